//! Secondary indexes, and lookups by them in the three states: single things that can go wrong. (What random histories
//! do to them is in `driver`, with what is here under `probe`.)

use std::cell::Cell;

use anabranch_proto::{Epoch, Lsn};
use bytes::Bytes;
use rusqlite::Connection;

use super::{
    cases::{settings, simple},
    model::{Row, Value, decode, encode, table},
};
use crate::{
    lookup::{self, Index, Lookup, Part, push},
    mirror::{
        Applied, Error, Key, Mirror, Place, Reader, Settings, State,
        lookup::{Range, now_sql},
        past::{changed_sql, unchanged_sql},
    },
    shape::{Reading, Zone},
    table::{Identity, Kind, Oid, Table},
    transaction::{Change, Chunk, End, Old},
};

fn row(id: i64, grp: Option<i64>, v: &str) -> Bytes {
    let grp = grp.map_or(Value::Null, Value::Integer);
    encode(&[Value::Integer(id), grp, Value::Text(v.into())])
}

fn index(oid: Oid, parts: &[(usize, Reading)]) -> Index {
    let part = |(column, reading): &(usize, Reading)| Part {
        column: *column,
        reading: reading.clone(),
    };
    Index {
        table: oid,
        parts: parts.iter().map(part).collect(),
    }
}

fn by_grp(oid: Oid) -> Index {
    index(oid, &[(1, Reading::Integer)])
}

fn by_v_and_grp(oid: Oid) -> Index {
    index(oid, &[(2, Reading::Bytes), (1, Reading::Integer)])
}

fn grp(grp: Option<i64>) -> Vec<u8> {
    let mut key = Vec::new();
    push(&mut key, grp.map(crate::shape::Value::Integer));
    key
}

/// The rows 0 to 9, of group `id % 3`.
fn copy(mirror: &mut Mirror, oid: Oid, at: u64) {
    mirror.begin_copy(&simple(oid)).unwrap();
    let rows: Vec<Bytes> = (0..10).map(|id| row(id, Some(id % 3), "copied")).collect();
    mirror.copy_rows(oid, &rows).unwrap();
    mirror.end_copy(oid, Lsn(at)).unwrap();
}

/// A mirror at LSN 100 with the tables 1 and 2.
fn mirror(settings: &Settings) -> Mirror {
    let mut mirror = Mirror::open(settings).unwrap();
    for oid in [1, 2] {
        copy(&mut mirror, oid, 100);
    }
    mirror.begin_epoch(Epoch(7), None, Lsn(100)).unwrap();
    mirror
}

