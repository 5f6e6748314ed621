//! What is counted, for `/metrics` (OpenMetrics text).
//!
//! Counters and histograms are counted where things happen; gauges are taken from [`Status`] when somebody asks.

use std::{
    fmt,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::status::Status;

/// How a stream ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Cause {
    /// A gRPC status code in lower case, or `connect`, `silence`, `closed`, `file`.
    pub cause: &'static str,
}

/// All that is counted.
pub struct Metrics {
    registry: Registry,
    /// Messages received from the streamer.
    pub messages: Counter,
    /// Their bytes, unpacked.
    pub received_bytes: Counter,
    /// Transactions applied.
    pub transactions: Counter,
    /// Row operations applied.
    pub rows: Counter,
    /// Streams opened.
    pub streams: Counter,
    /// Streams and attempts that failed.
    pub failures: Family<Cause, Counter>,
    /// Times that a message had to be tried again on the file.
    pub file_retries: Counter,
    /// Times that the file got a new id.
    pub identities: Counter,
    /// How long a message took in the file.
    pub apply: Histogram,
    /// How long the write lock was held for a commit.
    pub write_lock: Histogram,
    /// From the commit in Postgres to the commit in the file.
    pub delay: Histogram,
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    connected: Gauge,
    caught_up: Gauge,
    ready: Gauge,
    position: Gauge<u64, AtomicU64>,
    source: Gauge<u64, AtomicU64>,
    lag: Gauge<f64, AtomicU64>,
    write_lock_max: Gauge<f64, AtomicU64>,
    queue: Gauge,
    waiters: Gauge,
    readers: Gauge,
    pending: Gauge,
    rejected: Gauge,
    stopped: Gauge,
}

