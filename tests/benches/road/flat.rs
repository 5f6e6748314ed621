//! F1: whether a change costs more the more is subscribed.
//!
//! Light replicas are connected, and the streamer is stopped (SIGSTOP) while a backlog is written: it lasts shorter than the
//! silence that both sides take for an end. Then it goes on, and works off the backlog with all of its sessions live. The
//! last transaction has a mark for each replica; when the last of them has seen it, all is told.
//!
//! Every row concerns exactly one replica, however many values are subscribed, so what is delivered is the same, but with one
//! value: there a transaction is one delivery instead of a hundred.

use std::time::{Duration, Instant};

use anabranch_tests::{
    light::{self, Fleet},
    peers::{Streamer, TOKEN},
    postgres::Database,
    process,
    wait::until,
};

use crate::{
    Sizes,
    lab::Lab,
    limits::DRAINS,
    report::{Cost, Report, median},
};

/// How many distinct values are subscribed.
const VALUES: [u64; 4] = [1, 100, 10_000, 100_000];

/// Rows of the table: one for each of the most values.
const ROWS: u64 = 100_000;

/// Sessions at most; each then has several values.
const SESSIONS_MAX: u64 = 1_000;

/// Rows that a transaction changes.
const TOGETHER: u64 = 100;

/// Transactions of so many rows, and those of one.
const TRANSACTIONS: u64 = 3_000;
const SMALL_TRANSACTIONS: u64 = 50_000;

/// The streamer must not be stopped for as long as a replica's silence may last, from its last word on.
const STOPPED_MAX: Duration = Duration::from_secs(7);

/// No work takes longer, or something hangs.
const WORK_MAX: Duration = Duration::from_secs(300);

/// What a table must have so that all of a backlog concerns somebody.
pub async fn measure(lab: &Lab, sizes: &Sizes, report: &mut Report) {
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); VALUES.len()];
    let (mut ours, mut limit) = (Vec::new(), Vec::new());
    for _ in 0..sizes.rounds {
        for (values, rates) in VALUES.into_iter().zip(&mut rates) {
            let mut flat = Flat::start(lab, sizes, values).await;
            let (took, _) = flat.backlog(lab, TRANSACTIONS, TOGETHER).await;
            let who = format!("anabranch, {values} values");
            let count = TRANSACTIONS * TOGETHER;
            let cost = flat.cost.clone();
            rates.push(report.rate_of("row changes", ("F1", &who), count, took, cost));
            if values == VALUES[VALUES.len() - 1] {
                let (took, drained) = flat.backlog(lab, SMALL_TRANSACTIONS, 1).await;
                let mut add = |who, took, cost| {
                    report.rate_of(
                        "one-row transactions",
                        ("F1", who),
                        SMALL_TRANSACTIONS,
                        took,
                        cost,
                    )
                };
                ours.push(add("anabranch, 100000 values", took, flat.cost.clone()));
                let name = "limit: pg_recvlogical to nowhere";
                limit.push(add(name, drained, Cost::default()));
            }
            flat.end(lab).await;
        }
    }
    let rates: Vec<f64> = rates.iter().map(|rates| median(rates)).collect();
    let (first, last) = (rates[0], rates[rates.len() - 1]);
    let verdict = |holds: bool| if holds { "holds" } else { "MISSED" };
    report.note(format!(
        "F1   {} values: {:.2} of the rate with 1 (aim 0.8): {}; {:.2} of that with 100; {last:.0} row changes a second (aim \
         40,000): {}",
        VALUES[3],
        last / first,
        verdict(last >= 0.8 * first),
        last / rates[1],
        verdict(last >= 40_000.0),
    ));
    let ratio = median(&ours) / median(&limit);
    report.note(format!(
        "F1   one-row transactions: {ratio:.2} of what pg_recvlogical drains (aim 0.6): {}",
        verdict(ratio >= 0.6)
    ));
}

struct Flat {
    database: Database,
    streamer: Streamer,
    fleet: Fleet,
    sessions: u64,
    mark: i64,
    /// Of the last backlog.
    cost: Cost,
}

