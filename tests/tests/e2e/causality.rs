//! Five replicas that write, and partitions of all kinds between them, the streamer and Postgres: whatever a program reads, of
//! its own and of others, pending or not, is whole, in order, with all that led to it, and stays. After each run everything
//! heals, and all must be equal soon.
//!
//! The checker and its data are in `anabranch_tests::oracle::causality`. `ANABRANCH_CAUSALITY=200` makes so many runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anabranch_tests::{
    oracle::causality::{Checker, Event, Read, Session, Value, Wrote},
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server},
    proxy::{Cut, Proxy, Way},
    seed::Seed,
    wait::{DEADLINE, until},
};
use rand::{Rng, rngs::StdRng};
use rusqlite::{Connection, TransactionBehavior, params};

const WRITERS: usize = 5;

const KEYS: usize = 4;

/// Where nobody says how many.
const RUNS: u64 = 3;

/// Local transactions of each writer in a run.
const TRANSACTIONS: i64 = 24;

/// A run has about so many changes of the network.
const CHANGES: i64 = 12;

/// One of so many transactions is refused by Postgres.
const DOOMED_EVERY: u32 = 8;

/// Between two steps of a program at most: it lasts through some changes then, and sees what is between them.
const PAUSE_MS: std::ops::Range<u64> = 0..50;

/// How soon all must be equal when everything is healed.
const CONVERGED_WITHIN: Duration = Duration::from_secs(10);

/// The log comes last in a transaction, so that what is doomed has done all else before.
const TABLES: &str = "
    CREATE TABLE registers (run int, key int, top bigint NOT NULL DEFAULT 0, w0 text, w1 text, w2 text, w3 text, w4 text,
                            PRIMARY KEY (run, key));
    CREATE TABLE log (run int, writer int, number bigint, doomed bool NOT NULL CHECK (NOT doomed),
                      PRIMARY KEY (run, writer, number));
    CREATE FUNCTION greatest_top(saw registers, wrote registers, there registers) RETURNS registers LANGUAGE plpgsql AS
    $$ BEGIN wrote.top := greatest(wrote.top, there.top); RETURN wrote; END $$";

const REGISTERS: &str = "SELECT * FROM registers";
const LOG: &str = "SELECT * FROM log";

/// One program: its own connection to the file of one replica, and all that it did.
struct Program {
    connection: Connection,
    run: i64,
    replica: usize,
    events: Vec<Event>,
}

impl Program {
    fn open(file: &PathBuf, run: i64, replica: usize) -> Self {
        let connection = Connection::open(file).unwrap();
        connection.busy_timeout(Duration::from_secs(5)).unwrap();
        Self {
            connection,
            run,
            replica,
            events: Vec::new(),
        }
    }

    fn read(&mut self) {
        let transaction = self.connection.transaction().unwrap();
        let read = read_file(&transaction, self.run, self.replica).unwrap();
        transaction.commit().unwrap();
        // One that saw the same as before tells nothing new, whatever it is checked for.
        if !matches!(self.events.last(), Some(Event::Read(last)) if *last == read) {
            self.events.push(Event::Read(read));
        }
    }

