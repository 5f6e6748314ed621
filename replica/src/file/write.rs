//! From records to rows: binds the values of a record straight to a prepared statement.
//!
//! Everything about a record is checked here, where its values pass anyway: their number, their storage, NULLs. A bad
//! one fails the SQLite transaction that it was to be part of, so that nothing of it is applied.

use std::sync::Arc;

use anabranch_proto::{
    ops::Kind,
    record::{self, Malformed, ValueRef},
};
use rusqlite::{
    CachedStatement, Connection, Statement,
    types::{Null, ToSqlOutput, ValueRef as SqlRef},
};
use serde_json::Value;

use super::{
    capture::quiet::Quiet,
    names,
    table::{Column, Storage, Table},
};

/// Why a row could not be written.
#[derive(Debug)]
pub(super) enum RowError {
    /// The stream is at fault.
    Malformed(&'static str),
    /// SQLite refused.
    Sqlite(rusqlite::Error),
    /// A program's trigger made SQLite skip the row without an error (`RAISE(IGNORE)`).
    Ignored,
}

impl From<Malformed> for RowError {
    fn from(Malformed(what): Malformed) -> Self {
        RowError::Malformed(what)
    }
}

impl From<rusqlite::Error> for RowError {
    fn from(error: rusqlite::Error) -> Self {
        RowError::Sqlite(error)
    }
}

/// Above this many, the keys that changed in a table are not listed.
const KEYS_MAX: usize = 1_000;

/// Keys that changed, as JSON arrays. `None`: too many to list.
#[derive(Debug)]
pub(super) struct Keys(pub Option<Vec<Value>>);

impl Keys {
    pub(super) fn new() -> Keys {
        Keys(Some(Vec::new()))
    }

    pub(super) fn push(&mut self, key: impl FnOnce() -> Value) {
        match &mut self.0 {
            Some(keys) if keys.len() < KEYS_MAX => keys.push(key()),
            _ => self.0 = None,
        }
    }
}

/// A key's value as JSON; a blob as Postgres prints one.
pub(super) fn json(value: rusqlite::types::ValueRef<'_>) -> Value {
    use rusqlite::types::ValueRef::{Blob, Integer, Null, Real, Text};
    match value {
        Null => Value::Null,
        Integer(value) => value.into(),
        Real(value) => value.into(),
        Text(value) => String::from_utf8_lossy(value).into(),
        Blob(value) => json_of_blob(value),
    }
}

fn json_of_blob(bytes: &[u8]) -> Value {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("\\x{digits}").into()
}

/// Writes rows into one table.
pub(super) struct Writer<'c> {
    connection: &'c Connection,
    table: Arc<Table>,
    /// Its name, which is not the table's if this is a stage.
    name: String,
    upsert: CachedStatement<'c>,
    delete: Option<CachedStatement<'c>>,
    /// Programs have triggers here. So a row that does not change must be looked at; and each is written by a statement
    /// of its own (see `capture::quiet`).
    watched: Option<Quiet>,
    binding: Binding,
}

/// Whose values they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Binding {
    /// Those of Postgres.
    Checked,
    /// Those of programs may be among them: bytes are text that is no UTF-8 (see `overlay::entry`).
    OfPrograms,
}

