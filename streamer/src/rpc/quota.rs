//! How much one subject may do, whatever replicas it connects as: calls at once, calls begun, local transactions and their bytes.
//!
//! What is begun too often, or too much at once, is refused with the time after which to come again: it costs no more than looking.
//! Writes are not refused but taken more slowly, since one that was sent must be made, and refusing it would only have it sent
//! again; the connection makes the replica wait meanwhile.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::config::Limits;

/// Accounts that are kept. Those that nobody uses, and that have nothing to wait for, make way.
const ACCOUNTS_MAX: usize = 100_000;

/// When to come again where only the end of another call helps, which may come at any time; or to another streamer.
pub const ROOM_AFTER: Duration = Duration::from_secs(5);

/// What one local transaction and one byte may come to at once, in seconds of what is allowed: what was written offline comes in
/// one go.
const BURST_SECONDS: f64 = 10.0;

/// Which kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `Replicate`.
    Stream,
    /// `Write`.
    Write,
}

/// Too much, or too often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// For a person.
    pub what: String,
    /// When to come again.
    pub after: Duration,
}

/// All accounts.
pub struct Quotas {
    limits: Limits,
    accounts: Mutex<HashMap<String, Account>>,
}

/// What one subject did.
struct Account {
    streams: u32,
    writes: u32,
    calls: Bucket,
    transactions: Bucket,
    bytes: Bucket,
}

/// Holds what may be done now; it fills with time.
struct Bucket {
    level: f64,
    most: f64,
    per_second: f64,
    counted: Instant,
}

/// A call, for as long as it goes on.
pub struct Entered {
    quotas: Arc<Quotas>,
    account: Option<String>,
    kind: Kind,
}

impl Quotas {
    /// Nobody did anything yet.
    pub fn new(limits: Limits) -> Arc<Quotas> {
        Arc::new(Quotas {
            limits,
            accounts: Mutex::default(),
        })
    }

    /// Begins a call, if it may be. `None` has no limits.
    pub fn enter(
        self: &Arc<Self>,
        account: Option<String>,
        kind: Kind,
        now: Instant,
    ) -> Result<Entered, Exhausted> {
        if let Some(name) = &account {
            let limits = self.limits;
            self.with(name, now, |account| {
                let at_once = match kind {
                    Kind::Stream => &mut account.streams,
                    Kind::Write => &mut account.writes,
                };
                if *at_once >= limits.streams_max {
                    return Err(Exhausted {
                        what: format!(
                            "{} calls of this subject are open, and no more may be (auth.limits.streams_max)",
                            limits.streams_max
                        ),
                        after: ROOM_AFTER,
                    });
                }
                let wait = account.calls.spend(1.0, now, false);
                if !wait.is_zero() {
                    return Err(Exhausted {
                        what: "calls of this subject are begun too often (auth.limits.calls_per_minute)".into(),
                        after: wait,
                    });
                }
                *at_once += 1;
                Ok(())
            })?;
        }
        Ok(Entered {
            quotas: self.clone(),
            account,
            kind,
        })
    }

