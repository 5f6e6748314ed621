//! Messages to replicas, written as they travel.
//!
//! A streamer tells thousands of replicas each their part of a transaction, mostly a row or two. To build the generated
//! [`Down`](crate::v1::Down) of it, element by element, and to encode that, costs more than all else that a row takes on its way to
//! a connection. So rows are written once, as bytes, behind what is written already; lengths, which stand before what they are the
//! length of, are set when it is known.

use bytes::{BufMut, Bytes, BytesMut};
use prost::{Message, encode_length_delimiter};

use crate::{MESSAGE_BYTES_TARGET, codec::Outgoing, ops, v1};

/// Keys of fields, all of them length-delimited but two: `number << 3 | 2`, or `| 0`.
mod key {
    pub const DOWN_ELEMENTS: u8 = 1 << 3 | 2;
    pub const DOWN_RESUME_TOKEN: u8 = 2 << 3 | 2;
    pub const DOWN_ZSTD: u8 = 3 << 3 | 2;
    pub const ELEMENT_ROWS: u8 = 3 << 3 | 2;
    pub const ROWS_TABLE: u8 = 1 << 3;
    pub const ROWS_OPS: u8 = 2 << 3 | 2;
    pub const ROWS_CONTINUED: u8 = 3 << 3;
}

/// A key, and a length up to 4 GiB, which no message has.
const FIELD_BYTES_MAX: usize = 1 + 5;

/// Bytes of a length that is set once what it is the length of was written: enough for 2 MiB, and a run is cut at a quarter of that.
const WIDE: usize = 3;

/// Bytes of a [`Rows`](v1::Rows) as an element, before its fields.
const FIELDS: usize = 2 * (1 + WIDE);

/// The same, before its ops, at most.
const HEADS_BYTES_MAX: usize = FIELDS + 6 + 2 + 1 + WIDE;

const _: () = assert!(2 * MESSAGE_BYTES_TARGET + HEADS_BYTES_MAX < 1 << (7 * WIDE));

/// A [`Down`](v1::Down), encoded.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    head: Bytes,
    /// What follows, where it is not copied behind the other: a part of a large row, or the token of a full buffer.
    rest: Bytes,
}

impl Encoded {
    /// A message of nothing but this: what [`pack`](crate::packed::pack) made.
    pub fn packed(zstd: &[u8]) -> Encoded {
        let mut message = BytesMut::with_capacity(FIELD_BYTES_MAX + zstd.len());
        field(&mut message, key::DOWN_ZSTD, zstd);
        message.freeze().into()
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.head.len() + self.rest.len()
    }

    /// Whether it says nothing but that the streamer lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it.
    pub fn bytes(self) -> Bytes {
        match self.rest.is_empty() {
            true => self.head,
            false => [self.head, self.rest].concat().into(),
        }
    }
}

impl Outgoing for Encoded {
    fn size(&self) -> usize {
        self.len()
    }

    fn put(&self, out: &mut impl BufMut) {
        out.put_slice(&self.head);
        out.put_slice(&self.rest);
    }
}

impl From<Bytes> for Encoded {
    fn from(head: Bytes) -> Encoded {
        Encoded {
            head,
            rest: Bytes::new(),
        }
    }
}

impl From<v1::Down> for Encoded {
    fn from(down: v1::Down) -> Encoded {
        Bytes::from(down.encode_to_vec()).into()
    }
}

/// The elements of a message, as far as they are written.
#[derive(Debug, Default)]
pub struct Elements {
    out: BytesMut,
    /// A [`Rows`](v1::Rows) that ops are added to.
    run: Option<Run>,
}

#[derive(Debug)]
struct Run {
    table: u32,
    /// Where it begins in `out`, and where its ops do.
    begin: usize,
    ops: usize,
}

impl Elements {
    /// Nothing is written.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Bytes that are written.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Bytes of memory that they take.
    pub fn capacity(&self) -> usize {
        self.out.capacity()
    }

    /// Adds an element. No run may be open.
    pub fn push(&mut self, kind: v1::element::Kind) {
        debug_assert!(self.run.is_none(), "its length is not known yet");
        self.out.put_u8(key::DOWN_ELEMENTS);
        let element = v1::Element { kind: Some(kind) };
        let written = element.encode_length_delimited(&mut self.out);
        written.expect("the buffer grows");
    }

