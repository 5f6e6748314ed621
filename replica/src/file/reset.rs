//! The end of a reset: a stage, or no rows at all, becomes the table, within the commit's transaction.
//!
//! | what is there | what is done |
//! |---|---|
//! | no table, or an empty one without a program's triggers and indexes | the stage is renamed: nothing is copied |
//! | the table, with rows | only what differs is written, so that triggers and `/changes` see only that |
//! | another definition | the table is made anew; a program's triggers see all rows go and come |
//!
//! Readers see the old rows or the new ones, never an empty table: all of it is one transaction.
//!
//! Of a table with base rows those are reset, and what is pending is put on top of them again at the end of the commit
//! (`overlay`): local writes are never undone by a reset.
//!
//! The rename is done with `legacy_alter_table`, which leaves programs' views and triggers alone: they refer to the
//! table by name, and find the new one.

use std::sync::Arc;

use rusqlite::{Connection, params_from_iter, types::Value as SqlValue};
use serde_json::Value;

use super::{
    Error,
    capture::quiet::Quiet,
    error::{self, Doing},
    index, leases,
    names::{self, quote},
    obstacle::Obstacle,
    overlay,
    schema::{self, Catalog, There},
    stage::Stage,
    table::Table,
    write::{Keys, RowError, json},
};

/// Columns that are compared in one row value.
const COMPARED_COLUMNS_MAX: usize = 100;

/// Keys that are looked for at a time, where each row is written by a statement of its own.
const APART_ROWS: usize = 10_000;

/// Why a reset could not be finished.
pub(super) enum ResetError {
    Error(Error),
    /// SQLite refused to change rows: a program's trigger or index may be why.
    Rows(rusqlite::Error),
    /// A program's trigger made SQLite skip rows, or changed them.
    Ignored,
}

impl From<Error> for ResetError {
    fn from(error: Error) -> Self {
        ResetError::Error(error)
    }
}

/// Makes the table hold the rows of the stage and no others. Says which keys changed, if `keys` are asked for.
pub(super) fn finish(
    (connection, quiet): (&Connection, &Quiet),
    catalog: &mut Arc<Catalog>,
    table: &Arc<Table>,
    stage: Option<&Stage>,
    keys: Option<&mut Keys>,
) -> Result<(), ResetError> {
    // Another table's index may have taken the name since the table was declared.
    index::make_way(connection, &table.name)?;
    let overlaid = catalog.get(&table.name).is_some_and(|there| there.overlaid);
    Arc::make_mut(catalog).renew(connection, table)?;
    let there = catalog.find(connection, table)?;
    let is_same = matches!(there, There::Same);
    match there {
        There::Nothing => {
            // A program may have dropped it.
            if catalog.get(&table.name).is_some() {
                Arc::make_mut(catalog).remove(connection, &table.name)?;
            }
            take_place(connection, table, stage)?;
            forget_keys(keys);
        }
        There::Same => {
            let programs = schema::of_programs(connection, &table.name)?;
            let overlaid = overlaid && !is_empty(connection, &names::base_rows(&table.name))?;
            if programs.is_empty() && !overlaid && is_empty(connection, &table.name)? {
                if stage.is_some() {
                    catalog.drop_table(connection, &table.name)?;
                    take_place(connection, table, stage)?;
                    forget_keys(keys);
                }
            } else {
                if overlaid {
                    overlay::reset_base_rows(connection, table, stage).doing("reset base rows")?;
                }
                let watched = programs.iter().any(Obstacle::is_trigger);
                if watched {
                    differ_apart((connection, quiet), table, stage, overlaid, keys)
                } else {
                    differ(connection, table, stage, overlaid, keys)
                }
                .map_err(ResetError::Rows)?;
                if watched && !is_equal(connection, table, stage, overlaid)? {
                    return Err(ResetError::Ignored);
                }
            }
        }
        There::Other => {
            rebuild((connection, quiet), Arc::make_mut(catalog), table, stage)?;
            forget_keys(keys);
        }
    }
    leases::drop_of(connection, &table.name).doing("drop the leases of a table")?;
    Arc::make_mut(catalog).record(connection, table)?;
    Catalog::set_state(connection, &table.name, None)?;
    if !is_same {
        overlay::rebase(connection, table).map_err(|error| match error {
            RowError::Sqlite(error) => error::sqlite("make base rows of a new table", error),
            RowError::Malformed(_) | RowError::Ignored => {
                Error::Definite(format!("can't make base rows of {}", table.name))
            }
        })?;
    }
    Ok(())
}

