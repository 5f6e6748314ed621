//! Bytes of the `pgoutput` plugin become messages.
//!
//! A pure function over borrowed bytes: nothing is copied, nothing is allocated, and whatever the bytes are, it
//! answers and never panics. Counts and lengths are checked against the bytes that are there before they are
//! believed, so that the iterators which a message hands out cannot fail any more.
//!
//! It knows every message of protocol versions 1 to 4, also those that we never ask for (two-phase commit), so that
//! a surprise is named and not "malformed". What messages mean, and in which order they may come, is `assemble`'s.
//!
//! Source: <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.

use anabranch_proto::Lsn;

use crate::table::Oid;

#[cfg(test)]
pub(super) mod encode;
#[cfg(test)]
mod tests;

/// The bytes are not a message of pgoutput.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed pgoutput message: {0}")]
pub struct Malformed(pub &'static str);

/// A message. Times are microseconds since 2000-01-01, by Postgres' clock: see [`unix_time`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Message<'a> {
    /// `B`: a transaction that has committed begins.
    Begin {
        /// Where its commit record starts.
        final_lsn: Lsn,
        /// Of the commit.
        commit_time: i64,
        /// Transaction id.
        xid: u32,
    },
    /// `C`: it ends.
    Commit {
        /// Unused by Postgres so far.
        flags: u8,
        /// Where its commit record starts.
        commit_lsn: Lsn,
        /// Where its commit record ends.
        end_lsn: Lsn,
        /// Of the commit.
        commit_time: i64,
    },
    /// `O`: it came to this server by replication.
    Origin {
        /// LSN of the commit on the origin.
        lsn: Lsn,
        /// Name of the origin.
        name: &'a str,
    },
    /// `R`: what the next rows of a table look like.
    Relation(Relation<'a>),
    /// `Y`: the name of a type that is not built in.
    Type {
        /// OID of the type.
        oid: Oid,
        /// Its schema.
        schema: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// `I`.
    Insert {
        /// OID of the table.
        relation: Oid,
        /// The row.
        new: Tuple<'a>,
    },
    /// `U`.
    Update {
        /// OID of the table.
        relation: Oid,
        /// What is told of the old row, if anything.
        old: Option<OldTuple<'a>>,
        /// The row after.
        new: Tuple<'a>,
    },
    /// `D`.
    Delete {
        /// OID of the table.
        relation: Oid,
        /// What is told of the row.
        old: OldTuple<'a>,
    },
    /// `T`: TRUNCATE of some tables.
    Truncate {
        /// CASCADE was said.
        cascade: bool,
        /// RESTART IDENTITY was said.
        restart_identity: bool,
        /// OIDs of the tables.
        relations: Oids<'a>,
    },
    /// `M`: a message of `pg_logical_emit_message`.
    Logical {
        /// Part of the transaction; otherwise emitted whatever becomes of it.
        transactional: bool,
        /// Where it is in the WAL.
        lsn: Lsn,
        /// Prefix.
        prefix: &'a str,
        /// Content.
        content: &'a [u8],
    },
    /// `S`: a block of changes of an in-progress transaction begins.
    StreamStart {
        /// Id of the top-level transaction.
        xid: u32,
        /// No block of it came before.
        first: bool,
    },
    /// `E`: the block ends.
    StreamStop,
    /// `c`: a streamed transaction has committed.
    StreamCommit {
        /// Id of the top-level transaction.
        xid: u32,
        /// Unused by Postgres so far.
        flags: u8,
        /// Where its commit record starts.
        commit_lsn: Lsn,
        /// Where its commit record ends.
        end_lsn: Lsn,
        /// Of the commit.
        commit_time: i64,
    },
    /// `A`: a streamed transaction, or a subtransaction of one, was rolled back.
    StreamAbort {
        /// Id of the top-level transaction.
        xid: u32,
        /// Id of the subtransaction, or the same id again.
        subxid: u32,
        /// Where and when, under version 4 with parallel streaming.
        at: Option<(Lsn, i64)>,
    },
    /// `b`: a transaction that was prepared begins.
    BeginPrepare(Prepared<'a>),
    /// `P`: it ends.
    Prepare(Prepared<'a>),
    /// `p`: a streamed transaction was prepared.
    StreamPrepare(Prepared<'a>),
    /// `K`: a prepared transaction has committed.
    CommitPrepared(Prepared<'a>),
    /// `r`: a prepared transaction was rolled back.
    RollbackPrepared {
        /// End of the PREPARE.
        prepare_end_lsn: Lsn,
        /// End of the ROLLBACK PREPARED.
        rollback_end_lsn: Lsn,
        /// Of the PREPARE.
        prepare_time: i64,
        /// Of the ROLLBACK PREPARED.
        rollback_time: i64,
        /// Transaction id.
        xid: u32,
        /// The name that the user gave.
        gid: &'a str,
    },
}

/// One step of two-phase commit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prepared<'a> {
    /// Where its record starts.
    pub lsn: Lsn,
    /// Where its record ends.
    pub end_lsn: Lsn,
    /// When.
    pub time: i64,
    /// Transaction id.
    pub xid: u32,
    /// The name that the user gave.
    pub gid: &'a str,
}

/// What the rows of a table look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Relation<'a> {
    /// OID of the table.
    pub oid: Oid,
    /// Its schema. Empty: `pg_catalog`.
    pub schema: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Replica identity, as in `pg_class.relreplident`: `d`, `n`, `f` or `i`.
    pub identity: u8,
    /// Its published columns, in the order of the tuples.
    pub columns: Columns<'a>,
}

/// A column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// Part of the replica identity.
    pub key: bool,
    /// Name.
    pub name: &'a str,
    /// OID of its type.
    pub type_oid: Oid,
    /// `atttypmod`.
    pub typmod: i32,
}

/// The columns of a [`Relation`], checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Columns<'a> {
    count: u16,
    bytes: &'a [u8],
}

/// A row, or the part of one that Postgres sends. Checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuple<'a> {
    count: u16,
    bytes: &'a [u8],
}

/// What is told of an old row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OldTuple<'a> {
    /// `K`: the columns of the replica identity; all others are NULL.
    Key(Tuple<'a>),
    /// `O`: the whole row.
    Full(Tuple<'a>),
}

/// A value of a [`Tuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL's NULL.
    Null,
    /// Out of line (TOAST), and not changed: not sent.
    Unchanged,
    /// As the type's output function prints it.
    Text(&'a [u8]),
    /// As the type's send function writes it. Only if asked for, which we don't.
    Binary(&'a [u8]),
}

/// OIDs of tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Oids<'a>(&'a [u8]);

impl<'a> Columns<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In the order of the tuples.
    pub fn iter(&self) -> impl Iterator<Item = Column<'a>> + use<'a> {
        let mut rest = Reader(self.bytes);
        (0..self.count).map_while(move |_| rest.column().ok())
    }
}

impl<'a> Tuple<'a> {
    /// How many values.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In the order of the relation's columns.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut rest = Reader(self.bytes);
        (0..self.count).map_while(move |_| rest.value().ok())
    }
}

impl<'a> Oids<'a> {
    /// In the order of the message.
    pub fn iter(&self) -> impl Iterator<Item = Oid> + use<'a> {
        let (oids, _) = self.0.as_chunks::<4>();
        oids.iter().map(|oid| Oid::from_be_bytes(*oid))
    }
}

