//! Random statements of a program, in transactions that may be rolled back. What is captured of them, put on top of the
//! rows that were there, gives the rows that are there; undone, it gives back those that were; and the view of base
//! rows never changes. The oracle is SQLite itself: the table's own rows.

use proptest::prelude::*;
use v1::Storage::{Integer, Real, Text};

use super::*;

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => (0..3u8).prop_map(|n| format!("'{n}'")),
        1 => Just("NULL".to_owned()),
        1 => Just("''".to_owned()),
    ]
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof![
        (-2..3i64).prop_map(|n| n.to_string()),
        Just("0.5".to_owned()),
        Just("NULL".to_owned()),
        Just("-0.0".to_owned()),
        Just("1e300 * 1e300".to_owned()),
    ]
}

/// Few keys, so that they meet; −1 is what a key that is left out looks like.
fn id() -> impl Strategy<Value = i64> {
    -2..5i64
}

fn or() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "",
        "",
        "OR REPLACE ",
        "OR IGNORE ",
        "OR ABORT ",
        "OR FAIL ",
        "OR ROLLBACK ",
    ])
}

fn condition() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => id().prop_map(|id| format!("id = {id}")),
        1 => id().prop_map(|id| format!("id > {id}")),
        1 => value().prop_map(|value| format!("v IS {value}")),
        1 => Just("true".to_owned()),
    ]
}

fn statement() -> impl Strategy<Value = String> {
    let row = || (id(), value(), number()).prop_map(|(id, v, r)| format!("({id}, {v}, {r})"));
    let rows = move || prop::collection::vec(row(), 1..4).prop_map(|rows| rows.join(", "));
    let pair = || (id(), value()).prop_map(|(n, a)| format!("({n}, coalesce({a}, 'n'), {n})"));
    prop_oneof![
        4 => (or(), rows()).prop_map(|(or, rows)| format!("INSERT {or}INTO t VALUES{rows}")),
        2 => rows().prop_map(|rows| format!("INSERT INTO t VALUES{rows} ON CONFLICT(id) DO UPDATE SET v = excluded.v || t.v")),
        1 => (rows(), id()).prop_map(|(rows, id)| format!("INSERT INTO t VALUES{rows} ON CONFLICT(id) DO UPDATE SET id = {id} WHERE t.v = '1'")),
        1 => rows().prop_map(|rows| format!("INSERT INTO t VALUES{rows} ON CONFLICT DO NOTHING")),
        1 => Just("INSERT INTO t(v) VALUES('no id')".to_owned()),
        3 => (or(), value(), number(), condition()).prop_map(|(or, v, r, when)| format!("UPDATE {or}t SET v = {v}, r = {r} WHERE {when}")),
        2 => (or(), id(), condition()).prop_map(|(or, id, when)| format!("UPDATE {or}t SET id = id + {id} WHERE {when}")),
        2 => (or(), id(), condition()).prop_map(|(or, id, when)| format!("UPDATE {or}t SET rowid = {id}, v = v || '.' WHERE {when}")),
        2 => condition().prop_map(|when| format!("DELETE FROM t WHERE {when}")),
        3 => (or(), pair()).prop_map(|(or, row)| format!("INSERT {or}INTO c VALUES{row}")),
        2 => (or(), id()).prop_map(|(or, n)| format!("UPDATE {or}c SET n = {n}, a = a || n WHERE n > {n}")),
        1 => or().prop_map(|or| format!("UPDATE {or}c SET n = -n")),
        1 => id().prop_map(|n| format!("DELETE FROM c WHERE n = {n}")),
        1 => Just("BEGIN".to_owned()),
        1 => Just("COMMIT".to_owned()),
        1 => Just("ROLLBACK".to_owned()),
        1 => Just("SAVEPOINT s".to_owned()),
        1 => Just("ROLLBACK TO s".to_owned()),
        1 => Just("RELEASE s".to_owned()),
        1 => any::<bool>().prop_map(|on| format!("PRAGMA recursive_triggers = {}", u8::from(on))),
    ]
}

fn tables() -> Vec<Table> {
    vec![
        synced(
            "t",
            &[
                ("id", "bigint", Integer, 1),
                ("v", "text", Text, 0),
                ("r", "double precision", Real, 0),
            ],
            true,
        ),
        synced(
            "c",
            &[
                ("n", "bigint", Integer, 2),
                ("a", "text", Text, 1),
                ("v", "bigint", Integer, 0),
            ],
            true,
        ),
    ]
}

/// Triggers of programs that leave the row alone that is being written: what SQLite then does is defined.
const TRIGGERS: [&str; 3] = [
    "",
    "CREATE TRIGGER p AFTER INSERT ON t BEGIN UPDATE t SET v = v || '!' WHERE id = NEW.id; INSERT INTO c VALUES(NEW.id, 'p', 0) ON CONFLICT DO NOTHING; END;
     CREATE TRIGGER q AFTER UPDATE OF v ON t BEGIN UPDATE c SET v = v + 1 WHERE n = NEW.id; END;",
    "CREATE TRIGGER p BEFORE INSERT ON c BEGIN INSERT INTO t VALUES(NEW.n, 'parent', 0) ON CONFLICT DO NOTHING; END;
     CREATE TRIGGER q AFTER DELETE ON t BEGIN DELETE FROM c WHERE n = OLD.id; END;",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, ..ProptestConfig::default() })]
    #[test]
    fn what_is_captured_is_what_was_done(
        trigger in 0..TRIGGERS.len(),
        statements in prop::collection::vec(statement(), 1..40),
        engine in prop_oneof![
            8 => Just(Engine::Bundled),
            1 => Just(Engine::Shell),
            1 => Just(Engine::Oldest),
        ],
    ) {
        let rows = "INSERT INTO t VALUES(0, 'zero', 0), (1, '1', 1.5), (2, NULL, NULL);
                    INSERT INTO c VALUES(0, 'a', 1), (1, 'a', 2), (1, 'b', 3);";
        let fixture = Fixture::new(tables(), rows);
        let connection = open(&fixture.path);
        connection.execute_batch(TRIGGERS[trigger]).unwrap();
        inspect_all(&connection, &fixture.tables);
        let before: Vec<Rows> =
            fixture.tables.iter().map(|table| rows_of(&connection, table, &table.name)).collect();
        run(engine, &[Work { path: fixture.path.clone(), statements: statements.clone() }]);
        check_sums(&connection, &fixture.tables, &before, &format!("{statements:#?}"));
    }
}
