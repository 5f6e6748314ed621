//! The history oracle: what Postgres held at every position.
//!
//! A slot of its own with `test_decoding`, Postgres' textual plugin, tells of each committed transaction, with the end
//! LSN of its commit: the plugin's own COMMIT line carries it (`logical.c`, `commit_cb_wrapper`: *"points to the end
//! of the record"*), and it is the position by which our streamer knows the transaction. From that, [`History`] keeps
//! every version of every row, as a file would hold it ([`form`](super::form)), and whether it is in each [`View`],
//! which Postgres decides by evaluating the condition over the row's own values.
//!
//! A [`Watch`] looks at a replica's file, at any moment, and compares all of it with the views at the file's position.
//!
//! What it does not do: follow changes of the schema, and conditions that depend on other rows.
//!
//! Kills of Postgres do no harm: what was read is confirmed to the slot only afterwards, so a slot that goes back
//! sends transactions again, and these are known by their LSN.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anabranch_proto::Lsn;
use anyhow::{Context, anyhow, bail, ensure};
use tokio::sync::Mutex;
use tokio_postgres::{Client, types::ToSql};

use super::{
    Cell, Row, compare,
    decoding::{self, Line, Operation, Tuple, Value},
    file,
    form::{Form, SESSION, Types},
    quote,
};
use crate::postgres::Database;

/// How many lines are asked for at a time. Postgres holds them in memory, and so do we.
const LINES_MAX: i32 = 20_000;

/// How long Postgres may be away, or behind a file, before a look fails.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);

/// What a replica should have of a table.
#[derive(Clone, Debug)]
pub struct View {
    /// The table, as `public.t` is called in a file: `t`, or `s.t` in another schema.
    pub table: String,
    /// The columns, or all.
    pub columns: Option<Vec<String>>,
    /// SQL over the table's columns, with parameters filled in.
    pub condition: String,
}

impl View {
    /// All columns of the rows for which `condition` is true.
    pub fn new(table: &str, condition: &str) -> Self {
        Self {
            table: table.into(),
            columns: None,
            condition: condition.into(),
        }
    }

    /// Only these columns.
    pub fn columns(mut self, columns: &[&str]) -> Self {
        self.columns = Some(columns.iter().map(|&column| column.into()).collect());
        self
    }
}

/// The key of a row, as Postgres prints it.
type Key = Vec<String>;

/// What Postgres prints of a row's columns.
type Raw = Vec<Option<String>>;

/// A version of a row.
#[derive(Debug)]
struct Version {
    /// All columns.
    row: Row,
    /// For each view of the table, in order: is it in.
    is_in: Vec<bool>,
}

#[derive(Debug)]
struct Change {
    lsn: Lsn,
    table: usize,
    key: Key,
    /// `None`: deleted.
    version: Option<Arc<Version>>,
}

#[derive(Debug)]
struct Table {
    /// As in a file.
    name: String,
    /// The name alone, which conditions may use.
    bare: String,
    columns: Vec<Column>,
    /// Places of the key's columns.
    key: Vec<usize>,
    /// Places of its views in [`History::views`].
    views: Vec<usize>,
}

#[derive(Debug)]
struct Column {
    name: String,
    /// As `format_type` prints it.
    postgres_type: String,
    form: Form,
}

/// All versions of all rows of some tables, from its start on.
#[derive(Debug)]
pub struct History {
    database: Source,
    slot: String,
    tables: Vec<Table>,
    /// Of the tables, as `test_decoding` prints them.
    printed: Vec<String>,
    views: Vec<View>,
    state: Mutex<State>,
}

/// How to reach the database.
#[derive(Debug)]
struct Source {
    url: String,
}

#[derive(Debug, Default)]
struct State {
    client: Option<Client>,
    /// In the order of commits; the first ones are what was there at the start.
    log: Vec<Change>,
    /// What was read, but is not evaluated yet: the connection was lost in between.
    pending: Vec<Pending>,
    /// Rows as they are at the end of `pending`.
    now: Vec<HashMap<Key, Raw>>,
    /// The last transaction in `pending`.
    last: Lsn,
    /// Every transaction up to here is in `log`.
    complete: Lsn,
}

impl History {
    /// Starts to keep the history of the views' tables. They are locked against writers for a moment; a transaction
    /// that has written elsewhere already and waits for that lock would make both wait for ever, so start it
    /// before the load.
    pub async fn start(database: &Database, views: Vec<View>) -> Self {
        Self::try_start(database, views)
            .await
            .unwrap_or_else(|error| panic!("keep the history of a database: {error:?}"))
    }

