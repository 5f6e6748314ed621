//! Nothing leaves the streamer for a replica that its shapes never showed it: under kills, cuts, moves, catch-ups, other claims,
//! tokens that end, other shapes, and writes that Postgres refuses.
//!
//! Each row version carries random words. Postgres itself says after each transaction which of them each replica's shapes show;
//! every byte that was sent to the replica, its file with WAL and free pages, and all logs and pages are searched for all others.
//! `ANABRANCH_LEAK_STEPS` says how many faults there are, `ANABRANCH_LEAK_SEEDS` how many seeds in a row.

mod canary;
mod data;
mod tenant;
mod wire;

use std::{collections::BTreeMap, fs, path::PathBuf, time::Instant};

use anabranch_proto::Lsn;
use anabranch_tests::{
    caller::{self, hello},
    issuer::{LEEWAY_SECONDS, Signer, at},
    oracle::select::compare_file,
    peers::{Peer, Replica, Streamer, TOKEN},
    postgres::{Database, Server},
    proxy::{Cut, Proxy, Way},
    seed::Seed,
    wait::{DEADLINE, until},
};
use rand::{
    Rng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};
use serde_json::json;
use tempfile::TempDir;

use self::{
    canary::Canaries,
    data::{Data, Definitions, PERSONS, TABLES, TEAMS},
    tenant::{Away, Tenant},
};

/// Faults where nobody says how many.
const STEPS: usize = 40;

/// Replicas, each with claims of its own, and what they subscribe to: of those that are served together no SELECT looks into
/// other tables.
const TENANTS: [&[&str]; 4] = [
    &TABLES,
    &TABLES,
    &TABLES,
    &["projects", "bookings", "number"],
];

/// Faults between two looks into everything.
const LOOK_EVERY: usize = 6;

/// How long a token that ends lives, leeway included.
const LIFE_SECONDS: i64 = 3;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
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

/// What a program writes, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Write {
    Accepted,
    /// DETAIL has the slot, which the writer chose.
    SlotOfAnother,
    /// DETAIL has the span of a row of another team.
    SpanOfAnother,
    /// DETAIL has the whole row, with the secret.
    Unchecked,
    KeyOfAnother,
    OutOfShape,
    /// Of a row that went to another team meanwhile.
    Missing,
}

