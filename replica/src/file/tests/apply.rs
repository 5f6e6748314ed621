//! What arrives is what is in the file.

use super::*;

#[test]
fn every_type_arrives_as_it_was_and_nan_becomes_null() {
    let folder = Folder::new();
    let mut file = folder.open();
    let columns = &[
        ("id", Integer, 1),
        ("i", Integer, 0),
        ("r", Real, 0),
        ("t", Text, 0),
        ("b", Blob, 0),
    ];
    let long = "ä".repeat(100_000);
    let zeros = vec![0u8; 1000];
    file.apply(&down(vec![
        first(&[]),
        table(1, "types", columns),
        upserts(
            1,
            &[
                &[I(1), I(i64::MAX), R(f64::MAX), T(""), B(&[])],
                &[
                    I(2),
                    I(i64::MIN),
                    R(f64::NEG_INFINITY),
                    T("a'b\"c"),
                    B(&[0, 255]),
                ],
                &[I(3), I(0), R(f64::INFINITY), T(&long), B(&zeros)],
                &[I(-4), I(-1), R(f64::NAN), T("00"), B(b"00")],
                &[I(5), I(1), R(-0.0), T("1e3"), B(&[1])],
                &[I(6), N, N, N, N],
                &[
                    I(i64::MIN),
                    I(1 << 53),
                    R(f64::MIN_POSITIVE),
                    T("\u{10FFFF}"),
                    N,
                ],
                &[I(i64::MAX), I(7), R(0.1 + 0.2), T(" x "), N],
                &[I(7), I(7), R(f64::from(0.1f32)), T("x"), N],
            ],
        ),
        commit(10),
    ]))
    .unwrap();
    let there =
        folder.query("SELECT i, r, t, b FROM types WHERE id IN (1, 2, -4, 5, 6) ORDER BY abs(id)");
    assert_eq!(
        there,
        [
            format!("{}|{:?}|''|x''", i64::MAX, f64::MAX),
            format!("{}|-inf|'a'b\"c'|x'00ff'", i64::MIN),
            "-1|NULL|'00'|x'3030'".into(),
            // -0.0 becomes 0.0.
            "1|0.0|'1e3'|x'01'".into(),
            "NULL|NULL|NULL|NULL".into(),
        ]
    );
    assert_eq!(
        folder.query("SELECT r, t, length(b), b = zeroblob(1000) FROM types WHERE id = 3"),
        [format!("inf|'{long}'|1000|1")]
    );
    assert_eq!(
        folder
            .query("SELECT id, i, r, t FROM types WHERE abs(id / 2) > 1000 OR id = 7 ORDER BY id"),
        [
            format!(
                "{}|{}|{:?}|'\u{10FFFF}'",
                i64::MIN,
                1i64 << 53,
                f64::MIN_POSITIVE
            ),
            format!("7|7|{:?}|'x'", f64::from(0.1f32)),
            format!("{}|7|{:?}|' x '", i64::MAX, 0.1 + 0.2),
        ]
    );
}

