//! `explain`: why a row is, or is not, in what a replica is shown, condition by condition.
//!
//! It reads the mirror by itself, in one snapshot, and asks the running streamer who the replica is (`connected` says why so). What
//! each part of a condition says is asked of the code that decides (`shape::Bound::explain`); what it comes to is asked once more
//! in the way of a catch-up (`TableView::contains`), and the two are compared.
//!
//! Values of the row are in the answer: it is for the operator who asked, on the machine where the mirror is, and nothing
//! of it is logged. Parameters are named, never shown.

use std::{fmt, sync::Arc};

use anabranch_proto::record::{self, ValueRef};
use serde::Serialize;
use serde_json::Value;

use crate::{
    catchup::View,
    connected::{self, Answer, Replica},
    lookup,
    mirror::{self, Entry, Key, Outside, State},
    policy::Policies,
    session::TableView,
    shape::{self, Explanation, INNER_COUNTED_MAX, Shape, Source},
    table::{Kind, Table},
};

/// Characters of a value that are shown.
const VALUE_CHARS_MAX: usize = 60;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Question {
    /// The replica's id.
    pub replica: String,
    /// The table: `name`, of schema public, or `schema.name`.
    pub table: String,
    /// The key: a value; for several columns `column=value` each; or one JSON array (in the key's order) or object.
    pub key: Vec<String>,
}

/// It can't be explained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The question is wrong.
    #[error("{0}")]
    Question(String),
    /// The mirror can't be read.
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    /// A row of it, or a lookup.
    #[error(transparent)]
    Lookup(#[from] lookup::Error),
    /// The shapes in force can't be read against the mirror's tables.
    #[error("the shapes in force don't fit the mirror: {0}")]
    Shapes(String),
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    /// `schema.name`.
    pub table: String,
    /// The key's columns and values, as text.
    pub key: Vec<(String, Option<String>)>,
    /// Where the mirror is: `epoch@lsn`.
    pub position: String,
    /// The state of the table in the mirror, for people, where it is not simply followed.
    pub table_state: Option<String>,
    /// The row's columns and values, as text; `None`: there is no such row.
    pub row: Option<Vec<(String, Option<String>)>>,
    /// The replica.
    pub replica: String,
    /// Whether it is connected. If it is not, its parameters are not known.
    pub connected: bool,
    /// The last position that it was sent: `epoch@lsn`.
    pub sent: Option<String>,
    /// The shapes that have the table: those that the replica subscribes to, or all if it is not connected.
    pub shapes: Vec<OfShape>,
    /// Whether the replica is shown the row; `None`: that can't be known.
    pub shown: Option<bool>,
    /// In one sentence.
    pub verdict: String,
}

/// What one shape says.
#[derive(Clone, Debug, Serialize)]
pub struct OfShape {
    /// Its name.
    pub shape: String,
    /// Its SELECT over the table, as in the config.
    pub select: String,
    /// What its condition says of the row; `None`: it was not asked.
    pub truth: Option<Truth>,
    /// The condition, part by part; `None`: it was not asked, or there is none.
    pub condition: Option<Part>,
}

/// A part of a condition.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// SQL, or AND, OR, NOT, IS ….
    pub part: String,
    /// What it says.
    pub truth: Truth,
    /// The values that it looks at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<(String, Option<String>)>,
    /// What it is made of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// Of a subquery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner: Option<Inner>,
}

/// The rows that a subquery finds for the row.
#[derive(Clone, Debug, Serialize)]
pub struct Inner {
    /// `schema.name`.
    pub table: String,
    /// How many are equal in what is compared; 1,000 stands for as many or more.
    pub rows: usize,
    /// How many of these meet the subquery's own condition.
    pub met: usize,
    /// Some of them.
    pub shown: Vec<InnerRow>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct InnerRow {
    /// Its key's columns and values.
    pub key: Vec<(String, Option<String>)>,
    /// What the subquery's condition says of it.
    pub condition: Option<Part>,
}

/// SQL's three truths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Truth {
    /// It is.
    True,
    /// It is not.
    False,
    /// NULL.
    Unknown,
}

impl From<Option<bool>> for Truth {
    fn from(truth: Option<bool>) -> Self {
        match truth {
            Some(true) => Truth::True,
            Some(false) => Truth::False,
            None => Truth::Unknown,
        }
    }
}