    async fn try_start(database: &Database, views: Vec<View>) -> anyhow::Result<Self> {
        let slot = format!("history_{}", database.name());
        let locker = database.try_connect().await?;
        locker.batch_execute(SESSION).await?;
        let types = Types::load(&locker).await?;
        let mut names: Vec<_> = views.iter().map(|view| view.table.clone()).collect();
        names.sort();
        names.dedup();
        let (mut tables, mut printed) = (Vec::new(), Vec::new());
        for name in names {
            let (mut table, name) = Table::load(&locker, &types, &name).await?;
            table.views = (0..views.len())
                .filter(|&place| views[place].table == table.name)
                .collect();
            tables.push(table);
            printed.push(name);
        }

        let mut history = Self {
            database: Source {
                url: database.url().to_owned(),
            },
            slot,
            tables,
            printed,
            views,
            state: Mutex::default(),
        };
        // Nothing is written between the slot's consistent point and the look at what is there.
        let lock = format!(
            "BEGIN; SET LOCAL lock_timeout = '30s'; LOCK TABLE {} IN SHARE MODE",
            history.printed.join(", ")
        );
        locker.batch_execute(&lock).await?;
        let client = history.database.connect().await?;
        let start: String = client
            .query_one(
                "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'test_decoding')",
                &[&history.slot],
            )
            .await
            .context("create a slot with test_decoding (contrib)")?
            .get(0);
        let start: Lsn = start.parse()?;
        let mut state = State {
            last: start,
            complete: start,
            ..State::default()
        };
        let mut pending = Vec::new();
        for (place, table) in history.tables.iter().enumerate() {
            let columns: Vec<_> = table
                .columns
                .iter()
                .map(|column| format!("{}::text", quote(&column.name)))
                .collect();
            let sql = format!(
                "SELECT {} FROM {}",
                columns.join(", "),
                history.printed[place]
            );
            let rows = locker.query(&sql, &[]).await?;
            let mut now = HashMap::new();
            for row in rows {
                let raw: Raw = (0..table.columns.len()).map(|i| row.get(i)).collect();
                let key = table.key_of(&raw)?;
                pending.push((start, place, key.clone(), Some(raw.clone())));
                now.insert(key, raw);
            }
            state.now.push(now);
        }
        locker.batch_execute("COMMIT").await?;
        let versions = history.versions(&client, &pending).await?;
        state.log = changes(pending, versions).collect();
        state.client = Some(client);
        history.state = Mutex::new(state);
        Ok(history)
    }