#[test]
fn keys_of_any_shape_are_found_again() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&down(vec![
        first(&[]),
        table(
            1,
            "composite",
            &[("v", Text, 0), ("b", Text, 2), ("a", Integer, 1)],
        ),
        table(2, "text", &[("k", Text, 1), ("v", Integer, 0)]),
        table(3, "blob", &[("k", Blob, 1), ("v", Integer, 0)]),
        table(4, "all_key", &[("x", Integer, 2), ("y", Text, 1)]),
        upserts(
            1,
            &[
                &[T("one"), T("x"), I(1)],
                &[T("two"), T("y"), I(1)],
                &[T("three"), T("x"), I(2)],
            ],
        ),
        upserts(2, &[&[T("a"), I(1)], &[T("A"), I(2)], &[T(""), I(3)]]),
        upserts(3, &[&[B(&[0]), I(1)], &[B(&[]), I(2)]]),
        upserts(4, &[&[I(1), T("y")], &[I(2), T("y")]]),
        commit(1),
    ]))
    .unwrap();
    file.apply(&down(vec![
        begin(&[]),
        rows(
            1,
            packed(&[&[T("TWO"), T("y"), I(1)]], &[&[I(1), T("x")]]),
            false,
        ),
        rows(2, packed(&[&[T("A"), I(20)]], &[&[T("a")]]), false),
        rows(3, packed(&[&[B(&[]), N]], &[&[B(&[0])], &[B(&[9])]]), false),
        // The key's order is y, x; an upsert of a row that is there changes nothing.
        rows(4, packed(&[&[I(2), T("y")]], &[&[T("y"), I(1)]]), false),
        commit(2),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT a, b, v FROM composite ORDER BY a, b"),
        ["1|'y'|'TWO'", "2|'x'|'three'"]
    );
    assert_eq!(
        folder.query("SELECT k, v FROM text ORDER BY k"),
        ["''|3", "'A'|20"]
    );
    assert_eq!(folder.query("SELECT k, v FROM blob"), ["x''|NULL"]);
    assert_eq!(folder.query("SELECT x, y FROM all_key"), ["2|'y'"]);
    assert_eq!(
        folder.query("SELECT type, sql FROM sqlite_schema WHERE name IN ('composite', 'all_key') ORDER BY name"),
        [
            r#"'table'|'CREATE TABLE "all_key"("x" INTEGER NOT NULL, "y" TEXT NOT NULL, PRIMARY KEY("y", "x")) STRICT, WITHOUT ROWID'"#,
            r#"'table'|'CREATE TABLE "composite"("v" TEXT, "b" TEXT NOT NULL, "a" INTEGER NOT NULL, PRIMARY KEY("a", "b")) STRICT, WITHOUT ROWID'"#,
        ]
    );
}

#[test]
fn swapped_keys_and_values_do_not_collide() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(
        1,
        &[&[I(1), T("a")], &[I(2), T("b")], &[I(3), T("c")]],
    ))
    .unwrap();
    // id = id + 1 for all rows, as the streamer's net changes.
    let ops = packed(
        &[&[I(2), T("a")], &[I(3), T("b")], &[I(4), T("c")]],
        &[&[I(1)]],
    );
    file.apply(&down(vec![begin(&[]), rows(1, ops, false), commit(2)]))
        .unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["2|'a'", "3|'b'", "4|'c'"]);
}

#[test]
fn hostile_names_are_only_names() {
    let folder = Folder::new();
    let mut file = folder.open();
    let names = [
        "select",
        "Mixed Case",
        "a\"b",
        "a'b",
        "x; DROP TABLE t",
        "s.dotted.name",
        "ünïcödé",
        "[b]",
        "`c`",
        "%",
        "1",
    ];
    let mut elements = vec![first(&[])];
    for (id, name) in names.iter().enumerate() {
        let mut declared = declared(id as u32, "t", &[("k", Integer, 1), ("v", Text, 0)]);
        declared.schema = if id % 2 == 0 {
            "public".into()
        } else {
            "S \"q\"".into()
        };
        declared.name = (*name).into();
        declared.columns[1].name = (*name).into();
        declared.indexes = vec![v1::Index {
            name: (*name).into(),
            columns: vec![1],
        }];
        elements.push(element(Kind::Table(declared)));
        elements.push(upserts(id as u32, &[&[I(1), T(name)]]));
    }
    elements.push(commit(1));
    file.apply(&down(elements)).unwrap();
    for (id, name) in names.iter().enumerate() {
        let expected = if id % 2 == 0 {
            (*name).to_owned()
        } else {
            format!("S \"q\".{name}")
        };
        let quoted = super::super::names::quote(&expected);
        let column = super::super::names::quote(name);
        assert_eq!(
            folder.query(&format!("SELECT k, {column} FROM {quoted}")),
            [format!("1|'{name}'")]
        );
        let base = super::super::names::quote(&format!("_anabranch_base_{expected}"));
        assert_eq!(folder.query(&format!("SELECT count(*) FROM {base}")), ["1"]);
    }
    assert_eq!(
        folder.query("SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL AND tbl_name NOT GLOB '_anabranch_*'"),
        [names.len().to_string()]
    );
    assert_eq!(
        folder.query("SELECT count(DISTINCT table_name) FROM _anabranch_columns"),
        [names.len().to_string()]
    );
}