fn apply(mirror: &mut Mirror, lsn: u64, changes: Vec<Change>) -> Applied {
    let chunk = Chunk {
        changes,
        bytes: 0,
        first: true,
        commit_lsn: Lsn(lsn - 1),
        end: Some(End {
            lsn: Lsn(lsn),
            commit_time: 0,
        }),
    };
    mirror.apply(&chunk).unwrap()
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

/// The first column of what is found, ascending.
fn ids(state: &dyn Lookup, index: &Index, prefix: &[u8]) -> Result<Vec<i64>, lookup::Error> {
    let mut ids = Vec::new();
    state.rows(index, prefix, &mut |row| {
        let Value::Integer(id) = decode(row)[0] else {
            panic!("an id that is no integer")
        };
        ids.push(id);
        Ok(true)
    })?;
    ids.sort_unstable();
    Ok(ids)
}

#[track_caller]
fn finds(state: &dyn Lookup, group: Option<i64>, expect: &[i64]) {
    assert_eq!(ids(state, &by_grp(1), &grp(group)).unwrap(), expect);
}

/// The indexes that the file has.
fn made(sqlite: &Connection) -> Vec<String> {
    sqlite
        .prepare("SELECT name FROM sqlite_schema WHERE name LIKE 'index%' ORDER BY name")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

/// A list of all that changed after `since`, with the old rows of these tables.
fn collect(reader: &mut Reader, list: u64, since: i64, past: &[Index]) -> Result<(), Error> {
    let mut place = Place {
        ordinal: since,
        entry: None,
    };
    while let Some(next) = reader.collect(list, &[], past, &place, 2)? {
        place = next;
    }
    Ok(())
}

#[test]
fn indexes_are_those_that_are_wanted_whatever_is_copied_when() {
    let directory = tempfile::tempdir().unwrap();
    let mut one = Mirror::open(&settings(&directory)).unwrap();
    // Nothing is there yet.
    one.set_indexes(&[by_grp(1), by_v_and_grp(1), by_grp(2), index(2, &[])])
        .unwrap();
    assert!(made(&one.sqlite).is_empty());
    one.begin_copy(&simple(1)).unwrap();
    one.set_indexes(&[by_grp(1), by_v_and_grp(1), by_grp(2)])
        .unwrap();
    assert!(made(&one.sqlite).is_empty(), "made while it is copied");
    copy(&mut one, 1, 100);
    assert_eq!(made(&one.sqlite), ["index_1_1i", "index_1_2b_1i"]);
    copy(&mut one, 2, 100);
    one.begin_epoch(Epoch(7), None, Lsn(100)).unwrap();
    let all = ["index_1_1i", "index_1_2b_1i", "index_2_1i"];
    assert_eq!(made(&one.sqlite), all);
    finds(&one.now(), Some(1), &[1, 4, 7]);
    // Copied again, they come back.
    one.begin_copy(&simple(1)).unwrap();
    assert_eq!(made(&one.sqlite), ["index_2_1i"]);
    copy(&mut one, 1, 100);
    assert_eq!(made(&one.sqlite), all);
    // After a restart they are there, and what is wanted then decides.
    drop(one);
    let mut one = Mirror::open(&settings(&directory)).unwrap();
    assert_eq!(made(&one.sqlite), all);
    finds(&one.now(), Some(1), &[1, 4, 7]);
    let version = |one: &Mirror| {
        let version = one
            .sqlite
            .pragma_query_value(None, "schema_version", |row| row.get::<_, i64>(0));
        version.unwrap()
    };
    let before = version(&one);
    one.set_indexes(&[by_grp(2), by_grp(1), by_v_and_grp(1)])
        .unwrap();
    assert_eq!(version(&one), before, "made again without a need");
    one.set_indexes(&[by_v_and_grp(2), by_grp(1), by_grp(1)])
        .unwrap();
    assert_eq!(made(&one.sqlite), ["index_1_1i", "index_2_2b_1i"]);
    one.drop_table(2).unwrap();
    assert_eq!(made(&one.sqlite), ["index_1_1i"]);
    copy(&mut one, 2, 100);
    assert_eq!(made(&one.sqlite), ["index_1_1i", "index_2_2b_1i"]);
    one.clear().unwrap();
    assert!(made(&one.sqlite).is_empty());
    copy(&mut one, 1, 100);
    assert_eq!(made(&one.sqlite), ["index_1_1i"]);
    one.set_indexes(&[]).unwrap();
    assert!(made(&one.sqlite).is_empty());
}

#[test]
fn an_index_that_cannot_be_is_refused_and_the_others_stay() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1)]).unwrap();
    for wrong in [
        index(1, &[(1, Reading::Float)]),
        index(1, &[(3, Reading::Integer)]),
    ] {
        let refused = mirror.set_indexes(&[by_grp(2), wrong]);
        assert!(matches!(refused, Err(Error::Misused(_))));
    }
    // The rows have texts there.
    let refused = mirror.set_indexes(&[by_grp(2), index(1, &[(2, Reading::Date)])]);
    assert!(matches!(refused, Err(Error::Sqlite(_))));
    assert_eq!(made(&mirror.sqlite), ["index_1_1i"]);
    apply(&mut mirror, 110, vec![delete(1, 4)]);
    finds(&mirror.now(), Some(1), &[1, 7]);
    assert!(
        ids(&mirror.now(), &by_grp(2), &grp(None)).is_err(),
        "a lookup by what is not there is no scan"
    );
}

