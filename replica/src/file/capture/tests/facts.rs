//! What the triggers rely on of SQLite, each in a few lines, in all four: if one of these fails with a new SQLite, so may
//! capture.

use super::*;

/// Runs statements in each SQLite on an empty file, then looks at table `seen`.
#[track_caller]
fn check(statements: &[&str], seen: &[&str]) {
    check_in(&ENGINES, statements, seen);
}

#[track_caller]
fn check_in(engines: &[Engine], statements: &[&str], seen: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    for &engine in engines {
        let path = directory.path().join(format!("{engine:?}.db"));
        let statements = statements
            .iter()
            .map(|&statement| statement.to_owned())
            .collect();
        let errors = run(
            engine,
            &[Work {
                path: path.clone(),
                statements,
            }],
        );
        let found = query(&open(&path), "SELECT * FROM seen ORDER BY rowid");
        assert_eq!(found, seen, "{engine:?}: {errors:?}");
    }
}

const TABLES: &str = "CREATE TABLE seen(what, value)";
const T: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT NOT NULL) STRICT";

#[test]
fn the_oldest_sqlite_is_as_old_as_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    let statements = [TABLES, "INSERT INTO seen VALUES(sqlite_version(), 1)"].map(str::to_owned);
    let work = Work {
        path: path.clone(),
        statements: statements.to_vec(),
    };
    run(Engine::Oldest, &[work]);
    let version = query(&open(&path), "SELECT what FROM seen");
    assert_eq!(version, [format!("'{}'", oldest::VERSION)]);
}

#[test]
fn the_newest_trigger_fires_first() {
    check(
        &[
            TABLES,
            T,
            "CREATE TRIGGER z BEFORE INSERT ON t BEGIN INSERT INTO seen VALUES('before', 'old'); END",
            "CREATE TRIGGER y AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('after', 'old'); END",
            "CREATE TRIGGER b BEFORE INSERT ON t BEGIN INSERT INTO seen VALUES('before', 'new'); END",
            "CREATE TRIGGER a AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('after', 'new'); END",
            "INSERT INTO t VALUES(1, 'x')",
        ],
        &[
            "'before'|'new'",
            "'before'|'old'",
            "'after'|'new'",
            "'after'|'old'",
        ],
    );
}

#[test]
fn triggers_keep_their_order_when_the_file_is_vacuumed_or_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let path = directory.path().join(format!("{engine:?}.db"));
        open(&path)
            .execute_batch(&format!(
                "{TABLES}; {T};
                 CREATE TRIGGER gone AFTER INSERT ON t BEGIN SELECT 1; END;
                 CREATE TRIGGER old AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('old', 1); END;
                 CREATE TRIGGER new AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('new', 1); END;
                 DROP TRIGGER gone;"
            ))
            .unwrap();
        let statements = ["VACUUM", "INSERT INTO t VALUES(1, 'x')"]
            .map(str::to_owned)
            .to_vec();
        run(
            engine,
            &[Work {
                path: path.clone(),
                statements,
            }],
        );
        assert_eq!(
            query(&open(&path), "SELECT what FROM seen"),
            ["'new'", "'old'"],
            "{engine:?}"
        );
    }
}

#[test]
fn what_a_before_trigger_did_stays_when_the_row_is_skipped() {
    check(
        &[
            TABLES,
            T,
            "CREATE TRIGGER a BEFORE INSERT ON t BEGIN INSERT INTO seen VALUES('before', NEW.id); END",
            "CREATE TRIGGER b AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('after', NEW.id); END",
            "INSERT INTO t VALUES(1, 'x')",
            "INSERT OR IGNORE INTO t VALUES(1, 'x'), (2, NULL)",
        ],
        &["'before'|1", "'after'|1", "'before'|1", "'before'|2"],
    );
}

