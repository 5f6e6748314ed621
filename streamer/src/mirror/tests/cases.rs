//! Single things that can go wrong.

use std::sync::Arc;

use anabranch_proto::{Epoch, Lsn, Position};
use bytes::Bytes;

use super::model::{Value, decode, encode, table};
use crate::{
    catchup::{Catchup, Item, Round, View},
    delta::Op,
    lookup,
    mirror::{Applied, Error, Key, Keys, Mirror, NETS_BYTES_MAX, Settings, State},
    table::{Identity, Kind, Oid, Table},
    transaction::{Change, Chunk, End, Old},
};

const EPOCH: Epoch = Epoch(7);

pub(super) fn settings(directory: &tempfile::TempDir) -> Settings {
    Settings {
        directory: directory.path().into(),
        cache_bytes: 1 << 20,
        reader_cache_bytes: 1 << 20,
        index_bytes_max: u64::MAX,
        index_hours_max: 24,
        row_bytes_max: 2 << 20,
    }
}

pub(super) fn simple(oid: Oid) -> Arc<Table> {
    table(
        oid,
        &[
            ("id", Kind::Integer),
            ("grp", Kind::Integer),
            ("v", Kind::Text),
        ],
        &[0],
        Identity::Key,
    )
}

fn row(id: i64, v: &str) -> Bytes {
    encode(&[Value::Integer(id), Value::Integer(1), Value::Text(v.into())])
}

/// A mirror at LSN 100 with the tables 1 and 2, of ids 0 to 9 each.
fn mirror(settings: &Settings) -> Mirror {
    let mut mirror = Mirror::open(settings).unwrap();
    for oid in [1, 2] {
        mirror.begin_copy(&simple(oid)).unwrap();
        let rows: Vec<Bytes> = (0..10).map(|id| row(id, "copied")).collect();
        mirror.copy_rows(oid, &rows).unwrap();
        mirror.end_copy(oid, Lsn(100)).unwrap();
    }
    mirror.begin_epoch(EPOCH, None, Lsn(100)).unwrap();
    mirror
}

fn chunk(lsn: u64, changes: Vec<Change>) -> Chunk {
    Chunk {
        changes,
        bytes: 0,
        first: true,
        commit_lsn: Lsn(lsn - 1),
        end: Some(End {
            lsn: Lsn(lsn),
            commit_time: 0,
        }),
    }
}

fn insert(oid: Oid, new: Bytes) -> Change {
    Change::Insert {
        table: simple(oid),
        new,
    }
}

fn update(oid: Oid, new: Bytes) -> Change {
    Change::Update {
        table: simple(oid),
        old: None,
        new,
        unchanged: Vec::new(),
    }
}

fn delete(oid: Oid, id: i64) -> Change {
    Change::Delete {
        table: simple(oid),
        old: Old::Identity(encode(&[Value::Integer(id)])),
    }
}

fn at(lsn: u64) -> Position {
    Position {
        epoch: EPOCH,
        lsn: Lsn(lsn),
    }
}

/// What a new reader sees of a table: ids and values.
fn content(mirror: &Mirror, oid: Oid) -> Vec<(i64, String)> {
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    let mut rows = Vec::new();
    reader
        .scan(
            oid,
            Keys {
                after: None,
                upto: None,
            },
            |_, row| {
                let [Value::Integer(id), _, Value::Text(v)] = &decode(&row)[..] else {
                    panic!()
                };
                rows.push((*id, v.clone()));
                Ok(true)
            },
        )
        .unwrap();
    rows
}

fn reaches(mirror: &Mirror, oid: Oid, from: Position) -> bool {
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    reader.reaches(oid, from).unwrap()
}

struct All(Arc<Table>);

impl View for All {
    fn table(&self) -> &Arc<Table> {
        &self.0
    }
    fn contains(&self, _: &[u8], _: &dyn lookup::Lookup) -> Result<bool, lookup::Error> {
        Ok(true)
    }
    fn project(&self, row: &Bytes) -> Result<Bytes, anabranch_proto::record::Malformed> {
        Ok(row.clone())
    }
}

fn item(oid: Oid, from: Option<Position>) -> Item {
    Item {
        view: Arc::new(All(simple(oid))),
        from,
    }
}