    fn write(&mut self, number: i64, chance: &mut StdRng) {
        let doomed = chance.random_ratio(1, DOOMED_EVERY);
        let mut keys: BTreeSet<usize> = (0..KEYS).filter(|_| chance.random()).collect();
        keys.insert(chance.random_range(0..KEYS));
        let (run, replica) = (self.run, self.replica);
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .unwrap();
        let read = read_file(&transaction, run, replica).unwrap();
        // Above all that it saw, and no other writer's.
        let round = read.tops.iter().max().unwrap() / WRITERS as i64 + 1;
        let top = round * WRITERS as i64 + replica as i64;
        let mut seen = read.lasting();
        if !doomed {
            for key in &keys {
                seen[key * WRITERS + replica] = number;
            }
        }
        let value = Value {
            number,
            doomed,
            seen,
        };
        let set_top = if doomed { "" } else { ", top = ?4" };
        let sql = format!(
            "UPDATE registers SET w{replica} = ?3{set_top} WHERE run = ?1 AND key = ?2 RETURNING ?4"
        );
        for key in &keys {
            let mut update = transaction.prepare_cached(&sql).unwrap();
            update
                .query_row(params![run, *key as i64, value.text(), top], |_| Ok(()))
                .unwrap();
        }
        transaction
            .execute(
                "INSERT INTO log(run, writer, number, doomed) VALUES(?1, ?2, ?3, ?4)",
                params![run, replica as i64, number, doomed],
            )
            .unwrap();
        transaction.commit().unwrap();
        self.events.push(Event::Read(read));
        self.events.push(Event::Wrote(Wrote {
            number,
            doomed,
            keys,
            top,
        }));
    }

    fn ended(self) -> Session {
        Session {
            replica: self.replica,
            events: self.events,
        }
    }
}

/// Everything of a run, as a file shows it in one transaction.
fn read_file(file: &Connection, run: i64, replica: usize) -> rusqlite::Result<Read> {
    let mut read = empty();
    let mut registers =
        file.prepare_cached("SELECT key, top, w0, w1, w2, w3, w4 FROM registers WHERE run = ?1")?;
    let mut rows = registers.query([run])?;
    while let Some(row) = rows.next()? {
        let texts: Vec<Option<String>> = (2..2 + WRITERS)
            .map(|place| row.get(place))
            .collect::<rusqlite::Result<_>>()?;
        put(&mut read, row.get(0)?, row.get(1)?, &texts);
    }
    let mut log = file.prepare_cached("SELECT writer, number, doomed FROM log WHERE run = ?1")?;
    let mut rows = log.query([run])?;
    while let Some(row) = rows.next()? {
        let writer = usize::try_from(row.get::<_, i64>(0)?).unwrap();
        read.log[writer].insert(row.get(1)?, row.get(2)?);
    }
    let mut rejected = file.prepare_cached(
        "SELECT key ->> 2 FROM _anabranch_rejected
         WHERE table_name = 'log' AND key ->> 0 = ?1 AND key ->> 1 = ?2",
    )?;
    let mut rows = rejected.query(params![run, replica as i64])?;
    while let Some(row) = rows.next()? {
        read.rejected.insert(row.get(0)?);
    }
    Ok(read)
}

fn empty() -> Read {
    Read {
        values: vec![Value::default(); KEYS * WRITERS],
        tops: vec![0; KEYS],
        log: vec![BTreeMap::new(); WRITERS],
        rejected: BTreeSet::new(),
    }
}

fn put(read: &mut Read, key: i64, top: i64, texts: &[Option<String>]) {
    let key = usize::try_from(key).unwrap();
    read.tops[key] = top;
    for (writer, text) in texts.iter().enumerate() {
        read.values[key * WRITERS + writer] = Value::parse(text.as_deref());
    }
}

/// The same as Postgres has it.
async fn read_postgres(
    client: &tokio_postgres::Client,
    run: i64,
) -> Result<Read, tokio_postgres::Error> {
    let mut read = empty();
    let registers =
        "SELECT key::bigint, top, w0, w1, w2, w3, w4 FROM registers WHERE run = $1::bigint";
    for row in client.query(registers, &[&run]).await? {
        let texts: Vec<_> = (2..2 + WRITERS).map(|place| row.get(place)).collect();
        put(&mut read, row.get(0), row.get(1), &texts);
    }
    let log = "SELECT writer, number, doomed FROM log WHERE run = $1::bigint";
    for row in client.query(log, &[&run]).await? {
        let writer = usize::try_from(row.get::<_, i32>(0)).unwrap();
        read.log[writer].insert(row.get(1), row.get(2));
    }
    Ok(read)
}

/// What is wrong with one link. A connection that lost bytes must be cut when it is healed.
struct Link {
    proxy: Proxy,
    lost: bool,
}

