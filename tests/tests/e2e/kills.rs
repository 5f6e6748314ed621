//! kill -9 of everything, at any moment, under load; and at every look each file is exactly what Postgres held at its
//! position.
//!
//! `ANABRANCH_KILLS=300` makes it long. Whoever says how many also has the machine for it: then it is a verdict on speed
//! too.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anabranch_tests::{
    oracle::history::{History, View, Watch},
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server, Stop},
    seed::Seed,
    wait::{DEADLINE, until},
};
use rand::{Rng, rngs::StdRng};

/// How many kills there are where nobody says how many.
const KILLS: u64 = 24;

/// How soon everything must be equal after the last kill, where the run is a verdict on speed.
const CONVERGED_WITHIN: Duration = Duration::from_secs(10);

const TABLES: &str = "
    CREATE TABLE issues (id int PRIMARY KEY, team int, state text, note text, at timestamptz DEFAULT now());
    CREATE TABLE votes (issue int, person int, weight numeric(6,2), PRIMARY KEY (issue, person));
    ALTER TABLE issues ALTER note SET STORAGE EXTERNAL;
    INSERT INTO issues SELECT g, g % 5, 'open', 'note ' || g FROM generate_series(1, 400) g;
    INSERT INTO votes SELECT g, g % 7, g / 8.0 FROM generate_series(1, 400) g";

/// Two shapes that rows move in and out of; each has both tables.
const SHAPES: [[(&str, &str); 2]; 2] = [
    [
        ("issues", "team = 1 AND state <> 'done'"),
        ("votes", "person IN (1, 3)"),
    ],
    [
        ("issues", "team IN (2, 3) OR note IS NULL"),
        ("votes", "weight > 20"),
    ],
];

fn transaction(rng: &mut StdRng) -> String {
    let mut sql = String::from("BEGIN;");
    for _ in 0..rng.random_range(1..5) {
        let (id, other) = (rng.random_range(1..450), rng.random_range(0..450));
        let team = other % 5;
        sql += &match rng.random_range(0..10) {
            0 => format!("INSERT INTO issues VALUES ({id}, {team}, 'new') ON CONFLICT DO NOTHING;"),
            1..=3 => format!("UPDATE issues SET team = {team} WHERE id % 50 = {id} % 50;"),
            4 => format!("UPDATE issues SET note = repeat('long {id} ', 500) WHERE id = {id};"),
            5 => format!(
                "UPDATE issues SET state = CASE state WHEN 'done' THEN 'open' ELSE 'done' END WHERE id = {id};"
            ),
            6 => format!(
                "UPDATE issues SET id = {other} WHERE id = {id} AND NOT EXISTS (SELECT FROM issues WHERE id = {other});"
            ),
            7 => format!("DELETE FROM issues WHERE id = {id};"),
            8 => format!(
                "INSERT INTO votes VALUES ({id}, {team}, {other} / 8.0) ON CONFLICT (issue, person) DO UPDATE SET weight = excluded.weight;"
            ),
            _ => format!(
                "UPDATE votes SET person = person + 1 WHERE issue = {id} AND person < 7; DELETE FROM votes WHERE issue = {other};"
            ),
        };
    }
    sql + if rng.random_ratio(1, 8) {
        "ROLLBACK"
    } else {
        "COMMIT"
    }
}

/// Writes until it is told to stop, through all restarts of Postgres.
async fn write(
    database: Arc<Database>,
    mut rng: StdRng,
    committed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) {
    let mut client = None;
    while !stop.load(SeqCst) {
        let connected = match client.take() {
            Some(client) => Some(client),
            // At its own pace: one that spins takes the processor from a server that recovers.
            None => {
                until("Postgres takes connections again", DEADLINE, || async {
                    if stop.load(SeqCst) {
                        return Ok(None);
                    }
                    database.try_connect().await.map(Some)
                })
                .await
            }
        };
        let Some(connected) = connected else { break };
        // A transaction that fails, by a deadlock or a kill, is none; its connection may be gone too.
        if connected
            .batch_execute(&transaction(&mut rng))
            .await
            .is_ok()
        {
            committed.fetch_add(1, SeqCst);
            client = Some(connected);
        }
    }
}

