//! Puts rows together that came in pieces (`Rows.continued`).

use anabranch_proto::{
    ops::{self, Kind},
    record::Malformed,
};
use bytes::{Bytes, BytesMut};

/// The beginning of an operation whose end has not come. Cheap to clone: pieces are kept as they came, and copied
/// once, when the last of them is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    parts: Vec<Bytes>,
    length: usize,
}

impl Pieces {
    /// Hands out the operations that are complete with these bytes.
    pub(super) fn feed<E: From<Malformed>>(
        &mut self,
        bytes: &Bytes,
        continued: bool,
        mut each: impl FnMut(Kind, &Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = if self.parts.is_empty() {
            bytes.clone()
        } else {
            self.length += bytes.len();
            self.parts.push(bytes.clone());
            if !self.is_whole()? {
                return self.expect(continued);
            }
            self.join()
        };
        while let Some((kind, record)) = ops::take(&mut rest)? {
            each(kind, &record)?;
        }
        if !rest.is_empty() {
            self.length = rest.len();
            self.parts.push(rest);
        }
        self.expect(continued)
    }

    fn expect<E: From<Malformed>>(&self, continued: bool) -> Result<(), E> {
        match (self.parts.is_empty(), continued) {
            (false, false) => Err(Malformed("rows end within an operation").into()),
            _ => Ok(()),
        }
    }

    /// Whether the operation at the beginning is complete. Looks at its head only: joining the parts each time one
    /// comes would cost the square of their number.
    fn is_whole(&self) -> Result<bool, Malformed> {
        let mut head = 0u64;
        for (i, &byte) in self.parts.iter().flatten().take(10).enumerate() {
            if i == 9 {
                return Err(Malformed("length of an op"));
            }
            head |= u64::from(byte & 0x7F) << (7 * i);
            if byte & 0x80 == 0 {
                let length = head >> 1;
                if length > anabranch_proto::ROW_BYTES_MAX as u64 {
                    return Err(Malformed("an op above the limit of a row"));
                }
                return Ok((self.length - i - 1) as u64 >= length);
            }
        }
        Ok(false)
    }

    fn join(&mut self) -> Bytes {
        let mut all = BytesMut::with_capacity(self.length);
        for part in self.parts.drain(..) {
            all.extend_from_slice(&part);
        }
        self.length = 0;
        all.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_cut_anywhere_come_out_whole(
            records in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..400)), 1..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut packed = BytesMut::new();
            for (delete, record) in &records {
                ops::push(&mut packed, if *delete { Kind::Delete } else { Kind::Upsert }, record);
            }
            let packed = packed.freeze();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.index(packed.len() + 1)).collect();
            cuts.push(packed.len());
            cuts.sort_unstable();
            let mut pieces = Pieces::default();
            let mut read = Vec::new();
            let mut from = 0;
            for (i, &cut) in cuts.iter().enumerate() {
                pieces.feed::<Malformed>(&packed.slice(from..cut), i + 1 < cuts.len(), |kind, record| {
                    read.push((kind == Kind::Delete, record.to_vec()));
                    Ok(())
                }).unwrap();
                from = cut;
            }
            prop_assert_eq!(read, records);
            prop_assert_eq!(pieces.length, 0);
        }

        #[test]
        fn any_bytes_are_read_without_panic(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8)) {
            let mut pieces = Pieces::default();
            for part in parts {
                if pieces.feed::<Malformed>(&part.into(), true, |_, _| Ok(())).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn an_operation_without_end_is_an_error() {
        let mut packed = BytesMut::new();
        ops::push(&mut packed, Kind::Upsert, &[1; 10]);
        let cut = packed.freeze().slice(..5);
        let mut pieces = Pieces::default();
        assert!(
            pieces
                .feed::<Malformed>(&cut, false, |_, _| Ok(()))
                .is_err()
        );
    }
}