impl Link {
    fn break_somehow(&mut self, chance: &mut StdRng) {
        let ways = [vec![Way::Up], vec![Way::Down], vec![Way::Up, Way::Down]];
        let ways = ways[chance.random_range(0..3)].clone();
        let each = |change: fn(&mut anabranch_tests::proxy::Faults, Way)| {
            self.proxy
                .set(|faults| ways.iter().for_each(|&way| change(faults, way)));
        };
        let how = [Cut::Reset, Cut::Close][chance.random_range(0..2)];
        match chance.random_range(0..7) {
            0 => self.proxy.cut(how),
            1 => each(|faults, way| faults.stall(way)),
            // Half-open, or answers are lost, or questions.
            2 => {
                self.lost = true;
                each(|faults, way| faults.swallow(way));
            }
            3 => {
                self.proxy.set(|faults| faults.refuse());
                self.proxy.cut(how);
            }
            4 => {
                self.lost = true;
                self.proxy.set(|faults| faults.hang());
                self.proxy.cut(how);
            }
            5 => each(|faults, way| faults.delay(way, Duration::from_millis(30))),
            _ => {
                let bytes = chance.random_range(1..5_000);
                self.proxy
                    .set(|faults| faults.cut_after(ways[0], bytes, how));
            }
        }
    }

    fn heal(&mut self) {
        match std::mem::take(&mut self.lost) {
            true => self.proxy.heal_anew(),
            false => self.proxy.set(|faults| faults.heal()),
        }
    }
}

/// Programs end when this is dropped: also when the test fails, which waits for them.
#[derive(Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Everything that lasts through all runs.
struct Scene {
    server: Server,
    database: Database,
    _streamer: Streamer,
    replicas: Vec<Replica>,
    /// Those of the replicas, and that of the streamer to Postgres.
    links: Vec<Link>,
    counts: Counts,
}

/// What the runs were made of.
#[derive(Debug, Default)]
struct Counts {
    breaks: usize,
    written: usize,
    doomed: usize,
    reads: usize,
}

impl Counts {
    fn add(&mut self, sessions: &[Session]) {
        for event in sessions.iter().flat_map(|session| &session.events) {
            match event {
                Event::Read(_) => self.reads += 1,
                Event::Wrote(wrote) => {
                    self.written += 1;
                    self.doomed += usize::from(wrote.doomed);
                }
            }
        }
    }
}

impl Scene {
    async fn start() -> Self {
        let server = Server::start(Options::new()).await;
        let database = server.database().await;
        database.execute(TABLES).await;
        let to_postgres = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
        let streamer = Streamer::config(&database)
            .through(&to_postgres, &database)
            .shape("causal", &[REGISTERS, LOG])
            .set("shape.causal.writable", true)
            .toml("[table.\"public.registers\"]\nconflict = { function = \"public.greatest_top\" }")
            .start()
            .await;
        let mut replicas = Vec::new();
        let mut links = Vec::new();
        for _ in 0..WRITERS {
            let proxy = Proxy::to(streamer.address()).await;
            let config = Replica::config(&streamer).through(&proxy);
            replicas.push(config.subscribe("causal").start().await);
            links.push(Link { proxy, lost: false });
        }
        links.push(Link {
            proxy: to_postgres,
            lost: false,
        });
        Self {
            server,
            database,
            _streamer: streamer,
            replicas,
            links,
            counts: Counts::default(),
        }
    }

