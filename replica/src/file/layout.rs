//! How entries are stored: what the columns of an entries table mean.
//!
//! What a program did to `t` is kept in `_anabranch_entries_t`, whose columns are numbered by place: they mean something
//! only together with the declaration that was in force. So that declaration is kept with the table, as its
//! [`Layout`], in `_anabranch_layouts`.
//!
//! **Entries are never rewritten, and never lost.** Their bytes are hashed when they become a local transaction, and a
//! transaction is sent again unchanged. When a table is declared with other columns, another key or another conflict
//! policy, and when it leaves the shapes, its entries table is *retired*: renamed to `_anabranch_retired_<n>`, with its
//! layout. What is in it is sent as it was captured, under the columns that it was captured with; Postgres judges it.
//! Meanwhile it is still shown in the table of today, column by column by name, as long as that has the same key.
//! Where it has not, or the table is gone, the entries are only in `_anabranch_outbox` until they are answered.

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

use super::{
    Error, capture,
    error::Doing,
    names::{self, quote},
    receipts,
    schema::object,
    table::{Conflict, Storage, Table},
};

/// What retired entries tables are called before their number.
const RETIRED_PREFIX: &str = "_anabranch_retired_";

/// One column of a layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Field {
    pub name: String,
    pub storage: Storage,
    pub conflict: Conflict,
}

/// A declaration, as far as entries depend on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layout {
    /// As in Postgres.
    pub schema: String,
    /// As in Postgres.
    pub name: String,
    pub columns: Vec<Field>,
    /// Places in `columns`, in the order of the key.
    pub key: Vec<usize>,
}

/// An entries table.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// Its name.
    pub entries: String,
    /// The table that it speaks of, by its name in the file.
    pub table: String,
    pub layout: Layout,
}

impl Layout {
    fn of(table: &Table) -> Layout {
        Layout {
            schema: table.schema.clone(),
            name: table.postgres_name.clone(),
            columns: table
                .columns
                .iter()
                .map(|column| Field {
                    name: column.name.clone(),
                    storage: column.storage,
                    conflict: column.conflict,
                })
                .collect(),
            key: table.key.clone(),
        }
    }

    /// Base rows of both are stored alike.
    fn has_same_rows(&self, other: &Layout) -> bool {
        let alike = |(a, b): (&Field, &Field)| a.name == b.name && a.storage == b.storage;
        self.key == other.key
            && self.columns.len() == other.columns.len()
            && self.columns.iter().zip(&other.columns).all(alike)
    }

    /// For each column of the table, where it is in here. `None`: the keys are not of one kind, so that what happened to
    /// one row can't be told of a row of the other.
    pub(super) fn places_for(&self, table: &Table) -> Option<Vec<Option<usize>>> {
        let places: Vec<Option<usize>> = table
            .columns
            .iter()
            .map(|column| {
                self.columns
                    .iter()
                    .position(|f| f.name == column.name && f.storage == column.storage)
            })
            .collect();
        let key: Option<Vec<usize>> = table.key.iter().map(|&place| places[place]).collect();
        (key? == self.key).then_some(places)
    }

    fn key_of(&self, side: char) -> Vec<String> {
        self.key
            .iter()
            .map(|place| format!("{side}{place}"))
            .collect()
    }

    /// The condition that an entry is to be found by its old key: it took a row away from there.
    pub(super) fn leaves_old_key(&self) -> String {
        let moved: Vec<String> = self
            .key
            .iter()
            .map(|place| format!("o{place} IS NOT n{place}"))
            .collect();
        format!("o{} IS NOT NULL AND ({})", self.key[0], moved.join(" OR "))
    }

    /// An index on the key that an entry leaves a row at, which all but deletes have, and one on the key that it takes a
    /// row from, of those few that do. An index ends with the rowid, so the entries of one key after some id are a range.
    fn create_indexes(&self, connection: &Connection, entries: &str) -> rusqlite::Result<()> {
        let on = quote(entries);
        let (new, old) = index_names(entries);
        connection.execute_batch(&format!(
            "CREATE INDEX IF NOT EXISTS {} ON {on}({});\
             CREATE INDEX IF NOT EXISTS {} ON {on}({}) WHERE {}",
            quote(&new),
            self.key_of('n').join(", "),
            quote(&old),
            self.key_of('o').join(", "),
            self.leaves_old_key(),
        ))
    }

