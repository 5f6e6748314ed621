//! A program at the edge. It writes the replica's file with plain SQL, online or not, and knows nothing of Anabranch.

use std::{collections::HashSet, path::PathBuf, time::Duration};

use anabranch_tests::{
    oracle,
    postgres::Database,
    wait::{DEADLINE, until},
};
use anyhow::ensure;
use rusqlite::{Connection, TransactionBehavior, params};
use tokio_util::sync::CancellationToken;

/// Between two local transactions.
const PACE: Duration = Duration::from_millis(20);

/// How long it waits while the sidecar, or another program, has the lock.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// One of so many notes is empty, which Postgres refuses.
const EMPTY_EVERY: u64 = 40;

/// One of so many local transactions also changes an issue, which the workload in Postgres may have deleted or moved.
const ISSUE_EVERY: u64 = 5;

pub struct Writer {
    /// Its notes are called so, with a number.
    pub name: &'static str,
    pub file: PathBuf,
    /// Whose notes it writes.
    pub org: i32,
}

/// What a writer did.
pub struct Written {
    pub name: &'static str,
    pub file: PathBuf,
    /// Local transactions, each with a note of its own.
    pub transactions: u64,
}

impl Writer {
    /// Writes until it is told to stop.
    pub fn run(self, stopping: &CancellationToken) -> anyhow::Result<Written> {
        let mut sqlite = Connection::open(&self.file)?;
        sqlite.busy_timeout(LOCK_WAIT_MAX)?;
        let mut transactions = 0u64;
        while !stopping.is_cancelled() {
            let body = match transactions % EMPTY_EVERY {
                1 => "",
                _ => "written at the edge",
            };
            let local = sqlite.transaction_with_behavior(TransactionBehavior::Immediate)?;
            local.execute(
                "INSERT INTO notes(id, org_id, body) VALUES(?1, ?2, ?3)",
                params![format!("{}-{transactions}", self.name), self.org, body],
            )?;
            local.execute("UPDATE visits SET n = n + 1 WHERE id = 1", [])?;
            if transactions.is_multiple_of(ISSUE_EVERY) {
                local.execute(
                    "UPDATE issues SET points = coalesce(points, 0) + 1 WHERE id = (SELECT id FROM issues WHERE org_id = ?1 \
                     ORDER BY random() LIMIT 1)",
                    [self.org],
                )?;
            }
            local.commit()?;
            transactions += 1;
            std::thread::park_timeout(PACE);
        }
        Ok(Written {
            name: self.name,
            file: self.file,
            transactions,
        })
    }
}

impl Written {
    async fn until_answered(&self) -> anyhow::Result<()> {
        until("all local writes are answered", DEADLINE, || async {
            oracle::file::pending(&self.file).is_ok_and(|pending| pending == 0)
        })
        .await;
        Ok(())
    }

    /// The notes of rejected transactions.
    fn rejected(&self) -> anyhow::Result<HashSet<String>> {
        let sqlite = Connection::open(&self.file)?;
        let mut keys = sqlite.prepare(
            "SELECT json_extract(key, '$[0]') FROM _anabranch_rejected WHERE table_name = 'notes'",
        )?;
        let keys = keys.query_map([], |row| row.get(0))?;
        Ok(keys.collect::<Result<_, _>>()?)
    }
}

/// Proves that each local transaction took effect in Postgres once, or is rejected: its note is there or in
/// `_anabranch_rejected`, and the visits that all of them count are as many as there are notes.
pub async fn prove(written: &[Written], database: &Database) -> anyhow::Result<()> {
    for writer in written {
        writer.until_answered().await?;
    }
    let rows = database.query("SELECT id FROM notes", &[]).await;
    let arrived: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let mut applied = 0;
    for writer in written {
        let (name, transactions) = (writer.name, writer.transactions);
        let rejected = writer.rejected()?;
        for n in 0..transactions {
            let note = format!("{name}-{n}");
            ensure!(
                arrived.contains(&note) != rejected.contains(&note),
                "the note {note} is lost, or both there and rejected"
            );
            applied += u64::from(arrived.contains(&note));
        }
        println!(
            "  {name}: {transactions} local transactions, {} of them rejected",
            rejected.len()
        );
    }
    let visits = database.query("SELECT n FROM visits", &[]).await[0].get::<_, i64>(0);
    ensure!(
        u64::try_from(visits)? == applied && arrived.len() as u64 == applied,
        "{visits} visits and {} notes of {applied} local transactions",
        arrived.len()
    );
    Ok(())
}
