//! When commits of the file are worth gathering.
//!
//! From so many local transactions without an answer on the file is *crowded*. A commit of the file for each answer, and another
//! for each write, would be most of the work then: commits that come within some time are applied together, and the WAL is
//! looked at no more often. That time is a part of what answers take anyway, so nobody notices.

use std::time::{Duration, Instant};

/// So many are a crowd.
pub const CROWD: u64 = 128;

/// The part of the time that an answer takes.
const PART: u32 = 8;

/// What that time is taken for until there was an answer: about what a hundred take together.
const FIRST: Duration = Duration::from_millis(400);

/// The longest. More hardly saves anything, and changes that come from elsewhere wait for as long.
const GATHER_MAX: Duration = Duration::from_millis(250);

/// Local transactions without an answer, and what answers take.
pub struct Crowd {
    /// A local transaction that has no answer, and when it was seen first.
    probe: Option<(u64, Instant)>,
    /// How long the last one of them had to wait.
    took: Duration,
}

impl Default for Crowd {
    fn default() -> Self {
        Crowd {
            probe: None,
            took: FIRST,
        }
    }
}

impl Crowd {
    /// How long commits are gathered at `now`, when the last local transactions are these; `None`: the file is not crowded.
    pub fn gathers_for(&mut self, assigned: u64, answered: u64, now: Instant) -> Option<Duration> {
        if let Some((probe, since)) = self.probe
            && answered >= probe
        {
            self.took = now.saturating_duration_since(since);
            self.probe = None;
        }
        if assigned > answered {
            self.probe.get_or_insert((assigned, now));
        }
        let unanswered = assigned.saturating_sub(answered);
        (unanswered >= CROWD).then(|| (self.took / PART).min(GATHER_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_wait_for_nothing_and_many_for_a_part_of_what_they_wait_anyway() {
        let (mut crowd, began) = (Crowd::default(), Instant::now());
        let after = |millis| began + Duration::from_millis(millis);
        assert_eq!(crowd.gathers_for(CROWD - 1, 0, after(0)), None);
        // How long it takes is not known yet.
        let gathers = crowd.gathers_for(CROWD, 0, after(100));
        assert_eq!(gathers, Some(FIRST / PART));
        let gathers = crowd.gathers_for(3 * CROWD, CROWD, after(800));
        assert_eq!(gathers, Some(Duration::from_millis(100)));
        // The next was seen then.
        let gathers = crowd.gathers_for(5 * CROWD, 3 * CROWD, after(880));
        assert_eq!(gathers, Some(Duration::from_millis(10)));
        let gathers = crowd.gathers_for(9 * CROWD, 6 * CROWD, after(1_000_000));
        assert_eq!(gathers, Some(GATHER_MAX));
        assert_eq!(
            crowd.gathers_for(9 * CROWD, 9 * CROWD, after(1_000_001)),
            None
        );
    }
}
