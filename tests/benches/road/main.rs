//! `cargo bench`: the road from Postgres to the replica's file beside its limits and its peer, in one run on one machine.
//!
//! | | work | limit | peer |
//! |---|---|---|---|
//! | W1 | initial copy of 1,000,000 rows until the replica has them all | COPY to nowhere; a bare SQLite insert loop | `CREATE SUBSCRIPTION` into a second cluster |
//! | W2a | a backlog of 100,000 one-row transactions | `pg_recvlogical` to nowhere, in three ways | the subscription |
//! | W2b | a backlog of one transaction that updates 1,000,000 rows | the same | the subscription |
//! | W3 | commit-to-visible latency at 500 transactions a second for 30 s | a poller at the source itself | the subscription |
//! | M1 | memory peaks of the initial copy and of W2b's transaction, with `memory_max` of 256 and 128 MiB | the caps | |
//! | M2 | latency and the streamer's memory beside a replica that gets 2 kB/s | the same without that one | |
//!
//! Each consumer works alone: the others are stopped meanwhile. Wall times are noisy, so medians of several rounds are
//! what counts. Environment: `ANABRANCH_BENCH_ROUNDS` (3), `ANABRANCH_BENCH_ROWS` (1000000),
//! `ANABRANCH_BENCH_TRANSACTIONS` (100000, of W2a), `ANABRANCH_BENCH_SECONDS` (30, of W3 and M2), `ANABRANCH_BENCH_ONLY` (a
//! list such as `W1,W3`), `ANABRANCH_BENCH_MEMORY` (the streamer's `memory_max`; the replica gets half).

mod lab;
mod latency;
mod limits;
mod memory;
mod report;

use std::time::Duration;

use lab::Lab;
use report::Report;

/// Sizes of a run.
#[derive(Clone, Debug)]
pub struct Sizes {
    rounds: usize,
    rows: u64,
    transactions: u64,
    latency: Duration,
    memory: String,
}

fn main() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| {
            text.parse()
                .unwrap_or_else(|_| panic!("{name} must be a number, not {text}"))
        })
    };
    let sizes = Sizes {
        rounds: number("ANABRANCH_BENCH_ROUNDS", 3) as usize,
        rows: number("ANABRANCH_BENCH_ROWS", 1_000_000),
        transactions: number("ANABRANCH_BENCH_TRANSACTIONS", 100_000),
        latency: Duration::from_secs(number("ANABRANCH_BENCH_SECONDS", 30)),
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
        lab.fill().await;
        if wanted("M1") {
            memory::large_transaction(&lab, &mut report).await;
        }
        if wanted("M2") {
            memory::stalled_beside_live(&lab, sizes.latency, &mut report).await;
        }
        report.print();
    });
}
