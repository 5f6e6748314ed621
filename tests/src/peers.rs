//! The real programs, as processes that can be killed.
//!
//! ```no_run
//! # async fn test() {
//! use anabranch_tests::{peers::{Replica, Streamer}, postgres::Server};
//! let database = Server::shared().await.database().await;
//! let streamer = Streamer::config(&database)
//!     .shape("all", &["SELECT * FROM issues"])
//!     .start()
//!     .await;
//! let replica = Replica::config(&streamer).subscribe("all").start().await;
//! replica.kill();
//! replica.start().await; // the same file, the same port
//! # }
//! ```
//!
//! Each has a directory of its own for its config, data and log. When a test fails the logs are printed and the
//! directories kept; else both are gone with the test, and the processes with them, also when the test is killed.

use std::{
    fs::{self, File},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    time::Duration,
};

use anabranch_proto::Lsn;
use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    http::{self, Answer},
    oracle::select::compare_file,
    port,
    postgres::Database,
    process, programs,
    proxy::Proxy,
    wait::{DEADLINE, until},
    watcher::Watcher,
};

/// The token that replicas use unless told otherwise.
pub const TOKEN: &str = "dev-1";

/// How long a replica may take to get somewhere: it may have to copy a lot first.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);

/// How much of a log is printed when a test fails.
const LOG_LINES_PRINTED: usize = 80;

/// A process of one of our programs, running or not, with what it takes to run it again.
#[derive(Debug)]
pub struct Peer {
    program: &'static str,
    environment: Vec<(String, String)>,
    address: String,
    dir: Option<TempDir>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    watcher: Watcher,
}

impl Peer {
    fn new(program: &'static str, config: Config, address: String) -> Self {
        let dir = config.dir;
        let text = toml::to_string(&config.table).expect("a config is a table");
        fs::write(dir.path().join("config.toml"), text).expect("write a config");
        Self {
            program,
            environment: config.environment,
            address,
            dir: Some(dir),
            running: Mutex::new(None),
        }
    }

