//! The call `Write`: takes the local transactions of one replica and has them made in Postgres, in their order.
//!
//! Nothing is answered here: the answer is a row that the transaction itself writes in Postgres, and that the replica gets by
//! its stream (see `receipts`). So this call may end at any moment, and whatever was not answered is sent again.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anabranch_proto::{
    HEARTBEAT_EVERY, JUDGED_MAX, Nonce, SILENCE_MAX,
    v1::{self, write_down, write_up},
};
use bytes::{Bytes, BytesMut};
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use super::{Budgets, permit::Permit, quota::Entered};
use crate::{
    metrics::Metrics,
    postgres::{
        target::Target,
        writer::{self, Books, Outcome, Rejection, Replica, Rules, Writer},
    },
    table::Table,
    write::{Hash, Invalid, Kind, LocalTransaction, NO_HASH, Policy, WriteTable},
};

/// Connections that write, at most: about as many as a small server can use at once. Each call takes one for a batch. There is
/// one more, for the books.
pub const WRITERS_MAX: usize = 8;

/// Local transactions of one replica that wait for their turn.
const AHEAD_MAX: usize = 256;

/// Their bytes. One that is larger waits alone.
const AHEAD_BYTES_MAX: u32 = 1024 * 1024;

/// Local transactions that are made with one connection before somebody else gets it.
const BATCH_MAX: usize = 128;

/// The pause after a failure that may pass: the first one, and the longest; each is twice the one before.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// How often claims that are too old are looked for, where none were left over.
const PRUNE_EVERY: Duration = Duration::from_secs(60);

/// Ids that are leased at a time: what a program inserts in a busy hour offline, and little to lose with a file.
const LEASE_IDS: u32 = 1_000;

/// NAMEDATALEN less one.
const NAME_BYTES_MAX: usize = 63;

/// The connections that write.
pub struct Writers {
    target: Target,
    books: Arc<Books>,
    /// When claims are to be pruned next. Claims are made by those who do it, so it keeps up.
    prune_due: Mutex<Instant>,
    /// As many as there may be.
    free: Arc<Semaphore>,
    /// Open, and used by nobody.
    idle: Mutex<Vec<Writer>>,
}

/// One of them, for a while. It goes back as it is dropped, unless it broke.
struct Held<'a> {
    writers: &'a Writers,
    writer: Option<Writer>,
    _place: OwnedSemaphorePermit,
}

impl Writers {
    /// None is open yet.
    pub fn new(target: Target) -> Arc<Writers> {
        Arc::new(Writers {
            books: Arc::new(Books::new(target.clone())),
            target,
            prune_due: Mutex::new(Instant::now()),
            free: Arc::new(Semaphore::new(WRITERS_MAX)),
            idle: Mutex::default(),
        })
    }

    /// For a replica: rather one that it had before, which is as it left it.
    async fn take(&self, replica: &Replica) -> Result<Held<'_>, writer::Error> {
        let place = Semaphore::acquire_owned(self.free.clone()).await;
        let place = place.expect("it is never closed");
        let idle = {
            let mut idle = self.lock();
            match idle.iter().rposition(|writer| writer.is_of(replica)) {
                Some(place) => Some(idle.remove(place)),
                None => idle.pop(),
            }
        };
        let usable = idle.and_then(|mut writer| writer.is_usable().then_some(writer));
        let writer = match usable {
            Some(writer) => writer,
            None => Writer::connect_with(&self.target, self.books.clone()).await?,
        };
        Ok(Held {
            writers: self,
            writer: Some(writer),
            _place: place,
        })
    }

    /// Prunes, if it is time.
    async fn prune(&self) -> Result<(), writer::Error> {
        let now = Instant::now();
        {
            let mut due = self
                .prune_due
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if *due > now {
                return Ok(());
            }
            *due = now + PRUNE_EVERY;
        }
        if self.books.prune().await? {
            *self
                .prune_due
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = now;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Writer>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held<'_> {
    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("held until it is dropped")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(mut writer) = self.writer.take()
            && writer.is_usable()
        {
            self.writers.lock().push(writer);
        }
    }
}

