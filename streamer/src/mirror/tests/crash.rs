//! A real process that writes a mirror is killed, again and again, with nothing of it left but the files.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use anabranch_proto::{Epoch, Lsn, Position};
use rand::Rng;

use super::model::{Value, decode, encode, table};
use crate::{
    mirror::{Keys, Mirror, Settings},
    table::{Identity, Kind, Table},
    transaction::{Change, Chunk, End},
};

const DIRECTORY: &str = "ANABRANCH_TEST_CRASH_DIRECTORY";
const ROWS: i64 = 200;

fn settings(directory: &Path) -> Settings {
    Settings {
        directory: directory.into(),
        // Small, so that pages of open groups are in the log when it dies.
        cache_bytes: 1 << 16,
        reader_cache_bytes: 1 << 16,
        index_bytes_max: 1 << 20,
        index_hours_max: 24,
        row_bytes_max: 1 << 20,
    }
}

fn counters() -> Arc<Table> {
    table(
        1,
        &[
            ("id", Kind::Integer),
            ("n", Kind::Integer),
            ("pad", Kind::Text),
        ],
        &[0],
        Identity::Key,
    )
}

/// Which rows transaction `n` sets to `n`. Each twentieth is a large one.
fn sets(n: i64) -> std::ops::Range<i64> {
    if n % 20 == 0 {
        0..ROWS
    } else {
        n % ROWS..n % ROWS + 1
    }
}

fn transaction(table: &Arc<Table>, n: i64) -> Chunk {
    let pad = Value::Text("x".repeat(300));
    Chunk {
        changes: sets(n)
            .map(|id| Change::Update {
                table: table.clone(),
                old: None,
                new: encode(&[Value::Integer(id), Value::Integer(n), pad.clone()]),
                unchanged: Vec::new(),
            })
            .collect(),
        bytes: 0,
        first: true,
        commit_lsn: Lsn(n as u64 - 1),
        end: Some(End {
            lsn: Lsn(n as u64),
            commit_time: 0,
        }),
    }
}

/// What the killed process does: goes on from where the mirror is, and says what is durable.
fn write_for_ever(directory: &Path) -> ! {
    let mut mirror = Mirror::open(&settings(directory)).unwrap();
    let table = counters();
    let mut out = std::io::stdout();
    loop {
        let n = mirror.position().lsn.0 as i64 + 1;
        let chunk = transaction(&table, n);
        if n % 20 == 0 {
            mirror.apply_part(&chunk).unwrap();
            mirror.end_large(chunk.end.unwrap()).unwrap();
        } else {
            mirror.apply(&chunk).unwrap();
            if n % 7 == 0 {
                mirror.commit().unwrap();
            }
        }
        writeln!(out, "durable {}", mirror.durable().lsn.0).unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn a_kill_at_any_moment_leaves_whole_transactions_and_all_that_was_durable() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        write_for_ever(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = Mirror::open(&settings(directory.path())).unwrap();
    let table = counters();
    mirror.begin_copy(&table).unwrap();
    let pad = Value::Text("x".repeat(300));
    let rows: Vec<_> = (0..ROWS)
        .map(|id| encode(&[Value::Integer(id), Value::Integer(0), pad.clone()]))
        .collect();
    mirror.copy_rows(1, &rows).unwrap();
    mirror.end_copy(1, Lsn(0)).unwrap();
    mirror.begin_epoch(Epoch(1), None, Lsn(0)).unwrap();
    drop(mirror);

    for _ in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "mirror::tests::crash::a_kill_at_any_moment_leaves_whole_transactions_and_all_that_was_durable", "--nocapture"])
            .env(DIRECTORY, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut durable = 0;
        let lines = rand::rng().random_range(1..150);
        // The harness prints a line of its own, perhaps in front of the first of ours.
        let said = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        for lsn in said
            .filter_map(|line| line.split_once("durable ")?.1.parse().ok())
            .take(lines)
        {
            durable = lsn;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(durable > 0 || lines < 10, "it wrote nothing");

        let mirror = Mirror::open(&settings(directory.path())).unwrap();
        let at = mirror.position().lsn.0;
        assert!(at >= durable, "{at} is below {durable}, which was durable");
        let mut expected: BTreeMap<i64, i64> = (0..ROWS).map(|id| (id, 0)).collect();
        for n in 1..=at as i64 {
            expected.extend(sets(n).map(|id| (id, n)));
        }
        let mut reader = mirror.reader().unwrap();
        reader.begin().unwrap();
        let mut found = BTreeMap::new();
        reader
            .scan(
                1,
                Keys {
                    after: None,
                    upto: None,
                },
                |_, row| {
                    let [Value::Integer(id), Value::Integer(n), _] = decode(&row)[..] else {
                        panic!()
                    };
                    found.insert(id, n);
                    Ok(true)
                },
            )
            .unwrap();
        assert_eq!(found, expected, "as of {at}");
        // And the change index has each of the last transactions, whole.
        let last = reader.snapshot().unwrap().last;
        for back in 0..25.min(at as i64) {
            let n = at as i64 - back;
            let from = Position {
                epoch: Epoch(1),
                lsn: Lsn(n as u64 - 1),
            };
            if !reader.reaches(1, from).unwrap() {
                break;
            }
            let ordinal = reader.ordinal_at(Lsn(n as u64)).unwrap();
            assert_eq!(last - ordinal, back);
            let mut entries = 0;
            reader
                .changes_of(
                    &table,
                    ordinal - 1,
                    ordinal,
                    Keys {
                        after: None,
                        upto: None,
                    },
                    |_, old| {
                        assert!(old.is_some());
                        entries += 1;
                        Ok(true)
                    },
                )
                .unwrap();
            assert_eq!(entries, sets(n).count());
        }
        let check: String = mirror
            .sqlite
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(check, "ok");
    }
}
