//! Random transactions, as SQL.

use anabranch_tests::nested::{Kind, Schema, Value, generator};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

/// Rows of a table at most, about.
pub const ROWS_MAX: usize = 12;

/// Bytes of what every row has beside its columns, in a transaction that is too large to be routed, and in one that fills queues.
const PAD_BYTES: [usize; 2] = [120_000, 12_000];

/// The column for it, which no condition reads.
pub const PAD: &str = "pad";

pub struct Transactions<'a> {
    pub rng: &'a mut StdRng,
    pub schema: &'a Schema,
}

impl Transactions<'_> {
    /// One, from BEGIN to COMMIT or ROLLBACK.
    pub fn any(&mut self) -> String {
        let mut sql = String::from("BEGIN;\n");
        for _ in 0..*[1, 1, 2, 3, 4, 8].choose(self.rng).expect("six") {
            match self.rng.random_ratio(1, 20) {
                true => {
                    let (one, other) = (self.statement(), self.statement());
                    sql += &format!("SAVEPOINT s; {one}; {other}; ROLLBACK TO s;\n");
                }
                false => sql += &format!("{};\n", self.statement()),
            }
        }
        sql + match self.rng.random_ratio(1, 10) {
            true => "ROLLBACK;\n",
            false => "COMMIT;\n",
        }
    }

    /// A row more, if there are not too many.
    pub fn insert(&mut self, table: usize) -> String {
        let of = &self.schema.tables[table];
        let row = generator::row(self.rng, self.schema, table);
        let names: Vec<&str> = of.columns.iter().map(|c| c.name.as_str()).collect();
        let values: Vec<String> = (row.iter().enumerate())
            .map(|(place, value)| self.written(table, place, value))
            .collect();
        format!(
            "INSERT INTO {} ({}) SELECT {} WHERE (SELECT count(*) FROM {}) < {ROWS_MAX} ON CONFLICT DO NOTHING",
            of.name,
            names.join(", "),
            values.join(", "),
            of.name
        )
    }

    /// What a column may be set to: what it refers to is there, or it is NULL.
    fn written(&self, table: usize, place: usize, value: &Value) -> String {
        let of = &self.schema.tables[table];
        let kind = of.columns[place].kind.sql();
        match of.links.iter().find(|link| link.column == place) {
            Some(link) => {
                let to = &self.schema.tables[link.to];
                let key = &to.columns[to.key[0]].name;
                let value = value.sql();
                format!(
                    "(SELECT y.{key} FROM {} y WHERE y.{key} = {value})",
                    to.name
                )
            }
            None => format!("{}::{kind}", value.sql()),
        }
    }

    /// `column = value` of a row, for each column of the key.
    fn key(&mut self, table: usize) -> String {
        let of = &self.schema.tables[table];
        let row = generator::row(self.rng, self.schema, table);
        let parts: Vec<String> = (of.key.iter())
            .map(|place| format!("{} = {}", of.columns[*place].name, row[*place].sql()))
            .collect();
        parts.join(" AND ")
    }

    /// Some rows, by any column.
    fn some(&mut self, table: usize) -> String {
        let of = &self.schema.tables[table];
        let place = self.rng.random_range(0..of.columns.len());
        let value = generator::row(self.rng, self.schema, table)[place].clone();
        match value {
            Value::Null => format!("{} IS NULL", of.columns[place].name),
            value => format!("{} = {}", of.columns[place].name, value.sql()),
        }
    }

    fn statement(&mut self) -> String {
        let table = self.rng.random_range(0..self.schema.tables.len());
        let name = self.schema.tables[table].name.clone();
        match self.rng.random_range(0..100) {
            0..25 => self.insert(table),
            25..32 => {
                let inserts: Vec<String> = (0..4).map(|_| self.insert(table)).collect();
                inserts.join(";\n")
            }
            32..60 => {
                let (set, of) = (
                    self.set(table),
                    match self.rng.random_bool(0.6) {
                        true => self.key(table),
                        false => self.some(table),
                    },
                );
                format!("UPDATE {name} SET {set} WHERE {of}")
            }
            60..70 => format!("DELETE FROM {name} WHERE {}", self.key(table)),
            70..75 => format!("DELETE FROM {name} WHERE {}", self.some(table)),
            75..79 => {
                // The same key again; what referred to it went, or refers to nothing.
                let (key, insert) = (self.key(table), self.insert(table));
                format!("DELETE FROM {name} WHERE {key};\n{insert}")
            }
            79..90 => self.rekey(table),
            90..92 => format!("TRUNCATE {name} CASCADE"),
            92..95 => {
                let bytes = PAD_BYTES[usize::from(self.rng.random_ratio(3, 4))];
                let letter = char::from(self.rng.random_range(b'a'..=b'z'));
                format!("UPDATE {name} SET {PAD} = repeat('{letter}', {bytes})")
            }
            95..97 => format!("UPDATE {name} SET {PAD} = NULL WHERE {PAD} IS NOT NULL"),
            _ => {
                // Two columns of one type swap what they say, in all rows.
                let of = &self.schema.tables[table];
                let free = |place: &usize| {
                    !of.key.contains(place) && of.links.iter().all(|link| link.column != *place)
                };
                let places: Vec<usize> = (0..of.columns.len()).filter(free).collect();
                let same = |one: &usize, other: &usize| {
                    let kind = |place: &usize| of.columns[*place].kind;
                    kind(one) == kind(other) && kind(one) != Kind::Text
                };
                let pair = places
                    .iter()
                    .flat_map(|one| places.iter().map(move |other| (one, other)));
                match pair
                    .into_iter()
                    .find(|(one, other)| one != other && same(one, other))
                {
                    Some((one, other)) => {
                        let (one, other) = (&of.columns[*one].name, &of.columns[*other].name);
                        format!("UPDATE {name} SET {one} = {other}, {other} = {one}")
                    }
                    None => self.insert(table),
                }
            }
        }
    }

    fn set(&mut self, table: usize) -> String {
        let of = &self.schema.tables[table];
        let row = generator::row(self.rng, self.schema, table);
        let mut sets = Vec::new();
        for (place, (column, value)) in of.columns.iter().zip(&row).enumerate() {
            if !of.key.contains(&place) && self.rng.random_bool(0.5) {
                let value = self.written(table, place, value);
                sets.push(format!("{} = {value}", column.name));
            }
        }
        match sets.is_empty() {
            true => format!("{PAD} = {PAD}"),
            false => sets.join(", "),
        }
    }

    /// The key of a row becomes another one, if that is free.
    fn rekey(&mut self, table: usize) -> String {
        let (from, row) = (
            self.key(table),
            generator::row(self.rng, self.schema, table),
        );
        let of = &self.schema.tables[table];
        let parts: Vec<String> = (of.key.iter())
            .map(|place| format!("{} = {}", of.columns[*place].name, row[*place].sql()))
            .collect();
        format!(
            "UPDATE {0} SET {1} WHERE {from} AND NOT EXISTS (SELECT 1 FROM {0} y WHERE {2})",
            of.name,
            parts.join(", "),
            parts.join(" AND ")
        )
    }
}
