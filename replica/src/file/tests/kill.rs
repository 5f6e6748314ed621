//! Killed at any moment, the file is as of one commit, and opens again without help.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    thread,
};

use super::*;

const CHILD: &str = "ANABRANCH_TEST_KILLED_CHILD";

/// What `t` holds as of `lsn`: transaction n writes n into some rows, and deletes one.
fn content(lsn: u64) -> BTreeMap<i64, u64> {
    let mut rows = BTreeMap::new();
    for n in 1..=lsn {
        for op in ops_of(n) {
            match op {
                (id, Some(v)) => rows.insert(id, v),
                (id, None) => rows.remove(&id),
            };
        }
    }
    rows
}

fn ops_of(n: u64) -> Vec<(i64, Option<u64>)> {
    let id = |i: u64| ((n * 31 + i * 17) % 97) as i64;
    (0..5).map(|i| (id(i), (i > 0).then_some(n))).collect()
}

fn payload(v: u64) -> String {
    format!("{v} ").repeat(1 + v as usize % 200)
}

fn packed_ops(ops: &[(i64, Option<u64>)]) -> Bytes {
    let mut all = BytesMut::new();
    for &(id, v) in ops {
        match v {
            Some(v) => {
                all.extend_from_slice(&packed(&[&[I(id), I(v as i64), T(&payload(v))]], &[]))
            }
            None => all.extend_from_slice(&packed(&[], &[&[I(id)]])),
        }
    }
    all.freeze()
}

fn tables(with_u: bool) -> Vec<v1::Element> {
    let columns = &[("id", Integer, 1), ("v", Integer, 0), ("p", Text, 0)];
    let mut tables = vec![with_index(table(1, "t", columns), "by_v", &[1])];
    if with_u {
        tables.push(simple(2, "u"));
    }
    tables
}

/// Both tables speak of the same transaction.
fn last(n: u64) -> v1::Element {
    upserts(2, &[&[I(1), T(&n.to_string())]])
}

fn say(what: &str) {
    println!("{what}");
}

/// Runs in a process of its own until it is killed: streams of transactions, and resets, one message after the other.
#[test]
fn child() {
    let Ok(path) = env::var(CHILD) else { return };
    let mut settings = settings(Path::new(&path));
    settings.hold_bytes_max = 2_000;
    let mut file = File::open(&settings).unwrap();
    let give = |file: &mut File, elements: Vec<v1::Element>| {
        file.apply(&down(elements)).unwrap();
        say("message");
    };
    loop {
        file.begin_stream().unwrap();
        let lsn = file.position().map_or(0, |position| position.lsn.0);
        // In full, in small messages, as of some transactions later.
        let to = lsn + 3;
        let rows_now = content(to);
        give(&mut file, vec![first(&[1, 2])]);
        give(&mut file, tables(true));
        for (&id, &v) in &rows_now {
            // Some keys come twice.
            let ops = packed_ops(&[(id, Some(v / 2)), (id, Some(v))]);
            give(&mut file, vec![rows(1, ops.slice(..7), true)]);
            give(&mut file, vec![rows(1, ops.slice(7..), false)]);
        }
        give(&mut file, vec![last(to), commit(to)]);
        // Then transactions, cut anywhere.
        let mut n = to;
        for _ in 0..30 {
            let mut elements = vec![];
            for _ in 0..1 + n % 3 {
                n += 1;
                elements.push(begin(&[]));
                elements.push(rows(1, packed_ops(&ops_of(n)), false));
                if n.is_multiple_of(2) {
                    give(&mut file, std::mem::take(&mut elements));
                }
                elements.push(last(n));
                elements.push(commit(n));
            }
            give(&mut file, elements);
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_file_as_of_one_commit() {
    let folder = Folder::new();
    let seed = super::model::seed();
    println!("ANABRANCH_SEED={seed}");
    let mut random = super::model::Random(seed);
    let mut before = 0;
    for round in 0..60 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "file::tests::kill::child", "--nocapture"])
            .env(CHILD, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..random.below(400) {
            lines.next().expect("the child ended").unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if !folder.path().exists() {
            continue;
        }
        // As any program sees it.
        let connection = Connection::open(folder.path()).unwrap();
        connection.execute_batch("BEGIN").unwrap();
        let has_state = query(
            &connection,
            "SELECT count(*) FROM sqlite_schema WHERE name = '_anabranch_status'",
        );
        if has_state == ["0"] {
            continue;
        }
        let lsn: Option<String> = connection
            .query_row("SELECT lsn FROM _anabranch_status", [], |row| row.get(0))
            .unwrap();
        let Some(lsn) = lsn else {
            assert_eq!(before, 0);
            continue;
        };
        let lsn = lsn.parse::<Lsn>().unwrap().0;
        assert!(lsn >= before, "round {round}: {lsn} after {before}");
        before = lsn;
        let expected: Vec<String> = content(lsn)
            .into_iter()
            .map(|(id, v)| format!("{id}|{v}|'{}'", payload(v)))
            .collect();
        assert_eq!(
            query(&connection, "SELECT id, v, p FROM t ORDER BY id"),
            expected,
            "round {round}"
        );
        assert_eq!(query(&connection, "SELECT v FROM u"), [format!("'{lsn}'")]);
        connection.execute_batch("COMMIT").unwrap();
        // And as we do.
        let file = File::open(&folder.settings).unwrap();
        assert_eq!(file.position(), Some(position(lsn)));
        assert_eq!(file.resume_token(), format!("token {lsn}"));
        assert_tidy(&folder);
    }
    assert!(before > 100, "hardly anything was applied: {before}");
}

#[test]
fn a_reader_at_any_moment_sees_rows_and_position_of_one_commit() {
    let folder = Folder::new();
    let mut file = folder.open();
    let mut elements = vec![first(&[1, 2])];
    elements.extend(tables(true));
    elements.extend([rows(1, packed_ops(&ops_of(1)), false), last(1), commit(1)]);
    file.apply(&down(elements)).unwrap();
    let applying = thread::Builder::new()
        .name("apply".into())
        .spawn(move || {
            for n in 2..3000 {
                let ops = packed_ops(&ops_of(n));
                let message = down(vec![begin(&[]), rows(1, ops, false), last(n), commit(n)]);
                file.apply(&message).unwrap();
            }
        })
        .unwrap();
    let reader = reader(folder.path());
    let mut looks = 0;
    let mut positions = std::collections::BTreeSet::new();
    while !applying.is_finished() || looks < 1000 {
        let seen = query(
            &reader,
            "SELECT lsn, (SELECT v FROM u), (SELECT max(v) FROM t) FROM _anabranch_status",
        );
        let lsn: Lsn = seen[0].split('\'').nth(1).unwrap().parse().unwrap();
        assert_eq!(seen, [format!("'{lsn}'|'{0}'|{0}", lsn.0)]);
        positions.insert(lsn);
        looks += 1;
    }
    applying.join().unwrap();
    assert!(positions.len() > 5, "{} in {looks} looks", positions.len());
}