#[test]
fn a_second_streamer_on_the_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let first = mirror(&settings(&directory));
    assert!(matches!(
        Mirror::open(&settings(&directory)),
        Err(Error::InUse(_))
    ));
    drop(first);
    Mirror::open(&settings(&directory)).unwrap();
}

#[test]
fn a_file_that_is_newer_or_not_ours_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(mirror(&settings(&directory)));
    let file = directory.path().join("mirror.db");
    let sqlite = rusqlite::Connection::open(&file).unwrap();
    sqlite.pragma_update(None, "user_version", 2).unwrap();
    assert!(matches!(
        Mirror::open(&settings(&directory)),
        Err(Error::Damaged(_))
    ));
    sqlite.pragma_update(None, "user_version", 1).unwrap();
    sqlite.pragma_update(None, "application_id", 1).unwrap();
    assert!(matches!(
        Mirror::open(&settings(&directory)),
        Err(Error::Damaged(_))
    ));
    sqlite
        .pragma_update(None, "application_id", 0x416E_6162)
        .unwrap();
    assert_eq!(
        content(&Mirror::open(&settings(&directory)).unwrap(), 1).len(),
        10
    );
}

#[test]
fn facts_survive_a_kill_and_clear_forgets_all() {
    let directory = tempfile::tempdir().unwrap();
    let mut one = mirror(&settings(&directory));
    one.set_facts(&[("slot", Some("anabranch")), ("nonce", Some("1"))])
        .unwrap();
    one.set_facts(&[("nonce", None), ("slot", Some("other"))])
        .unwrap();
    one.apply(&chunk(200, vec![insert(1, row(50, "lost"))]))
        .unwrap();
    drop(one);
    let mut one = Mirror::open(&settings(&directory)).unwrap();
    assert_eq!(one.fact("slot").unwrap().as_deref(), Some("other"));
    assert_eq!(one.fact("nonce").unwrap(), None);
    assert_eq!(one.position(), at(100));
    one.apply(&chunk(200, vec![insert(1, row(50, "new"))]))
        .unwrap();
    one.clear().unwrap();
    assert_eq!(one.position(), Position::default());
    assert!(one.tables().is_empty());
    drop(one);
    let one = mirror(&settings(&directory));
    assert_eq!(one.fact("slot").unwrap(), None);
    assert_eq!(content(&one, 1).len(), 10);
}

#[test]
fn nobody_sees_an_open_group_or_half_a_large_transaction() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    let before = content(&mirror, 1);
    mirror.apply(&chunk(200, vec![delete(1, 0)])).unwrap();
    assert_eq!(content(&mirror, 1), before);
    assert_eq!((mirror.position(), mirror.durable()), (at(200), at(100)));
    mirror.commit().unwrap();
    assert_eq!(mirror.durable(), at(200));
    let before = content(&mirror, 1);
    assert_eq!(before.len(), 9);
    let mut part = chunk(300, vec![delete(1, 1)]);
    part.end = None;
    mirror.apply_part(&part).unwrap();
    assert_eq!(content(&mirror, 1), before);
    let end = End {
        lsn: Lsn(300),
        commit_time: 0,
    };
    assert_eq!(mirror.end_large(end).unwrap().large, [1]);
    assert_eq!(content(&mirror, 1).len(), 8);
    assert_eq!(mirror.durable(), at(300));
}

#[test]
fn a_transaction_above_the_limits_becomes_large() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.nets_max = 9;
    let applied = mirror
        .apply(&chunk(
            200,
            vec![
                update(2, row(3, "changed")),
                Change::Truncate { table: simple(1) },
            ],
        ))
        .unwrap();
    assert!(applied.nets.is_empty());
    assert_eq!(applied.large, [1, 2]);
    // Few bytes of keys that name many bytes of rows.
    mirror.nets_max = 1000;
    let big = "x".repeat(1 << 20);
    let rows = NETS_BYTES_MAX as i64 / (1 << 20) + 1;
    for id in 0..rows {
        let inserted = mirror
            .apply(&chunk(300 + id as u64, vec![insert(1, row(id, &big))]))
            .unwrap();
        assert_eq!(inserted.nets.len(), 1);
    }
    let some = mirror
        .apply(&chunk(1000, (0..3).map(|id| delete(1, id)).collect()))
        .unwrap();
    assert_eq!((some.nets.len(), some.large.len()), (3, 0));
    let all = mirror
        .apply(&chunk(
            1001,
            (3..rows)
                .map(|id| delete(1, id))
                .chain([delete(2, 0)])
                .collect(),
        ))
        .unwrap();
    assert_eq!(all.nets.len(), rows as usize - 2);
    mirror.commit().unwrap();
    assert_eq!(content(&mirror, 1), []);

    for id in 0..rows {
        mirror
            .apply(&chunk(2000 + id as u64, vec![insert(1, row(id, &big))]))
            .unwrap();
    }
    let all = mirror
        .apply(&chunk(3001, (0..rows).map(|id| delete(1, id)).collect()))
        .unwrap();
    assert_eq!((all.nets.len(), &all.large[..]), (0, &[1][..]));
}

