//! Tests on real files, looked at through other connections and through the `sqlite3` program.

mod apply;
mod files;
mod foreign;
mod identity;
mod kill;
mod leases;
mod local;
mod model;
mod outbox;
mod overlay;
mod pending;
mod programs;
mod resets;
mod status;
mod stream;

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anabranch_proto::{
    Epoch, Lsn, Position, ops,
    record::{self, ValueRef},
    v1::{self, element::Kind},
};
use bytes::{Bytes, BytesMut};
use rusqlite::{Connection, OpenFlags, types::ValueRef as Sql};
use tempfile::TempDir;

pub use super::{Claim, Error, File, Judged, Judgement, Outgoing, Settings, TableChanges};
pub use ValueRef::{Blob as B, Integer as I, Null as N, Real as R, Text as T};
pub use v1::Storage::{Blob, Integer, Real, Text};

pub const EPOCH: u64 = 0xC0FF_EE00;

/// A directory with a file in it.
pub struct Folder {
    pub directory: TempDir,
    pub settings: Settings,
}

impl Folder {
    pub fn new() -> Folder {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(&directory.path().join("app.db"));
        Folder {
            directory,
            settings,
        }
    }

    pub fn path(&self) -> &Path {
        &self.settings.path
    }

    pub fn open(&self) -> File {
        let mut file = File::open(&self.settings).unwrap();
        file.begin_stream().unwrap();
        file
    }

    /// What a query says to another connection: values as SQL literals, joined by `|`, one text for each row.
    pub fn query(&self, sql: &str) -> Vec<String> {
        query(&reader(self.path()), sql)
    }

    /// Runs SQL as a program would.
    pub fn program(&self, sql: &str) {
        Connection::open(self.path())
            .unwrap()
            .execute_batch(sql)
            .unwrap();
    }
}

pub fn settings(path: &Path) -> Settings {
    Settings {
        path: path.to_owned(),
        mode: 0o600,
        cache_bytes: 1 << 20,
        hold_bytes_max: 1 << 20,
    }
}

pub fn reader(path: &Path) -> Connection {
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap()
}

