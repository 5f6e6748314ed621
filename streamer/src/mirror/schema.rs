//! The file `mirror.db`: its tables, its version, and how connections to it are set up.
//!
//! | table            | what                                                                                    |
//! |------------------|-----------------------------------------------------------------------------------------|
//! | `state`          | one row: the position, where the change index begins, how many histories and copies were |
//! | `fact`           | small durable facts by name                                                             |
//! | `tables`         | the published tables: schema as JSON, state, floor                                      |
//! | `rows_<oid>`     | the rows of one: `k` the key, `r` the row's record as it came                           |
//! | `identity_<oid>` | where Postgres names old rows by another unique index: `i` its record, `k` the key      |
//! | `epoch`          | histories of the source, each with the place where it left its parent                   |
//! | `hole`           | stretches of an epoch that the change index lacks                                       |
//! | `txn`            | transactions with changes: ordinal → epoch, LSN, commit time. Ordinals have no gaps     |
//! | `segment`        | segments of the change index: `first` ordinal, bytes, time of the first commit          |
//! | `definition`     | what replicas were told that they hold, by fingerprint (see `definitions`)              |
//! | `changes_<n>`    | one: what rows were before a transaction; `old` is NULL where there was none            |
//!
//! `rows_<oid>` may have indexes `index_<oid>_<columns>`, by which rows are found for conditions with subqueries (see `secondary`).
//!
//! `tables.open`: readers may look at it although its copy is not complete (see `copy`). `tables.copy`: the number of the
//! copy, which no other one has. `tables.replaced`: it began when there were replicas, which may have the table from before.
//! `tables.reach`: the lowest position from which the change index has all that happened to it.
//!
//! LSNs and epochs are unsigned 64-bit numbers kept in SQLite's signed ones, bit by bit; so they are compared here,
//! in Rust, and never by SQLite.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::ErrorKind,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rusqlite::{Connection, OpenFlags};

use super::{Error, definitions, secondary};
use crate::table::Oid;

/// The version of the file's format, in `user_version`.
///
/// - 1: first version. Secondary indexes are no part of it: they come and go, and each start makes those that it wants. Neither
///   is the table `definition`, which is made where it is not there.
const FORMAT: i32 = 1;

/// In `application_id`, so that no other file is taken for a mirror: "Anab".
const APPLICATION: i32 = 0x416E_6162;

/// Bytes of a page. A page is written whole for one row, so small ones win. Measured with 100,000 random updates of rows
/// of 200 bytes, with 1, 2, 4 and 8 KiB: 490, 580, 790 and 1,340 MiB written. With 1 KiB, rows of 250 bytes in the
/// change index, or under a key that is no integer, would take a page of their own; with 2 KiB it is those of 490.
const PAGE_BYTES: i64 = 2048;

/// Prepared statements that a connection keeps: about ten for each of some hundred tables.
const STATEMENTS_MAX: usize = 2048;

/// What is left of the `-wal` file after it was longer (a large transaction, a reader that stayed).
const WAL_KEPT_BYTES: i64 = 256 * 1024 * 1024;