/// What a call does.
pub(super) struct Call {
    pub replica: Replica,
    /// What it may write.
    pub rules: Rules,
    pub writers: Arc<Writers>,
    /// A larger local transaction is rejected.
    pub transaction_bytes_max: usize,
    pub budgets: Arc<Budgets>,
    pub metrics: Arc<Metrics>,
    /// Who calls, as long as he may.
    pub permit: Permit,
    /// How much he may do.
    pub entered: Entered,
    pub down: mpsc::Sender<Box<v1::WriteDown>>,
}

/// What waits for its turn.
enum Work {
    Transaction(Received, OwnedSemaphorePermit),
    Judge(Vec<Nonce>, OwnedSemaphorePermit),
    Settled(u64),
    Lease(v1::Lease),
}

/// A local transaction as it came.
struct Received {
    seq: u64,
    hash: Hash,
    merged: bool,
    /// Of its last entry.
    nonce: Option<Nonce>,
    content: Result<(Vec<v1::WriteTable>, Bytes), Rejection>,
}

/// Where this replica's writes stand.
#[derive(Clone, Copy)]
struct Answered {
    seq: u64,
    hash: Hash,
}

impl Call {
    /// Until the replica ends it, or something must be begun anew.
    pub(super) async fn run(&self, up: Streaming<v1::WriteUp>) -> Status {
        let (work, mut waiting) = mpsc::channel(AHEAD_MAX);
        let done = async {
            match self.work(&mut waiting).await {
                Ok(()) => Status::ok("the replica ended the call"),
                Err(status) => status,
            }
        };
        tokio::select! {
            status = done => status,
            status = self.take(up, work) => status,
            status = self.say_alive() => status,
        }
    }

    /// Takes what the replica says.
    async fn take(&self, mut up: Streaming<v1::WriteUp>, work: mpsc::Sender<Work>) -> Status {
        let room = Arc::new(Semaphore::new(AHEAD_BYTES_MAX as usize));
        let mut assembler = Assembler::new(self.transaction_bytes_max);
        loop {
            let kind = match timeout(SILENCE_MAX, up.next()).await {
                Err(_) => return Status::unavailable("nothing was heard from the replica"),
                Ok(None) => {
                    drop(work);
                    // What waits is made before the call ends.
                    return std::future::pending().await;
                }
                Ok(Some(Err(status))) => return status,
                Ok(Some(Ok(message))) => message.kind,
            };
            let next = match kind {
                Some(write_up::Kind::Transaction(piece)) => match assembler.push(piece) {
                    Ok(Some(transaction)) => {
                        // Who sent more than he may waits here, and the connection makes his replica wait. It is counted when
                        // it is taken: or else one that comes again, since the call ended meanwhile, would wait longer each time.
                        let wait = self.entered.owes(Instant::now());
                        // Not even for nothing: a timer takes up to a millisecond for that.
                        if !wait.is_zero() {
                            tokio::time::sleep(wait).await;
                        }
                        self.entered.wrote(transaction.bytes(), Instant::now());
                        let room = place(&room, transaction.bytes()).await;
                        Work::Transaction(transaction, room)
                    }
                    Ok(None) => continue,
                    Err(what) => return Status::invalid_argument(what),
                },
                Some(write_up::Kind::Settled(seq)) => Work::Settled(seq),
                Some(write_up::Kind::Judge(judge)) => match asked(&judge.nonces) {
                    Some(nonces) => {
                        let room = place(&room, judge.nonces.len()).await;
                        Work::Judge(nonces, room)
                    }
                    None => return Status::invalid_argument("nonces have 16 bytes, and are some"),
                },
                Some(write_up::Kind::Lease(lease)) if is_name(&lease) => Work::Lease(lease),
                Some(write_up::Kind::Lease(_)) => {
                    return Status::invalid_argument("a name in Postgres has at most 63 bytes");
                }
                Some(write_up::Kind::Alive(_)) => continue,
                Some(write_up::Kind::Renew(renew)) => {
                    match Box::pin(self.permit.renew(&renew.token)).await {
                        Ok(()) => continue,
                        Err(status) => return status,
                    }
                }
                Some(write_up::Kind::Hello(_)) | None => {
                    return Status::invalid_argument("WriteHello is said once, and first");
                }
            };
            if work.send(next).await.is_err() {
                // Whoever works on it has ended, and says why.
                return std::future::pending().await;
            }
        }
    }

