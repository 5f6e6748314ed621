//! Committed transactions of Postgres, as `postgres` hands them to the engine.
//!
//! A transaction comes as one or more [`Chunk`]s; only the last has an `end`. One that fits in memory is a single
//! chunk and is routed; a larger one comes in many, is applied as they come, and its sessions catch up.
//! Nothing here is uncommitted: what Postgres streams before the commit is spooled, and becomes chunks at its commit.

use std::sync::Arc;

use anabranch_proto::Lsn;
use bytes::Bytes;

use crate::table::{Oid, Table};

/// What arrives from Postgres, in the order of its WAL.
#[derive(Clone, Debug)]
pub enum Event {
    /// Changes.
    Chunk(Chunk),
    /// Nothing that concerns us lies between the last commit and this LSN. Only ever sent between transactions.
    Idle {
        /// WAL up to here has been looked at.
        lsn: Lsn,
        /// Postgres waits for it to be confirmed (it may be shutting down).
        urgent: bool,
    },
    /// The connection was lost. A transaction of which the last chunk has not come is void, and will come again.
    Lost,
}

/// A run of changes of one transaction.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// In the order in which they were made.
    pub changes: Vec<Change>,
    /// What they hold in memory, about.
    pub bytes: usize,
    /// No chunk of this transaction came before.
    pub first: bool,
    /// Where its commit record *starts*: known from the first chunk on, while `end` is not. A transaction lies at or
    /// below a position if, and only if, this is less than the position's LSN.
    pub commit_lsn: Lsn,
    /// Set on the last chunk.
    pub end: Option<End>,
}

/// The commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// End LSN of the commit record: the transaction's name.
    pub lsn: Lsn,
    /// Microseconds since 1970, by Postgres' clock. Never used for order.
    pub commit_time: i64,
}

/// One change. Every record has one value for each of `Table::columns`, unless said otherwise.
#[derive(Clone, Debug)]
pub enum Change {
    /// INSERT.
    Insert {
        /// Into this table.
        table: Arc<Table>,
        /// The row.
        new: Bytes,
    },
    /// UPDATE.
    Update {
        /// Of this table.
        table: Arc<Table>,
        /// What Postgres says of the row before. `None`: its replica identity is as in `new`.
        old: Option<Old>,
        /// The row after, NULL where a value is in `unchanged`.
        new: Bytes,
        /// Places of the columns that Postgres did not send, since their TOASTed values did not change. Ascending.
        unchanged: Vec<u16>,
    },
    /// DELETE.
    Delete {
        /// From this table.
        table: Arc<Table>,
        /// What Postgres says of the row.
        old: Old,
    },
    /// TRUNCATE of one table.
    Truncate {
        /// This one.
        table: Arc<Table>,
    },
    /// From here on this table can't be followed: its schema changed in a way that we cannot follow yet.
    Stop {
        /// This one.
        table: Oid,
        /// For a person: what happened, and what mends it.
        reason: String,
    },
}

/// What Postgres says of an old row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Old {
    /// A record of the columns of `Table::identity_columns`, in that order.
    Identity(Bytes),
    /// The whole row (`REPLICA IDENTITY FULL`).
    Full(Bytes),
}
