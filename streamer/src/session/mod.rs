//! One connected replica.
//!
//! A session holds no sets of keys; its state is its bound SELECTs and a position. Its queue is small and bounded: when
//! it overflows, or when a transaction was too large to be routed, it is dropped and the session *catches up*: it asks
//! the mirror for the difference between its position and now, sends that as one transaction, and goes back to the
//! queue. A join is a catch-up from nothing, so there is no other mode, and a slow replica costs a position.
//!
//! [`queue`] is what the engine pushes to, [`view`] what the replica may see, [`former`] what it was shown before, and
//! [`Session::run`] turns both into messages. Thousands of sessions share a few [`readers`], in [`turns`]; those that are only
//! a little behind are served together ([`gathering`]), and who comes while too many wait is sent away for a while
//! ([`admission`]).

pub mod admission;
pub mod former;
pub mod gathering;
mod queue;
mod readers;
mod rounds;
mod turns;
mod view;

use std::{sync::Arc, time::Duration};

use anabranch_proto::{HEARTBEAT_EVERY, Position, down::Encoded, packed};
use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::{
    admission::Admitted,
    gathering::{Answer, Request, Requests},
};
pub use self::{
    queue::{Handle, Taken, Total},
    readers::{Lease, Owner, Readers},
    rounds::{Room, Rounds},
    view::{ColumnsDiffer, TableView},
};
use crate::{
    catchup::{Catchup, Item, Round, View, tables_of, together::Member},
    encode::{At, Encoder, Ending},
    engine::{Input, Inputs, Join, Joined, Joining, Progress},
    events::Waiting,
    metrics::Metrics,
    mirror,
    route::SessionId,
    shape::Bound,
    table::{Defaults, Oid},
    token::Proof,
};

/// While Postgres is ahead of the replica, what comes within this time travels together: a message, and a commit of the
/// replica, for each transaction of a backlog would be most of the work. What is live goes at once.
const GATHER: Duration = Duration::from_millis(5);

/// The same for each so many bytes of WAL that it is behind: what comes that late may as well come a moment later, in fewer
/// messages. Unless there is a message's worth of it. What waits for the engine counts too: how far Postgres is ahead is asked once
/// a second, and that is late where a backlog begins.
const GATHER_BYTES: u64 = 256 * 1024;

/// The longest.
const GATHER_MAX: Duration = Duration::from_secs(1);

/// Messages on their way into the connection of one session.
pub const MESSAGES_AHEAD: usize = 2;

/// The session is over.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The replica is gone.
    #[error("the replica disconnected")]
    Gone,
    /// The streamer stops, or the engine did.
    #[error("the streamer is stopping")]
    Stopping,
    /// The mirror can't be read.
    #[error(transparent)]
    Mirror(mirror::Error),
    /// The mirror can't serve this replica just now: the change index was trimmed beyond its position while it caught
    /// up, or a table is not complete yet. A new connection starts over.
    #[error("{0}; connect again")]
    Later(mirror::Error),
}

impl From<mirror::Error> for Ended {
    fn from(error: mirror::Error) -> Self {
        use mirror::Error::{Ahead, NotReady, OutOfReach};
        match error {
            OutOfReach(_) | NotReady(_) | Ahead { .. } => Ended::Later(error),
            error => Ended::Mirror(error),
        }
    }
}

/// Makes resume tokens for one replica.
pub type Issue = Box<dyn Fn(Position) -> Bytes + Send + Sync>;

