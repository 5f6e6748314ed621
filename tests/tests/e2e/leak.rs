//! Nothing leaves the streamer for a replica that its shapes never showed it: under kills, cuts, moves, catch-ups, other claims,
//! tokens that end, other shapes, and writes that Postgres refuses.
//!
//! Each row version carries random words. Postgres itself says after each transaction which of them each replica's shapes show;
//! every byte that was sent to the replica, its file with WAL and free pages, and all logs and pages are searched for all others.
//! `ANABRANCH_LEAK_STEPS` says how many faults there are, `ANABRANCH_LEAK_SEEDS` how many seeds in a row.

mod canary;
mod data;
mod faults;
mod tenant;
mod wire;
mod writes;

use std::{collections::BTreeMap, fs, time::Instant};

use anabranch_tests::{
    caller::{self, hello},
    issuer::Signer,
    oracle::select::compare_file,
    peers::{Peer, Replica, Streamer, TOKEN},
    postgres::{Database, Server},
    proxy::{Proxy, Way},
    seed::Seed,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use tempfile::TempDir;

use self::{
    canary::Canaries,
    data::{Data, Definitions, TABLES, TEAMS},
    faults::{FAULTS, Fault},
    tenant::Tenant,
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
                counts.rolled_back > 0
                    && counts.returns_with_other_claims > 0
                    && counts.only_while_away > 0,
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
            let mut found = tenant.judge_files(&self.canaries);
            // While they were read SQLite may have moved a page from one that was read later to one that was read before.
            found.extend(tenant.judge_files(&self.canaries));
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
        assert!(log.contains("TRACE"), "it logs less than it can");
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
