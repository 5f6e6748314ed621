//! The sample data set, the shapes, and the workload.

use std::time::Duration;

use anabranch_tests::postgres::Database;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

/// Six related tables of some 100,000 rows, and two that the programs at the edge fill.
pub const TABLES: [&str; 8] = [
    "orgs", "people", "projects", "issues", "labels", "comments", "notes", "visits",
];

/// Connections that write.
pub const WORKERS: u64 = 2;

/// Between two transactions of a worker: some two hundred a second in all, and cores to spare for the rest.
const PACE: Duration = Duration::from_millis(8);

const SCHEMA: &str = "
CREATE TABLE orgs (id int PRIMARY KEY, name text NOT NULL, plan text NOT NULL);
CREATE TABLE people (id int PRIMARY KEY, org_id int NOT NULL REFERENCES orgs, name text NOT NULL, email text NOT NULL);
CREATE TABLE projects (id int PRIMARY KEY, org_id int NOT NULL REFERENCES orgs, name text NOT NULL, budget numeric(12,2) NOT NULL);
CREATE TABLE issues (id bigint PRIMARY KEY, org_id int NOT NULL REFERENCES orgs, project_id int NOT NULL REFERENCES projects,
  title text NOT NULL, state text NOT NULL, points int, due timestamptz, details jsonb NOT NULL DEFAULT '{}');
CREATE INDEX issues_project ON issues (project_id);
CREATE TABLE labels (issue_id bigint NOT NULL REFERENCES issues ON DELETE CASCADE, label text NOT NULL, org_id int NOT NULL,
  PRIMARY KEY (issue_id, label));
CREATE TABLE comments (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), org_id int NOT NULL, issue_id bigint NOT NULL REFERENCES issues ON DELETE CASCADE,
  body text NOT NULL, written timestamptz NOT NULL DEFAULT now());
CREATE INDEX comments_issue ON comments (issue_id);
CREATE TABLE notes (id text PRIMARY KEY, org_id int NOT NULL, body text NOT NULL CHECK (body <> ''));
CREATE TABLE visits (id int PRIMARY KEY, n bigint NOT NULL);
INSERT INTO visits VALUES (1, 0);
CREATE SEQUENCE issue_ids START 30001;
INSERT INTO orgs SELECT g, 'Org ' || g, (ARRAY['free','team','large'])[1 + g % 3] FROM generate_series(1, 50) g;
INSERT INTO people SELECT g, 1 + g % 50, 'Person ' || g, 'person' || g || '@example.org' FROM generate_series(1, 2000) g;
INSERT INTO projects SELECT g, 1 + g % 50, 'Project ' || g, g * 17.25 FROM generate_series(1, 500) g;
INSERT INTO issues SELECT g, 1 + (1 + g % 500) % 50, 1 + g % 500, 'Issue ' || g, (ARRAY['open','doing','done','done'])[1 + g % 4],
  nullif(g % 9, 0), now() + g * interval '1 minute', jsonb_build_object('n', g, 'tags', jsonb_build_array('a', g % 5))
  FROM generate_series(1, 30000) g;
INSERT INTO labels SELECT id, (ARRAY['bug','idea','late'])[1 + id % 3], org_id FROM issues WHERE id % 2 = 0;
INSERT INTO comments (org_id, issue_id, body) SELECT org_id, id, 'What about ' || title || '? ' || repeat('x', (id % 200)::int)
  FROM issues, generate_series(1, 2);
";

/// What the streamer is told.
pub const SHAPES: &str = r#"
[shape.everything]
tables = [ "SELECT * FROM orgs", "SELECT * FROM people", "SELECT * FROM projects", "SELECT * FROM issues", "SELECT * FROM labels",
  "SELECT * FROM comments", "SELECT * FROM notes", "SELECT * FROM visits" ]
writable = [ "issues", "notes", "visits" ]

