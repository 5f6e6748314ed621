//! A real Postgres, in a line of code.
//!
//! ```no_run
//! # async fn test() {
//! use anabranch_tests::postgres::{Options, Server, Stop};
//! let database = Server::shared().await.database().await; // one server per test run, one database per test
//! database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
//!
//! let server = Server::start(Options::new().set("wal_sender_timeout", "5s")).await; // a cluster of one's own
//! server.stop(Stop::Immediate).await;
//! server.start_again().await;
//! # }
//! ```
//!
//! Where the server comes from is settled once per process, and said: see [`backend`]. All of this is the same with
//! Docker and with local programs; a test that needs one of them asks [`Server::backend`] and says why.

use std::time::{Duration, Instant};

use tokio::sync::OnceCell;

use crate::authority::Authority;

pub mod backend;
mod database;
mod docker;
mod local;
mod tls;

pub use backend::Backend;
pub use database::Database;
pub(crate) use database::connect;

/// The superuser of every server.
pub const USER: &str = "postgres";

/// Its password, asked for over TCP (SCRAM).
pub const PASSWORD: &str = "anabranch";

/// How long a server may take to start: crash recovery of a large WAL on a slow disk included.
const START_MAX: Duration = Duration::from_secs(90);

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct Options {
    settings: Vec<(String, String)>,
    segment_mb: Option<u32>,
    locale: String,
}

impl Options {
    /// What [`Server::shared`] has too: logical decoding for hundreds of slots, and no waiting for disks.
    pub fn new() -> Self {
        let defaults = [
            ("listen_addresses", "*"),
            ("wal_level", "logical"),
            // Each test has a slot or two, and they run at the same time.
            ("max_replication_slots", "250"),
            ("max_wal_senders", "250"),
            ("max_connections", "300"),
            ("max_prepared_transactions", "20"),
            // The machine won't lose power during a test, and a killed process loses nothing that it wrote.
            ("fsync", "off"),
            ("shared_buffers", "128MB"),
            ("max_wal_size", "4GB"),
            ("log_line_prefix", "%m [%p] %d %a "),
            ("timezone", "UTC"),
        ];
        Self {
            settings: defaults.map(|(k, v)| (k.into(), v.into())).to_vec(),
            segment_mb: None,
            locale: "C".into(),
        }
    }

    /// Sets a parameter of `postgresql.conf`. [`Server::alter`] changes one later.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(given, _)| given != name);
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Makes WAL segments of this many megabytes (1 to 1,024, a power of two; 16 by default): with small ones a slot
    /// is lost in seconds.
    pub fn segment_mb(mut self, segment_mb: u32) -> Self {
        self.segment_mb = Some(segment_mb);
        self
    }

    /// The locale of the cluster, `C` by default. It must exist where the server runs; `C.UTF-8` mostly does.
    pub fn locale(mut self, locale: &str) -> Self {
        self.locale = locale.into();
        self
    }

    fn config_file(&self) -> String {
        let quote = |value: &str| value.replace('\'', "''");
        self.settings
            .iter()
            .map(|(name, value)| format!("{name} = '{}'\n", quote(value)))
            .collect()
    }

    /// For `initdb`, beside what says where the cluster is and who may log in.
    fn initdb_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "--encoding=UTF8".into(),
            format!("--locale={}", self.locale),
            "--no-sync".into(),
        ];
        arguments.extend(self.segment_mb.map(|mb| format!("--wal-segsize={mb}")));
        arguments
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `pg_ctl stop -m fast`: connections are ended, WAL is sent to whoever streams it, then a checkpoint.
    Fast,
    /// `pg_ctl stop -m immediate`: at once, without a checkpoint. Recovers when it is started again.
    Immediate,
    /// kill -9 of every process of the server.
    Kill,
}

/// A running server, gone when this is dropped or the process ends.
#[derive(Debug)]
pub struct Server {
    place: Place,
    /// `server_version_num`: 150004 is 15.4.
    version: u32,
}

