//! Shapes that change at a restart of the streamer: replicas are right again, and are sent no table again that did not
//! change.

use anabranch_tests::{
    oracle::file,
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    proxy::{Proxy, Way},
};

const BIG: &str = "SELECT * FROM big";
const NEW: &str = "SELECT * FROM new";
const GOING: &str = "SELECT * FROM going WHERE v > 0";

struct Scene {
    database: Database,
    streamer: Streamer,
    proxy: Proxy,
    replica: Replica,
    /// What the first copy was.
    copied: u64,
}

impl Scene {
    async fn start(tables: &[&str]) -> Scene {
        let database = Server::shared().await.database().await;
        database
            .execute(
                "CREATE TABLE big (id int PRIMARY KEY, v int, pad text);
                 INSERT INTO big SELECT g, g % 100, repeat(md5(g::text), 10) FROM generate_series(1, 10000) g;
                 CREATE TABLE new (id int PRIMARY KEY, v int);
                 INSERT INTO new SELECT g, g FROM generate_series(1, 500) g;
                 CREATE TABLE going (id int PRIMARY KEY, v int);
                 INSERT INTO going SELECT g, g FROM generate_series(1, 500) g",
            )
            .await;
        let streamer = Streamer::config(&database).shape("s", tables).start().await;
        let proxy = Proxy::to(streamer.address()).await;
        let replica = Replica::config(&streamer)
            .subscribe("s")
            .through(&proxy)
            .start()
            .await;
        let copied = proxy.bytes(Way::Down);
        Scene {
            database,
            streamer,
            proxy,
            replica,
            copied,
        }
    }

    /// Restarts the streamer with other tables, and writes meanwhile; starts the replica if it was killed. How many
    /// bytes that one was sent for it.
    async fn reshape(&self, tables: &[&str], sql: &str) -> u64 {
        assert!(self.streamer.terminate().await.success());
        let before = self.proxy.bytes(Way::Down);
        self.database.execute(sql).await;
        self.streamer.reconfigure("shape.s.tables", tables.to_vec());
        self.streamer.start().await;
        if self.replica.pid().is_none() {
            self.replica.start().await;
        }
        self.replica.until_caught_up(&self.database).await;
        self.proxy.bytes(Way::Down) - before
    }

    async fn same(&self, tables: &[(&str, &str)]) {
        self.replica.until_equal(&self.database, tables).await;
    }

    /// What the file has of a table that it should not have any more.
    fn left(&self, table: &str) -> usize {
        let content = file::read(&self.replica.file(), &[table]).unwrap();
        let rows = content.tables.into_iter().flatten();
        rows.map(|table| table.rows.len()).sum()
    }

    async fn published(&self) -> Vec<String> {
        let sql = "SELECT tablename::text FROM pg_publication_tables WHERE pubname = 'anabranch' ORDER BY 1";
        let rows = self.database.query(sql, &[]).await;
        rows.iter().map(|row| row.get(0)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_comes_and_another_goes_without_the_rest_being_sent_again() {
    let scene = Scene::start(&[BIG, GOING]).await;
    assert!(scene.copied > 3_000_000, "{}", scene.copied);
    let sent = scene
        .reshape(
            &[BIG, NEW, GOING],
            "UPDATE big SET v = -1 WHERE id <= 10; UPDATE new SET v = -1 WHERE id <= 10; DELETE FROM going WHERE id <= 10",
        )
        .await;
    println!(
        "the first copy is {} bytes, a table of 500 rows more {sent}",
        scene.copied
    );
    assert!(sent < 100_000, "{sent}");
    scene
        .same(&[("big", BIG), ("new", NEW), ("going", GOING)])
        .await;
    // It is followed from then on, in one transaction with the others.
    scene
        .database
        .execute("BEGIN; UPDATE new SET v = id + 1; DELETE FROM new WHERE id % 7 = 0; UPDATE big SET v = 3 WHERE id % 1000 = 1; COMMIT")
        .await;
    scene.same(&[("big", BIG), ("new", NEW)]).await;

    let sent = scene
        .reshape(
            &[BIG, NEW],
            "UPDATE big SET v = -2 WHERE id <= 10; DELETE FROM going WHERE id <= 20",
        )
        .await;
    println!("a table less is {sent} bytes");
    assert!(sent < 50_000, "{sent}");
    scene.same(&[("big", BIG), ("new", NEW)]).await;
    assert_eq!(scene.left("going"), 0);
    assert_eq!(scene.published().await, ["big", "new"]);
    // What happens to it now is nobody's business, and neither is its schema.
    scene
        .database
        .execute("UPDATE going SET v = v + 1; ALTER TABLE going ADD COLUMN more int DEFAULT 7")
        .await;
    scene.same(&[("big", BIG), ("new", NEW)]).await;

    let sent = scene
        .reshape(
            &[GOING, NEW, BIG],
            "UPDATE going SET v = 0 WHERE id % 2 = 0",
        )
        .await;
    println!("the table back again is {sent} bytes");
    assert!(sent < 100_000, "{sent}");
    scene
        .same(&[("big", BIG), ("new", NEW), ("going", GOING)])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_condition_is_right_whether_the_replica_was_there_or_not() {
    let condition = |condition: &str| format!("SELECT * FROM going WHERE {condition}");
    let first = condition("v <= 100");
    let scene = Scene::start(&[BIG, &first]).await;
    scene.same(&[("big", BIG), ("going", &first)]).await;
    let conditions = ["v <= 300", "v > 200", "v < 0", "v > 10 OR v IS NULL"];
    for (turn, now) in conditions.into_iter().map(condition).enumerate() {
        // Every second time the replica is away meanwhile, and rows move under both conditions.
        if turn % 2 == 1 {
            scene.replica.kill();
        }
        let sql =
            format!("UPDATE going SET v = v + {turn}0; UPDATE big SET v = {turn} WHERE id <= 10");
        let sent = scene.reshape(&[BIG, &now], &sql).await;
        println!("{now}: {sent} bytes");
        assert!(sent < 100_000, "{sent}");
        scene.same(&[("big", BIG), ("going", &now)]).await;
        scene
            .database
            .execute("UPDATE going SET v = v - 7 WHERE id % 3 = 0; INSERT INTO going SELECT max(id) + 1, 250 FROM going")
            .await;
        scene.same(&[("big", BIG), ("going", &now)]).await;
    }
}

/// What Postgres sends of before the copy does not concern the table any more, however it looked then.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_altered_before_it_was_copied_is_followed() {
    let scene = Scene::start(&[BIG]).await;
    scene
        .reshape(
            &[BIG, NEW],
            "BEGIN; ALTER PUBLICATION anabranch ADD TABLE new; COMMIT; BEGIN; INSERT INTO new VALUES (1001, 1); COMMIT;
             BEGIN; ALTER TABLE new ADD COLUMN more int; COMMIT; BEGIN; INSERT INTO new VALUES (1002, 2, 3); COMMIT",
        )
        .await;
    scene.same(&[("big", BIG), ("new", NEW)]).await;
    scene
        .database
        .execute("INSERT INTO new VALUES (1003, 4, 5); DELETE FROM new WHERE id = 1001")
        .await;
    scene.same(&[("big", BIG), ("new", NEW)]).await;
}
