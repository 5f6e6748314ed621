//! What one machine can do at all.

use std::time::{Duration, Instant};

use anabranch_tests::postgres::Database;

use crate::lab::Lab;

/// COPY of the table to nowhere.
pub async fn copy_out(lab: &Lab) -> Duration {
    let began = Instant::now();
    let arguments = ["-qc", "COPY events TO STDOUT", "-o", "/dev/null"];
    lab.source
        .tool("psql", lab.database.name(), &arguments)
        .await;
    began.elapsed()
}

/// `pg_recvlogical`: a backlog decoded and sent to nowhere.
pub struct Drain {
    pub name: &'static str,
    slot: &'static str,
    /// Large transactions are sent while they are decoded.
    streaming: &'static str,
    /// `logical_decoding_work_mem`.
    memory: &'static str,
}

/// As native replication has it by default, as we ask for it, and as a client may at most.
pub const DRAINS: [Drain; 3] = [
    Drain {
        name: "limit: pg_recvlogical to nowhere",
        slot: "drain_default",
        streaming: "streaming=off",
        memory: "64MB",
    },
    Drain {
        name: "limit: the same with 256 MB",
        slot: "drain_large",
        streaming: "streaming=off",
        memory: "256MB",
    },
    Drain {
        name: "limit: the same, streaming=on",
        slot: "drain_streaming",
        streaming: "streaming=on",
        memory: "256MB",
    },
];

impl Drain {
    /// Before the backlog comes to be.
    pub async fn create(&self, database: &Database) {
        database
            .execute(&format!(
                "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')",
                self.slot
            ))
            .await;
    }

    /// Takes the backlog of a publication, and drops the slot.
    pub async fn drain(&self, lab: &Lab, database: &Database, publication: &str) -> Duration {
        let end = database.lsn().await.to_string();
        let connection = format!(
            "--dbname=dbname={} options='-c logical_decoding_work_mem={}'",
            database.name(),
            self.memory
        );
        let publication = format!("publication_names={publication}");
        let slot = format!("--slot={}", self.slot);
        let began = Instant::now();
        let arguments = [
            &connection,
            &slot,
            "--start",
            "--no-loop",
            "--file=/dev/null",
            "--endpos",
            &end,
            "-o",
            "proto_version=2",
            "-o",
            &publication,
            "-o",
            self.streaming,
        ];
        lab.source
            .tool("pg_recvlogical", database.name(), &arguments)
            .await;
        let took = began.elapsed();
        database
            .execute(&format!("SELECT pg_drop_replication_slot('{}')", self.slot))
            .await;
        took
    }
}

/// A bare loop of a prepared INSERT of rows like those of the table, in one transaction.
pub fn sqlite_inserts(rows: u64) -> Duration {
    let directory = tempfile::tempdir().expect("a directory");
    let sqlite = rusqlite::Connection::open(directory.path().join("bare.db")).expect("open");
    sqlite
        .execute_batch(
            "PRAGMA journal_mode = wal; PRAGMA synchronous = normal; PRAGMA cache_size = -262144;
             CREATE TABLE events (id INTEGER PRIMARY KEY, org_id INTEGER, kind TEXT, payload TEXT,
               amount TEXT, ok INTEGER, created_at TEXT, tag TEXT) STRICT",
        )
        .expect("a table");
    let payload = "x".repeat(120);
    let began = Instant::now();
    sqlite.execute_batch("BEGIN").expect("begin");
    let mut insert = sqlite
        .prepare("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")
        .expect("a statement");
    for id in 0..rows as i64 {
        let values = rusqlite::params![
            id,
            id % 1000,
            "kind-11",
            payload,
            "1234.56",
            id % 2,
            "2024-01-01 00:00:00.000000Z",
            "01234567-89ab-cdef-0123-456789abcdef"
        ];
        insert.execute(values).expect("insert");
    }
    drop(insert);
    sqlite.execute_batch("COMMIT").expect("commit");
    began.elapsed()
}
