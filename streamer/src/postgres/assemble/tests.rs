use std::collections::BTreeMap;

use anabranch_proto::record::{self, ValueRef};
use rand::Rng;

use super::{
    super::pgoutput::encode::{self, Column as Described, Value, text},
    *,
};
use crate::{
    postgres::seed::seeded,
    table::{Collation, Column, Identity, Kind},
    transaction::Old,
};

const CHUNK_BYTES_MAX: usize = 1_000_000;

fn column(name: &str, type_oid: u32, attnum: i16) -> Column {
    Column {
        name: name.into(),
        attnum,
        type_oid,
        base_oid: type_oid,
        typmod: -1,
        postgres_type: "type".into(),
        kind: Kind::Text,
        not_null: false,
        collation: Collation::Bytes,
    }
}

/// `a`, `b`, `c`, of which `a` is the key.
fn table(oid: Oid, identity: Identity) -> Arc<Table> {
    Arc::new(Table {
        oid,
        schema: "public".into(),
        name: format!("t{oid}"),
        columns: vec![column("a", 25, 1), column("b", 25, 2), column("c", 25, 4)],
        key: vec![0],
        identity,
        indexes: Vec::new(),
        version: 1,
    })
}

fn described(columns: &[(bool, &str)]) -> Vec<Described> {
    let column = |(key, name): &(bool, &str)| (*key, (*name).to_owned(), 25, -1);
    columns.iter().map(column).collect()
}

/// Table 1 has a key, 2 is FULL, 3 is identified by an index on b and c.
struct Fixture {
    assembler: Assembler,
    events: Vec<Event>,
    directory: tempfile::TempDir,
}

fn fixture(chunk_bytes_max: usize, memory_bytes_max: usize) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let tables = [
        table(1, Identity::Key),
        table(2, Identity::Full),
        table(3, Identity::Index(vec![1, 2])),
    ];
    let tables = tables.into_iter().map(|table| (table.oid, table)).collect();
    let assembler = Assembler::new(tables, chunk_bytes_max, directory.path(), memory_bytes_max);
    Fixture {
        assembler,
        events: Vec::new(),
        directory,
    }
}

fn relation_of(xid: Option<u32>, oid: u32) -> Vec<u8> {
    let (identity, keys) = match oid {
        1 => (b'd', [true, false, false]),
        2 => (b'f', [true, true, true]),
        _ => (b'i', [false, true, true]),
    };
    let columns = described(&[(keys[0], "a"), (keys[1], "b"), (keys[2], "c")]);
    encode::relation(xid, oid, "public", &format!("t{oid}"), identity, &columns)
}

fn row(values: [&str; 3]) -> Vec<Value> {
    values.iter().map(|value| text(value)).collect()
}

impl Fixture {
    fn try_feed(&mut self, message: &[u8]) -> Result<(), Error> {
        let events = &mut self.events;
        let payload = encode::xlog_data(message);
        self.assembler.feed(&payload, &mut |event| {
            events.push(event);
            Ok(())
        })
    }

    fn feed(&mut self, messages: &[Vec<u8>]) -> &mut Self {
        for message in messages {
            self.try_feed(message).unwrap();
        }
        self
    }

    fn keepalive(&mut self, wal_end: u64, reply: bool) -> &mut Self {
        let events = &mut self.events;
        let payload = encode::keepalive(Lsn(wal_end), reply);
        let mut sink = |event| {
            events.push(event);
            Ok(())
        };
        self.assembler.feed(&payload, &mut sink).unwrap();
        self
    }

    fn cut(&mut self, message: &[u8]) -> &mut Self {
        let events = &mut self.events;
        let mut payload = encode::xlog_data(message);
        payload.truncate(64);
        let mut sink = |event| {
            events.push(event);
            Ok(())
        };
        self.assembler.feed_cut(&payload, &mut sink).unwrap();
        self
    }

    fn flush(&mut self) -> &mut Self {
        let events = &mut self.events;
        let mut sink = |event| {
            events.push(event);
            Ok(())
        };
        self.assembler.flush(&mut sink).unwrap();
        self
    }