    /// Says where writes stand, and makes what comes.
    async fn work(&self, waiting: &mut mpsc::Receiver<Work>) -> Result<(), Status> {
        let mut patience = Patience::default();
        let standing = loop {
            match self.writers.books.standing(&self.replica).await {
                Ok(standing) => break Some(standing.unwrap_or((0, NO_HASH))),
                Err(writer::Error::OtherSubject) => break None,
                Err(error) => patience.after(error).await?,
            }
        };
        let (seq, hash) = standing.unwrap_or((0, NO_HASH));
        let mut answered = Answered { seq, hash };
        self.say(write_down::Kind::Ready(v1::WriteReady {
            seq,
            hash: hash.to_vec().into(),
            transaction_bytes_max: self.transaction_bytes_max as u64,
            other_subject: standing.is_none(),
        }))
        .await?;
        // Whatever it sends now is refused at the claim.
        let mut batch = Vec::new();
        while waiting.recv_many(&mut batch, BATCH_MAX).await > 0 {
            let mut received = Vec::with_capacity(batch.len());
            // Given back with the batch.
            let mut rooms = Vec::new();
            let mut settled = None;
            let mut leases = Vec::new();
            for work in batch.drain(..) {
                match work {
                    Work::Transaction(transaction, room) => {
                        received.push(transaction);
                        rooms.push(room);
                    }
                    Work::Settled(seq) => settled = Some(seq),
                    Work::Judge(nonces, _room) => self.judge(&nonces).await?,
                    Work::Lease(lease) => leases.push(lease),
                }
            }
            self.make(&mut answered, received).await?;
            if let Some(seq) = settled {
                self.settle(seq).await?;
            }
            for lease in leases {
                let ids = self.lease(lease).await?;
                self.say(write_down::Kind::Ids(ids)).await?;
            }
            if let Err(error) = self.writers.prune().await {
                tracing::debug!(%error, "old claims could not be forgotten now");
            }
        }
        Ok(())
    }

    /// Makes local transactions, runs of them together.
    async fn make(&self, answered: &mut Answered, received: Vec<Received>) -> Result<(), Status> {
        let mut run: Vec<Read> = Vec::new();
        let mut before = *answered;
        for transaction in received {
            if transaction.seq <= before.seq {
                // A resend of what was answered since the call began.
                continue;
            }
            let (seq, hash) = (transaction.seq, transaction.hash);
            let nonce = transaction.nonce;
            match self.read(&before.hash, transaction) {
                Ok(Ok(read)) => run.push(Read(read)),
                Err(status) => {
                    // Those before it are sound.
                    self.apply(answered, &run).await?;
                    return Err(status);
                }
                Ok(Err(rejection)) => {
                    self.apply(answered, &run).await?;
                    run.clear();
                    self.reject(answered, (seq, hash), nonce, rejection).await?;
                }
            }
            before = Answered { seq, hash };
        }
        self.apply(answered, &run).await
    }

