//! Ids and defaults over streams: what is leased, offered and dropped, and how defaults change under rows and programs.

use super::*;

fn notes(default: v1::DefaultKind, value: &str) -> v1::Table {
    let mut table = declared(
        1,
        "t",
        &[("id", Integer, 1), ("v", Text, 0), ("w", Text, 0)],
    );
    table.writable = true;
    table.columns[0].default_kind = v1::DefaultKind::Sequence.into();
    table.columns[1].default_kind = default.into();
    table.columns[1].not_null = default != v1::DefaultKind::Other;
    if default == v1::DefaultKind::Value {
        table.columns[1].default_value = record::build([ValueRef::Text(value)]);
    }
    table
}

fn begun(folder: &Folder, table: &v1::Table) -> File {
    let mut file = folder.open();
    let row: &[ValueRef<'_>] = &[ValueRef::Integer(1), ValueRef::Text("a"), ValueRef::Null];
    let elements = vec![
        first(&[1]),
        element(Kind::Table(table.clone())),
        upserts(1, &[row]),
        commit(10),
    ];
    file.apply(&down(elements)).unwrap();
    file
}

fn redeclare(file: &mut File, table: &v1::Table, lsn: u64) {
    let elements = vec![begin(&[]), element(Kind::Table(table.clone())), commit(lsn)];
    file.apply(&down(elements)).unwrap();
}

fn block(first: i64, last: i64, step: i64) -> v1::Block {
    v1::Block { first, last, step }
}

fn ids(blocks: &[v1::Block]) -> v1::Ids {
    v1::Ids {
        schema: "public".into(),
        table: "t".into(),
        blocks: blocks.to_vec(),
    }
}

const OFFERED: &str = "SELECT next_id, last_id FROM _anabranch_ids WHERE table_name = 't'";
const TAKE: &str =
    "INSERT INTO t(id) VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = 't'))";

#[test]
fn more_ids_are_asked_for_than_are_used() {
    let folder = Folder::new();
    let mut file = begun(&folder, &notes(v1::DefaultKind::Value, "x"));
    let wanted = vec![("public".to_owned(), "t".to_owned())];
    assert_eq!(file.leases_wanted().unwrap(), wanted);
    file.lease(&ids(&[])).unwrap();
    assert_eq!(file.leases_wanted().unwrap(), wanted);
    file.lease(&ids(&[block(10, 15, 1), block(20, 23, 1)]))
        .unwrap();
    for _ in 0..5 {
        assert!(file.leases_wanted().unwrap().is_empty());
        folder.program(TAKE);
    }
    assert!(file.leases_wanted().unwrap().is_empty());
    folder.program(TAKE);
    // Four are left of ten.
    assert_eq!(file.leases_wanted().unwrap(), wanted);
    file.lease(&ids(&[block(30, 39, 1)])).unwrap();
    assert!(file.leases_wanted().unwrap().is_empty());
    assert_eq!(folder.query(OFFERED), ["20|23"]);
}

#[test]
fn ids_outlive_what_they_were_leased_for() {
    let folder = Folder::new();
    let table = notes(v1::DefaultKind::Value, "x");
    let mut file = begun(&folder, &table);
    file.lease(&ids(&[block(10, 15, 1)])).unwrap();
    drop(file);
    let mut file = folder.open();
    assert_eq!(folder.query(OFFERED), ["10|15"]);
    // Sent in full: it may be another table of that name.
    let elements = vec![first(&[1]), element(Kind::Table(table.clone())), commit(20)];
    file.apply(&down(elements)).unwrap();
    assert_eq!(folder.query(OFFERED), [""; 0]);
    file.lease(&ids(&[block(20, 25, 1)])).unwrap();
    assert_eq!(folder.query(OFFERED), ["20|25"]);
    // Another history.
    folder.program("UPDATE _anabranch_state SET epoch = 'another'");
    assert_eq!(folder.query(OFFERED), [""; 0]);
}

#[test]
fn blocks_that_make_no_sense_are_kept() {
    let folder = Folder::new();
    let mut file = begun(&folder, &notes(v1::DefaultKind::Value, "x"));
    for wrong in [
        block(1, 2, 0),
        block(2, 1, 1),
        block(1, 2, -1),
        block(1, 4, 2),
        block(i64::MIN, i64::MAX, 1),
        block(i64::MIN, i64::MIN + 1, i64::MIN),
    ] {
        let kept = file.lease(&ids(&[block(1, 1, 1), wrong]));
        assert!(matches!(kept, Err(Error::Stream(_))), "{wrong:?}: {kept:?}");
    }
    assert_eq!(folder.query(OFFERED), [""; 0]);
}

#[test]
fn a_default_changes_and_rows_or_triggers_or_pending_writes_are_gone() {
    let folder = Folder::new();
    let mut file = begun(&folder, &notes(v1::DefaultKind::Value, "x"));
    folder.program(
        "CREATE TABLE seen(v);
         CREATE TRIGGER mine AFTER INSERT ON t BEGIN INSERT INTO seen VALUES(NEW.v); END;
         CREATE VIEW all_of_t AS SELECT * FROM t;
         INSERT INTO t(id) VALUES(2)",
    );
    redeclare(&mut file, &notes(v1::DefaultKind::Value, "it's new"), 20);
    folder.program("INSERT INTO t(id) VALUES(3)");
    redeclare(&mut file, &notes(v1::DefaultKind::Other, ""), 30);
    folder.program("INSERT INTO t(id) VALUES(4)");
    let rows = ["1|'a'", "2|'x'", "3|'it's new'", "4|NULL"];
    assert_eq!(folder.query("SELECT id, v FROM all_of_t ORDER BY id"), rows);
    assert_eq!(
        folder.query("SELECT v FROM seen"),
        ["'x'", "'it's new'", "NULL"]
    );
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["3"]
    );
    assert_eq!(
        folder.query("SELECT state FROM _anabranch_tables"),
        ["'live'"]
    );
    assert_eq!(folder.query("PRAGMA integrity_check"), ["'ok'"]);
    drop(file);
    // A stream that resumes: nothing is sent in full.
    let mut file = folder.open();
    let declared = element(Kind::Table(notes(v1::DefaultKind::Other, "")));
    file.apply(&down(vec![first(&[]), declared, commit(40)]))
        .unwrap();
    assert_eq!(folder.query("SELECT count(*) FROM t"), ["4"]);
}

#[test]
fn a_null_is_in_a_column_that_may_not_be_null_again() {
    let folder = Folder::new();
    let mut file = begun(&folder, &notes(v1::DefaultKind::Other, ""));
    folder.program("INSERT INTO t(id) VALUES(2)");
    let table = element(Kind::Table(notes(v1::DefaultKind::None, "")));
    let declared = down(vec![begin(&[]), table, commit(20)]);
    // It is sent in full, then.
    assert!(matches!(file.apply(&declared), Err(Error::Stream(_))));
    assert!(file.resume_token().is_empty());
}