/// Looks at a file again and again. Gives how often.
async fn look(
    history: Arc<History>,
    mut watch: Watch,
    file: PathBuf,
    looks: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) {
    let mut last = false;
    loop {
        let result = watch.look(&history, &file).await;
        result.unwrap_or_else(|error| panic!("{}: {error:#}", file.display()));
        looks.fetch_add(1, SeqCst);
        if last {
            break;
        }
        last = stop.load(SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_kill_at_any_moment_makes_a_file_wrong() {
    let wanted = std::env::var("ANABRANCH_KILLS").ok();
    let wanted: Option<u64> = wanted.map(|text| text.parse().expect("a number"));
    let kills = wanted.unwrap_or(KILLS);
    let seed = Seed::new();
    let mut rng = seed.rng("kills");
    let server = Server::start(Options::new()).await;
    let database = Arc::new(server.database().await);
    database.execute(TABLES).await;
    let views = SHAPES
        .iter()
        .flatten()
        .map(|(table, condition)| View::new(table, condition));
    let history = Arc::new(History::start(&database, views.collect()).await);

    let select = |(table, condition)| format!("SELECT * FROM {table} WHERE {condition}");
    let queries = SHAPES.map(|shape| shape.map(select));
    let streamer = Streamer::config(&database)
        .shape("one", &[&queries[0][0], &queries[0][1]])
        .shape("two", &[&queries[1][0], &queries[1][1]])
        .start()
        .await;
    let replicas = [
        Replica::config(&streamer).subscribe("one").start().await,
        Replica::config(&streamer).subscribe("two").start().await,
    ];

    let (committed, looks) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (stop_writing, stop_looking) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut writers = tokio::task::JoinSet::new();
    for name in ["writer 1", "writer 2"] {
        writers.spawn(write(
            database.clone(),
            seed.rng(name),
            committed.clone(),
            stop_writing.clone(),
        ));
    }
    let mut lookers = tokio::task::JoinSet::new();
    for (place, replica) in replicas.iter().enumerate() {
        let watch = Watch::new(&history, &[2 * place, 2 * place + 1]);
        lookers.spawn(look(
            history.clone(),
            watch,
            replica.file(),
            looks.clone(),
            stop_looking.clone(),
        ));
    }

    let mut killed = [0u64; 3];
    for _ in 0..kills {
        // The next kill falls anywhere within the work of some transactions, also into the start of what was killed.
        let next = committed.load(SeqCst) + rng.random_range(1..60);
        let reached = until("more is committed", DEADLINE, || async {
            committed.load(SeqCst) >= next
        });
        tokio::select! {
            () = reached => {}
            Some(ended) = lookers.join_next() => { ended.expect("every look is right"); }
        }
        let victim = [0, 0, 0, 1, 1, 1, 2][rng.random_range(0..7)];
        killed[victim] += 1;
        match victim {
            0 => {
                streamer.kill();
                streamer.spawn();
            }
            1 => {
                let replica = &replicas[rng.random_range(0..2)];
                replica.kill();
                replica.spawn();
            }
            _ => server.restart(Stop::Immediate).await,
        }
    }
    stop_writing.store(true, SeqCst);
    while let Some(ended) = writers.join_next().await {
        ended.expect("a writer does not panic");
    }

    let start = Instant::now();
    for (replica, (shape, sql)) in replicas.iter().zip(SHAPES.iter().zip(&queries)) {
        let tables = [(shape[0].0, sql[0].as_str()), (shape[1].0, sql[1].as_str())];
        replica.until_equal(&database, &tables).await;
    }
    let converged = start.elapsed();
    stop_looking.store(true, SeqCst);
    while let Some(ended) = lookers.join_next().await {
        ended.expect("every look is right");
    }
    let [of_streamer, of_replicas, of_postgres] = killed;
    println!(
        "{of_streamer} kills of the streamer, {of_replicas} of replicas, {of_postgres} of Postgres; {} transactions; \
         {} looks, all right; equal after {converged:?}",
        committed.load(SeqCst),
        looks.load(SeqCst),
    );
    assert!(
        looks.load(SeqCst) >= 4 * kills,
        "too few looks to mean anything"
    );
    assert!(
        wanted.is_none() || converged < CONVERGED_WITHIN,
        "{converged:?}"
    );
}