    /// Everything that came since the last time, in words.
    fn said(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for event in self.events.drain(..) {
            match event {
                Event::Idle { lsn, urgent } => {
                    let urgent = if urgent { " urgent" } else { "" };
                    said.push(format!("idle {}{urgent}", lsn.0));
                }
                Event::Lost => said.push("lost".into()),
                Event::Chunk(chunk) => {
                    let first = if chunk.first { "begin " } else { "more " };
                    said.push(format!("{first}{}", chunk.commit_lsn.0));
                    said.extend(chunk.changes.iter().map(words));
                    if let Some(end) = chunk.end {
                        said.push(format!("end {} {}", end.lsn.0, end.commit_time));
                    }
                }
            }
        }
        said
    }
}

fn values(record: &[u8]) -> String {
    let words: Vec<_> = record::values(record)
        .unwrap()
        .map(|value| match value.unwrap() {
            ValueRef::Null => "NULL".to_owned(),
            ValueRef::Text(text) => text.to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    words.join(",")
}

fn words(change: &Change) -> String {
    let old = |old: &Old| match old {
        Old::Identity(record) => format!("identity({})", values(record)),
        Old::Full(record) => format!("full({})", values(record)),
    };
    match change {
        Change::Insert { table, new } => format!("insert {}({})", table.name, values(new)),
        Change::Update {
            table,
            old: before,
            new,
            unchanged,
        } => {
            let before = before.as_ref().map(|o| old(o) + " ").unwrap_or_default();
            let unchanged = if unchanged.is_empty() {
                String::new()
            } else {
                format!(" unchanged {unchanged:?}")
            };
            format!("update {} {before}({}){unchanged}", table.name, values(new))
        }
        Change::Delete { table, old: before } => format!("delete {} {}", table.name, old(before)),
        Change::Truncate { table } => format!("truncate {}", table.name),
        Change::Stop { table, reason } => format!("stop {table}: {reason}"),
    }
}

fn begin(lsn: u64) -> Vec<u8> {
    encode::begin(Lsn(lsn), 0, 700)
}

fn commit(lsn: u64) -> Vec<u8> {
    encode::commit(Lsn(lsn), Lsn(lsn + 8), 5)
}

#[test]
fn a_transaction_is_one_chunk_with_every_kind_of_change() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    let key = [text("1"), Value::Null, Value::Null];
    let index = [Value::Null, text("x"), text("y")];
    let (long, short) = (row(["1", "x", "y"]), row(["2", "x", "z"]));
    let toasted = [text("1"), Value::Unchanged, text("y")];
    fixture.feed(&[
        begin(100),
        relation_of(None, 1),
        relation_of(None, 2),
        relation_of(None, 3),
        encode::insert(None, 1, &long),
        encode::insert(None, 1, &[text("1"), Value::Null, text("")]),
        encode::update(None, 1, None, &toasted),
        encode::update(None, 1, Some((b'K', &key)), &short),
        encode::update(None, 2, Some((b'O', &long)), &short),
        encode::update(None, 3, Some((b'K', &index)), &short),
        encode::delete(None, 1, b'K', &key),
        encode::delete(None, 2, b'O', &long),
        encode::delete(None, 3, b'K', &index),
        encode::truncate(None, 3, &[2, 1]),
    ]);
    assert!(fixture.events.is_empty());
    fixture.feed(&[commit(100)]);
    assert_eq!(
        fixture.said(),
        [
            "begin 100",
            "insert t1(1,x,y)",
            "insert t1(1,NULL,)",
            "update t1 (1,NULL,y) unchanged [1]",
            "update t1 identity(1) (2,x,z)",
            "update t2 full(1,x,y) (2,x,z)",
            "update t3 identity(x,y) (2,x,z)",
            "delete t1 identity(1)",
            "delete t2 full(1,x,y)",
            "delete t3 identity(x,y)",
            "truncate t2",
            "truncate t1",
            "end 108 946684800000005",
        ]
    );
}

#[test]
fn columns_are_found_by_name_in_whatever_order() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    let columns = described(&[(true, "c"), (false, "a"), (true, "b")]);
    let key = [text("y"), Value::Null, text("x")];
    fixture.feed(&[
        begin(1),
        encode::relation(None, 3, "public", "t3", b'i', &columns),
        encode::update(
            None,
            3,
            Some((b'K', &key)),
            &[Value::Unchanged, text("1"), text("2")],
        ),
        commit(1),
    ]);
    assert_eq!(
        fixture.said()[1],
        "update t3 identity(x,y) (1,2,NULL) unchanged [2]"
    );
}

