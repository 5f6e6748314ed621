//! Writers in other processes, with SQLites of their own, write the file at the same time as the replica applies what comes from
//! Postgres. None of them gets `SQLITE_BUSY`, all that they wrote arrives, and each local transaction arrives as the one that it was.
//!
//! `ANABRANCH_WRITERS_SECONDS=60` makes it long. Whoever says how long also has the machine for it: then it is a verdict on speed
//! too.

mod engine;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    seed::Seed,
    wait::{DEADLINE, until},
};
use engine::{ENGINES, Engine};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use tokio::task::JoinSet;

/// How long programs write where nobody says it.
const SECONDS: u64 = 4;

/// Rows a second that Postgres changes.
const FEED_ROWS: u32 = 5_000;

/// Transactions a second in which it does.
const FEED_TRANSACTIONS: u32 = 100;

/// How far the replica may be behind at the end of the run, where that is a verdict on speed.
const BEHIND_MAX: Duration = Duration::from_secs(5);

/// How often every row of `feed` is changed while the replica does not look.
const BACKLOG_ROUNDS: u32 = 15;

/// What a program asks of SQLite; what it must not have to ask again.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// `log` tells which transaction of Postgres wrote which tag, how often.
const TABLES: &str = "
    CREATE TABLE parts (id bigint PRIMARY KEY, tag text NOT NULL, pad text NOT NULL);
    CREATE TABLE marks (id int PRIMARY KEY, tag text NOT NULL, n int NOT NULL);
    INSERT INTO marks SELECT g, '', 0 FROM generate_series(0, 9) g;
    CREATE TABLE log (tag text NOT NULL, xid xid8 NOT NULL DEFAULT pg_current_xact_id());
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.log(tag) VALUES (NEW.tag); RETURN NULL; END $$;
    CREATE TRIGGER note AFTER INSERT OR UPDATE ON parts FOR EACH ROW EXECUTE FUNCTION note();
    CREATE TRIGGER note AFTER UPDATE ON marks FOR EACH ROW EXECUTE FUNCTION note();
    CREATE TABLE feed (id int PRIMARY KEY, n bigint NOT NULL, pad text NOT NULL);
    INSERT INTO feed SELECT g, 0, repeat('x', 100) FROM generate_series(0, 19999) g";

const PARTS: &str = "SELECT * FROM parts";
const MARKS: &str = "SELECT * FROM marks";
const FEED: &str = "SELECT * FROM feed";

/// A program: which SQLite, on which file, and what it did.
struct Program {
    engine: Engine,
    place: usize,
    file: PathBuf,
    chance: StdRng,
    /// The next id of `parts`, and the next tag.
    next: u64,
    /// Tags that it committed.
    committed: u64,
    longest: Duration,
}

impl Program {
    /// Writes until it is told to stop. The tag of a transaction says how many rows it writes.
    fn write(mut self, stop: &AtomicBool) -> Program {
        let mut sql = self.engine.open(&self.file);
        sql.run(&format!(
            "PRAGMA busy_timeout = {}",
            BUSY_TIMEOUT.as_millis()
        ))
        .unwrap();
        while !stop.load(SeqCst) {
            if self.chance.random_ratio(1, 20) {
                for pragma in self.settings() {
                    sql.run(&pragma).unwrap();
                }
            }
            for statement in self.transaction() {
                let began = Instant::now();
                if let Err(error) = sql.run(&statement) {
                    panic!(
                        "{:?}, {statement}, after {:?}: {error}",
                        self.engine,
                        began.elapsed()
                    );
                }
                self.longest = self.longest.max(began.elapsed());
            }
            thread::park_timeout(Duration::from_millis(self.chance.random_range(0..30)));
        }
        self
    }

    fn settings(&mut self) -> [String; 2] {
        let synchronous = ["OFF", "NORMAL", "FULL"].choose(&mut self.chance).unwrap();
        let pages = [0, 1, 1_000].choose(&mut self.chance).unwrap();
        [
            format!("PRAGMA synchronous = {synchronous}"),
            format!("PRAGMA wal_autocheckpoint = {pages}"),
        ]
    }

    fn transaction(&mut self) -> Vec<String> {
        let rows = self.chance.random_range(1..6);
        let tag = format!("{}-{}-{rows}", self.place, self.next);
        let mut statements: Vec<String> = Vec::new();
        let kind = self.chance.random_range(0..8);
        if kind == 0 {
            // Without BEGIN: rows of one statement.
            let values: Vec<String> = (0..rows).map(|_| self.values(&tag)).collect();
            statements.push(format!("INSERT INTO parts VALUES {}", values.join(", ")));
            self.committed += 1;
            return statements;
        }
        let begins = ["BEGIN IMMEDIATE", "BEGIN", "SAVEPOINT outermost"];
        let begin = *begins.choose(&mut self.chance).unwrap();
        statements.push(begin.into());
        for row in 0..rows {
            statements.push(self.one(&tag, row));
        }
        if kind == 1 {
            statements.push("SAVEPOINT gone".into());
            statements.push(self.one("gone", 0));
            statements.push("ROLLBACK TO gone".into());
        }
        statements.push(match (kind, begin) {
            (2, _) => "ROLLBACK".into(),
            (_, "SAVEPOINT outermost") => "RELEASE outermost".into(),
            _ => "COMMIT".into(),
        });
        self.committed += u64::from(kind != 2);
        statements
    }

