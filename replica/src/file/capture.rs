//! Capture: what programs write to synced tables is queued, by triggers in pure SQL, in their own transactions.
//!
//! Any program in any language is captured, with the SQLite that it has (3.37 or newer), also while no replica runs. For a
//! table T that may be written there are, in the file:
//!
//! | | |
//! |---|---|
//! | `_anabranch_entries_T` | what was done, in typed columns: nothing is turned into text |
//! | `_anabranch_saved_T` | rows as Postgres has them, of those keys that were touched |
//! | `_anabranch_prior_T` | what a running INSERT, or a change of a key, found at its key |
//! | `_anabranch_base_T` | the view of all rows as Postgres has them |
//! | `_anabranch_insert_before_T` … | the triggers: see `triggers` for what they do, and for what they rely on |
//!
//! `_anabranch_head` counts entries of all tables. A table that may not be written has triggers that say so.
//! `_anabranch_capture` keeps what the triggers of each table were made of, so that they can be compared before the
//! streamer declares the table again, and made again; no SQL is ever taken from the file.
//!
//! **Ours are the last created**, and so the first to fire. Where a program added one since, all of ours are made again
//! ([`install`], and [`inspect`] whenever the schema changed). Where one of ours is missing or not what we made, writes may
//! not have been captured: it is made again, and the table is said to be altered, so that it is sent in full, and
//! shows what Postgres has.
//!
//! Until that is noticed, and with TEMP triggers always, an AFTER trigger of a program fires before ours: what it
//! writes is queued before what set it off. Columns that both change then end as the outer statement has them. So [`inspect`]
//! runs soon after `PRAGMA schema_version` moved, also while nothing comes from the streamer.
//!
//! What is *not* done here: making and keeping the tables of entries and of base rows (`layout`), finding where
//! transactions end, sending, and rebuilding rows. Prior rows are of no use once a
//! statement is done; those that are left (of rows that were skipped, of upserts) are removed by [`tidy`].

mod key;
pub(super) mod quiet;
#[cfg(test)]
mod tests;
mod triggers;

#[cfg(test)]
use rusqlite::types::{Value as SqlValue, ValueRef as SqlRef};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::{
    layout,
    names::{self, quote},
    schema::object,
    status::time_text,
    table::{Conflict, Storage, Table},
};
use triggers::Trigger;

/// A table of more columns takes no writes: entries have two columns for each, and SQLite has 2,000.
pub(super) const WRITABLE_COLUMNS_MAX: usize = 500;

/// A trigger of longer SQL is not made: SQLite takes 1,000,000 bytes, and names may have 255.
const SQL_BYTES_MAX: usize = 990_000;

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS _anabranch_capture(
    table_name TEXT PRIMARY KEY,
    declaration TEXT NOT NULL
) STRICT, WITHOUT ROWID;
";

/// Version of the SQL of the triggers, to be raised with each change to it: those that an earlier program made are no
/// work of somebody who meddled.
const VERSION: u32 = 3;

/// What of a table's declaration its triggers are made of, and its entries are to be read with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Captured {
    version: u32,
    /// As in the file.
    pub table: String,
    /// As in Postgres.
    pub schema: String,
    /// As in Postgres.
    pub postgres_name: String,
    pub columns: Vec<CapturedColumn>,
    /// Places in `columns`, in the order of the key.
    pub key: Vec<usize>,
    is_rowid: bool,
    /// Its key is taken from a lease.
    #[serde(default)]
    is_leased: bool,
    /// Why programs can't write it; `None`: they can.
    refusal: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CapturedColumn {
    pub name: String,
    pub postgres_type: String,
    pub storage: Storage,
    pub conflict: Conflict,
}

/// Where entries are, and how they are to be read.
#[cfg(test)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// The name of the table that they are in.
    pub entries: String,
    /// As it was when they were captured.
    pub captured: Captured,
}

#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Insert,
    Update,
    Delete,
}

/// One change of one row.
///
/// | | changed | old | new |
/// |---|---|---|---|
/// | insert | all | NULLs | the row |
/// | update | those that differ | of these, and of the key | of these, and of the key |
/// | delete | none | the row | NULLs |
///
/// Text that is not UTF-8 comes as a blob: there is no such value in Postgres.
#[cfg(test)]
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub id: i64,
    /// As in the file.
    pub table: String,
    pub operation: Operation,
    pub captured_time: String,
    pub changed: Vec<bool>,
    pub old: Vec<SqlValue>,
    pub new: Vec<SqlValue>,
}