impl Flat {
    async fn start(lab: &Lab, sizes: &Sizes, values: u64) -> Flat {
        let database = lab.source.database().await;
        database
            .execute(&format!(
                "CREATE TABLE flat (id int8 PRIMARY KEY, owner int8 NOT NULL, made int8 NOT NULL, note text NOT NULL)
                   WITH (fillfactor = 50);
                 INSERT INTO flat SELECT g, g % {values}, 0, repeat('note ', 20) FROM generate_series(0, {ROWS} - 1) g"
            ))
            .await;
        database.execute("VACUUM ANALYZE flat").await;
        let streamer = Streamer::config(&database)
            .set("memory_max", sizes.memory.clone())
            .toml(
                r#"[shape.own]
                   params.owner = { client = "int8" }
                   tables = ["SELECT * FROM flat WHERE owner = $owner"]"#,
            )
            .start()
            .await;
        let sessions = values.min(SESSIONS_MAX);
        let fleet = Fleet::start(light::Settings {
            url: streamer.url(),
            token: TOKEN.into(),
            replicas: sessions as usize,
            connections: sessions as usize,
            subscriptions: Box::new(move |number| {
                let own = (number as u64..values).step_by(sessions as usize);
                own.map(|value| light::subscription("own", &[("owner", value.to_string())]))
                    .collect()
            }),
            made: 2,
        });
        let flat = Flat {
            database,
            streamer,
            fleet,
            sessions,
            mark: 0,
            cost: Cost::default(),
        };
        flat.until_caught_up().await;
        flat
    }

    async fn until_caught_up(&self) {
        let lsn = self.database.lsn().await;
        until("all light replicas are there", WORK_MAX, || async {
            let there = self.fleet.at(lsn);
            match there as u64 == self.sessions {
                true => Ok(()),
                false => Err((there, self.fleet.last_failure())),
            }
        })
        .await;
    }

    /// How long our road takes for so many transactions, and how long `pg_recvlogical`.
    async fn backlog(&mut self, lab: &Lab, transactions: u64, rows: u64) -> (Duration, Duration) {
        self.mark -= 1;
        let mark = self.mark;
        let limit = &DRAINS[1];
        limit.create(&self.database).await;
        self.database.execute("CHECKPOINT").await;
        self.fleet.received();
        let pid = self.streamer.pid().expect("it runs");
        let busy = || [process::cpu_seconds(pid), Fleet::cpu_seconds()];
        let (clusters, before) = (lab.busy(), busy());
        self.streamer.pause();
        let paused = Instant::now();
        // 7919 is a prime: the rows are not in the order of the table.
        self.database
            .execute(&format!(
                "DO $$ BEGIN
                   PERFORM set_config('synchronous_commit', 'off', false);
                   FOR i IN 1..{transactions} LOOP
                     UPDATE flat SET made = i WHERE id BETWEEN i * 7919::int8 % ({ROWS} / {rows}) * {rows}
                       AND i * 7919::int8 % ({ROWS} / {rows}) * {rows} + {rows} - 1;
                     COMMIT;
                   END LOOP;
                   PERFORM set_config('synchronous_commit', 'on', false);
                   UPDATE flat SET made = {mark} WHERE id < {};
                 END $$",
                self.sessions
            ))
            .await;
        assert!(paused.elapsed() < STOPPED_MAX, "{:?}", paused.elapsed());
        let began = Instant::now();
        self.streamer.resume();
        until("all have the mark", WORK_MAX, || async {
            let (marked, _) = self.fleet.marked(mark);
            match marked as u64 == self.sessions {
                true => Ok(()),
                false => Err((marked, self.fleet.last_failure())),
            }
        })
        .await;
        let (_, last) = self.fleet.marked(mark);
        let took = last.expect("a mark was seen") - began;
        let after = busy();
        let received = self.fleet.received();
        self.cost = lab.cost(clusters);
        let peak = self.streamer.memory_peak_bytes();
        self.cost.add("streamer", after[0] - before[0], peak);
        self.cost.add("light replicas", after[1] - before[1], 0);
        eprintln!(
            "    {} messages with {} rows of {} reached {} sessions; {} streams begun in all",
            received.messages,
            received.rows,
            transactions * rows + self.sessions,
            self.sessions,
            self.fleet.attempts().0
        );
        let drained = limit.drain(lab, &self.database, "anabranch").await;
        (took, drained)
    }

    async fn end(self, lab: &Lab) {
        drop(self.fleet);
        self.streamer.terminate().await;
        drop(self.streamer);
        drop(self.database);
        lab.drop_slots().await;
    }
}
