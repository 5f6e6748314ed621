//! What programs see of a row that they changed: what Postgres has of it, with the changes that are pending on top.
//!
//! An entry is pending until the local transaction that it belongs to is answered (`receipts`). Of each key that a
//! pending entry touches, `_anabranch_saved_<t>` keeps what Postgres has, saved by the triggers at the first change.
//!
//! ```text
//! op of Postgres ─▶ is there a base row of its key? ─no──▶ the table
//!                                │yes
//!                                ▼
//!                    the base row; the key is dirty ─┐
//! answered entry ─▶ its keys are dirty ──────────────┤   at the end of the commit
//! reset ─▶ the base rows; all keys are dirty ────────┴─▶ rebuild: base rows ─▶ compose ─▶ the table
//! ```
//!
//! All of it is part of the SQLite transaction that has the rows, so nobody ever sees a pending change gone, or half
//! of what one commit brings. A row is rebuilt together with all that pending changes of keys connect it to, since a
//! row that was moved is where it is by the grace of the row that it came from.
//!
//! **Cost.** A table without base rows is looked at once in a commit; then nothing is done for each operation.
//! With base rows each operation first tries an UPDATE by primary key. A rebuild finds the entries of a key by index.
//! What is held in memory: up to [`DIRTY_KEYS_MAX`] keys of each table, beyond that all of its base rows are rebuilt, in
//! pages; and the rows and entries of the keys that are connected, which are as many as programs moved in a chain.
//!
//! A base row that no pending entry touches is removed when its key is rebuilt.

mod compose;
mod entry;
mod number;
mod rebuild;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use anabranch_proto::{
    ops::Kind,
    record::{self, Malformed},
};
use rusqlite::{CachedStatement, Connection, types::ToSqlOutput};

pub(super) use entry::{Entry, Key, Operation, in_record};

use super::{
    capture::quiet::Quiet,
    grammar::Tables,
    layout::{self, Layout},
    names::{self, quote},
    receipts,
    stage::Stage,
    table::Table,
    write::{self, Keys, RowError},
};
use rebuild::Rebuilder;

/// Keys of one table that are remembered to be rebuilt; above that all are.
const DIRTY_KEYS_MAX: usize = 10_000;

/// What is to be rebuilt of a table.
enum Dirty {
    Keys(HashSet<Key>),
    All,
}

/// One table within a commit.
pub(super) struct Overlaid<'c> {
    connection: &'c Connection,
    /// It was looked for base rows; if there are any, these statements take operations on them.
    looked: bool,
    base: Option<BaseWriter<'c>>,
    dirty: Dirty,
}

struct BaseWriter<'c> {
    table: Arc<Table>,
    upsert: CachedStatement<'c>,
    delete: CachedStatement<'c>,
}

/// The tables of a commit, by the ids that the stream gave them.
pub(super) struct Overlay<'c> {
    connection: &'c Connection,
    tables: BTreeMap<u32, Overlaid<'c>>,
}

impl<'c> Overlay<'c> {
    pub(super) fn new(connection: &'c Connection) -> Overlay<'c> {
        Overlay {
            connection,
            tables: BTreeMap::new(),
        }
    }

    fn at(&mut self, id: u32) -> &mut Overlaid<'c> {
        let connection = self.connection;
        self.tables.entry(id).or_insert_with(|| Overlaid {
            connection,
            looked: false,
            base: None,
            dirty: Dirty::Keys(HashSet::new()),
        })
    }

    /// The table, to be asked before each operation. `may` it have base rows?
    pub(super) fn of(
        &mut self,
        table: &Arc<Table>,
        may: bool,
    ) -> rusqlite::Result<&mut Overlaid<'c>> {
        let overlaid = self.at(table.id);
        if !overlaid.looked {
            overlaid.look(table, may)?;
        }
        Ok(overlaid)
    }

    /// Its definition is about to change, or its base rows did.
    pub(super) fn forget(&mut self, id: u32) {
        if let Some(overlaid) = self.tables.get_mut(&id) {
            overlaid.looked = false;
            overlaid.base = None;
        }
    }

    /// A key whose pending entries are others now.
    pub(super) fn touch(&mut self, id: u32, key: Key) {
        self.at(id).touch(key);
    }

    /// All base rows may be others now.
    pub(super) fn touch_all(&mut self, id: u32) {
        self.forget(id);
        self.at(id).dirty = Dirty::All;
    }

    /// Rebuilds what is dirty. Says with which table it failed. Adds what changed to `changes`, if they are asked for.
    pub(super) fn rebuild(
        self,
        tables: &Tables,
        watched: impl Fn(&Table) -> Option<Quiet>,
        mut changes: Option<&mut HashMap<u32, Keys>>,
    ) -> Result<(), (Arc<Table>, RowError)> {
        for (id, Overlaid { dirty, .. }) in self.tables {
            let Some(table) = tables.get(&id) else {
                continue;
            };
            if matches!(&dirty, Dirty::Keys(keys) if keys.is_empty()) {
                continue;
            }
            let changed = changes
                .as_deref_mut()
                .map(|changes| changes.entry(id).or_insert_with(Keys::new));
            rebuild(self.connection, table, watched(table), &dirty, changed)
                .map_err(|error| (table.clone(), error))?;
        }
        Ok(())
    }
}

