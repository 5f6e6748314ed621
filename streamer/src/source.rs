//! Keeps the replication connection: verifies history at each connect, streams, and connects again with back-off.
//!
//! What may be tried again is told apart from what may not where the fact is known, in `postgres`. A definite error ends
//! the streamer: going on would mean going over a gap.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anabranch_proto::Lsn;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{self, Input, Inputs},
    events::Waiting,
    metrics::Metrics,
    mirror::{self, Mirror},
    postgres::{
        catalog::defaults,
        check,
        history::{self, Remembered, Verdict},
        replication::Replication,
        sql::{Client, Error},
        stream::{self, Closed, Limits, Observed},
        target::Target,
        witness::Witness,
    },
    session,
    start::{WATCH_EVERY, watch},
    table::{Defaults, Oid, Table},
};

/// The first wait after a lost connection, at most; doubled each time up to [`BACKOFF_MAX`]. The wait is a random part
/// of it, so that several streamers do not come back at once.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// The longest wait: a Postgres that is back is noticed within this time.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A connection that held this long was a good one: the next wait is short again.
const STEADY: Duration = Duration::from_secs(10);

/// How often Postgres is asked how far its WAL has come. What it streams can't tell: a walsender with a backlog says
/// how far it is itself. This is what makes "caught up" true when it is said.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// How long Postgres may take to answer that until nobody is told any more that it is caught up: the time for which
/// replicas believe what they heard. That the connection is lost is known much later if nothing says so.
const ANSWERED_WITHIN: Duration = Duration::from_secs(3);

/// Nobody knows how far Postgres' WAL has come.
const NOT_CONNECTED: engine::Source = engine::Source {
    lsn: Lsn(0),
    connected: false,
};

/// How often it is looked whether something is to be tended.
const TEND_EVERY: Duration = Duration::from_secs(1);

/// What is streamed, from where, to whom.
pub struct Source {
    /// Where Postgres is.
    pub target: Target,
    /// Our slot.
    pub slot: String,
    /// Our publication.
    pub publication: String,
    /// Large transactions are sent before they commit.
    pub streaming: bool,
    /// What it holds back.
    pub retained: Retained,
    /// The tables that are followed.
    pub tables: Arc<HashMap<Oid, Arc<Table>>>,
    /// The witness of each, as of the last look; the mirror has the same.
    pub witnesses: BTreeMap<Oid, Witness>,
    /// What columns hold that an INSERT leaves out, as of the last look.
    pub defaults: Arc<watch::Sender<Arc<Defaults>>>,
    /// In-progress transactions are spooled here.
    pub spool_directory: PathBuf,
    /// Bounds of memory.
    pub limits: Limits,
    /// The engine.
    pub inputs: Inputs,
    /// What it has not yet taken.
    pub waiting: Arc<Waiting>,
    /// What may be confirmed to Postgres.
    pub confirmed: watch::Receiver<Lsn>,
    /// Counted here.
    pub metrics: Arc<Metrics>,
    /// What can be seen of the connection.
    pub observed: Arc<Observed>,
}

/// Whether the slot holds back more WAL than it should, as of the last look.
#[derive(Clone, Copy, Debug)]
pub struct Retained {
    bytes_max: u64,
    above: bool,
}

impl Retained {
    /// Not above `bytes_max`, so far.
    pub fn new(bytes_max: u64) -> Retained {
        Retained {
            bytes_max,
            above: false,
        }
    }

    /// Takes what a look found; whether it has just gone above the limit. What stays above it is not news.
    fn crossed(&mut self, bytes: u64) -> bool {
        let before = std::mem::replace(&mut self.above, bytes > self.bytes_max);
        self.above && !before
    }
}