/// A session about to run.
pub struct Session {
    /// Its queue.
    pub handle: Arc<Handle>,
    /// What it may see.
    pub bounds: Arc<Vec<Bound>>,
    /// The same, by table.
    pub views: Vec<Arc<TableView>>,
    /// What its resume token proved; its fingerprints are those of [`TableView::fingerprint`].
    pub proof: Option<Proof>,
    /// Makes its tokens.
    pub issue: Issue,
    /// Where it asks to join.
    pub inputs: Inputs,
    /// How far the engine is.
    pub progress: watch::Receiver<Progress>,
    /// What waits for it.
    pub waiting: Arc<Waiting>,
    /// What columns hold that an INSERT leaves out.
    pub defaults: watch::Receiver<Arc<Defaults>>,
    /// For catch-ups.
    pub readers: Arc<Readers>,
    /// For what they fill.
    pub rounds: Arc<Rounds>,
    /// That of the last round, until something else was sent behind it.
    pub room: Option<Room>,
    /// Whose turn it takes for them.
    pub owner: Owner,
    /// Where it is served together with others.
    pub gathering: Requests,
    /// Its place in the line, until it is served.
    pub admitted: Option<Admitted>,
    /// Counts what the initial copy brings, if one is under way.
    pub copied: watch::Receiver<u64>,
    /// Messages may be packed.
    pub zstd: bool,
    /// Where its messages go.
    pub out: mpsc::Sender<Box<Encoded>>,
    /// Counts its catch-ups.
    pub metrics: Arc<Metrics>,
    /// The streamer stops.
    pub stopping: CancellationToken,
}

/// Where a session stands.
struct Standing {
    /// What the replica has been sent, for each of `views`; `None`: nothing that it could keep.
    from: Vec<Option<Position>>,
    /// What it was shown there by, where that is not the view; until it got the first transaction.
    former: Vec<Option<Arc<TableView>>>,
    /// No transaction was sent yet.
    first: bool,
    /// The position of the last Commit or Heartbeat.
    last: Option<Position>,
    /// Tables whose stop was told.
    stopped: Vec<Oid>,
    /// What its tables were declared with.
    defaults: Arc<Defaults>,
    /// Bytes of WAL that the last transaction from its queue was behind Postgres.
    lag_bytes: u64,
}

impl Session {
    /// Streams until the replica is gone or the streamer stops.
    pub async fn run(&mut self) -> Result<(), Ended> {
        let stopping = self.stopping.clone();
        tokio::select! {
            ended = self.stream() => ended,
            () = stopping.cancelled() => Err(Ended::Stopping),
        }
    }

    async fn stream(&mut self) -> Result<(), Ended> {
        let mut encoder = Encoder::default();
        let mut standing = self.standing();
        // Boxed, as all that follows: a session is live nearly all the time, and should not hold the room that the others need.
        Box::pin(self.wait_for_mirror(&standing, &mut encoder)).await?;
        loop {
            self.metrics.catch_ups.inc();
            if !Box::pin(self.catch_up_together(&mut standing, &mut encoder)).await? {
                Box::pin(self.catch_up(&mut standing, &mut encoder)).await?;
            }
            self.live(&mut standing, &mut encoder).await?;
        }
    }

    /// Believes what the token proved, and no more.
    fn standing(&self) -> Standing {
        let epoch = self.progress.borrow().durable.epoch;
        let proof = self
            .proof
            .as_ref()
            .filter(|proof| proof.position.epoch == epoch);
        let held = |view: &Arc<TableView>| {
            proof
                .filter(|proof| proof.fingerprints.contains(&view.fingerprint()))
                .map(|proof| proof.position)
        };
        Standing {
            from: self.views.iter().map(held).collect(),
            former: vec![None; self.views.len()],
            first: true,
            last: proof.map(|proof| proof.position),
            stopped: Vec::new(),
            defaults: Arc::default(),
            lag_bytes: 0,
        }
    }

    /// A replica may be ahead of a streamer that was killed: it got ops before they were durable here. Postgres sends
    /// them again; until the mirror is there, there is nothing to tell but that the streamer is alive.
    async fn wait_for_mirror(
        &mut self,
        standing: &Standing,
        encoder: &mut Encoder,
    ) -> Result<(), Ended> {
        let Some(at) = standing.last else {
            return Ok(());
        };
        loop {
            let now = *self.progress.borrow_and_update();
            if now.durable.lsn >= at.lsn {
                return Ok(());
            }
            // A heartbeat comes with a token that proves what the replica is shown now, which it was not yet if that is something else.
            if standing.from.contains(&None) {
                encoder.sign_of_life();
            } else {
                encoder.heartbeat(at, now.source);
                encoder.end_message(&(self.issue)(at));
            }
            self.send(encoder).await?;
            let moved = tokio::time::timeout(HEARTBEAT_EVERY, self.progress.changed());
            if let Ok(Err(_)) = moved.await {
                return Err(Ended::Stopping);
            }
        }
    }

