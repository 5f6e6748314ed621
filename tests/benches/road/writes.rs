//! The way up: what programs write into replicas' files, until the file itself says that it is answered.
//!
//! Each replica is shown rows of its own, writes as a role of its own claims, and so pays for all that a write costs: the
//! claim, the role, the condition of its shape before and after. A program writes its file by SQLite's library, one UPDATE
//! of one row in each transaction.
//!
//! **Receipt** is here the moment at which another connection to the file, as any program's, finds the transaction answered:
//! the SQLite commit that settles it. It looks at the last row of `_anabranch_local` that has an `answered_lsn`, by index:
//! `/flush` would have the file looked at for our sake, and the view `_anabranch_status` counts what is pending.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Database,
    process,
};
use rusqlite::Connection;

use crate::{
    lab::Lab,
    report::{Cost, Report},
};

/// Local transactions a second where latency is measured.
const RATE: u32 = 100;

/// How often an eye looks. Half of it is part of every figure.
const LOOK_EVERY: Duration = Duration::from_micros(300);

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// A program that writes as fast as it can waits when as many are not answered: what is measured is the way, not a queue.
const AHEAD_MAX: i64 = 2_000;

/// Replicas of X3.
pub const REPLICAS: usize = 20;

/// Rows that each replica is shown.
pub const ROWS: i64 = 1_000;

/// As the streamer has at most.
const CONNECTIONS: usize = 8;

/// Transactions that pgbench sends without waiting: as many as the streamer does of one replica at most.
const PIPELINED: usize = 128;

/// Claims are chained by hashes, and nobody minds if all are the same.
const HASH: &str = "'\\x0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef'";

const ITEMS: &str = "
    CREATE TABLE items (id bigint PRIMARY KEY, owner int NOT NULL, n int NOT NULL, note text NOT NULL);
    CREATE ROLE bench_login LOGIN NOINHERIT PASSWORD 'bench';
    CREATE ROLE bench_writer;
    GRANT SELECT, INSERT, UPDATE, DELETE ON items TO bench_writer";

const SHAPE: &str = r#"
    [auth.role]
    claim = "role"
    allowed = ["bench_writer"]
    [shape.own]
    params.owner = { claim = "owner" }
    tables = ["SELECT * FROM items WHERE owner = $owner"]
    writable = true"#;

/// The last local transaction that is answered.
const ANSWERED: &str =
    "SELECT seq FROM _anabranch_local WHERE answered_lsn IS NOT NULL ORDER BY last DESC LIMIT 1";

/// A database that replicas write to, and a streamer.
pub struct Writing {
    pub database: Database,
    pub streamer: Streamer,
}

impl Writing {
    pub async fn start(lab: &Lab) -> Writing {
        let database = lab.source.database().await;
        database.execute(ITEMS).await;
        database
            .execute(&format!(
                "INSERT INTO items SELECT g, g / {ROWS}, 0, 'item ' || g FROM generate_series(0, {}) g",
                ROWS * REPLICAS as i64 - 1
            ))
            .await;
        database.execute("VACUUM ANALYZE items").await;
        let mut streamer = Streamer::config(&database)
            .set(
                "postgres.write_url",
                database.url_as("bench_login", "bench"),
            )
            .toml(SHAPE);
        for owner in 0..REPLICAS {
            let claims = serde_json::json!({
                "sub": format!("owner {owner}"), "owner": owner, "role": "bench_writer"
            });
            streamer = streamer.token(&format!("token-{owner}"), claims);
        }
        let streamer = streamer.start().await;
        Writing { database, streamer }
    }

    pub async fn replica(&self, owner: usize) -> Replica {
        Replica::config(&self.streamer)
            .token(&format!("token-{owner}"))
            .subscribe("own")
            .start()
            .await
    }

    /// Each counter has counted each transaction once.
    async fn check(&self, transactions: u64) {
        let sum = "SELECT sum(n)::bigint FROM items";
        let made: i64 = self.database.query(sum, &[]).await[0].get(0);
        assert_eq!(made as u64, transactions, "each was made once");
    }

    pub async fn end(self, lab: &Lab) {
        lab.drop_slots().await;
        let url = lab.source.connect("postgres").await;
        let name = self.database.name();
        let dropped = format!("DROP DATABASE \"{name}\" WITH (FORCE)");
        url.batch_execute(&dropped).await.expect("drop a database");
        url.batch_execute("DROP ROLE bench_writer; DROP ROLE bench_login")
            .await
            .expect("drop roles");
    }
}

/// A program: a connection to the file, and how it stands.
struct Program {
    connection: Connection,
    owner: i64,
    /// The last transaction that is answered as it begins.
    first: i64,
}

impl Program {
    fn open(file: &Path, owner: usize) -> Program {
        let connection = Connection::open(file).expect("open the file");
        connection
            .busy_timeout(Duration::from_secs(5))
            .expect("a timeout");
        let mut program = Program {
            connection,
            owner: owner as i64,
            first: 0,
        };
        program.first = program.answered();
        program
    }

