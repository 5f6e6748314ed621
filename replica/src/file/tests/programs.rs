//! What programs do to the schema that they share with us.

use super::*;

fn started() -> (Folder, File) {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("one")], &[I(2), T("two")]]))
        .unwrap();
    (folder, file)
}

fn change(lsn: u64, id: i64, v: &str) -> v1::Down {
    down(vec![begin(&[]), upserts(1, &[&[I(id), T(v)]]), commit(lsn)])
}

#[test]
fn a_full_text_index_kept_by_a_programs_triggers_follows_what_is_applied() {
    let (folder, mut file) = started();
    // As the manual of FTS5 says, by the sqlite3 program.
    let made = sqlite3(
        folder.path(),
        "CREATE VIRTUAL TABLE fts USING fts5(v, content='t', content_rowid='id');
         INSERT INTO fts(fts) VALUES('rebuild');
         CREATE TRIGGER t_ai AFTER INSERT ON t BEGIN INSERT INTO fts(rowid, v) VALUES (new.id, new.v); END;
         CREATE TRIGGER t_ad AFTER DELETE ON t BEGIN INSERT INTO fts(fts, rowid, v) VALUES('delete', old.id, old.v); END;
         CREATE TRIGGER t_au AFTER UPDATE ON t BEGIN
           INSERT INTO fts(fts, rowid, v) VALUES('delete', old.id, old.v);
           INSERT INTO fts(rowid, v) VALUES (new.id, new.v);
         END;",
    );
    assert_eq!(made, "");
    let ops = packed(&[&[I(2), T("zwei two")], &[I(3), T("three")]], &[&[I(1)]]);
    file.apply(&down(vec![begin(&[]), rows(1, ops, false), commit(2)]))
        .unwrap();
    let find = |word: &str| {
        sqlite3(
            folder.path(),
            &format!("SELECT rowid FROM fts WHERE fts MATCH '{word}' ORDER BY rowid"),
        )
    };
    assert_eq!(
        [find("one"), find("zwei"), find("two"), find("three")],
        ["", "2\n", "2\n", "3\n"]
    );
    // And a reset.
    file.begin_stream().unwrap();
    file.apply(&start(3, &[&[I(3), T("drei")], &[I(4), T("two")]]))
        .unwrap();
    assert_eq!(
        [find("two"), find("three"), find("drei")],
        ["4\n", "", "3\n"]
    );
    assert_eq!(
        sqlite3(
            folder.path(),
            "INSERT INTO fts(fts, rank) VALUES('integrity-check', 1)"
        ),
        ""
    );
    assert_eq!(
        folder.query("SELECT * FROM _anabranch_dropped"),
        Vec::<String>::new()
    );
}

#[test]
fn what_programs_have_in_the_file_stays() {
    let folder = Folder::new();
    folder.program(
        "PRAGMA user_version = 7; PRAGMA application_id = 42;
         CREATE TABLE own(id INTEGER PRIMARY KEY, v); INSERT INTO own VALUES(1, 'mine');",
    );
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("one")]])).unwrap();
    folder.program(
        "CREATE INDEX own_index ON t(v); CREATE VIEW own_view AS SELECT * FROM t JOIN own USING(id);
         INSERT INTO own VALUES(2, 'too');",
    );
    file.apply(&change(2, 2, "two")).unwrap();
    drop(file);
    let mut file = folder.open();
    file.apply(&resume(3)).unwrap();
    assert_eq!(folder.query("PRAGMA user_version"), ["7"]);
    assert_eq!(folder.query("PRAGMA application_id"), ["42"]);
    assert_eq!(
        folder.query("SELECT * FROM own_view"),
        ["1|'one'|'mine'", "2|'two'|'too'"]
    );
    assert_eq!(
        folder.query("SELECT count(*) FROM sqlite_schema WHERE name = 'own_index'"),
        ["1"]
    );
    assert_eq!(
        folder.query("SELECT * FROM _anabranch_dropped"),
        Vec::<String>::new()
    );
}

