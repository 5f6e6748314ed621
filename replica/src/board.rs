//! The one place that the file's thread, the client and the HTTP interface share: what is known, who waits for it, what
//! changed, and what was counted. Writing to it never waits for a reader.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anabranch_proto::{Lsn, Position};
use tokio::sync::watch;

use crate::{
    changes::Changes,
    file::{Applied, Local, TableState, reaches},
    metrics::{Metrics, Sizes},
    status::{Status, now},
    wait::Waiters,
};

/// See the module.
#[derive(Debug)]
pub struct Board {
    status: watch::Sender<Status>,
    /// Those who wait for a position.
    pub waiters: Waiters,
    /// What changed lately.
    pub changes: Arc<Changes>,
    /// What was counted.
    pub metrics: Metrics,
    /// Bytes of messages that wait for the file.
    pub queue_bytes: AtomicUsize,
    /// Where local writes stand.
    pub local: watch::Sender<Local>,
}

/// What the last element of a message says about the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The position of the commit or heartbeat.
    pub position: Position,
    /// How far Postgres' WAL had come.
    pub source_lsn: Lsn,
    /// Whether the streamer has Postgres.
    pub source_connected: bool,
}

impl Board {
    /// Over a file that was just opened.
    pub fn new(
        replica_id: &str,
        position: Option<Position>,
        tables: Vec<TableState>,
        changes_bytes_max: usize,
    ) -> Self {
        let waiters = Waiters::default();
        if let Some(position) = position {
            waiters.advance(position);
        }
        Board {
            status: watch::Sender::new(Status {
                replica_id: replica_id.into(),
                position,
                tables: tables.into(),
                connected_changed: now(),
                ..Status::default()
            }),
            waiters,
            changes: Arc::new(Changes::new(changes_bytes_max, position)),
            metrics: Metrics::new(),
            queue_bytes: AtomicUsize::new(0),
            local: watch::Sender::default(),
        }
    }

    /// What is known now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// What is known, and a call when that changes.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The text for `/metrics`.
    pub fn render_metrics(&self) -> String {
        let sizes = Sizes {
            queue_bytes: self.queue_bytes.load(Ordering::Relaxed),
            waiters: self.waiters.count(),
            readers: self.changes.readers(),
        };
        self.metrics.render(&self.status(), now(), sizes)
    }

    /// A message was applied; `collected`: its changes are known. Changes go first, status and waiters together: who
    /// learns of the position in any way finds everything else in place.
    pub fn applied(
        &self,
        applied: &Applied,
        collected: bool,
        heard: Option<Heard>,
        tables: Option<Vec<TableState>>,
        took: Duration,
    ) {
        let metrics = &self.metrics;
        metrics.apply.observe(took.as_secs_f64());
        metrics.transactions.inc_by(applied.transactions);
        metrics.rows.inc_by(applied.rows);
        if !applied.locked.is_zero() {
            metrics.write_lock.observe(applied.locked.as_secs_f64());
        }
        let now = now();
        if applied.transactions > 0 && applied.commit_time != 0 {
            // The clocks are of two machines: ours may be behind.
            metrics.delayed(Duration::from_micros(
                now.saturating_sub(applied.commit_time).max(0) as u64,
            ));
        }
        if let Some(position) = applied.position {
            if collected || applied.transactions == 0 {
                self.changes.push(position, &applied.changes);
            } else {
                self.changes.skip(position);
            }
        }
        self.status.send_modify(|status| {
            status.write_lock_max = status.write_lock_max.max(applied.locked);
            status.transactions += applied.transactions;
            status.rows += applied.rows;
            if let Some(tables) = tables {
                status.tables = tables.into();
            }
            if let Some(position) = applied.position {
                status.position = Some(position);
                self.waiters.advance(position);
            }
            if applied.commit_time != 0 {
                status.commit_time = applied.commit_time;
                status.fresh_time = status.fresh_time.max(applied.commit_time);
            }
            if let Some(heard) = heard {
                status.received_time = now;
                // What was still queued of a stream that broke does not make it whole.
                if status.connected {
                    status.last_error = None;
                }
                status.commits += 1;
                status.source_connected = heard.source_connected;
                // The file writes a heartbeat's position a little later. Its content is that of the position already, so
                // nothing is missing; what is told as position stays what the file says.
                let is_ahead = status.position.is_some() && status.position != Some(heard.position);
                let is_complete = reaches(heard.position.lsn, heard.source_lsn);
                if !(is_ahead && is_complete) {
                    status.source_lsn = heard.source_lsn;
                }
                if is_complete && heard.source_connected {
                    status.fresh_time = now;
                }
            }
        });
    }

