//! A source that plays Postgres: what it has, and what it sends of a transaction.

use std::{collections::BTreeMap, sync::Arc};

use anabranch_proto::{
    Lsn,
    record::{self, ValueRef},
};
use anabranch_streamer::{
    table::{Collation, Column, Identity, Kind, Table},
    transaction::{Change, Chunk, End, Old},
};
use anabranch_tests::nested::{self, Data, OnDelete, Row, Schema, Value, generator};
use bytes::Bytes;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

/// Rows of a table at most, about.
const ROWS_MAX: usize = 10;

pub struct Source {
    pub schema: Schema,
    /// As the streamer knows them.
    pub tables: Vec<Arc<Table>>,
    pub data: Data,
    pub lsn: Lsn,
    /// What the present transaction has done.
    changes: Vec<Change>,
}

pub fn encode(row: &[Value], columns: &[nested::Column]) -> Bytes {
    let texts: Vec<String> = row.iter().map(Value::text).collect();
    let values = row.iter().zip(&texts).zip(columns);
    record::build(values.map(|((value, text), column)| match value {
        Value::Null => ValueRef::Null,
        Value::Number(number, _) if column.kind != nested::Kind::Numeric => {
            ValueRef::Integer(*number)
        }
        _ => ValueRef::Text(text),
    }))
}

fn table(place: usize, table: &nested::Table) -> Arc<Table> {
    let column = |(place, column): (usize, &nested::Column)| {
        let (type_oid, kind) = match column.kind {
            nested::Kind::Int4 => (23, Kind::Integer),
            nested::Kind::Int8 => (20, Kind::Integer),
            nested::Kind::Numeric => (1700, Kind::Numeric),
            nested::Kind::Text => (25, Kind::Text),
        };
        Column {
            name: column.name.clone(),
            attnum: place as i16 + 1,
            type_oid,
            base_oid: type_oid,
            typmod: -1,
            postgres_type: column.kind.sql().into(),
            kind,
            not_null: table.key.contains(&place),
            collation: Collation::Bytes,
        }
    };
    Arc::new(Table {
        oid: 100 + place as u32,
        schema: "public".into(),
        name: table.name.clone(),
        columns: table.columns.iter().enumerate().map(column).collect(),
        key: table.key.clone(),
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    })
}

impl Source {
    pub fn new(rng: &mut StdRng) -> Source {
        let width = rng.random_range(4..9);
        let schema = generator::schema(rng, 6, width);
        let tables = schema.tables.iter().enumerate();
        let tables = tables.map(|(place, of)| table(place, of)).collect();
        let mut source = Source {
            data: vec![BTreeMap::new(); schema.tables.len()],
            schema,
            tables,
            lsn: Lsn(100),
            changes: Vec::new(),
        };
        for place in 0..source.tables.len() {
            for _ in 0..rng.random_range(ROWS_MAX / 2..2 * ROWS_MAX) {
                source.insert(rng, place);
            }
        }
        source.changes.clear();
        source
    }

    pub fn encode(&self, table: usize, row: &Row) -> Bytes {
        encode(row, &self.schema.tables[table].columns)
    }

    /// Commits a random transaction.
    pub fn commit(&mut self, rng: &mut StdRng) -> Chunk {
        for _ in 0..*[1, 1, 2, 3, 5].choose(rng).expect("five") {
            self.statement(rng);
        }
        let commit_lsn = Lsn(self.lsn.0 + rng.random_range(0..2));
        self.lsn = Lsn(commit_lsn.0 + rng.random_range(1..9));
        Chunk {
            changes: std::mem::take(&mut self.changes),
            bytes: 0,
            first: true,
            commit_lsn,
            end: Some(End {
                lsn: self.lsn,
                commit_time: 0,
            }),
        }
    }

