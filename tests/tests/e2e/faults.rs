//! What must not break the road: restarts, kills, silence, stalls, readers that hold on.

use std::time::{Duration, Instant};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Options, Server, Stop},
    proxy::{Cut, Proxy, Way},
    wait::{DEADLINE, until},
};
use tokio_postgres::error::SqlState;

const ITEMS: &str = "CREATE TABLE items (id bigint PRIMARY KEY, owner int, v int, note text);
     INSERT INTO items SELECT g, g % 4, 0, 'item ' || g FROM generate_series(1, 2000) g";
const ONE: &str = "SELECT * FROM items WHERE owner = 1";

/// What a fast shutdown may take with a streamer connected.
const FAST: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn postgres_restarted_killed_or_crashed_loses_and_doubles_nothing() {
    let server = Server::start(Options::new().set("fsync", "on")).await;
    let database = server.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    for (turn, how) in [Stop::Fast, Stop::Immediate, Stop::Kill]
        .into_iter()
        .enumerate()
    {
        database
            .execute(&format!(
                "UPDATE items SET v = v + 1, owner = (owner + {turn}) % 4 WHERE id % 3 = {turn}"
            ))
            .await;
        server.restart(how).await;
        database
            .execute("UPDATE items SET v = v + 10 WHERE id % 5 = 0")
            .await;
        replica.until_equal(&database, &[("items", ONE)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fast_shutdown_of_postgres_is_not_held_up() {
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database.execute("UPDATE items SET v = v + 1").await;
    let took = server
        .stop_within(Stop::Fast, Duration::from_secs(30))
        .await;
    println!("stopped in {took:?}");
    assert!(took < FAST, "{took:?}");
    server.start_again().await;
    replica.until_equal(&database, &[("items", ONE)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_streamer_does_not_hold_up_a_fast_shutdown_once_it_goes_on() {
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    streamer.pause();
    database.execute("UPDATE items SET v = v + 1").await;
    let resume = async {
        until("Postgres is shutting down", DEADLINE, || async {
            match database.try_connect().await {
                Err(error) if error.code() == Some(&SqlState::CANNOT_CONNECT_NOW) => Ok(()),
                other => Err(format!("{:?}", other.err())),
            }
        })
        .await;
        streamer.resume();
        Instant::now()
    };
    let stop = async {
        server
            .stop_within(Stop::Fast, Duration::from_secs(60))
            .await;
        Instant::now()
    };
    let (resumed, stopped) = tokio::join!(resume, stop);
    // Else it did not wait for the streamer, and nothing was tried.
    assert!(stopped > resumed, "the streamer did not matter");
    let took = stopped - resumed;
    println!("stopped {took:?} after the streamer went on");
    assert!(took < FAST, "{took:?}");
    server.start_again().await;
    replica.until_equal(&database, &[("items", ONE)]).await;
}

/// What Postgres asks for before it ends lies in a group that is not durable yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_fast_shutdown_does_not_wait_for_a_group_that_stays_open() {
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database)
        .shape("s", &[ONE])
        .env("ANABRANCH_FAILPOINT_GROUP_MS", "8000")
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    for turn in 0..3 {
        database
            .execute(&format!("UPDATE items SET v = {turn}"))
            .await;
        let took = server
            .stop_within(Stop::Fast, Duration::from_secs(60))
            .await;
        println!("stopped in {took:?}");
        assert!(took < FAST, "{took:?}");
        server.start_again().await;
    }
    replica.until_equal(&database, &[("items", ONE)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_streamers_and_replicas_resume_where_they_were() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    for turn in 0..4 {
        database
            .execute("UPDATE items SET v = v + 1, owner = (owner + id) % 4 WHERE id % 7 = 0")
            .await;
        match turn % 3 {
            0 => streamer.kill(),
            1 => replica.kill(),
            _ => {
                streamer.kill();
                replica.kill();
            }
        }
        database.execute("DELETE FROM items WHERE id % 100 = 3; INSERT INTO items SELECT max(id) + 1, 1, 7, 'new' FROM items").await;
        if streamer.pid().is_none() {
            streamer.start().await;
        }
        if replica.pid().is_none() {
            replica.start().await;
        }
        replica.until_equal(&database, &[("items", ONE)]).await;
    }
    assert!(streamer.terminate().await.success());
    assert!(replica.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_return_sends_what_changed_and_not_the_table() {
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, v int, pad text); INSERT INTO t SELECT g, 0, repeat(md5(g::text), 10) FROM generate_series(1, 20000) g")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t"])
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    let replica = Replica::config(&streamer)
        .subscribe("s")
        .through(&proxy)
        .start()
        .await;
    let copied = proxy.bytes(Way::Down);
    assert!(copied > 5_000_000, "{copied}");
    replica.kill();
    database
        .execute("UPDATE t SET v = 1 WHERE id <= 10; DELETE FROM t WHERE id = 11")
        .await;
    streamer.kill();
    streamer.start().await;
    replica.start().await;
    replica.until_caught_up(&database).await;
    let returned = proxy.bytes(Way::Down) - copied;
    println!("a copy is {copied} bytes, the return {returned}");
    assert!(returned < 50_000, "{returned}");
    replica
        .until_equal(&database, &[("t", "SELECT * FROM t")])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_stalled_and_half_open_connections_heal() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let proxy = Proxy::to(streamer.address()).await;
    let replica = Replica::config(&streamer)
        .subscribe("s")
        .through(&proxy)
        .start()
        .await;
    let faults: [&dyn Fn(); 4] = [
        &|| proxy.cut(Cut::Reset),
        &|| proxy.set(|faults| faults.cut_after(Way::Down, 700, Cut::Reset)),
        &|| proxy.set(|faults| faults.swallow(Way::Down)),
        &|| proxy.set(|faults| faults.stall(Way::Up)),
    ];
    for fault in faults {
        let accepted = proxy.accepted();
        fault();
        database
            .execute("UPDATE items SET v = v + 1, owner = (owner + 1) % 4 WHERE id % 3 = 0")
            .await;
        until("the replica connects again", DEADLINE, || async {
            (proxy.accepted() > accepted).then_some(())
        })
        .await;
        proxy.set(|faults| faults.heal());
        replica.until_equal(&database, &[("items", ONE)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_publication_beside_a_busy_database_lets_go_of_wal() {
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    let busy = server.database().await;
    database.execute(ITEMS).await;
    busy.execute("CREATE TABLE noise (id int, v text)").await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let confirmed = || async {
        let rows = database
            .query(
                "SELECT confirmed_flush_lsn::text FROM pg_replication_slots",
                &[],
            )
            .await;
        rows[0]
            .get::<_, String>(0)
            .parse::<anabranch_proto::Lsn>()
            .unwrap()
    };
    for _ in 0..3 {
        busy.execute(
            "INSERT INTO noise SELECT g, repeat('x', 1000) FROM generate_series(1, 5000) g",
        )
        .await;
        let written = busy.lsn().await;
        let began = Instant::now();
        until(
            "what was written beside us is confirmed",
            DEADLINE,
            || async {
                let at = confirmed().await;
                if at >= written { Ok(()) } else { Err(at) }
            },
        )
        .await;
        println!("confirmed after {:?}", began.elapsed());
    }
    drop(streamer);
}

/// `ANABRANCH_READER_SECONDS=60` makes it hold on for that long.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_holds_a_snapshot_sees_it_and_stops_nobody() {
    let seconds: u64 =
        std::env::var("ANABRANCH_READER_SECONDS").map_or(0, |text| text.parse().expect("a number"));
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let reader = replica.open();
    let sum = |file: &rusqlite::Connection| -> i64 {
        file.query_row("SELECT sum(v) FROM items", [], |row| row.get(0))
            .unwrap()
    };
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(sum(&reader), 0);
    let (began, mut updates) = (Instant::now(), 0);
    while updates < 20 || began.elapsed().as_secs() < seconds {
        database.execute("UPDATE items SET v = v + 1").await;
        replica.until_caught_up(&database).await;
        updates += 1;
        assert_eq!(sum(&reader), 0);
    }
    println!("{updates} updates arrived in {:?}", began.elapsed());
    // Others have seen each of them.
    assert_eq!(sum(&replica.open()), updates * 500);
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(sum(&reader), updates * 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_writes_its_own_tables_is_left_alone() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database).shape("s", &[ONE]).start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let own = rusqlite::Connection::open(replica.file()).unwrap();
    own.busy_timeout(Duration::from_secs(5)).unwrap();
    own.execute_batch("CREATE TABLE mine (id INTEGER PRIMARY KEY, v); CREATE INDEX mine_v ON mine (v); CREATE VIEW both AS SELECT i.id, m.v FROM items i JOIN mine m USING (id)")
        .unwrap();
    for turn in 0..50i64 {
        database
            .execute("UPDATE items SET v = v + 1 WHERE id < 500")
            .await;
        own.execute("INSERT INTO mine (v) VALUES (?1)", [turn])
            .unwrap();
    }
    replica.until_equal(&database, &[("items", ONE)]).await;
    let count: i64 = own
        .query_row("SELECT count(*) FROM mine", [], |row| row.get(0))
        .unwrap();
    assert_eq!(count, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_replica_does_not_slow_another_and_catches_up() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM items"])
        .start()
        .await;
    let live = Replica::config(&streamer).subscribe("s").start().await;
    let stalled = Replica::config(&streamer).subscribe("s").start().await;
    stalled.pause();
    for _ in 0..100 {
        database
            .execute("UPDATE items SET v = v + 1, note = note || '.'")
            .await;
    }
    live.until_caught_up(&database).await;
    stalled.resume();
    stalled.until_caught_up(&database).await;
    for replica in [&live, &stalled] {
        replica
            .until_equal(&database, &[("items", "SELECT * FROM items")])
            .await;
    }
}

/// A group of the mirror that stays open for seconds is where a wrong hand-over would lose or double transactions.
#[tokio::test(flavor = "multi_thread")]
async fn joins_and_catch_ups_while_a_group_is_stretched_miss_nothing() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let streamer = Streamer::config(&database)
        .shape("s", &[ONE])
        .env("ANABRANCH_FAILPOINT_GROUP_MS", "1500")
        .start()
        .await;
    let load = async {
        for turn in 0..120 {
            database.execute(&format!("UPDATE items SET v = v + 1, owner = (owner + 1) % 4 WHERE id % 11 = {turn} % 11")).await;
        }
    };
    let joins = async {
        let mut replicas = Vec::new();
        for _ in 0..4 {
            replicas.push(Replica::config(&streamer).subscribe("s").start().await);
        }
        // And two that come back.
        for replica in &replicas[..2] {
            replica.kill();
            replica.start().await;
        }
        replicas
    };
    let ((), replicas) = tokio::join!(load, joins);
    for replica in &replicas {
        replica.until_equal(&database, &[("items", ONE)]).await;
    }
}

/// The transaction takes as long as Postgres takes to send it. Who comes meanwhile is served as of before.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_joins_while_a_large_transaction_is_on_its_way() {
    let server = Server::shared().await;
    let database = server.database().await;
    database.execute(ITEMS).await;
    let proxy = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
    let streamer = Streamer::config(&database)
        .set("postgres.url", database.url_at("127.0.0.1", proxy.port()))
        // Chunks of half a megabyte.
        .set("memory_max", "64MiB")
        .shape("s", &["SELECT * FROM items"])
        .start()
        .await;
    proxy.set(|faults| faults.throttle(Way::Down, 4_000_000));
    let before = proxy.bytes(Way::Down);
    database
        .execute("INSERT INTO items SELECT g, 1, 0, repeat('x', 200) FROM generate_series(10001, 60000) g")
        .await;
    until("some chunks have come", DEADLINE, || async {
        proxy.bytes(Way::Down) > before + 4_000_000
    })
    .await;
    proxy.set(|faults| faults.stall(Way::Down));
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let rows: i64 = replica
        .open()
        .query_row("SELECT count(*) FROM items", [], |row| row.get(0))
        .unwrap();
    assert_eq!(rows, 2000);
    let connections = streamer
        .log()
        .matches("streaming from Postgres slot")
        .count();
    assert_eq!(connections, 1, "it is still the first attempt");
    proxy.set(|faults| faults.heal());
    replica
        .until_equal(&database, &[("items", "SELECT * FROM items")])
        .await;
}

/// A replica leaves a streamer that says nothing, and would begin again, and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_waits_for_long_hears_that_the_streamer_lives() {
    let database = Server::shared().await.database().await;
    database.execute(ITEMS).await;
    let longer = anabranch_proto::SILENCE_MAX + Duration::from_secs(3);
    let streamer = Streamer::config(&database)
        .shape("s", &[ONE])
        .env(
            "ANABRANCH_FAILPOINT_GROUP_MS",
            &longer.as_millis().to_string(),
        )
        .start()
        .await;
    // Opens a group, which keeps who comes from joining.
    database.execute("UPDATE items SET v = v + 1").await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    replica.until_equal(&database, &[("items", ONE)]).await;
    let connected = streamer.log().matches("replica connected").count();
    assert_eq!(connected, 1, "{}", streamer.log());
}