#[test]
fn index_names_that_meet_get_other_names_and_keep_them() {
    let folder = Folder::new();
    let mut file = folder.open();
    let declare = || {
        let columns = &[("id", Integer, 1), ("a", Text, 0), ("b", Text, 0)];
        vec![
            first(&[]),
            with_index(table(1, "s1.t", columns), "i", &[1]),
            with_index(table(2, "s2.t", columns), "i", &[2, 1]),
            with_index(table(3, "i2", columns), "s1.t", &[1]),
            commit(1),
        ]
    };
    file.apply(&down(declare())).unwrap();
    let indexes = "SELECT name, tbl_name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL AND tbl_name NOT GLOB '_anabranch_*' ORDER BY name";
    let expected = [
        r#"'i'|'s1.t'|'CREATE INDEX "i" ON "s1.t"("a")'"#,
        r#"'i2_s1.t'|'i2'|'CREATE INDEX "i2_s1.t" ON "i2"("a")'"#,
        r#"'s2.t_i'|'s2.t'|'CREATE INDEX "s2.t_i" ON "s2.t"("b", "a")'"#,
    ];
    assert_eq!(folder.query(indexes), expected);
    let version = folder.query("PRAGMA schema_version");
    file.begin_stream().unwrap();
    file.apply(&down(declare())).unwrap();
    assert_eq!(folder.query(indexes), expected);
    assert_eq!(
        folder.query("PRAGMA schema_version"),
        version,
        "nothing was made again"
    );
    // One goes, one changes.
    file.begin_stream().unwrap();
    let columns = &[("id", Integer, 1), ("a", Text, 0), ("b", Text, 0)];
    file.apply(&down(vec![
        first(&[]),
        table(1, "s1.t", columns),
        with_index(table(2, "s2.t", columns), "i", &[2]),
        with_index(table(3, "i2", columns), "s1.t", &[1]),
        commit(2),
    ]))
    .unwrap();
    assert_eq!(
        folder.query(indexes),
        [
            r#"'i'|'s2.t'|'CREATE INDEX "i" ON "s2.t"("b")'"#,
            r#"'i2_s1.t'|'i2'|'CREATE INDEX "i2_s1.t" ON "i2"("a")'"#,
        ]
    );
}

#[test]
fn rows_in_pieces_and_transactions_larger_than_memory_arrive_whole() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("old")], &[I(2), T("old")]]))
        .unwrap();
    let long = "long ".repeat(1_000_000);
    let ops = packed(&[&[I(1), T(&long)], &[I(3), T("x")]], &[&[I(2)]]);
    assert!(ops.len() > 4 * folder.settings.hold_bytes_max);
    file.apply(&down(vec![begin(&[])])).unwrap();
    for (i, start) in (0..ops.len()).step_by(100_000).enumerate() {
        let end = (start + 100_000).min(ops.len());
        let piece = rows(1, ops.slice(start..end), end < ops.len());
        let applied = file.apply(&down(vec![piece])).unwrap();
        assert_eq!(applied.position, None);
        if i % 10 == 0 {
            assert_eq!(folder.query("SELECT * FROM t"), ["1|'old'", "2|'old'"]);
        }
    }
    let applied = file.apply(&down(vec![commit(2)])).unwrap();
    assert_eq!((applied.rows, applied.transactions), (3, 1));
    assert_eq!(
        folder.query("SELECT id, length(v) FROM t"),
        ["1|5000000", "3|1"]
    );
    assert_tidy(&folder);
}

