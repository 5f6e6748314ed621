//! Secondary indexes: rows of a table by the values of some of its columns, for conditions with subqueries.
//!
//! Each is an index of SQLite on an expression: a function of ours that gives the [`Index::key`] of a row. So SQLite keeps it
//! true on all ways that rows take (held in memory, written at once, undone, emptied, copied), and nothing
//! here has to. What it costs is that whoever writes rows must have the function: a program that does not know it can
//! read the file, and is refused by SQLite when it writes a row, so the file's format did not change.
//!
//! While a table is copied it has none: to sort all rows at the end is much cheaper than to place each. Which ones are wanted
//! is not kept in the file: whoever wants them says so at each start.

use anabranch_proto::record::Malformed;
use rusqlite::{
    Connection, Error as SqliteError,
    functions::{Context, FunctionFlags},
    types::ValueRef,
};

use super::{Error, Mirror, State, rows::Rows};
use crate::{lookup::Index, table::Oid};

/// The function, of an index' [`Index::name`] and a row. Were it to give another key for the same row, it would need
/// another name: indexes that are kept under the old one are dropped then, and made anew.
const FUNCTION: &str = "anabranch_key";

/// Gives a connection the function.
pub(super) fn register(sqlite: &Connection) -> Result<(), SqliteError> {
    let flags = FunctionFlags::SQLITE_UTF8
        | FunctionFlags::SQLITE_DETERMINISTIC
        | FunctionFlags::SQLITE_INNOCUOUS;
    sqlite.create_scalar_function(FUNCTION, 2, flags, key)
}

/// The key of a row. NULL, which is in the place of an absent row, has none.
fn key(context: &Context<'_>) -> Result<Option<Vec<u8>>, SqliteError> {
    // Read once for each execution of a statement.
    let index = context.get_or_create_aux(0, |name| {
        let index = name.as_str().ok().and_then(|name| Index::parse(0, name));
        index.ok_or("no name of an index")
    })?;
    match context.get_raw(1) {
        ValueRef::Null => Ok(None),
        ValueRef::Blob(row) => match index.key(row) {
            Ok(key) => Ok(Some(key)),
            Err(error) => Err(SqliteError::UserFunctionError(Box::new(error))),
        },
        _ => {
            let error = Malformed("a row is no blob");
            Err(SqliteError::UserFunctionError(Box::new(error)))
        }
    }
}

/// The key, in this index, of the row in a column; as SQL.
pub(super) fn key_sql(index: &Index, column: &str) -> String {
    format!("{FUNCTION}('{}', {column})", index.name())
}

/// The name of the index in SQLite, behind that of what it is on.
pub(super) fn suffix(index: &Index) -> String {
    format!("{}_{}", index.table, index.name().replace(',', "_"))
}

/// Reads what [`suffix`] wrote.
fn of_suffix(suffix: &str) -> Option<Index> {
    let (table, parts) = suffix.split_once('_')?;
    Index::parse(table.parse().ok()?, &parts.replace('_', ","))
}

/// Those that are made.
pub(super) fn all(sqlite: &Connection) -> Result<Vec<Index>, SqliteError> {
    let names = made(sqlite)?.into_iter();
    let suffixes = names.filter_map(|(name, _)| Some(name.strip_prefix("index_")?.to_owned()));
    Ok(suffixes.filter_map(|name| of_suffix(&name)).collect())
}

/// What SQLite keeps of it in its schema, word for word.
fn create_sql(index: &Index) -> String {
    format!(
        "CREATE INDEX index_{} ON rows_{}({})",
        suffix(index),
        index.table,
        key_sql(index, "r")
    )
}

/// All there are: name, and how it was made.
fn made(sqlite: &Connection) -> Result<Vec<(String, String)>, SqliteError> {
    sqlite
        .prepare(
            "SELECT name, sql FROM sqlite_schema
             WHERE type = 'index' AND substr(name, 1, 6) = 'index_' AND substr(tbl_name, 1, 5) = 'rows_'",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

impl Mirror {
    /// From here on, these are the indexes that there are, and no others. Durable when it returns; an open group is
    /// committed before if any must be made or dropped, and nothing else is done if none must.
    ///
    /// Those of a table that is not there, or is still being copied, are made when its copy ends, and made again
    /// whenever it is copied anew. To be called at each start: until then those that the file has are kept, but not made
    /// again by a copy. One without parts needs nothing: all rows of its table are looked at.
    ///
    /// Making one reads its whole table, and takes as much of the log as the index is large.
    pub fn set_indexes(&mut self, indexes: &[Index]) -> Result<(), Error> {
        self.check()?;
        let mut wanted: Vec<Index> = Vec::new();
        for index in indexes {
            if Index::parse(index.table, &index.name()).as_ref() != Some(index) {
                return Err(Error::Misused("an index by what has no keys"));
            }
            if let Some(rows) = self.complete(index.table) {
                let columns = rows.table().columns.len();
                if index.parts.iter().any(|part| part.column >= columns) {
                    return Err(Error::Misused("an index by a column that is not there"));
                }
            }
            if !wanted.contains(index) {
                wanted.push(index.clone());
            }
        }
        let made = made(&self.sqlite)?;
        let possible =
            |index: &&Index| !index.parts.is_empty() && self.complete(index.table).is_some();
        let mut missing: Vec<String> = (wanted.iter().filter(possible)).map(create_sql).collect();
        let mut unwanted = made;
        unwanted.retain(|(_, sql)| match missing.iter().position(|m| m == sql) {
            Some(place) => {
                missing.swap_remove(place);
                false
            }
            None => true,
        });
        if !missing.is_empty() || !unwanted.is_empty() {
            self.alone(|mirror| {
                for (name, _) in &unwanted {
                    mirror.sqlite.execute_batch(&format!("DROP INDEX {name}"))?;
                    tracing::info!("{name} is dropped");
                }
                for sql in &missing {
                    make(&mirror.sqlite, sql)?;
                }
                Ok(())
            })?;
        }
        for rows in self.tables.values_mut() {
            rows.indexes = of_table(&wanted, rows.table().oid);
        }
        self.indexes = wanted;
        Ok(())
    }

    /// The rows of a table, if it has its indexes: it is not being copied.
    fn complete(&self, table: Oid) -> Option<&Rows> {
        let rows = self.tables.get(&table)?;
        (rows.entry.state != State::Copying).then_some(rows)
    }
}

/// Those of one table.
pub(super) fn of_table(indexes: &[Index], table: Oid) -> Vec<Index> {
    let of_it = indexes.iter().filter(|index| index.table == table);
    of_it.cloned().collect()
}

/// Makes the indexes of a table, as far as they are not there.
pub(super) fn make_all(sqlite: &Connection, rows: &Rows) -> Result<(), Error> {
    let made = made(sqlite)?;
    for index in rows.indexes.iter().filter(|index| !index.parts.is_empty()) {
        let sql = create_sql(index);
        if !made.iter().any(|(_, other)| *other == sql) {
            make(sqlite, &sql)?;
        }
    }
    Ok(())
}

fn make(sqlite: &Connection, sql: &str) -> Result<(), Error> {
    sqlite.execute_batch(sql)?;
    tracing::info!("index is made: {sql}");
    Ok(())
}