impl Source {
    /// Streams until `stopping`, or until an error that trying again does not mend.
    pub async fn run(mut self, stopping: CancellationToken) -> Result<(), Error> {
        let mut backoff = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            let ended = self.connection(&stopping).await;
            if stopping.is_cancelled() {
                return Ok(());
            }
            session::send(&self.inputs, Input::Source(NOT_CONNECTED));
            let reason = match ended {
                Ok(()) => "the stream ended".to_owned(),
                Err(Error::Transient(reason)) => reason,
                Err(definite) => return Err(definite),
            };
            self.metrics.disconnects.inc();
            if began.elapsed() >= STEADY {
                backoff = BACKOFF_MIN;
            }
            let wait = backoff.mul_f64(random_part());
            let wait_ms = wait.as_millis() as u64;
            tracing::warn!(reason, wait_ms, "not connected to Postgres");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopping.cancelled() => return Ok(()),
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection, from the proof that history goes on to its end.
    async fn connection(&mut self, stopping: &CancellationToken) -> Result<(), Error> {
        let connecting = async {
            let client = Client::connect(&self.target, "anabranch").await?;
            let (replication, from) = self.prove(&client).await?;
            Ok::<_, Error>((client, replication, from))
        };
        let (client, replication, from) = tokio::select! {
            connected = connecting => connected?,
            () = stopping.cancelled() => return Ok(()),
        };
        tracing::info!(position = %from, "streaming from Postgres");
        let source = stream::Source {
            replication,
            slot: self.slot.clone(),
            from,
            publication: self.publication.clone(),
            streaming: self.streaming,
            tables: (*self.tables).clone(),
            spool_directory: self.spool_directory.clone(),
            limits: self.limits,
        };
        let (inputs, waiting) = (self.inputs.clone(), self.waiting.clone());
        let events = move |events| {
            let events = Input::Events(waiting.admit(events));
            inputs.send(events).map_err(|_| Closed)
        };
        let cut = stopping.child_token();
        let confirmed = self.confirmed.clone();
        let streaming = stream::run(
            source,
            events,
            confirmed,
            cut.clone(),
            self.observed.clone(),
        );
        tokio::pin!(streaming);
        let inputs = self.inputs.clone();
        let ended = tokio::select! {
            ended = &mut streaming => return ended,
            ended = ask(&client, &inputs) => ended,
            ended = self.tend(&client) => ended,
        };
        // The stream has to end by itself: its last event must come before the next stream's first.
        cut.cancel();
        let _ = streaming.await;
        ended
    }

    /// Proves that the mirror's history goes on at this server; a replication connection, and where to begin.
    async fn prove(&mut self, client: &Client) -> Result<(Replication, Lsn), Error> {
        let mut replication = Replication::connect(&self.target, "anabranch").await?;
        let remembered = self.mirror(|mirror| Remembered::read(mirror)).await?;
        let observed =
            history::observe(client, &mut replication, &self.slot, &self.publication).await?;
        match history::judge(&observed, &remembered, &self.slot) {
            Verdict::Continue => {}
            Verdict::Wait { what } => return Err(Error::Transient(what)),
            broken => return Err(Error::Definite(broken.to_string())),
        }
        // Before the first event: a table that lacks changes must not be followed for a moment.
        self.look(client).await?;
        Ok((replication, remembered.position))
    }

    /// Renews the continuity nonce now and then, and looks for schema changes that came without a row.
    async fn tend(&mut self, client: &Client) -> Result<(), Error> {
        let (mut renewed, mut watched) = (None::<Instant>, Instant::now());
        let mut described = self.observed.descriptions();
        loop {
            if renewed.is_none_or(|at| at.elapsed() >= history::RENEW_EVERY) {
                let claim = self.mirror(Remembered::begin_renewal).await?;
                if !history::renew(client, &self.slot, &claim).await? {
                    // The next connect will judge it, with all the words for it.
                    return Err(Error::Transient("the continuity nonce is not ours".into()));
                }
                self.mirror(move |mirror| Remembered::end_renewal(mirror, &claim))
                    .await?;
                renewed = Some(Instant::now());
            }
            // Postgres describes a table anew after whatever may have changed it.
            let described_now = self.observed.descriptions();
            if watched.elapsed() >= WATCH_EVERY || described != described_now {
                self.look(client).await?;
                (watched, described) = (Instant::now(), described_now);
            }
            tokio::time::sleep(TEND_EVERY).await;
        }
    }

    /// Stops the tables that can't be followed any more, and remembers the witnesses of the others; measures what the
    /// slot holds back.
    async fn look(&mut self, client: &Client) -> Result<(), Error> {
        if let Some(bytes) = check::retained(client, &self.slot).await? {
            self.metrics.wal_retained_bytes.set(bytes as i64);
            if self.retained.crossed(bytes) {
                tracing::warn!("{}", check::retains(&self.slot, bytes));
            }
        }
        let tables: Vec<_> = self.tables.values().cloned().collect();
        let found = watch(client, &self.publication, &tables, &self.witnesses).await?;
        let tables: Vec<_> = (tables.into_iter())
            .filter(|table| found.stop.iter().all(|(stopped, _)| *stopped != table.oid))
            .collect();
        for (table, reason) in found.stop {
            session::send(&self.inputs, Input::Stop(table, reason));
        }
        self.look_at_defaults(client, &tables).await?;
        if found.witnesses != self.witnesses {
            let witnesses = found.witnesses.clone();
            self.mirror(move |mirror| Remembered::witnesses(mirror, &witnesses))
                .await?;
            self.witnesses = found.witnesses;
        }
        Ok(())
    }

    /// Tells sessions what columns hold that an INSERT leaves out, where that changed.
    async fn look_at_defaults(&self, client: &Client, tables: &[Arc<Table>]) -> Result<(), Error> {
        let now = defaults::read(&client.client, tables.iter().map(|table| &**table)).await?;
        self.defaults.send_if_modified(|known| {
            let is_new = (now.iter()).any(|(table, of_table)| known.get(table) != Some(of_table));
            if is_new {
                Arc::make_mut(known).extend(now);
            }
            is_new
        });
        Ok(())
    }

    /// Does something with the mirror on the engine's thread, between two groups.
    async fn mirror<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Mirror) -> Result<T, mirror::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let work = Input::Mirror(Box::new(move |mirror| {
            let _ = answer.send(work(mirror)?);
            Ok(())
        }));
        session::send(&self.inputs, work);
        answered
            .await
            .map_err(|_| Error::Transient("the engine stopped".into()))
    }
}