/// Sizes that are known elsewhere than in [`Status`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// Bytes of messages that wait for the file.
    pub queue_bytes: usize,
    /// Requests to `/wait` that wait.
    pub waiters: usize,
    /// Readers of `/changes`.
    pub readers: usize,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.000_1, 3.0, 13));
        let mut registry = Registry::with_prefix("anabranch_replica");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "What runs", build);
        let metrics = Metrics {
            messages: Counter::default(),
            received_bytes: Counter::default(),
            transactions: Counter::default(),
            rows: Counter::default(),
            streams: Counter::default(),
            failures: Family::default(),
            file_retries: Counter::default(),
            identities: Counter::default(),
            apply: seconds(),
            write_lock: seconds(),
            delay: seconds(),
            asked: Mutex::default(),
            registry: Registry::default(),
        };
        registry.register(
            "messages",
            "Messages received from the streamer",
            metrics.messages.clone(),
        );
        registry.register_with_unit(
            "received",
            "Bytes of those messages, unpacked",
            Unit::Bytes,
            metrics.received_bytes.clone(),
        );
        registry.register(
            "transactions",
            "Transactions applied",
            metrics.transactions.clone(),
        );
        registry.register("rows", "Row operations applied", metrics.rows.clone());
        registry.register("streams", "Streams opened", metrics.streams.clone());
        registry.register(
            "failures",
            "Streams and attempts that failed",
            metrics.failures.clone(),
        );
        registry.register(
            "file_retries",
            "Messages tried again on the file",
            metrics.file_retries.clone(),
        );
        registry.register(
            "identities",
            "Times that the file got a new id: it was restored from a backup, or copied",
            metrics.identities.clone(),
        );
        registry.register_with_unit(
            "apply",
            "Time of a message in the file",
            Unit::Seconds,
            metrics.apply.clone(),
        );
        registry.register_with_unit(
            "write_lock",
            "Time that the write lock was held for a commit",
            Unit::Seconds,
            metrics.write_lock.clone(),
        );
        registry.register_with_unit(
            "commit_delay",
            "Time from the commit in Postgres, by its clock, to the commit in the file",
            Unit::Seconds,
            metrics.delay.clone(),
        );
        {
            let asked = metrics.asked.lock().unwrap_or_else(PoisonError::into_inner);
            registry.register(
                "connected",
                "1: the streamer is there",
                asked.connected.clone(),
            );
            registry.register(
                "caught_up",
                "1: the file has all that Postgres had as of the last heartbeat",
                asked.caught_up.clone(),
            );
            registry.register(
                "ready",
                "1: the file holds a complete commit",
                asked.ready.clone(),
            );
            registry.register_with_unit(
                "position",
                "LSN of the file's content",
                Unit::Bytes,
                asked.position.clone(),
            );
            registry.register_with_unit(
                "source_position",
                "LSN of Postgres as last heard",
                Unit::Bytes,
                asked.source.clone(),
            );
            registry.register_with_unit(
                "lag",
                "Age of the content; 0 when caught up, NaN when not known",
                Unit::Seconds,
                asked.lag.clone(),
            );
            registry.register_with_unit(
                "write_lock_max",
                "Longest time that the write lock was held",
                Unit::Seconds,
                asked.write_lock_max.clone(),
            );
            registry.register_with_unit(
                "queue",
                "Messages that wait for the file",
                Unit::Bytes,
                asked.queue.clone(),
            );
            registry.register(
                "waiters",
                "Requests to /wait that wait",
                asked.waiters.clone(),
            );
            registry.register(
                "changes_readers",
                "Readers of /changes",
                asked.readers.clone(),
            );
            registry.register(
                "pending_writes",
                "Local writes not yet answered",
                asked.pending.clone(),
            );
            registry.register(
                "rejected_writes",
                "Local writes that were rejected",
                asked.rejected.clone(),
            );
            registry.register(
                "stopped_tables",
                "Tables that are not followed",
                asked.stopped.clone(),
            );
        }
        Metrics {
            registry,
            ..metrics
        }
    }

    /// The text for `/metrics`.
    pub fn render(&self, status: &Status, now: i64, sizes: Sizes) -> String {
        // Held until the text is made, so that the gauges in it are of one moment.
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.connected.set(status.connected.into());
        asked.caught_up.set(status.caught_up_at(now).into());
        asked.ready.set(status.position.is_some().into());
        asked
            .position
            .set(status.position.map_or(0, |position| position.lsn.0));
        asked.source.set(status.source_lsn.0);
        asked
            .lag
            .set(status.lag(now).map_or(f64::NAN, |lag| lag.as_secs_f64()));
        asked
            .write_lock_max
            .set(status.write_lock_max.as_secs_f64());
        asked.queue.set(sizes.queue_bytes as i64);
        asked.waiters.set(sizes.waiters as i64);
        asked.readers.set(sizes.readers as i64);
        asked.pending.set(status.pending as i64);
        asked.rejected.set(status.rejected as i64);
        asked.stopped.set(
            status
                .tables
                .iter()
                .filter(|table| table.state == "stopped")
                .count() as i64,
        );
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// A stream ended.
    pub fn failed(&self, cause: &'static str) {
        self.failures.get_or_create(&Cause { cause }).inc();
    }

    /// A commit of Postgres is in the file, that long after it.
    pub fn delayed(&self, delay: Duration) {
        self.delay.observe(delay.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_missing_or_without_unit() {
        let metrics = Metrics::new();
        metrics.failed("silence");
        metrics.received_bytes.inc_by(5);
        let sizes = Sizes {
            queue_bytes: 7,
            waiters: 1,
            readers: 2,
        };
        let text = metrics.render(
            &Status {
                connected: true,
                ..Status::default()
            },
            0,
            sizes,
        );
        for line in [
            "anabranch_replica_build_info{version=",
            "anabranch_replica_received_bytes_total 5\n",
            "anabranch_replica_transactions_total 0\n",
            "anabranch_replica_failures_total{cause=\"silence\"} 1\n",
            "anabranch_replica_connected 1\n",
            "anabranch_replica_caught_up 0\n",
            "anabranch_replica_lag_seconds NaN\n",
            "anabranch_replica_queue_bytes 7\n",
            "anabranch_replica_changes_readers 2\n",
            "anabranch_replica_write_lock_max_seconds 0.0\n",
            "anabranch_replica_commit_delay_seconds_bucket{le=",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
