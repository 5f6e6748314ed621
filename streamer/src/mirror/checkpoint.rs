//! Moves what is durable in the log (`mirror.db-wal`) to the file, beside the writer.
//!
//! A checkpoint in the writer would stop the engine for hundreds of milliseconds every few seconds, since each page
//! goes to another place of the file. So a thread of its own does it, with a connection of its own; SQLite lets the writer
//! write on meanwhile (`PASSIVE`). But the log only starts again from its beginning when *all* of it is in the
//! file, and a writer that never rests is always some frames ahead: the last few are moved by the writer itself, right
//! after a commit. Where the thread cannot keep up at all, the writer moves the rest as well, so the log is bounded;
//! a reader that holds a snapshot bounds it too, by the time for which it may.

use std::{
    path::Path,
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
};

use rusqlite::Connection;

use super::{Error, schema};

/// From this length of the log on (about 160 MB) it is moved. The longer, the more often a page that was changed
/// several times is moved once; the shorter, the sooner readers find a page, and the faster a restart.
const LOG_PAGES: i64 = 80_000;

/// So few pages are moved by the writer: some milliseconds.
const REST_PAGES: i64 = 500;

/// At this length the writer waits until all is moved.
const LOG_PAGES_MAX: i64 = 4 * LOG_PAGES;

/// What can't be moved now (a reader holds it) is tried again when the log grew by this.
const AGAIN_PAGES: i64 = LOG_PAGES / 8;

/// The thread, and when to call it.
pub(super) struct Checkpoint {
    /// Taken on drop.
    ask: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Length of the log when the writer last tried to move all of it.
    tried: i64,
}

/// The log's length, and how much of it is in the file, in pages.
struct Log {
    length: i64,
    moved: i64,
}

impl Checkpoint {
    pub fn start(file: &Path) -> Result<Checkpoint, Error> {
        let sqlite = schema::open_checkpoint(file)?;
        let (ask, asked) = sync_channel(1);
        let work = move || {
            while asked.recv().is_ok() {
                move_log(&sqlite, "PASSIVE");
            }
        };
        let thread = std::thread::Builder::new()
            .name("mirror-checkpoint".into())
            .spawn(work)
            .map_err(|error| Error::Damaged(format!("starting a thread: {error}")))?;
        Ok(Checkpoint {
            ask: Some(ask),
            thread: Some(thread),
            tried: 0,
        })
    }

    /// After a commit of the writing connection.
    pub fn committed(&mut self, sqlite: &Connection) {
        let Some(log) = move_log(sqlite, "NOOP").filter(|log| log.length >= LOG_PAGES) else {
            self.tried = 0;
            return;
        };
        let rest = log.length - log.moved;
        let small = rest <= REST_PAGES && rest > 0;
        let too_long = log.length >= LOG_PAGES_MAX && log.length >= self.tried + AGAIN_PAGES;
        if small || too_long {
            self.tried = log.length;
            move_log(sqlite, "PASSIVE");
        } else if rest > 0
            && let Some(ask) = &self.ask
        {
            // Full: it is asked already.
            let _ = ask.try_send(());
        }
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A checkpoint in this mode. What fails is tried again after a later commit; nothing is lost by it, since what
/// was committed is durable in the log.
fn move_log(sqlite: &Connection, mode: &str) -> Option<Log> {
    let moved = sqlite
        .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))
        .and_then(|mut checkpoint| {
            checkpoint.query_row([], |row| {
                Ok(Log {
                    length: row.get(1)?,
                    moved: row.get(2)?,
                })
            })
        });
    moved
        .inspect_err(|error| tracing::warn!(%error, "moving the mirror's log to its file"))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn file_of_rows(directory: &Path) -> Connection {
        let sqlite = schema::open(&directory.join("mirror.db"), 1 << 20).unwrap();
        sqlite.pragma_update(None, "synchronous", "off").unwrap();
        sqlite
            .execute_batch("CREATE TABLE big(k INTEGER PRIMARY KEY, r)")
            .unwrap();
        sqlite
    }

    /// About as many pages as rows, all of them new in the log.
    fn write(sqlite: &Connection, rows: i64) {
        sqlite
            .execute(
                "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?1)
                 INSERT INTO big SELECT n, randomblob(1900) FROM n WHERE true
                 ON CONFLICT(k) DO UPDATE SET r = excluded.r",
                [rows],
            )
            .unwrap();
    }

    /// Small groups, as a live engine commits them, until the log is short again.
    fn wait_until_short(checkpoint: &mut Checkpoint, sqlite: &Connection) -> i64 {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut longest = 0;
        loop {
            write(sqlite, 3);
            checkpoint.committed(sqlite);
            let log = move_log(sqlite, "NOOP").unwrap();
            longest = longest.max(log.length);
            if log.length < LOG_PAGES {
                return longest;
            }
            assert!(Instant::now() < deadline, "the log stays at {}", log.length);
        }
    }

    #[test]
    fn the_log_becomes_short_again_while_the_writer_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let sqlite = file_of_rows(directory.path());
        let mut checkpoint = Checkpoint::start(&directory.path().join("mirror.db")).unwrap();
        write(&sqlite, LOG_PAGES + 1000);
        assert!(move_log(&sqlite, "NOOP").unwrap().length > LOG_PAGES);
        let longest = wait_until_short(&mut checkpoint, &sqlite);
        assert!(longest < LOG_PAGES_MAX);
    }

    #[test]
    fn a_log_that_the_thread_never_catches_is_moved_by_the_writer() {
        let directory = tempfile::tempdir().unwrap();
        let sqlite = file_of_rows(directory.path());
        let mut checkpoint = Checkpoint {
            ask: None,
            thread: None,
            tried: 0,
        };
        let mut longest = 0;
        for _ in 0..12 {
            write(&sqlite, LOG_PAGES / 2);
            checkpoint.committed(&sqlite);
            longest = longest.max(move_log(&sqlite, "NOOP").unwrap().length);
        }
        assert!(
            (LOG_PAGES_MAX..LOG_PAGES_MAX + LOG_PAGES).contains(&longest),
            "{longest}"
        );
        assert!(move_log(&sqlite, "NOOP").unwrap().length < LOG_PAGES_MAX);
    }
}
