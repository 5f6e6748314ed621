//! Copies tables out of Postgres, as of a slot's snapshot, into the mirror.
//!
//! ```text
//! [`CONNECTIONS`] × ( socket ─▶ driver task ─▶ copy task: text ─▶ records ─▶ batch ) ─▶ bounded channel ─▶ mirror's thread
//! ```
//!
//! so that Postgres' COPY, the parsing and SQLite overlap. The schema that was compiled must be that of the snapshot
//! and of now: all tables are locked (ACCESS SHARE, as by any SELECT) while they are copied, and looked at after the
//! lock. A TRUNCATE or a rewrite between the snapshot and the lock shows as another file of the table: COPY would see
//! it empty (see "Caveats" in the manual's chapter on MVCC), so the copy is given up, and made again.
//!
//! No order is asked for: Postgres would have to sort. Rows come in the order of the heap, which mostly is that of the key.

mod progress;
mod text;

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anabranch_proto::{Lsn, record::Builder};
use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_stream::StreamExt as _;

use self::progress::Counters;
pub use self::progress::{Line, Progress};
use super::{
    catalog::{self, Name},
    setup::qualified,
    sql::{Client, Error, identifier},
    target::Target,
};
use crate::{
    mirror::{self, Mirror},
    table::{Oid, Table},
};

/// How many tables are copied at a time. The mirror's one thread is the limit: two keep it busy, and a third covers for
/// one that starts.
pub const CONNECTIONS: usize = 3;

/// How long a table's lock is waited for. Statements of the application would queue behind ours.
const LOCK_WAIT: &str = "10s";

/// Batches that wait for the mirror.
const QUEUE_BATCHES: usize = 3;

/// Batches at a time: being filled, waiting, being inserted.
const BATCHES: usize = CONNECTIONS + QUEUE_BATCHES + 1;

/// A batch is handed over at this size, if memory allows: each is a transaction of the mirror.
const BATCH_BYTES: usize = 1 << 20;

/// What a row costs in memory beside its record.
const ROW_OVERHEAD_BYTES: usize = 64;

const LOG_EVERY: Duration = Duration::from_secs(5);

/// A run of rows of one table, or its end.
#[derive(Debug)]
pub struct Batch {
    /// Of this table.
    pub table: Oid,
    /// Its rows.
    pub rows: Vec<Bytes>,
    /// There are no more.
    pub last: bool,
}

/// Connections within one snapshot.
pub struct Snapshot {
    clients: Vec<Client>,
}

