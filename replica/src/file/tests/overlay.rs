//! What programs see of rows that they changed while Postgres changes them too.

use rusqlite::types::Value;

use super::{local::*, *};

/// A file with `t`, its rows as (id, a, b, n).
fn start_with(rows: &[(i64, &str, &str, &str)]) -> (Folder, File, Sheet) {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&full(rows, 10, &[])).unwrap();
    (folder, file, Sheet::simple())
}

fn full(rows: &[(i64, &str, &str, &str)], lsn: u64, more: &[v1::Element]) -> v1::Down {
    let mut elements = vec![first(&[1, RECEIPTS, REJECTIONS]), Sheet::simple().declare()];
    elements.extend(receipts());
    elements.push(upsert_all(rows));
    elements.extend_from_slice(more);
    elements.push(commit(lsn));
    down(elements)
}

fn upsert_all(rows: &[(i64, &str, &str, &str)]) -> v1::Element {
    let rows: Vec<[ValueRef<'_>; 4]> = rows
        .iter()
        .map(|&(id, a, b, n)| [I(id), T(a), T(b), T(n)])
        .collect();
    let rows: Vec<&[ValueRef<'_>]> = rows.iter().map(|row| &row[..]).collect();
    upserts(1, &rows)
}

/// A local transaction for each of these values, which sets `a` of row 1.
fn assign_each(folder: &Folder, file: &mut File, t: &Sheet, values: &[&str]) {
    for a in values {
        folder.write(|program| t.set(program, 1, &[("a", text(a))]));
        folder.assign(file);
    }
}

/// All up to `upto` are answered, and these of them rejected.
fn answers(file: &File, upto: u64, rejected: &[u64]) -> Vec<v1::Element> {
    let rejected = rejected.iter().map(|seq| rejection(file, *seq, Some(0)));
    std::iter::once(receipt(file, upto))
        .chain(rejected)
        .collect()
}

/// One live transaction.
fn live(lsn: u64, elements: &[v1::Element]) -> v1::Down {
    let mut all = vec![begin(&[])];
    all.extend_from_slice(elements);
    all.push(commit(lsn));
    down(all)
}

fn row(id: i64, a: &str, b: &str, n: &str) -> Vec<Value> {
    vec![id.into(), text(a), text(b), text(n)]
}

#[track_caller]
fn shows(folder: &Folder, expected: &[&str]) {
    assert_eq!(
        folder.query("SELECT id, a, b, n FROM t ORDER BY id"),
        expected,
        "the table"
    );
}

#[track_caller]
fn base_is(folder: &Folder, expected: &[&str]) {
    assert_eq!(
        folder.query("SELECT id, a, b, n FROM _anabranch_base_t ORDER BY id"),
        expected,
        "the base view"
    );
}

fn pending(folder: &Folder) -> String {
    folder.query("SELECT pending, rejected FROM _anabranch_status")[0].clone()
}

fn base_rows(folder: &Folder) -> String {
    folder.query("SELECT count(*) FROM _anabranch_saved_t")[0].clone()
}

#[test]
fn a_change_of_postgres_to_a_pending_row_is_seen_where_nothing_is_pending() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "10")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine")), ("n", text("12"))]));
    file.apply(&live(
        20,
        &[upsert_all(&[(1, "theirs", "theirs", "100.50")])],
    ))
    .unwrap();
    shows(&folder, &["1|'mine'|'theirs'|'102.50'"]);
    base_is(&folder, &["1|'theirs'|'theirs'|'100.50'"]);
    assert_eq!(pending(&folder), "1|0");
    assert_eq!(
        folder.query(
            "SELECT id, txn, table_name, operation, key, changes, captured_time GLOB '20*Z', state FROM _anabranch_outbox"
        ),
        [
            r#"1|NULL|'t'|'update'|'[1]'|'{"a":"mine","n":"12"}'|1|'captured'"#
        ]
    );
}

#[test]
fn a_row_that_postgres_deleted_is_gone_although_an_update_is_pending() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1"), (2, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    file.apply(&live(20, &[deletes(1, &[&[I(1)], &[I(2)]])]))
        .unwrap();
    shows(&folder, &[]);
    let seq = folder.assign(&mut file);
    file.apply(&live(
        30,
        &[rejection(&file, seq, Some(0)), receipt(&file, seq)],
    ))
    .unwrap();
    shows(&folder, &[]);
    assert_eq!(pending(&folder), "0|1");
    assert_eq!(
        folder.query("SELECT key, changes, outcome FROM _anabranch_rejected"),
        [r#"'[1]'|'{"a":"mine"}'|'insert_exists'"#]
    );
    assert_eq!(base_rows(&folder), "0");
}

#[test]
fn an_own_echo_never_shows_an_older_value() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    let mut lsn = 10;
    let reader = reader(folder.path());
    for i in 0..5 {
        let a = format!("mine {i}");
        folder.write(|program| t.set(program, 1, &[("a", text(&a))]));
        folder.assign(&mut file);
    }
    let seen = |expected: &str| {
        assert_eq!(query(&reader, "SELECT a FROM t"), [format!("'{expected}'")]);
    };
    for i in 0..5 {
        seen("mine 4");
        // Effects first, then the receipt; or both at once.
        lsn += 10;
        let echo = upsert_all(&[(1, &format!("mine {i}"), "b", "1")]);
        if i % 2 == 0 {
            file.apply(&live(lsn, &[echo])).unwrap();
            seen("mine 4");
            lsn += 1;
            file.apply(&live(lsn, &[receipt(&file, i + 1)])).unwrap();
        } else {
            file.apply(&live(lsn, &[echo, receipt(&file, i + 1)]))
                .unwrap();
        }
    }
    seen("mine 4");
    assert_eq!(base_rows(&folder), "0");
    assert_eq!(pending(&folder), "0|0");
    let answered = folder.query("SELECT seq, answered_lsn FROM _anabranch_local");
    assert_eq!(answered[0], "1|'0/15'");
    assert_eq!(answered.len(), 5);
}

