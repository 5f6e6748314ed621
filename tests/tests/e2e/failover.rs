//! A failover to a standby that lacks what was answered already. Programs write all the time, and see all that they wrote all
//! the time; what was lost is offered again, and in the end each token is there once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use super::ledger::{COUNTER, Program, TABLES, TOKENS, until_answered, verdict};
use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server, Stop},
    proxy::{Cut, Proxy},
    seed::Seed,
    wait::{DEADLINE, until},
};

const REPLICAS: usize = 3;

/// Local transactions of each program at most; it is ended when all has happened.
const EACH: u64 = 10_000;

/// Between two of them.
const PAUSE: Duration = Duration::from_millis(40);

/// How many answered transactions of each replica are lost at least.
const LOST_MIN: i64 = 5;

/// The last local transaction of which a file knows the answer.
fn answered(replica: &Replica) -> i64 {
    let sql = "SELECT coalesce(max(seq), 0) FROM _anabranch_local WHERE answered_lsn IS NOT NULL";
    replica.open().query_row(sql, [], |row| row.get(0)).unwrap()
}

/// The last one that a server has, of each replica.
async fn claimed(database: &Database, replicas: &[Arc<Replica>]) -> Vec<i64> {
    let mut claimed = Vec::new();
    for replica in replicas {
        let id: String = replica
            .open()
            .query_row("SELECT replica_id FROM _anabranch_state", [], |row| {
                row.get(0)
            })
            .unwrap();
        let sql = "SELECT seq FROM anabranch.replicas WHERE replica = $1";
        let rows = database.query(sql, &[&id]).await;
        claimed.push(rows.first().map_or(0, |row| row.get(0)));
    }
    claimed
}

/// Until each file has so many more answers than `than`.
async fn until_answered_beyond(replicas: &[Arc<Replica>], than: &[i64]) {
    for (replica, than) in replicas.iter().zip(than) {
        until("more is answered", DEADLINE, || async {
            match answered(replica) {
                more if more >= than + LOST_MIN => Ok(()),
                fewer => Err(fewer),
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_standby_lacks_is_lost_though_it_was_answered() {
    let Some(primary) = Server::start_local(Options::new()).await else {
        return;
    };
    let seed = Seed::new();
    let database = primary.database().await;
    database.execute(TABLES).await;
    let proxy = Proxy::to(&format!("{}:{}", primary.host(), primary.port())).await;
    let streamer = Streamer::config(&database)
        .through(&proxy, &database)
        .shape("ledger", &[TOKENS, COUNTER])
        .set("shape.ledger.writable", true)
        .toml("[table.\"public.counter\"]\ncolumn.n = \"add\"")
        .start()
        .await;
    let mut replicas = Vec::new();
    for _ in 0..REPLICAS {
        let replica = Replica::config(&streamer).subscribe("ledger");
        replicas.push(Arc::new(replica.start().await));
    }
    let enough = Arc::new(AtomicBool::new(false));
    let mut programs = tokio::task::JoinSet::new();
    for (place, replica) in replicas.iter().enumerate() {
        let program = Program {
            file: replica.file(),
            name: format!("r{place}"),
            count: EACH,
            pause: PAUSE,
            pending_max: i64::MAX,
            done: Arc::new(AtomicU64::new(0)),
            enough: enough.clone(),
        };
        let chance = seed.rng(&program.name);
        programs.spawn_blocking(move || (place, program.by_the_library(chance)));
    }

    until_answered_beyond(&replicas, &[0; REPLICAS]).await;
    let standby = primary.standby().await;
    let on_standby = database.on(&standby);
    // It hears nothing more.
    standby.alter("primary_conninfo", "").await;
    until("the standby is cut off", DEADLINE, || async {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walreceiver'";
        let connected: i64 = database.query(sql, &[]).await[0].get(0);
        if connected == 0 {
            Ok(())
        } else {
            Err(connected)
        }
    })
    .await;
    // What it has heard it must have replayed, or it would keep more than is counted here.
    until("the standby is where it stays", DEADLINE, || async {
        let sql = "SELECT pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()";
        let replayed: bool = on_standby.query(sql, &[]).await[0].get(0);
        if replayed { Ok(()) } else { Err("behind") }
    })
    .await;
    let kept = claimed(&on_standby, &replicas).await;
    until_answered_beyond(&replicas, &kept).await;
    let lost: i64 = claimed(&database, &replicas)
        .await
        .iter()
        .zip(&kept)
        .map(|(had, kept)| had - kept)
        .sum();

    primary.stop(Stop::Kill).await;
    on_standby
        .query("SELECT pg_promote()", &[])
        .await
        .pop()
        .expect("promote the standby");
    // Only now: a streamer that gets to a standby before it is promoted finds an old timeline that ends too early, and says so in
    // other words.
    proxy.retarget(&format!("{}:{}", standby.host(), standby.port()));
    proxy.cut(Cut::Reset);
    let status = streamer.exit().await;
    assert_eq!(status.code(), Some(1), "{}", streamer.log());
    let log = streamer.log();
    assert!(
        log.contains("failover") && log.contains("remove its data_dir"),
        "{log}"
    );
    // What it says is done. There is no slot.
    std::fs::remove_dir_all(streamer.dir().join("data")).unwrap();
    streamer.start().await;

    until(
        "the promoted server gets writes of all",
        DEADLINE,
        || async {
            let now = claimed(&on_standby, &replicas).await;
            match now.iter().zip(&kept).all(|(now, kept)| now > kept) {
                true => Ok(()),
                false => Err(now),
            }
        },
    )
    .await;
    enough.store(true, SeqCst);
    let mut made = [0; REPLICAS];
    while let Some(ended) = programs.join_next().await {
        let (place, count) = ended.expect("a program sees what it wrote");
        assert!(count < EACH, "it wrote all before the end");
        made[place] = count;
    }
    until_answered(&replicas).await;
    let tables = [("tokens", TOKENS), ("counter", COUNTER)];
    for replica in &replicas {
        replica.until_equal(&on_standby, &tables).await;
    }
    // By its receipts, which went back, or as its call was told where its writes stand: a replica offered again what was lost, or
    // tokens would be missing.
    assert!(lost > 0, "nothing was lost");
    let refused = verdict(&on_standby, &replicas, &made).await;
    println!("{lost} answered transactions were lost, and offered again; {refused} are rejected");
}
