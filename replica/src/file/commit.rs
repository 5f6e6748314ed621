//! The commit of a message that has a resume token: everything that waited becomes one SQLite transaction.
//!
//! `replay` does it; here is what is done about the ways in which it can fail. A transient error leaves everything as
//! it was. A row that a program's trigger or index refuses is tried without that. A file that is not what its token says
//! forgets the token; one whose content was replaced under us is read anew as well.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anabranch_proto::{Lsn, v1};
use bytes::Bytes;
use jiff::Timestamp;

use super::{
    Applied, Error, File,
    error::Doing,
    leases,
    obstacle::Obstacle,
    replay::{Failure, Outcome, Replay},
    schema::{self, Catalog},
    stage,
    state::{self, Heard, State},
    transaction::Write,
};

/// What is said of a file whose content somebody replaced.
const REPLACED: &str = "the file's position is not the one that was last written: was a backup restored into it? \
    everything is sent again";

impl File {
    /// Commits what waited, and this message.
    pub(super) fn commit(
        &mut self,
        message: &v1::Down,
        applied: &mut Applied,
    ) -> Result<(), Error> {
        self.guard.still_there()?;
        // Looked at again under the write lock; here it is for the stages, which would not be there either.
        if !self.stream.stages.is_empty() && !self.state.is_in_file(&self.connection)? {
            return Err(self.start_over());
        }
        let catalog = &self.catalog;
        let connection = &self.connection;
        let held = self
            .stream
            .stages
            .make_indexes(connection, &mut self.version, |table| {
                Ok(catalog.get(&table.name).is_none()
                    && matches!(catalog.find(connection, table)?, schema::There::Nothing))
            })?;
        applied.locked = applied.locked.max(held);
        let (outcome, held) = match self.replay_around_obstacles(message) {
            Ok(done) => done,
            Err(Failure::Error(error)) => return Err(error),
            Err(Failure::Forget(why)) => return Err(self.forget(why)),
            Err(Failure::Replaced) => return Err(self.start_over()),
            Err(Failure::Blocked { table, why }) => {
                return Err(Error::Definite(format!("can't write to {table}: {why}")));
            }
        };
        applied.locked = applied.locked.max(held);
        applied.position = outcome
            .state
            .position
            .filter(|_| outcome.state.position != self.state.position);
        applied.commit_time = outcome.commit_time;
        applied.transactions = outcome.transactions;
        applied.rows = outcome.rows;
        applied.answers = outcome.answers;
        applied.changes = outcome.changes;
        self.state = outcome.state;
        self.catalog = outcome.catalog;
        self.stream.tables = outcome.tables;
        self.stream.heard = Some(outcome.heard);
        self.stream.noted = None;
        self.stream.queue.clear();
        self.written = Some(Instant::now());
        if !self.stream.stages.is_empty() {
            self.discarded.extend(self.stream.stages.take_names());
            // They are in nobody's way: another time will do.
            if let Err(error) = self.discard() {
                tracing::debug!(%error, "could not drop a stage yet");
            }
        }
        Ok(())
    }

    /// Replays, and where a row is refused or skipped, finds which of the programs' triggers and indexes on its table
    /// is why, by leaving out one after the other. Those are dropped with the commit.
    fn replay_around_obstacles(
        &mut self,
        message: &v1::Down,
    ) -> Result<(Outcome, Duration), Failure> {
        let mut dropped: Vec<(Obstacle, String)> = Vec::new();
        loop {
            let (table, why) = match self.replay(message, &dropped) {
                Err(Failure::Blocked { table, why }) => (table, why),
                done => return done,
            };
            let mut candidates = schema::of_programs(&self.connection, &table)?;
            candidates.retain(|candidate| dropped.iter().all(|(there, _)| there != candidate));
            if candidates.is_empty() {
                return Err(Failure::Blocked { table, why });
            }
            let mut culprit = None;
            for candidate in &candidates {
                let mut trial = dropped.clone();
                trial.push((candidate.clone(), why.clone()));
                match self.replay(message, &trial) {
                    Err(Failure::Blocked { table: other, .. }) if other == table => {}
                    Err(Failure::Blocked { .. }) => {
                        culprit = Some(candidate.clone());
                        break;
                    }
                    done => return done,
                }
            }
            match culprit {
                Some(culprit) => dropped.push((culprit, why)),
                // Only together do they let the row pass.
                None => dropped.extend(candidates.into_iter().map(|one| (one, why.clone()))),
            }
        }
    }