    /// Reads on until every transaction up to `lsn` is known. Postgres may be down for a while.
    async fn read_to(&self, state: &mut State, lsn: Lsn) -> anyhow::Result<()> {
        let start = Instant::now();
        while state.complete < lsn {
            let read = tokio::time::timeout(CATCH_UP_MAX, self.read(state)).await;
            let error = match read {
                Ok(Ok(())) if state.complete >= lsn => break,
                Ok(Ok(())) => anyhow!("Postgres is at {}", state.complete),
                Ok(Err(error)) => {
                    // A line that can't be read will not get better; a lost connection will.
                    if error.downcast_ref::<tokio_postgres::Error>().is_none() {
                        return Err(error);
                    }
                    state.client = None;
                    error
                }
                Err(_) => anyhow!("no answer"),
            };
            if start.elapsed() > CATCH_UP_MAX {
                return Err(error.context(format!("read Postgres' history up to {lsn}")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Reads what there is to read now.
    async fn read(&self, state: &mut State) -> anyhow::Result<()> {
        if state.client.as_ref().is_none_or(Client::is_closed) {
            state.client = Some(self.database.connect().await?);
        }
        loop {
            let client = state.client.as_ref().expect("just made");
            // Asked before: what is committed in between is read, or lies beyond.
            let flushed: String = client
                .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
                .await?
                .get(0);
            let lines = client
                .query(
                    "SELECT lsn::text, data FROM pg_logical_slot_peek_changes($1, NULL, $2, 'skip-empty-xacts', '1')",
                    &[&self.slot, &LINES_MAX],
                )
                .await?;
            let mut transaction = Vec::new();
            for line in &lines {
                let (lsn, data): (String, String) = (line.get(0), line.get(1));
                let said = decoding::parse(&data, &self.printed)
                    .ok_or_else(|| anyhow!("test_decoding says: {data}"))?;
                if said != Line::Commit {
                    transaction.push(said);
                    continue;
                }
                let lsn: Lsn = lsn.parse()?;
                let transaction = std::mem::take(&mut transaction);
                if lsn <= state.last {
                    continue; // sent again
                }
                state.last = lsn;
                for said in transaction {
                    self.apply(said, lsn, &mut state.now, &mut state.pending)?;
                }
            }
            ensure!(transaction.is_empty(), "a transaction without its COMMIT");
            let versions = self.versions(client, &state.pending).await?;
            state
                .log
                .extend(changes(std::mem::take(&mut state.pending), versions));
            if !lines.is_empty() {
                client
                    .execute(
                        "SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)",
                        &[&self.slot, &state.last.to_string()],
                    )
                    .await?;
            }
            if lines.len() < LINES_MAX as usize {
                // A slot that went back behind a crash may have sent nothing yet; what is flushed is read.
                state.complete = flushed.parse::<Lsn>()?.max(state.complete);
                return Ok(());
            }
        }
    }

    fn apply(
        &self,
        said: Line,
        lsn: Lsn,
        now: &mut [HashMap<Key, Raw>],
        pending: &mut Vec<Pending>,
    ) -> anyhow::Result<()> {
        match said {
            Line::Other | Line::Commit => {}
            Line::Truncate(tables) => {
                for table in tables {
                    let keys = now[table].drain();
                    pending.extend(keys.map(|(key, _)| (lsn, table, key, None)));
                }
            }
            Line::Row(place, operation) => {
                let (table, now) = (&self.tables[place], &mut now[place]);
                let (old, new) = match operation {
                    Operation::Insert(new) => (None, Some(table.raw(&new, None)?)),
                    Operation::Delete(old) => (Some(table.key_in(&old)?), None),
                    Operation::Update(old, new) => {
                        let old = match old {
                            Some(old) => table.key_in(&old)?,
                            None => table.key_in(&new)?,
                        };
                        let new = table.raw(&new, now.get(&old))?;
                        (Some(old), Some(new))
                    }
                };
                if let Some(old) = old {
                    ensure!(
                        now.remove(&old).is_some(),
                        "{} has no row {old:?} to change",
                        table.name
                    );
                    pending.push((lsn, place, old, None));
                }
                if let Some(new) = new {
                    let key = table.key_of(&new)?;
                    now.insert(key.clone(), new.clone());
                    pending.push((lsn, place, key, Some(new)));
                }
            }
        }
        Ok(())
    }

    /// Has Postgres evaluate new rows: their values in the form of a file, and the conditions of the views.
    async fn versions(
        &self,
        client: &Client,
        pending: &[Pending],
    ) -> anyhow::Result<Vec<Option<Arc<Version>>>> {
        let mut versions = vec![None; pending.len()];
        for (place, table) in self.tables.iter().enumerate() {
            let new: Vec<(usize, &Raw)> = pending
                .iter()
                .enumerate()
                .filter(|(_, change)| change.1 == place)
                .filter_map(|(i, change)| Some((i, change.3.as_ref()?)))
                .collect();
            if new.is_empty() {
                continue;
            }
            let columns: Vec<Vec<&Option<String>>> = (0..table.columns.len())
                .map(|column| new.iter().map(|(_, raw)| &raw[column]).collect())
                .collect();
            let params: Vec<&(dyn ToSql + Sync)> =
                columns.iter().map(|c| c as &(dyn ToSql + Sync)).collect();
            let rows = client
                .query(&table.evaluation(&self.views), &params)
                .await
                .with_context(|| format!("evaluate rows of {}", table.name))?;
            ensure!(rows.len() == new.len(), "a row is missing");
            for ((i, _), row) in new.iter().zip(rows) {
                let cells = table.columns.iter().enumerate();
                let version = Version {
                    row: cells
                        .map(|(c, column)| column.form.cell(row.get(c)))
                        .collect(),
                    is_in: (0..table.views.len())
                        .map(|view| row.get(table.columns.len() + view))
                        .collect(),
                };
                versions[*i] = Some(Arc::new(version));
            }
        }
        Ok(versions)
    }
}

/// A change whose new row is not evaluated yet.
type Pending = (Lsn, usize, Key, Option<Raw>);

fn changes(
    pending: Vec<Pending>,
    versions: Vec<Option<Arc<Version>>>,
) -> impl Iterator<Item = Change> {
    let changes = pending.into_iter().zip(versions);
    changes.map(|((lsn, table, key, _), version)| Change {
        lsn,
        table,
        key,
        version,
    })
}

impl Source {
    async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        let client = crate::postgres::connect(&self.url).await?;
        client.batch_execute(SESSION).await?;
        Ok(client)
    }
}

impl Table {
    /// The table that is called `name` in a file, and how `test_decoding` prints its name.
    async fn load(client: &Client, types: &Types, name: &str) -> anyhow::Result<(Self, String)> {
        let found = client
            .query_opt(
                "SELECT c.oid, c.relname::text, quote_ident(n.nspname) || '.' || quote_ident(c.relname)
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind = 'r' AND $1 = CASE n.nspname WHEN 'public' THEN c.relname::text
                                                ELSE n.nspname || '.' || c.relname END",
                &[&name],
            )
            .await?
            .with_context(|| format!("there is no table {name}"))?;
        let oid: u32 = found.get(0);
        let rows = client
            .query(
                "SELECT attname::text, format_type(atttypid, atttypmod), atttypid,
                        coalesce(attnum = ANY(i.indkey), false)
                 FROM pg_attribute LEFT JOIN pg_index i ON i.indrelid = attrelid AND i.indisprimary
                 WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                &[&oid],
            )
            .await?;
        let columns = rows.iter().map(|row| Column {
            name: row.get(0),
            postgres_type: row.get(1),
            form: types.form(row.get(2)),
        });
        let columns = columns.collect();
        let key: Vec<_> = (0..rows.len()).filter(|&i| rows[i].get(3)).collect();
        ensure!(!key.is_empty(), "table {name} has no primary key");
        let table = Self {
            name: name.to_owned(),
            bare: found.get(1),
            columns,
            key,
            views: Vec::new(),
        };
        Ok((table, found.get(2)))
    }

    fn key_of(&self, raw: &Raw) -> anyhow::Result<Key> {
        let key = self.key.iter().map(|&place| raw[place].clone());
        key.collect::<Option<_>>()
            .with_context(|| format!("a key of {} is NULL", self.name))
    }

    fn key_in(&self, tuple: &Tuple) -> anyhow::Result<Key> {
        let value = |place: &usize| match find(tuple, &self.columns[*place].name) {
            Some(Value::Text(text)) => Ok(text.clone()),
            other => bail!("the key of a row of {} is {other:?}", self.name),
        };
        self.key.iter().map(value).collect()
    }

    /// A row as printed, with what was not printed from the row before.
    fn raw(&self, tuple: &Tuple, before: Option<&Raw>) -> anyhow::Result<Raw> {
        let value = |(place, column): (usize, &Column)| match find(tuple, &column.name) {
            Some(Value::Text(text)) => Ok(Some(text.clone())),
            Some(Value::Null) => Ok(None),
            Some(Value::Unchanged) => Ok(before
                .with_context(|| format!("no row of {} before this", self.name))?[place]
                .clone()),
            None => bail!("{} has no value in a row of {}", column.name, self.name),
        };
        self.columns.iter().enumerate().map(value).collect()
    }

    /// A query whose parameters are arrays of printed values, one for each column.
    fn evaluation(&self, views: &[View]) -> String {
        let bare = quote(&self.bare);
        let list = |each: &dyn Fn((usize, &Column)) -> String| {
            let items: Vec<_> = self.columns.iter().enumerate().map(each).collect();
            items.join(", ")
        };
        let forms =
            list(&|(_, column)| column.form.sql(&format!("{bare}.{}", quote(&column.name))));
        let conditions: String = self
            .views
            .iter()
            .map(|&view| format!(", ({}) IS TRUE", views[view].condition))
            .collect();
        let arrays = list(&|(i, _)| format!("${}::text[]", i + 1));
        let names = list(&|(i, _)| format!("c{i}"));
        let casts = list(&|(i, column)| {
            format!("c{i}::{} AS {}", column.postgres_type, quote(&column.name))
        });
        // The order is that of the numbers, so that answers can be told apart; OFFSET 0 keeps it a query of its own.
        format!(
            "SELECT {forms}{conditions} FROM (
               SELECT {casts}, number AS \"number of the row\"
               FROM unnest({arrays}) WITH ORDINALITY AS printed({names}, number) OFFSET 0) AS {bare}
             ORDER BY \"number of the row\""
        )
    }
}

fn find<'a>(tuple: &'a Tuple, name: &str) -> Option<&'a Value> {
    let (_, value) = tuple.iter().find(|(column, _)| column == name)?;
    Some(value)
}

/// Looks at one replica's file, again and again.
#[derive(Debug)]
pub struct Watch {
    /// Places of the replica's views in the history.
    views: Vec<usize>,
    /// Rows of each of the history's tables at `at`.
    content: Vec<BTreeMap<Key, Arc<Version>>>,
    /// How much of the history's log `content` holds.
    applied: usize,
    at: Option<(String, Lsn)>,
    looks: u64,
}

impl Watch {
    /// Of a replica that has the views at these places of those that the history was started with, at most one for
    /// each table.
    pub fn new(history: &History, views: &[usize]) -> Self {
        let mut tables: Vec<_> = views
            .iter()
            .map(|&view| &history.views[view].table)
            .collect();
        tables.sort();
        tables.dedup();
        assert_eq!(tables.len(), views.len(), "one view for each table");
        Self {
            views: views.to_vec(),
            content: vec![BTreeMap::new(); history.tables.len()],
            applied: 0,
            at: None,
            looks: 0,
        }
    }