    /// The same as [`catch_up`](Self::catch_up), together with others who have all of their tables as of one position. False:
    /// it must be done alone, and nothing was sent.
    async fn catch_up_together(
        &mut self,
        standing: &mut Standing,
        encoder: &mut Encoder,
    ) -> Result<bool, Ended> {
        let looks_into_others = |bound: &Bound| !bound.select.subqueries().is_empty();
        let Some(from) = standing.from.first().copied() else {
            return Ok(false);
        };
        // Who has something that is not proved may have been shown it by another definition, whose difference is found alone.
        let may_be_changed = from.is_none() && standing.last.is_some();
        if may_be_changed
            || standing.from.iter().any(|other| *other != from)
            || self.bounds.iter().any(looks_into_others)
        {
            return Ok(false);
        }
        let (answer, answered) = oneshot::channel();
        let request = Request {
            joining: self.joining(),
            member: Member {
                views: self.views.clone(),
                from,
            },
            answer,
        };
        let asked = async {
            // Without an answer the streamer stops.
            let _ = self.gathering.send(request).await;
            answered.await.map_err(|_| Ended::Stopping)
        };
        let told = self.alive(encoder, asked).await??;
        self.admitted = None;
        let Answer {
            ops: Some((ops, room)),
            position,
            stopped,
        } = told
        else {
            self.handle.fall_behind();
            return Ok(false);
        };
        let count = match from {
            Some(_) => 0,
            None => self.views.len() as u32,
        };
        self.begin(standing, encoder, (1..=count).collect());
        for (at, op) in &ops {
            encoder.op(*at as u32 + 1, op);
        }
        drop(ops);
        self.complete(standing, encoder, position, &stopped).await?;
        self.taken(room).await?;
        Ok(true)
    }

    /// Begins a transaction of a catch-up.
    fn begin(&mut self, standing: &mut Standing, encoder: &mut Encoder, reset: Vec<u32>) {
        encoder.begin(standing.first, reset);
        if standing.first {
            standing.defaults = self.defaults.borrow_and_update().clone();
            self.declare(encoder, &standing.defaults, &standing.former, |_| true);
        }
    }

    /// Ends it, and sends it.
    async fn complete(
        &self,
        standing: &mut Standing,
        encoder: &mut Encoder,
        position: Position,
        stopped: &[(Oid, String)],
    ) -> Result<(), Ended> {
        for (table, reason) in stopped {
            self.tell_stopped(standing, encoder, *table, reason);
        }
        let now = *self.progress.borrow();
        encoder.end(&nameless(position, now));
        encoder.end_message(&(self.issue)(position));
        self.send(encoder).await?;
        standing.from.fill(Some(position));
        standing.former.fill(None);
        standing.first = false;
        standing.last = Some(position);
        Ok(())
    }

