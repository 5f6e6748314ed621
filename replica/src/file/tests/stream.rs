//! A stream that breaks the grammar is refused, and nothing of it is applied.

use super::*;

/// Gives `message` to a file that holds a row, in a stream whose first transaction is done; expects a stream error,
/// and that the file is as it was.
fn refused(what: &str, message: v1::Down) {
    refused_after(what, &[], message);
}

fn refused_after(what: &str, before: &[v1::Down], message: v1::Down) {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[&[I(1), T("a")]])).unwrap();
    for message in before {
        file.apply(message)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    match file.apply(&message) {
        Err(Error::Stream(_)) => {}
        other => panic!("{what}: {other:?}"),
    }
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"], "{what}");
    assert_eq!(file.position(), Some(position(10)), "{what}");
    assert_eq!(file.resume_token(), "token 10", "{what}");
    match file.apply(&down(vec![begin(&[]), commit(99)])) {
        Err(Error::Stream(_)) => {}
        other => panic!("{what}: the stream goes on: {other:?}"),
    }
    // A new one works.
    file.begin_stream().unwrap();
    file.apply(&resume(11)).unwrap();
    assert_eq!(file.position(), Some(position(11)), "{what}");
    assert_tidy(&folder);
}

fn good() -> v1::Element {
    upserts(1, &[&[I(2), T("b")]])
}

fn raw(ops: &[u8]) -> v1::Element {
    rows(1, Bytes::copy_from_slice(ops), false)
}

#[test]
fn elements_out_of_place_are_refused() {
    let unknown = v1::Element { kind: None };
    refused(
        "unset kind",
        down(vec![begin(&[]), good(), unknown, commit(11)]),
    );
    refused(
        "Begin twice",
        down(vec![begin(&[]), begin(&[]), good(), commit(11)]),
    );
    refused(
        "first twice",
        down(vec![first(&[]), simple(1, "t"), good(), commit(11)]),
    );
    refused("Commit without Begin", down(vec![commit(11)]));
    refused("Rows without Begin", down(vec![good()]));
    refused("Table without Begin", down(vec![simple(1, "t")]));
    refused(
        "Rows after Commit",
        down(vec![begin(&[]), commit(11), good()]),
    );
    refused(
        "Heartbeat in a transaction",
        down(vec![begin(&[]), good(), heartbeat(11, 11)]),
    );
    refused(
        "unknown table",
        down(vec![begin(&[]), upserts(9, &[]), commit(11)]),
    );
    refused(
        "reset of an unknown table",
        down(vec![begin(&[9]), good(), commit(11)]),
    );
    refused("reset twice", down(vec![begin(&[1, 1]), commit(11)]));
    refused(
        "Table after its Rows",
        down(vec![begin(&[]), good(), simple(1, "t"), commit(11)]),
    );
    refused(
        "id of another table",
        down(vec![begin(&[]), simple(1, "other"), commit(11)]),
    );
}

#[test]
fn positions_that_go_back_are_refused() {
    refused(
        "back in a stream",
        down(vec![begin(&[]), good(), commit(9)]),
    );
    refused("heartbeat back", down(vec![heartbeat(9, 9)]));
    let other_epoch = element(Kind::Commit(v1::Commit {
        position: Some(v1::Position { epoch: 1, lsn: 11 }),
        commit_time: 0,
        source_lsn: 0,
    }));
    refused(
        "another epoch",
        v1::Down {
            elements: vec![begin(&[]), good(), other_epoch],
            resume_token: "x".into(),
            ..v1::Down::default()
        },
    );
    let nowhere = element(Kind::Commit(v1::Commit::default()));
    refused(
        "no position",
        v1::Down {
            elements: vec![begin(&[]), good(), nowhere],
            resume_token: "x".into(),
            ..v1::Down::default()
        },
    );
    // A streamer that is behind the file.
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[&[I(1), T("a")]])).unwrap();
    file.begin_stream().unwrap();
    assert!(matches!(file.apply(&start(9, &[])), Err(Error::Stream(_))));
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
    assert_eq!(file.position(), Some(position(10)));
    file.begin_stream().unwrap();
    file.apply(&resume(10)).unwrap();
}

#[test]
fn tokens_out_of_place_are_refused() {
    let with = |elements, token: &str| v1::Down {
        elements,
        resume_token: token.to_owned().into(),
        ..v1::Down::default()
    };
    refused("no token", with(vec![begin(&[]), good(), commit(11)], ""));
    refused(
        "token in a transaction",
        with(vec![begin(&[]), good()], "x"),
    );
    refused("token of nothing", with(vec![], "x"));
    refused(
        "token too long",
        with(vec![begin(&[]), good(), commit(11)], &"x".repeat(70_000)),
    );
}

