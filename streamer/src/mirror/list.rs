//! What changed since some transaction, listed by key: the change index itself has it by transaction. It is kept in temporary
//! tables of a reader, in a file, and outlives its snapshots: it is filled some entries at a time, and goes on where it
//! stopped, in a later snapshot if need be.
//!
//! `changed` has keys and transactions only. Of tables that conditions look into, `past_<oid>` has the old rows as well, with
//! indexes as the rows themselves have (see `past`). `affected` has rows that did not change, and of which a condition may say
//! something else since a transaction all the same: whoever knows conditions notes them there.

use rusqlite::{Connection, Rows, types::FromSql};

use super::{Error, Key, Keys, Reader, secondary};
use crate::{lookup::Index, table::Oid};

/// An old row counts as one entry, and as one more for each so many bytes.
const ENTRY_BYTES: usize = 1024;

/// What a reader has listed.
pub(super) struct List {
    id: u64,
    /// It has what came after this transaction.
    pub since: i64,
    /// Up to and with this one; `None`: it is not complete up to the last of any snapshot.
    pub upto: Option<i64>,
    /// The tables whose old rows it has.
    pub past: Vec<Past>,
}

/// A table whose old rows are listed.
pub(super) struct Past {
    pub table: Oid,
    /// As the table was when it was first listed. What is listed of another copy does not belong together.
    pub version: u32,
    pub copy: i64,
    /// The last transaction whose old rows are of another version: they can't be read, and are not listed.
    pub unreadable: Option<i64>,
}

/// A place in the change index.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Behind this entry of this transaction; `None`: behind all of it.
    pub ordinal: i64,
    pub entry: Option<(Oid, Key)>,
}

impl Reader {
    /// Whether it has this list of [`Reader::collect`].
    pub(crate) fn has_list(&self, list: u64) -> bool {
        self.list.as_ref().is_some_and(|has| has.id == list)
    }

    /// Empties the list of changed keys that [`Reader::collect`] fills.
    pub(crate) fn forget_collected(&mut self) -> Result<(), Error> {
        let sqlite = self.sqlite();
        sqlite.execute_batch(
            "DROP TABLE IF EXISTS temp.changed; DROP TABLE IF EXISTS temp.affected",
        )?;
        for past in self.list.iter().flat_map(|list| &list.past) {
            let table = past.table;
            sqlite.execute_batch(&format!("DROP TABLE IF EXISTS temp.past_{table}"))?;
        }
        self.list = None;
        Ok(())
    }

    /// Lists the keys that transactions after `from` changed in these tables, and in those that the indexes `past` are of, at
    /// most about `entries_max` of them; another `list` is forgotten. Of the latter it also lists the old rows, for
    /// [`Reader::at`]. Returns where to go on, or `None` once it is complete up to the snapshot's last transaction; in a
    /// later snapshot, go on behind that one.
    ///
    /// `tables` and `past` are the same in all calls for one list. After an error the list is void.
    pub(crate) fn collect(
        &mut self,
        list: u64,
        tables: &[Oid],
        past: &[Index],
        from: &Place,
        entries_max: usize,
    ) -> Result<Option<Place>, Error> {
        if !self.has_list(list) {
            self.begin_list(list, past, from.ordinal)?;
        }
        let Some(mut has) = self.list.take() else {
            return Ok(None);
        };
        let place =
            (self.check_copies(&has)).and_then(|()| self.fill(&mut has, tables, from, entries_max));
        has.upto = match place {
            Ok(None) => Some(self.snapshot()?.last),
            _ => None,
        };
        // Also after an error: what it is made of is known by it, to be dropped.
        self.list = Some(has);
        place
    }

