//! Local writes: any program writes the file, and Postgres gets it, once, whole, in order, or it is rejected and undone.

use std::{path::Path, process::Command};

use anabranch_tests::{
    peers::{Replica, Streamer, StreamerConfig},
    postgres::{Database, Server},
};
use rusqlite::Connection;

/// Opens a file as a program does.
fn program(file: &Path) -> Connection {
    let connection = Connection::open(file).unwrap();
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .unwrap();
    connection
}

/// A streamer and a replica that may write what it sees.
struct Pair {
    database: Database,
    streamer: Streamer,
    replica: Replica,
}

const TASKS: &str = "
    CREATE TABLE tasks (id int PRIMARY KEY, team int NOT NULL, title text NOT NULL, done bool NOT NULL DEFAULT false,
                        hits int NOT NULL DEFAULT 0, CHECK (title <> 'forbidden'));
    INSERT INTO tasks SELECT g, g % 2, 'task ' || g FROM generate_series(1, 20) g";

const OWN: &str = "SELECT * FROM tasks WHERE team = 1";

impl Pair {
    async fn start() -> Pair {
        let database = Server::shared().await.database().await;
        database.execute(TASKS).await;
        let streamer = Streamer::config(&database);
        Pair::of(database, streamer).await
    }

    async fn of(database: Database, streamer: StreamerConfig) -> Pair {
        let streamer = streamer
            .shape("own", &[OWN])
            .set("shape.own.writable", true)
            .start()
            .await;
        let replica = Replica::config(&streamer).subscribe("own").start().await;
        replica.until_equal(&database, &[("tasks", OWN)]).await;
        Pair {
            database,
            streamer,
            replica,
        }
    }

    fn program(&self) -> Connection {
        program(&self.replica.file())
    }

    /// Until nothing is pending, and Postgres shows what became of it.
    async fn until_answered(&self) {
        self.replica.until_answered().await;
        self.database.until_visible().await;
    }

    async fn same(&self) {
        self.replica
            .until_equal(&self.database, &[("tasks", OWN)])
            .await;
    }

