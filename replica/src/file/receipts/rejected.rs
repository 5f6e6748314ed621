//! Rejected local transactions: what programs are told of them, and how they are tried again.

use jiff::Timestamp;
use rusqlite::{Connection, params};
use serde_json::{Map, Value as Json};

use super::{
    super::{
        Error, File,
        capture::quiet,
        error::{self, Doing},
        grammar::Tables,
        identity,
        layout::{self, Layout, Source},
        names::{self, quote},
        overlay::{self, Entry, Operation, Overlay},
        status::time_text,
        table::Table,
        transaction::Write,
        write::{self, RowError},
    },
    BOUNDARY, last_of,
};

/// What an entry of a rejected transaction is that was not itself the reason.
const ROLLED_BACK: &str = "rolled_back";

/// What is said of a rejected local transaction.
struct Rejection {
    seq: i64,
    /// Which entry is why; `None`: the transaction as a whole.
    entry: Option<i64>,
    outcome: String,
    sqlstate: Option<String>,
    message: Option<String>,
    constraint_name: Option<String>,
    /// It may hold several transactions of programs.
    merged: bool,
}

/// What `list` lists of the entries in the range `(after, last]` is all that is listed of them afterwards: they may have been
/// rejected once before, and have taken effect this time.
pub(in super::super) fn listed_anew(
    connection: &Connection,
    range: (i64, i64),
    list: impl FnOnce() -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    // With each receipt, so they are not compiled each time.
    let execute = |sql| connection.prepare_cached(sql)?.execute(range);
    execute("UPDATE _anabranch_rejected SET txn = 0 WHERE id > ?1 AND id <= ?2")?;
    list()?;
    execute("DELETE FROM _anabranch_rejected WHERE txn = 0 AND id > ?1 AND id <= ?2").map(drop)
}

/// Lists the entries of those that were rejected among the transactions after `before` and up to `now`.
pub(super) fn list(
    connection: &Connection,
    replica_id: &str,
    before: i64,
    now: i64,
) -> rusqlite::Result<()> {
    let rejections: Vec<Rejection> = connection
        .prepare_cached(&format!(
            "SELECT seq, entry, outcome, sqlstate, message, constraint_name, \
             coalesce((SELECT merged FROM _anabranch_local AS l WHERE l.seq = r.seq), 0) FROM {} AS r \
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
                merged: row.get(6)?,
            })
        })?
        .collect::<Result<_, _>>()?;
    list_all(connection, &rejections)
}

/// The same of what was sent by another copy of the file.
pub(super) fn list_judged(connection: &Connection, before: i64, now: i64) -> rusqlite::Result<()> {
    let rejections: Vec<Rejection> = connection
        .prepare_cached(
            "SELECT seq, outcome, sqlstate FROM _anabranch_judged WHERE seq > ?1 AND seq <= ?2 ORDER BY seq",
        )?
        .query_map([before, now], |row| {
            let outcome: String = row.get(1)?;
            let message = match &*outcome {
                identity::UNKNOWN => {
                    "nobody can tell any more whether another copy of this file sent it: look, then try it again or delete this row"
                }
                _ => "it was rejected when another copy of this file sent it",
            };
            Ok(Rejection {
                seq: row.get(0)?,
                entry: None,
                merged: outcome == identity::UNKNOWN,
                outcome,
                sqlstate: row.get(2)?,
                message: Some(message.to_owned()),
                constraint_name: None,
            })
        })?
        .collect::<Result<_, _>>()?;
    connection
        .prepare_cached("DELETE FROM _anabranch_judged WHERE seq > ?1 AND seq <= ?2")?
        .execute([before, now])?;
    list_all(connection, &rejections)
}

