//! How many ids a client may lease: a sequence of int4 must not be used up by one that asks again and again.
//!
//! A budget is of one subject and one table, whatever replicas it connects as, and is counted in leases. It fills up with
//! time; rows that a subject inserts fill it as well, so who uses its ids gets as many as it needs.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::table::Oid;

/// Leases that may be taken at once: as many replicas of one subject as start together.
const LEASES_MAX: u32 = 64;

/// How long until there is one more. An int4 sequence lasts four years, then, whatever a client does.
const LEASE_EVERY: Duration = Duration::from_secs(60);

/// Budgets that are kept. The one that is fullest makes way: it is the nearest to a new one.
const BUDGETS_MAX: usize = 100_000;

/// What is left.
#[derive(Clone, Copy, Debug)]
struct Budget {
    leases: u32,
    /// Rows that were inserted since they made up a lease.
    inserted: u64,
    /// Up to here the time was counted.
    counted: Instant,
}

/// The budgets of all clients.
#[derive(Debug, Default)]
pub struct Budgets(Mutex<HashMap<(String, Oid), Budget>>);

impl Budgets {
    /// Takes a lease, if there is one.
    pub fn take(&self, subject: &str, table: Oid) -> bool {
        self.take_at(subject, table, Instant::now())
    }

    fn take_at(&self, subject: &str, table: Oid, now: Instant) -> bool {
        let mut budgets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if budgets.len() >= BUDGETS_MAX {
            budgets.retain(|_, budget| {
                budget.fill(now);
                budget.leases < LEASES_MAX
            });
        }
        let budget = budgets
            .entry((subject.to_owned(), table))
            .or_insert(Budget {
                leases: LEASES_MAX,
                inserted: 0,
                counted: now,
            });
        budget.fill(now);
        let taken = budget.leases.checked_sub(1);
        budget.leases = taken.unwrap_or_default();
        taken.is_some()
    }

    /// Rows were inserted; `lease_rows` of them make up for a lease.
    pub fn inserted(&self, subject: &str, table: Oid, rows: u64, lease_rows: u64) {
        let mut budgets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(budget) = budgets.get_mut(&(subject.to_owned(), table)) {
            let rows = budget.inserted + rows;
            budget.inserted = rows % lease_rows;
            let leases = u32::try_from(rows / lease_rows).unwrap_or(LEASES_MAX);
            budget.leases = budget.leases.saturating_add(leases).min(LEASES_MAX);
        }
    }
}

impl Budget {
    /// Adds what the time brought.
    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_secs() / LEASE_EVERY.as_secs();
        let leases = u32::try_from(passed).unwrap_or(LEASES_MAX);
        self.leases = self.leases.saturating_add(leases).min(LEASES_MAX);
        self.counted += LEASE_EVERY * leases;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_again_and_again_uses_up_a_sequence() {
        let (budgets, start) = (Budgets::default(), Instant::now());
        let taken = |minutes: u32| {
            let at = start + LEASE_EVERY * minutes;
            (0..1000)
                .filter(|_| budgets.take_at("mallory", 1, at))
                .count()
        };
        assert_eq!(taken(0), 64);
        assert_eq!(taken(0), 0);
        assert_eq!(taken(3), 3);
        assert_eq!(taken(10_000), 64);
        assert!(budgets.take_at("mallory", 2, start));
        assert!(budgets.take_at("alice", 1, start));
    }

    #[test]
    fn who_uses_its_ids_gets_no_more() {
        let (budgets, start) = (Budgets::default(), Instant::now());
        while budgets.take_at("alice", 1, start) {}
        budgets.inserted("alice", 1, 999, 1000);
        assert!(!budgets.take_at("alice", 1, start));
        budgets.inserted("alice", 1, 1001, 1000);
        assert!(budgets.take_at("alice", 1, start));
        assert!(budgets.take_at("alice", 1, start));
        assert!(!budgets.take_at("alice", 1, start));
    }
}
