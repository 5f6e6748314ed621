//! What both sides must spell alike of local transactions: [`Nonce`], and what their hash covers of a table.

use std::fmt;

/// What tells an entry from every other one, also from one that looks alike and was made in a copy of the file.
///
/// The time is in front so that those which were made together are together in an index too, and so that it can be told
/// of each whether what was remembered of it may have been forgotten by age.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(u128);

impl Nonce {
    /// How many bytes it has.
    pub const BYTES: usize = 16;

    /// Of an entry that was captured so many seconds after 1970-01-01 00:00 UTC.
    pub fn new(seconds: u64, random: u64) -> Nonce {
        Nonce(u128::from(seconds) << 64 | u128::from(random))
    }

    /// When its entry was captured, by the clock of the replica.
    pub fn seconds(self) -> u64 {
        (self.0 >> 64) as u64
    }

    /// As it travels.
    pub fn to_bytes(self) -> [u8; Nonce::BYTES] {
        self.0.to_be_bytes()
    }

    /// As it came.
    pub fn from_bytes(bytes: [u8; Nonce::BYTES]) -> Nonce {
        Nonce(u128::from_be_bytes(bytes))
    }
}

/// As Postgres reads a uuid.
impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Adds a number of what `LocalTransaction.hash` covers of tables: how many there are of something, or a place.
pub fn push_number(out: &mut Vec<u8>, number: usize) {
    // Nothing that is counted here comes near 32 bits: a message has at most 4 MiB.
    out.extend_from_slice(&(number as u32).to_be_bytes());
}

/// Adds what `LocalTransaction.hash` covers of one table.
pub fn push_table<'a>(
    out: &mut Vec<u8>,
    schema: &str,
    name: &str,
    columns: impl ExactSizeIterator<Item = &'a str>,
    key: impl ExactSizeIterator<Item = usize>,
) {
    let text = |out: &mut Vec<u8>, text: &str| {
        push_number(out, text.len());
        out.extend_from_slice(text.as_bytes());
    };
    text(out, schema);
    text(out, name);
    push_number(out, columns.len());
    columns.for_each(|column| text(out, column));
    push_number(out, key.len());
    key.for_each(|place| push_number(out, place));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_read_as_it_was_written_and_sorts_by_time() {
        let nonce = Nonce::new(1_800_000_000, u64::MAX);
        assert_eq!(Nonce::from_bytes(nonce.to_bytes()), nonce);
        assert_eq!(nonce.seconds(), 1_800_000_000);
        assert_eq!(nonce.to_string(), "000000006b49d200ffffffffffffffff");
        assert!(nonce < Nonce::new(1_800_000_001, 0));
    }

    #[test]
    fn tables_of_different_meaning_are_not_hashed_alike() {
        let of = |schema: &str, name: &str, columns: &[&str], key: &[usize]| {
            let mut out = Vec::new();
            push_table(
                &mut out,
                schema,
                name,
                columns.iter().copied(),
                key.iter().copied(),
            );
            out
        };
        let all = [
            of("s", "t", &["a", "b"], &[0]),
            of("st", "", &["a", "b"], &[0]),
            of("s", "u", &["a", "b"], &[0]),
            of("s", "t", &["ab"], &[0]),
            of("s", "t", &["b", "a"], &[0]),
            of("s", "t", &["a", "b"], &[1]),
            of("s", "t", &["a", "b"], &[0, 1]),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one), "{i}");
        }
    }
}
