//! Tests on real files, written to by four SQLites: the bundled one, the `sqlite3` program, Python's module, and the oldest one
//! that may be. The last three are other processes, and other versions.

mod facts;
mod guards;
mod ids;
mod model;
#[path = "../../../../tests/oldest/locate.rs"]
mod oldest;
mod repair;
mod suite;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anabranch_proto::{
    record::{self, ValueRef},
    v1,
};
use rusqlite::Connection;
use serde_json::json;
use tempfile::TempDir;

use super::{Captured, CapturedColumn, Entry, Operation, Source, SqlValue, create_shared, inspect};
use crate::file::{layout, names::quote, schema::Catalog, state, table::Table};

/// (name, Postgres' type, storage, place in the key or 0)
type Columns<'a> = &'a [(&'a str, &'a str, v1::Storage, u32)];

pub fn synced(name: &str, columns: Columns<'_>, writable: bool) -> Table {
    let columns = columns
        .iter()
        .map(|&(name, postgres_type, storage, key_position)| v1::Column {
            name: name.into(),
            postgres_type: postgres_type.into(),
            storage: storage.into(),
            key_position,
            ..v1::Column::default()
        });
    Table::new(&v1::Table {
        id: 1,
        schema: "public".into(),
        name: name.into(),
        columns: columns.collect(),
        writable,
        ..v1::Table::default()
    })
    .unwrap()
}

/// A file with synced tables, as a replica leaves it.
pub struct Fixture {
    pub directory: TempDir,
    pub path: PathBuf,
    pub tables: Vec<Table>,
}

pub fn catalog(connection: &Connection, tables: &[Table]) {
    let mut catalog = Catalog::default();
    for table in tables {
        Catalog::create(connection, &table.name, table).unwrap();
        catalog.record(connection, table).unwrap();
    }
}

impl Fixture {
    pub fn new(tables: Vec<Table>, rows: &str) -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.db");
        let connection = Connection::open(&path).unwrap();
        connection
            .pragma_update(None, "journal_mode", "wal")
            .unwrap();
        state::create(&connection, "test").unwrap();
        create_shared(&connection).unwrap();
        catalog(&connection, &tables);
        let quiet = super::quiet::install(&connection).unwrap();
        connection.execute_batch(rows).unwrap();
        drop((quiet, connection));
        Fixture {
            directory,
            path,
            tables,
        }
    }

    pub fn copy(&self, to: &str) -> PathBuf {
        let path = self.directory.path().join(to);
        fs::copy(&self.path, &path).unwrap();
        path
    }
}

/// Has all triggers of ours made again where a program's are newer.
pub fn inspect_all(connection: &Connection, tables: &[Table]) {
    for table in tables {
        assert!(
            !inspect(connection, &table.name).unwrap(),
            "{} was meddled with",
            table.name
        );
    }
}

pub fn literal(value: &SqlValue) -> String {
    match value {
        SqlValue::Null => "NULL".into(),
        SqlValue::Integer(value) => value.to_string(),
        SqlValue::Real(value) => format!("{value:?}"),
        SqlValue::Text(value) => format!("{value:?}").replace('"', "'"),
        SqlValue::Blob(value) => {
            let digits: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("x'{digits}'")
        }
    }
}

pub fn literals(values: &[SqlValue]) -> String {
    values.iter().map(literal).collect::<Vec<_>>().join(", ")
}

/// An entry as a line of text.
pub fn line(entry: &Entry, captured: &Captured) -> String {
    let table = &entry.table;
    match entry.operation {
        Operation::Insert => format!("insert {table} {}", literals(&entry.new)),
        Operation::Delete => format!("delete {table} {}", literals(&entry.old)),
        Operation::Update => {
            let key: Vec<_> = captured
                .key
                .iter()
                .map(|&place| entry.old[place].clone())
                .collect();
            let mut line = format!("update {table} {}:", literals(&key));
            for (i, column) in captured.columns.iter().enumerate() {
                if entry.changed[i] {
                    let (old, new) = (literal(&entry.old[i]), literal(&entry.new[i]));
                    line.push_str(&format!(" {} {old} > {new}", column.name));
                } else if !captured.key.contains(&i) {
                    assert_eq!(
                        (&entry.old[i], &entry.new[i]),
                        (&SqlValue::Null, &SqlValue::Null)
                    );
                } else {
                    assert_eq!(entry.old[i], entry.new[i]);
                }
            }
            line
        }
    }
}