[shape.org]
params.org = { claim = "org_id" }
tables = [
  "SELECT * FROM projects WHERE org_id = $org",
  "SELECT * FROM issues WHERE org_id = $org",
  "SELECT * FROM comments WHERE org_id = $org",
  "SELECT * FROM notes WHERE org_id = $org",
  "SELECT * FROM visits",
]
writable = [ "issues", "notes", "visits" ]

[shape.board]
tables = [ "SELECT id, org_id, title, state, points FROM issues WHERE state <> 'done' AND points >= 3" ]

[table."public.issues"]
column.points = "add"

[table."public.visits"]
column.n = "add"
"#;

/// A replica, and what must be in its file.
pub struct Place {
    /// Its name, and its token.
    pub name: &'static str,
    /// The shape that it subscribes to.
    pub shape: &'static str,
    /// Tables and the SQL that Postgres would answer.
    pub tables: Vec<(&'static str, String)>,
    /// The org whose notes a program writes into the file.
    pub writes: Option<i32>,
}

/// The three replicas.
pub fn places() -> Vec<Place> {
    let all = |table: &'static str| (table, format!("SELECT * FROM {table}"));
    let org = |table: &'static str| (table, format!("SELECT * FROM {table} WHERE org_id = 7"));
    let board =
        "SELECT id, org_id, title, state, points FROM issues WHERE state <> 'done' AND points >= 3";
    vec![
        Place {
            name: "everything",
            shape: "everything",
            tables: TABLES.map(all).to_vec(),
            writes: Some(1),
        },
        Place {
            name: "org-7",
            shape: "org",
            tables: ["projects", "issues", "comments", "notes"]
                .map(org)
                .into_iter()
                .chain([all("visits")])
                .collect(),
            writes: Some(7),
        },
        Place {
            name: "board",
            shape: "board",
            tables: vec![("issues", board.to_owned())],
            writes: None,
        },
    ]
}

/// Makes the tables and their rows; how many there are.
pub async fn fill(database: &Database) -> i64 {
    database.execute(SCHEMA).await;
    let mut rows = 0;
    for table in TABLES {
        let count = database
            .query(&format!("SELECT count(*) FROM {table}"), &[])
            .await;
        rows += count[0].get::<_, i64>(0);
    }
    rows
}

/// Writes until it is told to stop; how many transactions it made.
pub async fn work(client: Client, worker: u64, stopping: CancellationToken) -> anyhow::Result<u64> {
    let mut random = StdRng::seed_from_u64(worker);
    let mut transactions = 0;
    while !stopping.is_cancelled() {
        let issue: i64 = random.random_range(1..=30_000);
        let org = random.random_range(1..=50);
        let sql = match random.random_range(0..10) {
            0..=2 => format!(
                "UPDATE issues SET state = (ARRAY['open','doing','done'])[1 + {issue} % 3], points = {} WHERE id = {issue}",
                random.random_range(1..9)
            ),
            3..=5 => format!(
                "INSERT INTO comments (org_id, issue_id, body) SELECT org_id, id, 'Said by worker {worker}' FROM issues WHERE id = {issue}"
            ),
            6 => format!("DELETE FROM issues WHERE id = {issue}"),
            // Several tables in one transaction.
            7 => format!(
                "BEGIN;
                 WITH made AS (INSERT INTO issues SELECT nextval('issue_ids'), org_id, id, 'A new issue', 'open', 5, now() FROM projects
                   WHERE org_id = {org} LIMIT 1 RETURNING id, org_id)
                 INSERT INTO comments (org_id, issue_id, body) SELECT org_id, id, 'The first word on it' FROM made;
                 UPDATE projects SET budget = budget - 1.25 WHERE org_id = {org};
                 COMMIT"
            ),
            // A row that moves from one tenant to another.
            8 => format!("UPDATE issues SET org_id = {org} WHERE id = {issue}"),
            _ => format!("UPDATE people SET name = 'Renamed ' || {issue} WHERE id = 1 + {issue} % 2000"),
        };
        client.batch_execute(&sql).await?;
        transactions += 1;
        tokio::select! {
            () = tokio::time::sleep(PACE) => {}
            () = stopping.cancelled() => {}
        }
    }
    Ok(transactions)
}
