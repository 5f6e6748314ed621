//! Two clusters, a streamer and a replica, and what is done with them.

use std::time::{Duration, Instant};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server},
    process, programs,
    wait::until,
};

use crate::{
    Sizes, latency, limits,
    report::{Cost, Report},
};

/// No work takes longer than this, or something hangs.
const WORK_MAX: Duration = Duration::from_secs(300);

/// The table of all works.
pub const EVENTS: &str = "CREATE TABLE events (id bigint PRIMARY KEY, org_id int, kind text, payload jsonb, \
     amount numeric(12,2), ok bool, created_at timestamptz, tag uuid)";

/// CPU seconds of the source and the peer.
#[derive(Clone, Copy)]
pub struct Busy([f64; 2]);

pub struct Lab {
    sizes: Sizes,
    pub source: Server,
    peer: Server,
    pub database: Database,
    subscriber: Database,
    running: Option<(Streamer, Replica)>,
    /// Marks the end of a backlog: the id of the last row inserted for that.
    marker: u64,
}

impl Lab {
    pub async fn new(sizes: &Sizes) -> Lab {
        // Builds the programs, if need be: not while something is timed.
        programs::directory();
        let options = Options::new()
            .set("shared_buffers", "1GB")
            .set("max_wal_size", "8GB")
            .set("checkpoint_timeout", "30min")
            .set("fsync", "on")
            .set("autovacuum", "off")
            // A subscription that is enabled again goes on at once, not up to five seconds later.
            .set("wal_retrieve_retry_interval", "100ms");
        // Their processes are measured, and one connects to the other: not in containers.
        let local = "cargo bench needs a Postgres server's programs on this machine";
        let source = Server::start_local(options.clone()).await.expect(local);
        let peer = Server::start_local(options).await.expect(local);
        let database = source.database().await;
        let subscriber = peer.database().await;
        database.execute(EVENTS).await;
        database
            .execute("CREATE PUBLICATION bench FOR TABLE events")
            .await;
        subscriber.execute(EVENTS).await;
        Lab {
            sizes: sizes.clone(),
            source,
            peer,
            database,
            subscriber,
            running: None,
            marker: 1_000_000_000,
        }
    }

    /// The same rows for each round: what an earlier one updated and added is not in order any more.
    pub async fn fill(&self) {
        let rows = self.sizes.rows;
        self.database
            .execute(&format!(
                "TRUNCATE events; INSERT INTO events SELECT g, g % 1000, 'kind-' || g % 17,
                   jsonb_build_object('name', 'event number ' || g, 'hash', md5(g::text), 'again', md5((g * 7)::text), 'n', g),
                   (g % 100000) / 100.0, g % 2 = 0, '2024-01-01'::timestamptz + g * interval '1 second', md5(g::text)::uuid
                   FROM generate_series(1, {rows}) g"
            ))
            .await;
        self.database.execute("VACUUM ANALYZE events").await;
    }

    /// W1, and its limits.
    pub async fn initial_copy(&mut self, report: &mut Report) {
        let rows = self.sizes.rows;
        report.add(
            "W1",
            "limit: COPY to nowhere",
            limits::copy_out(self).await,
            None,
        );
        let loop_time = limits::sqlite_inserts(self.sizes.rows);
        report.add("W1", "limit: SQLite insert loop", loop_time, None);

        self.settle().await;
        let (began, before) = (Instant::now(), self.busy());
        self.subscriber
            .execute(&format!(
                "CREATE SUBSCRIPTION bench CONNECTION '{}' PUBLICATION bench",
                self.source_for_peer()
            ))
            .await;
        let subscriber = &self.subscriber;
        let copied = async |states: &str| {
            let sql = format!("SELECT srsubstate IN ({states}) FROM pg_subscription_rel");
            until("the subscription has copied", WORK_MAX, || async {
                let ready = subscriber.query(&sql, &[]).await;
                ready.first().is_some_and(|row| row.get(0)).then_some(())
            })
            .await;
        };
        // The first of these is committed together with the rows.
        copied("'f', 's', 'r'").await;
        let took = began.elapsed();
        let cost = self.cost(before);
        report.add("W1", "native logical replication", took, Some(cost));
        assert_eq!(Self::count_in(&self.subscriber).await, rows);
        copied("'r'").await;
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        self.settle().await;
        let before = self.busy();
        let streamer = Streamer::config(&self.database)
            .set("memory_max", self.sizes.memory.clone())
            .shape("all", &["SELECT * FROM events"])
            .prepare();
        let replica = Replica::config(&streamer)
            .set("memory_max", half(&self.sizes.memory))
            .subscribe("all")
            .prepare();
        let began = Instant::now();
        streamer.spawn();
        replica.spawn();
        replica_has(&replica, rows).await;
        let took = began.elapsed();
        self.running = Some((streamer, replica));
        let cost = self.cost(before);
        report.add("W1", "anabranch", took, Some(cost));
    }

