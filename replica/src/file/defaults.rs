//! Defaults of columns, in SQL, and how they change in a table that is there.
//!
//! SQLite evaluates the default of a column that an INSERT leaves out before any trigger fires, once: so what is captured is
//! what the program sees. It can't ALTER a default. But a default is only a text in the schema, nothing of it is in rows;
//! so is NOT NULL, which goes and comes with defaults that only Postgres knows. So the text is replaced, as SQLite's manual
//! of ALTER TABLE says for such changes: rows, triggers, indexes and pending writes stay, however large the table is.

use rusqlite::{Connection, config::DbConfig};

use super::{
    names::{literal, quote},
    table::{Column, LeftOut, Storage, Table},
};

/// As timestamps are written; the clock of SQLite has milliseconds.
const NOW: &str = "strftime('%Y-%m-%d %H:%M:%f000Z', 'now')";

/// Version 4. Not `abs(random())`, which fails for the smallest integer.
const UUID: &str = "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-' \
    || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))";

/// What CREATE TABLE says of it; empty: nothing.
pub(super) fn clause(column: &Column) -> String {
    let expression = match &column.left_out {
        LeftOut::Null | LeftOut::Sequence | LeftOut::Other => return String::new(),
        LeftOut::Value(sql) => sql.as_str(),
        LeftOut::Now => NOW,
        LeftOut::Uuid => UUID,
    };
    format!(" DEFAULT ({expression})")
}

/// What SQLite calls it.
pub(super) fn type_name(storage: Storage) -> &'static str {
    match storage {
        Storage::Integer => "INTEGER",
        Storage::Real => "REAL",
        Storage::Text => "TEXT",
        Storage::Blob => "BLOB",
    }
}

/// Makes a table that is there what it is declared as, if it differs by defaults and NOT NULL alone, and no row is in the way.
/// False: it is something else. Within a write transaction.
pub(super) fn renew(connection: &Connection, table: &Table) -> rusqlite::Result<bool> {
    if !differs_by_them(connection, table)? {
        return Ok(false);
    }
    // Our connection is guarded against this very thing, which else is a mistake.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false)?;
    connection.pragma_update(None, "writable_schema", true)?;
    let done = replace_text(connection, table);
    connection.pragma_update(None, "writable_schema", false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    done
}

fn replace_text(connection: &Connection, table: &Table) -> rusqlite::Result<bool> {
    let version: i64 = connection.pragma_query_value(None, "schema_version", |row| row.get(0))?;
    let sql = format!("CREATE TABLE {}{}", quote(&table.name), table.definition());
    let updated = connection.execute(
        "UPDATE sqlite_schema SET sql = ?2 WHERE type = 'table' AND name = ?1",
        [&table.name, &sql],
    )?;
    // So that every connection reads it again, this one too.
    connection.pragma_update(None, "schema_version", version + 1)?;
    Ok(updated == 1)
}

fn differs_by_them(connection: &Connection, table: &Table) -> rusqlite::Result<bool> {
    let there: Vec<(String, String, bool, i64)> = connection
        .prepare_cached(
            "SELECT name, type, \"notnull\", pk FROM pragma_table_info(?1) ORDER BY cid",
        )?
        .query_map([&table.name], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?
        .collect::<Result<_, _>>()?;
    if there.len() != table.columns.len() {
        return Ok(false);
    }
    for (place, (column, (name, storage, not_null, key))) in
        table.columns.iter().zip(&there).enumerate()
    {
        let declared_key = table.key.iter().position(|key| *key == place);
        let is_same = column.name == *name
            && type_name(column.storage) == storage
            && declared_key.map_or(0, |at| at as i64 + 1) == *key;
        if !is_same
            || (column.not_null && !not_null && *key == 0 && has_null(connection, table, name)?)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

fn has_null(connection: &Connection, table: &Table, column: &str) -> rusqlite::Result<bool> {
    connection
        .prepare(&format!(
            "SELECT 1 FROM {} WHERE {} IS NULL LIMIT 1",
            quote(&table.name),
            quote(column)
        ))?
        .exists([])
}

/// A constant, as SQL; `None`: there is none.
pub(super) fn constant(record: &[u8], storage: Storage) -> Option<String> {
    use anabranch_proto::record::{ValueRef, values};

    let mut values = values(record).ok()?;
    let value = values.next()?.ok()?;
    if values.next().is_some() {
        return None;
    }
    Some(match (value, storage) {
        (ValueRef::Integer(value), Storage::Integer) => value.to_string(),
        (ValueRef::Real(value), Storage::Real) if value.is_finite() => format!("{value:?}"),
        (ValueRef::Text(text), Storage::Text) if !text.contains('\0') => literal(text),
        (ValueRef::Blob(bytes), Storage::Blob) => {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("x'{digits}'")
        }
        _ => return None,
    })
}
