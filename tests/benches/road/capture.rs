//! What the capture triggers cost a program that writes: the same statements on the same rows with and without them, nothing
//! else running.
//!
//! Two costs are told: of a row within a large transaction, which is that of the triggers alone, and of a transaction of one
//! row, which is what most programs do (`synchronous=NORMAL`, so that the disk does not hide it).

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anabranch_tests::peers::Replica;
use rusqlite::Connection;

use crate::{
    report::Report,
    writes::{ROWS, Writing},
};

/// Rows that each kind of statement is about, of those that the replica has or has not yet.
const COUNT: i64 = ROWS;

/// Each is measured as often; the median counts.
const TIMES: usize = 9;

/// Kinds of statements: their SQL, with the id as its parameter, and whether the row is there before.
const STATEMENTS: [(&str, &str, bool); 5] = [
    (
        "insert",
        "INSERT INTO items(id, owner, n, note) VALUES(?1, 0, 0, 'an item that is new')",
        false,
    ),
    ("update", "UPDATE items SET n = n + 1 WHERE id = ?1", true),
    (
        "upsert",
        "INSERT INTO items(id, owner, n, note) VALUES(?1, 0, 0, 'an item that is there')
         ON CONFLICT(id) DO UPDATE SET n = n + 1",
        true,
    ),
    (
        "replace",
        "INSERT OR REPLACE INTO items(id, owner, n, note) VALUES(?1, 0, 7, 'another item')",
        true,
    ),
    ("delete", "DELETE FROM items WHERE id = ?1", true),
];

/// X4.
pub async fn cost(writing: &Writing, report: &mut Report) {
    let replica = writing.replica(0).await;
    let directory = tempfile::tempdir().expect("a directory");
    let (with, without) = (
        directory.path().join("with.db"),
        directory.path().join("without.db"),
    );
    copy(&replica, &with);
    copy(&replica, &without);
    replica.terminate().await;
    writing.streamer.terminate().await;
    drop_triggers(&without);
    tokio::task::block_in_place(|| {
        for (name, sql, is_there) in STATEMENTS {
            let mut told = Vec::new();
            for together in [true, false] {
                let [with, without] =
                    [&with, &without].map(|file| median(file, sql, is_there, together));
                let micros = |took: Duration| took.as_secs_f64() * 1e6 / COUNT as f64;
                let (with, without) = (micros(with), micros(without));
                let what = if together {
                    "a row in one transaction"
                } else {
                    "a transaction of one row"
                };
                told.push(format!(
                    "{what} {with:.1} µs with, {without:.1} without: {:.1} ×",
                    with / without
                ));
            }
            report.note(format!("X4   {name}: {}", told.join("; ")));
        }
    });
}

/// The file as it is, without the sidecar.
fn copy(replica: &Replica, to: &Path) {
    let to = to.to_str().expect("a path of ours");
    let source = replica.open();
    source
        .execute("VACUUM INTO ?1", [to])
        .expect("copy the file");
}

fn drop_triggers(file: &Path) {
    let connection = Connection::open(file).expect("open the copy");
    let names: Vec<String> = connection
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'trigger'")
        .and_then(|mut names| names.query_map([], |row| row.get(0))?.collect())
        .expect("triggers");
    assert!(!names.is_empty(), "the tables are captured");
    for name in names {
        let name = name.replace('"', "\"\"");
        let drop = format!("DROP TRIGGER \"{name}\"");
        connection.execute(&drop, []).expect("drop a trigger");
    }
}

/// Each time from the same file.
fn median(file: &Path, sql: &str, is_there: bool, together: bool) -> Duration {
    let mut times: Vec<Duration> = (0..TIMES)
        .map(|_| once(file, sql, is_there, together))
        .collect();
    times.sort_unstable();
    times[TIMES / 2]
}

fn once(file: &Path, sql: &str, is_there: bool, together: bool) -> Duration {
    let directory = tempfile::tempdir().expect("a directory");
    let fresh = directory.path().join("fresh.db");
    std::fs::copy(file, &fresh).expect("copy the copy");
    let connection = Connection::open(&fresh).expect("open the copy");
    connection
        .execute_batch("PRAGMA journal_mode = wal; PRAGMA synchronous = normal")
        .expect("pragmas");
    let mut statement = connection.prepare(sql).expect("a statement");
    let first = if is_there { 0 } else { 1_000_000 };
    let began = Instant::now();
    if together {
        connection.execute_batch("BEGIN IMMEDIATE").expect("begin");
    }
    for id in first..first + COUNT {
        assert_eq!(statement.execute([id]).expect("write"), 1);
    }
    if together {
        connection.execute_batch("COMMIT").expect("commit");
    }
    began.elapsed()
}
