//! Line 16: what a streamer says that wants to harm its replicas. Each lie is told to a real replica whose file holds rows, and
//! what a program has beside them: it says what is wrong, and the file stays what it was at the last good commit.

mod answers;

use std::collections::BTreeSet;

use anabranch_proto::{
    Lsn, MESSAGE_BYTES_MAX, ops,
    record::{self, ValueRef},
    v1::{self, element::Kind},
};
use anabranch_tests::{
    liar::{Answer, Call, Liar},
    peers::Replica,
    wait::{DEADLINE, until},
};
use bytes::{Bytes, BytesMut};
use prost::Message;

use super::{last_error, program};

/// The cap of a replica that is told no other, and what a debug build takes besides.
const MEMORY_BYTES_MAX: u64 = 160 << 20;

/// Behind all good commits.
const LATER: u64 = 1 << 40;

/// What a program keeps in the file.
const PROGRAM: &str = "
    CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT);
    INSERT INTO notes VALUES (1, 'of the program');
    CREATE INDEX notes_by_body ON notes(body);
    CREATE VIEW seen AS SELECT * FROM items JOIN notes USING (id);
    CREATE TRIGGER noted AFTER INSERT ON notes BEGIN UPDATE notes SET body = upper(body) WHERE id = new.id; END;
    CREATE INDEX items_by_body ON items(body)";

/// A replica, and the streamer that lies to it.
struct Victim {
    liar: Liar,
    replica: Replica,
    /// It called, and was not answered.
    waiting: Option<Call>,
    /// Of the last good commit.
    lsn: u64,
}

impl Victim {
    async fn start() -> Victim {
        let liar = Liar::start().await;
        let replica = Replica::config_at(&liar.url())
            .set("zstd", true)
            .subscribe("all")
            .prepare();
        replica.spawn();
        let mut victim = Victim {
            liar,
            replica,
            waiting: None,
            lsn: 100,
        };
        let _stream = victim.good().await;
        program(&victim.replica).execute_batch(PROGRAM).unwrap();
        victim.again();
        victim
    }

    /// A new process, which is as patient as at first, and whose memory is counted anew.
    fn again(&mut self) {
        self.replica.kill();
        self.waiting = None;
        self.replica.spawn();
    }

    async fn call(&mut self, method: &str) -> Call {
        if let Some(call) = self.waiting.take() {
            return call;
        }
        let called = async {
            loop {
                let call = self.liar.call().await;
                if call.is(method) {
                    return call;
                }
            }
        };
        let called = tokio::time::timeout(DEADLINE, called).await;
        called.unwrap_or_else(|_| panic!("it does not call:\n{}", self.replica.log()))
    }

    /// A stream with a first transaction that is as it should be.
    async fn good(&mut self) -> Answer {
        let stream = self.call("Replicate").await.answer(&[]);
        assert!(stream.say(&self.copy(&[])).await);
        self.replica.until_at(Lsn(self.lsn)).await;
        stream
    }

    /// A first transaction: `items` as a whole, and more.
    fn copy(&mut self, more: &[v1::Element]) -> v1::Down {
        self.lsn += 1;
        let mut elements = vec![begin(true, &[1]), declare(table(1, "items"))];
        for (id, body) in [(1, "one"), (2, "two")] {
            let row = [ValueRef::Integer(id), ValueRef::Text(body)];
            elements.push(rows(1, upsert(&row), false));
        }
        elements.extend_from_slice(more);
        elements.push(commit(self.lsn));
        down(elements)
    }

    /// Says these after a good transaction: it complains so, and nothing of them is in the file.
    async fn refuses(&mut self, lie: &[v1::Down], complaint: &str) {
        let framed: Vec<Bytes> = lie.iter().map(framed).collect();
        self.refuses_bytes(&framed, complaint).await;
    }

