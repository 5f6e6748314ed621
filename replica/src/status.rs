//! What the sidecar knows of itself, in memory: for `/status`, `/metrics` and the program that embeds it.
//!
//! It is written by the file's thread after each commit and by the client as the connection comes and goes, and read
//! without asking either: a status report never waits for a consumer, a disk or a lock.

use std::{sync::Arc, time::Duration};

use anabranch_proto::{Lsn, Position};
use serde_json::{Value, json};

use crate::file::{HEARD_AGE_MAX, TableState, reaches};

/// One moment.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The replica's id, made with the file.
    pub replica_id: Arc<str>,
    /// What the file's content is; `None` before the first complete commit.
    pub position: Option<Position>,
    /// When Postgres committed the last transaction that was applied, in µs since 1970; 0: not known.
    pub commit_time: i64,
    /// When the last commit or heartbeat was applied here, in µs since 1970; 0: not since the start.
    pub received_time: i64,
    /// How far Postgres' WAL had come, as the streamer last said.
    pub source_lsn: Lsn,
    /// Whether the streamer has Postgres.
    pub source_connected: bool,
    /// Whether we have the streamer: true from its first message on.
    pub connected: bool,
    /// Since when `connected` is what it is, in µs since 1970.
    pub connected_changed: i64,
    /// When the content was last known to be all there is, in µs since 1970; 0: not known.
    pub fresh_time: i64,
    /// Local writes not yet answered.
    pub pending: u64,
    /// Local writes that were rejected.
    pub rejected: u64,
    /// What last went wrong, until something goes right again.
    pub last_error: Option<Arc<str>>,
    /// Why local writes wait, until they don't.
    pub writes_error: Option<Arc<str>>,
    /// The tables of the file.
    pub tables: Arc<[TableState]>,
    /// Transactions applied since the start.
    pub transactions: u64,
    /// Row operations applied since the start.
    pub rows: u64,
    /// Commits to the file since the start, those of heartbeats included.
    pub commits: u64,
    /// Streams opened since the start.
    pub streams: u64,
    /// The longest that the write lock was held at once since the start.
    pub write_lock_max: Duration,
}

impl Status {
    /// Whether the file holds all that Postgres had committed as of the last heartbeat, and heartbeats still come.
    pub fn caught_up(&self) -> bool {
        self.caught_up_at(now())
    }

    /// The same at a time, in µs since 1970: what was heard of the source too long ago says nothing of it now.
    pub fn caught_up_at(&self, now: i64) -> bool {
        let age = Duration::from_micros(now.abs_diff(self.received_time));
        self.connected
            && self.source_connected
            && age <= HEARD_AGE_MAX
            && self
                .position
                .is_some_and(|position| reaches(position.lsn, self.source_lsn))
    }

    /// How old the content may be: zero when caught up, `None` when not known.
    pub fn lag(&self, now: i64) -> Option<Duration> {
        if self.caught_up_at(now) {
            Some(Duration::ZERO)
        } else {
            (self.fresh_time != 0)
                .then(|| Duration::from_micros(now.saturating_sub(self.fresh_time).max(0) as u64))
        }
    }

    /// What last went wrong: of the stream, or else of local writes.
    pub fn trouble(&self) -> Option<Arc<str>> {
        self.last_error
            .as_ref()
            .or(self.writes_error.as_ref())
            .cloned()
    }

