//! Shapes that name some columns only: the others leave the streamer in no way.

use anabranch_tests::{
    oracle::file,
    peers::{Replica, Streamer},
    postgres::Server,
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};

/// What is in no shape's columns.
const SECRET: &str = "nobody-may-know";

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_no_shape_names_decides_and_is_never_sent() {
    let database = Server::shared().await.database().await;
    database
        .execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, salary text NOT NULL, title text, team int);
             INSERT INTO t SELECT g, '{SECRET} ' || g, 'title ' || g, g % 2 FROM generate_series(1, 2000) g"
        ))
        .await;
    // The condition's column is not among them either.
    let select = "SELECT title, id FROM t WHERE team = 1";
    let streamer = Streamer::config(&database)
        .shape("s", &[select])
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    proxy.record();
    let replica = Replica::config(&streamer)
        .through(&proxy)
        .set("zstd", false)
        .subscribe("s")
        .start()
        .await;
    let same = async || {
        replica.until_equal(&database, &[("t", select)]).await;
    };
    same().await;
    let content = file::read(&replica.file(), &["t"]).unwrap();
    assert_eq!(content.tables[0].as_ref().unwrap().columns, ["id", "title"]);

    // Not a row for 1,000 of them: what there is are positions.
    let before = proxy.bytes(Way::Down);
    for turn in 0..3 {
        database
            .execute(&format!("UPDATE t SET salary = '{SECRET} raised {turn}'"))
            .await;
        same().await;
    }
    let sent = proxy.bytes(Way::Down) - before;
    println!("3 transactions that concern nobody are {sent} bytes");
    assert!(sent < 3_000, "{sent}");

    // In, out, and both with a new key; and what is named goes on being sent.
    for sql in [
        "UPDATE t SET team = 1 - team WHERE id <= 100",
        "UPDATE t SET salary = salary || '!', title = title || '?' WHERE id % 3 = 0",
        "UPDATE t SET id = id + 10000, team = 1 - team WHERE id % 5 = 0",
        "DELETE FROM t WHERE id % 7 = 0",
    ] {
        database.execute(sql).await;
        same().await;
    }
    // It was looked for where it would be found.
    let recorded = proxy.recorded(Way::Down);
    let has = |words: &str| {
        let mut windows = recorded.windows(words.len());
        windows.any(|window| window == words.as_bytes())
    };
    assert!(has("title 777?"));
    assert!(!has(SECRET), "a column of no shape was sent");
}

/// The mirror has every column, so a list needs no more than the key.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_list_needs_the_whole_key_and_nothing_else() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE pair (a int, b int, v text, PRIMARY KEY (b, a));
             CREATE TABLE coded (id int PRIMARY KEY, code text NOT NULL, v int);
             CREATE UNIQUE INDEX by_code ON coded (code);
             ALTER TABLE coded REPLICA IDENTITY USING INDEX by_code;
             INSERT INTO pair SELECT g, g % 3, 'v' || g FROM generate_series(1, 50) g;
             INSERT INTO coded SELECT g, 'c' || g, g FROM generate_series(1, 50) g",
        )
        .await;
    for (sql, lacks) in [
        ("SELECT a, v FROM pair", "b"),
        ("SELECT v FROM pair", "key"),
        ("SELECT code, v FROM coded", "id"),
    ] {
        let streamer = Streamer::config(&database).shape("s", &[sql]).prepare();
        streamer.spawn();
        assert_eq!(streamer.exit().await.code(), Some(1));
        let log = streamer.log();
        assert!(log.contains("config.toml:"), "{sql}: {log}");
        assert!(log.contains(lacks), "{sql}: {log}");
    }
    let selects = [
        "SELECT a, b FROM pair",
        "SELECT id, v FROM coded WHERE v > 10",
    ];
    let streamer = Streamer::config(&database)
        .shape("s", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let tables = [("pair", selects[0]), ("coded", selects[1])];
    for sql in [
        "UPDATE pair SET b = b + 10 WHERE a < 20; UPDATE pair SET v = 'unseen'",
        "UPDATE coded SET code = 'd' || code; UPDATE coded SET id = id + 100, v = v - 5 WHERE id % 2 = 0",
        "DELETE FROM pair WHERE b > 10; DELETE FROM coded WHERE id % 3 = 0",
    ] {
        database.execute(sql).await;
        replica.until_equal(&database, &tables).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shapes_with_different_columns_of_a_table_do_not_go_into_one_replica() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, a int, b int);
             INSERT INTO t SELECT g, g % 4, g FROM generate_series(1, 40) g",
        )
        .await;
    let [short, other, long] = [
        "SELECT id, a FROM t WHERE a = 1",
        "SELECT a, id FROM t WHERE a = 2",
        "SELECT * FROM t WHERE a = 3",
    ];
    let streamer = Streamer::config(&database)
        .shape("short", &[short])
        .shape("other", &[other])
        .shape("long", &[long])
        .start()
        .await;
    let refused = Replica::config(&streamer)
        .subscribe("short")
        .subscribe("long")
        .prepare();
    refused.spawn();
    let error = until("it is refused, and says so", DEADLINE, || async {
        let status = refused.get("/status").await?.json()?;
        let error = status["last_error"].as_str().map(str::to_owned);
        error.ok_or_else(|| anyhow::anyhow!("{status}"))
    })
    .await;
    for word in ["short", "long", "public.t", "columns"] {
        assert!(error.contains(word), "{error}");
    }
    assert!(refused.open().prepare("SELECT * FROM t").is_err());

    // The order in which they are named is no difference, and in replicas of their own they may differ.
    let both = Replica::config(&streamer)
        .subscribe("other")
        .subscribe("short")
        .start()
        .await;
    let alone = Replica::config(&streamer).subscribe("long").start().await;
    database
        .execute("UPDATE t SET a = (a + 1) % 4; UPDATE t SET b = b + 1 WHERE id < 30")
        .await;
    let union = "SELECT id, a FROM t WHERE a IN (1, 2)";
    both.until_equal(&database, &[("t", union)]).await;
    alone.until_equal(&database, &[("t", long)]).await;
}