    async fn refuses_bytes(&mut self, lie: &[Bytes], complaint: &str) {
        let stream = self.good().await;
        let before = content(&self.replica).await;
        for bytes in lie {
            if !stream.bytes(bytes.clone()).await {
                break;
            }
        }
        self.complains(stream, complaint).await;
        is_as_before(&self.replica, &before, complaint).await;
        self.again();
    }

    /// It ends the stream, or itself, and says why.
    async fn complains(&mut self, stream: Answer, complaint: &str) {
        let ended = until(&format!("it ends: {complaint}"), DEADLINE, || async {
            self.replica.poll_exit()
        });
        let called = async {
            loop {
                let call = self.liar.call().await;
                if call.is("Replicate") {
                    return call;
                }
            }
        };
        tokio::select! {
            status = ended => {
                assert_eq!(status.code(), Some(1), "{complaint}: {status}");
                let log = self.replica.log();
                let last = log.lines().last().unwrap_or_default();
                assert!(last.contains(complaint), "{complaint} is not in {last}");
            }
            call = called => {
                let error = last_error(&self.replica).await.unwrap();
                assert!(error.contains(complaint), "{complaint} is not in {error}");
                assert!(!error.contains(char::is_control), "{error:?}");
                let peak = self.replica.memory_peak_bytes();
                assert!(peak < MEMORY_BYTES_MAX, "{complaint}: {} MiB", peak >> 20);
                self.waiting = Some(call);
            }
        }
        drop(stream);
        let log = self.replica.log();
        assert!(!log.contains("panicked"), "{complaint}:\n{log}");
    }

    /// Says a table with a row in a first transaction: it is there by its name, and nothing else is touched. Then it goes again.
    async fn takes(&mut self, table: v1::Table, row: &[ValueRef<'_>]) {
        let _stream = self.good().await;
        let before = content(&self.replica).await;
        self.again();
        let name = match &*table.schema {
            "public" => table.name.clone(),
            schema => format!("{schema}.{}", table.name),
        };
        let stream = self.call("Replicate").await.answer(&[]);
        let columns: Vec<_> = table.columns.iter().map(|c| c.name.clone()).collect();
        let more = [element(Kind::Table(table)), rows(2, upsert(row), false)];
        assert!(stream.say(&self.copy(&more)).await);
        let file = self.replica.open();
        until(&format!("{name:?} is there"), DEADLINE, || async {
            if let Some(status) = self.replica.poll_exit() {
                panic!("{name:?}: {status}\n{}", self.replica.log());
            }
            let sql = "SELECT group_concat(quote(name)) FROM pragma_table_info(?1)";
            let found: Option<String> = file.query_row(sql, [&name], |row| row.get(0))?;
            let wanted: Vec<_> = columns
                .iter()
                .map(|name| format!("'{}'", name.replace('\'', "''")))
                .collect();
            anyhow::ensure!(found == Some(wanted.join(",")), "{found:?}");
            Ok(())
        })
        .await;
        let quoted = name.replace('"', "\"\"");
        let sql = format!("SELECT count(*) FROM \"{quoted}\"");
        let count: i64 = file.query_row(&sql, [], |row| row.get(0)).unwrap();
        assert_eq!(count, 1, "{name:?}");
        drop(file);
        self.again();
        let _stream = self.good().await;
        is_as_before(&self.replica, &before, &name).await;
        self.again();
    }
}

/// All that is in the file, but for the row that says that the replica lives. SQLite's own check of it first.
async fn content(replica: &Replica) -> BTreeSet<String> {
    let file = replica.open();
    // Dropped behind a commit, when there is time.
    until("no stage is left", DEADLINE, || async {
        let sql = "SELECT count(*) FROM sqlite_schema WHERE name LIKE '\\_anabranch\\_stage\\_%' ESCAPE '\\'";
        let stages: i64 = file.query_row(sql, [], |row| row.get(0))?;
        anyhow::ensure!(stages == 0, "{stages}");
        Ok(())
    })
    .await;
    let check: String = file
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(check, "ok");
    let mut content = BTreeSet::new();
    let mut dump = |sql: &str| {
        let mut statement = file.prepare(sql).unwrap();
        let width = statement.column_count();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let value = |i| match row.get_ref(i).unwrap() {
                rusqlite::types::ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
                value => format!("{value:?}"),
            };
            let values: Vec<_> = (0..width).map(value).collect();
            content.insert(format!("{sql}: {}", values.join(" | ")));
        }
    };
    dump("SELECT type, name, tbl_name, sql FROM sqlite_schema");
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name <> '_anabranch_state'";
    let mut statement = file.prepare(sql).unwrap();
    let names = statement.query_map([], |row| row.get::<_, String>(0));
    for name in names.unwrap() {
        let name = name.unwrap().replace('"', "\"\"");
        dump(&format!("SELECT * FROM \"{name}\""));
    }
    content
}

