//! Random local transactions, transactions of Postgres, answers, rejections and resets against a model. After every
//! commit the table is what Postgres has with what is pending on top, and the base view is what Postgres has.

use std::{collections::BTreeMap, env};

use rusqlite::types::Value;

use super::{
    local::*,
    model::{Random, seed},
    *,
};

/// By key as text, which sorts.
type Rows = BTreeMap<String, Row>;

#[derive(Clone, Debug)]
enum Change {
    Insert(Row),
    /// The key as it was; for each column that changed, the old and the new value; the new key.
    Update(Row, Vec<Option<(Value, Value)>>, Row),
    Delete(Row),
}

struct World {
    random: Random,
    sheets: Vec<Sheet>,
    /// What Postgres has, as it was last sent.
    upstream: Vec<Rows>,
    /// Local transactions that are not answered. Table and change.
    pending: Vec<Vec<(usize, Change)>>,
    /// Of those, so many are assigned.
    assigned: usize,
    answered: u64,
    rejected: usize,
    lsn: u64,
}

fn name(key: &[Value]) -> String {
    format!("{key:?}")
}

/// Adds as integers: the model's numerics are whole.
fn sum(there: &Value, old: &Value, new: &Value) -> Value {
    let number = |value: &Value| match value {
        Value::Integer(value) => Some(*value),
        Value::Text(value) => value.parse().ok(),
        _ => None,
    };
    match (number(there), number(old), number(new)) {
        (Some(there), Some(old), Some(added)) => match new {
            Value::Text(_) => text(&(there + added - old).to_string()),
            _ => (there + added - old).into(),
        },
        _ => new.clone(),
    }
}

/// False: it could not be made.
fn make(sheet: &Sheet, rows: &mut Rows, change: &Change) -> bool {
    match change {
        Change::Insert(row) => {
            let there = rows.insert(name(&sheet.key_of(row)), row.clone());
            there.is_none()
        }
        Change::Delete(key) => rows.remove(&name(key)).is_some(),
        Change::Update(key, columns, new_key) => {
            let Some(mut row) = rows.remove(&name(key)) else {
                return false;
            };
            for (place, column) in columns.iter().enumerate() {
                if let Some((old, new)) = column {
                    let adds = sheet.columns[place].3 == v1::Conflict::Add;
                    row[place] = if adds {
                        sum(&row[place], old, new)
                    } else {
                        new.clone()
                    };
                }
            }
            rows.insert(name(new_key), row).is_none()
        }
    }
}

fn dump(rows: &Rows) -> Vec<String> {
    let mut all: Vec<String> = rows
        .values()
        .map(|row| {
            let values: Vec<String> = row.iter().map(|value| literal(value.into())).collect();
            values.join("|")
        })
        .collect();
    all.sort();
    all
}

impl World {
    fn one_in(&mut self, n: u64) -> bool {
        self.random.below(n) == 0
    }

    fn value(&mut self, sheet: usize, place: usize) -> Value {
        let (_, storage, key, conflict) = self.sheets[sheet].columns[place];
        if key == 0 && self.one_in(6) {
            return Value::Null;
        }
        let n = self.random.below(if key > 0 { 4 } else { 50 }) as i64;
        match storage {
            Integer => n.into(),
            Real => (n as f64 / 2.0).into(),
            Text if conflict == v1::Conflict::Add => text(&n.to_string()),
            Text => text(&format!("v{n}")),
            _ => vec![n as u8; 3].into(),
        }
    }

    fn row(&mut self, sheet: usize) -> Row {
        let width = self.sheets[sheet].columns.len();
        (0..width).map(|place| self.value(sheet, place)).collect()
    }

    fn shown(&self, sheet: usize) -> Rows {
        let mut rows = self.upstream[sheet].clone();
        for (at, change) in self.pending.iter().flatten() {
            if *at == sheet {
                make(&self.sheets[sheet], &mut rows, change);
            }
        }
        rows
    }

