//! What became of local transactions: which are answered, and which of those were rejected.
//!
//! The streamer's word on a local transaction is a row of a table in Postgres, so it comes as rows do
//! (`_anabranch_receipts`, `_anabranch_rejections`), in the commit that has the effects. When the row's `seq` moved, then in
//! that same SQLite transaction the entries up to it stop being pending, their keys are rebuilt (`overlay`), and those
//! of rejected transactions are listed in `_anabranch_rejected` with what they wanted to do.
//!
//! Answered entries stay for a while: after a failover that lost commits the receipt goes back, they are pending again,
//! and are sent again. [`File::forget_answered`] removes what is old enough.
//!
//! A receipt is only taken if its hash is the one that we know of that `seq`: otherwise this file is not the one that sent
//! it (it was copied, or restored from a backup), and its entries are not answered by it.

use anabranch_proto::Lsn;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::{Map, Value as Json};

use super::{
    Error, File,
    error::{self, Doing},
    grammar::Tables,
    layout::{self, Layout, Source},
    names::{self, quote},
    outbox,
    overlay::{self, Entry, Operation, Overlay},
    schema,
    state::replace_view,
    status::time_text,
    table::Table,
    transaction::Write,
    write::{self, RowError},
};

/// Our own tables for local writes. `_anabranch_rejected` is for programs.
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
    action TEXT
) STRICT;
";

/// The greatest id of an answered entry, as a scalar subquery.
pub(super) const BOUNDARY: &str =
    "(SELECT coalesce(max(last), 0) FROM _anabranch_local WHERE answered_lsn IS NOT NULL)";

/// Entries that are removed in one write transaction.
const FORGET_ROWS: usize = 10_000;

/// What an entry of a rejected transaction is that was not itself the reason.
const ROLLED_BACK: &str = "rolled_back";

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
fn forgotten(connection: &Connection) -> rusqlite::Result<i64> {
    let first: Option<i64> = connection
        .prepare_cached("SELECT min(seq) FROM _anabranch_local")?
        .query_row([], |row| row.get(0))?;
    Ok(first.filter(|first| *first > 1).unwrap_or(0))
}