/// The table changed as a whole.
fn forget_keys(keys: Option<&mut Keys>) {
    if let Some(keys) = keys {
        keys.0 = None;
    }
}

fn is_empty(connection: &Connection, name: &str) -> Result<bool, Error> {
    connection
        .prepare(&format!("SELECT 1 FROM {} LIMIT 1", quote(name)))
        .and_then(|mut first| first.exists([]))
        .map(|exists| !exists)
        .doing("look whether a table is empty")
}

/// There is no table of that name.
fn take_place(connection: &Connection, table: &Table, stage: Option<&Stage>) -> Result<(), Error> {
    match stage {
        Some(stage) => connection
            .execute_batch(&format!(
                "ALTER TABLE {} RENAME TO {}",
                quote(&stage.name),
                quote(&table.name)
            ))
            .doing("put a stage in its place"),
        None => Catalog::create(connection, &table.name, table),
    }
}

/// Turns the stage into a difference. Rows that have a base row (`overlaid`: there are some) are left as they are: it is
/// that which was reset.
fn differ(
    connection: &Connection,
    table: &Table,
    stage: Option<&Stage>,
    overlaid: bool,
    mut keys: Option<&mut Keys>,
) -> rusqlite::Result<()> {
    let name = quote(&table.name);
    let returning = match keys {
        Some(_) => format!(" RETURNING {}", names::quote_all(table.key_names())),
        None => String::new(),
    };
    let Some(stage) = stage else {
        return run(
            connection,
            &format!(
                "DELETE FROM {name} WHERE true{}{returning}",
                and_is_base(table, &table.name, overlaid)
            ),
            keys,
        );
    };
    let from = quote(&stage.name);
    let (same_key, same_row) = (same_key(table, stage), same_row(table, stage));
    run(
        connection,
        &format!(
            "DELETE FROM {name} WHERE NOT EXISTS (SELECT 1 FROM {from} WHERE {same_key}){}{returning}",
            and_is_base(table, &table.name, overlaid)
        ),
        keys.as_deref_mut(),
    )?;
    let all = names::quote_all(table.column_names());
    run(
        connection,
        &format!(
            "INSERT INTO {name}({all}) SELECT {all} FROM {from} \
             WHERE NOT EXISTS (SELECT 1 FROM {name} WHERE {same_row}){} {}{returning}",
            and_is_base(table, &stage.name, overlaid),
            table.on_conflict()
        ),
        keys,
    )
}

fn and_is_base(table: &Table, of: &str, overlaid: bool) -> String {
    if !overlaid {
        return String::new();
    }
    let key: Vec<&str> = table.key_names().collect();
    format!(" AND {}", overlay::is_base(&table.name, of, &key))
}