fn rebuild(
    connection: &Connection,
    table: &Arc<Table>,
    watched: Option<Quiet>,
    dirty: &Dirty,
    changed: Option<&mut Keys>,
) -> Result<(), RowError> {
    if !layout::has_base_rows(connection, &table.name)? {
        return Ok(());
    }
    let boundary = receipts::boundary(connection)?;
    let mut rebuilder = Rebuilder::new(connection, table.clone(), watched, boundary, changed)?;
    match dirty {
        Dirty::Keys(keys) => keys.iter().try_for_each(|key| rebuilder.key(key)),
        Dirty::All => rebuilder.all(),
    }
}

impl<'c> Overlaid<'c> {
    fn look(&mut self, table: &Arc<Table>, may: bool) -> rusqlite::Result<()> {
        self.looked = true;
        self.base = None;
        if !may {
            return Ok(());
        }
        let name = quote(&names::base_rows(&table.name));
        let has_some = self
            .connection
            .prepare_cached(&format!("SELECT 1 FROM {name} LIMIT 1"))?
            .exists([])?;
        if has_some {
            let set = |value: fn(usize) -> String| -> String {
                (0..table.columns.len())
                    .map(|place| format!(", v{place} = {}", value(place)))
                    .collect()
            };
            let by_key = |parameter: &dyn Fn(usize) -> usize| -> String {
                (0..table.key.len())
                    .map(|i| format!("k{i} = ?{}", parameter(i)))
                    .collect::<Vec<_>>()
                    .join(" AND ")
            };
            self.base = Some(BaseWriter {
                upsert: self.connection.prepare_cached(&format!(
                    "UPDATE {name} SET present = 1{} WHERE {}",
                    set(|place| format!("?{}", place + 1)),
                    by_key(&|i| table.key[i] + 1)
                ))?,
                delete: self.connection.prepare_cached(&format!(
                    "UPDATE {name} SET present = 0{} WHERE {}",
                    set(|_| "NULL".to_owned()),
                    by_key(&|i| i + 1)
                ))?,
                table: table.clone(),
            });
        }
        Ok(())
    }

    fn touch(&mut self, key: Key) {
        match &mut self.dirty {
            Dirty::Keys(keys) if keys.len() < DIRTY_KEYS_MAX => {
                keys.insert(key);
            }
            dirty => *dirty = Dirty::All,
        }
    }

    /// Does an operation of Postgres on the base row of its key. False: there is none, so it belongs to the table.
    pub(super) fn take(&mut self, kind: Kind, operation: &[u8]) -> Result<bool, RowError> {
        let Some(base) = &mut self.base else {
            return Ok(false);
        };
        let table = &*base.table;
        let key_columns = table.key.iter().map(|&place| &table.columns[place]);
        let statement = match kind {
            Kind::Upsert => {
                write::bind(&mut base.upsert, table.columns.iter(), operation)?;
                &mut base.upsert
            }
            Kind::Delete => {
                write::bind(&mut base.delete, key_columns, operation)?;
                &mut base.delete
            }
        };
        if statement.raw_execute()? == 0 {
            return Ok(false);
        }
        let key = key_of_operation(table, kind, operation)?;
        self.touch(key);
        Ok(true)
    }
}

fn key_of_operation(table: &Table, kind: Kind, operation: &[u8]) -> Result<Key, Malformed> {
    let values: Vec<_> = match kind {
        Kind::Upsert => table
            .key
            .iter()
            .map(|&place| record::value(operation, place))
            .collect::<Result<_, _>>()?,
        Kind::Delete => record::values(operation)?.collect::<Result<_, _>>()?,
    };
    Ok(record::build(values))
}

/// The table was made anew, and holds exactly what Postgres has: base rows of all that is pending are made of that. What
/// is pending must be put on top of it in the same SQLite transaction ([`Overlay::touch_all`]).
pub(super) fn rebase(connection: &Connection, table: &Arc<Table>) -> Result<(), RowError> {
    if !layout::has_base_rows(connection, &table.name)? {
        return Ok(());
    }
    let base = quote(&names::base_rows(&table.name));
    connection.execute(&format!("DELETE FROM {base}"), [])?;
    save(connection, table, receipts::boundary(connection)?, i64::MAX)
}

/// Makes base rows of the keys of entries above `after` and up to `last` that have none: what is shown of them is what
/// Postgres has, until the end of this SQLite transaction, when what is pending is put on top.
pub(super) fn save(
    connection: &Connection,
    table: &Arc<Table>,
    after: i64,
    last: i64,
) -> Result<(), RowError> {
    if !layout::has_base_rows(connection, &table.name)? {
        return Ok(());
    }
    let boundary = receipts::boundary(connection)?;
    let mut rebuilder = Rebuilder::new(connection, table.clone(), None, boundary, None)?;
    each_key(connection, table, after, last, |key| rebuilder.save(&key))
}

