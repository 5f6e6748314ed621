//! The rows to show: what Postgres has, with what is pending put on top, in the order in which it was done.
//!
//! No I/O: rows and entries in, rows out.

use std::collections::HashMap;

use rusqlite::types::Value;

use super::{
    super::table::{Column, Conflict, Storage, Table},
    entry::{Entry, Key, Operation, Row},
    number,
};

/// Puts entries on top of rows. `rows` has every key that an entry names; `None` is the absence of a row.
pub(super) fn compose<'e>(
    table: &Table,
    rows: &mut HashMap<Key, Option<Row>>,
    entries: impl IntoIterator<Item = &'e Entry>,
) {
    for entry in entries {
        let row = match entry.operation {
            Operation::Insert => Some(entry.new.clone()),
            Operation::Delete => None,
            Operation::Update => entry
                .old_key(table)
                .and_then(|old| rows.get(&old).cloned().flatten())
                .map(|row| update(table, row, entry)),
        };
        // An update of a row that is not there, since its insert was rejected or Postgres deleted it, does nothing.
        if row.is_none() && entry.operation == Operation::Update {
            continue;
        }
        if let Some(old) = entry.old_key(table) {
            rows.insert(old, None);
        }
        if let Some(new) = entry.new_key(table) {
            rows.insert(new, row.filter(|row| fits(table, row)));
        }
    }
}

/// Only what was changed, so that what Postgres changed in other columns meanwhile is seen.
fn update(table: &Table, mut row: Row, entry: &Entry) -> Row {
    for (place, column) in table.columns.iter().enumerate() {
        if !entry.changed[place] || table.key.contains(&place) {
            continue;
        }
        let (old, new) = (&entry.old[place], &entry.new[place]);
        let sum = match column.conflict {
            Conflict::Add => number::add(&row[place], old, new),
            Conflict::LastWrite | Conflict::FirstWrite | Conflict::Function => None,
        };
        let value = sum.unwrap_or_else(|| new.clone());
        // The column may be another one than it was when this was captured.
        if is_storable(column, &value) {
            row[place] = value;
        }
    }
    for &place in &table.key {
        row[place] = entry.new[place].clone();
    }
    row
}

/// A row that was inserted before a NOT NULL column was added has no value for it, and can't be shown: it is in the
/// outbox, and Postgres decides.
fn fits(table: &Table, row: &Row) -> bool {
    table
        .columns
        .iter()
        .zip(row)
        .all(|(column, value)| is_storable(column, value))
}

fn is_storable(column: &Column, value: &Value) -> bool {
    match value {
        Value::Null => !column.not_null,
        Value::Integer(_) => column.storage == Storage::Integer,
        Value::Real(_) => column.storage == Storage::Real,
        Value::Text(_) => column.storage == Storage::Text,
        Value::Blob(_) => column.storage == Storage::Blob,
    }
}