const TABLES: &str = "
    CREATE TABLE state(
        one INTEGER PRIMARY KEY CHECK (one = 1),
        epoch INTEGER NOT NULL, lsn INTEGER NOT NULL, index_floor INTEGER NOT NULL, histories INTEGER NOT NULL,
        copies INTEGER NOT NULL
    );
    INSERT INTO state VALUES(1, 0, 0, 0, 0, 0);
    CREATE TABLE fact(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE tables(
        oid INTEGER PRIMARY KEY, version INTEGER NOT NULL, schema TEXT NOT NULL,
        state INTEGER NOT NULL, open INTEGER NOT NULL, floor INTEGER NOT NULL, stopped INTEGER, reason TEXT,
        copy INTEGER NOT NULL, replaced INTEGER NOT NULL, reach INTEGER NOT NULL
    );
    CREATE TABLE epoch(
        id INTEGER PRIMARY KEY, began INTEGER NOT NULL, first INTEGER NOT NULL, parent INTEGER, parent_left INTEGER
    );
    CREATE TABLE hole(epoch INTEGER NOT NULL, after INTEGER NOT NULL, upto INTEGER NOT NULL);
    CREATE TABLE txn(ordinal INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, lsn INTEGER NOT NULL, commit_time INTEGER NOT NULL);
    CREATE TABLE segment(n INTEGER PRIMARY KEY, first INTEGER NOT NULL, bytes INTEGER NOT NULL, began INTEGER);
";

/// The directory is this process's.
pub(super) struct Lock(File);

impl Drop for Lock {
    /// Closing alone would leave it to a child process that was forked and has not yet called `exec`.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// Takes the directory for this process.
pub(super) fn lock(directory: &Path) -> Result<Lock, Error> {
    let path = directory.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| Error::Damaged(format!("opening {}: {error}", path.display())))?;
    match lock.try_lock() {
        Ok(()) => Ok(Lock(lock)),
        Err(TryLockError::WouldBlock) => Err(Error::InUse(directory.display().to_string())),
        Err(TryLockError::Error(error)) => Err(Error::Damaged(format!(
            "locking {}: {error}",
            path.display()
        ))),
    }
}

/// Opens the writing connection, and makes the tables if they are not there. The directory is locked.
pub(super) fn open(file: &Path, cache_bytes: usize) -> Result<Connection, Error> {
    // Made here, since SQLite's own could be read by all where the directory can: it holds every row. The -wal and -shm
    // take its permissions. One that is there is not touched: closing it would drop the locks that SQLite holds on it.
    let made = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(file);
    if let Err(error) = made
        && error.kind() != ErrorKind::AlreadyExists
    {
        let what = format!("making {}: {error}", file.display());
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN);
        return Err(rusqlite::Error::SqliteFailure(code, Some(what)).into());
    }
    let sqlite = Connection::open_with_flags(
        file,
        OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    // Only takes effect on a file that is still empty.
    sqlite.pragma_update(None, "page_size", PAGE_BYTES)?;
    set_up(&sqlite, cache_bytes)?;
    sqlite.pragma_update(None, "journal_mode", "wal")?;
    sqlite.pragma_update(None, "synchronous", "full")?;
    sqlite.pragma_update(None, "foreign_keys", false)?;
    sqlite.pragma_update(None, "journal_size_limit", WAL_KEPT_BYTES)?;
    // `checkpoint` does it.
    sqlite.pragma_update(None, "wal_autocheckpoint", 0)?;

    let number = |name| sqlite.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    match (number("application_id")?, number("user_version")?) {
        (0, 0) => {
            // One transaction: a kill leaves either an empty file, or all of it.
            sqlite.execute_batch(&format!(
                "BEGIN IMMEDIATE;{TABLES}PRAGMA application_id = {APPLICATION};PRAGMA user_version = {FORMAT};COMMIT;"
            ))?;
        }
        (APPLICATION, FORMAT) => {}
        (APPLICATION, format) => {
            return Err(Error::Damaged(format!(
                "{} is of format {format}, this program reads {FORMAT}: use the newer program, or remove the \
                 directory to start with a new copy",
                file.display()
            )));
        }
        _ => {
            return Err(Error::Damaged(format!(
                "{} is a SQLite file of another program",
                file.display()
            )));
        }
    }
    definitions::create(&sqlite)?;
    Ok(sqlite)
}

/// Opens a connection that moves the log to the file, and does nothing else.
pub(super) fn open_checkpoint(file: &Path) -> Result<Connection, Error> {
    let sqlite = Connection::open_with_flags(
        file,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    set_up(&sqlite, 0)?;
    sqlite.pragma_update(None, "synchronous", "full")?;
    sqlite.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(sqlite)
}

/// Opens a connection that can only read.
pub(super) fn open_reader(file: &Path, cache_bytes: usize) -> Result<Connection, Error> {
    // The flag, not `query_only`: that would forbid temporary tables as well.
    let sqlite = Connection::open_with_flags(
        file,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    set_up(&sqlite, cache_bytes)?;
    Ok(sqlite)
}

fn set_up(sqlite: &Connection, cache_bytes: usize) -> Result<(), Error> {
    sqlite.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    secondary::register(sqlite)?;
    // Negative: KiB. What does not fit is spilled, so this bounds memory whatever a transaction's size.
    let kibibytes = i64::try_from(cache_bytes / 1024)
        .unwrap_or(i64::MAX)
        .max(64);
    sqlite.pragma_update(None, "cache_size", -kibibytes)?;
    // Temporary tables may be as large as the change index: they belong in a file, with SQLite's small cache.
    sqlite.pragma_update(None, "temp_store", "file")?;
    // Only ever waited for at the edge of a checkpoint that restarts the log.
    sqlite.busy_timeout(std::time::Duration::from_secs(10))?;
    Ok(())
}

/// Makes the tables that hold the rows of a published table, empty.
pub(super) fn create_rows(
    sqlite: &Connection,
    oid: Oid,
    integer_key: bool,
    identity: bool,
) -> Result<(), rusqlite::Error> {
    drop_rows(sqlite, oid)?;
    sqlite.execute_batch(&if integer_key {
        format!("CREATE TABLE rows_{oid}(k INTEGER PRIMARY KEY, r BLOB NOT NULL)")
    } else {
        format!(
            "CREATE TABLE rows_{oid}(k BLOB PRIMARY KEY NOT NULL, r BLOB NOT NULL) WITHOUT ROWID"
        )
    })?;
    if identity {
        sqlite.execute_batch(&format!(
            "CREATE TABLE identity_{oid}(i BLOB PRIMARY KEY NOT NULL, k NOT NULL) WITHOUT ROWID"
        ))?;
    }
    Ok(())
}

/// Drops them.
pub(super) fn drop_rows(sqlite: &Connection, oid: Oid) -> Result<(), rusqlite::Error> {
    sqlite.execute_batch(&format!(
        "DROP TABLE IF EXISTS rows_{oid};DROP TABLE IF EXISTS identity_{oid};"
    ))
}

/// Makes a segment of the change index.
pub(super) fn create_segment(sqlite: &Connection, n: i64) -> Result<(), rusqlite::Error> {
    sqlite.execute_batch(&format!(
        "CREATE TABLE changes_{n}(
            txn INTEGER NOT NULL, tbl INTEGER NOT NULL, k NOT NULL, version INTEGER NOT NULL, old BLOB,
            PRIMARY KEY(txn, tbl, k)
        ) WITHOUT ROWID"
    ))
}

/// Drops everything, and makes the file as if it were new.
pub(super) fn clear(sqlite: &Connection) -> Result<(), rusqlite::Error> {
    let tables: Vec<String> = sqlite
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table'")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let (histories, copies): (i64, i64) =
        sqlite.query_row("SELECT histories, copies FROM state", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    for table in tables {
        sqlite.execute_batch(&format!("DROP TABLE {table}"))?;
    }
    sqlite.execute_batch(TABLES)?;
    definitions::create(sqlite)?;
    // Goes on counting, so that a catch-up that is under way notices.
    sqlite.execute(
        "UPDATE state SET histories = ?1, copies = ?2",
        [histories + 1, copies],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_all_may_enter_does_not_show_the_rows() {
        let directory = tempfile::tempdir().unwrap();
        let _sqlite = open(&directory.path().join("mirror.db"), 1 << 20).unwrap();
        for name in ["mirror.db", "mirror.db-wal", "mirror.db-shm"] {
            let about = std::fs::metadata(directory.path().join(name)).unwrap();
            assert_eq!(about.permissions().mode() & 0o777, 0o600, "{name}");
        }
    }
}
