//! Numbers about the streamer, in the text format of Prometheus. None of them carries a row, a key or a parameter.

use std::sync::{Arc, atomic::AtomicI64, atomic::AtomicU64};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// All metrics.
pub struct Metrics {
    registry: Registry,
    /// Connected replicas.
    pub sessions: Gauge<i64, AtomicI64>,
    /// Calls of replicas that send local writes.
    pub writing: Gauge<i64, AtomicI64>,
    /// Local transactions that took effect.
    pub writes_applied: Counter<u64, AtomicU64>,
    /// Local transactions that were rejected.
    pub writes_rejected: Counter<u64, AtomicU64>,
    /// Replicas whose file got a new id.
    pub forks: Counter<u64, AtomicU64>,
    /// Calls refused because their subject makes too many.
    pub limited: Counter<u64, AtomicU64>,
    /// Connections to Postgres that were lost.
    pub disconnects: Counter<u64, AtomicU64>,
    /// Catch-ups of sessions from the mirror.
    pub catch_ups: Counter<u64, AtomicU64>,
    /// Bytes in all queues of sessions.
    pub queue_bytes: Gauge<i64, AtomicI64>,
    /// LSN confirmed to Postgres.
    pub confirmed_lsn: Gauge<i64, AtomicI64>,
    /// How far Postgres' WAL had come when last heard.
    pub source_lsn: Gauge<i64, AtomicI64>,
    /// Bytes of WAL that the slot held back when last looked at.
    pub wal_retained_bytes: Gauge<i64, AtomicI64>,
}

/// Counts a session as long as it lives.
pub struct Counted(Arc<Metrics>);

impl Metrics {
    /// All at zero.
    pub fn new() -> Arc<Metrics> {
        let mut registry = Registry::with_prefix("anabranch_streamer");
        let gauge = |registry: &mut Registry, name: &str, help: &str| {
            let gauge = Gauge::<i64, AtomicI64>::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::<u64, AtomicU64>::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let r = &mut registry;
        let sessions = gauge(r, "sessions", "Connected replicas");
        let writing = gauge(r, "writing", "Replicas that send local writes");
        let writes_applied = counter(
            r,
            "writes_applied",
            "Local transactions that took effect in Postgres",
        );
        let writes_rejected = counter(
            r,
            "writes_rejected",
            "Local transactions that were rejected",
        );
        let forks = counter(
            r,
            "forks",
            "Replicas that came with a new id: their file was restored from a backup, or copied",
        );
        let limited = counter(
            r,
            "limited",
            "Calls that were refused because their subject makes too many (auth.limits)",
        );
        let disconnects = counter(r, "disconnects", "Connections to Postgres that were lost");
        let catch_ups = counter(
            r,
            "catch_ups",
            "Times that a session was served from the mirror: it joined, or was too slow for its queue",
        );
        let queue_bytes = gauge(r, "queue_bytes", "Bytes in the queues of all sessions");
        let confirmed_lsn = gauge(r, "confirmed_lsn", "LSN confirmed to Postgres");
        let source_lsn = gauge(
            r,
            "source_lsn",
            "LSN that Postgres' WAL had reached when last heard",
        );
        let wal_retained_bytes = gauge(
            r,
            "wal_retained_bytes",
            "Bytes of WAL that the slot held back when last looked at",
        );
        Arc::new(Metrics {
            registry,
            sessions,
            writing,
            writes_applied,
            writes_rejected,
            forks,
            limited,
            disconnects,
            catch_ups,
            queue_bytes,
            confirmed_lsn,
            source_lsn,
            wal_retained_bytes,
        })
    }

    /// Counts a session until what it returns is dropped.
    pub fn session_started(self: &Arc<Self>) -> Counted {
        self.sessions.inc();
        Counted(self.clone())
    }

    /// As text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.sessions.dec();
    }
}
