//! What can go wrong with the mirror, split by what the caller can do.

use anabranch_proto::Position;

/// The mirror can't go on, or can't serve what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite or the file system failed. The transaction in hand was rolled back.
    #[error("mirror: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// Another process uses the directory.
    #[error("{0} is in use by another streamer")]
    InUse(String),
    /// What is stored contradicts itself, or is of a version that this program can't read.
    #[error("mirror: {0}")]
    Damaged(String),
    /// The change index does not, or no longer, reach back to where a catch-up of this table starts: start again
    /// with a reset of the table.
    #[error("the change index no longer reaches back far enough for {0}")]
    OutOfReach(String),
    /// Nobody may see a row of this table yet: it is not copied, or its copy is ahead of the mirror's position.
    #[error("{0} is not completely copied yet")]
    NotReady(String),
    /// The replica is ahead of the mirror: wait until the mirror is there.
    #[error("a replica at {from} is ahead of the mirror at {at}")]
    Ahead {
        /// Where the replica is.
        from: Position,
        /// Where the mirror is.
        at: Position,
    },
    /// A call in a state in which it makes no sense: a bug of the caller. Nothing was done.
    #[error("mirror: {0}")]
    Misused(&'static str),
}
