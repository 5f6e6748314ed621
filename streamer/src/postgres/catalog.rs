//! What the system catalogs say of tables.
//!
//! One statement reads everything about any number of tables, in one snapshot: two statements could see a table
//! before and after a change of it. What was read ([`facts`]) is judged without I/O ([`judge`]): a [`Table`], or a
//! [`Refusal`] that says why not, and the SQL that mends it.
//!
//! # The key
//!
//! The mirror and the replicas find rows by the *text* of their key. That is exact for every type of which
//! Postgres' equality is coarser than that of the text (numeric, citext, text under a non-deterministic collation):
//! two rows that are equal by text would be equal to Postgres too, and never exist at the same time; and Postgres
//! decides by bytes, not by equality, whether an UPDATE changed its identity, so one that turns `Foo` into `foo` or
//! 1.0 into 1.00 does come with the old key. So those are allowed. Refused are
//!
//! - floats: NaN becomes NULL in SQLite, and −0.0 becomes 0.0;
//! - `regclass` and its like: they print as a name, which changes without any change of the row;
//! - deferrable keys: within a transaction two rows may have the same key. As a replica identity Postgres does not
//!   accept them; as a primary key beside another identity it does, so then the identity is the key here;
//! - generated columns: Postgres does not stream them.
//!
//! # NOT NULL
//!
//! Only where Postgres enforces it in the table. That a domain is NOT NULL does not keep its columns from NULL
//! (`INSERT INTO t (d) VALUES ((SELECT d FROM t WHERE false))`, says the manual of CREATE DOMAIN), and a constraint
//! that is NOT VALID (Postgres 18) says nothing of older rows. A replica that declared such a column NOT NULL could not
//! apply the row.

pub mod defaults;
mod difference;
mod facts;
mod judge;

pub use difference::difference;

use super::sql::{Client, Error};
use crate::table::Table;

/// Why a table can't be replicated, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("table {table}: {reason}")]
pub struct Refusal {
    /// `schema.name`.
    pub table: String,
    /// For a person.
    pub reason: String,
    /// SQL that mends it, if there is some.
    pub remedy: Option<String>,
}

/// A table's name as in the catalog.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Schema.
    pub schema: String,
    /// Table.
    pub name: String,
}

/// Reads tables by name. One answer for each name, in order.
///
/// All tables that are to be replicated must be asked for together: two of them may have one name in SQLite.
pub async fn read(client: &Client, names: &[Name]) -> Result<Vec<Result<Table, Refusal>>, Error> {
    let facts = facts::read(client, facts::Asked::Names(names)).await?;
    let judged = judge::judge(&facts);
    let answers = names.iter().zip(&facts.alike).zip(judged);
    Ok(answers
        .map(|((name, alike), judged)| {
            judged.unwrap_or_else(|| Err(judge::missing(name, alike.as_deref())))
        })
        .collect())
}

/// Reads tables by OID, as they are now, for comparison with what is known. `None`: dropped.
pub async fn read_again(
    client: &Client,
    oids: &[u32],
) -> Result<Vec<Option<Result<Table, Refusal>>>, Error> {
    let facts = facts::read(client, facts::Asked::Oids(oids)).await?;
    Ok(judge::judge(&facts))
}