#[test]
fn a_programs_table_where_ours_belongs_is_never_touched() {
    for sql in [
        "CREATE TABLE T(mine); INSERT INTO T VALUES(1)",
        "CREATE VIEW t AS SELECT 1",
        "CREATE TABLE x(mine); CREATE INDEX t ON x(mine)",
        "CREATE VIRTUAL TABLE t USING fts5(mine)",
    ] {
        let folder = Folder::new();
        folder.program(sql);
        let before =
            folder.query("SELECT name, sql FROM sqlite_schema WHERE name NOT GLOB '_anabranch_*'");
        let mut file = folder.open();
        match file.apply(&start(1, &[&[I(1), N]])) {
            Err(Error::Definite(text)) => assert!(text.contains("rename"), "{text}"),
            other => panic!("{sql}: {other:?}"),
        }
        assert_eq!(
            folder.query("SELECT name, sql FROM sqlite_schema WHERE name NOT GLOB '_anabranch_*'"),
            before
        );
        assert_eq!(file.position(), None);
    }
}

#[test]
fn a_unique_index_of_a_program_is_dropped_and_reported() {
    let (folder, mut file) = started();
    folder.program("CREATE UNIQUE INDEX own ON t(v); CREATE INDEX fine ON t(v);");
    file.apply(&change(2, 3, "two")).unwrap();
    assert_eq!(
        folder.query("SELECT * FROM t"),
        ["1|'one'", "2|'two'", "3|'two'"]
    );
    assert_eq!(
        folder.query("SELECT kind, name, table_name, sql FROM _anabranch_dropped"),
        ["'index'|'own'|'t'|'CREATE UNIQUE INDEX own ON t(v)'"]
    );
    assert_eq!(
        folder.query("SELECT reason LIKE '%UNIQUE%', dropped_time GLOB '20??-??-?? ??:??:??.??????Z' FROM _anabranch_dropped"),
        ["1|1"]
    );
    // Also one that was made while no replica ran.
    drop(file);
    folder.program("CREATE UNIQUE INDEX own2 ON t(v, id)");
    folder.open();
    assert_eq!(
        folder.query("SELECT name FROM sqlite_schema WHERE tbl_name = 't' AND type = 'index'"),
        ["'fine'"]
    );
}

