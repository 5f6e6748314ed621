//! The SQLite file.
//!
//! One row's way down:
//!
//! ```text
//! message ─▶ grammar ─┬─▶ queue (memory, then a temporary file) ─┐
//!                     └─▶ stage (rows of tables in a reset) ─────┴─▶ commit ─▶ replay ─┬─▶ write ─▶ the table
//!                                                                                      └─▶ overlay ───▲
//! ```
//!
//! - `table`, `names`: what the streamer declares, checked and turned into SQL; `grammar`: what may follow what.
//! - `defaults`: what columns hold that an INSERT leaves out.
//! - `queue`: elements wait for their commit. `stage`, `reset`: rows of tables that come in full wait in the file.
//! - `commit`, `replay`: everything up to a resume token becomes one SQLite transaction, with the position and the token.
//! - `overlay`: rows that programs changed show what Postgres has with the pending changes on top; `layout`: how those
//!   are stored; `receipts`: which are answered, and which were rejected; `outbox`: what is to be sent.
//! - `heartbeat`: positions that move without content.
//! - `schema`, `obstacle`: the file is shared with programs, whose tables, indexes, views and triggers are welcome;
//!   what they do to the synced tables is noticed here.
//! - `boundary`: which local writes were one transaction of a program, and whether they are durable.
//! - `leases`: ids of Postgres' sequences, for programs to use.
//! - `capture`: what programs write to synced tables is queued by triggers, which what we write does not set off.
//! - `open`: the file, its lock, its settings; `state`, `status`: what it says of itself.
//!
//! [`File`] is synchronous, and owned by one thread. It knows nothing of the network: what it is given is a message,
//! what it hands back is what came of it.
//!
//! **Exact.** Rows, position and resume token are written in one SQLite transaction, at the end of a message that has a
//! token, and at no other time: whoever opens the file sees the shapes as of one commit of Postgres. A kill or a power
//! cut undoes a transaction as a whole, and the streamer sends it again.
//!
//! **Again.** After a transient error the same message can be given again: a commit is rolled back as a whole, the queue
//! takes a message's elements last of all, a row in pieces goes back to what it was before the message, and what went to
//! stages already can go there again without harm, since each operation says what its row is to be, not how it is to
//! change.

mod boundary;
mod capture;
mod commit;
mod defaults;
mod error;
mod grammar;
mod heartbeat;
mod identity;
mod index;
mod layout;
mod leases;
mod local;
mod names;
mod obstacle;
mod open;
mod outbox;
mod overlay;
mod pieces;
mod queue;
mod receipts;
mod replay;
mod reset;
mod reshape;
mod schema;
mod stage;
mod state;
mod status;
mod table;
#[cfg(test)]
mod tests;
mod transaction;
mod write;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anabranch_proto::{
    Position,
    v1::{self, element::Kind},
};
use bytes::Bytes;
use jiff::Timestamp;
use rusqlite::Connection;

pub use boundary::{Boundaries, Following, Look, Watch};
use capture::quiet::{self, Quiet};
use error::Doing;
pub use error::Error;
use grammar::{Grammar, Place, Tables};
pub use identity::{Adopted, Claim, Judged, Judgement};
pub use local::{Local, Rejected};
pub use outbox::Outgoing;
use pieces::Pieces;
use queue::Queue;
pub use receipts::{Decision, Which};
use schema::{Catalog, Version};
use stage::{Stager, Stages};
use state::{Heard, State};
pub use status::{HEARD_AGE_MAX, reaches, without_header};
use transaction::Write;

/// How the file is opened.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The SQLite file.
    pub path: PathBuf,
    /// Permission bits of a file that is created.
    pub mode: u32,
    /// Page cache of the writing connection.
    pub cache_bytes: usize,
    /// Above this, what has come of a transaction goes to disk until its commit.
    pub hold_bytes_max: usize,
}

/// What a message did.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The position that the file has now, if it changed.
    pub position: Option<Position>,
    /// Commit time (µs since 1970) of the last transaction committed, 0 if none or not known.
    pub commit_time: i64,
    /// Transactions committed.
    pub transactions: u64,
    /// Row operations committed.
    pub rows: u64,
    /// Whether rows of receipts or rejections were among them.
    pub answers: bool,
    /// The longest time that the write lock was held.
    pub locked: Duration,
    /// Table and keys (JSON arrays of key values) that changed, for `/changes`; a table that changed as a whole, or in more
    /// than 1,000 rows, has `keys: None`. Empty unless [`File::set_report_changes`] asked for it.
    pub changes: Vec<TableChanges>,
}

/// What changed in one table.
#[derive(Clone, Debug, PartialEq)]
pub struct TableChanges {
    /// Its name in the file.
    pub table: String,
    /// Keys, each as a JSON array. A key may occur more than once.
    pub keys: Option<Vec<serde_json::Value>>,
}

