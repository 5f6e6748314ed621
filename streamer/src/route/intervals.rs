//! Ranges of values, each of a binding: which of them hold a value is found without looking at the others.
//!
//! It is a search tree by the ranges' beginnings, of which each node knows the furthest end below it; so a part in which no
//! range reaches up to the value, or all begin behind it, is left out. It is a treap: what keeps it flat are random priorities,
//! which come from the order in which ranges were added, so that the same history makes the same tree.

use std::{cmp::Ordering, ops::Bound};

use super::BindingId;

/// The ranges. See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Intervals {
    nodes: Vec<Node>,
    free: Vec<usize>,
    root: Option<usize>,
    added: u64,
}

/// A value, in the order of its bytes. Of most, all of them are where the node is: to look for them elsewhere is what takes
/// the time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    /// The first bytes, and zeros for those that are missing.
    first: u128,
    /// How many it has; of more than [`FIRST_BYTES`], one more than that.
    length: u8,
    /// Those behind them.
    rest: Box<[u8]>,
}

const FIRST_BYTES: usize = size_of::<u128>();

/// A beginning; in order, nothing is before all values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Low {
    Open,
    /// At a value, or behind it.
    At(Point, bool),
}

/// An end; in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum High {
    /// Before a value, or with it.
    At(Point, bool),
    Open,
}

type Range = (Low, High, BindingId);

#[derive(Debug)]
struct Node {
    /// The first bytes of the furthest end, of this one and those below.
    furthest: u128,
    left: Option<usize>,
    right: Option<usize>,
    range: Range,
    priority: u64,
}

fn range(low: &Bound<Vec<u8>>, high: &Bound<Vec<u8>>, id: BindingId) -> Range {
    let low = match low {
        Bound::Unbounded => Low::Open,
        Bound::Included(value) => Low::At(Point::new(value), false),
        Bound::Excluded(value) => Low::At(Point::new(value), true),
    };
    let high = match high {
        Bound::Unbounded => High::Open,
        Bound::Included(value) => High::At(Point::new(value), true),
        Bound::Excluded(value) => High::At(Point::new(value), false),
    };
    (low, high, id)
}

impl Point {
    fn new(value: &[u8]) -> Point {
        let (first, rest) = value.split_at(value.len().min(FIRST_BYTES));
        let mut bytes = [0; FIRST_BYTES];
        bytes[..first.len()].copy_from_slice(first);
        Point {
            first: u128::from_be_bytes(bytes),
            length: first.len() as u8 + u8::from(!rest.is_empty()),
            rest: rest.into(),
        }
    }
}

impl Low {
    fn is_before(&self, value: &Point) -> bool {
        match self {
            Low::Open => true,
            Low::At(low, behind) => match low.cmp(value) {
                Ordering::Less => true,
                Ordering::Equal => !behind,
                Ordering::Greater => false,
            },
        }
    }
}

impl High {
    fn first(&self) -> u128 {
        match self {
            High::Open => u128::MAX,
            High::At(high, _) => high.first,
        }
    }

    fn reaches(&self, value: &Point) -> bool {
        match self {
            High::Open => true,
            High::At(high, with) => match high.cmp(value) {
                Ordering::Greater => true,
                Ordering::Equal => *with,
                Ordering::Less => false,
            },
        }
    }
}

