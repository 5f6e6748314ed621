//! Filling tables with rows that were copied from Postgres.
//!
//! Batches are committed with `synchronous=NORMAL`: no sync for each, but a checkpoint still syncs the log before
//! it writes the file and the file before it forgets the log, so a power cut in the middle loses batches and harms
//! nothing, least of all the tables that are followed meanwhile. (With OFF it could tear those.) The batches become
//! durable with the next commit under FULL, which syncs all of the log up to itself: that of `end_copy` at the latest.
//!
//! *Early readers.* Until the first history begins, nothing that was copied changes any more. So a catch-up may give out
//! rows of a table while its copy goes on, in key order, up to the highest key that is there; what comes behind that it
//! finds later. A row that comes *below* the highest key may have been passed already: it gets an entry in the change
//! index (it was absent), under an ordinal for its batch, and is found as any change is. That costs a write more for such
//! a row, so a table is only opened to readers once its first [`SAMPLE_ROWS`] rows came nearly in the order of
//! their keys, as those of a growing key do; any other is read when its copy is complete.

use std::sync::Arc;

use anabranch_proto::Lsn;
use bytes::Bytes;

use super::{
    Entry, Error, Key, Mirror, State,
    change::{Failure, check_row},
    rows::Rows,
    schema, secondary,
};
use crate::table::{Oid, Table};

/// After so many rows it is decided whether readers may look at a table that is being copied.
pub(super) const SAMPLE_ROWS: u64 = 16 * 1024;

/// They may, if at most this part of them came below a higher key.
const LATE_PART_MAX: u64 = 16;

/// How the copy of a table goes.
#[derive(Debug, Default)]
pub(super) struct Copied {
    /// The highest key so far.
    highest: Option<Key>,
    rows: u64,
    /// Rows that came in a batch after one with a higher key.
    late: u64,
    /// Readers may look at it.
    open: bool,
}

impl Mirror {
    /// Creates an empty table in state `Copying`; one that is there already is emptied. An open group is
    /// committed before.
    pub fn begin_copy(&mut self, table: &Table) -> Result<(), Error> {
        let entry = Entry {
            table: Arc::new(table.clone()),
            state: State::Copying,
            floor: Lsn(0),
        };
        let rows = Rows::new(entry, &self.indexes);
        let description = serde_json::to_string(table)
            .map_err(|error| Error::Damaged(format!("{}: {error}", table.full_name())))?;
        self.alone(|mirror| {
            let integer_key = table.integer_key().is_some();
            schema::create_rows(&mirror.sqlite, table.oid, integer_key, rows.has_identity())?;
            (mirror.sqlite).execute("UPDATE state SET copies = copies + 1", [])?;
            mirror.sqlite.execute(
                "INSERT OR REPLACE INTO tables(oid, version, schema, state, open, floor, copy, replaced, reach)
                 VALUES(?1, ?2, ?3, ?4, 0, 0, (SELECT copies FROM state), ?5, 0)",
                (
                    table.oid,
                    table.version,
                    description,
                    State::Copying.columns().0,
                    mirror.has_begun(),
                ),
            )?;
            mirror.tables.insert(table.oid, rows);
            Ok(())
        })
    }

    /// Adds copied rows, in a mirror transaction of their own (not necessarily durable; an open group is committed
    /// before, durably). No key comes twice.
    ///
    /// A row that can't be kept (malformed, above `row_bytes_max`) stops the table, which is then empty: the rest of
    /// its copy is ignored.
    pub fn copy_rows(&mut self, table: Oid, rows: &[Bytes]) -> Result<(), Error> {
        match self.tables.get(&table).map(|rows| &rows.entry.state) {
            Some(State::Copying) => {}
            Some(State::Stopped { .. }) => return Ok(()),
            Some(State::Live) | None => {
                return Err(Error::Misused("rows for a table that is not being copied"));
            }
        }
        if self.large.is_some() {
            return Err(Error::Misused("within a large transaction"));
        }
        self.commit()?;
        self.sqlite.pragma_update(None, "synchronous", "normal")?;
        let copied = self.copy_batch(table, rows);
        self.sqlite.pragma_update(None, "synchronous", "full")?;
        match copied {
            Err(Failure::Mirror(error)) => Err(error),
            Err(Failure::Stop(reason)) => self.alone(|mirror| {
                mirror.tables[&table].truncate(&mirror.sqlite)?;
                mirror.set_stopped(table, mirror.position.lsn, &reason)
            }),
            Err(Failure::TooLarge) | Ok(()) => Ok(()),
        }
    }