    /// Sends the difference between where the replica stands and now as one transaction. If that is so little that it
    /// fits in one round it joins the queue there; else the queue stays closed, and the next catch-up has less to bring.
    async fn catch_up(
        &mut self,
        standing: &mut Standing,
        encoder: &mut Encoder,
    ) -> Result<(), Ended> {
        let taken = self.readers.take(&self.owner);
        let mut reader = self.alive(encoder, taken).await?;
        self.admitted = None;
        self.find_former(standing, &mut reader)?;
        let reset = self.unreachable(standing, &mut reader).await?;
        for at in &reset {
            standing.from[*at] = None;
        }
        let ids = reset.iter().map(|at| *at as u32 + 1).collect();
        self.begin(standing, encoder, ids);
        let items = self.views.iter().zip(&standing.from).zip(&standing.former);
        let items = items.map(|((view, from), former)| Item {
            view: match former {
                Some(former) => Arc::new(former::Changed::new(view.clone(), former.clone())),
                None => view.clone(),
            },
            from: *from,
        });
        let mut catchup = Catchup::new(items.collect());
        // A replica that is not far away joins at once; one that is goes round by round, without a queue.
        let mut join = reset.is_empty();
        let mut said = Instant::now();
        let (position, stopped, room) = loop {
            let room = self.rounds.take();
            let bytes_max = room.bytes();
            let mut stopped = Vec::new();
            let mut snapshot = reader;
            if join {
                let joined = self.alive(encoder, self.join(snapshot)).await??;
                snapshot = joined.reader;
                stopped = joined.stopped;
            } else {
                snapshot = blocking(move || {
                    snapshot.begin()?;
                    Ok(snapshot)
                })
                .await?;
            }
            let mut filling = std::mem::take(encoder);
            let work = blocking(move || {
                let round = catchup.round(&mut snapshot, bytes_max, &mut |item, op| {
                    filling.op(item as u32 + 1, &op);
                });
                let round = round.and_then(|round| Ok((round, snapshot.stopped()?)));
                snapshot.end();
                Ok((round, catchup, snapshot, filling))
            });
            let (round, filled);
            (round, catchup, reader, filled) = self.alive(encoder, work).await??;
            *encoder = filled;
            let (round, stopped_by_now) = round?;
            // Joined or not: what changes within one group may be more than a round holds, again and again. A replica that
            // had to join first would then be told everything and never commit any of it.
            if let Round::Complete(position) = round {
                stopped.extend(stopped_by_now);
                break (position, stopped, room);
            }
            if join {
                self.handle.fall_behind();
                join = false;
            }
            drop(reader);
            if round == Round::Filling || room.is_short() {
                // What there is goes out now: the replica takes it in while Postgres is read on, or memory is short.
                encoder.end_message(&[]);
            }
            // A round may find nothing to send, and so may those after it.
            if said.elapsed() >= HEARTBEAT_EVERY {
                encoder.sign_of_life();
            }
            if self.send(encoder).await? {
                said = Instant::now();
            }
            self.taken(room).await?;
            if round == Round::Filling {
                self.wait_for_copy(encoder).await?;
            }
            reader = self.alive(encoder, self.readers.take(&self.owner)).await?;
        };
        drop(reader);
        self.complete(standing, encoder, position, &stopped).await?;
        self.taken(room).await
    }

    /// Finds what the replica was shown of the tables whose definitions are others now.
    fn find_former(&self, standing: &mut Standing, reader: &mut Lease) -> Result<(), Ended> {
        let epoch = self.progress.borrow().durable.epoch;
        let proof = self.proof.as_ref();
        let proof = proof.filter(|proof| standing.first && proof.position.epoch == epoch);
        let Some(proof) = proof else { return Ok(()) };
        let found = tokio::task::block_in_place(|| former::find(&mut *reader, &self.views, proof))?;
        for (place, former) in found.into_iter().enumerate() {
            if former.is_some() {
                standing.from[place] = Some(proof.position);
                standing.former[place] = former;
            }
        }
        Ok(())
    }

    /// Declares tables. `former`: what the replica was shown of them before, where that was something else.
    fn declare(
        &self,
        encoder: &mut Encoder,
        defaults: &Defaults,
        former: &[Option<Arc<TableView>>],
        which: impl Fn(&TableView) -> bool,
    ) {
        for (at, view) in self.views.iter().enumerate() {
            if which(view) {
                let former = former.get(at).and_then(Option::as_ref);
                encoder.table(
                    at as u32 + 1,
                    view.table(),
                    view.columns(),
                    former.is_some_and(|former| former.columns() != view.columns()),
                    view.is_writable(),
                    view.policy(),
                    defaults,
                );
            }
        }
    }

