//! Random tables and shapes with subqueries, and what these mean, found out in the most simple way.
//!
//! - [`Schema`]: some tables with few values, so that rows meet; keys of one or two columns, NULLs, foreign keys.
//! - [`Condition`]: conditions as Postgres has them, as SQL, and what they are of a row: each row of an inner table is looked at,
//!   with no index, no order and no memory.
//! - [`generator`]: any of these.
//!
//! Nothing here knows how the streamer does it.

mod condition;
pub mod generator;

use std::collections::BTreeMap;

pub use condition::{Comparison, Condition, Inner, Operand, Truth};
use serde_json::{Map, json};

/// A value. Numbers are whole; a numeric one has a number of zeros behind its point, which make no difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// NULL.
    Null,
    /// A number, with its zeros.
    Number(i64, u8),
    /// Text.
    Text(String),
}

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// integer
    Int4,
    /// bigint
    Int8,
    /// numeric
    Numeric,
    /// text
    Text,
}

/// A column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: Kind,
}

/// What becomes of rows when the row goes that they refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDelete {
    /// They go too.
    Cascade,
    /// They refer to nothing.
    SetNull,
}

/// A foreign key: of one column, to a table with a key of one column.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Place of the column.
    pub column: usize,
    /// Place of the table that it refers to.
    pub to: usize,
    /// What happens.
    pub on_delete: OnDelete,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Its columns.
    pub columns: Vec<Column>,
    /// Places of the key's columns, in its order; these are never NULL.
    pub key: Vec<usize>,
    /// Its foreign keys.
    pub links: Vec<Link>,
    /// What shapes choose of it: `None`, all.
    pub chosen: Option<Vec<usize>>,
}

/// Some tables.
#[derive(Clone, Debug)]
pub struct Schema {
    /// The tables; foreign keys lead to those before.
    pub tables: Vec<Table>,
    /// Keys of one column are below this, and as many are the values of others, about.
    pub width: i64,
}

/// A row: one value for each column.
pub type Row = Vec<Value>;

/// The rows of all tables, by key.
pub type Data = Vec<BTreeMap<Vec<Value>, Row>>;

/// What the parameters of all shapes are, for one replica.
#[derive(Clone, Debug)]
pub struct Principal {
    /// `$me`, an integer.
    pub me: i64,
    /// `$top`, another one.
    pub top: i64,
    /// `$num`, a numeric.
    pub num: i64,
    /// `$name`, text.
    pub name: String,
    /// `$them`, an array of integers.
    pub them: Vec<i64>,
}

/// A shape with a single SELECT.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its name.
    pub name: String,
    /// Place of its table.
    pub table: usize,
    /// Its condition.
    pub condition: Condition,
}

impl Kind {
    /// As SQL has it.
    pub fn sql(self) -> &'static str {
        match self {
            Kind::Int4 => "integer",
            Kind::Int8 => "bigint",
            Kind::Numeric => "numeric",
            Kind::Text => "text",
        }
    }

    /// Whether values of the two can be compared.
    pub fn goes_with(self, other: Kind) -> bool {
        (self == Kind::Text) == (other == Kind::Text)
    }
}

impl Value {
    /// As a constant of SQL.
    pub fn sql(&self) -> String {
        match self {
            Value::Null => "NULL".into(),
            Value::Number(..) => self.text(),
            Value::Text(text) => format!("'{text}'"),
        }
    }

    /// As Postgres prints it.
    pub fn text(&self) -> String {
        match self {
            Value::Null => String::new(),
            Value::Number(number, 0) => number.to_string(),
            Value::Number(number, zeros) => format!("{number}.{}", "0".repeat((*zeros).into())),
            Value::Text(text) => text.clone(),
        }
    }
}

impl Table {
    /// The key of a row.
    pub fn key_of(&self, row: &Row) -> Vec<Value> {
        self.key.iter().map(|place| row[*place].clone()).collect()
    }

    /// What shapes choose of it.
    pub fn columns_sql(&self) -> String {
        match &self.chosen {
            None => "*".into(),
            Some(chosen) => {
                let names = chosen
                    .iter()
                    .map(|place| self.columns[*place].name.as_str());
                names.collect::<Vec<_>>().join(", ")
            }
        }
    }

    /// What shapes show of a row.
    pub fn project(&self, row: &Row) -> Row {
        match &self.chosen {
            None => row.clone(),
            Some(chosen) => chosen.iter().map(|place| row[*place].clone()).collect(),
        }
    }
}

impl Schema {
    /// Makes the tables.
    pub fn sql(&self) -> String {
        let mut sql = String::new();
        for table in &self.tables {
            let name = |place: &usize| table.columns[*place].name.clone();
            let mut parts: Vec<String> = (table.columns.iter().enumerate())
                .map(|(place, column)| {
                    let not_null = if table.key.contains(&place) {
                        " NOT NULL"
                    } else {
                        ""
                    };
                    format!("{} {}{not_null}", column.name, column.kind.sql())
                })
                .collect();
            let key: Vec<String> = table.key.iter().map(name).collect();
            parts.push(format!("PRIMARY KEY ({})", key.join(", ")));
            for link in &table.links {
                let to = &self.tables[link.to];
                let on_delete = match link.on_delete {
                    OnDelete::Cascade => "CASCADE",
                    OnDelete::SetNull => "SET NULL",
                };
                parts.push(format!(
                    "FOREIGN KEY ({}) REFERENCES {} ON DELETE {on_delete} ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED",
                    name(&link.column),
                    to.name
                ));
            }
            sql += &format!("CREATE TABLE {} ({});\n", table.name, parts.join(", "));
        }
        sql
    }
}

impl Principal {
    /// As claims of a token, beside its subject.
    pub fn claims(&self, subject: &str) -> Map<String, serde_json::Value> {
        let claims = json!({
            "sub": subject, "me": self.me, "top": self.top, "num": self.num, "name": self.name, "them": self.them,
        });
        claims.as_object().expect("an object").clone()
    }
}

impl Shape {
    /// Its SELECT, with parameters.
    pub fn sql(&self, schema: &Schema) -> String {
        self.select(schema, None)
    }

    /// Its SELECT, with the parameters of a principal filled in.
    pub fn sql_for(&self, schema: &Schema, principal: &Principal) -> String {
        self.select(schema, Some(principal))
    }

    fn select(&self, schema: &Schema, principal: Option<&Principal>) -> String {
        let table = &schema.tables[self.table];
        let condition = self.condition.sql(schema, self.table, principal);
        format!(
            "SELECT {} FROM {} WHERE {condition}",
            table.columns_sql(),
            table.name
        )
    }

    /// The parameters that it uses.
    pub fn params(&self, schema: &Schema) -> Vec<&'static str> {
        let sql = self.sql(schema);
        let uses = |name: &&&str| {
            let param = format!("${name}");
            sql.match_indices(&param).any(|(at, _)| {
                !sql[at + param.len()..].starts_with(|c: char| c.is_ascii_alphanumeric())
            })
        };
        ["me", "top", "num", "name", "them"]
            .iter()
            .filter(uses)
            .copied()
            .collect()
    }

    /// Whether it shows a row of its table.
    pub fn shows(&self, data: &Data, principal: &Principal, row: &Row) -> bool {
        self.condition.truth(data, principal, row) == Some(true)
    }
}
