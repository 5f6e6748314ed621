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
        history::{self, Remembered, Verdict},
        replication::Replication,
        setup::Membership,
        sql::{Client, Error},
        stream::{self, Closed, Limits, Observed},
        target::Target,
    },
    session,
    start::{WATCH_EVERY, watch},
    table::{Oid, Table},
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
    /// The tables that are followed.
    pub tables: Arc<HashMap<Oid, Arc<Table>>>,
    /// The membership of each in the publication.
    pub memberships: BTreeMap<Oid, Membership>,
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

impl Source {
    /// Streams until `stopping`, or until an error that trying again does not mend.
    pub async fn run(self, stopping: CancellationToken) -> Result<(), Error> {
        let mut backoff = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            let ended = self.connection(&stopping).await;
            if stopping.is_cancelled() {
                return Ok(());
            }
            let disconnected = engine::Source {
                lsn: Lsn(0),
                connected: false,
            };
            session::send(&self.inputs, Input::Source(disconnected));
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
    async fn connection(&self, stopping: &CancellationToken) -> Result<(), Error> {
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
        tokio::select! {
            ended = &mut streaming => ended,
            ended = self.tend(&client) => {
                // The stream has to end by itself: its last event must come before the next stream's first.
                cut.cancel();
                let _ = streaming.await;
                ended
            }
        }
    }

    /// Proves that the mirror's history goes on at this server; a replication connection, and where to begin.
    async fn prove(&self, client: &Client) -> Result<(Replication, Lsn), Error> {
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
    async fn tend(&self, client: &Client) -> Result<(), Error> {
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
            let row = client
                .client
                .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
                .await?;
            let connected = engine::Source {
                lsn: row.get::<_, String>(0).parse().unwrap_or_default(),
                connected: true,
            };
            session::send(&self.inputs, Input::Source(connected));
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Stops the tables that can't be followed any more.
    async fn look(&self, client: &Client) -> Result<(), Error> {
        let tables: Vec<_> = self.tables.values().cloned().collect();
        let found = watch(client, &self.publication, &tables, &self.memberships).await?;
        for (table, reason) in found {
            session::send(&self.inputs, Input::Stop(table, reason));
        }
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

/// Between a half and one, evenly: enough to spread, never near zero.
fn random_part() -> f64 {
    let mut byte = [0];
    // Without random numbers the wait is the longest, which is safe.
    match aws_lc_rs::rand::fill(&mut byte) {
        Ok(()) => 0.5 + f64::from(byte[0]) / 510.0,
        Err(_) => 1.0,
    }
}