    fn begin_list(&mut self, id: u64, past: &[Index], since: i64) -> Result<(), Error> {
        self.forget_collected()?;
        let mut list = List {
            id,
            since,
            upto: None,
            past: Vec::new(),
        };
        for index in past {
            let table = index.table;
            if list.past.iter().any(|past| past.table == table) {
                continue;
            }
            let Some(standing) = self.standing(table)? else {
                return Err(Error::NotReady(format!("table {table}")));
            };
            list.past.push(Past {
                table,
                version: standing.version,
                copy: standing.copy,
                unreadable: None,
            });
        }
        let tables: Vec<Oid> = list.past.iter().map(|past| past.table).collect();
        self.list = Some(Box::new(list));
        let sqlite = self.sqlite();
        sqlite.execute_batch(
            "CREATE TEMP TABLE changed(
                tbl INTEGER, k, txn INTEGER, PRIMARY KEY(tbl, k, txn)
            ) WITHOUT ROWID;
            CREATE TEMP TABLE affected(
                item INTEGER, k, txn INTEGER, PRIMARY KEY(item, k)
            ) WITHOUT ROWID",
        )?;
        // Rows as they come: in the order of their keys, each long one would go to another page.
        for table in tables {
            sqlite.execute_batch(&format!(
                "CREATE TEMP TABLE past_{table}(k, txn INTEGER, old BLOB NOT NULL)"
            ))?;
        }
        for index in past.iter().filter(|index| !index.parts.is_empty()) {
            sqlite.execute_batch(&format!(
                "CREATE INDEX IF NOT EXISTS temp.past_{} ON past_{}({}, k, txn)",
                secondary::suffix(index),
                index.table,
                secondary::key_sql(index, "old")
            ))?;
        }
        Ok(())
    }

    /// That what is listed and what the snapshot has are of the same copies.
    pub(super) fn check_copies(&self, list: &List) -> Result<(), Error> {
        for past in &list.past {
            let standing = self.standing(past.table)?;
            if standing.map(|standing| (standing.version, standing.copy))
                != Some((past.version, past.copy))
            {
                return Err(Error::OutOfReach(self.name(past.table)?));
            }
        }
        Ok(())
    }

    fn fill(
        &self,
        list: &mut List,
        tables: &[Oid],
        from: &Place,
        entries_max: usize,
    ) -> Result<Option<Place>, Error> {
        let sqlite = self.sqlite();
        let in_list = |tables: &mut dyn Iterator<Item = Oid>| {
            let tables: Vec<String> = tables.map(|table| table.to_string()).collect();
            tables.join(", ")
        };
        let of_past = in_list(&mut list.past.iter().map(|past| past.table));
        let wanted =
            in_list(&mut (tables.iter().copied()).chain(list.past.iter().map(|past| past.table)));
        let mut changed = sqlite
            .prepare_cached("INSERT OR IGNORE INTO temp.changed(tbl, k, txn) VALUES(?1, ?2, ?3)")?;
        let mut left = entries_max;
        let snapshot = self.snapshot()?;
        let first = (snapshot.segments)
            .partition_point(|(_, first)| *first <= from.ordinal)
            .saturating_sub(1);
        for (segment, _) in &snapshot.segments[first..] {
            // Old rows may be long: only those that are wanted are read.
            let mut statement = sqlite.prepare(&format!(
                "SELECT txn, tbl, k, version, CASE WHEN tbl IN ({of_past}) THEN old END
                 FROM changes_{segment} WHERE (txn, tbl, k) > (?1, ?2, ?3) AND tbl IN ({wanted})"
            ))?;
            let (table, key) = match &from.entry {
                Some((table, key)) => (i64::from(*table), Some(key)),
                // Behind all tables of that transaction.
                None => (i64::MAX, None),
            };
            let mut entries = statement.query((from.ordinal, table, key))?;
            while let Some(entry) = entries.next()? {
                let (ordinal, table, key): (i64, Oid, Key) =
                    (entry.get(0)?, entry.get(1)?, entry.get(2)?);
                changed.raw_bind_parameter(1, table)?;
                changed.raw_bind_parameter(2, &key)?;
                changed.raw_bind_parameter(3, ordinal)?;
                changed.raw_execute()?;
                left = left.saturating_sub(1);
                let old = entry.get_ref(4)?.as_blob_or_null();
                if let Some(old) = old.map_err(rusqlite::Error::from)?
                    && let Some(past) = list.past.iter_mut().find(|past| past.table == table)
                {
                    if entry.get::<_, u32>(3)? == past.version {
                        insert_past(sqlite, table, &key, ordinal, old)?;
                        left = left.saturating_sub(old.len() / ENTRY_BYTES);
                    } else {
                        past.unreadable = past.unreadable.max(Some(ordinal));
                    }
                }
                if left == 0 {
                    return Ok(Some(Place {
                        ordinal,
                        entry: Some((table, key)),
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Gives the collected keys of a table, each with the first transaction after `from` that changed it, in key order,
    /// until `each` says that it is enough.
    pub(crate) fn changed_after(
        &self,
        table: Oid,
        from: i64,
        keys: Keys<'_>,
        each: impl FnMut(Key, i64) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = keys.condition();
        let mut statement = self.sqlite().prepare_cached(&format!(
            "SELECT k, txn FROM temp.changed WHERE tbl = ?3 AND {range} AND txn > ?4 ORDER BY k, txn"
        ))?;
        first_of_each(statement.query((keys.after, keys.upto, table, from))?, each)
    }

    /// Gives the collected changes of a table by transactions after `after`, up to and with `upto`, of keys above `above`, in
    /// key order, until `each` says that it is enough.
    pub(crate) fn changes_between(
        &self,
        table: Oid,
        (after, upto): (i64, i64),
        above: Option<&Key>,
        mut each: impl FnMut(Key, i64) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = match above {
            Some(_) => "k > ?4",
            None => "?4 IS NULL",
        };
        let mut statement = self.sqlite().prepare_cached(&format!(
            "SELECT k, txn FROM temp.changed WHERE tbl = ?1 AND txn > ?2 AND txn <= ?3 AND {range} ORDER BY k, txn"
        ))?;
        let mut changes = statement.query((table, after, upto, above))?;
        while let Some(change) = changes.next()? {
            if !each(change.get(0)?, change.get(1)?)? {
                break;
            }
        }
        Ok(())
    }

    /// Notes that what a condition says of a row may be something else since the transaction `ordinal`, although the row may not
    /// have changed. `item` tells conditions apart.
    pub(crate) fn note_affected(&self, item: usize, key: &Key, ordinal: i64) -> Result<(), Error> {
        self.sqlite()
            .prepare_cached(
                "INSERT INTO temp.affected(item, k, txn) VALUES(?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET txn = excluded.txn WHERE excluded.txn > txn",
            )?
            .execute((item as i64, key, ordinal))?;
        Ok(())
    }

    /// Gives the keys of a table that changed or were noted for `item` after the transaction `from`: each with the first
    /// transaction after `from` that changed it, if one did; in key order, until `each` says that it is enough.
    pub(crate) fn concerned_after(
        &self,
        table: Oid,
        item: usize,
        from: i64,
        keys: Keys<'_>,
        each: impl FnMut(Key, Option<i64>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = keys.condition();
        // A note comes behind all changes of its key.
        let mut statement = self.sqlite().prepare_cached(&format!(
            "SELECT k, txn, 0 AS noted FROM temp.changed WHERE tbl = ?3 AND {range} AND txn > ?4
             UNION ALL SELECT k, NULL, 1 FROM temp.affected WHERE item = ?5 AND {range} AND txn > ?4
             ORDER BY k, noted, txn"
        ))?;
        first_of_each(
            statement.query((keys.after, keys.upto, table, from, item as i64))?,
            each,
        )
    }
}

impl Reader {
    /// Gives all keys of a table that have a row now, or were changed after the transaction `from`: each with the first
    /// transaction after `from` that changed it, if one did; in key order, until `each` says that it is enough.
    pub(crate) fn all_after(
        &self,
        table: Oid,
        from: i64,
        keys: Keys<'_>,
        each: impl FnMut(Key, Option<i64>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = keys.condition();
        // A row comes behind all changes of its key.
        let mut statement = self.sqlite().prepare_cached(&format!(
            "SELECT k, txn, 0 AS is_row FROM temp.changed WHERE tbl = ?3 AND {range} AND txn > ?4
             UNION ALL SELECT k, NULL, 1 FROM rows_{table} WHERE {range} ORDER BY k, is_row, txn"
        ))?;
        first_of_each(statement.query((keys.after, keys.upto, table, from))?, each)
    }
}

/// Gives each key (the first column; in order) once, with what stands beside it first, until `each` says that it is enough.
fn first_of_each<T: FromSql>(
    mut entries: Rows<'_>,
    mut each: impl FnMut(Key, T) -> Result<bool, Error>,
) -> Result<(), Error> {
    let mut last: Option<Key> = None;
    while let Some(entry) = entries.next()? {
        let key: Key = entry.get(0)?;
        if last.as_ref() == Some(&key) {
            continue;
        }
        last = Some(key.clone());
        if !each(key, entry.get(1)?)? {
            break;
        }
    }
    Ok(())
}

fn insert_past(
    sqlite: &Connection,
    table: Oid,
    key: &Key,
    ordinal: i64,
    old: &[u8],
) -> Result<(), Error> {
    let mut insert = sqlite.prepare_cached(&format!(
        "INSERT INTO temp.past_{table}(k, txn, old) VALUES(?1, ?2, ?3)"
    ))?;
    insert.raw_bind_parameter(1, key)?;
    insert.raw_bind_parameter(2, ordinal)?;
    insert.raw_bind_parameter(3, old)?;
    insert.raw_execute()?;
    Ok(())
}