/// Where entries are.
fn sources(connection: &Connection) -> Vec<Source> {
    let source = |source: layout::Source| Source {
        captured: Captured {
            version: super::VERSION,
            table: source.table,
            schema: source.layout.schema,
            postgres_name: source.layout.name,
            columns: source
                .layout
                .columns
                .into_iter()
                .map(|field| CapturedColumn {
                    name: field.name,
                    postgres_type: String::new(),
                    storage: field.storage,
                    conflict: field.conflict,
                })
                .collect(),
            key: source.layout.key,
            is_rowid: false,
            is_leased: false,
            refusal: None,
        },
        entries: source.entries,
    };
    let all = layout::all(connection).unwrap();
    all.into_iter().map(source).collect()
}

/// All entries of a file, in order.
pub fn captured_in(connection: &Connection) -> Vec<(Captured, Entry)> {
    let mut all = Vec::new();
    for source in sources(connection) {
        let Source { captured, .. } = source.clone();
        source
            .visit(connection, 0, i64::MAX, |entry| {
                assert_eq!(entry.changed.len(), captured.columns.len());
                all.push((captured.clone(), entry));
                Ok::<_, rusqlite::Error>(())
            })
            .unwrap();
    }
    all.sort_by_key(|(_, entry)| entry.id);
    assert!(
        all.windows(2).all(|two| two[0].1.id < two[1].1.id),
        "an id twice"
    );
    all
}

pub fn lines(connection: &Connection) -> Vec<String> {
    captured_in(connection)
        .iter()
        .map(|(captured, entry)| line(entry, captured))
        .collect()
}

/// Rows by key, as text: it tells 1 from 1.0 and from '1'.
pub type Rows = BTreeMap<String, Vec<String>>;

/// The rows of a table or view.
pub fn rows_of(connection: &Connection, table: &Table, name: &str) -> Rows {
    let sql = format!("SELECT * FROM {}", quote(name));
    let mut statement = connection.prepare(&sql).unwrap();
    let width = table.columns.len();
    let all = statement
        .query_map([], |row| {
            let values: Vec<String> = (0..width)
                .map(|i| literal(&super::value(row.get_ref(i).unwrap())))
                .collect();
            let key: Vec<&str> = table
                .key
                .iter()
                .map(|&place| values[place].as_str())
                .collect();
            Ok((key.join(","), values.clone()))
        })
        .unwrap();
    let mut rows = Rows::new();
    for row in all {
        let (key, values) = row.unwrap();
        assert!(rows.insert(key, values).is_none(), "a key twice in {name}");
    }
    rows
}

/// Does what an entry says to rows in which it must fit; backwards if `undo`.
pub fn apply(rows: &mut Rows, captured: &Captured, entry: &Entry, undo: bool) {
    let text = |values: &[SqlValue]| -> Vec<String> { values.iter().map(literal).collect() };
    let key = |values: &[String]| -> String {
        let key: Vec<&str> = captured
            .key
            .iter()
            .map(|&place| values[place].as_str())
            .collect();
        key.join(",")
    };
    let (mut from, mut to) = (text(&entry.old), text(&entry.new));
    let mut operation = entry.operation;
    if undo {
        std::mem::swap(&mut from, &mut to);
        operation = match operation {
            Operation::Insert => Operation::Delete,
            Operation::Delete => Operation::Insert,
            Operation::Update => Operation::Update,
        };
    }
    match operation {
        Operation::Insert => {
            let there = rows.insert(key(&to), to);
            assert_eq!(there, None, "inserted what was there: {entry:?}");
        }
        Operation::Delete => {
            let there = rows.remove(&key(&from));
            assert_eq!(there, Some(from), "deleted something else: {entry:?}");
        }
        Operation::Update => {
            let mut row = rows
                .remove(&key(&from))
                .unwrap_or_else(|| panic!("no row for {entry:?}"));
            for (i, value) in row.iter_mut().enumerate() {
                if entry.changed[i] {
                    assert_eq!(*value, from[i], "changed from something else: {entry:?}");
                    value.clone_from(&to[i]);
                }
            }
            assert_eq!(
                rows.insert(key(&row), row),
                None,
                "moved to what was there: {entry:?}"
            );
        }
    }
}