#[test]
fn lookups_search_and_do_not_scan() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    let index = by_v_and_grp(1);
    let indexes = std::slice::from_ref(&index);
    mirror.set_indexes(indexes).unwrap();
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    collect(&mut reader, 1, 0, indexes).unwrap();
    let plan = |sqlite: &Connection, sql: &str| {
        let mut statement = sqlite
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .unwrap();
        let mut lines = statement.raw_query();
        let mut plan: Vec<String> = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            plan.push(line.get(3).unwrap());
        }
        plan
    };
    let prefix = grp(Some(1));
    let range = Range::new(&prefix).unwrap();
    let by = "USING INDEX index_1_2b_1i (<expr>>? AND <expr><?)";
    assert_eq!(
        plan(&mirror.sqlite, &now_sql(&index, &range)),
        [format!("SEARCH rows_1 {by}")]
    );
    assert_eq!(
        plan(reader.sqlite(), &unchanged_sql(&index, &range)),
        [
            format!("SEARCH now {by}"),
            "CORRELATED SCALAR SUBQUERY 1".into(),
            "SEARCH c USING PRIMARY KEY (tbl=? AND k=? AND txn>?)".into()
        ]
    );
    let sql = changed_sql(&index);
    for (sql, by) in [
        (sql.key, "<expr>>? AND <expr><?"),
        (sql.row, "<expr>=? AND k>?"),
        (sql.entry, "<expr>=? AND k=? AND txn>?"),
    ] {
        let [only] = &plan(reader.sqlite(), &sql)[..] else {
            panic!("{sql} takes more than a search")
        };
        // The key alone is in the index.
        let only = only.replace(" COVERING", "");
        assert_eq!(
            only,
            format!("SEARCH temp.past_1 USING INDEX past_1_2b_1i ({by})")
        );
    }
    assert_eq!(
        plan(reader.sqlite(), &sql.first).last().unwrap(),
        "SEARCH temp.changed USING PRIMARY KEY (tbl=? AND k=? AND txn>? AND txn<?)"
    );
}

#[test]
fn a_row_that_has_no_key_in_an_index_stops_its_table_and_not_the_mirror() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1), by_grp(2)]).unwrap();
    let text = |id| encode(&[Value::Integer(id), Value::Text("1".into()), Value::Null]);
    let changes = vec![delete(1, 4), insert(1, text(20)), delete(2, 4)];
    let applied = apply(&mut mirror, 110, changes);
    assert_eq!(applied.stopped.len(), 1);
    assert_eq!(applied.stopped[0].0, 1);
    assert_eq!(applied.nets.len(), 1);
    finds(&mirror.now(), Some(1), &[1, 4, 7]);
    assert_eq!(
        ids(&mirror.now(), &by_grp(2), &grp(Some(1))).unwrap(),
        [1, 7]
    );
    // In a copy as well: with the index it would never end.
    mirror.begin_copy(&simple(1)).unwrap();
    mirror
        .copy_rows(1, &[row(1, None, "good"), text(2)])
        .unwrap();
    mirror.end_copy(1, Lsn(110)).unwrap();
    assert!(matches!(mirror.tables()[0].state, State::Stopped { .. }));
    finds(&mirror.now(), None, &[]);
}

#[test]
fn a_program_without_the_function_reads_and_is_refused_where_it_writes() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1)]).unwrap();
    let other = Connection::open(directory.path().join("mirror.db")).unwrap();
    let count = |sqlite: &Connection| -> i64 {
        let count = sqlite.query_row("SELECT count(*) FROM rows_1", [], |row| row.get(0));
        count.unwrap()
    };
    assert_eq!(count(&other), 10);
    let busy: i64 = other
        .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get(0))
        .unwrap();
    assert_eq!(busy, 0);
    let refused = other.execute("DELETE FROM rows_1 WHERE k = 1", []);
    assert!(refused.unwrap_err().to_string().contains("anabranch_key"));
    assert_eq!(count(&other), 10);
}