/// Puts one more entry behind all others, in places of the table that it is for.
pub(super) fn enter(
    connection: &Connection,
    table: &Table,
    entry: &Entry,
    time: &str,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE _anabranch_head SET last = last + 1")?
        .execute([])?;
    let values = vec![", ?"; 2 * table.columns.len()].concat();
    let changed: String = entry
        .changed
        .iter()
        .map(|changed| if *changed { '1' } else { '0' })
        .collect();
    let sides = ['o', 'n'].map(|side| -> String {
        (0..table.columns.len())
            .map(|place| format!(", {side}{place}"))
            .collect()
    });
    let mut insert = connection.prepare_cached(&format!(
        "INSERT INTO {}(id, operation, captured_time, changed{}) \
         VALUES((SELECT last FROM _anabranch_head), ?, ?, ?{values})",
        quote(&names::entries(&table.name)),
        sides.concat()
    ))?;
    insert.raw_bind_parameter(1, entry.operation.name())?;
    insert.raw_bind_parameter(2, time)?;
    insert.raw_bind_parameter(3, changed)?;
    let columns = table.columns.iter().chain(&table.columns);
    for (i, (value, column)) in entry.old.iter().chain(&entry.new).zip(columns).enumerate() {
        let value = entry::as_stored(value.into(), column.storage);
        insert.raw_bind_parameter(4 + i, ToSqlOutput::Borrowed(value))?;
    }
    insert.raw_execute().map(drop)
}

/// The keys of entries above `after` and up to `last`, some of them several times.
pub(super) fn each_key(
    connection: &Connection,
    table: &Table,
    after: i64,
    last: i64,
    mut each: impl FnMut(Key) -> Result<(), RowError>,
) -> Result<(), RowError> {
    for (source, places) in layout::shown_in(connection, table)? {
        let Layout { key, .. } = &source.layout;
        // It has the columns of this key, in this order.
        debug_assert!(
            table
                .key
                .iter()
                .zip(key)
                .all(|(&t, &k)| places[t] == Some(k))
        );
        let columns = |side: char| -> Vec<String> {
            key.iter().map(|place| format!("{side}{place}")).collect()
        };
        let mut statement = connection.prepare_cached(&format!(
            "SELECT {}, {} FROM {} WHERE id > ?1 AND id <= ?2",
            columns('o').join(", "),
            columns('n').join(", "),
            quote(&source.entries),
        ))?;
        let mut rows = statement.query([after, last])?;
        while let Some(row) = rows.next()? {
            let side = |from: usize| -> rusqlite::Result<Option<Key>> {
                let values = (from..from + key.len()).map(|i| Ok(entry::value(row.get_ref(i)?)));
                let values: Vec<_> = values.collect::<rusqlite::Result<_>>()?;
                let is_there = !values.contains(&rusqlite::types::Value::Null);
                Ok(is_there.then(|| record::build(values.iter().map(in_record))))
            };
            let (old, new) = (side(0)?, side(key.len())?);
            let unchanged = old == new;
            if let Some(old) = old {
                each(old)?;
            }
            if let Some(new) = new.filter(|_| !unchanged) {
                each(new)?;
            }
        }
    }
    Ok(())
}

/// A reset brought these rows and no others: so many base rows become what came, or absent.
pub(super) fn reset_base_rows(
    connection: &Connection,
    table: &Table,
    stage: Option<&Stage>,
) -> rusqlite::Result<()> {
    let base = quote(&names::base_rows(&table.name));
    let absent: String = (0..table.columns.len())
        .map(|place| format!(", v{place} = NULL"))
        .collect();
    let Some(stage) = stage else {
        let sql = format!("UPDATE {base} SET present = 0{absent} WHERE present = 1");
        return connection.execute(&sql, []).map(drop);
    };
    let from = quote(&stage.name);
    let same_key: Vec<String> = table
        .key_names()
        .enumerate()
        .map(|(i, name)| format!("{from}.{} = {base}.k{i}", quote(name)))
        .collect();
    let same_key = same_key.join(" AND ");
    connection.execute(
        &format!(
            "UPDATE {base} SET present = 0{absent} \
             WHERE present = 1 AND NOT EXISTS (SELECT 1 FROM {from} WHERE {same_key})"
        ),
        [],
    )?;
    let present: String = table
        .column_names()
        .enumerate()
        .map(|(place, name)| format!(", v{place} = {from}.{}", quote(name)))
        .collect();
    connection
        .execute(
            &format!("UPDATE {base} SET present = 1{present} FROM {from} WHERE {same_key}"),
            [],
        )
        .map(drop)
}

/// The condition that a row of `of`, the table or a stage of it, has no base row: then it is what Postgres has.
pub(super) fn is_base(table: &str, of: &str, key: &[&str]) -> String {
    // Without the `+` the comparison would have the affinity of the table's column, and no index.
    let same_key: Vec<String> = key
        .iter()
        .enumerate()
        .map(|(i, name)| format!("k{i} = +{}.{}", quote(of), quote(name)))
        .collect();
    format!(
        "NOT EXISTS (SELECT 1 FROM {} WHERE {})",
        quote(&names::base_rows(table)),
        same_key.join(" AND ")
    )
}
