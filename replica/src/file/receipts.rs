//! What became of local transactions: which are answered, and which of those were rejected.
//!
//! The streamer's word on a local transaction is a row of a table in Postgres, so it comes as rows do
//! (`_anabranch_receipts`, `_anabranch_rejections`), in the commit that has the effects. When the row's `seq` moved, then in
//! that same SQLite transaction the entries up to it stop being pending, their keys are rebuilt (`overlay`), and those
//! of rejected transactions are listed in `_anabranch_rejected` with what they wanted to do.
//!
//! Answered entries stay for a while: after a failover that lost commits the receipt goes back, they are pending again,
//! and are sent again. What was listed of them as rejected stays listed until they are answered anew: where the token is of another
//! subject there may be no second answer. `forget` removes what is old enough; `rejected` tells programs what was rejected, and
//! makes it again if they say so; what they decided on is never listed again.
//!
//! A receipt is only taken if its hash is the one that we know of that `seq`: otherwise this file is not the one that sent
//! it (it was copied, or restored from a backup), and its entries are not answered by it: see `identity`.

mod forget;
mod rejected;

pub(super) use rejected::listed_anew;
pub use rejected::{Decision, Which};

use anabranch_proto::Lsn;
use rusqlite::{Connection, OptionalExtension, params};

use super::{
    grammar::Tables,
    layout, names,
    overlay::{self, Overlay},
    schema::object,
    state::State,
    write::RowError,
};