#[test]
fn what_postgres_made_of_an_insert_is_seen_with_the_receipt() {
    let (folder, mut file, t) = start_with(&[]);
    folder.write(|program| t.insert(program, &row(7, "mine", "b", "1")));
    let seq = folder.assign(&mut file);
    file.apply(&live(20, &[upsert_all(&[(7, "trigger", "b", "1")])]))
        .unwrap();
    shows(&folder, &["7|'mine'|'b'|'1'"]);
    file.apply(&live(30, &[receipt(&file, seq)])).unwrap();
    shows(&folder, &["7|'trigger'|'b'|'1'"]);
}

#[test]
fn a_rejection_restores_and_tells_what_was_wanted() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1"), (2, "a", "b", "2")]);
    folder.write(|program| {
        t.set(program, 1, &[("a", text("mine"))]);
        t.delete(program, &[2.into()]);
        t.insert(program, &row(3, "new", "it's \"x\"", "3"));
    });
    let seq = folder.assign(&mut file);
    folder.write(|program| t.set(program, 1, &[("b", text("later"))]));
    file.apply(&live(
        20,
        &[receipt(&file, seq), rejection(&file, seq, Some(2))],
    ))
    .unwrap();
    shows(&folder, &["1|'a'|'later'|'1'", "2|'a'|'b'|'2'"]);
    assert_eq!(pending(&folder), "1|3");
    assert_eq!(
        folder.query("SELECT id, txn, table_name, operation, key, changes, sqlstate, constraint_name, outcome, action FROM _anabranch_rejected"),
        [
            r#"1|1|'t'|'update'|'[1]'|'{"a":"mine"}'|NULL|NULL|'rolled_back'|NULL"#,
            r#"2|1|'t'|'delete'|'[2]'|'{"a":"a","b":"b","id":2,"n":"2"}'|NULL|NULL|'rolled_back'|NULL"#,
            r#"3|1|'t'|'insert'|'[3]'|'{"a":"new","b":"it's \"x\"","id":3,"n":"3"}'|'23505'|'t_pkey'|'insert_exists'|NULL"#,
        ]
    );
}

#[test]
fn several_transactions_that_are_rejected_together_pass_for_one() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    folder.write(|program| t.set(program, 1, &[("b", text("mine"))]));
    file.assign(&[2], true).unwrap();
    folder.write(|program| t.set(program, 1, &[("n", text("5"))]));
    file.assign(&[2, 3], false).unwrap();
    for seq in [1, 2] {
        let rejected = [receipt(&file, seq), rejection(&file, seq, None)];
        file.apply(&live(20 + seq, &rejected)).unwrap();
    }
    assert_eq!(
        folder.query("SELECT txn, merged FROM _anabranch_rejected"),
        ["1|1", "1|1", "2|0"]
    );
}

#[test]
fn dependents_of_a_rejected_insert_are_judged_on_their_own() {
    let (folder, mut file, t) = start_with(&[]);
    folder.write(|program| t.insert(program, &row(1, "mine", "b", "1")));
    let seq = folder.assign(&mut file);
    folder.write(|program| t.set(program, 1, &[("a", text("later"))]));
    shows(&folder, &["1|'later'|'b'|'1'"]);
    file.apply(&live(
        20,
        &[receipt(&file, seq), rejection(&file, seq, None)],
    ))
    .unwrap();
    shows(&folder, &[]);
    // Somebody else's row of that key: the update is of that now.
    file.apply(&live(30, &[upsert_all(&[(1, "theirs", "theirs", "9")])]))
        .unwrap();
    shows(&folder, &["1|'later'|'theirs'|'9'"]);
}

#[test]
fn chains_and_swaps_of_keys_keep_what_postgres_changes_on_the_way() {
    let (folder, mut file, t) = start_with(&[(1, "one", "b", "1"), (2, "two", "b", "2")]);
    folder.write(|program| {
        // Swapped, by way of 9; then 1 goes on to 5.
        t.set(program, 1, &[("id", 9.into())]);
        t.set(program, 2, &[("id", 1.into())]);
        t.set(program, 9, &[("id", 2.into())]);
        t.set(program, 1, &[("id", 5.into())]);
    });
    shows(&folder, &["2|'one'|'b'|'1'", "5|'two'|'b'|'2'"]);
    base_is(&folder, &["1|'one'|'b'|'1'", "2|'two'|'b'|'2'"]);
    file.apply(&live(20, &[upsert_all(&[(2, "two", "theirs", "22")])]))
        .unwrap();
    shows(&folder, &["2|'one'|'b'|'1'", "5|'two'|'theirs'|'22'"]);
    file.apply(&live(
        30,
        &[deletes(1, &[&[I(1)]]), upsert_all(&[(5, "five", "x", "5")])],
    ))
    .unwrap();
    shows(&folder, &["5|'two'|'theirs'|'22'"]);
    let seq = folder.assign(&mut file);
    file.apply(&live(
        40,
        &[receipt(&file, seq), rejection(&file, seq, Some(0))],
    ))
    .unwrap();
    shows(&folder, &["2|'two'|'theirs'|'22'", "5|'five'|'x'|'5'"]);
    assert_eq!(base_rows(&folder), "0");
}

