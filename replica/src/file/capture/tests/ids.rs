//! Ids that are taken from leases, and columns that are left out: the same in each SQLite.

use v1::Storage::{Integer, Text};

use super::*;

fn with_defaults(name: &str, columns: &[(&str, &str, v1::Storage, u32, v1::DefaultKind)]) -> Table {
    let columns =
        columns.iter().map(
            |&(name, postgres_type, storage, key_position, default)| v1::Column {
                name: name.into(),
                postgres_type: postgres_type.into(),
                storage: storage.into(),
                key_position,
                not_null: default == v1::DefaultKind::Value,
                default_kind: default.into(),
                default_value: match default {
                    v1::DefaultKind::Value => record::build([ValueRef::Text("it's")]),
                    _ => Default::default(),
                },
                ..v1::Column::default()
            },
        );
    Table::new(&v1::Table {
        id: 1,
        schema: "public".into(),
        name: name.into(),
        columns: columns.collect(),
        writable: true,
        ..v1::Table::default()
    })
    .unwrap()
}

fn leased() -> Table {
    with_defaults(
        "n",
        &[
            ("id", "bigint", Integer, 1, v1::DefaultKind::Sequence),
            ("v", "text", Text, 0, v1::DefaultKind::None),
        ],
    )
}

const OFFERED: &str = "SELECT next_id, last_id, step FROM _anabranch_ids WHERE table_name = 'n'";

/// Runs statements in each SQLite on a file with leases (first, last, step). `ids`: of the rows, as they were inserted;
/// `offered`: what is offered afterwards.
#[track_caller]
fn check(leases: &str, statements: &[&str], ids: &[&str], offered: &[&str], error: &str) {
    let insert = format!(
        "INSERT INTO _anabranch_leases(table_name, first, last, step, leased) SELECT 'n', column1, column2, column3, 1 \
         FROM (VALUES {leases})"
    );
    let fixture = Fixture::new(vec![leased()], &insert);
    for engine in ENGINES {
        let path = fixture.copy(&format!("{engine:?}.db"));
        let statements = statements.iter().map(|&statement| statement.to_owned());
        let work = Work {
            path: path.clone(),
            statements: statements.collect(),
        };
        let errors = run(engine, &[work]).concat();
        assert!(errors.contains(error), "{engine:?}: {errors}");
        assert!(
            !error.is_empty() || errors.is_empty(),
            "{engine:?}: {errors}"
        );
        let connection = open(&path);
        let found = query(
            &connection,
            "SELECT n0 FROM _anabranch_entries_n ORDER BY id",
        );
        assert_eq!(found, ids, "{engine:?}");
        assert_eq!(query(&connection, OFFERED), offered, "{engine:?}");
    }
}

const TAKE: &str =
    "INSERT INTO n(id) VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = 'n'))";

#[test]
fn an_id_is_offered_twice() {
    check(
        "(1, 3, 1), (10, 20, 5)",
        &[TAKE; 5],
        &["1", "2", "3", "10", "15"],
        &["20|20|5"],
        "",
    );
    check(
        "(-5, -15, -5), (-40, -40, -5)",
        &[TAKE; 3],
        &["-5", "-10", "-15"],
        &["-40|-40|-5"],
        "",
    );
}

#[test]
fn a_rollback_loses_ids() {
    check(
        "(1, 9, 1)",
        &[TAKE, "BEGIN", TAKE, TAKE, "ROLLBACK", TAKE],
        &["1", "2"],
        &["3|9|1"],
        "",
    );
}

#[test]
fn an_insert_without_an_id_does_not_show_the_way() {
    let take = "SELECT next_id FROM _anabranch_ids WHERE table_name = ";
    check(
        "(1, 1, 1)",
        &["INSERT INTO n(v) VALUES('x')"],
        &[],
        &["1|1|1"],
        take,
    );
    check("(1, 1, 1)", &[TAKE, TAKE], &["1"], &[], take);
}

#[test]
fn ids_that_a_program_chose_itself_are_offered() {
    check(
        "(10, 30, 5), (1, 2, 1)",
        &[
            "INSERT INTO n(id) VALUES(17)",
            "INSERT INTO n(id) VALUES(12)",
            "INSERT INTO n(id) VALUES(31)",
            "INSERT INTO n(id) VALUES(2)",
            "UPDATE n SET id = 20 WHERE id = 31",
        ],
        &["17", "12", "31", "2", "20"],
        &["25|30|5"],
        "",
    );
    // At the edges of what an id can be.
    check(
        "(9223372036854775806, 9223372036854775807, 1)",
        &[TAKE, TAKE],
        &["9223372036854775806", "9223372036854775807"],
        &[],
        "",
    );
}

#[test]
fn many_rows_of_one_statement_get_the_same_id() {
    check(
        "(10, 40, 5)",
        &[
            "INSERT INTO n(id, v) SELECT next_id + step * (row_number() OVER () - 1), v \
           FROM _anabranch_ids, (SELECT 'a' AS v UNION ALL SELECT 'b' UNION ALL SELECT 'c') WHERE table_name = 'n'",
        ],
        &["10", "15", "20"],
        &["25|40|5"],
        "",
    );
}