fn list_all(connection: &Connection, rejections: &[Rejection]) -> rusqlite::Result<()> {
    let time = time_text(Timestamp::now());
    for rejection in rejections {
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
        for source in layout::having(connection, after, last)? {
            list_entries(connection, &source, after, last, rejection, &time)?;
        }
        mark_guilty(connection, rejection)?;
        // Last: which entry is why is counted among all of them.
        connection.execute(
            "DELETE FROM _anabranch_rejected WHERE txn = ?1 AND id IN (SELECT id FROM _anabranch_decided)",
            [rejection.seq],
        )?;
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
    // One that is there keeps what the program wants to do with it.
    let mut insert = connection.prepare_cached(
        "INSERT INTO _anabranch_rejected(id, txn, table_name, operation, key, changes, outcome, rejected_time, merged) \
         VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) \
         ON CONFLICT(id) DO UPDATE SET (txn, outcome, rejected_time, merged, sqlstate, message, constraint_name) = \
         (excluded.txn, excluded.outcome, excluded.rejected_time, excluded.merged, NULL, NULL, NULL)",
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
            time,
            rejection.merged
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

/// An entry's operation, the key as it was, as an array, and the new values of what changed (of a delete: the row as it
/// was), as an object.
fn in_json(entry: &Entry, layout: &Layout) -> (&'static str, Json, Json) {
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

/// Rows of `_anabranch_rejected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// One, by its `id`.
    Change(i64),
    /// Those of a transaction, by its `txn`.
    Transaction(i64),
}

/// What is to become of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// They are made again.
    Retry,
    /// They are forgotten.
    Discard,
}

impl File {
    /// Decides on rejected changes, as programs do by SQL. Says how many there were; what is to be made again is at the
    /// next look.
    pub fn decide(&mut self, which: Which, decision: Decision) -> Result<u64, Error> {
        let (column, number) = match which {
            Which::Change(id) => ("id", id),
            Which::Transaction(txn) => ("txn", txn),
        };
        let sql = match decision {
            Decision::Retry => "UPDATE _anabranch_rejected SET action = 'retry'",
            Decision::Discard => "DELETE FROM _anabranch_rejected",
        };
        let write = Write::begin(&self.connection)?;
        let count = self
            .connection
            .prepare_cached(&format!("{sql} WHERE {column} = ?1"))
            .and_then(|mut decide| decide.execute([number]))
            .doing("decide on rejected writes")?;
        write.commit()?;
        Ok(count as u64)
    }

    /// Makes the changes again of which a program said so (`UPDATE _anabranch_rejected SET action = 'retry'`): they
    /// become new entries, behind all others, and their rows go. Those of tables that can't be written now wait, and those that are
    /// pending again: they may take effect. Says how many it were.
    pub fn retry_rejected(&mut self) -> Result<u64, Error> {
        let connection = &self.connection;
        let ids = format!(
            "SELECT id FROM _anabranch_rejected WHERE {} ORDER BY id",
            wanted()
        );
        let any = connection
            .prepare_cached(&ids)
            .and_then(|mut ids| ids.exists([]))
            .doing("look for writes that are to be tried again")?;
        if !any {
            return Ok(0);
        }
        let write = Write::begin(connection)?;
        // Each time: what was last applied may have thought otherwise.
        quiet::run_triggers(connection, self.catalog.has_triggers())
            .doing("set whether triggers run")?;
        let mut overlay = Overlay::new(connection);
        let retry = || -> Result<u64, RowError> {
            let ids: Vec<i64> = connection
                .prepare_cached(&ids)?
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
        let count = match retry() {
            Ok(count) => count,
            Err(RowError::Ignored) => return self.refuse_retry(write, "RAISE(IGNORE)"),
            Err(RowError::Sqlite(error)) if error::is_of_statement(&error) => {
                return self.refuse_retry(write, &error.to_string());
            }
            Err(RowError::Sqlite(error)) => {
                return Err(error::sqlite("make rejected writes again", error));
            }
            Err(RowError::Malformed(what)) => {
                return Err(Error::Definite(format!(
                    "make rejected writes again: {what}"
                )));
            }
        };
        write.commit()?;
        if count > 0 {
            tracing::info!(count, "rejected writes are made again");
        }
        Ok(count)
    }

    /// A trigger of a program does not let them be made again: as with a write of its own, that is for the program to settle.
    /// It is said once, and nothing else waits for it.
    fn refuse_retry(&self, write: Write<'_>, why: &str) -> Result<u64, Error> {
        drop(write);
        tracing::warn!(
            why,
            "a program's trigger refused rejected writes that were to be made again"
        );
        let write = Write::begin(&self.connection)?;
        self.connection
            .execute(
                &format!(
                    "UPDATE _anabranch_rejected SET action = 'refused' WHERE {}",
                    wanted()
                ),
                [],
            )
            .doing("say that writes are not made again")?;
        write.commit()?;
        Ok(0)
    }
}

/// Rows that are to be made again now: what is pending again may yet take effect.
fn wanted() -> String {
    format!("action = 'retry' AND id <= {BOUNDARY}")
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
