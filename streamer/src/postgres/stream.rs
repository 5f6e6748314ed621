//! Drives one replication connection: from the socket to the engine.
//!
//! ```text
//!            reader (async)                    assembler (blocking thread)
//!  socket ──▶ whole CopyData frames ──batches──▶ transactions ──events──▶ engine
//!     ▲            │ "answer!"      (bounded)                                │
//!     └── feedback (task) ◀──────────────────────── durable position ◀───────┘
//! ```
//!
//! The *assembler* may wait for the engine as long as it takes; a blocking thread is made for that. The *reader* goes
//! on, within a bound, so that a question of Postgres is seen meanwhile; the *feedback* waits for neither.
//!
//! Bounded memory: read-ahead, one row, one chunk, the spool. A row above `row_bytes_max` is not read into memory at
//! all; its table is stopped.
//!
//! What it does not do: decide where to begin, reconnect, or leave out transactions that were applied already. A
//! connection that ended is of no use any more; the next one begins with a new [`run`], which must not be called
//! before the last one has returned (its assembler might still be sending).

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anabranch_proto::Lsn;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use super::assemble::Closed;
use super::{
    assemble::{self, Assembler},
    feedback::{self, Asked},
    reader::{Batch, Content, Reader},
    replication::{Replication, Streaming},
    sql::Error,
};
use crate::{
    events,
    table::{Oid, Table},
    transaction::Event,
};

/// How long Postgres may take to close the connection when we stop. It frees the slot as it does.
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);

/// Events of more bytes than this are handed on although more came together with them.
const TOGETHER_BYTES: usize = 256 * 1024;

/// Everything that `run` is about.
pub struct Source {
    /// Not yet streaming.
    pub replication: Replication,
    /// Name of the slot.
    pub slot: String,
    /// Where to begin: the durable position.
    pub from: Lsn,
    /// Name of the publication.
    pub publication: String,
    /// Whether Postgres sends large transactions before they commit.
    pub streaming: bool,
    /// The tables to follow, for as long as this connection lives.
    pub tables: HashMap<Oid, Arc<Table>>,
    /// For the files of transactions in progress.
    pub spool_directory: PathBuf,
    /// Bounds of memory.
    pub limits: Limits,
}

/// Bounds of memory of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A transaction above this is sent as several chunks.
    pub chunk_bytes_max: usize,
    /// A change above this, with its old and new row as Postgres prints them, stops its table.
    pub row_bytes_max: usize,
    /// What transactions in progress may hold in memory together, beyond which they go to disk.
    pub spool_memory_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            chunk_bytes_max: 8 * 1024 * 1024,
            row_bytes_max: 192 * 1024 * 1024,
            spool_memory_bytes_max: 16 * 1024 * 1024,
        }
    }
}

/// What can be seen of a connection from outside, while it lives and after. Shared by successive ones.
#[derive(Debug)]
pub struct Observed {
    since: Instant,
    received: AtomicU64,
    wal_end: AtomicU64,
    confirmed: AtomicU64,
    bytes: AtomicU64,
    descriptions: AtomicU64,
    /// Milliseconds after `since`.
    last_message: AtomicU64,
}

impl Default for Observed {
    fn default() -> Self {
        Observed {
            since: Instant::now(),
            received: AtomicU64::new(0),
            wal_end: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            descriptions: AtomicU64::new(0),
            last_message: AtomicU64::new(0),
        }
    }
}

impl Observed {
    /// The highest LSN that was received, of a change or a keepalive.
    pub fn received(&self) -> Lsn {
        Lsn(self.received.load(Ordering::Relaxed))
    }

    /// How far Postgres had decoded its WAL as of its last keepalive.
    pub fn wal_end(&self) -> Lsn {
        Lsn(self.wal_end.load(Ordering::Relaxed))
    }

    /// What Postgres was last told to be durable here.
    pub fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Relaxed))
    }

    /// Bytes received from replication connections.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How often Postgres described a followed table. It does so once per connection, and again after whatever may
    /// have changed it, also in ways that the description does not show (a column dropped, and added again with the
    /// same name and type): a reason to read the catalog again.
    pub fn descriptions(&self) -> u64 {
        self.descriptions.load(Ordering::Relaxed)
    }

    /// How long Postgres has been silent.
    pub fn silence(&self) -> Duration {
        let last = Duration::from_millis(self.last_message.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(last)
    }

    pub(super) fn has_received(&self, lsn: Lsn) {
        self.received.fetch_max(lsn.0, Ordering::Relaxed);
    }

    pub(super) fn has_decoded(&self, wal_end: Lsn) {
        self.wal_end.fetch_max(wal_end.0, Ordering::Relaxed);
    }

    pub(super) fn has_read(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = self.since.elapsed().as_millis() as u64;
        self.last_message.store(now, Ordering::Relaxed);
    }

    pub(super) fn told(&self, lsn: Lsn) {
        self.confirmed.store(lsn.0, Ordering::Relaxed);
    }
}