pub fn query(connection: &Connection, sql: &str) -> Vec<String> {
    let mut statement = connection.prepare(sql).unwrap();
    let width = statement.column_count();
    statement
        .query_map([], |row| {
            Ok((0..width)
                .map(|i| literal(row.get_ref(i).unwrap()))
                .collect::<Vec<_>>()
                .join("|"))
        })
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

pub fn literal(value: Sql<'_>) -> String {
    match value {
        Sql::Null => "NULL".into(),
        Sql::Integer(value) => value.to_string(),
        Sql::Real(value) => format!("{value:?}"),
        Sql::Text(value) => format!("'{}'", String::from_utf8(value.to_vec()).unwrap()),
        Sql::Blob(value) => format!(
            "x'{}'",
            value.iter().map(|b| format!("{b:02x}")).collect::<String>()
        ),
    }
}

pub fn element(kind: Kind) -> v1::Element {
    v1::Element { kind: Some(kind) }
}

/// The beginning of a stream's first transaction.
pub fn first(reset: &[u32]) -> v1::Element {
    element(Kind::Begin(v1::Begin {
        first: true,
        reset: reset.to_vec(),
    }))
}

pub fn begin(reset: &[u32]) -> v1::Element {
    element(Kind::Begin(v1::Begin {
        first: false,
        reset: reset.to_vec(),
    }))
}

/// Columns as (name, storage, place in the key or 0).
pub fn declared(id: u32, name: &str, columns: &[(&str, v1::Storage, u32)]) -> v1::Table {
    let (schema, name) = name.split_once('.').unwrap_or(("public", name));
    v1::Table {
        id,
        schema: schema.into(),
        name: name.into(),
        columns: columns
            .iter()
            .map(|&(name, storage, key_position)| v1::Column {
                name: name.into(),
                postgres_type: storage.as_str_name().to_lowercase(),
                storage: storage.into(),
                not_null: false,
                key_position,
                ..v1::Column::default()
            })
            .collect(),
        indexes: vec![],
        ..v1::Table::default()
    }
}

pub fn table(id: u32, name: &str, columns: &[(&str, v1::Storage, u32)]) -> v1::Element {
    element(Kind::Table(declared(id, name, columns)))
}

pub fn with_index(mut table: v1::Element, name: &str, columns: &[u32]) -> v1::Element {
    if let Some(Kind::Table(table)) = &mut table.kind {
        table.indexes.push(v1::Index {
            name: name.into(),
            columns: columns.to_vec(),
        });
    }
    table
}

/// The table that most tests use: `t(id, v)`.
pub fn simple(id: u32, name: &str) -> v1::Element {
    table(id, name, &[("id", Integer, 1), ("v", Text, 0)])
}

pub fn packed(upserts: &[&[ValueRef<'_>]], deletes: &[&[ValueRef<'_>]]) -> Bytes {
    let mut packed = BytesMut::new();
    for (kind, records) in [(ops::Kind::Upsert, upserts), (ops::Kind::Delete, deletes)] {
        for values in records {
            ops::push(&mut packed, kind, &record::build(values.iter().copied()));
        }
    }
    packed.freeze()
}

pub fn rows(table: u32, ops: Bytes, continued: bool) -> v1::Element {
    element(Kind::Rows(v1::Rows {
        table,
        ops,
        continued,
    }))
}

pub fn upserts(table: u32, records: &[&[ValueRef<'_>]]) -> v1::Element {
    rows(table, packed(records, &[]), false)
}

pub fn deletes(table: u32, keys: &[&[ValueRef<'_>]]) -> v1::Element {
    rows(table, packed(&[], keys), false)
}

pub fn position(lsn: u64) -> Position {
    Position {
        epoch: Epoch(EPOCH),
        lsn: Lsn(lsn),
    }
}

pub fn commit(lsn: u64) -> v1::Element {
    element(Kind::Commit(v1::Commit {
        position: Some(position(lsn).into()),
        commit_time: 1_700_000_000_000_000 + lsn as i64,
        source_lsn: lsn,
    }))
}

pub fn heartbeat(lsn: u64, source_lsn: u64) -> v1::Element {
    element(Kind::Heartbeat(v1::Heartbeat {
        position: Some(position(lsn).into()),
        source_lsn,
        source_connected: true,
    }))
}

/// A message, with a token if it ends between transactions.
pub fn down(elements: Vec<v1::Element>) -> v1::Down {
    let token = match elements.last().and_then(|last| last.kind.as_ref()) {
        Some(Kind::Commit(commit)) => commit.position.map(|p| format!("token {}", p.lsn)),
        Some(Kind::Heartbeat(heartbeat)) => heartbeat.position.map(|p| format!("token {}", p.lsn)),
        _ => None,
    };
    v1::Down {
        elements,
        resume_token: token.unwrap_or_default().into(),
        ..v1::Down::default()
    }
}

/// A stream's first transaction with `t(id, v)` as table 1, in full.
pub fn start(lsn: u64, records: &[&[ValueRef<'_>]]) -> v1::Down {
    down(vec![
        first(&[1]),
        simple(1, "t"),
        upserts(1, records),
        commit(lsn),
    ])
}

/// One that resumes it.
pub fn resume(lsn: u64) -> v1::Down {
    down(vec![first(&[]), simple(1, "t"), commit(lsn)])
}

/// The `sqlite3` program on a file: a process of its own, with an SQLite of its own.
pub struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    pub fn open(path: &Path) -> Shell {
        let mut child = Command::new("sqlite3")
            .arg("-batch")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this test needs the `sqlite3` program: install it (Debian: apt-get install sqlite3)");
        Shell {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// What is printed when SQL is done.
    const DONE: &str = "-- done --";

    /// Runs SQL, and returns what it printed once all of it is done.
    pub fn run(&mut self, sql: &str) -> Vec<String> {
        self.begin(sql);
        self.end()
    }

    /// Has it run SQL, and does not wait.
    pub fn begin(&mut self, sql: &str) {
        writeln!(self.input, "{sql}\n.print '{}'", Shell::DONE).unwrap();
        self.input.flush().unwrap();
    }

    /// Waits until that is done; returns what it printed.
    pub fn end(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).unwrap();
            if read == 0 {
                panic!("the sqlite3 program ended");
            }
            match line.trim_end() {
                Shell::DONE => return lines,
                line => lines.push(line.to_owned()),
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One run of the `sqlite3` program; its output, errors included.
pub fn sqlite3(path: &Path, sql: &str) -> String {
    let output = Command::new("sqlite3")
        .arg("-batch")
        .arg(path)
        .arg(sql)
        .output()
        .expect(
            "this test needs the `sqlite3` program: install it (Debian: apt-get install sqlite3)",
        );
    let mut text = String::from_utf8(output.stdout).unwrap();
    text.push_str(&String::from_utf8(output.stderr).unwrap());
    text
}

pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// No trace of stages or spools.
pub fn assert_tidy(folder: &Folder) {
    assert_eq!(
        folder.query("SELECT name FROM sqlite_schema WHERE name GLOB '_anabranch_stage_*'"),
        Vec::<String>::new()
    );
    assert_eq!(folder.query("PRAGMA integrity_check"), ["'ok'"]);
    assert!(!beside(folder.path(), "-anabranch-spool").exists());
}
