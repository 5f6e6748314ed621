//! Memory: what a large transaction takes of small caps, and what a replica that hardly reads costs the others.

use std::time::{Duration, Instant};

use anabranch_tests::{
    light::{self, Fleet},
    peers::{Replica, Streamer, TOKEN},
    proxy::{Proxy, Way},
    wait::until,
};

use crate::{lab::Lab, latency, report::Report};

/// The caps of the streamer and the replica, and what they are called.
const CAPS: [(&str, u64); 2] = [("256MiB", 256 << 20), ("128MiB", 128 << 20)];

/// What a replica on a line that is hardly one gets.
const THIN_BYTES_PER_SECOND: u64 = 2_000;

/// How long a large local transaction may take.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// Replicas that do not read, and what there is for each: more than their windows take.
const SLOW: usize = 300;
const SLOW_ROWS: usize = 2_000;
const SLOW_ROW_BYTES: usize = 4_000;

/// Until nothing more is sent.
const SETTLE: Duration = Duration::from_secs(5);

/// What a program writes in one transaction; how many rows and bytes that makes.
const LARGE: [(&str, &str, (i64, i64)); 2] = [
    (
        "a local transaction of 100,000 rows",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
         INSERT INTO large SELECT i, printf('%.200c', 'x') FROM n",
        (100_000, 20_000_000),
    ),
    (
        "a local value of 64 MiB",
        "INSERT INTO large VALUES(1, printf('%.67108864c', 'x'))",
        (1, 67_108_864),
    ),
];

/// M1: initial copy, then one transaction that updates every row, with small caps.
pub async fn large_transaction(lab: &Lab, report: &mut Report) {
    let streamer = Streamer::config(&lab.database)
        .set("memory_max", CAPS[0].0)
        .shape("all", &["SELECT * FROM events"])
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .set("memory_max", CAPS[1].0)
        .subscribe("all")
        .start()
        .await;
    replica.until_caught_up(&lab.database).await;
    peaks("M1", "the initial copy", &streamer, &replica, report);
    lab.database
        .execute("UPDATE events SET amount = amount + 1, ok = NOT ok")
        .await;
    replica.until_caught_up(&lab.database).await;
    let what = "a transaction that updates all rows";
    peaks("M1", what, &streamer, &replica, report);
    replica.terminate().await;
    streamer.terminate().await;
    lab.drop_slots().await;
}

fn peaks(work: &str, what: &str, streamer: &Streamer, replica: &Replica, report: &mut Report) {
    let peaks = [streamer.memory_peak_bytes(), replica.memory_peak_bytes()];
    for ((who, peak), (cap, bytes)) in ["streamer", "replica"].iter().zip(peaks).zip(CAPS) {
        let verdict = if peak <= bytes { "holds" } else { "TOO MUCH" };
        report.note(format!(
            "{work}   {who} after {what}: peak {} MiB of {cap}: {verdict}",
            peak >> 20
        ));
    }
}

/// M3: a large local transaction, then a large value, both with the same small caps.
pub async fn large_local_transactions(lab: &Lab, report: &mut Report) {
    for (what, sql, sum) in LARGE {
        let database = lab.source.database().await;
        database
            .execute("CREATE TABLE large (id int PRIMARY KEY, note text NOT NULL)")
            .await;
        let streamer = Streamer::config(&database)
            .set("memory_max", CAPS[0].0)
            .shape("large", &["SELECT * FROM large"])
            .set("shape.large.writable", true)
            .start()
            .await;
        let replica = Replica::config(&streamer)
            .set("memory_max", CAPS[1].0)
            .subscribe("large")
            .start()
            .await;
        replica.until_caught_up(&database).await;
        peaks("M3", "start", &streamer, &replica, report);
        let began = Instant::now();
        tokio::task::block_in_place(|| {
            let program = rusqlite::Connection::open(replica.file()).expect("open the file");
            program.execute_batch(sql).expect("write");
        });
        let file = replica.open();
        until("it is answered", ANSWER_MAX, || async {
            let sql = "SELECT pending = 0 FROM _anabranch_status";
            let answered = file.query_row(sql, [], |row| row.get(0));
            answered.unwrap_or(false).then_some(())
        })
        .await;
        let took = began.elapsed().as_secs_f64();
        report.note(format!("M3   {what}: answered after {took:.2} s"));
        let found = "SELECT count(*), sum(length(note))::bigint FROM large";
        let row = &database.query(found, &[]).await[0];
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), sum, "{what}");
        peaks("M3", what, &streamer, &replica, report);
        replica.terminate().await;
        streamer.terminate().await;
        lab.drop_slots().await;
    }
}

