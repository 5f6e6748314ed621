//! Opens or creates the file, and keeps watching that it is the one that was opened.
//!
//! SQLite's locks are POSIX locks: closing *any* descriptor of the file in this process drops them all. So the
//! database, its `-wal` and its `-shm` are never opened outside SQLite; they are looked at by `stat` only. The one
//! descriptor of our own is that of the lock file beside it.
//!
//! `synchronous=NORMAL` is enough on this side: a power cut may undo the last commits, but rows, position and token are
//! of one transaction and go back together, and the streamer sends the rest again. `foreign_keys=OFF`: rows come in an
//! order that no foreign key knows, and a parent may be outside of the shape. `trusted_schema=OFF` and DEFENSIVE: the
//! schema is shared with programs, and what they put in it must not reach beyond the file.

use std::{
    fs::{self, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, config::DbConfig, hooks::Wal};

use super::{
    Error, Following, Settings,
    error::{Doing, is_full},
    transaction::{self, LOCK_WAIT_MAX},
};

/// Pages in the WAL from which on it is written back: at 20,000 instead of SQLite's 1,000, random updates are twice as
/// fast, and 80 MB of WAL are no burden. We do it ourselves, after the commit: within it, it would look as if the write
/// lock were held all that time.
pub(super) const CHECKPOINT_PAGES: u32 = 20_000;

/// The same while there is more to apply: whoever waits for that does not wait for a checkpoint too, and a page that is
/// changed several times is written back once. 400 MB; a backlog of 100,000 random updates takes a fifth less time.
const CHECKPOINT_BEHIND_PAGES: u32 = 100_000;

/// Where a reader keeps some of the WAL from being written back, it is tried again each time it grew by this.
pub(super) const CHECKPOINT_AGAIN_PAGES: u32 = 1_000;

/// What the WAL is cut back to when SQLite starts it over.
const WAL_KEEP_BYTES: i64 = 96 * 1024 * 1024;

/// From here on the WAL is emptied if no reader needs it just then.
const TRUNCATE_PAGES: u32 = 50_000;

/// From here on that is waited for: where readers overlap there is never a moment without one. While we wait nobody
/// writes, so readers that begin take the newest snapshot: they don't keep the WAL from being written back as soon as
/// the old ones ran out, and whoever begins after that does not need it at all.
const WAIT_PAGES: u32 = 4 * TRUNCATE_PAGES;

/// How long, since programs can't write meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Statements that are kept prepared: two for each of some dozens of tables, and our own.
const STATEMENTS: usize = 256;

/// The file as it was opened, and the lock that keeps a second replica away.
pub(super) struct Guard {
    pub path: PathBuf,
    wal: PathBuf,
    file_is: (u64, u64),
    wal_is: Option<(u64, u64)>,
    /// Follows the WAL, from the first look on, also while the writing connection waits.
    pub following: Following,
    /// Pages in the WAL as of our last commit.
    wal_pages: Arc<AtomicU32>,
    checkpointed_pages: u32,
    wal_is_long: bool,
    /// The lock file stays: removing it would race with another opener.
    lock: fs::File,
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn io_error(doing: &str, path: &Path, error: &io::Error) -> Error {
    let text = format!("{doing} {}: {error}", path.display());
    match error.kind() {
        _ if is_full(error) => Error::Full(text),
        io::ErrorKind::Interrupted => Error::Transient(text),
        _ => Error::Definite(text),
    }
}

/// The path without links, so that two names of one file share one lock.
fn resolve(path: &Path) -> Result<PathBuf, Error> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        done => return done.map_err(|error| io_error("open", path, &error)),
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path
        .file_name()
        .ok_or_else(|| Error::Definite(format!("{} is no name of a file", path.display())))?;
    fs::canonicalize(directory)
        .map(|directory| directory.join(name))
        .map_err(|error| io_error("open the directory", directory, &error))
}

fn lock(path: &Path, mode: u32) -> Result<fs::File, Error> {
    let lock_path = beside(path, "-anabranch-lock");
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(mode)
        .open(&lock_path)
        .map_err(|error| io_error("create the lock file", &lock_path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Definite(format!(
            "another replica runs on {}: a file can have only one",
            path.display()
        ))),
        Err(TryLockError::Error(error)) => Err(io_error("lock", &lock_path, &error)),
    }
}

/// Creates the file if it is not there. Nobody else can have it open yet, so closing it here is harmless.
fn create(path: &Path, mode: u32) -> Result<(), Error> {
    let created = fs::File::options()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(path);
    match created {
        // SQLite gives its -wal and -shm the permissions of the file; the umask is not to change them.
        Ok(file) => file
            .set_permissions(fs::Permissions::from_mode(mode))
            .map_err(|error| io_error("set the permissions of", path, &error)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(io_error("create", path, &error)),
    }
}

/// Opens the file; everything but our own tables.
pub(super) fn open(settings: &Settings) -> Result<(Connection, Guard), Error> {
    let path = resolve(&settings.path)?;
    let lock = lock(&path, settings.mode)?;
    create(&path, settings.mode)?;
    let opening = format!("open {}", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    // Whatever can't be opened at all, a person must look at.
    let refused = |error: rusqlite::Error| match super::error::code(&error) {
        Some(ErrorCode::NotADatabase) => {
            Error::Definite(format!("{} is not a SQLite database", path.display()))
        }
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly) => Error::Definite(format!(
            "{opening}: {error}; the file and its directory must be writable, since SQLite keeps its -wal and -shm there"
        )),
        _ => super::error::sqlite(&opening, error),
    };
    let mut connection = Connection::open_with_flags(&path, flags).map_err(refused)?;
    let following = Following::default();
    transaction::wait_for_locks(&mut connection, LOCK_WAIT_MAX, &following)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    configure(&connection, settings).map_err(refused)?;
    check_journal(&connection)?;
    let wal = beside(&path, "-wal");
    let wal_pages = Arc::new(AtomicU32::new(0));
    let pages_now = wal_pages.clone();
    connection
        .wal_hook(Some(move |_: &mut Wal, pages: i32| {
            pages_now.store(pages.unsigned_abs(), Ordering::Relaxed);
            Ok(())
        }))
        .doing(&opening)?;
    let guard = Guard {
        file_is: identity(&path).map_err(|error| io_error("look at", &path, &error))?,
        wal_is: None,
        wal_pages,
        checkpointed_pages: 0,
        wal_is_long: false,
        wal,
        path,
        following,
        lock,
    };
    Ok((connection, guard))
}

fn configure(connection: &Connection, settings: &Settings) -> rusqlite::Result<()> {
    let cache_kib = (settings.cache_bytes / 1024).max(256) as i64;
    connection.pragma_update(None, "cache_size", -cache_kib)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_LEGACY_ALTER_TABLE, true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "foreign_keys", false)?;
    connection.pragma_update(None, "recursive_triggers", false)?;
    let _: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let limit = format!("PRAGMA journal_size_limit = {WAL_KEEP_BYTES}");
    connection.query_row(&limit, [], |_| Ok(()))
}

/// A program may have switched WAL off while no replica ran; it can't while one does, unless it tries very hard.
pub(super) fn check_journal(connection: &Connection) -> Result<(), Error> {
    let mode: String = connection
        .query_row("PRAGMA journal_mode", [], |row| row.get(0))
        .doing("read the journal mode")?;
    match mode.as_str() {
        "wal" => Ok(()),
        mode => Err(Error::Definite(format!(
            "the file is in journal mode `{mode}`: a program switched WAL off; the replica needs it, so that programs can read while it writes"
        ))),
    }
}

impl Drop for Guard {
    /// Closing alone would not do it: a process that is being forked by another thread has a copy of the descriptor
    /// until it executes its program.
    fn drop(&mut self) {
        let _ = self.lock.unlock();
    }
}

impl Guard {
    /// Where a large transaction may be held.
    pub(super) fn spool_path(&self) -> PathBuf {
        beside(&self.path, "-anabranch-spool")
    }

    /// Checks that the path still names the file that was opened, and its WAL. Otherwise what we write goes where
    /// nobody sees it.
    pub(super) fn still_there(&mut self) -> Result<(), Error> {
        let gone = |path: &Path| {
            Error::Definite(format!(
                "{} was deleted, moved or replaced while the replica had it open: put it back, or restart the replica to start a new file",
                path.display()
            ))
        };
        match identity(&self.path) {
            Ok(now) if now == self.file_is => {}
            _ => return Err(gone(&self.path)),
        }
        match (identity(&self.wal), self.wal_is) {
            (Ok(now), Some(was)) if now == was => Ok(()),
            (Ok(now), None) => {
                self.wal_is = Some(now);
                Ok(())
            }
            // SQLite makes it with the first read or write, and removes it with the last connection.
            (Err(_), None) => Ok(()),
            (_, Some(_)) => Err(gone(&self.wal)),
        }
    }

    /// Writes the WAL back where it has become long, and empties it where it has become very long and stayed so. What a reader still
    /// needs stays until that is gone, which is waited for only if nothing else helps. A checkpoint that was not possible
    /// is no error: it is tried again.
    pub(super) fn tend_wal(
        &mut self,
        connection: &mut Connection,
        is_behind: bool,
    ) -> Result<(), Error> {
        let pages = self.wal_pages.load(Ordering::Relaxed);
        if pages < checkpoint_from(is_behind) {
            self.checkpointed_pages = 0;
            self.wal_is_long = false;
            return Ok(());
        }
        let before = std::mem::replace(&mut self.checkpointed_pages, pages);
        if before > 0 && pages.abs_diff(before) < CHECKPOINT_AGAIN_PAGES {
            self.checkpointed_pages = before;
            return Ok(());
        }
        // The first time without a lock, however long it is: that may be all there is to do.
        if before == 0 || pages < TRUNCATE_PAGES {
            // What comes of it is seen by how long the WAL is next time.
            let _ = checkpoint(connection, "PASSIVE");
            return Ok(());
        }
        let is_blocked = !empty_wal(connection, patience(pages), &self.following)?;
        if is_blocked && !self.wal_is_long {
            tracing::warn!(
                pages,
                "the WAL is long, and a program that reads keeps it from being emptied"
            );
        }
        if !is_blocked {
            self.wal_pages.store(0, Ordering::Relaxed);
        }
        self.wal_is_long = is_blocked;
        Ok(())
    }

    /// The next [`tend_wal`](Guard::tend_wal) may empty it.
    pub(super) fn wal_is_to_be_emptied(&self) -> bool {
        self.checkpointed_pages > 0 && self.wal_pages.load(Ordering::Relaxed) >= TRUNCATE_PAGES
    }

    /// The disk is full: gives back what the WAL takes of it, however short that is, if nobody needs it just now. It may
    /// be what filled the disk, and would stay so: below [`CHECKPOINT_PAGES`] nobody else writes it back.
    pub(super) fn make_room(&mut self, connection: &mut Connection) -> Result<(), Error> {
        if empty_wal(connection, Duration::ZERO, &self.following)? {
            self.wal_pages.store(0, Ordering::Relaxed);
            self.checkpointed_pages = 0;
            self.wal_is_long = false;
        }
        Ok(())
    }
}

/// The length of a WAL from which on it is written back.
fn checkpoint_from(is_behind: bool) -> u32 {
    if is_behind {
        CHECKPOINT_BEHIND_PAGES
    } else {
        CHECKPOINT_PAGES
    }
}

/// How long readers of a WAL of that length are waited for.
fn patience(pages: u32) -> Duration {
    if pages < WAIT_PAGES {
        Duration::ZERO
    } else {
        WAIT_MAX
    }
}

/// Writes all of the WAL back and cuts it to nothing. False: somebody was in the way for longer than `patience`, or the
/// disk was.
fn empty_wal(
    connection: &mut Connection,
    patience: Duration,
    following: &Following,
) -> Result<bool, Error> {
    if patience.is_zero() {
        connection
            .busy_handler(None::<fn(i32) -> bool>)
            .doing("stop waiting for locks")?;
    } else {
        transaction::wait_for_locks(connection, patience, following)?;
    }
    let is_empty = matches!(checkpoint(connection, "TRUNCATE"), Ok(false));
    transaction::wait_for_locks(connection, LOCK_WAIT_MAX, following)?;
    Ok(is_empty)
}

/// True: something was in the way.
fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<bool> {
    connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |row| {
        row.get(0)
    })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_wal_of_a_replica_that_is_behind_may_be_longer() {
        assert_eq!(checkpoint_from(false), CHECKPOINT_PAGES);
        assert_eq!(checkpoint_from(true), CHECKPOINT_BEHIND_PAGES);
        const { assert!(CHECKPOINT_PAGES < TRUNCATE_PAGES && CHECKPOINT_BEHIND_PAGES < WAIT_PAGES) }
    }

    #[test]
    fn a_wal_under_overlapping_readers_is_emptied_by_waiting() {
        assert_eq!(patience(TRUNCATE_PAGES), Duration::ZERO);
        assert_eq!(patience(WAIT_PAGES - 1), Duration::ZERO);
        assert_eq!(patience(WAIT_PAGES), WAIT_MAX);
        assert_eq!(patience(u32::MAX), WAIT_MAX);
    }

    #[test]
    fn a_reader_that_ends_in_time_does_not_keep_the_wal_long() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let mut connection = Connection::open(&path).unwrap();
        connection
            .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(v)")
            .unwrap();
        let old = Connection::open(&path).unwrap();
        let read = |reader: &Connection| -> i64 {
            reader.execute_batch("BEGIN").unwrap();
            reader
                .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
                .unwrap()
        };
        assert_eq!(read(&old), 0);
        connection.execute_batch("INSERT INTO t VALUES(1)").unwrap();
        assert!(!empty_wal(&mut connection, Duration::ZERO, &Following::default()).unwrap());
        // Another one comes while the old one is waited for: there is no moment without a reader.
        let reading = thread::Builder::new()
            .name("reader".into())
            .spawn(move || {
                let new = Connection::open(&path).unwrap();
                new.busy_timeout(Duration::ZERO).unwrap();
                let is_waited_for = || match new.execute_batch("BEGIN IMMEDIATE; ROLLBACK") {
                    Ok(()) => false,
                    Err(error) => error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy),
                };
                while !is_waited_for() {
                    thread::yield_now();
                }
                assert_eq!(read(&new), 1);
                old.execute_batch("COMMIT").unwrap();
                new.execute_batch("COMMIT").unwrap();
            })
            .unwrap();
        let patience = Duration::from_secs(60);
        assert!(empty_wal(&mut connection, patience, &Following::default()).unwrap());
        let wal = beside(&directory.path().join("app.db"), "-wal");
        assert_eq!(fs::metadata(wal).unwrap().len(), 0);
        reading.join().unwrap();
    }
}
