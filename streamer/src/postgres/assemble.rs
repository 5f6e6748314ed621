//! Messages of a replication connection become [`Event`]s: whole transactions, in the order of their commits.
//!
//! A state machine without I/O of its own (but for the spool's file), fed with the payloads of CopyData in the order
//! in which they arrive. It lives as long as one connection, and is dropped with all that was not committed.
//!
//! - Rows become packed records in the order of [`Table::columns`], through `convert`.
//! - A table whose description by Postgres differs from the known one, or a value of which cannot be converted, is
//!   stopped: a [`Change::Stop`] in its place in the transaction. What comes after it is the mirror's to leave out, since
//!   only the mirror knows whether the table's copy is younger, and the table therefore not stopped. Schema changes inside a
//!   streamed transaction count when, and only if, that transaction commits.
//! - A transaction above `chunk_bytes_max` becomes several chunks.
//!
//! # Which positions may be confirmed
//!
//! `Event::Idle { lsn }` says: whatever commits below `lsn` has been handed on. The end of an empty transaction is
//! such an LSN. So is the `wal_end` of a keepalive that arrives outside of a transaction: the walsender sends there
//! the end of the last record that it has decoded, and everything that decoding it yielded was written to the same
//! socket before. Inside a transaction (between `B` and `C`) a keepalive says nothing new: no Idle.
//!
//! In-progress streamed transactions do not hinder. A slot's confirmed LSN decides by the place of the *commit record*
//! what is sent again after a reconnect: a transaction that is in progress now commits later, hence above, and will
//! be sent again whole, also what it did before that LSN, since the slot's `restart_lsn` stays below the start of
//! the oldest transaction that was in progress. (Every ordinary commit that is confirmed while another transaction
//! is in progress relies on the same.) So the spool may be dropped at any moment, and need not be durable.

use std::{collections::HashMap, io, path::Path, sync::Arc};

use anabranch_proto::Lsn;
use bytes::Bytes;

use super::{
    pgoutput::{self, Malformed, Message, unix_time},
    rows::Rows,
    spool::{Entry, Spool},
};
use crate::{
    table::{Oid, Table},
    transaction::{Change, Chunk, End, Event},
};

#[cfg(test)]
mod tests;

/// About what a change holds beside its records.
const CHANGE_BYTES: usize = size_of::<Change>() + 2 * size_of::<Bytes>();

/// Length of what precedes a message in XLogData: its kind, two LSNs, a time.
pub(super) const XLOG_HEADER_BYTES: usize = 25;

/// Whoever takes the events has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped")]
pub struct Closed;

/// Takes events, in order. May block.
pub type Sink<'a> = dyn FnMut(Event) -> Result<(), Closed> + 'a;