#[test]
fn a_table_that_stops_takes_back_its_part_of_the_transaction_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    let before = content(&mirror, 1);
    let broken = |lsn| {
        chunk(
            lsn,
            vec![
                update(1, row(3, "gone")),
                delete(1, 4),
                delete(2, lsn as i64 / 100),
                delete(1, 777),
                insert(1, row(99, "late")),
            ],
        )
    };
    let check = |mirror: &mut Mirror, applied: Applied, lsn| {
        let [(1, reason)] = &applied.stopped[..] else {
            panic!("{applied:?}")
        };
        assert!(
            reason.contains("DELETE") && !reason.contains("777"),
            "{reason}"
        );
        mirror.commit().unwrap();
        assert_eq!(content(mirror, 1), before);
        assert!(
            matches!(mirror.tables()[0].state, State::Stopped { lsn: at, .. } if at == Lsn(lsn))
        );
        assert_eq!(mirror.tables()[1].state, State::Live);
    };
    let applied = mirror.apply(&broken(200)).unwrap();
    assert_eq!(applied.nets.len(), 1);
    check(&mut mirror, applied, 200);
    // It stays as it is until it is copied again.
    assert_eq!(
        mirror.apply(&chunk(300, vec![delete(1, 0)])).unwrap().nets,
        []
    );
    mirror.begin_copy(&simple(1)).unwrap();
    let rows: Vec<Bytes> = before.iter().map(|(id, v)| row(*id, v)).collect();
    mirror.copy_rows(1, &rows).unwrap();
    mirror.end_copy(1, Lsn(300)).unwrap();
    mirror.apply_part(&broken(400)).unwrap();
    let applied = mirror.end_large(broken(400).end.unwrap()).unwrap();
    assert_eq!(applied.large, [2]);
    check(&mut mirror, applied, 400);
    assert_eq!(content(&mirror, 2).len(), 8);
    mirror.stop_table(2, "its schema changed").unwrap();
    mirror.commit().unwrap();
    drop(mirror);
    let mirror = Mirror::open(&settings(&directory)).unwrap();
    assert!(
        mirror
            .tables()
            .iter()
            .all(|entry| matches!(entry.state, State::Stopped { .. }))
    );
}

#[test]
fn a_copy_that_was_cut_off_is_told_and_one_with_a_bad_row_stops_empty() {
    let directory = tempfile::tempdir().unwrap();
    let mut one = mirror(&settings(&directory));
    one.begin_copy(&simple(3)).unwrap();
    one.copy_rows(3, &[row(1, "a")]).unwrap();
    drop(one);
    let mut one = Mirror::open(&settings(&directory)).unwrap();
    assert_eq!(one.tables()[2].state, State::Copying);
    assert_eq!(one.tables()[0].state, State::Live);
    assert!(!reaches(&one, 3, at(100)));
    let mut reader = one.reader().unwrap();
    reader.begin().unwrap();
    let early = Catchup::new(vec![item(3, None)]).round(&mut reader, 1000, &mut |_, _| panic!());
    assert!(matches!(early, Err(Error::NotReady(_))));
    reader.end();

    for bad in [
        row(2, &"x".repeat(3 << 20)),
        row(1, "again"),
        Bytes::from_static(b"\x09"),
    ] {
        one.begin_copy(&simple(3)).unwrap();
        one.copy_rows(3, &[row(1, "a")]).unwrap();
        one.copy_rows(3, &[row(5, "b"), bad]).unwrap();
        one.copy_rows(3, &[row(6, "c")]).unwrap();
        one.end_copy(3, Lsn(100)).unwrap();
        assert!(matches!(one.tables()[2].state, State::Stopped { .. }));
        assert_eq!(content(&one, 3), []);
    }
    one.drop_table(3).unwrap();
    assert_eq!(one.tables().len(), 2);
}

