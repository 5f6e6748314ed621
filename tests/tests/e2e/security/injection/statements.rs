//! What Postgres was asked to run, without what was in it: two statements of one shape differ by constants and names alone.

use std::collections::BTreeSet;

use anabranch_tests::postgres::Options;

/// Settings of a server whose log [`shapes`] reads.
pub fn logged() -> Options {
    Options::new()
        .set("log_statement", "all")
        .set("log_replication_commands", "on")
        .set("log_line_prefix", "<%a> ")
        // They are what may be anything.
        .set("log_parameter_max_length", "0")
        .set("log_parameter_max_length_on_error", "0")
}

/// The shapes of the statements of the streamer's sessions. A line of the log that goes on begins with a tab.
pub fn shapes(log: &str) -> BTreeSet<String> {
    let mut shapes = BTreeSet::new();
    for entry in log.replace("\n\t", "\u{0}").lines() {
        let Some((application, rest)) = entry
            .strip_prefix('<')
            .and_then(|rest| rest.split_once("> "))
        else {
            continue;
        };
        let Some(said) = rest
            .strip_prefix("LOG:  ")
            .filter(|_| application.starts_with("anabranch"))
        else {
            continue;
        };
        let sql = said
            .strip_prefix("statement: ")
            .or_else(|| said.strip_prefix("received replication command: "))
            .or_else(|| Some(said.strip_prefix("execute ")?.split_once(": ")?.1));
        if let Some(sql) = sql {
            shapes.insert(shape(&sql.replace('\u{0}', "\n")));
        }
    }
    shapes
}

/// A statement as Postgres' lexer cuts it, each constant and quoted name being one as good as another, and lists of them too.
pub fn shape(sql: &str) -> String {
    let mut shape = String::new();
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let word = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        let (kept, length) = match first {
            'e' | 'E' if rest[1..].starts_with('\'') => ("'?'", 1 + quoted(&rest[1..], true)),
            '\'' => ("'?'", quoted(rest, false)),
            '"' => ("\"?\"", quoted(rest, false)),
            '$' => match dollar(rest) {
                Some(length) => ("$$?$$", length),
                None => {
                    let digits = rest[1..].bytes().take_while(u8::is_ascii_digit);
                    ("$?", 1 + digits.count())
                }
            },
            '-' if rest.starts_with("--") => ("--", rest.find('\n').unwrap_or(rest.len())),
            '/' if rest.starts_with("/*") => {
                ("/**/", rest.find("*/").map_or(rest.len(), |at| at + 2))
            }
            '0'..='9' => {
                // An LSN too, which has a slash in it.
                let number =
                    rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '/');
                ("0", number.unwrap_or(rest.len()))
            }
            _ if word > 0 => (&rest[..word], word),
            _ if first.is_whitespace() => (
                " ",
                rest.find(|c: char| !c.is_whitespace())
                    .unwrap_or(rest.len()),
            ),
            _ => (&rest[..first.len_utf8()], first.len_utf8()),
        };
        shape.push_str(kept);
        rest = &rest[length..];
    }
    // Longer ones first, whose parts the others are.
    [
        "\"?\" = $?::pg_catalog.\"?\"",
        "$?::pg_catalog.\"?\"",
        "'?'::text",
        "ONLY \"?\".\"?\"",
        "\"?\".\"?\"",
        "\"?\"",
        "'?'",
    ]
    .iter()
    .fold(shape, |mut shape, item| {
        let two = format!("{item}, {item}");
        while shape.contains(&two) {
            shape = shape.replace(&two, item);
        }
        shape
    })
}

/// Bytes of what is quoted, with its quotes; to the end, if it has none.
fn quoted(text: &str, escapes: bool) -> usize {
    let bytes = text.as_bytes();
    let quote = bytes[0];
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if escapes => at += 2,
            byte if byte == quote && bytes.get(at + 1) == Some(&quote) => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Bytes of what is quoted by dollars.
fn dollar(text: &str) -> Option<usize> {
    let end = text[1..].find('$')? + 2;
    let tag = &text[..end];
    let inside = &tag[1..end - 1];
    let is_tag = !inside.starts_with(|c: char| c.is_ascii_digit())
        && inside.chars().all(|c| c.is_alphanumeric() || c == '_');
    let close = text[end..].find(tag).filter(|_| is_tag)?;
    Some(end + close + tag.len())
}

#[test]
fn a_statement_that_holds_another_has_the_shape_of_one() {
    let same = [
        (
            "SELECT 'a', 1 FROM \"t\"",
            "SELECT 'it''s; --', 77 FROM \"x\"\"; DROP\"",
        ),
        ("SELECT E'a'", "SELECT E'\\'; DROP TABLE t; --'"),
        ("SELECT $$a$$", "SELECT $x$ '; $$ $x$"),
        ("SELECT $1", "SELECT $12"),
        (
            "ADD TABLE \"a\".\"b\"",
            "ADD TABLE \"a\".\"b\", \"c\".\"d\", \"e\".\"f\"",
        ),
        ("SELECT 1 -- a", "SELECT 1 -- b"),
    ];
    for (one, other) in same {
        assert_eq!(shape(one), shape(other), "{one} {other}");
    }
    let different = [
        ("SELECT 'a'", "SELECT 'a'; DROP TABLE t; --'"),
        ("SELECT \"a\"", "SELECT \"a\", 1; --\""),
        ("SELECT 'a'", "SELECT 'a' OR 'b' = 'b'"),
        ("SELECT $$a$$", "SELECT $$a$$; $$"),
        ("SELECT 1", "SELECT 1 --"),
        ("SELECT 1", "SELECT a"),
    ];
    for (one, other) in different {
        assert_ne!(shape(one), shape(other), "{one} {other}");
    }
}
