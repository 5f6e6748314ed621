//! What goes wrong.

use std::{fs, path::PathBuf, time::Instant};

use anabranch_proto::Lsn;
use anabranch_tests::{
    issuer::{LEEWAY_SECONDS, at},
    proxy::{Cut, Way},
    wait::{DEADLINE, until},
};
use rand::{Rng, seq::IndexedRandom};
use serde_json::json;

use super::{
    Scene, TENANTS,
    data::{PERSONS, TEAMS},
    tenant::Away,
    writes::Write,
};

/// How long a token that ends lives, leeway included.
const LIFE_SECONDS: i64 = 3;

/// One of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    StreamerKilled,
    ShapesChanged,
    ReplicaKilled,
    ConnectionCut,
    ConnectionTorn,
    ConnectionStalled,
    ClaimsChanged,
    TokenEnded,
    SubjectRevoked,
    Moves,
    Write(Write),
}

/// In each round.
pub const FAULTS: [Fault; 19] = [
    Fault::StreamerKilled,
    Fault::ShapesChanged,
    Fault::ShapesChanged,
    Fault::ReplicaKilled,
    Fault::ReplicaKilled,
    Fault::ConnectionCut,
    Fault::ConnectionTorn,
    Fault::ConnectionStalled,
    Fault::ClaimsChanged,
    Fault::TokenEnded,
    Fault::SubjectRevoked,
    Fault::Moves,
    Fault::Write(Write::Accepted),
    Fault::Write(Write::SlotOfAnother),
    Fault::Write(Write::SpanOfAnother),
    Fault::Write(Write::Unchecked),
    Fault::Write(Write::KeyOfAnother),
    Fault::Write(Write::OutOfShape),
    Fault::Write(Write::Missing),
];

impl Scene {
    pub async fn fault(&mut self, fault: Fault) {
        let place = self.somebody().await;
        *self.counts.faults.entry(fault).or_default() += 1;
        match fault {
            Fault::StreamerKilled => {
                self.segments();
                self.note_catch_ups().await;
                self.streamer.kill();
                self.transactions(0..4).await;
                self.streamer.spawn();
            }
            Fault::ShapesChanged => self.change_shapes().await,
            Fault::ReplicaKilled => {
                self.perhaps_caught_up(place).await;
                self.tenants[place].replica.kill();
                self.tenants[place].leaves(Away::Killed).await;
            }
            Fault::ConnectionCut => {
                self.perhaps_caught_up(place).await;
                self.cut(place).await;
            }
            Fault::ConnectionTorn => {
                let bytes = self.rng.random_range(1..3000);
                let how = *[Cut::Reset, Cut::Close].choose(&mut self.rng).expect("two");
                self.tenants[place]
                    .proxy
                    .set(|faults| faults.cut_after(Way::Down, bytes, how));
                self.transactions(2..6).await;
                self.tenants[place].proxy.heal_anew();
            }
            Fault::ConnectionStalled => {
                self.tenants[place]
                    .proxy
                    .set(|faults| faults.stall(Way::Down));
                self.transactions(5..12).await;
                self.tenants[place].proxy.set(|faults| faults.heal());
            }
            Fault::ClaimsChanged => self.change_claims(place).await,
            Fault::TokenEnded => {
                self.say_token(place, LIFE_SECONDS - LEEWAY_SECONDS);
                self.until_refused(place).await;
            }
            Fault::SubjectRevoked => {
                self.tenants[place].revoked = true;
                self.say_revoked().await;
                self.until_refused(place).await;
            }
            Fault::Moves => {
                let sql = self.data(|data| data.moves());
                self.commit(&sql).await;
            }
            Fault::Write(Write::Missing) => self.write_missing(place).await,
            Fault::Write(write) => self.write(place, write).await,
        }
        if self.tenants[place].away.is_some() {
            self.visit(place).await;
        }
    }

    /// Rows come that one would see that is away, and go before it is back.
    async fn visit(&mut self, place: usize) {
        let (me, team) = (self.tenants[place].me, self.tenants[place].team);
        let (comes, goes) = self.data(|data| data.visit(me, team));
        self.commit_for_good(&comes).await;
        self.transactions(0..2).await;
        self.commit_for_good(&goes).await;
    }

    /// One that is there, and is no longer busy.
    async fn somebody(&mut self) -> usize {
        let place = self.rng.random_range(0..TENANTS.len());
        self.come_back(place, self.comes_as_another()).await;
        self.tenants[place].until_at(self.number).await;
        place
    }

    /// Every third that comes back.
    pub fn comes_as_another(&self) -> bool {
        self.counts.returns % 3 == 1
    }

    async fn perhaps_caught_up(&mut self, place: usize) {
        let burst = self.rng.random();
        if burst {
            self.transactions(3..8).await;
        } else {
            self.tenants[place].until_at(self.number).await;
        }
    }

    /// Each that is there begins a new segment: what it had before it asks for again.
    fn segments(&mut self) {
        for tenant in self
            .tenants
            .iter_mut()
            .filter(|tenant| tenant.away.is_none())
        {
            tenant.begins_anew(&self.canaries);
        }
    }

    pub async fn cut(&mut self, place: usize) {
        let tenant = &mut self.tenants[place];
        tenant.proxy.set(|faults| faults.refuse());
        tenant.proxy.cut(Cut::Reset);
        tenant.leaves(Away::Cut).await;
    }

