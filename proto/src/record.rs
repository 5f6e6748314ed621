//! Rows as packed records, in SQLite's record format.
//!
//! Source: <https://www.sqlite.org/fileformat2.html#record_format>. The format is compact (a small integer takes
//! two bytes with its type), typed, and specified; the mirror stores rows in it, and they travel in it unchanged.
//!
//! Reading never panics, whatever the bytes: what is wrong with them is a [`Malformed`].

use bytes::Bytes;

/// One value of a record. Lives as long as the bytes that it was read from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValueRef<'a> {
    /// SQL's NULL.
    Null,
    /// Any integer.
    Integer(i64),
    /// Any float, NaN included.
    Real(f64),
    /// UTF-8 text.
    Text(&'a str),
    /// Bytes.
    Blob(&'a [u8]),
}

/// The bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed record: {0}")]
pub struct Malformed(pub &'static str);

/// Builds records. Its buffers are reused from one record to the next.
#[derive(Debug, Default)]
pub struct Builder {
    types: Vec<u8>,
    body: Vec<u8>,
}

impl Builder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a value at the end.
    pub fn push(&mut self, value: ValueRef<'_>) {
        match value {
            ValueRef::Null => self.push_null(),
            ValueRef::Integer(value) => self.push_integer(value),
            ValueRef::Real(value) => self.push_real(value),
            ValueRef::Text(value) => self.push_text(value),
            ValueRef::Blob(value) => self.push_blob(value),
        }
    }

    /// Adds NULL.
    pub fn push_null(&mut self) {
        self.types.push(0);
    }

    /// Adds an integer in the fewest bytes.
    pub fn push_integer(&mut self, value: i64) {
        let bytes = value.to_be_bytes();
        let (kind, width) = match value {
            0 => (8, 0),
            1 => (9, 0),
            -0x80..=0x7F => (1, 1),
            -0x8000..=0x7FFF => (2, 2),
            -0x80_0000..=0x7F_FFFF => (3, 3),
            -0x8000_0000..=0x7FFF_FFFF => (4, 4),
            -0x8000_0000_0000..=0x7FFF_FFFF_FFFF => (5, 6),
            _ => (6, 8),
        };
        self.types.push(kind);
        self.body.extend_from_slice(&bytes[8 - width..]);
    }

    /// Adds a float.
    pub fn push_real(&mut self, value: f64) {
        self.types.push(7);
        self.body.extend_from_slice(&value.to_bits().to_be_bytes());
    }

    /// Adds a text.
    pub fn push_text(&mut self, value: &str) {
        push_varint(&mut self.types, value.len() as u64 * 2 + 13);
        self.body.extend_from_slice(value.as_bytes());
    }

    /// Adds a blob.
    pub fn push_blob(&mut self, value: &[u8]) {
        push_varint(&mut self.types, value.len() as u64 * 2 + 12);
        self.body.extend_from_slice(value);
    }

    /// Bytes that the record will have, about.
    pub fn len(&self) -> usize {
        self.types.len() + self.body.len() + 1
    }

    /// Nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }

    /// Forgets what was pushed.
    pub fn clear(&mut self) {
        self.types.clear();
        self.body.clear();
    }

    /// Takes the record, and leaves the builder empty.
    pub fn finish(&mut self) -> Bytes {
        // The length of the header counts its own varint; one more byte of it may need one more byte again.
        let mut header = self.types.len() + 1;
        while varint_len(header as u64) + self.types.len() > header {
            header += 1;
        }
        let mut record = Vec::with_capacity(header + self.body.len());
        push_varint(&mut record, header as u64);
        record.extend_from_slice(&self.types);
        record.extend_from_slice(&self.body);
        self.clear();
        record.into()
    }
}

/// Builds one record of `values`.
pub fn build<'a>(values: impl IntoIterator<Item = ValueRef<'a>>) -> Bytes {
    let mut builder = Builder::new();
    values.into_iter().for_each(|value| builder.push(value));
    builder.finish()
}

/// Reads the values of a record in order.
///
/// After an error it ends. That it ended without error at the count of columns that the table has is the
/// caller's to check: a record does not know its table.
#[derive(Clone, Debug)]
pub struct Values<'a> {
    types: &'a [u8],
    body: &'a [u8],
}

