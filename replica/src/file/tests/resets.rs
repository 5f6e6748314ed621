//! Tables that come in full.

use super::*;

/// Counts what triggers of a program see.
const COUNTERS: &str = "
    CREATE TABLE seen(what TEXT, id INTEGER);
    CREATE TRIGGER seen_i AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('insert', new.id); END;
    CREATE TRIGGER seen_u AFTER UPDATE ON t BEGIN INSERT INTO seen VALUES('update', new.id); END;
    CREATE TRIGGER seen_d AFTER DELETE ON t BEGIN INSERT INTO seen VALUES('delete', old.id); END;
";

#[test]
fn triggers_and_changes_see_only_what_differs() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.set_report_changes(true);
    file.apply(&start(
        1,
        &[
            &[I(1), T("a")],
            &[I(2), T("b")],
            &[I(3), N],
            &[I(4), T("d")],
        ],
    ))
    .unwrap();
    folder.program(COUNTERS);
    file.begin_stream().unwrap();
    let mut changes = file
        .apply(&start(
            2,
            &[&[I(1), T("a")], &[I(2), T("B")], &[I(3), N], &[I(5), N]],
        ))
        .unwrap()
        .changes;
    assert_eq!(
        folder.query("SELECT * FROM seen ORDER BY id"),
        ["'update'|2", "'delete'|4", "'insert'|5"]
    );
    assert_eq!(
        folder.query("SELECT * FROM t"),
        ["1|'a'", "2|'B'", "3|NULL", "5|NULL"]
    );
    let keys = changes.remove(0).keys.unwrap();
    let mut keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
    keys.sort();
    assert_eq!(keys, ["[2]", "[4]", "[5]"]);
    assert_tidy(&folder);
    // Once more: nothing differs.
    folder.program("DELETE FROM seen");
    file.begin_stream().unwrap();
    let applied = file
        .apply(&start(
            3,
            &[&[I(1), T("a")], &[I(2), T("B")], &[I(3), N], &[I(5), N]],
        ))
        .unwrap();
    assert_eq!(applied.changes, []);
    assert_eq!(folder.query("SELECT * FROM seen"), Vec::<String>::new());
}

#[test]
fn a_table_of_keys_alone_is_compared_too() {
    let folder = Folder::new();
    let mut file = folder.open();
    let columns = &[("a", Text, 2), ("b", Blob, 1)];
    let full = |lsn, records: &[&[ValueRef<'_>]]| {
        down(vec![
            first(&[1]),
            table(1, "t", columns),
            upserts(1, records),
            commit(lsn),
        ])
    };
    file.apply(&full(1, &[&[T("x"), B(&[1])], &[T("y"), B(&[1])]]))
        .unwrap();
    folder.program("CREATE TABLE seen(what); CREATE TRIGGER i AFTER INSERT ON t BEGIN INSERT INTO seen VALUES(new.a); END;");
    file.begin_stream().unwrap();
    file.apply(&full(2, &[&[T("y"), B(&[1])], &[T("z"), B(&[1])]]))
        .unwrap();
    assert_eq!(folder.query("SELECT a FROM t ORDER BY a"), ["'y'", "'z'"]);
    assert_eq!(folder.query("SELECT * FROM seen"), ["'z'"]);
}

#[test]
fn a_reset_without_rows_empties_the_table_and_fires_triggers() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.set_report_changes(true);
    file.apply(&start(1, &[&[I(1), T("a")], &[I(2), T("b")]]))
        .unwrap();
    folder.program(COUNTERS);
    file.begin_stream().unwrap();
    let applied = file
        .apply(&down(vec![first(&[1]), simple(1, "t"), commit(2)]))
        .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), Vec::<String>::new());
    assert_eq!(
        folder.query("SELECT * FROM seen ORDER BY id"),
        ["'delete'|1", "'delete'|2"]
    );
    assert_eq!(applied.changes[0].keys.as_ref().unwrap().len(), 2);
}

#[test]
fn a_key_that_comes_again_within_a_reset_is_taken_last() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![
        first(&[1]),
        simple(1, "t"),
        upserts(1, &[&[I(1), T("a")], &[I(2), T("b")], &[I(3), T("c")]]),
    ]))
    .unwrap();
    file.apply(&down(vec![rows(
        1,
        packed(&[&[I(2), T("B")]], &[&[I(3)], &[I(9)]]),
        false,
    )]))
    .unwrap();
    file.apply(&down(vec![upserts(1, &[&[I(4), T("d")]]), commit(5)]))
        .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'", "2|'B'", "4|'d'"]);
}

