//! Stages: where the rows of a table that is being reset gather before their commit.
//!
//! A stage is a table of the same definition in the same file, filled in short write transactions as rows arrive, so
//! that programs get the write lock in between, and nothing has to be held in memory or written twice. At the commit it
//! becomes the table (`reset`). What a crash leaves of one is dropped when the file is opened.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anabranch_proto::v1;
use rusqlite::Connection;

use super::{
    Error,
    error::Doing,
    index, names,
    pieces::Pieces,
    schema::{self, Version},
    table::Table,
    transaction::Write,
    write::{RowError, Writer},
};

/// Longest time, about, for which one write transaction on a stage holds the lock.
const HOLD_MAX: Duration = Duration::from_millis(50);

/// How often that time is looked at. A power of two.
const LOOK_EVERY_ROWS: u64 = 256;

/// Rows deleted in one write transaction when a stage is thrown away.
const DISCARD_ROWS: usize = 20_000;

/// One table's reset within one transaction: its ordinal since the last commit to the file, and the table's id.
pub(super) type Key = (u32, u32);

#[derive(Debug)]
pub(super) struct Stage {
    pub name: String,
    pub table: Arc<Table>,
    /// Operations that it took.
    pub rows: u64,
    /// Its secondary indexes are made.
    pub indexed: bool,
}

/// The stages that are being filled.
#[derive(Debug, Default)]
pub(super) struct Stages {
    made: u64,
    filling: HashMap<Key, Stage>,
}

impl Stages {
    pub(super) fn get(&self, key: Key) -> Option<&Stage> {
        self.filling.get(&key)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filling.is_empty()
    }

    /// Forgets all of them, and tells their names.
    pub(super) fn take_names(&mut self) -> Vec<String> {
        self.filling.drain().map(|(_, stage)| stage.name).collect()
    }

    /// Makes the secondary indexes of those stages whose table is not there: one at a time, before the commit, so that
    /// the write lock is not held for all of them together.
    pub(super) fn make_indexes(
        &mut self,
        connection: &Connection,
        version: &mut Version,
        is_new: impl Fn(&Table) -> Result<bool, Error>,
    ) -> Result<Duration, Error> {
        let mut held = Duration::ZERO;
        let mut counts: HashMap<u32, usize> = HashMap::new();
        for (_, id) in self.filling.keys() {
            *counts.entry(*id).or_default() += 1;
        }
        for ((_, id), stage) in &mut self.filling {
            if stage.indexed {
                continue;
            }
            // Of two stages for one table, the second finds the first in the table's place, with the indexes' names.
            if counts[id] == 1 && !stage.table.indexes.is_empty() && is_new(&stage.table)? {
                let took = change(connection, version, || {
                    index::make_all(connection, &stage.table, &stage.name)
                })?;
                held = held.max(took);
            }
            stage.indexed = true;
        }
        Ok(held)
    }
}

/// Changes the schema in a write transaction of its own.
fn change(
    connection: &Connection,
    version: &mut Version,
    make: impl FnOnce() -> Result<(), Error>,
) -> Result<Duration, Error> {
    let write = Write::begin(connection)?;
    version.look(connection)?;
    make()?;
    let moved = schema::read_version(connection)?;
    let held = write.commit()?;
    version.moved(moved);
    Ok(held)
}

/// Fills stages with what one message brings.
pub(super) struct Stager<'a> {
    connection: &'a Connection,
    stages: &'a mut Stages,
    version: &'a mut Version,
    writers: HashMap<Key, Writer<'a>>,
    write: Option<Write<'a>>,
    longest: Duration,
}