#[test]
fn a_reset_leaves_pending_changes_on_top_at_every_moment() {
    let (folder, mut file, t) =
        start_with(&[(1, "a", "b", "1"), (2, "a", "b", "2"), (3, "c", "c", "3")]);
    folder.write(|program| {
        t.set(program, 1, &[("a", text("mine"))]);
        t.set(program, 2, &[("a", text("mine"))]);
        t.insert(program, &row(8, "new", "b", "8"));
    });
    file.begin_stream().unwrap();
    // Row 2 is gone, 3 changed, 4 is new.
    let message = full(
        &[
            (1, "theirs", "theirs", "1"),
            (3, "x", "y", "3"),
            (4, "d", "d", "4"),
        ],
        20,
        &[],
    );
    let expected = [
        "1|'mine'|'theirs'|'1'",
        "3|'x'|'y'|'3'",
        "4|'d'|'d'|'4'",
        "8|'new'|'b'|'8'",
    ];
    // Stages first, then the rest.
    let (head, tail) = message.elements.split_at(5);
    file.apply(&down(head.to_vec())).unwrap();
    assert_eq!(
        folder.query("SELECT a FROM t WHERE id IN (1, 8) ORDER BY id"),
        ["'mine'", "'new'"]
    );
    file.apply(&v1::Down {
        elements: tail.to_vec(),
        ..message.clone()
    })
    .unwrap();
    shows(&folder, &expected);
    base_is(
        &folder,
        &["1|'theirs'|'theirs'|'1'", "3|'x'|'y'|'3'", "4|'d'|'d'|'4'"],
    );
    assert_eq!(pending(&folder), "3|0");
}

#[test]
fn a_reset_that_changes_nothing_fires_no_triggers_of_programs() {
    let rows = [(1, "a", "b", "1"), (2, "a", "b", "2"), (3, "c", "c", "3")];
    let (folder, mut file, t) = start_with(&rows);
    folder.write(|program| {
        t.set(program, 1, &[("a", text("mine"))]);
        t.delete(program, &[2.into()]);
        t.insert(program, &row(8, "new", "b", "8"));
    });
    folder.program(
        "CREATE TABLE log(what); \
         CREATE TRIGGER a AFTER INSERT ON t BEGIN INSERT INTO log VALUES('insert'); END; \
         CREATE TRIGGER b AFTER UPDATE ON t BEGIN INSERT INTO log VALUES('update'); END; \
         CREATE TRIGGER c AFTER DELETE ON t BEGIN INSERT INTO log VALUES('delete'); END;",
    );
    file.begin_stream().unwrap();
    file.apply(&full(&rows, 20, &[])).unwrap();
    assert_eq!(folder.query("SELECT what FROM log"), Vec::<String>::new());
    file.begin_stream().unwrap();
    file.apply(&full(&[(1, "a", "x", "1")], 30, &[])).unwrap();
    shows(&folder, &["1|'mine'|'x'|'1'", "8|'new'|'b'|'8'"]);
    let log = folder.query("SELECT what FROM log ORDER BY 1");
    assert_eq!(log, ["'delete'", "'update'"]);
}

#[test]
fn an_answer_in_a_reset_counts() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    folder.assign(&mut file);
    folder.write(|program| t.insert(program, &row(2, "refused", "b", "1")));
    folder.assign(&mut file);
    file.begin_stream().unwrap();
    let answers = [receipt(&file, 2), rejection(&file, 2, Some(0))];
    file.apply(&full(&[(1, "mine", "b", "1")], 20, &answers))
        .unwrap();
    shows(&folder, &["1|'mine'|'b'|'1'"]);
    assert_eq!(pending(&folder), "0|1");
    assert_eq!(base_rows(&folder), "0");
    assert_eq!(file.answered().unwrap(), (2, file.hash_of(2).unwrap()));
    // The same again, as after a restart, lists nothing twice.
    file.begin_stream().unwrap();
    let answers = [receipt(&file, 2), rejection(&file, 2, Some(0))];
    file.apply(&full(&[(1, "mine", "b", "1")], 30, &answers))
        .unwrap();
    assert_eq!(pending(&folder), "0|1");
}

#[test]
fn a_receipt_that_goes_back_makes_answered_changes_pending_again() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    let seq = folder.assign(&mut file);
    file.apply(&live(
        20,
        &[upsert_all(&[(1, "mine", "b", "1")]), receipt(&file, seq)],
    ))
    .unwrap();
    assert_eq!(pending(&folder), "0|0");
    // A failover lost both.
    file.apply(&live(
        30,
        &[
            upsert_all(&[(1, "a", "c", "1")]),
            deletes(RECEIPTS, &[&[T(file.replica_id())]]),
        ],
    ))
    .unwrap();
    shows(&folder, &["1|'mine'|'c'|'1'"]);
    base_is(&folder, &["1|'a'|'c'|'1'"]);
    assert_eq!(pending(&folder), "1|0");
    assert_eq!(file.answered().unwrap().0, 0);
}

#[test]
fn a_receipt_that_goes_back_in_a_reset_makes_answered_changes_vanish() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1"), (3, "c", "b", "3")]);
    folder.write(|program| {
        t.set(program, 1, &[("a", text("mine"))]);
        t.insert(program, &row(2, "new", "b", "2"));
    });
    folder.assign(&mut file);
    folder.write(|program| t.set(program, 2, &[("a", text("newer"))]));
    let seq = folder.assign(&mut file);
    file.apply(&live(
        20,
        &[
            upsert_all(&[(1, "mine", "b", "1"), (2, "newer", "b", "2")]),
            receipt(&file, seq),
        ],
    ))
    .unwrap();
    assert_eq!(pending(&folder), "0|0");
    assert_eq!(base_rows(&folder), "0");
    // A failover lost the second, and what the streamer sends anew knows neither.
    for (lsn, answered, left) in [(30, seq - 1, "1|0"), (40, 0, "3|0")] {
        file.begin_stream().unwrap();
        let there: &[_] = match answered {
            0 => &[(1, "a", "c", "1"), (3, "c", "b", "3")],
            _ => &[
                (1, "mine", "c", "1"),
                (2, "new", "b", "2"),
                (3, "c", "b", "3"),
            ],
        };
        let answer: &[_] = match answered {
            0 => &[],
            _ => &[receipt(&file, answered)],
        };
        file.apply(&full(there, lsn, answer)).unwrap();
        shows(
            &folder,
            &["1|'mine'|'c'|'1'", "2|'newer'|'b'|'2'", "3|'c'|'b'|'3'"],
        );
        assert_eq!(pending(&folder), left);
    }
    base_is(&folder, &["1|'a'|'c'|'1'", "3|'c'|'b'|'3'"]);
}

