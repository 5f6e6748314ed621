//! The mirror: the streamer's own copy of the published tables, in SQLite, at a position.
//!
//! Everything else rests on it. It knows what a row was when Postgres only names it, what is in a column that
//! Postgres did not send, and, by its change index, what rows were at earlier positions, so that joins and returns cost
//! Postgres nothing. It knows no shapes, no sessions and no Postgres: it is given committed changes in order.
//!
//! [`Mirror`] is the one writing connection. It gathers transactions in a group, which is one SQLite transaction, until
//! [`Mirror::commit`] makes them durable; a kill loses the open group, Postgres sends it again, and
//! what was kept is told by its position. [`Reader`]s see whole groups only.
//!
//! | module      | what                                                                             |
//! |-------------|----------------------------------------------------------------------------------|
//! | `schema`    | the tables of `mirror.db`, its version, how connections are set up               |
//! | `key`       | how a row, or what Postgres says of an old one, names a row                       |
//! | `rows`      | reading and writing the rows of one table                                        |
//! | `change`    | what one change does, over rows that are held in memory or written at once       |
//! | `fold`      | a transaction in memory: the net changes, to be routed                           |
//! | `direct`    | a transaction that does not fit: written as it comes                             |
//! | `transaction` | the calls that apply transactions, of both kinds                               |
//! | `dependents`| tables that stop with others                                                     |
//! | `index`     | what rows were before                                                            |
//! | `copy`      | filling tables                                                                   |
//! | `history`   | epochs, holes, facts                                                             |
//! | `checkpoint`| moves what is durable in the log to the file, beside the writer                  |
//! | `definitions` | what replicas were told that they hold, by fingerprint                         |
//! | `reader`    | snapshots for catch-ups                                                          |
//! | `outside`   | the same for other processes                                                      |
//! | `list`      | what changed since, by key: for long catch-ups                                    |
//! | `secondary` | indexes by other columns than the key                                             |
//! | `lookup`    | rows by these, as they are, and before the last transaction                       |
//! | `past`      | and as of an earlier one                                                          |

mod change;
mod checkpoint;
mod copy;
mod definitions;
mod dependents;
mod direct;
mod error;
mod fold;
mod history;
mod index;
mod key;
mod list;
mod lookup;
mod outside;
mod past;
mod reader;
mod rows;
mod schema;
mod secondary;
#[cfg(test)]
mod tests;
mod transaction;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use anabranch_proto::{Epoch, Lsn, Position};
use bytes::Bytes;
use foldhash::fast::FixedState;
use rusqlite::Connection;

use self::{checkpoint::Checkpoint, index::Index, rows::Rows, transaction::Large};
pub use self::{
    definitions::{DEFINITION_BYTES_MAX, DEFINITIONS_BYTES_MAX, Kept},
    error::Error,
    fold::{NETS_BYTES_MAX, NETS_MAX},
    key::Key,
    lookup::{Before, EachKeyed, Now},
    outside::{Here, Outside, SNAPSHOT_HOLD_MAX},
    past::At,
    reader::Reader,
};
pub(crate) use self::{list::Place, reader::Keys};
use crate::table::{Oid, Table};

/// How a mirror is opened.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Holds `mirror.db` and `lock`.
    pub directory: PathBuf,
    /// Page cache of the writing connection.
    pub cache_bytes: usize,
    /// Page cache of each reader.
    pub reader_cache_bytes: usize,
    /// The change index is trimmed above this.
    pub index_bytes_max: u64,
    /// And what is older than this.
    pub index_hours_max: u32,
    /// A row above this stops its table.
    pub row_bytes_max: usize,
}

/// The only writing connection; the engine thread owns it.
pub struct Mirror {
    sqlite: Connection,
    file: PathBuf,
    settings: Settings,
    tables: HashMap<Oid, Rows, FixedState>,
    /// The secondary indexes that are wanted, also of tables that are not there.
    indexes: Vec<crate::lookup::Index>,
    dependents: dependents::Dependents,
    index: Index,
    position: Position,
    durable: Position,
    /// Commit time of the last transaction: the clock of the change index.
    now: i64,
    group: bool,
    large: Option<Large>,
    nets_max: usize,
    sample_rows: u64,
    /// Since all of them were looked at.
    definitions_added: usize,
    checkpoint: Checkpoint,
    /// The file could not be read again after an error: what is in memory proves nothing.
    failed: bool,
    /// Last, so that the directory stays locked until the connection is closed.
    _lock: schema::Lock,
}

