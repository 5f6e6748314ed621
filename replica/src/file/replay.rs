//! One commit to the file: replays what waited, writes position and token, in one SQLite transaction.
//!
//! It works on copies of what is remembered beside the file (tables, catalog, state); they replace the originals when
//! the COMMIT has succeeded, so that a transaction that fails leaves nothing behind, and can be replayed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use anabranch_proto::{
    Lsn, Position,
    record::Malformed,
    v1::{self, element::Kind},
};
use jiff::Timestamp;
use rusqlite::Connection;

use super::{
    Error, TableChanges,
    capture::quiet::{self, Quiet},
    error::{self, Doing, is_of_statement},
    grammar::Tables,
    index,
    obstacle::Obstacle,
    overlay::{self, Overlay},
    pieces::Pieces,
    receipts,
    reset::{self, ResetError},
    reshape,
    schema::{Catalog, There, Version},
    stage::{Stage, Stages},
    state::{Heard, State},
    table::{Purpose, Table},
    write::{Keys, RowError, Writer},
};

/// Why a commit failed.
#[derive(Debug)]
pub(super) enum Failure {
    Error(Error),
    /// A row of this table (by its name in the file) was refused or skipped.
    Blocked {
        table: String,
        why: String,
    },
    /// The file is not what its resume token says: it must be sent again.
    Forget(String),
    /// The file's state is not the one that was last written: nothing that is remembered speaks of this content.
    Replaced,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

/// What a commit works with.
pub(super) struct Replay<'c> {
    connection: &'c Connection,
    quiet: &'c Quiet,
    stages: &'c Stages,
    report_changes: bool,
    /// The stream's first transaction was seen: until then a heartbeat's position says nothing of this file.
    is_proved: bool,
    writers: HashMap<u32, Writer<'c>>,
    overlay: Overlay<'c>,
    /// Rows of receipts or rejections came.
    answers: bool,
    /// What came is of another history of the source than what the file had.
    other_history: bool,
    pieces: Pieces,
    ordinal: u32,
    first: bool,
    reset: Vec<u32>,
    /// The last of each table.
    states: BTreeMap<u32, v1::TableState>,
    changes: HashMap<u32, Keys>,
    pub outcome: Outcome,
}

/// What a commit has changed, once it succeeds.
pub(super) struct Outcome {
    pub catalog: Arc<Catalog>,
    pub tables: Arc<Tables>,
    pub state: State,
    pub heard: Heard,
    pub transactions: u64,
    pub rows: u64,
    /// Rows of receipts or rejections came.
    pub answers: bool,
    pub commit_time: i64,
    pub changes: Vec<TableChanges>,
}

