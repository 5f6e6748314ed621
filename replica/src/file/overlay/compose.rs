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
        Value::Blob(bytes) => match column.storage {
            Storage::Blob => true,
            // Text of a program that is no UTF-8.
            Storage::Text => std::str::from_utf8(bytes).is_err(),
            Storage::Integer | Storage::Real => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::v1;

    use super::*;

    /// `t(k, a, n)`: `n` is added.
    fn table() -> Table {
        let column =
            |name: &str, storage: v1::Storage, key_position, conflict: v1::Conflict| v1::Column {
                name: name.into(),
                postgres_type: "t".into(),
                storage: storage.into(),
                not_null: false,
                key_position,
                conflict: conflict.into(),
                ..v1::Column::default()
            };
        Table::new(&v1::Table {
            id: 1,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![
                column("k", v1::Storage::Integer, 1, v1::Conflict::LastWrite),
                column("a", v1::Storage::Text, 0, v1::Conflict::LastWrite),
                column("n", v1::Storage::Integer, 0, v1::Conflict::Add),
            ],
            writable: true,
            ..v1::Table::default()
        })
        .unwrap()
    }

    /// `1 a 5`; a blank is NULL in `-`.
    fn row(text: &str) -> Row {
        let value = |(i, word): (usize, &str)| match word {
            "-" => Value::Null,
            word if i == 1 => Value::Text(word.into()),
            word => Value::Integer(word.parse().unwrap()),
        };
        text.split(' ').enumerate().map(value).collect()
    }

    /// `+ 1 a 5`, `- 1 a 5`, or `1 a 5 > 1 b 5`.
    fn entry(id: usize, text: &str) -> Entry {
        let none = vec![Value::Null; 3];
        let (operation, old, new) = match text.split_at(2) {
            ("+ ", new) => (Operation::Insert, none, row(new)),
            ("- ", old) => (Operation::Delete, row(old), none),
            _ => {
                let (old, new) = text.split_once(" > ").unwrap();
                (Operation::Update, row(old), row(new))
            }
        };
        Entry {
            id: id as i64,
            operation,
            changed: old.iter().zip(&new).map(|(old, new)| old != new).collect(),
            old,
            new,
        }
    }

    #[test]
    fn what_is_pending_is_on_top_of_what_postgres_has() {
        let table = table();
        let check = |base: &[&str], pending: &[&str], upstream: &[&str], expected: &[&str]| {
            let key = |row: &Row| super::super::entry::key_of(row, &table.key);
            // What Postgres changed is what it has.
            let mut rows: HashMap<Key, Option<Row>> = HashMap::new();
            for text in base.iter().chain(upstream) {
                match text.strip_prefix("- ") {
                    Some(gone) => rows.insert(key(&row(gone)), None),
                    None => rows.insert(key(&row(text)), Some(row(text))),
                };
            }
            let entries: Vec<Entry> = (1..).zip(pending).map(|(i, text)| entry(i, text)).collect();
            compose(&table, &mut rows, &entries);
            let mut shown: Vec<Row> = rows.into_values().flatten().collect();
            shown.sort_by_key(|row| format!("{row:?}"));
            let expected: Vec<Row> = expected.iter().map(|text| row(text)).collect();
            assert_eq!(shown, expected, "{base:?} {pending:?} {upstream:?}");
        };
        check(&["1 a 5"], &[], &[], &["1 a 5"]);
        check(&["1 a 5"], &["1 a 5 > 1 b 5"], &[], &["1 b 5"]);
        check(&["1 a 5"], &["1 a 5 > 1 b 5"], &["1 x 9"], &["1 b 9"]);
        check(&["1 a 5"], &["1 a 5 > 1 a 7"], &["1 x 9"], &["1 x 11"]);
        check(
            &["1 a 5"],
            &["1 a 5 > 1 a 7", "1 a 7 > 1 a 4"],
            &["1 a 100"],
            &["1 a 99"],
        );
        check(&["1 a 5"], &["1 a 5 > 1 a 7"], &["1 a -"], &["1 a 7"]);
        check(&["1 a 5"], &["1 a 5 > 1 a -"], &["1 a 9"], &["1 a -"]);
        check(&["1 a 5"], &["1 a 5 > 1 b 5"], &["- 1 a 5"], &[]);
        check(&["1 a 5"], &["- 1 a 5"], &["1 x 9"], &[]);
        check(&["1 a 5"], &["- 1 a 5", "+ 1 b 6"], &["1 x 9"], &["1 b 6"]);
        check(&["- 1 a 5"], &["+ 1 a 5"], &[], &["1 a 5"]);
        check(&["- 1 a 5"], &["+ 1 a 5"], &["1 a 5"], &["1 a 5"]);
        check(
            &["- 1 a 5"],
            &["+ 1 a 5", "1 a 5 > 1 b 5"],
            &["1 x 6"],
            &["1 b 5"],
        );
        // An update whose insert is not there.
        check(&["- 1 a 5"], &["1 a 5 > 1 b 5"], &[], &[]);
        check(
            &["- 1 a 5", "- 2 a 5"],
            &["1 a 5 > 2 a 5", "2 a 5 > 2 b 5"],
            &[],
            &[],
        );
        // Moved, and on; swapped.
        check(
            &["1 a 5"],
            &["1 a 5 > 2 a 5", "2 a 5 > 3 b 5"],
            &["1 x 6"],
            &["3 b 6"],
        );
        check(
            &["1 a 5", "2 b 6"],
            &["1 a 5 > 9 a 5", "2 b 6 > 1 b 6", "9 a 5 > 2 a 5"],
            &["2 x 60"],
            &["1 x 60", "2 a 5"],
        );
        // Onto a row that is replaced: a delete, then the update.
        check(
            &["1 a 5", "2 b 6"],
            &["- 2 b 6", "1 a 5 > 2 a 5"],
            &["2 x 7"],
            &["2 a 5"],
        );
        // Nothing moves: what is at the new key stays.
        check(&["- 1 a 5", "2 b 6"], &["1 a 5 > 2 a 5"], &[], &["2 b 6"]);
    }

    #[test]
    fn a_row_without_a_value_that_the_table_demands_is_not_shown() {
        let mut table = table();
        table.columns[1].not_null = true;
        let mut rows = HashMap::new();
        compose(
            &table,
            &mut rows,
            &[entry(1, "+ 1 - 5"), entry(2, "+ 2 a 5")],
        );
        assert_eq!(
            rows.into_values().flatten().collect::<Vec<_>>(),
            [row("2 a 5")]
        );
    }
}