/// A table in the mirror.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its schema.
    pub table: Arc<Table>,
    /// Its state.
    pub state: State,
    /// It was copied at this LSN: transactions at or below it are in the copy, and its change index starts here.
    pub floor: Lsn,
}

/// State of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not complete yet; nobody sees a row of it.
    Copying,
    /// Followed.
    Live,
    /// Not followed since a transaction at `lsn`; its rows are as of before that transaction.
    Stopped {
        /// Where.
        lsn: Lsn,
        /// Why.
        reason: String,
    },
}

/// What mends a table that is stopped, as far as this version can, once the reason is gone.
pub const REMEDY: &str =
    "to follow it again: take it out of the shapes, restart the streamer, put it back, and restart";

/// What a transaction did to one row, in the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Net {
    /// Of this table.
    pub table: Arc<Table>,
    /// This row.
    pub key: Key,
    /// The row before the transaction, if there was one.
    pub before: Option<Bytes>,
    /// The row after it, if there is one. Never equal to `before`.
    pub after: Option<Bytes>,
}

/// What applying a transaction came to.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// What became of each touched row, in the order of first touch; empty where `large`.
    pub nets: Vec<Net>,
    /// Too many rows to hold: whoever has one of these tables must catch up.
    pub large: Vec<Oid>,
    /// Tables that this transaction stopped, and why.
    pub stopped: Vec<(Oid, String)>,
}

impl Mirror {
    /// Opens or creates it. Takes an exclusive lock on the directory for as long as it lives.
    ///
    /// Whatever a kill left behind is rolled back by SQLite; a table whose copy was cut off is still `Copying`.
    pub fn open(settings: &Settings) -> Result<Mirror, Error> {
        let lock = schema::lock(&settings.directory)?;
        let file = settings.directory.join("mirror.db");
        let sqlite = schema::open(&file, settings.cache_bytes)?;
        let index = Index::load(&sqlite, Lsn(0), settings)?;
        let checkpoint = Checkpoint::start(&file)?;
        let mut mirror = Mirror {
            sqlite,
            file,
            settings: settings.clone(),
            tables: HashMap::default(),
            indexes: Vec::new(),
            dependents: Default::default(),
            index,
            position: Position::default(),
            durable: Position::default(),
            now: 0,
            group: false,
            large: None,
            nets_max: NETS_MAX,
            sample_rows: copy::SAMPLE_ROWS,
            definitions_added: 0,
            checkpoint,
            failed: false,
            _lock: lock,
        };
        mirror.load()?;
        Ok(mirror)
    }

