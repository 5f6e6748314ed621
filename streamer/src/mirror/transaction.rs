//! Applying transactions: one that is held in memory, or one that comes in parts.

use std::collections::{BTreeSet, HashMap};

use anabranch_proto::Lsn;
use foldhash::fast::FixedState;

use super::{
    Applied, Error, Mirror, REMEDY, State,
    change::{self, Failure},
    dependents,
    direct::Direct,
    fold::Fold,
    rows::Rows,
};
use crate::{
    table::Oid,
    transaction::{Change, Chunk, End},
};

/// A transaction that is applied in parts.
#[derive(Debug)]
pub(super) struct Large {
    /// It was applied before.
    skipped: bool,
    commit_lsn: Lsn,
    ordinal: i64,
    touched: BTreeSet<Oid>,
    stopped: Vec<(Oid, String)>,
}

impl Mirror {
    /// Applies a transaction that is one chunk. Opens a group if none is open. One at or below the position does
    /// nothing. On an error the group is rolled back, and the mirror is as of `durable()`.
    pub fn apply(&mut self, chunk: &Chunk) -> Result<Applied, Error> {
        let Some(end) = chunk.end.filter(|_| chunk.first) else {
            return Err(Error::Misused(
                "a part of a transaction was applied as a whole one",
            ));
        };
        if self.large.is_some() {
            return Err(Error::Misused("a transaction within a large one"));
        }
        if chunk.commit_lsn < self.position.lsn {
            return Ok(Applied::default());
        }
        self.open_group()?;
        let applied = match self.fold(chunk, end) {
            Ok(Some(applied)) => Ok(applied),
            // Nothing was written yet.
            Ok(None) => self.apply_directly(chunk, end),
            Err(error) => Err(error),
        };
        self.settle(applied)
    }

    /// Applies it in memory, then writes it. `None`: it does not fit, and nothing was written.
    fn fold(&mut self, chunk: &Chunk, end: End) -> Result<Option<Applied>, Error> {
        let mut fold = Fold::new(&self.sqlite, self.nets_max);
        let mut stopped: Vec<(Oid, String)> = Vec::new();
        for change in &chunk.changes {
            let oid = oid(change);
            let Some(rows) = taking(&self.tables, oid, chunk, &stopped) else {
                continue;
            };
            match change::make(&mut fold, rows, change, self.settings.row_bytes_max) {
                Ok(()) => {}
                Err(Failure::Stop(reason)) => {
                    stopped.push((oid, reason));
                    stopped.extend(dependents::with(&self.tables, &self.dependents, oid));
                }
                Err(Failure::TooLarge) => return Ok(None),
                Err(Failure::Mirror(error)) => return Err(error),
            }
        }
        let tables = &self.tables;
        let (nets, ordinal) = fold.write(&mut self.index, |oid| {
            (!stopped.iter().any(|(other, _)| *other == oid)).then(|| &tables[&oid])
        })?;
        self.finish(ordinal, end, &stopped)?;
        Ok(Some(Applied {
            nets,
            large: Vec::new(),
            stopped,
        }))
    }

    fn apply_directly(&mut self, chunk: &Chunk, end: End) -> Result<Applied, Error> {
        let mut large = self.begin_directly(chunk.commit_lsn)?;
        self.change_directly(&mut large, chunk)?;
        self.finish_directly(large, end)
    }

    /// Applies one chunk of a larger transaction, in a mirror transaction of its own: an open group is committed
    /// before. On an error all of it is undone, and the mirror is as of `durable()`.
    pub fn apply_part(&mut self, chunk: &Chunk) -> Result<(), Error> {
        self.check()?;
        let mut large = match self.large.take() {
            Some(large) if !chunk.first && chunk.commit_lsn == large.commit_lsn => large,
            None if chunk.first => {
                self.commit()?;
                let skipped = chunk.commit_lsn < self.position.lsn;
                if !skipped {
                    self.sqlite.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
                }
                let begun = self.begin_directly(chunk.commit_lsn);
                let mut large = self.settle(begun)?;
                large.skipped = skipped;
                large
            }
            large => {
                self.large = large;
                return Err(Error::Misused("a part of another transaction"));
            }
        };
        if !large.skipped {
            let changed = self.change_directly(&mut large, chunk);
            self.settle(changed)?;
        }
        self.large = Some(large);
        Ok(())
    }

    /// Ends a larger transaction (its last chunk was given to `apply_part`) and commits it, durable.
    pub fn end_large(&mut self, end: End) -> Result<Applied, Error> {
        let Some(large) = self.large.take() else {
            return Err(Error::Misused("the end of no large transaction"));
        };
        if large.skipped {
            return Ok(Applied::default());
        }
        let ended = self
            .finish_directly(large, end)
            .and_then(|applied| self.commit_sqlite().map(|()| applied));
        self.settle(ended)
    }