/// Makes what is missing of the tables that all captured tables share. Within a write transaction.
pub(super) fn create_shared(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(TABLES)?;
    let is_counting = connection
        .prepare_cached("SELECT 1 FROM _anabranch_head")?
        .exists([])?;
    if !is_counting {
        // The count must go on where it was, if a program took it away.
        let mut last: i64 = connection.query_row(
            "SELECT coalesce(max(last), 0) FROM _anabranch_local",
            [],
            |row| row.get(0),
        )?;
        for source in layout::all(connection)? {
            if object(connection, &source.entries)?.is_none() {
                continue;
            }
            let newest = format!(
                "SELECT coalesce(max(id), 0) FROM {}",
                quote(&source.entries)
            );
            last = last.max(connection.query_row(&newest, [], |row| row.get(0))?);
        }
        connection.execute("INSERT INTO _anabranch_head VALUES(1, ?1)", [last])?;
    }
    let (name, sql) = triggers::HEAD_GUARD;
    let there: Option<String> = connection
        .prepare_cached(
            "SELECT sql FROM sqlite_schema WHERE type = 'trigger' AND name = ?1 COLLATE NOCASE",
        )?
        .query_row([name], |row| row.get(0))
        .optional()?;
    if there.as_deref() != Some(sql) {
        connection.execute_batch(&format!("DROP TRIGGER IF EXISTS {}; {sql}", quote(name)))?;
    }
    Ok(())
}

/// Makes the triggers of a table that is there as declared, and their tables, where they are not as they should be. Within a
/// write transaction, with [`create_shared`] done.
pub(super) fn install(connection: &Connection, table: &Table) -> rusqlite::Result<()> {
    let captured = Captured::new(table);
    let there = load(connection, &table.name)?;
    if there
        .as_ref()
        .is_some_and(|there| !there.has_layout_of(&captured))
    {
        drop_triggers(connection, &table.name)?;
        drop_prior(connection, &table.name)?;
    }
    if there.as_ref() != Some(&captured) {
        let declaration = serde_json::to_string(&captured)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        connection
            .prepare_cached(
                "INSERT INTO _anabranch_capture VALUES(?1, ?2) ON CONFLICT(table_name) DO UPDATE SET \
                 declaration = excluded.declaration",
            )?
            .execute(params![table.name, declaration])?;
    }
    make_tables(connection, &captured)?;
    make_triggers(connection, &captured)
}

/// Compares the triggers of a table, and their tables, with what was made; makes again what is missing or altered. Says
/// whether anything was: then writes may not have been captured. Within a write transaction.
pub(super) fn inspect(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    let Some(captured) = load(connection, table)? else {
        return Ok(false);
    };
    if captured.version != VERSION {
        // Those that the streamer's next declaration replaces still capture.
        return Ok(false);
    }
    let is_whole = make_tables(connection, &captured)? & are_made(connection, &captured)?;
    make_triggers(connection, &captured)?;
    Ok(!is_whole)
}

/// Whether programs can write a table.
pub(super) fn captures(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    Ok(load(connection, table)?.is_some_and(|captured| captured.is_writable()))
}

/// Removes the triggers of a table. What they captured stays: see `layout`.
pub(super) fn remove(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    drop_triggers(connection, table)?;
    drop_prior(connection, table)?;
    connection
        .execute(
            "DELETE FROM _anabranch_capture WHERE table_name = ?1",
            [table],
        )
        .map(drop)
}

fn drop_prior(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "DROP TABLE IF EXISTS {}",
        quote(&names::prior(table))
    ))
}

/// Drops the triggers that we have on a table: it is not what they were made for.
pub(super) fn drop_triggers(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    // By name: a program may have renamed the table, and they go with it.
    for name in triggers::names(table) {
        let is_there = connection
            .prepare_cached(
                "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = ?1 COLLATE NOCASE",
            )?
            .exists([&name])?;
        if is_there {
            connection.execute_batch(&format!("DROP TRIGGER {}", quote(&name)))?;
        }
    }
    Ok(())
}

/// Removes what statements left in the table of prior rows. Within a write transaction: nobody's statement is running.
pub(super) fn tidy(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached(&format!("DELETE FROM {}", quote(&names::prior(table))))?
        .execute([])
        .map(drop)
}

/// The entries of a table with `after` < id ≤ `upto`, in the order of their ids.
#[cfg(test)]
pub(super) fn entries(
    connection: &Connection,
    table: &Table,
    after: i64,
    upto: i64,
) -> rusqlite::Result<Vec<Entry>> {
    let source = Source {
        entries: names::entries(&table.name),
        captured: Captured::new(table),
    };
    let mut all = Vec::new();
    source.visit(connection, after, upto, |entry| {
        all.push(entry);
        Ok::<_, rusqlite::Error>(())
    })?;
    Ok(all)
}

