//! Random streams against a model: transactions, resets, changed definitions, heartbeats, cut into messages anywhere,
//! with streams that break off and disks that are full in between. After every message the file is read through
//! another connection.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    env,
    time::SystemTime,
};

use serde_json::json;

use super::*;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// From the environment (`ANABRANCH_SEED`), or new.
pub fn seed() -> u64 {
    match env::var("ANABRANCH_SEED") {
        Ok(seed) => seed.parse().expect("ANABRANCH_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64,
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    Null,
    Integer(i64),
    Text(String),
    Blob(Vec<u8>),
}

impl Value {
    fn as_ref(&self) -> ValueRef<'_> {
        match self {
            Value::Null => N,
            Value::Integer(value) => I(*value),
            Value::Text(value) => T(value),
            Value::Blob(value) => B(value),
        }
    }

    fn literal(&self) -> String {
        match self {
            Value::Null => "NULL".into(),
            Value::Integer(value) => value.to_string(),
            Value::Text(value) => format!("'{value}'"),
            Value::Blob(value) => literal(Sql::Blob(value)),
        }
    }

    fn json(&self) -> serde_json::Value {
        match self {
            Value::Null => json!(null),
            Value::Integer(value) => json!(value),
            Value::Text(value) => json!(value),
            Value::Blob(value) => {
                let digits: String = value.iter().map(|b| format!("{b:02x}")).collect();
                json!(format!("\\x{digits}"))
            }
        }
    }

    fn random(random: &mut Random, storage: v1::Storage, is_key: bool) -> Value {
        if !is_key && random.one_in(5) {
            return Value::Null;
        }
        // Few keys, so that they come again.
        let n = random.below(if is_key { 6 } else { 1000 });
        let length = if random.one_in(30) { 3000 } else { 3 };
        match storage {
            Integer => Value::Integer(n as i64 - 3),
            Text => Value::Text(format!("ä{n}").repeat(if is_key { 1 } else { length })),
            _ => Value::Blob(vec![n as u8; if is_key { 2 } else { length }]),
        }
    }
}

type Row = Vec<Value>;

#[derive(Clone, Debug)]
struct Model {
    /// Name, storage, place in the key.
    columns: Vec<(String, v1::Storage, u32)>,
    rows: BTreeMap<Row, Row>,
}

impl Model {
    fn key_columns(&self) -> Vec<usize> {
        let mut key: Vec<usize> = (0..self.columns.len())
            .filter(|&i| self.columns[i].2 > 0)
            .collect();
        key.sort_by_key(|&i| self.columns[i].2);
        key
    }

    fn key_of(&self, row: &Row) -> Row {
        self.key_columns().iter().map(|&i| row[i].clone()).collect()
    }

    fn random_row(&self, random: &mut Random) -> Row {
        self.columns
            .iter()
            .map(|&(_, storage, key)| Value::random(random, storage, key > 0))
            .collect()
    }

    fn declare(&self, id: u32, name: &str) -> v1::Element {
        let columns: Vec<(&str, v1::Storage, u32)> = self
            .columns
            .iter()
            .map(|(n, s, k)| (n.as_str(), *s, *k))
            .collect();
        let last = columns.len() as u32 - 1;
        let index: &[u32] = if last == 0 { &[0] } else { &[last, 0] };
        with_index(table(id, name, &columns), "an_index", index)
    }

    fn dump(&self) -> Vec<String> {
        let mut rows: Vec<String> = self
            .rows
            .values()
            .map(|row| row.iter().map(Value::literal).collect::<Vec<_>>().join("|"))
            .collect();
        rows.sort();
        rows
    }
}

type World = BTreeMap<String, Model>;

fn upsert(out: &mut BytesMut, row: &Row) {
    let values: Vec<ValueRef<'_>> = row.iter().map(Value::as_ref).collect();
    out.extend_from_slice(&packed(&[&values], &[]));
}

fn delete(out: &mut BytesMut, key: &Row) {
    let values: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
    out.extend_from_slice(&packed(&[], &[&values]));
}

/// A streamer that makes things up.
struct Streamer {
    random: Random,
    lsn: u64,
    /// As of the last transaction that it made.
    world: World,
    ids: HashMap<String, u32>,
    /// Elements that were made, and what the world is after each Commit.
    made: VecDeque<(v1::Element, Option<World>)>,
}

impl Streamer {
    /// Cuts operations anywhere.
    fn push_rows(&mut self, table: u32, ops: Bytes) {
        let mut from = 0;
        while from < ops.len() {
            let length = 1 + self.random.below(if self.random.0.is_multiple_of(2) {
                20
            } else {
                5000
            }) as usize;
            let to = (from + length).min(ops.len());
            self.made
                .push_back((rows(table, ops.slice(from..to), to < ops.len()), None));
            from = to;
        }
    }

    fn transaction(&mut self, is_first: bool, known: &World) {
        let names: Vec<String> = self.world.keys().cloned().collect();
        let mut reset = BTreeSet::new();
        for name in &names {
            let is_unknown = known
                .get(name)
                .is_none_or(|there| there.columns != self.world[name].columns);
            if (is_first && is_unknown) || self.random.one_in(if is_first { 3 } else { 8 }) {
                reset.insert(name.clone());
            }
        }
        let ids: Vec<u32> = reset.iter().map(|name| self.ids[name]).collect();
        let head = if is_first { first(&ids) } else { begin(&ids) };
        self.made.push_back((head, None));
        for name in &names {
            let id = self.ids[name];
            if reset.contains(name) && self.random.one_in(4) {
                // Another definition.
                let model = self.world.get_mut(name).unwrap();
                model.rows.clear();
                let count = self.random.below(3);
                model.columns.retain(|(_, _, key)| *key > 0);
                for i in 0..count {
                    let storage = if self.random.one_in(2) { Text } else { Blob };
                    model.columns.push((format!("c{i}"), storage, 0));
                }
                let declare = model.declare(id, name);
                self.made.push_back((declare, None));
            } else if is_first {
                let declare = self.world[name].declare(id, name);
                self.made.push_back((declare, None));
            }
        }
        for name in &names {
            let id = self.ids[name];
            let mut ops = BytesMut::new();
            if reset.contains(name) {
                let mut model = self.world[name].clone();
                let kept: Vec<Row> = model.rows.values().cloned().collect();
                model.rows.clear();
                let fresh = self.random.below(12);
                let mut rows: Vec<Row> = kept
                    .into_iter()
                    .filter(|_| !self.random.one_in(4))
                    .collect();
                rows.extend((0..fresh).map(|_| model.random_row(&mut self.random)));
                for row in rows {
                    upsert(&mut ops, &row);
                    let key = model.key_of(&row);
                    if self.random.one_in(6) {
                        delete(&mut ops, &key);
                        model.rows.remove(&key);
                    } else {
                        model.rows.insert(key, row);
                    }
                }
                self.world.insert(name.clone(), model);
            } else {
                let mut touched = BTreeSet::new();
                for _ in 0..self.random.below(8) {
                    let row = self.world[name].random_row(&mut self.random);
                    let key = self.world[name].key_of(&row);
                    if !touched.insert(key.clone()) {
                        continue;
                    }
                    let is_delete = self.random.one_in(3);
                    let model = self.world.get_mut(name).unwrap();
                    if is_delete {
                        delete(&mut ops, &key);
                        model.rows.remove(&key);
                    } else {
                        upsert(&mut ops, &row);
                        model.rows.insert(key, row);
                    }
                }
            }
            self.push_rows(id, ops.freeze());
        }
        self.lsn += 1 + self.random.below(100);
        self.made
            .push_back((commit(self.lsn), Some(self.world.clone())));
        if self.random.one_in(5) {
            self.lsn += 1;
            self.made
                .push_back((heartbeat(self.lsn, self.lsn), Some(self.world.clone())));
        }
    }

    /// The next message, and what the world is after it, if it commits.
    fn message(&mut self) -> (v1::Down, Option<World>) {
        let count = 1 + self.random.below(12) as usize;
        let mut elements = Vec::new();
        let mut world = None;
        while elements.len() < count {
            let Some((element, after)) = self.made.pop_front() else {
                break;
            };
            elements.push(element);
            world = after.or(world);
        }
        let message = down(elements);
        let world = world.filter(|_| !message.resume_token.is_empty());
        (message, world)
    }
}

fn assert_equal(reader: &Connection, world: &World, what: &str) {
    for (name, model) in world {
        let columns: Vec<&str> = model
            .columns
            .iter()
            .map(|(name, _, _)| name.as_str())
            .collect();
        let sql = format!("SELECT \"{}\" FROM \"{name}\"", columns.join("\",\""));
        let mut rows = query(reader, &sql);
        rows.sort();
        assert_eq!(rows, model.dump(), "{what}: {name}");
    }
}

/// Every key that differs was told, or that the table changed as a whole.
fn assert_told(before: &World, after: &World, changes: &[TableChanges], what: &str) {
    for (name, model) in after {
        let none = BTreeMap::new();
        let old = before.get(name).map_or(&none, |model| &model.rows);
        let keys = old.keys().chain(model.rows.keys());
        for key in keys.filter(|key| old.get(*key) != model.rows.get(*key)) {
            let key: serde_json::Value = key.iter().map(Value::json).collect();
            let told = changes.iter().any(|change| {
                change.table == *name && change.keys.as_ref().is_none_or(|keys| keys.contains(&key))
            });
            assert!(told, "{what}: {name} {key}");
        }
    }
}

fn run(seed: u64) {
    let folder = Folder::new();
    let mut settings = folder.settings.clone();
    let mut random = Random(seed);
    settings.hold_bytes_max = if random.one_in(2) { 300 } else { 1 << 20 };
    let columns = |columns: &[(&str, v1::Storage, u32)]| Model {
        columns: columns
            .iter()
            .map(|&(n, s, k)| (n.to_owned(), s, k))
            .collect(),
        rows: BTreeMap::new(),
    };
    let all: World = [
        ("t", columns(&[("id", Integer, 1), ("v", Text, 0)])),
        (
            "s.composite",
            columns(&[("v", Text, 0), ("b", Text, 2), ("a", Integer, 1)]),
        ),
        ("all key", columns(&[("x", Blob, 2), ("y", Integer, 1)])),
        (
            "blob",
            columns(&[("k", Blob, 1), ("v", Blob, 0), ("w", Integer, 0)]),
        ),
    ]
    .map(|(name, model)| (name.to_owned(), model))
    .into();
    let mut file = File::open(&settings).unwrap();
    file.set_report_changes(true);
    let mut known = World::new();
    let mut lsn = 0;
    let mut streamer = None;
    for step in 0..120 {
        let what = format!("seed {seed}, step {step}");
        let streamer = match &mut streamer {
            Some(streamer) if !random.one_in(25) => streamer,
            gone => {
                // A new stream, perhaps after a restart, of perhaps other tables.
                if random.one_in(2) {
                    drop(file);
                    file = File::open(&settings).unwrap();
                    file.set_report_changes(true);
                }
                file.begin_stream().unwrap();
                let mut world = known.clone();
                for (name, model) in &all {
                    if random.one_in(6) {
                        world.remove(name);
                    } else {
                        world.entry(name.clone()).or_insert_with(|| model.clone());
                    }
                }
                let ids = world.keys().cloned().zip(1..).collect();
                let streamer = gone.insert(Streamer {
                    random: Random(random.next()),
                    lsn,
                    world,
                    ids,
                    made: VecDeque::new(),
                });
                streamer.transaction(true, &known);
                streamer
            }
        };
        while streamer.made.len() < 15 {
            streamer.transaction(false, &known);
        }
        let (message, world) = streamer.message();
        if random.one_in(6) {
            let limit = |pages: u64| {
                let sql = format!("PRAGMA max_page_count = {pages}");
                file.connection.query_row(&sql, [], |_| Ok(())).unwrap();
            };
            limit(1);
            let applied = file.apply(&message);
            let sql = "PRAGMA max_page_count = 1000000";
            file.connection.query_row(sql, [], |_| Ok(())).unwrap();
            match applied {
                Err(Error::Full(_)) => {
                    assert_equal(&reader(folder.path()), &known, &what);
                    let applied = file
                        .apply(&message)
                        .unwrap_or_else(|e| panic!("{what}: {e}"));
                    check(&folder, &file, &known, world.as_ref(), &applied, &what);
                }
                Ok(applied) => check(&folder, &file, &known, world.as_ref(), &applied, &what),
                Err(error) => panic!("{what}: {error}"),
            }
        } else {
            let applied = file
                .apply(&message)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            check(&folder, &file, &known, world.as_ref(), &applied, &what);
        }
        if let Some(world) = world {
            known = world;
        }
        lsn = file.position().map_or(0, |position| position.lsn.0);
    }
    drop(file);
    File::open(&settings).unwrap();
    assert_tidy(&folder);
    assert_equal(
        &reader(folder.path()),
        &known,
        &format!("seed {seed}, at the end"),
    );
}

fn check(
    folder: &Folder,
    file: &File,
    before: &World,
    after: Option<&World>,
    applied: &super::super::Applied,
    what: &str,
) {
    let reader = reader(folder.path());
    assert_equal(&reader, after.unwrap_or(before), what);
    let lsn = query(
        &reader,
        "SELECT coalesce(lsn, 'none') FROM _anabranch_status",
    );
    let expected = file
        .position()
        .map_or("none".to_owned(), |p| p.lsn.to_string());
    assert_eq!(lsn, [format!("'{expected}'")], "{what}");
    if let Some(after) = after {
        assert_told(before, after, &applied.changes, what);
        let mut names: Vec<String> = after.keys().map(|name| format!("'{name}'")).collect();
        names.sort();
        assert_eq!(
            query(
                &reader,
                "SELECT table_name FROM _anabranch_tables ORDER BY 1"
            ),
            names,
            "{what}"
        );
    }
}

#[test]
fn random_streams_leave_what_the_model_says() {
    let seed = seed();
    println!("ANABRANCH_SEED={seed}");
    let rounds = env::var("ANABRANCH_ROUNDS").map_or(25, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        run(seed.wrapping_add(round));
    }
}