/// Asks Postgres again and again how far its WAL has come, and tells the engine.
async fn ask(client: &Client, inputs: &Inputs) -> Result<(), Error> {
    loop {
        let asked = client
            .client
            .query_one("SELECT pg_current_wal_flush_lsn()::text", &[]);
        tokio::pin!(asked);
        let row = match tokio::time::timeout(ANSWERED_WITHIN, &mut asked).await {
            Ok(answered) => answered?,
            Err(_) => {
                session::send(inputs, Input::Source(NOT_CONNECTED));
                asked.await?
            }
        };
        let text: String = row.try_get(0)?;
        let lsn = text
            .parse()
            .map_err(|_| Error::Definite(format!("Postgres says that its WAL is at {text}")))?;
        let connected = engine::Source {
            lsn,
            connected: true,
        };
        session::send(inputs, Input::Source(connected));
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Between a half and one, evenly: enough to spread, never near zero.
fn random_part() -> f64 {
    let mut byte = [0];
    // Without random numbers the wait is the longest, which is safe.
    match aws_lc_rs::rand::fill(&mut byte) {
        Ok(()) => 0.5 + f64::from(byte[0]) / 510.0,
        Err(_) => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_crossing_of_the_limit_is_told_once_and_not_each_look() {
        let mut retained = Retained::new(100);
        let looks = [0, 100, 101, 500, 101, 100, 99, 101, 102];
        let told = looks.map(|bytes| retained.crossed(bytes));
        assert_eq!(
            told,
            [false, false, true, false, false, false, false, true, false]
        );
    }
}