    /// Takes everything that is held in memory from the file.
    fn load(&mut self) -> Result<(), Error> {
        let (epoch, lsn, floor) =
            (self.sqlite).query_row("SELECT epoch, lsn, index_floor FROM state", [], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, i64>(1)?,
                    row.get::<_, i64>(2)?,
                ))
            })?;
        self.position = Position {
            epoch: Epoch(epoch as u64),
            lsn: Lsn(lsn as u64),
        };
        self.durable = self.position;
        self.tables = load_tables(&self.sqlite)?
            .into_iter()
            .map(|entry| (entry.table.oid, Rows::new(entry, &self.indexes)))
            .collect();
        self.index = Index::load(&self.sqlite, Lsn(floor as u64), &self.settings)?;
        self.now = self.sqlite.query_row(
            "SELECT coalesce((SELECT commit_time FROM txn ORDER BY ordinal DESC LIMIT 1), 0)",
            [],
            |row| row.get(0),
        )?;
        self.group = false;
        self.large = None;
        Ok(())
    }

    /// The first history has begun: before, there is nothing but tables that are being copied.
    fn has_begun(&self) -> bool {
        self.position != Position::default()
    }

    /// The position as applied (the group may still be open).
    pub fn position(&self) -> Position {
        self.position
    }

    /// The position as of the last commit: survives a power cut.
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// All tables, by OID.
    pub fn tables(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self
            .tables
            .values()
            .map(|rows| rows.entry.clone())
            .collect();
        entries.sort_unstable_by_key(|entry| entry.table.oid);
        entries
    }

    /// A new reader.
    pub fn reader(&self) -> Result<Reader, Error> {
        Reader::open(&self.file, self.settings.reader_cache_bytes)
    }

    /// A group is open.
    pub fn is_open(&self) -> bool {
        self.group
    }

    /// Commits the open group, durable when it returns. Trims the change index now and then.
    pub fn commit(&mut self) -> Result<(), Error> {
        if !self.group {
            return Ok(());
        }
        let committed = self.commit_sqlite();
        self.settle(committed)?;
        self.group = false;
        Ok(())
    }

    fn open_group(&mut self) -> Result<(), Error> {
        self.check()?;
        if !self.group {
            self.sqlite.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
            self.group = true;
        }
        Ok(())
    }

    /// Writes the position and commits. What `synchronous` is decides whether it is durable: FULL, except while copying.
    fn commit_sqlite(&mut self) -> Result<(), Error> {
        self.sqlite
            .prepare_cached("UPDATE state SET lsn = ?1 WHERE lsn <> ?1")?
            .execute([self.position.lsn.0 as i64])?;
        self.index.maintain(&self.sqlite, self.now)?;
        self.sqlite.prepare_cached("COMMIT")?.execute([])?;
        self.durable = self.position;
        self.checkpoint.committed(&self.sqlite);
        Ok(())
    }

    /// A SQLite transaction of its own: the open group is committed before. Durable when it returns.
    fn alone<T>(&mut self, work: impl FnOnce(&mut Mirror) -> Result<T, Error>) -> Result<T, Error> {
        self.check()?;
        if self.large.is_some() {
            return Err(Error::Misused("within a large transaction"));
        }
        self.commit()?;
        self.sqlite.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let done = work(self).and_then(|done| self.commit_sqlite().map(|()| done));
        self.settle(done)
    }

    /// After an error: nothing of the SQLite transaction stays, in the file or in memory.
    fn settle<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if result.is_err() {
            self.failed = true;
            // SQLite rolls back by itself after some errors, such as a full disk.
            if !self.sqlite.is_autocommit() {
                self.sqlite.execute_batch("ROLLBACK")?;
            }
            self.load()?;
            self.failed = false;
        }
        result
    }

    fn check(&self) -> Result<(), Error> {
        if self.failed {
            return Err(Error::Damaged(
                "an earlier error left the file unreadable: restart the streamer".into(),
            ));
        }
        Ok(())
    }
}

impl State {
    /// As the columns `state`, `stopped` and `reason` have it.
    fn columns(&self) -> (i64, Option<i64>, Option<&str>) {
        match self {
            State::Copying => (0, None, None),
            State::Live => (1, None, None),
            State::Stopped { lsn, reason } => (2, Some(lsn.0 as i64), Some(reason)),
        }
    }
}

/// The tables as the file has them.
fn load_tables(sqlite: &Connection) -> Result<Vec<Entry>, Error> {
    let mut statement =
        sqlite.prepare("SELECT schema, state, floor, stopped, reason FROM tables ORDER BY oid")?;
    let mut found = statement.query([])?;
    let mut entries = Vec::new();
    while let Some(row) = found.next()? {
        let schema: String = row.get(0)?;
        let table: Table = serde_json::from_str(&schema)
            .map_err(|error| Error::Damaged(format!("the schema of a table: {error}")))?;
        let state = match row.get(1)? {
            0 => State::Copying,
            1 => State::Live,
            2 => State::Stopped {
                lsn: Lsn(row.get::<_, i64>(3)? as u64),
                reason: row.get(4)?,
            },
            other => return Err(Error::Damaged(format!("a table in state {other}"))),
        };
        entries.push(Entry {
            table: Arc::new(table),
            state,
            floor: Lsn(row.get::<_, i64>(2)? as u64),
        });
    }
    Ok(entries)
}