impl Snapshot {
    /// Opens the connections and imports the snapshot in each. Once this returns, the connection that exported it
    /// is no longer needed.
    pub async fn import(target: &Target, snapshot: &str, tables: usize) -> Result<Snapshot, Error> {
        let mut opening = JoinSet::new();
        for _ in 0..tables.clamp(1, CONNECTIONS) {
            let target = target.clone();
            let begin = format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; \
                 SET LOCAL row_security = off; SET LOCAL lock_timeout = '{LOCK_WAIT}'",
                postgres_protocol::escape::escape_literal(snapshot)
            );
            opening.spawn(async move {
                let client = Client::connect(&target, "anabranch copy").await?;
                client.client.batch_execute(&begin).await?;
                Ok::<_, Error>(client)
            });
        }
        let mut clients = Vec::new();
        while let Some(opened) = opening.join_next().await {
            clients.push(opened.map_err(|error| Error::Definite(format!("copy: {error}")))??);
        }
        Ok(Snapshot { clients })
    }

    /// Locks the tables against changes of their schema, for as long as this lives, and makes sure that they are, in the
    /// snapshot and now, what is known. `client` is another connection, outside of the snapshot.
    pub async fn lock(&self, client: &Client, tables: &[Arc<Table>]) -> Result<(), Error> {
        let (Some(first), false) = (self.clients.first(), tables.is_empty()) else {
            return Ok(());
        };
        let list: Vec<_> = tables
            .iter()
            .map(|table| format!("ONLY {}", qualified(&name(table))))
            .collect();
        let locked = first
            .client
            .batch_execute(&format!(
                "LOCK TABLE {} IN ACCESS SHARE MODE",
                list.join(", ")
            ))
            .await;
        if let Err(error) = locked {
            let dropped = error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE);
            return Err(match Error::from(error) {
                // Looking again will say what became of it.
                Error::Definite(text) if dropped => Error::Transient(text),
                error => error,
            });
        }
        let oids: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
        for client in [first, client] {
            let read = catalog::read_again(client, &oids).await?;
            for (table, now) in tables.iter().zip(read) {
                let changed = match now {
                    None => Some("it was dropped".to_owned()),
                    Some(Err(refusal)) => Some(refusal.reason),
                    Some(Ok(now)) => catalog::difference(table, &now),
                };
                if let Some(changed) = changed {
                    return Err(changed_meanwhile(table, &changed));
                }
            }
        }
        // The column is read within the snapshot, the function answers as of now.
        let moved = first
            .client
            .query(
                "SELECT oid FROM pg_class WHERE oid = ANY($1) AND relfilenode IS DISTINCT FROM pg_catalog.pg_relation_filenode(oid)",
                &[&oids],
            )
            .await?;
        let moved = moved.first().map(|row| row.get::<_, Oid>(0));
        match tables.iter().find(|table| Some(table.oid) == moved) {
            Some(table) => Err(changed_meanwhile(table, "it was truncated or rewritten")),
            None => Ok(()),
        }
    }

    /// Copies the tables, several at a time, largest first. Everything was sent when it returns.
    pub async fn copy(
        self,
        tables: &[Arc<Table>],
        copy_bytes_max: usize,
        batches: &mpsc::Sender<Batch>,
        progress: &Progress,
    ) -> Result<(), Error> {
        let batch_bytes = (copy_bytes_max / BATCHES).clamp(1, BATCH_BYTES);
        let mut waiting = self.by_size(tables).await?;
        waiting.reverse();
        let waiting = Arc::new(Mutex::new(waiting));
        let mut copying = JoinSet::new();
        let mut idle = Vec::new();
        for client in self.clients {
            let (waiting, progress) = (waiting.clone(), progress.clone());
            let batches = batches.clone();
            copying.spawn(async move {
                let next = || {
                    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    waiting.pop()
                };
                while let Some((table, estimated)) = next() {
                    let counters = progress.begin(table.full_name(), estimated);
                    copy_table(&client, &table, batch_bytes, &batches, &counters).await?;
                }
                Ok::<_, Error>(client)
            });
        }
        let mut ticks = time::interval_at(time::Instant::now() + LOG_EVERY, LOG_EVERY);
        loop {
            tokio::select! {
                ended = copying.join_next() => match ended {
                    // Kept until all are done: the first one holds the locks.
                    Some(Ok(Ok(client))) => idle.push(client),
                    Some(Ok(Err(error))) => return Err(error),
                    Some(Err(error)) => return Err(Error::Definite(format!("copy: {error}"))),
                    None => return Ok(()),
                },
                _ = ticks.tick() => log(progress),
            }
        }
    }

    async fn by_size(&self, tables: &[Arc<Table>]) -> Result<Vec<(Arc<Table>, u64)>, Error> {
        let Some(first) = self.clients.first() else {
            return Ok(Vec::new());
        };
        let oids: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
        let sizes = first
            .client
            .query(
                "SELECT oid, greatest(reltuples, 0)::float8, pg_catalog.pg_table_size(oid) FROM pg_class WHERE oid = ANY($1)",
                &[&oids],
            )
            .await?;
        let sizes: HashMap<Oid, (f64, i64)> = sizes
            .iter()
            .map(|row| (row.get(0), (row.get(1), row.get(2))))
            .collect();
        let mut tables: Vec<_> = tables
            .iter()
            .map(|table| {
                (
                    table.clone(),
                    sizes.get(&table.oid).copied().unwrap_or((0.0, 0)),
                )
            })
            .collect();
        tables.sort_by_key(|(table, (_, bytes))| (-bytes, table.oid));
        Ok(tables
            .into_iter()
            .map(|(table, (rows, _))| (table, rows as u64))
            .collect())
    }
}