    /// One local transaction, in the file and in the model.
    fn local(&mut self, folder: &Folder) {
        let mut changes = Vec::new();
        folder.write(|program| {
            for _ in 0..1 + self.random.below(4) {
                let at = self.random.below(self.sheets.len() as u64) as usize;
                let sheet = self.sheets[at].clone();
                let row = self.row(at);
                let key = sheet.key_of(&row);
                match sheet.row(program, &key) {
                    None => {
                        sheet.insert(program, &row);
                        changes.push((at, Change::Insert(row)));
                    }
                    Some(_) if self.one_in(3) => {
                        sheet.delete(program, &key);
                        changes.push((at, Change::Delete(key)));
                    }
                    Some(old) => {
                        let mut new = old.clone();
                        for (place, value) in new.iter_mut().enumerate() {
                            let is_key = sheet.columns[place].2 > 0;
                            if self.one_in(if is_key { 4 } else { 2 }) {
                                *value = self.value(at, place);
                            }
                        }
                        if new == old {
                            continue;
                        }
                        let new_key = sheet.key_of(&new);
                        if new_key != key && sheet.row(program, &new_key).is_some() {
                            changes.push((at, Change::Delete(new_key.clone())));
                        }
                        sheet.update(program, &key, &new);
                        let columns = old.into_iter().zip(new);
                        let columns = columns
                            .map(|(old, new)| (old != new).then_some((old, new)))
                            .collect();
                        changes.push((at, Change::Update(key, columns, new_key)));
                    }
                }
            }
        });
        if !changes.is_empty() {
            self.pending.push(changes);
        }
    }

    /// What Postgres does in one transaction: of others, and of ours. The elements that tell it.
    fn upstream(&mut self, file: &File) -> Vec<v1::Element> {
        let before = self.upstream.clone();
        for at in 0..self.sheets.len() {
            for _ in 0..self.random.below(3) {
                let row = self.row(at);
                let key = name(&self.sheets[at].key_of(&row));
                if self.one_in(3) {
                    self.upstream[at].remove(&key);
                } else {
                    self.upstream[at].insert(key, row);
                }
            }
        }
        let mut answers = Vec::new();
        while self.assigned > 0 && self.one_in(2) {
            let changes = self.pending.remove(0);
            self.assigned -= 1;
            self.answered += 1;
            let mut after = self.upstream.clone();
            let mut guilty = self.one_in(5).then_some(0);
            for (i, (at, change)) in changes.iter().enumerate() {
                let done = make(&self.sheets[*at], &mut after[*at], change);
                if !done && !matches!(change, Change::Delete(_)) {
                    guilty = guilty.or(Some(i));
                }
            }
            match guilty {
                Some(entry) => {
                    self.rejected += changes.len();
                    let entry = (!self.one_in(4)).then_some(entry as i64);
                    answers.push(rejection(file, self.answered, entry));
                }
                None => self.upstream = after,
            }
        }
        if self.answered > 0 {
            answers.push(receipt(file, self.answered));
        }
        let mut elements = Vec::new();
        for (at, sheet) in self.sheets.iter().enumerate() {
            for (key, row) in &self.upstream[at] {
                if before[at].get(key) != Some(row) {
                    elements.push(upsert(sheet, row));
                }
            }
            for (key, row) in &before[at] {
                if !self.upstream[at].contains_key(key) {
                    let key = sheet.key_of(row);
                    let key: Vec<ValueRef<'_>> = key.iter().map(value).collect();
                    elements.push(deletes(sheet.id, &[&key]));
                }
            }
        }
        elements.extend(answers);
        self.lsn += 10;
        elements
    }

    fn check(&self, folder: &Folder, what: &str) {
        let reader = reader(folder.path());
        for (at, sheet) in self.sheets.iter().enumerate() {
            let table = sheet.name;
            assert_eq!(
                sheet.all(&reader, table),
                dump(&self.shown(at)),
                "{what}: {table}"
            );
            assert_eq!(
                sheet.all(&reader, &format!("_anabranch_base_{table}")),
                dump(&self.upstream[at]),
                "{what}: base of {table}"
            );
        }
        let pending: usize = self.pending.iter().map(Vec::len).sum();
        assert_eq!(
            query(
                &reader,
                "SELECT pending, rejected, (SELECT count(*) FROM _anabranch_outbox) FROM _anabranch_status"
            ),
            [format!("{pending}|{}|{pending}", self.rejected)],
            "{what}"
        );
    }
}