    async fn one(&self, sql: &str) -> String {
        let client = self.database.connect().await;
        let row = client.query_one(sql, &[]).await.unwrap();
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_programs_writes_do_not_arrive_in_postgres() {
    let pair = Pair::start().await;
    let program = pair.program();
    program
        .execute_batch(
            "UPDATE tasks SET done = 1 WHERE id = 7;
             INSERT INTO tasks(id, team, title, done, hits) VALUES(100, 1, 'from a program', 0, 0);
             DELETE FROM tasks WHERE id = 9;
             UPDATE tasks SET id = 101 WHERE id = 11;
             INSERT OR REPLACE INTO tasks(id, team, title, done, hits) VALUES(13, 1, 'replaced', 0, 0);
             INSERT INTO tasks(id, team, title, done, hits) VALUES(15, 1, 'x', 0, 0) ON CONFLICT(id) DO UPDATE SET title = 'upserted';",
        )
        .unwrap();
    pair.until_answered().await;
    assert_eq!(
        pair.one(
            "SELECT string_agg(id || ' ' || title || ' ' || done, ', ' ORDER BY id) FROM tasks WHERE team = 1"
        )
        .await,
        "1 task 1 false, 3 task 3 false, 5 task 5 false, 7 task 7 true, 13 replaced false, 15 upserted false, \
         17 task 17 false, 19 task 19 false, 100 from a program false, 101 task 11 false"
    );
    pair.same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_while_nothing_ran_is_lost() {
    let pair = Pair::start().await;
    pair.streamer.kill();
    let offline = pair.program();
    offline
        .execute("UPDATE tasks SET title = 'offline 1' WHERE id = 1", [])
        .unwrap();
    pair.replica.kill();
    offline
        .execute("UPDATE tasks SET title = 'offline 3' WHERE id = 3", [])
        .unwrap();
    // Visible at once to every program, and Postgres knows nothing of it.
    let seen: String = pair
        .program()
        .query_row("SELECT title FROM tasks WHERE id = 3", [], |row| row.get(0))
        .unwrap();
    assert_eq!(seen, "offline 3");
    pair.database
        .execute("UPDATE tasks SET hits = 7 WHERE id = 3; UPDATE tasks SET title = 'elsewhere' WHERE id = 5")
        .await;
    pair.replica.spawn();
    pair.streamer.start().await;
    pair.until_answered().await;
    assert_eq!(
        pair.one("SELECT string_agg(title || ' ' || hits, ', ' ORDER BY id) FROM tasks WHERE id IN (1, 3, 5)")
            .await,
        "offline 1 0, offline 3 7, elsewhere 0"
    );
    pair.same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_refuses_stays_or_blocks_what_comes_after() {
    let pair = Pair::start().await;
    let program = pair.program();
    for sql in [
        "UPDATE tasks SET title = 'good 1' WHERE id = 1",
        // 23514
        "UPDATE tasks SET title = 'forbidden' WHERE id = 3",
        "UPDATE tasks SET title = 'good 5' WHERE id = 5",
        // Out of the shape afterwards.
        "UPDATE tasks SET team = 2 WHERE id = 7",
        // 23505: Postgres has it, and this replica does not see it.
        "INSERT INTO tasks(id, team, title, done, hits) VALUES(2, 1, 'mine', 0, 0)",
        "UPDATE tasks SET title = 'good 9' WHERE id = 9",
    ] {
        program.execute(sql, []).unwrap();
    }
    pair.until_answered().await;
    pair.same().await;
    assert_eq!(
        pair.one(
            "SELECT string_agg(title, ', ' ORDER BY id) FROM tasks WHERE id IN (1, 2, 3, 5, 7, 9)"
        )
        .await,
        "good 1, task 2, task 3, good 5, task 7, good 9"
    );
    let rejected: Vec<(String, String, String, Option<String>)> = program
        .prepare(
            "SELECT table_name, operation, outcome, sqlstate FROM _anabranch_rejected ORDER BY id",
        )
        .unwrap()
        .query_map([], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let outcomes: Vec<_> = rejected
        .iter()
        .map(|(table, operation, outcome, sqlstate)| {
            (
                &**table,
                &**operation,
                &**outcome,
                sqlstate.as_deref().unwrap_or_default(),
            )
        })
        .collect();
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    assert_eq!(outcomes[0].0, "tasks");
    assert_eq!(outcomes[0].3, "23514");
    assert_eq!(outcomes[1].2, "out_of_shape");
    assert_eq!(outcomes[2].2, "insert_exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_transaction_arrives_in_parts_or_with_another() {
    let database = Server::shared().await.database().await;
    database
        .execute(&format!(
            "{TASKS};
             CREATE TABLE log (tag text, xid xid8 DEFAULT pg_current_xact_id());
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO log(tag) VALUES (NEW.title); RETURN NULL; END $$;
             CREATE TRIGGER note AFTER INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION note()"
        ))
        .await;
    let streamer = Streamer::config(&database);
    let pair = Pair::of(database, streamer).await;
    let mut program = pair.program();
    for tag in 0..50 {
        let transaction = program.transaction().unwrap();
        for id in [1, 3, 5] {
            transaction
                .execute(
                    "UPDATE tasks SET title = ?1 WHERE id = ?2",
                    (format!("tag {tag}"), id),
                )
                .unwrap();
        }
        transaction.commit().unwrap();
    }
    pair.until_answered().await;
    pair.same().await;
    assert_eq!(
        pair.one(
            "SELECT count(*) || ' ' || count(DISTINCT xid) || ' ' || max(tags) FROM
             (SELECT xid, count(*) n, count(DISTINCT tag) tags FROM log GROUP BY xid HAVING count(*) = 3) one"
        )
        .await,
        "50 50 1"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_lost_or_doubled_by_kills() {
    let pair = Pair::start().await;
    for n in 0..60 {
        let program = pair.program();
        program
            .execute_batch(&format!(
                "BEGIN IMMEDIATE;
                 INSERT INTO tasks(id, team, title, done, hits) VALUES({}, 1, 'token {n}', 0, 0);
                 UPDATE tasks SET title = 'counter {n}' WHERE id = 1;
                 COMMIT",
                1000 + n
            ))
            .unwrap();
        match n % 10 {
            3 => {
                pair.streamer.kill();
                pair.streamer.spawn();
            }
            7 => {
                pair.replica.kill();
                pair.replica.spawn();
            }
            _ => {}
        }
    }
    pair.until_answered().await;
    pair.same().await;
    assert_eq!(
        pair.one("SELECT count(*) || ' ' || (SELECT title FROM tasks WHERE id = 1) FROM tasks WHERE id >= 1000")
            .await,
        "60 counter 59"
    );
    let rejected: i64 = pair
        .program()
        .query_row("SELECT count(*) FROM _anabranch_rejected", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert_eq!(rejected, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_writable_takes_writes() {
    let database = Server::shared().await.database().await;
    database.execute(TASKS).await;
    let streamer = Streamer::config(&database)
        .shape("own", &[OWN])
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("own").start().await;
    replica.until_equal(&database, &[("tasks", OWN)]).await;
    let program = program(&replica.file());
    for sql in [
        "UPDATE tasks SET done = 1",
        "DELETE FROM tasks",
        "INSERT INTO tasks(id, team, title, done, hits) VALUES(100, 1, 'a', 0, 0)",
        "INSERT OR IGNORE INTO tasks(id, team, title, done, hits) VALUES(100, 1, 'a', 0, 0)",
    ] {
        let error = program.execute(sql, []).unwrap_err().to_string();
        assert!(error.contains("read-only"), "{sql}: {error}");
    }
    replica.until_equal(&database, &[("tasks", OWN)]).await;
}

/// The CLI that the machine has, as a foreign process.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shell_can_not_write() {
    let pair = Pair::start().await;
    let done = Command::new("sqlite3")
        .arg(pair.replica.file())
        .arg("PRAGMA busy_timeout=5000; UPDATE tasks SET title = 'by the shell' WHERE id = 7 RETURNING title")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    pair.until_answered().await;
    pair.same().await;
    assert_eq!(
        pair.one("SELECT title FROM tasks WHERE id = 7").await,
        "by the shell"
    );
}