#[test]
fn the_outer_statements_or_clause_overrides_those_in_a_trigger_but_not_raise() {
    check(
        &[
            TABLES,
            T,
            "CREATE TABLE u(id INTEGER PRIMARY KEY, v)",
            "INSERT INTO u VALUES(1, 'old')",
            "CREATE TRIGGER a AFTER INSERT ON t BEGIN INSERT OR IGNORE INTO u VALUES(1, 'new'); \
             INSERT INTO seen SELECT v, NEW.id FROM u; SELECT RAISE(ABORT, 'no') WHERE NEW.id = 3; END",
            "INSERT INTO t VALUES(1, 'x')",
            "INSERT OR REPLACE INTO t VALUES(2, 'x')",
            "INSERT OR IGNORE INTO t VALUES(3, 'x')",
            "INSERT OR FAIL INTO t VALUES(4, 'x'), (3, 'x')",
        ],
        &["'old'|1", "'new'|2"],
    );
}

#[test]
fn a_row_that_replace_deletes_fires_triggers_only_if_they_are_recursive() {
    let triggers =
        "CREATE TRIGGER a AFTER DELETE ON t BEGIN INSERT INTO seen VALUES('deleted', OLD.id); END";
    let replace = "REPLACE INTO t VALUES(1, 'y')";
    check(
        &[TABLES, T, triggers, "INSERT INTO t VALUES(1, 'x')", replace],
        &[],
    );
    check(
        &[
            TABLES,
            T,
            triggers,
            "INSERT INTO t VALUES(1, 'x')",
            "PRAGMA recursive_triggers = 1",
            replace,
        ],
        &["'deleted'|1"],
    );
}

#[test]
fn an_update_of_a_rowid_by_another_name_is_not_an_update_of_its_column() {
    check(
        &[
            TABLES,
            T,
            "CREATE TRIGGER a AFTER UPDATE OF id ON t BEGIN INSERT INTO seen VALUES(OLD.id, NEW.id); END",
            "INSERT INTO t VALUES(1, 'x')",
            "UPDATE t SET id = 2",
            "UPDATE t SET rowid = 3",
        ],
        &["1|2"],
    );
}

#[test]
fn an_id_that_is_left_out_is_minus_one_before_the_insert() {
    check(
        &[
            TABLES,
            T,
            "CREATE TRIGGER a BEFORE INSERT ON t BEGIN INSERT INTO seen VALUES('before', NEW.id); END",
            "CREATE TRIGGER b AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('after', NEW.id); END",
            "INSERT INTO t(v) VALUES('x')",
            "INSERT INTO t(id, v) VALUES(NULL, 'x')",
            "INSERT INTO t(id, v) VALUES(-1, 'x')",
        ],
        &[
            "'before'|-1",
            "'after'|1",
            "'before'|-1",
            "'after'|2",
            "'before'|-1",
            "'after'|-1",
        ],
    );
}

#[test]
fn an_upsert_fires_both_before_triggers_of_its_row() {
    check(
        &[
            TABLES,
            T,
            "INSERT INTO t VALUES(1, 'x')",
            "CREATE TRIGGER a BEFORE INSERT ON t BEGIN INSERT INTO seen VALUES('insert', NEW.id); END",
            "CREATE TRIGGER b BEFORE UPDATE ON t BEGIN INSERT INTO seen VALUES('update', NEW.id); END",
            "CREATE TRIGGER c AFTER INSERT ON t BEGIN INSERT INTO seen VALUES('inserted', NEW.id); END",
            "INSERT INTO t VALUES(1, 'y') ON CONFLICT(id) DO UPDATE SET v = excluded.v",
        ],
        &["'insert'|1", "'update'|1"],
    );
}

#[test]
fn a_real_keeps_its_type_in_a_column_of_any_type() {
    check(
        &[
            TABLES,
            "CREATE TABLE r(id INTEGER PRIMARY KEY, v REAL) STRICT",
            "CREATE TABLE any(v ANY) STRICT",
            "CREATE TRIGGER a AFTER INSERT ON r BEGIN INSERT INTO any VALUES(NEW.v); END",
            "INSERT INTO r VALUES(1, 1), (2, 4611686018427387904), (3, '5')",
            "INSERT INTO seen SELECT typeof(v), v FROM any",
        ],
        &["'real'|1.0", "'real'|4.611686018427388e18", "'real'|5.0"],
    );
}

