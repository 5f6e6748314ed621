//! Local writes without triggers: what those would do is done here, by hand, as the contract says it. So these tests
//! see entries and base rows only, however they are captured.

use rusqlite::{params_from_iter, types::Value};

use super::*;

pub type Row = Vec<Value>;

/// A writable table of a test.
#[derive(Clone)]
pub struct Sheet {
    pub id: u32,
    pub name: &'static str,
    pub columns: Vec<(&'static str, v1::Storage, u32, v1::Conflict)>,
}

pub const RECEIPTS: u32 = 100;
pub const REJECTIONS: u32 = 101;

impl Sheet {
    /// `t(id, a, b, n)`, where `n` is a numeric that is added.
    pub fn simple() -> Sheet {
        use v1::Conflict::{Add, LastWrite};
        Sheet {
            id: 1,
            name: "t",
            columns: vec![
                ("id", Integer, 1, LastWrite),
                ("a", Text, 0, LastWrite),
                ("b", Text, 0, LastWrite),
                ("n", Text, 0, Add),
            ],
        }
    }

    pub fn composite() -> Sheet {
        use v1::Conflict::{Add, FirstWrite, LastWrite};
        Sheet {
            id: 2,
            name: "s.wide one",
            columns: vec![
                ("x", Real, 0, LastWrite),
                ("k\"2", Text, 2, LastWrite),
                ("i", Integer, 0, Add),
                ("k1", Integer, 1, LastWrite),
                ("blob", Blob, 0, FirstWrite),
            ],
        }
    }

    pub fn declare(&self) -> v1::Element {
        let columns: Vec<_> = self
            .columns
            .iter()
            .map(|&(name, storage, key, _)| (name, storage, key))
            .collect();
        let mut table = declared(self.id, self.name, &columns);
        table.writable = true;
        for (column, (.., conflict)) in table.columns.iter_mut().zip(&self.columns) {
            column.conflict = (*conflict).into();
        }
        element(Kind::Table(table))
    }

    /// Places of the key, in its order.
    pub fn key(&self) -> Vec<usize> {
        let mut key: Vec<usize> = (0..self.columns.len())
            .filter(|&place| self.columns[place].2 > 0)
            .collect();
        key.sort_by_key(|&place| self.columns[place].2);
        key
    }

    pub fn key_of(&self, row: &[Value]) -> Row {
        self.key().iter().map(|&place| row[place].clone()).collect()
    }

    fn quoted(&self) -> String {
        crate::file::names::quote(self.name)
    }

    fn entries(&self) -> String {
        crate::file::names::quote(&format!("_anabranch_entries_{}", self.name))
    }

    fn base_rows(&self) -> String {
        crate::file::names::quote(&format!("_anabranch_base_rows_{}", self.name))
    }

    fn names(&self) -> Vec<String> {
        let quote =
            |(name, ..): &(&str, v1::Storage, u32, v1::Conflict)| crate::file::names::quote(name);
        self.columns.iter().map(quote).collect()
    }

    fn by_key(&self) -> String {
        let names = self.names();
        let terms: Vec<String> = self
            .key()
            .iter()
            .map(|&place| format!("{} = ?", names[place]))
            .collect();
        terms.join(" AND ")
    }

    pub fn row(&self, connection: &Connection, key: &[Value]) -> Option<Row> {
        let sql = format!(
            "SELECT {} FROM {} WHERE {}",
            self.names().join(","),
            self.quoted(),
            self.by_key()
        );
        let mut statement = connection.prepare(&sql).unwrap();
        let mut rows = statement.query(params_from_iter(key)).unwrap();
        let row = rows.next().unwrap()?;
        Some(
            (0..self.columns.len())
                .map(|i| row.get(i).unwrap())
                .collect(),
        )
    }

    fn save(&self, connection: &Connection, key: &[Value]) {
        let keys: Vec<String> = (0..key.len()).map(|i| format!("k{i}")).collect();
        let values: Vec<String> = (0..self.columns.len()).map(|i| format!("v{i}")).collect();
        let row = self.row(connection, key);
        let mut all: Row = key.to_vec();
        all.push(i64::from(row.is_some()).into());
        all.extend(row.unwrap_or_else(|| vec![Value::Null; self.columns.len()]));
        connection
            .execute(
                &format!(
                    "INSERT INTO {}({}, present, {}) VALUES({}) ON CONFLICT DO NOTHING",
                    self.base_rows(),
                    keys.join(","),
                    values.join(","),
                    vec!["?"; all.len()].join(",")
                ),
                params_from_iter(all),
            )
            .unwrap();
    }

    fn enter(&self, connection: &Connection, operation: &str, changed: &str, old: &Row, new: &Row) {
        connection
            .execute("UPDATE _anabranch_head SET last = last + 1", [])
            .unwrap();
        let mut all: Row = vec![operation.to_owned().into(), changed.to_owned().into()];
        all.extend(old.iter().chain(new).cloned());
        connection
            .execute(
                &format!(
                    "INSERT INTO {} VALUES((SELECT last FROM _anabranch_head), ?, '2026-01-01 00:00:00.000000Z', ?, {})",
                    self.entries(),
                    vec!["?"; old.len() + new.len()].join(",")
                ),
                params_from_iter(all),
            )
            .unwrap();
    }

