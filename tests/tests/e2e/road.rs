//! The road from Postgres to the file: what rows do, and what the file then holds.

use anabranch_tests::{
    peers::{Replica, Streamer, StreamerConfig},
    postgres::{Database, Server},
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};

/// A streamer and a replica with one shape of one SELECT.
struct Pair {
    database: Database,
    streamer: Streamer,
    replica: Replica,
    table: &'static str,
    sql: &'static str,
}

impl Pair {
    async fn start(setup: &str, table: &'static str, sql: &'static str) -> Pair {
        let database = Server::shared().await.database().await;
        database.execute(setup).await;
        let streamer = Streamer::config(&database);
        Pair::of(database, streamer, table, sql).await
    }

    async fn of(
        database: Database,
        streamer: StreamerConfig,
        table: &'static str,
        sql: &'static str,
    ) -> Pair {
        let streamer = streamer.shape("s", &[sql]).start().await;
        let replica = Replica::config(&streamer).subscribe("s").start().await;
        Pair {
            database,
            streamer,
            replica,
            table,
            sql,
        }
    }

    /// Executes, and compares the file with Postgres once it has caught up.
    async fn after(&self, sql: &str) {
        self.database.execute(sql).await;
        self.same().await;
    }

    async fn same(&self) {
        self.replica
            .until_equal(&self.database, &[(self.table, self.sql)])
            .await;
    }