/// The file is as it was.
async fn is_as_before(replica: &Replica, before: &BTreeSet<String>, what: &str) {
    let now = content(replica).await;
    let differ: Vec<_> = now.symmetric_difference(before).collect();
    assert!(differ.is_empty(), "{what}: {differ:#?}");
}

fn element(kind: Kind) -> v1::Element {
    v1::Element { kind: Some(kind) }
}

fn column(name: &str, storage: v1::Storage, key_position: u32) -> v1::Column {
    v1::Column {
        name: name.into(),
        postgres_type: "text".into(),
        storage: storage as i32,
        key_position,
        ..v1::Column::default()
    }
}

/// `public.NAME(id int8 primary key, body text)`.
fn table(id: u32, name: &str) -> v1::Table {
    v1::Table {
        id,
        schema: "public".into(),
        name: name.into(),
        columns: vec![
            column("id", v1::Storage::Integer, 1),
            column("body", v1::Storage::Text, 0),
        ],
        ..v1::Table::default()
    }
}

fn declare(table: v1::Table) -> v1::Element {
    element(Kind::Table(table))
}

fn begin(first: bool, reset: &[u32]) -> v1::Element {
    let reset = reset.to_vec();
    element(Kind::Begin(v1::Begin { first, reset }))
}

fn rows(table: u32, ops: Bytes, continued: bool) -> v1::Element {
    element(Kind::Rows(v1::Rows {
        table,
        ops,
        continued,
    }))
}

