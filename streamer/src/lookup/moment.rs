//! One state of the mirror's rows, of which much is asked: what subqueries say in it is remembered, and what is read is counted.
//!
//! Without a memory, a subquery that has nothing to do with the row that it is asked for would be read again for each row and
//! each bound SELECT, and n rows in each of three levels would cost n³; with it, each level is read once for each of the values
//! that tie it to the one around it. An answer is only true in its state: so each state has [`Answers`] of its own, which end with
//! it.
//!
//! Even so a condition may need more than is good for whoever else waits; [`Reads`] ends it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use foldhash::fast::RandomState;

use super::{Each, Error, Index, Lookup};

/// What the answers of one state hold, at most: some ten thousand. There are two states in the engine, and two with each reader
/// of the mirror.
pub const ANSWERS_BYTES_MAX: usize = 1 << 20;

/// What an answer costs beside its key, about.
const ANSWER_BYTES: usize = 64;

type Map<K, V> = HashMap<K, V, RandomState>;

/// What subqueries said, in one state: by the subquery with what its parameters are bound to, and the values of the row that it
/// was asked for.
#[derive(Debug)]
pub struct Answers {
    bytes_max: usize,
    known: RefCell<Known>,
}

#[derive(Debug, Default)]
struct Known {
    bytes: usize,
    of: Map<u128, Map<Box<[u8]>, Option<bool>>>,
}

/// How many rows may still be read.
#[derive(Debug)]
pub struct Reads {
    left: Cell<usize>,
}

/// A state with a memory, whose rows are counted as they are given.
pub struct Moment<'a> {
    /// The state.
    pub of: &'a dyn Lookup,
    /// What was said in it.
    pub answers: &'a Answers,
    /// What may still be read.
    pub reads: &'a Reads,
}

impl Answers {
    /// None yet.
    pub fn new(bytes_max: usize) -> Answers {
        Answers {
            bytes_max,
            known: RefCell::default(),
        }
    }

    /// What `subquery` said of a row with these values.
    pub fn get(&self, subquery: u128, values: &[u8]) -> Option<Option<bool>> {
        self.known.borrow().of.get(&subquery)?.get(values).copied()
    }

    /// Remembers. If there is no more room, all others are forgotten: the few that cost much are soon there again.
    pub fn put(&self, subquery: u128, values: Vec<u8>, answer: Option<bool>) {
        let known = &mut *self.known.borrow_mut();
        let bytes = values.len() + ANSWER_BYTES;
        if known.bytes + bytes > self.bytes_max {
            *known = Known::default();
        }
        if bytes <= self.bytes_max {
            known.bytes += bytes;
            let of_it = known.of.entry(subquery).or_default();
            of_it.insert(values.into(), answer);
        }
    }

    /// What they hold.
    pub fn bytes(&self) -> usize {
        self.known.borrow().bytes
    }
}

impl Reads {
    /// So many.
    pub fn new(left: usize) -> Reads {
        Reads {
            left: Cell::new(left),
        }
    }

    /// How many are left.
    pub fn left(&self) -> usize {
        self.left.get()
    }

    /// From here on, so many are left.
    pub fn set(&self, left: usize) {
        self.left.set(left);
    }

    fn take(&self) -> Result<(), Error> {
        let left = self.left.get().checked_sub(1).ok_or(Error::TooMuch)?;
        self.left.set(left);
        Ok(())
    }
}

impl Lookup for Moment<'_> {
    /// Looking for rows counts as one, too, where there are none.
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        self.reads.take()?;
        self.of.rows(index, prefix, &mut |row| {
            self.reads.take()?;
            each(row)
        })
    }

    fn answers(&self) -> Option<&Answers> {
        Some(self.answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_those_of_their_values_and_never_take_more_than_they_may() {
        let answers = Answers::new(4_000);
        let mut found = 0;
        for value in 0..1_000_u32 {
            let (subquery, key) = (u128::from(value % 3), value.to_be_bytes().to_vec());
            assert_eq!(answers.get(subquery, &key), None);
            let answer = [None, Some(false), Some(true)][(value / 3 % 3) as usize];
            answers.put(subquery, key.clone(), answer);
            assert_eq!(answers.get(subquery, &key), Some(answer));
            assert_eq!(answers.get(subquery + 1, &key), None);
            assert!(answers.bytes() <= 4_000);
            let before = value.saturating_sub(6);
            let known = answers.get(u128::from(before % 3), &before.to_be_bytes());
            found += usize::from(known.is_some());
        }
        assert!(found > 500, "{found}");
        answers.put(9, vec![0; 4_000], Some(true));
        assert!(answers.bytes() <= 4_000);
    }

    #[test]
    fn what_is_read_ends() {
        struct Endless;
        impl Lookup for Endless {
            fn rows(&self, _: &Index, _: &[u8], each: Each<'_>) -> Result<(), Error> {
                while each(b"row")? {}
                Ok(())
            }
        }
        let index = Index {
            table: 1,
            parts: Vec::new(),
        };
        let (answers, reads) = (Answers::new(0), Reads::new(10));
        let moment = Moment {
            of: &Endless,
            answers: &answers,
            reads: &reads,
        };
        let read = |enough: usize| {
            let mut given = 0;
            let read = moment.rows(&index, &[], &mut |_| {
                given += 1;
                Ok(given < enough)
            });
            (read, given)
        };
        assert!(matches!(read(3), (Ok(()), 3)));
        assert_eq!(reads.left(), 6);
        assert!(matches!(read(100), (Err(Error::TooMuch), 5)));
        assert!(matches!(read(1), (Err(Error::TooMuch), 0)));
    }
}