/// What the file says of one of its tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableState {
    /// Its name in the file.
    pub name: String,
    /// `live` or `stopped`.
    pub state: String,
    /// Why it is stopped.
    pub reason: Option<String>,
    /// Up to where it was followed; a live one is where the file is.
    pub lsn: Option<String>,
}

/// The file, with its one writing connection.
pub struct File {
    connection: Connection,
    quiet: Quiet,
    /// Dropped after the connection: only then may another replica open the file.
    guard: open::Guard,
    state: State,
    catalog: Arc<Catalog>,
    version: Version,
    stream: Stream,
    /// Stages that are not needed any more, but could not be dropped yet.
    discarded: Vec<String>,
    report_changes: bool,
    written: Option<Instant>,
    found: local::Found,
}

/// What is known of the stream that is being applied.
struct Stream {
    grammar: Grammar,
    /// Tables by id, as of the last commit to the file.
    tables: Arc<Tables>,
    queue: Queue,
    stages: Stages,
    /// Of a row on its way to a stage.
    pieces: Pieces,
    heard: Option<Heard>,
    /// A heartbeat's position and token that are not in the file yet.
    noted: Option<(Position, Bytes)>,
    /// It failed: nothing more of it can be applied.
    is_broken: bool,
}

impl File {
    /// Opens or creates it; takes a lock that a second replica can't take.
    pub fn open(settings: &Settings) -> Result<File, Error> {
        let (connection, mut guard) = open::open(settings)?;
        let mut version = Version::new();
        let known = state::check_format(&connection)?;
        let quiet = quiet::install(&connection).doing("make what we write not be captured")?;
        let write = Write::begin(&connection)?;
        version.look(&connection)?;
        let new_id = uuid::Uuid::new_v4().to_string();
        state::create(&connection, &new_id).doing("make our own tables")?;
        let mut state = State::load(&connection)?;
        let mut catalog = Catalog::load(&connection)?;
        catalog.inspect(&connection, &state.replica_id)?;
        if catalog.altered().is_some() {
            state.resume_token = Bytes::new();
        }
        state.connected = false;
        state
            .store(&connection)
            .doing("write the state of the file")?;
        let moved = schema::read_version(&connection)?;
        write.commit()?;
        version.moved(moved);
        version.due = false;
        guard.still_there()?;
        let left_over = stage::left_over(&connection)?;
        stage::discard(&connection, &mut version, &left_over)?;
        tracing::info!(
            path = %guard.path.display(),
            new = !known,
            replica = state.replica_id,
            position = state.position.map(|position| position.to_string()),
            "opened the file"
        );
        let queue = Queue::new(settings.hold_bytes_max, guard.spool_path());
        Ok(File {
            connection,
            quiet,
            guard,
            state,
            catalog: Arc::new(catalog),
            version,
            stream: Stream {
                grammar: Grammar::default(),
                tables: Arc::default(),
                queue,
                stages: Stages::default(),
                pieces: Pieces::default(),
                heard: None,
                noted: None,
                is_broken: false,
            },
            discarded: Vec::new(),
            report_changes: false,
            written: None,
            found: local::Found::default(),
        })
    }

    /// Where it is, without links.
    pub fn path(&self) -> &Path {
        &self.guard.path
    }

    /// The replica's id: made once with the file.
    pub fn replica_id(&self) -> &str {
        &self.state.replica_id
    }

    /// The position as committed; `None` before the first commit.
    pub fn position(&self) -> Option<Position> {
        self.state.position
    }

    /// The token of that position; empty before the first, and when a program altered a synced table: then everything
    /// is to be sent again.
    pub fn resume_token(&self) -> Bytes {
        self.state.resume_token.clone()
    }

    /// The id that the token was given to, if that was another one than today's.
    pub fn token_id(&self) -> Option<String> {
        self.state.token_id.clone()
    }

    /// The tables that it holds, as the view `_anabranch_tables` tells them.
    pub fn tables(&self) -> Result<Vec<TableState>, Error> {
        let list = || -> rusqlite::Result<_> {
            self.connection
                .prepare_cached(
                    "SELECT table_name, state, reason, lsn FROM _anabranch_tables ORDER BY table_name",
                )?
                .query_map([], |row| {
                    Ok(TableState {
                        name: row.get(0)?,
                        state: row.get(1)?,
                        reason: row.get(2)?,
                        lsn: row.get(3)?,
                    })
                })?
                .collect()
        };
        list().doing("read the state of tables")
    }

    /// Whether [`Applied::changes`] is wanted: it costs time.
    pub fn set_report_changes(&mut self, report: bool) {
        self.report_changes = report;
    }