impl Intervals {
    /// Adds a range.
    pub fn insert(&mut self, low: &Bound<Vec<u8>>, high: &Bound<Vec<u8>>, id: BindingId) {
        let range = range(low, high, id);
        self.added += 1;
        let (before, behind) = self.split(self.root, &range);
        let node = Node {
            furthest: range.1.first(),
            left: None,
            right: None,
            range,
            priority: scatter(self.added),
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        let before = self.join(before, Some(at));
        self.root = self.join(before, behind);
    }

    /// Removes a range that was added.
    pub fn remove(&mut self, low: &Bound<Vec<u8>>, high: &Bound<Vec<u8>>, id: BindingId) {
        let range = range(low, high, id);
        self.root = self.without(self.root, &range);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    /// Adds those whose range holds `value`. Says how many were looked at.
    pub fn find(&self, value: &[u8], found: &mut Vec<BindingId>) -> usize {
        self.find_from(self.root, &Point::new(value), found)
    }

    fn find_from(&self, at: Option<usize>, value: &Point, found: &mut Vec<BindingId>) -> usize {
        let Some(at) = at else { return 0 };
        let node = &self.nodes[at];
        if node.furthest < value.first {
            return 1;
        }
        let mut looked = 1 + self.find_from(node.left, value, found);
        let (low, high, id) = &node.range;
        if low.is_before(value) {
            if high.reaches(value) {
                found.push(*id);
            }
            looked += self.find_from(node.right, value, found);
        }
        looked
    }

    /// Those before a range, and the others.
    fn split(&mut self, at: Option<usize>, range: &Range) -> (Option<usize>, Option<usize>) {
        let Some(at) = at else { return (None, None) };
        if self.nodes[at].range < *range {
            let (before, behind) = self.split(self.nodes[at].right, range);
            self.nodes[at].right = before;
            self.look_below(at);
            (Some(at), behind)
        } else {
            let (before, behind) = self.split(self.nodes[at].left, range);
            self.nodes[at].left = behind;
            self.look_below(at);
            (before, Some(at))
        }
    }

    /// All of one are before all of the other.
    fn join(&mut self, one: Option<usize>, other: Option<usize>) -> Option<usize> {
        let (Some(before), Some(behind)) = (one, other) else {
            return one.or(other);
        };
        if self.nodes[before].priority > self.nodes[behind].priority {
            self.nodes[before].right = self.join(self.nodes[before].right, other);
            self.look_below(before);
            Some(before)
        } else {
            self.nodes[behind].left = self.join(one, self.nodes[behind].left);
            self.look_below(behind);
            Some(behind)
        }
    }

    fn without(&mut self, at: Option<usize>, range: &Range) -> Option<usize> {
        let at = at?;
        match range.cmp(&self.nodes[at].range) {
            Ordering::Equal => {
                self.free.push(at);
                return self.join(self.nodes[at].left, self.nodes[at].right);
            }
            Ordering::Less => self.nodes[at].left = self.without(self.nodes[at].left, range),
            Ordering::Greater => self.nodes[at].right = self.without(self.nodes[at].right, range),
        }
        self.look_below(at);
        Some(at)
    }

    fn look_below(&mut self, at: usize) {
        let node = &self.nodes[at];
        let below = [node.left, node.right].into_iter().flatten();
        let ends = below.map(|below| self.nodes[below].furthest);
        let furthest = ends.fold(node.range.1.first(), u128::max);
        self.nodes[at].furthest = furthest;
    }
}

/// Makes numbers in a row look random. Source: Sebastiano Vigna, splitmix64.
fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::ops::RangeBounds;

    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    type Ends = (Bound<Vec<u8>>, Bound<Vec<u8>>);

    /// Some begin as others do, also with zeros, and some are longer than what is at hand.
    fn value(rng: &mut StdRng, width: u16) -> Vec<u8> {
        let value = rng.random_range(0..width).to_be_bytes();
        match rng.random_range(0..4) {
            0 => value[1..].to_vec(),
            1 => [&value[..], &[0; 3][..rng.random_range(0..=3)]].concat(),
            2 => [&[0; 15], &value[..]].concat(),
            _ => value.to_vec(),
        }
    }

    fn end(rng: &mut StdRng, width: u16) -> Bound<Vec<u8>> {
        let value = value(rng, width);
        match rng.random_range(0..5) {
            0 => Bound::Unbounded,
            1 | 2 => Bound::Included(value),
            _ => Bound::Excluded(value),
        }
    }

    #[test]
    fn those_are_found_that_hold_the_value_whatever_came_and_went() {
        let mut rng = StdRng::seed_from_u64(1);
        for width in [3, 10, 300] {
            let mut intervals = Intervals::default();
            let mut all: Vec<Option<Ends>> = vec![None; 60];
            for _ in 0..2_000 {
                let id = rng.random_range(0..all.len());
                match all[id].take() {
                    Some((low, high)) => intervals.remove(&low, &high, id),
                    None => {
                        let (low, high) = (end(&mut rng, width), end(&mut rng, width));
                        intervals.insert(&low, &high, id);
                        all[id] = Some((low, high));
                    }
                }
                let value = value(&mut rng, width);
                let mut found = Vec::new();
                intervals.find(&value, &mut found);
                found.sort_unstable();
                let holds = |(id, ends): (usize, &Option<Ends>)| {
                    let (low, high) = ends.as_ref()?;
                    let range = (low.as_ref(), high.as_ref());
                    RangeBounds::<Vec<u8>>::contains(&range, &value).then_some(id)
                };
                assert!(
                    found
                        .into_iter()
                        .eq(all.iter().enumerate().filter_map(holds))
                );
            }
            for (id, ends) in all.iter().enumerate() {
                if let Some((low, high)) = ends {
                    intervals.remove(low, high, id);
                }
            }
            assert!(intervals.is_empty());
            assert_eq!(intervals.free.len(), intervals.nodes.len());
        }
    }

    #[test]
    fn ranges_that_do_not_hold_the_value_are_hardly_looked_at() {
        let mut intervals = Intervals::default();
        let at = |value: u32| value.to_be_bytes().to_vec();
        // Windows one behind the other, added in order, which would make a bad tree of one that does not care.
        for id in 0..100_000_u32 {
            let (low, high) = (
                Bound::Included(at(10 * id)),
                Bound::Excluded(at(10 * id + 20)),
            );
            intervals.insert(&low, &high, id as usize);
        }
        for value in [5, 15, 500_005, 999_999, 2_000_000] {
            let mut found = Vec::new();
            let looked = intervals.find(&at(value), &mut found);
            assert!(found.len() <= 2 && looked < 200, "{value}: {looked}");
        }
    }
}
