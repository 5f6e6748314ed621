//! A table whose columns are others now, and whose rows are kept.
//!
//! The streamer says so where a shape names other columns of a table than before (`Table.reshaped`): then only what differs
//! is sent, which is nothing where columns were left out. What is there is put into a stage, which becomes the table as one of a
//! reset does (`reset`): the rows as Postgres has them, so that pending writes are put on top of them again.
//!
//! All of it is within the SQLite transaction of the commit. What stands in a new column that is NOT NULL is replaced by the rows
//! that come in the same transaction.

use std::collections::HashMap;

use rusqlite::Connection;

use super::{
    Error, defaults,
    error::Doing,
    names::{self, quote},
    schema::Catalog,
    stage::Stage,
    table::{Column, Storage, Table},
};

/// Its stage. Those of resets are counted from 1.
const STAGE: &str = "0";

/// A column that is there.
struct There {
    storage: String,
    /// From 1; 0: it is not in the key.
    key: i64,
}

/// A stage with the rows that are there, in the columns that are declared; `None`: those that are there can't become them.
pub(super) fn stage(
    connection: &Connection,
    catalog: &Catalog,
    table: &std::sync::Arc<Table>,
) -> Result<Option<Stage>, Error> {
    let is_ours = catalog.get(&table.name).is_some_and(|synced| {
        synced.altered.is_none() && synced.name == table.name && synced.is_of(table)
    });
    if !is_ours || !fits(connection, table).doing("look at the columns of a table")? {
        return Ok(None);
    }
    let stage = Stage {
        name: format!("{}{STAGE}", names::STAGE_PREFIX),
        table: table.clone(),
        rows: 0,
        indexed: false,
    };
    Catalog::create(connection, &stage.name, table)?;
    fill(connection, table, &stage.name).doing("put the rows of a table under other columns")?;
    Ok(Some(stage))
}

/// Drops it, if it did not become the table.
pub(super) fn drop_stage(connection: &Connection, stage: &Stage) -> Result<(), Error> {
    connection
        .execute_batch(&format!("DROP TABLE IF EXISTS {}", quote(&stage.name)))
        .doing("drop a stage")
}

fn columns(connection: &Connection, table: &Table) -> rusqlite::Result<HashMap<String, There>> {
    connection
        .prepare("SELECT name, type, pk FROM pragma_table_info(?1)")?
        .query_map([&table.name], |row| {
            let there = There {
                storage: row.get(1)?,
                key: row.get(2)?,
            };
            Ok((row.get(0)?, there))
        })?
        .collect()
}

/// Whether the key is the same, and the columns that are in both are stored alike.
fn fits(connection: &Connection, table: &Table) -> rusqlite::Result<bool> {
    let there = columns(connection, table)?;
    let keys = there.values().filter(|column| column.key > 0).count();
    let fits = |(place, column): (usize, &Column)| {
        let key = table.key.iter().position(|key| *key == place);
        match there.get(&column.name) {
            Some(there) => {
                there.storage == defaults::type_name(column.storage)
                    && there.key == key.map_or(0, |at| at as i64 + 1)
            }
            None => key.is_none(),
        }
    };
    Ok(keys == table.key.len() && table.columns.iter().enumerate().all(fits))
}

fn fill(connection: &Connection, table: &Table, stage: &str) -> rusqlite::Result<()> {
    let there = columns(connection, table)?;
    let values: Vec<String> = table
        .columns
        .iter()
        .map(|column| match there.contains_key(&column.name) {
            true => quote(&column.name),
            false => new_value(column).to_owned(),
        })
        .collect();
    connection.execute_batch(&format!(
        "INSERT INTO {}({}) SELECT {} FROM {}",
        quote(stage),
        names::quote_all(table.column_names()),
        values.join(", "),
        quote(&names::base_view(&table.name))
    ))
}

/// What stands in a column that is new, until a row comes that has something else.
fn new_value(column: &Column) -> &'static str {
    match (column.not_null, column.storage) {
        (false, _) => "NULL",
        (true, Storage::Integer) => "0",
        (true, Storage::Real) => "0.0",
        (true, Storage::Text) => "''",
        (true, Storage::Blob) => "x''",
    }
}
