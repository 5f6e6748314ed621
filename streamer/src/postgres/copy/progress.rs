//! How far the copy of each table has come: for the log, and for `/status`. Reading it never waits on the copy.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// All tables that this process copies or has copied. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    tables: Arc<Mutex<Vec<Arc<Counters>>>>,
}

/// One table, as of now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `schema.name`.
    pub table: String,
    /// Rows read.
    pub rows: u64,
    /// What Postgres estimates that there are.
    pub rows_estimated: u64,
    /// Bytes read, as Postgres printed them.
    pub bytes: u64,
    /// Since its copy began; until its end, once it has ended.
    pub ms: u64,
    /// Everything was read.
    pub done: bool,
}

#[derive(Debug)]
pub(super) struct Counters {
    table: String,
    rows_estimated: u64,
    rows: AtomicU64,
    bytes: AtomicU64,
    began: Instant,
    /// 0 until its end.
    ended_ms: AtomicU64,
}

impl Progress {
    /// Each table, in the order of beginning.
    pub fn lines(&self) -> Vec<Line> {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.iter().map(|counters| counters.line()).collect()
    }

    pub(super) fn begin(&self, table: String, rows_estimated: u64) -> Arc<Counters> {
        let counters = Arc::new(Counters {
            table,
            rows_estimated,
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            began: Instant::now(),
            ended_ms: AtomicU64::new(0),
        });
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is copied again counts anew.
        tables.retain(|other| other.table != counters.table);
        tables.push(counters.clone());
        counters
    }
}

impl Counters {
    pub(super) fn add(&self, rows: u64, bytes: u64) {
        self.rows.fetch_add(rows, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn end(&self) {
        self.ended_ms.store(self.elapsed_ms().max(1), Relaxed);
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn line(&self) -> Line {
        let ended = self.ended_ms.load(Relaxed);
        Line {
            table: self.table.clone(),
            rows: self.rows.load(Relaxed),
            rows_estimated: self.rows_estimated,
            bytes: self.bytes.load(Relaxed),
            ms: if ended == 0 { self.elapsed_ms() } else { ended },
            done: ended != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_copied_again_counts_anew() {
        let progress = Progress::default();
        let first = progress.begin("public.a".into(), 10);
        first.add(3, 30);
        first.end();
        let line = &progress.lines()[0];
        assert_eq!((line.rows, line.bytes, line.done), (3, 30, true));
        assert!(line.ms > 0);
        progress.begin("public.b".into(), 0);
        progress.begin("public.a".into(), 20);
        let lines: Vec<_> = progress
            .lines()
            .into_iter()
            .map(|line| (line.table, line.rows, line.done))
            .collect();
        assert_eq!(
            lines,
            [("public.b".into(), 0, false), ("public.a".into(), 0, false)]
        );
    }
}
