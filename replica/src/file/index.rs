//! The secondary indexes that we make on synced tables.
//!
//! They are Postgres' own, made as plain ones: uniqueness is Postgres' business, and in the middle of a transaction there
//! may be none. Which ones are ours, and what name each got, is in `_anabranch_indexes`.

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Error,
    error::Doing,
    names,
    schema::object,
    table::{Index, Table},
};

fn create(name: &str, table: &str, columns: &[String]) -> String {
    format!(
        "CREATE INDEX {} ON {}({})",
        names::quote(name),
        names::quote(table),
        names::quote_all(columns.iter().map(String::as_str))
    )
}

/// Makes those of our indexes again that a program dropped.
pub(super) fn inspect(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    for (name, index) in recorded(connection, table)? {
        let expected = create(&name, table, &index.columns);
        let there = object(connection, &name)?;
        if there.as_ref().is_some_and(|(_, sql)| *sql == expected) {
            continue;
        }
        forget(connection, &name)?;
        make(connection, table, table, &index, None)?;
    }
    Ok(())
}

/// The secondary indexes that we made on a table, with the names that they got.
fn recorded(connection: &Connection, table: &str) -> rusqlite::Result<Vec<(String, Index)>> {
    connection
        .prepare_cached(
            "SELECT index_name, postgres_name, columns FROM _anabranch_indexes WHERE table_name = ?1",
        )?
        .query_map([table], |row| {
            let columns: String = row.get(2)?;
            Ok((
                row.get(0)?,
                Index {
                    name: row.get(1)?,
                    columns: serde_json::from_str(&columns).unwrap_or_default(),
                },
            ))
        })?
        .collect()
}

fn forget(connection: &Connection, name: &str) -> rusqlite::Result<()> {
    connection
        .execute(
            "DELETE FROM _anabranch_indexes WHERE index_name = ?1",
            [name],
        )
        .map(drop)
}

/// Makes the secondary indexes of a table that are not there yet, and drops those that it has no more. `target` is the
/// table itself, or the stage that will become it.
pub(super) fn make_all(connection: &Connection, table: &Table, target: &str) -> Result<(), Error> {
    let all = || {
        let recorded = recorded(connection, &table.name)?;
        for (name, index) in &recorded {
            if !table.indexes.contains(index) {
                connection
                    .execute_batch(&format!("DROP INDEX IF EXISTS {}", names::quote(name)))?;
                forget(connection, name)?;
            }
        }
        for index in &table.indexes {
            if !recorded.iter().any(|(_, there)| there == index) {
                make(connection, &table.name, target, index, None)?;
            }
        }
        Ok(())
    };
    all().doing("make the indexes of a table")
}

/// Whether an index of ours has this name.
pub(super) fn is_ours(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM _anabranch_indexes WHERE index_name = ?1 COLLATE NOCASE")?
        .exists([name])
}

/// Gives the index of ours that has a table's name another one, since nobody asks for an index by name. In Postgres
/// they may be of two schemas. Only here is it known that there is such a table: it may be declared long after.
pub(super) fn make_way(connection: &Connection, table: &str) -> Result<(), Error> {
    let rename = || {
        let taker: Option<(String, String, Index)> = connection
            .prepare_cached(
                "SELECT index_name, table_name, postgres_name, columns FROM _anabranch_indexes \
                 WHERE index_name = ?1 COLLATE NOCASE",
            )?
            .query_row([table], |row| {
                let columns: String = row.get(3)?;
                let columns = serde_json::from_str(&columns).unwrap_or_default();
                let name = row.get(2)?;
                Ok((row.get(0)?, row.get(1)?, Index { name, columns }))
            })
            .optional()?;
        let Some((name, of, index)) = taker else {
            return Ok(());
        };
        // What it is on may still be a stage.
        let target: Option<String> = connection
            .prepare_cached(
                "SELECT tbl_name FROM sqlite_schema WHERE type = 'index' AND name = ?1 COLLATE NOCASE",
            )?
            .query_row([&name], |row| row.get(0))
            .optional()?;
        forget(connection, &name)?;
        let Some(target) = target else {
            return Ok(());
        };
        connection.execute_batch(&format!("DROP INDEX {}", names::quote(&name)))?;
        make(connection, &of, &target, &index, Some(table))
    };
    rename().doing("give an index another name")
}

/// `taken` is the name of a table that is about to be made.
fn make(
    connection: &Connection,
    table: &str,
    target: &str,
    index: &Index,
    taken: Option<&str>,
) -> rusqlite::Result<()> {
    if index.columns.is_empty() {
        return Ok(());
    }
    let name = names::free_index(&index.name, table, |name| {
        let is_taken = taken.is_some_and(|taken| taken.eq_ignore_ascii_case(name));
        Ok::<_, rusqlite::Error>(is_taken || object(connection, name)?.is_some())
    })?;
    connection.execute_batch(&create(&name, target, &index.columns))?;
    let columns = serde_json::Value::from(index.columns.clone()).to_string();
    connection
        .prepare_cached(
            "INSERT INTO _anabranch_indexes VALUES(?1, ?2, ?3, ?4) ON CONFLICT(index_name) DO UPDATE SET \
             table_name = excluded.table_name, postgres_name = excluded.postgres_name, columns = excluded.columns",
        )?
        .execute(params![name, table, index.name, columns])
        .map(drop)
}
