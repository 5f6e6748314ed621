//! What one machine can do at all.

use std::time::{Duration, Instant};

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

/// The backlog of the slot `drain`, decoded and sent to nowhere; the slot is dropped.
pub async fn drain(lab: &Lab, streaming: bool) -> Duration {
    let end = lab.database.lsn().await.to_string();
    let streaming = if streaming {
        "streaming=on"
    } else {
        "streaming=off"
    };
    let name = format!("--dbname={}", lab.database.name());
    let began = Instant::now();
    let arguments = [
        &name,
        "--slot=drain",
        "--start",
        "--no-loop",
        "--file=/dev/null",
        "--endpos",
        &end,
        "-o",
        "proto_version=2",
        "-o",
        "publication_names=bench",
        "-o",
        streaming,
    ];
    lab.source
        .tool("pg_recvlogical", lab.database.name(), &arguments)
        .await;
    let took = began.elapsed();
    lab.database
        .execute("SELECT pg_drop_replication_slot('drain')")
        .await;
    took
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
