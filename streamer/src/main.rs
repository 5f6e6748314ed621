//! `anabranch-streamer`: reads the command line and runs the library.

mod commands;

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, time::Duration};

use anabranch_streamer::{
    auth,
    config::Config,
    explain::Question,
    postgres::{self, check::Severity},
    run::{self, Keys, KeysError},
    start,
};
use clap::{Parser, Subcommand, ValueEnum};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Fragments less over weeks than the C library's; SQLite's and zstd's memory is its too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Streams shapes of a Postgres database to replicas.
#[derive(Parser)]
#[command(name = "anabranch-streamer", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// The config file.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "streamer.toml"
    )]
    config: PathBuf,
    /// How log lines are written.
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Stream until stopped.
    Run,
    /// Say everything that is wrong with server, role, publication, tables and shapes, and the SQL that mends it.
    Check,
    /// Make schema and publication in the database, or print the SQL where the role may not.
    Setup {
        /// Only print the SQL that is missing.
        #[arg(long)]
        print: bool,
    },
    /// Look at shapes beside the streamer that runs.
    Shapes {
        #[command(subcommand)]
        command: Shapes,
    },
    /// Say why a connected replica is, or is not, shown a row, condition by condition. It shows the row: to be run by the
    /// streamer's user, on its machine.
    Explain {
        /// The replica's id.
        #[arg(long)]
        replica: String,
        /// The table: `issues`, or `other.notes` of another schema.
        #[arg(long)]
        table: String,
        /// The key, as the replica's file has it: a value; `column=value` for each of several columns; or a JSON array or object.
        #[arg(long, required = true)]
        key: Vec<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Mint a token to try things out, where the config holds a signing key.
    Token {
        /// Its claims, as a JSON object: '{"sub": "edge-1", "team_id": 7}'.
        claims: String,
        /// How long it is good, in seconds.
        #[arg(long, default_value_t = 3600)]
        seconds: u64,
    },
}

#[derive(Subcommand)]
enum Shapes {
    /// Say what each connected replica would gain and lose if the streamer were restarted with this config. Exit code 1 if one
    /// of them would be refused.
    Diff {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Threads beside the runtime's own: one for each reader of the mirror, and some that take over from one that waits for the engine.
/// When many replicas come at once more would be started, up to hundreds, and each keeps some megabytes of the allocator's.
const BLOCKING_THREADS_MAX: usize = 12;

/// A definite error.
const FAILED: u8 = 1;
/// Wrong usage or config.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // What is cleared two megabytes at a time makes a copy slower by a tenth and memory larger by a third. Where the system
    // can't, it costs that.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let arguments = Arguments::parse();
    log(arguments.log_format);
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(USAGE, &error),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error),
    };
    let code = runtime.block_on(async {
        match arguments.command {
            Command::Run => stream(config).await,
            Command::Check => match Keys::read(&config).await {
                Ok(_) => check(&config).await,
                Err(error) => without_keys(&error),
            },
            Command::Setup { print } => setup(&config, print).await,
            Command::Shapes {
                command: Shapes::Diff { json },
            } => commands::diff(&config, json).await,
            Command::Explain {
                replica,
                table,
                key,
                json,
            } => {
                let question = Question {
                    replica,
                    table,
                    key,
                };
                commands::explain(&config, &question, json).await
            }
            Command::Token { claims, seconds } => token(&config, &claims, seconds),
        }
    });
    // A thread that waits for a disk must not keep the program from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

async fn stream(config: Config) -> ExitCode {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let keys = match Keys::read(&config).await {
        Ok(keys) => keys,
        Err(error) => return without_keys(&error),
    };
    let listener = match TcpListener::bind(config.listen).await {
        Ok(listener) => listener,
        Err(error) => return fail(FAILED, &format!("listen {}: {error}", config.listen)),
    };
    let stopping = CancellationToken::new();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %config.listen,
        tls = config.tls.is_some(),
        data_dir = %config.data_dir.display(),
        "streamer starts"
    );
    let signals = tokio::spawn(signalled(stopping.clone()));
    let ended = run::run(config, keys, listener, stopping).await;
    signals.abort();
    match ended {
        Ok(()) => {
            tracing::info!("streamer stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error}");
            fail(FAILED, &error)
        }
    }
}

/// Stops on SIGTERM and SIGINT; a second one ends the program at once.
async fn signalled(stopping: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return;
    };
    for again in [false, true] {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if again {
            std::process::exit(130);
        }
        tracing::info!("stopping");
        stopping.cancel();
    }
}

async fn check(config: &Config) -> ExitCode {
    let findings = postgres::check::check(config).await;
    for finding in &findings {
        println!("{finding}\n");
    }
    if findings.is_empty() {
        println!("Everything is as it should be.");
    }
    let wrong = |finding: &postgres::check::Finding| finding.severity == Severity::Error;
    if findings.iter().any(wrong) {
        ExitCode::from(FAILED)
    } else {
        ExitCode::SUCCESS
    }
}

async fn setup(config: &Config, print: bool) -> ExitCode {
    match start::set_up(config, print).await {
        Ok(script) if script.is_empty() => {
            println!("-- Nothing is missing.");
            ExitCode::SUCCESS
        }
        Ok(script) => {
            println!("{script}");
            ExitCode::SUCCESS
        }
        Err(error) => fail(FAILED, &error),
    }
}

fn token(config: &Config, claims: &str, seconds: u64) -> ExitCode {
    let claims = match serde_json::from_str(claims) {
        Ok(serde_json::Value::Object(claims)) => claims,
        _ => {
            return fail(
                USAGE,
                &"claims must be a JSON object, such as '{\"sub\": \"edge-1\"}'",
            );
        }
    };
    match auth::mint(&config.auth, claims, Duration::from_secs(seconds)) {
        Ok(token) => {
            println!("{token}");
            ExitCode::SUCCESS
        }
        // There is no signing key, it can't be read, or the claims are not such as a token may have.
        Err(error) => fail(USAGE, &error),
    }
}

fn without_keys(error: &KeysError) -> ExitCode {
    match error {
        KeysError::File(error) => fail(USAGE, error),
        KeysError::Unreachable(error) => fail(FAILED, error),
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("anabranch-streamer: {error}");
    ExitCode::from(code)
}

fn log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"))
        // Whatever is asked for. It logs statements; and in them what a replica is shown is told by values of its rows.
        .add_directive("tokio_postgres=warn".parse().expect("it is a directive"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        // Colours are for people: a journal or a container's log would keep them as text.
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => builder.json().init(),
    }
}
