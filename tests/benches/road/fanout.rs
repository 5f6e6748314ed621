//! F2 and F3: many connected replicas, and what happens when all of them lose their connections at once.

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
    report::{Cost, Report},
};

/// Rows of each replica.
const ROWS: usize = 4;

/// Transactions a second, and rows of each.
const RATE: usize = 500;
const TOGETHER: usize = 4;

/// Replicas that share one shape, and changes of it a second.
const SHARING: usize = 1_000;
const SHARED_RATE: usize = 20;

/// Nothing grows here: longer tells no more.
const SHARED_MAX: Duration = Duration::from_secs(30);

/// What is changed while all replicas are away.
const AWAY_TRANSACTIONS: usize = 2_500;

/// No work takes longer, or something hangs.
const WORK_MAX: Duration = Duration::from_secs(300);

/// Long enough for what is left of a burst of allocations to go back.
const SETTLE: Duration = Duration::from_secs(5);

/// The memory that a connected replica may take: the aim.
const SESSION_BYTES: f64 = 20.0 * 1024.0;

const SHAPES: &str = r#"
    [shape.own]
    params.owner = { client = "int8" }
    tables = ["SELECT * FROM fan WHERE owner = $owner"]
    [shape.news]
    tables = ["SELECT * FROM news"]"#;

struct Fan<'a> {
    lab: &'a Lab,
    database: Database,
    streamer: Streamer,
    replicas: usize,
}

pub async fn measure(
    lab: &Lab,
    sizes: &Sizes,
    wanted: &impl Fn(&str) -> bool,
    report: &mut Report,
) {
    let replicas = sizes.replicas;
    let database = lab.source.database().await;
    database
        .execute(&format!(
            "CREATE TABLE fan (id int8 PRIMARY KEY, owner int8 NOT NULL, made int8 NOT NULL, note text NOT NULL)
               WITH (fillfactor = 50);
             INSERT INTO fan SELECT g, g % {replicas}, 0, repeat('note ', 20) FROM generate_series(0, {} - 1) g;
             CREATE TABLE news (id int8 PRIMARY KEY, n int8 NOT NULL, made int8 NOT NULL, note text NOT NULL);
             INSERT INTO news SELECT g, 0, 0, repeat('note ', 20) FROM generate_series(0, 99) g",
            replicas * ROWS
        ))
        .await;
    database.execute("VACUUM ANALYZE").await;
    let streamer = Streamer::config(&database)
        .set("memory_max", sizes.memory.clone())
        .toml(SHAPES)
        .start()
        .await;
    let fan = Fan {
        lab,
        database,
        streamer,
        replicas,
    };
    fan.sleep().await;
    let empty = fan.resident();
    let connections = sizes.connections;
    let fleet = fan.fleet(replicas, connections, |number| {
        light::subscription("own", &[("owner", number.to_string())])
    });
    let began = Instant::now();
    fan.until_caught_up(&fleet).await;
    report.note(format!(
        "F2   {replicas} replicas on {connections} connections joined in {:.2} s",
        began.elapsed().as_secs_f64()
    ));
    fan.idle(&fleet, empty, report).await;
    if wanted("F2") {
        fan.load(&fleet, sizes.fanout, report).await;
        fan.per_session("after the load", empty, report);
    }
    if wanted("F3") {
        fan.herd(&fleet, false, report).await;
        fan.herd(&fleet, true, report).await;
        fan.sleep().await;
        fan.per_session("after the herds", empty, report);
    }
    drop(fleet);
    if wanted("F2") {
        let sharing = SHARING.min(replicas);
        let fleet = fan.fleet(sharing, sharing.min(connections), |_| {
            light::subscription("news", &[])
        });
        fan.until_caught_up(&fleet).await;
        fan.share(&fleet, sharing, sizes.fanout.min(SHARED_MAX), report)
            .await;
    }
    let Fan {
        database, streamer, ..
    } = fan;
    streamer.terminate().await;
    drop(streamer);
    drop(database);
    lab.drop_slots().await;
}

