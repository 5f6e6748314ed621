//! The queue between the engine and one session. Pushing never waits: what does not fit makes the session fall behind.
//!
//! *Small transactions are written at once*, as the bytes of a message, behind those that wait already. When they are pushed, their
//! rows are in the processor's cache; when the session's turn comes, thousands of other rows lie between any two of them, and to
//! gather them costs more than all else. The rows of a large one are shared by all queues.
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

use tokio::sync::Notify;

use crate::{
    delta::Op,
    encode::{Ending, Told, Transactions},
    route::{Ops, SessionId},
    table::Oid,
};

/// A transaction whose rows have up to so many bytes is small. To copy them for each session is the engine's work then, so it must
/// not cost much more than to share them.
const SMALL_BYTES_MAX: usize = 1024;

/// What the engine knows of a session: its queue. Pushing never waits.
pub struct Handle {
    id: SessionId,
    /// The tables that it was declared, ascending: an id is a place from 1 on.
    tables: Box<[Oid]>,
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
    told: VecDeque<Told>,
    /// What `told` holds in memory, about.
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
    pub told: VecDeque<Told>,
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
    /// A session's queue, closed until the engine opens it at a join. `tables`: ascending.
    pub fn new(
        id: SessionId,
        tables: Box<[Oid]>,
        bytes_max: usize,
        total: Arc<Total>,
    ) -> Arc<Handle> {
        Arc::new(Handle {
            id,
            tables,
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

    /// The id that a table was declared with.
    pub fn id_of(&self, table: Oid) -> Option<u32> {
        let at = self.tables.binary_search(&table);
        at.ok().map(|at| at as u32 + 1)
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
    pub fn push(&self, ops: Ops, ending: &Ending) -> bool {
        let mut queue = self.lock();
        if !queue.open {
            return !queue.closed;
        }
        let bytes = queue.add(ops, ending, |table| self.id_of(table));
        let held = queue.bytes + bytes;
        if held <= self.bytes_max && self.total.add(bytes, held + queue.taken) {
            queue.bytes = held;
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
            told: std::mem::take(&mut queue.told),
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
        queue.told = VecDeque::new();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here can panic halfway, so a poisoned queue is still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Adds a transaction; tells by how many bytes that made it larger. Rows that are shared with other queues are counted for each,
    /// so memory is never underestimated.
    fn add(&mut self, ops: Ops, ending: &Ending, id_of: impl Fn(Oid) -> Option<u32>) -> usize {
        let records = ops.iter().map(|(_, op)| match op {
            Op::Upsert(record) | Op::Delete(record) => record.len(),
        });
        let records = records.sum::<usize>();
        if records > SMALL_BYTES_MAX {
            let bytes = size_of::<Told>() + size_of_val(&ops[..]) + records;
            self.told.push_back(Told::Large(ops, ending.clone()));
            return bytes;
        }
        if let Some(Told::Small(transactions, at)) = self.told.back_mut()
            && !transactions.is_full()
        {
            let before = transactions.capacity();
            transactions.push(&ops, ending, id_of);
            *at = ending.at;
            return transactions.capacity() - before;
        }
        let mut transactions = Transactions::default();
        transactions.push(&ops, ending, id_of);
        let bytes = size_of::<Told>() + transactions.capacity();
        self.told.push_back(Told::Small(transactions, ending.at));
        bytes
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

    use anabranch_proto::{
        Lsn, Position,
        ops::{Kind, take},
        v1::{self, element},
    };
    use bytes::Bytes;
    use prost::Message;

    use super::*;
    use crate::encode::Encoder;

    const ROW_BYTES: usize = 2 * SMALL_BYTES_MAX;

    /// What such a row takes in a queue.
    const HELD: usize = ROW_BYTES + size_of::<Told>() + size_of::<(Oid, Op)>();

    fn ending(lsn: u64) -> Ending {
        let position = Position {
            lsn: Lsn(lsn),
            ..Position::default()
        };
        Ending::new(position, 0, Lsn(lsn))
    }

    fn push_row(handle: &Handle) {
        let row = Op::Upsert(Bytes::from(vec![7; ROW_BYTES]));
        handle.push(vec![(1, row)], &ending(1));
    }

    fn open(total: &Arc<Total>, count: u64) -> Vec<Arc<Handle>> {
        let handle = |id| Handle::new(id, Box::new([1, 5]), 1 << 20, total.clone());
        let handles = (0..count).map(handle);
        handles.inspect(|handle| handle.open()).collect()
    }

    #[test]
    fn those_with_much_make_one_with_little_fall_behind() {
        let total = Total::new(20 * 4 * ROW_BYTES);
        let (quiet, stormy) = (open(&total, 1), open(&total, 19));
        // As full as it gets before anybody has too much.
        for handle in (0..100).flat_map(|_| &stormy) {
            if total.bytes() + HELD <= total.bytes_max {
                push_row(handle);
            }
        }
        let behind = stormy.iter().filter(|handle| !handle.lock().open).count();
        assert!(behind > 0, "nothing was tried: all of it fitted");
        push_row(&quiet[0]);
        let taken = quiet[0].take();
        assert!(!taken.behind && taken.told.len() == 1);
    }

    #[tokio::test]
    async fn who_waits_for_more_is_woken_before_the_queue_is_full() {
        let total = Total::new(1 << 20);
        let handle = Handle::new(1, Box::new([1]), 8 * HELD, total);
        handle.open();
        push_row(&handle);
        let waits = async || {
            tokio::time::timeout(Duration::ZERO, handle.filled())
                .await
                .is_err()
        };
        assert!(waits().await);
        push_row(&handle);
        assert!(!waits().await);
        assert!(!handle.take().behind);
    }

    #[test]
    fn what_was_taken_and_is_not_sent_counts_no_more() {
        let total = Total::new(100 * ROW_BYTES);
        let handles = open(&total, 2);
        let mut held = Vec::new();
        for _ in 0..200 {
            push_row(&handles[0]);
            held.push(handles[0].take());
        }
        assert!(total.bytes() <= 100 * ROW_BYTES && total.bytes() > 40 * ROW_BYTES);
        assert!(held.last().unwrap().behind, "it holds all it likes");
        // The other one has its share.
        push_row(&handles[1]);
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
                for at in 0..10 * place {
                    match at % 3 {
                        0 => push_row(handle),
                        _ => _ = handle.push(Vec::new(), &ending(1)),
                    }
                }
                let taken = handle.take();
                match (place + round) % 3 {
                    0 => handle.fall_behind(),
                    1 => handle.open(),
                    _ => handle.close(),
                }
                push_row(handle);
                drop(taken);
            }
        }
        assert_eq!((total.bytes(), total.open.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn many_small_transactions_fill_a_queue_too() {
        let total = Total::new(1 << 30);
        let handle = Handle::new(1, Box::new([1]), 64 << 10, total.clone());
        handle.open();
        let row = || vec![(1, Op::Delete(Bytes::from(vec![7; 50])))];
        let mut fitted: usize = 0;
        while handle.lock().open {
            handle.push(row(), &ending(1));
            fitted += 1;
            assert!(total.bytes() <= 64 << 10);
        }
        assert!((200..1000).contains(&fitted), "{fitted}");
        assert_eq!(total.bytes(), 0);
    }

    /// Small ones and large ones, of two tables that are declared and of one that is not.
    #[test]
    fn what_is_pushed_is_taken_in_order_and_whole() {
        let handle = &open(&Total::new(1 << 30), 1)[0];
        let mut pushed = Vec::new();
        for lsn in 1..2000_u64 {
            let length = match lsn % 700 {
                0 => ROW_BYTES,
                few => few as usize / 2,
            };
            let op = |table: Oid| match lsn % 5 {
                0 => (table, Op::Delete(Bytes::from(vec![lsn as u8; length]))),
                _ => (table, Op::Upsert(Bytes::from(vec![lsn as u8; length]))),
            };
            let tables: &[Oid] = match lsn % 4 {
                0 => &[],
                1 => &[5],
                2 => &[1, 1, 5],
                _ => &[5, 9, 1],
            };
            let ops: Vec<_> = tables.iter().map(|table| op(*table)).collect();
            assert!(handle.push(ops.clone(), &ending(lsn)));
            let known = ops.into_iter().filter(|(table, _)| *table != 9);
            pushed.push((lsn, known.collect::<Vec<_>>()));
        }
        let taken = handle.take();
        assert!(!taken.behind && taken.told.len() > 4);

        let mut encoder = Encoder::default();
        for told in taken.told {
            encoder.told(told, |table| handle.id_of(table));
        }
        encoder.end_message(&[]);
        let messages = std::iter::from_fn(|| encoder.take());
        let elements = messages
            .flat_map(|message| v1::Down::decode(message.bytes()).unwrap().elements)
            .map(|element| element.kind.unwrap());
        let (mut told, mut in_hand) = (Vec::new(), None);
        for element in elements {
            match (element, &mut in_hand) {
                (element::Kind::Begin(_), in_hand @ None) => *in_hand = Some(Vec::new()),
                (element::Kind::Rows(v1::Rows { table, mut ops, .. }), Some(in_hand)) => {
                    while let Some((kind, record)) = take(&mut ops).unwrap() {
                        let op = match kind {
                            Kind::Upsert => Op::Upsert(record),
                            Kind::Delete => Op::Delete(record),
                        };
                        in_hand.push(([1, 5][table as usize - 1], op));
                    }
                }
                (element::Kind::Commit(commit), in_hand @ Some(_)) => {
                    told.push((commit.position.unwrap().lsn, in_hand.take().unwrap()));
                }
                (element, _) => panic!("{element:?}"),
            }
        }
        assert_eq!(told, pushed);
    }
}
