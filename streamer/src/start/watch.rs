//! Looks, every few seconds, whether the tables that are followed are still what they were.
//!
//! The stream tells a changed schema only with the next row of its table, and never that a table was dropped, rewritten, or
//! taken out of the publication: its rows would freeze, or be wrong, without a word. To be asked before each stream
//! begins, too.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    postgres::{
        catalog, setup,
        sql::{Client, Error},
        witness::{Witness, untold},
    },
    table::{Oid, Table},
};

/// How often to look: cheap, and soon enough for something that a person did.
pub const WATCH_EVERY: Duration = Duration::from_secs(5);

/// What was found.
pub struct Found {
    /// Each table that can't be followed any more, and why.
    pub stop: Vec<(Oid, String)>,
    /// The witness of each of the tables: as it was, where it can't be followed any more.
    pub witnesses: BTreeMap<Oid, Witness>,
}

/// Looks once. `witnesses`: as of the last look.
pub async fn watch(
    client: &Client,
    publication: &str,
    tables: &[Arc<Table>],
    witnesses: &BTreeMap<Oid, Witness>,
) -> Result<Found, Error> {
    let oids: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
    let now = catalog::read_again(client, &oids).await?;
    let published = setup::published(client, publication).await?;
    let witness = |oid| Some(published.as_ref()?.tables.get(&oid)?.0);
    let reason = |table: &Table, now| {
        match now {
            None => return Some(format!("{} was dropped", table.full_name())),
            Some(Err(catalog::Refusal { reason, .. })) => return Some(reason),
            Some(Ok(now)) => {
                if let Some(changed) = catalog::difference(table, &now) {
                    return Some(changed);
                }
            }
        }
        if published.is_none() {
            return Some("the publication was dropped".to_owned());
        }
        let oid = table.oid;
        untold(witnesses.get(&oid), witness(oid).as_ref()).map(str::to_owned)
    };
    let mut found = Found {
        stop: Vec::new(),
        witnesses: witnesses.clone(),
    };
    for (table, now) in tables.iter().zip(now) {
        match reason(table, now) {
            Some(reason) => found.stop.push((table.oid, reason)),
            None => found
                .witnesses
                .extend(witness(table.oid).map(|now| (table.oid, now))),
        }
    }
    Ok(found)
}