#[test]
fn a_receipt_of_another_file_answers_nothing() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    folder.assign(&mut file);
    for seq in [1, 2] {
        let foreign = upserts(RECEIPTS, &[&[T(file.replica_id()), I(seq), B(&[7; 32])]]);
        file.apply(&live(20 + seq as u64, &[foreign])).unwrap();
        assert_eq!(pending(&folder), "1|0");
        shows(&folder, &["1|'mine'|'b'|'1'"]);
    }
}

#[test]
fn entries_survive_a_changed_definition_and_a_dropped_table() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| {
        t.set(program, 1, &[("b", text("mine"))]);
        t.insert(program, &row(2, "new", "b", "2"));
    });
    folder.assign(&mut file);
    let sent = file.outgoing(&mut Outgoing::after(0), 1 << 20).unwrap();
    // Column `a` goes, `c` comes.
    let mut changed = t.clone();
    changed.columns = vec![
        t.columns[3],
        t.columns[0],
        t.columns[2],
        ("c", Text, 0, v1::Conflict::LastWrite),
    ];
    file.begin_stream().unwrap();
    let mut elements = vec![first(&[1]), changed.declare()];
    elements.extend(receipts());
    elements.extend([
        upserts(1, &[&[T("5"), I(1), T("theirs"), T("c")]]),
        commit(20),
    ]);
    file.apply(&down(elements)).unwrap();
    let dump = "SELECT id, b, c, n FROM t ORDER BY id";
    assert_eq!(folder.query(dump), ["1|'mine'|'c'|'5'", "2|'b'|NULL|'2'"]);
    assert_eq!(pending(&folder), "2|0");
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["2"]
    );
    folder.write(|program| changed.set(program, 2, &[("c", text("mine too"))]));
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["3"]
    );
    assert_eq!(
        file.outgoing(&mut Outgoing::after(0), 1 << 20).unwrap(),
        sent,
        "resent as it was"
    );
    // It leaves the shapes, and comes back.
    file.begin_stream().unwrap();
    let mut elements = vec![first(&[])];
    elements.extend(receipts());
    elements.push(commit(30));
    file.apply(&down(elements)).unwrap();
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["3"]
    );
    assert_eq!(
        file.outgoing(&mut Outgoing::after(0), 1 << 20).unwrap(),
        sent
    );
    file.begin_stream().unwrap();
    let mut elements = vec![first(&[1]), changed.declare()];
    elements.extend(receipts());
    elements.extend([
        upserts(1, &[&[T("6"), I(1), T("theirs"), T("c")]]),
        commit(40),
    ]);
    file.apply(&down(elements)).unwrap();
    assert_eq!(
        folder.query(dump),
        ["1|'mine'|'c'|'6'", "2|'b'|'mine too'|'2'"]
    );
    let seq = folder.assign(&mut file);
    file.apply(&live(50, &[receipt(&file, seq)])).unwrap();
    assert_eq!(folder.query(dump), ["1|'theirs'|'c'|'6'"]);
    assert_eq!(base_rows(&folder), "0");
    // The policy alone.
    folder.write(|program| changed.set(program, 1, &[("c", text("x"))]));
    changed.columns[3].3 = v1::Conflict::FirstWrite;
    file.apply(&live(60, &[changed.declare()])).unwrap();
    folder.write(|program| changed.set(program, 1, &[("b", text("y"))]));
    file.apply(&live(
        70,
        &[upserts(1, &[&[T("7"), I(1), T("theirs"), T("c")]])],
    ))
    .unwrap();
    assert_eq!(folder.query(dump), ["1|'y'|'x'|'7'"]);
    assert_eq!(pending(&folder), "2|0");
}

#[test]
fn a_table_that_a_program_dropped_comes_back_with_what_is_pending() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    folder.program("DROP TABLE t");
    assert!(matches!(
        file.apply(&down(vec![
            begin(&[]),
            upsert_all(&[(1, "x", "y", "1")]),
            commit(20)
        ])),
        Err(Error::Stream(_))
    ));
    file.begin_stream().unwrap();
    file.apply(&full(&[(1, "x", "y", "1")], 30, &[])).unwrap();
    shows(&folder, &["1|'mine'|'y'|'1'"]);
    base_is(&folder, &["1|'x'|'y'|'1'"]);
}

#[test]
fn base_rows_and_entries_that_a_program_dropped_are_told_from_what_postgres_has_by_a_reset() {
    for dropped in ["saved", "entries"] {
        let (folder, mut file, t) = start_with(&[(1, "a", "b", "1"), (2, "a", "b", "2")]);
        folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
        folder.program(&format!("DROP TABLE _anabranch_{dropped}_t"));
        let applied = file.apply(&live(20, &[upsert_all(&[(2, "x", "y", "2")])]));
        assert!(matches!(applied, Err(Error::Stream(_))));
        assert!(file.resume_token().is_empty());
        file.begin_stream().unwrap();
        file.apply(&full(&[(1, "x", "y", "1"), (2, "x", "y", "2")], 30, &[]))
            .unwrap();
        let a = match dropped {
            "entries" => "x",
            _ => "mine",
        };
        shows(&folder, &[&format!("1|'{a}'|'y'|'1'"), "2|'x'|'y'|'2'"]);
        base_is(&folder, &["1|'x'|'y'|'1'", "2|'x'|'y'|'2'"]);
        folder.write(|program| t.set(program, 2, &[("a", text("mine"))]));
        file.apply(&live(40, &[upsert_all(&[(2, "z", "z", "2")])]))
            .unwrap();
        assert_eq!(
            folder.query("SELECT a, b FROM t WHERE id = 2"),
            ["'mine'|'z'"]
        );
    }
}

