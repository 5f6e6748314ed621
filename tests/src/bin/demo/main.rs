//! `cargo demo`: a throw-away Postgres with data and a live workload, a streamer, three replicas of different shapes,
//! programs that write the files of two of them, one of which is offline now and then, and a board that shows it live.
//! Ctrl-C cleans up.
//!
//! `cargo demo -- --once` does the same for ten seconds without a terminal, proves every replica equal to Postgres and
//! every local write there once or rejected, prints the figures, and exits 0 or not.

mod board;
mod data;
mod edge;
mod writer;

use std::{process::ExitCode, time::Duration};

use anabranch_tests::{
    peers::Streamer,
    postgres::{Options, Server},
};
use clap::Parser;
use edge::Edge;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// Shows Anabranch at work, on this machine, with nothing left behind.
#[derive(Parser)]
#[command(name = "cargo demo")]
struct Arguments {
    /// Run for ten seconds without a terminal, prove every replica equal to Postgres, and end.
    #[arg(long)]
    once: bool,
}

/// How long `--once` lets the workload run.
const ONCE: Duration = Duration::from_secs(10);

/// How often the board is drawn.
const DRAW_EVERY: Duration = Duration::from_secs(1);

/// The replica that is offline now and then, and the draws of which it is so.
const COMES_AND_GOES: &str = "org-7";
const OFFLINE: std::ops::Range<u64> = 3..6;
const OFFLINE_EVERY: u64 = 10;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match demo(arguments.once).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:?}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(once: bool) -> anyhow::Result<()> {
    println!("Starting a Postgres of its own …");
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    println!("Filling {} tables …", data::TABLES.len());
    let rows = data::fill(&database).await;
    println!("{rows} rows. Starting a streamer and three replicas …");
    let streamer = Streamer::config(&database)
        .toml(data::SHAPES)
        .token("everything", serde_json::json!({ "sub": "everything" }))
        .token("org-7", serde_json::json!({ "sub": "org-7", "org_id": 7 }))
        .token("board", serde_json::json!({ "sub": "board" }))
        .start()
        .await;
    let began = Instant::now();
    let mut edges = Vec::new();
    for place in data::places() {
        edges.push(Edge::start(&streamer, place).await);
    }
    println!(
        "All replicas had their first complete copy after {:.1} s.\n",
        began.elapsed().as_secs_f64()
    );

    let stopping = CancellationToken::new();
    let mut tasks = JoinSet::new();
    for worker in 0..data::WORKERS {
        tasks.spawn(data::work(
            database.try_connect().await?,
            worker,
            stopping.clone(),
        ));
    }
    let mut writers = JoinSet::new();
    for edge in &edges {
        edge.watch(&mut tasks, stopping.clone());
        if let Some(writer) = edge.writer() {
            let stopping = stopping.clone();
            writers.spawn_blocking(move || writer.run(&stopping));
        }
    }
    let shown = if once {
        show(&edges, Some(ONCE), false).await
    } else {
        tokio::select! {
            shown = show(&edges, None, true) => shown,
            interrupted = tokio::signal::ctrl_c() => interrupted.map_err(anyhow::Error::from),
        }
    };
    stopping.cancel();
    let mut transactions = 0;
    while let Some(done) = tasks.join_next().await {
        transactions += done??;
    }
    let mut written = Vec::new();
    while let Some(done) = writers.join_next().await {
        written.push(done??);
    }
    shown?;
    if once {
        board::print(&edges, false);
        println!(
            "\nThe workload made {transactions} transactions in Postgres. Looking for what was written at the edge …"
        );
        writer::prove(&written, &database).await?;
        println!("Each took effect once or is rejected. Comparing every replica with Postgres …");
        for edge in &edges {
            edge.prove(&database).await?;
        }
        println!("All equal.");
    } else {
        println!("\nCleaning up …");
    }
    for edge in edges {
        edge.stop().await;
    }
    streamer.terminate().await;
    Ok(())
}

/// Draws the board until the time is over. One replica is offline now and then.
async fn show(edges: &[Edge], time: Option<Duration>, terminal: bool) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut draws = 0;
    while time.is_none_or(|time| DRAW_EVERY * draws < time) {
        tokio::time::sleep_until(begin + DRAW_EVERY * draws).await;
        for edge in edges
            .iter()
            .filter(|edge| edge.place.name == COMES_AND_GOES)
        {
            match u64::from(draws) % OFFLINE_EVERY {
                at if at == OFFLINE.start => edge.go_offline(),
                at if at == OFFLINE.end => edge.go_online(),
                _ => {}
            }
        }
        if terminal {
            board::print(edges, true);
        }
        draws += 1;
    }
    Ok(())
}
