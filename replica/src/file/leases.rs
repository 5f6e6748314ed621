//! Ids of Postgres' sequences that this file may use, also offline.
//!
//! An integer key that Postgres fills in from a sequence can't be made up by SQLite: another replica would make up the same
//! one. So the replica leases blocks of the sequence, and offers them to programs in the view `_anabranch_ids`. Who inserts
//! a row takes its id from there; the trigger that captures the row moves the lease on, in the program's transaction, so a
//! rollback gives the id back.
//!
//! **Never twice.** Ids of a lease were taken from the sequence for good, and a lease is in the file before anybody sees
//! it. A crash between the two wastes ids, and repeats none. A copy of the file would use the same ones as the original:
//! so whoever gives a file a new identity calls [`drop_all`]. A database that was put back to an earlier state gives ids
//! again that it gave before: so a lease is of one epoch. A table that is sent in full may be another one of the same
//! name: so its leases are dropped too.

use anabranch_proto::v1;
use rusqlite::{Connection, OptionalExtension, params};

use super::{Error, File, error::Doing, table::Table, transaction::Write};

/// Blocks that one answer may have: a sequence that others use as well comes in several.
const BLOCKS_MAX: usize = 10_000;

/// Ids that one answer may have: far above what a streamer leases, and what is left of all answers can still be added up.
const IDS_MAX: i64 = 1 << 32;

pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS _anabranch_leases(
    id INTEGER PRIMARY KEY,
    table_name TEXT NOT NULL,
    epoch TEXT,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    step INTEGER NOT NULL,
    taken INTEGER,
    leased INTEGER NOT NULL
) STRICT;
";

/// A lease that is not used up, of the history that the file is of.
const USABLE: &str = "taken IS NOT last AND epoch IS (SELECT epoch FROM _anabranch_state)";

/// The view that programs take ids from: of each table the block that is used at present.
pub(super) fn view() -> String {
    format!(
        "CREATE VIEW _anabranch_ids AS SELECT table_name, \
         CASE WHEN taken IS NULL THEN first ELSE taken + step - (taken - first) % step END AS next_id, \
         last AS last_id, step FROM _anabranch_leases WHERE id IN \
         (SELECT min(id) FROM _anabranch_leases WHERE {USABLE} GROUP BY table_name)"
    )
}

/// The statement of a trigger that moves the leases of a table on: `id` is used. Ids that were passed over are not offered
/// again.
pub(super) fn take(table: &str, id: &str) -> String {
    format!(
        "UPDATE _anabranch_leases SET taken = {id} WHERE table_name = {table} AND CASE WHEN step > 0 \
         THEN {id} >= first AND {id} <= last AND (taken IS NULL OR {id} > taken) \
         ELSE {id} <= first AND {id} >= last AND (taken IS NULL OR {id} < taken) END"
    )
}

/// A file that gets a new identity was copied, or restored: its ids may be used elsewhere. Within a write transaction.
pub(super) fn drop_all(connection: &Connection) -> rusqlite::Result<()> {
    connection
        .execute("DELETE FROM _anabranch_leases", [])
        .map(drop)
}

/// The table is gone, or another one may come in its place. Within a write transaction.
pub(super) fn drop_of(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM _anabranch_leases WHERE table_name = ?1")?
        .execute([table])
        .map(drop)
}

impl File {
    /// The tables that should have more ids, by schema and name in Postgres: less than half is left of what was leased
    /// last.
    pub fn leases_wanted(&self) -> Result<Vec<(String, String)>, Error> {
        let mut wanted = Vec::new();
        for table in self.stream.tables.values() {
            if table.is_leased() && self.is_short(table).doing("count leased ids")? {
                wanted.push((table.schema.clone(), table.postgres_name.clone()));
            }
        }
        Ok(wanted)
    }

    fn is_short(&self, table: &Table) -> rusqlite::Result<bool> {
        let (left, leased): (i64, i64) = self
            .connection
            .prepare_cached(&format!(
                "SELECT coalesce(sum((last - coalesce(taken, first - step)) / step), 0), \
                 coalesce(max(leased) FILTER (WHERE id = (SELECT max(id) FROM _anabranch_leases WHERE table_name = ?1)), 0) \
                 FROM _anabranch_leases WHERE table_name = ?1 AND {USABLE}"
            ))?
            .query_row([&table.name], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(left == 0 || left < leased / 2)
    }

    /// Keeps ids that were leased.
    pub fn lease(&mut self, ids: &v1::Ids) -> Result<(), Error> {
        let is_named = |table: &&std::sync::Arc<Table>| {
            table.is_leased() && (&table.schema, &table.postgres_name) == (&ids.schema, &ids.table)
        };
        let Some(table) = self.stream.tables.values().find(is_named) else {
            // It left the shapes meanwhile. The ids are lost.
            return Ok(());
        };
        let leased = count(&ids.blocks)
            .ok_or_else(|| Error::Stream(format!("ids of {} that make no sense", table.name)))?;
        if leased == 0 {
            return Ok(());
        }
        let keep = || -> rusqlite::Result<()> {
            let epoch: Option<String> = self
                .connection
                .prepare_cached("SELECT epoch FROM _anabranch_state")?
                .query_row([], |row| row.get(0))
                .optional()?
                .flatten();
            self.connection
                .prepare_cached(&format!(
                    "DELETE FROM _anabranch_leases WHERE NOT ({USABLE})"
                ))?
                .execute([])?;
            let mut insert = self.connection.prepare_cached(
                "INSERT INTO _anabranch_leases(table_name, epoch, first, last, step, leased) VALUES(?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            for block in &ids.blocks {
                let (first, last, step) = (block.first, block.last, block.step);
                insert.execute(params![table.name, epoch, first, last, step, leased])?;
            }
            Ok(())
        };
        let write = Write::begin(&self.connection)?;
        keep().doing("keep leased ids")?;
        write.commit()?;
        tracing::debug!(table = table.name, leased, "ids leased");
        Ok(())
    }
}

/// How many ids these are; `None`: one of them is not a block, or they are more than anybody needs. Where SQLite's arithmetic
/// goes one step beyond an end it must not leave 64 bits: it would go on in floats.
fn count(blocks: &[v1::Block]) -> Option<i64> {
    if blocks.len() > BLOCKS_MAX {
        return None;
    }
    let mut ids = 0i64;
    for block in blocks {
        block.first.checked_sub(block.step)?;
        block.last.checked_add(block.step)?;
        let between = block.last.checked_sub(block.first)?;
        if between.checked_rem(block.step)? != 0 {
            return None;
        }
        let more = between.checked_div(block.step)?.checked_add(1)?;
        if more < 1 {
            return None;
        }
        ids = ids.checked_add(more)?;
    }
    Some(ids).filter(|ids| *ids <= IDS_MAX)
}
