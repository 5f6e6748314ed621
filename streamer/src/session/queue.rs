//! The queue between the engine and one session. Pushing never waits: what does not fit makes the session fall behind.
//!
//! *Fairness.* All queues together are bounded. Half of that is for whoever needs it; the other half is shared out equally: what a
//! session has within its share fits, however much the others have. So those who are slow, or get much, fall behind when
//! memory is short, and those that get little stay live beside them. What was taken counts until it is on its way: or else a
//! thousand replicas that do not read would hold a thousand times what they took.

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
    filled: Notify,
}

/// What all queues hold together.
pub struct Total {
    bytes: AtomicUsize,
    bytes_max: usize,
    /// Queues that are open.
    open: AtomicUsize,
}

impl Total {
    /// Nothing yet.
    pub fn new(bytes_max: usize) -> Arc<Total> {
        Arc::new(Total {
            bytes: AtomicUsize::new(0),
            bytes_max,
            open: AtomicUsize::new(0),
        })
    }

    /// Adds bytes to what a session has (`own`, those included), if they fit.
    fn add(&self, bytes: usize, own: usize) -> bool {
        let total = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let share = self.bytes_max / 2 / self.open.load(Ordering::Relaxed).max(1);
        let fits = total <= self.bytes_max && (own <= share || total <= self.bytes_max / 2);
        if !fits {
            self.remove(bytes);
        }
        fits
    }

    fn remove(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
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
    /// Bytes that were taken, and are not on their way yet.
    taken: usize,
    /// Joined, and not fallen behind since.
    open: bool,
    /// The session is over.
    closed: bool,
    /// Tables that stopped, not yet told.
    stopped: Vec<(Oid, String)>,
}

/// What was taken from a queue.
pub struct Taken {
    /// In commit order.
    pub deliveries: VecDeque<Delivery>,
    /// Tables that stopped.
    pub stopped: Vec<(Oid, String)>,
    /// There is more to know than the queue had: catch up.
    pub behind: bool,
    /// Kept until all of it is on its way.
    pub charge: Charge,
}

/// Bytes that were taken, and count until this is dropped.
pub struct Charge {
    handle: Arc<Handle>,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.handle.lock().taken -= self.bytes;
        self.handle.total.remove(self.bytes);
    }
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
            filled: Notify::new(),
        })
    }

    /// Who it is.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The session is over.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// From here on everything is pushed. What was in the queue is older, and dropped.
    pub fn open(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        let open = !queue.closed;
        self.set_open(&mut queue, open);
    }

    /// Adds a transaction, or notices that the session is too slow for its queue. False once the session is over.
    pub fn push(&self, delivery: Delivery) -> bool {
        let mut queue = self.lock();
        if !queue.open {
            return !queue.closed;
        }
        let bytes = delivery.bytes();
        let held = queue.bytes + bytes;
        if held <= self.bytes_max && self.total.add(bytes, held + queue.taken) {
            queue.bytes = held;
            queue.deliveries.push_back(delivery);
            if held >= self.bytes_max / 4 {
                self.filled.notify_one();
            }
        } else {
            self.empty(&mut queue);
            self.set_open(&mut queue, false);
        }
        drop(queue);
        self.wake.notify_one();
        true
    }

    /// The session is over: nothing is pushed any more.
    pub fn close(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        self.set_open(&mut queue, false);
        queue.closed = true;
    }

    /// The queue can't tell everything: the session must catch up.
    pub fn fall_behind(&self) {
        let mut queue = self.lock();
        self.empty(&mut queue);
        self.set_open(&mut queue, false);
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

    /// Waits until there is more than should wait for even more: a quarter of what fits. Or there was, a while ago.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Takes all that is there.
    pub fn take(self: &Arc<Self>) -> Taken {
        let mut queue = self.lock();
        let bytes = std::mem::take(&mut queue.bytes);
        queue.taken += bytes;
        Taken {
            deliveries: std::mem::take(&mut queue.deliveries),
            stopped: std::mem::take(&mut queue.stopped),
            behind: !queue.open,
            charge: Charge {
                handle: self.clone(),
                bytes,
            },
        }
    }

    fn set_open(&self, queue: &mut Queue, open: bool) {
        match (queue.open, open) {
            (false, true) => self.total.open.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.total.open.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
        queue.open = open;
    }

    fn empty(&self, queue: &mut Queue) {
        self.total.remove(std::mem::take(&mut queue.bytes));
        queue.deliveries = VecDeque::new();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here can panic halfway, so a poisoned queue is still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;

    const ROW_BYTES: usize = 1_000;

    fn delivery() -> Delivery {
        Delivery {
            position: Position::default(),
            commit_time: 0,
            source_lsn: Lsn(0),
            ops: vec![(1, Op::Upsert(Bytes::from(vec![7; ROW_BYTES])))],
        }
    }

    fn open(total: &Arc<Total>, count: u64) -> Vec<Arc<Handle>> {
        let handles = (0..count).map(|id| Handle::new(id, 1 << 20, total.clone()));
        handles.inspect(|handle| handle.open()).collect()
    }

    #[test]
    fn those_with_much_make_one_with_little_fall_behind() {
        let total = Total::new(20 * 2 * ROW_BYTES * 2);
        let (quiet, stormy) = (open(&total, 1), open(&total, 19));
        // As full as it gets before anybody has too much.
        for handle in (0..100).flat_map(|_| &stormy) {
            if total.bytes() + delivery().bytes() <= total.bytes_max {
                handle.push(delivery());
            }
        }
        let behind = stormy.iter().filter(|handle| !handle.lock().open).count();
        assert!(behind > 0, "nothing was tried: all of it fitted");
        quiet[0].push(delivery());
        let taken = quiet[0].take();
        assert!(!taken.behind && taken.deliveries.len() == 1);
    }

    #[tokio::test]
    async fn who_waits_for_more_is_woken_before_the_queue_is_full() {
        let total = Total::new(1 << 20);
        let handle = Handle::new(1, 8 * delivery().bytes(), total);
        handle.open();
        handle.push(delivery());
        let waits = async || {
            tokio::time::timeout(Duration::ZERO, handle.filled())
                .await
                .is_err()
        };
        assert!(waits().await);
        handle.push(delivery());
        assert!(!waits().await);
        assert!(!handle.take().behind);
    }

    #[test]
    fn what_was_taken_and_is_not_sent_counts_no_more() {
        let total = Total::new(100 * ROW_BYTES);
        let handles = open(&total, 2);
        let mut held = Vec::new();
        for _ in 0..200 {
            handles[0].push(delivery());
            held.push(handles[0].take());
        }
        assert!(total.bytes() <= 100 * ROW_BYTES && total.bytes() > 40 * ROW_BYTES);
        assert!(held.last().unwrap().behind, "it holds all it likes");
        // The other one has its share.
        handles[1].push(delivery());
        assert!(!handles[1].take().behind);
        held.clear();
        assert_eq!(total.bytes(), 0);
    }

    #[test]
    fn whatever_happens_nothing_stays_counted() {
        let total = Total::new(50 * ROW_BYTES);
        for round in 0..3 {
            let handles = open(&total, 5);
            for (place, handle) in handles.iter().enumerate() {
                (0..10 * place).for_each(|_| _ = handle.push(delivery()));
                let taken = handle.take();
                match (place + round) % 3 {
                    0 => handle.fall_behind(),
                    1 => handle.open(),
                    _ => handle.close(),
                }
                handle.push(delivery());
                drop(taken);
            }
        }
        assert_eq!((total.bytes(), total.open.load(Ordering::Relaxed)), (0, 0));
    }
}