    /// What can't be read is rejected: whatever it is, it must not block what comes behind it.
    fn read(
        &self,
        previous: &Hash,
        received: Received,
    ) -> Result<Result<LocalTransaction, Rejection>, Status> {
        let Received {
            seq,
            hash,
            merged,
            nonce: _,
            content,
        } = received;
        let (tables, entries) = match content {
            Ok(content) => content,
            Err(rejection) => return Ok(Err(rejection)),
        };
        let table = |table: v1::WriteTable| {
            let rule = self.rules.of(&table.schema, &table.name);
            let policy = rule.map_or_else(Policy::default, |rule| rule.policy.clone());
            let key = table.key.into_iter().map(|place| place as usize).collect();
            WriteTable::new(table.schema, table.name, table.columns, key, &policy).map(Arc::new)
        };
        let read = tables
            .into_iter()
            .map(table)
            .collect::<Result<_, _>>()
            .map_err(Invalid::from)
            .and_then(|tables| {
                LocalTransaction::read(previous, seq, hash, tables, entries, merged)
            });
        match read {
            Ok(read) => Ok(Ok(read)),
            Err(Invalid::Malformed(what)) => {
                Ok(Err(refused("malformed", "08P01", what.to_string())))
            }
            // The file is not the one that sent those before it.
            Err(error @ Invalid::Hash) => Err(Status::aborted(error.to_string())),
        }
    }

    async fn apply(&self, answered: &mut Answered, run: &[Read]) -> Result<(), Status> {
        let mut done = 0;
        let mut patience = Patience::default();
        while done < run.len() {
            let mut held = self.held(&mut patience).await?;
            let applied = held
                .writer()
                .apply_many(&self.replica, &answered.hash, &run[done..], &self.rules)
                .await;
            drop(held);
            for outcome in applied.outcomes {
                let transaction = &run[done].0;
                self.answered(answered, transaction.seq, transaction.hash, &outcome);
                if matches!(outcome, Outcome::Applied) {
                    self.inserted(transaction);
                }
                done += 1;
                patience = Patience::default();
            }
            if let Some(error) = applied.error {
                patience.after(error).await?;
            }
        }
        Ok(())
    }

    /// `nonce`: or else a copy of the file would take it for applied, as what is behind it is claimed.
    async fn reject(
        &self,
        answered: &mut Answered,
        (seq, hash): (u64, Hash),
        nonce: Option<Nonce>,
        rejection: Rejection,
    ) -> Result<(), Status> {
        let mut patience = Patience::default();
        loop {
            let mut held = self.held(&mut patience).await?;
            let (previous, rejection) = (&answered.hash, rejection.clone());
            let tried = held
                .writer()
                .reject(
                    &self.replica,
                    previous,
                    (seq, &hash),
                    nonce.as_slice(),
                    rejection,
                )
                .await;
            drop(held);
            match tried {
                Ok(outcome) => {
                    self.answered(answered, seq, hash, &outcome);
                    return Ok(());
                }
                Err(error) => patience.after(error).await?,
            }
        }
    }

    /// Says what became of entries that a copy of the file may have sent.
    async fn judge(&self, nonces: &[Nonce]) -> Result<(), Status> {
        let mut patience = Patience::default();
        let judged = loop {
            match self.writers.books.judge(nonces).await {
                Ok(judged) => break judged,
                Err(error) => patience.after(error).await?,
            }
        };
        tracing::warn!(
            replica = self.replica.id,
            asked = nonces.len(),
            claimed = judged.claimed.len(),
            "a replica's file was restored from a backup, or copied: told what is answered of its writes"
        );
        let claimed = judged.claimed.into_iter().map(|claimed| v1::Claimed {
            nonce: claimed.nonce.to_bytes().to_vec().into(),
            outcome: claimed.outcome.unwrap_or_default(),
            sqlstate: claimed.sqlstate.unwrap_or_default(),
        });
        self.say(write_down::Kind::Judged(v1::WriteJudged {
            claimed: claimed.collect(),
            kept_since: judged.kept_since,
            lsn: judged.lsn.0,
        }))
        .await
    }