#[cfg(test)]
impl Source {
    /// Visits the entries with `after` < id ≤ `upto`, in the order of their ids, one at a time.
    pub(super) fn visit<E: From<rusqlite::Error>>(
        &self,
        connection: &Connection,
        after: i64,
        upto: i64,
        mut each: impl FnMut(Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        let width = self.captured.columns.len();
        let columns = |prefix: char| {
            (0..width)
                .map(move |i| format!(", {prefix}{i}"))
                .collect::<String>()
        };
        let sql = format!(
            "SELECT id, operation, captured_time, changed{}{} FROM {} WHERE id > ?1 AND id <= ?2 ORDER BY id",
            columns('o'),
            columns('n'),
            quote(&self.entries)
        );
        let mut statement = connection.prepare_cached(&sql)?;
        let mut rows = statement.query([after, upto])?;
        while let Some(row) = rows.next()? {
            let operation: String = row.get(1)?;
            let changed: String = row.get(3)?;
            let values = |from: usize| -> rusqlite::Result<Vec<SqlValue>> {
                (from..from + width)
                    .map(|i| row.get_ref(i).map(value))
                    .collect()
            };
            each(Entry {
                id: row.get(0)?,
                table: self.captured.table.clone(),
                operation: match operation.as_str() {
                    "insert" => Operation::Insert,
                    "update" => Operation::Update,
                    _ => Operation::Delete,
                },
                captured_time: row.get(2)?,
                changed: changed.bytes().map(|mark| mark == b'1').collect(),
                old: values(4)?,
                new: values(4 + width)?,
            })?;
        }
        Ok(())
    }
}

impl Captured {
    pub(super) fn new(table: &Table) -> Captured {
        let mut captured = Captured {
            version: VERSION,
            table: table.name.clone(),
            schema: table.schema.clone(),
            postgres_name: table.postgres_name.clone(),
            columns: table
                .columns
                .iter()
                .map(|column| CapturedColumn {
                    name: column.name.clone(),
                    postgres_type: column.postgres_type.clone(),
                    storage: column.storage,
                    conflict: column.conflict,
                })
                .collect(),
            key: table.key.clone(),
            is_rowid: table.rowid().is_some(),
            is_leased: table.is_leased(),
            refusal: None,
        };
        if !table.writable {
            captured.refuse("it is not writable in any of the replica's shapes");
        } else if captured.columns.len() > WRITABLE_COLUMNS_MAX {
            captured.refuse(&format!("it has more than {WRITABLE_COLUMNS_MAX} columns"));
        } else if triggers::all(&captured, true)
            .iter()
            .any(|one| one.sql.len() > SQL_BYTES_MAX)
        {
            captured.refuse("its columns have too long names, for so many");
        }
        captured
    }

    fn refuse(&mut self, why: &str) {
        self.refusal = Some(format!(
            "anabranch: table {} is read-only here: {why}",
            self.table
        ));
    }

    /// What a program is told that leaves an integer key out.
    fn id_missing(&self) -> String {
        let column = self
            .key
            .first()
            .map_or("", |&place| &self.columns[place].name);
        let how = match self.is_leased {
            true => format!(
                "; take it from _anabranch_ids: VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = {}), …), which \
                 is NULL where no id is left until the replica is connected",
                names::literal(&self.table)
            ),
            false => String::new(),
        };
        format!(
            "anabranch: a row of {} must be inserted with its {column}: one that SQLite makes up may be in use elsewhere{how}",
            self.table
        )
    }

    /// Programs may write it.
    pub(super) fn is_writable(&self) -> bool {
        self.refusal.is_none()
    }