    /// One run: programs, partitions, healing, and the verdict. Says how long it took to be equal after that.
    async fn run(&mut self, run: i64, seed: Seed) -> Duration {
        let sql =
            format!("INSERT INTO registers SELECT {run}, g FROM generate_series(0, {KEYS} - 1) g");
        self.database.execute(&sql).await;
        for replica in &self.replicas {
            replica.until_caught_up(&self.database).await;
        }
        let written = Arc::new(AtomicI64::new(0));
        let stop = Stop::default();
        let mut programs = tokio::task::JoinSet::new();
        for (place, replica) in self.replicas.iter().enumerate() {
            for writes in [true, false] {
                let program = Program::open(&replica.file(), run, place);
                let chance = seed.rng(&format!("run {run}, program {place}, {writes}"));
                let (written, stop) = (written.clone(), stop.0.clone());
                let count = if writes { TRANSACTIONS } else { 0 };
                programs.spawn_blocking(move || work(program, chance, count, &written, &stop));
            }
        }
        let mut chance = seed.rng(&format!("run {run}, network"));
        let all = TRANSACTIONS * WRITERS as i64;
        while written.load(SeqCst) < all {
            let more = chance.random_range(1..2 * all / CHANGES);
            let next = all.min(written.load(SeqCst) + more);
            let reached = until("programs write", DEADLINE, || async {
                written.load(SeqCst) >= next
            });
            tokio::select! {
                () = reached => {}
                Some(ended) = programs.join_next() => panic!("a program ended: {:?}", ended.err()),
            }
            for link in &mut self.links {
                match chance.random_range(0..6) {
                    0 | 1 => {
                        self.counts.breaks += 1;
                        link.break_somehow(&mut chance);
                    }
                    2 | 3 => link.heal(),
                    _ => {}
                }
            }
        }
        self.links.iter_mut().for_each(Link::heal);
        let healed = Instant::now();
        self.until_equal(run).await;
        let converged = healed.elapsed();
        drop(stop);
        let mut sessions = Vec::new();
        while let Some(ended) = programs.join_next().await {
            sessions.push(ended.expect("a program does what it may"));
        }
        self.counts.add(&sessions);
        let violations = Checker::new(WRITERS, &sessions).check(true);
        assert!(violations.is_empty(), "run {run}: {violations:#?}");
        converged
    }

    async fn until_equal(&self, run: i64) {
        let client = self.server.connect(self.database.name()).await;
        until("all are equal again", CONVERGED_WITHIN, || async {
            let expected = read_postgres(&client, run).await?;
            for (place, replica) in self.replicas.iter().enumerate() {
                let file = replica.open();
                let mut read = read_file(&file, run, place)?;
                read.rejected.clear();
                let pending: i64 =
                    file.query_row("SELECT pending FROM _anabranch_status", [], |row| {
                        row.get(0)
                    })?;
                anyhow::ensure!(pending == 0, "{pending} are pending in replica {place}");
                anyhow::ensure!(
                    read == expected,
                    "replica {place} has {read:?}, not {expected:?}"
                );
            }
            Ok(())
        })
        .await;
    }
}

/// Writes so many transactions, and reads, until it is told to stop.
fn work(
    mut program: Program,
    mut chance: StdRng,
    count: i64,
    written: &AtomicI64,
    stop: &AtomicBool,
) -> Session {
    let mut number = 0;
    loop {
        let last = stop.load(SeqCst);
        program.read();
        if last {
            return program.ended();
        }
        if number < count {
            number += 1;
            program.write(number, &mut chance);
            written.fetch_add(1, SeqCst);
            program.read();
        }
        std::thread::park_timeout(Duration::from_millis(chance.random_range(PAUSE_MS)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_sees_a_write_without_what_led_to_it_or_never_again() {
    let wanted = std::env::var("ANABRANCH_CAUSALITY").ok();
    let runs = wanted.map_or(RUNS, |text| text.parse().expect("a number"));
    let seed = Seed::new();
    let mut scene = Scene::start().await;
    let mut took = Vec::new();
    for run in 1..=runs {
        took.push(scene.run(run as i64, seed).await);
    }
    took.sort_unstable();
    let at = |part: usize| took[(took.len() - 1) * part / 100];
    println!(
        "{runs} runs, {:?}, without a violation; equal after healing within {:?} (least), {:?} (half), {:?} (9 of 10), {:?} (all)",
        scene.counts,
        at(0),
        at(50),
        at(90),
        at(100),
    );
}
