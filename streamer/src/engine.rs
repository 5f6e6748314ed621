//! The engine: one thread that takes transactions in commit order, applies each to the mirror, asks the router whom
//! it concerns, and hands each session its ops.
//!
//! [`Engine`] is deterministic: the same inputs give the same mirror and the same deliveries. It has no clock; the
//! loop around it ([`Engine::run`]) has one, only to decide when a group is committed, which nobody can see but the
//! disk.
//!
//! *Group commit.* Transactions are applied in an open SQLite transaction, the group, which is committed (and synced)
//! when it has lasted [`GROUP_TIME`] with nothing more waiting, [`GROUP_TIME_MAX`] at most, or
//! [`GROUP_CHANGES_MAX`] changes. Only what was committed is confirmed to Postgres. Sessions get their ops at once: if
//! the streamer dies, Postgres sends the same transactions again with the same LSNs.
//!
//! *Hand-over.* A session joins between the commit of one group and the beginning of the next, and the engine itself
//! opens the snapshot for it there. So the position of the snapshot, the position of the engine, and the start of the
//! session's queue are the same, and no transaction is missing between them or twice.

use std::{
    cell::LazyCell,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender},
    },
    time::{Duration, Instant},
};

use anabranch_proto::{Lsn, Position, record::Malformed};
use tokio::sync::{oneshot, watch};

use crate::{
    encode::Ending,
    events::Events,
    lookup::{self, Nothing},
    mirror::{self, Applied, Entry, Mirror, Net, State},
    route::{Routed, Router, SessionId},
    session::{Handle, Lease},
    shape::Bound,
    table::Oid,
    transaction::{Chunk, End, Event},
};

/// A group is committed this long after its first change, if nothing more is waiting. Long enough that a sync is
/// shared at a few hundred transactions a second, short enough that Postgres' retained WAL and joins do not notice.
pub const GROUP_TIME: Duration = Duration::from_millis(5);

/// A group is committed at this age even if more is waiting, so that joins and confirmations get their turn.
pub const GROUP_TIME_MAX: Duration = Duration::from_millis(200);

/// A group is committed at this many changes: beyond it larger groups hardly save anything.
pub const GROUP_CHANGES_MAX: usize = 5_000;

/// An idle position is made durable at most this often, unless Postgres waits for it.
pub const IDLE_EVERY: Duration = Duration::from_secs(1);

/// What waits for the engine at most, in inputs. Those that hold data are bounded in bytes too (see `events`).
pub const INPUTS_MAX: usize = 1_024;

/// What the engine takes.
pub enum Input {
    /// From Postgres, in the order of its WAL.
    Events(Events),
    /// How far Postgres' WAL had come, or that it is out of reach.
    Source(Source),
    /// A session wants to be served from the next boundary of groups on.
    Join(Join),
    /// A session is gone.
    Leave(SessionId),
    /// The schema of a table was found changed.
    Stop(Oid, String),
    /// Something to do with the mirror between two groups.
    Mirror(Work),
    /// Commit and end.
    Shutdown,
}

/// Something to do with the mirror. Its error ends the engine, as any error of the mirror does.
pub type Work = Box<dyn FnOnce(&mut Mirror) -> Result<(), mirror::Error> + Send>;

/// What is known of Postgres, for honest heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// How far its WAL had come when it was last heard.
    pub lsn: Lsn,
    /// Whether it is connected.
    pub connected: bool,
}

/// Sessions ask to join, together.
pub struct Join {
    /// Those that do.
    pub sessions: Vec<Joining>,
    /// Comes back with a snapshot open.
    pub reader: Lease,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Joined>,
}

/// A session that joins.
pub struct Joining {
    /// Its queue, which is filled from here on.
    pub session: Arc<Handle>,
    /// What it may see.
    pub bounds: Arc<Vec<Bound>>,
}

/// The answer to a [`Join`].
pub struct Joined {
    /// Its snapshot is at `position`.
    pub reader: Lease,
    /// The queues have everything after it.
    pub position: Position,
    /// All tables that are not followed any more, and why.
    pub stopped: Vec<(Oid, String)>,
}

/// What the engine tells everybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Survives a power cut: what is confirmed to Postgres, and said in heartbeats.
    pub durable: Position,
    /// What is known of Postgres.
    pub source: Source,
}