    /// What the README tells programs that write much.
    fn normal(self) -> Program {
        (self.connection)
            .pragma_update(None, "synchronous", "NORMAL")
            .expect("a pragma");
        self
    }

    fn write(&self, n: i64) {
        let sql = "UPDATE items SET n = n + 1 WHERE id = ?1";
        let mut update = self.connection.prepare_cached(sql).expect("a statement");
        let changed = update.execute([self.owner * ROWS + n % ROWS]);
        assert_eq!(changed.expect("write"), 1);
    }

    fn answered(&self) -> i64 {
        let mut answered = self.connection.prepare_cached(ANSWERED).expect("a query");
        answered.query_row([], |row| row.get(0)).unwrap_or(0)
    }

    /// Writes so many transactions and waits until all are answered.
    fn sustain(&self, count: i64) {
        let mut done = 0;
        let mut waited = Instant::now();
        for n in 0..count {
            while n - done >= AHEAD_MAX {
                thread::park_timeout(Duration::from_millis(1));
                done = self.progress(done, &mut waited);
            }
            self.write(n);
        }
        while done < count {
            thread::park_timeout(Duration::from_millis(1));
            done = self.progress(done, &mut waited);
        }
    }

    fn progress(&self, done: i64, waited: &mut Instant) -> i64 {
        let now = self.answered() - self.first;
        if now > done {
            *waited = Instant::now();
        }
        assert!(
            waited.elapsed() < ANSWER_MAX,
            "{now} are answered, and no more"
        );
        now
    }
}

/// X1: from a program's commit to the receipt, at a moderate rate.
pub async fn latency(lab: &Lab, writing: &Writing, seconds: Duration, report: &mut Report) {
    let replica = writing.replica(0).await;
    let before = lab.busy();
    let count = i64::from(RATE) * seconds.as_secs() as i64;
    let file = replica.file();
    let mut took = tokio::task::block_in_place(|| paced(&file, count));
    // The first second is for caches and plans.
    let mut took = took.split_off(RATE as usize);
    took.sort_by(f64::total_cmp);
    let mut cost = lab.cost(before);
    add(&mut cost, &writing.streamer, std::slice::from_ref(&replica));
    let name = "anabranch, commit to receipt";
    report.latency("X1", name, &took, cost);
    writing.check(count as u64).await;
    replica.terminate().await;
    writing.streamer.terminate().await;
}

/// How long each of so many transactions took, in seconds. The program writes with the settings that SQLite has by default.
fn paced(file: &Path, count: i64) -> Vec<f64> {
    let program = Program::open(file, 0);
    let eye = Program::open(file, 0);
    let watching = thread::Builder::new()
        .name("eye".into())
        .spawn(move || {
            let mut answered = Vec::with_capacity(count as usize);
            let began = Instant::now();
            while (answered.len() as i64) < count {
                let done = eye.answered() - eye.first;
                let now = Instant::now();
                answered.resize(answered.len().max(done as usize), now);
                let late = Duration::from_secs((count / i64::from(RATE)) as u64) + ANSWER_MAX;
                assert!(began.elapsed() < late, "{done} are answered, and no more");
                thread::park_timeout(LOOK_EVERY);
            }
            answered
        })
        .expect("a thread");
    let began = Instant::now();
    let mut committed = Vec::with_capacity(count as usize);
    for n in 0..count {
        let due = began + Duration::from_secs(n as u64) / RATE;
        thread::park_timeout(due.saturating_duration_since(Instant::now()));
        program.write(n);
        committed.push(Instant::now());
    }
    let answered = watching.join().expect("the eye");
    let pairs = answered.iter().zip(&committed);
    pairs
        .map(|(answered, committed)| answered.saturating_duration_since(*committed).as_secs_f64())
        .collect()
}

/// X2 with one replica, X3 with many: as fast as they can, until the last receipt.
pub async fn sustained(
    lab: &Lab,
    work: &'static str,
    writing: &Writing,
    replicas: usize,
    total: u64,
    report: &mut Report,
) {
    let each = total / replicas as u64;
    let mut running = Vec::new();
    for owner in 0..replicas {
        running.push(writing.replica(owner).await);
    }
    let made = |sql: &'static str| async move {
        let made: i64 = writing.database.query(sql, &[]).await[0].get(0);
        made as u64
    };
    let sum = "SELECT sum(n)::bigint FROM items";
    let first = made(sum).await;
    let programs: Vec<Program> = (running.iter().enumerate())
        .map(|(owner, replica)| Program::open(&replica.file(), owner).normal())
        .collect();
    let (before, began) = (lab.busy(), Instant::now());
    tokio::task::block_in_place(|| {
        thread::scope(|scope| {
            for program in programs {
                scope.spawn(move || program.sustain(each as i64));
            }
        });
    });
    let took = began.elapsed();
    let mut cost = lab.cost(before);
    add(&mut cost, &writing.streamer, &running);
    let name = format!("anabranch, {replicas} replicas");
    report.rate(work, &name, each * replicas as u64, took, cost);
    assert_eq!(
        made(sum).await - first,
        each * replicas as u64,
        "each was made once"
    );
    // What comes next has the machine for itself.
    for replica in &running {
        replica.terminate().await;
    }
    writing.streamer.terminate().await;
}

