//! How long to wait before another attempt.

use std::time::Duration;

use crate::config::Timing;

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The network, or a streamer that restarts: soon may help.
    Soon,
    /// Somebody must act first: a token, a claim, a shape, a config.
    Slow,
}

/// Counts attempts. The pause is random over its whole range ("full jitter"), so that replicas that lost the same
/// streamer do not all come back at the same moment.
#[derive(Debug)]
pub struct Retry {
    soon: (Duration, Duration),
    slow: (Duration, Duration),
    failures: u32,
}

impl Retry {
    /// No failure yet.
    pub fn new(timing: &Timing) -> Self {
        Retry {
            soon: timing.retry,
            slow: timing.slow_retry,
            failures: 0,
        }
    }

    /// Something went right.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Something went wrong; `random` is any number.
    pub fn pause(&mut self, pace: Pace, random: u64) -> Duration {
        let doubled = |least: Duration, most: Duration| {
            least.saturating_mul(1 << self.failures.min(20)).min(most)
        };
        let (from, to) = match pace {
            Pace::Soon => (Duration::ZERO, doubled(self.soon.0, self.soon.1)),
            Pace::Slow => (
                self.slow.0,
                doubled(self.slow.0.saturating_mul(2), self.slow.1),
            ),
        };
        self.failures = self.failures.saturating_add(1);
        let range = u64::try_from(to.saturating_sub(from).as_micros()).unwrap_or(u64::MAX);
        from + Duration::from_micros(random % range.saturating_add(1).max(1))
    }
}

/// What a streamer asks for is obeyed up to here: beyond, somebody is mistaken, and a replica must not stay away for that.
pub const PUSHBACK_MAX: Duration = Duration::from_secs(60);

/// The pause that a streamer asked for, and at random up to as long again: others were told the same.
pub fn pushed_back(asked: Duration, random: u64) -> Duration {
    let asked = asked.min(PUSHBACK_MAX);
    let range = u64::try_from(asked.as_micros()).unwrap_or(u64::MAX);
    asked + Duration::from_micros(random % range.saturating_add(1).max(1))
}

/// Any number, different on each machine and at each call.
pub fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1.rotate_left(8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pause_is_out_of_its_bounds(failures in 0u32..100, randoms in prop::collection::vec(any::<u64>(), 1..5)) {
            let mut retry = Retry::new(&Timing::default());
            retry.failures = failures;
            for random in randoms {
                prop_assert!(retry.pause(Pace::Soon, random) <= Duration::from_secs(5));
                let slow = retry.pause(Pace::Slow, random);
                prop_assert!(slow >= Duration::from_secs(15) && slow <= Duration::from_secs(60), "{slow:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_replica_comes_before_it_was_told_to_or_stays_away(asked_ms: u64, random: u64) {
            let asked = Duration::from_millis(asked_ms);
            let pause = pushed_back(asked, random);
            let obeyed = asked.min(PUSHBACK_MAX);
            prop_assert!(pause >= obeyed && pause <= 2 * obeyed, "{pause:?}");
        }
    }

    #[test]
    fn replicas_that_were_told_the_same_come_at_the_same_moment() {
        let asked = Duration::from_secs(2);
        let pauses = (0..64).map(|_| pushed_back(asked, random()));
        let pauses: std::collections::HashSet<_> = pauses.collect();
        assert!(pauses.len() > 32, "{pauses:?}");
    }

    #[test]
    fn replicas_come_back_all_at_once() {
        let mut retry = Retry::new(&Timing::default());
        assert!(retry.pause(Pace::Soon, u64::MAX) <= Duration::from_millis(100));
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let pause = (0..64).map(|_| {
                Retry {
                    failures: retry.failures,
                    ..Retry::new(&Timing::default())
                }
                .pause(Pace::Soon, random())
            });
            let pauses: std::collections::HashSet<_> = pause
                .inspect(|pause| longest = longest.max(*pause))
                .collect();
            assert!(pauses.len() > 32, "{pauses:?}");
            retry.pause(Pace::Soon, 0);
        }
        assert!(longest > Duration::from_secs(3), "{longest:?}");
        retry.reset();
        assert!(retry.pause(Pace::Soon, random()) <= Duration::from_millis(100));
    }
}
