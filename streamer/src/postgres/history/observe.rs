//! Asks the server what [`judge`](super::judge) needs to know, and renews the continuity nonce.

use anabranch_proto::Lsn;

use super::{Claim, Observed, Slot};
use crate::postgres::{
    replication::Replication,
    sql::{Client, Error},
};

/// Columns differ by version; as JSON a missing one is NULL.
const SLOT: &str = "
    SELECT plugin::text, database::text, temporary, two_phase, active_pid, confirmed_flush_lsn::text,
           CASE WHEN wal_status = 'lost' OR pg_catalog.to_jsonb(s) ->> 'conflicting' = 'true'
                     OR pg_catalog.to_jsonb(s) ->> 'invalidation_reason' IS NOT NULL
                THEN coalesce(pg_catalog.to_jsonb(s) ->> 'invalidation_reason', 'its WAL was removed') END,
           CASE WHEN NOT pg_catalog.pg_is_in_recovery()
                THEN pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::float8 END
      FROM pg_replication_slots s
     WHERE slot_name = $1";

/// Asks the server. The two connections must lead to the same one: a URL may name several hosts.
pub async fn observe(
    client: &Client,
    replication: &mut Replication,
    slot: &str,
    publication: &str,
) -> Result<Observed, Error> {
    let system = replication.identify().await?;
    let sql = &client.client;
    let row = sql
        .query_one(
            "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system())::text, pg_catalog.pg_is_in_recovery(), d.oid, d.datname::text,
                    (SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
                       FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE n.nspname = 'anabranch' AND c.relname = 'source'),
                    (SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
                       FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE n.nspname = 'anabranch' AND c.relname = 'streamers'),
                    (SELECT oid FROM pg_publication WHERE pubname = $1)
               FROM pg_database d WHERE d.datname = pg_catalog.current_database()",
            &[&publication],
        )
        .await?;
    if row.get::<_, String>(0) != system.identifier.to_string() {
        return Err(Error::Transient(
            "two connections led to two different servers".into(),
        ));
    }
    // NULL: it is not there. One that may not be read is not the same as none.
    let readable = |column, table| match row.get(column) {
        Some(false) => Err(Error::Definite(format!(
            "the role may not read anabranch.{table}: `anabranch-streamer setup` says what to run"
        ))),
        Some(true) => Ok(true),
        None => Ok(false),
    };
    let nonce = match readable(4, "source")? {
        true => sql
            .query_opt(
                "SELECT pg_catalog.encode(nonce, 'hex') FROM anabranch.source",
                &[],
            )
            .await?
            .map(|row| row.get(0)),
        false => None,
    };
    let continuity = match readable(5, "streamers")? {
        true => sql
            .query_opt(
                "SELECT nonce FROM anabranch.streamers WHERE slot = $1",
                &[&slot],
            )
            .await?
            .map(|row| row.get(0)),
        false => None,
    };
    let found = sql.query_opt(SLOT, &[&slot]).await?;
    let confirmed = found
        .as_ref()
        .and_then(|found| found.get::<_, Option<String>>(5))
        .map(|text| text.parse::<Lsn>())
        .transpose()
        .map_err(|error| Error::Definite(error.to_string()))?;
    Ok(Observed {
        system: system.identifier,
        timeline: system.timeline,
        database: row.get(2),
        database_name: row.get(3),
        flushed: system.flushed,
        in_recovery: row.get(1),
        nonce,
        continuity,
        publication: row.get(6),
        slot: found.map(|found| Slot {
            name: slot.to_owned(),
            plugin: found.get(0),
            database: found.get(1),
            temporary: found.get(2),
            two_phase: found.get(3),
            active_pid: found.get(4),
            lost: found.get(6),
            confirmed,
            retained_bytes: found.get::<_, Option<f64>>(7).map(|bytes| bytes as u64),
        }),
    })
}

/// Claims the name of a slot that does not exist, whoever had it before.
pub async fn claim(
    client: &Client,
    slot: &str,
    publication: &str,
    claim: &Claim,
) -> Result<(), Error> {
    client
        .client
        .execute(
            "INSERT INTO anabranch.streamers (slot, nonce, publication) VALUES ($1, $2, $3)
             ON CONFLICT (slot) DO UPDATE
                SET nonce = excluded.nonce, publication = excluded.publication, renewed_at = pg_catalog.now()",
            &[&slot, &claim.to, &publication],
        )
        .await?;
    Ok(())
}

/// Whether the claim still stands.
pub async fn stands(client: &Client, slot: &str, claim: &Claim) -> Result<bool, Error> {
    let row = client
        .client
        .query_opt(
            "SELECT FROM anabranch.streamers WHERE slot = $1 AND nonce = $2",
            &[&slot, &claim.to],
        )
        .await?;
    Ok(row.is_some())
}

/// Renews the continuity nonce in the database. `false`: what is there is not ours: history is broken, or somebody
/// else uses our slot. After an error it may or may not be renewed; renew the same claim again.
pub async fn renew(client: &Client, slot: &str, claim: &Claim) -> Result<bool, Error> {
    let renewed = client
        .client
        .execute(
            "UPDATE anabranch.streamers SET nonce = $2, renewed_at = pg_catalog.now() WHERE slot = $1 AND nonce = ANY($3)",
            &[&slot, &claim.to, &claim.from],
        )
        .await?;
    Ok(renewed == 1)
}