/// Microseconds since 1970 of Postgres' microseconds since 2000.
pub fn unix_time(postgres_time: i64) -> i64 {
    postgres_time.saturating_add(946_684_800_000_000)
}

/// Id of the (sub)transaction that a message inside a streamed block belongs to, and what is left of the message.
///
/// `None`: this message carries none (`O`, and the messages about blocks themselves).
pub fn streamed_xid(bytes: &[u8]) -> Result<Option<u32>, Malformed> {
    let mut rest = Reader(bytes);
    Ok(match rest.u8()? {
        b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M' => Some(rest.u32()?),
        _ => None,
    })
}

/// Reads one message. `streamed`: it was sent inside a streamed block, where changes carry a transaction id
/// (skipped here: [`streamed_xid`] reads it).
pub fn decode(bytes: &[u8], streamed: bool) -> Result<Message<'_>, Malformed> {
    let mut rest = Reader(bytes);
    let kind = rest.u8()?;
    if streamed && matches!(kind, b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M') {
        rest.u32()?;
    }
    let message = match kind {
        b'I' => {
            let relation = rest.u32()?;
            rest.expect(b'N')?;
            let new = rest.tuple()?;
            Message::Insert { relation, new }
        }
        b'U' => {
            let relation = rest.u32()?;
            let old = match rest.u8()? {
                b'N' => None,
                letter => {
                    let old = rest.old(letter)?;
                    rest.expect(b'N')?;
                    Some(old)
                }
            };
            let new = rest.tuple()?;
            Message::Update { relation, old, new }
        }
        b'D' => {
            let relation = rest.u32()?;
            let letter = rest.u8()?;
            let old = rest.old(letter)?;
            Message::Delete { relation, old }
        }
        b'B' => Message::Begin {
            final_lsn: rest.lsn()?,
            commit_time: rest.i64()?,
            xid: rest.u32()?,
        },
        b'C' => Message::Commit {
            flags: rest.u8()?,
            commit_lsn: rest.lsn()?,
            end_lsn: rest.lsn()?,
            commit_time: rest.i64()?,
        },
        b'O' => Message::Origin {
            lsn: rest.lsn()?,
            name: rest.text()?,
        },
        b'R' => Message::Relation(rest.relation()?),
        b'Y' => Message::Type {
            oid: rest.u32()?,
            schema: rest.text()?,
            name: rest.text()?,
        },
        b'T' => {
            let count = rest.u32()?;
            let options = rest.u8()?;
            let bytes = (count as usize)
                .checked_mul(4)
                .ok_or(Malformed("count of tables"))?;
            Message::Truncate {
                cascade: options & 1 != 0,
                restart_identity: options & 2 != 0,
                relations: Oids(rest.take(bytes)?),
            }
        }
        b'M' => {
            let flags = rest.u8()?;
            let lsn = rest.lsn()?;
            let prefix = rest.text()?;
            let length = rest.u32()? as usize;
            Message::Logical {
                transactional: flags & 1 != 0,
                lsn,
                prefix,
                content: rest.take(length)?,
            }
        }
        b'S' => Message::StreamStart {
            xid: rest.u32()?,
            first: rest.u8()? != 0,
        },
        b'E' => Message::StreamStop,
        b'c' => Message::StreamCommit {
            xid: rest.u32()?,
            flags: rest.u8()?,
            commit_lsn: rest.lsn()?,
            end_lsn: rest.lsn()?,
            commit_time: rest.i64()?,
        },
        b'A' => Message::StreamAbort {
            xid: rest.u32()?,
            subxid: rest.u32()?,
            at: if rest.0.is_empty() {
                None
            } else {
                Some((rest.lsn()?, rest.i64()?))
            },
        },
        b'b' => Message::BeginPrepare(rest.prepared()?),
        b'P' => Message::Prepare(rest.flags_and_prepared()?),
        b'p' => Message::StreamPrepare(rest.flags_and_prepared()?),
        b'K' => Message::CommitPrepared(rest.flags_and_prepared()?),
        b'r' => {
            rest.u8()?;
            Message::RollbackPrepared {
                prepare_end_lsn: rest.lsn()?,
                rollback_end_lsn: rest.lsn()?,
                prepare_time: rest.i64()?,
                rollback_time: rest.i64()?,
                xid: rest.u32()?,
                gid: rest.text()?,
            }
        }
        _ => return Err(Malformed("unknown kind")),
    };
    if !rest.0.is_empty() {
        return Err(Malformed("bytes after its end"));
    }
    Ok(message)
}

