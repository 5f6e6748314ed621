//! A ledger: five replicas, a program writes each file, and kills, cuts and half-open links meet all of it. Every token is in
//! Postgres once, or its transaction was rejected, and the shared counter has counted just those that are there.
//!
//! Beside all faults, 30 % of the streamer's answers are dropped ([`answers`]).
//!
//! `ANABRANCH_LEDGER=100000` makes it long. Whoever says how many transactions also has the machine for it: then it is a
//! verdict on speed too.

mod answers;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server, Stop},
    proxy::{Cut, Proxy, Way},
    seed::Seed,
    wait::{DEADLINE, until},
};
use rand::{Rng, rngs::StdRng};
use rusqlite::Connection;

use answers::{Claims, Droppers};

const REPLICAS: usize = 5;

/// Local transactions, over all replicas, where nobody says how many.
const TRANSACTIONS: u64 = 300;

/// How soon all must be equal after the last fault, where the run is a verdict on speed.
const CONVERGED_WITHIN: Duration = Duration::from_secs(10);

/// Faults of a short run, about, and one for so many transactions of a long one.
const FAULTS: u64 = 30;
const TRANSACTIONS_PER_FAULT: u64 = 250;

/// In a long run a program that has so many pending waits until some are answered: all of it meets the faults then.
const PENDING_MAX: i64 = 1_000;

/// How many answers are dropped at once at most, in a short run and in a long one.
const DROPPED_AT_ONCE: (i64, i64) = (3, 60);

/// Which share of the answers must have been dropped in a long run, in percent: transactions that are merged have one.
const DROPPED_MIN_PERCENT: i64 = 27;

/// One of so many transactions is refused by Postgres.
const REFUSED_EVERY: u64 = 17;

/// Between two transactions of a program in the short run, so that it lasts through some faults; the long one has as many as
/// can be made.
const PAUSE: Duration = Duration::from_millis(100);

/// `arrived` has no key, so what Postgres made twice is in it twice.
pub(super) const TABLES: &str = "
    CREATE TABLE tokens (token text PRIMARY KEY, note text NOT NULL CHECK (note <> 'forbidden'));
    CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
    INSERT INTO counter VALUES (1, 0);
    CREATE TABLE arrived (token text);
    CREATE FUNCTION arrive() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.arrived VALUES (NEW.token); RETURN NULL; END $$;
    CREATE TRIGGER arrive AFTER INSERT ON tokens FOR EACH ROW EXECUTE FUNCTION arrive()";

pub(super) const TOKENS: &str = "SELECT * FROM tokens";
pub(super) const COUNTER: &str = "SELECT * FROM counter";

/// 1: the token is in the table, or in a rejected transaction, and not in both. All of it is one statement, so one snapshot.
const SEEN: &str = "
    SELECT (SELECT count(*) FROM tokens WHERE token = ?1)
         + (SELECT count(*) FROM _anabranch_rejected WHERE table_name = 'tokens' AND key = '[\"' || ?1 || '\"]')";

/// The same program as [`write`], by another library in another process. A line for each transaction.
const PYTHON: &str = r#"
import random, sqlite3, sys, time
file, name, count, refused_every, pause, seed, seen, pending_max = sys.argv[1:]
count, refused_every, pause, pending_max = int(count), int(refused_every), float(pause), int(pending_max)
chance = random.Random(int(seed))
db = sqlite3.connect(file, timeout=5, isolation_level=None)
def check(n):
    token = f"{name}-{n}"
    found = db.execute(seen, (token,)).fetchone()[0]
    if found != 1:
        sys.exit(f"{token} is seen {found} times")
for n in range(count):
    note = "forbidden" if n % refused_every == 3 else "fine"
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO tokens VALUES(?, ?)", (f"{name}-{n}", note))
    db.execute("UPDATE counter SET n = n + 1 WHERE id = 1")
    db.execute("COMMIT")
    print(n, flush=True)
    check(n)
    check(chance.randrange(n + 1))
    full = time.monotonic()
    while db.execute("SELECT pending FROM _anabranch_status").fetchone()[0] > pending_max:
        if time.monotonic() - full > 30:
            sys.exit("nothing is answered")
        time.sleep(0.02)
    time.sleep(pause)
"#;

/// One program: where it writes, and what.
pub(super) struct Program {
    pub(super) file: PathBuf,
    pub(super) name: String,
    pub(super) count: u64,
    pub(super) pause: Duration,
    pub(super) pending_max: i64,
    pub(super) done: Arc<AtomicU64>,
    /// Ends it before it has made as many; heard by `by_the_library`.
    pub(super) enough: Arc<AtomicBool>,
}