#[test]
fn a_reset_in_the_middle_of_a_stream_follows_what_came_before_it() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("a")]])).unwrap();
    file.apply(&down(vec![
        begin(&[]),
        upserts(1, &[&[I(2), T("before")], &[I(3), T("before")]]),
        commit(2),
        begin(&[1]),
        upserts(1, &[&[I(3), T("reset")], &[I(4), T("reset")]]),
        commit(3),
        begin(&[]),
        rows(1, packed(&[&[I(5), T("after")]], &[&[I(4)]]), false),
        commit(4),
        begin(&[1]),
        upserts(1, &[&[I(3), T("reset")], &[I(5), T("after")], &[I(6), N]]),
        commit(5),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT * FROM t"),
        ["3|'reset'", "5|'after'", "6|NULL"]
    );
    assert_tidy(&folder);
}

#[test]
fn a_reader_sees_the_old_rows_or_the_new_ones_never_none() {
    let folder = Folder::new();
    let mut file = folder.open();
    let row = |i: i64, v: &str| packed(&[&[I(i), T(v)]], &[]);
    file.apply(&start(1, &[&[I(1), T("old")]])).unwrap();
    let snapshot = reader(folder.path());
    snapshot.execute_batch("BEGIN").unwrap();
    assert_eq!(query(&snapshot, "SELECT v FROM t"), ["'old'"]);
    file.begin_stream().unwrap();
    file.apply(&down(vec![first(&[1]), simple(1, "t")]))
        .unwrap();
    for i in 0..100 {
        file.apply(&down(vec![rows(1, row(i, "new"), false)]))
            .unwrap();
        assert_eq!(folder.query("SELECT v FROM t"), ["'old'"]);
    }
    file.apply(&down(vec![commit(2)])).unwrap();
    assert_eq!(folder.query("SELECT DISTINCT v FROM t"), ["'new'"]);
    assert_eq!(folder.query("SELECT count(*) FROM t"), ["100"]);
    assert_eq!(query(&snapshot, "SELECT v FROM t"), ["'old'"]);
    snapshot.execute_batch("COMMIT").unwrap();
    assert_eq!(query(&snapshot, "SELECT count(*) FROM t"), ["100"]);
}

#[test]
fn indexes_views_and_triggers_survive_that_a_stage_takes_the_tables_place() {
    let folder = Folder::new();
    let mut file = folder.open();
    let declare = |lsn, records: &[&[ValueRef<'_>]]| {
        down(vec![
            first(&[1]),
            with_index(simple(1, "t"), "by_v", &[1]),
            upserts(1, records),
            commit(lsn),
        ])
    };
    // Empty, with a program's view of it, and a program's own trigger that reads it.
    file.apply(&declare(1, &[])).unwrap();
    folder.program(
        "CREATE VIEW upper_t AS SELECT id, upper(v) AS v FROM t;
         CREATE TABLE own(id INTEGER PRIMARY KEY, n);
         CREATE TRIGGER own_i AFTER INSERT ON own BEGIN UPDATE own SET n = (SELECT count(*) FROM t); END;",
    );
    file.begin_stream().unwrap();
    file.apply(&declare(2, &[&[I(1), T("a")], &[I(2), T("b")]]))
        .unwrap();
    folder.program("INSERT INTO own(id) VALUES(1)");
    assert_eq!(folder.query("SELECT n FROM own"), ["2"]);
    assert_eq!(folder.query("SELECT v FROM upper_t"), ["'A'", "'B'"]);
    let indexes = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = 't'";
    assert_eq!(
        folder.query(indexes),
        [r#"'by_v'|'CREATE INDEX "by_v" ON "t"("v")'"#]
    );
    assert_eq!(
        folder.query("SELECT sql FROM sqlite_schema WHERE name = 't'"),
        [r#"'CREATE TABLE "t"("id" INTEGER PRIMARY KEY, "v" TEXT) STRICT'"#]
    );
    // A stage that took its place is not taken for altered by a program.
    file.apply(&down(vec![begin(&[]), commit(3)])).unwrap();
    drop(file);
    let file = folder.open();
    assert_eq!(file.resume_token(), "token 3");
    assert_eq!(
        folder.query("SELECT * FROM _anabranch_tables"),
        ["'t'|'live'|NULL|'0/3'"]
    );
}

#[test]
fn another_definition_needs_a_reset_and_gets_one() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("a")]])).unwrap();
    folder.program(
        "CREATE INDEX own_index ON t(v); CREATE INDEX own_expression ON t(lower(v));
         CREATE VIEW own_view AS SELECT id FROM t;",
    );
    let columns = &[("id", Integer, 1), ("w", Real, 0), ("v", Text, 0)];
    // Not sent in full: nothing is applied, and the token is forgotten.
    file.begin_stream().unwrap();
    assert!(matches!(
        file.apply(&down(vec![first(&[]), table(1, "t", columns), commit(2)])),
        Err(Error::Stream(_))
    ));
    file.begin_stream().unwrap();
    assert_eq!(file.resume_token(), "");
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
    assert_eq!(file.position(), Some(position(1)));
    // In full.
    file.apply(&down(vec![
        first(&[1]),
        table(1, "t", columns),
        upserts(1, &[&[I(1), R(0.5), T("a")], &[I(2), N, T("B")]]),
        commit(2),
    ]))
    .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|0.5|'a'", "2|NULL|'B'"]);
    assert_eq!(folder.query("SELECT * FROM own_view"), ["1", "2"]);
    assert_eq!(
        folder.query("SELECT name FROM sqlite_schema WHERE name GLOB 'own_*' ORDER BY name"),
        ["'own_expression'", "'own_index'", "'own_view'"]
    );
    assert_eq!(
        folder.query("SELECT column_name, postgres_type, position, is_key FROM _anabranch_columns ORDER BY position"),
        [
            "'id'|'storage_integer'|1|1",
            "'w'|'storage_real'|2|0",
            "'v'|'storage_text'|3|0"
        ]
    );
    // With triggers of a program; its index does not fit any more.
    folder.program(COUNTERS);
    file.begin_stream().unwrap();
    file.apply(&down(vec![
        first(&[1]),
        table(1, "t", &[("id", Integer, 1), ("x", Blob, 0)]),
        upserts(1, &[&[I(2), B(&[1])], &[I(3), N]]),
        commit(3),
    ]))
    .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["2|x'01'", "3|NULL"]);
    assert_eq!(
        folder.query("SELECT * FROM seen ORDER BY what, id"),
        ["'delete'|1", "'delete'|2", "'insert'|2", "'insert'|3"]
    );
    assert_eq!(
        folder.query("SELECT kind, name FROM _anabranch_dropped ORDER BY name"),
        ["'index'|'own_expression'", "'index'|'own_index'"]
    );
    assert_tidy(&folder);
}