#[test]
fn a_table_that_changed_is_stopped_and_says_why_and_goes_on_where_it_fits_again() {
    type Change = fn(&mut Vec<Described>) -> (&'static str, u8);
    let cases: &[(Change, &str)] = &[
        (
            |c| {
                c.push((false, "d".into(), 25, -1));
                ("t1", b'd')
            },
            "\"d\" is new",
        ),
        (
            |c| {
                c.remove(1);
                ("t1", b'd')
            },
            "column \"b\" was dropped",
        ),
        (
            |c| {
                c[1].1 = "bb".into();
                ("t1", b'd')
            },
            "column \"b\" was dropped, renamed or unpublished; column \"bb\" is new",
        ),
        (
            |c| {
                c[2].2 = 23;
                ("t1", b'd')
            },
            "type of column \"c\"",
        ),
        (
            |c| {
                c[2].3 = 14;
                ("t1", b'd')
            },
            "type modifier of column \"c\"",
        ),
        (
            |c| {
                c[2].0 = true;
                ("t1", b'd')
            },
            "replica identity is now (a, c)",
        ),
        (
            |c| {
                c.iter_mut().for_each(|c| c.0 = true);
                ("t1", b'f')
            },
            "FULL",
        ),
        (
            |c| {
                c[0].0 = false;
                ("t1", b'n')
            },
            "NOTHING",
        ),
        (|_| ("T1", b'd'), "now called public.T1"),
    ];
    for (change, reason) in cases {
        let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
        let mut columns = described(&[(true, "a"), (false, "b"), (false, "c")]);
        let (name, identity) = change(&mut columns);
        let altered = encode::relation(None, 1, "public", name, identity, &columns);
        let values = vec![text("1"); columns.len()];
        fixture.feed(&[
            begin(1),
            relation_of(None, 1),
            relation_of(None, 2),
            encode::insert(None, 1, &row(["1", "2", "3"])),
            altered.clone(),
            encode::insert(None, 1, &values),
            altered.clone(),
            encode::truncate(None, 0, &[1, 2]),
            commit(1),
            begin(20),
            relation_of(None, 1),
            encode::insert(None, 1, &row(["1", "2", "3"])),
            encode::insert(None, 2, &row(["1", "2", "3"])),
            commit(20),
        ]);
        let said = fixture.said();
        assert!(said[2].starts_with("stop 1: "), "{said:?}");
        assert!(said[2].contains(reason), "{said:?}");
        assert_eq!(said[1], "insert t1(1,2,3)");
        assert_eq!(said[3], said[2], "it is described so once more");
        assert_eq!(said[4], "truncate t2");
        // The mirror does not take it where it was stopped, but does where its copy is younger than all of the above.
        assert_eq!(said[7], "insert t1(1,2,3)");
        assert_eq!(said[8], "insert t2(1,2,3)");
        assert_eq!(said.len(), 10);
    }
}

#[test]
fn a_value_that_makes_no_sense_stops_its_table_without_showing_it() {
    for (value, says) in [
        (Value::Text(b"CANARY\xFF".to_vec()), "can't be converted"),
        (Value::Binary(b"CANARY".to_vec()), "binary"),
        (Value::Unchanged, "was not sent"),
    ] {
        let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
        fixture.feed(&[
            begin(1),
            relation_of(None, 1),
            encode::insert(None, 1, &[text("1"), value, text("")]),
            encode::insert(None, 1, &row(["1", "2", "3"])),
            commit(1),
        ]);
        let said = fixture.said();
        assert!(said[1].contains("column \"b\" (type)") && said[1].contains(says));
        assert!(!said[1].contains("CANARY"));
        assert_eq!(said[2], "insert t1(1,2,3)", "for a younger copy");
        assert_eq!(said.len(), 4);
    }
}

#[test]
fn a_row_that_is_too_large_stops_its_table_wherever_it_is() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    let large = row(["1", &"x".repeat(100), ""]);
    fixture
        .feed(&[begin(1), relation_of(None, 1), relation_of(None, 2)])
        .cut(&encode::insert(None, 1, &large))
        .cut(&encode::update(None, 1, None, &large))
        .feed(&[
            encode::insert(None, 2, &row(["1", "2", "3"])),
            commit(1),
            encode::stream_start(9, true),
            relation_of(Some(9), 2),
            encode::insert(Some(9), 2, &row(["4", "5", "6"])),
        ])
        .cut(&encode::insert(Some(10), 2, &large))
        .cut(&encode::delete(Some(9), 2, b'O', &large))
        .feed(&[
            encode::stream_stop(),
            encode::stream_abort(9, 10),
            encode::stream_commit(9, Lsn(20), Lsn(28), 0),
        ]);
    assert_eq!(
        fixture.said(),
        [
            "begin 1",
            "stop 1: a row is larger than row_bytes_max",
            "stop 1: a row is larger than row_bytes_max",
            "insert t2(1,2,3)",
            "end 9 946684800000005",
            "begin 20",
            "insert t2(4,5,6)",
            "stop 2: a row is larger than row_bytes_max",
            "end 28 946684800000000",
        ]
    );
}

