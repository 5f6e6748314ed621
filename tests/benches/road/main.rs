//! `cargo bench`: the road from Postgres to the replica's file beside its limits and its peer, in one run on one machine.
//!
//! | | work | limit | peer |
//! |---|---|---|---|
//! | W1 | initial copy of 1,000,000 rows until the replica has them all | COPY to nowhere; a bare SQLite insert loop | `CREATE SUBSCRIPTION` into a second cluster |
//! | W2a | a backlog of 100,000 one-row transactions | `pg_recvlogical` to nowhere, in three ways | the subscription |
//! | W2b | a backlog of one transaction that updates 1,000,000 rows | the same | the subscription |
//! | W3 | commit-to-visible latency at 500 transactions a second for 30 s | a poller at the source itself | the subscription |
//! | X1 | a program's commit until its receipt, at 100 local transactions a second for 30 s | | |
//! | X2 | 30,000 one-row local transactions of one replica, until the last receipt | the same statements by pgbench | |
//! | X3 | 100,000 of 20 replicas | the same, by as many connections | |
//! | X4 | the cost of the capture triggers to a program that writes | the same without them | |
//! | F1 | row changes a second with 1 to 100,000 distinct parameter values subscribed by light replicas: 100 rows a transaction, each another session's; one row | `pg_recvlogical` to nowhere |
//! | F2 | 5,000 connected light replicas, each with its own shape, at 2,000 row changes a second; 1,000 that share one shape | |
//! | F3 | the same 5,000 lose their connections at once, and return | |
//! | M1 | memory peaks of the initial copy and of W2b's transaction, with `memory_max` of 256 and 128 MiB | the caps | |
//! | M2 | latency and the streamer's memory beside a replica that gets 2 kB/s | the same without that one | |
//! | M3 | memory peaks of one local transaction of 100,000 rows with the caps of M1, and of a local value of 64 MB | the caps | |
//! | M4 | memory peak of the streamer with 300 replicas that do not read what they are sent | the cap of M1 | |
//!
//! Each consumer works alone: the others are stopped meanwhile. Wall times are noisy, so medians of several rounds are
//! what counts. Environment: `ANABRANCH_BENCH_ROUNDS` (3), `ANABRANCH_BENCH_ROWS` (1000000),
//! `ANABRANCH_BENCH_TRANSACTIONS` (100000, of W2a), `ANABRANCH_BENCH_SECONDS` (30, of W3, X1 and M2), `ANABRANCH_BENCH_WRITES`
//! (100000, of X3; X2 has three tenths of them), `ANABRANCH_BENCH_REPLICAS` (5000, of F2 and F3), `ANABRANCH_BENCH_CONNECTIONS` (as
//! many as replicas), `ANABRANCH_BENCH_FANOUT_SECONDS` (30; 600 shows whether memory grows), `ANABRANCH_BENCH_ONLY` (a list such as `W1,W3`), `ANABRANCH_BENCH_MEMORY` (the streamer's `memory_max`; the replica gets half).

mod capture;
mod fanout;
mod flat;
mod lab;
mod latency;
mod limits;
mod memory;
mod report;
mod writes;

use std::time::Duration;

use lab::Lab;
use report::Report;
use writes::Writing;

/// Sizes of a run.
#[derive(Clone, Debug)]
pub struct Sizes {
    rounds: usize,
    rows: u64,
    transactions: u64,
    latency: Duration,
    writes: u64,
    replicas: usize,
    connections: usize,
    fanout: Duration,
    memory: String,
}

fn main() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| {
            text.parse()
                .unwrap_or_else(|_| panic!("{name} must be a number, not {text}"))
        })
    };
    let replicas = number("ANABRANCH_BENCH_REPLICAS", 5_000);
    let sizes = Sizes {
        rounds: number("ANABRANCH_BENCH_ROUNDS", 3) as usize,
        rows: number("ANABRANCH_BENCH_ROWS", 1_000_000),
        transactions: number("ANABRANCH_BENCH_TRANSACTIONS", 100_000),
        latency: Duration::from_secs(number("ANABRANCH_BENCH_SECONDS", 30)),
        writes: number("ANABRANCH_BENCH_WRITES", 100_000),
        replicas: replicas as usize,
        connections: number("ANABRANCH_BENCH_CONNECTIONS", replicas) as usize,
        fanout: Duration::from_secs(number("ANABRANCH_BENCH_FANOUT_SECONDS", 30)),
        memory: std::env::var("ANABRANCH_BENCH_MEMORY").unwrap_or_else(|_| "768MiB".into()),
    };
    let only = std::env::var("ANABRANCH_BENCH_ONLY").unwrap_or_default();
    let wanted = |work: &str| only.is_empty() || only.split(',').any(|one| one == work);

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut report = Report::new(&sizes);
        let mut lab = Lab::new(&sizes).await;
        let works = ["W1", "W2a", "W2b", "W3"].into_iter().any(wanted);
        for round in 1..=if works { sizes.rounds } else { 0 } {
            eprintln!("round {round} of {}", sizes.rounds);
            lab.fill().await;
            // W1 leaves a streamer, a replica and a subscription behind that the others need.
            lab.initial_copy(&mut report).await;
            if wanted("W2a") {
                lab.backlog(&mut report, "W2a").await;
            }
            if wanted("W2b") {
                lab.backlog(&mut report, "W2b").await;
            }
            if wanted("W3") {
                lab.latency(&mut report).await;
            }
            lab.clear().await;
        }
        for _ in 0..if WRITES.into_iter().any(wanted) {
            sizes.rounds
        } else {
            0
        } {
            writes(&lab, &sizes, &wanted, &mut report).await;
        }
        if wanted("F1") {
            flat::measure(&lab, &sizes, &mut report).await;
        }
        if wanted("F2") || wanted("F3") {
            fanout::measure(&lab, &sizes, &wanted, &mut report).await;
        }
        if wanted("M1") || wanted("M2") {
            lab.fill().await;
        }
        if wanted("M1") {
            memory::large_transaction(&lab, &mut report).await;
        }
        if wanted("M2") {
            memory::stalled_beside_live(&lab, sizes.latency, &mut report).await;
        }
        if wanted("M3") {
            memory::large_local_transactions(&lab, &mut report).await;
        }
        if wanted("M4") {
            memory::slow_readers(&lab, &mut report).await;
        }
        report.print();
    });
}

/// The works on the way up.
const WRITES: [&str; 4] = ["X1", "X2", "X3", "X4"];

/// One round of them, each with a streamer and a database of its own.
async fn writes(lab: &Lab, sizes: &Sizes, wanted: &impl Fn(&str) -> bool, report: &mut Report) {
    if wanted("X1") {
        let writing = Writing::start(lab).await;
        writes::latency(lab, &writing, sizes.latency, report).await;
        writing.end(lab).await;
    }
    for (work, total) in [("X2", sizes.writes * 3 / 10), ("X3", sizes.writes)] {
        if wanted(work) {
            let writing = Writing::start(lab).await;
            let replicas = if work == "X2" { 1 } else { writes::REPLICAS };
            writes::sustained(lab, work, &writing, replicas, total, report).await;
            writes::pgbench(lab, work, &writing, replicas, total, report).await;
            writing.end(lab).await;
        }
    }
    if wanted("X4") {
        let writing = Writing::start(lab).await;
        capture::cost(&writing, report).await;
        writing.end(lab).await;
    }
}