    /// Adds others: without a copy, if these are the first. No run may be open, here or there.
    pub fn append(&mut self, others: Elements) {
        match self.is_empty() {
            true => *self = others,
            false => self.repeat(&others),
        }
    }

    /// Adds a copy of others. No run may be open, here or there.
    pub fn repeat(&mut self, others: &Elements) {
        debug_assert!(self.run.is_none() && others.run.is_none());
        self.out.extend_from_slice(&others.out);
    }

    /// The table of the run that is open.
    pub fn run_of(&self) -> Option<u32> {
        self.run.as_ref().map(|run| run.table)
    }

    /// Adds an operation to the run that is open, or opens one for this table. It may not be another's.
    pub fn op(&mut self, table: u32, kind: ops::Kind, record: &[u8]) {
        debug_assert!(self.run_of().is_none_or(|open| open == table));
        if self.run.is_none() {
            self.out.reserve(HEADS_BYTES_MAX + record.len());
            self.run = Some(self.begin_run(table, false));
        }
        ops::push(&mut self.out, kind, record);
    }

    /// Ends the run, if one is open. While it is longer than two messages should be, a piece is taken off as a message of its own,
    /// which is continued in the next one and has no resume token.
    pub fn end_run(&mut self, mut message: impl FnMut(Encoded)) {
        let Some(run) = self.run.take() else { return };
        let length = self.out.len() - run.ops;
        // What is just above the target stays whole: its rest would be a message of a few bytes.
        if length <= 2 * MESSAGE_BYTES_TARGET {
            return self.set_lengths(&run, length);
        }
        let mut rest = self.out.split_off(run.ops).freeze();
        self.out.truncate(run.begin);
        while rest.len() > 2 * MESSAGE_BYTES_TARGET {
            let ops = rest.split_to(MESSAGE_BYTES_TARGET);
            let piece = self.begin_run(run.table, true);
            self.set_lengths(&piece, ops.len());
            message(Encoded {
                head: std::mem::take(&mut self.out).freeze(),
                rest: ops,
            });
        }
        let last = self.begin_run(run.table, false);
        self.out.extend_from_slice(&rest);
        self.set_lengths(&last, rest.len());
    }

    /// Ends the message, with this token if it is not empty. No run may be open.
    pub fn finish(&mut self, resume_token: &[u8]) -> Encoded {
        debug_assert!(self.run.is_none(), "its length is not known yet");
        let mut message = std::mem::take(&mut self.out);
        let mut rest = BytesMut::new();
        if !resume_token.is_empty() {
            let room = message.capacity() - message.len();
            let is_room = room >= FIELD_BYTES_MAX + resume_token.len();
            let out = if is_room { &mut message } else { &mut rest };
            field(out, key::DOWN_RESUME_TOKEN, resume_token);
        }
        Encoded {
            head: message.freeze(),
            rest: rest.freeze(),
        }
    }

    /// Writes all of a [`Rows`](v1::Rows) that is before its ops, but for the lengths.
    fn begin_run(&mut self, table: u32, continued: bool) -> Run {
        let begin = self.out.len();
        let no_length = wide(0);
        self.out.put_u8(key::DOWN_ELEMENTS);
        self.out.put_slice(&no_length);
        self.out.put_u8(key::ELEMENT_ROWS);
        self.out.put_slice(&no_length);
        let fields = self.out.len();
        self.out.put_u8(key::ROWS_TABLE);
        varint(&mut self.out, table as usize);
        if continued {
            self.out.put_slice(&[key::ROWS_CONTINUED, 1]);
        }
        self.out.put_u8(key::ROWS_OPS);
        self.out.put_slice(&no_length);
        let ops = self.out.len();
        debug_assert!(ops - begin <= HEADS_BYTES_MAX && fields - begin == FIELDS);
        Run { table, begin, ops }
    }

    fn set_lengths(&mut self, run: &Run, ops: usize) {
        let rows = run.ops - run.begin - FIELDS + ops;
        let element = 1 + WIDE + rows;
        for (end, length) in [
            (run.begin + 1 + WIDE, element),
            (run.begin + FIELDS, rows),
            (run.ops, ops),
        ] {
            self.out[end - WIDE..end].copy_from_slice(&wide(length));
        }
    }
}

