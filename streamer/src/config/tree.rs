//! The config's TOML as a tree in which every value knows where it is from, so that each complaint can name a place.
//!
//! Serde would stop at the first error and forget places once the environment is laid over the file; this reads by
//! hand, and goes on after an error to find the others. It knows nothing of what the keys mean.

use std::{cell::RefCell, collections::BTreeMap, ops::Range};

use toml::de::{DeTable, DeValue};

/// All environment variables of ours begin so.
const PREFIX: &str = "ANABRANCH_";

/// Variables that begin like ours and are not keys of the config: those of the command line, the logs and the tests.
const OTHER_VARIABLES: [&str; 6] = ["CONFIG", "LOG", "TEST", "DEMO", "BENCH", "FAILPOINT"];

/// Where a value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Bytes of the file.
    File(Range<usize>),
    /// This environment variable.
    Variable(String),
}

/// A value and where it is from.
#[derive(Clone, Debug)]
pub struct Node {
    pub origin: Origin,
    pub value: Value,
}

/// A value of TOML.
#[derive(Clone, Debug)]
pub enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    /// A date or a time, as it is written.
    Time(String),
    List(Vec<Node>),
    Table(BTreeMap<String, Entry>),
    /// From the environment: text where text is wanted, else TOML.
    Variable(String),
}

/// A value and its key.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: Origin,
    pub node: Node,
}

/// What is wrong, where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    pub origin: Origin,
    /// Dotted path; empty where TOML itself is broken.
    pub field: String,
    pub message: String,
}

/// Collects complaints.
#[derive(Debug, Default)]
pub struct Complaints(RefCell<Vec<Complaint>>);

impl Complaints {
    pub fn add(&self, origin: &Origin, field: &str, message: impl Into<String>) {
        self.0.borrow_mut().push(Complaint {
            origin: origin.clone(),
            field: field.into(),
            message: message.into(),
        });
    }

    pub fn into_inner(self) -> Vec<Complaint> {
        self.0.into_inner()
    }
}

/// Reads TOML; says everything that is wrong with its syntax. Never shows the text itself, which may hold secrets.
pub fn parse(text: &str, complaints: &Complaints) -> Node {
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let at = error.span().unwrap_or(0..0);
        complaints.add(&Origin::File(at), "", error.message());
    }
    let at = root.span();
    Node {
        origin: Origin::File(at),
        value: table(root.into_inner(), None, complaints),
    }
}

fn table(from: DeTable<'_>, variable: Option<&Origin>, complaints: &Complaints) -> Value {
    let place = |span: Range<usize>| variable.cloned().unwrap_or(Origin::File(span));
    Value::Table(
        from.into_iter()
            .map(|(key, value)| {
                let origin = place(value.span());
                let entry = Entry {
                    key: place(key.span()),
                    node: node(value.into_inner(), origin, variable, complaints),
                };
                (key.into_inner().into_owned(), entry)
            })
            .collect(),
    )
}

fn node(
    from: DeValue<'_>,
    origin: Origin,
    variable: Option<&Origin>,
    complaints: &Complaints,
) -> Node {
    let value = match from {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => {
            match i64::from_str_radix(&number.as_str().replace('_', ""), number.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => {
                    complaints.add(&origin, "", "an integer beyond 64 bits");
                    Value::Integer(0)
                }
            }
        }
        DeValue::Float(number) => {
            Value::Float(number.as_str().replace('_', "").parse().unwrap_or(f64::NAN))
        }
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(time) => Value::Time(time.to_string()),
        DeValue::Array(list) => Value::List(
            list.into_iter()
                .map(|item| {
                    let origin = variable.cloned().unwrap_or(Origin::File(item.span()));
                    node(item.into_inner(), origin, variable, complaints)
                })
                .collect(),
        ),
        DeValue::Table(entries) => table(entries, variable, complaints),
    };
    Node { origin, value }
}

