//! Local writes, as programs make them.

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

    pub fn insert(&self, connection: &Connection, row: &Row) {
        let sql = format!(
            "INSERT INTO {} VALUES({})",
            self.quoted(),
            vec!["?"; row.len()].join(",")
        );
        connection.execute(&sql, params_from_iter(row)).unwrap();
    }

    pub fn delete(&self, connection: &Connection, key: &[Value]) {
        let sql = format!("DELETE FROM {} WHERE {}", self.quoted(), self.by_key());
        connection.execute(&sql, params_from_iter(key)).unwrap();
    }

    /// What is at the new key goes.
    pub fn update(&self, connection: &Connection, key: &[Value], new: &Row) {
        let set: Vec<String> = self
            .names()
            .iter()
            .map(|name| format!("{name} = ?"))
            .collect();
        let sql = format!(
            "UPDATE OR REPLACE {} SET {} WHERE {}",
            self.quoted(),
            set.join(","),
            self.by_key()
        );
        connection
            .execute(&sql, params_from_iter(new.iter().chain(key)))
            .unwrap();
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
            ("settled", Integer, 0),
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
            I(0),
        ]],
    )
}

pub fn text(text: &str) -> Value {
    Value::Text(text.into())
}