/// Writes a field of bytes.
fn field(out: &mut BytesMut, key: u8, content: &[u8]) {
    out.put_u8(key);
    varint(out, content.len());
    out.extend_from_slice(content);
}

fn varint(out: &mut BytesMut, number: usize) {
    encode_length_delimiter(number, out).expect("the buffer grows");
}

/// A varint of [`WIDE`] bytes, whatever the number: its first bytes say that more follow, also where only zeros do. All readers of
/// protobuf take it.
fn wide(number: usize) -> [u8; WIDE] {
    assert!(number < 1 << (7 * WIDE), "a run is cut before");
    let byte = |at: usize| (number >> (7 * at)) as u8 & 0x7F;
    [byte(0) | 0x80, byte(1) | 0x80, byte(2)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{MESSAGE_BYTES_MAX, v1::element::Kind};

    fn element() -> impl Strategy<Value = Kind> {
        let records = prop::collection::vec((any::<bool>(), 0..300_usize), 1..5);
        let large = (any::<bool>(), 1..(7 * MESSAGE_BYTES_TARGET)).prop_map(|of| vec![of]);
        let records = prop_oneof![9 => records, 1 => large];
        prop_oneof![
            any::<bool>().prop_map(|first| Kind::Begin(v1::Begin {
                first,
                reset: Vec::new()
            })),
            (1..u32::MAX, records).prop_map(|(table, records)| Kind::Rows(v1::Rows {
                table,
                ops: packed(&records),
                continued: false
            })),
            any::<i64>().prop_map(|commit_time| Kind::Commit(v1::Commit {
                position: Some(v1::Position {
                    epoch: 1,
                    lsn: commit_time.cast_unsigned()
                }),
                commit_time,
                source_lsn: 3
            })),
        ]
    }

    fn packed(records: &[(bool, usize)]) -> Bytes {
        let mut packed = BytesMut::new();
        for (delete, length) in records {
            ops::push(&mut packed, kind(*delete), &vec![7; *length]);
        }
        packed.freeze()
    }

    fn kind(delete: bool) -> ops::Kind {
        match delete {
            true => ops::Kind::Delete,
            false => ops::Kind::Upsert,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_the_elements_that_it_stands_for(
            kinds in prop::collection::vec(element(), 0..8),
            token in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut elements = Elements::default();
            let mut messages = Vec::new();
            for (place, kind) in kinds.iter().enumerate() {
                match kind {
                    // In three ways.
                    kind if place % 3 > 0 && !matches!(kind, Kind::Rows(_)) => {
                        let mut one = Elements::default();
                        one.push(kind.clone());
                        match place % 3 {
                            1 => elements.repeat(&one),
                            _ => elements.append(one),
                        }
                    }
                    Kind::Rows(rows) => {
                        let mut ops = rows.ops.clone();
                        while let Some((kind, record)) = ops::take(&mut ops).unwrap() {
                            elements.op(rows.table, kind, &record);
                        }
                        elements.end_run(|message| messages.push(message));
                    }
                    kind => elements.push(kind.clone()),
                }
            }
            messages.push(elements.finish(&token));
            prop_assert!(elements.is_empty());

            let count = messages.len();
            let mut read: Vec<Kind> = Vec::new();
            for (place, written) in messages.into_iter().enumerate() {
                let mut put = BytesMut::new();
                written.put(&mut put);
                prop_assert!(put.len() == written.len() && put.len() < MESSAGE_BYTES_MAX);
                let down = v1::Down::decode(written.bytes()).unwrap();
                prop_assert_eq!(&down, &v1::Down::decode(put).unwrap());
                let last = place == count - 1;
                prop_assert_eq!(&down.resume_token[..], if last { &token[..] } else { &[] });
                for (at, element) in down.elements.into_iter().enumerate() {
                    match (element.kind.unwrap(), read.last_mut()) {
                        (Kind::Rows(rest), Some(Kind::Rows(rows))) if rows.continued => {
                            prop_assert!(at == 0 && rest.table == rows.table);
                            rows.ops = [&rows.ops[..], &rest.ops].concat().into();
                            rows.continued = rest.continued;
                        }
                        (kind, _) => read.push(kind),
                    }
                }
            }
            prop_assert_eq!(read, kinds);
        }
    }
}