    fn create_entries(&self, connection: &Connection, entries: &str) -> rusqlite::Result<()> {
        let side = |side: char| -> String {
            (0..self.columns.len())
                .map(|place| format!(", {side}{place} ANY"))
                .collect()
        };
        connection.execute_batch(&format!(
            "CREATE TABLE IF NOT EXISTS {}(id INTEGER PRIMARY KEY, operation TEXT NOT NULL, captured_time TEXT NOT NULL, \
             changed TEXT NOT NULL{}{}, nonce INTEGER NOT NULL DEFAULT (random())) STRICT",
            quote(entries),
            side('o'),
            side('n')
        ))?;
        self.create_indexes(connection, entries)
    }

    fn create_base_rows(&self, connection: &Connection, table: &str) -> rusqlite::Result<()> {
        let numbered = |side: char, count: usize| -> Vec<String> {
            (0..count).map(|i| format!("{side}{i}")).collect()
        };
        let keys = numbered('k', self.key.len());
        connection.execute_batch(&format!(
            "CREATE TABLE IF NOT EXISTS {}({} ANY, present INTEGER NOT NULL, {} ANY, PRIMARY KEY({})) STRICT, WITHOUT ROWID",
            quote(&names::base_rows(table)),
            keys.join(" ANY, "),
            numbered('v', self.columns.len()).join(" ANY, "),
            keys.join(", "),
        ))
    }
}

fn index_names(entries: &str) -> (String, String) {
    (
        format!("_anabranch_new_keys_of_{entries}"),
        format!("_anabranch_old_keys_of_{entries}"),
    )
}

/// The entries tables that have entries above `after` and up to `last`. Only their layouts are read: there may be
/// hundreds, and this is done for each answer.
pub(super) fn having(
    connection: &Connection,
    after: i64,
    last: i64,
) -> rusqlite::Result<Vec<Source>> {
    let names: Vec<String> = connection
        .prepare_cached("SELECT entries FROM _anabranch_layouts ORDER BY entries")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let mut sources = Vec::new();
    for name in names {
        let has_some = connection
            .prepare_cached(&format!(
                "SELECT 1 FROM {} WHERE id > ?1 AND id <= ?2 LIMIT 1",
                quote(&name)
            ))?
            .exists([after, last])?;
        if has_some {
            sources.extend(read(connection, "WHERE entries = ?1", Some(&name))?);
        }
    }
    Ok(sources)
}

fn read(
    connection: &Connection,
    condition: &str,
    value: Option<&str>,
) -> rusqlite::Result<Vec<Source>> {
    let sql = format!(
        "SELECT entries, table_name, layout FROM _anabranch_layouts {condition} ORDER BY entries"
    );
    connection
        .prepare_cached(&sql)?
        .query_map(rusqlite::params_from_iter(value), |row| {
            let layout: String = row.get(2)?;
            Ok(Source {
                entries: row.get(0)?,
                table: row.get(1)?,
                layout: serde_json::from_str(&layout)
                    .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?,
            })
        })?
        .collect()
}

/// All entries tables.
pub(super) fn all(connection: &Connection) -> rusqlite::Result<Vec<Source>> {
    read(connection, "", None)
}

/// Those that can be shown in a table, and for each of its columns where it is in them.
pub(super) fn shown_in(
    connection: &Connection,
    table: &Table,
) -> rusqlite::Result<Vec<(Source, Vec<Option<usize>>)>> {
    let sources = read(connection, "WHERE table_name = ?1", Some(&table.name))?;
    Ok(sources
        .into_iter()
        .filter_map(|source| {
            let places = source.layout.places_for(table)?;
            Some((source, places))
        })
        .collect())
}

/// Makes the tables for a declaration, and retires entries that were captured under another one. Says whether the
/// entries tables of the file are others now, and whether there may be base rows of this table.
pub(super) fn declare(connection: &Connection, table: &Table) -> Result<(bool, bool), Error> {
    let declare = || {
        let wanted = Layout::of(table);
        let entries = names::entries(&table.name);
        let there = read(connection, "WHERE entries = ?1", Some(&entries))?.pop();
        let fits = there.as_ref().is_some_and(|there| there.layout == wanted);
        let mut changed = false;
        if let Some(there) = there.filter(|_| !fits) {
            retire_entries(connection, &there)?;
            if !there.layout.has_same_rows(&wanted) {
                drop_base_rows(connection, &table.name)?;
            }
            changed = true;
        }
        // One of more columns is read-only here.
        if table.writable && wanted.columns.len() <= capture::WRITABLE_COLUMNS_MAX {
            wanted.create_entries(connection, &entries)?;
            if !fits {
                let layout = serde_json::to_string(&wanted)
                    .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
                connection.execute(
                    "INSERT INTO _anabranch_layouts VALUES(?1, ?2, ?3)",
                    params![entries, table.name, layout],
                )?;
                changed = true;
            }
        }
        let overlaid = !read(connection, "WHERE table_name = ?1", Some(&table.name))?.is_empty();
        if overlaid {
            wanted.create_base_rows(connection, &table.name)?;
        }
        Ok((changed, overlaid))
    };
    declare().doing("make the tables for local writes")
}

