//! Random shapes over random tables, random transactions, and kills on both sides: whenever Postgres is quiet, each replica has
//! what Postgres itself answers to the words of its shapes.
//!
//! `ANABRANCH_MOVES_TRANSACTIONS` says how many transactions there are for each seed, `ANABRANCH_MOVES_SEEDS` how many seeds in
//! a row; `ANABRANCH_SEED` which one.

use std::{env, time::Instant};

use anabranch_tests::{
    nested::{Principal, Schema, Shape, generator},
    oracle::select::compare_file,
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    seed::{Seed, VARIABLE},
};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use super::transactions::{PAD, ROWS_MAX, Transactions};

/// Transactions where nobody says how many.
const TRANSACTIONS: usize = 120;

/// Shapes of a seed.
const SHAPES: usize = 200;

/// Replicas, each with claims of its own.
const REPLICAS: usize = 6;

/// Each has as many of the shapes; so each shape is somebody's.
const SHAPES_EACH: usize = 40;

/// Different values, about.
const WIDTH: i64 = 8;

/// Transactions between two kills.
const BATCH: usize = 10;

struct Scene {
    database: Database,
    schema: Schema,
    shapes: Vec<Shape>,
    streamer: Streamer,
    replicas: Vec<Other>,
    counts: Counts,
}

/// A replica, and what it subscribed to.
struct Other {
    replica: Replica,
    principal: Principal,
    /// By table, its SELECTs with the parameters filled in.
    selects: Vec<(String, Vec<String>)>,
    /// It is there, and does nothing.
    paused: bool,
}

#[derive(Debug, Default)]
struct Counts {
    committed: usize,
    failed: usize,
    checks: usize,
    tables: usize,
    rows: i64,
    streamer_kills: usize,
    streamer_restarts: usize,
    replicas_away: usize,
    replicas_paused: usize,
    catch_ups: u64,
}