    /// W2a or W2b, and its limits.
    pub async fn backlog(&mut self, report: &mut Report, work: &str) {
        self.stop_ours().await;
        for limit in &limits::DRAINS {
            limit.create(&self.database).await;
        }
        if work == "W2a" {
            self.many_transactions().await;
        } else {
            self.database
                .execute("UPDATE events SET amount = amount + 1, ok = NOT ok")
                .await;
        }
        self.marker += 1;
        let marker = self.marker;
        self.database
            .execute(&format!("INSERT INTO events (id) VALUES ({marker})"))
            .await;
        self.settle().await;

        for limit in &limits::DRAINS {
            let took = limit.drain(self, &self.database, "bench").await;
            report.add(work, limit.name, took, None);
        }

        let (began, before) = (Instant::now(), self.busy());
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench ENABLE")
            .await;
        let subscriber = &self.subscriber;
        until("the subscription has the marker", WORK_MAX, || async {
            let sql = "SELECT FROM events WHERE id = $1";
            let found = subscriber.query(sql, &[&(marker as i64)]).await;
            found.first().map(|_| ())
        })
        .await;
        let took = began.elapsed();
        let cost = self.cost(before);
        report.add(work, "native logical replication", took, Some(cost));
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        self.settle().await;
        let before = self.busy();
        let began = Instant::now();
        replica_row(self.start_ours(), marker).await;
        let took = began.elapsed();
        let cost = self.cost(before);
        report.add(work, "anabranch", took, Some(cost));
        report.note(format!(
            "{work:4} catch-ups of the replica: {}",
            self.catch_ups().await
        ));
    }

    /// W3: each consumer for itself, and without a backlog.
    pub async fn latency(&mut self, report: &mut Report) {
        let seconds = self.sizes.latency;
        self.stop_ours().await;
        let source = latency::Eye::Postgres(self.source.url(self.database.name()));
        latency::measure(
            self,
            source,
            ("W3", "limit: seen at the source"),
            seconds,
            report,
        )
        .await;

        self.subscriber
            .execute("ALTER SUBSCRIPTION bench ENABLE")
            .await;
        let newest = "SELECT max(id) FROM events";
        let expected: i64 = self.database.query(newest, &[]).await[0].get(0);
        until("the subscription has caught up", WORK_MAX, || async {
            let found: i64 = self.subscriber.query(newest, &[]).await[0].get(0);
            (found == expected).then_some(())
        })
        .await;
        let peer = latency::Eye::Postgres(self.peer.url(self.subscriber.name()));
        latency::measure(
            self,
            peer,
            ("W3", "native logical replication"),
            seconds,
            report,
        )
        .await;
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        let replica = self.start_ours();
        replica.until_caught_up(&self.database).await;
        let eye = latency::Eye::Sqlite(replica.file());
        latency::measure(self, eye, ("W3", "anabranch"), seconds, report).await;
    }

    /// How often the replica was served from the mirror: once as it joined, and whenever it was too slow for its queue.
    async fn catch_ups(&self) -> String {
        let (streamer, _) = self.running.as_ref().expect("W1 was run");
        let page = streamer.get("/metrics").await.expect("metrics");
        let mut lines = page.body.lines();
        let name = "anabranch_streamer_catch_ups_total ";
        let count = lines.find_map(|line| line.strip_prefix(name));
        count.expect("a counter of catch-ups").to_owned()
    }

    /// Back to the state before W1, but for the rows.
    pub async fn clear(&mut self) {
        self.subscriber.execute("DROP SUBSCRIPTION bench").await;
        self.subscriber.execute("TRUNCATE events").await;
        if let Some((streamer, replica)) = self.running.take() {
            replica.terminate().await;
            streamer.terminate().await;
        }
        self.drop_slots().await;
    }