    async fn change_shapes(&mut self) {
        self.segments();
        // It may have been started a moment ago.
        self.streamer.until_ready().await;
        self.note_catch_ups().await;
        assert!(self.streamer.terminate().await.success());
        self.definitions.change(&mut self.rng);
        let shapes = self.definitions.shapes();
        self.streamer.rewrite(|config| {
            config.insert("shape".into(), shapes.into());
        });
        self.observe().await;
        self.transactions(0..3).await;
        self.streamer.start().await;
    }

    /// Before it ends: then it counts anew.
    pub async fn note_catch_ups(&mut self) {
        // It may have just been started.
        let counted = self.streamer.metric("anabranch_streamer_catch_ups_total");
        self.counts.catch_ups += counted.await.unwrap_or_default();
    }

    fn other_claims(&mut self, place: usize) {
        let tenant = &mut self.tenants[place];
        let before = (tenant.me, tenant.team);
        while (tenant.me, tenant.team) == before {
            tenant.me = self.rng.random_range(1..=PERSONS);
            tenant.team = self.rng.random_range(1..=TEAMS);
        }
    }

    /// Nothing is committed until they count.
    async fn change_claims(&mut self, place: usize) {
        let streams = self.streams(place).await.expect("it runs");
        self.other_claims(place);
        self.say_token(place, 3600);
        self.observe().await;
        until("it begins anew", DEADLINE, || async {
            self.streams(place).await.is_ok_and(|now| now > streams)
        })
        .await;
        self.tenants[place].until_at(self.number).await;
    }

    /// How many it has begun.
    async fn streams(&self, place: usize) -> anyhow::Result<f64> {
        let replica = &self.tenants[place].replica;
        replica.metric("anabranch_replica_streams_total").await
    }

    pub fn token_file(&self, subject: &str) -> PathBuf {
        self.dir.path().join(subject)
    }

    /// A newer token, for so many seconds without the leeway.
    pub fn say_token(&mut self, place: usize, seconds: i64) {
        let tenant = &self.tenants[place];
        let claims = json!({
            "sub": tenant.subject, "me": tenant.me, "team": tenant.team, "exp": at(seconds),
            "jti": self.rng.random::<u32>().to_string(),
        });
        let (file, newer) = (
            self.token_file(&tenant.subject),
            self.dir.path().join("newer"),
        );
        fs::write(&newer, self.signer.token(&claims)).unwrap();
        fs::rename(newer, file).unwrap();
    }

    /// Says who is not let in.
    async fn say_revoked(&self) {
        let revoked = self.tenants.iter().filter(|tenant| tenant.revoked);
        let lines: String = revoked
            .map(|tenant| format!("sub {}\n", tenant.subject))
            .collect();
        let newer = self.dir.path().join("newer");
        fs::write(&newer, &lines).unwrap();
        fs::rename(newer, self.dir.path().join("revoked")).unwrap();
        until("the streamer knows who is revoked", DEADLINE, || async {
            let status = self.streamer.get("/status").await?.json()?;
            anyhow::ensure!(
                status["revoked"]["entries"] == json!(lines.lines().count()),
                "{status}"
            );
            Ok(())
        })
        .await;
    }

    /// Transactions go on until its stream ends, since it is not let in any more.
    async fn until_refused(&mut self, place: usize) {
        let start = Instant::now();
        loop {
            let status = self.tenants[place]
                .replica
                .get("/status")
                .await
                .unwrap()
                .json()
                .unwrap();
            if status["last_error"]
                .as_str()
                .unwrap_or_default()
                .starts_with("UNAUTHENTICATED")
            {
                break;
            }
            assert!(start.elapsed() < DEADLINE, "its stream goes on: {status}");
            self.transactions(0..2).await;
        }
        self.tenants[place].leaves(Away::Refused).await;
    }

    /// The mirror has all that was committed while it was away, so that this is not shown on the way.
    pub async fn come_back(&mut self, place: usize, with_other_claims: bool) {
        let Some(away) = self.tenants[place].away else {
            return;
        };
        let lsn = self.database.lsn().await;
        until("the mirror has it all", DEADLINE, || async {
            let status = self.streamer.get("/status").await?.json()?;
            let at: Lsn = status["lsn"].as_str().unwrap_or_default().parse()?;
            anyhow::ensure!(at >= lsn, "it is at {at}");
            Ok(())
        })
        .await;
        self.counts.returns += 1;
        if with_other_claims {
            self.counts.returns_with_other_claims += 1;
            self.other_claims(place);
        }
        self.tenants[place].begins_anew(&self.canaries);
        self.observe().await;
        self.counts.only_while_away += self.tenants[place].missed_for_good();
        if std::mem::take(&mut self.tenants[place].revoked) {
            self.say_revoked().await;
        }
        if with_other_claims || away == Away::Refused {
            self.say_token(place, 3600);
        }
        match away {
            Away::Killed => self.tenants[place].replica.spawn(),
            Away::Cut => self.tenants[place].proxy.set(|faults| faults.heal()),
            Away::Refused => {}
        }
        // Else it may come at any later transaction.
        if self.rng.random_bool(0.7) {
            self.tenants[place].until_at(self.number).await;
        }
    }
}