    fn replay(
        &mut self,
        message: &v1::Down,
        dropped: &[(Obstacle, String)],
    ) -> Result<(Outcome, Duration), Failure> {
        let stream = &self.stream;
        let outcome = Outcome {
            catalog: self.catalog.clone(),
            tables: stream.tables.clone(),
            state: self.state.clone(),
            heard: stream.heard.unwrap_or(Heard {
                source_lsn: Lsn(0),
                source_connected: false,
                time: Timestamp::now(),
            }),
            transactions: 0,
            rows: 0,
            answers: false,
            commit_time: 0,
            changes: Vec::new(),
        };
        let write = Write::begin(&self.connection)?;
        let mut replay = Replay::begin(
            (&self.connection, &self.quiet),
            &stream.stages,
            &mut self.version,
            self.report_changes,
            stream.grammar.has_completed(),
            outcome,
            dropped,
        )?;
        stream.queue.visit(|element| replay.element(element))?;
        message
            .elements
            .iter()
            .try_for_each(|element| replay.element(element))?;
        let outcome = replay.finish(&message.resume_token)?;
        let moved = schema::read_version(&self.connection)?;
        let held = write.commit()?;
        self.version.moved(moved);
        self.version.due = false;
        Ok((outcome, held))
    }

    /// Forgets the resume token, so that everything is sent again; the other tables turn that into a difference.
    fn forget(&mut self, why: String) -> Error {
        let forget = || {
            let write = Write::begin(&self.connection)?;
            let mut catalog = Catalog::clone(&self.catalog);
            catalog.inspect(&self.connection, &self.state.replica_id)?;
            let mut state = self.state.clone();
            state.resume_token = Bytes::new();
            state.set_last_error(Some(&why));
            state
                .store(&self.connection)
                .doing("forget the resume token")?;
            let moved = schema::read_version(&self.connection)?;
            write.commit()?;
            Ok((catalog, state, moved))
        };
        match forget() {
            Ok((catalog, state, moved)) => {
                self.catalog = Arc::new(catalog);
                self.state = state;
                self.version.moved(moved);
                self.version.due = false;
                Error::Stream(why)
            }
            Err(error) => error,
        }
    }

    /// Takes the file as it is now, after somebody put other content into it, and forgets the resume token: what is there
    /// came from nobody knows where, so everything is sent again and turned into a difference. The stream is over: what
    /// it would add continues rows that are not there. The replica's id stays what it was told to be.
    pub(super) fn start_over(&mut self) -> Error {
        let connection = &self.connection;
        let replica_id = self.state.replica_id.clone();
        let read_anew = || {
            let write = Write::begin(connection)?;
            state::create(connection, &replica_id).doing("make our own tables")?;
            // Since that state of the file was written its ids may have been used.
            leases::drop_all(connection).doing("drop leased ids")?;
            let mut state = State {
                replica_id,
                resume_token: Bytes::new(),
                connected: self.state.connected,
                caught_up: false,
                ..State::load(connection)?
            };
            state.set_last_error(Some(REPLACED));
            let mut catalog = Catalog::load(connection)?;
            catalog.inspect(connection, &state.replica_id)?;
            let left_over = stage::left_over(connection)?;
            state.store(connection).doing("forget the resume token")?;
            let moved = schema::read_version(connection)?;
            write.commit()?;
            Ok((state, catalog, left_over, moved))
        };
        match read_anew() {
            Ok((state, catalog, left_over, moved)) => {
                tracing::warn!(
                    was = self.state.position.map(|position| position.to_string()),
                    is = state.position.map(|position| position.to_string()),
                    "{REPLACED}"
                );
                self.state = state;
                self.catalog = Arc::new(catalog);
                self.discarded.extend(left_over);
                self.stream.noted = None;
                self.stream.heard = None;
                self.stream.is_broken = true;
                self.version.moved(moved);
                self.version.due = false;
                Error::Stream(REPLACED.to_owned())
            }
            Err(error) => error,
        }
    }
}
