//! A replica of the demo: its process, the proxy that counts its bytes, and the eye on its file.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anabranch_tests::{
    oracle::{file, select},
    peers::{Replica, Streamer},
    postgres::Database,
    proxy::{Cut, Proxy, Way},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{data::Place, writer::Writer};

/// How often the file is looked at: half of it is part of every lag.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// Lags that are kept for the percentiles: the last ones, so that the board shows what is now.
const LAGS_MAX: usize = 5_000;

pub struct Edge {
    pub place: Place,
    replica: Replica,
    proxy: Proxy,
    seen: Arc<Mutex<Seen>>,
}

/// What the eye saw last.
#[derive(Clone, Default)]
pub struct Seen {
    /// Rows in all synced tables.
    pub rows: i64,
    /// `_anabranch_status.lsn`.
    pub position: String,
    /// Local changes that are not answered.
    pub pending: i64,
    /// Rows of `_anabranch_rejected`.
    pub rejected: i64,
    /// Whether the sidecar hears the streamer.
    pub connected: bool,
    /// From Postgres' commit to the first look that saw it, in milliseconds.
    pub lags: VecDeque<f64>,
}

impl Edge {
    pub async fn start(streamer: &Streamer, place: Place) -> Edge {
        let proxy = Proxy::to(streamer.address()).await;
        let replica = Replica::config(streamer)
            .token(place.name)
            .subscribe(place.shape)
            .through(&proxy)
            .start()
            .await;
        Edge {
            place,
            replica,
            proxy,
            seen: Arc::default(),
        }
    }

    pub fn file(&self) -> PathBuf {
        self.replica.file()
    }

    /// Bytes that came down the wire.
    pub fn bytes(&self) -> u64 {
        self.proxy.bytes(Way::Down)
    }

    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Looks at the file, as any program could, until it is told to stop.
    pub fn watch(&self, tasks: &mut JoinSet<anyhow::Result<u64>>, stopping: CancellationToken) {
        let (path, seen) = (self.file(), self.seen.clone());
        let names: Vec<&str> = self.place.tables.iter().map(|(name, _)| *name).collect();
        let counts: Vec<_> = names
            .iter()
            .map(|name| format!("(SELECT count(*) FROM {name})"))
            .collect();
        let count = format!("SELECT {}", counts.join(" + "));
        tasks.spawn(async move {
            let sqlite = file::open(&path)?;
            let (mut last, mut looks) = (0.0, 0u64);
            while !stopping.is_cancelled() {
                let made: f64 = sqlite.query_row(
                    "SELECT ifnull(unixepoch(commit_time, 'subsec'), 0.0) FROM _anabranch_status",
                    [],
                    |row| row.get(0),
                )?;
                let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
                if made > last {
                    let mut seen = lock(&seen);
                    if last > 0.0 {
                        if seen.lags.len() == LAGS_MAX {
                            seen.lags.pop_front();
                        }
                        seen.lags.push_back((now - made) * 1e3);
                    }
                    last = made;
                }
                // Counting is dear, and the board is drawn once a second.
                if looks.is_multiple_of(200) {
                    let rows = sqlite.query_row(&count, [], |row| row.get(0))?;
                    let (position, pending, rejected, connected) = sqlite.query_row(
                        "SELECT lsn, pending, rejected, connected FROM _anabranch_status",
                        [],
                        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
                    )?;
                    let mut seen = lock(&seen);
                    (seen.rows, seen.position) = (rows, position);
                    (seen.pending, seen.rejected) = (pending, rejected);
                    seen.connected = connected;
                }
                looks += 1;
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Ok(0)
        });
    }

    /// A program that writes its file, if there is one.
    pub fn writer(&self) -> Option<Writer> {
        self.place.writes.map(|org| Writer {
            name: self.place.name,
            file: self.file(),
            org,
        })
    }

    /// Cuts it off from the streamer.
    pub fn go_offline(&self) {
        self.proxy.set(|faults| faults.refuse());
        self.proxy.cut(Cut::Reset);
    }

    /// Lets it connect again.
    pub fn go_online(&self) {
        self.proxy.set(|faults| faults.heal());
    }

    /// Equal to what Postgres answers.
    pub async fn prove(&self, database: &Database) -> anyhow::Result<()> {
        self.replica.until_caught_up(database).await;
        let tables: Vec<_> = self
            .place
            .tables
            .iter()
            .map(|(name, sql)| (*name, sql.as_str()))
            .collect();
        select::compare_file(database, &self.file(), &tables).await?;
        println!("  {}: equal in {} tables", self.place.name, tables.len());
        Ok(())
    }

    pub async fn stop(self) {
        self.replica.terminate().await;
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