#[test]
fn many_dirty_keys_are_rebuilt_in_pages() {
    let count = 12_000;
    let rows: Vec<(i64, &str, &str, &str)> = (0..count).map(|id| (id, "a", "b", "1")).collect();
    let (folder, mut file, t) = start_with(&rows);
    folder.write(|program| {
        for id in 0..count {
            t.set(program, id, &[("a", text("mine"))]);
        }
    });
    let theirs: Vec<(i64, &str, &str, &str)> = (0..count).map(|id| (id, "x", "y", "1")).collect();
    file.apply(&live(20, &[upsert_all(&theirs)])).unwrap();
    let groups = "SELECT a, b, count(*) FROM t GROUP BY 1, 2";
    assert_eq!(folder.query(groups), ["'mine'|'y'|12000"]);
    let seq = folder.assign(&mut file);
    file.apply(&live(30, &[receipt(&file, seq)])).unwrap();
    assert_eq!(folder.query(groups), ["'x'|'y'|12000"]);
    assert_eq!(base_rows(&folder), "0");
}

#[test]
fn a_rejected_write_that_is_retried_is_made_again_and_one_that_is_deleted_is_not() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "10"), (2, "a", "b", "2")]);
    folder.write(|program| {
        t.set(program, 1, &[("a", text("mine")), ("n", text("15"))]);
        t.set(program, 2, &[("a", text("mine"))]);
        t.insert(program, &row(3, "new", "b", "3"));
    });
    let seq = folder.assign(&mut file);
    let rejected = live(20, &[receipt(&file, seq), rejection(&file, seq, Some(1))]);
    file.apply(&rejected).unwrap();
    file.apply(&live(30, &[upsert_all(&[(1, "theirs", "theirs", "100")])]))
        .unwrap();
    shows(&folder, &["1|'theirs'|'theirs'|'100'", "2|'a'|'b'|'2'"]);
    assert_eq!(file.retry_rejected().unwrap(), 0);
    folder.program("UPDATE _anabranch_rejected SET action = 'retry' WHERE id <> 2");
    folder.program("DELETE FROM _anabranch_rejected WHERE id = 2");
    assert_eq!(file.retry_rejected().unwrap(), 2);
    shows(
        &folder,
        &[
            "1|'mine'|'theirs'|'105'",
            "2|'a'|'b'|'2'",
            "3|'new'|'b'|'3'",
        ],
    );
    base_is(&folder, &["1|'theirs'|'theirs'|'100'", "2|'a'|'b'|'2'"]);
    assert_eq!(pending(&folder), "2|0");
    let seq = folder.assign(&mut file);
    let sent = file.outgoing(&mut Outgoing::after(1), 1 << 20).unwrap();
    assert_eq!((sent.len(), sent[0].seq), (1, 2));
    let echo = upsert_all(&[(1, "mine", "theirs", "105"), (3, "new", "b", "3")]);
    file.apply(&live(40, &[echo, receipt(&file, seq)])).unwrap();
    shows(
        &folder,
        &[
            "1|'mine'|'theirs'|'105'",
            "2|'a'|'b'|'2'",
            "3|'new'|'b'|'3'",
        ],
    );
    assert_eq!(pending(&folder), "0|0");
    assert_eq!(base_rows(&folder), "0");
}

#[test]
fn what_was_forgotten_is_not_pending_again_and_what_was_rejected_can_still_be_retried() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    assign_each(&folder, &mut file, &t, &["1", "2", "3", "4"]);
    file.apply(&live(20, &[receipt(&file, 1)])).unwrap();
    let second = live(30, &[receipt(&file, 2), rejection(&file, 2, None)]);
    file.apply(&second).unwrap();
    let third = live(40, &[upsert_all(&[(1, "3", "b", "1")]), receipt(&file, 3)]);
    file.apply(&third).unwrap();
    let kept = "SELECT (SELECT group_concat(seq) FROM _anabranch_local), \
                (SELECT group_concat(id) FROM _anabranch_entries_t)";
    file.forget_answered(Lsn(20)).unwrap();
    assert_eq!(folder.query(kept), ["'1,2,3,4'|'1,2,3,4'"]);
    file.forget_answered(Lsn(39)).unwrap();
    assert_eq!(folder.query(kept), ["'2,3,4'|'2,3,4'"]);
    // A failover to before all of it.
    let gone = live(50, &[deletes(RECEIPTS, &[&[T(file.replica_id())]])]);
    file.apply(&gone).unwrap();
    assert_eq!(pending(&folder), "2|1");
    assert_eq!(file.answered().unwrap().0, 2);
    file.apply(&live(60, &[receipt(&file, 4)])).unwrap();
    file.forget_answered(Lsn(1_000)).unwrap();
    assert_eq!(folder.query(kept), ["'4'|'2'"]);
    assert_eq!(pending(&folder), "0|1");
    folder.program("UPDATE _anabranch_rejected SET action = 'retry'");
    assert_eq!(file.retry_rejected().unwrap(), 1);
    shows(&folder, &["1|'2'|'b'|'1'"]);
    assert_eq!(folder.assign(&mut file), 5);
    let sent = file.outgoing(&mut Outgoing::after(4), 1 << 20).unwrap();
    assert_eq!(sent.len(), 1);
}