#[test]
fn a_table_that_a_program_altered_is_sent_again_and_the_file_says_so() {
    for alter in [
        "DROP TABLE t",
        "ALTER TABLE t RENAME TO gone",
        "ALTER TABLE t ADD COLUMN x TEXT",
        "ALTER TABLE t RENAME COLUMN v TO w",
        "DROP TABLE t; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT); INSERT INTO t VALUES(7, 'fake')",
    ] {
        for while_running in [true, false] {
            let folder = Folder::new();
            let mut file = folder.open();
            let full = |lsn, records: &[&[ValueRef<'_>]]| {
                let declare = with_index(simple(1, "t"), "by_v", &[1]);
                down(vec![first(&[1]), declare, upserts(1, records), commit(lsn)])
            };
            file.apply(&full(1, &[&[I(1), T("one")], &[I(2), T("two")]]))
                .unwrap();
            let mut file = Some(file);
            if !while_running {
                file = None;
            }
            folder.program(alter);
            let mut file = match file {
                Some(mut file) => {
                    match file.apply(&down(vec![begin(&[]), commit(2)])) {
                        Err(Error::Stream(text)) => assert!(text.contains("a program"), "{text}"),
                        other => panic!("{alter}: {other:?}"),
                    }
                    file.begin_stream().unwrap();
                    file
                }
                None => folder.open(),
            };
            assert_eq!(file.resume_token(), "", "{alter}");
            assert_eq!(
                folder.query("SELECT table_name, state, lsn FROM _anabranch_tables"),
                ["'t'|'stopped'|'0/1'"],
                "{alter}"
            );
            // A streamer that did not send it in full would be refused.
            assert!(
                matches!(file.apply(&resume(2)), Err(Error::Stream(_))),
                "{alter}"
            );
            file.begin_stream().unwrap();
            file.apply(&full(3, &[&[I(1), T("one")], &[I(3), N]]))
                .unwrap_or_else(|e| panic!("{alter}: {e}"));
            assert_eq!(
                folder.query(
                    "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND tbl_name = 't'"
                ),
                ["1"],
                "{alter}"
            );
            assert_eq!(
                folder.query("SELECT * FROM t"),
                ["1|'one'", "3|NULL"],
                "{alter}"
            );
            assert_eq!(
                folder.query("SELECT * FROM _anabranch_tables"),
                ["'t'|'live'|NULL|'0/3'"],
                "{alter}"
            );
            assert_eq!(
                folder.query("SELECT * FROM _anabranch_base_t"),
                ["1|'one'", "3|NULL"],
                "{alter}"
            );
            file.apply(&change(4, 1, "uno")).unwrap();
            assert_eq!(file.resume_token(), "token 4");
        }
    }
}

#[test]
fn an_altered_table_does_not_disturb_the_others() {
    let folder = Folder::new();
    let mut file = folder.open();
    let full = |lsn| {
        down(vec![
            first(&[1, 2]),
            simple(1, "t"),
            simple(2, "u"),
            upserts(1, &[&[I(1), T("a")]]),
            upserts(2, &[&[I(1), T("a")], &[I(2), T("b")]]),
            commit(lsn),
        ])
    };
    file.apply(&full(1)).unwrap();
    folder.program(
        "CREATE TABLE seen(what); CREATE TRIGGER s AFTER UPDATE ON u BEGIN INSERT INTO seen VALUES('u'); END;
         CREATE TRIGGER s2 AFTER INSERT ON u BEGIN INSERT INTO seen VALUES('i'); END;
         DROP TABLE t;",
    );
    // Rows of the other table alone: noticed all the same.
    assert!(matches!(
        file.apply(&down(vec![
            begin(&[]),
            upserts(2, &[&[I(9), N]]),
            commit(2)
        ])),
        Err(Error::Stream(_))
    ));
    assert_eq!(folder.query("SELECT count(*) FROM u"), ["2"]);
    file.begin_stream().unwrap();
    file.apply(&full(2)).unwrap();
    assert_eq!(folder.query("SELECT * FROM seen"), Vec::<String>::new());
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
}

#[test]
fn our_own_indexes_and_views_that_a_program_dropped_are_made_again() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![
        first(&[1]),
        with_index(simple(1, "t"), "by_v", &[1]),
        commit(1),
    ]))
    .unwrap();
    let ours = "SELECT name, sql FROM sqlite_schema ORDER BY name";
    let before = folder.query(ours);
    folder.program(
        "DROP INDEX by_v; DROP VIEW _anabranch_status; DROP VIEW _anabranch_base_t; DROP VIEW _anabranch_tables;
         DROP TABLE _anabranch_dropped;",
    );
    file.apply(&change(2, 1, "x")).unwrap();
    assert_eq!(folder.query(ours), before);
    assert_eq!(folder.query("SELECT lsn FROM _anabranch_status"), ["'0/2'"]);
    folder.program("DROP INDEX by_v; CREATE UNIQUE INDEX by_v ON t(v);");
    file.apply(&change(3, 2, "x")).unwrap();
    assert_eq!(folder.query(ours), before);
}