    async fn stop_ours(&self) {
        let (streamer, replica) = self.running.as_ref().expect("W1 was run");
        streamer.terminate().await;
        replica.terminate().await;
    }

    fn start_ours(&self) -> &Replica {
        let (streamer, replica) = self.running.as_ref().expect("W1 was run");
        streamer.spawn();
        replica.spawn();
        replica
    }

    /// All of them, as soon as nobody uses them: whoever did has ended.
    pub async fn drop_slots(&self) {
        until("the slots are dropped", WORK_MAX, || async {
            let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active";
            self.database.execute(sql).await;
            let left = self.database.query("SELECT FROM pg_replication_slots", &[]);
            left.await.is_empty().then_some(())
        })
        .await;
    }

    /// Writes what is dirty, so that nobody pays for what was done before.
    async fn settle(&self) {
        self.database.execute("CHECKPOINT").await;
        self.subscriber.execute("CHECKPOINT").await;
    }

    async fn many_transactions(&self) {
        let script = format!(
            "\\set id random(1, {})\nUPDATE events SET amount = amount + 1, ok = NOT ok WHERE id = :id;\n",
            self.sizes.rows
        );
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("update.sql");
        std::fs::write(&file, script).expect("write a script");
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), readable)
            .expect("let the server's user read it");
        let transactions = (self.sizes.transactions / 4).to_string();
        let file = file.to_str().expect("a path of ours");
        self.database
            .execute("ALTER SYSTEM SET synchronous_commit = off")
            .await;
        self.database.execute("SELECT pg_reload_conf()").await;
        let arguments = [
            "-n",
            "-M",
            "prepared",
            "-c",
            "4",
            "-j",
            "2",
            "-t",
            &transactions,
            "-f",
            file,
        ];
        self.source
            .tool("pgbench", self.database.name(), &arguments)
            .await;
        self.database
            .execute("ALTER SYSTEM RESET synchronous_commit")
            .await;
        self.database.execute("SELECT pg_reload_conf()").await;
    }

    async fn count_in(database: &Database) -> u64 {
        let rows = database.query("SELECT count(*) FROM events", &[]).await;
        rows[0].get::<_, i64>(0) as u64
    }

    fn source_for_peer(&self) -> String {
        self.database.url().to_owned()
    }

    /// CPU seconds of each cluster, ended processes included.
    pub fn busy(&self) -> Busy {
        Busy(self.clusters().map(process::cpu_seconds_of_tree))
    }

    /// What was used since `before`, by whoever runs: of ours everything since it was started.
    pub fn cost(&self, before: Busy) -> Cost {
        let Busy(now) = self.busy();
        let peaks = self.clusters().map(process::private_peak_bytes_of_tree);
        let mut cost = Cost::default();
        for (at, name) in ["source", "peer"].into_iter().enumerate() {
            cost.add(name, now[at] - before.0[at], peaks[at]);
        }
        if let Some((streamer, replica)) = &self.running {
            for (name, peer) in [("streamer", &**streamer), ("replica", &**replica)] {
                if let Some(pid) = peer.pid() {
                    cost.add(name, process::cpu_seconds(pid), peer.memory_peak_bytes());
                }
            }
        }
        cost
    }

    fn clusters(&self) -> [rustix::process::Pid; 2] {
        [&self.source, &self.peer].map(|server| server.pid().expect("it runs on this machine"))
    }
}

/// Until the replica's file has so many rows, looking only once it says that it is complete.
async fn replica_has(replica: &Replica, rows: u64) {
    until("the replica has all rows", WORK_MAX, || async {
        replica.get("/readyz").await?.ok()
    })
    .await;
    let count: i64 = replica
        .open()
        .query_row("SELECT count(*) FROM events", [], |row| row.get(0))
        .expect("the table is there");
    assert_eq!(count as u64, rows, "the first commit is complete");
}

async fn replica_row(replica: &Replica, id: u64) {
    let file = replica.open();
    until("the replica has the marker", WORK_MAX, || async {
        let sql = "SELECT 1 FROM events WHERE id = ?1";
        file.query_row(sql, [id as i64], |_| Ok(())).ok()
    })
    .await;
}

/// Half of a size such as `768MiB`.
fn half(size: &str) -> String {
    let digits = size.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits.parse().expect("a size");
    format!("{}{}", number / 2, &size[digits.len()..])
}
