//! How long answered writes are kept.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anabranch_proto::{Lsn, Position};

/// Answered writes are kept as long as this: should Postgres lose them with a failover, they are sent again.
const ANSWERED_KEPT: Duration = Duration::from_secs(3_600);

/// How often the position is noted for that.
const NOTE_EVERY: Duration = Duration::from_secs(60);

/// Where the file was at some moments of the last [`ANSWERED_KEPT`].
#[derive(Debug, Default)]
pub(super) struct Noted(VecDeque<(Instant, Position)>);

impl Noted {
    /// Notes where the file is; up to where answered writes may be forgotten: where it was long enough ago. LSNs of another
    /// history say nothing about this one: a promoted standby's are lower than what was noted before.
    pub(super) fn forgettable(&mut self, now: Instant, position: Option<Position>) -> Option<Lsn> {
        let position = position?;
        let newest = self.0.back().copied();
        if newest.is_some_and(|(_, noted)| noted.epoch != position.epoch) {
            self.0.clear();
        }
        if self
            .0
            .back()
            .is_none_or(|(noted, _)| now - *noted >= NOTE_EVERY)
        {
            self.0.push_back((now, position));
        }
        let mut forget = None;
        while let Some((noted, position)) = self.0.front().copied()
            && now - noted >= ANSWERED_KEPT
        {
            self.0.pop_front();
            forget = Some(position.lsn);
        }
        forget
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Epoch;

    use super::*;

    fn at(epoch: u64, lsn: u64) -> Option<Position> {
        Some(Position {
            epoch: Epoch(epoch),
            lsn: Lsn(lsn),
        })
    }

    #[test]
    fn answers_are_forgotten_before_their_time() {
        let mut noted = Noted::default();
        let start = Instant::now();
        for minute in 0..60 {
            let now = start + minute * NOTE_EVERY;
            assert_eq!(noted.forgettable(now, at(1, 100 + u64::from(minute))), None);
        }
        let now = start + ANSWERED_KEPT;
        assert_eq!(noted.forgettable(now, at(1, 500)), Some(Lsn(100)));
        assert_eq!(noted.forgettable(now, at(1, 500)), None);
    }

    #[test]
    fn answers_after_a_failover_are_judged_by_positions_from_before() {
        let mut noted = Noted::default();
        let start = Instant::now();
        assert_eq!(noted.forgettable(start, at(1, 9_000)), None);
        assert_eq!(noted.forgettable(start + NOTE_EVERY, at(2, 500)), None);
        let later = start + ANSWERED_KEPT;
        assert_eq!(noted.forgettable(later, at(2, 600)), None);
        let later = later + NOTE_EVERY;
        assert_eq!(noted.forgettable(later, at(2, 700)), Some(Lsn(500)));
    }
}