    /// Its own directory.
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("until it is dropped").path()
    }

    /// Its config file, for `check` and `status`, or to change it before it is started again.
    pub fn config_file(&self) -> PathBuf {
        self.dir().join("config.toml")
    }

    /// Changes one key of its config file, for when it is started again.
    pub fn reconfigure(&self, path: &str, value: impl Into<toml::Value>) {
        self.rewrite(|table| set(table, path, value.into()));
    }

    /// Changes its config file in any way, for when it is started again.
    pub fn rewrite(&self, change: impl FnOnce(&mut toml::Table)) {
        let file = self.config_file();
        let text = fs::read_to_string(&file).expect("read a config");
        let mut table = text.parse().expect("a config that we wrote");
        change(&mut table);
        let text = toml::to_string(&table).expect("a config is a table");
        fs::write(file, text).expect("write a config");
    }

    /// `host:port` of its HTTP.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<Pid> {
        let running = self.running.lock().expect("no panic under it");
        running
            .as_ref()
            .map(|running| Pid::from_child(&running.child))
    }

    /// A command of the program (`check`, `status`, …) with its config.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(programs::directory().join(self.program));
        command
            .arg(subcommand)
            .arg("--config")
            .arg(self.config_file())
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .current_dir(self.dir())
            .stdin(Stdio::null());
        command
    }

    /// Starts it, and does not wait for anything.
    pub fn spawn(&self) {
        let mut running = self.running.lock().expect("no panic under it");
        assert!(running.is_none(), "{} is already running", self.program);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir().join("log"))
            .expect("open a log");
        let mut command = self.command("run");
        command
            .stdout(log.try_clone().expect("share a log"))
            .stderr(log);
        // A terminal's Ctrl-C is for the test; what the test started is the watcher's to end.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.program));
        let id = child.id().to_string();
        let arguments = [id.as_ref(), self.dir().as_os_str()];
        let watcher = Watcher::start(r#"kill -9 "$1"; rm -rf "$2""#, arguments, None)
            .expect("start a process's watcher");
        *running = Some(Running { child, watcher });
    }

    /// Starts it and waits until it is ready.
    pub async fn start(&self) {
        self.spawn();
        self.until_ready().await;
    }

    /// Until `/readyz` says so. Panics at once if the process ends.
    pub async fn until_ready(&self) {
        until(&format!("{} is ready", self.program), DEADLINE, || async {
            if let Some(status) = self.poll_exit() {
                panic!("{} ended instead of getting ready: {status}", self.program);
            }
            self.get("/readyz").await?.ok()
        })
        .await;
    }

    /// GETs a path of its HTTP.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        http::get(&self.address, path).await
    }

    /// A number from its `/metrics`.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let page = self.get("/metrics").await?.ok()?;
        let mut values = page.lines().filter_map(|line| line.strip_prefix(name));
        let value = values.find_map(|value| value.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("no {name} in:\n{page}"))
    }

    /// kill -9. Nothing happens if it does not run.
    pub fn kill(&self) {
        let running = self.running.lock().expect("no panic under it").take();
        if let Some(mut running) = running {
            let _ = running.child.kill();
            let _ = running.child.wait();
            running.watcher.disarm();
        }
    }

    /// SIGSTOP: it is there, and does nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM, and what it exits with.
    pub async fn terminate(&self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.exit().await
    }

    /// What it exits with. Panics if it goes on running.
    pub async fn exit(&self) -> ExitStatus {
        until(&format!("{} ends", self.program), DEADLINE, || async {
            self.poll_exit()
        })
        .await
    }

    /// All that it has logged, over all its runs.
    pub fn log(&self) -> String {
        let log = fs::read(self.dir().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The most memory that the running process has ever had resident.
    pub fn memory_peak_bytes(&self) -> u64 {
        let pid = self.pid().expect("it is running");
        process::memory_peak_bytes(pid).expect("/proc tells the memory of a process")
    }

    fn signal(&self, signal: Signal) {
        let pid = self.pid().expect("it is running");
        kill_process(pid, signal).expect("signal a process of our own");
    }

    /// Its exit status, once, if it has ended.
    pub fn poll_exit(&self) -> Option<ExitStatus> {
        let mut slot = self.running.lock().expect("no panic under it");
        let status = slot.as_mut()?.child.try_wait().expect("ask for an end")?;
        slot.take().expect("it was there").watcher.disarm();
        Some(status)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
        let Some(dir) = self.dir.take() else { return };
        if std::thread::panicking() {
            let log = fs::read(dir.path().join("log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES_PRINTED)..];
            println!(
                "--- {} (all of it is kept in {})\n{}\n---",
                self.program,
                dir.keep().display(),
                last.join("\n")
            );
        }
    }
}

/// What both programs' configs have in common.
#[derive(Debug)]
struct Config {
    table: toml::Table,
    environment: Vec<(String, String)>,
    dir: TempDir,
}

impl Config {
    fn new() -> Self {
        Self {
            table: toml::Table::new(),
            environment: Vec::new(),
            dir: tempfile::Builder::new()
                .prefix("anabranch-peer-")
                .tempdir()
                .expect("make a directory for a process"),
        }
    }

    fn merge(&mut self, text: &str) {
        let more = text
            .parse()
            .unwrap_or_else(|error| panic!("not TOML: {error}\n{text}"));
        merge(&mut self.table, more);
    }

    fn set(&mut self, path: &str, value: toml::Value) {
        set(&mut self.table, path, value);
    }
}

/// Sets one key, such as `postgres.slot`.
fn set(into: &mut toml::Table, path: &str, value: toml::Value) {
    let (path, last) = path.rsplit_once('.').unwrap_or(("", path));
    let mut table = toml::Table::from_iter([(last.to_owned(), value)]);
    for name in path.rsplit('.').filter(|name| !name.is_empty()) {
        table = toml::Table::from_iter([(name.to_owned(), table.into())]);
    }
    merge(into, table);
}

/// Tables are merged, all else is replaced.
fn merge(into: &mut toml::Table, more: toml::Table) {
    for (name, value) in more {
        match (into.get_mut(&name), value) {
            (Some(toml::Value::Table(into)), toml::Value::Table(more)) => merge(into, more),
            (_, value) => {
                into.insert(name, value);
            }
        }
    }
}

macro_rules! config_methods {
    () => {
        /// Adds TOML to the config file. What is there already is replaced, tables are merged.
        pub fn toml(mut self, text: &str) -> Self {
            self.config.merge(text);
            self
        }

        /// Sets one key, such as `memory_max` or `postgres.slot`.
        pub fn set(mut self, path: &str, value: impl Into<toml::Value>) -> Self {
            self.config.set(path, value.into());
            self
        }

        /// Sets a variable of the process's environment.
        pub fn env(mut self, name: &str, value: &str) -> Self {
            self.config.environment.push((name.into(), value.into()));
            self
        }
    };
}

/// A streamer.
#[derive(Debug)]
pub struct Streamer(Peer);

/// How a streamer is run.
#[derive(Debug)]
pub struct StreamerConfig {
    config: Config,
    port: u16,
    tokens: Vec<toml::Value>,
    everywhere: bool,
}

impl Streamer {
    /// A streamer of `database`, with the token [`TOKEN`] whose only claim is `sub = "test"`.
    pub fn config(database: &Database) -> StreamerConfig {
        let mut config = Config::new();
        let port = port::free();
        config.set("listen", format!("127.0.0.1:{port}").into());
        let data_dir = config.dir.path().join("data");
        config.set(
            "data_dir",
            data_dir.to_str().expect("a path of ours").into(),
        );
        config.set("postgres.url", database.url().into());
        config.set("postgres.publication", "anabranch".into());
        // Slots are of the whole server, and other tests have theirs.
        config.set(
            "postgres.slot",
            format!("anabranch_{}", database.name()).into(),
        );
        StreamerConfig {
            config,
            port,
            tokens: Vec::new(),
            everywhere: false,
        }
    }

    /// What replicas connect to.
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }
}

impl Deref for Streamer {
    type Target = Peer;

    fn deref(&self) -> &Peer {
        &self.0
    }
}

impl StreamerConfig {
    config_methods!();

    /// Adds a shape without parameters. One with parameters is written in [`toml`](Self::toml).
    pub fn shape(self, name: &str, tables: &[&str]) -> Self {
        let tables: toml::value::Array = tables.iter().map(|&sql| sql.into()).collect();
        self.set(&format!("shape.{name}.tables"), tables)
    }

    /// Connects to Postgres through a proxy in front of it.
    pub fn through(self, proxy: &Proxy, database: &Database) -> Self {
        self.set("postgres.url", database.url_at("127.0.0.1", proxy.port()))
    }

    /// Listens on all addresses of this machine, where static tokens are refused: it has none then, nor [`TOKEN`].
    pub fn listen_everywhere(mut self) -> Self {
        self.everywhere = true;
        let listen = format!("0.0.0.0:{}", self.port);
        self.set("listen", listen)
    }

    /// Accepts a token. Once one is named, [`TOKEN`] is no longer accepted by itself.
    pub fn token(mut self, token: &str, claims: serde_json::Value) -> Self {
        let mut entry = toml::Table::new();
        entry.insert("token".into(), token.into());
        let claims = toml::Value::try_from(claims).expect("claims without null");
        entry.insert("claims".into(), claims);
        self.tokens.push(entry.into());
        self
    }

    /// Writes the config, and starts nothing yet.
    pub fn prepare(mut self) -> Streamer {
        if self.tokens.is_empty() && !self.everywhere {
            self = self.token(TOKEN, serde_json::json!({ "sub": "test" }));
        }
        if !self.tokens.is_empty() {
            self.config.set("auth.tokens", self.tokens.into());
        }
        let address = format!("127.0.0.1:{}", self.port);
        Streamer(Peer::new("anabranch-streamer", self.config, address))
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Streamer {
        let streamer = self.prepare();
        streamer.start().await;
        streamer
    }
}

/// A replica.
#[derive(Debug)]
pub struct Replica(Peer);

/// How a replica is run.
#[derive(Debug)]
pub struct ReplicaConfig {
    config: Config,
    port: u16,
    subscriptions: toml::value::Array,
}

impl Replica {
    /// A replica of `streamer`, which uses [`TOKEN`].
    pub fn config(streamer: &Streamer) -> ReplicaConfig {
        Self::config_at(&streamer.url())
    }

    /// A replica of whatever is at `url`.
    pub fn config_at(url: &str) -> ReplicaConfig {
        let mut config = Config::new();
        let port = port::free();
        config.set("streamer", url.into());
        config.set("token", TOKEN.into());
        let file = config.dir.path().join("app.db");
        config.set("database", file.to_str().expect("a path of ours").into());
        config.set("http", format!("127.0.0.1:{port}").into());
        ReplicaConfig {
            config,
            port,
            subscriptions: Vec::new(),
        }
    }

    /// Its SQLite file.
    pub fn file(&self) -> PathBuf {
        self.dir().join("app.db")
    }

    /// The file, opened as any program would that only reads.
    pub fn open(&self) -> rusqlite::Connection {
        crate::oracle::file::open(&self.file())
            .unwrap_or_else(|error| panic!("open {}: {error}", self.file().display()))
    }

    /// Until the file is at `lsn` or beyond, by what the file itself says.
    #[track_caller]
    pub fn until_at(&self, lsn: Lsn) -> impl Future<Output = ()> + '_ {
        until(
            &format!("the replica is at {lsn}"),
            CATCH_UP_MAX,
            move || async move {
                match crate::oracle::file::position(&self.file())? {
                    Some((_, at)) if at >= lsn => Ok(()),
                    at => anyhow::bail!("it is at {at:?}"),
                }
            },
        )
    }

    /// Until the file holds all that `database` has committed by now.
    #[track_caller]
    pub fn until_caught_up<'a>(&'a self, database: &'a Database) -> impl Future<Output = ()> + 'a {
        // So that the caller is the one that is named.
        let caller = std::panic::Location::caller();
        async move {
            let lsn = database.lsn().await;
            println!("{caller}: waiting until the replica is at {lsn}");
            self.until_at(lsn).await;
        }
    }

    /// Until nothing that programs wrote is pending.
    #[track_caller]
    pub fn until_answered(&self) -> impl Future<Output = ()> + '_ {
        until("nothing is pending", DEADLINE, move || async move {
            match crate::oracle::file::pending(&self.file())? {
                0 => Ok(()),
                pending => anyhow::bail!("{pending} are pending"),
            }
        })
    }

    /// Until the file holds all that `database` has committed by now; its tables then equal what Postgres answers to
    /// these queries, or the test fails.
    #[track_caller]
    pub fn until_equal<'a>(
        &'a self,
        database: &'a Database,
        tables: &'a [(&'a str, &'a str)],
    ) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        let caught_up = self.until_caught_up(database);
        async move {
            caught_up.await;
            compare_file(database, &self.file(), tables)
                .await
                .unwrap_or_else(|difference| panic!("{caller}: {difference:#}"));
        }
    }
}