    async fn settle(&self, seq: u64) -> Result<(), Status> {
        let mut patience = Patience::default();
        loop {
            match self.writers.books.settle(&self.replica, seq).await {
                Ok(()) => return Ok(()),
                Err(error) => patience.after(error).await?,
            }
        }
    }

    /// A writer, as soon as there is one. It is given back before anything is waited for.
    async fn held<'a>(&'a self, patience: &mut Patience) -> Result<Held<'a>, Status> {
        loop {
            match self.writers.take(&self.replica).await {
                Ok(held) => return Ok(held),
                Err(error) => patience.after(error).await?,
            }
        }
    }

    /// Takes ids for the replica, if it may have some. Writes do not wait for what is wrong with that.
    async fn lease(&self, wanted: v1::Lease) -> Result<v1::Ids, Status> {
        let v1::Lease { schema, table } = wanted;
        let mut blocks = Vec::new();
        if let Some(rule) = self.rules.of(&schema, &table)
            && self.budgets.take(&self.replica.subject, rule.table.oid)
        {
            blocks = self.leased(&rule.table).await?;
        }
        let block = |block: writer::Block| v1::Block {
            first: block.first,
            last: block.last,
            step: block.step,
        };
        Ok(v1::Ids {
            schema,
            table,
            blocks: blocks.into_iter().map(block).collect(),
        })
    }

    async fn leased(&self, table: &Table) -> Result<Vec<writer::Block>, Status> {
        let mut patience = Patience::default();
        loop {
            let books = &self.writers.books;
            match books.lease(&self.replica, table, LEASE_IDS).await {
                Ok(blocks) => return Ok(blocks),
                Err(writer::Error::Definite(reason)) => {
                    let table = table.full_name();
                    tracing::warn!(table, reason, "replicas get no ids");
                    return Ok(Vec::new());
                }
                Err(error) => patience.after(error).await?,
            }
        }
    }

    fn answered(&self, answered: &mut Answered, seq: u64, hash: Hash, outcome: &Outcome) {
        *answered = Answered { seq, hash };
        match outcome {
            Outcome::Applied => {
                self.metrics.writes_applied.inc();
            }
            Outcome::Rejected(rejection) => {
                self.metrics.writes_rejected.inc();
                // Neither its message nor its constraint: they may quote what was written.
                tracing::info!(
                    replica = self.replica.id,
                    seq,
                    outcome = &*rejection.outcome,
                    sqlstate = rejection.sqlstate,
                    "a local transaction was rejected"
                );
            }
            Outcome::AlreadyAnswered => {}
        }
    }

    /// Whoever uses its ids may have more.
    fn inserted(&self, transaction: &LocalTransaction) {
        let mut rows = vec![0; transaction.tables.len()];
        for entry in &transaction.entries {
            rows[entry.table()] += u64::from(entry.kind() == Kind::Insert);
        }
        for (table, rows) in transaction.tables.iter().zip(rows) {
            if rows > 0
                && let Some(rule) = self.rules.of(&table.schema, &table.name)
                && rule.table.integer_key().is_some()
            {
                let subject = &self.replica.subject;
                (self.budgets).inserted(subject, rule.table.oid, rows, LEASE_IDS.into());
            }
        }
    }

    async fn say_alive(&self) -> Status {
        loop {
            tokio::time::sleep(HEARTBEAT_EVERY).await;
            if let Err(status) = self.say(write_down::Kind::Alive(v1::Alive {})).await {
                return status;
            }
        }
    }

    async fn say(&self, kind: write_down::Kind) -> Result<(), Status> {
        let message = v1::WriteDown { kind: Some(kind) };
        let gone = |_| Status::ok("the replica disconnected");
        self.down.send(Box::new(message)).await.map_err(gone)
    }
}

/// Waits between attempts, while what fails may pass.
#[derive(Default)]
struct Patience {
    attempts: u32,
}