/// What was fed can't be assembled. The connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Stop.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// A message can't be read.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A message came where it makes no sense.
    #[error("Postgres sent what the replication protocol does not allow: {0}")]
    Unexpected(&'static str),
    /// The disk.
    #[error("transactions in progress can't be spooled: {0}")]
    Spool(#[from] io::Error),
}

/// Puts transactions together.
pub struct Assembler {
    rows: Rows,
    chunk_bytes_max: usize,
    spool: Spool,
    block: Block,
    /// The last Idle that was not sent yet.
    idle: Option<Lsn>,
    /// The last LSN that was sent, by a commit or an Idle.
    reached: Lsn,
}

/// Where in the stream we are.
enum Block {
    /// Between transactions.
    Outside,
    /// Between `B` and `C`.
    Transaction(Open),
    /// Between `S` and `E` of this top-level transaction.
    Streamed(u32),
}

/// A transaction that is being handed on.
pub(super) struct Open {
    commit_lsn: Lsn,
    changes: Vec<Change>,
    bytes: usize,
    bytes_max: usize,
    /// No chunk was sent yet.
    first: bool,
}

impl Assembler {
    /// Knows `tables`; all others are ignored. See [`Spool::new`] for the last two arguments.
    pub fn new(
        tables: HashMap<Oid, Arc<Table>>,
        chunk_bytes_max: usize,
        spool_directory: &Path,
        spool_memory_bytes_max: usize,
    ) -> Self {
        Assembler {
            rows: Rows::new(tables),
            chunk_bytes_max,
            spool: Spool::new(spool_directory, spool_memory_bytes_max),
            block: Block::Outside,
            idle: None,
            reached: Lsn(0),
        }
    }

    /// How often Postgres described a followed table so far. It does so again after whatever may have changed it,
    /// also in ways that the description does not show.
    pub fn descriptions(&self) -> u64 {
        self.rows.descriptions()
    }

    /// Takes the payload of one CopyData. Idle positions that are not urgent wait for [`Assembler::flush`].
    pub fn feed(&mut self, payload: &[u8], sink: &mut Sink<'_>) -> Result<(), Error> {
        match payload.first() {
            Some(b'w') => {
                let message = payload
                    .get(XLOG_HEADER_BYTES..)
                    .ok_or(Malformed("ends too early"))?;
                self.message(message, sink)
            }
            Some(b'k') => {
                let keepalive = Keepalive::read(payload)?;
                if !matches!(self.block, Block::Transaction(_)) {
                    self.idle = self.idle.max(Some(keepalive.wal_end));
                    if keepalive.reply {
                        self.send_idle(true, sink)?;
                    }
                }
                Ok(())
            }
            _ => Err(Malformed("unknown kind of replication message").into()),
        }
    }

    /// Takes the beginning of a CopyData payload that was too large to be read, `length` bytes long. Its table is
    /// stopped.
    pub fn feed_cut(&mut self, head: &[u8], sink: &mut Sink<'_>) -> Result<(), Error> {
        let message = match head.first() {
            Some(b'w') => head.get(XLOG_HEADER_BYTES..),
            _ => None,
        };
        let message = message.ok_or(Malformed("too large"))?;
        match &mut self.block {
            Block::Streamed(xid) => {
                if let Some(subxid) = pgoutput::streamed_xid(message)? {
                    self.spool.push(*xid, subxid, &Entry::Cut(message))?;
                }
                Ok(())
            }
            Block::Transaction(open) => self.rows.apply_cut(message, false, open, sink),
            Block::Outside => Err(Error::Unexpected("a change outside of a transaction")),
        }
    }

    /// Sends the last idle position, if there is a new one. To be called when all that has arrived was fed.
    pub fn flush(&mut self, sink: &mut Sink<'_>) -> Result<(), Error> {
        match self.block {
            Block::Transaction(_) => Ok(()),
            _ => self.send_idle(false, sink),
        }
    }

    fn send_idle(&mut self, urgent: bool, sink: &mut Sink<'_>) -> Result<(), Error> {
        match self.idle.take() {
            // One that is urgent is sent even if it says nothing new: what came before it may not be durable yet.
            Some(lsn) if lsn > self.reached || urgent => {
                let lsn = lsn.max(self.reached);
                self.reached = lsn;
                Ok(sink(Event::Idle { lsn, urgent })?)
            }
            _ => Ok(()),
        }
    }

    fn message(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<(), Error> {
        match &mut self.block {
            Block::Transaction(open) => match pgoutput::decode(bytes, false)? {
                Message::Commit {
                    commit_lsn,
                    end_lsn,
                    commit_time,
                    ..
                } => {
                    if commit_lsn != open.commit_lsn {
                        return Err(Error::Unexpected("a commit of another transaction"));
                    }
                    let Block::Transaction(open) =
                        std::mem::replace(&mut self.block, Block::Outside)
                    else {
                        return Err(Error::Unexpected("no transaction is open"));
                    };
                    self.finish(open, end_lsn, commit_time, sink)
                }
                message => self.rows.apply(message, open, sink),
            },
            Block::Streamed(xid) => match pgoutput::streamed_xid(bytes)? {
                Some(subxid) => Ok(self.spool.push(*xid, subxid, &Entry::Message(bytes))?),
                None => match pgoutput::decode(bytes, true)? {
                    Message::StreamStop => {
                        self.block = Block::Outside;
                        Ok(())
                    }
                    Message::Origin { .. } => Ok(()),
                    _ => Err(Error::Unexpected("in a streamed block")),
                },
            },
            Block::Outside => self.outside(bytes, sink),
        }
    }

    fn outside(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<(), Error> {
        match pgoutput::decode(bytes, false)? {
            Message::Begin { final_lsn, .. } => {
                self.block = Block::Transaction(Open::new(final_lsn, self.chunk_bytes_max));
                Ok(())
            }
            Message::StreamStart { xid, first } => {
                if first == self.spool.contains(xid) || (first && !self.spool.begin(xid)) {
                    return Err(Error::Unexpected(
                        "a streamed transaction begins twice or never",
                    ));
                }
                self.block = Block::Streamed(xid);
                Ok(())
            }
            Message::StreamCommit {
                xid,
                commit_lsn,
                end_lsn,
                commit_time,
                ..
            } => {
                let mut replay = self
                    .spool
                    .take(xid)
                    .ok_or(Error::Unexpected("commit of a transaction not streamed"))?;
                let mut open = Open::new(commit_lsn, self.chunk_bytes_max);
                while let Some(entry) = replay.entry()? {
                    match entry {
                        Entry::Message(bytes) => {
                            let message = pgoutput::decode(bytes, true)?;
                            self.rows.apply(message, &mut open, sink)?;
                        }
                        Entry::Cut(head) => self.rows.apply_cut(head, true, &mut open, sink)?,
                    }
                }
                self.finish(open, end_lsn, commit_time, sink)
            }
            Message::StreamAbort { xid, subxid, .. } => {
                self.spool.abort(xid, subxid);
                Ok(())
            }
            // Not part of a transaction, and not asked for.
            Message::Origin { .. } | Message::Type { .. } | Message::Logical { .. } => Ok(()),
            _ => Err(Error::Unexpected("outside of a transaction")),
        }
    }

    fn finish(
        &mut self,
        open: Open,
        lsn: Lsn,
        commit_time: i64,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        if open.first && open.changes.is_empty() {
            self.idle = self.idle.max(Some(lsn));
            return Ok(());
        }
        // A later position says all that an earlier one did.
        self.idle = self.idle.filter(|idle| *idle > lsn);
        self.reached = self.reached.max(lsn);
        let commit_time = unix_time(commit_time);
        open.finish(End { lsn, commit_time }, sink)
    }
}

/// What a keepalive of the server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// End of the WAL that the server has decoded and sent.
    pub wal_end: Lsn,
    /// It wants an answer at once.
    pub reply: bool,
}

impl Keepalive {
    /// Reads the payload of a CopyData that begins with `k`.
    pub fn read(payload: &[u8]) -> Result<Keepalive, Malformed> {
        match payload {
            [b'k', wal_end @ .., _, _, _, _, _, _, _, _, reply] => Ok(Keepalive {
                wal_end: Lsn(u64::from_be_bytes(
                    wal_end.try_into().map_err(|_| Malformed("keepalive"))?,
                )),
                reply: *reply != 0,
            }),
            _ => Err(Malformed("keepalive")),
        }
    }
}

impl Open {
    fn new(commit_lsn: Lsn, bytes_max: usize) -> Self {
        Open {
            commit_lsn,
            changes: Vec::new(),
            bytes: 0,
            bytes_max,
            first: true,
        }
    }

    /// Adds a change that holds `bytes`; sends a chunk when it is full.
    pub fn push(&mut self, change: Change, bytes: usize, sink: &mut Sink<'_>) -> Result<(), Error> {
        let bytes = bytes + CHANGE_BYTES;
        if self.bytes + bytes > self.bytes_max && !self.changes.is_empty() {
            let chunk = self.chunk(None);
            sink(Event::Chunk(chunk))?;
        }
        self.changes.push(change);
        self.bytes += bytes;
        Ok(())
    }

    fn finish(mut self, end: End, sink: &mut Sink<'_>) -> Result<(), Error> {
        let chunk = self.chunk(Some(end));
        Ok(sink(Event::Chunk(chunk))?)
    }

    fn chunk(&mut self, end: Option<End>) -> Chunk {
        Chunk {
            changes: std::mem::take(&mut self.changes),
            bytes: std::mem::take(&mut self.bytes),
            first: std::mem::take(&mut self.first),
            commit_lsn: self.commit_lsn,
            end,
        }
    }
}