/// The values of `record`.
pub fn values(record: &[u8]) -> Result<Values<'_>, Malformed> {
    let mut rest = record;
    let header = take_varint(&mut rest)?;
    let used = record.len() - rest.len();
    let header = usize::try_from(header).map_err(|_| Malformed("header length"))?;
    if header < used || header > record.len() {
        return Err(Malformed("header length"));
    }
    Ok(Values {
        types: &record[used..header],
        body: &record[header..],
    })
}

/// The value at `index`, from 0.
pub fn value(record: &[u8], index: usize) -> Result<ValueRef<'_>, Malformed> {
    values(record)?
        .nth(index)
        .unwrap_or(Err(Malformed("fewer values than columns")))
}

impl<'a> Values<'a> {
    /// The header is read to its end; what is left of the body would be garbage.
    pub fn is_at_end(&self) -> bool {
        self.types.is_empty() && self.body.is_empty()
    }

    fn take(&mut self) -> Result<ValueRef<'a>, Malformed> {
        let kind = take_varint(&mut self.types)?;
        Ok(match kind {
            0 => ValueRef::Null,
            1..=6 => ValueRef::Integer(self.integer([1, 2, 3, 4, 6, 8][kind as usize - 1])?),
            7 => {
                let bits = self.bytes(8)?.try_into().expect("took 8 bytes");
                ValueRef::Real(f64::from_bits(u64::from_be_bytes(bits)))
            }
            8 => ValueRef::Integer(0),
            9 => ValueRef::Integer(1),
            10 | 11 => return Err(Malformed("reserved type")),
            _ => {
                let length =
                    usize::try_from((kind - 12) / 2).map_err(|_| Malformed("value length"))?;
                let bytes = self.bytes(length)?;
                if kind % 2 == 0 {
                    ValueRef::Blob(bytes)
                } else {
                    ValueRef::Text(
                        std::str::from_utf8(bytes).map_err(|_| Malformed("text is not UTF-8"))?,
                    )
                }
            }
        })
    }

    fn integer(&mut self, width: usize) -> Result<i64, Malformed> {
        let bytes = self.bytes(width)?;
        let sign = if bytes[0] & 0x80 == 0 { 0 } else { 0xFF };
        let mut all = [sign; 8];
        all[8 - width..].copy_from_slice(bytes);
        Ok(i64::from_be_bytes(all))
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self
            .body
            .split_at_checked(count)
            .ok_or(Malformed("ends within a value"))?;
        self.body = rest;
        Ok(bytes)
    }
}

impl<'a> Iterator for Values<'a> {
    type Item = Result<ValueRef<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.types.is_empty() {
            return None;
        }
        let value = self.take();
        if value.is_err() {
            self.types = &[];
        }
        Some(value)
    }

    /// Skips without looking at what is skipped, so that reading one column of a wide row is cheap.
    fn nth(&mut self, n: usize) -> Option<Self::Item> {
        let mut skip = 0usize;
        for _ in 0..n {
            if self.types.is_empty() {
                return None;
            }
            let width = match take_varint(&mut self.types) {
                Ok(kind @ 0..=9) => [0, 1, 2, 3, 4, 6, 8, 8, 0, 0][kind as usize],
                Ok(kind @ 12..) => (kind - 12) / 2,
                Ok(_) => return self.fail("reserved type"),
                Err(Malformed(reason)) => return self.fail(reason),
            };
            skip = match usize::try_from(width)
                .ok()
                .and_then(|w| skip.checked_add(w))
            {
                Some(skip) => skip,
                None => return self.fail("value length"),
            };
        }
        match self.bytes(skip) {
            Ok(_) => self.next(),
            Err(Malformed(reason)) => self.fail(reason),
        }
    }
}

impl Values<'_> {
    fn fail<T>(&mut self, reason: &'static str) -> Option<Result<T, Malformed>> {
        self.types = &[];
        Some(Err(Malformed(reason)))
    }
}

