//! The call `Write`: takes the local transactions of one replica and has them made in Postgres, in their order.
//!
//! Nothing is answered here: the answer is a row that the transaction itself writes in Postgres, and that the replica gets by
//! its stream (see `receipts`). So this call may end at any moment, and whatever was not answered is sent again.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anabranch_proto::{
    HEARTBEAT_EVERY, SILENCE_MAX,
    v1::{self, write_down, write_up},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use crate::{
    postgres::{
        target::Target,
        writer::{self, Applied, Replica, Writer},
    },
    session::TableView,
    write::{Assembler, LocalTransaction},
};

/// Connections that write, at most: about as many as a small server can use at once. Each call takes one for a batch.
pub const WRITERS_MAX: usize = 8;

/// Local transactions that wait for their turn, of one replica.
const AHEAD_MAX: usize = 256;

/// Their bytes. One that is larger waits alone.
const AHEAD_BYTES_MAX: usize = 1024 * 1024;

/// Local transactions that are made with one connection before somebody else gets it.
const BATCH_MAX: usize = 128;

/// The pause after a failure that may pass: doubled each time, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The connections that write.
pub struct Writers {
    target: Target,
    /// As many as there may be.
    free: Arc<Semaphore>,
    /// Open, and used by nobody.
    idle: Mutex<Vec<Writer>>,
}

/// One of them, for a while.
struct Held<'a> {
    writers: &'a Writers,
    writer: Option<Writer>,
    _place: OwnedSemaphorePermit,
}

impl Writers {
    /// None is open yet.
    pub fn new(target: Target) -> Arc<Writers> {
        Arc::new(Writers {
            target,
            free: Arc::new(Semaphore::new(WRITERS_MAX)),
            idle: Mutex::default(),
        })
    }

    async fn take(&self) -> Result<Held<'_>, writer::Error> {
        let place = Semaphore::acquire_owned(self.free.clone()).await;
        let place = place.expect("it is never closed");
        let idle = self.lock().pop();
        let writer = match idle {
            Some(writer) => writer,
            None => Writer::connect(&self.target).await?,
        };
        Ok(Held {
            writers: self,
            writer: Some(writer),
            _place: place,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Writer>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held<'_> {
    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("held until it is given back")
    }

    /// It is as it was, and may serve somebody else. One that is dropped instead is closed.
    fn give_back(mut self) {
        self.writers.lock().extend(self.writer.take());
    }
}

/// What a call does.
pub(super) struct Call {
    pub replica: Replica,
    /// What it sees, and may write.
    pub views: Vec<Arc<TableView>>,
    pub writers: Arc<Writers>,
    /// A larger local transaction is rejected.
    pub transaction_bytes_max: usize,
    pub down: mpsc::Sender<v1::WriteDown>,
}

/// What waits for its turn.
enum Work {
    Transaction(LocalTransaction, OwnedSemaphorePermit),
    Settled(u64),
}

impl Call {
    /// Until the replica ends it, or something must be begun anew.
    pub(super) async fn run(self, up: Streaming<v1::WriteUp>) -> Status {
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
        let room = Arc::new(Semaphore::new(AHEAD_BYTES_MAX));
        let mut assembler = Assembler::new(self.transaction_bytes_max);
        loop {
            let kind = match timeout(SILENCE_MAX, up.next()).await {
                Err(_) => return Status::unavailable("nothing was heard from the replica"),
                Ok(None) => return Status::ok("the replica ended the call"),
                Ok(Some(Err(status))) => return status,
                Ok(Some(Ok(message))) => message.kind,
            };
            let next = match kind {
                Some(write_up::Kind::Transaction(piece)) => match assembler.push(piece) {
                    Ok(Some(transaction)) => {
                        let bytes = transaction.bytes().clamp(1, AHEAD_BYTES_MAX) as u32;
                        let room = Semaphore::acquire_many_owned(room.clone(), bytes).await;
                        Work::Transaction(transaction, room.expect("it is never closed"))
                    }
                    Ok(None) => continue,
                    Err(malformed) => return Status::invalid_argument(malformed.to_string()),
                },
                Some(write_up::Kind::Settled(seq)) => Work::Settled(seq),
                Some(write_up::Kind::Alive(_)) => continue,
                Some(write_up::Kind::Hello(_)) | None => {
                    return Status::invalid_argument(
                        "after WriteHello, only local transactions are said",
                    );
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
        let answered = self
            .retried(async |writer| writer.answered(&self.replica).await)
            .await?;
        let ready = write_down::Kind::Ready(v1::WriteReady {
            seq: answered.seq,
            hash: answered.hash.to_vec().into(),
            transaction_bytes_max: self.transaction_bytes_max as u64,
        });
        self.say(ready).await?;
        let mut previous = answered;
        let mut batch = Vec::new();
        loop {
            if waiting.recv_many(&mut batch, BATCH_MAX).await == 0 {
                return Ok(());
            }
            let mut transactions = Vec::new();
            let mut settled = None;
            // What they hold of the room is given back with the batch.
            let mut rooms = Vec::new();
            for work in batch.drain(..) {
                match work {
                    Work::Transaction(transaction, room) => {
                        transactions.push(transaction);
                        rooms.push(room);
                    }
                    Work::Settled(seq) => settled = Some(seq),
                }
            }
            let mut rest = &transactions[..];
            while !rest.is_empty() {
                let Applied { count, answered } = self
                    .retried(async |writer| {
                        writer
                            .apply(&self.replica, &self.views, previous, rest)
                            .await
                    })
                    .await?;
                previous = answered;
                rest = &rest[count..];
            }
            if let Some(seq) = settled {
                self.retried(async |writer| writer.settle(&self.replica, seq).await)
                    .await?;
            }
        }
    }

    /// With a connection; again and again while what fails may pass.
    async fn retried<T>(
        &self,
        work: impl AsyncFn(&mut Writer) -> Result<T, writer::Error>,
    ) -> Result<T, Status> {
        let mut pause = RETRY.0;
        let mut said = false;
        loop {
            let tried = match self.writers.take().await {
                Ok(mut held) => {
                    let tried = work(held.writer()).await;
                    if tried.is_ok() {
                        held.give_back();
                    }
                    tried
                }
                Err(error) => Err(error),
            };
            match tried {
                Ok(done) => return Ok(done),
                Err(writer::Error::Transient(reason)) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(reason, "local writes wait");
                    }
                }
                Err(error @ writer::Error::OutOfOrder { .. }) => {
                    return Err(Status::aborted(error.to_string()));
                }
                Err(writer::Error::Definite(reason)) => {
                    tracing::error!(reason, "local writes can't be made");
                    return Err(Status::failed_precondition(
                        "the streamer can't write to Postgres; see its log",
                    ));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
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
        self.down.send(message).await.map_err(gone)
    }
}