    /// As `/status` tells it.
    pub fn to_json(&self, now: i64, streamer: &str, database: &str) -> Value {
        json!({
            "replica_id": &*self.replica_id,
            "version": env!("CARGO_PKG_VERSION"),
            "streamer": streamer,
            "database": database,
            "position": self.position.map(|position| position.to_string()),
            "epoch": self.position.map(|position| position.epoch.to_string()),
            "lsn": self.position.map(|position| position.lsn.to_string()),
            "commit_time": time_text(self.commit_time),
            "received_time": time_text(self.received_time),
            "connected": self.connected,
            "connected_changed": time_text(self.connected_changed),
            "source_connected": self.connected && self.source_connected,
            "source_lsn": (self.source_lsn != Lsn(0)).then(|| self.source_lsn.to_string()),
            "caught_up": self.caught_up_at(now),
            "lag_ms": self.lag(now).map(|lag| lag.as_millis() as u64),
            "pending": self.pending,
            "rejected": self.rejected,
            "last_error": self.trouble().as_deref(),
            "tables": self.tables.iter().map(|table| json!({
                "table": table.name,
                "state": table.state,
                "reason": table.reason,
                "lsn": match (table.state.as_str(), self.position) {
                    ("live", Some(position)) => Some(position.lsn.to_string()),
                    _ => table.lsn.clone(),
                },
            })).collect::<Vec<_>>(),
            "transactions": self.transactions,
            "rows": self.rows,
            "streams": self.streams,
            "write_lock_max_ms": self.write_lock_max.as_micros() as f64 / 1_000.0,
        })
    }
}

/// Microseconds since 1970, now.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

fn time_text(micros: i64) -> Option<String> {
    (micros != 0)
        .then(|| {
            jiff::Timestamp::from_microsecond(micros)
                .ok()
                .map(|time| time.to_string())
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Epoch;

    use super::*;

    fn status() -> Status {
        Status {
            position: Some(Position {
                epoch: Epoch(7),
                lsn: Lsn(100),
            }),
            source_lsn: Lsn(100),
            source_connected: true,
            connected: true,
            fresh_time: 1_000_000,
            received_time: 1_000_000,
            ..Status::default()
        }
    }

    #[test]
    fn up_to_date_is_not_said_of_a_source_that_is_not_heard_any_more() {
        let heard = status().received_time;
        let max = HEARD_AGE_MAX.as_micros() as i64;
        for (now, expected) in [
            (heard, true),
            (heard + max, true),
            (heard + max + 1, false),
            // The clock was set back: nobody knows when that was.
            (heard - max - 1, false),
        ] {
            assert_eq!(status().caught_up_at(now), expected, "{now}");
            let json = status().to_json(now, "http://x", "y.db");
            assert_eq!(json["caught_up"], expected, "{now}");
        }
        assert_eq!(
            status().lag(heard + max + 1),
            Some(HEARD_AGE_MAX + Duration::from_micros(1))
        );
    }

    #[test]
    fn up_to_date_is_said_when_it_is_not() {
        assert!(status().caught_up_at(1_000_000));
        for stale in [
            Status {
                connected: false,
                ..status()
            },
            Status {
                source_connected: false,
                ..status()
            },
            Status {
                source_lsn: Lsn(101),
                ..status()
            },
            Status {
                position: None,
                ..status()
            },
            Status::default(),
        ] {
            assert!(!stale.caught_up_at(1_000_000), "{stale:?}");
            assert_ne!(stale.lag(3_000_000), Some(Duration::ZERO), "{stale:?}");
        }
        assert_eq!(status().lag(3_000_000), Some(Duration::ZERO));
    }

    #[test]
    fn lag_is_wrong_while_cut_off() {
        let cut = Status {
            connected: false,
            ..status()
        };
        assert_eq!(cut.lag(3_500_000), Some(Duration::from_millis(2_500)));
        // The clock of the source may be ahead of ours.
        assert_eq!(cut.lag(500_000), Some(Duration::ZERO));
        assert_eq!(Status::default().lag(3_500_000), None);
    }

    #[test]
    fn status_shows_times_and_positions_that_are_not_known() {
        let json = Status::default().to_json(5, "http://x", "y.db");
        for key in [
            "position",
            "epoch",
            "lsn",
            "commit_time",
            "received_time",
            "source_lsn",
            "lag_ms",
            "last_error",
        ] {
            assert_eq!(json[key], Value::Null, "{key}");
        }
        let known = Status {
            commit_time: 1_700_000_000_123_456,
            ..status()
        }
        .to_json(5, "http://x", "y.db");
        assert_eq!(known["position"], "0000000000000007@0/64");
        assert_eq!(known["commit_time"], "2023-11-14T22:13:20.123456Z");
    }
}