/// Explains. `answer` is the streamer's, with the replica if it is connected.
pub fn explain(
    outside: &mut Outside,
    answer: &Answer,
    question: &Question,
) -> Result<Explained, Error> {
    let position = outside.reader().begin()?;
    let explained = within(outside, answer, question, position.to_string());
    outside.reader().end();
    explained
}

/// Within a snapshot.
fn within(
    outside: &mut Outside,
    answer: &Answer,
    question: &Question,
    position: String,
) -> Result<Explained, Error> {
    let entries = outside.reader().entries()?;
    let entry = find(&entries, &question.table)?;
    let table = entry.table.clone();
    let key = key_of(&table, &question.key).map_err(Error::Question)?;
    let tables: Vec<_> = entries.iter().map(|entry| entry.table.clone()).collect();
    let shapes = shape::compile(&answer.shapes, &tables).map_err(|refused| {
        let reasons: Vec<_> = refused.iter().map(ToString::to_string).collect();
        Error::Shapes(reasons.join("; "))
    })?;
    let copying = entry.state == State::Copying;
    let row = match copying {
        true => None,
        false => outside.reader().row(table.oid, &key)?,
    };
    let values = |record: &[u8], columns: &mut dyn Iterator<Item = usize>| {
        let named = columns
            .zip(record::values(record)?)
            .map(|(column, value)| Ok((table.columns[column].name.clone(), text(value?))));
        named.collect::<Result<Vec<_>, record::Malformed>>()
    };
    let all = &mut (0..table.columns.len());
    let row_shown = match &row {
        Some(row) => Some(values(row, all).map_err(lookup::Error::from)?),
        None => None,
    };
    let replica = answer.replicas.last();
    let mut explained = Explained {
        table: table.full_name(),
        key: values(&key.record(), &mut table.key.iter().copied()).map_err(lookup::Error::from)?,
        position,
        table_state: state_of(entry),
        row: row_shown,
        replica: question.replica.clone(),
        connected: replica.is_some(),
        sent: replica.and_then(|replica| replica.sent.clone()),
        shapes: Vec::new(),
        shown: None,
        verdict: String::new(),
    };
    let Some(replica) = replica else {
        explained.shapes = having(&shapes, &answer.shapes, &table, None);
        explained.verdict = unconnected(&explained);
        return Ok(explained);
    };
    explained.shapes = having(&shapes, &answer.shapes, &table, Some(replica));
    if explained.shapes.is_empty() {
        explained.shown = Some(false);
        explained.verdict =
            "none of the shapes that the replica subscribes to has this table".into();
        return Ok(explained);
    }
    let Some(row) = row else {
        explained.shown = Some(false);
        explained.verdict = match copying {
            true => "the table is still being copied: no replica is shown a row of it yet".into(),
            false => "there is no row of this key, so there is nothing to show".into(),
        };
        return Ok(explained);
    };
    let bounds = connected::bind(&shapes, replica).map_err(|error| {
        Error::Shapes(format!("the replica could not connect with them: {error}"))
    })?;
    let of_table: Vec<_> = (bounds.into_iter())
        .filter(|(_, bound)| bound.select.table.oid == table.oid)
        .collect();
    let here = outside.here()?;
    for (shape, bound) in &of_table {
        let explanation = bound.explain(&row, &here)?;
        let said = explained.shapes.iter_mut().find(|of| of.shape == *shape);
        if let Some(said) = said {
            let truth = (explanation.as_ref()).map_or(Some(true), |explanation| explanation.truth);
            said.truth = Some(truth.into());
            said.condition = explanation.map(part).transpose()?;
        }
    }
    let views = TableView::of(&of_table, &Policies::default())
        .map_err(|error| Error::Shapes(error.to_string()))?;
    let mut shown = false;
    for view in &views {
        shown |= view.contains(&row, &here)?;
    }
    let is_true = |of: &OfShape| of.truth == Some(Truth::True);
    if shown != explained.shapes.iter().any(is_true) {
        return Err(Error::Mirror(mirror::Error::Misused(
            "the parts of a condition come to something else than the condition",
        )));
    }
    explained.shown = Some(shown);
    explained.verdict = verdict(&explained, entry, shown);
    Ok(explained)
}

