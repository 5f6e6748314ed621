//! The few connections to the mirror that all catch-ups share.
//!
//! A catch-up gives its reader back after each round, so a long one has no more of them than a short one. Who waits is served
//! in turns of their owners ([`Turns`]): one that has a thousand replicas to fill does not keep away another's single one.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::turns::Turns;
use crate::mirror::Reader;

/// Whose replica it is: the subject of its token, or itself.
pub type Owner = Arc<str>;

/// A pool of readers.
pub struct Readers(Mutex<Pool>);

struct Pool {
    idle: Vec<Reader>,
    /// Whoever waits no longer has dropped its end.
    waiting: Turns<Owner, oneshot::Sender<Lease>>,
}

/// A reader that goes back to its pool by itself, without a snapshot, whatever becomes of who has it.
pub struct Lease {
    reader: Option<Reader>,
    pool: Arc<Readers>,
}

impl Readers {
    /// A pool of these.
    pub fn new(readers: Vec<Reader>) -> Arc<Readers> {
        Arc::new(Readers(Mutex::new(Pool {
            idle: readers,
            waiting: Turns::default(),
        })))
    }

    /// Waits for a reader, in turn.
    pub async fn take(self: &Arc<Self>, owner: &Owner) -> Lease {
        self.wait(|waiting, lease| waiting.push(owner.clone(), lease))
            .await
    }

    /// Waits for a reader, before all that have an owner. For the one who serves many at once.
    pub async fn take_first(self: &Arc<Self>) -> Lease {
        self.wait(Turns::push_first).await
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.pool().waiting.len()
    }

    async fn wait(
        self: &Arc<Self>,
        push: impl FnOnce(&mut Turns<Owner, oneshot::Sender<Lease>>, oneshot::Sender<Lease>),
    ) -> Lease {
        let waits = {
            let mut pool = self.pool();
            // Nobody waits while there is an idle one.
            if let Some(reader) = pool.idle.pop() {
                return self.lease(reader);
            }
            let (lease, waits) = oneshot::channel();
            push(&mut pool.waiting, lease);
            waits
        };
        waits.await.expect("the pool outlives who waits for it")
    }

    fn lease(self: &Arc<Self>, reader: Reader) -> Lease {
        Lease {
            reader: Some(reader),
            pool: self.clone(),
        }
    }

    fn give_back(self: &Arc<Self>, mut reader: Reader) {
        loop {
            let next = {
                let mut pool = self.pool();
                match pool.waiting.pop() {
                    Some(next) => next,
                    None => return pool.idle.push(reader),
                }
            };
            // The lock is free again: a lease that nobody takes comes back as it is, to go to the next.
            match next.send(self.lease(reader)) {
                Ok(()) => return,
                Err(mut lease) => match lease.reader.take() {
                    Some(untaken) => reader = untaken,
                    None => return,
                },
            }
        }
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(mut reader) = self.reader.take() {
            reader.end();
            let pool = self.pool.clone();
            pool.give_back(reader);
        }
    }
}

impl Deref for Lease {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        self.reader.as_ref().expect("a lease has its reader")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Reader {
        self.reader.as_mut().expect("a lease has its reader")
    }
}