#[test]
fn a_table_that_left_the_shapes_is_dropped_and_what_was_on_it_is_kept() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![
        first(&[]),
        simple(1, "t"),
        with_index(simple(2, "u"), "by_v", &[1]),
        upserts(2, &[&[I(1), N]]),
        commit(1),
    ]))
    .unwrap();
    folder.program("CREATE TRIGGER own AFTER INSERT ON u BEGIN SELECT 1; END; CREATE VIEW v AS SELECT * FROM u;");
    file.begin_stream().unwrap();
    file.apply(&resume(2)).unwrap();
    assert_eq!(
        folder
            .query("SELECT name FROM sqlite_schema WHERE tbl_name LIKE '%u' OR name LIKE '%by_v%'"),
        Vec::<String>::new()
    );
    assert_eq!(
        folder.query("SELECT table_name FROM _anabranch_tables"),
        ["'t'"]
    );
    assert_eq!(
        folder.query("SELECT kind, name, table_name FROM _anabranch_dropped"),
        ["'trigger'|'own'|'u'"]
    );
    // And may come back.
    file.begin_stream().unwrap();
    file.apply(&down(vec![
        first(&[2]),
        simple(1, "t"),
        with_index(simple(2, "u"), "by_v", &[1]),
        upserts(2, &[&[I(7), N]]),
        commit(3),
    ]))
    .unwrap();
    assert_eq!(folder.query("SELECT * FROM v"), ["7|NULL"]);
}