#[test]
fn changes_that_the_copy_has_are_skipped_and_a_copy_from_the_past_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.begin_copy(&simple(3)).unwrap();
    mirror.copy_rows(3, &[row(1, "a"), row(2, "b")]).unwrap();
    mirror
        .apply(&chunk(200, vec![insert(3, row(2, "b"))]))
        .unwrap();
    assert!(matches!(
        mirror.end_copy(3, Lsn(199)),
        Err(Error::Misused(_))
    ));
    mirror.end_copy(3, Lsn(300)).unwrap();
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    let early = Catchup::new(vec![item(3, None)]).round(&mut reader, 1000, &mut |_, _| panic!());
    assert!(
        matches!(early, Err(Error::NotReady(_))),
        "its rows are ahead of the position"
    );
    assert_eq!(
        mirror
            .apply(&chunk(300, vec![insert(3, row(1, "a"))]))
            .unwrap()
            .nets,
        []
    );
    assert_eq!(
        mirror
            .apply(&chunk(301, vec![delete(3, 1)]))
            .unwrap()
            .nets
            .len(),
        1
    );
    mirror.commit().unwrap();
    assert_eq!(content(&mirror, 3), [(2, "b".into())]);
    assert!(!reaches(&mirror, 3, at(299)));
    assert!(reaches(&mirror, 3, at(300)));
}

#[test]
fn other_epochs_holes_and_what_was_trimmed_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(&directory);
    settings.index_bytes_max = 30_000;
    let mut mirror = mirror(&settings);
    assert!(reaches(&mirror, 1, at(100)) && reaches(&mirror, 1, at(170)));
    assert!(!reaches(&mirror, 1, at(99)));
    assert!(!reaches(
        &mirror,
        1,
        Position {
            epoch: Epoch(6),
            lsn: Lsn(100)
        }
    ));
    assert!(!reaches(&mirror, 9, at(100)));
    mirror.apply(&chunk(200, vec![delete(1, 1)])).unwrap();
    mirror.commit().unwrap();
    mirror.begin_epoch(EPOCH, None, Lsn(300)).unwrap();
    assert!(reaches(&mirror, 1, at(200)) && reaches(&mirror, 1, at(300)));
    assert!(!reaches(&mirror, 1, at(201)) && !reaches(&mirror, 1, at(299)));
    mirror
        .begin_epoch(Epoch(8), Some(at(250)), Lsn(250))
        .unwrap();
    let of_new = |lsn| Position {
        epoch: Epoch(8),
        lsn: Lsn(lsn),
    };
    assert!(!reaches(&mirror, 1, at(250)) && !reaches(&mirror, 1, of_new(249)));
    assert!(reaches(&mirror, 1, of_new(250)));

    let value = "x".repeat(500);
    for n in 0..200 {
        mirror
            .apply(&chunk(
                1000 + n,
                vec![update(1, row(2, &format!("{value}{n}")))],
            ))
            .unwrap();
        mirror.commit().unwrap();
    }
    let bytes: i64 = mirror
        .sqlite
        .query_row("SELECT sum(bytes) FROM segment", [], |row| row.get(0))
        .unwrap();
    assert!(bytes <= 30_000 && bytes > 20_000, "{bytes}");
    assert!(!reaches(&mirror, 1, of_new(250)) && !reaches(&mirror, 1, of_new(1100)));
    assert!(reaches(&mirror, 1, of_new(1190)));
    // All of it is reached that is said to be.
    let lowest = (1000..1200)
        .find(|lsn| reaches(&mirror, 1, of_new(*lsn)))
        .unwrap();
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    let mut ops = Vec::new();
    let mut catchup = Catchup::new(vec![item(1, Some(of_new(lowest)))]);
    assert_eq!(
        catchup
            .round(&mut reader, 1 << 20, &mut |_, op| ops.push(op))
            .unwrap(),
        Round::Complete(of_new(1199))
    );
    assert_eq!(ops, [Op::Upsert(row(2, &format!("{value}199")))]);
    reader.end();
    // By age, too: a day later nothing is left but the last transactions.
    let day = |lsn, day: i64| {
        let mut chunk = chunk(lsn, vec![update(1, row(2, &format!("{lsn}")))]);
        chunk.end = Some(End {
            lsn: Lsn(lsn),
            commit_time: day * 86_400_000_000,
        });
        chunk
    };
    for n in 0..6u64 {
        mirror.apply(&day(2000 + n, n as i64)).unwrap();
        mirror.commit().unwrap();
    }
    assert!(!reaches(&mirror, 1, of_new(1199)) && reaches(&mirror, 1, of_new(2004)));
    // What a new process finds is the same.
    drop(mirror);
    let mirror = Mirror::open(&settings).unwrap();
    assert!(!reaches(&mirror, 1, of_new(1199)) && reaches(&mirror, 1, of_new(2004)));
}