const FAULTS: [Fault; 19] = [
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

struct Scene {
    database: Database,
    streamer: Streamer,
    signer: Signer,
    dir: TempDir,
    rng: StdRng,
    canaries: Canaries,
    definitions: Definitions,
    tenants: Vec<Tenant>,
    /// The last transaction, which `number` holds.
    number: i64,
    next_id: i64,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    faults: BTreeMap<Fault, usize>,
    transactions: usize,
    rolled_back: usize,
    returns: usize,
    returns_with_other_claims: usize,
    catch_ups: f64,
    /// Words that were shown only while somebody was away, and so must not come.
    only_while_away: usize,
    looks: usize,
    /// Words found where they may be, over all looks.
    found: usize,
    outcomes: BTreeMap<String, i64>,
    body_bytes: usize,
    log_bytes: usize,
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_sent_what_its_shapes_do_not_show() {
    let steps = number("ANABRANCH_LEAK_STEPS", STEPS);
    let first = Seed::new();
    for turn in 0..number("ANABRANCH_LEAK_SEEDS", 1) as u64 {
        let seed = Seed(first.0.wrapping_add(turn));
        println!("{seed}");
        let start = Instant::now();
        let mut scene = Scene::start(seed.rng("leak")).await;
        scene.run(steps).await;
        let counts = &scene.counts;
        println!(
            "{seed}: {} words, {:?}: {counts:#?}",
            scene.canaries.count(),
            start.elapsed()
        );
        if steps > FAULTS.len() {
            let missing = FAULTS
                .iter()
                .find(|fault| !counts.faults.contains_key(fault));
            assert_eq!(missing, None, "it never happened");
            assert!(
                counts.rolled_back > 0 && counts.returns_with_other_claims > 0 && counts.found > 0,
                "{counts:?}"
            );
            for outcome in ["error", "insert_exists", "out_of_shape", "update_missing"] {
                assert!(
                    counts.outcomes.contains_key(outcome),
                    "{outcome}: {counts:?}"
                );
            }
        }
    }
}

impl Scene {
    async fn start(mut rng: StdRng) -> Scene {
        let database = Server::shared().await.database().await;
        let (mut canaries, mut next_id) = (Canaries::default(), 1000);
        let setup = Data {
            rng: &mut rng,
            canaries: &mut canaries,
            number: 0,
            next_id: &mut next_id,
        }
        .setup();
        database.execute(&setup).await;
        let dir = TempDir::new().unwrap();
        let signer = Signer::new("a");
        let (key, revoked) = (dir.path().join("issuer.pem"), dir.path().join("revoked"));
        fs::write(&key, signer.public_pem()).unwrap();
        fs::write(&revoked, "").unwrap();
        let definitions = Definitions::default();
        let streamer = Streamer::config(&database)
            .env("RUST_LOG", "trace")
            // The least that is taken, and with it the smallest queues.
            .set("memory_max", "64MiB")
            .set("shape", definitions.shapes())
            .set("auth.jwt.public_key_file", key.to_str().unwrap())
            .set("auth.revoked_file", revoked.to_str().unwrap())
            .start()
            .await;
        let mut scene = Scene {
            database,
            streamer,
            signer,
            dir,
            rng,
            canaries,
            definitions,
            tenants: Vec::new(),
            number: 0,
            next_id,
            counts: Counts::default(),
        };
        for place in 0..TENANTS.len() {
            scene.join(place as i64 + 1).await;
        }
        scene
    }

    async fn join(&mut self, who: i64) {
        let subject = format!("tenant-{who}");
        let proxy = Proxy::to(self.streamer.address()).await;
        let mut config = Replica::config(&self.streamer)
            .env("RUST_LOG", "trace")
            .set("zstd", false)
            .token_file(&self.token_file(&subject))
            .through(&proxy);
        let tables = TENANTS[who as usize - 1];
        for table in tables {
            config = config.subscribe(table);
        }
        let claims = (who, (who - 1) % TEAMS + 1);
        self.tenants.push(Tenant::new(
            config.prepare(),
            tables,
            proxy,
            subject,
            claims,
        ));
        let place = self.tenants.len() - 1;
        self.say_token(place, 3600);
        self.observe().await;
        self.tenants[place].replica.start().await;
    }

    async fn run(&mut self, steps: usize) {
        self.look().await;
        let mut faults = Vec::new();
        for step in 1..=steps {
            if faults.is_empty() {
                faults = FAULTS.to_vec();
                faults.shuffle(&mut self.rng);
            }
            self.transactions(1..4).await;
            let fault = faults.pop().expect("there are some");
            println!("step {step}, transaction {}: {fault:?}", self.number);
            self.fault(fault).await;
            self.transactions(0..4).await;
            for place in 0..TENANTS.len() {
                if self.rng.random_bool(0.4) {
                    self.come_back(place, self.comes_as_another()).await;
                }
            }
            if step % LOOK_EVERY == 0 {
                self.look().await;
            }
        }
        for place in 0..TENANTS.len() {
            self.come_back(place, false).await;
        }
        self.look().await;
        self.note_catch_ups().await;
        self.count_outcomes();
    }

    async fn transactions(&mut self, how_many: std::ops::Range<usize>) {
        for _ in 0..self.rng.random_range(how_many) {
            let sql = self.data(|data| data.transaction());
            self.commit(&sql).await;
        }
    }

    fn data<T>(&mut self, make: impl FnOnce(&mut Data<'_>) -> T) -> T {
        make(&mut Data {
            rng: &mut self.rng,
            canaries: &mut self.canaries,
            number: self.number + 1,
            next_id: &mut self.next_id,
        })
    }

    /// In a transaction that tells its number, or in one that is rolled back.
    async fn commit(&mut self, sql: &str) {
        if self.rng.random_ratio(1, 10) {
            self.counts.rolled_back += 1;
            let sql = format!("BEGIN; {sql} ROLLBACK");
            return self.database.execute(&sql).await;
        }
        self.commit_for_good(sql).await;
    }

    async fn commit_for_good(&mut self, sql: &str) {
        self.number += 1;
        self.counts.transactions += 1;
        let number = self.number;
        self.database
            .execute(&format!(
                "BEGIN; INSERT INTO number VALUES ({number}); {sql} COMMIT"
            ))
            .await;
        self.observe().await;
    }

    /// Asks Postgres what it shows to whom.
    async fn observe(&mut self) {
        for place in 0..self.tenants.len() {
            let tenant = &self.tenants[place];
            let selects = tenant.selects(self.definitions).into_iter();
            let rows: Vec<_> = selects
                .map(|(_, select)| format!("SELECT t::text FROM ({select}) t"))
                .collect();
            let rows = self.database.query(&rows.join(" UNION ALL "), &[]).await;
            let text: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
            let shown = self.canaries.found(text.join("\n").as_bytes());
            self.tenants[place].sees(self.number, shown);
        }
    }

    async fn fault(&mut self, fault: Fault) {
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
    fn comes_as_another(&self) -> bool {
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

    async fn cut(&mut self, place: usize) {
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
    async fn note_catch_ups(&mut self) {
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

    fn token_file(&self, subject: &str) -> PathBuf {
        self.dir.path().join(subject)
    }

    /// A newer token, for so many seconds without the leeway.
    fn say_token(&mut self, place: usize, seconds: i64) {
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
    async fn come_back(&mut self, place: usize, with_other_claims: bool) {
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

    /// A program writes a booking, and is answered.
    async fn write(&mut self, place: usize, write: Write) {
        let secret = self.data(|data| data.canary("bookings.secret"));
        self.database
            .execute(&format!("UPDATE words SET word = '{secret}'"))
            .await;
        let (note, of_span) = (self.written(place, "note"), self.written(place, "span"));
        self.next_id += 1;
        let team = self.tenants[place].team;
        let foreign =
            format!("SELECT id, slot, team FROM bookings WHERE team <> {team} ORDER BY id LIMIT 1");
        let foreign = &self.database.query(&foreign, &[]).await[0];
        let (foreign_id, foreign_slot, foreign_team): (i32, i32, i32) =
            (foreign.get(0), foreign.get(1), foreign.get(2));
        let own = self.next_id;
        let id = match write {
            Write::KeyOfAnother => i64::from(foreign_id),
            _ => own,
        };
        let team = match write {
            Write::OutOfShape => i64::from(foreign_team),
            _ => team,
        };
        let slot = match write {
            Write::SlotOfAnother => i64::from(foreign_slot),
            _ => own,
        };
        let span = match write {
            Write::SpanOfAnother => format!("[{foreign_id:04}a,{foreign_id:04}zz)"),
            _ => format!("[{own:04}{of_span},{own:04}z)"),
        };
        let note = match write {
            Write::Unchecked => format!("no {note}"),
            _ => note,
        };
        self.tenants[place].program(&format!(
            "INSERT INTO bookings (id, team, span, slot, note) VALUES ({id}, {team}, '{span}', {slot}, '{note}')"
        ));
        self.answered(place).await;
    }

    /// A word that a program makes up.
    fn written(&mut self, place: usize, column: &str) -> String {
        let of = format!("bookings.{column}, by {}", self.tenants[place].subject);
        let canary = self.canaries.make(&mut self.rng, &of);
        self.tenants[place].writes(&canary);
        canary
    }

    async fn answered(&mut self, place: usize) {
        let file = self.tenants[place].replica.open();
        until("the write is answered", DEADLINE, || async {
            let pending: i64 =
                file.query_row("SELECT pending FROM _anabranch_status", [], |row| {
                    row.get(0)
                })?;
            anyhow::ensure!(pending == 0, "{pending} pending");
            Ok(())
        })
        .await;
        self.observe().await;
    }

    /// While it is cut off a booking becomes another team's, with other words, and a program that does not know changes it.
    async fn write_missing(&mut self, place: usize) {
        let row = self
            .database
            .query("SELECT min(id) FROM bookings", &[])
            .await;
        let id: i32 = row[0].get(0);
        let mine = self.tenants[place].team;
        self.give(id, mine).await;
        self.tenants[place].until_at(self.number).await;
        self.cut(place).await;
        self.give(id, mine % TEAMS + 1).await;
        let note = self.written(place, "note");
        let sql = format!("UPDATE bookings SET note = '{note}' WHERE id = {id}");
        self.tenants[place].program(&sql);
        self.come_back(place, false).await;
        self.answered(place).await;
    }

    /// A booking becomes a team's.
    async fn give(&mut self, id: i32, team: i64) {
        let sql = self.data(|data| {
            let (note, secret) = (data.canary("bookings.note"), data.canary("bookings.secret"));
            format!(
                "UPDATE bookings SET team = {team}, note = '{note}', secret = '{secret}' WHERE id = {id};"
            )
        });
        self.commit_for_good(&sql).await;
    }

    /// Into everything.
    async fn look(&mut self) {
        self.counts.looks += 1;
        // What should not have come may also be why nothing comes any more.
        for tenant in &mut self.tenants {
            tenant.judge(&self.canaries);
        }
        let there = |tenant: &&mut Tenant| tenant.away.is_none();
        for tenant in self.tenants.iter_mut().filter(there) {
            tenant.until_at(self.number).await;
            tenant.begins_anew(&self.canaries);
            let found = tenant.judge_files(&self.canaries);
            self.counts.found += tenant.judge_blindness(&found);
            for page in ["/status", "/metrics", "/healthz", "/readyz"] {
                judge_page(&self.canaries, &tenant.replica, page).await;
            }
            // The claims and the definitions are what they are believed to be.
            let selects = tenant.selects(self.definitions);
            let tables: Vec<_> = selects
                .iter()
                .map(|(table, sql)| (*table, &**sql))
                .collect();
            compare_file(&self.database, &tenant.replica.file(), &tables)
                .await
                .unwrap_or_else(|difference| panic!("{}: {difference:#}", tenant.subject));
        }
        for tenant in self.tenants.iter().filter(|tenant| tenant.away.is_some()) {
            tenant.judge_files(&self.canaries);
        }
        self.streamer.until_ready().await;
        for page in ["/", "/status", "/metrics"] {
            judge_page(&self.canaries, &self.streamer, page).await;
        }
        let log = self.streamer.log();
        let found = self.canaries.found_in_log(log.as_bytes());
        assert!(found.is_empty(), "the streamer's log has {found:?}");
        self.counts.log_bytes = log.len();
        self.counts.body_bytes = self.tenants.iter().map(|tenant| tenant.body_bytes).sum();
    }

    /// How often what was written came to what.
    fn count_outcomes(&mut self) {
        for tenant in &self.tenants {
            let file = tenant.replica.open();
            let mut outcomes = file
                .prepare("SELECT outcome, count(*) FROM _anabranch_rejected GROUP BY 1")
                .unwrap();
            let outcomes = outcomes.query_map([], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?))
            });
            for (outcome, count) in outcomes.unwrap().map(Result::unwrap) {
                *self.counts.outcomes.entry(outcome).or_default() += count;
            }
        }
    }
}

/// A page tells of rows to nobody.
async fn judge_page(canaries: &Canaries, peer: &Peer, page: &str) {
    let answer = peer.get(page).await.expect("it answers");
    let found = canaries.found_in_log(answer.body.as_bytes());
    assert!(
        found.is_empty(),
        "{page} of {} has {found:?}",
        peer.address()
    );
}

/// The search sees what gRPC tells as a header, packed by HTTP/2: here the name of a claim.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_on_the_wire_is_not_found() {
    let mut rng = Seed::new().rng("leak");
    let mut canaries = Canaries::default();
    let word = canaries.make(&mut rng, "a claim that no token has");
    let database = Server::shared().await.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let streamer = Streamer::config(&database)
        .shape("s", &["SELECT * FROM t WHERE id = $id"])
        .set("shape.s.params.id.claim", &*word)
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    proxy.record();
    let channel = caller::channel(&proxy.address()).await;
    let refused = caller::replicate(channel, Some(TOKEN), hello("r", "s")).await;
    let status = refused.expect_err("it is refused");
    assert!(status.message().contains(&word), "{status:?}");
    let record = proxy.recorded(Way::Down);
    let plain = canaries.found(&record);
    assert!(plain.is_empty(), "it is not packed any more");
    let carried = wire::Connection::default().read(&record);
    let mut texts = carried.texts();
    let found = texts.any(|text| canaries.found(&text).contains(&word));
    assert!(found, "{word} is not found in {record:?}");
}
