//! A source in plain maps. It shares no code with the mirror but the encoding of records.

use std::{collections::BTreeMap, sync::Arc};

use anabranch_proto::{
    Lsn,
    record::{self, ValueRef},
};
use bytes::Bytes;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::{
    table::{Collation, Column, Identity, Kind, Oid, Table},
    transaction::{Change, End, Old},
};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Null,
    Integer(i64),
    Text(String),
    Blob(Vec<u8>),
}

pub type Row = Vec<Value>;
/// The values of the key, in key order.
pub type RowKey = Vec<Value>;
pub type Content = BTreeMap<RowKey, Row>;
pub type Tables = BTreeMap<Oid, Content>;

pub fn encode(row: &[Value]) -> Bytes {
    record::build(row.iter().map(|value| match value {
        Value::Null => ValueRef::Null,
        Value::Integer(value) => ValueRef::Integer(*value),
        Value::Text(value) => ValueRef::Text(value),
        Value::Blob(value) => ValueRef::Blob(value),
    }))
}

pub fn decode(record: &[u8]) -> Row {
    (record::values(record).unwrap())
        .map(|value| match value.unwrap() {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(value) => Value::Integer(value),
            ValueRef::Text(value) => Value::Text(value.into()),
            ValueRef::Blob(value) => Value::Blob(value.into()),
            ValueRef::Real(_) => unreachable!("the model has no floats"),
        })
        .collect()
}

pub fn key_of(table: &Table, row: &Row) -> RowKey {
    table
        .key
        .iter()
        .map(|&column| row[column].clone())
        .collect()
}

/// A table for tests. Every one has an integer column `grp` for conditions.
pub fn table(oid: Oid, columns: &[(&str, Kind)], key: &[usize], identity: Identity) -> Arc<Table> {
    let column = |(place, (name, kind)): (usize, &(&str, Kind))| Column {
        name: (*name).into(),
        attnum: place as i16 + 1,
        type_oid: 25,
        base_oid: 25,
        typmod: -1,
        postgres_type: "text".into(),
        kind: kind.clone(),
        not_null: key.contains(&place),
        collation: Collation::Bytes,
    };
    Arc::new(Table {
        oid,
        schema: "public".into(),
        name: format!("t{oid}"),
        columns: columns.iter().enumerate().map(column).collect(),
        key: key.to_vec(),
        identity,
        indexes: Vec::new(),
        version: 1,
    })
}

pub fn grp(table: &Table) -> usize {
    table
        .columns
        .iter()
        .position(|column| column.name == "grp")
        .unwrap()
}

fn tables() -> Vec<Arc<Table>> {
    use Kind::{Bytea, Integer, Text};
    vec![
        table(
            11,
            &[
                ("id", Integer),
                ("grp", Integer),
                ("v", Text),
                ("big", Text),
            ],
            &[0],
            Identity::Key,
        ),
        // The order of the key is not that of the columns.
        table(
            12,
            &[("a", Text), ("grp", Integer), ("b", Integer), ("big", Text)],
            &[2, 0],
            Identity::Key,
        ),
        // Old rows are named by `code`, also where `id` changes.
        table(
            13,
            &[
                ("id", Integer),
                ("code", Text),
                ("grp", Integer),
                ("big", Text),
            ],
            &[0],
            Identity::Index(vec![1]),
        ),
        table(
            14,
            &[("v", Text), ("id", Text), ("grp", Integer), ("big", Text)],
            &[1],
            Identity::Full,
        ),
        table(
            15,
            &[
                ("k", Bytea),
                ("grp", Integer),
                ("code", Integer),
                ("big", Text),
            ],
            &[0],
            Identity::Index(vec![1, 2]),
        ),
    ]
}

/// A committed transaction, as Postgres sends it.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub commit_lsn: Lsn,
    pub end: End,
    pub changes: Vec<Change>,
    /// What Postgres has after it.
    pub after: Tables,
    /// Its changes of these tables contradict what came before, or can't be kept.
    pub broken: Vec<Oid>,
}

pub struct Source {
    pub tables: Vec<Arc<Table>>,
    pub start: Lsn,
    pub initial: Tables,
    pub log: Vec<Transaction>,
    /// Chance, of a thousand, that a transaction breaks a table.
    pub broken_of_1000: u32,
}

/// Rows above this are broken.
pub const ROW_BYTES_MAX: usize = 1000;

impl Source {
    pub fn new(rng: &mut StdRng) -> Source {
        let tables = tables();
        let mut initial = Tables::new();
        for table in &tables {
            let content = initial.entry(table.oid).or_default();
            for _ in 0..rng.random_range(0..30) {
                let row = new_row(rng, table, content);
                content.insert(key_of(table, &row), row);
            }
        }
        Source {
            tables,
            // Above 2^63: an LSN is unsigned.
            start: Lsn(if rng.random() {
                0xFFFF_FF00_0000_0000
            } else {
                5
            }),
            initial,
            log: Vec::new(),
            broken_of_1000: 20,
        }
    }