#[derive(Debug)]
enum Place {
    Docker(docker::Container),
    Local(local::Cluster),
}

impl Server {
    /// The server of this test run, started when it is first asked for. It is never stopped, since all tests share
    /// it: one that wants to do more than use a database starts its own.
    pub async fn shared() -> &'static Server {
        static SHARED: OnceCell<Server> = OnceCell::const_new();
        SHARED.get_or_init(|| Server::start(Options::new())).await
    }

    /// Starts a cluster of the caller's own.
    pub async fn start(options: Options) -> Server {
        Self::start_on(backend::choose().await, options).await
    }

    /// Starts a cluster on a given backend, whatever the environment says.
    pub async fn start_on(backend: &Backend, options: Options) -> Server {
        let place = match backend {
            Backend::Docker { image } => {
                Place::Docker(docker::Container::start(image, &options).await)
            }
            Backend::Local { bin } => Place::Local(local::Cluster::start(bin, &options).await),
        };
        let mut server = Server { place, version: 0 };
        server.version = server.until_it_answers().await;
        server
    }

    /// Starts a cluster whose files can be got at: on local programs, also where the others run in Docker. `None`, and
    /// said: there are no local programs.
    pub async fn start_local(options: Options) -> Option<Server> {
        let local = match backend::choose().await {
            local @ Backend::Local { .. } => Ok(local.clone()),
            Backend::Docker { .. } => backend::resolve("local").await.map(|(local, _)| local),
        };
        match local {
            Ok(local) => Some(Self::start_on(&local, options).await),
            Err(error) => {
                crate::announce(&format!("NOT TESTED: what needs a server's files: {error}"));
                None
            }
        }
    }

    /// A physical standby of it, which follows it until it is promoted.
    pub async fn standby(&self) -> Server {
        let place = Place::Local(self.local().standby().await);
        let mut server = Server { place, version: 0 };
        server.version = server.until_it_answers().await;
        server
    }

    /// Keeps a copy of its files, of which there is one at a time. It must be stopped.
    pub async fn save(&self) {
        self.local().save().await;
    }

    /// Puts its files back to what they were at [`save`](Self::save). It must be stopped.
    pub async fn put_back(&self) {
        self.local().put_back().await;
    }

    fn local(&self) -> &local::Cluster {
        match &self.place {
            Place::Local(cluster) => cluster,
            Place::Docker(_) => panic!("a server of `start_local` is needed here"),
        }
    }

    /// What it runs on.
    pub fn backend(&self) -> Backend {
        match &self.place {
            Place::Docker(container) => Backend::Docker {
                image: container.image().into(),
            },
            Place::Local(cluster) => Backend::Local {
                bin: cluster.bin().into(),
            },
        }
    }

    /// `server_version_num`: 150004 is 15.4.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The major version: 15, 16, …
    pub fn major(&self) -> u32 {
        self.version / 10_000
    }

    /// Where it listens.
    pub fn host(&self) -> &str {
        match &self.place {
            Place::Docker(container) => container.host(),
            Place::Local(_) => "127.0.0.1",
        }
    }

    /// Where it listens, now and after [`start_again`](Self::start_again).
    pub fn port(&self) -> u16 {
        match &self.place {
            Place::Docker(container) => container.port(),
            Place::Local(cluster) => cluster.port(),
        }
    }

    /// Of a database of it, as [`USER`].
    pub fn url(&self, database: &str) -> String {
        let (host, port) = (self.host(), self.port());
        format!("postgres://{USER}:{PASSWORD}@{host}:{port}/{database}")
    }

    /// A new, empty database with a name that no other has.
    pub async fn database(&self) -> Database {
        self.database_with("").await
    }

    /// The same, with what follows `CREATE DATABASE name`.
    pub async fn database_with(&self, options: &str) -> Database {
        Database::create(self, options).await
    }

    /// Stops it, and tells how long that took. Panics after `within`.
    #[track_caller]
    pub fn stop_within(&self, how: Stop, within: Duration) -> impl Future<Output = Duration> + '_ {
        let caller = std::panic::Location::caller();
        async move {
            let start = Instant::now();
            let stopped = async {
                match &self.place {
                    Place::Docker(container) => container.stop(how).await,
                    Place::Local(cluster) => cluster.stop(how).await,
                }
            };
            if tokio::time::timeout(within, stopped).await.is_err() {
                panic!(
                    "{caller}: Postgres did not stop ({how:?}) within {within:?}\n{}",
                    self.log().await
                );
            }
            start.elapsed()
        }
    }

    /// Stops it, and tells how long that took.
    pub async fn stop(&self, how: Stop) -> Duration {
        self.stop_within(how, crate::wait::DEADLINE).await
    }

    /// Starts it after a [`stop`](Self::stop), with the same data, on the same port.
    pub async fn start_again(&self) {
        match &self.place {
            Place::Docker(container) => container.start_again().await,
            Place::Local(cluster) => cluster.start_again().await,
        }
        self.until_it_answers().await;
    }

    /// Stops it, and starts it again.
    pub async fn restart(&self, how: Stop) {
        self.stop(how).await;
        self.start_again().await;
    }

    /// Changes a parameter for good (`ALTER SYSTEM`) and reloads. Some take effect only after a restart.
    pub async fn alter(&self, name: &str, value: &str) {
        let client = self.connect("postgres").await;
        let value = value.replace('\'', "''");
        client
            .batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))
            .await
            .unwrap_or_else(|error| panic!("set {name}: {error:?}"));
        client
            .batch_execute("SELECT pg_reload_conf()")
            .await
            .expect("reload the configuration");
    }

    /// Its postmaster, where it runs on this machine outside of a container.
    pub fn pid(&self) -> Option<rustix::process::Pid> {
        match &self.place {
            Place::Docker(_) => None,
            Place::Local(cluster) => cluster.pid(),
        }
    }

    /// Makes it speak TLS, with a certificate of a new authority for `localhost`, 127.0.0.1 and its address.
    pub async fn enable_tls(&self) -> Authority {
        tls::enable(self).await
    }

    /// Runs one of Postgres' own programs against it (`pgbench`, `psql`, `pg_recvlogical`, …), where the server
    /// runs, and panics if it fails. Gives its output.
    pub async fn tool(&self, name: &str, database: &str, arguments: &[&str]) -> String {
        let (success, output) = match &self.place {
            Place::Docker(container) => container.tool(name, database, arguments).await,
            Place::Local(cluster) => cluster.tool(name, database, arguments).await,
        };
        assert!(success, "{name} {arguments:?} failed:\n{output}");
        output
    }

    /// What it has logged.
    pub async fn log(&self) -> String {
        match &self.place {
            Place::Docker(container) => container.log().await,
            Place::Local(cluster) => cluster.log(),
        }
    }

    /// A connection to one of its databases. Panics if there is none to be had.
    pub async fn connect(&self, database: &str) -> tokio_postgres::Client {
        database::connect(&self.url(database))
            .await
            .unwrap_or_else(|error| panic!("connect to Postgres: {error:?}"))
    }

    /// Until a query is answered: a server that listens may still recover. Gives its version.
    async fn until_it_answers(&self) -> u32 {
        let url = self.url("postgres");
        let start = Instant::now();
        loop {
            let asked = async {
                let client = database::connect(&url).await?;
                let row = client
                    .query_one("SELECT current_setting('server_version_num')::int", &[])
                    .await?;
                row.try_get::<_, i32>(0)
            };
            let error = match tokio::time::timeout(START_MAX, asked).await {
                Ok(Ok(version)) => return version.unsigned_abs(),
                Ok(Err(error)) => format!("{error:?}"),
                Err(_) => "no answer".into(),
            };
            let ended = match &self.place {
                Place::Docker(container) => container.has_ended().await,
                Place::Local(cluster) => cluster.has_ended(),
            };
            if ended || start.elapsed() > START_MAX {
                panic!(
                    "Postgres does not answer ({error}); it logged:\n{}",
                    self.log().await
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