    /// The file wrote the position of a heartbeat that waited; or somebody put other content into it, of another
    /// position or of none.
    pub fn moved(&self, position: Option<Position>) {
        if let Some(position) = position {
            self.changes.push(position, &[]);
        }
        self.status.send_modify(|status| {
            status.position = position;
            match position {
                Some(position) => self.waiters.advance(position),
                None => self.waiters.forget(),
            }
        });
    }

    /// The streamer sent its first message on a stream. What an older stream said of the source says nothing of now.
    pub fn connected(&self) {
        self.metrics.streams.inc();
        self.status.send_modify(|status| {
            status.source_connected = false;
            status.source_lsn = Lsn(0);
            status.connected = true;
            status.connected_changed = now();
            status.streams += 1;
        });
    }

    /// There is no stream; why, if it is a trouble.
    pub fn disconnected(&self, why: Option<&str>) {
        self.status.send_modify(|status| {
            status.source_connected = false;
            if status.connected {
                status.connected = false;
                status.connected_changed = now();
            }
            if let Some(why) = why {
                status.last_error = Some(why.into());
            }
        });
    }

    /// Where local writes stand now.
    pub fn local_writes(&self, local: Local) {
        self.status.send_if_modified(|status| {
            let is_new = (status.pending, status.rejected) != (local.pending, local.rejected);
            (status.pending, status.rejected) = (local.pending, local.rejected);
            is_new
        });
        self.local.send_if_modified(|told| {
            let is_new = *told != local;
            *told = local;
            is_new
        });
    }

    /// The file has a new id.
    pub fn renamed(&self, replica_id: &str) {
        self.status
            .send_modify(|status| status.replica_id = replica_id.into());
    }

    /// Local writes can't be sent now, and why; `None`: they can, or there is no reason any more to say so.
    pub fn writes_wait(&self, why: Option<&str>) {
        let why: Option<Arc<str>> = why.map(|why| format!("local writes wait: {why}").into());
        self.status.send_if_modified(|status| {
            let is_new = status.writes_error != why;
            status.writes_error = why;
            is_new
        });
    }

    /// Something is wrong with the file.
    pub fn trouble(&self, why: &str) {
        self.status
            .send_modify(|status| status.last_error = Some(why.into()));
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Epoch;

    use super::*;

    #[tokio::test]
    async fn a_position_that_the_file_lost_is_not_told_any_more() {
        let at = Position {
            epoch: Epoch(7),
            lsn: Lsn(100),
        };
        let board = Board::new("r", Some(at), Vec::new(), 1_000);
        let target = "0/64".parse().unwrap();
        board.moved(None);
        assert_eq!(board.status().position, None);
        let mut waiting = std::pin::pin!(board.waiters.wait(target));
        std::future::poll_fn(|context| {
            assert!(waiting.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        board.moved(Some(at));
        assert_eq!(waiting.await, crate::wait::Outcome::Reached(at));
    }

    #[test]
    fn a_new_stream_is_not_up_to_date_by_what_the_last_one_said() {
        let at = |lsn| Position {
            epoch: Epoch(7),
            lsn: Lsn(lsn),
        };
        let heard = Heard {
            position: at(100),
            source_lsn: Lsn(100),
            source_connected: true,
        };
        let board = Board::new("r", Some(at(100)), Vec::new(), 1_000);
        let hear = || {
            board.applied(
                &Applied::default(),
                false,
                Some(heard),
                None,
                Duration::ZERO,
            )
        };
        let says = |expected: bool| {
            let status = board.status();
            // As if no time had passed.
            assert_eq!(
                status.caught_up_at(status.received_time),
                expected,
                "{status:?}"
            );
        };
        says(false);
        board.connected();
        says(false);
        hear();
        says(true);
        board.disconnected(Some("cut"));
        says(false);
        // What waited of it is applied after it ended.
        hear();
        says(false);
        board.connected();
        says(false);
        assert_eq!(board.status().source_lsn, Lsn(0));
        hear();
        says(true);
    }
}
