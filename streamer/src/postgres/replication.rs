//! Commands on a walsender connection.

use std::time::Duration;

use anabranch_proto::Lsn;
use bytes::BytesMut;

use super::{dial::Socket, sql::Error, sql::identifier, target::Target, wire::Wire};

/// `logical_decoding_work_mem` of our sessions. With Postgres' default of 64 MB transactions go to its disk, or are
/// streamed in many small blocks, early; with more, large ones are sent faster. It is used
/// while a large transaction is decoded, and by this connection only. `options` in the URL may say otherwise.
const DECODING_MEMORY: &str = "256MB";

/// The version of pgoutput's protocol that we ask for: the lowest that streams transactions in progress (Postgres 14).
/// Version 3 would add two-phase commit, and 4 hints for applying streamed transactions in parallel; we apply in
/// commit order, by one thread.
const PGOUTPUT_VERSION: u32 = 2;

/// `FAILOVER` of a slot exists since this version.
const FAILOVER_SINCE: u32 = 170_000;

/// How long a query of the walsender may take that waits for nobody.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A connection opened with `replication=database`, before streaming.
pub struct Replication {
    wire: Wire,
}

/// What IDENTIFY_SYSTEM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// Identifies the cluster.
    pub identifier: u64,
    /// Timeline.
    pub timeline: u32,
    /// Flushed WAL.
    pub flushed: Lsn,
    /// The database connected to.
    pub database: String,
}

/// A created slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Transactions that committed at or below it are in the snapshot, later ones will be streamed.
    pub consistent_point: Lsn,
    /// For SET TRANSACTION SNAPSHOT. Valid until the next command on this connection, or its end.
    pub snapshot: String,
}

/// A connection that streams.
pub(super) struct Streaming {
    pub socket: Socket,
    /// What has already arrived.
    pub read: BytesMut,
}

impl Replication {
    /// Connects and verifies the pinned settings.
    pub async fn connect(target: &Target, application_name: &str) -> Result<Replication, Error> {
        let suggested = [("logical_decoding_work_mem", DECODING_MEMORY)];
        let wire = Wire::connect(target, application_name, &suggested).await?;
        Ok(Replication { wire })
    }

    /// `major * 10000 + minor`, e.g. 150018.
    pub fn server_version(&self) -> u32 {
        self.wire.server_version()
    }

    /// IDENTIFY_SYSTEM.
    pub async fn identify(&mut self) -> Result<System, Error> {
        let row = self.row("IDENTIFY_SYSTEM").await?;
        Ok(System {
            identifier: parsed(&row, 0)?,
            timeline: parsed(&row, 1)?,
            flushed: parsed(&row, 2)?,
            database: parsed(&row, 3)?,
        })
    }

    /// `CREATE_REPLICATION_SLOT "name" [TEMPORARY] LOGICAL pgoutput (SNAPSHOT 'export' [, FAILOVER true])`.
    ///
    /// A slot that stays survives a failover where Postgres can do that (17 and later, on a primary). Waits for all
    /// transactions that are open anywhere in the cluster, so a caller should show them when this takes long. If it
    /// is dropped before it answers, the connection can't be used any more (and Postgres drops the slot).
    pub async fn create_slot(&mut self, name: &str, temporary: bool) -> Result<Slot, Error> {
        let failover = !temporary
            && self.server_version() >= FAILOVER_SINCE
            && self.wire.parameter("in_hot_standby") != Some("on");
        let sql = format!(
            "CREATE_REPLICATION_SLOT {}{} LOGICAL pgoutput (SNAPSHOT 'export'{})",
            identifier(name),
            if temporary { " TEMPORARY" } else { "" },
            if failover { ", FAILOVER true" } else { "" },
        );
        let rows = self.wire.query(&sql).await?;
        let row = rows.into_iter().next().ok_or_else(no_row)?;
        Ok(Slot {
            consistent_point: parsed(&row, 1)?,
            snapshot: parsed(&row, 2)?,
        })
    }

    /// `DROP_REPLICATION_SLOT "name" WAIT`. Waits until nobody uses it.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), Error> {
        let sql = format!("DROP_REPLICATION_SLOT {} WAIT", identifier(name));
        self.wire.query(&sql).await.map(drop)
    }

    /// START_REPLICATION: all that commits above `from`, or what the slot has confirmed, whichever is later. (The
    /// caller must have compared the two: Postgres skips what is in between without a word.)
    pub(super) async fn start(
        self,
        slot: &str,
        from: Lsn,
        publication: &str,
        streaming: bool,
    ) -> Result<Streaming, Error> {
        let command = start_command(slot, from, publication, streaming);
        let (socket, read) = answered(self.wire.copy_both(&command)).await?;
        Ok(Streaming { socket, read })
    }

    async fn row(&mut self, sql: &str) -> Result<Vec<Option<String>>, Error> {
        let rows = answered(self.wire.query(sql)).await?;
        rows.into_iter().next().ok_or_else(no_row)
    }
}

/// The names of publications are a list of identifiers inside of a string.
///
/// `streaming` is off unless the config has it on. A transaction is then sent as a whole once it has committed, and is
/// applied while it is sent. What is streamed before can only be applied after it, so the two follow one another:
/// an update of 1,000,000 rows that lies in a backlog takes 22 s instead of 15 s. What streaming saves is Postgres' disk, which it needs for transactions above
/// [`DECODING_MEMORY`].
fn start_command(slot: &str, from: Lsn, publication: &str, streaming: bool) -> String {
    let streaming = if streaming { "on" } else { "off" };
    format!(
        "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '{PGOUTPUT_VERSION}', publication_names {}, streaming '{streaming}', binary 'off', messages 'off')",
        identifier(slot),
        literal(&identifier(publication)),
    )
}

/// A string as the walsender's own grammar has it: no backslash is special.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

async fn answered<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER_WITHIN, work).await {
        Ok(done) => done,
        Err(_) => Err(Error::Transient(format!(
            "Postgres did not answer within {} s",
            ANSWER_WITHIN.as_secs()
        ))),
    }
}

fn no_row() -> Error {
    Error::Transient("Postgres answered a replication command without a row".into())
}

fn parsed<T: std::str::FromStr>(row: &[Option<String>], place: usize) -> Result<T, Error> {
    row.get(place)
        .and_then(Option::as_deref)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::Transient("Postgres answered a replication command strangely".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_in_the_grammar_of_the_walsender() {
        let command = start_command("s\"l", Lsn(0x1_0000_00AB), "My 'pub\\' \"x\"", true);
        assert_eq!(
            command,
            "START_REPLICATION SLOT \"s\"\"l\" LOGICAL 1/AB (proto_version '2', publication_names \
             '\"My ''pub\\'' \"\"x\"\"\"', streaming 'on', binary 'off', messages 'off')"
        );
    }
}
