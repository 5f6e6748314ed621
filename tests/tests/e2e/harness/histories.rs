//! The history oracle passes what is right, and nothing else.

use std::path::Path;

use anabranch_proto::Lsn;
use anabranch_tests::{
    oracle::{
        Cell,
        form::{SESSION, Types},
        history::{History, View, Watch},
        select::ask,
    },
    postgres::{Database, Options, Server, Stop},
    seed::Seed,
};
use rand::Rng;
use rusqlite::{Connection, types::Value};

/// What stands for a replica here: a file that is filled from Postgres, when nothing is being written.
struct Copy<'a> {
    database: &'a Database,
    sqlite: Connection,
    views: &'a [View],
}

impl<'a> Copy<'a> {
    fn new(database: &'a Database, file: &Path, views: &'a [View]) -> Self {
        let sqlite = Connection::open(file).unwrap();
        sqlite
            .execute_batch(
                "PRAGMA journal_mode = WAL; CREATE TABLE _anabranch_status (epoch TEXT, lsn TEXT);
                 INSERT INTO _anabranch_status VALUES ('e1', NULL)",
            )
            .unwrap();
        Self {
            database,
            sqlite,
            views,
        }
    }

    /// Copies what Postgres holds now, and gives the position of that.
    async fn take(&mut self) -> Lsn {
        let lsn = self.database.lsn().await;
        let client = self.database.connect().await;
        client.batch_execute(SESSION).await.unwrap();
        let types = Types::load(&client).await.unwrap();
        let transaction = self.sqlite.transaction().unwrap();
        for view in self.views {
            let columns = view.columns.as_ref().map_or("*".into(), |c| c.join(", "));
            let sql = format!(
                "SELECT {columns} FROM {} WHERE {}",
                view.table, view.condition
            );
            let answer = ask(&client, &types, &sql).await.unwrap();
            let names = answer.columns.join(", ");
            let table = &view.table;
            transaction
                .execute_batch(&format!(
                    "DROP TABLE IF EXISTS {table}; CREATE TABLE {table} ({names})"
                ))
                .unwrap();
            for row in answer.rows {
                let marks = vec!["?"; row.len()].join(", ");
                let values = row.into_iter().map(|cell| match cell {
                    Cell::Null => Value::Null,
                    Cell::Integer(value) => Value::Integer(value),
                    Cell::Real(bits) => Value::Real(f64::from_bits(bits)),
                    Cell::Text(text) | Cell::Array(text) => Value::Text(text),
                    Cell::Blob(bytes) => Value::Blob(bytes),
                });
                transaction
                    .execute(
                        &format!("INSERT INTO {table} VALUES ({marks})"),
                        rusqlite::params_from_iter(values),
                    )
                    .unwrap();
            }
        }
        transaction
            .execute("UPDATE _anabranch_status SET lsn = ?1", [lsn.to_string()])
            .unwrap();
        transaction.commit().unwrap();
        lsn
    }
}

fn views() -> Vec<View> {
    vec![
        View::new("t", "team % 3 = 1 AND NOT coalesce(done, false)"),
        View::new("u", "v IS NOT NULL").columns(&["id", "v"]),
    ]
}

const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, team int NOT NULL, done bool, note text, at timestamptz, tags text[]);
    ALTER TABLE t ALTER note SET STORAGE EXTERNAL;
    CREATE TABLE u (a int, id int, v numeric(8,2), PRIMARY KEY (a, id));
    INSERT INTO t SELECT i, i, i % 5 = 0, 'it''s ' || i, now(), ARRAY['a', NULL] FROM generate_series(1, 50) i;
    INSERT INTO u SELECT i % 2, i, i / 3.0 FROM generate_series(1, 20) i";

/// A transaction that does a bit of everything.
fn transaction(rng: &mut impl Rng) -> String {
    let mut sql = String::from("BEGIN;");
    for _ in 0..rng.random_range(1..6) {
        let (id, other) = (rng.random_range(1..60), rng.random_range(1..60));
        sql += &match rng.random_range(0..8) {
            0 => format!(
                "INSERT INTO t VALUES ({id}, {other}, NULL, 'new', 'infinity') ON CONFLICT DO NOTHING;"
            ),
            1 => format!("UPDATE t SET team = {other} WHERE id = {id};"),
            2 => format!(
                "UPDATE t SET id = {other} WHERE id = {id} AND NOT EXISTS (SELECT FROM t WHERE id = {other});"
            ),
            3 => format!("UPDATE t SET note = repeat('long {other} ', 2000) WHERE id = {id};"),
            4 => format!("DELETE FROM t WHERE id = {id};"),
            5 => format!("UPDATE u SET v = nullif({other}, 7) / 4.0 WHERE id = {id};"),
            6 => format!(
                "SAVEPOINT s; DELETE FROM u; ROLLBACK TO s; UPDATE t SET done = NOT done WHERE id = {id};"
            ),
            _ if id == 1 => "TRUNCATE t, u;".into(),
            _ => format!("INSERT INTO u VALUES ({other}, {id}, {id}) ON CONFLICT DO NOTHING;"),
        };
    }
    sql + if rng.random_ratio(1, 5) {
        "ROLLBACK"
    } else {
        "COMMIT"
    }
}

