//! What is refused, in which words, and that nothing was harmed by then.

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Server,
    wait::{DEADLINE, until},
};

/// Exit code, and what was said.
async fn run(streamer: &Streamer, subcommand: &str) -> (i32, String) {
    let output = streamer.command(subcommand).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code().unwrap(), said.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_replicated_are_refused_by_name_and_not_published() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE no_key (a int); CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
             CREATE TABLE late (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE floats (id float8 PRIMARY KEY); CREATE VIEW a_view AS SELECT 1 AS id;
             CREATE TABLE nothing (id int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING",
        )
        .await;
    for table in [
        "no_key",
        "unlogged",
        "late",
        "floats",
        "a_view",
        "nothing",
        "not_there",
    ] {
        let sql = format!("SELECT * FROM {table}");
        let streamer = Streamer::config(&database).shape("s", &[&sql]).prepare();
        for subcommand in ["check", "run"] {
            let (code, said) = run(&streamer, subcommand).await;
            assert_eq!(code, 1, "{said}");
            assert!(said.contains(&format!("public.{table}")), "{said}");
        }
    }
    let published = database
        .query("SELECT count(*) FROM pg_publication_tables", &[])
        .await;
    assert_eq!(published[0].get::<_, i64>(0), 0);
    // The application's updates go on.
    database
        .execute("INSERT INTO no_key VALUES (1); UPDATE no_key SET a = 2; DELETE FROM no_key")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_which_conditions_each_change_costs_for_each_session_and_no_others() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, owner int); CREATE TABLE u (id int PRIMARY KEY, v int)")
        .await;
    let streamer = Streamer::config(&database)
        .toml(
            r#"
            [shape.dear]
            params.me = { claim = "me" }
            tables = [
                "SELECT * FROM u WHERE v >= $me",
                "SELECT * FROM t WHERE owner <> $me",
            ]
            [shape.cheap]
            params.me = { claim = "me" }
            tables = ["SELECT * FROM t WHERE owner = $me AND id NOT IN (SELECT v FROM u WHERE v > 5)", "SELECT * FROM u"]
            "#,
        )
        .prepare();
    let (_, said) = run(&streamer, "setup").await;
    let (code, said_of_it) = run(&streamer, "check").await;
    assert_eq!(code, 0, "{said}{said_of_it}");
    let warned: Vec<&str> = (said_of_it.lines())
        .filter(|line| {
            line.contains("is evaluated for every change of the table, for each of its sessions")
        })
        .collect();
    assert_eq!(warned.len(), 1, "{said_of_it}");
    let words = [
        "warning: ",
        "config.toml:",
        "shape dear, table public.t: this condition is",
        "no part of it that AND joins",
    ];
    assert!(
        words.iter().all(|word| warned[0].contains(word)),
        "{said_of_it}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn shapes_that_cannot_be_exact_are_refused_with_place_and_reason() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, body jsonb, name text)")
        .await;
    // One level more than there may be.
    let deep = (0..5).fold("SELECT id FROM t".to_owned(), |inner, _| {
        format!("SELECT id FROM t WHERE id IN ({inner})")
    });
    for (sql, reason) in [
        (&*deep, "subqueries are nested deeper"),
        ("SELECT * FROM t WHERE body = '{}'", "json"),
        ("SELECT name FROM t", "key"),
        ("SELECT * FROM t WHERE name ILIKE 'a%'", "ILIKE"),
        ("SELECT * FROM t WHERE no_column = 1", "no_column"),
    ] {
        let streamer = Streamer::config(&database).shape("s", &[sql]).prepare();
        let (code, said) = run(&streamer, "run").await;
        assert!(code == 1 || code == 2, "{code}: {said}");
        assert!(said.contains(reason), "{sql}: {said}");
        assert!(said.contains("config.toml:"), "{sql}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_config_is_refused_with_file_line_and_field() {
    let database = Server::shared().await.database().await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t"])
        .prepare();
    let good = std::fs::read_to_string(streamer.config_file()).unwrap();
    std::fs::write(
        streamer.config_file(),
        format!("memory_may = \"1GiB\"\n{good}"),
    )
    .unwrap();
    let (code, said) = run(&streamer, "run").await;
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("config.toml:1:")
            && said.contains("memory_may")
            && said.contains("memory_max"),
        "{said}"
    );
    assert!(!said.contains("postgres://"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_replica_of_one_file_is_refused() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t"])
        .start()
        .await;
    let first = Replica::config(&streamer).subscribe("s").start().await;
    let file = first.file();
    let second = Replica::config(&streamer)
        .set("database", file.to_str().unwrap())
        .subscribe("s")
        .prepare();
    second.spawn();
    let status = second.exit().await;
    assert_eq!(status.code(), Some(1), "{}", second.log());
    assert!(second.log().contains("app.db"), "{}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_change_stops_its_table_by_name_and_no_other() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE changing (id int PRIMARY KEY, v int); CREATE TABLE steady (id int PRIMARY KEY, v int);
                  INSERT INTO changing VALUES (1, 1); INSERT INTO steady VALUES (1, 1)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM changing", "SELECT * FROM steady"])
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database
        .execute("ALTER TABLE changing ADD COLUMN w int DEFAULT 7; UPDATE changing SET v = 2; UPDATE steady SET v = 2")
        .await;
    replica.until_caught_up(&database).await;
    let stopped = until("the file says that the table stopped", DEADLINE, || async {
        let file = replica.open();
        file.query_row(
            "SELECT reason FROM _anabranch_tables WHERE table_name = 'changing' AND state = 'stopped'",
            [],
            |row| row.get::<_, String>(0),
        )
        .ok()
    })
    .await;
    assert!(stopped.contains('w'), "{stopped}");
    let file = replica.open();
    let value = |sql: &str| file.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(value("SELECT v FROM changing"), 1, "as before the change");
    assert_eq!(value("SELECT v FROM steady"), 2);
    database.execute("UPDATE steady SET v = 3").await;
    replica.until_caught_up(&database).await;
    assert_eq!(value("SELECT v FROM steady"), 3);

    // It says itself how it comes back.
    let remedy = "take it out of the shapes, restart the streamer, put it back, and restart";
    assert!(stopped.contains(remedy), "{stopped}");
    assert!(streamer.log().contains(remedy), "{}", streamer.log());
    let both = ["SELECT * FROM changing", "SELECT * FROM steady"];
    for tables in [&both[1..], &both[..]] {
        assert!(streamer.terminate().await.success());
        streamer.reconfigure("shape.s.tables", tables.to_vec());
        streamer.start().await;
    }
    database.execute("UPDATE changing SET v = 4").await;
    let all = [("changing", both[0]), ("steady", both[1])];
    replica.until_equal(&database, &all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_table_is_said_to_be_stopped_without_any_row() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM gone"])
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database.execute("DROP TABLE gone").await;
    until("the file says that the table stopped", DEADLINE, || async {
        let file = replica.open();
        let sql = "SELECT reason FROM _anabranch_tables WHERE state = 'stopped' AND reason LIKE '%dropped%'";
        file.query_row(sql, [], |row| row.get::<_, String>(0)).ok()
    })
    .await;
}

/// Between the two ALTERs nobody was told of deletes.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_kept_quiet_for_a_while_is_noticed() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)",
        )
        .await;
    let all = [("t", "SELECT * FROM t")];
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t"])
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let quietly = |sql: &str| {
        format!(
            "BEGIN; ALTER PUBLICATION anabranch SET (publish = 'insert, update'); COMMIT; BEGIN; {sql}; COMMIT;
             BEGIN; ALTER PUBLICATION anabranch SET (publish = 'insert, update, delete, truncate'); COMMIT"
        )
    };
    assert!(streamer.terminate().await.success());
    database
        .execute(&quietly("DELETE FROM t WHERE id <= 10"))
        .await;
    streamer.start().await;
    replica.until_equal(&database, &all).await;

    database
        .execute(&quietly("DELETE FROM t WHERE id <= 20"))
        .await;
    until("the file says that the table stopped", DEADLINE, || async {
        let file = replica.open();
        let sql = "SELECT reason FROM _anabranch_tables WHERE state = 'stopped' AND reason LIKE '%altered%'";
        file.query_row(sql, [], |row| row.get::<_, String>(0)).ok()
    })
    .await;
}

/// An ALTER TABLE that leaves every type as it is, and yet changes every row: Postgres tells of none of it.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_an_alter_table_rewrote_are_noticed() {
    let database = Server::shared().await.database().await;
    let tables = ["rewritten", "vacuumed", "defaulted"];
    for table in tables {
        database
            .execute(&format!(
                "CREATE TABLE {table} (id int PRIMARY KEY, v text); INSERT INTO {table} VALUES (1, 'One'), (2, 'Two')"
            ))
            .await;
    }
    let selects = tables.map(|table| format!("SELECT * FROM {table}"));
    let selects = selects.each_ref().map(String::as_str);
    let all = std::array::from_fn::<_, 3, _>(|i| (tables[i], selects[i]));
    let streamer = Streamer::config(&database)
        .shape("s", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let change = async |to: &str| {
        // One by one: VACUUM is not to be in a transaction.
        for sql in [
            &format!("ALTER TABLE rewritten ALTER v TYPE text USING {to}(v)"),
            "VACUUM FULL vacuumed",
            "VACUUM FULL pg_attribute",
            "ALTER TABLE defaulted ALTER v SET DEFAULT 'x', ALTER v SET STATISTICS 7",
            "UPDATE vacuumed SET v = v || '!'",
            "UPDATE defaulted SET v = v || '!'",
        ] {
            database.execute(sql).await;
        }
    };
    assert!(streamer.terminate().await.success());
    change("lower").await;
    streamer.start().await;
    replica.until_equal(&database, &all).await;

    change("upper").await;
    until("the file says that the table stopped", DEADLINE, || async {
        let file = replica.open();
        let sql = "SELECT reason FROM _anabranch_tables WHERE state = 'stopped' AND table_name = 'rewritten'
                   AND reason LIKE '%ALTER TABLE%'";
        file.query_row(sql, [], |row| row.get::<_, String>(0)).ok()
    })
    .await;
    replica.until_equal(&database, &all[1..]).await;
    let file = replica.open();
    let sql = "SELECT count(*) FROM _anabranch_tables WHERE state = 'stopped'";
    assert_eq!(
        file.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_above_the_limit_stops_its_table_by_name_and_no_other() {
    let database = Server::shared().await.database().await;
    let tables = ["copied", "inserted", "updated", "large", "steady"];
    for table in tables {
        database
            .execute(&format!(
                "CREATE TABLE {table} (id int PRIMARY KEY, v text); INSERT INTO {table} VALUES (1, 'first')"
            ))
            .await;
    }
    // Random, so that nobody makes it small.
    let wide = |kib: i64| {
        format!(
            "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, {}))",
            kib * 1024 / 32
        )
    };
    database
        .execute(&format!("INSERT INTO copied VALUES (2, {})", wide(1500)))
        .await;
    let selects = tables.map(|table| format!("SELECT * FROM {table}"));
    let selects = selects.each_ref().map(String::as_str);
    let streamer = Streamer::config(&database)
        .set("row_bytes_max", "1MiB")
        .shape("s", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    // In one transaction with a row of another table, and one below the limit.
    database
        .execute(&format!(
            "BEGIN; UPDATE steady SET v = 'second'; INSERT INTO inserted VALUES (2, {0}); UPDATE updated SET v = {0};
             INSERT INTO steady VALUES (2, 'third'); INSERT INTO large VALUES (2, {1}); COMMIT;
             UPDATE inserted SET v = 'never seen'; DELETE FROM updated; UPDATE steady SET v = v || '!'",
            wide(1500),
            wide(900)
        ))
        .await;
    let said = |replica: &Replica| -> Vec<(String, String)> {
        let file = replica.open();
        let sql = "SELECT table_name, state, reason FROM _anabranch_tables ORDER BY table_name";
        let mut rows = file.prepare(sql).unwrap();
        let rows = rows.query_map([], |row| {
            let (state, reason): (String, Option<String>) = (row.get(1)?, row.get(2)?);
            let told = reason.is_some_and(|reason| reason.contains("row_bytes_max"));
            Ok((row.get(0)?, format!("{state} {told}")))
        });
        rows.unwrap().collect::<Result<_, _>>().unwrap()
    };
    let expected = [
        ("copied", "stopped true"),
        ("inserted", "stopped true"),
        ("large", "live false"),
        ("steady", "live false"),
        ("updated", "stopped true"),
    ]
    .map(|(table, said)| (table.to_owned(), said.to_owned()));
    let steady = [
        ("steady", "SELECT * FROM steady"),
        ("large", "SELECT * FROM large"),
    ];
    let count = |replica: &Replica, sql: &str| -> i64 {
        let file = replica.open();
        file.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    replica.until_caught_up(&database).await;
    assert_eq!(said(&replica), expected);
    replica.until_equal(&database, &steady).await;
    // The last state before the row: of what was copied there is none.
    assert_eq!(count(&replica, "SELECT count(*) FROM copied"), 0);
    for table in ["inserted", "updated"] {
        let sql = format!("SELECT count(*) FROM {table} WHERE id = 1 AND v = 'first'");
        assert_eq!(count(&replica, &sql), 1, "{table}");
        let sql = format!("SELECT count(*) FROM {table}");
        assert_eq!(count(&replica, &sql), 1, "{table}");
    }

    // It stays so: over a restart, for who joins, and for the row below the limit.
    streamer.kill();
    streamer.start().await;
    let late = Replica::config(&streamer).subscribe("s").start().await;
    // From its first commit on: before that there would be empty tables that claim to be live.
    assert_eq!(said(&late), expected);
    database
        .execute("UPDATE large SET id = id + 10; UPDATE steady SET v = 'last'")
        .await;
    for replica in [&replica, &late] {
        replica.until_caught_up(&database).await;
        assert_eq!(said(replica), expected);
        replica.until_equal(&database, &steady).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_slot_is_said_and_never_skipped_over() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t"])
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    streamer.kill();
    until("the slot is free", DEADLINE, || async {
        database
            .try_execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database() AND NOT active")
            .await
            .ok();
        let left = database.query("SELECT FROM pg_replication_slots WHERE database = current_database()", &[]).await;
        left.is_empty().then_some(())
    })
    .await;
    database.execute("INSERT INTO t VALUES (2)").await;
    streamer.spawn();
    let status = streamer.exit().await;
    assert_eq!(status.code(), Some(1));
    let log = streamer.log();
    assert!(log.contains("slot") && log.contains("gone"), "{log}");
    let rows: i64 = replica
        .open()
        .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
        .unwrap();
    assert_eq!(rows, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_decide_who_sees_what() {
    let database = Server::shared().await.database().await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, team int); INSERT INTO t SELECT g, g % 3 FROM generate_series(1, 30) g").await;
    let streamer = Streamer::config(&database)
        .toml("[shape.s]\nparams.team = { claim = \"team_id\" }\ntables = [\"SELECT * FROM t WHERE team = $team\"]")
        .token("token-one", serde_json::json!({ "sub": "a", "team_id": 1 }))
        .token("token-none", serde_json::json!({ "sub": "b" }))
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .token("token-one")
        .subscribe("s")
        .start()
        .await;
    let teams: String = replica
        .open()
        .query_row("SELECT group_concat(DISTINCT team) FROM t", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert_eq!(teams, "1");
    for (token, word) in [("token-none", "team_id"), ("token-unknown", "token")] {
        let refused = Replica::config(&streamer)
            .token(token)
            .subscribe("s")
            .prepare();
        refused.spawn();
        until("it is refused, and says so", DEADLINE, || async {
            let status = refused.get("/status").await?.ok()?;
            anyhow::ensure!(format!("{status:?}").contains(word), "{status:?}");
            Ok(())
        })
        .await;
        for log in [refused.log(), streamer.log(), replica.log()] {
            assert!(!log.contains(token), "a token is in a log:\n{log}");
        }
    }
    for log in [streamer.log(), replica.log()] {
        assert!(!log.contains("token-one"), "a token is in a log:\n{log}");
    }
}