#[test]
fn tables_of_others_are_ignored_and_empty_transactions_are_idle() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    let foreign = encode::relation(None, 99, "x", "y", b'n', &[]);
    fixture
        .feed(&[
            begin(10),
            foreign.clone(),
            encode::insert(None, 99, &[]),
            encode::truncate(None, 0, &[99]),
            commit(10),
            begin(30),
            commit(30),
        ])
        .flush();
    assert_eq!(fixture.said(), ["idle 38"]);
    fixture
        .flush()
        .keepalive(38, false)
        .flush()
        .keepalive(20, false)
        .flush();
    assert_eq!(fixture.said(), [""; 0]);
    fixture.keepalive(50, false).feed(&[
        begin(60),
        relation_of(None, 1),
        encode::insert(None, 1, &row(["1", "2", "3"])),
        commit(60),
    ]);
    // The commit says more.
    assert_eq!(fixture.flush().said().len(), 3);
}

#[test]
fn a_keepalive_within_a_transaction_says_nothing() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    fixture.keepalive(5, true);
    assert_eq!(fixture.said(), ["idle 5 urgent"]);
    fixture
        .feed(&[begin(10), relation_of(None, 1)])
        .keepalive(12, true)
        .flush()
        .feed(&[encode::insert(None, 1, &row(["1", "2", "3"]))])
        .keepalive(12, false)
        .flush();
    assert_eq!(fixture.said(), [""; 0]);
    fixture.feed(&[commit(10)]);
    assert_eq!(fixture.said().len(), 3);
    // One that asks for an answer says so, even if it says nothing new; and positions never go back.
    fixture.keepalive(18, true).keepalive(15, true);
    assert_eq!(fixture.said(), ["idle 18 urgent", "idle 18 urgent"]);
    // Transactions in progress do not hinder, not even within a block.
    fixture
        .feed(&[encode::stream_start(9, true)])
        .keepalive(50, true);
    assert_eq!(fixture.said(), ["idle 50 urgent"]);
}

#[test]
fn a_large_transaction_comes_in_chunks() {
    let mut fixture = fixture(4_000, 0);
    fixture.feed(&[begin(1), relation_of(None, 1)]);
    for i in 0..100 {
        let values = row([&i.to_string(), &"x".repeat(90), ""]);
        fixture.feed(&[encode::insert(None, 1, &values)]);
    }
    // A single change above the bound is a chunk of its own.
    fixture.feed(&[
        encode::insert(None, 1, &row(["100", &"x".repeat(9_000), ""])),
        commit(1),
    ]);
    let chunks: Vec<_> = fixture
        .events
        .iter()
        .map(|event| match event {
            Event::Chunk(chunk) => chunk.clone(),
            _ => panic!("not a chunk"),
        })
        .collect();
    assert!(chunks.len() > 5);
    for (i, chunk) in chunks.iter().enumerate() {
        let last = i == chunks.len() - 1;
        assert_eq!((chunk.first, chunk.end.is_some()), (i == 0, last));
        assert!(chunk.bytes <= 4_000 || chunk.changes.len() == 1);
        // What precedes the large change is cut short by it.
        assert!(i + 2 >= chunks.len() || chunk.bytes > 3_000);
        assert_eq!(chunk.commit_lsn, Lsn(1));
    }
    let count: usize = chunks.iter().map(|chunk| chunk.changes.len()).sum();
    assert_eq!(count, 101);
}

