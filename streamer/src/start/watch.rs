//! Looks, every few seconds, whether the tables that are followed are still what they were.
//!
//! The stream tells a changed schema only with the next row of its table, and never that a table was dropped or taken
//! out of the publication: its rows would freeze without a word. To be asked before each stream begins, too.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    postgres::{
        catalog,
        setup::{self, Membership},
        sql::{Client, Error},
    },
    table::{Oid, Table},
};

/// How often to look: cheap, and soon enough for something that a person did.
pub const WATCH_EVERY: Duration = Duration::from_secs(5);

/// Looks once. Each table that can't be followed any more, and why. `memberships` are those of the start: a table that
/// was taken out of the publication and put back has another one, and lacks what was committed in between.
pub async fn watch(
    client: &Client,
    publication: &str,
    tables: &[Arc<Table>],
    memberships: &BTreeMap<Oid, Membership>,
) -> Result<Vec<(Oid, String)>, Error> {
    let oids: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
    let now = catalog::read_again(client, &oids).await?;
    let published = setup::published(client, publication).await?;
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
        match &published {
            None => Some("the publication was dropped".into()),
            Some(published) => match published.tables.get(&table.oid) {
                None => Some("it was taken out of the publication".into()),
                Some((membership, _)) if memberships.get(&table.oid) != Some(membership) => Some(
                    "it was taken out of the publication for a while, or that was altered".into(),
                ),
                Some(_) => None,
            },
        }
    };
    Ok(tables
        .iter()
        .zip(now)
        .filter_map(|(table, now)| Some((table.oid, reason(table, now)?)))
        .collect())
}
