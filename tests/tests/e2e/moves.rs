//! Rows that move in and out of a shape since rows of other tables do: with the very transaction that moves them, and also
//! for a replica that was away meanwhile.
//!
//! A transaction says its number in the file, and Postgres is quiet behind it: whatever comes later than the number comes
//! too late, or never.

mod oracle;
mod transactions;

use anabranch_tests::{
    oracle::{file, select::compare_file},
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use serde_json::json;

const TABLES: &str = "
    CREATE TABLE projects (id int PRIMARY KEY, org int, parent int);
    CREATE TABLE members (project int, person int, role text, PRIMARY KEY (project, person),
      FOREIGN KEY (project) REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE);
    CREATE TABLE tasks (id int PRIMARY KEY, project int REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE,
      owner int, title text);
    CREATE TABLE comments (id int PRIMARY KEY, task int REFERENCES tasks ON DELETE CASCADE ON UPDATE CASCADE, body text);
    CREATE TABLE hidden (id int PRIMARY KEY, project int, person int);
    CREATE TABLE notes (id int PRIMARY KEY, project int, body text);
    CREATE TABLE number (n int PRIMARY KEY);
    INSERT INTO projects SELECT g, g % 3, g / 2 FROM generate_series(1, 9) g;
    INSERT INTO members VALUES (1, 1, 'lead'), (2, 1, 'guest'), (2, 2, 'lead'), (3, 2, 'guest');
    INSERT INTO tasks SELECT g, 1 + g % 9, g % 4, 'task ' || g FROM generate_series(1, 40) g;
    INSERT INTO comments SELECT g, 1 + g % 40, 'comment ' || g FROM generate_series(1, 120) g;
    INSERT INTO notes SELECT g, NULLIF(g % 7, 0), 'note ' || g FROM generate_series(1, 30) g";

/// By table, with `$me` for who it is.
const SELECTS: [(&str, &str); 5] = [
    (
        "tasks",
        "SELECT * FROM tasks WHERE project IN (SELECT project FROM members WHERE person = $me) OR owner = $me",
    ),
    (
        "comments",
        "SELECT * FROM comments WHERE EXISTS (SELECT 1 FROM tasks t WHERE t.id = comments.task AND t.project IN \
         (SELECT p.id FROM projects p WHERE (p.id, $me) IN (SELECT m.project, m.person FROM members m)))",
    ),
    (
        "notes",
        "SELECT id, project FROM notes WHERE project NOT IN (SELECT project FROM hidden WHERE person = $me)",
    ),
    (
        "projects",
        "SELECT id, org FROM projects WHERE NOT EXISTS (SELECT 1 FROM projects q WHERE q.parent = projects.id AND q.org = $me)",
    ),
    ("number", "SELECT * FROM number"),
];

/// Each is a transaction; what it is good for is in its name.
const STEPS: [(&str, &str); 30] = [
    ("a membership appears", "INSERT INTO members VALUES (4, 1, 'new'), (4, 2, 'new')"),
    ("it goes", "DELETE FROM members WHERE project = 4"),
    ("it becomes another's", "UPDATE members SET person = 3 - person WHERE project = 1"),
    (
        "of two ways that a row is in by, one goes",
        "INSERT INTO members VALUES (5, 1, 'x'), (5, 2, 'x'); UPDATE tasks SET owner = 1 WHERE project = 5",
    ),
    ("the one", "DELETE FROM members WHERE project = 5"),
    ("and the other", "UPDATE tasks SET owner = 9 WHERE project = 5"),
    (
        "a chain of two tables is made in one transaction",
        "INSERT INTO projects VALUES (20, 1, 1); INSERT INTO members VALUES (20, 1, 'x'), (20, 2, 'x');
         INSERT INTO tasks VALUES (200, 20, 7, 'new'); UPDATE comments SET task = 200 WHERE id < 10",
    ),
    (
        "it is changed at both ends",
        "UPDATE members SET project = 6 WHERE project = 20 AND person = 1; UPDATE comments SET task = 12 WHERE id < 5",
    ),
    (
        "inner and outer row are deleted together",
        "DELETE FROM members WHERE project = 2 AND person = 1; DELETE FROM tasks WHERE project = 2 AND id % 2 = 0",
    ),
    ("by a cascade, all the way", "DELETE FROM projects WHERE id IN (20, 3)"),
    (
        "they come back under the same keys, in another way",
        "INSERT INTO projects VALUES (3, 1, 1), (20, 2, 3); INSERT INTO members VALUES (3, 1, 'y');
         INSERT INTO tasks VALUES (200, 3, NULL, 'again'); INSERT INTO comments VALUES (300, 200, 'again')",
    ),
    ("a key of the inner table is changed", "UPDATE members SET project = 7 WHERE project = 3"),
    ("a key of the table between", "UPDATE tasks SET id = id + 500 WHERE id % 3 = 0"),
    ("a key of the innermost, with all that refer to it", "UPDATE projects SET id = 31 WHERE id = 1"),
    ("its rows swap what they say", "UPDATE members SET person = CASE person WHEN 1 THEN 2 ELSE 1 END WHERE project = 7"),
    ("an inner row changes, and nothing follows", "UPDATE members SET role = 'other'"),
    ("the inner set of NOT IN becomes one", "INSERT INTO hidden VALUES (1, 3, 1), (2, 4, 2)"),
    ("it gains its first NULL", "INSERT INTO hidden VALUES (3, NULL, 1), (4, NULL, 2)"),
    ("and a second one", "INSERT INTO hidden VALUES (5, NULL, 1)"),
    ("it loses one of two", "DELETE FROM hidden WHERE id = 5"),
    ("it loses the last", "UPDATE hidden SET project = 5 WHERE id = 3"),
    ("a NULL outside, and another inside", "UPDATE notes SET project = NULL WHERE id < 5; UPDATE hidden SET project = NULL WHERE id = 1"),
    ("it becomes empty", "DELETE FROM hidden WHERE person = 1"),
    ("and gains a NULL as its first", "INSERT INTO hidden VALUES (9, NULL, 1)"),
    ("TRUNCATE of the inner table", "TRUNCATE hidden"),
    ("of the members", "TRUNCATE members"),
    ("and all that is inner is made anew with it", "INSERT INTO members SELECT id, 1 + id % 2, 'z' FROM projects"),
    (
        "truncated and filled in one transaction",
        "TRUNCATE members; INSERT INTO members SELECT id, 2 - id % 2, 'w' FROM projects WHERE id % 4 < 3",
    ),
    ("a row that is its own table's inner one", "UPDATE projects SET parent = id, org = 1 WHERE id IN (4, 5)"),
    ("and loses it", "UPDATE projects SET parent = NULL WHERE id = 4; DELETE FROM projects WHERE id = 5"),
];

fn selects(me: i64) -> Vec<(&'static str, String)> {
    let of = |(table, sql): &(&'static str, &str)| (*table, sql.replace("$me", &format!("'{me}'")));
    SELECTS.iter().map(of).collect()
}

struct Scene {
    database: Database,
    streamer: Streamer,
    /// With who they are.
    replicas: Vec<(Replica, i64)>,
}

impl Scene {
    async fn start(persons: &[i64]) -> Scene {
        let database = Server::shared().await.database().await;
        database.execute(TABLES).await;
        let mut config = Streamer::config(&database);
        for (table, sql) in SELECTS {
            let params = if sql.contains("$me") {
                "params.me = { claim = \"me\" }"
            } else {
                ""
            };
            config = config.toml(&format!("[shape.{table}]\n{params}\ntables = ['{sql}']"));
        }
        for me in persons {
            let claims = json!({ "sub": format!("person {me}"), "me": me });
            config = config.token(&format!("token-{me}"), claims);
        }
        let streamer = config.start().await;
        let mut scene = Scene {
            database,
            streamer,
            replicas: Vec::new(),
        };
        for me in persons {
            scene.join(*me).await;
        }
        scene
    }

    async fn join(&mut self, me: i64) {
        let mut config = Replica::config(&self.streamer).token(&format!("token-{me}"));
        for (table, _) in SELECTS {
            config = config.subscribe(table);
        }
        self.replicas.push((config.start().await, me));
    }

    async fn commit(&self, number: usize, sql: &str) {
        self.database
            .execute(&format!(
                "BEGIN; INSERT INTO number VALUES ({number}); {sql}; COMMIT"
            ))
            .await;
    }

    /// The first look at the file that shows the number shows all.
    async fn arrived(&self, place: usize, number: usize, what: &str) {
        let (replica, me) = &self.replicas[place];
        until(&format!("{what}: it comes"), DEADLINE, || async {
            let read = file::read(&replica.file(), &["number"])?;
            let rows = read.tables[0].as_ref().map_or(0, |table| table.rows.len());
            anyhow::ensure!(rows >= number, "{rows} numbers");
            Ok(())
        })
        .await;
        self.same(replica, *me, what).await;
    }

    async fn same(&self, replica: &Replica, me: i64, what: &str) {
        let selects = selects(me);
        let tables: Vec<(&str, &str)> = selects
            .iter()
            .map(|(table, sql)| (*table, sql.as_str()))
            .collect();
        compare_file(&self.database, &replica.file(), &tables)
            .await
            .unwrap_or_else(|difference| panic!("{what}, person {me}: {difference:#}"));
        // Tables that only conditions look into never reach the file.
        let others = file::read(&replica.file(), &["members", "hidden"]).unwrap();
        assert!(others.tables.iter().all(Option::is_none), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_move_with_the_transaction_that_moves_them() {
    let scene = Scene::start(&[1, 2]).await;
    for (number, (what, sql)) in STEPS.iter().enumerate() {
        scene.commit(number + 1, sql).await;
        for place in 0..scene.replicas.len() {
            scene.arrived(place, number + 1, what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_away_gets_what_moved_meanwhile() {
    let mut scene = Scene::start(&[1, 2]).await;
    // One more, away all the time; and one that comes back half-way.
    scene.join(1).await;
    scene.join(2).await;
    for place in [2, 3] {
        scene.replicas[place].0.kill();
    }
    for (number, (what, sql)) in STEPS.iter().enumerate() {
        scene.replicas[0].0.kill();
        if number % 3 == 1 {
            scene.streamer.kill();
        }
        scene.commit(number + 1, sql).await;
        if number % 3 == 1 {
            scene.streamer.start().await;
        }
        scene.replicas[0].0.start().await;
        if number == STEPS.len() / 2 {
            scene.replicas[3].0.start().await;
        }
        for place in [0, 1] {
            scene.arrived(place, number + 1, what).await;
        }
    }
    scene.replicas[2].0.start().await;
    for place in [2, 3] {
        scene.arrived(place, STEPS.len(), "after all of it").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inner_table_that_stops_stops_what_looks_into_it_by_name() {
    let scene = Scene::start(&[1]).await;
    let (replica, me) = &scene.replicas[0];
    let before = file::read(&replica.file(), &["tasks", "comments"]).unwrap();
    scene
        .database
        .execute(
            "ALTER TABLE members ADD COLUMN more int DEFAULT 7;
             INSERT INTO members VALUES (8, 1, 'unseen', 1);
             INSERT INTO tasks VALUES (900, 8, 1, 'unseen'); INSERT INTO notes VALUES (900, 6, 'seen')",
        )
        .await;
    let states = || -> anyhow::Result<Vec<(String, String, String)>> {
        let file = replica.open();
        let mut statement = file.prepare(
            "SELECT table_name, state, coalesce(reason, '') FROM _anabranch_tables ORDER BY table_name",
        )?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    };
    until("both have stopped, and say why", DEADLINE, || async {
        let states = states()?;
        let stopped = |table: &str| {
            states.iter().any(|(name, state, reason)| {
                name == table && state == "stopped" && reason.contains("public.members")
            })
        };
        anyhow::ensure!(stopped("tasks") && stopped("comments"), "{states:?}");
        anyhow::ensure!(!stopped("notes") && !stopped("projects"), "{states:?}");
        anyhow::ensure!(
            states.iter().all(|(name, ..)| name != "members"),
            "{states:?}"
        );
        Ok(())
    })
    .await;
    // The others go on, and what stopped keeps what it had.
    scene
        .database
        .execute("INSERT INTO hidden VALUES (1, 6, 1)")
        .await;
    replica.until_caught_up(&scene.database).await;
    let selects = selects(*me);
    for (table, sql) in selects
        .iter()
        .filter(|(table, _)| ["notes", "projects"].contains(table))
    {
        compare_file(&scene.database, &replica.file(), &[(table, sql)])
            .await
            .unwrap();
    }
    let after = file::read(&replica.file(), &["tasks", "comments"]).unwrap();
    assert_eq!(before.tables, after.tables);
}