    fn with<T>(&self, name: &str, now: Instant, what: impl FnOnce(&mut Account) -> T) -> T {
        let mut accounts = self.lock();
        if accounts.len() >= ACCOUNTS_MAX && !accounts.contains_key(name) {
            accounts.retain(|_, account| !account.is_idle(now));
        }
        if !accounts.contains_key(name) {
            accounts.insert(name.to_owned(), Account::new(&self.limits, now));
        }
        what(accounts.get_mut(name).expect("it was just put there"))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entered {
    /// A local transaction of so many bytes is taken.
    pub fn wrote(&self, bytes: usize, now: Instant) {
        self.spend(1.0, bytes as f64, now);
    }

    /// How long to wait before the next one is taken.
    pub fn owes(&self, now: Instant) -> Duration {
        self.spend(0.0, 0.0, now)
    }

    fn spend(&self, transactions: f64, bytes: f64, now: Instant) -> Duration {
        let Some(name) = &self.account else {
            return Duration::ZERO;
        };
        self.quotas.with(name, now, |account| {
            let transactions = account.transactions.spend(transactions, now, true);
            transactions.max(account.bytes.spend(bytes, now, true))
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some(name) = &self.account else { return };
        if let Some(account) = self.quotas.lock().get_mut(name) {
            match self.kind {
                Kind::Stream => account.streams -= 1,
                Kind::Write => account.writes -= 1,
            }
        }
    }
}

impl Account {
    fn new(limits: &Limits, now: Instant) -> Account {
        let calls = f64::from(limits.calls_per_minute);
        let transactions = f64::from(limits.writes_per_second);
        let bytes = limits.write_bytes_per_second as f64;
        Account {
            streams: 0,
            writes: 0,
            calls: Bucket::new(calls, calls / 60.0, now),
            transactions: Bucket::new(transactions * BURST_SECONDS, transactions, now),
            bytes: Bucket::new(bytes * BURST_SECONDS, bytes, now),
        }
    }

    /// It is as one that was just opened.
    fn is_idle(&mut self, now: Instant) -> bool {
        let buckets = [&mut self.calls, &mut self.transactions, &mut self.bytes];
        let are_full = buckets.into_iter().all(|bucket| bucket.is_full(now));
        self.streams == 0 && self.writes == 0 && are_full
    }
}

impl Bucket {
    fn new(most: f64, per_second: f64, now: Instant) -> Bucket {
        Bucket {
            level: most,
            most,
            per_second,
            counted: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.most);
        self.counted = self.counted.max(now);
    }

    fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.level >= self.most
    }

    /// Takes so much; how long until it is there, if it is not. It is taken all the same where it `is_done` already.
    fn spend(&mut self, amount: f64, now: Instant, is_done: bool) -> Duration {
        self.fill(now);
        let left = self.level - amount;
        if left >= 0.0 || is_done {
            self.level = left;
        }
        Duration::from_secs_f64((-left).max(0.0) / self.per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas() -> Arc<Quotas> {
        Quotas::new(Limits {
            streams_max: 3,
            calls_per_minute: 6,
            writes_per_second: 10,
            write_bytes_per_second: 1000,
        })
    }

    #[test]
    fn one_subject_takes_the_room_of_all() {
        let (quotas, now) = (quotas(), Instant::now());
        let enter = |who: &str, kind| quotas.enter(Some(who.into()), kind, now);
        let mut held: Vec<_> = (0..3).map(|_| enter("a", Kind::Stream).ok()).collect();
        assert!(held.iter().all(Option::is_some));
        let refused = enter("a", Kind::Stream).err().unwrap();
        assert_eq!(refused.after, ROOM_AFTER);
        assert!(refused.what.contains("streams_max"), "{refused:?}");
        // Neither its other kind of call nor anybody else is concerned.
        assert!(enter("a", Kind::Write).is_ok());
        assert!(enter("b", Kind::Stream).is_ok());
        held.pop();
        assert!(enter("a", Kind::Stream).is_ok());
        assert!(quotas.enter(None, Kind::Stream, now).is_ok());
    }

    #[test]
    fn calls_are_begun_again_and_again() {
        let (quotas, start) = (quotas(), Instant::now());
        let begun = |seconds: u64| {
            let now = start + Duration::from_secs(seconds);
            let one = |_| quotas.enter(Some("a".into()), Kind::Stream, now).is_ok();
            (0..100).filter(|at| one(*at)).count()
        };
        assert_eq!(begun(0), 6);
        let refused = quotas.enter(Some("a".into()), Kind::Write, start).err();
        assert_eq!(refused.unwrap().after, Duration::from_secs(10));
        assert_eq!(begun(9), 0);
        assert_eq!(begun(10), 1);
        assert_eq!(begun(1000), 6);
    }

    #[test]
    fn a_flood_of_writes_is_not_slowed_down() {
        let (quotas, now) = (quotas(), Instant::now());
        let call = |who: &str| quotas.enter(Some(who.into()), Kind::Write, now).unwrap();
        let (first, second) = (call("a"), call("a"));
        let write = |call: &Entered, bytes| {
            call.wrote(bytes, now);
            call.owes(now)
        };
        let waits: Vec<_> = (0..110).map(|_| write(&first, 1)).collect();
        assert!(waits[..100].iter().all(Duration::is_zero));
        assert_eq!(waits[109], Duration::from_secs(1));
        // It is of the subject, not of the call.
        assert!(write(&second, 1) > Duration::from_secs(1));
        let large = call("b");
        assert_eq!(write(&large, 12_000), Duration::from_secs(2));
        assert_eq!(large.owes(now + Duration::from_secs(3)), Duration::ZERO);
        assert!(write(&call("c"), 1).is_zero());
    }

    #[test]
    fn accounts_pile_up() {
        let (quotas, now) = (quotas(), Instant::now());
        let _held = quotas
            .enter(Some("held".into()), Kind::Stream, now)
            .unwrap();
        for i in 0..ACCOUNTS_MAX {
            drop(quotas.enter(Some(i.to_string()), Kind::Stream, now));
        }
        let later = now + Duration::from_secs(60);
        drop(quotas.enter(Some("new".into()), Kind::Stream, later));
        assert_eq!(quotas.lock().len(), 2);
    }
}