#[test]
fn what_is_captured_of_a_default_is_not_what_the_program_sees() {
    use v1::DefaultKind::{None, Now, Other, Uuid, Value};

    let table = with_defaults(
        "d",
        &[
            ("id", "uuid", Text, 1, Uuid),
            ("title", "text", Text, 0, Value),
            ("at", "timestamp with time zone", Text, 0, Now),
            ("o", "text", Text, 0, Other),
            ("p", "text", Text, 0, None),
        ],
    );
    let fixture = Fixture::new(vec![table], "");
    for engine in ENGINES {
        let path = fixture.copy(&format!("{engine:?}.db"));
        let statements = [
            "INSERT INTO d DEFAULT VALUES",
            "INSERT INTO d(title) VALUES('x')",
        ];
        let work = Work {
            path: path.clone(),
            statements: statements.map(str::to_owned).to_vec(),
        };
        assert_eq!(run(engine, &[work]).concat(), "", "{engine:?}");
        let connection = open(&path);
        let count =
            |sql: &str| query(&connection, &format!("SELECT count(*) FROM {sql}"))[0].clone();
        let same = "d JOIN _anabranch_entries_d ON n0 = d.id WHERE (n1, n2, n3, n4) IS (d.title, d.at, d.o, d.p)";
        assert_eq!(count(same), "2", "{engine:?}");
        let hex = |digits: usize| "[0-9a-f]".repeat(digits);
        let uuid = format!(
            "{}-{}-4{}-[89ab]{}-{}",
            hex(8),
            hex(4),
            hex(3),
            hex(3),
            hex(12)
        );
        assert_eq!(
            count(&format!("d WHERE id GLOB '{uuid}'")),
            "2",
            "{engine:?}"
        );
        let time = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9] [0-9][0-9]:[0-9][0-9]:[0-9][0-9].[0-9][0-9][0-9]000Z";
        assert_eq!(
            count(&format!("d WHERE at GLOB '{time}'")),
            "2",
            "{engine:?}"
        );
        assert_eq!(count("d WHERE title = 'it''s'"), "1", "{engine:?}");
        // The key that BEFORE saw is the one that AFTER saw.
        assert_eq!(
            count("d JOIN _anabranch_saved_d ON k0 = id WHERE present = 0"),
            "2",
            "{engine:?}"
        );
        assert_eq!(count("_anabranch_saved_d"), "2", "{engine:?}");
    }
}

#[test]
fn a_numeric_key_is_spelled_otherwise_than_by_postgres() {
    let keys = |postgres_type: &str, texts: &[&str], may: bool| {
        let table = synced(
            "m",
            &[("id", postgres_type, Text, 1), ("v", "text", Text, 0)],
            true,
        );
        let fixture = Fixture::new(vec![table], "");
        let connection = open(&fixture.path);
        for text in texts {
            let done = connection.execute("INSERT INTO m(id) VALUES(?1)", [text]);
            assert_eq!(done.is_ok(), may, "{postgres_type} {text}: {done:?}");
        }
    };
    keys(
        "numeric",
        &[
            "0", "1", "-1", "1.50", "0.001", "-0.5", "100", "NaN", "Infinity",
        ],
        true,
    );
    let never = [
        "", "-", "01", "+1", "1e3", "-0", "-0.0", "--1", "1.", ".5", "1.2.3", " 1", "1 ", "1\0",
        "0x1", "nan",
    ];
    keys("numeric", &never, false);
    keys("numeric(6,2)", &["0.00", "1.50", "-12.34", "NaN"], true);
    keys(
        "numeric(6,2)",
        &["0", "1.5", "1.500", "-0.00", "01.50"],
        false,
    );
    keys("numeric(6,2)", &never, false);
    keys("numeric(6,0)", &["0", "42", "-42"], true);
    keys("numeric(6,0)", &["42.0", "42."], false);
    keys("numeric(6,-2)", &["4200"], true);
}

#[test]
fn a_file_in_utf16_takes_no_keys() {
    let folder = tempfile::tempdir().unwrap();
    let connection = open(&folder.path().join("wide.db"));
    connection
        .execute_batch("PRAGMA encoding = 'UTF-16'; CREATE TABLE t(v TEXT NOT NULL) STRICT")
        .unwrap();
    for (postgres_type, value) in [
        ("uuid", "5e1f7a9c-0d2b-4c8e-9f3a-1b6d4e8c2a70"),
        ("timestamp with time zone", "2024-02-29 18:30:00.000000Z"),
        ("timestamp without time zone", "2024-02-29 18:30:00.000000"),
        ("date", "2024-02-29"),
        ("time without time zone", "18:30:00.000000"),
        ("numeric(6,2)", "-12.34"),
    ] {
        for (value, may) in [(value.to_owned(), true), (format!("{value}\0"), false)] {
            connection.execute("DELETE FROM t", []).unwrap();
            connection
                .execute("INSERT INTO t VALUES(?1)", [&value])
                .unwrap();
            let (condition, _) = crate::file::capture::key::spelled(postgres_type, "v").unwrap();
            let is_so: bool = connection
                .query_row(&format!("SELECT {condition} FROM t"), [], |row| row.get(0))
                .unwrap();
            assert_eq!(is_so, may, "{postgres_type} {value:?}");
        }
    }
}
