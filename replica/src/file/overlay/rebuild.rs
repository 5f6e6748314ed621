//! Rebuilds rows of one table: finds base rows and pending entries of a key and of those connected to it, composes them,
//! and writes what differs.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use anabranch_proto::{
    ops::Kind,
    record::{self, ValueRef},
};
use rusqlite::{
    CachedStatement, Connection, Statement,
    types::{ToSqlOutput, ValueRef as SqlRef},
};

use super::{
    super::{
        capture::quiet::Quiet,
        layout::{self, Layout},
        names::{self, quote, quote_all},
        table::Table,
        write::{Keys, RowError, Writer, json},
    },
    compose::compose,
    entry::{self, Entry, Key, Row, in_record},
};

/// Base rows that are listed at once.
const PAGE_ROWS: usize = 1_000;

pub(super) struct Rebuilder<'c, 'k> {
    connection: &'c Connection,
    table: Arc<Table>,
    sources: Vec<Source<'c>>,
    /// Entries with greater ids are pending.
    boundary: i64,
    writer: Writer<'c>,
    shown: CachedStatement<'c>,
    base: CachedStatement<'c>,
    save: CachedStatement<'c>,
    save_absence: CachedStatement<'c>,
    let_go: CachedStatement<'c>,
    changed: Option<&'k mut Keys>,
    /// Those that were rebuilt together with others.
    done: HashSet<Key>,
}

/// Finds entries in one entries table.
struct Source<'c> {
    layout: Layout,
    places: Vec<Option<usize>>,
    by_new_key: CachedStatement<'c>,
    by_old_key: CachedStatement<'c>,
}

impl<'c, 'k> Rebuilder<'c, 'k> {
    pub(super) fn new(
        connection: &'c Connection,
        table: Arc<Table>,
        watched: Option<Quiet>,
        boundary: i64,
        changed: Option<&'k mut Keys>,
    ) -> rusqlite::Result<Rebuilder<'c, 'k>> {
        let width = table.key.len();
        let numbered = |format: &dyn Fn(usize) -> String, count: usize, between: &str| -> String {
            (0..count).map(format).collect::<Vec<_>>().join(between)
        };
        let base = quote(&names::base_rows(&table.name));
        let name = quote(&table.name);
        let keys = numbered(&|i| format!("k{i}"), width, ", ");
        let by_key = numbered(&|i| format!("k{i} = ?{}", i + 1), width, " AND ");
        let values = numbered(&|i| format!("v{i}"), table.columns.len(), ", ");
        let all = quote_all(table.column_names());
        let mut sources = Vec::new();
        for (source, places) in layout::shown_in(connection, &table)? {
            let layout = source.layout;
            let by = |side: char| {
                let key = &layout.key;
                numbered(
                    &|i| format!("{side}{} = ?{}", key[i], i + 1),
                    width,
                    " AND ",
                )
            };
            let select = format!(
                "SELECT {} FROM {} WHERE id > ?{} AND",
                Entry::columns(&layout),
                quote(&source.entries),
                width + 1
            );
            sources.push(Source {
                by_new_key: connection.prepare_cached(&format!("{select} {}", by('n')))?,
                by_old_key: connection.prepare_cached(&format!(
                    "{select} {} AND {}",
                    by('o'),
                    layout.leaves_old_key()
                ))?,
                layout,
                places,
            });
        }
        Ok(Rebuilder {
            sources,
            boundary,
            writer: Writer::of_programs(connection, table.clone(), watched)?,
            shown: connection
                .prepare_cached(&format!("SELECT {all} FROM {name} WHERE {}", table.by_key()))?,
            base: connection.prepare_cached(&format!(
                "SELECT present, {values} FROM {base} WHERE {by_key}"
            ))?,
            save: connection.prepare_cached(&format!(
                "INSERT INTO {base}({keys}, present, {values}) SELECT {}, 1, {all} FROM {name} WHERE {} \
                 ON CONFLICT DO NOTHING",
                quote_all(table.key_names()),
                table.by_key()
            ))?,
            save_absence: connection.prepare_cached(&format!(
                "INSERT INTO {base}({keys}, present) VALUES({}, 0) ON CONFLICT DO NOTHING",
                vec!["?"; width].join(", ")
            ))?,
            let_go: connection.prepare_cached(&format!("DELETE FROM {base} WHERE {by_key}"))?,
            connection,
            table,
            changed,
            done: HashSet::new(),
        })
    }

    /// Rebuilds every key that has a base row, in pages.
    pub(super) fn all(&mut self) -> Result<(), RowError> {
        let base = quote(&names::base_rows(&self.table.name));
        let width = self.table.key.len();
        let numbered = |before: &str| -> String {
            let each: Vec<String> = (0..width).map(|i| format!("{before}{}", i)).collect();
            each.join(", ")
        };
        let keys = numbered("k");
        let order = format!("ORDER BY {keys} LIMIT {PAGE_ROWS}");
        let mut first = self
            .connection
            .prepare(&format!("SELECT {keys} FROM {base} {order}"))?;
        let parameters = vec!["?"; width].join(", ");
        let mut next = self.connection.prepare(&format!(
            "SELECT {keys} FROM {base} WHERE ({keys}) > ({parameters}) {order}"
        ))?;
        let mut last: Option<Key> = None;
        loop {
            let statement = match &last {
                None => &mut first,
                Some(last) => {
                    bind_key(&self.table, &mut next, last)?;
                    &mut next
                }
            };
            let mut page: Vec<Key> = Vec::new();
            let mut rows = statement.raw_query();
            while let Some(row) = rows.next()? {
                let values: Vec<_> = (0..width)
                    .map(|i| Ok(entry::value(row.get_ref(i)?)))
                    .collect::<rusqlite::Result<_>>()?;
                page.push(record::build(values.iter().map(in_record)));
            }
            drop(rows);
            for key in &page {
                self.key(key)?;
            }
            match page.pop() {
                Some(key) => last = Some(key),
                None => return Ok(()),
            }
        }
    }