/// Turns the stage into a difference, row by row: programs have triggers on the table (see `capture::quiet`). Stops where
/// one makes SQLite skip a row; the tables are compared afterwards.
fn differ_apart(
    (connection, quiet): (&Connection, &Quiet),
    table: &Table,
    stage: Option<&Stage>,
    overlaid: bool,
    mut keys: Option<&mut Keys>,
) -> rusqlite::Result<()> {
    let name = quote(&table.name);
    let key = names::quote_all(table.key_names());
    let delete = table.delete_from(&table.name);
    let not_staged = match stage {
        Some(stage) => {
            let same_key = same_key(table, stage);
            format!(
                "NOT EXISTS (SELECT 1 FROM {} WHERE {same_key})",
                quote(&stage.name)
            )
        }
        None => "true".to_owned(),
    };
    let gone = format!(
        "SELECT {key} FROM {name} WHERE {not_staged}{} LIMIT {APART_ROWS}",
        and_is_base(table, &table.name, overlaid)
    );
    each_apart(connection, &gone, keys.as_deref_mut(), |row| {
        let _armed = quiet.arm();
        connection
            .prepare_cached(&delete)?
            .execute(params_from_iter(row))
    })?;
    let Some(stage) = stage else {
        return Ok(());
    };
    let from = quote(&stage.name);
    let all = names::quote_all(table.column_names());
    let by_key = table.by_key();
    let has = format!("SELECT 1 FROM {name} WHERE {by_key}");
    let insert = format!("INSERT INTO {name}({all}) SELECT {all} FROM {from} WHERE {by_key}");
    let update = format!(
        "UPDATE {name} SET ({all}) = (SELECT {all} FROM {from} WHERE {0}) WHERE {0}",
        by_key_numbered(table)
    );
    let differing = format!(
        "SELECT {key} FROM {from} WHERE NOT EXISTS (SELECT 1 FROM {name} WHERE {}){} LIMIT {APART_ROWS}",
        same_row(table, stage),
        and_is_base(table, &stage.name, overlaid)
    );
    each_apart(connection, &differing, keys, |row| {
        let is_there = connection
            .prepare_cached(&has)?
            .exists(params_from_iter(row))?;
        let mut statement = connection.prepare_cached(if is_there { &update } else { &insert })?;
        let _armed = quiet.arm();
        statement.execute(params_from_iter(row))
    })
}

/// Deletes all rows, row by row.
fn empty_apart((connection, quiet): (&Connection, &Quiet), name: &str) -> rusqlite::Result<()> {
    let key: Vec<String> = connection
        .prepare("SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk")?
        .query_map([name], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    if key.is_empty() {
        // A program made it.
        return run(
            connection,
            &format!("DELETE FROM {} WHERE true", quote(name)),
            None,
        );
    }
    let names = names::quote_all(key.iter().map(String::as_str));
    let by_key: Vec<String> = key
        .iter()
        .map(|name| format!("{} = ?", quote(name)))
        .collect();
    let delete = format!("DELETE FROM {} WHERE {}", quote(name), by_key.join(" AND "));
    let all = format!("SELECT {names} FROM {} LIMIT {APART_ROWS}", quote(name));
    each_apart(connection, &all, None, |row| {
        let _armed = quiet.arm();
        connection
            .prepare_cached(&delete)?
            .execute(params_from_iter(row))
    })
}

/// Does something for each key that a query gives, and asks again until it gives none: what is done takes a key out of it.
fn each_apart(
    connection: &Connection,
    query: &str,
    mut keys: Option<&mut Keys>,
    mut each: impl FnMut(&[SqlValue]) -> rusqlite::Result<usize>,
) -> rusqlite::Result<()> {
    loop {
        let mut statement = connection.prepare_cached(query)?;
        let width = statement.column_count();
        let found: Vec<Vec<SqlValue>> = statement
            .query_map([], |row| (0..width).map(|i| row.get(i)).collect())?
            .collect::<Result<_, _>>()?;
        if found.is_empty() {
            return Ok(());
        }
        for row in &found {
            if each(row)? == 0 {
                return Ok(());
            }
            if let Some(keys) = &mut keys {
                keys.push(|| row.iter().map(|value| json(value.into())).collect());
            }
        }
    }
}

/// The condition that finds a row by its key, which may be used more than once.
fn by_key_numbered(table: &Table) -> String {
    table
        .key_names()
        .zip(1..)
        .map(|(name, number)| format!("{} = ?{number}", quote(name)))
        .collect::<Vec<_>>()
        .join(" AND ")
}

/// The condition that a row of the table and one of the stage have one key.
fn same_key(table: &Table, stage: &Stage) -> String {
    compare(table, stage, table.key_names(), "=")
}

/// The condition that they are equal: IS, since NULL is equal to NULL here.
fn same_row(table: &Table, stage: &Stage) -> String {
    let key = same_key(table, stage);
    match compare(table, stage, table.value_names(), "IS") {
        values if values.is_empty() => key,
        values => format!("{key} AND {values}"),
    }
}

/// Compares columns as row values, which SQLite takes as one expression: an AND for each would nest deeper than the
/// 1,000 that it allows (`SQLITE_MAX_EXPR_DEPTH`).
fn compare<'t>(
    table: &Table,
    stage: &Stage,
    columns: impl Iterator<Item = &'t str>,
    how: &str,
) -> String {
    let row = |of: &str, columns: &[&str]| {
        let of = quote(of);
        let values: Vec<String> = columns
            .iter()
            .map(|column| format!("{of}.{}", quote(column)))
            .collect();
        format!("({})", values.join(", "))
    };
    columns
        .collect::<Vec<_>>()
        .chunks(COMPARED_COLUMNS_MAX)
        .map(|group| {
            let (left, right) = (row(&table.name, group), row(&stage.name, group));
            format!("{left} {how} {right}")
        })
        .collect::<Vec<_>>()
        .join(" AND ")
}