    fn statement(&mut self, rng: &mut StdRng) {
        let table = rng.random_range(0..self.tables.len());
        let any = |rng: &mut StdRng, data: &Data| {
            let keys: Vec<&Vec<Value>> = data[table].keys().collect();
            keys.choose(rng).map(|key| (*key).clone())
        };
        match rng.random_range(0..100) {
            0..30 => self.insert(rng, table),
            30..58 => {
                let Some(key) = any(rng, &self.data) else {
                    return;
                };
                let other = generator::row(rng, &self.schema, table);
                let mut row = self.data[table][&key].clone();
                for (place, value) in other.into_iter().enumerate() {
                    if !self.schema.tables[table].key.contains(&place) && rng.random_bool(0.5) {
                        row[place] = value;
                    }
                }
                self.update(table, &key, row);
            }
            58..72 => {
                if let Some(key) = any(rng, &self.data) {
                    self.delete(table, &key);
                }
            }
            // The same key again, as another row.
            72..76 => {
                let Some(key) = any(rng, &self.data) else {
                    return;
                };
                self.delete(table, &key);
                let mut row = generator::row(rng, &self.schema, table);
                for (place, value) in self.schema.tables[table].key.iter().zip(&key) {
                    row[*place] = value.clone();
                }
                self.put(table, row);
            }
            76..86 => {
                let Some(key) = any(rng, &self.data) else {
                    return;
                };
                let other = generator::row(rng, &self.schema, table);
                let mut row = self.data[table][&key].clone();
                for place in &self.schema.tables[table].key {
                    row[*place] = other[*place].clone();
                }
                if !self.data[table].contains_key(&self.schema.tables[table].key_of(&row)) {
                    self.update(table, &key, row);
                }
            }
            86..94 => {
                // All rows with some value in a column.
                let place = rng.random_range(0..self.tables[table].columns.len());
                let (of, to) = (
                    generator::row(rng, &self.schema, table),
                    generator::row(rng, &self.schema, table),
                );
                let is_key = self.schema.tables[table].key.contains(&place);
                let keys: Vec<_> = self.data[table].keys().cloned().collect();
                let goes = is_key || rng.random_bool(0.4);
                for key in keys {
                    let Some(row) = self.data[table].get(&key).cloned() else {
                        continue;
                    };
                    if row[place] != of[place] {
                        continue;
                    }
                    if goes {
                        self.delete(table, &key);
                    } else {
                        let mut row = row;
                        row[place] = to[place].clone();
                        self.update(table, &key, row);
                    }
                }
            }
            94..97 => {
                self.data[table].clear();
                self.changes.push(Change::Truncate {
                    table: self.tables[table].clone(),
                });
            }
            // One that lives only within the transaction.
            _ => {
                let row = generator::row(rng, &self.schema, table);
                let key = self.schema.tables[table].key_of(&row);
                if !self.data[table].contains_key(&key) {
                    self.put(table, row);
                    self.delete(table, &key);
                }
            }
        }
    }

    fn insert(&mut self, rng: &mut StdRng, table: usize) {
        let row = generator::row(rng, &self.schema, table);
        let key = self.schema.tables[table].key_of(&row);
        if self.data[table].len() < ROWS_MAX && !self.data[table].contains_key(&key) {
            self.put(table, row);
        }
    }

    fn put(&mut self, table: usize, row: Row) {
        self.changes.push(Change::Insert {
            table: self.tables[table].clone(),
            new: self.encode(table, &row),
        });
        let key = self.schema.tables[table].key_of(&row);
        assert_eq!(self.data[table].insert(key, row), None);
    }

    /// What refers to a key that is no more is left alone but where it is deleted: to a mirror that is all the same.
    fn update(&mut self, table: usize, key: &Vec<Value>, row: Row) {
        let before = self.data[table].remove(key).expect("it is there");
        let new_key = self.schema.tables[table].key_of(&row);
        let old = (new_key != *key).then(|| Old::Identity(self.identity(table, &before)));
        self.changes.push(Change::Update {
            table: self.tables[table].clone(),
            old,
            new: self.encode(table, &row),
            unchanged: Vec::new(),
        });
        assert_eq!(self.data[table].insert(new_key, row), None);
    }

    fn delete(&mut self, table: usize, key: &Vec<Value>) {
        let Some(row) = self.data[table].remove(key) else {
            return;
        };
        self.changes.push(Change::Delete {
            table: self.tables[table].clone(),
            old: Old::Identity(self.identity(table, &row)),
        });
        for place in 0..self.schema.tables.len() {
            for link in self.schema.tables[place].links.clone() {
                if link.to != table {
                    continue;
                }
                let refer = |row: &Row| row[link.column] == key[0];
                let referring = self.data[place].iter().filter(|(_, row)| refer(row));
                let keys: Vec<_> = referring.map(|(key, _)| key.clone()).collect();
                for other in keys {
                    match link.on_delete {
                        OnDelete::Cascade => self.delete(place, &other),
                        OnDelete::SetNull => {
                            if let Some(mut row) = self.data[place].get(&other).cloned() {
                                row[link.column] = Value::Null;
                                self.update(place, &other, row);
                            }
                        }
                    }
                }
            }
        }
    }

    fn identity(&self, table: usize, row: &Row) -> Bytes {
        let columns = self.tables[table].identity_columns();
        let of = &self.schema.tables[table].columns;
        let (values, kinds): (Vec<_>, Vec<_>) = columns
            .iter()
            .map(|place| (row[*place].clone(), of[*place].clone()))
            .unzip();
        encode(&values, &kinds)
    }
}