#[test]
fn a_catch_up_whose_history_goes_away_must_start_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(&directory);
    settings.index_bytes_max = 10_000;
    let mut mirror = mirror(&settings);
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    let mut catchup = Catchup::new(vec![item(1, None)]);
    assert_eq!(
        catchup.round(&mut reader, 1, &mut |_, _| ()).unwrap(),
        Round::More
    );
    reader.end();
    for n in 0..100 {
        mirror
            .apply(&chunk(
                1000 + n,
                vec![update(1, row(2, &"x".repeat(500 + n as usize)))],
            ))
            .unwrap();
        mirror.commit().unwrap();
    }
    reader.begin().unwrap();
    assert!(matches!(
        catchup.round(&mut reader, 1, &mut |_, _| panic!()),
        Err(Error::OutOfReach(_))
    ));
    let mut catchup = Catchup::new(vec![item(1, Some(at(5000)))]);
    assert!(matches!(
        catchup.round(&mut reader, 1, &mut |_, _| panic!()),
        Err(Error::Ahead { .. })
    ));
    reader.end();

    for what in ["copied again", "a hole", "cleared"] {
        let mut catchup = Catchup::new(vec![item(2, None)]);
        reader.begin().unwrap();
        assert_eq!(
            catchup.round(&mut reader, 1, &mut |_, _| ()).unwrap(),
            Round::More
        );
        reader.end();
        let lsn = Lsn(mirror.position().lsn.0 + 10);
        match what {
            "copied again" => {
                mirror.begin_copy(&simple(2)).unwrap();
                mirror.copy_rows(2, &[row(1, "a"), row(2, "b")]).unwrap();
                mirror.end_copy(2, lsn).unwrap();
                mirror.advance(lsn).unwrap();
                mirror.commit().unwrap();
            }
            "a hole" => mirror.begin_epoch(EPOCH, None, lsn).unwrap(),
            _ => {
                mirror.clear().unwrap();
                mirror.begin_copy(&simple(2)).unwrap();
                mirror.end_copy(2, Lsn(0)).unwrap();
            }
        }
        reader.begin().unwrap();
        let round = catchup.round(&mut reader, 1000, &mut |_, _| panic!());
        assert!(
            matches!(round, Err(Error::OutOfReach(_))),
            "{what}: {round:?}"
        );
        reader.end();
    }
}

/// A replica that took rows while the mirror was filled, and came back when the table had been copied anew.
#[test]
fn a_catch_up_does_not_go_on_from_the_first_copy_in_a_later_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = Mirror::open(&settings(&directory)).unwrap();
    mirror.sample_rows = 1;
    mirror.begin_copy(&simple(1)).unwrap();
    mirror.copy_rows(1, &[row(1, "a"), row(2, "b")]).unwrap();
    let mut reader = mirror.reader().unwrap();
    let mut catchup = Catchup::new(vec![item(1, None)]);
    reader.begin().unwrap();
    let mut given = 0;
    let round = catchup.round(&mut reader, 1000, &mut |_, _| given += 1);
    assert_eq!((round.unwrap(), given), (Round::Filling, 2));
    reader.end();

    mirror.end_copy(1, Lsn(100)).unwrap();
    mirror.begin_epoch(EPOCH, None, Lsn(100)).unwrap();
    // No entry of the change index tells that row 1 is gone and row 2 another.
    mirror.begin_copy(&simple(1)).unwrap();
    mirror.copy_rows(1, &[row(2, "c")]).unwrap();
    mirror.end_copy(1, Lsn(200)).unwrap();
    mirror.advance(Lsn(200)).unwrap();
    mirror.commit().unwrap();
    reader.begin().unwrap();
    let round = catchup.round(&mut reader, 1000, &mut |_, _| panic!());
    assert!(matches!(round, Err(Error::OutOfReach(_))), "{round:?}");
}

