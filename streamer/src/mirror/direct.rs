//! A transaction that does not fit in memory: each change is written as it comes, each first old row goes to the change
//! index. Memory is SQLite's page cache, whatever the transaction's size.

use bytes::Bytes;
use rusqlite::Connection;

use super::{
    Error, Key,
    change::{Failure, Work},
    index::Index,
    rows::Rows,
};

/// Writes as it goes.
pub(super) struct Direct<'a> {
    pub sqlite: &'a Connection,
    pub index: &'a mut Index,
    pub ordinal: i64,
}

impl Direct<'_> {
    /// Brings a table back to before this transaction, from its own entries in the index, and removes those.
    pub fn undo(&mut self, rows: &Rows) -> Result<(), Error> {
        let sqlite = self.sqlite;
        let oid = rows.table().oid;
        let segment = self.index.current();
        let entries = format!("SELECT k, old FROM changes_{segment} WHERE txn = ?1 AND tbl = ?2");
        let mut entries = sqlite.prepare(&entries)?;
        let identity = |row: &[u8]| {
            rows.identity(row).map_err(|error| {
                Error::Damaged(format!("a row of {}: {error}", rows.table().full_name()))
            })
        };
        // First everything goes, so that no row is in the way of another's replica identity.
        let mut touched = entries.query((self.ordinal, oid))?;
        while let Some(entry) = touched.next()? {
            let key: Key = entry.get(0)?;
            if let Some(now) = rows.get(sqlite, &key)? {
                if let Some(identity) = identity(&now)? {
                    rows.delete_identity(sqlite, &identity)?;
                }
                rows.delete(sqlite, &key)?;
            }
        }
        drop(touched);
        let mut touched = entries.query((self.ordinal, oid))?;
        while let Some(entry) = touched.next()? {
            let key: Key = entry.get(0)?;
            if let Some(old) = entry
                .get_ref(1)?
                .as_blob_or_null()
                .map_err(rusqlite::Error::from)?
            {
                rows.insert(sqlite, &key, old)?;
                if let Some(identity) = identity(old)? {
                    rows.insert_identity(sqlite, &identity, &key)?;
                }
            }
        }
        drop(touched);
        sqlite.execute(
            &format!("DELETE FROM changes_{segment} WHERE txn = ?1 AND tbl = ?2"),
            (self.ordinal, oid),
        )?;
        Ok(())
    }
}

impl Work for Direct<'_> {
    fn get(&mut self, rows: &Rows, key: &Key) -> Result<Option<Bytes>, Failure> {
        Ok(rows.get(self.sqlite, key)?)
    }

    fn find(&mut self, rows: &Rows, identity: &Bytes) -> Result<Option<Key>, Failure> {
        Ok(rows.find(self.sqlite, identity)?)
    }

    fn put(
        &mut self,
        rows: &Rows,
        key: &Key,
        old: Option<&Bytes>,
        new: Option<&Bytes>,
    ) -> Result<(), Failure> {
        if old == new {
            return Ok(());
        }
        let table = rows.table();
        let named = (table.oid, table.version);
        self.index.add(
            self.sqlite,
            self.ordinal,
            named,
            key,
            old.map(|old| &old[..]),
        )?;
        match (old, new) {
            (None, Some(new)) => rows.insert(self.sqlite, key, new)?,
            (Some(_), Some(new)) => rows.update(self.sqlite, key, new)?,
            (_, None) => rows.delete(self.sqlite, key)?,
        };
        if rows.has_identity() {
            let identity = |row: Option<&Bytes>| row.map_or(Ok(None), |row| rows.identity(row));
            let (left, kept) = (identity(old)?, identity(new)?);
            if left != kept {
                if let Some(left) = left {
                    rows.delete_identity(self.sqlite, &left)?;
                }
                if let Some(kept) = kept {
                    rows.insert_identity(self.sqlite, &kept, key)?;
                }
            }
        }
        Ok(())
    }

    fn truncate(&mut self, rows: &Rows) -> Result<(), Failure> {
        let table = rows.table();
        self.index
            .add_all(self.sqlite, self.ordinal, (table.oid, table.version))?;
        rows.truncate(self.sqlite)?;
        Ok(())
    }
}