#[test]
fn what_was_rejected_and_is_answered_anew_is_listed_as_it_is_answered_then() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    assign_each(&folder, &mut file, &t, &["1", "2", "3", "4"]);
    let listed = "SELECT id, txn, outcome, sqlstate, action FROM _anabranch_rejected ORDER BY id";
    let row = |id, action| format!("{id}|{id}|'insert_exists'|'23505'|{action}");
    file.apply(&live(20, &answers(&file, 4, &[1, 2, 3])))
        .unwrap();
    folder.program("DELETE FROM _anabranch_rejected WHERE id = 3");
    folder.program("UPDATE _anabranch_rejected SET action = 'mine'");
    assert_eq!(folder.query(listed), [row(1, "'mine'"), row(2, "'mine'")]);

    // A failover to before all of it; then the first takes effect, and the last does not.
    let mut gone = vec![deletes(RECEIPTS, &[&[T(file.replica_id())]])];
    for seq in [1, 2, 3, 4] {
        gone.push(deletes(REJECTIONS, &[&[T(file.replica_id()), I(seq)]]));
    }
    file.apply(&live(30, &gone)).unwrap();
    assert_eq!(pending(&folder), "4|2");
    file.apply(&live(40, &answers(&file, 4, &[2, 3, 4])))
        .unwrap();
    assert_eq!(folder.query(listed), [row(2, "'mine'"), row(4, "NULL")]);
    // Once more: that a row was removed by us is not the program's decision.
    file.apply(&live(50, &gone)).unwrap();
    file.apply(&live(60, &answers(&file, 4, &[1, 3]))).unwrap();
    assert_eq!(folder.query(listed), [row(1, "NULL")]);
    folder.program("DELETE FROM _anabranch_rejected");
    let decided = "SELECT group_concat(id) FROM _anabranch_decided";
    assert_eq!(folder.query(decided), ["'1,3'"]);
    file.forget_answered(Lsn(1_000)).unwrap();
    assert_eq!(folder.query(decided), ["NULL"]);
}

/// The write call was faster than the stream: what the failover lost is answered again before the file hears that it was lost.
#[test]
fn an_answer_that_another_history_gives_otherwise_is_not_noticed() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    assign_each(&folder, &mut file, &t, &["1", "2", "3"]);
    let listed = "SELECT group_concat(id), group_concat(txn) FROM _anabranch_rejected";
    file.apply(&live(20, &answers(&file, 3, &[1, 2]))).unwrap();
    assert_eq!(folder.query(listed), ["'1,2'|'1,2'"]);
    let other = anabranch_proto::Epoch(1);
    folder.program(&format!("UPDATE _anabranch_state SET epoch = '{other}'"));
    drop(file);
    let mut file = folder.open();
    file.begin_stream().unwrap();
    file.apply(&full(
        &[(1, "1", "b", "1")],
        30,
        &answers(&file, 3, &[2, 3]),
    ))
    .unwrap();
    assert_eq!(folder.query(listed), ["'2,3'|'2,3'"]);
    assert_eq!(pending(&folder), "0|2");
    shows(&folder, &["1|'1'|'b'|'1'"]);
}

#[test]
fn only_what_is_seen_to_change_is_told() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1"), (2, "a", "b", "1")]);
    file.set_report_changes(true);
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    let seq = folder.assign(&mut file);
    let told = |applied: super::super::Applied| {
        let keys = applied
            .changes
            .into_iter()
            .map(|change| (change.table, change.keys));
        keys.collect::<Vec<_>>()
    };
    let t_changed = |key: i64| vec![("t".to_owned(), Some(vec![serde_json::json!([key])]))];
    let echo = live(20, &[upsert_all(&[(1, "mine", "b", "1")])]);
    assert_eq!(told(file.apply(&echo).unwrap()), vec![]);
    let other = live(30, &[upsert_all(&[(1, "x", "theirs", "1")])]);
    assert_eq!(told(file.apply(&other).unwrap()), t_changed(1));
    let answer = live(40, &[receipt(&file, seq)]);
    assert_eq!(told(file.apply(&answer).unwrap()), t_changed(1));
    let plain = live(50, &[upsert_all(&[(2, "x", "theirs", "1")])]);
    assert_eq!(told(file.apply(&plain).unwrap()), t_changed(2));
    assert_eq!(
        file.tables().unwrap().len(),
        1,
        "receipts are not for programs"
    );
}

#[test]
fn lookups_go_by_index() {
    let (folder, ..) = start_with(&[]);
    let plan = |sql: &str| {
        let rows = folder.query(&format!("EXPLAIN QUERY PLAN {sql}"));
        rows.join("\n")
    };
    let status = plan("SELECT pending FROM _anabranch_status");
    assert!(status.contains("_anabranch_local_answered"), "{status}");
    let outbox = plan("SELECT * FROM _anabranch_outbox");
    assert!(
        outbox.contains("_anabranch_local_last (last>?)"),
        "{outbox}"
    );
    let base = plan("SELECT * FROM _anabranch_base_t");
    assert!(base.contains("PRIMARY KEY (k0=?)"), "{base}");
    let base = plan("SELECT * FROM _anabranch_base_t WHERE id = 7");
    assert!(
        base.contains("SEARCH t USING INTEGER PRIMARY KEY"),
        "{base}"
    );
    let new = plan("SELECT * FROM _anabranch_entries_t WHERE id > 5 AND n0 = 7");
    assert!(new.contains("(n0=? AND rowid>?)"), "{new}");
    let old = plan(
        "SELECT * FROM _anabranch_entries_t WHERE id > 5 AND o0 = 7 AND o0 IS NOT NULL AND (o0 IS NOT n0)",
    );
    assert!(old.contains("(o0=? AND rowid>?)"), "{old}");
}