#[test]
fn a_row_that_changes_all_the_time_does_not_keep_a_catch_up_from_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    let mut reader = mirror.reader().unwrap();
    let mut catchup = Catchup::new(vec![item(1, None), item(2, None)]);
    let mut given = 0;
    let rounds = (0..)
        .find(|n| {
            mirror
                .apply(&chunk(
                    1000 + n,
                    vec![
                        update(1, row(0, &format!("{n}"))),
                        update(2, row(9, &format!("{n}"))),
                    ],
                ))
                .unwrap();
            mirror.commit().unwrap();
            reader.begin().unwrap();
            // Two rows a round, and two change each round.
            let round = catchup
                .round(&mut reader, 60, &mut |_, _| given += 1)
                .unwrap();
            reader.end();
            assert!(*n < 100);
            matches!(round, Round::Complete(_))
        })
        .unwrap();
    assert!(rounds >= 5, "it took rounds at all");
    assert!(given <= 40, "hot rows were sent again and again: {given}");
}

#[test]
fn a_full_disk_undoes_the_group_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.apply(&chunk(200, vec![delete(1, 0)])).unwrap();
    mirror.commit().unwrap();
    let before = content(&mirror, 1);
    let pages: i64 = mirror
        .sqlite
        .pragma_query_value(None, "page_count", |row| row.get(0))
        .unwrap();
    let limit = |mirror: &Mirror, pages: i64| {
        let set: i64 = mirror
            .sqlite
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| {
                row.get(0)
            })
            .unwrap();
        assert!(set >= pages);
    };
    limit(&mirror, pages + 3);
    mirror.apply(&chunk(300, vec![delete(1, 1)])).unwrap();
    let big = chunk(
        400,
        (100..110)
            .map(|id| insert(1, row(id, &"x".repeat(10_000))))
            .collect(),
    );
    assert!(matches!(mirror.apply(&big), Err(Error::Sqlite(_))));
    assert_eq!(
        (mirror.position(), mirror.durable(), mirror.is_open()),
        (at(200), at(200), false)
    );
    assert_eq!(content(&mirror, 1), before);
    assert!(matches!(mirror.apply_part(&big), Err(Error::Sqlite(_))));
    assert_eq!(mirror.position(), at(200));
    assert!(matches!(
        mirror.end_large(big.end.unwrap()),
        Err(Error::Misused(_))
    ));
    // Space returns, and Postgres sends it again.
    limit(&mirror, 1_000_000);
    mirror.apply(&chunk(300, vec![delete(1, 1)])).unwrap();
    assert_eq!(mirror.apply(&big).unwrap().nets.len(), 10);
    mirror.commit().unwrap();
    assert_eq!(content(&mirror, 1).len(), 18);
    assert!(reaches(&mirror, 1, at(100)));
}

#[test]
fn keys_of_the_mirror_order_as_sqlite_orders_them() {
    let text = |text: &str| Key::Record(encode(&[Value::Text(text.into())]));
    for keys in [
        vec![
            Key::Integer(i64::MIN),
            Key::Integer(-1),
            Key::Integer(0),
            Key::Integer(300),
            Key::Integer(i64::MAX),
        ],
        vec![
            text(""),
            text("a"),
            text("ab"),
            text("b"),
            text(&"a".repeat(200)),
        ],
    ] {
        let sqlite = rusqlite::Connection::open_in_memory().unwrap();
        sqlite
            .execute_batch("CREATE TABLE t(k PRIMARY KEY) WITHOUT ROWID")
            .unwrap();
        for key in &keys {
            sqlite.execute("INSERT INTO t VALUES(?1)", [key]).unwrap();
        }
        let found: Vec<Key> = sqlite
            .prepare("SELECT k FROM t ORDER BY k")
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let mut sorted = keys;
        sorted.sort();
        assert_eq!(found, sorted);
    }
}