fn find<'e>(entries: &'e [Entry], name: &str) -> Result<&'e Entry, Error> {
    let (schema, table) = name.split_once('.').unwrap_or(("public", name));
    let is_it = |entry: &&Entry| {
        (entry.table.schema == schema && entry.table.name == table)
            || entry.table.full_name() == name
    };
    entries.iter().find(is_it).ok_or_else(|| {
        Error::Question(format!(
            "{schema}.{table} is not in the mirror: no shape names it, or it is written otherwise (unquoted, in the case that \
             Postgres has)"
        ))
    })
}

fn state_of(entry: &Entry) -> Option<String> {
    match &entry.state {
        State::Live => None,
        State::Copying => Some("is being copied".into()),
        State::Stopped { lsn, reason } => Some(format!("is stopped since {lsn}: {reason}")),
    }
}

/// The SELECTs over the table.
fn having(
    shapes: &[Shape],
    sources: &[Source],
    table: &Arc<Table>,
    replica: Option<&Replica>,
) -> Vec<OfShape> {
    let subscribed = |name: &str| {
        replica.is_none_or(|replica| replica.subscriptions.iter().any(|of| of.shape == name))
    };
    let mut having = Vec::new();
    for (shape, source) in shapes.iter().zip(sources) {
        let place = (shape.selects.iter()).position(|select| select.table.oid == table.oid);
        if let Some(place) = place.filter(|_| subscribed(&shape.name)) {
            having.push(OfShape {
                shape: shape.name.clone(),
                select: source.tables.get(place).cloned().unwrap_or_default(),
                truth: None,
                condition: None,
            });
        }
    }
    having
}

fn unconnected(explained: &Explained) -> String {
    let row = match &explained.row {
        Some(_) => "The row is there",
        None => "There is no row of this key",
    };
    let shapes = match &explained.shapes[..] {
        [] => "no shape has this table, so no replica is shown a row of it".to_owned(),
        _ => "which of the shapes above it subscribes to, and with which parameters, only its connection tells".to_owned(),
    };
    format!("the replica is not connected. {row}; {shapes}")
}

fn verdict(explained: &Explained, entry: &Entry, shown: bool) -> String {
    let mut verdict = match shown {
        true => "the replica is shown the row".to_owned(),
        false => "the replica is not shown the row".to_owned(),
    };
    if entry.state != State::Live {
        verdict.push_str(", as it was when the table was stopped");
    }
    match &explained.sent {
        Some(sent) if *sent == explained.position => {}
        Some(sent) => verdict.push_str(&format!(
            "; what it was sent last is as of {sent}, and it may lack what changed since"
        )),
        None => verdict.push_str("; it has been sent no complete transaction yet"),
    }
    verdict
}

fn part(explanation: Explanation) -> Result<Part, lookup::Error> {
    let inner = match explanation.inner {
        None => None,
        Some(inner) => {
            let mut shown = Vec::with_capacity(inner.rows.len());
            for row in inner.rows {
                let mut key = Vec::with_capacity(inner.table.key.len());
                for (column, value) in inner.table.key.iter().zip(record::values(&row.key)?) {
                    key.push((inner.table.columns[*column].name.clone(), text(value?)));
                }
                let condition = row.condition.map(part).transpose()?;
                shown.push(InnerRow { key, condition });
            }
            Some(Inner {
                table: inner.table.full_name(),
                rows: inner.count,
                met: inner.met,
                shown,
            })
        }
    };
    let parts: Result<_, _> = explanation.parts.into_iter().map(part).collect();
    Ok(Part {
        part: explanation.part,
        truth: explanation.truth.into(),
        values: explanation.values,
        parts: parts?,
        inner,
    })
}

/// A value as it is shown, and as it is written for a key; `None`: NULL.
pub(crate) fn text(value: ValueRef<'_>) -> Option<String> {
    Some(match value {
        ValueRef::Null => return None,
        ValueRef::Integer(value) => value.to_string(),
        ValueRef::Real(value) => value.to_string(),
        ValueRef::Text(text) => text.to_owned(),
        ValueRef::Blob(bytes) => {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("\\x{digits}")
        }
    })
}

