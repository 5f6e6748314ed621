//! Where local writes stand, and the look at the WAL that finds new ones.
//!
//! `boundary` tells which entries were one transaction of a program, `outbox` numbers them, `receipts` says what became of
//! them; here is the order in which that happens: found, durable, numbered, sent.

use std::sync::Arc;

use anabranch_proto::Lsn;
use bytes::Bytes;

use super::{
    Error, File, capture,
    error::Doing,
    layout, names, open, receipts,
    schema::{self, Catalog},
    transaction::Write,
};

/// Where local writes stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Local transactions up to this one are durable, and may be sent.
    pub assigned: u64,
    /// Up to this one they are answered.
    pub answered: u64,
    /// Up to this one rejections came, which are durable here, and the streamer was not told so.
    pub settled: u64,
    /// As `_anabranch_status` tells it: changes of rows that are not answered.
    pub pending: u64,
    /// Rows of `_anabranch_rejected`.
    pub rejected: u64,
    /// Behind this one those of today's id begin: with a new id what is not answered gets other numbers.
    pub chain: u64,
    /// What came of answers is not of this file: the streamer is to be asked.
    pub in_doubt: bool,
    /// Ids should be leased.
    pub wants_ids: bool,
}

impl Local {
    /// Whether all that was written then is answered by now.
    pub fn has_answered(&self, then: &Local) -> bool {
        self.answered >= self.last_of(then)
    }

    /// The last local transaction that may be one of then.
    pub fn last_of(&self, then: &Local) -> u64 {
        if self.chain == then.chain {
            then.assigned
        } else {
            self.assigned
        }
    }
}

/// A rejected entry, for those who wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its row in `_anabranch_rejected`.
    pub id: i64,
    /// The table.
    pub table: String,
    /// Postgres' reason.
    pub sqlstate: Option<String>,
    /// In words.
    pub message: Option<String>,
}

/// Found by a look, not numbered yet.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The last entry of each local transaction, and whether it may be several.
    ends: Vec<(i64, bool)>,
    /// From this length on our reader makes way for a checkpoint.
    way_from: u32,
}

impl File {
    /// Looks for local transactions since the last look; they may be sent when this returns. True: there were some.
    pub fn look(&mut self) -> Result<bool, Error> {
        self.look_at_schema()?;
        if !self.captures()? {
            // Reading along in the WAL costs something, and there is nothing to find.
            self.guard.following.stop();
            return Ok(false);
        }
        let following = self.guard.following.clone();
        let look = following.look(&self.guard.path, || {
            super::outbox::assigned(&self.connection).map(|(_, known)| known)
        })?;
        for (place, end) in look.ends.into_iter().enumerate() {
            self.found.ends.push((end, place == 0 && !look.proved));
        }
        if !look.is_pinned || look.wal_pages < open::CHECKPOINT_PAGES {
            self.found.way_from = open::CHECKPOINT_PAGES;
        } else if look.wal_pages >= self.found.way_from {
            // A program that reads may be in the way: tried again when the WAL has grown some more.
            following.make_way(&self.connection)?;
            self.found.way_from = look.wal_pages + open::CHECKPOINT_AGAIN_PAGES;
        }
        if self.found.ends.is_empty() {
            return Ok(false);
        }
        let durable = following.make_durable()?.unwrap_or_default();
        let mut ends = std::mem::take(&mut self.found.ends);
        let later = ends.split_off(ends.partition_point(|(end, _)| *end <= durable));
        let mut numbered = Ok(());
        for run in ends.chunk_by(|one, other| !one.1 && !other.1) {
            let last: Vec<i64> = run.iter().map(|(end, _)| *end).collect();
            numbered = numbered.and_then(|()| self.assign(&last, run[0].1));
        }
        self.found.ends = later;
        if numbered.is_err() {
            // What was numbered is passed over the next time.
            ends.append(&mut self.found.ends);
            self.found.ends = ends;
        } else if ends.is_empty() {
            return Ok(false);
        }
        numbered.map(|()| true)
    }

    /// The last look found what can't be sent yet: a power cut could undo it.
    pub fn has_found_more(&self) -> bool {
        !self.found.ends.is_empty()
    }

    /// Whether programs may write anything here, or did.
    fn captures(&self) -> Result<bool, Error> {
        self.connection
            .prepare_cached("SELECT 1 FROM _anabranch_layouts LIMIT 1")
            .and_then(|mut any| any.exists([]))
            .doing("look whether any table is captured")
    }

    /// Writes the WAL back where it has become long. Our own reader, which follows it, must not be what keeps it long.
    pub(super) fn tend_wal(&mut self) -> Result<(), Error> {
        let is_behind = !self.state.caught_up;
        if self.guard.wal_is_to_be_emptied() {
            self.guard.following.make_way(&self.connection)?;
        }
        self.guard.tend_wal(&mut self.connection, is_behind)
    }

    /// A program that made a trigger may have put it before ours: they are to be the first to fire.
    fn look_at_schema(&mut self) -> Result<(), Error> {
        if !self.version.look(&self.connection)? {
            return Ok(());
        }
        let write = Write::begin(&self.connection)?;
        let mut catalog = Catalog::clone(&self.catalog);
        catalog.inspect(&self.connection, &self.state.replica_id)?;
        let mut state = self.state.clone();
        if catalog.altered().is_some() {
            state.resume_token = Bytes::new();
            state
                .store(&self.connection)
                .doing("forget the resume token")?;
        }
        let moved = schema::read_version(&self.connection)?;
        write.commit()?;
        self.catalog = Arc::new(catalog);
        self.state = state;
        self.version.moved(moved);
        self.version.due = false;
        Ok(())
    }