impl Fan<'_> {
    fn fleet(
        &self,
        replicas: usize,
        connections: usize,
        subscription: impl Fn(usize) -> anabranch_proto::v1::Subscription + Send + Sync + 'static,
    ) -> Fleet {
        Fleet::start(light::Settings {
            url: self.streamer.url(),
            token: TOKEN.into(),
            replicas,
            connections,
            subscriptions: Box::new(move |number| vec![subscription(number)]),
            made: 2,
        })
    }

    async fn until_caught_up(&self, fleet: &Fleet) {
        let lsn = self.database.lsn().await;
        until("all light replicas are there", WORK_MAX, || async {
            let there = fleet.at(lsn);
            let all = there == fleet.replicas();
            all.then_some(()).ok_or((there, fleet.last_failure()))
        })
        .await;
    }

    /// What the replicas cost while nothing happens.
    async fn idle(&self, fleet: &Fleet, empty: u64, report: &mut Report) {
        self.sleep().await;
        self.per_session("idle", empty, report);
        fleet.received();
        let (cpu, light, began) = (self.cpu(), Fleet::cpu_seconds(), Instant::now());
        self.sleep().await;
        let seconds = began.elapsed().as_secs_f64();
        report.note(format!(
            "F2   idle: streamer {:.2} CPU s a second, {:.0} messages a second; light replicas {:.2} CPU s a second",
            (self.cpu() - cpu) / seconds,
            fleet.received().messages as f64 / seconds,
            (Fleet::cpu_seconds() - light) / seconds,
        ));
    }

    fn per_session(&self, when: &str, empty: u64, report: &mut Report) {
        let each = self.resident().saturating_sub(empty) as f64 / self.replicas as f64;
        let verdict = if each <= SESSION_BYTES {
            "holds"
        } else {
            "MISSED"
        };
        report.note(format!(
            "F2   memory {when}: {} MiB, {:.1} KiB for each connected replica (aim 20): {verdict}",
            self.resident() >> 20,
            each / 1024.0
        ));
    }

    /// 2,000 row changes a second.
    async fn load(&self, fleet: &Fleet, duration: Duration, report: &mut Report) {
        let script = format!(
            "\\set id random(0, {} - {TOGETHER})\nUPDATE fan SET made = (extract(epoch FROM clock_timestamp()) * 1e6)::int8 \
             WHERE id BETWEEN :id AND :id + {TOGETHER} - 1;\n",
            self.replicas * ROWS
        );
        let mut resident = Vec::new();
        let took = self
            .paced(fleet, &script, RATE, duration, &mut resident)
            .await;
        let name = format!("{} replicas, own shapes", self.replicas);
        self.report_load(fleet, &name, took, report);
        let (early, late) = (resident[resident.len() / 4], resident[resident.len() - 1]);
        report.note(format!(
            "F2   memory in {} s of load: {} MiB after a quarter, {} MiB at the end ({:+.1} %)",
            duration.as_secs(),
            early >> 20,
            late >> 20,
            (late as f64 / early as f64 - 1.0) * 100.0
        ));
    }

    /// One shape for all.
    async fn share(&self, fleet: &Fleet, sharing: usize, duration: Duration, report: &mut Report) {
        let script = "\\set id random(0, 99)\nUPDATE news SET made = (extract(epoch FROM clock_timestamp()) * 1e6)::int8 \
                      WHERE id = :id;\n";
        let took = self
            .paced(fleet, script, SHARED_RATE, duration, &mut Vec::new())
            .await;
        let name = format!("{sharing} replicas, one shape");
        self.report_load(fleet, &name, took, report);
    }

    /// pgbench at a rate, without its first second; what the streamer had resident meanwhile; what both used.
    async fn paced(
        &self,
        fleet: &Fleet,
        script: &str,
        rate: usize,
        duration: Duration,
        resident: &mut Vec<u64>,
    ) -> Cost {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("load.sql");
        std::fs::write(&file, script).expect("write a script");
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), readable)
            .expect("let the server's user read it");
        let (rate, seconds) = (rate.to_string(), duration.as_secs().max(2).to_string());
        let file = file.to_str().expect("a path of ours");
        let arguments = [
            "-n", "-M", "prepared", "-c", "4", "-j", "1", "-R", &rate, "-T", &seconds, "-f", file,
        ];
        let (clusters, cpu, light) = (self.lab.busy(), self.cpu(), Fleet::cpu_seconds());
        let load = self
            .lab
            .source
            .tool("pgbench", self.database.name(), &arguments);
        let look = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            fleet.received();
            fleet.measure(true);
            loop {
                resident.push(self.resident());
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        tokio::select! {
            _ = load => {}
            () = look => unreachable!("it never ends"),
        }
        self.until_caught_up(fleet).await;
        fleet.measure(false);
        let mut cost = self.lab.cost(clusters);
        cost.add(
            "streamer",
            self.cpu() - cpu,
            self.streamer.memory_peak_bytes(),
        );
        cost.add("light replicas", Fleet::cpu_seconds() - light, 0);
        cost
    }

    fn report_load(&self, fleet: &Fleet, name: &str, cost: Cost, report: &mut Report) {
        let mut received = fleet.received();
        received.latencies.sort_by(f64::total_cmp);
        report.latency("F2", name, &received.latencies, cost);
        report.note(format!(
            "F2   {name}: {} rows ({} MiB) in {} messages were received",
            received.rows,
            received.bytes >> 20,
            received.messages
        ));
    }

    /// All lose their connections, something changes meanwhile, and all return at once.
    async fn herd(&self, fleet: &Fleet, under_load: bool, report: &mut Report) {
        let pid = self.streamer.pid().expect("it runs");
        fleet.lose();
        until("the streamer has noticed", WORK_MAX, || async {
            let page = self.streamer.get("/metrics").await.expect("metrics");
            page.body.contains("anabranch_streamer_sessions 0\n")
        })
        .await;
        self.database
            .execute(&format!(
                "DO $$ BEGIN
                   FOR i IN 1..{AWAY_TRANSACTIONS} LOOP
                     UPDATE fan SET made = i WHERE id BETWEEN i * {TOGETHER} % {0} AND i * {TOGETHER} % {0} + {TOGETHER} - 1;
                     COMMIT;
                   END LOOP;
                 END $$",
                self.replicas * ROWS
            ))
            .await;
        // What an idle while of Postgres is.
        self.sleep().await;
        let (cpu, count, began) = (self.source_cpu(), self.statements().await, Instant::now());
        self.sleep().await;
        let idle_seconds = began.elapsed().as_secs_f64();
        let idle = [
            (self.source_cpu() - cpu) / idle_seconds,
            (self.statements().await - count) as f64 / idle_seconds,
        ];

        let attempts = fleet.attempts();
        process::forget_memory_peak(pid);
        let resident = self.resident();
        let (cpu, count) = (self.source_cpu(), self.statements().await);
        let (streamer, light) = (self.cpu(), Fleet::cpu_seconds());
        let began = Instant::now();
        fleet.let_back();
        let return_all = self.until_caught_up(fleet);
        if under_load {
            let script = format!(
                "\\set id random(0, {} - {TOGETHER})\nUPDATE fan SET made = 1 WHERE id BETWEEN :id AND :id + {TOGETHER} - 1;\n",
                self.replicas * ROWS
            );
            let directory = tempfile::tempdir().expect("a directory");
            let file = directory.path().join("load.sql");
            std::fs::write(&file, script).expect("write a script");
            let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(directory.path(), readable).expect("let it be read");
            let (rate, file) = (RATE.to_string(), file.to_str().expect("a path of ours"));
            let arguments = [
                "-n", "-M", "prepared", "-c", "4", "-j", "1", "-R", &rate, "-T", "300", "-f", file,
            ];
            let name = self.database.name();
            tokio::select! {
                _ = self.lab.source.tool("pgbench", name, &arguments) => panic!("the herd takes too long"),
                () = return_all => {}
            }
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'";
            self.database.execute(end).await;
        } else {
            return_all.await;
        }
        let seconds = began.elapsed().as_secs_f64();
        let load = if under_load {
            "under load".to_owned()
        } else {
            format!(
                "Postgres {:.2} CPU s a second ({:.2} when idle), {:.1} transactions a second ({:.1} when idle)",
                (self.source_cpu() - cpu) / seconds,
                idle[0],
                (self.statements().await - count) as f64 / seconds,
                idle[1]
            )
        };
        let now = fleet.attempts();
        report.note(format!(
            "F3   {} replicas return, {}: all caught up after {seconds:.2} s; {} streams were begun, {} told to come later; \
             streamer {:.2} CPU s, memory {} MiB before, peak {} MiB; light replicas {:.2} CPU s; {load}",
            self.replicas,
            if under_load { "and 2,000 rows a second change" } else { "nothing else happens" },
            now.0 - attempts.0,
            now.1 - attempts.1,
            self.cpu() - streamer,
            resident >> 20,
            self.streamer.memory_peak_bytes() >> 20,
            Fleet::cpu_seconds() - light,
        ));
    }

    /// Transactions of the database so far, this look's own not counted: it is what the last look has ended.
    async fn statements(&self) -> i64 {
        let sql = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
        self.database.query(sql, &[]).await[0].get(0)
    }

    fn source_cpu(&self) -> f64 {
        process::cpu_seconds_of_tree(self.lab.source.pid().expect("it runs on this machine"))
    }

    fn cpu(&self) -> f64 {
        process::cpu_seconds(self.streamer.pid().expect("it runs"))
    }

    fn resident(&self) -> u64 {
        let pid = self.streamer.pid().expect("it runs");
        process::memory_bytes(pid).expect("/proc tells the memory of a process")
    }

    async fn sleep(&self) {
        tokio::time::sleep(SETTLE).await;
    }
}