#[test]
fn a_trigger_or_index_that_refuses_rows_is_dropped_and_no_other() {
    for (what, culprit) in [
        (
            "raises",
            "CREATE TRIGGER bad BEFORE INSERT ON t BEGIN SELECT RAISE(ABORT, 'no'); END",
        ),
        (
            "rolls back",
            "CREATE TRIGGER bad AFTER UPDATE ON t BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
        ),
        (
            "ignores inserts",
            "CREATE TRIGGER bad BEFORE INSERT ON t WHEN new.id = 3 BEGIN SELECT RAISE(IGNORE); END",
        ),
        (
            "ignores updates",
            "CREATE TRIGGER bad BEFORE UPDATE ON t BEGIN SELECT RAISE(IGNORE); END",
        ),
        (
            "ignores deletes",
            "CREATE TRIGGER bad BEFORE DELETE ON t BEGIN SELECT RAISE(IGNORE); END",
        ),
        (
            "fails",
            "CREATE TRIGGER bad AFTER INSERT ON t BEGIN INSERT INTO own VALUES(1); END",
        ),
        (
            "refers to nothing",
            "CREATE TRIGGER bad AFTER DELETE ON t BEGIN DELETE FROM not_there; END",
        ),
        (
            "calls what we don't have",
            "CREATE TRIGGER bad AFTER INSERT ON t BEGIN SELECT my_function(new.id); END",
        ),
        (
            "is an index that fails",
            "CREATE INDEX bad ON t(json_extract(v, '$.a'))",
        ),
        (
            "deletes from a full-text index that was never built",
            "CREATE VIRTUAL TABLE fts USING fts5(v, content='t', content_rowid='id');
             CREATE TRIGGER bad AFTER DELETE ON t BEGIN
               INSERT INTO fts(fts, rowid, v) VALUES('delete', old.id, old.v);
             END",
        ),
    ] {
        for reset in [false, true] {
            let folder = Folder::new();
            let mut file = folder.open();
            file.apply(&start(1, &[&[I(1), T("1")], &[I(2), T("2")]]))
                .unwrap();
            let program = Connection::open(folder.path()).unwrap();
            program
                .create_scalar_function(
                    "my_function",
                    1,
                    rusqlite::functions::FunctionFlags::default(),
                    |_| Ok(1),
                )
                .unwrap();
            program
                .execute_batch(&format!(
                    "CREATE TABLE own(id INTEGER PRIMARY KEY); INSERT INTO own VALUES(1);
                     CREATE TABLE seen(id);
                     CREATE TRIGGER good AFTER UPDATE ON t BEGIN INSERT INTO seen VALUES(new.id); END;
                     CREATE INDEX good_index ON t(v, id);
                     {culprit};"
                ))
                .unwrap();
            if reset {
                file.begin_stream().unwrap();
                file.apply(&start(2, &[&[I(2), T("no json")], &[I(3), T("x")]]))
            } else {
                let ops = packed(&[&[I(2), T("no json")], &[I(3), T("x")]], &[&[I(1)]]);
                file.apply(&down(vec![begin(&[]), rows(1, ops, false), commit(2)]))
            }
            .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(
                folder.query("SELECT * FROM t"),
                ["2|'no json'", "3|'x'"],
                "{what}"
            );
            assert_eq!(
                folder.query("SELECT name FROM _anabranch_dropped"),
                ["'bad'"],
                "{what}"
            );
            assert_eq!(folder.query("SELECT * FROM seen"), ["2"], "{what}");
        }
    }
}

#[test]
fn an_insert_trigger_of_a_program_may_ignore_rows_that_are_all_key_and_there() {
    let folder = Folder::new();
    let mut file = folder.open();
    let columns = &[("a", Integer, 1), ("b", Integer, 2)];
    file.apply(&down(vec![
        first(&[]),
        table(1, "t", columns),
        upserts(1, &[&[I(1), I(1)]]),
        commit(1),
    ]))
    .unwrap();
    folder.program("CREATE TRIGGER fine AFTER INSERT ON t BEGIN SELECT 1; END");
    file.apply(&down(vec![
        begin(&[]),
        upserts(1, &[&[I(1), I(1)]]),
        deletes(1, &[&[I(5), I(5)]]),
        commit(2),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT * FROM _anabranch_dropped"),
        Vec::<String>::new()
    );
}

#[test]
fn a_stage_that_a_program_dropped_ends_the_stream_and_no_more() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![
        first(&[1]),
        simple(1, "t"),
        upserts(1, &[&[I(1), N]]),
    ]))
    .unwrap();
    folder.program("DROP TABLE _anabranch_stage_1");
    assert!(matches!(
        file.apply(&down(vec![upserts(1, &[&[I(2), N]]), commit(1)])),
        Err(Error::Stream(_))
    ));
    file.begin_stream().unwrap();
    file.apply(&start(1, &[&[I(3), N]])).unwrap();
    assert_eq!(folder.query("SELECT id FROM t"), ["3"]);
}