fn note(n: u64) -> &'static str {
    if n % REFUSED_EVERY == 3 {
        "forbidden"
    } else {
        "fine"
    }
}

fn check(connection: &Connection, token: &str) {
    let mut seen = connection.prepare_cached(SEEN).unwrap();
    let times: i64 = seen.query_row([token], |row| row.get(0)).unwrap();
    assert_eq!(times, 1, "how often {token} is seen");
}

fn pending(connection: &Connection) -> i64 {
    let mut pending = connection
        .prepare_cached("SELECT pending FROM _anabranch_status")
        .unwrap();
    pending.query_row([], |row| row.get(0)).unwrap()
}

impl Program {
    /// How many it has made.
    pub(super) fn by_the_library(&self, mut chance: StdRng) -> u64 {
        let mut connection = Connection::open(&self.file).unwrap();
        connection.busy_timeout(Duration::from_secs(5)).unwrap();
        for n in 0..self.count {
            if self.enough.load(SeqCst) {
                return n;
            }
            let token = format!("{}-{n}", self.name);
            let transaction = connection
                .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
                .unwrap();
            transaction
                .execute("INSERT INTO tokens VALUES(?1, ?2)", (&token, note(n)))
                .unwrap();
            transaction
                .execute("UPDATE counter SET n = n + 1 WHERE id = 1", [])
                .unwrap();
            transaction.commit().unwrap();
            self.done.fetch_add(1, SeqCst);
            check(&connection, &token);
            let earlier = chance.random_range(0..=n);
            check(&connection, &format!("{}-{earlier}", self.name));
            let full = Instant::now();
            while pending(&connection) > self.pending_max {
                assert!(full.elapsed() < DEADLINE, "nothing is answered");
                std::thread::park_timeout(Duration::from_millis(20));
            }
            std::thread::park_timeout(self.pause);
        }
        self.count
    }

