//! Why the file can't go on, and what SQLite's errors mean for that.

use std::io;

use rusqlite::ErrorCode;

/// Why the file can't go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Waiting and trying again may help: the file is locked by a program, the disk fails just now.
    #[error("{0}")]
    Transient(String),
    /// The same, because there is no room on the disk. What the file itself can give back was given back.
    #[error("{0}")]
    Full(String),
    /// The stream can't be applied to this file; a new connection starts over from the file's position.
    #[error("{0}")]
    Stream(String),
    /// A person must look.
    #[error("{0}")]
    Definite(String),
}

/// What an error of SQLite means while `doing`.
///
/// SQLite's messages name tables and columns, never values, with one exception: what a program's trigger raises. Those
/// are dealt with (`obstacle`) before they would come here.
pub(super) fn sqlite(doing: &str, error: rusqlite::Error) -> Error {
    let text = format!("{doing}: {error}");
    match code(&error) {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::Transient(format!("{doing}: another program holds the write lock"))
        }
        Some(ErrorCode::DiskFull) => Error::Full(text),
        Some(
            ErrorCode::SystemIoFailure
            | ErrorCode::OutOfMemory
            | ErrorCode::CannotOpen
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::OperationInterrupted,
        ) => Error::Transient(text),
        _ => Error::Definite(text),
    }
}

/// There is no room on the disk, or none for us.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// SQLite's code. rusqlite's own method does not know that of a statement that can't be prepared.
pub(super) fn code(error: &rusqlite::Error) -> Option<ErrorCode> {
    match error {
        rusqlite::Error::SqlInputError { error, .. } => Some(error.code),
        error => error.sqlite_error_code(),
    }
}

/// SQLite's code in full, as of the same two kinds of error.
fn extended_code(error: &rusqlite::Error) -> Option<i32> {
    match error {
        rusqlite::Error::SqlInputError { error, .. } => Some(error.extended_code),
        error => error.sqlite_error().map(|error| error.extended_code),
    }
}

/// A statement failed for what it does, not for the state of the machine: a program's trigger or index may be why.
pub(super) fn is_of_statement(error: &rusqlite::Error) -> bool {
    // A virtual table says so of its own content, such as a full-text index that was never built. Those are programs',
    // and only their triggers have us write to them; the file is not damaged.
    if extended_code(error) == Some(rusqlite::ffi::SQLITE_CORRUPT_VTAB) {
        return true;
    }
    !matches!(
        code(error),
        None | Some(
            ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::OutOfMemory
                | ErrorCode::CannotOpen
                | ErrorCode::FileLockingProtocolFailed
                | ErrorCode::OperationInterrupted
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied
        )
    )
}

/// Adds to SQLite's errors what was being done.
pub(super) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T, Error>;
}

impl<T> Doing<T> for rusqlite::Result<T> {
    fn doing(self, what: &str) -> Result<T, Error> {
        self.map_err(|error| sqlite(what, error))
    }
}
