//! The thread that keeps the file.
//!
//! SQLite blocks, and has one writer: so the file lives on one named thread, and everybody else sends it commands through a
//! channel bounded by bytes. While the file is slow the channel is full, the client does not read, and HTTP/2 makes the
//! streamer wait. The thread runs a small event loop of its own: it must notice a heartbeat or the end also while it waits
//! to try a message again.
//!
//! Each stream has a number, its *generation*. The file is told `begin_stream` before the first message of a stream, and
//! messages of any other generation are thrown away: late frames of an old connection can't come after a new one.

mod crowd;
mod noted;

use std::{
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anabranch_proto::{
    Lsn, Nonce, Position,
    v1::{self, element::Kind},
};
use bytes::Bytes;
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{MissedTickBehavior, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    board::{Board, Heard},
    config::Timing,
    file::{
        self, Applied, Decision, Error, File, Judgement, Local, Rejected, Settings, TableState,
        Watch, Which,
    },
};
use crowd::Crowd;
use noted::Noted;

/// Commands that wait at most; messages are bounded by their bytes before that.
const COMMANDS_MAX: usize = 1_024;

/// The channel counts in units of this.
const QUEUE_UNIT_BYTES: usize = 1_024;

/// The file is looked at at least this often: what nobody told, and so that our reader of the WAL gets out of the way of a
/// program's checkpoint.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// From where a stream goes on.
#[derive(Clone, Debug)]
pub struct Start {
    /// Who we are.
    pub replica_id: String,
    /// What proves what we have; may be empty.
    pub resume_token: Bytes,
    /// The id that it was given to, if that was another.
    pub token_id: Option<String>,
    /// What we have.
    pub position: Option<Position>,
}

enum Command {
    Begin {
        generation: u64,
        start: oneshot::Sender<Start>,
        refused: oneshot::Sender<String>,
    },
    Message {
        generation: u64,
        message: Box<v1::Down>,
        queued: Queued,
    },
    Ended,
    /// Decide on rejected changes.
    Decide {
        which: Which,
        decision: Decision,
        /// How many there were, or why that can't be done now.
        decided: oneshot::Sender<Result<u64, String>>,
    },
    /// Look for local writes now.
    Look {
        looked: oneshot::Sender<Option<Local>>,
    },
    /// What became of local transactions since.
    Flushed {
        since: Local,
        flushed: oneshot::Sender<Flushed>,
    },
    /// What is to be sent of local writes.
    Outgoing {
        after: Outgoing,
        bytes_max: usize,
        read: oneshot::Sender<Read>,
    },
    /// The pending entries after this one.
    Pending {
        after: i64,
        read: oneshot::Sender<Result<Vec<(i64, Nonce)>, String>>,
    },
    /// The file is a copy: it is to have an id of its own.
    Adopt {
        judgement: Option<Judgement>,
        adopted: oneshot::Sender<Result<bool, String>>,
    },
    /// Which tables should have more ids.
    LeasesWanted {
        wanted: oneshot::Sender<Vec<(String, String)>>,
    },
    /// Ids were leased.
    Lease {
        ids: v1::Ids,
        kept: oneshot::Sender<()>,
    },
}

/// Which local transactions are to be sent.
#[derive(Clone, Debug)]
pub enum Outgoing {
    /// Those after the one that Postgres has as the last, if the file knows it by this hash; 0: it has none.
    After(u64, Bytes),
    /// Those after what was read before.
    On(file::Outgoing),
}

/// Pieces of local transactions, and where to go on; or why nothing may be sent.
pub type Read = Result<(Vec<v1::LocalTransaction>, Outgoing), Unsent>;

/// Why nothing may be sent.
#[derive(Clone, Debug)]
pub enum Unsent {
    /// Postgres has what this file did not send: it was restored from a backup, or copied.
    Forked,
    /// The file can't be read now.
    Trouble(String),
}

/// What became of local transactions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// What was rejected of them.
    pub rejected: Vec<Rejected>,
    /// Local transactions that are not answered.
    pub pending: u64,
}