fn add(cost: &mut Cost, streamer: &Streamer, replicas: &[Replica]) {
    let of = |pid| process::cpu_seconds(pid);
    if let Some(pid) = streamer.pid() {
        cost.add("streamer", of(pid), streamer.memory_peak_bytes());
    }
    let pids = replicas.iter().filter_map(|replica| replica.pid());
    let peaks = replicas.iter().map(|replica| replica.memory_peak_bytes());
    cost.add(
        "replicas",
        pids.map(of).sum(),
        peaks.max().unwrap_or_default(),
    );
}

/// The same statements by pgbench: what this machine's Postgres can do with nothing else running, where nobody waits for an
/// answer before the last of many transactions, and where each statement waits for the one before.
pub async fn pgbench(
    lab: &Lab,
    work: &'static str,
    writing: &Writing,
    connections: usize,
    total: u64,
    report: &mut Report,
) {
    let connections = connections.min(CONNECTIONS);
    for pipelined in [true, false] {
        pgbench_once(lab, work, writing, connections, pipelined, total, report).await;
    }
}

async fn pgbench_once(
    lab: &Lab,
    work: &'static str,
    writing: &Writing,
    connections: usize,
    pipelined: bool,
    total: u64,
    report: &mut Report,
) {
    let known = format!(
        "DELETE FROM anabranch.replicas WHERE subject = 'pgbench';
         INSERT INTO anabranch.replicas (replica, subject, seq, hash)
           SELECT 'pgbench' || g, 'pgbench', 0, {HASH} FROM generate_series(0, {connections} - 1) g"
    );
    writing.database.execute(&known).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("write.sql");
    std::fs::write(&file, script(pipelined)).expect("write a script");
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), readable).expect("let the server's user read it");
    let rounds = (total / (connections * PIPELINED) as u64).max(1);
    let (clients, rounds_text) = (connections.to_string(), rounds.to_string());
    let file = file.to_str().expect("a path of ours");
    let arguments = [
        "-n",
        "-M",
        "prepared",
        "-c",
        &clients,
        "-j",
        "1",
        "-t",
        &rounds_text,
        "-D",
        "seq=0",
        "-f",
        file,
    ];
    let (before, began) = (lab.busy(), Instant::now());
    let database = writing.database.name();
    lab.source.tool("pgbench", database, &arguments).await;
    let took = began.elapsed();
    let made = rounds * (connections * PIPELINED) as u64;
    let how = if pipelined {
        "pipelined"
    } else {
        "step by step"
    };
    let name = format!("limit: pgbench, {connections} connections, {how}");
    report.rate(work, &name, made, took, lab.cost(before));
}

/// The statements of `streamer/src/postgres/writer.rs`, in as many transactions as are sent together.
fn script(pipelined: bool) -> String {
    let mut script = String::new();
    if pipelined {
        script += "\\startpipeline\n";
    }
    for at in 1..=PIPELINED {
        let off = if at < PIPELINED {
            ", set_config('synchronous_commit', 'off', true)"
        } else {
            ""
        };
        script += &format!(
            "\\set seq :seq + 1
             \\set id :client_id * {ROWS} + :seq % {ROWS}
             BEGIN READ WRITE;
             SELECT anabranch.claim('pgbench' || :client_id, 'pgbench', :seq, {HASH}, {HASH}, ARRAY[gen_random_uuid()]), set_config('role', 'bench_writer', true), set_config('request.jwt.claims', '{{\"sub\":\"pgbench\"}}', true){off};
             WITH changed AS (UPDATE ONLY public.items AS t SET n = :seq::int4 WHERE t.id = :id::int8 AND ((t.owner = :client_id) IS TRUE) RETURNING 1) SELECT anabranch.refuse('update_missing', NULL) WHERE NOT EXISTS (SELECT FROM changed);
             SET CONSTRAINTS ALL IMMEDIATE;
             SET LOCAL ROLE NONE;
             SELECT anabranch.refuse('out_of_shape', 0) FROM (SELECT (t.owner = :client_id) IS TRUE AS shown FROM ONLY public.items AS t WHERE t.id = :id::int8 OFFSET 0) AS s WHERE s.shown IS NOT TRUE;
             COMMIT;
"
        );
    }
    if pipelined {
        script += "\\endpipeline\n";
    }
    script
        .lines()
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}
