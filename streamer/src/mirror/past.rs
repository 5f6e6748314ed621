//! Lookups in the rows as they were after an earlier transaction.
//!
//! A row that no later transaction changed is what it is now; one that was changed is what the first of them found: the list
//! of what changed since has it.
//!
//! A row that changes all the time (a counter, say) is listed once for each time, mostly under the same key of an
//! index. To go through all of these at each lookup would be slow, so a lookup skips from row to row, and within each
//! to the one entry that may count.

use std::cell::Cell;

use rusqlite::{OptionalExtension, Row, ToSql};

use super::{
    Error as MirrorError, Key, Reader,
    list::List,
    lookup::{EachFound, EachKeyed, Now, Range, blob, failed},
    secondary,
};
use crate::{
    lookup::{Each, Error, Index, Lookup},
    table::Oid,
};

/// The rows as of an earlier transaction, in a reader's snapshot.
pub struct At<'a> {
    reader: &'a Reader,
    now: Now<'a>,
    list: &'a List,
    ordinal: i64,
}

impl Reader {
    /// The rows as they were after the transaction `ordinal` of the change index, of the tables whose old rows are listed and
    /// by the indexes with which they are.
    ///
    /// [`Reader::collect`] must have filled the list, from `ordinal` or an earlier one on, completely in this very
    /// snapshot. That the change index has all that happened to these tables since `ordinal` is the caller's to know, as
    /// of any other table ([`Reader::reaches`]). [`MirrorError::OutOfReach`]: one was copied anew since the list
    /// was begun; from a lookup: its old rows are of another version of its schema.
    pub fn at(&self, ordinal: i64) -> Result<At<'_>, MirrorError> {
        let now = self.now()?;
        let last = self.snapshot()?.last;
        let complete =
            |list: &&List| list.upto == Some(last) && (list.since..=last).contains(&ordinal);
        let Some(list) = self.list.as_deref().filter(complete) else {
            return Err(MirrorError::Misused("old rows that were not collected"));
        };
        self.check_copies(list)?;
        Ok(At {
            reader: self,
            now,
            list,
            ordinal,
        })
    }
}

impl At<'_> {
    /// As [`Lookup::rows`], with the keys of the rows.
    pub fn find(&self, index: &Index, prefix: &[u8], each: EachKeyed<'_>) -> Result<(), Error> {
        self.search(index, prefix, &mut |row| {
            let key: Key = row.get(0).map_err(failed)?;
            each(key, blob(row)?)
        })
    }

    fn search(&self, index: &Index, prefix: &[u8], each: EachFound<'_>) -> Result<(), Error> {
        let table = index.table;
        self.now.check(table)?;
        let Some(past) = self.list.past.iter().find(|past| past.table == table) else {
            return Err(MirrorError::Misused("old rows that were not collected").into());
        };
        if past.unreadable.is_some_and(|last| last > self.ordinal) {
            return Err(MirrorError::OutOfReach(self.reader.name(table)?).into());
        }
        let range = Range::new(prefix)?;
        let more = Cell::new(true);
        let mut each = |row: &Row<'_>| {
            more.set(each(row)?);
            Ok(more.get())
        };
        let sqlite = self.reader.sqlite();
        let since: [&dyn ToSql; 2] = [&table, &self.ordinal];
        range.search(sqlite, &unchanged_sql(index, &range), &since, &mut each)?;
        match &range.bounds {
            _ if !more.get() => Ok(()),
            None => range.search(sqlite, &all_changed_sql(table), &since, &mut each),
            Some((first, behind)) => self.changed(index, first, behind, &mut each),
        }
    }

    /// What the first transaction that changed a row found, where that had a key from `first` up to `behind`.
    fn changed(
        &self,
        index: &Index,
        first: &[u8],
        behind: &[u8],
        each: EachFound<'_>,
    ) -> Result<(), Error> {
        let sql = changed_sql(index);
        let prepare = |sql| self.reader.sqlite().prepare_cached(sql).map_err(failed);
        let (mut next_key, mut next_row) = (prepare(&sql.key)?, prepare(&sql.row)?);
        let (mut next_entry, mut first_of) = (prepare(&sql.entry)?, prepare(&sql.first)?);
        let mut from = first.to_vec();
        loop {
            let key: Option<Vec<u8>> = next_key
                .query_row((&from, behind), |row| row.get(0))
                .optional()
                .map_err(failed)?;
            let Some(key) = key else { return Ok(()) };
            // Below all keys of rows.
            let mut after: Box<dyn ToSql> = Box::new(f64::NEG_INFINITY);
            loop {
                let mut rows = next_row.query((&key, &after)).map_err(failed)?;
                let Some(found) = rows.next().map_err(failed)? else {
                    break;
                };
                let (row, mut ordinal): (Key, i64) = number(found)?;
                let mut entry = Some(found);
                let mut entries;
                if ordinal <= self.ordinal {
                    entries = (next_entry.query((&key, &row, self.ordinal))).map_err(failed)?;
                    entry = entries.next().map_err(failed)?;
                    if let Some(entry) = entry {
                        (_, ordinal) = number(entry)?;
                    }
                }
                if let Some(entry) = entry {
                    // It may have had another key in the index when it was changed first.
                    let is_first: bool = first_of
                        .query_row((index.table, &row, self.ordinal, ordinal), |row| row.get(0))
                        .map_err(failed)?;
                    if is_first && !each(entry)? {
                        return Ok(());
                    }
                }
                after = Box::new(row);
            }
            // The next one that there can be.
            from = key;
            from.push(0);
        }
    }
}