    fn copy_batch(&mut self, oid: Oid, batch: &[Bytes]) -> Result<(), Failure> {
        self.check().map_err(Failure::Mirror)?;
        self.sqlite.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let copied = self.insert_batch(oid, batch).and_then(|()| {
            self.sqlite.prepare_cached("COMMIT")?.execute([])?;
            Ok(())
        });
        self.checkpoint.committed(&self.sqlite);
        if copied.is_err() && !self.sqlite.is_autocommit() {
            self.sqlite.execute_batch("ROLLBACK")?;
        }
        copied
    }

    fn insert_batch(&mut self, oid: Oid, batch: &[Bytes]) -> Result<(), Failure> {
        let rows = &self.tables[&oid];
        let (before, mut highest) = (&rows.copied.highest, rows.copied.highest.clone());
        let mut late = Vec::new();
        let mut insert = rows.inserting(&self.sqlite)?;
        for row in batch {
            check_row(rows, row, self.settings.row_bytes_max)?;
            let key = Key::of_row(rows.table(), row)?;
            let identity = rows.identity(row)?;
            if !insert(&key, row)?
                || identity.map_or(Ok(false), |identity| {
                    (rows.insert_identity(&self.sqlite, &identity, &key)).map(|inserted| !inserted)
                })?
            {
                return Err(Failure::Stop("its copy has two rows of one key".into()));
            }
            if Some(&key) < before.as_ref() {
                late.push(key);
            } else if Some(&key) > highest.as_ref() {
                highest = Some(key);
            }
        }
        drop(insert);
        if self.has_begun() {
            return Ok(());
        }
        let copied = Copied {
            highest,
            rows: rows.copied.rows + batch.len() as u64,
            late: rows.copied.late + late.len() as u64,
            open: rows.copied.open,
        };
        self.open_to_readers(oid, copied, &late)
            .map_err(Failure::Mirror)
    }

    /// Lets readers look at a table, or tells those who do what came late.
    fn open_to_readers(&mut self, oid: Oid, mut copied: Copied, late: &[Key]) -> Result<(), Error> {
        if copied.open && !late.is_empty() {
            let version = self.tables[&oid].table().version;
            let ordinal = self.index.begin(&self.sqlite)?;
            for key in late {
                (self.index).add(&self.sqlite, ordinal, (oid, version), key, None)?;
            }
            self.index.end_copied(&self.sqlite, ordinal)?;
        }
        let sampled =
            copied.rows >= self.sample_rows && self.tables[&oid].copied.rows < self.sample_rows;
        if sampled && copied.late * LATE_PART_MAX <= copied.rows {
            copied.open = true;
            (self.sqlite).execute("UPDATE tables SET open = 1 WHERE oid = ?1", [oid])?;
        }
        if let Some(rows) = self.tables.get_mut(&oid) {
            rows.copied = copied;
        }
        Ok(())
    }

    /// The copy is complete as of `at`; durable when it returns. Makes the table's secondary indexes.
    ///
    /// `at` must not lie below the position: changes of a table that is being copied are not applied, so those in
    /// between would be missing. Until the position reaches `at` nobody may see its rows.
    pub fn end_copy(&mut self, table: Oid, at: Lsn) -> Result<(), Error> {
        let Some(rows) = self.tables.get(&table) else {
            return Err(Error::Misused("the end of a copy that was not begun"));
        };
        if rows.entry.state == State::Live {
            return Err(Error::Misused("the end of a copy that was not begun"));
        }
        if at < self.position.lsn {
            return Err(Error::Misused("a copy as of before the mirror's position"));
        }
        self.alone(|mirror| {
            let Some(rows) = mirror.tables.get_mut(&table) else {
                return Ok(());
            };
            if rows.entry.state == State::Copying {
                rows.entry.state = State::Live;
            }
            rows.entry.floor = at;
            // A replica that is at this very position already may have it from the table as it was before (stopped, say),
            // and no entry tells the difference: it is not reached.
            let behind = u64::from(at == mirror.position.lsn);
            mirror.sqlite.execute(
                "UPDATE tables SET state = ?2, floor = ?3, reach = ?3 + replaced * ?4 WHERE oid = ?1",
                (table, rows.entry.state.columns().0, at.0 as i64, behind as i64),
            )?;
            secondary::make_all(&mirror.sqlite, &mirror.tables[&table])
        })
    }

    /// Forgets a table and its rows. An open group is committed before.
    pub fn drop_table(&mut self, table: Oid) -> Result<(), Error> {
        self.alone(|mirror| {
            schema::drop_rows(&mirror.sqlite, table)?;
            (mirror.sqlite).execute("DELETE FROM tables WHERE oid = ?1", [table])?;
            mirror.tables.remove(&table);
            Ok(())
        })
    }
}
