//! kill -9 while a first copy is made: of the streamer that copies from Postgres, and of a replica that copies from it.
//! Moments are told by what was copied so far, not by a clock. What is left alone afterwards gets there by itself.

use anabranch_tests::{
    oracle::file,
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server},
    proxy::{Proxy, Way},
    seed::Seed,
    wait::{DEADLINE, until},
};
use rand::Rng;

/// Kills spread over the copy of the largest table.
const KILLS: i64 = 20;

/// Rows of the largest table.
const ROWS: i64 = 40_000;

/// Of each, at least, as COPY sends them.
const ROW_BYTES: u64 = 200;

const SELECTS: [(&str, &str); 3] = [
    ("large", "SELECT * FROM large"),
    ("middle", "SELECT * FROM middle WHERE v > 2000"),
    ("empty", "SELECT * FROM empty"),
];

async fn make_tables(database: &Database) {
    database
        .execute(&format!(
            "CREATE TABLE large (id bigint PRIMARY KEY, v int, pad text);
             CREATE INDEX large_v ON large (v);
             INSERT INTO large SELECT g, g % 100, repeat(md5(g::text), 6) FROM generate_series(1, {ROWS}) g;
             CREATE TABLE middle (id int PRIMARY KEY, v int);
             INSERT INTO middle SELECT g, g FROM generate_series(1, 10000) g;
             CREATE TABLE empty (id int PRIMARY KEY);
             ANALYZE"
        ))
        .await;
}

/// The application goes on: whatever mixes two copies is wrong somewhere.
async fn change(database: &Database, turn: i64) {
    database
        .execute(&format!(
            "UPDATE large SET v = v + 1 WHERE id % 500 = {turn}; DELETE FROM middle WHERE id % 1000 = {turn};
             UPDATE middle SET v = v + 1 WHERE id % 10 = {turn} % 10"
        ))
        .await;
}

