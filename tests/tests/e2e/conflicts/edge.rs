//! One replica that writes, as a role of its own.

use anabranch_tests::{
    peers::{Replica, Streamer, TOKEN},
    postgres::{Database, Server},
};
use rusqlite::Connection;

/// A row of `_anabranch_rejected`.
#[derive(Debug, PartialEq)]
pub struct Rejected {
    pub table: String,
    pub operation: String,
    pub key: String,
    pub changes: serde_json::Value,
    pub outcome: String,
    pub sqlstate: Option<String>,
    pub constraint: Option<String>,
    pub message: Option<String>,
}

/// A streamer, and a replica of the shape `s`, all of which it may write.
pub struct Edge {
    pub database: Database,
    pub streamer: Streamer,
    pub replica: Replica,
    tables: Vec<(String, String)>,
}

impl Edge {
    /// `tables` are names in the file, and SELECTs. In `sql` `{app}` is the role that its writes run as; `config` is more of
    /// the streamer's.
    pub async fn start(sql: &str, tables: &[(&str, &str)], config: &str) -> Edge {
        let database = Server::shared().await.database().await;
        let app = format!("{} app", database.name());
        database
            .execute(&format!(
                "CREATE ROLE \"{app}\"; GRANT USAGE ON SCHEMA public TO \"{app}\""
            ))
            .await;
        database
            .execute(&sql.replace("{app}", &format!("\"{app}\"")))
            .await;
        let selects: Vec<_> = tables.iter().map(|(_, select)| *select).collect();
        let claims = serde_json::json!({ "sub": "edge-1", "role": app });
        let streamer = Streamer::config(&database)
            .toml(config)
            .shape("s", &selects)
            .set("shape.s.writable", true)
            .set("auth.role.claim", "role")
            .set("auth.role.allowed", vec![app])
            .token(TOKEN, claims)
            .start()
            .await;
        let replica = Replica::config(&streamer).subscribe("s").start().await;
        let own = |(table, select): &(&str, &str)| ((*table).to_owned(), (*select).to_owned());
        let edge = Edge {
            database,
            streamer,
            replica,
            tables: tables.iter().map(own).collect(),
        };
        edge.same().await;
        edge
    }

    /// Opens the file as a program does.
    pub fn program(&self) -> Connection {
        let connection = Connection::open(self.replica.file()).unwrap();
        connection
            .busy_timeout(std::time::Duration::from_secs(5))
            .unwrap();
        connection
    }

    /// Until nothing is pending, and Postgres shows what became of it.
    pub async fn until_answered(&self) {
        self.replica.until_answered().await;
        self.database.until_visible().await;
    }

    /// The file equals Postgres, nothing of what was rejected is left.
    pub async fn same(&self) {
        let tables: Vec<_> = (self.tables.iter())
            .map(|(table, select)| (&**table, &**select))
            .collect();
        self.replica.until_equal(&self.database, &tables).await;
    }

    /// One text of Postgres.
    pub async fn text(&self, sql: &str) -> String {
        let row = self.database.query(sql, &[]).await;
        row[0].get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// All that was rejected, in the order in which it was written.
    pub fn rejected(&self) -> Vec<Rejected> {
        let file = self.replica.open();
        let mut rejected = file
            .prepare(
                "SELECT table_name, operation, key, changes, outcome, sqlstate, constraint_name, message
                   FROM _anabranch_rejected ORDER BY id",
            )
            .unwrap();
        let rows = rejected.query_map([], |row| {
            let changes: String = row.get(3)?;
            Ok(Rejected {
                table: row.get(0)?,
                operation: row.get(1)?,
                key: row.get(2)?,
                changes: serde_json::from_str(&changes).unwrap(),
                outcome: row.get(4)?,
                sqlstate: row.get(5)?,
                constraint: row.get(6)?,
                message: row.get(7)?,
            })
        });
        rows.unwrap().collect::<Result<_, _>>().unwrap()
    }
}