#[test]
fn malformed_rows_are_refused() {
    let with = |element| down(vec![begin(&[]), good(), element, commit(11)]);
    refused("too few values", with(upserts(1, &[&[I(3)]])));
    refused("too many values", with(upserts(1, &[&[I(3), N, N]])));
    refused("text in an integer", with(upserts(1, &[&[T("3"), N]])));
    refused("integer in a text", with(upserts(1, &[&[I(3), I(3)]])));
    refused("blob in a text", with(upserts(1, &[&[I(3), B(b"x")]])));
    refused("NULL in the key", with(upserts(1, &[&[N, N]])));
    refused("NULL as key", with(deletes(1, &[&[N]])));
    refused("text as key", with(deletes(1, &[&[T("1")]])));
    refused("two values as key", with(deletes(1, &[&[I(1), I(1)]])));
    refused("no value as key", with(deletes(1, &[&[]])));
    refused("empty record", with(raw(&[0])));
    refused("cut record", with(raw(&[6, 3, 1])));
    refused("no UTF-8", with(raw(&[10, 3, 9, 15, 0xFF, 0])));
    refused("reserved type", with(raw(&[8, 3, 10, 10, 0])));
    refused("endless length", with(raw(&[0xFF; 20])));
    refused(
        "a row above the limit",
        with(raw(&[0xFE, 0xFF, 0xFF, 0xFF, 0x7F])),
    );
    refused("ends in a row", with(raw(&[20, 3, 1])));
    refused(
        "the same in a reset",
        down(vec![
            begin(&[1]),
            good(),
            upserts(1, &[&[I(3)]]),
            commit(11),
        ]),
    );
}

#[test]
fn pieces_that_do_not_go_on_are_refused() {
    let ops = packed(&[&[I(2), T("bbbbbbbbbbbbbbbb")]], &[]);
    let head = || rows(1, ops.slice(..5), true);
    let tail = || rows(1, ops.slice(5..), false);
    let table = simple(2, "u");
    refused("then a commit", down(vec![begin(&[]), head(), commit(11)]));
    refused(
        "then another table",
        down(vec![
            begin(&[]),
            table,
            head(),
            upserts(2, &[]),
            tail(),
            commit(11),
        ]),
    );
    refused_after(
        "in the next message",
        &[down(vec![begin(&[]), head()])],
        down(vec![commit(11)]),
    );
    refused(
        "never whole",
        down(vec![begin(&[]), head(), head(), commit(11)]),
    );
    refused_after(
        "in a reset",
        &[down(vec![begin(&[1]), head()])],
        down(vec![commit(11)]),
    );
}

#[test]
fn names_that_sqlite_cannot_tell_apart_are_for_a_person_to_mend() {
    for (one, other) in [("t", "T"), ("s.t", "S.t"), ("a.b", "public.a.b")] {
        let folder = Folder::new();
        let mut file = folder.open();
        let two = match file.apply(&down(vec![
            first(&[]),
            simple(1, one),
            simple(2, other),
            commit(1),
        ])) {
            Err(Error::Definite(text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(two.contains("same name"), "{two}");
    }
}

#[test]
fn a_heartbeat_before_the_first_transaction_proves_nothing() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[&[I(1), T("a")]])).unwrap();
    file.begin_stream().unwrap();
    let applied = file.apply(&down(vec![heartbeat(500, 500)])).unwrap();
    assert_eq!(applied.position, None);
    file.report(true, None).unwrap();
    assert_eq!(file.position(), Some(position(10)));
    assert_eq!(file.resume_token(), "token 10");
    file.apply(&down(vec![
        heartbeat(500, 500),
        first(&[]),
        simple(1, "t"),
        commit(11),
    ]))
    .unwrap();
    assert_eq!(file.position(), Some(position(11)));
}

#[test]
fn an_unfinished_transaction_is_forgotten_by_a_new_stream() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[&[I(1), T("a")]])).unwrap();
    file.apply(&down(vec![begin(&[]), upserts(1, &[&[I(2), T("b")]])]))
        .unwrap();
    file.begin_stream().unwrap();
    assert!(matches!(
        file.apply(&down(vec![begin(&[]), commit(11)])),
        Err(Error::Stream(_))
    ));
    file.begin_stream().unwrap();
    file.apply(&resume(11)).unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
}

#[test]
fn a_streamer_cannot_make_us_remember_without_end() {
    let folder = Folder::new();
    let mut file = folder.open();
    let mut wide = declared(1, "t", &[("id", Integer, 1)]);
    for i in 0..1500 {
        let mut column = wide.columns[0].clone();
        column.name = format!("column {i} {}", "x".repeat(200));
        column.postgres_type = "y".repeat(1000);
        column.key_position = 0;
        wide.columns.push(column);
    }
    file.apply(&down(vec![first(&[])])).unwrap();
    let mut declare = |id| {
        wide.id = id;
        wide.name = format!("t{id}");
        file.apply(&down(vec![element(Kind::Table(wide.clone()))]))
    };
    let refused = (1..100).find(|&id| declare(id).is_err());
    assert!(refused.is_some_and(|id| id > 5), "{refused:?}");
}
