//! Write transactions.
//!
//! Always `BEGIN IMMEDIATE`: a read transaction that becomes a writing one fails with SQLITE_BUSY_SNAPSHOT when
//! another program wrote meanwhile, and waiting never cures that. Whoever holds the lock is waited for up to
//! [`LOCK_WAIT_MAX`]; then the caller gets a transient error and may come again.

use std::{
    thread,
    time::{Duration, Instant},
};

use rusqlite::Connection;

use super::{
    Error, Following,
    error::{self, Doing},
};

/// How long another program's write lock is waited for. Longer than any write transaction that a program should hold,
/// shorter than the silence that ends a stream.
pub(super) const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// How often a lock is asked for. SQLite has no way to be woken when another process lets go, and a program that begins its next
/// transaction as soon as one is done leaves gaps of some microseconds: whoever asks seldom never meets one.
const ASK_EVERY: Duration = Duration::from_millis(1);

/// Lets SQLite wait for locks, up to `wait_max`; `following` goes on meanwhile.
pub(super) fn wait_for_locks(
    connection: &mut Connection,
    wait_max: Duration,
    following: &Following,
) -> Result<(), Error> {
    let following = following.clone();
    let mut since = Instant::now();
    connection
        .busy_handler(Some(move |count: i32| {
            if count == 0 {
                since = Instant::now();
            }
            following.go_on();
            thread::park_timeout(ASK_EVERY);
            since.elapsed() < wait_max
        }))
        .doing("set up waiting for locks")
}

/// A write transaction; rolled back if it is dropped before its commit.
pub(super) struct Write<'c> {
    connection: &'c Connection,
    began: Instant,
}

impl<'c> Write<'c> {
    pub(super) fn begin(connection: &'c Connection) -> Result<Write<'c>, Error> {
        run(connection, "BEGIN IMMEDIATE").doing("begin a transaction")?;
        Ok(Write {
            connection,
            began: Instant::now(),
        })
    }

    /// How long the write lock has been held.
    pub(super) fn held(&self) -> Duration {
        self.began.elapsed()
    }

    /// Commits; says how long the write lock was held.
    pub(super) fn commit(self) -> Result<Duration, Error> {
        run(self.connection, "COMMIT").map_err(|error| error::sqlite("commit", error))?;
        Ok(self.held())
    }
}

impl Drop for Write<'_> {
    fn drop(&mut self) {
        // Some errors (a full disk, a trigger's ROLLBACK) have ended the transaction already. If this fails there is
        // nothing left to be done: the next BEGIN says why.
        if !self.connection.is_autocommit() {
            let _ = run(self.connection, "ROLLBACK");
        }
    }
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([]).map(drop)
}