#[test]
fn streamed_transactions_in_turns_come_out_whole_at_their_commits() {
    for memory_bytes_max in [0, 300, 1_000_000] {
        let mut fixture = fixture(CHUNK_BYTES_MAX, memory_bytes_max);
        let insert = |xid, value: &str| encode::insert(Some(xid), 1, &row([value, "", ""]));
        fixture.feed(&[
            encode::stream_start(10, true),
            relation_of(Some(10), 1),
            insert(10, "a"),
            insert(11, "subtransaction, rolled back"),
            encode::stream_stop(),
            encode::stream_start(20, true),
            relation_of(Some(20), 1),
            insert(20, "other"),
            encode::stream_stop(),
            encode::stream_abort(10, 11),
            // Described again after a rollback, as Postgres does.
            encode::stream_start(10, false),
            relation_of(Some(10), 1),
            insert(12, "b"),
            encode::stream_stop(),
            encode::stream_start(30, true),
            relation_of(Some(30), 1),
            insert(30, "rolled back"),
            encode::stream_stop(),
            // An ordinary one between them.
            begin(100),
            relation_of(None, 1),
            encode::insert(None, 1, &row(["ordinary", "", ""])),
            commit(100),
            encode::stream_abort(30, 30),
            encode::stream_start(10, false),
            insert(10, "c"),
            encode::stream_stop(),
            encode::stream_commit(20, Lsn(200), Lsn(208), 0),
            encode::stream_commit(10, Lsn(300), Lsn(308), 0),
            // All of it rolled back, and one rolled back that is not there any more.
            encode::stream_start(40, true),
            insert(41, "x"),
            encode::stream_stop(),
            encode::stream_abort(40, 41),
            encode::stream_commit(40, Lsn(400), Lsn(408), 0),
            encode::stream_abort(40, 40),
        ]);
        fixture.flush();
        let said = fixture.said();
        let said: Vec<_> = said.iter().filter(|s| !s.starts_with("end")).collect();
        assert_eq!(
            said,
            [
                "begin 100",
                "insert t1(ordinary,,)",
                "begin 200",
                "insert t1(other,,)",
                "begin 300",
                "insert t1(a,,)",
                "insert t1(b,,)",
                "insert t1(c,,)",
                "idle 408",
            ]
        );
        assert_eq!(fixture.directory.path().read_dir().unwrap().count(), 0);
    }
}

#[test]
fn a_schema_change_that_is_rolled_back_stops_nothing() {
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    let columns = described(&[(true, "a"), (false, "b")]);
    let altered = |xid| encode::relation(Some(xid), 1, "public", "t1", b'd', &columns);
    let insert = |xid| encode::insert(Some(xid), 1, &row(["1", "2", "3"]));
    fixture.feed(&[
        encode::stream_start(10, true),
        relation_of(Some(10), 1),
        insert(10),
        altered(11),
        encode::insert(Some(11), 1, &[text("1"), text("2")]),
        encode::stream_stop(),
        encode::stream_abort(10, 11),
        encode::stream_start(10, false),
        relation_of(Some(10), 1),
        insert(12),
        encode::stream_stop(),
        encode::stream_commit(10, Lsn(10), Lsn(18), 0),
        encode::stream_start(20, true),
        altered(20),
        encode::stream_stop(),
        begin(30),
        encode::insert(None, 1, &row(["4", "5", "6"])),
        commit(30),
        encode::stream_commit(20, Lsn(40), Lsn(48), 0),
        begin(50),
        encode::insert(None, 1, &[text("1"), text("2")]),
        commit(50),
    ]);
    fixture.flush();
    let said = fixture.said();
    assert_eq!(said[1], "insert t1(1,2,3)");
    assert_eq!(said[2], "insert t1(1,2,3)");
    assert_eq!(said[5], "insert t1(4,5,6)");
    assert!(said[8].starts_with("stop 1: column \"c\" was dropped"));
    assert_eq!(said.last().unwrap(), "idle 58");
}