/// What the receipt says, if it speaks of this file.
fn receipt(connection: &Connection, replica_id: &str) -> rusqlite::Result<Option<i64>> {
    let receipt: Option<(i64, Vec<u8>)> = connection
        .prepare_cached(&format!(
            "SELECT seq, hash FROM {} WHERE replica = ?1",
            names::RECEIPTS
        ))?
        .query_row([replica_id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((seq, hash)) = receipt else {
        return Ok(Some(0));
    };
    let known: Option<Vec<u8>> = connection
        .prepare_cached("SELECT hash FROM _anabranch_local WHERE seq = ?1")?
        .query_row([seq], |row| row.get(0))
        .optional()?;
    let is_ours = match known {
        Some(known) => known == hash,
        // It went back behind what is kept, or is of a transaction that this file never made.
        None => connection
            .prepare_cached("SELECT 1 FROM _anabranch_local WHERE seq > ?1")?
            .exists([seq])?,
    };
    if !is_ours {
        tracing::warn!(
            seq,
            "a receipt is of a local transaction that this file did not make: was it copied, or restored from a backup?"
        );
    }
    Ok(is_ours.then_some(seq))
}

/// Takes what came of receipts and rejections, as of `lsn`. The keys that are to be rebuilt are touched.
pub(super) fn take(
    connection: &Connection,
    replica_id: &str,
    lsn: Lsn,
    tables: &Tables,
    overlay: &mut Overlay<'_>,
) -> Result<(), RowError> {
    let Some(now) = receipt(connection, replica_id)? else {
        return Ok(());
    };
    // What was forgotten can't be pending again.
    let now = now.max(forgotten(connection)?);
    let before = answered(connection)?.map_or(0, |(seq, _)| seq);
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
        let declared = |name: &str| tables.values().any(|table| table.name == name);
        if declared(names::REJECTIONS) {
            list_rejected(connection, replica_id, before, now)?;
        }
    } else {
        tracing::warn!(before, now, "answered local transactions are pending again");
        for sql in [
            "UPDATE _anabranch_local SET answered_lsn = NULL WHERE seq > ?1",
            "DELETE FROM _anabranch_rejected WHERE txn > ?1",
        ] {
            connection.execute(sql, [now])?;
        }
    }
    let concerned: Vec<String> = layout::having(connection, after, last)?
        .into_iter()
        .map(|source| source.table)
        .collect();
    for (id, table) in tables
        .iter()
        .filter(|(_, table)| concerned.contains(&table.name))
    {
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

/// What is said of a rejected local transaction.
struct Rejection {
    seq: i64,
    /// Which entry is why; `None`: the transaction as a whole.
    entry: Option<i64>,
    outcome: String,
    sqlstate: Option<String>,
    message: Option<String>,
    constraint_name: Option<String>,
}

fn list_rejected(
    connection: &Connection,
    replica_id: &str,
    before: i64,
    now: i64,
) -> rusqlite::Result<()> {
    let rejections: Vec<Rejection> = connection
        .prepare_cached(&format!(
            "SELECT seq, entry, outcome, sqlstate, message, constraint_name FROM {} \
             WHERE replica = ?1 AND seq > ?2 AND seq <= ?3 ORDER BY seq",
            names::REJECTIONS
        ))?
        .query_map(params![replica_id, before, now], |row| {
            Ok(Rejection {
                seq: row.get(0)?,
                entry: row.get(1)?,
                outcome: row.get::<_, Option<String>>(2)?.unwrap_or_default(),
                sqlstate: row.get(3)?,
                message: row.get(4)?,
                constraint_name: row.get(5)?,
            })
        })?
        .collect::<Result<_, _>>()?;
    let time = time_text(Timestamp::now());
    for rejection in &rejections {
        tracing::warn!(
            txn = rejection.seq,
            sqlstate = rejection.sqlstate,
            outcome = rejection.outcome,
            "a local transaction was rejected; see _anabranch_rejected"
        );
        let (after, last) = (
            last_of(connection, rejection.seq - 1)?,
            last_of(connection, rejection.seq)?,
        );
        connection.execute(
            "DELETE FROM _anabranch_rejected WHERE txn = ?1",
            [rejection.seq],
        )?;
        for source in layout::having(connection, after, last)? {
            list_entries(connection, &source, after, last, rejection, &time)?;
        }
        mark_guilty(connection, rejection)?;
    }
    Ok(())
}

fn list_entries(
    connection: &Connection,
    source: &Source,
    after: i64,
    last: i64,
    rejection: &Rejection,
    time: &str,
) -> rusqlite::Result<()> {
    let mut entries = connection.prepare(&format!(
        "SELECT {} FROM {} WHERE id > ?1 AND id <= ?2 ORDER BY id",
        Entry::columns(&source.layout),
        quote(&source.entries)
    ))?;
    let mut insert = connection.prepare_cached(
        "INSERT INTO _anabranch_rejected(id, txn, table_name, operation, key, changes, outcome, rejected_time) \
         VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    let mut rows = entries.query([after, last])?;
    while let Some(row) = rows.next()? {
        let entry = Entry::read(row, &source.layout)?;
        let (operation, key, changes) = in_json(&entry, &source.layout);
        insert.execute(params![
            entry.id,
            rejection.seq,
            source.table,
            operation,
            key.to_string(),
            changes.to_string(),
            ROLLED_BACK,
            time
        ])?;
    }
    Ok(())
}

/// The entry that is why has the reason; all have where none is named.
fn mark_guilty(connection: &Connection, rejection: &Rejection) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE _anabranch_rejected SET outcome = ?2, sqlstate = ?3, message = ?4, constraint_name = ?5 \
             WHERE txn = ?1 AND (?6 IS NULL OR id = \
             (SELECT id FROM _anabranch_rejected WHERE txn = ?1 ORDER BY id LIMIT 1 OFFSET max(?6, 0)))",
        )?
        .execute(params![
            rejection.seq,
            rejection.outcome,
            rejection.sqlstate,
            rejection.message,
            rejection.constraint_name,
            rejection.entry
        ])
        .map(drop)
}

impl File {
    /// Removes answered entries whose answers came up to `up_to`, in steps: they can't be lost any more, since that is on
    /// all standbys, or so long ago that nobody would fail over to before it. Those of rejected transactions stay until
    /// their rows in `_anabranch_rejected` are gone, to be tried again.
    pub fn forget_answered(&mut self, up_to: Lsn) -> Result<(), Error> {
        let connection = &self.connection;
        let (newest, last) = forgettable(connection, up_to).doing("look for answered entries")?;
        if newest == 0 {
            return Ok(());
        }
        // Transactions first: one that is not whole any more must not be sent again.
        let mut steps = vec![(
            format!(
                "DELETE FROM _anabranch_local WHERE seq IN \
                 (SELECT seq FROM _anabranch_local WHERE seq < ?1 ORDER BY seq DESC LIMIT {FORGET_ROWS})"
            ),
            newest,
        )];
        for source in layout::having(connection, 0, last).doing("look for answered entries")? {
            let entries = quote(&source.entries);
            let step = format!(
                "DELETE FROM {entries} WHERE id IN (SELECT id FROM {entries} WHERE id <= ?1 \
                 AND id NOT IN (SELECT id FROM _anabranch_rejected) LIMIT {FORGET_ROWS})"
            );
            steps.push((step, last));
        }
        for (step, up_to) in &steps {
            loop {
                let write = Write::begin(connection)?;
                let deleted = connection
                    .execute(step, [up_to])
                    .doing("forget answered entries")?;
                write.commit()?;
                if deleted < FORGET_ROWS {
                    break;
                }
            }
        }
        self.drop_empty_layouts()
    }

    fn drop_empty_layouts(&mut self) -> Result<(), Error> {
        let connection = &self.connection;
        let write = Write::begin(connection)?;
        self.version.look(connection)?;
        let drop_empty = || {
            if layout::drop_empty(connection)? {
                replace_view(connection, "_anabranch_outbox", &outbox::view(connection)?)?;
            }
            Ok(())
        };
        drop_empty().doing("drop entries tables that are not used any more")?;
        let moved = schema::read_version(connection)?;
        write.commit()?;
        self.version.moved(moved);
        Ok(())
    }

    /// Makes the changes again of which a program said so (`UPDATE _anabranch_rejected SET action = 'retry'`): they
    /// become new entries, behind all others, and their rows go. Those of tables that can't be written now wait. Says how
    /// many it were.
    pub fn retry_rejected(&mut self) -> Result<u64, Error> {
        let connection = &self.connection;
        let wanted = "SELECT id FROM _anabranch_rejected WHERE action = 'retry' ORDER BY id";
        let any = connection
            .prepare_cached(wanted)
            .and_then(|mut wanted| wanted.exists([]))
            .doing("look for writes that are to be tried again")?;
        if !any {
            return Ok(0);
        }
        let write = Write::begin(connection)?;
        let mut overlay = Overlay::new(connection);
        let retry = || -> Result<u64, RowError> {
            let ids: Vec<i64> = connection
                .prepare_cached(wanted)?
                .query_map([], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            let mut count = 0;
            for id in ids {
                count += u64::from(retry(connection, id, &self.stream.tables, &mut overlay)?);
            }
            let catalog = &self.catalog;
            let watched = |table: &Table| {
                let synced = catalog.get(&table.name);
                synced
                    .is_some_and(|synced| synced.has_triggers)
                    .then(|| self.quiet.clone())
            };
            overlay
                .rebuild(&self.stream.tables, watched, None)
                .map_err(|(_, error)| error)?;
            Ok(count)
        };
        let count = retry().map_err(|error| match error {
            RowError::Sqlite(error) => error::sqlite("make rejected writes again", error),
            RowError::Malformed(_) | RowError::Ignored => Error::Definite(
                "a program's trigger made SQLite skip a rejected write that is made again".into(),
            ),
        })?;
        write.commit()?;
        if count > 0 {
            tracing::info!(count, "rejected writes are made again");
        }
        Ok(count)
    }
}

/// The newest local transaction that can be forgotten, and its last entry.
fn forgettable(connection: &Connection, up_to: Lsn) -> rusqlite::Result<(i64, i64)> {
    let mut answered = connection
        .prepare_cached("SELECT seq, last, answered_lsn FROM _anabranch_local ORDER BY seq")?;
    let mut rows = answered.query([])?;
    let mut newest = (0, 0);
    while let Some(row) = rows.next()? {
        let lsn: Option<String> = row.get(2)?;
        if lsn
            .and_then(|lsn| lsn.parse::<Lsn>().ok())
            .is_none_or(|lsn| lsn > up_to)
        {
            break;
        }
        newest = (row.get(0)?, row.get(1)?);
    }
    // The first would look as if nothing was forgotten.
    Ok(if newest.0 > 1 { newest } else { (0, 0) })
}

/// Makes one entry again. False: its table is not there, or has another key, or its values are gone.
fn retry(
    connection: &Connection,
    id: i64,
    tables: &Tables,
    overlay: &mut Overlay<'_>,
) -> Result<bool, RowError> {
    let Some(source) = layout::having(connection, id - 1, id)?.pop() else {
        return Ok(false);
    };
    let Some((table_id, table)) = tables
        .iter()
        .find(|(_, table)| table.name == source.table && table.writable)
    else {
        return Ok(false);
    };
    let Some(places) = source.layout.places_for(table) else {
        return Ok(false);
    };
    let entry = connection
        .prepare_cached(&format!(
            "SELECT {} FROM {} WHERE id = ?1",
            Entry::columns(&source.layout),
            quote(&source.entries)
        ))?
        .query_row([id], |row| Entry::read(row, &source.layout))?
        .placed(&places);
    overlay::enter(connection, table, &entry, &time_text(Timestamp::now()))?;
    for key in [entry.old_key(table), entry.new_key(table)] {
        key.into_iter()
            .for_each(|key| overlay.touch(*table_id, key));
    }
    connection
        .prepare_cached("DELETE FROM _anabranch_rejected WHERE id = ?1")?
        .execute([id])?;
    Ok(true)
}

/// An entry's operation, the key as it was, as an array, and the new values of what changed (of a delete: the row as it
/// was), as an object.
pub(super) fn in_json(entry: &Entry, layout: &Layout) -> (&'static str, Json, Json) {
    let (key_row, values) = match entry.operation {
        Operation::Insert => (&entry.new, &entry.new),
        Operation::Update => (&entry.old, &entry.new),
        Operation::Delete => (&entry.old, &entry.old),
    };
    let value = |value: &rusqlite::types::Value| match value {
        rusqlite::types::Value::Real(real) if real.is_infinite() => {
            let sign = if *real < 0.0 { "-" } else { "" };
            format!("{sign}Infinity").into()
        }
        value => write::json(value.into()),
    };
    let key = layout.key.iter().map(|&place| value(&key_row[place]));
    let changes: Map<String, Json> = layout
        .columns
        .iter()
        .enumerate()
        .filter(|(place, _)| entry.operation != Operation::Update || entry.changed[*place])
        .map(|(place, field)| (field.name.clone(), value(&values[place])))
        .collect();
    (entry.operation.name(), key.collect(), changes.into())
}
