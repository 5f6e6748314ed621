//! The grammar of a stream: what may follow what.
//!
//! ```text
//! stream      = { transaction | Heartbeat }
//! transaction = Begin { Table | Rows | TableState } Commit
//! ```
//!
//! [`Grammar`] sees every element before anything is done with it, and holds what the stream has said so far. It does
//! no I/O, and does not look into rows: those are checked where they are bound.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use anabranch_proto::{
    Position,
    v1::{self, element::Kind},
};

use super::{Error, table::Table};

/// Tables in one stream, by the ids that it gave them.
pub(super) type Tables = HashMap<u32, Arc<Table>>;

/// Far above what replicas subscribe to; bounds what a stream can make us remember.
const TABLES_MAX: usize = 10_000;

/// What all declarations of a stream may take together: a thousand wide tables do. They are held more than once, and all of it must
/// have room in what `memory_max` leaves.
const DECLARED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest reason of a table's state that is taken.
const REASON_BYTES_MAX: usize = 4096;

/// Longest resume token that is taken.
pub(super) const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// What a stream has said so far. Cheap to clone: a message that can't be applied now is taken again later, from the
/// same state.
#[derive(Clone, Debug, Default)]
pub(super) struct Grammar {
    tables: Arc<Tables>,
    declared_bytes: usize,
    open: Option<Open>,
    continued: Option<u32>,
    begun: bool,
    completed: bool,
    position: Option<Position>,
    /// Counts the transactions since the last commit to the file, from 1.
    ordinal: u32,
}

#[derive(Clone, Debug)]
struct Open {
    reset: BTreeSet<u32>,
    /// Tables that had rows: these must not change any more.
    touched: Vec<u32>,
}

/// What is to be done with an element.
pub(super) enum Place {
    /// It waits for its commit.
    Queue,
    /// It is rows of a table that is being reset: they go to its stage.
    Stage(u32, Arc<Table>),
}

fn broken<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Stream(format!(
        "the stream is malformed: {}",
        what.into()
    )))
}

impl Grammar {
    /// Takes the next element.
    pub(super) fn check(&mut self, element: &v1::Element) -> Result<Place, Error> {
        let Some(kind) = &element.kind else {
            return broken(
                "an element of a kind that this version does not know; update the replica",
            );
        };
        if let (Some(table), kind) = (self.continued, kind)
            && !matches!(kind, Kind::Rows(rows) if rows.table == table)
        {
            return broken("a row in pieces was not continued");
        }
        match kind {
            Kind::Begin(begin) => self.begin(begin)?,
            Kind::Table(table) => self.table(table)?,
            Kind::Rows(rows) => return self.rows(rows),
            Kind::State(state) => self.state(state)?,
            Kind::Commit(commit) => self.commit(commit)?,
            Kind::Heartbeat(heartbeat) => self.heartbeat(heartbeat)?,
        }
        Ok(Place::Queue)
    }

    /// Checks that a message may end here. True: it is to be committed.
    pub(super) fn end(&mut self, message: &v1::Down) -> Result<bool, Error> {
        if message.resume_token.len() > TOKEN_BYTES_MAX {
            return broken("a resume token above 64 KiB");
        }
        let last = message
            .elements
            .last()
            .and_then(|element| element.kind.as_ref());
        match (last, message.resume_token.is_empty()) {
            (Some(Kind::Commit(_)), true) => broken("a commit ends a message without resume token"),
            (Some(Kind::Commit(_)), false) => {
                self.ordinal = 0;
                Ok(true)
            }
            // Nothing is proved before the first commit: then a heartbeat only says that the streamer lives.
            (Some(Kind::Heartbeat(_)), no_token) => {
                let commits = !no_token && self.completed;
                if commits {
                    self.ordinal = 0;
                }
                Ok(commits)
            }
            (_, true) => Ok(false),
            (_, false) => broken("a resume token in the middle of a transaction"),
        }
    }

    /// The first transaction is complete: from here on a heartbeat's position speaks of what the file holds.
    pub(super) fn has_completed(&self) -> bool {
        self.completed
    }

