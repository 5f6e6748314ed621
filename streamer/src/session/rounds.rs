//! Room for what catch-ups have filled and connections have not taken yet.
//!
//! A replica that does not read keeps a round in memory for as long as it likes, and there may be thousands of them. So rounds
//! are as large as is good for speed while there is room, and ever smaller as it gets short: each gets half of what is left,
//! and never less than [`ROUND_BYTES_MIN`], so that nobody waits for those who are slow.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Bytes of one round of a catch-up, about: as much as is worth a snapshot, and sent in well below a second.
pub const ROUND_BYTES: usize = 1024 * 1024;

/// The least. A thousand slow replicas with a round of this take what sixteen take of [`ROUND_BYTES`].
pub const ROUND_BYTES_MIN: usize = 16 * 1024;

/// Of all sessions.
pub struct Rounds {
    held: AtomicUsize,
    bytes_max: usize,
}

/// Room for one round, given back when this is dropped: when its messages are on their way.
pub struct Room {
    rounds: Arc<Rounds>,
    bytes: usize,
}

impl Rounds {
    /// All rounds together hold as much, and [`ROUND_BYTES_MIN`] for each beyond.
    pub fn new(bytes_max: usize) -> Arc<Rounds> {
        Arc::new(Rounds {
            held: AtomicUsize::new(0),
            bytes_max,
        })
    }

    /// Room for a round.
    pub fn take(self: &Arc<Self>) -> Room {
        self.room(self.reserve(1, ROUND_BYTES))
    }

    /// Room for rounds that are filled at once, for each the same. `bytes_max`: together.
    pub fn take_many(self: &Arc<Self>, count: usize, bytes_max: usize) -> Vec<Room> {
        let bytes = self.reserve(count, bytes_max);
        (0..count).map(|_| self.room(bytes)).collect()
    }

    /// The bytes of each.
    fn reserve(&self, count: usize, bytes_max: usize) -> usize {
        let mut bytes = 0;
        let more = |held: usize| {
            bytes = self.share(held, count).min(bytes_max / count.max(1));
            Some(held + bytes * count)
        };
        let _ = (self.held).fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        bytes
    }

    fn share(&self, held: usize, count: usize) -> usize {
        let left = self.bytes_max.saturating_sub(held) / 2;
        (left / count.max(1)).clamp(ROUND_BYTES_MIN, ROUND_BYTES)
    }

    fn room(self: &Arc<Self>, bytes: usize) -> Room {
        Room {
            rounds: self.clone(),
            bytes,
        }
    }
}

impl Room {
    /// How much may be filled.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Rounds are smaller than they should be: this one is to be over before the next is filled.
    pub fn is_short(&self) -> bool {
        self.bytes < ROUND_BYTES
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.rounds.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_gets_all_that_is_good_and_nobody_gets_nothing() {
        let rounds = Rounds::new(16 * ROUND_BYTES);
        let first = rounds.take();
        assert_eq!(first.bytes(), ROUND_BYTES);
        assert!(!first.is_short());
        let slow: Vec<Room> = (0..2_000).map(|_| rounds.take()).collect();
        assert!(slow.iter().all(|room| room.bytes() >= ROUND_BYTES_MIN));
        assert!(slow.last().unwrap().is_short());
        let held: usize = slow.iter().map(Room::bytes).sum();
        assert!(held <= 16 * ROUND_BYTES + 2_000 * ROUND_BYTES_MIN, "{held}");
        drop((first, slow));
        assert_eq!(rounds.held.load(Ordering::Relaxed), 0);
        assert_eq!(rounds.take().bytes(), ROUND_BYTES);
    }

    #[test]
    fn those_that_are_filled_at_once_share() {
        let rounds = Rounds::new(16 * ROUND_BYTES);
        let together = rounds.take_many(100, 4 * ROUND_BYTES);
        assert!(
            together
                .iter()
                .all(|room| room.bytes() == 4 * ROUND_BYTES / 100)
        );
        assert!(rounds.take_many(0, ROUND_BYTES).is_empty());
        drop(together);
        assert_eq!(rounds.held.load(Ordering::Relaxed), 0);
    }
}