/// Lays environment variables over the tree: `ANABRANCH_` + the key in capitals, `__` between levels. A key that is
/// there is found whatever its case. Returns the names of variables that begin like ours but name no key of `roots`.
pub fn overlay(
    root: &mut Node,
    variables: impl IntoIterator<Item = (String, String)>,
    roots: &[&str],
    complaints: &Complaints,
) -> Vec<String> {
    let mut ours: Vec<_> = variables
        .into_iter()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    // A table comes before its keys, which are laid over it.
    ours.sort();
    let mut unknown = Vec::new();
    for (name, text) in ours {
        let path: Vec<String> = name[PREFIX.len()..]
            .split("__")
            .map(str::to_ascii_lowercase)
            .collect();
        if !roots.contains(&path[0].as_str()) {
            let other = OTHER_VARIABLES.iter().any(|other| {
                let rest = name[PREFIX.len()..].strip_prefix(other);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
            });
            if !other {
                unknown.push(name);
            }
            continue;
        }
        let origin = Origin::Variable(name);
        let mut at = &mut *root;
        for part in &path {
            if matches!(at.value, Value::Variable(_)) {
                *at = resolve(at.clone(), complaints);
            }
            if !matches!(at.value, Value::Table(_)) {
                *at = Node {
                    origin: origin.clone(),
                    value: Value::Table(BTreeMap::new()),
                };
            }
            let Value::Table(entries) = &mut at.value else {
                unreachable!("it was just made a table");
            };
            let key = entries
                .keys()
                .find(|key| key.eq_ignore_ascii_case(part))
                .unwrap_or(part)
                .clone();
            at = &mut entries
                .entry(key)
                .or_insert_with(|| Entry {
                    key: origin.clone(),
                    node: Node {
                        origin: origin.clone(),
                        value: Value::Table(BTreeMap::new()),
                    },
                })
                .node;
        }
        *at = Node {
            origin,
            value: Value::Variable(text),
        };
    }
    unknown
}

/// Where a dotted path is written, or else the innermost of what should hold it.
pub fn origin_of(root: &Node, field: &str) -> Origin {
    let mut at = root;
    for part in field.split('.') {
        match &at.value {
            Value::Table(entries) if entries.contains_key(part) => at = &entries[part].node,
            _ => break,
        }
    }
    at.origin.clone()
}

/// Reads a variable's text as TOML.
fn resolve(from: Node, complaints: &Complaints) -> Node {
    let Value::Variable(text) = &from.value else {
        return from;
    };
    match DeValue::parse(text) {
        Ok(value) => node(
            value.into_inner(),
            from.origin.clone(),
            Some(&from.origin),
            complaints,
        ),
        // Not TOML: left as it is, and whoever reads it says what it should be.
        Err(_) => from,
    }
}

/// One table of the tree while it is read: every key must be asked for.
pub struct Section<'c> {
    pub path: String,
    pub origin: Origin,
    entries: BTreeMap<String, Entry>,
    known: Vec<&'static str>,
    complaints: &'c Complaints,
}

/// A text and where it is from.
#[derive(Clone, Debug)]
pub struct Text {
    pub text: String,
    pub origin: Origin,
}

impl<'c> Section<'c> {
    /// Starts to read a node that must be a table.
    pub fn new(path: &str, from: Node, complaints: &'c Complaints) -> Option<Self> {
        let from = resolve(from, complaints);
        let Value::Table(entries) = from.value else {
            complaints.add(&from.origin, path, "must be a table");
            return None;
        };
        Some(Section {
            path: path.into(),
            origin: from.origin,
            entries,
            known: Vec::new(),
            complaints,
        })
    }

    /// The path of one of its keys.
    pub fn field(&self, key: &str) -> String {
        match &*self.path {
            "" => key.into(),
            path => format!("{path}.{key}"),
        }
    }

    /// Complains of one of its values.
    pub fn complain(&self, origin: &Origin, key: &str, message: impl Into<String>) {
        self.complaints.add(origin, &self.field(key), message);
    }

