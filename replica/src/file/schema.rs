//! The tables of the streamer's in the file: what they were made as, whether they still are that, and their making.
//!
//! Programs share the file, and may change its schema. Each commit compares `PRAGMA schema_version` with what it was
//! when we last committed; when a program moved it, [`Catalog::inspect`] looks at everything that concerns us:
//!
//! - a synced table that is gone or altered: its rows can't be relied on. It is said in `_anabranch_tables`, the resume
//!   token is forgotten, and the next stream sends everything in full, which the other tables turn into a difference.
//! - a UNIQUE index on a synced table: dropped, and kept in `_anabranch_dropped`, since it could refuse a row. If programs can
//!   write the table it is as if it were altered: OR REPLACE also deletes what has the same value there, and that
//!   fires no trigger.
//! - a trigger that captures writes is gone or altered: writes may not have been captured, so it is as if the table were
//!   altered. One that is not the newest any more is made again (see `capture`).
//! - an index, a base view or one of our own tables that is gone: made again.
//!
//! Everything else is the program's business, and stays.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Error, capture, defaults,
    error::Doing,
    index, layout, leases, names,
    obstacle::{self, Obstacle},
    outbox, overlay,
    state::{self, replace_view},
    table::{Purpose, Table},
};

/// What is known of the synced tables, as of our last commit. By folded name.
#[derive(Clone, Debug, Default)]
pub(super) struct Catalog {
    tables: HashMap<String, Synced>,
}

/// One synced table.
#[derive(Clone, Debug)]
pub(super) struct Synced {
    pub name: String,
    schema: String,
    postgres_name: String,
    definition: String,
    /// A program altered it: why its rows can't be relied on.
    pub altered: Option<String>,
    /// Programs have triggers on it.
    pub has_triggers: bool,
    /// It may have base rows.
    pub overlaid: bool,
}

/// What is in the file under a table's name.
#[derive(Debug)]
pub(super) enum There {
    /// Nothing.
    Nothing,
    /// The table as it is declared.
    Same,
    /// The table, with other columns or another key, or altered by a program.
    Other,
}

/// SQLite's count of changes to the schema, by which changes of programs are noticed.
#[derive(Debug)]
pub(super) struct Version {
    known: i64,
    /// A program changed the schema while we wrote something else: to be looked at with the next commit.
    pub due: bool,
}

impl Version {
    pub(super) fn new() -> Version {
        Version {
            known: 0,
            due: true,
        }
    }

    /// To be called at the beginning of each write transaction that cares. True: a program changed the schema.
    pub(super) fn look(&mut self, connection: &Connection) -> Result<bool, Error> {
        let now = read_version(connection)?;
        if now != self.known {
            self.known = now;
            self.due = true;
        }
        Ok(self.due)
    }

    /// To be called with what [`read_version`] said before the COMMIT of a transaction that changes the schema.
    pub(super) fn moved(&mut self, version: i64) {
        self.known = version;
    }
}

pub(super) fn read_version(connection: &Connection) -> Result<i64, Error> {
    connection
        .prepare_cached("PRAGMA schema_version")
        .and_then(|mut pragma| pragma.query_row([], |row| row.get(0)))
        .doing("read the schema's version")
}

/// The SQL that SQLite keeps for a table made with this definition.
fn create_table(name: &str, definition: &str) -> String {
    format!("CREATE TABLE {}{definition}", names::quote(name))
}