impl Patience {
    /// Waits, or says why trying again is of no use in this call.
    async fn after(&mut self, error: writer::Error) -> Result<(), Status> {
        match error {
            writer::Error::Transient(reason) => {
                if self.attempts == 0 {
                    tracing::warn!(reason, "local writes wait");
                }
            }
            writer::Error::Definite(reason) => {
                tracing::error!(reason, "local writes can't be made");
                return Err(Status::failed_precondition(
                    "the streamer can't write to Postgres; see its log",
                ));
            }
            error @ writer::Error::OtherSubject => {
                return Err(Status::permission_denied(error.to_string()));
            }
            // Only the replica can tell what else it has that was answered.
            error @ writer::Error::AlreadyClaimed => {
                return Err(Status::already_exists(error.to_string()));
            }
            // Another call was faster, or the file is another one: what stands is told as a call begins.
            error @ (writer::Error::OutOfOrder { .. } | writer::Error::Forked { .. }) => {
                return Err(Status::aborted(error.to_string()));
            }
        }
        let pause = RETRY.0.saturating_mul(1 << self.attempts.min(16));
        self.attempts += 1;
        tokio::time::sleep(pause.min(RETRY.1)).await;
        Ok(())
    }
}

/// One that can be made.
struct Read(LocalTransaction);

impl AsRef<LocalTransaction> for Read {
    fn as_ref(&self) -> &LocalTransaction {
        &self.0
    }
}

impl Received {
    /// As long as it waits, its tables are held too, and a transaction without entries may name thousands.
    fn bytes(&self) -> usize {
        self.content.as_ref().map_or(0, |(tables, entries)| {
            let tables: usize = tables.iter().map(Message::encoded_len).sum();
            tables + entries.len()
        })
    }
}

/// Waits until there is room for what is to wait.
async fn place(room: &Arc<Semaphore>, bytes: usize) -> OwnedSemaphorePermit {
    let bytes = bytes.clamp(1, AHEAD_BYTES_MAX as usize) as u32;
    let room = Semaphore::acquire_many_owned(room.clone(), bytes).await;
    room.expect("it is never closed")
}

fn is_name(lease: &v1::Lease) -> bool {
    lease.schema.len().max(lease.table.len()) <= NAME_BYTES_MAX
}

fn refused(outcome: &'static str, sqlstate: &str, message: String) -> Rejection {
    Rejection {
        entry: None,
        outcome: Cow::Borrowed(outcome),
        sqlstate: sqlstate.into(),
        message,
        constraint: None,
    }
}

/// The nonces that are asked for, if they are that.
fn asked(bytes: &[u8]) -> Option<Vec<Nonce>> {
    let (nonces, rest) = bytes.as_chunks::<{ Nonce::BYTES }>();
    let is_fine = rest.is_empty() && (1..=JUDGED_MAX).contains(&nonces.len());
    is_fine.then(|| {
        let nonces = nonces.iter().map(|bytes| Nonce::from_bytes(*bytes));
        nonces.collect()
    })
}

/// Puts pieces together.
struct Assembler {
    bytes_max: usize,
    begun: Option<Begun>,
}

struct Begun {
    seq: u64,
    hash: Hash,
    merged: bool,
    tables: Vec<v1::WriteTable>,
    entries: BytesMut,
    /// It has more bytes than it may; they are not kept.
    too_large: bool,
}

impl Assembler {
    fn new(bytes_max: usize) -> Assembler {
        Assembler {
            bytes_max,
            begun: None,
        }
    }