fn upsert(row: &[ValueRef<'_>]) -> Bytes {
    let mut packed = BytesMut::new();
    let record = record::build(row.iter().copied());
    ops::push(&mut packed, ops::Kind::Upsert, &record);
    packed.freeze()
}

fn raw(ops: &[u8]) -> v1::Element {
    rows(1, Bytes::copy_from_slice(ops), false)
}

fn position(epoch: u64, lsn: u64) -> Option<v1::Position> {
    Some(v1::Position { epoch, lsn })
}

fn commit_at(position: Option<v1::Position>) -> v1::Element {
    element(Kind::Commit(v1::Commit {
        position,
        ..v1::Commit::default()
    }))
}

fn commit(lsn: u64) -> v1::Element {
    commit_at(position(7, lsn))
}

/// A message with a token where the grammar wants one.
fn down(elements: Vec<v1::Element>) -> v1::Down {
    let last = elements.last().and_then(|element| element.kind.as_ref());
    let ends = matches!(last, Some(Kind::Commit(_) | Kind::Heartbeat(_)));
    v1::Down {
        elements,
        resume_token: if ends { "token".into() } else { Bytes::new() },
        ..v1::Down::default()
    }
}

/// Good rows, and then this, in one transaction.
fn within(more: Vec<v1::Element>) -> Vec<v1::Down> {
    let row = [ValueRef::Integer(3), ValueRef::Text("never")];
    let mut elements = vec![begin(false, &[]), rows(1, upsert(&row), false)];
    elements.extend(more);
    elements.push(commit(LATER));
    vec![down(elements)]
}

fn framed(message: &v1::Down) -> Bytes {
    let mut framed = vec![0];
    framed.extend((message.encoded_len() as u32).to_be_bytes());
    framed.extend(message.encode_to_vec());
    framed.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_order_position_or_rows_gets_into_the_file() {
    use ValueRef::{Blob, Integer, Null, Text};
    let mut victim = Victim::start().await;
    let good = || rows(1, upsert(&[Integer(3), Text("never")]), false);
    let nothing = || v1::Element { kind: None };
    let heartbeat = |lsn| {
        element(Kind::Heartbeat(v1::Heartbeat {
            position: position(7, lsn),
            ..v1::Heartbeat::default()
        }))
    };
    let state = |table, state: v1::table_state::State| {
        element(Kind::State(v1::TableState {
            table,
            state: state as i32,
            reason: "\u{1b}[31mDROP TABLE items\n".into(),
        }))
    };
    for (lie, complaint) in [
        (vec![good()], "Rows outside of a transaction"),
        (vec![commit(LATER)], "Commit outside of a transaction"),
        (
            vec![declare(table(2, "t"))],
            "Table outside of a transaction",
        ),
        (
            vec![begin(false, &[]), begin(false, &[])],
            "Begin within a transaction",
        ),
        (vec![begin(true, &[])], "to be marked as first"),
        (
            vec![begin(false, &[9]), good(), commit(LATER)],
            "not declared",
        ),
        (vec![begin(false, &[1, 1])], "reset twice"),
        (
            vec![begin(false, &[]), heartbeat(LATER)],
            "Heartbeat within a transaction",
        ),
        (vec![heartbeat(1)], "after"),
        (vec![begin(false, &[]), good(), commit(1)], "after"),
        (
            vec![begin(false, &[]), good(), commit_at(position(8, LATER))],
            "epoch changed",
        ),
        (
            vec![begin(false, &[]), good(), commit_at(None)],
            "without position",
        ),
    ] {
        victim.refuses(&[down(lie)], complaint).await;
    }
    for (lie, complaint) in [
        (nothing(), "does not know"),
        (rows(9, upsert(&[Integer(3)]), false), "not declared"),
        (state(9, v1::table_state::State::Live), "not declared"),
        (
            state(1, v1::table_state::State::Unspecified),
            "does not know",
        ),
        (declare(table(1, "items")), "declared again"),
        (declare(table(1, "notes")), "declared again"),
        (rows(1, upsert(&[Integer(4)]), false), "items"),
        (rows(1, upsert(&[Integer(4), Null, Null]), false), "items"),
        (rows(1, upsert(&[Text("4"), Null]), false), "items"),
        (rows(1, upsert(&[Integer(4), Blob(b"x")]), false), "items"),
        (rows(1, upsert(&[Null, Null]), false), "items"),
        // A record that is cut, one without end, one above the limit of a row, a type that is none, text that is no text.
        (raw(&[6, 3, 1]), "malformed"),
        (raw(&[255; 20]), "malformed"),
        (raw(&[0xfe, 0xff, 0xff, 0xff, 0x7f]), "malformed"),
        (raw(&[8, 3, 10, 10, 0]), "malformed"),
        (raw(&[10, 3, 9, 15, 0xff, 0]), "malformed"),
        (rows(1, Bytes::from_static(&[20, 3]), true), "continued"),
    ] {
        victim.refuses(&within(vec![lie]), complaint).await;
    }
    // Tokens where there are none, none where there should be one, and one that is too long.
    let with = |elements, token: &str| {
        vec![v1::Down {
            elements,
            resume_token: token.to_owned().into(),
            ..v1::Down::default()
        }]
    };
    let whole = || vec![begin(false, &[]), good(), commit(LATER)];
    for (lie, complaint) in [
        (with(whole(), ""), "without resume token"),
        (with(vec![begin(false, &[]), good()], "x"), "in the middle"),
        (with(whole(), &"x".repeat(70_000)), "64 KiB"),
    ] {
        victim.refuses(&lie, complaint).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_tables_reaches_what_a_program_has_in_the_file_or_what_is_ours() {
    use v1::Storage::{Blob, Integer, Real, Text};
    let mut victim = Victim::start().await;
    // Names that are taken. Nobody but a person can mend that, so it ends, and does not come back by itself.
    for (name, complaint) in [
        ("notes", "a program has a table named"),
        ("NOTES", "a program has a table named"),
        ("seen", "a program has a view named"),
        ("notes_by_body", "a program has a index named"),
        ("sqlite_schema", "are taken"),
        ("SQLITE_sequence", "are taken"),
        ("_anabranch_state", "are taken"),
        ("_ANABRANCH_stage_1", "are taken"),
        ("Items", "the same name"),
    ] {
        let lie = within(vec![declare(table(2, name))]);
        victim.refuses(&lie, complaint).await;
    }
    let changed = |change: fn(&mut v1::Table)| {
        let mut changed = table(2, "t");
        change(&mut changed);
        within(vec![declare(changed)])
    };
    let with_index = |columns: &[u32]| {
        let mut indexed = table(2, "t");
        indexed.indexes.push(v1::Index {
            name: "i".into(),
            columns: columns.to_vec(),
        });
        within(vec![declare(indexed)])
    };
    for (lie, complaint) in [
        (changed(|t| t.name = "a\0b".into()), "NUL"),
        (changed(|t| t.name = String::new()), "empty"),
        (changed(|t| t.schema = "s".repeat(300)), "longer than"),
        (
            changed(|t| t.columns[1].name = "ID".into()),
            "differ only by case",
        ),
        (changed(|t| t.columns[1].name = "a\0".into()), "NUL"),
        (changed(|t| t.columns[1].storage = 9), "storage"),
        (changed(|t| t.columns[1].conflict = 9), "conflict policy"),
        (
            changed(|t| t.columns[1].key_position = 9),
            "places in its key",
        ),
        (changed(|t| t.columns[1].key_position = 1), "one place"),
        (changed(|t| t.columns[0].key_position = 0), "no key"),
        (
            changed(|t| t.columns[0].storage = Real as i32),
            "float in the key",
        ),
        (changed(|t| t.columns.clear()), "no columns"),
        (changed(|t| t.purpose = 9), "purpose"),
        (
            changed(|t| t.purpose = v1::Purpose::Receipts as i32),
            "its purpose needs",
        ),
        (
            changed(|t| t.columns[1].postgres_type = "x".repeat(2000)),
            "too long",
        ),
        (
            changed(|t| {
                t.columns[1].default_kind = v1::DefaultKind::Value as i32;
                t.columns[1].default_value = record::build([ValueRef::Text("a\0b")]);
            }),
            "default",
        ),
        (with_index(&[]), "index"),
        (with_index(&[7]), "index"),
        (with_index(&[1, 1]), "index"),
    ] {
        victim.refuses(&lie, complaint).await;
    }

    // What a name may hold is only ever a name, and what a default may hold only ever a value.
    for name in [
        "a\"; DROP TABLE notes; --",
        "main.notes",
        "temp.sqlite_master",
        "notes\" AS SELECT 1; --",
        "'); DELETE FROM items; --",
        "[x]`y`",
        "rowid",
        "table",
        "\u{202e}seton",
        " ",
        "%s?1:x@y$z",
    ] {
        let mut odd = table(2, name);
        odd.columns[1].name = format!("{name}\", x TEXT DEFAULT ('");
        odd.columns[1].default_kind = v1::DefaultKind::Value as i32;
        let default = format!("'||(SELECT body FROM notes)||'{name}");
        odd.columns[1].default_value = record::build([ValueRef::Text(&default)]);
        odd.columns[1].postgres_type = format!("text'); DROP TABLE notes; {name}");
        odd.indexes = vec![
            v1::Index {
                name: format!("{name}\" ON notes(body); --"),
                columns: vec![1],
            },
            v1::Index {
                name: "notes_by_body".into(),
                columns: vec![1],
            },
            v1::Index {
                name: "_anabranch_local_last".into(),
                columns: vec![1, 0],
            },
        ];
        odd.writable = true;
        let row = [ValueRef::Integer(1), ValueRef::Text("x'); --")];
        victim.takes(odd, &row).await;
    }
    for (columns, row) in [
        // Names that SQLite has of its own for the row's number.
        (
            vec![
                column("rowid", Text, 0),
                column("oid", Text, 1),
                column("_rowid_", Blob, 2),
            ],
            vec![ValueRef::Null, ValueRef::Text("a"), ValueRef::Blob(b"b")],
        ),
        (
            (0..1600)
                .map(|i| {
                    column(
                        &format!("{i}{}", "\"".repeat(120)),
                        Integer,
                        u32::from(i == 0),
                    )
                })
                .collect(),
            vec![ValueRef::Integer(1); 1600],
        ),
    ] {
        for writable in [false, true] {
            let odd = v1::Table {
                columns: columns.clone(),
                writable,
                ..table(2, "odd")
            };
            victim.takes(odd, &row).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_sizes_fills_memory_or_ends_the_program() {
    let mut victim = Victim::start().await;
    let zstd = |bytes: &[u8]| v1::Down {
        zstd: zstd::bulk::compress(bytes, 1).unwrap().into(),
        ..v1::Down::default()
    };
    // A gigabyte in some kilobytes; the same without its length in the head; packed twice; no zstd.
    let stream = |megabytes: usize| {
        let mut packed = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        for _ in 0..megabytes {
            std::io::Write::write_all(&mut packed, &[0; 1 << 20]).unwrap();
        }
        v1::Down {
            zstd: packed.finish().unwrap().into(),
            ..v1::Down::default()
        }
    };
    let large = framed(&down(vec![raw(&vec![0; MESSAGE_BYTES_MAX + (128 << 10)])]));
    for (lie, complaint) in [
        (vec![framed(&zstd(&vec![0; 1 << 30]))], "unpacked"),
        (vec![framed(&stream(1024))], "unpacked"),
        (
            vec![framed(&zstd(&zstd(&[7; 10_000]).encode_to_vec()))],
            "twice",
        ),
        (
            vec![framed(&v1::Down {
                zstd: Bytes::from_static(b"no zstd at all"),
                ..v1::Down::default()
            })],
            "unpacked",
        ),
        // Above the limit of a message, in fact and by its head alone; a compression of gRPC's that nobody agreed to; no protobuf;
        // groups within groups.
        (vec![large], "OUT_OF_RANGE"),
        (
            vec![Bytes::from_static(&[0, 255, 255, 255, 255])],
            "OUT_OF_RANGE",
        ),
        (vec![Bytes::from_static(&[1, 0, 0, 0, 1, 0])], "INTERNAL"),
        (vec![Bytes::from_static(&[9, 0, 0, 0, 1, 0])], "INTERNAL"),
        (
            vec![[&[0, 0, 0, 0, 100][..], &[255; 100]].concat().into()],
            "INTERNAL",
        ),
        (
            vec![
                [&[0, 0, 0, 0x27, 0x10][..], &[0x0b; 10_000]]
                    .concat()
                    .into(),
            ],
            "INTERNAL",
        ),
    ] {
        victim.refuses_bytes(&lie, complaint).await;
    }
    // Resets and declarations without end.
    let many: Vec<u32> = (0..20_000).collect();
    victim
        .refuses(&[down(vec![begin(false, &many)])], "too many")
        .await;
    let mut wide = table(2, "t");
    for i in 0..1500 {
        let mut more = column(&format!("{i} {}", "x".repeat(200)), v1::Storage::Text, 0);
        more.postgres_type = "y".repeat(1000);
        wide.columns.push(more);
    }
    let mut lie = vec![down(vec![begin(false, &[])])];
    lie.extend((2..100).map(|id| {
        let name = format!("t{id}");
        down(vec![declare(v1::Table {
            id,
            name,
            ..wide.clone()
        })])
    }));
    victim.refuses(&lie, "16 MiB").await;
}

/// A transaction that never ends: it is held on disk, and forgotten with its stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_without_end_is_held_in_memory_or_seen() {
    const MESSAGES: i64 = 300;
    let mut victim = Victim::start().await;
    // Rows of a table that is there, and of one that is sent whole.
    for reset in [&[][..], &[1]] {
        let stream = victim.good().await;
        let before = content(&victim.replica).await;
        assert!(stream.say(&down(vec![begin(false, reset)])).await);
        let body = "x".repeat(1 << 20);
        for id in 0..MESSAGES {
            let row = [ValueRef::Integer(id), ValueRef::Text(&body)];
            let said = stream.say(&down(vec![rows(1, upsert(&row), false)])).await;
            assert!(said, "{}", victim.replica.log());
        }
        stream
            .end(&[("grpc-status", "14"), ("grpc-message", "over")])
            .await;
        let call = victim.call("Replicate").await;
        let peak = victim.replica.memory_peak_bytes();
        println!("{} MiB", peak >> 20);
        assert!(peak < MEMORY_BYTES_MAX, "{} MiB", peak >> 20);
        is_as_before(&victim.replica, &before, "without end").await;
        victim.waiting = Some(call);
        drop(victim.good().await);
        victim.again();
    }
}

/// What is around the messages: headers and trailers.
#[tokio::test(flavor = "multi_thread")]
async fn a_lie_in_headers_or_trailers_is_believed_or_printed_as_it_came() {
    let mut victim = Victim::start().await;
    let compressed = [("grpc-encoding", "gzip")];
    for (headers, complaint) in [
        (&compressed[..], "UNIMPLEMENTED"),
        (&[("content-type", "text/html")], "text/html"),
        (
            &[("grpc-status", "5"), ("grpc-message", "no%0Asuch%1B[2J")],
            "NOT_FOUND",
        ),
    ] {
        drop(victim.good().await);
        victim.again();
        let before = content(&victim.replica).await;
        let stream = victim.call("Replicate").await.answer(headers);
        stream.say(&victim.copy(&[])).await;
        let error = until(complaint, DEADLINE, || async {
            let error = last_error(&victim.replica).await?;
            anyhow::ensure!(error.contains(complaint), "{error}");
            Ok::<_, anyhow::Error>(error)
        })
        .await;
        assert!(!error.contains(char::is_control), "{error:?}");
        is_as_before(&victim.replica, &before, complaint).await;
        victim.again();
    }
    for (trailers, complaint) in [
        (&[("grpc-status", "99999")][..], "UNKNOWN"),
        (
            &[("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")],
            "RESOURCE_EXHAUSTED",
        ),
        (
            &[
                ("grpc-status", "14"),
                ("grpc-message", "a%0A2026 ERROR forged%1B[31m"),
            ],
            "forged",
        ),
    ] {
        let stream = victim.good().await;
        stream.end(trailers).await;
        let call = victim.call("Replicate").await;
        let error = last_error(&victim.replica).await.unwrap();
        assert!(error.contains(complaint), "{error}");
        assert!(!error.contains(char::is_control), "{error:?}");
        let log = victim.replica.log();
        assert!(
            !log.contains('\u{1b}') && !log.lines().any(|line| line.starts_with("2026 ERROR")),
            "{log}"
        );
        victim.waiting = Some(call);
        drop(victim.good().await);
        victim.again();
    }
}
