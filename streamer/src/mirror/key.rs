//! Keys of the mirror: how a row, or what Postgres says of an old row, names a row. Pure.

use anabranch_proto::record::{self, Malformed, ValueRef};
use bytes::Bytes;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput};

use crate::{delta, table::Table};

/// A key of the mirror: canonical for its table, hashable.
///
/// The order of keys of one table is that of SQLite: integers by value, records by their bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// Of a table with a single integer key.
    Integer(i64),
    /// A record of the key's columns, in key order.
    Record(Bytes),
}

impl Key {
    /// The key of a row. Also checks that the row is a whole, well-formed record of the table.
    pub fn of_row(table: &Table, row: &[u8]) -> Result<Key, Malformed> {
        let mut values = record::values(row)?;
        let integer = table.integer_key();
        let mut key = None;
        let mut columns = 0;
        for value in values.by_ref() {
            let value = value?;
            if integer == Some(columns) {
                let ValueRef::Integer(value) = value else {
                    return Err(Malformed("an integer key that is no integer"));
                };
                key = Some(Key::Integer(value));
            }
            columns += 1;
        }
        if columns != table.columns.len() {
            return Err(Malformed("not one value for each column"));
        }
        if !values.is_at_end() {
            return Err(Malformed("longer than its values"));
        }
        match key {
            Some(key) => Ok(key),
            None => Key::of_record(delta::key_record(table, row)?),
        }
    }

    /// The key that a record of the columns of `Table::identity_columns` names, where these are the key's.
    pub(super) fn of_identity(table: &Table, identity: &Bytes) -> Result<Key, Malformed> {
        let mut values = record::values(identity)?;
        let mut columns = 0;
        for value in values.by_ref() {
            value?;
            columns += 1;
        }
        if columns != table.key.len() || !values.is_at_end() {
            return Err(Malformed("an old key of another shape than the key"));
        }
        if table.integer_key().is_some() {
            let ValueRef::Integer(value) = record::value(identity, 0)? else {
                return Err(Malformed("an integer key that is no integer"));
            };
            return Ok(Key::Integer(value));
        }
        // The identity has the columns as the table has them, the key as the index has them.
        let mut ascending = table.key.clone();
        ascending.sort_unstable();
        let places: Vec<usize> = (table.key.iter())
            .map(|column| ascending.partition_point(|other| other < column))
            .collect();
        Key::of_record(delta::pick(identity, &places)?)
    }

    fn of_record(record: Bytes) -> Result<Key, Malformed> {
        for value in record::values(&record)? {
            if value? == ValueRef::Null {
                return Err(Malformed("NULL in a key"));
            }
        }
        Ok(Key::Record(record))
    }

    /// The record of the key's columns, in key order.
    pub fn record(&self) -> Bytes {
        match self {
            Key::Integer(value) => record::build([ValueRef::Integer(*value)]),
            Key::Record(record) => record.clone(),
        }
    }

    /// What it holds in memory and takes in a file, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Key::Integer(_) => 8,
            Key::Record(record) => record.len(),
        }
    }
}

impl ToSql for Key {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Key::Integer(value) => ToSqlOutput::from(*value),
            Key::Record(record) => ToSqlOutput::from(&record[..]),
        })
    }
}

impl FromSql for Key {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> FromSqlResult<Self> {
        match value {
            rusqlite::types::ValueRef::Integer(value) => Ok(Key::Integer(value)),
            rusqlite::types::ValueRef::Blob(record) => {
                Ok(Key::Record(Bytes::copy_from_slice(record)))
            }
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

/// `new` with the values at `unchanged` (ascending places) taken from `old`.
pub(super) fn fill(old: &[u8], new: &[u8], unchanged: &[u16]) -> Result<Bytes, Malformed> {
    let mut filled = record::Builder::new();
    let mut old = record::values(old)?;
    let mut unchanged = unchanged.iter().map(|&place| usize::from(place)).peekable();
    for (place, value) in record::values(new)?.enumerate() {
        let before = old.next().ok_or(Malformed("fewer values than columns"))?;
        if unchanged.next_if_eq(&place).is_some() {
            filled.push(before?);
        } else {
            filled.push(value?);
        }
    }
    match unchanged.next() {
        None => Ok(filled.finish()),
        Some(_) => Err(Malformed("an unchanged value of no column")),
    }
}