impl<'c> Replay<'c> {
    /// Within a write transaction. `dropped` are programs' triggers and indexes that are in the way, and why.
    pub(super) fn begin(
        (connection, quiet): (&'c Connection, &'c Quiet),
        stages: &'c Stages,
        version: &mut Version,
        report_changes: bool,
        is_proved: bool,
        mut outcome: Outcome,
        dropped: &[(Obstacle, String)],
    ) -> Result<Replay<'c>, Failure> {
        if !outcome.state.is_in_file(connection)? {
            return Err(Failure::Replaced);
        }
        if version.look(connection)? {
            Arc::make_mut(&mut outcome.catalog).inspect(connection, &outcome.state.replica_id)?;
        }
        for (obstacle, why) in dropped {
            obstacle
                .drop(connection, why)
                .doing("drop what is in the way of a row")?;
        }
        // Each time: a transaction that was rolled back may have thought otherwise.
        quiet::run_triggers(connection, outcome.catalog.has_triggers())
            .doing("set whether triggers run")?;
        Ok(Replay {
            connection,
            quiet,
            stages,
            report_changes,
            is_proved,
            writers: HashMap::new(),
            overlay: Overlay::new(connection),
            answers: false,
            other_history: false,
            pieces: Pieces::default(),
            ordinal: 0,
            first: false,
            reset: Vec::new(),
            states: BTreeMap::new(),
            changes: HashMap::new(),
            outcome,
        })
    }

    /// Does one element. The grammar has seen it.
    pub(super) fn element(&mut self, element: &v1::Element) -> Result<(), Failure> {
        match &element.kind {
            Some(Kind::Begin(begin)) => self.start(begin),
            Some(Kind::Table(table)) => self.table(table),
            Some(Kind::Rows(rows)) => self.rows(rows),
            Some(Kind::State(state)) => {
                self.states.insert(state.table, state.clone());
                Ok(())
            }
            Some(Kind::Commit(commit)) => self.commit(commit),
            Some(Kind::Heartbeat(heartbeat)) => {
                if let Some(position) = heartbeat.position.filter(|_| self.is_proved) {
                    self.outcome.state.position = Some(position.into());
                }
                self.outcome.heard = Heard {
                    source_lsn: Lsn(heartbeat.source_lsn),
                    source_connected: heartbeat.source_connected,
                    time: Timestamp::now(),
                };
                Ok(())
            }
            None => Err(Error::Stream("an element without kind".into()).into()),
        }
    }

    /// Writes the state. What follows is the COMMIT.
    pub(super) fn finish(mut self, resume_token: &[u8]) -> Result<Outcome, Failure> {
        if let Some(altered) = self.outcome.catalog.altered() {
            return Err(Failure::Forget(altered.to_owned()));
        }
        self.rebuild()?;
        let outcome = &mut self.outcome;
        outcome
            .state
            .set_token(bytes::Bytes::copy_from_slice(resume_token));
        outcome.state.connected = true;
        outcome.state.hear(&outcome.heard, Timestamp::now());
        if outcome.transactions > 0 {
            outcome.state.committed_at(outcome.commit_time);
        }
        outcome
            .state
            .store(self.connection)
            .doing("write the position")?;
        for (id, keys) in self.changes {
            if let Some(table) = outcome.tables.get(&id)
                && table.purpose == Purpose::Data
                && keys.0.as_ref().is_none_or(|keys| !keys.is_empty())
            {
                outcome.changes.push(TableChanges {
                    table: table.name.clone(),
                    keys: keys.0,
                });
            }
        }
        Ok(self.outcome)
    }

    /// Lets go of what is answered, and puts what is pending on top of what came.
    fn rebuild(&mut self) -> Result<(), Failure> {
        let connection = self.connection;
        let tables = self.outcome.tables.clone();
        self.outcome.answers = self.answers;
        let state = &mut self.outcome.state;
        let mut overlay = std::mem::replace(&mut self.overlay, Overlay::new(connection));
        let settles = state
            .position
            .is_some_and(|position| state.settles_at(position));
        if self.answers || settles {
            receipts::take(connection, state, &tables, &mut overlay, self.other_history)
                .map_err(|error| failure("_anabranch_rejected", error))?;
        }
        let catalog = &self.outcome.catalog;
        let quiet = self.quiet;
        let watched = |table: &Table| {
            let synced = catalog.get(&table.name);
            synced
                .is_some_and(|synced| synced.has_triggers)
                .then(|| quiet.clone())
        };
        let changes = self.report_changes.then_some(&mut self.changes);
        overlay
            .rebuild(&tables, watched, changes)
            .map_err(|(table, error)| failure(&table.name, error))
    }

    fn start(&mut self, begin: &v1::Begin) -> Result<(), Failure> {
        self.ordinal += 1;
        self.first = begin.first;
        self.reset.clone_from(&begin.reset);
        self.states.clear();
        if begin.first {
            self.outcome.tables = Arc::default();
            self.writers.clear();
        }
        Ok(())
    }

    fn table(&mut self, declared: &v1::Table) -> Result<(), Failure> {
        let table = Arc::new(Table::new(declared)?);
        let mut is_new = false;
        self.writers.remove(&table.id);
        self.overlay.forget(table.id);
        index::make_way(self.connection, &table.name)?;
        if !self.reset.contains(&table.id) {
            let catalog = &mut self.outcome.catalog;
            Arc::make_mut(catalog).renew(self.connection, &table)?;
            match catalog.find(self.connection, &table)? {
                There::Nothing if catalog.get(&table.name).is_none() => {
                    Catalog::create(self.connection, &table.name, &table)?;
                    is_new = true;
                }
                There::Same => {}
                There::Other if table.reshaped => return self.reshape(table),
                There::Nothing | There::Other => {
                    return Err(Failure::Forget(format!(
                        "{} is not in the file as the streamer declares it, which does not send it in full",
                        table.name
                    )));
                }
            }
            Arc::make_mut(catalog).record(self.connection, &table)?;
            if is_new {
                overlay::rebase(self.connection, &table)
                    .map_err(|error| failure(&table.name, error))?;
                self.overlay.touch_all(table.id);
            }
        }
        Arc::make_mut(&mut self.outcome.tables).insert(table.id, table);
        Ok(())
    }

    /// A table that is there with other columns becomes what it is declared as, with the rows that it has.
    fn reshape(&mut self, table: Arc<Table>) -> Result<(), Failure> {
        let stage = reshape::stage(self.connection, &self.outcome.catalog, &table)?;
        let Some(stage) = stage else {
            return Err(Failure::Forget(format!(
                "{} is not in the file with columns that could become those that the streamer declares",
                table.name
            )));
        };
        self.finish_reset_of(&table, Some(&stage), 0)?;
        reshape::drop_stage(self.connection, &stage)?;
        Arc::make_mut(&mut self.outcome.tables).insert(table.id, table);
        Ok(())
    }

    fn rows(&mut self, rows: &v1::Rows) -> Result<(), Failure> {
        if self.reset.contains(&rows.table) {
            return Ok(());
        }
        let Some(table) = self.outcome.tables.get(&rows.table) else {
            return Err(Error::Stream("rows of a table that was not declared".into()).into());
        };
        let writer = match self.writers.entry(rows.table) {
            std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::hash_map::Entry::Vacant(none) => {
                let synced = self.outcome.catalog.get(&table.name);
                if let Some(why) = synced.and_then(|synced| synced.altered.as_ref()) {
                    return Err(Failure::Forget(why.clone()));
                }
                let watched = synced
                    .is_some_and(|synced| synced.has_triggers)
                    .then(|| self.quiet.clone());
                let writer = Writer::new(self.connection, table.clone(), watched)
                    .map_err(|error| refused(&table.name, error))?;
                none.insert(writer)
            }
        };
        self.answers |= table.purpose != Purpose::Data;
        let may = self.outcome.catalog.get(&table.name);
        let overlaid = self
            .overlay
            .of(table, may.is_some_and(|synced| synced.overlaid))
            .map_err(|error| refused(&table.name, error))?;
        let mut keys = self
            .report_changes
            .then(|| self.changes.entry(rows.table).or_insert_with(Keys::new));
        let mut count = 0;
        self.pieces
            .feed::<RowError>(&rows.ops, rows.continued, |kind, record| {
                count += 1;
                if overlaid.take(kind, record)? {
                    return Ok(());
                }
                writer.write(kind, record)?;
                if let Some(keys) = &mut keys {
                    let key = writer.key(kind, record)?;
                    keys.push(|| key);
                }
                Ok(())
            })
            .map_err(|error| failure(&table.name, error))?;
        self.outcome.rows += count;
        Ok(())
    }

    fn commit(&mut self, commit: &v1::Commit) -> Result<(), Failure> {
        let position: Position = commit.position.unwrap_or_default().into();
        if let Some(before) = self.outcome.state.position {
            self.other_history |= before.epoch != position.epoch;
            if before.epoch == position.epoch && before.lsn > position.lsn {
                return Err(Error::Stream(format!(
                    "the streamer is at {position}, the file already at {before}"
                ))
                .into());
            }
        }
        for id in std::mem::take(&mut self.reset) {
            self.finish_reset(id)?;
        }
        if std::mem::take(&mut self.first) {
            self.drop_undeclared()?;
        }
        for (id, state) in std::mem::take(&mut self.states) {
            if let Some(table) = self.outcome.tables.get(&id) {
                let lsn = position.lsn.to_string();
                let stopped = (state.state() == v1::table_state::State::Stopped)
                    .then_some((state.reason.as_str(), lsn.as_str()));
                tracing::info!(
                    table = table.name,
                    stopped = stopped.is_some(),
                    "a table's state changed"
                );
                Catalog::set_state(self.connection, &table.name, stopped)?;
            }
        }
        self.is_proved = true;
        let outcome = &mut self.outcome;
        outcome.state.position = Some(position);
        outcome.heard = Heard {
            source_lsn: Lsn(commit.source_lsn),
            source_connected: true,
            time: Timestamp::now(),
        };
        outcome.commit_time = commit.commit_time;
        outcome.transactions += 1;
        Ok(())
    }

    fn finish_reset(&mut self, id: u32) -> Result<(), Failure> {
        let Some(table) = self.outcome.tables.get(&id).cloned() else {
            return Err(Error::Stream("a table is reset that was not declared".into()).into());
        };
        let stages = self.stages;
        let stage = stages.get((self.ordinal, id));
        self.finish_reset_of(&table, stage, stage.map_or(0, |stage| stage.rows))
    }

    fn finish_reset_of(
        &mut self,
        table: &Arc<Table>,
        stage: Option<&Stage>,
        rows: u64,
    ) -> Result<(), Failure> {
        let id = table.id;
        // The table may be about to be dropped, and statements on it with it.
        self.writers.remove(&id);
        self.overlay.touch_all(id);
        self.answers |= table.purpose != Purpose::Data;
        let keys = self
            .report_changes
            .then(|| self.changes.entry(id).or_insert_with(Keys::new));
        reset::finish(
            (self.connection, self.quiet),
            &mut self.outcome.catalog,
            table,
            stage,
            keys,
        )
        .map_err(|error| match error {
            ResetError::Error(error) => error.into(),
            ResetError::Rows(error) => refused(&table.name, error),
            ResetError::Ignored => skipped(&table.name),
        })?;
        self.outcome.rows += rows;
        Ok(())
    }

    fn drop_undeclared(&mut self) -> Result<(), Failure> {
        for name in self.outcome.catalog.names() {
            let declared = |table: &Arc<Table>| table.name.eq_ignore_ascii_case(&name);
            if !self.outcome.tables.values().any(declared) {
                tracing::info!(table = name, "dropped a table that left the shapes");
                Arc::make_mut(&mut self.outcome.catalog).drop(self.connection, &name)?;
                if self.report_changes {
                    self.outcome.changes.push(TableChanges {
                        table: name,
                        keys: None,
                    });
                }
            }
        }
        Ok(())
    }
}

fn failure(table: &str, error: RowError) -> Failure {
    match error {
        RowError::Malformed(what) => {
            Error::Stream(format!("a malformed row of {table}: {what}")).into()
        }
        RowError::Sqlite(error) => refused(table, error),
        RowError::Ignored => skipped(table),
    }
}

fn refused(table: &str, error: rusqlite::Error) -> Failure {
    if is_of_statement(&error) {
        return Failure::Blocked {
            table: table.to_owned(),
            why: format!("it made SQLite refuse a row of Postgres: {error}"),
        };
    }
    error::sqlite(&format!("write a row of {table}"), error).into()
}

fn skipped(table: &str) -> Failure {
    Failure::Blocked {
        table: table.to_owned(),
        why: "it made SQLite skip a row of Postgres (RAISE(IGNORE))".to_owned(),
    }
}

impl From<Malformed> for Failure {
    fn from(error: Malformed) -> Self {
        Error::Stream(error.to_string()).into()
    }
}
