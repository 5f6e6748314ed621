//! Why the file can't go on, and what SQLite's errors mean for that.

use rusqlite::ErrorCode;

/// Why the file can't go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Waiting and trying again may help: the file is locked by a program, the disk is full.
    #[error("{0}")]
    Transient(String),
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
        Some(
            ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::OutOfMemory
            | ErrorCode::CannotOpen
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::OperationInterrupted,
        ) => Error::Transient(text),
        _ => Error::Definite(text),
    }
}

/// SQLite's code. rusqlite's own method does not know that of a statement that can't be prepared.
pub(super) fn code(error: &rusqlite::Error) -> Option<ErrorCode> {
    match error {
        rusqlite::Error::SqlInputError { error, .. } => Some(error.code),
        error => error.sqlite_error_code(),
    }
}

/// A statement failed for what it does, not for the state of the machine: a program's trigger or index may be why.
pub(super) fn is_of_statement(error: &rusqlite::Error) -> bool {
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