    /// Writes one row.
    fn one(&mut self, tag: &str, row: u64) -> String {
        if row % 3 == 1 {
            let place = self.place;
            return format!("UPDATE marks SET tag = '{tag}', n = n + 1 WHERE id = {place}");
        }
        format!("INSERT INTO parts VALUES {}", self.values(tag))
    }

    fn values(&mut self, tag: &str) -> String {
        let id = self.place as u64 * 1_000_000_000 + self.next;
        self.next += 1;
        format!("({id}, '{tag}', 'xxxxxxxxxxxxxxxxxxxx')")
    }
}

/// A program that does to the WAL what a program may, and one that reads for a second at a time. Says how many checkpoints got
/// through, and how long one took at most.
fn disturb(file: &Path, stop: &AtomicBool) -> (u64, Duration) {
    let (mut done, mut longest) = (0, Duration::ZERO);
    let open = || {
        let connection = rusqlite::Connection::open(file).unwrap();
        connection.busy_timeout(BUSY_TIMEOUT).unwrap();
        connection
    };
    let (reader, checkpointer) = (open(), open());
    for round in 0.. {
        if stop.load(SeqCst) {
            break;
        }
        let holds = round % 3 == 0;
        if holds {
            reader
                .execute_batch("BEGIN; SELECT count(*) FROM marks")
                .unwrap();
        }
        thread::park_timeout(Duration::from_secs(1));
        if holds {
            reader.execute_batch("COMMIT").unwrap();
        }
        let began = Instant::now();
        let mode = ["TRUNCATE", "RESTART", "FULL"][round % 3];
        let busy: bool = checkpointer
            .query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |row| {
                row.get(0)
            })
            .unwrap();
        // At once where somebody else's checkpoint is under way: that is not waited for.
        assert!(
            !busy || began.elapsed() < BUSY_TIMEOUT,
            "wal_checkpoint({mode}) waited in vain"
        );
        longest = longest.max(began.elapsed());
        done += u64::from(!busy);
    }
    (done, longest)
}

/// Changes rows in Postgres, at the pace of [`FEED_ROWS`] if the machine can. Says how many.
async fn feed(database: &Database, stop: &AtomicBool, fed: &AtomicU64) {
    let client = database.connect().await;
    let rows = FEED_ROWS / FEED_TRANSACTIONS;
    let change = client
        .prepare("UPDATE feed SET n = n + 1 WHERE id >= $1 AND id < $2")
        .await
        .unwrap();
    let mut pace = tokio::time::interval(Duration::from_secs(1) / FEED_TRANSACTIONS);
    for round in 0.. {
        if stop.load(SeqCst) {
            return;
        }
        pace.tick().await;
        let from = (round * rows % 20_000) as i32;
        let changed = client
            .execute(&change, &[&from, &(from + rows as i32)])
            .await
            .unwrap();
        fed.fetch_add(changed, SeqCst);
    }
}

/// A replica whose file programs write.
struct Stage {
    database: Database,
    replica: Replica,
    _streamer: Streamer,
    stop: Arc<AtomicBool>,
    programs: JoinSet<Program>,
}

const TABLES_OF_FILE: [(&str, &str); 3] = [("parts", PARTS), ("marks", MARKS), ("feed", FEED)];

impl Stage {
    async fn start() -> Stage {
        let database = Server::shared().await.database().await;
        database.execute(TABLES).await;
        let streamer = Streamer::config(&database)
            .shape("written", &[PARTS, MARKS])
            .shape("feed", &[FEED])
            .set("shape.written.writable", true)
            .start()
            .await;
        let replica = Replica::config(&streamer)
            .subscribe("written")
            .subscribe("feed")
            .start()
            .await;
        replica.until_equal(&database, &TABLES_OF_FILE).await;
        Stage {
            database,
            replica,
            _streamer: streamer,
            stop: Arc::default(),
            programs: JoinSet::new(),
        }
    }

    /// Has programs write, one of each SQLite.
    fn write(&mut self, seed: Seed) {
        for (place, engine) in ENGINES.into_iter().enumerate() {
            let program = Program {
                engine,
                place,
                file: self.replica.file(),
                chance: seed.rng(&format!("{engine:?}")),
                next: 0,
                committed: 0,
                longest: Duration::ZERO,
            };
            let stop = self.stop.clone();
            self.programs.spawn_blocking(move || program.write(&stop));
        }
    }

