//! Commit-to-visible: rows say when they were made, and an eye says when it first sees them.
//!
//! A row's `created_at` is `clock_timestamp()` as its INSERT runs, so the commit itself is part of what is measured, for
//! all alike. Everything is on one machine and one clock.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{lab::Lab, report::Report};

/// How often an eye looks. Half of it is part of every figure.
const LOOK_EVERY: Duration = Duration::from_micros(300);

/// How long an eye waits for what is on its way when the load ends.
const LATE_MAX: Duration = Duration::from_secs(30);

/// Who looks.
pub enum Eye {
    /// A query of the table in Postgres.
    Postgres(String),
    /// A query of the replica's file.
    Sqlite(PathBuf),
}

/// The rows above an id: their ids, and the times at which they were made, in seconds since 1970.
type Look = Box<dyn FnMut(i64) -> Vec<(i64, f64)> + Send>;

pub async fn measure(
    lab: &Lab,
    eye: Eye,
    (work, name): (&'static str, &str),
    seconds: Duration,
    report: &mut Report,
) {
    let newest =
        async || -> i64 { lab.database.query("SELECT max(id) FROM events", &[]).await[0].get(0) };
    let start = newest().await;
    let end = Arc::new(AtomicI64::new(i64::MAX));
    let before = lab.busy();
    let watching = {
        let end = end.clone();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name("eye".into())
            .spawn(move || watch(eye.open(&runtime), start, &end))
            .expect("a thread")
    };
    load(lab, start, seconds).await;
    let made = newest().await;
    end.store(made, Ordering::Relaxed);
    let mut seen = tokio::task::block_in_place(|| watching.join()).expect("the eye");
    assert_eq!(
        seen.len() as i64,
        made - start,
        "{name}: each row is seen, once"
    );
    // The first second is for caches and plans.
    let mut seen = seen.split_off(seen.len() / seconds.as_secs().max(1) as usize);
    seen.sort_by(f64::total_cmp);
    report.latency(work, name, &seen, lab.cost(before));
}

/// Looks until the row `end` and all before it, down to `start`, were seen; how long each took.
fn watch(mut look: Look, start: i64, end: &AtomicI64) -> Vec<f64> {
    // Ids come nearly in order: all up to `below` were seen, and those of `above`.
    let (mut below, mut above) = (start, BTreeSet::new());
    let (mut seen, mut late) = (Vec::new(), None);
    while below < end.load(Ordering::Relaxed) {
        if end.load(Ordering::Relaxed) < i64::MAX {
            let since = late.get_or_insert_with(Instant::now);
            assert!(since.elapsed() < LATE_MAX, "rows after {below} do not come");
        }
        let rows = look(below);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_secs_f64();
        for (id, made) in rows {
            if above.insert(id) {
                seen.push(now - made);
            }
        }
        while above.remove(&(below + 1)) {
            below += 1;
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
    seen
}

impl Eye {
    fn open(self, runtime: &tokio::runtime::Handle) -> Look {
        match self {
            Eye::Postgres(url) => {
                let runtime = runtime.clone();
                let client = runtime.block_on(async {
                    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
                        .await
                        .expect("connect");
                    tokio::spawn(connection);
                    let sql = "SELECT id, extract(epoch FROM created_at)::float8 FROM events WHERE id > $1";
                    let statement = client.prepare(sql).await.expect("a statement");
                    (client, statement)
                });
                Box::new(move |below| {
                    let rows = runtime
                        .block_on(client.0.query(&client.1, &[&below]))
                        .expect("look");
                    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
                })
            }
            Eye::Sqlite(file) => {
                let sqlite = anabranch_tests::oracle::file::open(&file).expect("open the file");
                Box::new(move |below| {
                    let sql = "SELECT id, unixepoch(created_at, 'subsec') + 0.0, created_at FROM events WHERE id > ?1";
                    let mut statement = sqlite.prepare_cached(sql).expect("a statement");
                    let rows = statement.query_map([below], |row| {
                        let (whole, text): (f64, String) = (row.get(1)?, row.get(2)?);
                        // SQLite's clock has milliseconds; the text has all six digits.
                        let micros: f64 = text[20..26].parse().expect("six digits");
                        Ok((row.get(0)?, whole.floor() + micros / 1e6))
                    });
                    rows.expect("look").map(|row| row.expect("a row")).collect()
                })
            }
        }
    }
}

/// 500 transactions a second, each of one INSERT.
async fn load(lab: &Lab, start: i64, seconds: Duration) {
    lab.database
        .execute(&format!(
            "CREATE SEQUENCE IF NOT EXISTS load; SELECT setval('load', {start})"
        ))
        .await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("insert.sql");
    let script = "INSERT INTO events VALUES (nextval('load'), 7, 'kind-7', '{\"name\": \"a row that tells when it was made\", \"n\": 12345}', 1.5, true, clock_timestamp(), '01234567-89ab-cdef-0123-456789abcdef');\n";
    std::fs::write(&file, script).expect("write a script");
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), readable).expect("let the server's user read it");
    let seconds = seconds.as_secs().to_string();
    let file = file.to_str().expect("a path of ours");
    let arguments = [
        "-n", "-M", "prepared", "-c", "2", "-j", "1", "-R", "500", "-T", &seconds, "-f", file,
    ];
    lab.source
        .tool("pgbench", lab.database.name(), &arguments)
        .await;
}