/// The key that is asked for.
fn key_of(table: &Table, words: &[String]) -> Result<Key, String> {
    let names: Vec<&str> = (table.key.iter())
        .map(|column| table.columns[*column].name.as_str())
        .collect();
    let form = || {
        let form = match &names[..] {
            [_] => "--key VALUE".to_owned(),
            names => {
                let each: Vec<_> = names
                    .iter()
                    .map(|name| format!("--key {name}=VALUE"))
                    .collect();
                each.join(" ")
            }
        };
        format!(
            "the key of {} is ({}): write {form}, or --key '{}' with JSON values",
            table.full_name(),
            names.join(", "),
            Value::from(names.clone())
        )
    };
    let scalar = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    };
    let json = match words {
        [word] if word.starts_with(['[', '{']) => serde_json::from_str(word).ok(),
        _ => None,
    };
    let texts: Option<Vec<String>> = match (json, words) {
        (Some(Value::Array(values)), _) if values.len() == names.len() => {
            values.iter().map(scalar).collect()
        }
        (Some(Value::Object(values)), _) if values.len() == names.len() => names
            .iter()
            .map(|name| values.get(*name).and_then(scalar))
            .collect(),
        (Some(_), _) => None,
        (None, [word]) if names.len() == 1 => {
            let of_name = word.strip_prefix(&format!("{}=", names[0]));
            Some(vec![of_name.unwrap_or(word).to_owned()])
        }
        (None, words) if words.len() == names.len() => names
            .iter()
            .map(|name| {
                let prefix = format!("{name}=");
                let mut of_name = words.iter().filter_map(|word| word.strip_prefix(&prefix));
                of_name.next().map(str::to_owned)
            })
            .collect(),
        _ => None,
    };
    let texts = texts.ok_or_else(form)?;
    let mut builder = record::Builder::new();
    for (column, text) in table.key.iter().zip(&texts) {
        let column = &table.columns[*column];
        let wrong = |what: &str| format!("{} of the key must be {what}", column.name);
        match &column.kind {
            Kind::Integer => {
                let value: i64 = text.trim().parse().map_err(|_| wrong("a whole number"))?;
                if table.key.len() == 1 {
                    return Ok(Key::Integer(value));
                }
                builder.push_integer(value);
            }
            Kind::Bool => builder.push_integer(match text.as_str() {
                "t" | "true" | "1" => 1,
                "f" | "false" | "0" => 0,
                _ => return Err(wrong("true or false")),
            }),
            Kind::Bytea => {
                let bytes = hex(text).ok_or_else(|| wrong("in hex, such as \\x00ff"))?;
                builder.push_blob(&bytes);
            }
            Kind::Uuid => builder.push_text(&text.to_ascii_lowercase()),
            _ => builder.push_text(text),
        }
    }
    Ok(Key::Record(builder.finish()))
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("\\x")?;
    let is_even = digits.len().is_multiple_of(2) && digits.is_ascii();
    let pair = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
    is_even.then(|| (0..digits.len()).step_by(2).map(pair).collect())?
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Truth::True => "true",
            Truth::False => "false",
            Truth::Unknown => "unknown",
        })
    }
}

/// `a = 1, b = x`, each value shortened.
fn named(values: &[(String, Option<String>)], equals: &str) -> String {
    let one = |(name, value): &(String, Option<String>)| {
        let Some(value) = value else {
            return format!("{name}{equals}NULL");
        };
        let mut short: String = (value.chars().take(VALUE_CHARS_MAX))
            .map(|c| if c.is_control() { '\u{fffd}' } else { c })
            .collect();
        if short.len() < value.len() && value.chars().count() > VALUE_CHARS_MAX {
            short.push('…');
        }
        format!("{name}{equals}{short}")
    };
    values.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A tree for people.
impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = named(&self.key, " = ");
        writeln!(f, "{} ({key}) as of {}", self.table, self.position)?;
        if let Some(state) = &self.table_state {
            writeln!(f, "the table {state}")?;
        }
        match &self.row {
            Some(row) => writeln!(f, "the row: {}", named(row, " = "))?,
            None => writeln!(f, "there is no such row in the mirror")?,
        }
        for of in &self.shapes {
            writeln!(f, "\nshape {}: {}", of.shape, of.select)?;
            match (&of.truth, &of.condition) {
                (Some(_), Some(condition)) => write_part(f, condition, 1)?,
                (Some(truth), None) => writeln!(f, "  {truth:8}all rows")?,
                (None, _) => {}
            }
        }
        writeln!(f, "\nreplica {}: {}", self.replica, self.verdict)
    }
}

