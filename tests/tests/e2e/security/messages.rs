//! Line 14: what another role of the database can put into the stream, or where the streamer keeps its books. Anybody may call
//! `pg_logical_emit_message`, under any prefix.

use anabranch_proto::Lsn;
use anabranch_tests::{
    peers::Replica,
    wait::{DEADLINE, until},
};
use serde_json::Value;

use super::{Fixture, last_error, metric, program, role};

/// What a forger may hope to be read: an answer to a write, a position, a schema, a commit, and what is no text at all.
const CONTENTS: [&str; 7] = [
    "''::text",
    r#"'{"replica": "{id}", "seq": 1, "hash": "00"}'"#,
    "'FFFFFFFF/FFFFFFFF'",
    "'{\"epoch\": \"0000000000000007\", \"nonce\": \"forged\"}'",
    "'ALTER TABLE t DROP COLUMN v'",
    r"'\x42000000000000000000000000000000000000000243'::bytea",
    "repeat('x', 3000000)",
];

async fn status(fixture: &Fixture) -> Value {
    let status = fixture.streamer.get("/status").await.unwrap();
    status.json().unwrap()
}

fn columns(replica: &Replica) -> String {
    let sql = "SELECT group_concat(name || ' ' || type) FROM pragma_table_info('t')";
    (replica.open())
        .query_row(sql, [], |row| row.get(0))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_another_role_is_taken_for_the_streamers_own() {
    let fixture = Fixture::start(|config| config).await;
    let database = &fixture.database;
    let replica = Replica::config(&fixture.streamer)
        .token(&fixture.token("a", 1))
        .subscribe("s")
        .start()
        .await;
    let id = replica.get("/status").await.unwrap().json().unwrap()["replica_id"].clone();
    let id = id.as_str().unwrap().to_owned();
    let (epoch, schema) = (status(&fixture).await["epoch"].clone(), columns(&replica));

    // A write that waits in Postgres: whoever forges its answer makes it look done.
    let mut holder = database.connect().await;
    let lock = holder.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE t IN SHARE ROW EXCLUSIVE MODE")
        .await
        .unwrap();
    program(&replica)
        .execute("INSERT INTO t VALUES (100, 1, 'written')", [])
        .unwrap();
    until("it waits", DEADLINE, || async {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        database.query(sql, &[]).await.len() == 1
    })
    .await;

    let began = [fixture.streamer.log(), replica.log()].map(|log| log.len());
    let client = role(database, "stranger", "").await;
    let mut last = Lsn(0);
    for prefix in [
        "anabranch",
        "anabranch_",
        "anabranch.replicas",
        "anabranch.source",
        "",
        "pgoutput",
        "a'; DROP TABLE t; --",
    ] {
        let prefix = prefix.replace('\'', "''");
        for content in CONTENTS {
            let content = content.replace("{id}", &id);
            for is_transactional in [true, false] {
                let sql = format!(
                    "SELECT pg_logical_emit_message({is_transactional}, '{prefix}', {content})::text"
                );
                let row = client.query_one(&sql, &[]).await.unwrap();
                last = row.get::<_, &str>(0).parse().unwrap();
                // One that is taken back: what is not transactional stays in the WAL.
                let back = format!("BEGIN; {sql}; ROLLBACK");
                client.batch_execute(&back).await.unwrap();
            }
        }
    }
    // All of it was read.
    replica.until_at(last).await;
    let pending = "SELECT pending FROM _anabranch_status";
    let pending: i64 = (replica.open())
        .query_row(pending, [], |row| row.get(0))
        .unwrap();
    assert_eq!(pending, 1);
    let now = status(&fixture).await;
    assert_eq!(now["epoch"], epoch);
    let at = now["lsn"].as_str().unwrap().parse::<Lsn>().unwrap();
    assert!(at <= database.lsn().await, "{now}");
    assert_eq!(columns(&replica), schema);

    lock.rollback().await.unwrap();
    until("it is made", DEADLINE, || async {
        let sql = "SELECT FROM t WHERE id = 100 AND v = 'written'";
        database.query(sql, &[]).await.len() == 1
    })
    .await;
    database.execute("UPDATE t SET v = v || '!'").await;
    let mine = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(database, &mine).await;
    assert_eq!(last_error(&replica).await.unwrap(), "");
    assert_eq!(
        metric(&replica, "anabranch_replica_streams_total").await,
        1.0
    );
    assert_eq!(
        metric(&fixture.streamer, "anabranch_streamer_disconnects_total").await,
        0.0
    );
    for (log, began) in [fixture.streamer.log(), replica.log()].iter().zip(began) {
        let since = &log[began..];
        assert!(
            !since.contains(" WARN ") && !since.contains(" ERROR "),
            "{since}"
        );
    }
}

/// The books themselves: a stranger reads none of what authenticates, writes nothing, and calls nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_reads_or_writes_the_streamers_books() {
    let fixture = Fixture::start(|config| config).await;
    let database = &fixture.database;
    let client = role(database, "stranger", "").await;
    let objects = "SELECT relname::text, relkind::text FROM pg_class WHERE relnamespace = 'anabranch'::regnamespace
                       AND relkind IN ('r', 'v', 'S') ORDER BY 1";
    let tables = database.query(objects, &[]).await;
    assert!(tables.len() >= 5, "{tables:?}");
    let mut tries = Vec::new();
    for table in &tables {
        let name: &str = table.get(0);
        for sql in [
            "SELECT * FROM anabranch.{}",
            "INSERT INTO anabranch.{} DEFAULT VALUES",
            "DELETE FROM anabranch.{}",
            "TRUNCATE anabranch.{}",
            "ALTER TABLE anabranch.{} DISABLE TRIGGER ALL",
            "CREATE TRIGGER x BEFORE INSERT ON anabranch.{} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        ] {
            tries.push(sql.replace("{}", name));
        }
    }
    let functions = "SELECT format('SELECT anabranch.%I(%s)', proname, coalesce((SELECT string_agg('NULL::' || format_type(t, NULL), ', ')
                         FROM unnest(proargtypes) t), '')) FROM pg_proc
                      WHERE pronamespace = 'anabranch'::regnamespace";
    let functions = database.query(functions, &[]).await;
    assert!(functions.len() >= 5, "{functions:?}");
    tries.extend(functions.iter().map(|row| row.get::<_, String>(0)));
    let slot = format!("anabranch_{}", database.name());
    tries.extend([
        "CREATE TABLE anabranch.x (id int)".into(),
        "CREATE FUNCTION anabranch.claim(int) RETURNS void LANGUAGE sql AS ''".into(),
        "ALTER PUBLICATION anabranch SET (publish = 'insert')".into(),
        "ALTER PUBLICATION anabranch DROP TABLE t".into(),
        "DROP PUBLICATION anabranch".into(),
        format!("SELECT pg_drop_replication_slot('{slot}')"),
        format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())"),
        format!("SELECT * FROM pg_logical_slot_get_binary_changes('{slot}', NULL, NULL)"),
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'anabranch%'".into(),
    ]);
    for sql in tries {
        let refused = client.batch_execute(&sql).await;
        let Err(error) = refused else {
            panic!("a stranger may: {sql}");
        };
        assert_eq!(error.code().unwrap().code(), "42501", "{sql}: {error:?}");
    }
    // And he is right that he may log in: it is by what he may not that all of it was refused.
    client.batch_execute("SELECT 1").await.unwrap();
}
