//! The rows of one table in the mirror: reading and writing them by key.

use std::sync::Arc;

use anabranch_proto::{Lsn, record::Malformed};
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};

use super::{Entry, Key, State, copy::Copied, secondary};
use crate::{
    delta,
    lookup::Index,
    table::{Identity, Table},
};

/// A table that the mirror has, with the SQL that reads and writes it.
#[derive(Debug)]
pub(super) struct Rows {
    pub entry: Entry,
    pub copied: Copied,
    /// Its secondary indexes, once its copy is complete.
    pub indexes: Vec<Index>,
    get: String,
    insert: String,
    update: String,
    delete: String,
    identity: Option<IdentitySql>,
}

#[derive(Debug)]
struct IdentitySql {
    /// Places in the table's columns.
    columns: Vec<usize>,
    get: String,
    insert: String,
    delete: String,
}

impl Rows {
    pub fn new(entry: Entry, indexes: &[Index]) -> Rows {
        let oid = entry.table.oid;
        let identity = match &entry.table.identity {
            Identity::Index(columns) => Some(IdentitySql {
                columns: columns.clone(),
                get: format!("SELECT k FROM identity_{oid} WHERE i = ?1"),
                insert: format!("INSERT OR IGNORE INTO identity_{oid}(i, k) VALUES(?1, ?2)"),
                delete: format!("DELETE FROM identity_{oid} WHERE i = ?1"),
            }),
            Identity::Key | Identity::Full => None,
        };
        Rows {
            entry,
            copied: Copied::default(),
            indexes: secondary::of_table(indexes, oid),
            get: format!("SELECT r FROM rows_{oid} WHERE k = ?1"),
            insert: format!("INSERT OR IGNORE INTO rows_{oid}(k, r) VALUES(?1, ?2)"),
            update: format!("UPDATE rows_{oid} SET r = ?2 WHERE k = ?1"),
            delete: format!("DELETE FROM rows_{oid} WHERE k = ?1"),
            identity,
        }
    }

    pub fn table(&self) -> &Arc<Table> {
        &self.entry.table
    }

    /// Whether the changes of a transaction with this commit LSN are to be applied: the table is followed, and its copy
    /// does not have them.
    pub fn takes(&self, commit_lsn: Lsn) -> bool {
        self.entry.state == State::Live && commit_lsn >= self.entry.floor
    }

    pub fn get(&self, sqlite: &Connection, key: &Key) -> Result<Option<Bytes>, rusqlite::Error> {
        let mut statement = sqlite.prepare_cached(&self.get)?;
        statement.raw_bind_parameter(1, key)?;
        let mut found = statement.raw_query();
        found
            .next()?
            .map(|row| {
                row.get_ref(0)?
                    .as_blob()
                    .map(Bytes::copy_from_slice)
                    .map_err(Into::into)
            })
            .transpose()
    }

    /// As [`Rows::insert`], for many rows: the statement is only looked up once.
    pub fn inserting<'a>(
        &self,
        sqlite: &'a Connection,
    ) -> Result<impl FnMut(&Key, &[u8]) -> Result<bool, rusqlite::Error> + use<'a>, rusqlite::Error>
    {
        let mut statement = sqlite.prepare_cached(&self.insert)?;
        Ok(move |key: &Key, row: &[u8]| {
            statement.raw_bind_parameter(1, key)?;
            statement.raw_bind_parameter(2, row)?;
            Ok(statement.raw_execute()? == 1)
        })
    }

    /// False: there is a row of that key already, and it stays.
    pub fn insert(
        &self,
        sqlite: &Connection,
        key: &Key,
        row: &[u8],
    ) -> Result<bool, rusqlite::Error> {
        self.inserting(sqlite)?(key, row)
    }

    /// False: there is no row of that key.
    pub fn update(
        &self,
        sqlite: &Connection,
        key: &Key,
        row: &[u8],
    ) -> Result<bool, rusqlite::Error> {
        let mut statement = sqlite.prepare_cached(&self.update)?;
        statement.raw_bind_parameter(1, key)?;
        statement.raw_bind_parameter(2, row)?;
        Ok(statement.raw_execute()? == 1)
    }

    /// False: there is no row of that key.
    pub fn delete(&self, sqlite: &Connection, key: &Key) -> Result<bool, rusqlite::Error> {
        let mut statement = sqlite.prepare_cached(&self.delete)?;
        statement.raw_bind_parameter(1, key)?;
        Ok(statement.raw_execute()? == 1)
    }

    /// Whether SQLite will find the row's keys in all indexes; else it would refuse to write it.
    pub fn check_keys(&self, row: &[u8]) -> Result<(), Malformed> {
        for index in &self.indexes {
            index.key(row)?;
        }
        Ok(())
    }

    /// Postgres names old rows by another unique index than the key.
    pub fn has_identity(&self) -> bool {
        self.identity.is_some()
    }

    /// The record by which Postgres names this row, where that is not its key.
    pub fn identity(&self, row: &[u8]) -> Result<Option<Bytes>, Malformed> {
        (self.identity.as_ref())
            .map(|identity| delta::pick(row, &identity.columns))
            .transpose()
    }

    /// The key of the row that Postgres names so.
    pub fn find(
        &self,
        sqlite: &Connection,
        identity: &[u8],
    ) -> Result<Option<Key>, rusqlite::Error> {
        match &self.identity {
            Some(sql) => sqlite
                .prepare_cached(&sql.get)?
                .query_row([identity], |row| row.get(0))
                .optional(),
            None => Ok(None),
        }
    }

    /// False: another row has that identity, and keeps it.
    pub fn insert_identity(
        &self,
        sqlite: &Connection,
        identity: &[u8],
        key: &Key,
    ) -> Result<bool, rusqlite::Error> {
        match &self.identity {
            Some(sql) => {
                let changed = (sqlite.prepare_cached(&sql.insert)?).execute((identity, key))?;
                Ok(changed == 1)
            }
            None => Ok(true),
        }
    }

    pub fn delete_identity(
        &self,
        sqlite: &Connection,
        identity: &[u8],
    ) -> Result<(), rusqlite::Error> {
        if let Some(sql) = &self.identity {
            sqlite.prepare_cached(&sql.delete)?.execute([identity])?;
        }
        Ok(())
    }

    /// Removes all rows.
    pub fn truncate(&self, sqlite: &Connection) -> Result<(), rusqlite::Error> {
        let oid = self.entry.table.oid;
        sqlite.execute(&format!("DELETE FROM rows_{oid}"), [])?;
        if self.identity.is_some() {
            sqlite.execute(&format!("DELETE FROM identity_{oid}"), [])?;
        }
        Ok(())
    }
}
