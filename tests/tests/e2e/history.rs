//! History that does not go on is noticed, said, and stopped: never gone over. The file keeps its last state meanwhile,
//! and does not claim to be up to date.

use anabranch_tests::{
    oracle::file::{self, Snapshot},
    peers::{Replica, Streamer, StreamerConfig},
    postgres::{Database, Options, Server, Stop},
    proxy::{Cut, Proxy},
    wait::{DEADLINE, until},
};

const ALL: &str = "SELECT * FROM t";

/// A streamer and a replica of a table with some rows.
struct Scene<'a> {
    database: &'a Database,
    slot: String,
    streamer: Streamer,
    replica: Replica,
}

impl<'a> Scene<'a> {
    async fn start(database: &'a Database) -> Scene<'a> {
        database
            .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) g")
            .await;
        Self::with(database, Streamer::config(database)).await
    }

    async fn with(database: &'a Database, config: StreamerConfig) -> Scene<'a> {
        let streamer = config.shape("s", &[ALL]).start().await;
        let scene = Scene {
            database,
            slot: format!("anabranch_{}", database.name()),
            replica: Replica::config(&streamer).subscribe("s").start().await,
            streamer,
        };
        scene
            .goes_on("UPDATE t SET v = 'streamed' WHERE id < 10")
            .await;
        scene
    }

    /// What is written arrives.
    async fn goes_on(&self, sql: &str) {
        self.database.execute(sql).await;
        self.replica.until_equal(self.database, &[("t", ALL)]).await;
    }

    fn held(&self) -> Snapshot {
        file::read(&self.replica.file(), &["t"]).unwrap()
    }

    /// Ends the replication connection, from the server's side.
    async fn disconnect(&self) {
        self.database
            .execute(&format!(
                "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = '{}'",
                self.slot
            ))
            .await;
    }

    /// Drops the slot, which the streamer uses.
    async fn drop_slot(&self) {
        until("the slot is dropped", DEADLINE, || async {
            self.disconnect().await;
            let sql = format!("SELECT pg_drop_replication_slot('{}')", self.slot);
            self.database.try_execute(&sql).await
        })
        .await;
    }

    async fn nonce(&self) -> String {
        let sql = "SELECT nonce FROM anabranch.streamers WHERE slot = $1";
        self.database.query(sql, &[&self.slot]).await[0].get(0)
    }

    /// The streamer ends and says why, now and whenever it is started again; the file stays what it was, and says that
    /// it is not up to date. `held` is from before it broke.
    async fn is_broken(&self, held: &Snapshot, words: &[&str]) {
        self.database
            .try_execute("INSERT INTO t VALUES (1000, 'behind the gap')")
            .await
            .ok();
        for again in [false, true] {
            let logged = self.streamer.log().len();
            // Where it ran, it may have said so before this was called.
            let anew = again || self.streamer.pid().is_none();
            if anew {
                self.streamer.spawn();
            }
            let status = self.streamer.exit().await;
            let log = self.streamer.log();
            let said = if anew { &log[logged..] } else { &log[..] };
            assert_eq!(status.code(), Some(1), "{said}");
            for word in words {
                assert!(said.contains(word), "{word:?} was not said:\n{said}");
            }
        }
        until(
            "the file does not claim to be up to date",
            DEADLINE,
            || async {
                let sql =
                    "SELECT connected, caught_up, last_error IS NOT NULL FROM _anabranch_status";
                let said = self.replica.open().query_row(sql, [], |row| {
                    Ok((
                        row.get::<_, i64>(0)?,
                        row.get::<_, i64>(1)?,
                        row.get::<_, bool>(2)?,
                    ))
                })?;
                anyhow::ensure!(said == (0, 0, true), "{said:?}");
                Ok(())
            },
        )
        .await;
        let status = self.replica.get("/status").await.unwrap().json().unwrap();
        assert_eq!(status["caught_up"], false, "{status}");
        let holds = self.held();
        assert_eq!(holds.tables, held.tables);
        // While it still went on, WAL with nothing of ours in it may have moved the position.
        let ((epoch, lsn), (of, from)) = (holds.position.unwrap(), held.position.clone().unwrap());
        assert_eq!(epoch, of);
        assert!(lsn >= from, "{lsn} {from}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_dropped_while_it_streams_is_missed() {
    let database = Server::shared().await.database().await;
    let scene = Scene::start(&database).await;
    let held = scene.held();
    // It must not find it, and then find it gone, which is said in fewer words.
    scene.streamer.pause();
    scene.drop_slot().await;
    scene.streamer.resume();
    scene.is_broken(&held, &["slot", "is gone"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_made_again_is_not_taken_for_ours() {
    let database = Server::shared().await.database().await;
    let scene = Scene::start(&database).await;
    let held = scene.held();
    // It must not look while there is none.
    scene.streamer.pause();
    scene.drop_slot().await;
    database.execute("UPDATE t SET v = 'in the gap'").await;
    database
        .execute(&format!(
            "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')",
            scene.slot
        ))
        .await;
    scene.streamer.resume();
    scene
        .is_broken(&held, &["beyond the mirror's position", "made again"])
        .await;
    // It is somebody else's: it was not touched.
    let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
    let slots = database.query(sql, &[&scene.slot]).await;
    assert_eq!(slots[0].get::<_, i64>(0), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_consumed_is_noticed() {
    let database = Server::shared().await.database().await;
    let scene = Scene::start(&database).await;
    let held = scene.held();
    scene.streamer.kill();
    database.execute("UPDATE t SET v = 'consumed'").await;
    let sql = format!(
        "SELECT pg_replication_slot_advance('{}', pg_current_wal_flush_lsn())",
        scene.slot
    );
    until("the slot is free", DEADLINE, || database.try_execute(&sql)).await;
    scene
        .is_broken(&held, &["beyond the mirror's position", "consumed"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonces_that_went_back_are_noticed_and_put_right_are_forgiven() {
    let database = Server::shared().await.database().await;
    let scene = Scene::start(&database).await;
    let earlier = scene.nonce().await;
    scene.disconnect().await;
    until("the nonce is renewed", DEADLINE, || async {
        let now = scene.nonce().await;
        if now == earlier { Err(now) } else { Ok(()) }
    })
    .await;
    scene.goes_on("UPDATE t SET v = 'renewed'").await;
    let source: String = database
        .query("SELECT encode(nonce, 'hex') FROM anabranch.source", &[])
        .await[0]
        .get(0);
    for (breaks, mends, words) in [
        (
            format!("UPDATE anabranch.streamers SET nonce = '{earlier}'"),
            "UPDATE anabranch.streamers SET nonce = '#'".into(),
            ["anabranch.streamers", "put back to an earlier state"],
        ),
        (
            "UPDATE anabranch.source SET nonce = decode(repeat('00', 16), 'hex')".into(),
            format!("UPDATE anabranch.source SET nonce = decode('{source}', 'hex')"),
            ["anabranch.source", "is not the one"],
        ),
    ] {
        let held = scene.held();
        // Not renewed in between: it would be written over.
        scene.streamer.kill();
        let mends = mends.replace('#', &scene.nonce().await);
        database.execute(&breaks).await;
        scene.is_broken(&held, &words).await;
        database.execute(&mends).await;
        scene.streamer.start().await;
        scene.goes_on("DELETE FROM t WHERE id >= 1000").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_from_an_earlier_copy_is_noticed() {
    let Some(server) = Server::start_local(Options::new()).await else {
        return;
    };
    let database = server.database().await;
    let scene = Scene::start(&database).await;
    server.stop(Stop::Fast).await;
    server.save().await;
    server.start_again().await;
    // Lost by the restore: the replica has it.
    scene.goes_on("UPDATE t SET v = repeat('lost', 200)").await;
    let held = scene.held();
    server.stop(Stop::Fast).await;
    server.put_back().await;
    server.start_again().await;
    // Its log says so before anything was written there.
    scene
        .is_broken(&held, &["before the mirror's position", "earlier state"])
        .await;
    let (_, position) = scene.held().position.unwrap();
    // Then the same LSNs come to mean something else.
    until("as much WAL as was lost", DEADLINE, || async {
        database
            .execute("INSERT INTO t SELECT max(id) + 1, repeat('other', 1000) FROM t")
            .await;
        let lsn = database.lsn().await;
        // The mirror may be ahead of the file by what the end of a server writes.
        if lsn.0 > position.0 + 100_000 {
            Ok(())
        } else {
            Err(lsn)
        }
    })
    .await;
    scene
        .is_broken(&held, &["anabranch.streamers", "earlier state"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_is_not_followed_blindly() {
    let Some(server) = Server::start_local(Options::new()).await else {
        return;
    };
    let database = server.database().await;
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let proxy = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
    let config = Streamer::config(&database).through(&proxy, &database);
    let scene = Scene::with(&database, config).await;
    let standby = server.standby().await;
    // The standby hears nothing more, and a commit is lost with the primary.
    standby.alter("primary_conninfo", "").await;
    until("the standby is cut off", DEADLINE, || async {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walreceiver'";
        let connected: i64 = database.query(sql, &[]).await[0].get(0);
        if connected == 0 {
            Ok(())
        } else {
            Err(connected)
        }
    })
    .await;
    scene.goes_on("INSERT INTO t VALUES (1, 'lost')").await;
    let held = scene.held();
    let promoted = standby.connect("postgres").await;
    promoted
        .query_one("SELECT pg_promote()", &[])
        .await
        .expect("promote the standby");
    proxy.retarget(&format!("{}:{}", standby.host(), standby.port()));
    proxy.cut(Cut::Reset);
    scene
        .is_broken(&held, &["timeline 2", "timeline 1", "failover"])
        .await;
}