impl<'a> Stager<'a> {
    pub(super) fn new(
        connection: &'a Connection,
        stages: &'a mut Stages,
        version: &'a mut Version,
    ) -> Stager<'a> {
        Stager {
            connection,
            stages,
            version,
            writers: HashMap::new(),
            write: None,
            longest: Duration::ZERO,
        }
    }

    /// Adds rows to a stage. Doing it again, in the same order, changes nothing: that is what a message that failed
    /// half way relies on.
    pub(super) fn add(
        &mut self,
        key: Key,
        table: &Arc<Table>,
        rows: &v1::Rows,
        pieces: &mut Pieces,
    ) -> Result<(), Error> {
        let writer = match self.writers.remove(&key) {
            Some(writer) => writer,
            None => self.open(key, table)?,
        };
        let writer = self.writers.entry(key).insert_entry(writer).into_mut();
        let mut count = 0;
        let (connection, write, longest) = (self.connection, &mut self.write, &mut self.longest);
        pieces
            .feed::<RowOrError>(&rows.ops, rows.continued, |kind, record| {
                if write.is_none() {
                    *write = Some(Write::begin(connection)?);
                }
                writer.write(kind, record)?;
                count += 1;
                if count % LOOK_EVERY_ROWS == 0
                    && let Some(full) = write.take_if(|write| write.held() >= HOLD_MAX)
                {
                    *longest = (*longest).max(full.commit()?);
                }
                Ok(())
            })
            .map_err(|error| error.of(table))?;
        if let Some(stage) = self.stages.filling.get_mut(&key) {
            stage.rows += count;
        }
        Ok(())
    }

    /// Commits what was added; says how long the write lock was held at most.
    pub(super) fn finish(mut self) -> Result<Duration, Error> {
        self.commit()?;
        Ok(self.longest)
    }

    fn commit(&mut self) -> Result<(), Error> {
        if let Some(write) = self.write.take() {
            self.longest = self.longest.max(write.commit()?);
        }
        Ok(())
    }

    fn open(&mut self, key: Key, table: &Arc<Table>) -> Result<Writer<'a>, Error> {
        if !self.stages.filling.contains_key(&key) {
            self.commit()?;
            let name = format!("{}{}", names::STAGE_PREFIX, self.stages.made + 1);
            let held = change(self.connection, self.version, || {
                schema::Catalog::create(self.connection, &name, table)
            })?;
            self.longest = self.longest.max(held);
            self.stages.made += 1;
            let stage = Stage {
                name,
                table: table.clone(),
                rows: 0,
                indexed: false,
            };
            self.stages.filling.insert(key, stage);
        }
        let name = &self.stages.filling[&key].name;
        Writer::of_stage(self.connection, table.clone(), name).doing("prepare a stage")
    }
}

/// Either side's error while rows are read and written.
enum RowOrError {
    Row(RowError),
    Error(Error),
}

impl From<anabranch_proto::record::Malformed> for RowOrError {
    fn from(error: anabranch_proto::record::Malformed) -> Self {
        RowOrError::Row(error.into())
    }
}

impl From<RowError> for RowOrError {
    fn from(error: RowError) -> Self {
        RowOrError::Row(error)
    }
}

impl From<Error> for RowOrError {
    fn from(error: Error) -> Self {
        RowOrError::Error(error)
    }
}

impl RowOrError {
    fn of(self, table: &Table) -> Error {
        match self {
            RowOrError::Error(error) => error,
            RowOrError::Row(RowError::Malformed(what)) => {
                Error::Stream(format!("a malformed row of {}: {what}", table.name))
            }
            // Somebody meddled with the stage: a new stream makes a new one.
            RowOrError::Row(RowError::Sqlite(error)) if super::error::is_of_statement(&error) => {
                Error::Stream(format!("stage a row of {}: {error}", table.name))
            }
            RowOrError::Row(RowError::Sqlite(error)) => {
                super::error::sqlite(&format!("stage a row of {}", table.name), error)
            }
            RowOrError::Row(RowError::Ignored) => {
                Error::Stream(format!("the stage of {} skipped a row", table.name))
            }
        }
    }
}

/// Throws stages away: in steps, since dropping a large table at once holds the write lock for as long as that takes.
pub(super) fn discard(
    connection: &Connection,
    version: &mut Version,
    stages: &[String],
) -> Result<(), Error> {
    for name in stages {
        let quoted = names::quote(name);
        let keys: Vec<String> = connection
            .prepare("SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk")
            .and_then(|mut columns| {
                columns
                    .query_map([name], |row| row.get(0))?
                    .collect::<Result<_, _>>()
            })
            .doing("look at a stage")?;
        if keys.is_empty() {
            // It became the table.
            continue;
        }
        let key = names::quote_all(keys.iter().map(String::as_str));
        let step = format!(
            "DELETE FROM {quoted} WHERE ({key}) IN (SELECT {key} FROM {quoted} LIMIT {DISCARD_ROWS})"
        );
        loop {
            let write = Write::begin(connection)?;
            let deleted = connection.execute(&step, []).doing("empty a stage")?;
            write.commit()?;
            if deleted < DISCARD_ROWS {
                break;
            }
        }
        change(connection, version, || {
            let drop = || {
                connection.execute_batch(&format!("DROP TABLE IF EXISTS {quoted}"))?;
                // Its indexes were made for a table that did not come to be.
                connection.execute(
                    "DELETE FROM _anabranch_indexes WHERE table_name NOT IN (SELECT table_name FROM _anabranch_synced)",
                    [],
                )
            };
            drop().doing("drop a stage").map(std::mem::drop)
        })?;
    }
    Ok(())
}

/// The stages that an earlier run left in the file.
pub(super) fn left_over(connection: &Connection) -> Result<Vec<String>, Error> {
    connection
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB ?1 || '[0-9]*'")
        .and_then(|mut tables| {
            tables
                .query_map([names::STAGE_PREFIX], |row| row.get(0))?
                .collect()
        })
        .doing("look for stages that were left")
}