#[test]
fn a_stage_larger_than_one_step_is_thrown_away_whole() {
    let folder = Folder::new();
    let mut file = folder.open();
    let values: Vec<[ValueRef<'_>; 2]> = (0..45_000).map(|i| [I(i), T("x")]).collect();
    let values: Vec<&[ValueRef<'_>]> = values.iter().map(|row| &row[..]).collect();
    let text: Vec<String> = (0..45_000).map(|i| i.to_string()).collect();
    let keys: Vec<[ValueRef<'_>; 2]> = text.iter().map(|key| [T(key), T("x")]).collect();
    let keys: Vec<&[ValueRef<'_>]> = keys.iter().map(|row| &row[..]).collect();
    let columns = &[("a", Text, 1), ("b", Text, 2)];
    file.apply(&down(vec![
        first(&[1, 2]),
        simple(1, "t"),
        table(2, "u", columns),
        upserts(1, &values),
        upserts(2, &keys),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT count(*) FROM sqlite_schema WHERE name GLOB '_anabranch_stage_*'"),
        ["2"]
    );
    file.begin_stream().unwrap();
    assert_tidy(&folder);
    // The same when it was left by a crash.
    file.apply(&down(vec![
        first(&[2]),
        simple(1, "t"),
        table(2, "u", columns),
        upserts(2, &keys),
    ]))
    .unwrap();
    drop(file);
    folder.open();
    assert_tidy(&folder);
}

#[test]
fn a_table_as_wide_as_postgres_has_them_is_reset_again() {
    let folder = Folder::new();
    let mut file = folder.open();
    let names: Vec<String> = (0..1600).map(|i| format!("column {i}")).collect();
    let columns: Vec<(&str, v1::Storage, u32)> = names
        .iter()
        .zip(0..)
        .map(|(name, i)| (&**name, Integer, if i < 2 { i + 1 } else { 0 }))
        .collect();
    let row = |id: i64, last: ValueRef<'static>| {
        let mut row = vec![N; 1600];
        (row[0], row[1], row[1599]) = (I(id), I(id), last);
        row
    };
    let mut reset = |lsn, rows: &[Vec<ValueRef<'_>>]| {
        let rows: Vec<&[ValueRef<'_>]> = rows.iter().map(|row| &row[..]).collect();
        file.begin_stream().unwrap();
        file.set_report_changes(true);
        file.apply(&down(vec![
            first(&[1]),
            table(1, "wide", &columns),
            upserts(1, &rows),
            commit(lsn),
        ]))
        .unwrap()
    };
    let shown = r#"SELECT "column 0", "column 1599" FROM wide"#;
    reset(1, &[row(1, I(7)), row(2, N), row(3, I(7)), row(4, N)]);
    let applied = reset(2, &[row(1, I(7)), row(2, I(8)), row(4, N), row(5, N)]);
    assert_eq!(folder.query(shown), ["1|7", "2|8", "4|NULL", "5|NULL"]);
    // Only what differs: NULL is equal to NULL.
    assert_eq!(
        applied.changes[0].keys,
        Some(vec![[3, 3].into(), [2, 2].into(), [5, 5].into()])
    );
    // With a trigger, what came of it is compared.
    folder.program("CREATE TRIGGER own AFTER INSERT ON wide BEGIN SELECT 1; END");
    reset(3, &[row(1, N), row(6, I(9))]);
    assert_eq!(folder.query(shown), ["1|NULL", "6|9"]);
    assert_eq!(
        folder.query("SELECT * FROM _anabranch_dropped"),
        Vec::<String>::new()
    );
}

#[test]
fn an_index_makes_way_for_a_table_of_its_name() {
    // The table of that name comes: after the one with the index, before it, or in a later stream; in full, or not.
    for (order, reset) in [
        ("after", true),
        ("after", false),
        ("before", true),
        ("before", false),
        ("later", true),
        ("later", false),
    ] {
        let what = format!("{order}, reset {reset}");
        let folder = Folder::new();
        let mut file = folder.open();
        let indexed = || {
            let table = with_index(simple(1, "s.t"), "U", &[1]);
            // Nor may it get the name of a third.
            with_index(table, "by_v", &[1])
        };
        let others = || [simple(2, "u"), simple(3, "public.s.t_U")];
        let fill = |table| upserts(table, &[&[I(i64::from(table)), T("v")]]);
        let both: &[u32] = if reset { &[1, 2, 3] } else { &[] };
        let stream = |declared: Vec<v1::Element>, reset: &[u32], lsn| {
            let tables: Vec<u32> = (1..=declared.len() as u32).collect();
            let mut elements = vec![first(reset)];
            elements.extend(declared);
            elements.extend(tables.into_iter().map(fill));
            elements.push(commit(lsn));
            down(elements)
        };
        if order == "later" {
            let alone: &[u32] = if reset { &[1] } else { &[] };
            file.apply(&stream(vec![indexed()], alone, 1)).unwrap();
            file.begin_stream().unwrap();
        }
        let mut declared = Vec::from(others());
        declared.insert(if order == "before" { 2 } else { 0 }, indexed());
        for lsn in [2, 3] {
            file.apply(&stream(declared.clone(), both, lsn))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(
                folder.query(
                    r#"SELECT (SELECT id FROM u), (SELECT id FROM "s.t_U"), (SELECT id FROM "s.t")"#
                ),
                ["2|3|1"],
                "{what}"
            );
            assert_eq!(
                folder.query(
                    "SELECT name, tbl_name FROM sqlite_schema WHERE type = 'index' AND tbl_name NOT GLOB '_anabranch_*' ORDER BY name"
                ),
                ["'by_v'|'s.t'", "'s.t_U_2'|'s.t'"],
                "{what}"
            );
            assert_eq!(
                folder.query("SELECT index_name, postgres_name FROM _anabranch_indexes ORDER BY 1"),
                ["'by_v'|'by_v'", "'s.t_U_2'|'U'"],
                "{what}"
            );
            file.begin_stream().unwrap();
        }
        // A start takes nothing of it for altered.
        drop(file);
        assert_eq!(folder.open().resume_token(), "token 3", "{what}");
        assert_tidy(&folder);
    }
}