    /// How many looks there were at a file that had a position.
    pub fn looks(&self) -> u64 {
        self.looks
    }

    /// The file's position at the last look.
    pub fn at(&self) -> Option<Lsn> {
        self.at.as_ref().map(|(_, lsn)| *lsn)
    }

    /// Looks at the file, and fails if it is not, in every row of every table, what Postgres held at its position; or
    /// if its position went back.
    pub async fn look(&mut self, history: &History, path: &Path) -> anyhow::Result<()> {
        let names: Vec<_> = self
            .views
            .iter()
            .map(|&view| history.views[view].table.as_str())
            .collect();
        let snapshot = file::read(path, &names)?;
        let Some((epoch, lsn)) = snapshot.position else {
            ensure!(self.at.is_none(), "the file has lost its position");
            let rows = |content: &file::Content| content.rows.len();
            let rows: usize = snapshot.tables.iter().flatten().map(rows).sum();
            ensure!(rows == 0, "the file has {rows} rows, but no position");
            return Ok(());
        };
        if let Some((before, at)) = &self.at
            && *before == epoch
        {
            ensure!(
                lsn >= *at,
                "the file's position went back from {at} to {lsn}"
            );
        }
        self.at = Some((epoch, lsn));
        self.looks += 1;

        let mut state = history.state.lock().await;
        history.read_to(&mut state, lsn).await?;
        self.move_to(&state.log, lsn);
        drop(state);
        for (&view, found) in self.views.iter().zip(snapshot.tables) {
            self.compare(history, view, found)
                .with_context(|| format!("at {lsn}"))?;
        }
        Ok(())
    }

