//! Drops answers, and counts how many.
//!
//! An answer is the row of `anabranch.replicas` that comes down with the effects. To drop some, nothing of what the
//! streamer says gets through to a replica until Postgres has more of its transactions, and then the connection is cut:
//! what the file does not know then was answered in vain.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anabranch_tests::{
    peers::Replica,
    postgres::Database,
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};
use rand::{Rng, rngs::StdRng};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_postgres::Client;

/// Of all answers, so many are dropped.
pub const DROPPED_PERCENT: i64 = 30;

/// How long to wait for transactions to arrive that are to be answered in vain: something else may be broken.
const PATIENCE: Duration = Duration::from_secs(3);

/// Between two looks at what Postgres has.
const LOOK_EVERY: Duration = Duration::from_millis(25);

type Claimed = HashMap<String, i64>;

/// What Postgres has of each replica, looked at again and again, through all its restarts.
pub struct Claims {
    newest: watch::Receiver<Claimed>,
    looking: JoinHandle<()>,
}

impl Claims {
    pub fn watch(database: Arc<Database>) -> Self {
        let (tell, newest) = watch::channel(Claimed::new());
        let looking = tokio::spawn(async move {
            let mut client: Option<Client> = None;
            let mut tick = tokio::time::interval(LOOK_EVERY);
            loop {
                tick.tick().await;
                if client.is_none() {
                    client = database.try_connect().await.ok();
                }
                let Some(connected) = &client else { continue };
                match connected
                    .query("SELECT replica, seq FROM anabranch.replicas", &[])
                    .await
                {
                    Ok(rows) => {
                        let claimed = rows.iter().map(|row| (row.get(0), row.get(1)));
                        tell.send_replace(claimed.collect());
                    }
                    Err(_) => client = None,
                }
            }
        });
        Self { newest, looking }
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

/// One that drops a replica's answers.
struct Dropper {
    replica: String,
    file: Arc<Replica>,
    link: Arc<Proxy>,
    claims: watch::Receiver<Claimed>,
    at_once_max: i64,
}

/// All of them, until they are stopped.
pub struct Droppers {
    all: JoinSet<()>,
    dropped: watch::Sender<i64>,
}

impl Droppers {
    /// For each replica with its link. `at_once_max`: answers that are dropped before the connection is cut.
    pub fn start(
        claims: &Claims,
        pairs: impl Iterator<Item = (Arc<Replica>, Arc<Proxy>, StdRng)>,
        at_once_max: i64,
    ) -> Self {
        let mut all = JoinSet::new();
        let dropped = watch::Sender::new(0);
        for (file, link, rng) in pairs {
            let dropper = Dropper {
                replica: file
                    .open()
                    .query_row("SELECT replica_id FROM _anabranch_state", [], |row| {
                        row.get(0)
                    })
                    .unwrap(),
                file,
                link,
                claims: claims.newest.clone(),
                at_once_max,
            };
            all.spawn(dropper.run(rng, dropped.clone()));
        }
        Self { all, dropped }
    }

    /// How many answers were dropped.
    pub async fn stop(mut self) -> i64 {
        self.all.shutdown().await;
        *self.dropped.borrow()
    }
}

impl Dropper {
    async fn run(mut self, mut rng: StdRng, dropped: watch::Sender<i64>) {
        let mut all_in_vain = 0;
        loop {
            let from = self.claimed();
            let more = rng.random_range(1..=self.at_once_max);
            self.link.set(|faults| faults.swallow(Way::Down));
            let _ = tokio::time::timeout(PATIENCE, self.until(from + more)).await;
            let claimed = self.claimed();
            let in_vain = (claimed - self.answered().await).max(0);
            self.link.heal_anew();
            dropped.send_modify(|dropped| *dropped += in_vain);
            all_in_vain += in_vain;
            // As many get through as it takes to come to the share; what else is broken is healed by the next round.
            let share = self.until(all_in_vain * 100 / DROPPED_PERCENT);
            let _ = tokio::time::timeout(PATIENCE, share).await;
        }
    }

    fn claimed(&self) -> i64 {
        let claims = self.claims.borrow();
        claims.get(&self.replica).copied().unwrap_or_default()
    }

    async fn until(&mut self, seq: i64) {
        let Self {
            claims, replica, ..
        } = self;
        let reached = claims.wait_for(|claims| claims.get(replica).is_some_and(|at| *at >= seq));
        if reached.await.is_err() {
            // Nobody looks any more: this is about to be stopped.
            std::future::pending::<()>().await;
        }
    }

    /// Up to where the file knows what became of its transactions.
    async fn answered(&self) -> i64 {
        until("the file can be read", DEADLINE, || async {
            self.file.open().query_row(
                "SELECT coalesce(max(seq), 0) FROM _anabranch_local WHERE answered_lsn IS NOT NULL",
                [],
                |row| row.get(0),
            )
        })
        .await
    }
}