    /// Entries of one are read and sent as those of the other.
    fn has_layout_of(&self, other: &Captured) -> bool {
        let columns = |of: &Captured| -> Vec<(String, Storage)> {
            of.columns
                .iter()
                .map(|column| (column.name.clone(), column.storage))
                .collect()
        };
        (
            &self.table,
            &self.schema,
            &self.postgres_name,
            &self.key,
            self.is_rowid,
        ) == (
            &other.table,
            &other.schema,
            &other.postgres_name,
            &other.key,
            other.is_rowid,
        ) && columns(self) == columns(other)
    }
}

/// What the triggers of a table were made of.
fn load(connection: &Connection, table: &str) -> rusqlite::Result<Option<Captured>> {
    let declaration: Option<String> = connection
        .prepare_cached("SELECT declaration FROM _anabranch_capture WHERE table_name = ?1")?
        .query_row([table], |row| row.get(0))
        .optional()?;
    Ok(declaration
        .and_then(|declaration| serde_json::from_str::<Captured>(&declaration).ok())
        .filter(Captured::makes_sense))
}

impl Captured {
    /// A program may have written to where it is kept.
    fn makes_sense(&self) -> bool {
        !self.key.is_empty() && self.key.iter().all(|&place| place < self.columns.len())
    }
}

/// Makes the table of prior rows. False: it is not what we made.
fn make_tables(connection: &Connection, captured: &Captured) -> rusqlite::Result<bool> {
    let (name, sql) = triggers::prior(captured);
    let there = object(connection, &name)?;
    if !captured.is_writable() {
        if there.is_some() {
            drop_prior(connection, &captured.table)?;
        }
        return Ok(true);
    }
    let is_whole = match there {
        Some((_, there)) if there == sql => return Ok(true),
        Some(_) => {
            drop_prior(connection, &captured.table)?;
            false
        }
        None => true,
    };
    connection.execute_batch(&sql)?;
    Ok(is_whole)
}

/// Whether what captures or refuses writes is as it was made; guards and order apart, which may be due to be changed.
fn are_made(connection: &Connection, captured: &Captured) -> rusqlite::Result<bool> {
    let there = triggers_of(connection, &captured.table)?;
    let mut is_made = true;
    for wanted in triggers::all(captured, false) {
        match there.iter().find(|trigger| trigger.name == wanted.name) {
            Some(trigger) if *trigger == wanted => continue,
            Some(altered) => keep(connection, &captured.table, altered)?,
            None => {}
        }
        tracing::warn!(
            table = captured.table,
            trigger = wanted.name,
            "a program dropped or altered a trigger by which writes are captured; it is made again"
        );
        is_made = false;
    }
    Ok(is_made)
}

fn keep(connection: &Connection, table: &str, altered: &Trigger) -> rusqlite::Result<()> {
    connection
        .execute(
            "INSERT INTO _anabranch_dropped(kind, name, table_name, sql, reason, dropped_time) \
             VALUES('trigger', ?1, ?2, ?3, 'a program altered a trigger of the replica''s own; it was made again as it should be', ?4)",
            params![altered.name, table, altered.sql, time_text(jiff::Timestamp::now())],
        )
        .map(drop)
}

/// Makes our triggers the last ones of the table.
fn make_triggers(connection: &Connection, captured: &Captured) -> rusqlite::Result<()> {
    let wanted = triggers::all(captured, is_guarded(connection)?);
    let there = triggers_of(connection, &captured.table)?;
    let ours = there
        .iter()
        .filter(|trigger| names::is_ours(&trigger.name))
        .count();
    if ours == wanted.len() && there.ends_with(&wanted) {
        return Ok(());
    }
    if there
        .last()
        .is_some_and(|last| ours > 0 && !names::is_ours(&last.name))
    {
        tracing::info!(
            table = captured.table,
            "a program added a trigger; those that capture writes are made again, to fire before it"
        );
    }
    drop_triggers(connection, &captured.table)?;
    for trigger in &wanted {
        connection.execute_batch(&trigger.sql)?;
    }
    Ok(())
}

/// All triggers of a table, the oldest first.
fn triggers_of(connection: &Connection, table: &str) -> rusqlite::Result<Vec<Trigger>> {
    connection
        .prepare_cached(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?1 COLLATE NOCASE ORDER BY rowid",
        )?
        .query_map([table], |row| Ok(Trigger { name: row.get(0)?, sql: row.get(1)? }))?
        .collect()
}

/// Whether a write of ours can make a program's trigger write.
fn is_guarded(connection: &Connection) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name NOT LIKE '\\_anabranch\\_%' ESCAPE '\\' \
             AND lower(tbl_name) IN (SELECT lower(table_name) FROM _anabranch_synced)",
        )?
        .exists([])
}

#[cfg(test)]
fn value(value: SqlRef<'_>) -> SqlValue {
    match value {
        SqlRef::Null => SqlValue::Null,
        SqlRef::Integer(value) => SqlValue::Integer(value),
        SqlRef::Real(value) => SqlValue::Real(value),
        SqlRef::Blob(value) => SqlValue::Blob(value.to_vec()),
        SqlRef::Text(value) => match std::str::from_utf8(value) {
            Ok(text) => SqlValue::Text(text.to_owned()),
            Err(_) => SqlValue::Blob(value.to_vec()),
        },
    }
}
