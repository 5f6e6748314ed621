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
            .set("autovacuum", "off");
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
        let (began, walsender) = (Instant::now(), self.busy().await);
        self.subscriber
            .execute(&format!(
                "CREATE SUBSCRIPTION bench CONNECTION '{}' PUBLICATION bench",
                self.source_for_peer()
            ))
            .await;
        let subscriber = &self.subscriber;
        until("the subscription has copied", WORK_MAX, || async {
            let ready = subscriber
                .query("SELECT srsubstate = 'r' FROM pg_subscription_rel", &[])
                .await;
            ready.first().is_some_and(|row| row.get(0)).then_some(())
        })
        .await;
        let took = began.elapsed();
        let cost = Cost::new(&[("Postgres", self.busy().await - walsender, 0)]);
        report.add("W1", "native logical replication", took, Some(cost));
        assert_eq!(Self::count_in(&self.subscriber).await, rows);
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        self.settle().await;
        let postgres = self.busy().await;
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
        let cost = self.cost(postgres).await;
        report.add("W1", "anabranch", took, Some(cost));
    }

    /// W2a or W2b, and its limit.
    pub async fn backlog(&mut self, report: &mut Report, work: &str) {
        let (streamer, replica) = self.running.as_ref().expect("W1 was run");
        streamer.terminate().await;
        replica.terminate().await;
        self.database
            .execute("SELECT pg_create_logical_replication_slot('drain', 'pgoutput')")
            .await;
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

        let plain = limits::drain(self, false).await;
        report.add(work, "limit: pg_recvlogical to nowhere", plain, None);

        let (began, postgres) = (Instant::now(), self.busy().await);
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
        let cost = Cost::new(&[("Postgres", self.busy().await - postgres, 0)]);
        report.add(work, "native logical replication", took, Some(cost));
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        self.settle().await;
        let (streamer, replica) = self.running.as_ref().expect("W1 was run");
        let postgres = self.busy().await;
        let began = Instant::now();
        streamer.spawn();
        replica.spawn();
        replica_row(replica, marker).await;
        let took = began.elapsed();
        let cost = self.cost(postgres).await;
        report.add(work, "anabranch", took, Some(cost));
    }

    /// W3: each consumer for itself.
    pub async fn latency(&mut self, report: &mut Report) {
        let seconds = self.sizes.latency;
        let source = latency::Eye::Postgres(self.source.url(self.database.name()));
        latency::measure(self, source, "limit: seen at the source", seconds, report).await;

        self.subscriber
            .execute("ALTER SUBSCRIPTION bench ENABLE")
            .await;
        let peer = latency::Eye::Postgres(self.peer.url(self.subscriber.name()));
        latency::measure(self, peer, "native logical replication", seconds, report).await;
        self.subscriber
            .execute("ALTER SUBSCRIPTION bench DISABLE")
            .await;

        let (streamer, replica) = self.running.as_ref().expect("W1 was run");
        streamer.until_ready().await;
        replica.until_caught_up(&self.database).await;
        let eye = latency::Eye::Sqlite(replica.file());
        latency::measure(self, eye, "anabranch", seconds, report).await;
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

    /// Those that nobody uses.
    pub async fn drop_slots(&self) {
        self.database
            .execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active",
            )
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

    /// CPU seconds of both clusters, ended processes included.
    async fn busy(&self) -> f64 {
        let mut seconds = 0.0;
        for pid in [self.source.pid(), self.peer.pid()].into_iter().flatten() {
            seconds += process::cpu_seconds_of_tree(pid);
        }
        seconds
    }

    async fn cost(&self, postgres: f64) -> Cost {
        let (streamer, replica) = self.running.as_ref().expect("they run");
        Cost::new(&[
            ("Postgres", self.busy().await - postgres, 0),
            (
                "streamer",
                cpu(streamer.pid()),
                streamer.memory_peak_bytes(),
            ),
            ("replica", cpu(replica.pid()), replica.memory_peak_bytes()),
        ])
    }
}

fn cpu(pid: Option<rustix::process::Pid>) -> f64 {
    pid.map_or(0.0, process::cpu_seconds)
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