#[test]
fn a_transaction_is_looked_behind_also_from_within_a_lookup() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1), by_v_and_grp(1)]).unwrap();
    apply(&mut mirror, 110, vec![delete(1, 7)]);
    let applied = apply(
        &mut mirror,
        120,
        vec![
            delete(1, 4),
            insert(1, row(20, Some(1), "new")),
            update(1, row(0, Some(1), "came")),
            update(1, row(1, None, "left")),
        ],
    );
    let (now, before) = (mirror.now(), mirror.before(&applied.nets));
    finds(&now, Some(1), &[0, 20]);
    finds(&before, Some(1), &[1, 4]);
    finds(&now, None, &[1]);
    finds(&before, None, &[]);
    finds(&before, Some(0), &[0, 3, 6, 9]);
    let all: Vec<i64> = (0..10).filter(|id| *id != 7).collect();
    assert_eq!(ids(&before, &index(1, &[]), &[]).unwrap(), all);
    assert_eq!(ids(&before, &by_grp(1), &[]).unwrap(), all);
    // The same lookup for each row that it gives.
    let inner = Cell::new(0);
    before
        .rows(&by_grp(1), &grp(Some(1)), &mut |_| {
            finds(&before, Some(1), &[1, 4]);
            finds(&now, Some(1), &[0, 20]);
            inner.set(inner.get() + 1);
            Ok(true)
        })
        .unwrap();
    assert_eq!(inner.get(), 2);
    // And with keys, until it is enough: of rows that are there, and of some that were.
    for (group, any_of) in [(0, [3, 6]), (1, [1, 4])] {
        let mut keys = Vec::new();
        before
            .find(&by_grp(1), &grp(Some(group)), &mut |key, _| {
                keys.push(key);
                Ok(false)
            })
            .unwrap();
        assert_eq!(keys.len(), 1);
        assert!(any_of.map(Key::Integer).contains(&keys[0]), "{keys:?}");
    }
}

#[test]
fn nothing_is_found_in_a_table_that_nobody_may_see() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    let indexes = [by_grp(1), by_grp(2), by_grp(3)];
    mirror.set_indexes(&indexes).unwrap();
    mirror.begin_copy(&simple(1)).unwrap();
    // Ahead of the position.
    copy(&mut mirror, 2, 200);
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    for index in &indexes {
        for state in [&mirror.now() as &dyn Lookup, &reader.now().unwrap()] {
            let refused = ids(state, index, &grp(Some(1)));
            assert!(matches!(
                refused,
                Err(lookup::Error::Mirror(Error::NotReady(_)))
            ));
        }
    }
    reader.end();
    mirror.advance(Lsn(200)).unwrap();
    assert_eq!(
        ids(&mirror.now(), &by_grp(2), &grp(Some(1))).unwrap(),
        [1, 4, 7]
    );
    // A large transaction is neither before nor after.
    mirror.commit().unwrap();
    let part = Chunk {
        changes: vec![delete(2, 1)],
        bytes: 0,
        first: true,
        commit_lsn: Lsn(210),
        end: None,
    };
    mirror.apply_part(&part).unwrap();
    let refused = ids(&mirror.now(), &by_grp(2), &grp(Some(1)));
    assert!(matches!(
        refused,
        Err(lookup::Error::Mirror(Error::Misused(_)))
    ));
}

#[test]
fn the_past_is_only_told_where_all_of_it_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1)]).unwrap();
    apply(&mut mirror, 110, vec![update(1, row(1, Some(2), "a"))]);
    apply(&mut mirror, 120, vec![update(1, row(1, Some(1), "b"))]);
    apply(&mut mirror, 130, vec![delete(1, 1), delete(1, 4)]);
    mirror.commit().unwrap();
    let misused = |reader: &Reader, ordinal| {
        assert!(matches!(reader.at(ordinal), Err(Error::Misused(_))));
    };
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    misused(&reader, 0);
    let start = Place {
        ordinal: 1,
        entry: None,
    };
    let place = reader.collect(1, &[], &[by_grp(1)], &start, 1).unwrap();
    misused(&reader, 1);
    let place = reader
        .collect(1, &[], &[by_grp(1)], &place.unwrap(), 10)
        .unwrap();
    assert!(place.is_none());
    // Before what is listed, and behind what there is.
    misused(&reader, 0);
    misused(&reader, 4);
    finds(&reader.at(1).unwrap(), Some(2), &[1, 2, 5, 8]);
    finds(&reader.at(1).unwrap(), Some(1), &[4, 7]);
    finds(&reader.at(2).unwrap(), Some(1), &[1, 4, 7]);
    finds(&reader.at(3).unwrap(), Some(1), &[7]);
    assert!(ids(&reader.at(1).unwrap(), &by_grp(2), &grp(None)).is_err());
    // Another snapshot has more, until it is listed.
    apply(&mut mirror, 140, vec![insert(1, row(30, Some(1), "c"))]);
    mirror.commit().unwrap();
    reader.begin().unwrap();
    misused(&reader, 1);
    let place = Place {
        ordinal: 3,
        entry: None,
    };
    assert!(
        reader
            .collect(1, &[], &[by_grp(1)], &place, 10)
            .unwrap()
            .is_none()
    );
    finds(&reader.at(3).unwrap(), Some(1), &[7]);
    finds(&reader.at(4).unwrap(), Some(1), &[7, 30]);
    // A copy is another table.
    copy(&mut mirror, 1, 140);
    reader.begin().unwrap();
    assert!(matches!(reader.at(4), Err(Error::OutOfReach(_))));
    let again = reader.collect(1, &[], &[by_grp(1)], &place, 10);
    assert!(matches!(again, Err(Error::OutOfReach(_))));
}

