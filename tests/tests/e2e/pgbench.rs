//! pgbench's own TPC-B as the load: the sums of balances in the file agree at every moment. `ANABRANCH_PGBENCH_SECONDS` and
//! `ANABRANCH_PGBENCH_SCALE` make the run longer and larger. Whoever says how long also has the machine for it: then it is
//! a verdict on speed too.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Server,
};

/// How soon after the end of the load the file has all of it, where the run is a verdict on speed.
const BEHIND_MAX: Duration = Duration::from_secs(5);

/// Looks that a minute must have; in proportion, where the run is shorter.
const LOOKS_A_MINUTE: u64 = 1000;

/// Looks and different sums that even a short run beside other tests must have: fewer prove nothing.
const LOOKS_MIN: u64 = 20;
const SUMS_MIN: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn no_look_during_pgbench_sees_half_a_transaction() {
    let wanted = std::env::var("ANABRANCH_PGBENCH_SECONDS").ok();
    let wanted: Option<u64> = wanted.map(|text| text.parse().expect("a number"));
    let seconds = wanted.unwrap_or(8);
    let scale = std::env::var("ANABRANCH_PGBENCH_SCALE").unwrap_or_else(|_| "1".into());
    let server = Server::shared().await;
    let database = server.database().await;
    server
        .tool("pgbench", database.name(), &["-i", "-q", "-s", &scale])
        .await;
    database
        .execute("ALTER TABLE pgbench_history ADD COLUMN id bigserial PRIMARY KEY")
        .await;
    let tables = [
        "pgbench_accounts",
        "pgbench_tellers",
        "pgbench_branches",
        "pgbench_history",
    ];
    let selects = tables.map(|table| format!("SELECT * FROM {table}"));
    let selects = selects.each_ref().map(String::as_str);
    let streamer = Streamer::config(&database)
        .shape("all", &selects)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("all").start().await;

    // An index of the program's own, so that a look need not go through all accounts: many looks find more.
    let program = rusqlite::Connection::open(replica.file()).unwrap();
    program.busy_timeout(Duration::from_secs(10)).unwrap();
    program
        .execute_batch("CREATE INDEX touched ON pgbench_accounts(abalance) WHERE abalance <> 0")
        .unwrap();
    drop(program);
    let over = Arc::new(AtomicBool::new(false));
    let looking = {
        let (file, over) = (replica.open(), over.clone());
        tokio::task::spawn_blocking(move || look_at_sums(&file, &over))
    };
    let seconds_text = seconds.to_string();
    let said = server
        .tool(
            "pgbench",
            database.name(),
            &["-n", "-c", "8", "-j", "2", "-T", &seconds_text],
        )
        .await;
    let began = Instant::now();
    replica.until_caught_up(&database).await;
    let behind = began.elapsed();
    over.store(true, Ordering::Relaxed);
    let (looks, sums) = looking.await.unwrap();
    let pairs: Vec<_> = tables.into_iter().zip(selects).collect();
    replica.until_equal(&database, &pairs).await;
    let tps = said
        .lines()
        .find(|line| line.starts_with("tps"))
        .unwrap_or_default();
    println!(
        "{tps}; {looks} looks at {sums} different sums, all agreed; caught up {behind:?} after the end"
    );
    assert!(
        looks >= LOOKS_MIN && sums >= SUMS_MIN,
        "{looks} looks at {sums} different sums prove nothing"
    );
    if wanted.is_some() {
        assert!(looks >= LOOKS_A_MINUTE * seconds / 60, "only {looks} looks");
        assert!(behind < BEHIND_MAX, "{behind:?}");
    }
}

/// How often it looked, and how many different sums it saw.
fn look_at_sums(file: &rusqlite::Connection, over: &AtomicBool) -> (u64, usize) {
    let (mut looks, mut seen) = (0, HashSet::new());
    while !over.load(Ordering::Relaxed) {
        let sums: [i64; 4] = file
            .query_row(
                "SELECT (SELECT ifnull(sum(abalance), 0) FROM pgbench_accounts WHERE abalance <> 0), (SELECT sum(tbalance) FROM pgbench_tellers),
                        (SELECT sum(bbalance) FROM pgbench_branches), (SELECT ifnull(sum(delta), 0) FROM pgbench_history)",
                [],
                |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?]),
            )
            .unwrap();
        assert!(
            sums.iter().all(|sum| *sum == sums[0]),
            "half a transaction: {sums:?}"
        );
        looks += 1;
        seen.insert(sums[0]);
    }
    (looks, seen.len())
}