    /// A new stream begins: what came of an unfinished transaction is dropped, table ids are forgotten.
    pub fn begin_stream(&mut self) -> Result<(), Error> {
        let begun = self.drop_unfinished();
        self.make_room_if_full(begun)
    }

    fn drop_unfinished(&mut self) -> Result<(), Error> {
        let stream = &mut self.stream;
        stream.queue.clear();
        stream.grammar = Grammar::default();
        stream.tables = Arc::default();
        stream.pieces = Pieces::default();
        stream.heard = None;
        stream.noted = None;
        stream.is_broken = false;
        self.discarded.extend(stream.stages.take_names());
        self.guard.still_there()?;
        self.discard()
    }

    /// Takes one message. Commits if it has a resume token, and only then. Given again after a `Transient` or `Full`
    /// error, the same message goes on.
    ///
    /// The exception is a heartbeat: one that moves the position is committed at once only if nothing was for half a
    /// second; otherwise it waits for the next message or [`report`](File::report).
    pub fn apply(&mut self, message: &v1::Down) -> Result<Applied, Error> {
        if self.stream.is_broken {
            return Err(Error::Stream(
                "the stream failed; a new one must begin".into(),
            ));
        }
        let applied = self.take(message);
        if applied.is_err() {
            self.stream.pieces.rewind();
        }
        self.stream.is_broken = matches!(applied, Err(Error::Stream(_) | Error::Definite(_)));
        self.make_room_if_full(applied)
    }

    /// Writes the state row: connected or not, last error. Also to be called every 5 s as the heartbeat that keeps
    /// `_anabranch_status` from turning to `connected = 0`. Commits the position of a heartbeat that waits.
    pub fn report(&mut self, connected: bool, last_error: Option<&str>) -> Result<(), Error> {
        let written = self.write_report(connected, last_error);
        self.make_room_if_full(written)
    }

    fn write_report(&mut self, connected: bool, last_error: Option<&str>) -> Result<(), Error> {
        self.guard.still_there()?;
        open::check_journal(&self.connection)?;
        let mut state = self.state.clone();
        state.connected = connected;
        state.set_last_error(last_error);
        self.note(&mut state, Timestamp::now());
        self.store(state)?;
        self.tend_wal()
    }

    fn take(&mut self, message: &v1::Down) -> Result<Applied, Error> {
        let stream = &mut self.stream;
        let mut grammar = stream.grammar.clone();
        let mut waiting = Vec::new();
        let mut stager = Stager::new(&self.connection, &mut stream.stages, &mut self.version);
        for element in &message.elements {
            match (grammar.check(element)?, &element.kind) {
                (Place::Stage(ordinal, table), Some(Kind::Rows(rows))) => {
                    stager.add((ordinal, table.id), &table, rows, &mut stream.pieces)?;
                }
                _ => waiting.push(element),
            }
        }
        let mut applied = Applied {
            locked: stager.finish()?,
            ..Applied::default()
        };
        let is_heartbeats_only = message
            .elements
            .iter()
            .all(|element| matches!(element.kind, Some(Kind::Heartbeat(_))));
        let commits = grammar.end(message)?;
        // A heartbeat may be what brings the position where answers were waited for.
        let is_awaited = commits && grammar.has_completed() && awaits(&self.state, message);
        if is_heartbeats_only && stream.queue.is_empty() && !is_awaited {
            applied.position = self.heartbeats(message, commits)?;
        } else if commits {
            self.commit(message, &mut applied)?;
        } else {
            stream.queue.push(waiting.into_iter().cloned().collect())?;
        }
        self.stream.grammar = grammar;
        self.stream.pieces.settle();
        self.tend_wal()?;
        Ok(applied)
    }

    /// Passes a result on. Where the disk is full, that it can be tried again with what room we can make.
    fn make_room_if_full<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if matches!(result, Err(Error::Full(_))) {
            self.guard.following.make_way(&self.connection)?;
            self.guard.make_room(&mut self.connection)?;
        }
        result
    }

    fn discard(&mut self) -> Result<(), Error> {
        if !self.discarded.is_empty() {
            self.connection.flush_prepared_statement_cache();
            stage::discard(&self.connection, &mut self.version, &self.discarded)?;
            self.discarded.clear();
        }
        Ok(())
    }
}

/// Whether local writes get answers without a receipt, at the position that this heartbeat brings.
fn awaits(state: &State, message: &v1::Down) -> bool {
    let heartbeat = message.elements.last().and_then(|last| match &last.kind {
        Some(Kind::Heartbeat(heartbeat)) => heartbeat.position,
        _ => None,
    });
    heartbeat.is_some_and(|position| state.settles_at(Position::from(position)))
}