fn changed_meanwhile(table: &Table, what: &str) -> Error {
    Error::Transient(format!(
        "{} changed while it was about to be copied ({what}); its copy starts again",
        table.full_name()
    ))
}

fn name(table: &Table) -> Name {
    Name {
        schema: table.schema.clone(),
        name: table.name.clone(),
    }
}

fn log(progress: &Progress) {
    for line in progress.lines().iter().filter(|line| !line.done) {
        tracing::info!(
            table = line.table,
            rows = line.rows,
            of_about = line.rows_estimated,
            mib = line.bytes >> 20,
            ms = line.ms,
            "copying"
        );
    }
}

async fn copy_table(
    client: &Client,
    table: &Table,
    batch_bytes: usize,
    batches: &mpsc::Sender<Batch>,
    counters: &Counters,
) -> Result<(), Error> {
    let columns: Vec<_> = table
        .columns
        .iter()
        .map(|column| identifier(&column.name))
        .collect();
    // Of a plain table this copies what `SELECT … FROM ONLY` would show, without the executor.
    let sql = format!(
        "COPY {} ({}) TO STDOUT",
        qualified(&name(table)),
        columns.join(", ")
    );
    let gone = || Error::Transient("the mirror does not take rows any more".into());
    let send = async |rows: Vec<Bytes>, last| {
        let table = table.oid;
        batches
            .send(Batch { table, rows, last })
            .await
            .map_err(|_| gone())
    };
    let mut lines = pin!(client.client.copy_out(&sql).await?);
    let mut builder = Builder::new();
    let mut scratch = Vec::new();
    let mut rows = Vec::new();
    let (mut held, mut read) = (0, 0);
    // Each message is one row (manual, 55.2.6).
    while let Some(line) = lines.next().await {
        let line = line?;
        text::read(&line, &table.columns, &mut scratch, &mut builder)
            .map_err(|error| Error::Definite(format!("copy of {}: {error}", table.full_name())))?;
        let row = builder.finish();
        held += row.len() + ROW_OVERHEAD_BYTES;
        read += line.len() as u64;
        rows.push(row);
        if held >= batch_bytes {
            counters.add(rows.len() as u64, read);
            let more = Vec::with_capacity(rows.len());
            send(std::mem::replace(&mut rows, more), false).await?;
            (held, read) = (0, 0);
        }
    }
    counters.add(rows.len() as u64, read);
    send(rows, true).await?;
    counters.end();
    let line = counters.line();
    tracing::info!(
        table = line.table,
        rows = line.rows,
        mib = line.bytes >> 20,
        ms = line.ms,
        "copied"
    );
    Ok(())
}

/// A channel for [`Snapshot::copy`] and [`fill`].
pub fn channel() -> (mpsc::Sender<Batch>, mpsc::Receiver<Batch>) {
    mpsc::channel(QUEUE_BATCHES)
}

/// Inserts what comes, on the thread that owns the mirror, and ends each table's copy as of `at`. Each batch counts in
/// `copied`. `false`: the channel ended before all tables were complete.
pub fn fill(
    mirror: &mut Mirror,
    tables: &[Arc<Table>],
    at: Lsn,
    batches: &mut mpsc::Receiver<Batch>,
    copied: &watch::Sender<u64>,
) -> Result<bool, mirror::Error> {
    for table in tables {
        mirror.begin_copy(table)?;
    }
    let mut complete = 0;
    while let Some(batch) = batches.blocking_recv() {
        if !batch.rows.is_empty() {
            mirror.copy_rows(batch.table, &batch.rows)?;
        }
        if batch.last {
            mirror.end_copy(batch.table, at)?;
            complete += 1;
        }
        copied.send_modify(|count| *count += 1);
    }
    Ok(complete == tables.len())
}
