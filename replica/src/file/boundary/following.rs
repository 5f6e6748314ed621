//! Boundaries are followed also while their thread waits for a lock.
//!
//! A program's `wal_checkpoint(FULL)`, `RESTART` or `TRUNCATE` takes the write lock, and then waits for readers; the holder is
//! one. If its thread waited for that lock without looking, each would wait for the other until a timeout ends, and
//! every other writer with them. So whatever waits for a lock calls [`Following::go_on`] meanwhile.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rusqlite::Connection;

use super::{
    super::{Error, transaction::Write},
    Boundaries, Look,
};

/// The boundaries of a file, while they are wanted. One thread uses it: the lock is there because SQLite calls back.
#[derive(Clone, Default)]
pub struct Following(Arc<Mutex<Option<Boundaries>>>);

impl Following {
    /// Starts if it was not following yet, see [`Boundaries::open`]; then looks.
    pub fn look(
        &self,
        path: &Path,
        known: impl FnOnce() -> Result<i64, Error>,
    ) -> Result<Look, Error> {
        let mut boundaries = self.lock();
        let boundaries = match &mut *boundaries {
            Some(boundaries) => boundaries,
            none => none.insert(Boundaries::open(path, known()?)?),
        };
        boundaries.look()
    }

    /// Reading along costs something.
    pub fn stop(&self) {
        *self.lock() = None;
    }

    /// See [`Boundaries::make_durable`]; `None` if nothing is followed.
    pub fn make_durable(&self) -> Result<Option<i64>, Error> {
        let mut boundaries = self.lock();
        boundaries
            .as_mut()
            .map(Boundaries::make_durable)
            .transpose()
    }

    /// See [`Boundaries::make_all_durable`]; `None` if nothing is followed.
    pub fn make_all_durable(&self) -> Result<Option<bool>, Error> {
        let mut boundaries = self.lock();
        boundaries
            .as_mut()
            .map(Boundaries::make_all_durable)
            .transpose()
    }

    /// Has the WAL written back, and gets out of the way, so that the next writer starts it over. Programs that write all the
    /// time are held up for that, shortly: then `writer` takes the write lock, and waits for it as it always does. It must not be in a
    /// transaction. False: a program that reads was in the way, or one that wrote for too long. What is found meanwhile comes with
    /// the next look.
    pub fn make_way(&self, writer: &Connection) -> Result<bool, Error> {
        let is_made = match &mut *self.lock() {
            None => true,
            Some(boundaries) => boundaries.make_way_beside_writers()?,
        };
        if is_made {
            return Ok(true);
        }
        // Not locked here: we go on while we wait.
        let write = match Write::begin(writer) {
            Err(Error::Transient(_)) => return Ok(false),
            begun => begun?,
        };
        match &mut *self.lock() {
            None => Ok(true),
            Some(boundaries) => boundaries.make_way_without_writers(&write),
        }
    }

    /// Keeps nobody's checkpoint waiting. What is found comes with the next look, and so does what fails.
    pub fn go_on(&self) {
        // Locked by this thread further up: that waits for nothing that takes long.
        if let Ok(mut boundaries) = self.0.try_lock()
            && let Some(boundaries) = &mut *boundaries
        {
            let _ = boundaries.go_on();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Boundaries>> {
        // Its thread ends with a panic, and nothing else uses it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