    /// What Postgres has at the end of the log.
    pub fn now(&self) -> (&Tables, Lsn) {
        match self.log.last() {
            Some(last) => (&last.after, last.end.lsn),
            None => (&self.initial, self.start),
        }
    }

    /// Commits a random transaction.
    pub fn commit(&mut self, rng: &mut StdRng) {
        let (now, lsn) = self.now();
        let mut after = now.clone();
        let mut changes = Vec::new();
        let mut broken = Vec::new();
        // A transaction may begin its commit record right where the last one ends.
        let commit_lsn = Lsn(lsn.0 + rng.random_range(0..3));
        for _ in 0..rng.random_range(0..9) {
            let table = self.tables.choose(rng).unwrap().clone();
            let content = after.get_mut(&table.oid).unwrap();
            statement(rng, &table, content, &mut changes);
        }
        if rng.random_range(0..1000) < self.broken_of_1000 {
            let table = self.tables.choose(rng).unwrap();
            let change = nonsense(rng, table, &after[&table.oid]);
            let stays = changes.len();
            changes.insert(rng.random_range(0..=stays), change);
            broken.push(table.oid);
        }
        self.log.push(Transaction {
            commit_lsn,
            end: End {
                lsn: Lsn(commit_lsn.0 + rng.random_range(1..40)),
                commit_time: 1_000_000 * self.log.len() as i64,
            },
            changes,
            after,
            broken,
        });
    }
}

/// A row under a key that is free, and a replica identity that is free.
fn new_row(rng: &mut StdRng, table: &Table, content: &Content) -> Row {
    loop {
        let row: Row = table
            .columns
            .iter()
            .map(|column| any_value(rng, &column.name, &column.kind))
            .collect();
        if !content.contains_key(&key_of(table, &row))
            && identity_is_free(table, content, &row, None)
        {
            return row;
        }
    }
}

fn any_value(rng: &mut StdRng, name: &str, kind: &Kind) -> Value {
    match (name, kind) {
        ("grp", _) => Value::Integer(rng.random_range(0..4)),
        ("big", _) if rng.random_range(0..4) == 0 => Value::Null,
        ("big", _) => Value::Text("x".repeat(rng.random_range(0..60))),
        (_, Kind::Integer) => Value::Integer(match rng.random_range(0..20) {
            0 => i64::MIN,
            1 => i64::MAX,
            _ => rng.random_range(-40..40),
        }),
        (_, Kind::Bytea) => Value::Blob(vec![rng.random_range(0..7); rng.random_range(0..14)]),
        _ => Value::Text(format!("{}", rng.random_range(0..90))),
    }
}

fn identity_is_free(table: &Table, content: &Content, row: &Row, but: Option<&RowKey>) -> bool {
    let Identity::Index(columns) = &table.identity else {
        return true;
    };
    !(content.iter()).any(|(key, other)| {
        Some(key) != but && columns.iter().all(|&column| other[column] == row[column])
    })
}

/// One statement or a few that belong together, and what Postgres sends of it.
fn statement(
    rng: &mut StdRng,
    table: &Arc<Table>,
    content: &mut Content,
    changes: &mut Vec<Change>,
) {
    let any_key = |rng: &mut StdRng, content: &Content| {
        let keys: Vec<&RowKey> = content.keys().collect();
        keys.choose(rng).map(|key| (*key).clone())
    };
    match rng.random_range(0..100) {
        0..30 if content.len() < 40 => {
            let row = new_row(rng, table, content);
            insert(table, content, changes, row);
        }
        // Values change, the key does not; perhaps nothing does.
        30..60 => {
            let Some(key) = any_key(rng, content) else {
                return;
            };
            let mut row = content[&key].clone();
            for (place, column) in table.columns.iter().enumerate() {
                if !table.key.contains(&place) && rng.random() {
                    row[place] = any_value(rng, &column.name, &column.kind);
                }
            }
            if identity_is_free(table, content, &row, Some(&key)) {
                update(rng, table, content, changes, &key, row);
            }
        }
        60..72 => {
            let Some(key) = any_key(rng, content) else {
                return;
            };
            delete(table, content, changes, &key);
            // And the same key again, or none.
            if rng.random() {
                let mut row = new_row(rng, table, content);
                for (&column, value) in table.key.iter().zip(&key) {
                    row[column] = value.clone();
                }
                if identity_is_free(table, content, &row, None) {
                    insert(table, content, changes, row);
                }
            }
        }
        // The key changes, the rest may.
        72..84 => {
            let Some(key) = any_key(rng, content) else {
                return;
            };
            let free = new_row(rng, table, content);
            let mut row = if rng.random() {
                free.clone()
            } else {
                content[&key].clone()
            };
            for &column in &table.key {
                row[column] = free[column].clone();
            }
            if identity_is_free(table, content, &row, Some(&key))
                && !content.contains_key(&key_of(table, &row))
            {
                update(rng, table, content, changes, &key, row);
            }
        }
        // Two rows swap their keys, by way of a third.
        84..90 => {
            let (Some(one), Some(other)) = (any_key(rng, content), any_key(rng, content)) else {
                return;
            };
            let third = key_of(table, &new_row(rng, table, content));
            if one == other || table.identity == Identity::Index(vec![0]) {
                return;
            }
            for (from, to) in [(&one, &third), (&other, &one), (&third, &other)] {
                let mut row = content[from].clone();
                for (&column, value) in table.key.iter().zip(to) {
                    row[column] = value.clone();
                }
                update(rng, table, content, changes, from, row);
            }
        }
        90..93 => {
            content.clear();
            changes.push(Change::Truncate {
                table: table.clone(),
            });
        }
        // A row that lives only within the transaction.
        _ => {
            let row = new_row(rng, table, content);
            let key = key_of(table, &row);
            insert(table, content, changes, row);
            delete(table, content, changes, &key);
        }
    }
}