#[test]
fn what_the_protocol_does_not_allow_is_an_error() {
    let insert = encode::insert(None, 1, &row(["1", "2", "3"]));
    let cases: &[&[Vec<u8>]] = &[
        &[commit(1)],
        std::slice::from_ref(&insert),
        &[relation_of(None, 1)],
        &[begin(1), begin(1)],
        &[begin(1), commit(2)],
        &[begin(1), insert.clone()],
        &[begin(1), encode::stream_start(1, true)],
        &[begin(1), encode::stream_commit(1, Lsn(1), Lsn(2), 0)],
        &[
            begin(1),
            relation_of(None, 1),
            encode::insert(None, 1, &[text("1")]),
        ],
        &[encode::stream_stop()],
        &[encode::stream_start(1, false)],
        &[encode::stream_start(1, true), encode::stream_start(2, true)],
        &[encode::stream_start(1, true), begin(1)],
        &[
            encode::stream_start(1, true),
            encode::stream_stop(),
            encode::stream_start(1, true),
        ],
        &[encode::stream_commit(1, Lsn(1), Lsn(2), 0)],
        &[b"?".to_vec()],
        &[vec![]],
    ];
    for messages in cases {
        let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
        let (last, before) = messages.split_last().unwrap();
        fixture.feed(before);
        assert!(fixture.try_feed(last).is_err(), "{messages:?}");
    }
    let mut fixture = fixture(CHUNK_BYTES_MAX, 0);
    for payload in [&b""[..], b"w", b"k", b"x", &[b'k'; 30], &[b'w'; 25]] {
        fixture
            .assembler
            .feed(payload, &mut |_| Ok(()))
            .unwrap_err();
        fixture
            .assembler
            .feed_cut(payload, &mut |_| Ok(()))
            .unwrap_err();
    }
}

#[test]
fn it_stops_when_the_engine_is_gone() {
    let mut assembler = fixture(CHUNK_BYTES_MAX, 0).assembler;
    let payload = encode::keepalive(Lsn(5), true);
    let error = assembler.feed(&payload, &mut |_| Err(Closed)).unwrap_err();
    assert!(matches!(error, Error::Closed(Closed)));
}

/// A random order of blocks, rollbacks and commits against a model that keeps lists.
#[test]
fn streamed_transactions_in_any_order_equal_a_model_that_keeps_lists() {
    let mut random = seeded();
    for _ in 0..150 {
        let memory_bytes_max = random.random_range(0..3_000);
        let mut fixture = fixture(random.random_range(300..3_000), memory_bytes_max);
        // Of each open transaction: its subtransactions so far, and who wrote what.
        let mut open: BTreeMap<u32, (u32, Vec<(u32, String)>)> = BTreeMap::new();
        let mut expected = Vec::new();
        let (mut xid, mut lsn, mut count) = (0, 0, 0);
        for _ in 0..200 {
            lsn += 10;
            let known: Vec<u32> = open.keys().copied().collect();
            let some = (!known.is_empty()).then(|| known[random.random_range(0..known.len())]);
            match (random.random_range(0..12), some) {
                (0, _) => {
                    count += 1;
                    let value = count.to_string();
                    fixture.feed(&[
                        begin(lsn),
                        relation_of(None, 1),
                        encode::insert(None, 1, &row([&value, "", ""])),
                        commit(lsn),
                    ]);
                    expected.push((lsn, vec![value]));
                }
                (1, Some(top)) => {
                    let (_, written) = open.remove(&top).unwrap();
                    fixture.feed(&[encode::stream_commit(top, Lsn(lsn), Lsn(lsn + 5), 0)]);
                    let values: Vec<_> = written.into_iter().map(|(_, value)| value).collect();
                    if !values.is_empty() {
                        expected.push((lsn, values));
                    }
                }
                (2, Some(top)) => {
                    open.remove(&top);
                    fixture.feed(&[encode::stream_abort(top, top)]);
                }
                (3, Some(top)) => {
                    let (subtransactions, written) = open.get_mut(&top).unwrap();
                    let gone = top + random.random_range(0..=*subtransactions);
                    if gone != top {
                        written.retain(|(by, _)| *by != gone);
                        fixture.feed(&[encode::stream_abort(top, gone)]);
                        // Ids are not used again.
                        *subtransactions += 1;
                    }
                }
                (kind, some) => {
                    let top = some.filter(|_| kind > 5).unwrap_or_else(|| {
                        xid += 1_000;
                        xid
                    });
                    let first = !open.contains_key(&top);
                    let (subtransactions, written) = open.entry(top).or_default();
                    fixture.feed(&[encode::stream_start(top, first), relation_of(Some(top), 1)]);
                    for _ in 0..random.random_range(0..5) {
                        *subtransactions += random.random_range(0..2);
                        let by = top + random.random_range(0..2) * *subtransactions;
                        count += 1;
                        let value = count.to_string();
                        fixture.feed(&[encode::insert(Some(by), 1, &row([&value, "", ""]))]);
                        written.push((by, value));
                    }
                    fixture.feed(&[encode::stream_stop()]);
                }
            }
        }
        let mut came: Vec<(u64, Vec<String>)> = Vec::new();
        let mut ended = true;
        for event in fixture.events.drain(..) {
            let Event::Chunk(chunk) = event else { continue };
            assert_eq!(chunk.first, ended);
            if chunk.first {
                came.push((chunk.commit_lsn.0, Vec::new()));
            }
            let (_, values_of) = came.last_mut().unwrap();
            values_of.extend(chunk.changes.iter().map(|change| match change {
                Change::Insert { new, .. } => values(new).replace(',', ""),
                other => panic!("{other:?}"),
            }));
            ended = chunk.end.is_some();
        }
        assert!(ended);
        assert_eq!(came, expected);
    }
}

