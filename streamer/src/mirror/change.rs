//! What one change of Postgres does to the mirror's rows: finding the old row, filling in what was not sent,
//! noticing contradictions. It is written once, over [`Work`]: `fold` holds a transaction in memory, `direct` writes
//! each row at once.

use anabranch_proto::record::Malformed;
use bytes::Bytes;

use super::{Error, Key, key::fill, rows::Rows};
use crate::{
    table::Identity,
    transaction::{Change, Old},
};

/// Why a change could not be made.
#[derive(Debug)]
pub(super) enum Failure {
    /// The table can't be followed from here on: for a person, without values.
    Stop(String),
    /// The transaction does not fit in memory.
    TooLarge,
    /// The mirror can't go on.
    Mirror(Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Failure::Mirror(error.into())
    }
}

impl From<Malformed> for Failure {
    fn from(error: Malformed) -> Self {
        Failure::Stop(format!("a row can't be read: {error}"))
    }
}

/// The rows in the middle of a transaction.
pub(super) trait Work {
    /// The row of a key.
    fn get(&mut self, rows: &Rows, key: &Key) -> Result<Option<Bytes>, Failure>;
    /// The key of the row that has this replica identity, for tables with [`Identity::Index`].
    fn find(&mut self, rows: &Rows, identity: &Bytes) -> Result<Option<Key>, Failure>;
    /// Puts `new` in the place of `old` (as [`Work::get`] has it), where one or both are rows.
    fn put(
        &mut self,
        rows: &Rows,
        key: &Key,
        old: Option<&Bytes>,
        new: Option<&Bytes>,
    ) -> Result<(), Failure>;
    /// Removes all rows.
    fn truncate(&mut self, rows: &Rows) -> Result<(), Failure>;
}

/// Makes one change. After [`Failure::Stop`] some of it may have been made.
pub(super) fn make(
    work: &mut impl Work,
    rows: &Rows,
    change: &Change,
    row_bytes_max: usize,
) -> Result<(), Failure> {
    if let Change::Insert { table, .. }
    | Change::Update { table, .. }
    | Change::Delete { table, .. }
    | Change::Truncate { table } = change
        && table.version != rows.table().version
    {
        return Err(stop("a change came in another version of its schema"));
    }
    match change {
        Change::Insert { new, .. } => {
            let key = Key::of_row(rows.table(), new)?;
            insert(work, rows, &key, new, row_bytes_max)
        }
        Change::Update {
            old,
            new,
            unchanged,
            ..
        } => {
            let key = old_key(work, rows, old.as_ref(), new, unchanged)?;
            let Some(before) = work.get(rows, &key)? else {
                return Err(stop("an UPDATE of a row that the mirror does not have"));
            };
            let new = if unchanged.is_empty() {
                new.clone()
            } else {
                fill(&before, new, unchanged)?
            };
            let new_key = Key::of_row(rows.table(), &new)?;
            if new_key == key {
                check_row(rows, &new, row_bytes_max)?;
                let identity = rows.identity(&new)?;
                if let Some(identity) = identity
                    && (work.find(rows, &identity)?).is_some_and(|other| other != key)
                {
                    return Err(stop("an UPDATE to a replica identity that another row has"));
                }
                work.put(rows, &key, Some(&before), Some(&new))
            } else {
                work.put(rows, &key, Some(&before), None)?;
                insert(work, rows, &new_key, &new, row_bytes_max)
            }
        }
        Change::Delete { old, .. } => {
            let key = key_of_old(work, rows, old)?;
            let Some(before) = work.get(rows, &key)? else {
                return Err(stop("a DELETE of a row that the mirror does not have"));
            };
            work.put(rows, &key, Some(&before), None)
        }
        Change::Truncate { .. } => work.truncate(rows),
        Change::Stop { reason, .. } => Err(Failure::Stop(reason.clone())),
    }
}

fn insert(
    work: &mut impl Work,
    rows: &Rows,
    key: &Key,
    new: &Bytes,
    row_bytes_max: usize,
) -> Result<(), Failure> {
    check_row(rows, new, row_bytes_max)?;
    if work.get(rows, key)?.is_some() {
        return Err(stop("a row came under a key that the mirror has already"));
    }
    if let Some(identity) = rows.identity(new)?
        && work.find(rows, &identity)?.is_some()
    {
        return Err(stop(
            "a row came under a replica identity that the mirror has already",
        ));
    }
    work.put(rows, key, None, Some(new))
}

/// The key under which the mirror has the old row of an UPDATE.
fn old_key(
    work: &mut impl Work,
    rows: &Rows,
    old: Option<&Old>,
    new: &Bytes,
    unchanged: &[u16],
) -> Result<Key, Failure> {
    if let Some(old) = old {
        return key_of_old(work, rows, old);
    }
    let table = rows.table();
    let named_by = match &table.identity {
        Identity::Index(columns) => columns,
        Identity::Key | Identity::Full => &table.key,
    };
    if (named_by.iter()).any(|&column| unchanged.iter().any(|&place| usize::from(place) == column))
    {
        return Err(stop("an UPDATE that does not say which row it is of"));
    }
    match rows.identity(new)? {
        Some(identity) => key_of_old(work, rows, &Old::Identity(identity)),
        None => Ok(Key::of_row(table, new)?),
    }
}

fn key_of_old(work: &mut impl Work, rows: &Rows, old: &Old) -> Result<Key, Failure> {
    let table = rows.table();
    match (old, &table.identity) {
        (Old::Full(row), _) => Ok(Key::of_row(table, row)?),
        (Old::Identity(identity), Identity::Key) => Ok(Key::of_identity(table, identity)?),
        (Old::Identity(identity), Identity::Index(_)) => work
            .find(rows, identity)?
            .ok_or_else(|| stop("a change of a row that the mirror does not have")),
        (Old::Identity(_), Identity::Full) => Err(stop(
            "an old row came without all its columns, although the replica identity is FULL",
        )),
    }
}

/// Whether it can be kept. Found out before anything is written: one that cannot stops its table, not the mirror.
pub(super) fn check_row(rows: &Rows, row: &[u8], row_bytes_max: usize) -> Result<(), Failure> {
    if row.len() > row_bytes_max {
        return Err(Failure::Stop(format!(
            "a row of {} bytes is above row_bytes_max ({row_bytes_max} bytes)",
            row.len()
        )));
    }
    Ok(rows.check_keys(row)?)
}

fn stop(reason: &str) -> Failure {
    Failure::Stop(reason.into())
}