/// Room taken in the channel; given back when dropped.
struct Queued {
    bytes: usize,
    board: Arc<Board>,
    _room: OwnedSemaphorePermit,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.board
            .queue_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The thread has ended: its own result says why.
#[derive(Debug, thiserror::Error)]
#[error("the file's thread has ended")]
pub struct Gone;

/// Sends commands to the thread.
#[derive(Clone)]
pub struct Keeper {
    commands: mpsc::Sender<Command>,
    room: Arc<Semaphore>,
    units: u32,
    board: Arc<Board>,
}

/// The thread itself.
pub struct Thread {
    handle: JoinHandle<()>,
    ended: oneshot::Receiver<Result<(), Error>>,
}

impl Thread {
    /// Waits for its end; `None`: it panicked.
    pub async fn join(self) -> Option<Result<(), Error>> {
        let result = self.ended.await.ok();
        // It has sent its last word, so this takes no time.
        self.handle.join().ok()?;
        result
    }
}

impl Keeper {
    /// Opens the file on a thread of its own. Waits for as long as a program holds it locked, or the disk is full:
    /// whoever starts us would have to try again as well. `None`: told to end before it was open.
    pub async fn open(
        settings: Settings,
        timing: Timing,
        queue_bytes_max: usize,
        changes_bytes_max: usize,
        cancel: CancellationToken,
    ) -> Result<Option<(Keeper, Arc<Board>, Thread)>, Error> {
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (opened, board) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let handle = std::thread::Builder::new()
            .name("anabranch-file".into())
            .spawn(move || {
                let result = keep(&settings, timing, changes_bytes_max, inbox, opened, cancel);
                // Nobody listens if opening failed or everything was dropped.
                let _ = end.send(result);
            })
            .map_err(|error| Error::Definite(format!("starting the file's thread: {error}")))?;
        let thread = Thread { handle, ended };
        let Ok(board) = board.await else {
            return match thread.join().await {
                Some(Err(error)) => Err(error),
                Some(Ok(())) => Ok(None),
                None => Err(Error::Definite("the file's thread panicked".into())),
            };
        };
        let units = (queue_bytes_max / QUEUE_UNIT_BYTES)
            .clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize)) as u32;
        let keeper = Keeper {
            commands,
            room: Arc::new(Semaphore::new(units as usize)),
            units,
            board: board.clone(),
        };
        Ok(Some((keeper, board, thread)))
    }

    /// A stream begins. All that came of older ones is applied or dropped when this returns. The receiver hears if the
    /// file can't go on with the stream.
    pub async fn begin(&self, generation: u64) -> Result<(Start, oneshot::Receiver<String>), Gone> {
        let (start, started) = oneshot::channel();
        let (refused, refusal) = oneshot::channel();
        let begin = Command::Begin {
            generation,
            start,
            refused,
        };
        self.commands.send(begin).await.map_err(|_| Gone)?;
        Ok((started.await.map_err(|_| Gone)?, refusal))
    }

    /// Hands over a message; waits for room.
    pub async fn message(&self, generation: u64, message: v1::Down) -> Result<(), Gone> {
        let encoded = message.encoded_len();
        self.board.metrics.messages.inc();
        self.board.metrics.received_bytes.inc_by(encoded as u64);
        // Many small elements take more in memory than they did on the wire.
        let bytes = encoded.max(message.elements.len() * size_of::<v1::Element>());
        // One that is larger than the channel passes alone.
        let units = u32::try_from(bytes / QUEUE_UNIT_BYTES + 1)
            .unwrap_or(u32::MAX)
            .min(self.units);
        let room = self
            .room
            .clone()
            .acquire_many_owned(units)
            .await
            .map_err(|_| Gone)?;
        self.board.queue_bytes.fetch_add(bytes, Ordering::Relaxed);
        let queued = Queued {
            bytes,
            board: self.board.clone(),
            _room: room,
        };
        let message = Box::new(message);
        self.commands
            .send(Command::Message {
                generation,
                message,
                queued,
            })
            .await
            .map_err(|_| Gone)
    }

    /// Looks for local writes now: says what was written so far. `None`: it can't be told now, since a program holds the write
    /// lock, or the disk is full.
    pub async fn look(&self) -> Result<Option<Local>, Gone> {
        let (looked, done) = oneshot::channel();
        let command = Command::Look { looked };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Decides on rejected changes. Says how many there were, or why that can't be done now.
    pub async fn decide(
        &self,
        which: Which,
        decision: Decision,
    ) -> Result<Result<u64, String>, Gone> {
        let (decided, done) = oneshot::channel();
        let command = Command::Decide {
            which,
            decision,
            decided,
        };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// What became of the local transactions that were not answered then.
    pub async fn flushed(&self, since: Local) -> Result<Flushed, Gone> {
        let (flushed, done) = oneshot::channel();
        let command = Command::Flushed { since, flushed };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Reads local transactions that are to be sent; nothing if there is none.
    pub async fn outgoing(&self, after: Outgoing, bytes_max: usize) -> Result<Read, Gone> {
        let (read, done) = oneshot::channel();
        let command = Command::Outgoing {
            after,
            bytes_max,
            read,
        };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Pending entries after this one, in their order; nothing if there are no more.
    pub async fn pending(&self, after: i64) -> Result<Result<Vec<(i64, Nonce)>, String>, Gone> {
        let (read, done) = oneshot::channel();
        let command = Command::Pending { after, read };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Which tables should have more ids leased, by schema and name in Postgres.
    pub async fn leases_wanted(&self) -> Result<Vec<(String, String)>, Gone> {
        let (wanted, done) = oneshot::channel();
        let command = Command::LeasesWanted { wanted };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Gives the file a new id, and ends the stream. False: it was asked for only if nothing is pending (no judgement), and
    /// something is.
    pub async fn adopt(&self, judgement: Option<Judgement>) -> Result<Result<bool, String>, Gone> {
        let (adopted, done) = oneshot::channel();
        let command = Command::Adopt { judgement, adopted };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// Offers ids to programs.
    pub async fn lease(&self, ids: v1::Ids) -> Result<(), Gone> {
        let (kept, done) = oneshot::channel();
        let command = Command::Lease { ids, kept };
        self.commands.send(command).await.map_err(|_| Gone)?;
        done.await.map_err(|_| Gone)
    }

    /// The stream ended; the board knows why.
    pub async fn ended(&self) -> Result<(), Gone> {
        self.commands.send(Command::Ended).await.map_err(|_| Gone)
    }
}

/// What the thread does.
fn keep(
    settings: &Settings,
    timing: Timing,
    changes_bytes_max: usize,
    inbox: mpsc::Receiver<Command>,
    opened: oneshot::Sender<Arc<Board>>,
    cancel: CancellationToken,
) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Definite(format!("starting the file's thread: {error}")))?;
    runtime.block_on(async {
        let Some(file) = open(settings, &timing, &cancel).await? else {
            return Ok(());
        };
        let board = Arc::new(Board::new(
            file.replica_id(),
            file.position(),
            tables(&file).unwrap_or_default(),
            changes_bytes_max,
        ));
        if opened.send(board.clone()).is_err() {
            return Ok(());
        }
        let watch = Watch::new(file.path(), LOOK_EVERY)?;
        Keeping {
            file,
            watch,
            board,
            timing,
            cancel,
            generation: None,
            refused: None,
            gathered: None,
            tables_changed: false,
            collecting: false,
            caught_up_told: false,
            last_report: None,
            noted: Noted::default(),
            crowd: Crowd::default(),
        }
        .run(inbox)
        .await
    })
}

/// `None`: told to end.
async fn open(
    settings: &Settings,
    timing: &Timing,
    cancel: &CancellationToken,
) -> Result<Option<File>, Error> {
    let mut pause = timing.file_retry.0;
    let mut last_why = String::new();
    loop {
        match File::open(settings) {
            Ok(file) => return Ok(Some(file)),
            // One line for each change of state, not for each attempt.
            Err(Error::Transient(why) | Error::Full(why)) => {
                if why != last_why {
                    tracing::warn!("the file can't be opened now, trying again: {why}");
                    last_why = why;
                }
            }
            Err(error) => return Err(error),
        }
        if stopped_within(cancel, pause).await {
            return Ok(None);
        }
        pause = (pause * 2).min(timing.file_retry.1);
    }
}

async fn stopped_within(cancel: &CancellationToken, pause: Duration) -> bool {
    tokio::time::timeout(pause, cancel.cancelled())
        .await
        .is_ok()
}

/// Messages that each end with a commit, as the one that the streamer might have sent instead.
struct Gathered {
    message: v1::Down,
    /// What they take in the channel.
    queued: Vec<Queued>,
    due: Instant,
}

impl Gathered {
    fn add(&mut self, message: v1::Down, queued: Queued) {
        self.message.elements.extend(message.elements);
        self.message.resume_token = message.resume_token;
        self.queued.push(queued);
    }
}

struct Keeping {
    file: File,
    /// Tells when a program may have written.
    watch: Watch,
    board: Arc<Board>,
    timing: Timing,
    cancel: CancellationToken,
    /// The stream whose messages are applied.
    generation: Option<u64>,
    /// Tells that stream that it can't go on.
    refused: Option<oneshot::Sender<String>>,
    /// Commits of that stream that are applied together with the next ones, or soon.
    gathered: Option<Gathered>,
    /// The transaction at hand declares a table, or changes the state of one.
    tables_changed: bool,
    /// Whether the file collects keys of what changes.
    collecting: bool,
    /// The log says once for each stream that it has caught up.
    caught_up_told: bool,
    last_report: Option<Instant>,
    /// For how long answered writes are kept.
    noted: Noted,
    /// For how long commits are gathered.
    crowd: Crowd,
}

impl Keeping {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) -> Result<(), Error> {
        let mut tick = tokio::time::interval(self.timing.report_every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let cancel = self.cancel.clone();
        // What was written while nothing ran, and what an earlier run has not sent.
        self.look()?;
        self.tell_local()?;
        loop {
            let due = self.gathered.as_ref().map(|gathered| gathered.due);
            // The end first, then the heartbeat: neither waits for messages, which may never pause. Ticks are seconds
            // apart, so messages are not starved either. What is gathered at the end comes again.
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                _ = tick.tick() => self.report()?,
                told = self.watch.changed() => {
                    told?;
                    self.look()?;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {
                    if self.apply_gathered().await?.is_break() {
                        break;
                    }
                }
                command = inbox.recv() => match command {
                    Some(command) => {
                        let may_pass = matches!(command, Command::Message { .. } | Command::Outgoing { .. });
                        if !may_pass && self.apply_gathered().await?.is_break() {
                            break;
                        }
                        if self.take(command).await?.is_break() {
                            break;
                        }
                    }
                    None => break,
                },
            }
        }
        self.board.disconnected(None);
        self.report()
    }

    async fn take(&mut self, command: Command) -> Result<ControlFlow<()>, Error> {
        match command {
            Command::Begin {
                generation,
                start,
                refused,
            } => {
                self.generation = None;
                self.tables_changed = false;
                self.caught_up_told = false;
                if self.begin_stream().await?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                self.generation = Some(generation);
                self.refused = Some(refused);
                // One that gave up meanwhile begins again with a new generation.
                let _ = start.send(Start {
                    replica_id: self.file.replica_id().to_owned(),
                    resume_token: self.file.resume_token(),
                    token_id: self.file.token_id(),
                    position: self.file.position(),
                });
                Ok(ControlFlow::Continue(()))
            }
            Command::Message {
                generation,
                message,
                queued,
            } => {
                if self.generation != Some(generation) {
                    return Ok(ControlFlow::Continue(()));
                }
                if let Some(time) = self.gathers_for().filter(|_| ends_with_commit(&message)) {
                    match &mut self.gathered {
                        Some(gathered) => gathered.add(*message, queued),
                        None => {
                            self.gathered = Some(Gathered {
                                message: *message,
                                queued: vec![queued],
                                due: Instant::now() + time,
                            });
                        }
                    }
                    return Ok(ControlFlow::Continue(()));
                }
                if self.apply_gathered().await?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                // It may have ended the stream.
                match self.generation {
                    Some(_) => self.apply(&message).await,
                    None => Ok(ControlFlow::Continue(())),
                }
            }
            Command::Ended => {
                self.report()?;
                Ok(ControlFlow::Continue(()))
            }
            Command::Outgoing {
                after,
                bytes_max,
                read,
            } => {
                let outgoing = match self.outgoing(after, bytes_max) {
                    Err(Error::Definite(why)) => return Err(Error::Definite(why)),
                    Err(error) => Err(Unsent::Trouble(error.to_string())),
                    Ok(outgoing) => outgoing,
                };
                // Whoever asked may have given up.
                let _ = read.send(outgoing);
                Ok(ControlFlow::Continue(()))
            }
            Command::Pending { after, read } => {
                let pending = self.file.pending(after);
                let _ = read.send(or_say(pending)?);
                Ok(ControlFlow::Continue(()))
            }
            Command::Adopt { judgement, adopted } => {
                let done = self.adopt(judgement.as_ref());
                let _ = adopted.send(or_say(done)?);
                Ok(ControlFlow::Continue(()))
            }
            Command::Decide {
                which,
                decision,
                decided,
            } => {
                let count = match self.file.decide(which, decision) {
                    Err(Error::Definite(why)) => return Err(Error::Definite(why)),
                    Err(error) => Err(error.to_string()),
                    Ok(count) => Ok(count),
                };
                self.look()?;
                self.tell_local()?;
                let _ = decided.send(count);
                Ok(ControlFlow::Continue(()))
            }
            Command::LeasesWanted { wanted } => {
                let _ =
                    wanted.send(unless_definite(self.file.leases_wanted())?.unwrap_or_default());
                Ok(ControlFlow::Continue(()))
            }
            Command::Lease { ids, kept } => {
                // Those that can't be kept are lost, and others are asked for.
                unless_definite(self.file.lease(&ids))?;
                self.tell_local()?;
                let _ = kept.send(());
                Ok(ControlFlow::Continue(()))
            }
            Command::Look { looked } => {
                let is_all = self.look()? && self.tell_local()?;
                let local = *self.board.local.borrow();
                let _ = looked.send(is_all.then_some(local));
                Ok(ControlFlow::Continue(()))
            }
            Command::Flushed { since, flushed } => {
                let local = *self.board.local.borrow();
                let rejected = self.file.rejected(since.answered, local.last_of(&since));
                let _ = flushed.send(Flushed {
                    rejected: unless_definite(rejected)?.unwrap_or_default(),
                    pending: local.assigned.saturating_sub(local.answered),
                });
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    async fn apply_gathered(&mut self) -> Result<ControlFlow<()>, Error> {
        match self.gathered.take() {
            Some(gathered) => self.apply(&gathered.message).await,
            None => Ok(ControlFlow::Continue(())),
        }
    }

    /// How long commits are gathered; `None`: the file is not crowded.
    fn gathers_for(&mut self) -> Option<Duration> {
        let Local {
            assigned, answered, ..
        } = *self.board.local.borrow();
        self.crowd.gathers_for(assigned, answered, Instant::now())
    }

    /// Looks for local transactions, and tells that there are some. What is not possible just now is tried at the next look;
    /// true if all was.
    fn look(&mut self) -> Result<bool, Error> {
        let Some(found) = unless_definite(self.file.look())? else {
            self.watch.found_nothing();
            return Ok(false);
        };
        if !found {
            self.watch.found_nothing();
        }
        let is_told = !found || self.tell_local()?;
        if let Some(pace) = self.gathers_for() {
            self.watch.found_crowd(pace);
        }
        Ok(is_told && !self.file.has_found_more())
    }

    /// Tells everybody where local writes stand. False: that can't be read now.
    fn tell_local(&mut self) -> Result<bool, Error> {
        let local = unless_definite(self.file.local())?;
        if let Some(local) = local {
            self.board.local_writes(local);
        }
        Ok(local.is_some())
    }

    fn outgoing(&mut self, after: Outgoing, bytes_max: usize) -> Result<Read, Error> {
        let mut from = match after {
            Outgoing::On(from) => from,
            Outgoing::After(seq, hash) => {
                let on = self.file.go_on(seq, &hash)?;
                // It may have dispelled a doubt.
                self.tell_local()?;
                match on {
                    Some(from) => from,
                    None => return Ok(Err(Unsent::Forked)),
                }
            }
        };
        let pieces = self.file.outgoing(&mut from, bytes_max)?;
        Ok(Ok((pieces, Outgoing::On(from))))
    }

    fn adopt(&mut self, judgement: Option<&Judgement>) -> Result<bool, Error> {
        if self.file.adopt(judgement)?.is_none() {
            return Ok(false);
        }
        self.board.renamed(self.file.replica_id());
        self.board.metrics.identities.inc();
        // What still comes is of the former id.
        self.generation = None;
        if let Some(refused) = self.refused.take() {
            let _ = refused.send("the file has a new id".to_owned());
        }
        self.tell_local()?;
        Ok(true)
    }

    async fn begin_stream(&mut self) -> Result<ControlFlow<()>, Error> {
        let mut pause = self.timing.file_retry.0;
        loop {
            match self.file.begin_stream() {
                Ok(()) => return Ok(ControlFlow::Continue(())),
                Err(Error::Definite(why)) => return Err(Error::Definite(why)),
                Err(error) => {
                    if self
                        .wait_for_file(&error.to_string(), &mut pause)
                        .await?
                        .is_break()
                    {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
        }
    }

    async fn apply(&mut self, message: &v1::Down) -> Result<ControlFlow<()>, Error> {
        let began = Instant::now();
        let mut pause = self.timing.file_retry.0;
        let mut tries = 0u32;
        let wanted = self.board.changes.wanted();
        if wanted != self.collecting {
            self.collecting = wanted;
            self.file.set_report_changes(wanted);
        }
        self.tables_changed |= message
            .elements
            .iter()
            .any(|element| matches!(element.kind, Some(Kind::Table(_) | Kind::State(_))));
        loop {
            match self.file.apply(message) {
                Ok(applied) => {
                    if tries > 0 {
                        let ms = began.elapsed().as_millis() as u64;
                        tracing::info!(tries, ms, "the file goes on");
                    }
                    self.publish(message, &applied, began.elapsed())?;
                    return Ok(ControlFlow::Continue(()));
                }
                Err(Error::Transient(why) | Error::Full(why)) => {
                    tries += 1;
                    self.board.metrics.file_retries.inc();
                    if tries == 1 {
                        tracing::warn!("the file can't be written now, trying again: {why}");
                    }
                    if self.wait_for_file(&why, &mut pause).await?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Err(Error::Stream(why)) => {
                    self.generation = None;
                    if let Some(refused) = self.refused.take() {
                        // One that ended by itself needs no word.
                        let _ = refused.send(why);
                    }
                    return Ok(ControlFlow::Continue(()));
                }
                Err(Error::Definite(why)) => return Err(Error::Definite(why)),
            }
        }
    }

    /// Tells everybody what a message did.
    fn publish(
        &mut self,
        message: &v1::Down,
        applied: &Applied,
        took: Duration,
    ) -> Result<(), Error> {
        let heard = heard(message);
        // With a reset the receipts may have gone back: then answered writes are pending again.
        let may_be_pending_again = self.tables_changed;
        let tables = (heard.is_some() && self.tables_changed)
            .then(|| tables(&self.file))
            .flatten();
        if tables.is_some() {
            self.tables_changed = false;
        }
        let first = applied.position.is_some() && self.board.watch().borrow().position.is_none();
        // Before the position is told: who waits for both finds them together.
        let local = *self.board.local.borrow();
        let may_be_answered = local.assigned > local.answered || local.settled > 0;
        // An answer may also be of what another copy of the file sent.
        let is_doubtful = applied.answers || local.in_doubt;
        if may_be_answered || may_be_pending_again || is_doubtful {
            self.tell_local()?;
        }
        self.board
            .applied(applied, self.collecting, heard, tables, took);
        let status = self.board.watch();
        let status = status.borrow();
        if let (true, Some(position)) = (first, status.position) {
            tracing::info!(%position, rows = status.rows, ms = took.as_millis() as u64, "first complete commit");
        }
        let caught_up = status.position.filter(|_| status.caught_up());
        if let (false, Some(position)) = (self.caught_up_told, caught_up) {
            self.caught_up_told = true;
            let (rows, transactions) = (status.rows, status.transactions);
            tracing::info!(%position, rows, transactions, "caught up");
        }
        Ok(())
    }

    /// Pauses, and keeps the heartbeat going. Breaks when told to end.
    async fn wait_for_file(
        &mut self,
        why: &str,
        pause: &mut Duration,
    ) -> Result<ControlFlow<()>, Error> {
        self.board.trouble(why);
        if self
            .last_report
            .is_none_or(|last| last.elapsed() >= self.timing.report_every)
        {
            self.report()?;
        }
        let end = tokio::time::sleep(*pause);
        tokio::pin!(end);
        let cancel = self.cancel.clone();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(ControlFlow::Break(())),
                () = &mut end => break,
                // A program's checkpoint may be what the file waits for, and that may wait for our reader.
                told = self.watch.changed() => {
                    told?;
                    self.look()?;
                }
            }
        }
        *pause = (*pause * 2).min(self.timing.file_retry.1);
        Ok(ControlFlow::Continue(()))
    }

    /// Writes the state row. A file that is locked now is no trouble: the next heartbeat comes.
    fn report(&mut self) -> Result<(), Error> {
        let (connected, last_error) = {
            let status = self.board.watch();
            let status = status.borrow();
            (status.connected, status.trouble())
        };
        self.last_report = Some(Instant::now());
        let forget = self.noted.forgettable(Instant::now(), self.file.position());
        unless_definite(self.file.tidy(forget))?;
        match self.file.report(connected, last_error.as_deref()) {
            Ok(()) => {}
            Err(Error::Definite(why)) => return Err(Error::Definite(why)),
            Err(error) => tracing::debug!("the state row could not be written: {error}"),
        }
        // It may have written the position of a heartbeat that waited, or found another one.
        let known = self.board.watch().borrow().position;
        if self.file.position() != known {
            self.board.moved(self.file.position());
        }
        Ok(())
    }
}

/// What must not end the thread is told to whoever asked.
fn or_say<T>(result: Result<T, Error>) -> Result<Result<T, String>, Error> {
    match result {
        Err(Error::Definite(why)) => Err(Error::Definite(why)),
        result => Ok(result.map_err(|error| error.to_string())),
    }
}

/// What must not end the thread comes to nothing: it is tried again.
fn unless_definite<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(Error::Definite(why)) => Err(Error::Definite(why)),
        Err(error) => {
            tracing::debug!("{error}");
            Ok(None)
        }
    }
}

fn ends_with_commit(message: &v1::Down) -> bool {
    let last = message.elements.last();
    last.is_some_and(|last| matches!(last.kind, Some(Kind::Commit(_))))
}

/// What a message that ends with a commit or heartbeat says about the source.
fn heard(message: &v1::Down) -> Option<Heard> {
    if message.resume_token.is_empty() {
        return None;
    }
    match message.elements.last()?.kind.as_ref()? {
        Kind::Commit(commit) => Some(Heard {
            position: commit.position?.into(),
            source_lsn: Lsn(commit.source_lsn),
            // It has just read that commit.
            source_connected: true,
        }),
        Kind::Heartbeat(heartbeat) => Some(Heard {
            position: heartbeat.position?.into(),
            source_lsn: Lsn(heartbeat.source_lsn),
            source_connected: heartbeat.source_connected,
        }),
        _ => None,
    }
}

/// The file's tables, for `/status`. A file that can't be read just now tells them another time.
fn tables(file: &File) -> Option<Vec<TableState>> {
    file.tables()
        .inspect_err(|error| tracing::debug!("{error}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::{crowd::CROWD, *};

    fn element(kind: Kind) -> v1::Element {
        v1::Element { kind: Some(kind) }
    }

    fn position(lsn: u64) -> Position {
        Position {
            epoch: anabranch_proto::Epoch(7),
            lsn: Lsn(lsn),
        }
    }

    /// A file of its own, and what ends it.
    async fn opened(path: &std::path::Path) -> (Keeper, Arc<Board>, Thread, CancellationToken) {
        let settings = Settings {
            path: path.to_owned(),
            mode: 0o600,
            cache_bytes: 1 << 20,
            hold_bytes_max: 1 << 20,
        };
        let cancel = CancellationToken::new();
        let opened = Keeper::open(
            settings,
            Timing::default(),
            1 << 20,
            1 << 20,
            cancel.clone(),
        );
        let (keeper, board, thread) = opened.await.unwrap().unwrap();
        (keeper, board, thread, cancel)
    }

    /// The first transaction, with an empty table `t(id, v)` that programs may write.
    fn first() -> v1::Down {
        let column = |name: &str, storage: v1::Storage, key_position| v1::Column {
            name: name.into(),
            postgres_type: "t".into(),
            storage: storage.into(),
            key_position,
            ..v1::Column::default()
        };
        let table = v1::Table {
            id: 1,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![
                column("id", v1::Storage::Integer, 1),
                column("v", v1::Storage::Text, 0),
            ],
            writable: true,
            ..v1::Table::default()
        };
        v1::Down {
            elements: vec![
                element(Kind::Begin(v1::Begin {
                    first: true,
                    reset: vec![1],
                })),
                element(Kind::Table(table)),
                element(Kind::Commit(v1::Commit {
                    position: Some(position(10).into()),
                    commit_time: 1,
                    source_lsn: 10,
                })),
            ],
            resume_token: b"token".as_slice().into(),
            ..v1::Down::default()
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_can_not_be_looked_for_passes_for_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let (keeper, _board, thread, cancel) = opened(&path).await;
        keeper.begin(1).await.unwrap();
        keeper.message(1, first()).await.unwrap();
        assert_eq!(keeper.look().await.unwrap().unwrap().assigned, 0);
        let program = Connection::open(&path).unwrap();
        program.busy_timeout(Duration::from_secs(5)).unwrap();
        program
            .execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES(1, 'a'); COMMIT; BEGIN IMMEDIATE")
            .unwrap();
        // Whoever flushes now waits for that write, and it is in no local transaction as long as the lock is held.
        let looked = keeper.look().await.unwrap();
        assert!(looked.is_none_or(|local| local.assigned == 1), "{looked:?}");
        program.execute_batch("COMMIT").unwrap();
        assert_eq!(keeper.look().await.unwrap().unwrap().assigned, 1);
        cancel.cancel();
        thread.join().await.unwrap().unwrap();
    }

    /// A commit with one row of the table of [`first`].
    fn row_at(lsn: u64, id: u64, value: &str) -> v1::Down {
        let mut record = anabranch_proto::record::Builder::new();
        record.push_integer(id as i64);
        record.push_text(value);
        let mut ops = bytes::BytesMut::new();
        anabranch_proto::ops::push(
            &mut ops,
            anabranch_proto::ops::Kind::Upsert,
            &record.finish(),
        );
        let rows = v1::Rows {
            table: 1,
            ops: ops.freeze(),
            continued: false,
        };
        let commit = v1::Commit {
            position: Some(position(lsn).into()),
            commit_time: 1,
            source_lsn: lsn,
        };
        v1::Down {
            elements: vec![
                element(Kind::Begin(v1::Begin::default())),
                element(Kind::Rows(rows)),
                element(Kind::Commit(commit)),
            ],
            resume_token: b"token".as_slice().into(),
            ..v1::Down::default()
        }
    }

    fn heartbeat_at(lsn: u64) -> v1::Down {
        let heartbeat = v1::Heartbeat {
            position: Some(position(lsn).into()),
            source_lsn: lsn,
            ..v1::Heartbeat::default()
        };
        v1::Down {
            elements: vec![element(Kind::Heartbeat(heartbeat))],
            resume_token: b"token".as_slice().into(),
            ..v1::Down::default()
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_gathered_comes_after_what_came_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let (keeper, board, thread, cancel) = opened(&path).await;
        keeper.begin(1).await.unwrap();
        keeper.message(1, first()).await.unwrap();
        keeper.look().await.unwrap();
        let program = Connection::open(&path).unwrap();
        for id in 0..2 * CROWD as i64 {
            program
                .execute("INSERT INTO t VALUES(?1, 'a')", [id])
                .unwrap();
        }
        let looked = keeper.look().await.unwrap().unwrap();
        assert_eq!(looked.assigned, 2 * CROWD);
        let is_there = |id: u64| {
            let id = id as i64;
            let sql = "SELECT v FROM t WHERE id = ?1";
            program
                .query_row(sql, [id], |row| row.get::<_, String>(0))
                .ok()
        };
        // Two that are gathered, and a heartbeat, which is not.
        for (lsn, value) in [(20, "b"), (30, "c")] {
            keeper
                .message(1, row_at(lsn, 5 * CROWD, value))
                .await
                .unwrap();
        }
        keeper.message(1, heartbeat_at(40)).await.unwrap();
        keeper.look().await.unwrap();
        assert_eq!(
            board.watch().borrow().position.map(|at| at.lsn),
            Some(Lsn(30))
        );
        assert_eq!(is_there(5 * CROWD).as_deref(), Some("c"));
        // One of an older stream, behind the beginning of a new one.
        keeper.message(1, row_at(50, 6 * CROWD, "d")).await.unwrap();
        let (start, _) = keeper.begin(2).await.unwrap();
        assert_eq!(start.position.map(|at| at.lsn), Some(Lsn(50)));
        keeper.message(1, row_at(60, 7 * CROWD, "e")).await.unwrap();
        keeper.look().await.unwrap();
        assert_eq!(
            (is_there(6 * CROWD).as_deref(), is_there(7 * CROWD)),
            (Some("d"), None)
        );
        // And one that nothing follows.
        keeper.begin(3).await.unwrap();
        cancel.cancel();
        thread.join().await.unwrap().unwrap();
    }
}
