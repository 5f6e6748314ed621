//! Reading a replica's file, as any program could.

use std::path::Path;

use anabranch_proto::Lsn;
use rusqlite::{Connection, OpenFlags, Transaction, types::ValueRef};

use super::{Cell, Row, quote};

/// Opens the file read-only.
pub fn open(file: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags)?;
    // Whoever opens a file after a kill recovers its WAL first, and locks others out for that moment.
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    Ok(connection)
}

/// A table of a file, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Of all columns that the table has.
    pub columns: Vec<String>,
    /// In no order.
    pub rows: Vec<Row>,
}

/// What a file held at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Epoch and LSN, as `_anabranch_status` says; `None` before the first commit.
    pub position: Option<(String, Lsn)>,
    /// The tables that were asked for, in that order; `None`: it has no such table.
    pub tables: Vec<Option<Content>>,
}

/// Reads position and tables in one read transaction. A file that is not there yet is an empty one.
pub fn read(file: &Path, tables: &[&str]) -> anyhow::Result<Snapshot> {
    if !file.exists() {
        return Ok(Snapshot {
            position: None,
            tables: vec![None; tables.len()],
        });
    }
    let mut connection = open(file)?;
    let transaction = connection.transaction()?;
    let position = status(&transaction)?;
    let tables = tables
        .iter()
        .map(|table| content(&transaction, table))
        .collect::<rusqlite::Result<_>>()?;
    Ok(Snapshot { position, tables })
}

/// The file's position alone.
pub fn position(file: &Path) -> anyhow::Result<Option<(String, Lsn)>> {
    Ok(read(file, &[])?.position)
}

/// How many changes of programs are not answered.
pub fn pending(file: &Path) -> rusqlite::Result<i64> {
    open(file)?.query_row("SELECT pending FROM _anabranch_status", [], |row| {
        row.get(0)
    })
}

fn status(transaction: &Transaction<'_>) -> anyhow::Result<Option<(String, Lsn)>> {
    if !exists(transaction, "_anabranch_status")? {
        return Ok(None);
    }
    let mut statement = transaction.prepare("SELECT epoch, lsn FROM _anabranch_status")?;
    let mut rows = statement.query([])?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    let epoch = match row.get_ref(0)? {
        ValueRef::Integer(epoch) => epoch.to_string(),
        ValueRef::Text(epoch) => String::from_utf8_lossy(epoch).into_owned(),
        _ => String::new(),
    };
    let lsn: Option<String> = row.get(1)?;
    let lsn = lsn.map(|lsn| lsn.parse::<Lsn>()).transpose()?;
    // Zero is before everything.
    Ok(lsn.filter(|lsn| lsn.0 != 0).map(|lsn| (epoch, lsn)))
}

fn content(transaction: &Transaction<'_>, table: &str) -> rusqlite::Result<Option<Content>> {
    if !exists(transaction, table)? {
        return Ok(None);
    }
    let mut statement = transaction.prepare(&format!("SELECT * FROM {}", quote(table)))?;
    let columns: Vec<_> = statement.column_names().map(str::to_owned).collect();
    let mut rows = Vec::new();
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let cells = (0..columns.len()).map(|i| row.get_ref(i).map(cell));
        rows.push(cells.collect::<rusqlite::Result<_>>()?);
    }
    Ok(Some(Content { columns, rows }))
}

fn exists(transaction: &Transaction<'_>, name: &str) -> rusqlite::Result<bool> {
    transaction
        .prepare("SELECT 1 FROM sqlite_schema WHERE name = ?1 AND type IN ('table', 'view')")?
        .exists([name])
}

fn cell(value: ValueRef<'_>) -> Cell {
    match value {
        ValueRef::Null => Cell::Null,
        ValueRef::Integer(value) => Cell::Integer(value),
        ValueRef::Real(value) => Cell::Real(value.to_bits()),
        // Text that is not UTF-8 must not pass for some that is.
        ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Cell::Text(text.to_owned()),
            Err(_) => Cell::Blob(bytes.to_vec()),
        },
        ValueRef::Blob(bytes) => Cell::Blob(bytes.to_vec()),
    }
}

impl Content {
    /// The rows with these columns, in this order; `Err`: the names of those that it has instead.
    pub fn project(&self, columns: &[String]) -> Result<Vec<Row>, Vec<String>> {
        let place = |name: &String| self.columns.iter().position(|column| column == name);
        let places: Option<Vec<_>> = columns.iter().map(place).collect();
        match places {
            Some(places) if places.len() == self.columns.len() => Ok(self
                .rows
                .iter()
                .map(|row| places.iter().map(|&place| row[place].clone()).collect())
                .collect()),
            _ => Err(self.columns.clone()),
        }
    }
}
