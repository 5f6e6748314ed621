//! `cargo bench --bench route`: what the engine does for a change, with few and with many subscribed; in one thread, without
//! Postgres and without gRPC.
//!
//! - *Flat cost*: rows of transactions that each concern another session, with up to 100,000 of them. What is routed is
//!   handed to queues, as by the engine, and taken from them outside of the time.
//! - *Evaluation*: transactions whose conditions read other tables, of some thousand rows.
//!
//! Each figure is the median of [`ROUNDS`].

use std::{
    collections::{BTreeMap, HashMap},
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use anabranch_proto::{
    Epoch, Lsn, Position,
    record::{self, ValueRef},
};
use anabranch_streamer::{
    encode::Ending,
    mirror::{Mirror, Settings},
    route::Router,
    session::{Handle, Total},
    shape::{self, ParamSource, Shape, Source},
    table::{Collation, Column, Identity, Kind, Table},
    transaction::{Change, Chunk, End},
};
use bytes::Bytes;
use foldhash::fast::RandomState;

/// Rounds of each figure.
const ROUNDS: usize = 5;

/// Row changes of a round.
const CHANGES: usize = 20_000;

/// Sessions.
const SESSIONS: [usize; 4] = [1, 100, 10_000, 100_000];

/// Rows of an inner table.
const INNER: [i64; 2] = [1_000, 10_000];

struct Lab {
    _directory: tempfile::TempDir,
    mirror: Mirror,
    router: Router,
    handles: HashMap<u64, Arc<Handle>, RandomState>,
    shapes: Vec<Shape>,
    tables: Vec<Arc<Table>>,
    lsn: u64,
}

fn row(values: [i64; 4]) -> Bytes {
    record::build(values.map(ValueRef::Integer))
}

fn table(place: usize, name: &str) -> Arc<Table> {
    let column = |(place, name): (usize, &str)| Column {
        name: name.into(),
        attnum: place as i16 + 1,
        type_oid: 20,
        base_oid: 20,
        typmod: -1,
        postgres_type: "bigint".into(),
        kind: Kind::Integer,
        not_null: place == 0,
        collation: Collation::Bytes,
    };
    let names = ["id", "project", "person", "v"];
    Arc::new(Table {
        oid: 100 + place as u32,
        schema: "public".into(),
        name: name.into(),
        columns: names.into_iter().enumerate().map(column).collect(),
        key: vec![0],
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    })
}

impl Lab {
    /// The tables `t`, `a`, `b` and `c`, with the first `rows` of each.
    fn new(sql: &str, rows: [i64; 4], value: impl Fn(i64) -> [i64; 4]) -> Lab {
        let tables: Vec<_> = (["t", "a", "b", "c"].into_iter().enumerate())
            .map(|(place, name)| table(place, name))
            .collect();
        let params = ["me", "low", "high"].into_iter();
        let params = params.filter(|name| sql.contains(&format!("${name}")));
        let source = Source {
            name: "bench".into(),
            params: params
                .map(|name| (name.to_owned(), ParamSource::Claim(name.to_owned())))
                .collect::<BTreeMap<_, _>>(),
            tables: vec![sql.into()],
            writable: Vec::new(),
        };
        let shapes = shape::compile(&[source], &tables).expect("a shape");
        let directory = tempfile::tempdir().expect("a directory");
        let settings = Settings {
            directory: directory.path().into(),
            cache_bytes: 96 << 20,
            reader_cache_bytes: 1 << 20,
            index_bytes_max: 1 << 30,
            index_hours_max: 24,
            row_bytes_max: 1 << 20,
        };
        let mut mirror = Mirror::open(&settings).expect("a mirror");
        let indexes: Vec<_> = (shapes[0].selects.iter())
            .flat_map(|select| select.indexes())
            .collect();
        mirror.set_indexes(&indexes).expect("indexes");
        for (table, rows) in tables.iter().zip(rows) {
            mirror.begin_copy(table).expect("a copy");
            let rows: Vec<Bytes> = (0..rows).map(|id| row(value(id))).collect();
            for batch in rows.chunks(10_000) {
                mirror.copy_rows(table.oid, batch).expect("rows");
            }
            mirror.end_copy(table.oid, Lsn(100)).expect("a copy");
        }
        mirror
            .begin_epoch(Epoch(7), None, Lsn(100))
            .expect("an epoch");
        Lab {
            _directory: directory,
            mirror,
            router: Router::default(),
            handles: HashMap::default(),
            shapes,
            tables,
            lsn: 100,
        }
    }

    fn join(&mut self, sessions: usize) {
        let total = Total::new(1 << 30);
        for me in 0..sessions as i64 {
            let claims = serde_json::json!({"me": me, "low": me, "high": me + 1});
            let claims = claims.as_object().expect("claims");
            let bound = self.shapes[0].bind(claims, &HashMap::new()).expect("bound");
            self.router.add(me as u64, &bound);
            let tables = Box::new([self.tables[0].oid]);
            let handle = Handle::new(me as u64, tables, 1 << 20, total.clone());
            handle.open();
            self.handles.insert(me as u64, handle);
        }
    }

    /// A transaction: how long the mirror took, how long all else, and how many were told or left to a catch-up.
    fn commit(&mut self, rows: &[[i64; 4]]) -> (Duration, Duration, usize, usize) {
        let table = &self.tables[0];
        let changes = rows.iter().map(|values| Change::Update {
            table: table.clone(),
            old: None,
            new: row(*values),
            unchanged: Vec::new(),
        });
        let commit_lsn = Lsn(self.lsn);
        self.lsn += 1;
        let chunk = Chunk {
            changes: changes.collect(),
            bytes: 0,
            first: true,
            commit_lsn,
            end: Some(End {
                lsn: Lsn(self.lsn),
                commit_time: 0,
            }),
        };
        let began = Instant::now();
        let applied = self.mirror.apply(&chunk).expect("applied");
        let applying = began.elapsed();
        let began = Instant::now();
        let before = self.mirror.before(&applied.nets);
        let routed = self
            .router
            .route(&applied.nets, &before, &self.mirror.now());
        let routed = routed.expect("routed");
        let (told, behind) = (routed.ops.len(), routed.behind.len());
        let mut pushed = Vec::with_capacity(told);
        let ending = Ending::new(Position::default(), 0, Lsn(0));
        for (session, ops) in routed.ops {
            let handle = &self.handles[&session];
            handle.push(ops, &ending);
            pushed.push(session);
        }
        let routing = began.elapsed();
        for session in pushed {
            black_box(self.handles[&session].take());
        }
        (applying, routing, told, behind)
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Rows a second, of which each concerns one session.
fn flat(name: &str, sql: &str) {
    println!("\n{name}: {sql}");
    println!(
        "sessions | rows in a transaction | mirror, µs a row | routing and queues, µs a row | rows/s of both"
    );
    for sessions in SESSIONS {
        let count = SESSIONS[SESSIONS.len() - 1] as i64;
        // In `a` each person is a member of the project of the same number.
        let mut lab = Lab::new(sql, [count, count, 0, 0], |id| [id, id, id, id]);
        lab.join(sessions);
        let mut turn = 0_i64;
        for size in [100, 1] {
            let (mut applying, mut routing) = (Vec::new(), Vec::new());
            let changes = if size == 1 { CHANGES / 4 } else { CHANGES };
            for round in 0..=ROUNDS {
                let (mut in_mirror, mut in_router) = (Duration::ZERO, Duration::ZERO);
                for _ in 0..changes / size {
                    let rows: Vec<[i64; 4]> = (0..size)
                        .map(|_| {
                            turn += 1;
                            // Far from each other, and each once before any twice.
                            let id = turn * 61_803 % count;
                            let whose = id % sessions as i64;
                            [id, whose, -turn, whose]
                        })
                        .collect();
                    let (applied, routed, told, behind) = lab.commit(&rows);
                    assert!(behind == 0 && told == size.min(sessions), "{told} {behind}");
                    in_mirror += applied;
                    in_router += routed;
                }
                lab.mirror.commit().expect("a commit");
                // The first one warms up.
                if round > 0 {
                    applying.push(in_mirror);
                    routing.push(in_router);
                }
            }
            let per_row = |time: Duration| time.as_secs_f64() * 1e6 / changes as f64;
            let (applying, routing) = (per_row(median(applying)), per_row(median(routing)));
            let both = 1e6 / (applying + routing);
            println!("{sessions} | {size} | {applying:.2} | {routing:.2} | {both:.0}");
        }
    }
}

/// One transaction of ten rows, for ten sessions.
fn evaluation(name: &str, sql: &str) {
    println!("\n{name}: {sql}");
    println!("inner rows | ms a transaction | told | left to catch-ups");
    for inner in INNER {
        let mut lab = Lab::new(sql, [10, inner, inner, inner], |id| [id, 1, id, 0]);
        lab.join(10);
        let mut times = Vec::new();
        let (mut told, mut behind) = (0, 0);
        for round in 0..ROUNDS as i64 {
            let rows: Vec<[i64; 4]> = (0..10).map(|id| [id, 1, round + 20, 0]).collect();
            let time;
            (_, time, told, behind) = lab.commit(&rows);
            times.push(time);
        }
        let time = median(times).as_secs_f64() * 1e3;
        println!("{inner} | {time:.2} | {told} | {behind}");
    }
}

fn main() {
    // Run as a test, it has nothing to say.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let only = std::env::var("ANABRANCH_ROUTE").unwrap_or_default();
    for (name, sql) in [
        ("equal", "SELECT * FROM t WHERE project = $me"),
        ("window", "SELECT * FROM t WHERE v >= $low AND v < $high"),
        (
            "member",
            "SELECT * FROM t WHERE EXISTS (SELECT 1 FROM a WHERE a.project = t.project AND person = $me)",
        ),
    ] {
        if name.contains(&only) {
            flat(name, sql);
        }
    }
    for (name, sql) in [
        (
            "one of a project of all",
            "SELECT * FROM t WHERE EXISTS (SELECT 1 FROM a WHERE a.project = t.project AND person = $me)",
        ),
        (
            "not one of them",
            "SELECT * FROM t WHERE project NOT IN (SELECT project FROM a WHERE person = $me) OR v > 5",
        ),
        (
            "the same for all",
            "SELECT * FROM t WHERE person <> $me AND NOT EXISTS (SELECT 1 FROM a WHERE v > 5)",
        ),
        (
            "three levels",
            "SELECT * FROM t WHERE EXISTS (SELECT 1 FROM a WHERE v >= 0 AND EXISTS (SELECT 1 FROM b WHERE v >= 0 \
             AND EXISTS (SELECT 1 FROM c WHERE v < 0)))",
        ),
    ] {
        if name.contains(&only) {
            evaluation(name, sql);
        }
    }
}