/// SQLite's varint: big-endian, seven bits a byte, and eight in the ninth.
fn push_varint(out: &mut Vec<u8>, value: u64) {
    if value < 0x80 {
        out.push(value as u8);
    } else if value >> 56 != 0 {
        (1..=8).for_each(|i| out.push((value >> (64 - 7 * i)) as u8 | 0x80));
        out.push(value as u8);
    } else {
        let groups = varint_len(value);
        (1..groups)
            .rev()
            .for_each(|i| out.push((value >> (7 * i)) as u8 | 0x80));
        out.push(value as u8 & 0x7F);
    }
}

fn varint_len(value: u64) -> usize {
    match 64 - value.leading_zeros() {
        0 => 1,
        bits @ 1..=56 => bits.div_ceil(7) as usize,
        _ => 9,
    }
}

fn take_varint(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0u64;
    for i in 0..9 {
        let Some((&byte, rest)) = bytes.split_first() else {
            return Err(Malformed("ends within a varint"));
        };
        *bytes = rest;
        if i == 8 {
            return Ok(value << 8 | u64::from(byte));
        }
        value = value << 7 | u64::from(byte & 0x7F);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    unreachable!("the ninth byte returns")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Value {
        Null,
        Integer(i64),
        Real(f64),
        Text(String),
        Blob(Vec<u8>),
    }

    impl Value {
        fn as_ref(&self) -> ValueRef<'_> {
            match self {
                Value::Null => ValueRef::Null,
                Value::Integer(value) => ValueRef::Integer(*value),
                Value::Real(value) => ValueRef::Real(*value),
                Value::Text(value) => ValueRef::Text(value),
                Value::Blob(value) => ValueRef::Blob(value),
            }
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::Integer),
            (0..64u32, any::<bool>()).prop_map(|(bits, less)| Value::Integer(
                (1i64 << bits).wrapping_sub(i64::from(less))
            )),
            any::<f64>()
                .prop_filter("NaN is not equal to itself", |v| !v.is_nan())
                .prop_map(Value::Real),
            ".{0,80}".prop_map(Value::Text),
            prop::collection::vec(any::<u8>(), 0..200).prop_map(Value::Blob),
        ]
    }

    proptest! {
        #[test]
        fn what_was_built_is_read(row in prop::collection::vec(any_value(), 0..150)) {
            let record = build(row.iter().map(Value::as_ref));
            let mut read = values(&record).unwrap();
            for (i, value) in row.iter().enumerate() {
                prop_assert_eq!(read.next(), Some(Ok(value.as_ref())));
                prop_assert_eq!(super::value(&record, i), Ok(value.as_ref()));
            }
            prop_assert!(read.is_at_end());
            prop_assert_eq!(read.next(), None);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), n in 0usize..20) {
            if let Ok(read) = values(&bytes) {
                read.clone().for_each(drop);
                let _ = super::value(&bytes, n);
            }
        }

        #[test]
        fn varints_round_trip(value in any::<u64>(), shift in 0u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            push_varint(&mut bytes, value);
            prop_assert_eq!(bytes.len(), varint_len(value));
            prop_assert_eq!(take_varint(&mut bytes.as_slice()), Ok(value));
        }
    }

    /// The format is SQLite's own: a file written by SQLite holds, as the payload of a row, what we build.
    #[test]
    fn sqlite_writes_the_same_bytes() {
        let file = std::env::temp_dir().join(format!("anabranch-record-{}.db", std::process::id()));
        let _ = std::fs::remove_file(&file);
        let sqlite = rusqlite::Connection::open(&file).unwrap();
        // In a WITHOUT ROWID table every value is in the record.
        sqlite
            .execute_batch("CREATE TABLE t(a PRIMARY KEY, b, c, d, e, f, g) WITHOUT ROWID")
            .unwrap();
        let text = "ä".repeat(100);
        sqlite
            .execute(
                "INSERT INTO t VALUES(?1, ?2, NULL, 0, 1, ?3, ?4)",
                rusqlite::params![-12_345_678_901i64, 1.5, text, vec![7u8; 70]],
            )
            .unwrap();
        drop(sqlite);
        let record = build([
            ValueRef::Integer(-12_345_678_901),
            ValueRef::Real(1.5),
            ValueRef::Null,
            ValueRef::Integer(0),
            ValueRef::Integer(1),
            ValueRef::Text(&text),
            ValueRef::Blob(&[7; 70]),
        ]);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(bytes.windows(record.len()).any(|window| window == record));
    }
}
