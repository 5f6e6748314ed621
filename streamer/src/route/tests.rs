use std::collections::{BTreeMap, HashMap};

use anabranch_proto::record::{self, ValueRef};
use bytes::Bytes;

use super::*;
use crate::{
    lookup::Nothing,
    mirror::Key,
    shape::{self, ParamSource, Source},
    table::{Collation, Column, Identity, Kind, Table},
};

fn table() -> Arc<Table> {
    let column = |name: &str, attnum| Column {
        name: name.into(),
        attnum,
        type_oid: 23,
        base_oid: 23,
        typmod: -1,
        postgres_type: "integer".into(),
        kind: Kind::Integer,
        not_null: false,
        collation: Collation::Bytes,
    };
    Arc::new(Table {
        oid: 7,
        schema: "public".into(),
        name: "t".into(),
        columns: vec![column("id", 1), column("team", 2), column("v", 3)],
        key: vec![0],
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    })
}

/// `team = $team` (routed), and `v > 10` (looked at one by one).
fn bound(table: &Arc<Table>, shape: &str, team: i64) -> Bound {
    let team_of_token = ParamSource::Claim("team".into());
    let sources = [
        Source {
            name: "team".into(),
            params: BTreeMap::from([("team".into(), team_of_token)]),
            tables: vec!["SELECT * FROM t WHERE team = $team".into()],
            writable: Vec::new(),
        },
        Source {
            name: "part".into(),
            params: BTreeMap::from([("team".into(), ParamSource::Claim("team".into()))]),
            tables: vec!["SELECT id, team FROM t WHERE team = $team".into()],
            writable: Vec::new(),
        },
        Source {
            name: "large".into(),
            params: BTreeMap::new(),
            tables: vec!["SELECT * FROM t WHERE v > 10".into()],
            writable: Vec::new(),
        },
    ];
    let shapes = shape::compile(&sources, std::slice::from_ref(table)).unwrap();
    let shape = shapes.iter().find(|one| one.name == shape).unwrap();
    let claims = serde_json::Map::from_iter([("team".into(), team.into())]);
    shape.bind(&claims, &HashMap::new()).unwrap().remove(0)
}

fn row(values: [i64; 3]) -> Option<Bytes> {
    Some(record::build(values.map(ValueRef::Integer)))
}

fn net(table: &Arc<Table>, before: Option<Bytes>, after: Option<Bytes>) -> Net {
    Net {
        table: table.clone(),
        key: Key::Integer(1),
        before,
        after,
    }
}

fn told(router: &Router, net: Net) -> Vec<(SessionId, Op)> {
    let routed = router.route(&[net], &Nothing, &Nothing).unwrap().ops;
    let mut told: Vec<_> = routed
        .into_iter()
        .flat_map(|(session, ops)| ops.into_iter().map(move |(_, op)| (session, op)))
        .collect();
    told.sort_by_key(|(session, _)| *session);
    told
}

#[test]
fn a_change_concerns_those_who_saw_the_row_and_those_who_see_it_now() {
    let table = table();
    let mut router = Router::default();
    router.add(1, &[bound(&table, "team", 1)]);
    router.add(2, &[bound(&table, "team", 2)]);
    router.add(3, &[bound(&table, "team", 3)]);
    router.add(4, &[bound(&table, "large", 0)]);
    let key = record::build([ValueRef::Integer(1)]);
    let after = row([1, 2, 20]);
    assert_eq!(
        told(&router, net(&table, row([1, 1, 0]), after.clone())),
        [
            (1, Op::Delete(key.clone())),
            (2, Op::Upsert(after.clone().unwrap())),
            (4, Op::Upsert(after.clone().unwrap())),
        ]
    );
    assert_eq!(
        told(&router, net(&table, after, None)),
        [(2, Op::Delete(key.clone())), (4, Op::Delete(key))]
    );
}

#[test]
fn a_row_in_two_selects_of_one_session_goes_only_when_it_is_in_neither() {
    let table = table();
    let mut router = Router::default();
    router.add(1, &[bound(&table, "team", 1), bound(&table, "large", 0)]);
    let (both, one, none) = (row([1, 1, 20]), row([1, 2, 20]), row([1, 2, 0]));
    let upsert = |row: &Option<Bytes>| vec![(1, Op::Upsert(row.clone().unwrap()))];
    assert_eq!(told(&router, net(&table, both, one.clone())), upsert(&one));
    let key = record::build([ValueRef::Integer(1)]);
    assert_eq!(
        told(&router, net(&table, one, none)),
        [(1, Op::Delete(key))]
    );
}