    /// A whole transaction with its last piece.
    fn push(&mut self, piece: v1::LocalTransaction) -> Result<Option<Received>, &'static str> {
        let hash = Hash::try_from(&piece.hash[..]).map_err(|_| "a hash has 32 bytes")?;
        let begun = match &mut self.begun {
            None => self.begun.insert(Begun {
                seq: piece.seq,
                hash,
                merged: piece.merged,
                tables: piece.tables,
                entries: BytesMut::new(),
                too_large: false,
            }),
            Some(begun) if begun.seq == piece.seq && begun.hash == hash => begun,
            Some(_) => {
                return Err("a piece is of another local transaction than the one before it");
            }
        };
        begun.too_large |= begun.entries.len() + piece.entries.len() > self.bytes_max;
        if begun.too_large {
            begun.entries = BytesMut::new();
        } else {
            begun.entries.extend_from_slice(&piece.entries);
        }
        if piece.continued {
            return Ok(None);
        }
        let nonce = match <[u8; Nonce::BYTES]>::try_from(&piece.nonce[..]) {
            Ok(bytes) => Some(Nonce::from_bytes(bytes)),
            // Of a sidecar that does not say it yet.
            Err(_) if piece.nonce.is_empty() => None,
            Err(_) => return Err("a nonce has 16 bytes"),
        };
        let Some(begun) = self.begun.take() else {
            return Ok(None);
        };
        let content = if begun.too_large {
            let message = format!("a local transaction may have {} bytes", self.bytes_max);
            Err(refused("too_large", "54000", message))
        } else {
            Ok((begun.tables, begun.entries.freeze()))
        };
        Ok(Some(Received {
            seq: begun.seq,
            hash: begun.hash,
            merged: begun.merged,
            nonce,
            content,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(seq: u64, entries: &'static [u8], continued: bool) -> v1::LocalTransaction {
        v1::LocalTransaction {
            seq,
            hash: vec![seq as u8; 32].into(),
            entries: Bytes::from_static(entries),
            continued,
            ..v1::LocalTransaction::default()
        }
    }

    #[test]
    fn pieces_of_two_transactions_are_not_put_together() {
        let mut assembler = Assembler::new(100);
        assert!(assembler.push(piece(1, b"ab", true)).unwrap().is_none());
        let whole = assembler.push(piece(1, b"c", false)).unwrap().unwrap();
        assert_eq!(whole.content.unwrap().1, b"abc"[..]);
        assert!(assembler.push(piece(2, b"ab", true)).unwrap().is_none());
        assert!(assembler.push(piece(3, b"c", false)).is_err());
        assert!(
            Assembler::new(100)
                .push(v1::LocalTransaction::default())
                .is_err()
        );
    }

    #[test]
    fn what_is_asked_for_is_some_whole_nonces() {
        assert_eq!(asked(&[]), None);
        assert_eq!(asked(&[0; 17]), None);
        assert_eq!(asked(&[0; 32]).unwrap().len(), 2);
        assert_eq!(asked(&vec![0; 16 * JUDGED_MAX]).unwrap().len(), JUDGED_MAX);
        assert_eq!(asked(&vec![0; 16 * (JUDGED_MAX + 1)]), None);
    }

    #[test]
    fn tables_count_among_what_waits() {
        let table = v1::WriteTable {
            columns: vec!["a".repeat(50); 1000],
            ..v1::WriteTable::default()
        };
        let first = v1::LocalTransaction {
            tables: vec![table; 10],
            ..piece(1, b"", false)
        };
        let whole = Assembler::new(100).push(first).unwrap().unwrap();
        assert!(whole.bytes() > 500_000, "{}", whole.bytes());
    }

    #[test]
    fn one_above_the_limit_is_not_held_and_does_not_block_the_next() {
        let mut assembler = Assembler::new(4);
        for _ in 0..100 {
            assert!(assembler.push(piece(1, b"abc", true)).unwrap().is_none());
            assert!(assembler.begun.as_ref().unwrap().entries.len() <= 4);
        }
        let large = assembler.push(piece(1, b"", false)).unwrap().unwrap();
        assert_eq!(large.content.unwrap_err().outcome, "too_large");
        let next = assembler.push(piece(2, b"abcd", false)).unwrap().unwrap();
        assert_eq!(next.content.unwrap().1.len(), 4);
    }
}