impl<'c> Writer<'c> {
    pub(super) fn new(
        connection: &'c Connection,
        table: Arc<Table>,
        watched: Option<Quiet>,
    ) -> rusqlite::Result<Writer<'c>> {
        Ok(Writer {
            upsert: connection.prepare_cached(&table.upsert)?,
            delete: None,
            name: table.name.clone(),
            connection,
            table,
            watched,
            binding: Binding::Checked,
        })
    }

    /// Writes rows that programs changed.
    pub(super) fn of_programs(
        connection: &'c Connection,
        table: Arc<Table>,
        watched: Option<Quiet>,
    ) -> rusqlite::Result<Writer<'c>> {
        Ok(Writer {
            binding: Binding::OfPrograms,
            ..Writer::new(connection, table, watched)?
        })
    }

    /// Writes into the stage `name`.
    pub(super) fn of_stage(
        connection: &'c Connection,
        table: Arc<Table>,
        name: &str,
    ) -> rusqlite::Result<Writer<'c>> {
        Ok(Writer {
            upsert: connection.prepare_cached(&table.upsert_into(name))?,
            delete: None,
            name: name.to_owned(),
            connection,
            table,
            watched: None,
            binding: Binding::Checked,
        })
    }

    /// Does one operation.
    pub(super) fn write(&mut self, kind: Kind, record: &[u8]) -> Result<(), RowError> {
        match kind {
            Kind::Upsert => self.upsert(record),
            Kind::Delete => self.delete(record),
        }
    }

    fn upsert(&mut self, record: &[u8]) -> Result<(), RowError> {
        if let Some(quiet) = &self.watched {
            return self.upsert_watched(quiet, record);
        }
        let columns = self.table.columns.iter();
        bind_as(self.binding, &mut self.upsert, columns, record)?;
        self.upsert.raw_execute()?;
        Ok(())
    }

    /// An upsert sets off the triggers of an INSERT, and then those of an UPDATE: here it is one or the other.
    fn upsert_watched(&self, quiet: &Quiet, record: &[u8]) -> Result<(), RowError> {
        let table = &*self.table;
        let key = table.key.iter().map(|&place| record::value(record, place));
        let key: Vec<_> = key.collect::<Result<_, _>>()?;
        let sql = match self.has(&record::build(key))? {
            // Nothing changes.
            true if table.is_all_key() => return Ok(()),
            true => table.update_in(&self.name),
            false => table.insert_into(&self.name),
        };
        let mut statement = self.connection.prepare_cached(&sql)?;
        bind_as(self.binding, &mut statement, table.columns.iter(), record)?;
        let _armed = quiet.arm();
        match statement.raw_execute()? {
            0 => Err(RowError::Ignored),
            _ => Ok(()),
        }
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), RowError> {
        let table = &*self.table;
        let delete = match &mut self.delete {
            Some(delete) => delete,
            none => none.insert(
                self.connection
                    .prepare_cached(&table.delete_from(&self.name))?,
            ),
        };
        bind_as(
            self.binding,
            delete,
            table.key.iter().map(|&place| &table.columns[place]),
            key,
        )?;
        let armed = self.watched.as_ref().map(Quiet::arm);
        let deleted = delete.raw_execute()?;
        drop(armed);
        if deleted == 0 && self.watched.is_some() && self.has(key)? {
            return Err(RowError::Ignored);
        }
        Ok(())
    }

    fn has(&self, key: &[u8]) -> Result<bool, RowError> {
        let table = &*self.table;
        let sql = format!(
            "SELECT 1 FROM {} WHERE {}",
            names::quote(&self.name),
            table.by_key()
        );
        let mut probe = self.connection.prepare_cached(&sql)?;
        bind_as(
            self.binding,
            &mut probe,
            table.key.iter().map(|&place| &table.columns[place]),
            key,
        )?;
        let found = probe.raw_query().next()?.is_some();
        Ok(found)
    }

    /// The key of an operation, as a JSON array.
    pub(super) fn key(&self, kind: Kind, record: &[u8]) -> Result<Value, Malformed> {
        let json = |value| {
            Ok(match value {
                ValueRef::Null => Value::Null,
                ValueRef::Integer(value) => value.into(),
                ValueRef::Real(value) => value.into(),
                ValueRef::Text(value) => value.into(),
                ValueRef::Blob(value) => json_of_blob(value),
            })
        };
        match kind {
            Kind::Delete => record::values(record)?.map(|value| json(value?)).collect(),
            Kind::Upsert => self
                .table
                .key
                .iter()
                .map(|&place| json(record::value(record, place)?))
                .collect(),
        }
    }
}

/// Binds the values of a record of Postgres to a statement's parameters, one for each column.
pub(super) fn bind<'t>(
    statement: &mut Statement<'_>,
    columns: impl Iterator<Item = &'t Column>,
    record: &[u8],
) -> Result<(), RowError> {
    bind_as(Binding::Checked, statement, columns, record)
}

fn bind_as<'t>(
    binding: Binding,
    statement: &mut Statement<'_>,
    columns: impl Iterator<Item = &'t Column>,
    record: &[u8],
) -> Result<(), RowError> {
    let mut values = record::values(record)?;
    for (i, column) in columns.enumerate() {
        let value = values
            .next()
            .ok_or(RowError::Malformed("fewer values than columns"))??;
        let parameter = i + 1;
        match (column.storage, value) {
            (_, ValueRef::Null) if !column.not_null => {
                statement.raw_bind_parameter(parameter, Null)?;
            }
            (Storage::Integer, ValueRef::Integer(value)) => {
                statement.raw_bind_parameter(parameter, value)?;
            }
            // SQLite makes NULL of a NaN.
            (Storage::Real, ValueRef::Real(value)) if !(column.not_null && value.is_nan()) => {
                statement.raw_bind_parameter(parameter, value)?;
            }
            (Storage::Text, ValueRef::Text(value)) => {
                statement.raw_bind_parameter(parameter, value)?;
            }
            (Storage::Blob, ValueRef::Blob(value)) => {
                statement.raw_bind_parameter(parameter, value)?;
            }
            (Storage::Text, ValueRef::Blob(bytes)) if binding == Binding::OfPrograms => {
                let text = ToSqlOutput::Borrowed(SqlRef::Text(bytes));
                statement.raw_bind_parameter(parameter, text)?;
            }
            _ => return Err(RowError::Malformed("a value does not fit its column")),
        }
    }
    if !values.is_at_end() {
        return Err(RowError::Malformed("more values than columns"));
    }
    Ok(())
}