    /// Makes `content` what it was at `lsn`.
    fn move_to(&mut self, log: &[Change], lsn: Lsn) {
        let gone_too_far = self
            .applied
            .checked_sub(1)
            .is_some_and(|i| log[i].lsn > lsn);
        if gone_too_far {
            self.applied = 0;
            self.content.iter_mut().for_each(BTreeMap::clear);
        }
        while let Some(change) = log.get(self.applied).filter(|change| change.lsn <= lsn) {
            let table = &mut self.content[change.table];
            match &change.version {
                Some(version) => table.insert(change.key.clone(), version.clone()),
                None => table.remove(&change.key),
            };
            self.applied += 1;
        }
    }

    fn compare(
        &self,
        history: &History,
        view: usize,
        found: Option<file::Content>,
    ) -> anyhow::Result<()> {
        let name = &history.views[view].table;
        let place = history.tables.iter().position(|table| table.name == *name);
        let place = place.expect("a view's table is known");
        let table = &history.tables[place];
        let columns: Vec<String> = match &history.views[view].columns {
            Some(columns) => columns.clone(),
            None => table.columns.iter().map(|c| c.name.clone()).collect(),
        };
        let places: Vec<usize> = columns
            .iter()
            .map(|name| table.columns.iter().position(|c| c.name == *name))
            .collect::<Option<_>>()
            .with_context(|| format!("{name} lacks one of {columns:?}"))?;
        let condition = table.views.iter().position(|&other| other == view);
        let condition = condition.expect("a table knows its views");
        let expected: Vec<Row> = self.content[place]
            .values()
            .filter(|version| version.is_in[condition])
            .map(|version| places.iter().map(|&p| version.row[p].clone()).collect())
            .collect();
        let found = found.with_context(|| format!("the file has no table {name}"))?;
        let found = found
            .project(&columns)
            .map_err(|other| anyhow!("table {name} has columns {other:?}, not {columns:?}"))?;
        let spelled = |row: Row| -> Row {
            let cells = row.into_iter().zip(&places);
            cells
                .map(|(cell, &place): (Cell, _)| table.columns[place].form.found(cell))
                .collect()
        };
        compare(
            name,
            &columns,
            expected,
            found.into_iter().map(spelled).collect(),
        )?;
        Ok(())
    }
}
