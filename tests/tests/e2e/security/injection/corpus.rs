//! Texts that mean something to whoever takes them for more than texts.

use std::collections::HashSet;

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

/// The longest that has room in an index of Postgres.
const BYTES_MAX: usize = 2_000;

/// What has been tried elsewhere, as it was.
const CLASSICS: &[&str] = &[
    "'",
    "''",
    "\"",
    "\"\"",
    "`",
    "\\",
    "\\'",
    "\\\"; --",
    "' OR '1'='1",
    "' OR 1=1 --",
    "1; DROP TABLE v; --",
    "'; DROP TABLE v CASCADE; --",
    "\"; DROP TABLE v; --",
    "'); DELETE FROM w; --",
    "' UNION SELECT token_key::text FROM anabranch.source --",
    "x' AND 1=(SELECT 1 FROM pg_sleep(10)) --",
    "'||pg_sleep(10)||'",
    "'; COPY v TO PROGRAM 'id'; --",
    "$$; DROP TABLE v; $$",
    "$tag$ ' $tag$",
    "$1",
    "$1::text",
    "$team",
    "${jndi:ldap://127.0.0.1/x}",
    "{{7*7}}",
    "#{7*7}",
    "%s%s%s%n",
    "%1$s",
    "{}",
    "{0}",
    "{\"a\": 1}",
    "[]",
    "[\"a\"]",
    "{a,b,NULL}",
    "(a,b)",
    "\\x00",
    "\\000",
    "\\u0027",
    "%27%20OR%201=1",
    "E'\\047'",
    "U&'\\0027'",
    "x'27'",
    "b'1'",
    "NULL",
    "null",
    "DEFAULT",
    "true",
    "0",
    "-1",
    "1e400",
    "NaN",
    "infinity",
    "/*",
    "*/",
    "/* /* */",
    "--",
    "--\n",
    ";",
    ";;",
    "\n",
    "\r\n",
    "\t",
    "\u{1}",
    "\u{7f}",
    "\u{1b}[2J",
    "\u{8}",
    " ",
    "",
    "a b",
    "a  ",
    "\u{a0}",
    "\u{feff}",
    "\u{200b}",
    "\u{202e}txet",
    "\u{2019}",
    "\u{ff07}",
    "\u{2bc}",
    "\u{fffd}",
    "\u{10ffff}",
    "e\u{301}",
    "\u{1f600}",
    "ſelect",
    "İ",
    "../../../etc/passwd",
    "/dev/null",
    "..\\..\\x",
    "C:\\",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "?",
    "?1",
    ":name",
    "@name",
    "#",
    "sqlite_master",
    "sqlite_",
    "_anabranch_state",
    "anabranch.source",
    "pg_catalog.pg_authid",
    "main.v",
    "temp.v",
    "v",
    "w",
    "rowid",
    "[v]",
    "\"v\"",
    "ATTACH DATABASE '/tmp/x' AS x; --",
    "'; PRAGMA writable_schema = on; --",
    "load_extension('x')",
    "<script>alert(1)</script>",
    "a,b",
    "a=b",
    "a\tb\\N",
    "\\.",
    "\\N",
    "\\copy",
    "COMMIT",
    "ROLLBACK; DROP TABLE v",
    "SET ROLE postgres",
    "RESET ROLE; --",
];

