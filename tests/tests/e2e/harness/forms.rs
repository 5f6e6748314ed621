//! Oracles print values as the README says that they look, checked against examples written by hand.

use anabranch_tests::{
    oracle::{
        Cell,
        form::{SESSION, Types},
        select::{ask, compare_file},
    },
    postgres::Server,
};

fn text(text: &str) -> Cell {
    Cell::Text(text.into())
}

fn real(value: f64) -> Cell {
    Cell::Real(value.to_bits())
}

fn array(json: &str) -> Cell {
    Cell::Array(json.into())
}

#[tokio::test]
async fn every_form_is_the_documented_one() {
    let database = Server::shared().await.database().await;
    // Settings that change how values print; an oracle must not inherit them.
    let name = database.name();
    for hostile in [
        "DateStyle = 'SQL, DMY'",
        "TimeZone = 'Australia/Eucla'",
        "IntervalStyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "extra_float_digits = -5",
    ] {
        let sql = format!("ALTER DATABASE {name} SET {hostile}");
        database.execute(&sql).await;
    }
    database
        .execute(
            "CREATE TYPE mood AS ENUM ('sad', 'happy');
             CREATE TYPE pair AS (a int, b text);
             CREATE DOMAIN small AS int2;
             CREATE DOMAIN smalls AS small[]",
        )
        .await;
    let client = database.connect().await;
    client.batch_execute(SESSION).await.unwrap();
    let types = Types::load(&client).await.unwrap();
    for (sql, expected) in [
        ("'-32768'::int2", Cell::Integer(-32768)),
        ("9223372036854775807", Cell::Integer(i64::MAX)),
        ("4294967295::oid", Cell::Integer(4_294_967_295)),
        ("7::small", Cell::Integer(7)),
        ("true", Cell::Integer(1)),
        ("1.1::float4", real(1.100_000_023_841_858)),
        ("0.1::float8", real(0.1)),
        ("'-0'::float8", real(0.0)),
        ("'-Infinity'::float4", real(f64::NEG_INFINITY)),
        ("'NaN'::float8", Cell::Null),
        ("1.50::numeric", text("1.50")),
        ("'NaN'::numeric", text("NaN")),
        ("'  a b '::char(7)", text("  a b")),
        ("'  a b '::text", text("  a b ")),
        ("'sad'::mood", text("sad")),
        (
            "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid",
            text("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ),
        (r"'\x00ff27'::bytea", Cell::Blob(vec![0, 255, 39])),
        (r#"'{"a" :  1}'::json"#, text(r#"{"a" :  1}"#)),
        (r#"'{"a" :  1}'::jsonb"#, text(r#"{"a": 1}"#)),
        (
            "'2024-02-29 12:00:00.5+02'::timestamptz",
            text("2024-02-29 10:00:00.500000Z"),
        ),
        (
            "'0001-01-01 00:00:00+00'::timestamptz",
            text("0001-01-01 00:00:00.000000Z"),
        ),
        (
            "'0044-03-15 12:00:00+00 BC'::timestamptz",
            text("0044-03-15 12:00:00+00 BC"),
        ),
        ("'infinity'::timestamptz", text("infinity")),
        (
            "'9999-12-31 23:59:59.999999'::timestamp",
            text("9999-12-31 23:59:59.999999"),
        ),
        (
            "'10000-01-01 00:00:00'::timestamp",
            text("10000-01-01 00:00:00"),
        ),
        ("'2024-02-29'::date", text("2024-02-29")),
        ("'0044-03-15 BC'::date", text("0044-03-15 BC")),
        ("'-infinity'::date", text("-infinity")),
        ("'04:05:06.7'::time", text("04:05:06.700000")),
        ("'24:00'::time", text("24:00:00.000000")),
        ("'04:05:06.7+08'::timetz", text("04:05:06.7+08")),
        (
            "'1 year -2 days 03:04:05'::interval",
            text("1 year -2 days +03:04:05"),
        ),
        ("'[1,5)'::int4range", text("[1,5)")),
        (r#"ROW(1, 'a "b"')::pair"#, text(r#"(1,"a ""b""")"#)),
        ("'192.168.0.0/24'::inet", text("192.168.0.0/24")),
        ("NULL::int4", Cell::Null),
        ("NULL::int4[]", Cell::Null),
        ("'{}'::int4[]", array("[]")),
        ("'{{1,2},{3,NULL}}'::int4[]", array("[[1,2],[3,null]]")),
        ("'{7}'::smalls", array("[7]")),
        ("ARRAY[true, NULL]", array("[true,null]")),
        (
            "'{NaN,-0,Infinity,NULL}'::float8[]",
            array(r#"["NaN",0.0,"Infinity",null]"#),
        ),
        ("'{1.50,NULL}'::numeric[]", array(r#"["1.50",null]"#)),
        (
            r#"ARRAY['a"b', 'NULL', '', 'c,d']"#,
            array(r#"["a\"b","NULL","","c,d"]"#),
        ),
        (
            "ARRAY['2024-02-29 12:00:00+02'::timestamptz]",
            array(r#"["2024-02-29 10:00:00.000000Z"]"#),
        ),
        (r"ARRAY['\x0aff'::bytea]", array(r#"["\\x0aff"]"#)),
        (r#"ARRAY[ROW(1,'x')::pair]"#, array(r#"["(1,x)"]"#)),
        ("ARRAY['a '::char(3)]", array(r#"["a"]"#)),
        ("ARRAY['happy'::mood]", array(r#"["happy"]"#)),
    ] {
        let answer = ask(&client, &types, &format!("SELECT {sql} AS x"))
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        assert_eq!(answer.rows, [[expected]], "{sql}");
    }
}

#[tokio::test]
async fn the_select_oracle_sees_every_kind_of_difference() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, a float4[], b timestamptz);
             INSERT INTO t VALUES (1, '{1.1,NULL}', '2024-01-01 00:00:00+00'), (2, NULL, NULL)",
        )
        .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("app.db");
    let sqlite = rusqlite::Connection::open(&file).unwrap();
    sqlite
        .execute_batch(
            "PRAGMA journal_mode = WAL;
             CREATE TABLE t (id INTEGER PRIMARY KEY, b TEXT, a TEXT) STRICT;
             INSERT INTO t VALUES (1, '2024-01-01 00:00:00.000000Z', '[1.1, null]'), (2, NULL, NULL);
             CREATE TABLE narrow (id INTEGER PRIMARY KEY) STRICT",
        )
        .unwrap();
    let tables = [("t", "SELECT * FROM t")];
    compare_file(&database, &file, &tables).await.unwrap();
    for (wrong, mend) in [
        (
            "DELETE FROM t WHERE id = 2",
            "INSERT INTO t (id) VALUES (2)",
        ),
        (
            "INSERT INTO t (id) VALUES (3)",
            "DELETE FROM t WHERE id = 3",
        ),
        (
            "UPDATE t SET a = '[1.2, null]' WHERE id = 1",
            "UPDATE t SET a = '[1.1,null]' WHERE id = 1",
        ),
        (
            "UPDATE t SET b = '2024-01-01 00:00:00Z' WHERE id = 1",
            "UPDATE t SET b = '2024-01-01 00:00:00.000000Z' WHERE id = 1",
        ),
        (
            "ALTER TABLE t ADD COLUMN more TEXT",
            "ALTER TABLE t DROP COLUMN more",
        ),
    ] {
        sqlite.execute_batch(wrong).unwrap();
        let difference = compare_file(&database, &file, &tables).await;
        assert!(difference.is_err(), "{wrong} was not seen");
        sqlite.execute_batch(mend).unwrap();
        compare_file(&database, &file, &tables).await.unwrap();
    }
    let missing = compare_file(&database, &file, &[("u", "SELECT 1 AS id")]).await;
    assert!(missing.is_err());
}