#[test]
fn old_rows_of_another_schema_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&settings(&directory));
    mirror.set_indexes(&[by_grp(1)]).unwrap();
    apply(&mut mirror, 110, vec![delete(1, 1)]);
    let mut newer = Table::clone(&simple(1));
    newer.version = 2;
    mirror.begin_copy(&newer).unwrap();
    mirror.copy_rows(1, &[row(1, Some(1), "x")]).unwrap();
    mirror.end_copy(1, Lsn(110)).unwrap();
    let change = Change::Update {
        table: newer.into(),
        old: None,
        new: row(1, Some(2), "y"),
        unchanged: Vec::new(),
    };
    apply(&mut mirror, 120, vec![change]);
    mirror.commit().unwrap();
    let mut reader = mirror.reader().unwrap();
    reader.begin().unwrap();
    collect(&mut reader, 1, 0, &[by_grp(1)]).unwrap();
    let old = ids(&reader.at(0).unwrap(), &by_grp(1), &grp(Some(1)));
    assert!(matches!(
        old,
        Err(lookup::Error::Mirror(Error::OutOfReach(name))) if name == "public.t1"
    ));
    finds(&reader.at(1).unwrap(), Some(1), &[1]);
    finds(&reader.at(2).unwrap(), Some(1), &[]);
}

#[test]
fn values_that_are_equal_in_postgres_are_found_by_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let mut mirror = Mirror::open(&settings(&directory)).unwrap();
    let columns = [
        ("id", Kind::Integer),
        ("n", Kind::Numeric),
        ("at", Kind::Timestamp),
    ];
    let table = table(1, &columns, &[0], Identity::Key);
    let indexes = [
        index(1, &[(1, Reading::Decimal)]),
        index(
            1,
            &[(2, Reading::Timestamp(Zone::None)), (1, Reading::Decimal)],
        ),
    ];
    mirror.set_indexes(&indexes).unwrap();
    mirror.begin_copy(&table).unwrap();
    let rows: Vec<Row> = [
        ("7", "infinity"),
        ("7.00", "2020-01-02 03:04:05.000000"),
        ("7.01", "infinity"),
    ]
    .into_iter()
    .zip(0..)
    .map(|((n, at), id)| {
        vec![
            Value::Integer(id),
            Value::Text(n.into()),
            Value::Text(at.into()),
        ]
    })
    .collect();
    let rows: Vec<Bytes> = rows.iter().map(|row| encode(row)).collect();
    mirror.copy_rows(1, &rows).unwrap();
    mirror.end_copy(1, Lsn(0)).unwrap();
    let now = mirror.now();
    for (index, expect) in indexes.iter().zip([
        [vec![0, 1], vec![0, 1], vec![2]],
        [vec![0], vec![1], vec![2]],
    ]) {
        for (row, expect) in rows.iter().zip(expect) {
            let key = index.key(row).unwrap();
            assert_eq!(ids(&now, index, &key).unwrap(), expect);
        }
    }
    // By its first part.
    let both = indexes[1].key(&rows[0]).unwrap();
    let first = Index {
        table: 1,
        parts: indexes[1].parts[..1].to_vec(),
    };
    let prefix = first.key(&rows[0]).unwrap();
    assert!(both.starts_with(&prefix));
    assert_eq!(ids(&now, &indexes[1], &prefix).unwrap(), [0, 2]);
}