/// Whether the table holds the rows of the stage and no others, apart from those that have a base row.
fn is_equal(
    connection: &Connection,
    table: &Table,
    stage: Option<&Stage>,
    overlaid: bool,
) -> Result<bool, Error> {
    let in_table = and_is_base(table, &table.name, overlaid);
    let Some(stage) = stage else {
        let name = quote(&table.name);
        return connection
            .prepare(&format!(
                "SELECT 1 FROM {name} WHERE true{in_table} LIMIT 1"
            ))
            .and_then(|mut first| first.exists([]))
            .map(|exists| !exists)
            .doing("look whether a table is empty");
    };
    let in_stage = and_is_base(table, &stage.name, overlaid);
    let (name, from) = (quote(&table.name), quote(&stage.name));
    let (same_key, same_row) = (same_key(table, stage), same_row(table, stage));
    connection
        .prepare(&format!(
            "SELECT 1 FROM {name} WHERE NOT EXISTS (SELECT 1 FROM {from} WHERE {same_key}){in_table} \
             UNION ALL \
             SELECT 1 FROM {from} WHERE NOT EXISTS (SELECT 1 FROM {name} WHERE {same_row}){in_stage} LIMIT 1"
        ))
        .and_then(|mut difference| difference.exists([]))
        .map(|exists| !exists)
        .doing("compare a table with its stage")
}

fn run(connection: &Connection, sql: &str, keys: Option<&mut Keys>) -> rusqlite::Result<()> {
    let mut statement = connection.prepare(sql)?;
    let Some(keys) = keys else {
        return statement.execute([]).map(drop);
    };
    let width = statement.column_count();
    // All is done before the first row is returned.
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let key: Vec<Value> = (0..width)
            .map(|i| Ok(json(row.get_ref(i)?)))
            .collect::<rusqlite::Result<_>>()?;
        keys.push(|| key.into());
        if keys.0.is_none() {
            break;
        }
    }
    Ok(())
}

/// Makes the table anew, with another definition.
fn rebuild(
    (connection, quiet): (&Connection, &Quiet),
    catalog: &mut Catalog,
    table: &Table,
    stage: Option<&Stage>,
) -> Result<(), ResetError> {
    let programs = schema::of_programs(connection, &table.name)?;
    let (triggers, indexes): (Vec<Obstacle>, Vec<Obstacle>) =
        programs.into_iter().partition(Obstacle::is_trigger);
    let make_again = |all: &[Obstacle]| {
        all.iter()
            .try_for_each(|one| one.make_again(connection))
            .doing("make again what a program had on a table")
    };
    if triggers.is_empty() {
        catalog.remove(connection, &table.name)?;
        take_place(connection, table, stage)?;
        return Ok(make_again(&indexes)?);
    }
    empty_apart((connection, quiet), &table.name).map_err(ResetError::Rows)?;
    catalog.remove(connection, &table.name)?;
    take_place(connection, table, None)?;
    make_again(&indexes)?;
    make_again(&triggers)?;
    // Before a row goes in: without a guard of its own, each would set off what it must not (see `capture::quiet`).
    catalog.record(connection, table)?;
    differ_apart((connection, quiet), table, stage, false, None).map_err(ResetError::Rows)?;
    if is_equal(connection, table, stage, false)? {
        Ok(())
    } else {
        Err(ResetError::Ignored)
    }
}
