//! Whose turn it is: waiting ones are served one of each owner after the other, so that whoever has many of them waiting, or
//! comes again and again, delays the others by one turn at most. Pure.

use std::collections::{HashMap, VecDeque};

/// Who waits. Those of one owner are served in their order.
#[derive(Debug)]
pub struct Turns<Owner, T> {
    /// Before all others: those that are served in a moment, and of which there are few.
    first: VecDeque<T>,
    /// Never an empty line.
    lines: HashMap<Owner, VecDeque<T>>,
    /// Owners with a line, in the order of their turns.
    order: VecDeque<Owner>,
    count: usize,
}

impl<Owner, T> Default for Turns<Owner, T> {
    fn default() -> Self {
        Turns {
            first: VecDeque::new(),
            lines: HashMap::new(),
            order: VecDeque::new(),
            count: 0,
        }
    }
}

impl<Owner: Clone + Eq + std::hash::Hash, T> Turns<Owner, T> {
    /// Waits behind those of the same owner.
    pub fn push(&mut self, owner: Owner, one: T) {
        self.count += 1;
        let line = self.lines.entry(owner.clone()).or_default();
        if line.is_empty() {
            self.order.push_back(owner);
        }
        line.push_back(one);
    }

    /// Waits before all that have an owner.
    pub fn push_first(&mut self, one: T) {
        self.count += 1;
        self.first.push_back(one);
    }

    /// Whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        let next = self.first.pop_front().or_else(|| self.pop_line())?;
        self.count -= 1;
        Some(next)
    }

    fn pop_line(&mut self) -> Option<T> {
        let owner = self.order.pop_front()?;
        let line = self.lines.get_mut(&owner)?;
        let next = line.pop_front();
        if line.is_empty() {
            self.lines.remove(&owner);
        } else {
            self.order.push_back(owner);
        }
        next
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_thousand_waiting_delays_the_others_by_all_of_them() {
        let mut turns = Turns::default();
        for n in 0..1000 {
            turns.push("storm", n);
        }
        turns.push("quiet", 5000);
        turns.push("other", 6000);
        turns.push("quiet", 5001);
        let served: Vec<_> = (0..6).filter_map(|_| turns.pop()).collect();
        assert_eq!(served, [0, 5000, 6000, 1, 5001, 2]);
        // Who comes again at once waits behind the others, too.
        turns.push("quiet", 5002);
        assert_eq!([turns.pop(), turns.pop()], [Some(3), Some(5002)]);
        assert_eq!(turns.len(), 996);
    }

    #[test]
    fn what_goes_first_waits_and_nothing_is_lost() {
        let mut turns = Turns::default();
        for n in 0..50 {
            turns.push(n % 7, n);
        }
        turns.push_first(-1);
        assert_eq!(turns.pop(), Some(-1));
        let mut served: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        served.sort_unstable();
        assert_eq!(served, (0..50).collect::<Vec<_>>());
        assert!(turns.lines.is_empty() && turns.order.is_empty() && turns.len() == 0);
    }
}