/// Our own tables for local writes. `_anabranch_rejected` is for programs; `_anabranch_decided` has the entries that they removed from
/// there, as long as those could be answered anew. A row of `txn` 0 is removed by ourselves.
///
/// `answered` is in the file as the rows of `_anabranch_local` that have an `answered_lsn`; an index of only those finds the
/// last one without looking at all that wait.
pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS _anabranch_head(
    id INTEGER PRIMARY KEY CHECK(id = 1),
    last INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS _anabranch_local(
    seq INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    hash BLOB NOT NULL,
    merged INTEGER NOT NULL,
    captured_time TEXT NOT NULL,
    answered_lsn TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS _anabranch_local_last ON _anabranch_local(last);
CREATE INDEX IF NOT EXISTS _anabranch_local_answered ON _anabranch_local(last) WHERE answered_lsn IS NOT NULL;
CREATE TABLE IF NOT EXISTS _anabranch_layouts(
    entries TEXT PRIMARY KEY,
    table_name TEXT NOT NULL,
    layout TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _anabranch_rejected(
    id INTEGER PRIMARY KEY,
    txn INTEGER NOT NULL,
    table_name TEXT NOT NULL,
    operation TEXT NOT NULL,
    key TEXT NOT NULL,
    changes TEXT NOT NULL,
    sqlstate TEXT,
    message TEXT,
    constraint_name TEXT,
    outcome TEXT NOT NULL,
    rejected_time TEXT NOT NULL,
    action TEXT,
    merged INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS _anabranch_judged(
    seq INTEGER PRIMARY KEY,
    outcome TEXT NOT NULL,
    sqlstate TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS _anabranch_decided(
    id INTEGER PRIMARY KEY
) STRICT;
CREATE TRIGGER IF NOT EXISTS _anabranch_decide AFTER DELETE ON _anabranch_rejected WHEN old.txn > 0
BEGIN
    INSERT OR IGNORE INTO _anabranch_decided VALUES(old.id);
END;
";

/// The greatest id of an answered entry, as a scalar subquery.
pub(super) const BOUNDARY: &str =
    "(SELECT coalesce(max(last), 0) FROM _anabranch_local WHERE answered_lsn IS NOT NULL)";

/// Where pending entries begin: those with greater ids are pending.
pub(super) fn boundary(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(&format!("SELECT {BOUNDARY}"))?
        .query_row([], |row| row.get(0))
}

/// The last local transaction that is answered, and its hash.
pub(super) fn answered(connection: &Connection) -> rusqlite::Result<Option<(i64, Vec<u8>)>> {
    connection
        .prepare_cached(
            "SELECT seq, hash FROM _anabranch_local WHERE answered_lsn IS NOT NULL ORDER BY last DESC LIMIT 1",
        )?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

/// Up to which entry the local transactions up to `seq` go.
pub(super) fn last_of(connection: &Connection, seq: i64) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "SELECT last FROM _anabranch_local WHERE seq <= ?1 ORDER BY seq DESC LIMIT 1",
        )?
        .query_row([seq], |row| row.get(0))
        .optional()
        .map(|last| last.unwrap_or(0))
}

/// Up to which local transaction the entries are forgotten. Its row stays, so that it is known where the next begins.
pub(super) fn forgotten(connection: &Connection) -> rusqlite::Result<i64> {
    let first: Option<i64> = connection
        .prepare_cached("SELECT min(seq) FROM _anabranch_local")?
        .query_row([], |row| row.get(0))?;
    Ok(first.filter(|first| *first > 1).unwrap_or(0))
}

/// What the receipt says.
enum Receipt {
    /// Answered up to this one.
    Upto(i64),
    /// There is none.
    Missing,
    /// It is of a local transaction that this file did not send, or that is so old that what followed it is forgotten.
    Foreign,
}

/// Whether this file sent the local transaction `seq` with this hash, and has all that comes behind it.
pub(super) fn is_known(
    connection: &Connection,
    chain_seq: i64,
    seq: i64,
    hash: &[u8],
) -> rusqlite::Result<bool> {
    let known: Option<Vec<u8>> = connection
        .prepare_cached("SELECT hash FROM _anabranch_local WHERE seq = ?1")?
        .query_row([seq], |row| row.get(0))
        .optional()?;
    Ok(seq > chain_seq && known.is_some_and(|known| known == hash))
}

fn receipt(connection: &Connection, state: &State) -> rusqlite::Result<Receipt> {
    let receipt: Option<(i64, Vec<u8>)> = connection
        .prepare_cached(&format!(
            "SELECT seq, hash FROM {} WHERE replica = ?1",
            names::RECEIPTS
        ))?
        .query_row([&state.replica_id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(match receipt {
        None => Receipt::Missing,
        Some((seq, hash)) if is_known(connection, state.chain_seq, seq, &hash)? => {
            Receipt::Upto(seq)
        }
        Some(_) => Receipt::Foreign,
    })
}

/// Whether the streamer must be asked what became of local writes, since the receipts don't tell.
pub(super) fn is_in_doubt(connection: &Connection, state: &State) -> rusqlite::Result<bool> {
    if object(connection, names::RECEIPTS)?.is_none() {
        return Ok(false);
    }
    Ok(state.settles_elsewhere() || matches!(receipt(connection, state)?, Receipt::Foreign))
}

/// Takes what came of receipts and rejections, as of the position. The keys that are to be rebuilt are touched. `other_history`: it is
/// of another one than before, in which the same may have been answered again, and otherwise.
pub(super) fn take(
    connection: &Connection,
    state: &mut State,
    tables: &Tables,
    overlay: &mut Overlay<'_>,
    other_history: bool,
) -> Result<(), RowError> {
    let lsn = state.position.map_or(Lsn(0), |position| position.lsn);
    let before = answered(connection)?.map_or(0, |(seq, _)| seq);
    if (state.position).is_some_and(|position| state.settles_at(position)) {
        state.settle = None;
    }
    // What was forgotten can't be pending again, nor what was settled.
    let floor = match state.settle {
        Some(_) => before,
        None => forgotten(connection)?.max(state.chain_seq),
    };
    let (now, listed) = match receipt(connection, state)? {
        Receipt::Upto(seq) => {
            state.answered_once = 0;
            (seq.max(floor), if other_history { floor } else { before })
        }
        Receipt::Missing => {
            state.answered_once = state.answered_once.max(before);
            (floor, before)
        }
        Receipt::Foreign => (before.max(floor), before),
    };
    if now > listed {
        // What was answered before this id began is as it was.
        let after = last_of(connection, listed.max(state.chain_seq))?;
        rejected::listed_anew(connection, (after, last_of(connection, now)?), || {
            let declared = |name: &str| tables.values().any(|table| table.name == name);
            if declared(names::REJECTIONS) {
                rejected::list(connection, &state.replica_id, listed, now)?;
            }
            rejected::list_judged(connection, listed, now)
        })?;
    }
    if now == before {
        return Ok(());
    }
    let range = (before.min(now), before.max(now));
    let (after, last) = (last_of(connection, range.0)?, last_of(connection, range.1)?);
    if now > before {
        connection.execute(
            "UPDATE _anabranch_local SET answered_lsn = ?1 WHERE seq > ?2 AND seq <= ?3",
            params![lsn.to_string(), before, now],
        )?;
    } else {
        tracing::warn!(before, now, "answered local transactions are pending again");
        connection.execute(
            "UPDATE _anabranch_local SET answered_lsn = NULL WHERE seq > ?1",
            [now],
        )?;
    }
    let concerned: Vec<String> = layout::having(connection, after, last)?
        .into_iter()
        .map(|source| source.table)
        .collect();
    for (id, table) in tables
        .iter()
        .filter(|(_, table)| concerned.contains(&table.name))
    {
        if now < before {
            // After a reset all base rows are rebuilt, and no others: these must be among them.
            overlay::save(connection, table, after, last)?;
        }
        overlay::each_key(connection, table, after, last, |key| {
            overlay.touch(*id, key);
            Ok(())
        })?;
    }
    tracing::debug!(
        before,
        now,
        entries = last - after,
        "local transactions were answered"
    );
    Ok(())
}