/// Takes from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(Malformed("ends too early"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (bytes, rest) = self
            .0
            .split_first_chunk()
            .ok_or(Malformed("ends too early"))?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn i64(&mut self) -> Result<i64, Malformed> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    fn lsn(&mut self) -> Result<Lsn, Malformed> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }

    fn expect(&mut self, letter: u8) -> Result<(), Malformed> {
        if self.u8()? == letter {
            Ok(())
        } else {
            Err(Malformed("unknown kind of tuple"))
        }
    }

    /// A zero-terminated string.
    fn text(&mut self) -> Result<&'a str, Malformed> {
        let length = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(Malformed("unterminated string"))?;
        let text = self.take(length)?;
        self.u8()?;
        std::str::from_utf8(text).map_err(|_| Malformed("a name is not UTF-8"))
    }

    fn value(&mut self) -> Result<Value<'a>, Malformed> {
        let kind = self.u8()?;
        Ok(match kind {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' | b'b' => {
                let length = self.u32()? as usize;
                let bytes = self.take(length)?;
                if kind == b't' {
                    Value::Text(bytes)
                } else {
                    Value::Binary(bytes)
                }
            }
            _ => return Err(Malformed("unknown kind of value")),
        })
    }

    /// Walks the values once, so that nobody has to doubt them later.
    fn tuple(&mut self) -> Result<Tuple<'a>, Malformed> {
        let count = self.u16()?;
        let start = self.0;
        for _ in 0..count {
            self.value()?;
        }
        Ok(Tuple {
            count,
            bytes: &start[..start.len() - self.0.len()],
        })
    }

    fn old(&mut self, letter: u8) -> Result<OldTuple<'a>, Malformed> {
        match letter {
            b'K' => Ok(OldTuple::Key(self.tuple()?)),
            b'O' => Ok(OldTuple::Full(self.tuple()?)),
            _ => Err(Malformed("unknown kind of tuple")),
        }
    }

    fn column(&mut self) -> Result<Column<'a>, Malformed> {
        Ok(Column {
            key: self.u8()? & 1 != 0,
            name: self.text()?,
            type_oid: self.u32()?,
            typmod: self.u32()? as i32,
        })
    }

    fn relation(&mut self) -> Result<Relation<'a>, Malformed> {
        let oid = self.u32()?;
        let schema = self.text()?;
        let name = self.text()?;
        let identity = self.u8()?;
        let count = self.u16()?;
        let start = self.0;
        for _ in 0..count {
            self.column()?;
        }
        let bytes = &start[..start.len() - self.0.len()];
        Ok(Relation {
            oid,
            schema,
            name,
            identity,
            columns: Columns { count, bytes },
        })
    }

    fn prepared(&mut self) -> Result<Prepared<'a>, Malformed> {
        Ok(Prepared {
            lsn: self.lsn()?,
            end_lsn: self.lsn()?,
            time: self.i64()?,
            xid: self.u32()?,
            gid: self.text()?,
        })
    }

    fn flags_and_prepared(&mut self) -> Result<Prepared<'a>, Malformed> {
        self.u8()?;
        self.prepared()
    }
}