/// The table left the shapes: its entries wait for their answers without it.
pub(super) fn retire(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    let entries = names::entries(table);
    if let Some(source) = read(connection, "WHERE entries = ?1", Some(&entries))?.pop() {
        retire_entries(connection, &source)?;
    }
    drop_base_rows(connection, table)
}

fn drop_base_rows(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    let name = quote(&names::base_rows(table));
    connection.execute_batch(&format!("DROP TABLE IF EXISTS {name}"))
}

fn retire_entries(connection: &Connection, source: &Source) -> rusqlite::Result<()> {
    let from = quote(&source.entries);
    let forget = "DELETE FROM _anabranch_layouts WHERE entries = ?1";
    if object(connection, &source.entries)?.is_none() {
        // A program dropped it.
        return connection.execute(forget, [&source.entries]).map(drop);
    }
    let is_empty = !connection
        .prepare(&format!("SELECT 1 FROM {from}"))?
        .exists([])?;
    if is_empty {
        connection.execute(forget, [&source.entries])?;
        return connection.execute_batch(&format!("DROP TABLE {from}"));
    }
    let mut number = 1u64;
    while object(connection, &format!("{RETIRED_PREFIX}{number}"))?.is_some() {
        number += 1;
    }
    let retired = format!("{RETIRED_PREFIX}{number}");
    let (new, old) = index_names(&source.entries);
    connection.execute_batch(&format!(
        "ALTER TABLE {from} RENAME TO {};DROP INDEX IF EXISTS {};DROP INDEX IF EXISTS {}",
        quote(&retired),
        quote(&new),
        quote(&old)
    ))?;
    source.layout.create_indexes(connection, &retired)?;
    connection
        .execute(
            "UPDATE _anabranch_layouts SET entries = ?2 WHERE entries = ?1",
            [&source.entries, &retired],
        )
        .map(drop)
}

/// Drops retired entries tables that nothing is left in. Says whether there were any.
pub(super) fn drop_empty(connection: &Connection) -> rusqlite::Result<bool> {
    let mut dropped = false;
    for source in all(connection)? {
        let entries = quote(&source.entries);
        if source.entries == names::entries(&source.table)
            || connection
                .prepare(&format!("SELECT 1 FROM {entries}"))?
                .exists([])?
        {
            continue;
        }
        connection.execute_batch(&format!("DROP TABLE {entries}"))?;
        connection.execute(
            "DELETE FROM _anabranch_layouts WHERE entries = ?1",
            [&source.entries],
        )?;
        dropped = true;
    }
    Ok(dropped)
}

/// A program dropped the entries or the base rows of a table, so what its rows show can't be told from what Postgres has.
pub(super) fn is_damaged(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    for source in read(connection, "WHERE table_name = ?1", Some(table))? {
        if object(connection, &source.entries)?.is_none() || !has_base_rows(connection, table)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes again what a program dropped of the tables for local writes.
pub(super) fn inspect(connection: &Connection) -> rusqlite::Result<()> {
    for source in all(connection)? {
        let layout = &source.layout;
        layout.create_entries(connection, &source.entries)?;
        if source.entries == names::entries(&source.table) {
            layout.create_base_rows(connection, &source.table)?;
        }
    }
    Ok(())
}

/// Whether there are base rows of a table that nothing is pending in.
pub(super) fn are_base_rows_left(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    let has = |from: &str, condition: &str, after: Option<i64>| {
        connection
            .prepare_cached(&format!(
                "SELECT 1 FROM {} {condition} LIMIT 1",
                quote(from)
            ))?
            .exists(rusqlite::params_from_iter(after))
    };
    if !has_base_rows(connection, table)? || !has(&names::base_rows(table), "", None)? {
        return Ok(false);
    }
    let boundary = receipts::boundary(connection)?;
    for source in read(connection, "WHERE table_name = ?1", Some(table))? {
        // One that a program dropped can't be asked.
        if object(connection, &source.entries)?.is_none()
            || has(&source.entries, "WHERE id > ?1", Some(boundary))?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Deletes them.
pub(super) fn delete_base_rows(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    connection.execute_batch(&format!("DELETE FROM {}", quote(&names::base_rows(table))))
}

/// Whether there may be base rows of a table.
pub(super) fn has_base_rows(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    Ok(object(connection, &names::base_rows(table))?.is_some())
}