#[test]
fn a_row_is_encoded_once_for_all_who_get_it_whatever_they_had() {
    let table = table();
    let sources = ["team", "other"].map(|name| Source {
        name: name.into(),
        params: BTreeMap::from([("team".into(), ParamSource::Claim("team".into()))]),
        tables: vec![match name {
            "team" => "SELECT id, team FROM t WHERE team = $team".into(),
            _ => "SELECT team, id FROM t WHERE v = $team".into(),
        }],
        writable: Vec::new(),
    });
    let shapes = shape::compile(&sources, std::slice::from_ref(&table)).unwrap();
    let mut router = Router::default();
    for session in 0..20 {
        let team = if session < 10 { 1 } else { 2 };
        let claims = serde_json::Map::from_iter([("team".into(), team.into())]);
        let shape = &shapes[(session % 2) as usize];
        router.add(session, &shape.bind(&claims, &HashMap::new()).unwrap());
    }
    assert_eq!(router.bindings.len(), 4);
    // By team it moves from the first ten to the others; by v it stays with the first.
    let told = told(&router, net(&table, row([1, 1, 1]), row([1, 2, 1])));
    let mut records: HashMap<*const u8, (usize, &Bytes)> = HashMap::new();
    for (_, Op::Upsert(record) | Op::Delete(record)) in &told {
        records.entry(record.as_ptr()).or_insert((0, record)).0 += 1;
    }
    let mut counts: Vec<_> = records.values().map(|(count, _)| *count).collect();
    counts.sort_unstable();
    // A delete for five; the row for five who have it and five who had not.
    assert_eq!(counts, [5, 10]);
}

#[test]
fn a_row_is_encoded_anew_for_each_session_that_gets_it() {
    let table = table();
    let mut router = Router::default();
    for session in 0..1000 {
        router.add(session, &[bound(&table, "part", 1)]);
    }
    let told = told(&router, net(&table, None, row([1, 1, 0])));
    let records: Vec<_> = (told.iter())
        .map(|(_, op)| match op {
            Op::Upsert(record) | Op::Delete(record) => record,
        })
        .collect();
    assert_eq!(records.len(), 1000);
    assert_eq!(
        *records[0],
        record::build([1, 1].map(ValueRef::Integer)),
        "it is not made of the row's own bytes"
    );
    assert!(
        records
            .iter()
            .all(|record| record.as_ptr() == records[0].as_ptr())
    );
}

#[test]
fn a_row_may_be_seen_by_those_whose_values_it_has() {
    let table = table();
    let mut router = Router::default();
    router.add(1, &[bound(&table, "team", 1)]);
    router.add(2, &[bound(&table, "team", 2), bound(&table, "large", 0)]);
    router.add(3, &[bound(&table, "part", 1), bound(&table, "team", 1)]);
    let may_see = |team: i64| {
        let mut found = Vec::new();
        let row = row([1, team, 0]).unwrap();
        router.may_see(7, &row, &mut found).unwrap();
        found
    };
    // Who has a SELECT that no value leads to may see any row.
    assert_eq!(may_see(1), [1, 2, 3]);
    assert_eq!(may_see(9), [2]);
}

#[test]
fn a_session_that_left_is_told_nothing_and_leaves_nothing_behind() {
    let table = table();
    let mut router = Router::default();
    for session in 1..=3 {
        router.add(
            session,
            &[bound(&table, "team", 1), bound(&table, "large", 0)],
        );
    }
    assert_eq!(router.sessions_of(&[7]), [1, 2, 3]);
    router.remove(2);
    assert_eq!(told(&router, net(&table, None, row([1, 1, 0]))).len(), 2);
    router.remove(1);
    router.remove(3);
    assert!(router.sessions_of(&[7]).is_empty());
    assert!(router.tables.is_empty() && router.bindings.is_empty());
    assert!(router.slots.iter().all(Option::is_none));
}
