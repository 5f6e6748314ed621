//! A set of mostly one: of the sessions that share a binding, of the bindings under a key.
//!
//! With a hundred thousand of them, what a change costs is how often memory is waited for; so the one is where it is looked for.

use std::collections::{BTreeSet, btree_set};

/// The set. In order, so that the same history makes the same deliveries.
#[derive(Debug, Default)]
pub(super) enum Few<T> {
    /// It is empty.
    #[default]
    None,
    /// This one.
    One(T),
    /// Any number.
    Many(BTreeSet<T>),
}

/// Goes over a [`Few`].
pub(super) enum Iter<'a, T> {
    One(Option<T>),
    Many(btree_set::Iter<'a, T>),
}

impl<T: Copy + Ord> Few<T> {
    /// Adds one. False: it was there.
    pub fn insert(&mut self, new: T) -> bool {
        match self {
            Few::None => {
                *self = Few::One(new);
                true
            }
            Few::One(one) if *one == new => false,
            Few::One(one) => {
                *self = Few::Many(BTreeSet::from([*one, new]));
                true
            }
            Few::Many(many) => many.insert(new),
        }
    }

    /// Removes one.
    pub fn remove(&mut self, old: T) {
        match self {
            Few::One(one) if *one == old => *self = Few::None,
            Few::Many(many) => {
                many.remove(&old);
                if many.len() <= 1 {
                    *self = many.first().map_or(Few::None, |one| Few::One(*one));
                }
            }
            _ => {}
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        matches!(self, Few::None)
    }

    /// All.
    pub fn iter(&self) -> Iter<'_, T> {
        match self {
            Few::None => Iter::One(None),
            Few::One(one) => Iter::One(Some(*one)),
            Few::Many(many) => Iter::Many(many.iter()),
        }
    }
}

impl<T: Copy> Iterator for Iter<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match self {
            Iter::One(one) => one.take(),
            Iter::Many(many) => many.next().copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn it_is_the_set_that_it_stands_for() {
        let mut rng = StdRng::seed_from_u64(1);
        let (mut few, mut set) = (Few::None, BTreeSet::new());
        for _ in 0..2_000 {
            let one = rng.random_range(0..4);
            if rng.random_bool(0.5) {
                assert_eq!(few.insert(one), set.insert(one));
            } else {
                few.remove(one);
                set.remove(&one);
            }
            assert!(few.iter().eq(set.iter().copied()));
            assert_eq!(few.is_empty(), set.is_empty());
        }
    }
}
