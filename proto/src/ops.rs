//! Runs of row operations, as the `ops` of a [`Rows`](crate::v1::Rows) message packs them.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::record::Malformed;

/// What happens to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The row is, or becomes, as the record says: all columns.
    Upsert,
    /// The row goes: the record has the columns of the key.
    Delete,
}

/// Appends one operation.
pub fn push(out: &mut BytesMut, kind: Kind, record: &[u8]) {
    let mut head = (record.len() as u64) << 1 | u64::from(kind == Kind::Delete);
    while head >= 0x80 {
        out.put_u8(head as u8 | 0x80);
        head >>= 7;
    }
    out.put_u8(head as u8);
    out.extend_from_slice(record);
}

/// Takes the first operation off `ops`; `None` where it is not complete yet. What is taken shares the buffer.
pub fn take(ops: &mut Bytes) -> Result<Option<(Kind, Bytes)>, Malformed> {
    let mut head = 0u64;
    for (i, &byte) in ops.iter().enumerate() {
        // A record is below 2^62 bytes by far, so its head has at most nine bytes.
        if i == 9 {
            return Err(Malformed("length of an op"));
        }
        head |= u64::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 == 0 {
            let length = usize::try_from(head >> 1).map_err(|_| Malformed("length of an op"))?;
            if length > crate::ROW_BYTES_MAX {
                return Err(Malformed("an op above the limit of a row"));
            }
            if ops.len() - i - 1 < length {
                return Ok(None);
            }
            ops.advance(i + 1);
            let kind = if head & 1 == 0 {
                Kind::Upsert
            } else {
                Kind::Delete
            };
            return Ok(Some((kind, ops.split_to(length))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ops_cut_anywhere_are_read_once_they_are_whole(
            records in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut packed = BytesMut::new();
            for (delete, record) in &records {
                push(&mut packed, if *delete { Kind::Delete } else { Kind::Upsert }, record);
            }
            let packed = packed.freeze();
            let cut = cut.index(packed.len() + 1);
            let mut read = Vec::new();
            let mut first = packed.slice(..cut);
            while let Some(op) = take(&mut first).unwrap() {
                read.push(op);
            }
            let mut rest = BytesMut::from(&first[..]);
            rest.extend_from_slice(&packed[cut..]);
            let mut rest = rest.freeze();
            while let Some(op) = take(&mut rest).unwrap() {
                read.push(op);
            }
            prop_assert!(rest.is_empty());
            let read: Vec<_> = read.into_iter().map(|(kind, record)| (kind == Kind::Delete, record.to_vec())).collect();
            prop_assert_eq!(read, records);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = Bytes::from(bytes);
            while let Ok(Some(_)) = take(&mut bytes) {}
        }
    }
}
