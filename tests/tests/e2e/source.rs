//! The connection between streamer and Postgres, when it breaks or says nothing: nothing is lost, and the file does not
//! claim to be up to date meanwhile.

use std::time::{Duration, Instant};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server},
    proxy::{Cut, Proxy, Way},
    wait::{DEADLINE, until},
};

const T: &str = "SELECT * FROM t WHERE team = 1";

/// What the streamer takes for the death of Postgres is 60 s of silence.
const SILENCE_NOTICED: Duration = Duration::from_secs(150);

/// A streamer that reaches Postgres through a proxy only, and a replica.
struct Scene {
    _server: Server,
    database: Database,
    proxy: Proxy,
    streamer: Streamer,
    replica: Replica,
}

impl Scene {
    async fn start() -> Scene {
        // So that Postgres soon gives up whom it does not hear any more, and lets go of the slot.
        let server = Server::start(Options::new().set("wal_sender_timeout", "3s")).await;
        let database = server.database().await;
        database
            .execute("CREATE TABLE t (id int PRIMARY KEY, team int, v int); INSERT INTO t SELECT g, g % 3, 0 FROM generate_series(1, 600) g")
            .await;
        let proxy = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
        let streamer = Streamer::config(&database)
            .through(&proxy, &database)
            .shape("s", &[T])
            .start()
            .await;
        let replica = Replica::config(&streamer).subscribe("s").start().await;
        Scene {
            _server: server,
            database,
            proxy,
            streamer,
            replica,
        }
    }

    async fn write(&self) {
        for _ in 0..5 {
            self.database
                .execute("UPDATE t SET team = (team + 1) % 3, v = v + 1 WHERE id % 4 < 3")
                .await;
        }
    }

    async fn same(&self) {
        self.replica.until_equal(&self.database, &[("t", T)]).await;
    }

    fn sum(&self) -> i64 {
        let file = self.replica.open();
        file.query_row("SELECT sum(v) FROM t", [], |row| row.get(0))
            .unwrap()
    }

    async fn is_not_caught_up(&self) {
        until("the file says that it is behind", DEADLINE, || async {
            let file = self.replica.open();
            let sql = "SELECT caught_up FROM _anabranch_status";
            file.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap() == 0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_postgres_that_is_cut_anywhere_loses_nothing() {
    let scene = Scene::start().await;
    let proxy = &scene.proxy;
    let faults: [(&str, &dyn Fn()); 5] = [
        ("reset", &|| proxy.cut(Cut::Reset)),
        ("closed", &|| proxy.cut(Cut::Close)),
        ("cut within a message", &|| {
            proxy.set(|faults| faults.cut_after(Way::Down, 9_001, Cut::Reset));
        }),
        ("nothing reaches Postgres, which gives up", &|| {
            proxy.set(|faults| faults.swallow(Way::Up));
        }),
        ("nobody listens", &|| {
            proxy.set(|faults| faults.refuse());
            proxy.cut(Cut::Reset);
        }),
    ];
    for (what, fault) in faults {
        println!("{what}");
        let accepted = proxy.accepted();
        fault();
        scene.write().await;
        until("the streamer connects again", DEADLINE, || async {
            proxy.accepted() > accepted
        })
        .await;
        scene.write().await;
        // What lost some bytes can't go on.
        proxy.set(|faults| faults.heal());
        proxy.cut(Cut::Reset);
        scene.same().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_postgres_that_stalls_for_a_while_goes_on() {
    let scene = Scene::start().await;
    let before = scene.sum();
    scene.proxy.set(|faults| faults.stall(Way::Down));
    scene.write().await;
    scene.is_not_caught_up().await;
    assert_eq!(scene.sum(), before, "there is a way around the proxy");
    scene.proxy.set(|faults| faults.heal());
    scene.same().await;
}

/// Both sides find the other dead, each for itself: Postgres by its `wal_sender_timeout`, the streamer by its own limit.
/// Takes a minute, since that limit is no setting.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_postgres_that_is_half_open_is_given_up() {
    let scene = Scene::start().await;
    let before = scene.sum();
    let (accepted, began) = (scene.proxy.accepted(), Instant::now());
    scene.proxy.set(|faults| {
        faults.stall(Way::Down);
        faults.swallow(Way::Up);
    });
    scene.write().await;
    scene.is_not_caught_up().await;
    until("the streamer connects again", SILENCE_NOTICED, || async {
        scene.proxy.accepted() > accepted
    })
    .await;
    println!("given up after {:?}", began.elapsed());
    until("the streamer says why", SILENCE_NOTICED, || async {
        let log = scene.streamer.log();
        if log.contains("silent for") {
            Ok(())
        } else {
            Err(log)
        }
    })
    .await;
    assert_eq!(scene.sum(), before, "there is a way around the proxy");
    scene.write().await;
    scene.proxy.set(|faults| faults.heal());
    scene.proxy.cut(Cut::Reset);
    scene.same().await;
}