/// Prints what the hook costs where nothing is pending: nothing to speak of.
#[test]
#[ignore = "prints figures"]
fn cost_of_a_million_upserts() {
    let run = |writable: bool, base_row: bool| {
        let folder = Folder::new();
        let mut file = folder.open();
        let t = Sheet::simple();
        let mut declare = t.declare();
        if let Some(Kind::Table(table)) = &mut declare.kind {
            table.writable = writable;
        }
        file.apply(&down(vec![first(&[1]), declare, commit(10)]))
            .unwrap();
        if base_row {
            folder.write(|program| t.insert(program, &row(-1, "mine", "b", "1")));
        }
        let messages: Vec<v1::Down> = (0..100)
            .map(|i| {
                let rows: Vec<(i64, &str, &str, &str)> = (0..10_000)
                    .map(|j| (i * 10_000 + j, "some text", "b", "1.50"))
                    .collect();
                down(vec![begin(&[]), upsert_all(&rows), commit(20 + i as u64)])
            })
            .collect();
        let began = std::time::Instant::now();
        for message in &messages {
            file.apply(message).unwrap();
        }
        began.elapsed()
    };
    for round in 0..3 {
        let [plain, writable, pending] =
            [(false, false), (true, false), (true, true)].map(|(w, b)| run(w, b));
        println!(
            "round {round}: not writable {plain:?}, writable {writable:?}, with one base row {pending:?}"
        );
    }
}

/// Prints what it takes where many entries hang together.
#[test]
#[ignore = "prints figures"]
fn cost_of_long_chains() {
    let measure = |what: &str, file: &mut File, message: &v1::Down| {
        let began = std::time::Instant::now();
        file.apply(message).unwrap();
        println!("{what}: {:?}", began.elapsed());
    };
    let count = 20_000;
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "0")]);
    folder.write(|program| {
        for i in 0..count {
            t.set(program, 1, &[("n", text(&(i + 1).to_string()))]);
        }
    });
    let change = live(20, &[upsert_all(&[(1, "x", "y", "5")])]);
    measure("a row with 20,000 pending updates", &mut file, &change);
    let rows: Vec<(i64, &str, &str, &str)> = (0..count).map(|id| (id, "a", "b", "1")).collect();
    let (folder, mut file, t) = start_with(&rows);
    folder.write(|program| {
        for id in (0..count).rev() {
            t.set(program, id, &[("id", (id + 1).into())]);
        }
    });
    let change = live(20, &[upsert_all(&[(5, "x", "y", "5")])]);
    measure("20,000 rows that moved on by one", &mut file, &change);
    let seq = folder.assign(&mut file);
    let answer = live(30, &[receipt(&file, seq)]);
    measure("their answer", &mut file, &answer);
    folder.write(|program| {
        for id in 0..count {
            t.set(program, id, &[("a", text("mine"))]);
        }
    });
    let began = std::time::Instant::now();
    let seq = folder.assign(&mut file);
    println!(
        "to make a transaction of 20,000 updates: {:?}",
        began.elapsed()
    );
    let began = std::time::Instant::now();
    let sent = file
        .outgoing(&mut Outgoing::after(seq - 1), 1 << 30)
        .unwrap();
    println!("to encode it: {:?}, {} pieces", began.elapsed(), sent.len());
    let answer = live(40, &[receipt(&file, seq)]);
    measure("its answer", &mut file, &answer);
}

/// Latin-1, as a program may well store it: it is no UTF-8, and SQLite does not mind.
fn latin(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("CAST(x'{digits}' AS TEXT)")
}

fn named() -> Sheet {
    use v1::Conflict::LastWrite;
    Sheet {
        id: 1,
        name: "t",
        columns: vec![("name", Text, 1, LastWrite), ("a", Text, 0, LastWrite)],
    }
}

fn named_in_full(rows: &[&[ValueRef<'_>]], lsn: u64) -> v1::Down {
    let mut elements = vec![first(&[1, RECEIPTS, REJECTIONS]), named().declare()];
    elements.extend(receipts());
    elements.extend([upserts(1, rows), commit(lsn)]);
    down(elements)
}

const NAMES: &str = "SELECT hex(name), hex(a) FROM t ORDER BY name";

#[test]
fn a_rejected_key_that_is_no_utf8_stays() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&named_in_full(&[&[T("x"), T("old")]], 10))
        .unwrap();
    folder.program(&format!(
        "INSERT INTO t VALUES({}, 'new'); UPDATE t SET a = {} WHERE name = 'x'",
        latin(b"M\xfcller"),
        latin(b"caf\xe9")
    ));
    let shown = ["'4DFC6C6C6572'|'6E6577'", "'78'|'636166E9'"];
    assert_eq!(folder.query(NAMES), shown);
    let seq = folder.assign(&mut file);
    let sent = file.outgoing(&mut Outgoing::after(0), 1 << 20).unwrap();
    let sent = &sent[0].entries;
    let has = |bytes: &[u8]| sent.windows(bytes.len()).any(|there| there == bytes);
    // What the program wrote, and not something like it.
    assert!(has(b"M\xfcller") && has(b"caf\xe9"));
    // Postgres changes what is beside it, and then says no.
    file.apply(&live(20, &[upserts(1, &[&[T("x"), T("theirs")]])]))
        .unwrap();
    assert_eq!(folder.query(NAMES), shown);
    file.apply(&live(
        30,
        &[receipt(&file, seq), rejection(&file, seq, Some(0))],
    ))
    .unwrap();
    assert_eq!(folder.query(NAMES), ["'78'|'746865697273'"]);
    assert_eq!(base_rows(&folder), "0");
    folder.program("UPDATE _anabranch_rejected SET action = 'retry'");
    assert_eq!(file.retry_rejected().unwrap(), 2);
    assert_eq!(folder.query(NAMES), shown);
    let seq = folder.assign(&mut file);
    file.apply(&live(
        40,
        &[receipt(&file, seq), rejection(&file, seq, Some(0))],
    ))
    .unwrap();
    assert_eq!(folder.query(NAMES), ["'78'|'746865697273'"]);
    assert_eq!(base_rows(&folder), "0");
}