/// What others are made of.
const PIECES: &[&str] = &[
    "'",
    "''",
    "\"",
    "\"\"",
    "\\",
    "\\'",
    "`",
    "$$",
    "$a$",
    "$1",
    "$2::text",
    "--",
    "/*",
    "*/",
    ";",
    ")",
    "(",
    "(((",
    "}",
    "{",
    "[",
    "]",
    ",",
    ".",
    "..",
    "/",
    "%",
    "%s",
    "%27",
    "_",
    "||",
    "::",
    "::text",
    "=",
    "<>",
    "@",
    "#",
    "&",
    "|",
    "^",
    "~",
    "!",
    "?",
    "?1",
    ":a",
    "*",
    "+",
    "-",
    "0",
    "7",
    "1e9",
    " ",
    "  ",
    "\n",
    "\r",
    "\t",
    "\u{1}",
    "\u{1f}",
    "\u{7f}",
    "\u{80}",
    "\u{a0}",
    "\u{301}",
    "\u{2019}",
    "\u{2028}",
    "\u{202e}",
    "\u{feff}",
    "\u{ff07}",
    "\u{fffe}",
    "\u{1f600}",
    "\u{10ffff}",
    "ß",
    "İ",
    "ſ",
    "Ω",
    "SELECT",
    "select",
    "UNION ALL SELECT",
    "DROP TABLE v",
    "DELETE FROM w",
    "INSERT INTO w VALUES",
    "UPDATE",
    "COPY",
    "FROM",
    "WHERE",
    "OR",
    "AND",
    "NOT",
    "NULL",
    "IS",
    "TRUE",
    "RETURNING",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SET",
    "RESET",
    "E'",
    "U&'",
    "x'",
    "N'",
    "U&\"",
    "UESCAPE",
    "pg_sleep(9)",
    "pg_catalog.",
    "public.",
    "anabranch.",
    "_anabranch_",
    "sqlite_",
    "main.",
    "rowid",
    "xmin",
    "oid",
    "a",
    "b",
    "id",
    "t",
    "\\x",
    "\\u0000",
    "\\N",
    "\\.",
];

/// Makes texts, each once.
pub struct Corpus {
    rng: StdRng,
    /// Folded as SQLite folds names.
    made: HashSet<String>,
    classics: std::slice::Iter<'static, &'static str>,
}

impl Corpus {
    pub fn new(rng: StdRng) -> Corpus {
        Corpus {
            rng,
            made: HashSet::new(),
            classics: CLASSICS.iter(),
        }
    }

    /// Texts that Postgres can hold: without NUL. The classics first.
    pub fn texts(&mut self, count: usize) -> Vec<String> {
        let mut texts = Vec::with_capacity(count);
        while texts.len() < count {
            let text = match self.classics.next() {
                Some(text) => (*text).to_owned(),
                None => self.text(),
            };
            if text.len() <= BYTES_MAX && self.made.insert(text.to_ascii_lowercase()) {
                texts.push(text);
            }
        }
        texts
    }

    /// Texts of at most so many bytes.
    pub fn short(&mut self, count: usize, bytes_max: usize) -> Vec<String> {
        let mut short = Vec::with_capacity(count);
        while short.len() < count {
            let more = self.texts(count - short.len());
            short.extend(more.into_iter().filter(|text| text.len() <= bytes_max));
        }
        short
    }

    /// Names of tables and columns: of 63 bytes, not empty, and none that is SQLite's or ours.
    pub fn names(&mut self, count: usize) -> Vec<String> {
        let is_free = |name: &String| {
            let folded = name.to_ascii_lowercase();
            !name.is_empty() && !folded.starts_with("sqlite_") && !folded.starts_with("_anabranch_")
        };
        let mut names = Vec::with_capacity(count);
        while names.len() < count {
            let more = self.short(count - names.len(), 63);
            names.extend(more.into_iter().filter(is_free));
        }
        names
    }

    fn text(&mut self) -> String {
        let count = match self.rng.random_range(0..100) {
            0 => self.rng.random_range(100..400),
            1..10 => self.rng.random_range(8..30),
            _ => self.rng.random_range(2..8),
        };
        let pieces = (0..count).map(|_| *PIECES.choose(&mut self.rng).expect("there are some"));
        pieces.collect()
    }
}

/// As many that mean nothing.
pub fn harmless(count: usize, from: usize) -> Vec<String> {
    (from..from + count).map(|i| format!("plain{i}")).collect()
}