#[test]
fn many_transactions_of_one_message_are_seen_together_or_not_at_all() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[])).unwrap();
    let mut elements = vec![];
    for lsn in 2..100 {
        elements.push(begin(&[]));
        elements.push(upserts(1, &[&[I(1), T(&lsn.to_string())]]));
        elements.push(commit(lsn));
    }
    // Begun, but not complete: nothing is committed, not even what is complete in it.
    elements.push(begin(&[]));
    let applied = file.apply(&down(elements)).unwrap();
    assert_eq!((applied.position, applied.transactions), (None, 0));
    assert_eq!(folder.query("SELECT * FROM t"), Vec::<String>::new());
    assert_eq!(file.position(), Some(position(1)));
    let applied = file
        .apply(&down(vec![upserts(1, &[&[I(2), T("x")]]), commit(100)]))
        .unwrap();
    assert_eq!(applied.position, Some(position(100)));
    assert_eq!((applied.transactions, applied.rows), (99, 99));
    assert_eq!(applied.commit_time, 1_700_000_000_000_100);
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'99'", "2|'x'"]);
    assert_eq!(&file.resume_token()[..], b"token 100");
}

#[test]
fn what_was_committed_is_there_after_opening_again() {
    let folder = Folder::new();
    let mut file = folder.open();
    let id = file.replica_id().to_owned();
    assert!(
        id.len() <= 64
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    );
    assert_eq!((file.position(), file.resume_token()), (None, Bytes::new()));
    file.apply(&start(0xFFFF_FFFF_0000_0007, &[&[I(1), T("a")]]))
        .unwrap();
    drop(file);
    let mut file = folder.open();
    assert_eq!(file.replica_id(), id);
    assert_eq!(file.position(), Some(position(0xFFFF_FFFF_0000_0007)));
    assert_eq!(file.resume_token(), "token 18446744069414584327");
    file.apply(&resume(0xFFFF_FFFF_0000_0008)).unwrap();
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
}

#[test]
fn changes_are_told_by_key_up_to_a_thousand() {
    let folder = Folder::new();
    let mut file = folder.open();
    let columns = &[("b", Blob, 2), ("a", Text, 1), ("v", Integer, 0)];
    let declare = || {
        vec![
            first(&[]),
            simple(1, "t"),
            table(2, "u", columns),
            commit(1),
        ]
    };
    assert_eq!(file.apply(&down(declare())).unwrap().changes, []);
    let change = |lsn| {
        down(vec![
            begin(&[]),
            rows(1, packed(&[&[I(7), N]], &[&[I(8)]]), false),
            upserts(2, &[&[B(&[1, 255]), T("k"), N]]),
            commit(lsn),
        ])
    };
    assert_eq!(file.apply(&change(2)).unwrap().changes, [], "nobody asked");
    file.set_report_changes(true);
    let mut changes = file.apply(&change(3)).unwrap().changes;
    changes.sort_by(|a, b| a.table.cmp(&b.table));
    assert_eq!(
        changes,
        [
            TableChanges {
                table: "t".into(),
                keys: Some(vec![serde_json::json!([7]), serde_json::json!([8])]),
            },
            TableChanges {
                table: "u".into(),
                keys: Some(vec![serde_json::json!(["k", "\\x01ff"])]),
            },
        ]
    );
    for (count, listed) in [(1000, true), (1001, false)] {
        let values: Vec<[ValueRef<'_>; 2]> = (0..count).map(|i| [I(i), N]).collect();
        let values: Vec<&[ValueRef<'_>]> = values.iter().map(|row| &row[..]).collect();
        let applied = file
            .apply(&down(vec![begin(&[]), upserts(1, &values), commit(10)]))
            .unwrap();
        let keys = applied.changes[0].keys.as_ref().map(Vec::len);
        assert_eq!(keys, listed.then_some(count as usize));
    }
}