#[test]
fn a_pending_key_that_is_no_utf8_is_rebuilt_for_ever() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&named_in_full(&[&[T("x"), T("old")]], 10))
        .unwrap();
    folder.program(&format!(
        "INSERT INTO t VALUES({}, 'new')",
        latin(b"M\xfcller")
    ));
    let (done, is_done) = std::sync::mpsc::channel();
    // A table is sent in full, with what is pending in it.
    let again = std::thread::Builder::new()
        .name("apply".into())
        .spawn(move || {
            file.begin_stream().unwrap();
            file.apply(&named_in_full(&[&[T("x"), T("theirs")]], 20))
                .unwrap();
            done.send(()).unwrap();
        })
        .unwrap();
    is_done
        .recv_timeout(std::time::Duration::from_secs(20))
        .expect("it is done");
    again.join().unwrap();
    assert_eq!(
        folder.query(NAMES),
        ["'4DFC6C6C6572'|'6E6577'", "'78'|'746865697273'"]
    );
}

#[test]
fn a_retry_that_a_programs_trigger_refuses_ends_the_replica() {
    for (refuse, commits) in [
        ("RAISE(ABORT, 'too many')", true),
        ("RAISE(IGNORE)", true),
        ("RAISE(ABORT, 'too many')", false),
    ] {
        let (folder, mut file, t) = start_with(&[(1, "a", "b", "10")]);
        folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
        let seq = folder.assign(&mut file);
        file.apply(&live(
            20,
            &[receipt(&file, seq), rejection(&file, seq, Some(0))],
        ))
        .unwrap();
        folder.program(&format!(
            "CREATE TRIGGER own BEFORE UPDATE ON t WHEN NEW.a = 'mine' BEGIN SELECT {refuse}; END"
        ));
        file.look().unwrap();
        if commits {
            file.apply(&live(30, &[upsert_all(&[(2, "x", "y", "1")])]))
                .unwrap();
            file.apply(&live(40, &[deletes(1, &[&[I(2)]])])).unwrap();
        }
        folder.program("UPDATE _anabranch_rejected SET action = 'retry'");
        for _ in 0..2 {
            file.tidy(None).unwrap();
        }
        shows(&folder, &["1|'a'|'b'|'10'"]);
        assert_eq!(pending(&folder), "0|1");
        assert_eq!(
            folder.query("SELECT action FROM _anabranch_rejected"),
            ["'refused'"],
            "{refuse}"
        );
    }
}

#[test]
fn what_a_unique_index_had_replaced_is_missing_for_ever() {
    for running in [true, false] {
        let (folder, file, _) = start_with(&[(1, "a", "b", "1"), (2, "x", "b", "2")]);
        let running = running.then_some(file);
        // No trigger sees that the second row goes.
        folder.program(
            "PRAGMA recursive_triggers = OFF; CREATE UNIQUE INDEX own ON t(a); \
             INSERT OR REPLACE INTO t VALUES(1, 'x', 'b', '1')",
        );
        assert_eq!(folder.query("SELECT id FROM t"), ["1"]);
        let mut file = running.unwrap_or_else(|| folder.open());
        file.look().unwrap();
        assert!(
            file.resume_token().is_empty(),
            "the table is to be sent again"
        );
        file.begin_stream().unwrap();
        file.apply(&full(&[(1, "a", "b", "1"), (2, "x", "b", "2")], 20, &[]))
            .unwrap();
        shows(&folder, &["1|'x'|'b'|'1'", "2|'x'|'b'|'2'"]);
        assert_eq!(pending(&folder), "1|0");
    }
}

#[test]
fn base_rows_of_what_changed_nothing_stay_for_ever() {
    let (folder, mut file, _) = start_with(&[(1, "a", "b", "1"), (2, "x", "b", "2")]);
    folder.program(
        "INSERT OR REPLACE INTO t SELECT * FROM t WHERE id = 1; INSERT OR IGNORE INTO t VALUES(2, '', '', '')",
    );
    file.look().unwrap();
    assert_eq!(pending(&folder), "0|0");
    assert_eq!(base_rows(&folder), "2");
    file.tidy(None).unwrap();
    assert_eq!(base_rows(&folder), "0");
    folder.program(
        "UPDATE t SET a = 'mine' WHERE id = 1; INSERT OR IGNORE INTO t VALUES(2, '', '', '')",
    );
    file.tidy(None).unwrap();
    base_is(&folder, &["1|'a'|'b'|'1'", "2|'x'|'b'|'2'"]);
}

#[test]
fn a_rejection_that_a_power_cut_could_undo_is_said_to_be_here() {
    let (folder, mut file, t) = start_with(&[(1, "a", "b", "1")]);
    file.look().unwrap();
    let wal = beside(folder.path(), "-wal");
    let bytes = || std::fs::metadata(&wal).unwrap().len();
    let end = bytes();
    let pinning = reader(folder.path());
    pinning.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    folder.write(|program| t.set(program, 1, &[("a", text("mine"))]));
    // A byte of a frame's salts: read after a power cut, the WAL would end here.
    let mut damaged = std::fs::read(&wal).unwrap();
    damaged[usize::try_from(end).unwrap() + 8] ^= 1;
    std::fs::write(&wal, &damaged).unwrap();
    file.look().unwrap();
    let seq = folder.assign(&mut file);
    file.apply(&live(
        20,
        &[receipt(&file, seq), rejection(&file, seq, Some(0))],
    ))
    .unwrap();
    assert_eq!(file.local().unwrap().settled, 0);
    drop(pinning);
    assert_eq!(file.local().unwrap().settled, seq);
}