async fn slots(database: &Database) -> Vec<(String, Option<String>)> {
    let sql =
        "SELECT slot_name::text, restart_lsn::text FROM pg_replication_slots ORDER BY slot_name";
    let rows = database.query(sql, &[]).await;
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamer_killed_at_any_moment_of_its_first_copy_starts_clean() {
    let mut rng = Seed::new().rng("first copy");
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    make_tables(&database).await;
    database
        .execute("CREATE TABLE beside (id int PRIMARY KEY)")
        .await;
    // What is not ours to drop: slots that look like ours, and another streamer of the same database.
    for (slot, plugin) in [("ours_", "pgoutput"), ("ours_copy_0", "test_decoding")] {
        let sql = format!("SELECT pg_create_logical_replication_slot('{slot}', '{plugin}')");
        database.execute(&sql).await;
    }
    database
        .execute("SELECT pg_create_physical_replication_slot('our', true)")
        .await;
    let neighbour = Streamer::config(&database)
        .set("postgres.slot", "neighbour")
        .set("postgres.publication", "neighbour")
        .shape("s", &["SELECT * FROM beside"])
        .start()
        .await;
    let reader = Replica::config(&neighbour).subscribe("s").start().await;
    let before = slots(&database).await;

    let proxy = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
    // The copy takes a second at least, and each look at it finds another moment.
    proxy.set(|faults| faults.throttle(Way::Down, 10_000_000));
    let url = database.url_at("127.0.0.1", proxy.port());
    let streamer = Streamer::config(&database)
        .set("postgres.url", format!("{url}?application_name=ours"))
        .set("postgres.slot", "ours")
        .shape("s", &SELECTS.map(|(_, sql)| sql))
        .prepare();
    let replica = Replica::config(&streamer).subscribe("s").prepare();
    replica.spawn();

    let connected = |count: i64| {
        format!("SELECT count(*) >= {count} FROM pg_stat_activity WHERE application_name = 'ours'")
    };
    // Each start makes it anew.
    let slot = "SELECT coalesce((SELECT confirmed_flush_lsn > '#' FROM pg_replication_slots WHERE slot_name = 'ours'), false)";
    let sent = "SELECT count(*) = 0 FROM pg_stat_progress_copy JOIN pg_stat_activity USING (pid) WHERE application_name = 'ours'";
    let whole = ROWS as u64 * ROW_BYTES;
    let mut moments = vec![
        (0, connected(1)),
        (0, connected(2)),
        (0, slot.to_owned()),
        (0, slot.to_owned()),
    ];
    moments.extend((0..KILLS as u64).map(|kill| {
        let step = whole / KILLS as u64;
        let bytes = kill * step + rng.random_range(0..step);
        (bytes, "SELECT true".to_owned())
    }));
    // All rows were sent, and wait to be put into the mirror.
    moments.push((whole, sent.to_owned()));
    for (turn, (bytes, condition)) in (0..).zip(&moments) {
        let (from, now) = (proxy.bytes(Way::Down), database.lsn().await.to_string());
        let condition = condition.replace('#', &now);
        let moment = format!("start {turn} has {bytes} of {whole} bytes, {condition}");
        streamer.spawn();
        until(&moment, DEADLINE, || async {
            if let Some(status) = streamer.poll_exit() {
                panic!("it ended by itself: {status}");
            }
            let came = proxy.bytes(Way::Down) - from;
            anyhow::ensure!(came >= *bytes, "{came} bytes came");
            let row = &database.query(&condition, &[]).await[0];
            anyhow::ensure!(row.get::<_, bool>(0), "{came} bytes came");
            Ok(())
        })
        .await;
        streamer.kill();
        println!("killed as {moment}");
        change(&database, turn).await;
    }
    proxy.set(|faults| faults.heal());

    streamer.start().await;
    replica.until_ready().await;
    change(&database, 400).await;
    replica.until_equal(&database, &SELECTS).await;

    let mut after = slots(&database).await;
    let ours = after.iter().position(|(name, _)| name == "ours");
    after.remove(ours.expect("the one slot of ours"));
    // The neighbour goes on, and so does its slot; nobody reads the others.
    let still = |slots: &[(String, Option<String>)]| -> Vec<_> {
        let slots = slots.iter();
        slots
            .map(|(name, lsn)| (name.clone(), lsn.clone().filter(|_| name != "neighbour")))
            .collect()
    };
    assert_eq!(still(&after), still(&before));
    database.execute("INSERT INTO beside VALUES (1)").await;
    reader
        .until_equal(&database, &[("beside", "SELECT * FROM beside")])
        .await;
    println!("{} kills", moments.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_killed_at_any_moment_of_its_first_copy_starts_clean() {
    let mut rng = Seed::new().rng("first copy of a replica");
    let database = Server::shared().await.database().await;
    make_tables(&database).await;
    let streamer = Streamer::config(&database)
        .shape("s", &SELECTS.map(|(_, sql)| sql))
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    let configure = || {
        Replica::config(&streamer)
            .subscribe("s")
            .through(&proxy)
            .prepare()
    };
    let undisturbed = configure();
    undisturbed.start().await;
    let whole = proxy.bytes(Way::Down);
    assert!(whole > 6_000_000, "{whole}");
    undisturbed.kill();

    let mut replica = configure();
    let (mut nothing, mut everything) = (0, 0);
    for turn in 0..KILLS + 4 {
        let part = match turn {
            // Nearly all has arrived, and is being put together.
            KILLS.. => whole - rng.random_range(0..whole / 50),
            _ => {
                let step = whole / KILLS as u64;
                turn as u64 * step + rng.random_range(0..step)
            }
        };
        let before = proxy.bytes(Way::Down);
        replica.spawn();
        until(&format!("{part} of {whole} bytes"), DEADLINE, || async {
            let came = proxy.bytes(Way::Down) - before;
            if came >= part { Ok(()) } else { Err(came) }
        })
        .await;
        replica.kill();
        let held = file::read(&replica.file(), &["large", "middle"]).unwrap();
        let rows = held
            .tables
            .iter()
            .flatten()
            .map(|table| table.rows.len())
            .collect::<Vec<_>>();
        match held.position {
            None => {
                nothing += 1;
                assert!(rows.iter().all(|rows| *rows == 0), "{rows:?}");
            }
            Some(_) => {
                everything += 1;
                let rows = rows.first().copied();
                assert_eq!(rows, usize::try_from(ROWS).ok());
                replica = configure();
            }
        }
        change(&database, turn).await;
    }
    replica.start().await;
    replica.until_equal(&database, &SELECTS).await;
    // Nothing lies about of what was begun.
    let names = |replica: &Replica| -> String {
        let sql = "SELECT group_concat(name) FROM (SELECT name FROM sqlite_schema ORDER BY name)";
        let file = replica.open();
        file.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(names(&replica), names(&undisturbed));
    println!("{nothing} kills left nothing, {everything} all of it");
    assert!(nothing >= KILLS / 2, "{nothing}");
}