/// Type and SQL of what is in the file under this name, triggers apart, which have names of their own.
pub(super) fn object(
    connection: &Connection,
    name: &str,
) -> rusqlite::Result<Option<(String, String)>> {
    connection
        .prepare_cached(
            "SELECT type, coalesce(sql, '') FROM sqlite_schema WHERE name = ?1 COLLATE NOCASE AND type <> 'trigger'",
        )?
        .query_row([name], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

impl Catalog {
    /// Reads what earlier runs left.
    pub(super) fn load(connection: &Connection) -> Result<Catalog, Error> {
        let read = || -> rusqlite::Result<HashMap<String, Synced>> {
            connection
                .prepare("SELECT table_name, postgres_schema, postgres_name, definition FROM _anabranch_synced")?
                .query_map([], |row| {
                    let name: String = row.get(0)?;
                    Ok((
                        names::fold(&name),
                        Synced {
                            name,
                            schema: row.get(1)?,
                            postgres_name: row.get(2)?,
                            definition: row.get(3)?,
                            altered: None,
                            has_triggers: false,
                            overlaid: false,
                        },
                    ))
                })?
                .collect()
        };
        Ok(Catalog {
            tables: read().doing("read the list of synced tables")?,
        })
    }

    pub(super) fn get(&self, name: &str) -> Option<&Synced> {
        self.tables.get(&names::fold(name))
    }

    /// Why the first table that a program altered can't be relied on.
    pub(super) fn altered(&self) -> Option<&str> {
        self.tables
            .values()
            .find_map(|synced| synced.altered.as_deref())
    }

    /// Programs have triggers on some of them: what we write sets those off.
    pub(super) fn has_triggers(&self) -> bool {
        self.tables.values().any(|synced| synced.has_triggers)
    }

    /// The names of all synced tables.
    pub(super) fn names(&self) -> Vec<String> {
        self.tables
            .values()
            .map(|synced| synced.name.clone())
            .collect()
    }

    /// Compares the file with what we made in it, and mends what can be mended. Within a write transaction.
    pub(super) fn inspect(
        &mut self,
        connection: &Connection,
        replica_id: &str,
    ) -> Result<(), Error> {
        state::create(connection, replica_id).doing("make our own tables")?;
        for synced in self.tables.values_mut() {
            synced
                .inspect(connection)
                .doing("look at the schema that a program changed")?;
        }
        layout::inspect(connection).doing("make the tables for local writes again")
    }

    /// What is in the file where this table belongs. Something that is not ours is never touched; an index of ours makes
    /// way (see [`index::make_way`]).
    pub(super) fn find(&self, connection: &Connection, table: &Table) -> Result<There, Error> {
        let find = || match object(connection, &table.name)? {
            Some((kind, _)) if kind == "index" && index::is_ours(connection, &table.name)? => {
                Ok(None)
            }
            there => Ok(there),
        };
        let there = find().doing("look for a table")?;
        match (there, self.get(&table.name)) {
            (None, _) => Ok(There::Nothing),
            (Some((kind, _)), None) => Err(Error::Definite(format!(
                "{}.{} cannot be kept in the file: a program has a {kind} named `{}` there; rename that, or leave the table out of the shapes",
                table.schema, table.postgres_name, table.name
            ))),
            (Some((kind, _)), Some(_)) if kind != "table" => Err(Error::Definite(format!(
                "a program put a {kind} named `{}` where the table {}.{} belongs; drop or rename it",
                table.name, table.schema, table.postgres_name
            ))),
            (Some(_), Some(synced)) => {
                let same = synced.altered.is_none()
                    && synced.name == table.name
                    && synced.schema == table.schema
                    && synced.postgres_name == table.postgres_name
                    && synced.definition == table.definition();
                Ok(if same { There::Same } else { There::Other })
            }
        }
    }

    /// Makes a table what it is declared as, if only defaults of it changed. Within a write transaction.
    pub(super) fn renew(&mut self, connection: &Connection, table: &Table) -> Result<(), Error> {
        let Some(synced) = self.tables.get_mut(&names::fold(&table.name)) else {
            return Ok(());
        };
        let definition = table.definition();
        let is_it = synced.altered.is_none()
            && (&synced.name, &synced.schema, &synced.postgres_name)
                == (&table.name, &table.schema, &table.postgres_name);
        if is_it
            && synced.definition != definition
            && object(connection, &table.name)
                .doing("look for a table")?
                .is_some_and(|(_, sql)| sql == create_table(&synced.name, &synced.definition))
            && defaults::renew(connection, table).doing("change defaults")?
        {
            synced.definition = definition;
            tracing::info!(table = table.name, "defaults of its columns changed");
        }
        Ok(())
    }

    /// Makes an empty table.
    pub(super) fn create(connection: &Connection, name: &str, table: &Table) -> Result<(), Error> {
        connection
            .execute_batch(&create_table(name, &table.definition()))
            .doing("create a table")
    }

    /// Records a table that is now as declared, with its columns, indexes and base view.
    pub(super) fn record(&mut self, connection: &Connection, table: &Table) -> Result<(), Error> {
        let (moved, overlaid) = layout::declare(connection, table)?;
        if moved {
            outbox::view(connection)
                .and_then(|view| replace_view(connection, "_anabranch_outbox", &view))
                .doing("make the view of local writes")?;
        }
        let synced = Synced {
            overlaid,
            name: table.name.clone(),
            schema: table.schema.clone(),
            postgres_name: table.postgres_name.clone(),
            definition: table.definition(),
            altered: None,
            has_triggers: !obstacle::triggers(connection, &table.name)
                .doing("look for triggers")?
                .is_empty(),
        };
        let has_triggers = synced.has_triggers;
        record(connection, table, &synced).doing("record a table")?;
        if has_triggers {
            capture::quiet::run_triggers(connection, true).doing("run programs' triggers")?;
        }
        index::make_all(connection, table, &table.name)?;
        self.tables.insert(names::fold(&table.name), synced);
        Ok(())
    }

    /// Drops a table that left the subscriptions. What programs had on it is kept in `_anabranch_dropped`, what they wrote
    /// to it and was not answered stays in the outbox.
    pub(super) fn drop(&mut self, connection: &Connection, name: &str) -> Result<(), Error> {
        obstacle::keep_all(connection, name, "its table left the replica's shapes")
            .doing("keep what a program had on a table")?;
        let name = self
            .get(name)
            .map_or(name, |synced| &synced.name)
            .to_owned();
        capture::remove(connection, &name).doing("stop capturing what is written to a table")?;
        self.remove(connection, &name)?;
        let retire = || {
            layout::retire(connection, &name)?;
            let view = outbox::view(connection)?;
            replace_view(connection, "_anabranch_outbox", &view)
        };
        retire().doing("keep the local writes of a table that left the shapes")
    }

    /// Drops a table and forgets it, with what programs have on it.
    pub(super) fn remove(&mut self, connection: &Connection, name: &str) -> Result<(), Error> {
        // SQLite folds case; our own tables are told the name as it was.
        let synced = self.tables.remove(&names::fold(name));
        let name = synced.as_ref().map_or(name, |synced| &synced.name);
        self.drop_table(connection, name)?;
        let forget = || {
            state::drop_view(connection, &names::base_view(name))?;
            leases::drop_of(connection, name)?;
            for from in ["_anabranch_columns", "_anabranch_synced"] {
                connection.execute(&format!("DELETE FROM {from} WHERE table_name = ?1"), [name])?;
            }
            Ok(())
        };
        forget().doing("forget a table")
    }

    /// Drops only the table, with what is on it.
    pub(super) fn drop_table(&self, connection: &Connection, name: &str) -> Result<(), Error> {
        let drop = || {
            connection.execute(
                "DELETE FROM _anabranch_indexes WHERE table_name = ?1",
                [name],
            )?;
            connection.execute_batch(&format!("DROP TABLE IF EXISTS {}", names::quote(name)))
        };
        drop().doing("drop a table")
    }

    /// Says that a table is stopped, or live again.
    pub(super) fn set_state(
        connection: &Connection,
        name: &str,
        stopped: Option<(&str, &str)>,
    ) -> Result<(), Error> {
        let (state, reason, lsn) = match stopped {
            Some((reason, lsn)) => ("stopped", Some(reason), Some(lsn)),
            None => ("live", None, None),
        };
        connection
            .execute(
                "UPDATE _anabranch_synced SET state = ?2, reason = ?3, lsn = ?4 WHERE table_name = ?1",
                params![name, state, reason, lsn],
            )
            .doing("record a table's state")
            .map(drop)
    }
}

impl Synced {
    /// Whether it is the table of Postgres that this one is.
    pub(super) fn is_of(&self, table: &Table) -> bool {
        self.schema == table.schema && self.postgres_name == table.postgres_name
    }

    fn inspect(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let expected = create_table(&self.name, &self.definition);
        let view = names::base_view(&self.name);
        let what = match object(connection, &self.name)? {
            Some((_, sql)) if sql == expected => None,
            Some(_) => Some("altered"),
            None => Some("dropped or renamed"),
        };
        self.has_triggers = !obstacle::triggers(connection, &self.name)?.is_empty();
        if let Some(what) = what {
            let reason = format!("a program {what} it; the streamer will send it again");
            tracing::warn!(table = self.name, "a program {what} a synced table");
            self.stop(connection, &reason)?;
            // A view of a table that is not there would make ALTER TABLE fail in the programs.
            state::drop_view(connection, &view)?;
            return capture::drop_triggers(connection, &self.name);
        }
        self.altered = None;
        let mut may_have_replaced = false;
        for index in obstacle::indexes(connection, &self.name)? {
            if index.is_unique() {
                index.drop(
                    connection,
                    "a UNIQUE index could refuse rows of Postgres: the primary key must be the only uniqueness",
                )?;
                may_have_replaced = capture::captures(connection, &self.name)?;
            }
        }
        if may_have_replaced {
            // Rows that REPLACE deleted for its sake fired no trigger.
            let reason = "a program's UNIQUE index may have let it delete rows unseen; the streamer will send it again";
            self.stop(connection, reason)?;
        }
        let is_damaged = layout::is_damaged(connection, &self.name)?;
        if capture::inspect(connection, &self.name)? || is_damaged {
            let reason = "a program dropped or altered what captures its writes; the streamer will send it again";
            self.stop(connection, reason)?;
        }
        let columns: Vec<String> = connection
            .prepare_cached("SELECT column_name FROM _anabranch_columns WHERE table_name = ?1 ORDER BY position")?
            .query_map([&self.name], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        if !columns.is_empty() {
            let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
            let key: Vec<String> = connection
                .prepare_cached("SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk")?
                .query_map([&self.name], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            let key: Vec<&str> = key.iter().map(String::as_str).collect();
            self.overlaid = layout::has_base_rows(connection, &self.name)?;
            make_base_view(
                connection,
                &self.name,
                &columns,
                self.overlaid.then_some(&key),
            )?;
        }
        index::inspect(connection, &self.name)
    }

    /// Its rows can't be relied on until it was sent again.
    fn stop(&mut self, connection: &Connection, reason: &str) -> rusqlite::Result<()> {
        connection.execute(
            "UPDATE _anabranch_synced SET state = 'stopped', reason = ?2, \
             lsn = (SELECT lsn FROM _anabranch_state) WHERE table_name = ?1 AND state = 'live'",
            params![self.name, reason],
        )?;
        self.altered = Some(format!("{}: {reason}", self.name));
        Ok(())
    }
}

fn record(connection: &Connection, table: &Table, synced: &Synced) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO _anabranch_synced(table_name, postgres_schema, postgres_name, definition, state) \
             VALUES(?1, ?2, ?3, ?4, 'live') ON CONFLICT(table_name) DO UPDATE SET \
             postgres_schema = excluded.postgres_schema, postgres_name = excluded.postgres_name, \
             definition = excluded.definition",
        )?
        .execute(params![synced.name, synced.schema, synced.postgres_name, synced.definition])?;
    if table.purpose != Purpose::Data {
        return Ok(());
    }
    // Every stream declares every table: what is there already is not written again.
    let wanted: Vec<(String, String, i64, bool)> = table
        .columns
        .iter()
        .zip(1..)
        .map(|(column, position)| {
            let is_key = table.key.contains(&(position as usize - 1));
            (
                column.name.clone(),
                column.postgres_type.clone(),
                position,
                is_key,
            )
        })
        .collect();
    let there: Vec<(String, String, i64, bool)> = connection
        .prepare_cached(
            "SELECT column_name, postgres_type, position, is_key FROM _anabranch_columns \
             WHERE table_name = ?1 ORDER BY position",
        )?
        .query_map([&table.name], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?
        .collect::<Result<_, _>>()?;
    if names::is_ours(&table.name) {
        return Ok(());
    }
    if there != wanted {
        connection.execute(
            "DELETE FROM _anabranch_columns WHERE table_name = ?1",
            [&table.name],
        )?;
        for (name, postgres_type, position, is_key) in &wanted {
            connection
                .prepare_cached("INSERT INTO _anabranch_columns VALUES(?1, ?2, ?3, ?4, ?5)")?
                .execute(params![table.name, name, postgres_type, position, is_key])?;
        }
    }
    capture::install(connection, table)?;
    let columns: Vec<&str> = table.column_names().collect();
    let key: Vec<&str> = table.key_names().collect();
    make_base_view(
        connection,
        &table.name,
        &columns,
        synced.overlaid.then_some(&key),
    )
}

/// The view of what Postgres has. `key`: of a table that may have base rows, which then count instead of its own.
fn make_base_view(
    connection: &Connection,
    table: &str,
    columns: &[&str],
    key: Option<&Vec<&str>>,
) -> rusqlite::Result<()> {
    let name = names::base_view(table);
    let mut sql = format!(
        "CREATE VIEW {} AS SELECT {} FROM {}",
        names::quote(&name),
        names::quote_all(columns.iter().copied()),
        names::quote(table)
    );
    if let Some(key) = key {
        let values: Vec<String> = (0..columns.len())
            .map(|place| format!("v{place}"))
            .collect();
        sql.push_str(&format!(
            " WHERE {} UNION ALL SELECT {} FROM {} WHERE present = 1",
            overlay::is_base(table, table, key),
            values.join(", "),
            names::quote(&names::base_rows(table))
        ));
    }
    replace_view(connection, &name, &sql)
}

/// Everything that programs have on a table.
pub(super) fn of_programs(connection: &Connection, table: &str) -> Result<Vec<Obstacle>, Error> {
    let find = || {
        let mut all = obstacle::triggers(connection, table)?;
        all.extend(obstacle::indexes(connection, table)?);
        Ok(all)
    };
    find().doing("look for what programs have on a table")
}
