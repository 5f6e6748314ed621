//! Waiting for a position: what `/wait` does.
//!
//! A program that wrote to Postgres asks it for `pg_current_wal_insert_lsn()` and waits here until the file has it. Only
//! those whose position came are woken; a commit costs nothing for the others.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anabranch_proto::{Epoch, Lsn, Position};
use tokio::sync::oneshot;

use crate::file::without_header;

/// Waiters at a time; each is a connection and a timer.
pub const WAITERS_MAX: usize = 1_000;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where it is said; else it is that of the file when asked.
    pub epoch: Option<Epoch>,
    /// WAL up to here.
    pub lsn: Lsn,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(lsn) = text.parse() {
            return Ok(Target { epoch: None, lsn });
        }
        let position: Position = text.parse().map_err(|_| {
            format!("`{text}` is no position; write an LSN such as 0/16B3748, or epoch@lsn such as 00c0ffee00c0ffee@0/16B3748")
        })?;
        Ok(Target {
            epoch: Some(position.epoch),
            lsn: position.lsn,
        })
    }
}

/// How waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The file has it; this is what it has.
    Reached(Position),
    /// The file follows another history, in which that position means nothing.
    OtherEpoch(Position),
    /// Too many are waiting.
    Full,
}

/// All that wait.
#[derive(Debug, Default)]
pub struct Waiters(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    position: Option<Position>,
    waiting: BTreeMap<(Lsn, u64), oneshot::Sender<()>>,
    next: u64,
}

impl Waiters {
    /// The file has come to `position`.
    pub fn advance(&self, position: Position) {
        let mut inner = self.lock();
        let same_epoch = inner
            .position
            .is_some_and(|before| before.epoch == position.epoch);
        inner.position = Some(position);
        let rest = if same_epoch {
            inner
                .waiting
                .split_off(&(Lsn(position.lsn.0.saturating_add(1)), 0))
        } else {
            // Everybody has to think again.
            BTreeMap::new()
        };
        for (_, wake) in std::mem::replace(&mut inner.waiting, rest) {
            // One that gave up meanwhile needs no call.
            let _ = wake.send(());
        }
    }

    /// The file has no position any more; whoever waits goes on to.
    pub fn forget(&self) {
        self.lock().position = None;
    }