fn number(name: &str, default: usize) -> usize {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn random_shapes_equal_what_postgres_says_of_them() {
    let transactions = number("ANABRANCH_MOVES_TRANSACTIONS", TRANSACTIONS);
    let first = Seed::new();
    for turn in 0..number("ANABRANCH_MOVES_SEEDS", 1) as u64 {
        let seed = Seed(first.0.wrapping_add(turn));
        println!("{seed}");
        let start = Instant::now();
        let mut rng = seed.rng("moves");
        let mut scene = Scene::start(&mut rng).await;
        let began = start.elapsed();
        scene.run(&mut rng, transactions).await;
        let levels = |least| {
            scene
                .shapes
                .iter()
                .filter(|s| s.condition.levels() >= least)
                .count()
        };
        println!(
            "{seed}: {} shapes ({} with subqueries, {} of three levels), ready after {began:?}, done after {:?}: {:?}",
            scene.shapes.len(),
            levels(1),
            levels(3),
            start.elapsed(),
            scene.counts
        );
        assert!(
            scene.counts.rows > 0 && scene.counts.checks > 0,
            "{VARIABLE}"
        );
    }
}

impl Scene {
    async fn start(rng: &mut StdRng) -> Scene {
        let database = Server::shared().await.database().await;
        let schema = generator::schema(rng, 6, WIDTH);
        // It takes tables that were never analysed for large ones, and compiles each query for seconds.
        let jit = format!(
            "ALTER DATABASE {} SET jit = off; SET jit = off",
            database.name()
        );
        database.execute(&jit).await;
        database.execute(&schema.sql()).await;
        for table in &schema.tables {
            let table = &table.name;
            let sql = format!(
                "ALTER TABLE {table} ADD COLUMN {PAD} text; ALTER TABLE {table} ALTER {PAD} SET STORAGE EXTERNAL"
            );
            database.execute(&sql).await;
        }
        let mut fill = String::new();
        for table in 0..schema.tables.len() {
            for _ in 0..ROWS_MAX {
                let mut transactions = Transactions {
                    rng,
                    schema: &schema,
                };
                fill += &format!("{};\n", transactions.insert(table));
            }
        }
        database.execute(&fill).await;
        let mut shapes = Vec::new();
        while shapes.len() < SHAPES {
            let shape = generator::shape(rng, &schema, format!("s{}", shapes.len()));
            if rng.random_ratio(1, 10) || tells(rng, &database, &schema, &shape).await {
                shapes.push(shape);
            }
        }
        let principals: Vec<Principal> = (0..REPLICAS)
            .map(|_| generator::principal(rng, schema.width))
            .collect();
        let mut config = Streamer::config(&database)
            // The least that is taken, and with it the smallest queues.
            .set("memory_max", "64MiB");
        for shape in &shapes {
            let path = format!("shape.{}", shape.name);
            for param in shape.params(&schema) {
                config = config.set(&format!("{path}.params.{param}.claim"), param);
            }
            config = config.set(&format!("{path}.tables"), vec![shape.sql(&schema)]);
        }
        for (place, principal) in principals.iter().enumerate() {
            let claims = principal.claims(&format!("replica {place}"));
            config = config.token(&format!("token-{place}"), claims.into());
        }
        let streamer = config.start().await;
        let mut scene = Scene {
            database,
            schema,
            shapes,
            streamer,
            replicas: Vec::new(),
            counts: Counts::default(),
        };
        for (place, principal) in principals.into_iter().enumerate() {
            // Every shape is somebody's.
            let mut chosen: Vec<&Shape> =
                (scene.shapes.iter().skip(place).step_by(REPLICAS)).collect();
            while chosen.len() < SHAPES_EACH {
                let more = scene.shapes.choose(rng).expect("some");
                if chosen.iter().all(|shape| shape.name != more.name) {
                    chosen.push(more);
                }
            }
            scene
                .replicas
                .push(Other::new(&scene, place, principal, &chosen));
        }
        for other in &scene.replicas {
            other.replica.until_ready().await;
        }
        scene
    }

    async fn run(&mut self, rng: &mut StdRng, transactions: usize) {
        let mut left = transactions;
        let mut batch = 0;
        self.check("at first", rng).await;
        while left > 0 {
            batch += 1;
            for _ in 0..BATCH.min(left) {
                left -= 1;
                let mut transactions = Transactions {
                    rng,
                    schema: &self.schema,
                };
                let sql = transactions.any();
                match self.database.try_execute(&sql).await {
                    Ok(()) => self.counts.committed += 1,
                    Err(error) => {
                        // The replicas must not see any of it. A mistake of the test would be seen here.
                        self.counts.failed += 1;
                        assert!(
                            self.counts.failed < 20 + self.counts.committed / 5,
                            "{error:?}\n{sql}"
                        );
                        self.database.execute("ROLLBACK").await;
                    }
                }
            }
            self.disturb(rng).await;
            if batch % 3 == 0 {
                self.check(&format!("after batch {batch}"), rng).await;
            }
        }
        for other in &mut self.replicas {
            other.come_back();
        }
        self.check("in the end", rng).await;
    }

    /// Somebody is killed, or comes back.
    async fn disturb(&mut self, rng: &mut StdRng) {
        match rng.random_range(0..6) {
            0 => {
                self.counts.streamer_kills += 1;
                self.note_catch_ups().await;
                self.streamer.kill();
                self.streamer.spawn();
            }
            1 => {
                self.counts.streamer_restarts += 1;
                self.note_catch_ups().await;
                let status = self.streamer.terminate().await;
                // It may have been started a moment ago, and not know yet how to end in good order.
                let early = std::os::unix::process::ExitStatusExt::signal(&status).is_some();
                assert!(status.success() || early, "{status}");
                self.streamer.spawn();
            }
            _ => {}
        }
        for other in &mut self.replicas {
            match (other.is_there(), rng.random_range(0..10)) {
                (true, 0) => {
                    self.counts.replicas_away += 1;
                    other.replica.kill();
                }
                (true, 1) => {
                    self.counts.replicas_paused += 1;
                    other.replica.pause();
                    other.paused = true;
                }
                (false, 0..4) => other.come_back(),
                _ => {}
            }
        }
    }

    async fn note_catch_ups(&mut self) {
        // It may have just been started.
        let Ok(Ok(page)) = self
            .streamer
            .get("/metrics")
            .await
            .map(|answer| answer.ok())
        else {
            return;
        };
        let name = "anabranch_streamer_catch_ups_total ";
        let count = page.lines().find_map(|line| line.strip_prefix(name));
        self.counts.catch_ups += count.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    }

    /// Whoever is there equals.
    async fn check(&mut self, when: &str, rng: &mut StdRng) {
        let mut any = false;
        for other in &mut self.replicas {
            if !other.is_there() && rng.random_bool(0.3) {
                other.come_back();
            }
            any |= other.is_there();
        }
        if !any {
            self.replicas[0].come_back();
        }
        let lsn = self.database.lsn().await;
        let start = Instant::now();
        for (place, other) in self.replicas.iter().enumerate() {
            if !other.is_there() {
                continue;
            }
            other.replica.until_at(lsn).await;
            self.counts.checks += 1;
            println!(
                "{when}: replica {place} is there after {:?}",
                start.elapsed()
            );
            for (table, selects) in &other.selects {
                self.counts.tables += 1;
                let all = selects.join("\nUNION ");
                let compared =
                    compare_file(&self.database, &other.replica.file(), &[(table, &all)]).await;
                if let Err(difference) = compared {
                    panic!(
                        "{when}: replica {place}, {:?}: {difference:#}\n{}",
                        other.principal,
                        selects.join("\n")
                    );
                }
            }
            let rows = other.selects.iter().map(|(table, _)| {
                let sql = format!("SELECT count(*) FROM {table}");
                let count = other
                    .replica
                    .open()
                    .query_row(&sql, [], |row| row.get::<_, i64>(0));
                count.expect("count rows")
            });
            self.counts.rows += rows.sum::<i64>();
        }
    }
}

/// Whether it shows some of the rows to somebody, and not all of them.
async fn tells(rng: &mut StdRng, database: &Database, schema: &Schema, shape: &Shape) -> bool {
    let table = &schema.tables[shape.table].name;
    let sql = shape.sql_for(schema, &generator::principal(rng, schema.width));
    let sql = format!("SELECT (SELECT count(*) FROM ({sql}) s), (SELECT count(*) FROM {table})");
    let counts = &database.query(&sql, &[]).await[0];
    let (shown, all): (i64, i64) = (counts.get(0), counts.get(1));
    0 < shown && shown < all
}

impl Other {
    fn new(scene: &Scene, place: usize, principal: Principal, shapes: &[&Shape]) -> Other {
        let mut config = Replica::config(&scene.streamer).token(&format!("token-{place}"));
        let mut selects: Vec<(String, Vec<String>)> = Vec::new();
        for shape in shapes {
            config = config.subscribe(&shape.name);
            let table = &scene.schema.tables[shape.table].name;
            let sql = shape.sql_for(&scene.schema, &principal);
            match selects.iter_mut().find(|(other, _)| other == table) {
                Some((_, selects)) => selects.push(sql),
                None => selects.push((table.clone(), vec![sql])),
            }
        }
        let replica = config.prepare();
        replica.spawn();
        Other {
            replica,
            principal,
            selects,
            paused: false,
        }
    }

    fn is_there(&self) -> bool {
        self.replica.pid().is_some() && !self.paused
    }

    fn come_back(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.replica.resume();
        } else if self.replica.pid().is_none() {
            self.replica.spawn();
        }
    }
}