/// M2: latency of a live replica and memory of the streamer, alone and beside a replica that hardly reads.
pub async fn stalled_beside_live(lab: &Lab, seconds: Duration, report: &mut Report) {
    let streamer = Streamer::config(&lab.database)
        .shape("all", &["SELECT * FROM events"])
        .start()
        .await;
    let live = Replica::config(&streamer).subscribe("all").start().await;
    live.until_caught_up(&lab.database).await;
    let measure = async |name, report: &mut Report| {
        let eye = latency::Eye::Sqlite(live.file());
        latency::measure(lab, eye, ("M2", name), seconds, report).await;
        let peak = streamer.memory_peak_bytes() >> 20;
        report.note(format!("M2   {name}: peak of the streamer {peak} MiB"));
    };
    measure("a live replica alone", report).await;
    let proxy = Proxy::to(streamer.address()).await;
    let thin = Replica::config(&streamer)
        .through(&proxy)
        .subscribe("all")
        .start()
        .await;
    thin.until_caught_up(&lab.database).await;
    proxy.set(|faults| faults.throttle(Way::Down, THIN_BYTES_PER_SECOND));
    measure("beside a stalled one", report).await;
    proxy.set(|faults| faults.heal());
    thin.until_caught_up(&lab.database).await;
    for replica in [&live, &thin] {
        replica.terminate().await;
    }
    streamer.terminate().await;
    lab.drop_slots().await;
}

/// M4: many replicas that do not read what catch-ups have for them.
pub async fn slow_readers(lab: &Lab, report: &mut Report) {
    let database = lab.source.database().await;
    database
        .execute(&format!(
            "CREATE TABLE slow (id int PRIMARY KEY, made int8 NOT NULL, note text NOT NULL);
             ALTER TABLE slow ALTER note SET STORAGE EXTERNAL;
             INSERT INTO slow SELECT g, 0, repeat('slow', {SLOW_ROW_BYTES} / 4) FROM generate_series(1, {SLOW_ROWS}) g"
        ))
        .await;
    let streamer = Streamer::config(&database)
        .set("memory_max", CAPS[0].0)
        .shape("slow", &["SELECT * FROM slow"])
        .start()
        .await;
    let fleet = Fleet::start(light::Settings {
        url: streamer.url(),
        token: TOKEN.into(),
        replicas: SLOW,
        connections: SLOW,
        subscriptions: Box::new(|_| vec![light::subscription("slow", &[])]),
        made: 1,
    });
    fleet.read(false);
    // Each is sent all that its connection takes, and then stands.
    until("all are there", ANSWER_MAX, || async {
        let page = streamer.get("/metrics").await.expect("metrics");
        let all = format!("anabranch_streamer_sessions {SLOW}\n");
        page.body.contains(&all).then_some(())
    })
    .await;
    tokio::time::sleep(SETTLE).await;
    let (peak, (cap, bytes)) = (streamer.memory_peak_bytes(), CAPS[0]);
    let verdict = if peak <= bytes { "holds" } else { "TOO MUCH" };
    report.note(format!(
        "M4   streamer, {SLOW} replicas that do not read {} MiB each: peak {} MiB of {cap}: {verdict}",
        (SLOW_ROWS * SLOW_ROW_BYTES) >> 20,
        peak >> 20
    ));
    drop(fleet);
    streamer.terminate().await;
    lab.drop_slots().await;
}
