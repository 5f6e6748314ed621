//! One entry: what a program did to one row, as the triggers wrote it down.

use std::borrow::Cow;

use anabranch_proto::record;
use bytes::Bytes;
use rusqlite::{
    Row as SqlRow,
    types::{Value, ValueRef},
};

use super::super::{
    layout::Layout,
    table::{Storage, Table},
};

/// The values of a row, by place.
pub(in crate::file) type Row = Vec<Value>;

/// The values of a key, as a record: equal if the keys are.
pub(in crate::file) type Key = Bytes;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::file) enum Operation {
    Insert,
    Update,
    Delete,
}

impl Operation {
    /// As it is stored.
    pub(in crate::file) fn name(self) -> &'static str {
        match self {
            Operation::Insert => "insert",
            Operation::Update => "update",
            Operation::Delete => "delete",
        }
    }
}

/// Its values by place, in those of the layout that it was captured with or those of a table that it is shown in.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::file) struct Entry {
    pub id: i64,
    pub operation: Operation,
    /// Which columns changed.
    pub changed: Vec<bool>,
    pub old: Row,
    pub new: Row,
}

/// A value out of a row. Programs can store what is no UTF-8 as text. Postgres has no such value, and something like it would be
/// another one: so its bytes are kept, as a blob. The streamer refuses that in a column of text, and where it is shown it is
/// text again ([`as_stored`]).
pub(in crate::file) fn value(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(value) => Value::Integer(value),
        ValueRef::Real(value) => Value::Real(value),
        ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => Value::Blob(bytes.to_vec()),
        },
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    }
}

/// The same of a column of this storage. A whole float is an integer in a column of any type.
pub(in crate::file) fn stored(there: ValueRef<'_>, storage: Storage) -> Value {
    match (there, storage) {
        (ValueRef::Integer(whole), Storage::Real) => Value::Real(whole as f64),
        _ => value(there),
    }
}

/// The other way round: the value as it is in a column of this storage.
pub(in crate::file) fn as_stored(value: ValueRef<'_>, storage: Storage) -> ValueRef<'_> {
    match (value, storage) {
        (ValueRef::Blob(bytes), Storage::Text) => ValueRef::Text(bytes),
        (value, _) => value,
    }
}

/// A value for a record.
pub(in crate::file) fn in_record(value: &Value) -> record::ValueRef<'_> {
    match value {
        Value::Null => record::ValueRef::Null,
        Value::Integer(value) => record::ValueRef::Integer(*value),
        Value::Real(value) => record::ValueRef::Real(*value),
        Value::Text(value) => record::ValueRef::Text(value),
        Value::Blob(value) => record::ValueRef::Blob(value),
    }
}

pub(in crate::file) fn key_of(row: &[Value], places: &[usize]) -> Key {
    record::build(places.iter().map(|&place| in_record(&row[place])))
}

impl Entry {
    /// What [`Entry::read`] reads, from an entries table of this layout.
    pub(in crate::file) fn columns(layout: &Layout) -> String {
        let mut sql = String::from("id, operation, changed");
        for side in ['o', 'n'] {
            for place in 0..layout.columns.len() {
                sql.push_str(&format!(", {side}{place}"));
            }
        }
        sql
    }

    /// Reads one in the places of its layout.
    pub(in crate::file) fn read(row: &SqlRow<'_>, layout: &Layout) -> rusqlite::Result<Entry> {
        let width = layout.columns.len();
        let text = |i| -> rusqlite::Result<Cow<'_, str>> {
            Ok(match row.get_ref(i)? {
                ValueRef::Text(bytes) => String::from_utf8_lossy(bytes),
                _ => Cow::Borrowed(""),
            })
        };
        let values = |from: usize| -> rusqlite::Result<Row> {
            (from..from + width)
                .zip(&layout.columns)
                .map(|(i, field)| Ok(stored(row.get_ref(i)?, field.storage)))
                .collect()
        };
        let operation = match &*text(1)? {
            "insert" => Operation::Insert,
            "delete" => Operation::Delete,
            _ => Operation::Update,
        };
        let mut changed: Vec<bool> = text(2)?.bytes().map(|byte| byte == b'1').collect();
        changed.resize(width, false);
        Ok(Entry {
            id: row.get(0)?,
            operation,
            changed,
            old: values(3)?,
            new: values(3 + width)?,
        })
    }

    /// The same in other places.
    pub(in crate::file) fn placed(self, places: &[Option<usize>]) -> Entry {
        let move_row = |row: &Row| {
            let value = |place: &Option<usize>| place.map_or(Value::Null, |i| row[i].clone());
            places.iter().map(value).collect()
        };
        Entry {
            id: self.id,
            operation: self.operation,
            changed: places
                .iter()
                .map(|place| place.is_some_and(|i| self.changed[i]))
                .collect(),
            old: move_row(&self.old),
            new: move_row(&self.new),
        }
    }

    /// The key that it takes a row from.
    pub(in crate::file) fn old_key(&self, table: &Table) -> Option<Key> {
        (self.operation != Operation::Insert).then(|| key_of(&self.old, &table.key))
    }

    /// The key that it leaves a row at.
    pub(in crate::file) fn new_key(&self, table: &Table) -> Option<Key> {
        (self.operation != Operation::Delete).then(|| key_of(&self.new, &table.key))
    }
}