    fn begin(&mut self, begin: &v1::Begin) -> Result<(), Error> {
        if self.open.is_some() {
            return broken("Begin within a transaction");
        }
        if begin.first == self.begun {
            return broken("the first transaction, and only it, is to be marked as first");
        }
        let reset: BTreeSet<u32> = begin.reset.iter().copied().collect();
        if reset.len() != begin.reset.len() || reset.len() > TABLES_MAX {
            return broken("a table is reset twice, or there are too many");
        }
        self.begun = true;
        self.ordinal = self
            .ordinal
            .checked_add(1)
            .ok_or_else(|| Error::Stream("no commit".into()))?;
        self.open = Some(Open {
            reset,
            touched: Vec::new(),
        });
        Ok(())
    }

    fn table(&mut self, declared: &v1::Table) -> Result<(), Error> {
        let Some(open) = &self.open else {
            return broken("Table outside of a transaction");
        };
        if open.touched.contains(&declared.id) {
            return broken("a table declared again after its rows in one transaction");
        }
        let table = Arc::new(Table::new(declared)?);
        let before = self.tables.get(&declared.id);
        let others = self.declared_bytes - before.map_or(0, |before| before.declared_bytes);
        if others + table.declared_bytes > DECLARED_BYTES_MAX {
            return broken("declarations above 16 MiB");
        }
        match self.tables.get(&declared.id) {
            Some(known) if known.name != table.name => {
                return broken(format!(
                    "id {} was {} and becomes {}",
                    table.id, known.name, table.name
                ));
            }
            Some(_) => {}
            None => {
                if self.tables.len() >= TABLES_MAX {
                    return broken("too many tables");
                }
                if let Some(other) = self
                    .tables
                    .values()
                    .find(|other| other.name.eq_ignore_ascii_case(&table.name))
                {
                    return Err(Error::Definite(format!(
                        "{}.{} and {}.{} would have the same name in the SQLite file: leave one out of the shapes, or rename it in Postgres",
                        other.schema, other.postgres_name, table.schema, table.postgres_name
                    )));
                }
            }
        }
        self.declared_bytes = others + table.declared_bytes;
        Arc::make_mut(&mut self.tables).insert(table.id, table);
        Ok(())
    }

    fn rows(&mut self, rows: &v1::Rows) -> Result<Place, Error> {
        let Some(open) = &mut self.open else {
            return broken("Rows outside of a transaction");
        };
        let Some(table) = self.tables.get(&rows.table) else {
            return broken("rows of a table that was not declared");
        };
        if open.touched.last() != Some(&rows.table) && !open.touched.contains(&rows.table) {
            open.touched.push(rows.table);
        }
        self.continued = rows.continued.then_some(rows.table);
        if open.reset.contains(&rows.table) {
            Ok(Place::Stage(self.ordinal, table.clone()))
        } else {
            Ok(Place::Queue)
        }
    }

    fn state(&mut self, state: &v1::TableState) -> Result<(), Error> {
        if self.open.is_none() {
            return broken("TableState outside of a transaction");
        }
        if !self.tables.contains_key(&state.table) {
            return broken("state of a table that was not declared");
        }
        if state.state() == v1::table_state::State::Unspecified {
            return broken("a table's state that this version does not know; update the replica");
        }
        if state.reason.len() > REASON_BYTES_MAX {
            return broken("the reason of a table's state is above 4 KiB");
        }
        Ok(())
    }

    fn commit(&mut self, commit: &v1::Commit) -> Result<(), Error> {
        let Some(open) = self.open.take() else {
            return broken("Commit outside of a transaction");
        };
        if open.reset.iter().any(|id| !self.tables.contains_key(id)) {
            return broken("a table is reset that was not declared");
        }
        let Some(position) = commit.position else {
            return broken("Commit without position");
        };
        self.advance(position.into())?;
        self.completed = true;
        Ok(())
    }

    fn heartbeat(&mut self, heartbeat: &v1::Heartbeat) -> Result<(), Error> {
        if self.open.is_some() {
            return broken("Heartbeat within a transaction");
        }
        match heartbeat.position {
            Some(position) if self.completed => self.advance(position.into()),
            _ => Ok(()),
        }
    }

    fn advance(&mut self, position: Position) -> Result<(), Error> {
        if let Some(before) = self.position {
            if before.epoch != position.epoch {
                return broken("the epoch changed within a stream");
            }
            if position.lsn < before.lsn {
                return broken(format!("{position} after {before}"));
            }
        }
        self.position = Some(position);
        Ok(())
    }
}