    /// Until the initial copy has brought more.
    async fn wait_for_copy(&mut self, encoder: &mut Encoder) -> Result<(), Ended> {
        match tokio::time::timeout(HEARTBEAT_EVERY, self.copied.changed()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Ended::Stopping),
            Err(_) => {
                encoder.sign_of_life();
                self.send(encoder).await.map(drop)
            }
        }
    }

    /// Streams from the queue until the session falls behind.
    async fn live(&mut self, standing: &mut Standing, encoder: &mut Encoder) -> Result<(), Ended> {
        let mut said = Instant::now();
        loop {
            // Read before the queue is taken: whatever lies at or below it was pushed before it was told.
            let now = *self.progress.borrow_and_update();
            let waiting = self.waiting.bytes() as u64;
            if waiting >= GATHER_BYTES
                || standing.last.is_some_and(|last| last.lsn < now.source.lsn)
            {
                let behind = standing.lag_bytes.max(waiting);
                let gathered = tokio::time::sleep_until(said + gather(behind, self.handle.id()));
                tokio::select! {
                    () = gathered => {}
                    () = self.handle.filled() => {}
                }
            }
            let mut taken = self.handle.take();
            let something = !taken.told.is_empty() || !taken.stopped.is_empty();
            let behind = taken.behind;
            if something {
                self.encode(standing, encoder, &mut taken, now);
                self.send(encoder).await?;
                self.room = None;
                said = Instant::now();
            }
            drop(taken);
            if behind {
                return Ok(());
            }
            if something {
                continue;
            }
            if self.defaults.has_changed().unwrap_or_default() {
                self.declare_again(standing, encoder, now);
                self.send(encoder).await?;
                continue;
            }
            if said.elapsed() >= HEARTBEAT_EVERY {
                let last = standing.last.unwrap_or(now.durable);
                let position = if now.durable.lsn > last.lsn {
                    now.durable
                } else {
                    last
                };
                encoder.heartbeat(position, now.source);
                encoder.end_message(&(self.issue)(position));
                self.send(encoder).await?;
                self.room = None;
                standing.last = Some(position);
                standing.from.fill(Some(position));
                said = Instant::now();
                continue;
            }
            let _ = tokio::time::timeout_at(said + HEARTBEAT_EVERY, self.handle.woken()).await;
            if self.progress.has_changed().is_err() {
                return Err(Ended::Stopping);
            }
        }
    }

    fn encode(
        &mut self,
        standing: &mut Standing,
        encoder: &mut Encoder,
        taken: &mut Taken,
        now: Progress,
    ) {
        for told in std::mem::take(&mut taken.told) {
            let At {
                position,
                source_lsn,
            } = encoder.told(told, |table| self.handle.id_of(table));
            standing.last = Some(position);
            standing.lag_bytes = source_lsn.0.saturating_sub(position.lsn.0);
            if encoder.is_full() {
                encoder.end_message(&(self.issue)(position));
            }
        }
        let stopped = std::mem::take(&mut taken.stopped);
        if !stopped.is_empty() {
            // In a transaction without rows, at the last position.
            encoder.begin(false, Vec::new());
            for (table, reason) in stopped {
                self.tell_stopped(standing, encoder, table, &reason);
            }
            encoder.end(&nameless(standing.last.unwrap_or(now.durable), now));
        }
        if let Some(position) = standing.last {
            encoder.end_message(&(self.issue)(position));
            standing.from.fill(Some(position));
        }
    }

    /// Declares the tables again of which defaults changed, in a transaction without rows.
    fn declare_again(&mut self, standing: &mut Standing, encoder: &mut Encoder, now: Progress) {
        let defaults = self.defaults.borrow_and_update().clone();
        let known = std::mem::replace(&mut standing.defaults, defaults);
        let changed = |view: &TableView| {
            let table = view.table().oid;
            !standing.stopped.contains(&table) && known.get(&table) != standing.defaults.get(&table)
        };
        encoder.begin(false, Vec::new());
        self.declare(encoder, &standing.defaults, &[], changed);
        let position = standing.last.unwrap_or(now.durable);
        encoder.end(&nameless(position, now));
        encoder.end_message(&(self.issue)(position));
    }

    fn tell_stopped(
        &self,
        standing: &mut Standing,
        encoder: &mut Encoder,
        table: Oid,
        reason: &str,
    ) {
        if standing.stopped.contains(&table) {
            return;
        }
        if let Some(id) = self.handle.id_of(table) {
            encoder.stopped(id, &format!("{reason}; {}", mirror::REMEDY));
            standing.stopped.push(table);
        }
    }

    /// Places of the tables that must be sent in full: nothing is proved of them, or the change index does not reach
    /// back to where the replica stands.
    async fn unreachable(
        &self,
        standing: &Standing,
        reader: &mut Lease,
    ) -> Result<Vec<usize>, Ended> {
        let mut reset = Vec::new();
        tokio::task::block_in_place(|| {
            reader.begin()?;
            for (at, (view, from)) in self.views.iter().zip(&standing.from).enumerate() {
                let reaches = match from {
                    // It was looked at.
                    Some(_) if standing.former[at].is_some() => true,
                    Some(from) => tables_of(&**view).iter().try_fold(true, |all, table| {
                        Ok::<_, mirror::Error>(all && reader.reaches(table.oid, *from)?)
                    })?,
                    None => false,
                };
                if !reaches {
                    reset.push(at);
                }
            }
            reader.end();
            Ok::<_, mirror::Error>(())
        })?;
        Ok(reset)
    }

    fn joining(&self) -> Joining {
        Joining {
            session: self.handle.clone(),
            bounds: self.bounds.clone(),
        }
    }

    async fn join(&self, reader: Lease) -> Result<Joined, Ended> {
        let (answer, answered) = oneshot::channel();
        let join = Join {
            sessions: vec![self.joining()],
            reader,
            answer,
        };
        send(&self.inputs, Input::Join(join));
        answered.await.map_err(|_| Ended::Stopping)
    }

    /// Waits for this. Meanwhile the replica hears that the streamer lives, or it would leave, and begin again.
    async fn alive<T>(
        &self,
        encoder: &mut Encoder,
        waiting: impl Future<Output = T>,
    ) -> Result<T, Ended> {
        tokio::pin!(waiting);
        loop {
            match tokio::time::timeout(HEARTBEAT_EVERY, &mut waiting).await {
                Ok(done) => return Ok(done),
                Err(_) => {
                    encoder.sign_of_life();
                    self.send(encoder).await?;
                }
            }
        }
    }

    /// A round was sent: gives back the room of the one before, of which nothing waits here any more. Where room is short, the
    /// connection must take this one first.
    async fn taken(&mut self, room: Room) -> Result<(), Ended> {
        if room.is_short() {
            let all = self.out.reserve_many(MESSAGES_AHEAD).await;
            all.map_err(|_| Ended::Gone)?;
        }
        self.room = Some(room);
        Ok(())
    }

    /// Sends the messages that are finished; says whether there were any.
    async fn send(&self, encoder: &mut Encoder) -> Result<bool, Ended> {
        let mut any = false;
        while let Some(message) = encoder.take() {
            any = true;
            let message = match self.zstd {
                true => Box::new(packed::pack(*message)),
                false => message,
            };
            self.out.send(message).await.map_err(|_| Ended::Gone)?;
        }
        Ok(any)
    }
}