    /// Returns when the file has `target`, or never will. May be dropped at any time.
    pub async fn wait(&self, mut target: Target) -> Outcome {
        // An idle server's insert LSN lies behind a page's header, where no commit or flush position will ever lie.
        let lsn = Lsn(without_header(target.lsn));
        loop {
            let (place, woken) = {
                let mut inner = self.lock();
                if let Some(position) = inner.position {
                    if *target.epoch.get_or_insert(position.epoch) != position.epoch {
                        return Outcome::OtherEpoch(position);
                    }
                    if position.lsn >= lsn {
                        return Outcome::Reached(position);
                    }
                }
                if inner.waiting.len() >= WAITERS_MAX {
                    return Outcome::Full;
                }
                let (wake, woken) = oneshot::channel();
                let key = (lsn, inner.next);
                inner.next += 1;
                inner.waiting.insert(key, wake);
                (Place { waiters: self, key }, woken)
            };
            // An error would mean that the place was removed unwoken, which only its own drop does.
            let _ = woken.await;
            drop(place);
        }
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.lock().waiting.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code that can panic runs under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leaves the list when dropped.
struct Place<'a> {
    waiters: &'a Waiters,
    key: (Lsn, u64),
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiters.lock().waiting.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    fn at(epoch: u64, lsn: u64) -> Position {
        Position {
            epoch: Epoch(epoch),
            lsn: Lsn(lsn),
        }
    }

    fn bare(lsn: u64) -> Target {
        Target {
            epoch: None,
            lsn: Lsn(lsn),
        }
    }

    #[tokio::test]
    async fn an_lsn_within_a_page_header_is_waited_for_in_vain() {
        let waiters = Waiters::default();
        waiters.advance(at(1, 0x2000));
        assert_eq!(
            waiters.wait(bare(0x2000 + 24)).await,
            Outcome::Reached(at(1, 0x2000))
        );
        assert!(poll(&mut Box::pin(waiters.wait(bare(0x2000 + 25)))).is_none());
    }

    #[test]
    fn a_text_that_is_no_position_is_waited_for() {
        assert_eq!("0/10".parse(), Ok(bare(16)));
        assert_eq!(
            "00c0ffee00c0ffee@1/0".parse(),
            Ok(Target {
                epoch: Some(Epoch(0x00c0_ffee_00c0_ffee)),
                lsn: Lsn(1 << 32)
            })
        );
        for text in ["", "16", "x/y", "@0/1", "1@0/1", "0/1 "] {
            let error = text.parse::<Target>().unwrap_err();
            assert!(error.contains("0/16B3748"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_commit_that_comes_while_registering_is_missed() {
        // Many waiters against a writer that never pauses: each must be woken, at or above its position.
        let waiters = Arc::new(Waiters::default());
        waiters.advance(at(1, 0));
        let writer = {
            let waiters = waiters.clone();
            std::thread::Builder::new()
                .name("writer".into())
                .spawn(move || (1..=50_000).for_each(|lsn| waiters.advance(at(1, lsn * 100))))
                .unwrap()
        };
        let all = async {
            let mut set = tokio::task::JoinSet::new();
            for i in 0..900u64 {
                let waiters = waiters.clone();
                set.spawn(async move { (i, waiters.wait(bare(i * 5_500)).await) });
            }
            while let Some(result) = set.join_next().await {
                let (i, outcome) = result.unwrap();
                let Outcome::Reached(position) = outcome else {
                    panic!("{outcome:?}")
                };
                assert!(
                    position.lsn >= Lsn(without_header(Lsn(i * 5_500))),
                    "{position}"
                );
            }
        };
        tokio::time::timeout(Duration::from_secs(30), all)
            .await
            .expect("nobody waits for ever");
        writer.join().unwrap();
        assert_eq!(waiters.count(), 0);
    }

    #[tokio::test]
    async fn a_position_of_another_history_is_taken_for_ours() {
        let waiters = Waiters::default();
        waiters.advance(at(1, 1_000));
        let other = Target {
            epoch: Some(Epoch(2)),
            lsn: Lsn(1),
        };
        assert_eq!(waiters.wait(other).await, Outcome::OtherEpoch(at(1, 1_000)));
        // One that was asked for in the old history is not reached by a number of the new one.
        let (outcome, ()) = tokio::join!(waiters.wait(bare(2_000)), async {
            waiters.advance(at(2, 5_000))
        });
        assert_eq!(outcome, Outcome::OtherEpoch(at(2, 5_000)));
        assert_eq!(waiters.wait(other).await, Outcome::Reached(at(2, 5_000)));
    }

    #[tokio::test]
    async fn waiting_before_the_first_commit_never_ends() {
        let waiters = Waiters::default();
        let both = async { tokio::join!(waiters.wait(bare(100)), waiters.wait(bare(300))) };
        let commits = async {
            waiters.advance(at(1, 150));
            tokio::task::yield_now().await;
            waiters.advance(at(1, 300));
        };
        let ((first, second), ()) = tokio::join!(both, commits);
        assert!(matches!(first, Outcome::Reached(position) if position.lsn >= Lsn(150)));
        assert_eq!(second, Outcome::Reached(at(1, 300)));
    }

    #[tokio::test]
    async fn waiters_that_gave_up_stay_in_the_list() {
        let waiters = Waiters::default();
        let mut waiting: Vec<_> = (0..WAITERS_MAX)
            .map(|_| Box::pin(waiters.wait(bare(100))))
            .collect();
        for wait in &mut waiting {
            assert!(poll(wait).is_none());
        }
        assert_eq!(waiters.wait(bare(100)).await, Outcome::Full);
        waiting.clear();
        assert_eq!(waiters.count(), 0);
        waiters.advance(at(1, 100));
        assert_eq!(waiters.wait(bare(100)).await, Outcome::Reached(at(1, 100)));
    }

    fn poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