/// 3.37 looks at a row's types again after the BEFORE triggers, and does not know any more what it made of a whole number.
/// Nothing can be done about it: base rows are saved by such a trigger. The README says so.
#[test]
fn only_the_oldest_sqlite_refuses_whole_numbers_for_real_columns_with_a_before_trigger() {
    let statements = [
        TABLES,
        "CREATE TABLE r(id INTEGER PRIMARY KEY, v REAL) STRICT",
        "CREATE TRIGGER a BEFORE UPDATE ON r BEGIN SELECT 1; END",
        "INSERT INTO r VALUES(1, 1.0), (2, 0.5)",
        "UPDATE r SET v = 2.5 WHERE id = 1",
        "UPDATE r SET v = 2.0 WHERE id = 2",
        "INSERT INTO seen SELECT id, v FROM r",
    ];
    check_in(&[Engine::Bundled], &statements, &["1|2.5", "2|2.0"]);
    check_in(&[Engine::Oldest], &statements, &["1|2.5", "2|0.5"]);
}

#[test]
fn total_changes_can_be_overridden_for_triggers_of_a_schema_that_is_not_trusted() {
    let connection = Connection::open_in_memory().unwrap();
    connection
        .pragma_update(None, "trusted_schema", false)
        .unwrap();
    connection
        .execute_batch(
            "CREATE TABLE t(id INTEGER PRIMARY KEY); CREATE TABLE seen(id);
             CREATE TRIGGER a AFTER INSERT ON t WHEN total_changes() >= 0 BEGIN INSERT INTO seen VALUES(NEW.id); END;
             INSERT INTO t VALUES(1);",
        )
        .unwrap();
    let quiet = super::super::quiet::install(&connection).unwrap();
    connection
        .execute_batch("INSERT INTO t VALUES(2), (3)")
        .unwrap();
    assert_eq!(query(&connection, "SELECT * FROM seen"), ["1"]);
    let ask = || query(&connection, "SELECT total_changes()").join("");
    assert_eq!([ask(), ask()], ["-1", "-1"]);
    let armed = quiet.arm();
    assert_eq!([ask(), ask(), ask()], ["-1", "-2", "-2"]);
    drop(armed);
    assert_eq!([ask(), ask()], ["-1", "-1"]);
}

/// `k0 = NEW.id` would read the whole table of base rows for each row that is written.
#[test]
fn base_rows_are_found_by_their_key() {
    let table = synced(
        "t",
        &[
            ("id", "bigint", v1::Storage::Integer, 1),
            ("v", "text", v1::Storage::Text, 0),
        ],
        true,
    );
    let fixture = Fixture::new(vec![table], "");
    let connection = open(&fixture.path);
    // The one table of one row.
    let root = "SELECT rootpage FROM sqlite_schema WHERE name = '_anabranch_head'";
    let head: i64 = connection.query_row(root, [], |row| row.get(0)).unwrap();
    for statement in [
        "INSERT INTO t VALUES(1, 'x')",
        "REPLACE INTO t VALUES(1, 'x')",
        "UPDATE t SET v = 'y' WHERE id = 1",
        "UPDATE OR REPLACE t SET id = 2 WHERE id = 1",
        "DELETE FROM t WHERE id = 1",
    ] {
        let mut explain = connection.prepare(&format!("EXPLAIN {statement}")).unwrap();
        let mut steps = explain.query([]).unwrap();
        // Tables by cursor, as they were opened.
        let mut opened: BTreeMap<i64, i64> = BTreeMap::new();
        while let Some(step) = steps.next().unwrap() {
            let (code, cursor, root): (String, i64, i64) = (
                step.get(1).unwrap(),
                step.get(2).unwrap(),
                step.get(3).unwrap(),
            );
            match code.as_str() {
                "OpenRead" | "OpenWrite" => drop(opened.insert(cursor, root)),
                "OpenEphemeral" | "OpenAutoindex" => drop(opened.remove(&cursor)),
                // Reads a table from its beginning.
                "Rewind" | "Last" => {
                    let root = opened.get(&cursor).copied().unwrap_or(head);
                    assert_eq!(root, head, "{statement}");
                }
                _ => {}
            }
        }
    }
}