fn number(entry: &Row<'_>) -> Result<(Key, i64), Error> {
    let number = || Ok((entry.get(0)?, entry.get(2)?));
    number().map_err(failed)
}

/// Rows that are as they were. The plus sign takes from `k` what is known of its type, which would keep SQLite from searching
/// `changed` by it.
pub(super) fn unchanged_sql(index: &Index, range: &Range<'_>) -> String {
    format!(
        "SELECT k, r FROM rows_{} AS now{} WHERE {} AND NOT EXISTS (
            SELECT 1 FROM temp.changed AS c WHERE c.tbl = ?3 AND c.k = +now.k AND c.txn > ?4)",
        index.table,
        range.indexed_by(index),
        range.condition(index)
    )
}

/// What the first transactions that changed rows found: all of them.
fn all_changed_sql(table: Oid) -> String {
    format!(
        "SELECT k, old FROM temp.past_{table} AS past WHERE ?1 IS NULL AND ?2 IS NULL AND txn > ?4 AND NOT EXISTS (
            SELECT 1 FROM temp.changed AS c
            WHERE c.tbl = ?3 AND c.k = past.k AND c.txn > ?4 AND c.txn < past.txn)"
    )
}

pub(super) struct ChangedSql {
    /// The lowest key in the index from ?1 up to ?2.
    pub key: String,
    /// Of the entries of that key, the first of the first row behind ?2.
    pub row: String,
    /// Of those of this row, the first after ?3.
    pub entry: String,
    /// Whether a row of the table ?1 was not changed after ?3 and before ?4.
    pub first: String,
}

pub(super) fn changed_sql(index: &Index) -> ChangedSql {
    let key = secondary::key_sql(index, "old");
    let name = secondary::suffix(index);
    let past = format!("temp.past_{} INDEXED BY past_{name}", index.table);
    ChangedSql {
        key: format!(
            "SELECT {key} FROM {past} WHERE {key} >= ?1 AND {key} < ?2 ORDER BY {key} LIMIT 1"
        ),
        row: format!(
            "SELECT k, old, txn FROM {past} WHERE {key} = ?1 AND k > ?2 ORDER BY k, txn LIMIT 1"
        ),
        entry: format!(
            "SELECT k, old, txn FROM {past} WHERE {key} = ?1 AND k = ?2 AND txn > ?3 ORDER BY txn LIMIT 1"
        ),
        first: "SELECT NOT EXISTS (
                SELECT 1 FROM temp.changed WHERE tbl = ?1 AND k = ?2 AND txn > ?3 AND txn < ?4)"
            .into(),
    }
}

impl Lookup for At<'_> {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        self.search(index, prefix, &mut |row| each(blob(row)?))
    }
}