fn insert(table: &Arc<Table>, content: &mut Content, changes: &mut Vec<Change>, row: Row) {
    changes.push(Change::Insert {
        table: table.clone(),
        new: encode(&row),
    });
    assert_eq!(content.insert(key_of(table, &row), row), None);
}

fn update(
    rng: &mut StdRng,
    table: &Arc<Table>,
    content: &mut Content,
    changes: &mut Vec<Change>,
    key: &RowKey,
    row: Row,
) {
    let before = content.remove(key).unwrap();
    let identity = table.identity_columns();
    let old = match table.identity {
        Identity::Full => Some(Old::Full(encode(&before))),
        // Sent where a column of it changed, or is out of line.
        _ if identity.iter().any(|&column| before[column] != row[column])
            || rng.random_range(0..8) == 0 =>
        {
            Some(old_identity(table, &before))
        }
        _ => None,
    };
    let mut sent = row.clone();
    let mut unchanged = Vec::new();
    for place in 0..row.len() {
        // Out of line values that did not change; of a key only where the old one says it.
        let said = !identity.contains(&place) && !table.key.contains(&place) || old.is_some();
        if row[place] == before[place] && said && rng.random_range(0..3) == 0 {
            sent[place] = Value::Null;
            unchanged.push(place as u16);
        }
    }
    changes.push(Change::Update {
        table: table.clone(),
        old,
        new: encode(&sent),
        unchanged,
    });
    assert_eq!(content.insert(key_of(table, &row), row), None);
}

fn delete(table: &Arc<Table>, content: &mut Content, changes: &mut Vec<Change>, key: &RowKey) {
    let row = content.remove(key).unwrap();
    changes.push(Change::Delete {
        table: table.clone(),
        old: old_identity(table, &row),
    });
}

fn old_identity(table: &Table, row: &Row) -> Old {
    match table.identity {
        Identity::Full => Old::Full(encode(row)),
        _ => {
            let columns: Vec<Value> = (table.identity_columns().iter())
                .map(|&column| row[column].clone())
                .collect();
            Old::Identity(encode(&columns))
        }
    }
}

/// A change that cannot be: wherever it stands in the transaction, it must stop the table.
fn nonsense(rng: &mut StdRng, table: &Arc<Table>, content: &Content) -> Change {
    let mut row = new_row(rng, table, content);
    match rng.random_range(0..5) {
        0 => Change::Stop {
            table: table.oid,
            reason: "a column was dropped".into(),
        },
        1 => {
            row[3] = Value::Text("x".repeat(ROW_BYTES_MAX));
            Change::Insert {
                table: table.clone(),
                new: encode(&row),
            }
        }
        2 => {
            row.pop();
            Change::Insert {
                table: table.clone(),
                new: encode(&row),
            }
        }
        // No row ever has such a key or code.
        3 => {
            for value in &mut row {
                *value = match value {
                    Value::Integer(_) | Value::Null => Value::Integer(1234),
                    Value::Text(_) => Value::Text("never".into()),
                    Value::Blob(_) => Value::Blob(b"never".to_vec()),
                };
            }
            Change::Delete {
                table: table.clone(),
                old: old_identity(table, &row),
            }
        }
        _ => Change::Insert {
            table: table.clone(),
            new: Bytes::from_static(&[0xFF, 1, 2]),
        },
    }
}