    fn one<T: rusqlite::types::FromSql>(&self, sql: &str) -> T {
        let file = self.replica.open();
        file.query_row(sql, [], |row| row.get(0)).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_move_in_out_and_change_key_are_where_postgres_has_them() {
    let pair = Pair::start(
        "CREATE TABLE t (id int PRIMARY KEY, team int, title text);
         INSERT INTO t SELECT g, g % 3, 'row ' || g FROM generate_series(1, 100) g",
        "t",
        "SELECT * FROM t WHERE team = 1",
    )
    .await;
    pair.same().await;
    for sql in [
        "UPDATE t SET team = 1 WHERE id = 2",
        "UPDATE t SET team = 2 WHERE id = 1",
        "UPDATE t SET title = 'changed' WHERE id IN (4, 5)",
        "UPDATE t SET id = 1000 WHERE id = 4",
        "UPDATE t SET id = 1001, team = 1 WHERE id = 5",
        "UPDATE t SET id = 1002, team = 0 WHERE id = 7",
        "DELETE FROM t WHERE team = 1 AND id < 30",
        // Out and in again, and gone before anybody saw it.
        "BEGIN; UPDATE t SET team = 0 WHERE id = 31; UPDATE t SET team = 1, title = 'back' WHERE id = 31; COMMIT",
        "BEGIN; INSERT INTO t VALUES (5000, 1, 'brief'); DELETE FROM t WHERE id = 5000; COMMIT",
        // Keys swapped within one transaction.
        "BEGIN; UPDATE t SET id = -1 WHERE id = 34; UPDATE t SET id = 34 WHERE id = 37; UPDATE t SET id = 37 WHERE id = -1; COMMIT",
        "UPDATE t SET id = id + 10000",
        "BEGIN; TRUNCATE t; INSERT INTO t VALUES (1, 1, 'after'), (2, 2, 'elsewhere'); COMMIT",
        "TRUNCATE t",
    ] {
        pair.after(sql).await;
    }
    assert_eq!(pair.one::<i64>("SELECT count(*) FROM t"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_toasted_value_survives_updates_of_other_columns() {
    let pair = Pair::start(
        "CREATE TABLE t (id int PRIMARY KEY, seen bool, body text);
         ALTER TABLE t ALTER body SET STORAGE EXTERNAL;
         INSERT INTO t SELECT g, g = 1, repeat(md5(g::text), 1000) FROM generate_series(1, 3) g",
        "t",
        "SELECT * FROM t WHERE seen",
    )
    .await;
    pair.after("UPDATE t SET seen = false WHERE id = 1").await;
    // It moves in, and Postgres does not send its body.
    pair.after("UPDATE t SET seen = true WHERE id = 2").await;
    pair.after("UPDATE t SET id = 20 WHERE id = 2").await;
    pair.after("BEGIN; UPDATE t SET body = 'x' || body WHERE id = 3; UPDATE t SET seen = true WHERE id = 3; COMMIT")
        .await;
    assert_eq!(pair.one::<i64>("SELECT sum(length(body)) FROM t"), 64_001);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_any_spelling_reach_the_file_unchanged() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            r#"CREATE SCHEMA "My.Schema"; CREATE SCHEMA other;
               CREATE TABLE "My.Schema"."Order ""Items""" ("Select" int PRIMARY KEY, "from" text, "a.b" text, "größe" int);
               INSERT INTO "My.Schema"."Order ""Items""" VALUES (1, 'x', 'y', 2);
               CREATE TABLE other."table" ("group" text, "ORDER" int, PRIMARY KEY ("ORDER", "group"));
               INSERT INTO other."table" VALUES ('a', 1);
               CREATE TABLE "UPPER" (id int PRIMARY KEY, v text);
               INSERT INTO "UPPER" VALUES (1, 'one')"#,
        )
        .await;
    let selects = [
        r#"SELECT * FROM "My.Schema"."Order ""Items""" WHERE "größe" > 1"#,
        r#"SELECT * FROM other."table" WHERE "ORDER" >= 1"#,
        r#"SELECT * FROM "UPPER""#,
    ];
    let streamer = Streamer::config(&database)
        .shape("s", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database
        .execute(
            r#"UPDATE "My.Schema"."Order ""Items""" SET "from" = 'z'; INSERT INTO other."table" VALUES ('b', 2);
               UPDATE "UPPER" SET id = 2"#,
        )
        .await;
    let tables = [
        (r#"My.Schema.Order "Items""#, selects[0]),
        ("other.table", selects[1]),
        ("UPPER", selects[2]),
    ];
    replica.until_equal(&database, &tables).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_other_than_the_primary_key_find_the_old_row() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE by_index (id int PRIMARY KEY, code text NOT NULL, v int);
             CREATE UNIQUE INDEX by_code ON by_index (code);
             ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_code;
             CREATE TABLE no_primary (code text NOT NULL, v int);
             CREATE UNIQUE INDEX no_primary_code ON no_primary (code);
             ALTER TABLE no_primary REPLICA IDENTITY USING INDEX no_primary_code;
             CREATE TABLE whole (id int PRIMARY KEY, v int, big text);
             ALTER TABLE whole REPLICA IDENTITY FULL;
             INSERT INTO by_index SELECT g, 'c' || g, g FROM generate_series(1, 50) g;
             INSERT INTO no_primary SELECT 'c' || g, g FROM generate_series(1, 50) g;
             INSERT INTO whole SELECT g, g, repeat(md5(g::text), 300) FROM generate_series(1, 50) g",
        )
        .await;
    let names = ["by_index", "no_primary", "whole"];
    let selects = names.map(|name| format!("SELECT * FROM {name} WHERE v > 10"));
    let borrowed: Vec<&str> = selects.iter().map(String::as_str).collect();
    let streamer = Streamer::config(&database)
        .shape("s", &borrowed)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database
        .execute(
            "UPDATE by_index SET id = id + 100; UPDATE by_index SET code = 'd' || code WHERE v < 30; DELETE FROM by_index WHERE v > 40;
             UPDATE no_primary SET code = 'd' || code WHERE v < 30; UPDATE no_primary SET v = v - 5; DELETE FROM no_primary WHERE v > 40;
             UPDATE whole SET id = id + 100; UPDATE whole SET v = v + 5; DELETE FROM whole WHERE v > 40",
        )
        .await;
    let tables: Vec<_> = names.iter().copied().zip(borrowed).collect();
    replica.until_equal(&database, &tables).await;
}

/// `ANABRANCH_ROWS=1000000` makes it larger.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_with_a_subtransaction_rolled_back_arrives_whole() {
    let rows: u64 =
        std::env::var("ANABRANCH_ROWS").map_or(150_000, |text| text.parse().expect("a number"));
    for streaming in [false, true] {
        let database = Server::shared().await.database().await;
        database
            .execute("CREATE TABLE t (id int PRIMARY KEY, v int, pad text)")
            .await;
        let mut streamer = Streamer::config(&database);
        if streaming {
            // Everything above 64 kB is streamed before its commit, in many blocks.
            let eager = "?options=-c%20logical_decoding_work_mem%3D64kB";
            streamer = streamer
                .set("postgres.streaming", true)
                .set("postgres.url", format!("{}{eager}", database.url()));
        }
        let pair = Pair::of(database, streamer, "t", "SELECT * FROM t WHERE v <> 3").await;
        pair.after(&format!(
            "BEGIN;
             INSERT INTO t SELECT g, g % 5, repeat('x', 100) FROM generate_series(1, {rows}) g;
             SAVEPOINT a; DELETE FROM t WHERE id % 2 = 0; ROLLBACK TO a;
             SAVEPOINT b; UPDATE t SET v = v + 1 WHERE id % 7 = 0; RELEASE b;
             COMMIT"
        ))
        .await;
        pair.after("UPDATE t SET v = v + 1").await;
        pair.after("BEGIN; DELETE FROM t; ROLLBACK").await;
        pair.after("TRUNCATE t").await;
        let streamed = "SELECT stream_txns > 0 FROM pg_stat_replication_slots WHERE slot_name = $1";
        if streaming {
            let slot = format!("anabranch_{}", pair.database.name());
            until("Postgres counts what it streamed", DEADLINE, || async {
                let rows = pair.database.query(streamed, &[&slot]).await;
                rows.first().is_some_and(|row| row.get(0)).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_64_megabytes_travels_in_pieces() {
    let pair = Pair::start(
        "CREATE TABLE t (id int PRIMARY KEY, v int, body text)",
        "t",
        "SELECT * FROM t",
    )
    .await;
    pair.database
        .execute("INSERT INTO t SELECT 1, 1, repeat('0123456789abcdef', 4 * 1024 * 1024)")
        .await;
    pair.replica.until_caught_up(&pair.database).await;
    assert_eq!(pair.one::<i64>("SELECT length(body) FROM t"), 64 << 20);
    pair.database
        .execute("UPDATE t SET v = 2; INSERT INTO t VALUES (2, 2, 'small')")
        .await;
    pair.replica.until_caught_up(&pair.database).await;
    assert_eq!(
        pair.one::<i64>("SELECT sum(v * length(body)) FROM t"),
        (128 << 20) + 10
    );
    // And from the mirror, for a replica that joins.
    let late = Replica::config(&pair.streamer).subscribe("s").start().await;
    let length: i64 = late
        .open()
        .query_row("SELECT max(length(body)) FROM t", [], |row| row.get(0))
        .unwrap();
    assert_eq!(length, 64 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_hold_nothing_of_ours_move_the_position() {
    let pair = Pair::start(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE unpublished (id int)",
        "t",
        "SELECT * FROM t",
    )
    .await;
    for _ in 0..5 {
        pair.after("INSERT INTO unpublished SELECT generate_series(1, 1000)")
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_in_two_shapes_of_one_replica_goes_when_it_is_in_neither() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, a bool, b bool, v int); INSERT INTO t VALUES (1, true, true, 0), (2, true, false, 0), (3, false, true, 0), (4, false, false, 0)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("a", &["SELECT * FROM t WHERE a"])
        .shape("b", &["SELECT * FROM t WHERE b"])
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .subscribe("a")
        .subscribe("b")
        .start()
        .await;
    for sql in [
        "UPDATE t SET v = 1",
        "UPDATE t SET a = false WHERE id = 1",
        "UPDATE t SET b = false WHERE id = 1",
        "UPDATE t SET a = false WHERE id = 2",
        "UPDATE t SET a = true WHERE id IN (3, 4)",
        "UPDATE t SET b = false WHERE id = 3",
        "DELETE FROM t WHERE id = 3",
    ] {
        database.execute(sql).await;
        replica
            .until_equal(&database, &[("t", "SELECT * FROM t WHERE a OR b")])
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_are_packed_where_the_replica_wants_it() {
    let pair = Pair::start(
        "CREATE TABLE t (id int PRIMARY KEY, v int, body text);
         INSERT INTO t SELECT g, g % 5, 'the same words in every row ' || g FROM generate_series(1, 20000) g",
        "t",
        "SELECT * FROM t",
    )
    .await;
    let mut sent = Vec::new();
    for zstd in [false, true] {
        let proxy = Proxy::to(pair.streamer.address()).await;
        let replica = Replica::config(&pair.streamer)
            .through(&proxy)
            .set("zstd", zstd)
            .subscribe("s")
            .start()
            .await;
        let same = async || {
            replica
                .until_equal(&pair.database, &[(pair.table, pair.sql)])
                .await;
        };
        same().await;
        pair.database.execute("UPDATE t SET v = v + 1").await;
        same().await;
        sent.push(proxy.bytes(Way::Down));
    }
    assert!(sent[1] < sent[0] / 2, "{sent:?}");
}
