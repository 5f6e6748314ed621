//! The queue between the engine and one session. Pushing never waits: what does not fit makes the session fall behind.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anabranch_proto::{Lsn, Position};
use tokio::sync::Notify;

use crate::{
    delta::Op,
    route::{Ops, SessionId},
    table::Oid,
};

/// One transaction, as one session sees it.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Where it ends.
    pub position: Position,
    /// Microseconds since 1970.
    pub commit_time: i64,
    /// How far Postgres' WAL had come.
    pub source_lsn: Lsn,
    /// In any order; no key of a table twice.
    pub ops: Ops,
}

impl Delivery {
    /// What it holds in memory, about. Rows are shared with other queues; counted for each, memory is never
    /// underestimated.
    fn bytes(&self) -> usize {
        let ops = self.ops.iter().map(|(_, op)| match op {
            Op::Upsert(record) | Op::Delete(record) => record.len() + size_of::<(Oid, Op)>(),
        });
        size_of::<Delivery>() + ops.sum::<usize>()
    }
}

/// What the engine knows of a session: its queue. Pushing never waits.
pub struct Handle {
    id: SessionId,
    queue: Mutex<Queue>,
    bytes_max: usize,
    /// Bytes in all queues, and their limit.
    total: Arc<Total>,
    wake: Notify,
}

/// What all queues hold together.
pub struct Total {
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl Total {
    /// Nothing yet.
    pub fn new(bytes_max: usize) -> Arc<Total> {
        Arc::new(Total {
            bytes: AtomicUsize::new(0),
            bytes_max,
        })
    }

    /// Bytes in all queues.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    /// Joined, and not fallen behind since.
    open: bool,
    /// The session is over.
    closed: bool,
    /// Tables that stopped, not yet told.
    stopped: Vec<(Oid, String)>,
}

/// What was taken from a queue.
#[derive(Default)]
pub struct Taken {
    /// In commit order.
    pub deliveries: VecDeque<Delivery>,
    /// Tables that stopped.
    pub stopped: Vec<(Oid, String)>,
    /// There is more to know than the queue had: catch up.
    pub behind: bool,
}

impl Handle {
    /// A session's queue, closed until the engine opens it at a join.
    pub fn new(id: SessionId, bytes_max: usize, total: Arc<Total>) -> Arc<Handle> {
        Arc::new(Handle {
            id,
            queue: Mutex::default(),
            bytes_max,
            total,
            wake: Notify::new(),
        })
    }

    /// Who it is.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// From here on everything is pushed. What was in the queue is older, and dropped.
    pub fn open(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        queue.open = !queue.closed;
    }

    /// Adds a transaction, or notices that the session is too slow for its queue. False once the session is over.
    pub fn push(&self, delivery: Delivery) -> bool {
        let mut queue = self.lock();
        if !queue.open {
            return !queue.closed;
        }
        let bytes = delivery.bytes();
        let total = self.total.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        queue.bytes += bytes;
        if queue.bytes > self.bytes_max || total > self.total.bytes_max {
            self.empty(&mut queue);
            queue.open = false;
        } else {
            queue.deliveries.push_back(delivery);
        }
        drop(queue);
        self.wake.notify_one();
        true
    }

    /// The session is over: nothing is pushed any more.
    pub fn close(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        queue.open = false;
        queue.closed = true;
    }

    /// The queue can't tell everything: the session must catch up.
    pub fn fall_behind(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        queue.open = false;
        drop(queue);
        self.wake.notify_one();
    }

    /// A table is not followed any more. Kept whatever happens to the queue.
    pub fn stop(&self, table: Oid, reason: &str) {
        self.lock().stopped.push((table, reason.to_owned()));
    }

    /// Lets the session's task look at its queue.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until there may be something to take.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Takes all that is there.
    pub fn take(&self) -> Taken {
        let mut queue = self.lock();
        self.total.bytes.fetch_sub(queue.bytes, Ordering::Relaxed);
        queue.bytes = 0;
        Taken {
            deliveries: std::mem::take(&mut queue.deliveries),
            stopped: std::mem::take(&mut queue.stopped),
            behind: !queue.open,
        }
    }

    fn empty(&self, queue: &mut Queue) {
        self.total.bytes.fetch_sub(queue.bytes, Ordering::Relaxed);
        queue.bytes = 0;
        queue.deliveries = VecDeque::new();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here can panic halfway, so a poisoned queue is still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut queue = std::mem::take(&mut *self.lock());
        self.empty(&mut queue);
    }
}