    /// Rebuilds the row at a key, and those that pending changes of keys connect to it.
    pub(super) fn key(&mut self, key: &Key) -> Result<(), RowError> {
        if self.done.contains(key) {
            return Ok(());
        }
        let mut connected = HashSet::from([key.clone()]);
        let mut open = vec![key.clone()];
        let mut entries: BTreeMap<i64, Entry> = BTreeMap::new();
        while let Some(key) = open.pop() {
            let found = self.entries_of(&key)?;
            for entry in found {
                let keys = [entry.old_key(&self.table), entry.new_key(&self.table)];
                for other in keys.into_iter().flatten() {
                    if connected.insert(other.clone()) {
                        open.push(other);
                    }
                }
                entries.insert(entry.id, entry);
            }
        }
        let mut rows: HashMap<Key, Option<Row>> = HashMap::with_capacity(connected.len());
        for key in &connected {
            if !entries.is_empty() {
                self.save(key)?;
            }
            if let Some(row) = self.base_row(key)? {
                rows.insert(key.clone(), row);
            }
        }
        compose(&self.table, &mut rows, entries.values());
        for (key, row) in rows {
            self.show(&key, row)?;
        }
        if entries.is_empty() {
            bind_key(&self.table, &mut self.let_go, key)?;
            self.let_go.raw_execute()?;
        }
        if connected.len() > 1 {
            self.done.extend(connected);
        }
        Ok(())
    }

    /// Makes the row of this key a base row, if it has none: it was not pending until now, so it is what Postgres has.
    pub(super) fn save(&mut self, key: &Key) -> Result<(), RowError> {
        bind_key(&self.table, &mut self.save, key)?;
        if self.save.raw_execute()? == 0 {
            bind_key(&self.table, &mut self.save_absence, key)?;
            self.save_absence.raw_execute()?;
        }
        Ok(())
    }

    fn entries_of(&mut self, key: &Key) -> Result<Vec<Entry>, RowError> {
        let mut entries = Vec::new();
        for source in &mut self.sources {
            for statement in [&mut source.by_new_key, &mut source.by_old_key] {
                let next = bind_key(&self.table, statement, key)?;
                statement.raw_bind_parameter(next, self.boundary)?;
                let mut rows = statement.raw_query();
                while let Some(row) = rows.next()? {
                    entries.push(Entry::read(row, &source.layout)?.placed(&source.places));
                }
            }
        }
        Ok(entries)
    }

    /// What Postgres has at this key, if that is known here.
    fn base_row(&mut self, key: &Key) -> Result<Option<Option<Row>>, RowError> {
        bind_key(&self.table, &mut self.base, key)?;
        let mut rows = self.base.raw_query();
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let is_present: bool = row.get(0)?;
        Ok(Some(if is_present {
            Some(read_row(&self.table, row, 1)?)
        } else {
            None
        }))
    }

    fn show(&mut self, key: &Key, row: Option<Row>) -> Result<(), RowError> {
        bind_key(&self.table, &mut self.shown, key)?;
        let mut rows = self.shown.raw_query();
        let shown = match rows.next()? {
            Some(shown) => Some(read_row(&self.table, shown, 0)?),
            None => None,
        };
        drop(rows);
        if shown == row {
            return Ok(());
        }
        match &row {
            Some(row) => {
                let record = record::build(row.iter().map(in_record));
                self.writer.write(Kind::Upsert, &record)?;
            }
            None => self.writer.write(Kind::Delete, key)?,
        }
        if let Some(changed) = &mut self.changed {
            let row = shown.or(row).unwrap_or_default();
            let key = self.table.key.iter();
            changed.push(|| key.map(|&place| json((&row[place]).into())).collect());
        }
        Ok(())
    }
}

fn read_row(table: &Table, row: &rusqlite::Row<'_>, from: usize) -> rusqlite::Result<Row> {
    table
        .columns
        .iter()
        .enumerate()
        .map(|(place, column)| Ok(entry::stored(row.get_ref(from + place)?, column.storage)))
        .collect()
}

/// Binds a key to the first parameters; says which is the next.
fn bind_key(table: &Table, statement: &mut Statement<'_>, key: &Key) -> Result<usize, RowError> {
    let mut parameter = 1;
    for (value, &place) in record::values(key)?.zip(&table.key) {
        let value = match value? {
            ValueRef::Null => SqlRef::Null,
            ValueRef::Integer(value) => SqlRef::Integer(value),
            ValueRef::Real(value) => SqlRef::Real(value),
            ValueRef::Text(value) => SqlRef::Text(value.as_bytes()),
            ValueRef::Blob(value) => SqlRef::Blob(value),
        };
        let value = entry::as_stored(value, table.columns[place].storage);
        statement.raw_bind_parameter(parameter, ToSqlOutput::Borrowed(value))?;
        parameter += 1;
    }
    Ok(parameter)
}