    /// Whether a key is there.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Takes a value as it is.
    pub fn take(&mut self, key: &'static str) -> Option<Node> {
        self.known.push(key);
        self.entries.remove(key).map(|entry| entry.node)
    }

    /// Takes a text.
    pub fn text(&mut self, key: &'static str) -> Option<Text> {
        let node = self.take(key)?;
        let field = self.field(key);
        text(node, &field, self.complaints)
    }

    /// Takes an integer that is not negative.
    pub fn number(&mut self, key: &'static str, example: &str) -> Option<(u64, Origin)> {
        let node = resolve(self.take(key)?, self.complaints);
        match node.value {
            Value::Integer(number) if number >= 0 => Some((number.unsigned_abs(), node.origin)),
            _ => {
                self.complain(&node.origin, key, format!("must be {example}"));
                None
            }
        }
    }

    /// Takes true or false.
    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        let node = resolve(self.take(key)?, self.complaints);
        match node.value {
            Value::Bool(flag) => Some(flag),
            _ => {
                self.complain(&node.origin, key, "must be true or false");
                None
            }
        }
    }

    /// Takes a number of bytes: `"256MiB"`, or an integer.
    pub fn bytes(&mut self, key: &'static str) -> Option<(u64, Origin)> {
        let node = self.take(key)?;
        let bytes = match &node.value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::Text(text) | Value::Variable(text) => bytes(text),
            _ => None,
        };
        if bytes.is_none() {
            let message = "must be a size such as \"256MiB\" (KiB, MiB, GiB, TiB; not kB, MB, GB), or a number of bytes";
            self.complain(&node.origin, key, message);
        }
        Some((bytes?, node.origin))
    }

    /// Takes a list.
    pub fn list(&mut self, key: &'static str) -> Option<Vec<Node>> {
        let node = resolve(self.take(key)?, self.complaints);
        match node.value {
            Value::List(items) => Some(items),
            _ => {
                self.complain(&node.origin, key, "must be a list: [ … ]");
                None
            }
        }
    }

    /// Takes a table.
    pub fn section(&mut self, key: &'static str) -> Option<Section<'c>> {
        let node = self.take(key)?;
        Section::new(&self.field(key), node, self.complaints)
    }

    /// Takes everything that is left: for tables whose keys are names.
    pub fn rest(&mut self) -> BTreeMap<String, Entry> {
        std::mem::take(&mut self.entries)
    }

    /// Complains of the keys that nobody asked for.
    pub fn finish(self) {
        for (key, entry) in &self.entries {
            let message = match &self.known[..] {
                [] => "unknown key: none is expected here".to_owned(),
                known => format!("unknown key; known here: {}", known.join(", ")),
            };
            self.complain(&entry.key, key, message);
        }
    }
}

/// A node that must be text.
pub fn text(from: Node, field: &str, complaints: &Complaints) -> Option<Text> {
    match from.value {
        Value::Text(text) | Value::Variable(text) => Some(Text {
            text,
            origin: from.origin,
        }),
        _ => {
            complaints.add(&from.origin, field, "must be a text: \"…\"");
            None
        }
    }
}

/// A value as JSON. Dates and times become text; a float must be finite.
pub fn json(from: Node, field: &str, complaints: &Complaints) -> Option<serde_json::Value> {
    let from = resolve(from, complaints);
    Some(match from.value {
        Value::Text(text) | Value::Time(text) | Value::Variable(text) => text.into(),
        Value::Integer(number) => number.into(),
        Value::Bool(value) => value.into(),
        Value::Float(number) => match serde_json::Number::from_f64(number) {
            Some(number) => serde_json::Value::Number(number),
            None => {
                complaints.add(&from.origin, field, "must be a finite number");
                return None;
            }
        },
        Value::List(items) => items
            .into_iter()
            .map(|item| json(item, field, complaints))
            .collect::<Option<Vec<_>>>()?
            .into(),
        Value::Table(entries) => entries
            .into_iter()
            .map(|(key, entry)| {
                let field = format!("{field}.{key}");
                Some((key, json(entry.node, &field, complaints)?))
            })
            .collect::<Option<serde_json::Map<_, _>>>()?
            .into(),
    })
}