    /// To be called now and then: makes rejected writes again of which a program said so, forgets answered ones up to
    /// `forget`, and removes what statements left behind.
    pub fn tidy(&mut self, forget: Option<Lsn>) -> Result<(), Error> {
        self.retry_rejected()?;
        if let Some(up_to) = forget {
            self.forget_answered(up_to)?;
        }
        self.let_go_of_base_rows()?;
        let untidy = self.untidy().doing("look for what statements left")?;
        if untidy.is_empty() {
            return Ok(());
        }
        let write = Write::begin(&self.connection)?;
        for table in &untidy {
            capture::tidy(&self.connection, table).doing("remove what statements left")?;
        }
        write.commit().map(drop)
    }

    /// Removes base rows of tables that nothing is pending in. A statement that then skips the row, or changes nothing of it, has
    /// saved it before it could know: a program that imports all rows again and again would have each of them kept twice,
    /// for good. What such a base row says is what is shown.
    fn let_go_of_base_rows(&self) -> Result<(), Error> {
        let connection = &self.connection;
        for table in self.catalog.names() {
            let is_left = || layout::are_base_rows_left(connection, &table);
            if !is_left().doing("look for base rows")? {
                continue;
            }
            let write = Write::begin(connection)?;
            // A program may have written meanwhile.
            let delete = || match is_left()? {
                true => layout::delete_base_rows(connection, &table),
                false => Ok(()),
            };
            delete().doing("remove base rows that nothing needs")?;
            write.commit()?;
        }
        Ok(())
    }

    /// Tables of which statements left prior rows.
    fn untidy(&self) -> rusqlite::Result<Vec<String>> {
        let mut untidy = Vec::new();
        for table in self.catalog.names() {
            let prior = names::prior(&table);
            if schema::object(&self.connection, &prior)?.is_some()
                && self
                    .connection
                    .prepare_cached(&format!("SELECT 1 FROM {} LIMIT 1", names::quote(&prior)))?
                    .exists([])?
            {
                untidy.push(table);
            }
        }
        Ok(untidy)
    }

    /// Where they stand.
    pub fn local(&mut self) -> Result<Local, Error> {
        let (assigned, _) = self.assigned()?;
        let (answered, _) = self.answered()?;
        let mut settled = self.rejected_up_to(answered).doing("read rejections")?;
        // The streamer forgets them when it is told so.
        if settled > 0 && !self.is_all_durable()? {
            settled = 0;
        }
        let (pending, rejected): (i64, i64) = self
            .connection
            .prepare_cached("SELECT pending, rejected FROM _anabranch_status")
            .and_then(|mut status| status.query_row([], |row| Ok((row.get(0)?, row.get(1)?))))
            .doing("count local writes")?;
        Ok(Local {
            pending: pending.max(0) as u64,
            rejected: rejected.max(0) as u64,
            assigned,
            answered,
            chain: self.state.chain_seq as u64,
            in_doubt: receipts::is_in_doubt(&self.connection, &self.state)
                .doing("look at receipts")?,
            settled: settled as u64,
            wants_ids: !self.leases_wanted()?.is_empty(),
        })
    }

    /// Whether all that is committed by now would survive a power cut.
    fn is_all_durable(&self) -> Result<bool, Error> {
        match self.guard.following.make_all_durable()? {
            Some(is_durable) => Ok(is_durable),
            // It is not followed yet: a lock was in the way of the first look.
            None => Ok(!self.captures()?),
        }
    }

    /// The last rejection up to a local transaction of which the streamer was not told that it is here; 0 if there is none.
    fn rejected_up_to(&self, seq: u64) -> rusqlite::Result<i64> {
        if schema::object(&self.connection, names::REJECTIONS)?.is_none() {
            return Ok(0);
        }
        self.connection
            .prepare_cached(&format!(
                "SELECT coalesce(max(seq), 0) FROM {} WHERE seq <= ?1 AND NOT settled",
                names::REJECTIONS
            ))?
            .query_row([seq as i64], |row| row.get(0))
    }

    /// What was rejected of the local transactions after `after`, up to and with `upto`.
    pub fn rejected(&self, after: u64, upto: u64) -> Result<Vec<Rejected>, Error> {
        let list = || -> rusqlite::Result<_> {
            self.connection
                .prepare_cached(
                    "SELECT id, table_name, sqlstate, message FROM _anabranch_rejected \
                     WHERE txn > ?1 AND txn <= ?2 ORDER BY id",
                )?
                .query_map([after as i64, upto as i64], |row| {
                    Ok(Rejected {
                        id: row.get(0)?,
                        table: row.get(1)?,
                        sqlstate: row.get(2)?,
                        message: row.get(3)?,
                    })
                })?
                .collect()
        };
        list().doing("read what was rejected")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_while_the_file_gets_a_new_id_waits_for_the_new_numbers() {
        let local = |chain, answered, assigned| Local {
            chain,
            answered,
            assigned,
            ..Local::default()
        };
        let then = local(0, 2, 5);
        assert!(!local(0, 4, 9).has_answered(&then));
        assert!(local(0, 5, 9).has_answered(&then));
        // Numbers 3 to 5 are 7 and 8 now, behind what was answered elsewhere.
        assert!(!local(6, 6, 8).has_answered(&then));
        assert!(!local(6, 7, 8).has_answered(&then));
        assert!(local(6, 8, 8).has_answered(&then));
    }
}
