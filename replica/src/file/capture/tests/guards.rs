//! What we write, with programs' triggers in the way: nothing is captured, and what those would write to synced tables is
//! suppressed.

use super::*;
use crate::file::tests::*;

fn writable(id: u32, name: &str) -> v1::Element {
    let mut table = declared(
        id,
        name,
        &[("id", v1::Storage::Integer, 1), ("v", v1::Storage::Text, 0)],
    );
    table.writable = true;
    element(v1::element::Kind::Table(table))
}

/// `t` and `u`, with rows; all that it says is by a stream.
fn full(lsn: u64, t: &[&[anabranch_proto::record::ValueRef<'_>]]) -> v1::Down {
    down(vec![
        first(&[1, 2]),
        writable(1, "t"),
        writable(2, "u"),
        upserts(1, t),
        upserts(2, &[&[I(1), T("a")], &[I(2), T("b")]]),
        commit(lsn),
    ])
}

const NOTHING: [&str; 0] = [];

#[test]
fn what_we_write_is_not_captured() {
    for trigger in [
        "",
        "CREATE TABLE own(id); CREATE TRIGGER p AFTER INSERT ON t BEGIN INSERT INTO own VALUES(NEW.id); END",
    ] {
        let folder = Folder::new();
        let mut file = folder.open();
        file.apply(&full(1, &[&[I(1), T("one")], &[I(2), T("two")]]))
            .unwrap();
        folder.program(trigger);
        let ops = packed(&[&[I(2), T("zwei")], &[I(3), T("three")]], &[&[I(1)]]);
        file.apply(&down(vec![begin(&[]), rows(1, ops, false), commit(2)]))
            .unwrap();
        file.begin_stream().unwrap();
        file.apply(&full(3, &[&[I(3), T("drei")], &[I(4), T("four")]]))
            .unwrap();
        assert_eq!(folder.query("SELECT * FROM t"), ["3|'drei'", "4|'four'"]);
        assert_eq!(
            folder.query("SELECT * FROM _anabranch_base_t"),
            ["3|'drei'", "4|'four'"]
        );
        assert_eq!(lines(&reader(folder.path())), NOTHING);
        assert_eq!(folder.query("SELECT last FROM _anabranch_head"), ["0"]);
        // And a program is, right after.
        folder.program("UPDATE t SET v = 'x' WHERE id = 3; INSERT INTO u VALUES(9, 'y')");
        assert_eq!(
            lines(&reader(folder.path())),
            ["update t 3: v 'drei' > 'x'", "insert u 9, 'y'"]
        );
        assert_eq!(
            folder.query("SELECT * FROM _anabranch_base_t"),
            ["4|'four'", "3|'drei'"]
        );
    }
}

#[test]
fn what_a_programs_trigger_writes_to_synced_tables_is_suppressed_while_we_apply() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&full(1, &[&[I(1), T("one")], &[I(2), T("two")]]))
        .unwrap();
    folder.program(
        "CREATE TABLE own(what, id);
         CREATE TRIGGER i AFTER INSERT ON t BEGIN
           INSERT INTO own VALUES('insert', NEW.id);
           INSERT INTO u VALUES(NEW.id + 100, 'storm') ON CONFLICT DO NOTHING;
           REPLACE INTO u VALUES(1, 'storm');
           UPDATE t SET v = 'touched';
           INSERT INTO own VALUES('inserted', NEW.id);
         END;
         CREATE TRIGGER b BEFORE UPDATE ON t BEGIN
           UPDATE u SET v = 'storm';
           DELETE FROM u WHERE id = OLD.id;
           INSERT INTO own VALUES('update', NEW.id);
         END;
         CREATE TRIGGER d AFTER DELETE ON t BEGIN
           DELETE FROM u;
           INSERT INTO own VALUES('delete', OLD.id);
         END;
         CREATE TRIGGER nested AFTER INSERT ON own BEGIN DELETE FROM u WHERE id = 2; END;",
    );
    let ops = packed(&[&[I(2), T("zwei")], &[I(3), T("three")]], &[&[I(1)]]);
    file.apply(&down(vec![begin(&[]), rows(1, ops, false), commit(2)]))
        .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["2|'zwei'", "3|'three'"]);
    assert_eq!(folder.query("SELECT * FROM u"), ["1|'a'", "2|'b'"]);
    assert_eq!(
        folder.query("SELECT * FROM own"),
        ["'update'|2", "'insert'|3", "'inserted'|3", "'delete'|1"]
    );
    assert_eq!(lines(&reader(folder.path())), NOTHING);
    // In a reset as well, into the table as it is and into one that is made anew.
    file.begin_stream().unwrap();
    file.apply(&full(3, &[&[I(3), T("drei")], &[I(4), T("four")]]))
        .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["3|'drei'", "4|'four'"]);
    assert_eq!(folder.query("SELECT * FROM u"), ["1|'a'", "2|'b'"]);
    folder.program("DELETE FROM own");
    file.begin_stream().unwrap();
    let mut wider = declared(
        1,
        "t",
        &[
            ("id", v1::Storage::Integer, 1),
            ("v", v1::Storage::Text, 0),
            ("w", v1::Storage::Text, 0),
        ],
    );
    wider.writable = true;
    file.apply(&down(vec![
        first(&[1]),
        element(v1::element::Kind::Table(wider)),
        writable(2, "u"),
        upserts(1, &[&[I(4), T("four"), N], &[I(5), T("five"), N]]),
        commit(4),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT * FROM t"),
        ["4|'four'|NULL", "5|'five'|NULL"]
    );
    assert_eq!(folder.query("SELECT * FROM u"), ["1|'a'", "2|'b'"]);
    assert_eq!(
        folder.query("SELECT what, id FROM own WHERE what <> 'inserted'"),
        ["'delete'|3", "'delete'|4", "'insert'|4", "'insert'|5"]
    );
    assert_eq!(folder.query("SELECT * FROM _anabranch_dropped"), NOTHING);
    assert_eq!(lines(&reader(folder.path())), NOTHING);
    // A program's own writes set all of it off, and all of it is captured.
    folder.program("INSERT INTO t(id, v) VALUES(6, 'six')");
    let captured = lines(&reader(folder.path()));
    assert_eq!(
        captured.first().map(String::as_str),
        Some("insert t 6, 'six', NULL")
    );
    assert!(
        captured.contains(&"insert u 106, 'storm'".to_owned()),
        "{captured:?}"
    );
}

#[test]
fn our_row_is_written_where_all_columns_are_its_key() {
    let folder = Folder::new();
    let mut file = folder.open();
    let mut table = declared(
        1,
        "t",
        &[("a", v1::Storage::Integer, 1), ("b", v1::Storage::Text, 2)],
    );
    table.writable = true;
    file.apply(&down(vec![
        first(&[]),
        element(v1::element::Kind::Table(table)),
        upserts(1, &[&[I(1), T("x")]]),
        commit(1),
    ]))
    .unwrap();
    folder.program("CREATE TRIGGER p BEFORE INSERT ON t BEGIN DELETE FROM t WHERE a = 1; END");
    file.apply(&down(vec![
        begin(&[]),
        upserts(1, &[&[I(1), T("x")], &[I(2), T("y")]]),
        commit(2),
    ]))
    .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'x'", "2|'y'"]);
    assert_eq!(lines(&reader(folder.path())), NOTHING);
}