    fn nulls(&self) -> Row {
        vec![Value::Null; self.columns.len()]
    }

    pub fn insert(&self, connection: &Connection, row: &Row) {
        self.save(connection, &self.key_of(row));
        let sql = format!(
            "INSERT INTO {} VALUES({})",
            self.quoted(),
            vec!["?"; row.len()].join(",")
        );
        connection.execute(&sql, params_from_iter(row)).unwrap();
        let changed = "1".repeat(row.len());
        self.enter(connection, "insert", &changed, &self.nulls(), row);
    }

    pub fn delete(&self, connection: &Connection, key: &[Value]) {
        let Some(row) = self.row(connection, key) else {
            return;
        };
        self.save(connection, key);
        let sql = format!("DELETE FROM {} WHERE {}", self.quoted(), self.by_key());
        connection.execute(&sql, params_from_iter(key)).unwrap();
        let changed = "0".repeat(row.len());
        self.enter(connection, "delete", &changed, &row, &self.nulls());
    }

    /// As UPDATE OR REPLACE would.
    pub fn update(&self, connection: &Connection, key: &[Value], new: &Row) {
        let Some(old) = self.row(connection, key) else {
            return;
        };
        if old == *new {
            return;
        }
        let new_key = self.key_of(new);
        if new_key != key {
            self.delete(connection, &new_key);
            self.save(connection, &new_key);
        }
        self.save(connection, key);
        let set: Vec<String> = self
            .names()
            .iter()
            .map(|name| format!("{name} = ?"))
            .collect();
        let sql = format!(
            "UPDATE {} SET {} WHERE {}",
            self.quoted(),
            set.join(","),
            self.by_key()
        );
        connection
            .execute(&sql, params_from_iter(new.iter().chain(key)))
            .unwrap();
        let differs = |place: usize| old[place] != new[place];
        let changed: String = (0..new.len())
            .map(|place| if differs(place) { '1' } else { '0' })
            .collect();
        let kept = |row: &Row| -> Row {
            (0..row.len())
                .map(|place| match differs(place) || self.columns[place].2 > 0 {
                    true => row[place].clone(),
                    false => Value::Null,
                })
                .collect()
        };
        self.enter(connection, "update", &changed, &kept(&old), &kept(new));
    }

    /// Sets columns by name.
    pub fn set(&self, connection: &Connection, key: impl Into<Value>, set: &[(&str, Value)]) {
        let key = [key.into()];
        let mut row = self.row(connection, &key).unwrap();
        for (name, value) in set {
            let place = self.columns.iter().position(|(n, ..)| n == name).unwrap();
            row[place] = value.clone();
        }
        self.update(connection, &key, &row);
    }

    pub fn all(&self, connection: &Connection, from: &str) -> Vec<String> {
        let names = self.names().join(",");
        let from = crate::file::names::quote(from);
        let mut rows = query(connection, &format!("SELECT {names} FROM {from}"));
        rows.sort();
        rows
    }
}

impl Folder {
    /// One local transaction of a program.
    pub fn write(&self, write: impl FnOnce(&Connection)) {
        let mut connection = Connection::open(self.path()).unwrap();
        let transaction = connection.transaction().unwrap();
        write(&transaction);
        transaction.commit().unwrap();
    }

    /// All that was written so far is one more local transaction.
    pub fn assign(&self, file: &mut File) -> u64 {
        let head: i64 = reader(self.path())
            .query_row("SELECT last FROM _anabranch_head", [], |row| row.get(0))
            .unwrap();
        file.assign(&[head], false).unwrap();
        file.assigned().unwrap().0
    }
}

pub fn with_purpose(mut table: v1::Table, purpose: v1::Purpose) -> v1::Element {
    table.purpose = purpose.into();
    table.schema = "anabranch".into();
    element(Kind::Table(table))
}

pub fn receipts() -> [v1::Element; 2] {
    let receipts = declared(
        RECEIPTS,
        "replicas",
        &[("replica", Text, 1), ("seq", Integer, 0), ("hash", Blob, 0)],
    );
    let rejections = declared(
        REJECTIONS,
        "rejections",
        &[
            ("replica", Text, 1),
            ("seq", Integer, 2),
            ("entry", Integer, 0),
            ("outcome", Text, 0),
            ("sqlstate", Text, 0),
            ("message", Text, 0),
            ("constraint_name", Text, 0),
        ],
    );
    [
        with_purpose(receipts, v1::Purpose::Receipts),
        with_purpose(rejections, v1::Purpose::Rejections),
    ]
}

/// All up to `seq` is answered.
pub fn receipt(file: &File, seq: u64) -> v1::Element {
    let hash = file.hash_of(seq).unwrap().unwrap_or([0; 32]);
    upserts(
        RECEIPTS,
        &[&[T(file.replica_id()), I(seq as i64), B(&hash)]],
    )
}

pub fn rejection(file: &File, seq: u64, entry: Option<i64>) -> v1::Element {
    let entry = entry.map_or(N, I);
    upserts(
        REJECTIONS,
        &[&[
            T(file.replica_id()),
            I(seq as i64),
            entry,
            T("insert_exists"),
            T("23505"),
            T("duplicate key"),
            T("t_pkey"),
        ]],
    )
}

pub fn text(text: &str) -> Value {
    Value::Text(text.into())
}
