//! Many replicas of one tenant, and one of another: whatever the many do, the one stays up to date. And whoever comes while too
//! many wait is told when to come back, and does.

use anabranch_tests::{
    light::{self, Fleet},
    peers::{Replica, Streamer, TOKEN},
    postgres::Server,
    wait::{DEADLINE, until},
};

/// Replicas of the stormy tenant, which read nothing.
const STORMY: usize = 40;

/// Rows that are written for them, and bytes of each: several times what all queues hold together.
const ROWS: usize = 400;
const ROW_BYTES: usize = 32 * 1024;

const SHAPES: &str = r#"
    [shape.of]
    params.tenant = { client = "int8" }
    tables = ["SELECT * FROM t WHERE tenant = $tenant"]"#;

/// All replicas but one subscribe to what is written without end, and read nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_gets_much_and_reads_nothing_delays_another_ones_commits() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int8 PRIMARY KEY, tenant int8 NOT NULL, n int8 NOT NULL, body text NOT NULL);
             ALTER TABLE t ALTER body SET STORAGE EXTERNAL;
             INSERT INTO t VALUES (0, 0, 0, '')",
        )
        .await;
    let streamer = Streamer::config(&database)
        // The least that is taken, and with it the smallest queues.
        .set("memory_max", "64MiB")
        .toml(SHAPES)
        .start()
        .await;
    let stormy = Fleet::start(light::Settings {
        url: streamer.url(),
        token: TOKEN.into(),
        replicas: STORMY,
        connections: STORMY,
        subscriptions: Box::new(|_| vec![light::subscription("of", &[("tenant", "1".into())])]),
        made: 2,
    });
    let mut tenant = toml::Table::new();
    tenant.insert("tenant".into(), 0.into());
    let quiet = Replica::config(&streamer)
        .subscribe_with("of", tenant)
        .start()
        .await;
    let lsn = database.lsn().await;
    until("all are there", DEADLINE, || async {
        let there = stormy.at(lsn);
        (there == STORMY)
            .then_some(())
            .ok_or((there, stormy.last_failure()))
    })
    .await;
    quiet.until_caught_up(&database).await;

    stormy.read(false);
    let metric = async |name: &str| -> u64 {
        let page = streamer.get("/metrics").await.unwrap().ok().unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    let served = metric("anabranch_streamer_catch_ups_total").await;
    for round in 1..=ROWS {
        database
            .execute(&format!(
                "INSERT INTO t VALUES ({round}, 1, 0, repeat('{round:016}', {ROW_BYTES} / 16));
                 UPDATE t SET n = {round} WHERE id = 0"
            ))
            .await;
    }
    quiet.until_caught_up(&database).await;
    let n: i64 = (quiet.open())
        .query_row("SELECT n FROM t WHERE id = 0", [], |row| row.get(0))
        .unwrap();
    assert_eq!(n, ROWS as i64);
    // The others hold as much as they may, and have not got it all: else nothing was tried.
    let there = stormy.at(database.lsn().await);
    assert_eq!(there, 0, "some have all of it");
    // They did not keep the quiet one from its queue, and it was never away.
    let log = streamer.log();
    assert_eq!(
        log.matches("replica connected").count(),
        STORMY + 1,
        "{log}"
    );

    // They get theirs as soon as they read again.
    stormy.read(true);
    let lsn = database.lsn().await;
    until("all are there again", 2 * DEADLINE, || async {
        let there = stormy.at(lsn);
        (there == STORMY)
            .then_some(())
            .ok_or((there, stormy.last_failure()))
    })
    .await;
    assert!(
        metric("anabranch_streamer_catch_ups_total").await > served,
        "no queue overflowed: nothing was tried"
    );
}

/// While a group of the mirror stays open nobody can join, so all wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_comes_while_too_many_wait_comes_again_at_once() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int8 PRIMARY KEY, tenant int8 NOT NULL, n int8 NOT NULL, body text NOT NULL);
             INSERT INTO t SELECT g, g % 7, 0, '' FROM generate_series(1, 70) g",
        )
        .await;
    let streamer = Streamer::config(&database)
        .env("ANABRANCH_FAILPOINT_GROUP_MS", "4000")
        .toml(SHAPES)
        .start()
        .await;
    let many = anabranch_streamer::session::admission::WAITING_MAX + 300;
    let fleet = |replicas: usize| {
        Fleet::start(light::Settings {
            url: streamer.url(),
            token: TOKEN.into(),
            replicas,
            connections: replicas.div_ceil(100),
            subscriptions: Box::new(|number| {
                vec![light::subscription(
                    "of",
                    &[("tenant", (number % 7).to_string())],
                )]
            }),
            made: 2,
        })
    };
    // A write opens a group; from then on who joins waits for its end.
    let write = "UPDATE t SET n = n + 1 WHERE id = 1";
    database.execute(write).await;
    let herd = fleet(many);
    until("some are told to come later", DEADLINE, || async {
        let (_, told) = herd.attempts();
        (told > 0).then_some(()).ok_or_else(|| herd.last_failure())
    })
    .await;
    let mut tenant = toml::Table::new();
    tenant.insert("tenant".into(), 1.into());
    let replica = Replica::config(&streamer)
        .subscribe_with("of", tenant)
        .prepare();
    replica.spawn();
    let lsn = database.lsn().await;
    until("all are there", 4 * DEADLINE, || async {
        let there = herd.at(lsn);
        (there == many)
            .then_some(())
            .ok_or((there, herd.last_failure()))
    })
    .await;
    replica.until_caught_up(&database).await;
    let (begun, told) = herd.attempts();
    println!("{begun} streams were begun, {told} of them were told to come later");
    // Whoever came once more than it was told to would have been counted.
    assert!(begun <= many as u64 + told, "{begun} {told}");
    let log = replica.log();
    let told: Vec<_> = (log.lines())
        .filter(|line| line.contains("too many replicas wait"))
        .collect();
    assert!(!told.is_empty(), "it was not told anything:\n{log}");
    for line in told {
        let ms = line.split("pause_ms").nth(1).expect("a pause");
        let digits = ms
            .split(|c: char| !c.is_ascii_digit())
            .max_by_key(|part| part.len());
        let ms: u64 = digits.unwrap().parse().unwrap();
        assert!(ms >= 500, "it comes before it was told to: {line}");
    }
}
