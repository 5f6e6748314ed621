//! Writes pgoutput messages as Postgres does, for tests.

use anabranch_proto::Lsn;

/// Value of a tuple.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Unchanged,
    Text(Vec<u8>),
    Binary(Vec<u8>),
}

pub(crate) fn text(text: &str) -> Value {
    Value::Text(text.into())
}

/// `(key, name, type, typmod)`.
pub(crate) type Column = (bool, String, u32, i32);

/// A message under construction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn new(kind: u8) -> Self {
        Writer(vec![kind])
    }
    /// With the transaction id that a message inside a streamed block carries.
    pub fn with_xid(kind: u8, xid: Option<u32>) -> Self {
        let writer = Writer::new(kind);
        match xid {
            Some(xid) => writer.u32(xid),
            None => writer,
        }
    }
    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    pub fn text(mut self, value: &str) -> Self {
        self.0.extend(value.bytes());
        self.u8(0)
    }
    pub fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(value);
        self
    }
    pub fn tuple(mut self, values: &[Value]) -> Self {
        self = self.u16(values.len() as u16);
        for value in values {
            self = match value {
                Value::Null => self.u8(b'n'),
                Value::Unchanged => self.u8(b'u'),
                Value::Text(bytes) => self.u8(b't').u32(bytes.len() as u32).bytes(bytes),
                Value::Binary(bytes) => self.u8(b'b').u32(bytes.len() as u32).bytes(bytes),
            };
        }
        self
    }
}

pub(crate) fn begin(final_lsn: Lsn, commit_time: i64, xid: u32) -> Vec<u8> {
    let writer = Writer::new(b'B').u64(final_lsn.0).u64(commit_time as u64);
    writer.u32(xid).0
}

pub(crate) fn commit(commit_lsn: Lsn, end_lsn: Lsn, commit_time: i64) -> Vec<u8> {
    let writer = Writer::new(b'C').u8(0).u64(commit_lsn.0).u64(end_lsn.0);
    writer.u64(commit_time as u64).0
}

pub(crate) fn relation(
    xid: Option<u32>,
    oid: u32,
    schema: &str,
    name: &str,
    identity: u8,
    columns: &[Column],
) -> Vec<u8> {
    let mut writer = Writer::with_xid(b'R', xid).u32(oid).text(schema).text(name);
    writer = writer.u8(identity).u16(columns.len() as u16);
    for (key, name, type_oid, typmod) in columns {
        writer = writer.u8(u8::from(*key)).text(name);
        writer = writer.u32(*type_oid).u32(*typmod as u32);
    }
    writer.0
}

pub(crate) fn insert(xid: Option<u32>, oid: u32, new: &[Value]) -> Vec<u8> {
    Writer::with_xid(b'I', xid).u32(oid).u8(b'N').tuple(new).0
}

pub(crate) fn update(
    xid: Option<u32>,
    oid: u32,
    old: Option<(u8, &[Value])>,
    new: &[Value],
) -> Vec<u8> {
    let mut writer = Writer::with_xid(b'U', xid).u32(oid);
    if let Some((letter, old)) = old {
        writer = writer.u8(letter).tuple(old);
    }
    writer.u8(b'N').tuple(new).0
}

pub(crate) fn delete(xid: Option<u32>, oid: u32, letter: u8, old: &[Value]) -> Vec<u8> {
    let writer = Writer::with_xid(b'D', xid).u32(oid);
    writer.u8(letter).tuple(old).0
}

pub(crate) fn truncate(xid: Option<u32>, options: u8, oids: &[u32]) -> Vec<u8> {
    let mut writer = Writer::with_xid(b'T', xid).u32(oids.len() as u32);
    writer = writer.u8(options);
    oids.iter().fold(writer, |writer, oid| writer.u32(*oid)).0
}

pub(crate) fn stream_start(xid: u32, first: bool) -> Vec<u8> {
    Writer::new(b'S').u32(xid).u8(u8::from(first)).0
}

pub(crate) fn stream_stop() -> Vec<u8> {
    vec![b'E']
}

pub(crate) fn stream_commit(xid: u32, commit_lsn: Lsn, end_lsn: Lsn, time: i64) -> Vec<u8> {
    let writer = Writer::new(b'c').u32(xid).u8(0);
    let writer = writer.u64(commit_lsn.0).u64(end_lsn.0);
    writer.u64(time as u64).0
}

pub(crate) fn stream_abort(xid: u32, subxid: u32) -> Vec<u8> {
    Writer::new(b'A').u32(xid).u32(subxid).0
}

/// As CopyData carries it.
pub(crate) fn xlog_data(message: &[u8]) -> Vec<u8> {
    let writer = Writer::new(b'w').u64(0).u64(0).u64(0);
    writer.bytes(message).0
}

/// As CopyData carries it.
pub(crate) fn keepalive(wal_end: Lsn, reply: bool) -> Vec<u8> {
    let writer = Writer::new(b'k').u64(wal_end.0).u64(0);
    writer.u8(u8::from(reply)).0
}