impl Deref for Replica {
    type Target = Peer;

    fn deref(&self) -> &Peer {
        &self.0
    }
}

impl ReplicaConfig {
    config_methods!();

    /// Subscribes to a shape.
    pub fn subscribe(self, shape: &str) -> Self {
        self.subscribe_with(shape, toml::Table::new())
    }

    /// Subscribes to a shape with parameters that the replica chooses.
    pub fn subscribe_with(mut self, shape: &str, params: toml::Table) -> Self {
        let mut entry = toml::Table::new();
        entry.insert("shape".into(), shape.into());
        entry.insert("params".into(), params.into());
        self.subscriptions.push(entry.into());
        self
    }

    /// Uses this token.
    pub fn token(self, token: &str) -> Self {
        self.set("token", token)
    }

    /// Uses none: the certificate tells who it is.
    pub fn no_token(mut self) -> Self {
        self.config.table.remove("token");
        self
    }

    /// Reads its token from a file.
    pub fn token_file(mut self, file: &Path) -> Self {
        self.config.table.remove("token");
        self.set("token_file", file.to_str().expect("a path of ours"))
    }

    /// Connects to the streamer through a proxy in front of it.
    pub fn through(self, proxy: &Proxy) -> Self {
        let url = format!("http://{}", proxy.address());
        self.set("streamer", url)
    }

    /// Writes the config, and starts nothing yet.
    pub fn prepare(mut self) -> Replica {
        self.config.set("subscribe", self.subscriptions.into());
        let address = format!("127.0.0.1:{}", self.port);
        Replica(Peer::new("anabranch-replica", self.config, address))
    }

    /// Starts it and waits until it is ready: it has a first complete copy.
    pub async fn start(self) -> Replica {
        let replica = self.prepare();
        replica.start().await;
        replica
    }
}