    /// Ends them; says how many transactions they committed.
    async fn stop(&mut self) -> u64 {
        self.stop.store(true, SeqCst);
        let mut committed = 0;
        while let Some(ended) = self.programs.join_next().await {
            let program = ended.expect("no writer gets an error");
            committed += program.committed;
            println!(
                "{:?}: {} transactions, the longest statement {:?}",
                program.engine, program.committed, program.longest
            );
        }
        let held = self
            .replica
            .metric("anabranch_replica_write_lock_max_seconds")
            .await
            .unwrap();
        println!("the replica held the write lock for {held} s at most");
        committed
    }

    /// All that they committed is in Postgres, as the transactions that it was.
    async fn check(&self, committed: u64, patience: Duration) {
        let file = self.replica.open();
        until("all local writes are answered", patience, || async {
            let counts = "SELECT pending, rejected FROM _anabranch_status";
            file.query_row(counts, [], |row| Ok((row.get(0)?, row.get(1)?)))
                .map_err(|error| error.to_string())
                .and_then(|counts: (i64, i64)| match counts {
                    (0, 0) => Ok(()),
                    counts => Err(format!("pending and rejected: {counts:?}")),
                })
        })
        .await;
        self.replica
            .until_equal(&self.database, &TABLES_OF_FILE)
            .await;
        let client = self.database.connect().await;
        // Of each tag: all its rows, once, by one transaction, which is of no other tag.
        let row = client
            .query_one(
                "SELECT count(*), count(*) FILTER (WHERE n = split_part(tag, '-', 3)::int AND xids = 1),
                        (SELECT count(DISTINCT xid) FROM log)
                 FROM (SELECT tag, count(*) n, count(DISTINCT xid) xids FROM log GROUP BY tag) tags",
                &[],
            )
            .await
            .unwrap();
        let found: Vec<i64> = (0..3).map(|place| row.get(place)).collect();
        assert_eq!(found, [committed as i64; 3], "tags, whole ones, and xids");
    }
}

impl Drop for Stage {
    /// A test that fails ends all programs too.
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_gets_busy_or_its_transactions_are_torn_or_merged() {
    let wanted = std::env::var("ANABRANCH_WRITERS_SECONDS").ok();
    let wanted: Option<u64> = wanted.map(|text| text.parse().expect("a number"));
    let length = Duration::from_secs(wanted.unwrap_or(SECONDS));
    let mut stage = Stage::start().await;
    stage.write(Seed::new());
    let (file, stopped) = (stage.replica.file(), stage.stop.clone());
    let disturber = tokio::task::spawn_blocking(move || disturb(&file, &stopped));

    let (began, fed) = (Instant::now(), AtomicU64::new(0));
    let before = stage
        .replica
        .metric("anabranch_replica_rows_total")
        .await
        .unwrap();
    tokio::select! {
        () = feed(&stage.database, &stage.stop, &fed) => {}
        () = tokio::time::sleep(length) => {}
        Some(ended) = stage.programs.join_next() => { ended.expect("no writer gets an error"); }
    }
    let took = began.elapsed();
    let applied = stage
        .replica
        .metric("anabranch_replica_rows_total")
        .await
        .unwrap()
        - before;
    let behind = Instant::now();
    stage.replica.until_caught_up(&stage.database).await;
    let behind = behind.elapsed();
    let committed = stage.stop().await;
    let checkpoints = disturber.await.expect("no checkpoint waits in vain");
    let per_second = |rows: f64| rows / took.as_secs_f64();
    let fed = per_second(fed.into_inner() as f64);
    println!(
        "{took:?}: Postgres changed {fed:.0} rows/s, {:.0} rows/s were applied, and the rest after {behind:?}; \
         {checkpoints:?} checkpoints and the longest",
        per_second(applied),
    );
    stage.check(committed, DEADLINE.max(length)).await;
    if wanted.is_some() {
        assert!(behind < BEHIND_MAX, "{behind:?}");
        let enough = f64::from(FEED_ROWS) * 0.95;
        assert!(fed > enough, "Postgres is too slow for this run");
    }
}

/// As long as it is behind, a replica has the next transaction to apply as soon as one is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_gets_busy_while_the_replica_catches_up() {
    let mut stage = Stage::start().await;
    stage.replica.pause();
    let client = stage.database.connect().await;
    for _ in 0..BACKLOG_ROUNDS {
        for place in 0..20 {
            let change = format!("UPDATE feed SET n = n + 1 WHERE id / 1000 = {place}");
            client.batch_execute(&change).await.unwrap();
        }
    }
    stage.write(Seed::new());
    stage.replica.resume();
    let behind = Instant::now();
    stage.replica.until_caught_up(&stage.database).await;
    println!("{} rows in {:?}", BACKLOG_ROUNDS * 20_000, behind.elapsed());
    let committed = stage.stop().await;
    stage.check(committed, DEADLINE).await;
}
