//! What programs have on synced tables: triggers and indexes of their own.
//!
//! They are welcome, and keep working. But one that makes SQLite refuse or skip a row of Postgres (a trigger that
//! raises, an index over a function that only the program has) would hold up the replica for ever. Such a one is
//! dropped, and kept with its SQL and the reason in `_anabranch_dropped`.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::{names, status::time_text};

/// A trigger or an index that a program made on a synced table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    kind: String,
    name: String,
    table: String,
    sql: String,
}

/// The triggers of programs on a table.
pub(super) fn triggers(connection: &Connection, table: &str) -> rusqlite::Result<Vec<Obstacle>> {
    list(
        connection,
        table,
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type = 'trigger' \
         AND tbl_name = ?1 COLLATE NOCASE AND name NOT LIKE '\\_anabranch\\_%' ESCAPE '\\' ORDER BY rowid",
    )
}

/// The indexes of programs on a table. Ours are never unique: one of such a name has taken its place.
pub(super) fn indexes(connection: &Connection, table: &str) -> rusqlite::Result<Vec<Obstacle>> {
    list(
        connection,
        table,
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type = 'index' \
         AND tbl_name = ?1 COLLATE NOCASE AND sql IS NOT NULL \
         AND (sql LIKE 'CREATE UNIQUE %' OR name NOT IN (SELECT index_name FROM _anabranch_indexes)) ORDER BY rowid",
    )
}

fn list(connection: &Connection, table: &str, sql: &str) -> rusqlite::Result<Vec<Obstacle>> {
    connection
        .prepare_cached(sql)?
        .query_map([table], |row| {
            Ok(Obstacle {
                kind: row.get(0)?,
                name: row.get(1)?,
                table: row.get(2)?,
                sql: row.get(3)?,
            })
        })?
        .collect()
}

/// Writes down everything that programs have on a table, which is about to go with it.
pub(super) fn keep_all(connection: &Connection, table: &str, reason: &str) -> rusqlite::Result<()> {
    let mut all = triggers(connection, table)?;
    all.extend(indexes(connection, table)?);
    all.iter().try_for_each(|one| one.keep(connection, reason))
}

impl Obstacle {
    /// SQLite keeps what follows the first words as it was written, and these in capitals.
    pub(super) fn is_unique(&self) -> bool {
        self.sql.starts_with("CREATE UNIQUE ")
    }

    pub(super) fn is_trigger(&self) -> bool {
        self.kind == "trigger"
    }

    /// Drops it, and writes it down.
    pub(super) fn drop(&self, connection: &Connection, reason: &str) -> rusqlite::Result<()> {
        self.keep(connection, reason)?;
        let kind = if self.is_trigger() {
            "TRIGGER"
        } else {
            "INDEX"
        };
        connection.execute_batch(&format!(
            "DROP {kind} IF EXISTS {}",
            names::quote(&self.name)
        ))
    }

    /// Makes it again on a table that was rebuilt; where that is not possible, writes it down.
    pub(super) fn make_again(&self, connection: &Connection) -> rusqlite::Result<()> {
        match connection.execute_batch(&self.sql) {
            Err(error) if super::error::is_of_statement(&error) => self.keep(
                connection,
                &format!("its table changed, and it does not fit any more: {error}"),
            ),
            done => done,
        }
    }

    fn keep(&self, connection: &Connection, reason: &str) -> rusqlite::Result<()> {
        tracing::warn!(
            kind = self.kind,
            name = self.name,
            table = self.table,
            "dropped what a program had on a synced table; see _anabranch_dropped"
        );
        connection
            .execute(
                "INSERT INTO _anabranch_dropped(kind, name, table_name, sql, reason, dropped_time) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    self.kind,
                    self.name,
                    self.table,
                    self.sql,
                    reason,
                    time_text(Timestamp::now())
                ],
            )
            .map(drop)
    }
}