#[tokio::test]
async fn a_right_file_passes_at_every_position_across_kills_of_postgres() {
    let mut rng = Seed::new().rng("transactions");
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    database.execute(TABLES).await;
    let views = views();
    let history = History::start(&database, views.clone()).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("app.db");
    let mut copy = Copy::new(&database, &file, &views);
    let mut watch = Watch::new(&history, &[0, 1]);
    watch.look(&history, &file).await.unwrap();
    assert_eq!(
        watch.looks(),
        0,
        "a file without a position is not looked at"
    );
    for round in 0..60 {
        for _ in 0..rng.random_range(0..4) {
            database.execute(&transaction(&mut rng)).await;
        }
        if round % 20 == 10 {
            server.restart(Stop::Immediate).await;
        }
        copy.take().await;
        watch
            .look(&history, &file)
            .await
            .unwrap_or_else(|error| panic!("round {round}: {error:?}"));
    }
    assert_eq!(watch.looks(), 60);
}

#[tokio::test]
async fn a_wrong_row_a_wrong_position_and_a_step_back_are_found() {
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let views = views();
    let history = History::start(&database, views.clone()).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("app.db");
    let mut copy = Copy::new(&database, &file, &views);
    let first = copy.take().await;
    database
        .execute("UPDATE t SET note = 'changed' WHERE id = 1")
        .await;
    let second = copy.take().await;
    let mut watch = Watch::new(&history, &[0, 1]);
    watch.look(&history, &file).await.unwrap();

    for (wrong, sign) in [
        ("UPDATE t SET note = 'it''s 1' WHERE id = 1", "missing: 1"),
        ("DELETE FROM u WHERE id = 7", "missing: 1"),
        ("INSERT INTO t (id, team) VALUES (60, 1)", "extra: 1"),
        ("UPDATE t SET tags = '[\"a\"]' WHERE id = 4", "extra: 1"),
        ("UPDATE t SET done = NULL WHERE id = 4", "extra: 1"),
        ("ALTER TABLE u ADD COLUMN a", "has columns"),
        ("DROP TABLE t", "has no table t"),
        (
            "UPDATE _anabranch_status SET lsn = NULL",
            "lost its position",
        ),
    ] {
        copy.sqlite.execute_batch(wrong).unwrap();
        let error = watch.look(&history, &file).await.expect_err(wrong);
        assert!(format!("{error:#}").contains(sign), "{wrong}: {error:#}");
        copy.take().await;
        watch.look(&history, &file).await.expect("mended");
    }

    // The rows of the second position, under the name of the first.
    let set = "UPDATE _anabranch_status SET lsn = ?1";
    copy.sqlite.execute(set, [first.to_string()]).unwrap();
    let mut fresh = Watch::new(&history, &[0, 1]);
    let error = fresh.look(&history, &file).await.unwrap_err();
    assert!(format!("{error:#}").contains("extra: 1"), "{error:#}");
    let error = watch.look(&history, &file).await.unwrap_err();
    assert!(format!("{error:#}").contains("went back"), "{error:#}");
    assert!(first < second);
}

/// The oracle knows a transaction by the LSN of `test_decoding`'s COMMIT line, our streamer by the end LSN in
/// pgoutput's Commit message. They are the same.
#[tokio::test]
async fn both_plugins_mean_the_same_position() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY);
             CREATE PUBLICATION p FOR TABLE t;",
        )
        .await;
    let (text, binary) = (
        format!("text_{}", database.name()),
        format!("binary_{}", database.name()),
    );
    for (slot, plugin) in [(&text, "test_decoding"), (&binary, "pgoutput")] {
        let sql = format!("SELECT pg_create_logical_replication_slot('{slot}', '{plugin}')");
        database.execute(&sql).await;
    }
    for id in 0..300 {
        database
            .execute(&format!("INSERT INTO t VALUES ({id})"))
            .await;
    }
    let printed =
        "SELECT lsn::text FROM pg_logical_slot_get_changes($1, NULL, NULL, 'skip-empty-xacts', '1')
                   WHERE data LIKE 'COMMIT%'";
    let printed = database.query(printed, &[&text]).await;
    let printed: Vec<Lsn> = printed
        .iter()
        .map(|row| row.get::<_, String>(0).parse().unwrap())
        .collect();
    let messages = "SELECT data FROM pg_logical_slot_get_binary_changes(
                      $1, NULL, NULL, 'proto_version', '1', 'publication_names', 'p')";
    let messages = database.query(messages, &[&binary]).await;
    let ends: Vec<Lsn> = messages
        .iter()
        .map(|row| row.get::<_, Vec<u8>>(0))
        .filter(|message| message[0] == b'C')
        // Commit: 'C', flags, LSN of the commit, end LSN, time.
        .map(|message| Lsn(u64::from_be_bytes(message[10..18].try_into().unwrap())))
        .collect();
    assert_eq!(printed.len(), 300);
    assert_eq!(printed, ends);
}
