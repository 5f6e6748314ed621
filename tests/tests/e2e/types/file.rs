//! The same values all the way into a replica's file: copied, inserted and updated while streaming, and from the mirror.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Server,
    types::SETUP,
};
use rusqlite::{Connection, types::ValueRef};

use super::{PINNED, make_tables, said, spoil};

/// What also may not reach us, for the role in the database: that goes before what the database says.
const MORE_HOSTILE: &str = "
    SET DateStyle = 'SQL, DMY';
    SET TimeZone = 'America/St_Johns';
    SET IntervalStyle = 'sql_standard';
    SET client_encoding = 'LATIN1';
    SET standard_conforming_strings = off;
    SET xmlbinary = 'hex';
    SET default_transaction_isolation = 'serializable';
    SET default_transaction_read_only = on;
    SET default_transaction_deferrable = on;
    SET statement_timeout = 1;
    SET lock_timeout = 1;
    SET idle_in_transaction_session_timeout = 1;
    SET row_security = off";

/// Rows inserted while streaming have ids from here on.
const INSERTED: i32 = 1_000;

/// Rows that are copied as NULL, and get their value while streaming.
const UPDATED: i32 = 2_000;

/// What a table of a file holds, in the words of [`said`].
fn found(file: &Connection, table: &str) -> BTreeMap<i32, String> {
    let mut rows = file
        .prepare(&format!("SELECT id, v FROM {table}"))
        .unwrap_or_else(|error| panic!("{table}: {error}"));
    let rows = rows.query_map([], |row| {
        let value = match row.get_ref(1)? {
            ValueRef::Null => "NULL".into(),
            ValueRef::Integer(value) => format!("integer {value}"),
            ValueRef::Real(value) => format!("real {:016x}", value.to_bits()),
            ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => format!("text {text}"),
                Err(_) => "text that is not UTF-8".into(),
            },
            ValueRef::Blob(bytes) => {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("blob {hex}")
            }
        };
        Ok((row.get(0)?, value))
    });
    rows.unwrap().collect::<Result<_, _>>().unwrap()
}

/// SQLite has no NaN, and no −0.0 in a REAL column.
fn in_sqlite(said: String) -> String {
    let Some(bits) = said.strip_prefix("real ") else {
        return said;
    };
    let value = f64::from_bits(u64::from_str_radix(bits, 16).unwrap());
    match value {
        _ if value.is_nan() => "NULL".into(),
        _ => format!("real {:016x}", (value + 0.0).to_bits()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_exact_in_the_file_however_it_came_there() {
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    let cases = make_tables(&database).await;
    let every = async |sql: &str| {
        let statements = (0..cases.len()).map(|i| sql.replace("t#", &format!("t{i}")));
        database
            .execute(&statements.collect::<Vec<_>>().join(";\n"))
            .await;
    };
    every(&format!(
        "INSERT INTO t# SELECT id + {UPDATED}, NULL FROM t#"
    ))
    .await;
    let judge = database.connect().await;
    judge.batch_execute(PINNED).await.unwrap();
    spoil(&database).await;
    for setting in MORE_HOSTILE.split(';') {
        let role = format!("ALTER ROLE postgres IN DATABASE {}", database.name());
        database.execute(&format!("{role} {setting}")).await;
    }
    let spoilt = database.connect().await;
    let shown = spoilt.query_one("SHOW IntervalStyle", &[]).await.unwrap();
    assert_eq!(shown.get::<_, String>(0), "sql_standard");

    let selects: Vec<_> = (0..cases.len())
        .map(|i| format!("SELECT * FROM t{i}"))
        .collect();
    let selects: Vec<_> = selects.iter().map(String::as_str).collect();
    let streamer = Streamer::config(&database)
        .shape("s", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    // One transaction each, by a session whose own settings are no better than those of the database.
    every(&format!(
        "INSERT INTO t# SELECT id + {INSERTED}, v FROM t# WHERE id < {INSERTED}"
    ))
    .await;
    every(&format!(
        "UPDATE t# AS here SET v = there.v FROM t# AS there WHERE here.id = there.id + {UPDATED} AND there.id < {INSERTED}"
    ))
    .await;
    replica.until_caught_up(&database).await;
    let late = Replica::config(&streamer).subscribe("s").start().await;
    late.until_caught_up(&database).await;

    let mut wrong = Vec::new();
    let mut values = 0;
    for (i, case) in cases.iter().enumerate() {
        let table = format!("t{i}");
        let said = said(&judge, &table).await;
        assert_eq!(said.len(), 3 * (case.values.len() + 1), "{}", case.sql_type);
        values += said.len();
        let said: BTreeMap<i32, String> = said
            .into_iter()
            .map(|(id, said)| (id, in_sqlite(said)))
            .collect();
        for (whose, replica) in [("the first file", &replica), ("the late file", &late)] {
            let found = found(&replica.open(), &table);
            if found == said {
                continue;
            }
            let short = |text: Option<&String>| {
                let text = text.map_or("no row", String::as_str);
                text.chars().take(200).collect::<String>()
            };
            let ids: BTreeSet<_> = said.keys().chain(found.keys()).collect();
            for id in ids {
                let (said, found) = (said.get(id), found.get(id));
                if said != found {
                    wrong.push(format!(
                        "{} row {id} in {whose}: {} instead of {}",
                        case.sql_type,
                        short(found),
                        short(said)
                    ));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {values} values:\n{}",
        wrong.len(),
        wrong.join("\n")
    );

    let file = replica.open();
    let lax: i64 = file
        .query_row(
            "SELECT count(*) FROM pragma_table_list WHERE name GLOB 't[0-9]*' AND NOT strict",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(lax, 0, "tables that are not STRICT");
    let sql = "SELECT c.relname::text, format_type(a.atttypid, a.atttypmod)
               FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
               WHERE c.relname ~ '^t[0-9]+$' AND c.relkind = 'r' AND a.attname = 'v'";
    let rows = judge.query(sql, &[]).await.unwrap();
    assert_eq!(rows.len(), cases.len());
    for row in rows {
        let (table, of_postgres): (String, String) = (row.get(0), row.get(1));
        let recorded: String = file
            .query_row(
                "SELECT postgres_type FROM _anabranch_columns WHERE table_name = ?1 AND column_name = 'v'",
                [&table],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(recorded, of_postgres, "{table}");
    }
}
