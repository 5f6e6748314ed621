//! The few connections to the mirror that all catch-ups share.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Semaphore;

use crate::mirror::Reader;

/// A pool of readers. Whoever waits for one is served in order.
pub struct Readers {
    idle: Mutex<Vec<Reader>>,
    permits: Semaphore,
}

/// A reader that goes back to its pool by itself, without a snapshot, whatever becomes of who has it.
pub struct Lease {
    reader: Option<Reader>,
    pool: Arc<Readers>,
}

impl Readers {
    /// A pool of these.
    pub fn new(readers: Vec<Reader>) -> Arc<Readers> {
        Arc::new(Readers {
            permits: Semaphore::new(readers.len()),
            idle: Mutex::new(readers),
        })
    }

    /// Waits for a reader.
    pub async fn take(self: &Arc<Self>) -> Lease {
        let permit = self.permits.acquire().await;
        permit.expect("the semaphore is never closed").forget();
        Lease {
            reader: self.idle().pop(),
            pool: self.clone(),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Reader>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(mut reader) = self.reader.take() {
            reader.end();
            self.pool.idle().push(reader);
            self.pool.permits.add_permits(1);
        }
    }
}

impl Deref for Lease {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        self.reader
            .as_ref()
            .expect("there are as many permits as readers")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Reader {
        self.reader
            .as_mut()
            .expect("there are as many permits as readers")
    }
}