    fn by_python(&self, mut chance: StdRng) -> u64 {
        let mut python = Command::new("python3")
            .args(["-c", PYTHON])
            .arg(&self.file)
            .arg(&self.name)
            .arg(self.count.to_string())
            .arg(REFUSED_EVERY.to_string())
            .arg(self.pause.as_secs_f64().to_string())
            .arg(chance.random::<u32>().to_string())
            .arg(SEEN)
            .arg(self.pending_max.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        for line in BufReader::new(python.stdout.take().unwrap()).lines() {
            line.unwrap();
            self.done.fetch_add(1, SeqCst);
        }
        assert!(
            python.wait().unwrap().success(),
            "the Python program failed"
        );
        self.count
    }
}

fn count(file: &Path, sql: &str) -> rusqlite::Result<i64> {
    Connection::open(file)?.query_row(sql, [], |row| row.get(0))
}

/// Until no file has anything that is not answered.
pub(super) async fn until_answered(replicas: &[Arc<Replica>]) {
    for replica in replicas {
        replica.until_answered().await;
    }
}

/// All is answered: each of the transactions that every replica's program made is in Postgres once, or is rejected. Says how many
/// are.
pub(super) async fn verdict(database: &Database, replicas: &[Arc<Replica>], made: &[u64]) -> u64 {
    // What was written while no replica ran is merged, so a good transaction may be rejected together with a bad one; but not
    // the other way round.
    let mut refused = 0;
    for (place, (replica, made)) in replicas.iter().zip(made).enumerate() {
        let file = Connection::open(replica.file()).unwrap();
        for n in 0..*made {
            let token = format!("r{place}-{n}");
            check(&file, &token);
            let mut there = file
                .prepare_cached("SELECT 1 FROM tokens WHERE token = ?1")
                .unwrap();
            let is_there = there.exists([&token]).unwrap();
            assert!(!is_there || note(n) == "fine", "{token} is there");
            refused += u64::from(!is_there);
        }
        let outbox = "SELECT count(*) FROM _anabranch_outbox";
        assert_eq!(count(&replica.file(), outbox).unwrap(), 0);
    }
    let applied = made.iter().sum::<u64>() - refused;
    let client = database.connect().await;
    let row = client
        .query_one(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM arrived),
                    (SELECT count(DISTINCT token) FROM arrived), (SELECT n FROM counter)",
            &[],
        )
        .await
        .unwrap();
    let found: Vec<i64> = (0..4).map(|place| row.get(place)).collect();
    assert_eq!(
        found, [applied as i64; 4],
        "tokens, arrivals, distinct ones and the counter"
    );
    refused
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_lost_or_doubled_by_any_fault() {
    let wanted = std::env::var("ANABRANCH_LEDGER").ok();
    let wanted: Option<u64> = wanted.map(|text| text.parse().expect("a number"));
    let each = wanted.unwrap_or(TRANSACTIONS).div_ceil(REPLICAS as u64);
    let all = each * REPLICAS as u64;
    let seed = Seed::new();
    let mut rng = seed.rng("faults");
    let server = Server::start(Options::new()).await;
    let database = Arc::new(server.database().await);
    database.execute(TABLES).await;
    let streamer = Streamer::config(&database)
        .shape("ledger", &[TOKENS, COUNTER])
        .set("shape.ledger.writable", true)
        .toml("[table.\"public.counter\"]\ncolumn.n = \"add\"")
        .start()
        .await;
    let mut links = Vec::new();
    let mut replicas = Vec::new();
    for _ in 0..REPLICAS {
        let link = Arc::new(Proxy::to(streamer.address()).await);
        let replica = Replica::config(&streamer)
            .through(&link)
            .subscribe("ledger")
            .start()
            .await;
        links.push(link);
        replicas.push(Arc::new(replica));
    }

    let done = Arc::new(AtomicU64::new(0));
    let mut programs = tokio::task::JoinSet::new();
    for (place, replica) in replicas.iter().enumerate() {
        let program = Program {
            file: replica.file(),
            name: format!("r{place}"),
            count: each,
            pause: wanted.map_or(PAUSE, |_| Duration::ZERO),
            pending_max: wanted.map_or(i64::MAX, |_| PENDING_MAX),
            done: done.clone(),
            enough: Arc::new(AtomicBool::new(false)),
        };
        let chance = seed.rng(&program.name);
        programs.spawn_blocking(move || match place {
            0 => program.by_python(chance),
            _ => program.by_the_library(chance),
        });
    }

    let at_once = wanted.map_or(DROPPED_AT_ONCE.0, |_| DROPPED_AT_ONCE.1);
    let claims = Claims::watch(database.clone());
    let pairs = replicas.iter().zip(&links).enumerate();
    let pairs = pairs.map(|(place, (replica, link))| {
        (
            replica.clone(),
            link.clone(),
            seed.rng(&format!("answers {place}")),
        )
    });
    let droppers = Droppers::start(&claims, pairs, at_once);

    let mut faults = [0u64; 7];
    let between = wanted.map_or(all / FAULTS, |_| TRANSACTIONS_PER_FAULT);
    while done.load(SeqCst) < all {
        let next = all.min(done.load(SeqCst) + rng.random_range(1..2 * between));
        let reached = until("programs write", DEADLINE, || async {
            done.load(SeqCst) >= next
        });
        tokio::select! {
            () = reached => {}
            Some(ended) = programs.join_next() => { ended.expect("a program sees what it wrote"); }
        }
        let place = rng.random_range(0..REPLICAS);
        let link = &links[place];
        // What was swallowed makes a connection useless, and a budget may have been used up.
        let kind = rng.random_range(0..faults.len());
        faults[kind] += 1;
        match kind {
            0 => {
                streamer.kill();
                streamer.spawn();
            }
            1 => {
                replicas[place].kill();
                replicas[place].spawn();
            }
            2 => server.restart(Stop::Immediate).await,
            3 => link.cut(Cut::Reset),
            // Half-open.
            4 => link.set(|faults| {
                faults.swallow(Way::Up);
                faults.swallow(Way::Down);
            }),
            5 => {
                let bytes = rng.random_range(1..20_000);
                link.set(|faults| faults.cut_after(Way::Down, bytes, Cut::Close));
            }
            _ => {
                for link in &links {
                    link.heal_anew();
                }
            }
        }
    }
    while let Some(ended) = programs.join_next().await {
        ended.expect("a program sees what it wrote");
    }
    let dropped = droppers.stop().await;
    for link in &links {
        link.heal_anew();
    }

    let start = Instant::now();
    until_answered(&replicas).await;
    let tables = [("tokens", TOKENS), ("counter", COUNTER)];
    for replica in &replicas {
        replica.until_equal(&database, &tables).await;
    }
    let converged = start.elapsed();

    let answers = "SELECT sum(seq)::bigint FROM anabranch.replicas";
    let answers: i64 = database.query(answers, &[]).await[0].get(0);
    let share = 100 * dropped / answers;
    let refused = verdict(&database, &replicas, &[each; REPLICAS]).await;
    println!(
        "{all} local transactions, {faults:?} faults by kind, {dropped} answers dropped ({share} %); each there once, or one \
         of {refused} that were rejected; equal after {converged:?}"
    );
    assert!(dropped > 0 && (wanted.is_none() || share >= DROPPED_MIN_PERCENT));
    assert!(
        wanted.is_none() || converged < CONVERGED_WITHIN,
        "{converged:?}"
    );
}