fn value(value: &Value) -> ValueRef<'_> {
    match value {
        Value::Null => N,
        Value::Integer(value) => I(*value),
        Value::Real(value) => R(*value),
        Value::Text(value) => T(value),
        Value::Blob(value) => B(value),
    }
}

fn upsert(sheet: &Sheet, row: &Row) -> v1::Element {
    let row: Vec<ValueRef<'_>> = row.iter().map(value).collect();
    upserts(sheet.id, &[&row])
}

fn run(seed: u64) {
    let folder = Folder::new();
    let mut file = folder.open();
    let sheets = vec![Sheet::simple(), Sheet::composite()];
    let mut world = World {
        random: Random(seed),
        upstream: vec![Rows::new(); sheets.len()],
        sheets,
        pending: Vec::new(),
        assigned: 0,
        answered: 0,
        rejected: 0,
        lsn: 10,
    };
    let mut begun = false;
    for step in 0..150 {
        let what = format!("seed {seed}, step {step}");
        if begun {
            // At the end only answers come.
            while step < 120 && world.one_in(2) {
                world.local(&folder);
                world.check(&folder, &format!("{what}, after a local write"));
            }
            if world.one_in(2) || step >= 120 {
                world.assigned = world.pending.len();
                folder.assign_each(&mut file, &world);
            }
        }
        let is_first = !begun || world.one_in(12);
        let mut elements = Vec::new();
        if is_first {
            if world.one_in(2) {
                drop(file);
                file = folder.open();
            }
            file.begin_stream().unwrap();
            // Each table is sent in full, or goes on from where it is.
            let resets: Vec<u32> = [1, 2, RECEIPTS, REJECTIONS]
                .into_iter()
                .filter(|_| !begun || world.one_in(2))
                .collect();
            elements.push(first(&resets));
            for sheet in &world.sheets {
                elements.push(sheet.declare());
            }
            elements.extend(receipts());
            let changes = world.upstream(&file);
            for (at, sheet) in world.sheets.iter().enumerate() {
                if resets.contains(&sheet.id) {
                    elements.extend(world.upstream[at].values().map(|row| upsert(sheet, row)));
                }
            }
            elements.extend(changes.into_iter().filter(|change| match &change.kind {
                Some(Kind::Rows(rows)) => rows.table >= RECEIPTS || !resets.contains(&rows.table),
                _ => true,
            }));
            begun = true;
        } else {
            elements.push(begin(&[]));
            elements.extend(world.upstream(&file));
            // Several transactions in one commit.
            while world.one_in(3) {
                elements.push(commit(world.lsn));
                elements.push(begin(&[]));
                elements.extend(world.upstream(&file));
            }
        }
        elements.push(commit(world.lsn));
        file.apply(&down(elements))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        world.check(&folder, &what);
    }
    assert_eq!(world.pending.len(), 0, "seed {seed}");
    for sheet in ["t", "s.wide one"] {
        let left = folder.query(&format!(
            "SELECT count(*) FROM \"_anabranch_saved_{sheet}\""
        ));
        assert_eq!(left, ["0"], "seed {seed}");
    }
    assert_tidy(&folder);
}

impl Folder {
    /// Each transaction of the model is one.
    fn assign_each(&self, file: &mut File, world: &World) {
        let (seq, _) = file.assigned().unwrap();
        let mut last: i64 = query(
            &reader(self.path()),
            &format!(
                "SELECT coalesce(max(last), 0) FROM _anabranch_local WHERE seq <= {}",
                world.answered
            ),
        )[0]
        .parse()
        .unwrap();
        let mut ends = Vec::new();
        for changes in &world.pending {
            last += changes.len() as i64;
            ends.push(last);
        }
        file.assign(&ends, false).unwrap();
        assert!(file.assigned().unwrap().0 >= seq);
    }
}

#[test]
fn random_writes_on_both_sides_end_in_what_postgres_has() {
    let seed = seed();
    println!("ANABRANCH_SEED={seed}");
    let rounds = env::var("ANABRANCH_ROUNDS").map_or(10, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        run(seed.wrapping_add(round));
    }
}
