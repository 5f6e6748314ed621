//! Ids and defaults: rows that programs insert without knowing what Postgres would put in, also offline.

use std::path::Path;

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use rusqlite::Connection;

const ALL: &str = "SELECT * FROM notes";

/// Opens a file as a program does.
fn program(file: &Path) -> Connection {
    let connection = Connection::open(file).unwrap();
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .unwrap();
    connection
}

/// Inserts a row as the README says.
const INSERT: &str = "INSERT INTO notes(id, title) \
     VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = 'notes'), ?1) RETURNING id";

fn insert(program: &Connection, title: &str) -> i64 {
    program
        .query_row(INSERT, [title], |row| row.get(0))
        .unwrap()
}

struct Fleet {
    database: Database,
    streamer: Streamer,
    replicas: Vec<Replica>,
}

impl Fleet {
    /// Some replicas of the table `notes`.
    async fn start(notes: &str, replicas: usize) -> Fleet {
        let database = Server::shared().await.database().await;
        database.execute(notes).await;
        let streamer = Streamer::config(&database)
            .shape("notes", &[ALL])
            .set("shape.notes.writable", true)
            .start()
            .await;
        let mut fleet = Fleet {
            database,
            streamer,
            replicas: Vec::new(),
        };
        for _ in 0..replicas {
            let replica = Replica::config(&fleet.streamer).subscribe("notes");
            fleet.replicas.push(replica.start().await);
        }
        for replica in &fleet.replicas {
            replica
                .until_equal(&fleet.database, &[("notes", ALL)])
                .await;
        }
        fleet
    }

    async fn until_leased(&self) {
        for replica in &self.replicas {
            let file = replica.open();
            until("ids are leased", DEADLINE, || async {
                ids_of(&file).is_some()
            })
            .await;
        }
    }

    /// Until nothing is pending, all is the same everywhere, and nothing was rejected.
    async fn until_same(&self) {
        for replica in &self.replicas {
            let file = replica.open();
            until("all local writes are answered", DEADLINE, || async {
                number(&file, "SELECT pending FROM _anabranch_status") == 0
            })
            .await;
            assert_eq!(number(&file, "SELECT count(*) FROM _anabranch_rejected"), 0);
        }
        for replica in &self.replicas {
            replica.until_equal(&self.database, &[("notes", ALL)]).await;
        }
    }

    async fn one(&self, sql: &str) -> String {
        let client = self.database.connect().await;
        let row = client.query_one(sql, &[]).await.unwrap();
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }
}

/// What the view offers.
fn ids_of(file: &Connection) -> Option<(i64, i64, i64)> {
    file.query_row(
        "SELECT next_id, last_id, step FROM _anabranch_ids WHERE table_name = 'notes'",
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )
    .ok()
}

fn number(file: &Connection, sql: &str) -> i64 {
    file.query_row(sql, [], |row| row.get(0)).unwrap()
}

const NOTES: &str = "CREATE TABLE notes (id bigserial PRIMARY KEY, title text NOT NULL)";

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_and_psql_use_the_same_id() {
    let fleet = Fleet::start(NOTES, 2).await;
    fleet.until_leased().await;
    let [one, other] = [0, 1].map(|i| program(&fleet.replicas[i].file()));
    for n in 0..700 {
        insert(&one, &format!("one {n}"));
        insert(&other, &format!("other {n}"));
        if n % 10 == 0 {
            let psql = format!("INSERT INTO notes(title) VALUES ('psql {n}')");
            fleet.database.execute(&psql).await;
        }
    }
    fleet.until_same().await;
    assert_eq!(
        fleet
            .one("SELECT count(*) || ' ' || count(DISTINCT title) FROM notes")
            .await,
        "1470 1470"
    );
    // More were leased before those were used up.
    fleet.until_leased().await;
    fleet.streamer.kill();
    let offline = insert(&one, "offline");
    assert_ne!(offline, insert(&other, "offline"));
    fleet.streamer.start().await;
    fleet.until_same().await;
}