fn write_part(f: &mut fmt::Formatter<'_>, part: &Part, depth: usize) -> fmt::Result {
    let indent = "  ".repeat(depth);
    write!(f, "{indent}{:8}{}", part.truth, part.part)?;
    if !part.values.is_empty() {
        write!(f, "   [{}]", named(&part.values, " is "))?;
    }
    writeln!(f)?;
    for of in &part.parts {
        write_part(f, of, depth + 1)?;
    }
    let Some(inner) = &part.inner else {
        return Ok(());
    };
    let many = match inner.rows {
        INNER_COUNTED_MAX => "or more ",
        _ => "",
    };
    let met = match inner.shown.iter().any(|row| row.condition.is_some()) {
        true => format!(", {} of them meet its condition", inner.met),
        false => String::new(),
    };
    writeln!(
        f,
        "{indent}  {} {many}rows of {} go with it{met}",
        inner.rows, inner.table
    )?;
    for row in &inner.shown {
        writeln!(f, "{indent}    ({})", named(&row.key, " = "))?;
        if let Some(condition) = &row.condition {
            write_part(f, condition, depth + 3)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Collation, Column, Identity};

    fn table(key: &[(&str, Kind)]) -> Table {
        let column = |(name, kind): &(&str, Kind)| Column {
            name: (*name).into(),
            attnum: 1,
            type_oid: 25,
            base_oid: 25,
            typmod: -1,
            postgres_type: "text".into(),
            kind: kind.clone(),
            not_null: true,
            collation: Collation::Bytes,
        };
        Table {
            oid: 1,
            schema: "public".into(),
            name: "t".into(),
            columns: key.iter().map(column).collect(),
            key: (0..key.len()).collect(),
            identity: Identity::Key,
            indexes: Vec::new(),
            version: 1,
        }
    }

    fn key(table: &Table, words: &[&str]) -> Result<Key, String> {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        key_of(table, &words)
    }

    #[test]
    fn a_key_is_read_in_each_form_and_told_how_to_be_written() {
        let one = table(&[("id", Kind::Integer)]);
        for words in ["17", "id=17", "[17]", "{\"id\": 17}", "[\"17\"]"] {
            assert_eq!(key(&one, &[words]), Ok(Key::Integer(17)), "{words}");
        }
        for words in [&["x"][..], &["1", "2"], &["[1,2]"], &["{\"no\": 1}"], &[]] {
            let error = key(&one, words).unwrap_err();
            assert!(error.contains("id"), "{error}");
        }
        let two = table(&[("a", Kind::Text), ("b", Kind::Integer)]);
        let expected = Key::Record(record::build([
            ValueRef::Text("x=y"),
            ValueRef::Integer(-3),
        ]));
        for words in [
            &["a=x=y", "b=-3"][..],
            &["b=-3", "a=x=y"],
            &["[\"x=y\", -3]"],
            &["{\"b\": -3, \"a\": \"x=y\"}"],
        ] {
            assert_eq!(key(&two, words).as_ref(), Ok(&expected), "{words:?}");
        }
        let error = key(&two, &["x=y"]).unwrap_err();
        assert!(error.contains("--key a=VALUE --key b=VALUE"), "{error}");
        let bytes = table(&[("b", Kind::Bytea)]);
        let expected = Key::Record(record::build([ValueRef::Blob(&[0, 255])]));
        assert_eq!(key(&bytes, &["\\x00FF"]), Ok(expected));
        assert!(key(&bytes, &["\\x0"]).is_err());
        assert!(key(&bytes, &["\\xé"]).is_err());
        let uuid = table(&[("u", Kind::Uuid)]);
        let expected = Key::Record(record::build([ValueRef::Text("ab")]));
        assert_eq!(key(&uuid, &["AB"]), Ok(expected));
    }

    #[test]
    fn a_long_value_is_cut_and_none_can_write_to_the_terminal() {
        let long = "ä".repeat(VALUE_CHARS_MAX + 1);
        let cut = named(&[("a".into(), Some(long))], " is ");
        assert_eq!(cut.chars().count(), "a is ".len() + VALUE_CHARS_MAX + 1);
        assert!(cut.ends_with('…'));
        let escape = named(&[("a".into(), Some("\u{1b}[2J".into()))], "=");
        assert!(!escape.contains('\u{1b}'), "{escape}");
        assert_eq!(named(&[("a".into(), None)], " is "), "a is NULL");
    }
}
