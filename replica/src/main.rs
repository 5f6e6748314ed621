//! `anabranch-replica`: the sidecar as a program.
//!
//! Exit status: 0 after a clean stop, 1 after a definite error, 2 for bad usage or config.

mod show;

use std::{io::IsTerminal, path::PathBuf, pin::pin, process::ExitCode};

use anabranch_replica::{Config, Error, Sidecar};
use clap::{Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Fragments less over weeks than the C library's; SQLite's and zstd's memory is its too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const DEFINITE_ERROR: u8 = 1;
const BAD_CONFIG: u8 = 2;

#[derive(Parser)]
#[command(
    name = "anabranch-replica",
    version,
    about = "Keeps a plain SQLite file equal to shapes of a Postgres database"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs until SIGTERM or SIGINT
    Run {
        /// The config
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// How log lines look; RUST_LOG chooses which there are
        #[arg(long, value_enum, default_value_t = LogFormat::Text)]
        log_format: LogFormat,
    },
    /// Asks the running replica how it is
    Status {
        /// The config of the running replica
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print what /status answers, as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    // What is cleared two megabytes at a time makes a copy slower by a tenth and memory larger by a third. Where the system
    // can't, it costs that.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let arguments = Arguments::parse();
    let path = match &arguments.command {
        Command::Run { config, .. } | Command::Status { config, .. } => config,
    };
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(BAD_CONFIG);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("starting: {error}");
            return ExitCode::from(DEFINITE_ERROR);
        }
    };
    match arguments.command {
        Command::Run { log_format, .. } => {
            start_log(log_format);
            runtime.block_on(run(config))
        }
        Command::Status { json, .. } => runtime.block_on(show::status(&config, json)),
    }
}

/// To stderr: stdout stays free for what was asked for.
fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

async fn run(config: Config) -> ExitCode {
    // Asked for before anything starts, so that no signal goes unheard.
    let (mut terminate, mut interrupt) = match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!("listening for signals: {error}");
            return ExitCode::from(DEFINITE_ERROR);
        }
    };
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    let shapes: Vec<_> = config
        .subscriptions
        .iter()
        .map(|subscription| subscription.shape.as_str())
        .collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        streamer = %config.streamer,
        database = %config.database.display(),
        shapes = shapes.join(", "),
        memory_max_mib = config.memory.max >> 20,
        "starting"
    );
    let mut told = pin!(async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    });
    let cancel = CancellationToken::new();
    let mut start = pin!(Sidecar::start(config, None, cancel.clone()));
    // It may wait for a file that is locked, for as long as that takes.
    let started = tokio::select! {
        started = &mut start => started,
        signal = &mut told => {
            tracing::info!("{signal}: stopping");
            cancel.cancel();
            return match start.await {
                Ok(sidecar) => finish(sidecar.shutdown().await),
                Err(Error::Stopped) => finish(Ok(())),
                Err(error) => finish(Err(error)),
            };
        }
    };
    let mut sidecar = match started {
        Ok(sidecar) => sidecar,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(DEFINITE_ERROR);
        }
    };
    let status = sidecar.status().borrow().clone();
    let position = status
        .position
        .map_or_else(|| "none".to_owned(), |position| position.to_string());
    match sidecar.http() {
        Some(address) => {
            tracing::info!(replica = %status.replica_id, position, "HTTP at {address}")
        }
        None => tracing::info!(replica = %status.replica_id, position, "no HTTP"),
    }
    let signal = tokio::select! {
        result = sidecar.ended() => return finish(result),
        signal = told => signal,
    };
    tracing::info!("{signal}: stopping");
    finish(sidecar.shutdown().await)
}

fn finish(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("stopped: {error}");
            ExitCode::from(DEFINITE_ERROR)
        }
    }
}
