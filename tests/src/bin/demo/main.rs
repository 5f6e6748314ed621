//! `cargo demo`: a throw-away Postgres with data and a live workload, a streamer, three replicas of different shapes,
//! and a board that shows them live. Ctrl-C cleans up.
//!
//! `cargo demo -- --once` does the same for ten seconds without a terminal, proves every replica equal to Postgres,
//! prints the figures, and exits 0 or not.

mod board;
mod data;
mod edge;

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
    for edge in &edges {
        edge.watch(&mut tasks, stopping.clone());
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
    shown?;
    if once {
        board::print(&edges, false);
        println!(
            "\nThe workload made {transactions} transactions. Comparing every replica with Postgres …"
        );
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

/// Draws the board until the time is over.
async fn show(edges: &[Edge], time: Option<Duration>, terminal: bool) -> anyhow::Result<()> {
    let end = time.map(|time| Instant::now() + time);
    let mut next = Instant::now();
    while end.is_none_or(|end| next < end) {
        tokio::time::sleep_until(next).await;
        if terminal {
            board::print(edges, true);
        }
        next += DRAW_EVERY;
    }
    Ok(())
}