#[test]
fn mutated_streams_never_panic() {
    let rounds: u32 = std::env::var("ANABRANCH_FUZZ_ROUNDS")
        .map_or(200_000, |rounds| rounds.parse().expect("a number"));
    let mut random = seeded();
    let changes = |xid| {
        vec![
            relation_of(xid, 1),
            relation_of(xid, 2),
            relation_of(xid, 3),
            encode::insert(xid, 1, &row(["1", "2", "3"])),
            encode::update(xid, 1, None, &[text("1"), Value::Unchanged, Value::Null]),
            encode::update(
                xid,
                2,
                Some((b'O', &row(["1", "2", "3"]))),
                &row(["4", "5", "6"]),
            ),
            encode::delete(xid, 1, b'K', &[text("1"), Value::Null, Value::Null]),
            encode::truncate(xid, 0, &[1, 2, 3]),
        ]
    };
    // A stream that makes sense, of which now and then a message is left out, repeated, or damaged.
    let mut stream = vec![encode::stream_start(9, true)];
    stream.extend(changes(Some(9)));
    stream.extend([encode::stream_stop(), begin(10)]);
    stream.extend(changes(None));
    stream.extend([
        commit(10),
        encode::stream_start(9, false),
        encode::insert(Some(10), 1, &row(["1", "2", "3"])),
        encode::stream_stop(),
        encode::stream_abort(9, 10),
        encode::stream_commit(9, Lsn(30), Lsn(38), 0),
    ]);
    let mut fixture = fixture(500, 300);
    let (mut fed, mut refused, mut events) = (0, 0, 0);
    while fed < rounds {
        for message in &stream {
            let mut message = message.clone();
            // Seldom: most damage ends the connection, and what comes later must be reached too.
            match random.random_range(0..500) {
                0 => continue,
                1 => drop(fixture.try_feed(&message)),
                2..8 => {
                    let at = random.random_range(0..message.len());
                    message[at] ^= 1 << random.random_range(0..8);
                }
                8 => message.truncate(random.random_range(0..=message.len())),
                9 => drop(
                    fixture
                        .assembler
                        .feed_cut(&encode::xlog_data(&message), &mut |_| Ok(())),
                ),
                _ => {}
            }
            fed += 1;
            if fixture.try_feed(&message).is_err() {
                refused += 1;
                fixture = self::fixture(500, 300);
                break;
            }
        }
        events += fixture.events.len();
        fixture.events.clear();
    }
    println!("{fed} fed, {refused} refused, {events} events");
    assert!(refused > 0, "nothing was damaged");
    assert!(events > refused, "hardly any transaction was reached");
}