fn bytes(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Line and column, from 1, of a byte of `text`. Columns count characters.
pub fn line_and_column(text: &str, at: usize) -> (u64, u64) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    (line as u64, column as u64)
}

/// Where in a TOML string `literal`, quotes included, a byte of its value is written.
pub fn place_in_literal(literal: &str, value_at: usize) -> usize {
    let (quotes, escapes) = match literal.as_bytes() {
        [b'"', b'"', b'"', ..] => (3, true),
        [b'\'', b'\'', b'\'', ..] => (3, false),
        [b'"', ..] => (1, true),
        _ => (1, false),
    };
    let mut at = quotes;
    if quotes == 3 {
        // A line break right after the opening quotes is not part of the value.
        let rest = &literal[at.min(literal.len())..];
        at += if rest.starts_with("\r\n") {
            2
        } else {
            usize::from(rest.starts_with('\n'))
        };
    }
    let mut value = 0;
    while value < value_at && at < literal.len() {
        let rest = &literal[at..];
        let (written, meant) = match rest.chars().next() {
            Some('\\') if escapes => escape(rest),
            Some(char) => (char.len_utf8(), char.len_utf8()),
            None => break,
        };
        at += written;
        value += meant;
    }
    at.min(literal.len())
}

/// How many bytes the escape at the start of `rest` takes, and how many it stands for.
fn escape(rest: &str) -> (usize, usize) {
    let digits = match rest.as_bytes().get(1) {
        Some(b'x') => 2,
        Some(b'u') => 4,
        Some(b'U') => 8,
        Some(b' ' | b'\t' | b'\r' | b'\n') => {
            let blank = rest[1..].len() - rest[1..].trim_start().len();
            return (1 + blank, 0);
        }
        _ => return (2.min(rest.len()), 1),
    };
    let meant = rest
        .get(2..2 + digits)
        .and_then(|hex| u32::from_str_radix(hex, 16).ok())
        .and_then(char::from_u32)
        .map_or(1, char::len_utf8);
    ((2 + digits).min(rest.len()), meant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_by_their_unit_and_never_guessed() {
        for (text, expected) in [
            ("256MiB", Some(256 << 20)),
            ("1 GiB", Some(1 << 30)),
            ("4096", Some(4096)),
            ("256MB", None),
            ("256", Some(256)),
            ("MiB", None),
            ("-1MiB", None),
            ("1.5GiB", None),
            ("99999999999TiB", None),
            ("", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }

    #[test]
    fn a_place_in_a_string_is_found_whatever_its_quotes_and_escapes() {
        for literal in [
            r#""SELECT x WHERE""#,
            r#"'SELECT x WHERE'"#,
            "'''SELECT x WHERE'''",
            "\"\"\"\nSELECT x WHERE\"\"\"",
            "\"\"\"\r\nSELECT x WHERE\"\"\"",
            r#""\u0053ELECT\tx WHERE""#,
            "\"\"\"SELECT \\\n     x WHERE\"\"\"",
            r#""\U0001F600\xE9SEL é WHERE""#,
        ] {
            let Value::Table(mut entries) =
                parse(&format!("k = {literal}"), &Complaints::default()).value
            else {
                panic!("not a table");
            };
            let Value::Text(value) = entries.remove("k").expect("k").node.value else {
                panic!("not a text: {literal}");
            };
            let at = place_in_literal(literal, value.find("WHERE").expect("WHERE"));
            assert!(literal[at..].starts_with("WHERE"), "{literal} at {at}");
        }
    }

    #[test]
    fn lines_and_columns_count_characters_from_one() {
        let text = "a\néé = x\n";
        assert_eq!(line_and_column(text, 0), (1, 1));
        assert_eq!(line_and_column(text, text.find('x').expect("x")), (2, 6));
        assert_eq!(line_and_column(text, 1000), (3, 1));
    }
}