/// Streams until `shutdown` (which is no error), until the engine is gone (neither), or until something breaks.
///
/// `events` is called from a thread that may block, with those that came together, and sees [`Event::Lost`] at the
/// end, always. What `confirmed` says
/// is told to Postgres as durable. Must be run to its end; it ends soon after `shutdown`, provided that `events`
/// returns.
pub async fn run<S>(
    source: Source,
    events: S,
    confirmed: watch::Receiver<Lsn>,
    shutdown: CancellationToken,
    observed: Arc<Observed>,
) -> Result<(), Error>
where
    S: FnMut(Vec<Event>) -> Result<(), Closed> + Send + 'static,
{
    let Source {
        replication,
        slot,
        from,
        publication,
        streaming,
        tables,
        spool_directory,
        limits,
    } = source;
    let assembler = Assembler::new(
        tables,
        limits.chunk_bytes_max,
        &spool_directory,
        limits.spool_memory_bytes_max,
    );
    let (batches, received) = mpsc::unbounded_channel();
    let stop = Arc::new(AtomicBool::new(false));
    let assembling = {
        let (stop, observed) = (stop.clone(), observed.clone());
        tokio::task::spawn_blocking(move || assemble(received, assembler, events, &stop, &observed))
    };
    let start = async move {
        let streaming = (replication.start(&slot, from, &publication, streaming)).await?;
        tracing::info!(slot, %from, "streaming from Postgres");
        Ok(streaming)
    };
    let row_bytes_max = limits.row_bytes_max;
    let ended = stream(start, batches, row_bytes_max, confirmed, shutdown, observed).await;
    let ended = match ended {
        // What came before the end is worth having.
        End::Theirs(error) => Err(error),
        End::Ours(result) => {
            stop.store(true, Ordering::Relaxed);
            result
        }
    };
    match assembling.await {
        Ok(Ok(())) => ended,
        Ok(Err(assemble::Error::Closed(Closed))) => Ok(()),
        Ok(Err(error)) => Err(Error::Transient(error.to_string())),
        Err(panicked) => Err(Error::Transient(format!(
            "reading transactions failed: {panicked}"
        ))),
    }
}

/// How a connection ended.
enum End {
    /// By Postgres, or on the way.
    Theirs(Error),
    /// By us.
    Ours(Result<(), Error>),
}

/// Owns the way to the assembler, which ends when this does.
async fn stream(
    start: impl Future<Output = Result<Streaming, Error>>,
    batches: mpsc::UnboundedSender<Batch>,
    row_bytes_max: usize,
    confirmed: watch::Receiver<Lsn>,
    shutdown: CancellationToken,
    observed: Arc<Observed>,
) -> End {
    let streaming = tokio::select! {
        biased;
        () = shutdown.cancelled() => return End::Ours(Ok(())),
        streaming = start => streaming,
    };
    let Streaming { socket, read } = match streaming {
        Ok(streaming) => streaming,
        Err(error) => return End::Ours(Err(error)),
    };
    let (socket, write) = tokio::io::split(socket);
    let (asked, asked_seen) = watch::channel(Asked::default());
    let feedback = feedback::run(
        feedback::PACE,
        write,
        confirmed,
        asked_seen,
        shutdown.clone(),
        observed.clone(),
    );
    let mut feedback = AbortOnDropHandle::new(tokio::spawn(feedback));
    let mut reader = Reader::new(socket, read, row_bytes_max, batches, asked, observed);
    let ended = tokio::select! {
        biased;
        ended = &mut feedback => {
            let ended = ended.unwrap_or_else(|error| Err(Error::Transient(error.to_string())));
            End::Ours(ended)
        }
        ended = reader.run() => match ended {
            // The assembler knows why.
            Ok(()) => End::Ours(Ok(())),
            Err(error) => End::Theirs(error),
        }
    };
    if !shutdown.is_cancelled() {
        return ended;
    }
    // The feedback says goodbye; when Postgres has closed the connection, the slot is free.
    let goodbye = async {
        if !feedback.is_finished() {
            let _ = feedback.await;
        }
        reader.drain().await;
    };
    let _ = timeout(GOODBYE_WITHIN, goodbye).await;
    End::Ours(Ok(()))
}

fn assemble<S>(
    mut batches: mpsc::UnboundedReceiver<Batch>,
    mut assembler: Assembler,
    mut send: S,
    stop: &AtomicBool,
    observed: &Observed,
) -> Result<(), assemble::Error>
where
    S: FnMut(Vec<Event>) -> Result<(), Closed>,
{
    let mut described = 0;
    let (mut together, mut bytes) = (Vec::new(), 0);
    let mut work = || {
        while let Some(batch) = batches.blocking_recv() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let mut gather = |event| {
                bytes += events::bytes(&event);
                together.push(event);
                if bytes < TOGETHER_BYTES {
                    return Ok(());
                }
                bytes = 0;
                send(std::mem::take(&mut together))
            };
            match &batch.content {
                Content::Frames(frames) => {
                    for payload in frames.payloads() {
                        assembler.feed(payload, &mut gather)?;
                    }
                }
                Content::Cut(head) => assembler.feed_cut(head, &mut gather)?,
            }
            assembler.flush(&mut gather)?;
            if !together.is_empty() {
                bytes = 0;
                send(std::mem::take(&mut together))?;
            }
            let now = assembler.descriptions();
            observed
                .descriptions
                .fetch_add(now - described, Ordering::Relaxed);
            described = now;
        }
        Ok(())
    };
    let result = work();
    // So that the reader notices, while the engine takes its time.
    drop(batches);
    together.push(Event::Lost);
    let _ = send(together);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Callers run in spawned tasks.
    #[test]
    fn a_run_may_move_between_threads() {
        fn movable<T: Send>(_: impl FnOnce(Source, watch::Receiver<Lsn>) -> T) {}
        movable(|source, confirmed| {
            let events = |_| Ok(());
            run(
                source,
                events,
                confirmed,
                CancellationToken::new(),
                Arc::default(),
            )
        });
    }
}