/// The engine can't go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mirror failed. Opened again, it is as of its durable position, and Postgres sends what came after.
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    /// A row of the mirror can't be read.
    #[error("mirror: {0}")]
    Malformed(#[from] Malformed),
    /// Rows that a condition asks for could not be had.
    #[error(transparent)]
    Lookup(#[from] lookup::Error),
}

/// The engine. See the module's doc.
pub struct Engine {
    mirror: Mirror,
    router: Router,
    sessions: std::collections::HashMap<SessionId, Arc<Handle>, foldhash::fast::RandomState>,
    joins: Vec<Join>,
    /// Work on the mirror that waits for the end of a group.
    work: Vec<Work>,
    progress: watch::Sender<Progress>,
    confirmed: watch::Sender<Lsn>,
    source: Source,
    /// Changes in the open group.
    group_changes: usize,
    /// A transaction of many chunks has begun: its parts are in a mirror transaction of their own.
    large: bool,
    /// Where an idle source stands, not yet in the mirror.
    idle: Option<Lsn>,
}

impl Engine {
    /// An engine over an open mirror. It tells everybody how far it is by `progress`, and Postgres by what is returned.
    pub fn new(
        mirror: Mirror,
        progress: watch::Sender<Progress>,
    ) -> (Engine, watch::Receiver<Lsn>) {
        let durable = mirror.durable();
        progress.send_replace(Progress {
            durable,
            source: Source::default(),
        });
        let (confirmed, confirmed_seen) = watch::channel(durable.lsn);
        let engine = Engine {
            mirror,
            router: Router::default(),
            sessions: Default::default(),
            joins: Vec::new(),
            work: Vec::new(),
            progress,
            confirmed,
            source: Source::default(),
            group_changes: 0,
            large: false,
            idle: None,
        };
        (engine, confirmed_seen)
    }

    /// Takes inputs until `Shutdown`, or until nobody can send any more.
    ///
    /// `group_time` is [`GROUP_TIME`], but in tests that stretch groups.
    pub fn run(&mut self, inputs: &Receiver<Input>, group_time: Duration) -> Result<(), Error> {
        let group_time_max = group_time.max(GROUP_TIME_MAX);
        let mut began: Option<Instant> = None;
        let mut idle_at = Instant::now();
        loop {
            let now = Instant::now();
            let due = match began {
                Some(began) => Some(began + group_time),
                None if self.idle.is_some() => Some(idle_at + IDLE_EVERY),
                None => None,
            };
            let input = match inputs.try_recv() {
                Ok(input) => Ok(input),
                Err(_) => match due {
                    Some(due) => inputs.recv_timeout(due.saturating_duration_since(now)),
                    None => inputs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                },
            };
            match input {
                Ok(Input::Shutdown) | Err(RecvTimeoutError::Disconnected) => {
                    self.commit()?;
                    return Ok(());
                }
                Ok(input) => self.take(input)?,
                Err(RecvTimeoutError::Timeout) => {
                    self.commit()?;
                    idle_at = Instant::now();
                }
            }
            if self.group_changes >= GROUP_CHANGES_MAX
                || began.is_some_and(|began| began.elapsed() >= group_time_max)
            {
                self.commit()?;
            }
            began = match (self.mirror.is_open(), began) {
                (true, None) => Some(Instant::now()),
                (true, began) => began,
                (false, _) => None,
            };
        }
    }

    /// Takes one input.
    pub fn take(&mut self, input: Input) -> Result<(), Error> {
        match input {
            Input::Events(mut events) => {
                for event in events.events.drain(..) {
                    self.event(event)?;
                }
            }
            Input::Source(source) => {
                self.source = source;
                self.tell_progress();
            }
            Input::Join(join) => {
                self.joins.push(join);
                self.serve_waiting()?;
            }
            Input::Leave(session) => {
                for join in &mut self.joins {
                    (join.sessions).retain(|joining| joining.session.id() != session);
                }
                self.leave(session);
            }
            Input::Stop(table, reason) => self.stop(table, &reason)?,
            Input::Mirror(work) => {
                self.commit()?;
                self.work.push(work);
                self.serve_waiting()?;
            }
            Input::Shutdown => self.commit()?,
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Chunk(chunk) => self.chunk(chunk)?,
            Event::Idle { lsn, urgent } => {
                self.source.lsn = self.source.lsn.max(lsn);
                if lsn > self.mirror.position().lsn {
                    self.idle = Some(lsn);
                }
                if urgent {
                    self.commit()?;
                }
            }
            Event::Lost => {
                if std::mem::take(&mut self.large) {
                    self.mirror.abort_large()?;
                    self.serve_waiting()?;
                }
            }
        }
        Ok(())
    }

    /// Commits the open group, confirms it, and lets waiting sessions join.
    pub fn commit(&mut self) -> Result<(), Error> {
        if self.large {
            // The parts of a large transaction are committed by its end, or not at all.
            return Ok(());
        }
        if let Some(lsn) = self.idle.take()
            && lsn > self.mirror.position().lsn
        {
            self.mirror.advance(lsn)?;
        }
        if self.mirror.is_open() {
            self.mirror.commit()?;
            self.group_changes = 0;
            self.tell_progress();
        }
        self.serve_waiting()
    }

    fn chunk(&mut self, chunk: Chunk) -> Result<(), Error> {
        let whole = chunk.first && chunk.end.is_some();
        if chunk.first && self.large {
            // The source always says `Lost` first; never go on over half a transaction.
            self.mirror.abort_large()?;
            self.large = false;
        }
        if chunk.commit_lsn < self.mirror.position().lsn {
            // Postgres sends again what it was not yet told that we have.
            return Ok(());
        }
        if let (true, Some(end)) = (whole, chunk.end) {
            let applied = self.mirror.apply(&chunk)?;
            self.group_changes += chunk.changes.len().max(applied.nets.len());
            self.deliver(&applied, end)?;
            return Ok(());
        }
        if chunk.first {
            self.commit()?;
            self.large = true;
        }
        self.mirror.apply_part(&chunk)?;
        if let Some(end) = chunk.end {
            let applied = self.mirror.end_large(end)?;
            self.large = false;
            // Deliveries first: whoever sees the new progress must find its queue complete up to there.
            self.deliver(&applied, end)?;
            self.tell_progress();
            self.serve_waiting()?;
        }
        Ok(())
    }

    /// Hands out what a transaction means to each session.
    fn deliver(&mut self, applied: &Applied, end: End) -> Result<(), Error> {
        self.source.lsn = self.source.lsn.max(end.lsn);
        let position = self.mirror.position();
        let Routed {
            ops: mut routed,
            behind,
            ..
        } = self.route(&applied.nets)?;
        // First: who got a part of it would take it for all.
        for session in behind
            .into_iter()
            .chain(self.router.sessions_of(&applied.large))
        {
            if let Some(handle) = self.sessions.get(&session) {
                handle.fall_behind();
            }
        }
        for (table, reason) in &applied.stopped {
            for session in self.router.sessions_of(&[*table]) {
                // A stop is a delivery even where no row is.
                routed.entry(session).or_default();
                if let Some(handle) = self.sessions.get(&session) {
                    handle.stop(*table, reason);
                }
            }
        }
        // Most transactions may concern nobody.
        let source_lsn = self.source.lsn;
        let ending = LazyCell::new(|| Ending::new(position, end.commit_time, source_lsn));
        for (session, ops) in routed {
            let handle = self.sessions.get(&session);
            if handle.is_some_and(|handle| !handle.push(ops, &ending)) {
                self.leave(session);
            }
        }
        Ok(())
    }

    fn route(&self, nets: &[Net]) -> Result<Routed, Error> {
        if !self.router.looks_into_others() {
            // Most streamers have no shape that does: they need not prepare for it.
            return Ok(self.router.route(nets, &Nothing, &Nothing)?);
        }
        Ok(self
            .router
            .route(nets, &self.mirror.before(nets), &self.mirror.now())?)
    }

    fn stop(&mut self, table: Oid, reason: &str) -> Result<(), Error> {
        if self.large {
            // Not in the middle of a transaction; who found it looks again in a few seconds, and says so again.
            return Ok(());
        }
        let followed = |entry: &Entry| entry.table.oid == table && entry.state == State::Live;
        if !self.mirror.tables().iter().any(followed) {
            return Ok(());
        }
        // In a group of its own, so that it is durable before it is told.
        self.commit()?;
        let stopped = self.mirror.stop_table(table, reason)?;
        self.commit()?;
        for (table, reason) in &stopped {
            for session in self.router.sessions_of(&[*table]) {
                if let Some(handle) = self.sessions.get(&session) {
                    handle.stop(*table, reason);
                    handle.wake();
                }
            }
        }
        Ok(())
    }

    /// Lets sessions join and works on the mirror, if this is a boundary of groups.
    ///
    /// Sessions also join while a large transaction is applied, which may take minutes: its group began with it, so
    /// what is committed is as of the position; and its end makes all fall behind whom it concerns.
    fn serve_waiting(&mut self) -> Result<(), Error> {
        if self.mirror.is_open() && !self.large {
            return Ok(());
        }
        if !self.large {
            for work in std::mem::take(&mut self.work) {
                work(&mut self.mirror)?;
            }
        }
        for mut join in std::mem::take(&mut self.joins) {
            let position = join.reader.begin()?;
            let mut ids = Vec::with_capacity(join.sessions.len());
            for Joining { session, bounds } in join.sessions {
                let id = session.id();
                if session.is_closed() {
                    // It has left already: nobody would tell again.
                    continue;
                }
                session.open();
                self.router.add(id, &bounds);
                self.sessions.insert(id, session);
                ids.push(id);
            }
            let tables = self.mirror.tables().into_iter();
            let stopped = tables.filter_map(|entry| match entry.state {
                State::Stopped { reason, .. } => Some((entry.table.oid, reason)),
                _ => None,
            });
            let answer = Joined {
                reader: join.reader,
                position,
                stopped: stopped.collect(),
            };
            if join.answer.send(answer).is_err() {
                ids.into_iter().for_each(|id| self.leave(id));
            }
        }
        Ok(())
    }

    fn leave(&mut self, session: SessionId) {
        self.router.remove(session);
        self.sessions.remove(&session);
    }

    fn tell_progress(&mut self) {
        let durable = self.mirror.durable();
        self.confirmed.send_if_modified(|lsn| {
            let moved = *lsn != durable.lsn;
            *lsn = durable.lsn;
            moved
        });
        self.progress.send_replace(Progress {
            durable,
            source: self.source,
        });
    }
}

/// Where inputs are sent. Blocks while [`INPUTS_MAX`] wait.
pub type Inputs = SyncSender<Input>;