    /// Undoes the parts of a larger transaction: its end will not come on this connection.
    pub fn abort_large(&mut self) -> Result<(), Error> {
        match self.large.take() {
            Some(large) if !large.skipped => {
                self.failed = true;
                self.sqlite.execute_batch("ROLLBACK")?;
                self.load()?;
                self.failed = false;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Nothing of ours happened up to `lsn`: the position moves there. Opens a group if none is open.
    pub fn advance(&mut self, lsn: Lsn) -> Result<(), Error> {
        if self.large.is_some() {
            return Err(Error::Misused(
                "an idle position within a large transaction",
            ));
        }
        if lsn > self.position.lsn {
            self.open_group()?;
            self.position.lsn = lsn;
        }
        Ok(())
    }

    /// Stops a table outside of a transaction (the schema was found changed), and what can't be told of without it. Joins the
    /// open group. Returns all that were stopped, with the reasons.
    pub fn stop_table(&mut self, table: Oid, reason: &str) -> Result<Vec<(Oid, String)>, Error> {
        if self.large.is_some() {
            return Err(Error::Misused(
                "a table was stopped within a large transaction",
            ));
        }
        if !self.tables.contains_key(&table) {
            return Err(Error::Misused(
                "a table was stopped that the mirror does not have",
            ));
        }
        self.open_group()?;
        let mut stopped = vec![(table, reason.to_owned())];
        stopped.extend(dependents::with(&self.tables, &self.dependents, table));
        for (table, reason) in &stopped {
            let stopped = self.set_stopped(*table, self.position.lsn, reason);
            self.settle(stopped)?;
        }
        Ok(stopped)
    }

    fn begin_directly(&mut self, commit_lsn: Lsn) -> Result<Large, Error> {
        Ok(Large {
            skipped: false,
            commit_lsn,
            ordinal: self.index.begin(&self.sqlite)?,
            touched: BTreeSet::new(),
            stopped: Vec::new(),
        })
    }

    fn change_directly(&mut self, large: &mut Large, chunk: &Chunk) -> Result<(), Error> {
        let mut direct = Direct {
            sqlite: &self.sqlite,
            index: &mut self.index,
            ordinal: large.ordinal,
        };
        for change in &chunk.changes {
            let oid = oid(change);
            let Some(rows) = taking(&self.tables, oid, chunk, &large.stopped) else {
                continue;
            };
            match change::make(&mut direct, rows, change, self.settings.row_bytes_max) {
                Ok(()) => {
                    large.touched.insert(oid);
                }
                Err(Failure::Stop(reason)) => {
                    direct.undo(rows)?;
                    large.touched.remove(&oid);
                    large.stopped.push((oid, reason));
                    for with in dependents::with(&self.tables, &self.dependents, oid) {
                        direct.undo(&self.tables[&with.0])?;
                        large.touched.remove(&with.0);
                        large.stopped.push(with);
                    }
                }
                Err(Failure::TooLarge) => {
                    return Err(Error::Misused("a transaction too large for the disk path"));
                }
                Err(Failure::Mirror(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn finish_directly(&mut self, large: Large, end: End) -> Result<Applied, Error> {
        self.finish(Some(large.ordinal), end, &large.stopped)?;
        Ok(Applied {
            nets: Vec::new(),
            large: large.touched.into_iter().collect(),
            stopped: large.stopped,
        })
    }

    /// What both kinds end with. `ordinal`: that of its index entries, if it has any.
    fn finish(
        &mut self,
        ordinal: Option<i64>,
        end: End,
        stopped: &[(Oid, String)],
    ) -> Result<(), Error> {
        if end.lsn <= self.position.lsn {
            return Err(Error::Misused(
                "a transaction ends at or below the position",
            ));
        }
        if let Some(ordinal) = ordinal {
            self.index
                .end(&self.sqlite, ordinal, end, self.position.epoch)?;
        }
        for (oid, reason) in stopped {
            self.set_stopped(*oid, end.lsn, reason)?;
        }
        self.position.lsn = end.lsn;
        self.now = end.commit_time;
        Ok(())
    }

    /// A table that is stopped already keeps its first reason.
    pub(super) fn set_stopped(&mut self, oid: Oid, lsn: Lsn, reason: &str) -> Result<(), Error> {
        if let Some(rows) = self.tables.get_mut(&oid)
            && !matches!(rows.entry.state, State::Stopped { .. })
        {
            let name = rows.entry.table.full_name();
            tracing::warn!("table {name} is stopped: {reason}; {REMEDY}");
            rows.entry.state = State::Stopped {
                lsn,
                reason: reason.into(),
            };
            let (state, stopped, reason) = rows.entry.state.columns();
            self.sqlite.execute(
                "UPDATE tables SET state = ?2, stopped = ?3, reason = ?4 WHERE oid = ?1",
                (oid, state, stopped, reason),
            )?;
        }
        Ok(())
    }
}

/// The table's rows, if changes of this transaction are to be made to them: it did not stop the table before.
fn taking<'t>(
    tables: &'t HashMap<Oid, Rows, FixedState>,
    oid: Oid,
    chunk: &Chunk,
    stopped: &[(Oid, String)],
) -> Option<&'t Rows> {
    let rows = tables.get(&oid)?;
    let is_stopped = stopped.iter().any(|(other, _)| *other == oid);
    (rows.takes(chunk.commit_lsn) && !is_stopped).then_some(rows)
}

fn oid(change: &Change) -> Oid {
    match change {
        Change::Insert { table, .. }
        | Change::Update { table, .. }
        | Change::Delete { table, .. }
        | Change::Truncate { table } => table.oid,
        Change::Stop { table, .. } => *table,
    }
}
