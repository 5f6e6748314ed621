//! Puts rows together that came in pieces (`Rows.continued`).

use anabranch_proto::{
    ops::{self, Kind},
    record::Malformed,
};
use bytes::{Bytes, BytesMut};

/// The beginning of an operation whose end has not come. Pieces are kept as they came, and copied once, when the last of
/// them is there. Then they are let go: a row of a gigabyte must not be there twice.
///
/// A message that failed half way is taken again: [`rewind`](Self::rewind) goes back to where it began.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    parts: Vec<Bytes>,
    length: usize,
    settled: Settled,
}

/// What was there when the message at hand began.
#[derive(Debug)]
enum Settled {
    /// So many of the parts, of so many bytes.
    Parts(usize, usize),
    /// They were put together since; these bytes are a slice of that.
    Joined(Bytes),
}

impl Default for Settled {
    fn default() -> Self {
        Settled::Parts(0, 0)
    }
}

impl Pieces {
    /// The message at hand was taken; the next one begins here.
    pub(super) fn settle(&mut self) {
        self.settled = Settled::Parts(self.parts.len(), self.length);
    }

    /// The message at hand failed: all is as it was at its beginning.
    pub(super) fn rewind(&mut self) {
        match std::mem::take(&mut self.settled) {
            Settled::Parts(count, length) => {
                self.parts.truncate(count);
                self.length = length;
            }
            Settled::Joined(bytes) => {
                self.length = bytes.len();
                self.parts = vec![bytes];
            }
        }
        self.settle();
    }

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
        let all = all.freeze();
        // Only the first time in a message are they what it began with.
        if let Settled::Parts(1.., length) = self.settled {
            self.settled = Settled::Joined(all.slice(..length));
        }
        all
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
        fn a_message_that_failed_half_way_is_taken_again(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 1..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..16),
            elements in 1..4usize,
            failures in prop::collection::vec(0..4usize, 32),
        ) {
            let mut packed = BytesMut::new();
            for record in &records {
                ops::push(&mut packed, Kind::Upsert, record);
            }
            let packed = packed.freeze();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.index(packed.len() + 1)).collect();
            cuts.push(packed.len());
            cuts.sort_unstable();
            let starts: Vec<usize> = std::iter::once(0).chain(cuts.iter().copied()).collect();
            let runs: Vec<_> = starts.windows(2).map(|run| packed.slice(run[0]..run[1])).collect();
            let mut pieces = Pieces::default();
            let mut read = Vec::new();
            let last = runs.len() - 1;
            let messages: Vec<Vec<(usize, Bytes)>> =
                runs.into_iter().enumerate().collect::<Vec<_>>().chunks(elements).map(<[_]>::to_vec).collect();
            for (message, failures) in messages.iter().zip(failures.into_iter().chain(std::iter::repeat(0))) {
                // It fails after none, one, two … operations, and last of all when all of it was read.
                for fails_after in (0..failures).map(Some).chain([None]) {
                    let mut now = Vec::new();
                    let done = message.iter().try_for_each(|(i, run)| {
                        pieces.feed::<Malformed>(run, *i < last, |_, record| {
                            if Some(now.len()) == fails_after {
                                return Err(Malformed("it fails"));
                            }
                            now.push(record.to_vec());
                            Ok(())
                        })
                    });
                    match (done, fails_after) {
                        (Ok(()), None) => {
                            pieces.settle();
                            read.append(&mut now);
                        }
                        (_, Some(_)) => pieces.rewind(),
                        (Err(error), None) => prop_assert!(false, "{error}"),
                    }
                }
            }
            prop_assert_eq!(read, records);
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
    fn a_row_is_not_held_twice() {
        let mut packed = BytesMut::new();
        ops::push(&mut packed, Kind::Upsert, &[7; 100]);
        let packed = packed.freeze();
        let parts: Vec<Bytes> = [0..40, 40..80]
            .map(|range| Bytes::copy_from_slice(&packed[range]))
            .into();
        let mut pieces = Pieces::default();
        for part in &parts {
            pieces.feed::<Malformed>(part, true, |_, _| Ok(())).unwrap();
            pieces.settle();
        }
        assert!(!parts[0].is_unique() && !parts[1].is_unique());
        pieces
            .feed::<Malformed>(&packed.slice(80..), false, |_, record| {
                assert_eq!(record[..], [7; 100]);
                assert!(parts[0].is_unique() && parts[1].is_unique());
                Ok(())
            })
            .unwrap();
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
