//! A database of a test's own.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Mutex;
use tokio_postgres::{Client, Error, NoTls, Row, types::ToSql};

use super::Server;
use crate::{
    runtime,
    wait::{DEADLINE, until},
};

/// A database that only one test knows. When it is dropped, its slots and then itself are removed, in the background:
/// a slot that nobody reads would keep all WAL of the server.
#[derive(Debug)]
pub struct Database {
    name: String,
    url: String,
    admin_url: String,
    /// For [`execute`](Self::execute) and [`query`](Self::query); made when needed, and again when it is lost.
    client: Mutex<Option<Client>>,
}

impl Database {
    pub(super) async fn create(server: &Server, options: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        // The shared server is of this process alone, so a number is enough.
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let admin = server.connect("postgres").await;
        admin
            .batch_execute(&format!("CREATE DATABASE {name} {options}"))
            .await
            .unwrap_or_else(|error| panic!("create database {name} {options}: {error:?}"));
        Self {
            url: server.url(&name),
            admin_url: server.url("postgres"),
            name,
            client: Mutex::new(None),
        }
    }

    /// The same on a copy of its server: a standby.
    pub fn on(&self, server: &Server) -> Self {
        Self {
            url: server.url(&self.name),
            admin_url: server.url("postgres"),
            name: self.name.clone(),
            client: Mutex::new(None),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `postgres://user:password@host:port/name`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The same at another place: a proxy's.
    pub fn url_at(&self, host: &str, port: u16) -> String {
        let (user, _) = self.url.split_once('@').expect("a URL with a user");
        format!("{user}@{host}:{port}/{}", self.name)
    }

    /// The same as another role, both percent-encoded as in any URL.
    pub fn url_as(&self, role: &str, password: &str) -> String {
        let (_, place) = self.url.split_once('@').expect("a URL with a user");
        let encode = |text: &str| -> String {
            let escape = |byte: u8| match byte {
                b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(byte).to_string(),
                _ => format!("%{byte:02X}"),
            };
            text.bytes().map(escape).collect()
        };
        format!("postgres://{}:{}@{place}", encode(role), encode(password))
    }

    /// A new connection.
    pub async fn connect(&self) -> Client {
        self.try_connect()
            .await
            .unwrap_or_else(|error| panic!("connect to {}: {error:?}", self.name))
    }

    /// A new connection, where the server may be down.
    pub async fn try_connect(&self) -> Result<Client, Error> {
        connect(&self.url).await
    }

    /// Runs SQL, statements separated by `;`, and panics if it fails.
    #[track_caller]
    pub fn execute(&self, sql: &str) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            if let Err(error) = self.try_execute(sql).await {
                panic!("{caller}: {error:?}\n{sql}");
            }
        }
    }

    /// Runs SQL that may fail.
    pub async fn try_execute(&self, sql: &str) -> Result<(), Error> {
        let mut client = self.client.lock().await;
        self.ensure(&mut client).await?.batch_execute(sql).await
    }

    /// Runs a query, and panics if it fails.
    #[track_caller]
    pub fn query(
        &self,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Vec<Row>> {
        let caller = std::panic::Location::caller();
        async move {
            let mut client = self.client.lock().await;
            let rows = match self.ensure(&mut client).await {
                Ok(client) => client.query(sql, params).await,
                Err(error) => Err(error),
            };
            rows.unwrap_or_else(|error| panic!("{caller}: {error:?}\n{sql}"))
        }
    }

    /// Where the WAL of its server ends now: all that was committed lies before it. Not the insert position, which
    /// nobody is ever told about on an idle server, and which may lie behind a page's header.
    pub async fn lsn(&self) -> anabranch_proto::Lsn {
        let rows = self
            .query("SELECT pg_current_wal_flush_lsn()::text", &[])
            .await;
        rows[0]
            .get::<_, String>(0)
            .parse()
            .expect("Postgres prints an LSN")
    }

    /// Until everybody sees what the streamer has written. Postgres sends a commit as soon as it is in the WAL, and shows it a
    /// moment after: so a replica may have an answer of which a query knows nothing yet.
    pub async fn until_visible(&self) {
        let committing = "SELECT count(*) FROM pg_stat_activity
                           WHERE datname = current_database() AND application_name LIKE 'anabranch writer%'
                             AND backend_xid IS NOT NULL";
        until("what is written is visible", DEADLINE, || async {
            self.query(committing, &[]).await[0].get::<_, i64>(0) == 0
        })
        .await;
    }

    async fn ensure<'a>(&self, client: &'a mut Option<Client>) -> Result<&'a Client, Error> {
        if client.as_ref().is_none_or(Client::is_closed) {
            *client = Some(self.try_connect().await?);
        }
        Ok(client.as_ref().expect("just made"))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (url, name) = (self.admin_url.clone(), self.name.clone());
        runtime().spawn(async move {
            // Best effort: the server may be down or gone already, and then so is this.
            let admin = connect(&url).await?;
            let sql = format!(
                "ALTER DATABASE {name} ALLOW_CONNECTIONS false;
                 SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}';
                 SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = '{name}';
                 DROP DATABASE {name} WITH (FORCE)"
            );
            // One at a time: DROP DATABASE can't run in the transaction of several.
            for statement in sql.split(';') {
                admin.batch_execute(statement).await?;
            }
            Ok::<_, Error>(())
        });
    }
}

/// Connects, with the connection's task on the harness's runtime.
pub(crate) async fn connect(url: &str) -> Result<Client, Error> {
    let url = url.to_owned();
    let connected = runtime().spawn(async move {
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
        // It ends when the client is dropped; an error of it is an error of the client's calls.
        runtime().spawn(connection);
        Ok(client)
    });
    connected.await.expect("connecting does not panic")
}