/// Entries, put on top of what was there before, give what is there now, and the other way round; and the view of base
/// rows shows what was there before.
pub fn check_sums(connection: &Connection, tables: &[Table], before: &[Rows], what: &str) {
    let all = captured_in(connection);
    for (table, before) in tables.iter().zip(before) {
        let mine = || all.iter().filter(|(_, entry)| entry.table == table.name);
        let now = rows_of(connection, table, &table.name);
        let mut rows = before.clone();
        for (captured, entry) in mine() {
            apply(&mut rows, captured, entry, false);
        }
        assert_eq!(rows, now, "{what}: replayed, {}", table.name);
        let mut undone: Vec<_> = mine().collect();
        undone.reverse();
        for (captured, entry) in undone {
            apply(&mut rows, captured, entry, true);
        }
        assert_eq!(rows, *before, "{what}: undone, {}", table.name);
        let base = rows_of(
            connection,
            table,
            &format!("_anabranch_base_{}", table.name),
        );
        assert_eq!(base, *before, "{what}: base rows, {}", table.name);
    }
}

/// One program's work: on a file, statements that may fail.
pub struct Work {
    pub path: PathBuf,
    pub statements: Vec<String>,
}

/// Whose SQLite does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Bundled,
    Shell,
    Python,
    Oldest,
}

pub const ENGINES: [Engine; 4] = [
    Engine::Bundled,
    Engine::Shell,
    Engine::Python,
    Engine::Oldest,
];

/// Does all of it; says what errors there were.
pub fn run(engine: Engine, works: &[Work]) -> Vec<String> {
    match engine {
        Engine::Bundled => works.iter().map(run_bundled).collect(),
        Engine::Shell => works.iter().map(run_shell).collect(),
        Engine::Python => run_python(works),
        Engine::Oldest => works.iter().map(run_oldest).collect(),
    }
}

fn run_bundled(work: &Work) -> String {
    let connection = Connection::open(&work.path).unwrap();
    let mut errors = String::new();
    for statement in &work.statements {
        let run = || -> rusqlite::Result<()> {
            let mut statement = connection.prepare(statement)?;
            let mut rows = statement.query([])?;
            while rows.next()?.is_some() {}
            Ok(())
        };
        if let Err(error) = run() {
            errors.push_str(&format!("{error}\n"));
        }
    }
    errors
}

fn run_shell(work: &Work) -> String {
    let mut child = Command::new("sqlite3")
        .arg("-batch")
        .arg(&work.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect(
            "this test needs the `sqlite3` program: install it (Debian: apt-get install sqlite3)",
        );
    let input: String = work
        .statements
        .iter()
        .map(|statement| format!("{statement};\n"))
        .collect();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap()
}

fn run_oldest(work: &Work) -> String {
    let mut child = Command::new(oldest::program())
        .arg(&work.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It ends what it says as it is told what to do; each is less than a pipe holds.
    let input = work.statements.join("\0");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let output = String::from_utf8(output.stdout).unwrap();
    let errors = output.split('\0').filter(|error| !error.is_empty());
    errors.collect::<Vec<_>>().join("\n")
}

const PYTHON: &str = "
import json, sqlite3, sys
errors = []
for work in json.load(sys.stdin):
    connection = sqlite3.connect(work['path'], isolation_level=None)
    texts = []
    for statement in work['statements']:
        try:
            connection.execute(statement).fetchall()
        except sqlite3.Error as error:
            texts.append(str(error))
    connection.close()
    errors.append('\\n'.join(texts))
json.dump(errors, sys.stdout)
";

fn run_python(works: &[Work]) -> Vec<String> {
    let mut child = Command::new("python3")
        .arg("-c")
        .arg(PYTHON)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs `python3`: install it (Debian: apt-get install python3)");
    let works: Vec<_> = works
        .iter()
        .map(|work| json!({ "path": work.path, "statements": work.statements }))
        .collect();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(json!(works).to_string().as_bytes())
        .unwrap();
    serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
}

/// What a query says: values joined by `|`, one text for each row.
pub fn query(connection: &Connection, sql: &str) -> Vec<String> {
    crate::file::tests::query(connection, sql)
}

pub fn open(path: &Path) -> Connection {
    Connection::open(path).unwrap()
}
