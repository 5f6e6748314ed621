//! How many may wait for their catch-up at once. Who is too many is told when to come back.
//!
//! Replicas that lost the same streamer come back all at once. Those that wait here each hold a connection and a session;
//! beyond some number they had better wait where they are. Each that is refused gets a time of its own, one after the other,
//! so that they come back spread over the time that serving them takes, not all at once again.
//!
//! Only who waits for the *streamer* counts. One that is served, and takes its time to receive, keeps nobody out.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Who waits at most: about two seconds of them, where each has to be served by itself.
pub const WAITING_MAX: usize = 1_000;

/// No refused one comes back sooner.
const PUSHBACK_MIN: Duration = Duration::from_millis(500);

/// What is told at most. Who then finds the line full is told again.
const PUSHBACK_MAX: Duration = Duration::from_secs(30);

/// Between one refused one and the next.
const SPACING: Duration = Duration::from_millis(2);

/// The line.
pub struct Admission {
    waiting: AtomicUsize,
    waiting_max: usize,
    /// When the next refused one may come back.
    next: Mutex<Option<Instant>>,
}

/// Waits in the line until this is dropped.
pub struct Admitted(Arc<Admission>);

impl Admission {
    /// Nobody waits.
    pub fn new(waiting_max: usize) -> Arc<Admission> {
        Arc::new(Admission {
            waiting: AtomicUsize::new(0),
            waiting_max,
            next: Mutex::new(None),
        })
    }

    /// Joins the line, or is told after how long to come back.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Result<Admitted, Duration> {
        let admitted = Admitted(self.clone());
        if self.waiting.fetch_add(1, Ordering::Relaxed) < self.waiting_max {
            return Ok(admitted);
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let soonest = now + PUSHBACK_MIN;
        let at = next.map_or(soonest, |next| next.clamp(soonest, now + PUSHBACK_MAX));
        *next = Some(at + SPACING);
        Err(at - now)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_are_too_many_wait_as_well_or_come_back_all_at_once() {
        let (admission, now) = (Admission::new(3), Instant::now());
        let admitted: Vec<_> = (0..3).map(|_| admission.enter(now)).collect();
        assert!(admitted.iter().all(Result::is_ok));
        let refused: Vec<_> = (0..2_000).map(|_| admission.enter(now).err()).collect();
        let refused: Vec<_> = refused.into_iter().map(Option::unwrap).collect();
        assert_eq!(refused[0], PUSHBACK_MIN);
        assert!(refused.windows(2).all(|two| two[1] == two[0] + SPACING));
        drop(admitted);
        // Who was refused has left nothing behind.
        assert!((0..3).map(|_| admission.enter(now)).all(|one| one.is_ok()));
    }

    #[test]
    fn one_is_told_to_stay_away_for_ever() {
        let (admission, now) = (Admission::new(0), Instant::now());
        let longest = (0..100_000)
            .filter_map(|_| admission.enter(now).err())
            .max();
        assert_eq!(longest, Some(PUSHBACK_MAX));
        let later = now + 2 * PUSHBACK_MAX;
        assert_eq!(admission.enter(later).err(), Some(PUSHBACK_MIN));
    }
}