impl Drop for Session {
    /// Whatever ended it, the engine must not go on filling its queue.
    fn drop(&mut self) {
        self.handle.close();
        // If the engine is busy now, it notices by the closed queue.
        let _ = self.inputs.try_send(Input::Leave(self.handle.id()));
    }
}

/// The end of a transaction that is none of Postgres': at `position` it is not known which one was last.
fn nameless(position: Position, now: Progress) -> Ending {
    Ending::new(position, 0, now.source.lsn.max(position.lsn))
}

/// How long to wait for more that travels along. A long time is another one for each session, from half of it on: those who began to
/// wait together, as all do when a backlog begins, would else all get their turn at once, time after time.
fn gather(behind_bytes: u64, session: SessionId) -> Duration {
    let times = u32::try_from(behind_bytes / GATHER_BYTES).unwrap_or(u32::MAX);
    let longest = GATHER
        .saturating_mul(times.saturating_add(1))
        .min(GATHER_MAX);
    // Multiples of the golden ratio, but for what is before the point, lie far from each other.
    let part = (session as u32).wrapping_mul(0x9E37_79B9);
    longest / 2 + longest.mul_f64(f64::from(part) / f64::from(u32::MAX) / 2.0)
}

/// Gives the engine an input. It waits while the engine is busy, so the runtime's other tasks are moved away first.
pub fn send(inputs: &Inputs, input: Input) {
    if let Err(std::sync::mpsc::TrySendError::Full(input)) = inputs.try_send(input) {
        // A closed channel means that the engine ended, which everybody notices by its progress.
        tokio::task::block_in_place(|| inputs.send(input).ok());
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, mirror::Error> + Send + 'static,
) -> Result<T, Ended> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(panicked) => match panicked.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Ended::Stopping),
        },
    }
}
