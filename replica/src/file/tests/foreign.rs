//! Other processes at work on the file, with an SQLite of their own: the `sqlite3` program.

use std::{fs, sync::mpsc, thread, time::Duration};

use super::{local::*, *};

fn change(lsn: u64, id: i64, v: &str) -> v1::Down {
    down(vec![begin(&[]), upserts(1, &[&[I(id), T(v)]]), commit(lsn)])
}

#[test]
fn a_program_reads_and_writes_its_own_tables_while_we_apply() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[])).unwrap();
    let mut shell = Shell::open(folder.path());
    shell.run(".timeout 5000\nCREATE TABLE own(id INTEGER PRIMARY KEY, n);");
    for lsn in 2..200 {
        file.apply(&change(lsn, lsn as i64, "x")).unwrap();
        let lines = shell.run(&format!(
            "INSERT INTO own SELECT {lsn}, count(*) FROM t; SELECT n FROM own WHERE id = {lsn};"
        ));
        assert_eq!(lines, [(lsn - 1).to_string()]);
    }
    assert_eq!(folder.query("SELECT count(*) FROM own"), ["198"]);
    assert_eq!(shell.run("PRAGMA integrity_check;"), ["ok"]);
}

#[test]
fn a_reader_that_holds_its_snapshot_does_no_harm_and_the_wal_shrinks_again() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(0), T("old")]])).unwrap();
    let mut shell = Shell::open(folder.path());
    assert_eq!(shell.run("BEGIN; SELECT v FROM t;"), ["old"]);
    // SQLite writes no page for an update that changes nothing in it.
    let big = |lsn: u64| format!("{lsn:08}").repeat(400_000);
    let wal = beside(folder.path(), "-wal");
    let mut lsn = 1;
    // Until the WAL is longer than what is ever kept of it.
    while fs::metadata(&wal).unwrap().len() < 300_000_000 {
        lsn += 1;
        file.apply(&change(lsn, lsn as i64 % 3, &big(lsn))).unwrap();
        assert!(lsn < 1000, "the WAL does not grow");
    }
    assert_eq!(shell.run("SELECT v FROM t;"), ["old"]);
    file.report(true, None).unwrap();
    shell.run("COMMIT;");
    for _ in 0..3 {
        lsn += 1;
        file.apply(&change(lsn, lsn as i64 % 3, &big(lsn))).unwrap();
    }
    let length = fs::metadata(&wal).unwrap().len();
    assert!(length < 100_000_000, "{length}");
    assert_eq!(shell.run("SELECT count(*) FROM t;"), ["3"]);
}

#[test]
fn a_writer_that_holds_the_lock_for_long_is_told_and_the_message_goes_on_after_it() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("a")]])).unwrap();
    let mut shell = Shell::open(folder.path());
    shell.run("CREATE TABLE own(n); BEGIN IMMEDIATE; INSERT INTO own VALUES(1);");
    // Held until its commit: no lock is needed.
    file.apply(&down(vec![begin(&[]), upserts(1, &[&[I(2), T("b")]])]))
        .unwrap();
    let last = down(vec![upserts(1, &[&[I(3), T("c")]]), commit(2)]);
    match file.apply(&last) {
        Err(Error::Transient(text)) => assert!(text.contains("write lock"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(file.position(), Some(position(1)));
    shell.run("COMMIT;");
    file.apply(&last).unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'", "2|'b'", "3|'c'"]);
    // In a reset, in the middle of a row.
    let ops = packed(&[&[I(4), T("dddddddddd")], &[I(5), N]], &[]);
    file.apply(&down(vec![begin(&[1]), rows(1, ops.slice(..5), true)]))
        .unwrap();
    shell.run("BEGIN IMMEDIATE;");
    let rest = down(vec![rows(1, ops.slice(5..), false), commit(3)]);
    assert!(matches!(file.apply(&rest), Err(Error::Transient(_))));
    shell.run("ROLLBACK;");
    file.apply(&rest).unwrap();
    assert_eq!(
        folder.query("SELECT * FROM t"),
        ["4|'dddddddddd'", "5|NULL"]
    );
    assert_tidy(&folder);
}

#[test]
fn a_writer_that_lets_go_in_time_is_waited_for() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[])).unwrap();
    let mut shell = Shell::open(folder.path());
    shell.run("CREATE TABLE own(n); BEGIN IMMEDIATE;");
    let (send, receive) = mpsc::channel();
    let applying = thread::Builder::new()
        .name("apply".into())
        .spawn(move || {
            send.send(()).unwrap();
            file.apply(&change(2, 1, "x")).map(drop)
        })
        .unwrap();
    receive.recv().unwrap();
    // A thousand inserts of the program, then its commit.
    for n in 0..1000 {
        shell.run(&format!("INSERT INTO own VALUES({n});"));
    }
    shell.run("COMMIT;");
    applying.join().unwrap().unwrap();
    assert_eq!(
        folder.query("SELECT (SELECT count(*) FROM own), (SELECT count(*) FROM t)"),
        ["1000|1"]
    );
}

#[test]
fn a_stage_leaves_the_write_lock_to_programs_in_between() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![first(&[1]), simple(1, "t")]))
        .unwrap();
    let mut shell = Shell::open(folder.path());
    shell.run("CREATE TABLE own(n);");
    for n in 0..20 {
        let values: Vec<[ValueRef<'_>; 2]> = (0..500).map(|i| [I(n * 500 + i), T("x")]).collect();
        let values: Vec<&[ValueRef<'_>]> = values.iter().map(|row| &row[..]).collect();
        file.apply(&down(vec![upserts(1, &values)])).unwrap();
        // No timeout: it would fail if the lock were held between messages.
        assert_eq!(
            shell.run(&format!("INSERT INTO own VALUES({n}); SELECT changes();")),
            ["1"]
        );
    }
    file.apply(&down(vec![commit(1)])).unwrap();
    assert_eq!(shell.run("SELECT count(*) FROM t;"), ["10000"]);
}

/// A program's checkpoint that takes the write lock and waits for readers, of which our reader of the WAL is one.
#[test]
fn a_checkpoint_of_a_program_and_we_wait_for_each_other() {
    let sheet = Sheet::simple();
    for mode in ["FULL", "RESTART", "TRUNCATE"] {
        let folder = Folder::new();
        let mut file = folder.open();
        let row = upserts(1, &[&[I(1), T("a"), T("b"), T("1")]]);
        file.apply(&down(vec![first(&[]), sheet.declare(), row, commit(10)]))
            .unwrap();
        let mut shell = Shell::open(folder.path());
        shell.run(".timeout 600000\nUPDATE t SET a = 'first';");
        assert!(file.look().unwrap());
        shell.run("UPDATE t SET a = 'second';");
        shell.begin(&format!("PRAGMA wal_checkpoint({mode});"));
        let other = Connection::open(folder.path()).unwrap();
        other.busy_timeout(Duration::ZERO).unwrap();
        // It waits, and holds the lock.
        while other.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok() {}
        file.report(true, None).unwrap();
        let done = shell.end();
        assert!(done[0].starts_with("0|"), "{mode}: {done:?}");
        assert!(file.look().unwrap(), "what was written before is found");
        assert_eq!(file.assigned().unwrap().0, 2);
    }
}
