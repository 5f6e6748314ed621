//! The types of what is compared, and what Postgres compares with what.

use std::sync::Arc;

use super::syntax::TypeName;
use crate::table::{Column, Kind, Table};

/// A type whose values compare here exactly as they do in Postgres.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataType {
    /// int2
    Int2,
    /// int4
    Int4,
    /// int8
    Int8,
    /// oid
    Oid,
    /// bool
    Bool,
    /// float4
    Float4,
    /// float8
    Float8,
    /// numeric
    Numeric,
    /// text and varchar
    Text,
    /// name
    Name,
    /// char(n)
    Char,
    /// An enum.
    Enum(Enum),
    /// uuid
    Uuid,
    /// bytea
    Bytea,
    /// timestamptz
    Timestamptz,
    /// timestamp
    Timestamp,
    /// date
    Date,
    /// time
    Time,
}

/// An enum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enum {
    /// Its OID: two enums with the same labels are two types.
    pub oid: u32,
    /// As `format_type()` prints it.
    pub name: String,
    /// In the order of the catalog.
    pub labels: Arc<[String]>,
}

/// How two values are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Integers and numerics, by value.
    Number,
    /// Floats, and what Postgres makes a float to compare it with one.
    Float,
    /// false before true.
    Bool,
    /// By bytes: text, char(n) without trailing blanks, uuid in its canonical form, bytea.
    Bytes,
    /// Labels of an enum, for equality.
    Label,
    /// Labels of an enum, by their order.
    Rank(Arc<[String]>),
    /// Dates and timestamps.
    Instant,
    /// Times.
    Time,
}

impl DataType {
    /// The type of a column; none where its values can't be compared exactly.
    pub fn of(column: &Column) -> Option<DataType> {
        Some(match &column.kind {
            Kind::Integer => match column.base_oid {
                21 => DataType::Int2,
                23 => DataType::Int4,
                26 => DataType::Oid,
                _ => DataType::Int8,
            },
            Kind::Bool => DataType::Bool,
            Kind::Float4 => DataType::Float4,
            Kind::Float8 => DataType::Float8,
            Kind::Numeric => DataType::Numeric,
            Kind::Text if column.base_oid == 19 => DataType::Name,
            Kind::Text => DataType::Text,
            Kind::Char => DataType::Char,
            Kind::Enum(labels) => DataType::Enum(Enum {
                oid: column.type_oid,
                name: column.postgres_type.clone(),
                labels: labels.as_slice().into(),
            }),
            Kind::Uuid => DataType::Uuid,
            Kind::Bytea => DataType::Bytea,
            Kind::Timestamptz => DataType::Timestamptz,
            Kind::Timestamp => DataType::Timestamp,
            Kind::Date => DataType::Date,
            Kind::Time => DataType::Time,
            Kind::Citext | Kind::Json | Kind::Array(..) | Kind::Other => return None,
        })
    }

    /// The type that `name` names. Enums are known only as types of the columns of `tables`.
    pub fn named<'a>(
        name: &TypeName,
        tables: impl Iterator<Item = &'a Table>,
    ) -> Result<DataType, String> {
        let built_in = match name.schema.as_deref() {
            None | Some("pg_catalog") => match name.name.as_str() {
                "int2" => Some(DataType::Int2),
                "int4" => Some(DataType::Int4),
                "int8" => Some(DataType::Int8),
                "oid" => Some(DataType::Oid),
                "bool" => Some(DataType::Bool),
                "float4" => Some(DataType::Float4),
                "float8" => Some(DataType::Float8),
                "numeric" => Some(DataType::Numeric),
                "text" | "varchar" => Some(DataType::Text),
                "name" => Some(DataType::Name),
                "bpchar" => Some(DataType::Char),
                "uuid" => Some(DataType::Uuid),
                "bytea" => Some(DataType::Bytea),
                "timestamptz" => Some(DataType::Timestamptz),
                "timestamp" => Some(DataType::Timestamp),
                "date" => Some(DataType::Date),
                "time" => Some(DataType::Time),
                _ => None,
            },
            Some(_) => None,
        };
        if let Some(built_in) = built_in {
            return Ok(built_in);
        }
        let mut found: Option<DataType> = None;
        for column in tables.flat_map(|table| &table.columns) {
            let is_it =
                matches!(column.kind, Kind::Enum(_)) && is_named(&column.postgres_type, name);
            match DataType::of(column) {
                Some(other) if is_it && found.as_ref().is_some_and(|found| *found != other) => {
                    return Err(format!(
                        "columns have two types that are called {}: write its schema, too",
                        name.name
                    ));
                }
                Some(data_type) if is_it => found = Some(data_type),
                _ => {}
            }
        }
        found.ok_or_else(|| {
            let schema = name.schema.as_ref().map(|schema| format!("{schema}.")).unwrap_or_default();
            format!(
                "the type {schema}{} is not supported here: neither one whose values compare exactly, nor an enum \
                 that a column of the table has",
                name.name
            )
        })
    }

    /// As SQL names it.
    pub fn sql(&self) -> &str {
        match self {
            DataType::Int2 => "int2",
            DataType::Int4 => "int4",
            DataType::Int8 => "int8",
            DataType::Oid => "oid",
            DataType::Bool => "bool",
            DataType::Float4 => "float4",
            DataType::Float8 => "float8",
            DataType::Numeric => "numeric",
            DataType::Text => "text",
            DataType::Name => "name",
            DataType::Char => "bpchar",
            DataType::Enum(Enum { name, .. }) => name,
            DataType::Uuid => "uuid",
            DataType::Bytea => "bytea",
            DataType::Timestamptz => "timestamptz",
            DataType::Timestamp => "timestamp",
            DataType::Date => "date",
            DataType::Time => "time",
        }
    }

    /// int2, int4, int8.
    pub fn is_integer(&self) -> bool {
        matches!(self, DataType::Int2 | DataType::Int4 | DataType::Int8)
    }

    /// Whether a sign may stand before a constant of it.
    pub fn is_negatable(&self) -> bool {
        self.numeric_rank().is_some()
    }

    fn is_float(&self) -> bool {
        matches!(self, DataType::Float4 | DataType::Float8)
    }

    /// Place in the order in which Postgres casts numbers without being asked: each to those after it.
    fn numeric_rank(&self) -> Option<u8> {
        Some(match self {
            DataType::Int2 => 0,
            DataType::Int4 => 1,
            DataType::Int8 => 2,
            DataType::Numeric => 3,
            DataType::Float4 => 4,
            DataType::Float8 => 5,
            _ => return None,
        })
    }

    /// The type that a list of the two has. Source: `select_common_type()` of Postgres.
    pub fn common(self, other: DataType) -> Option<DataType> {
        if self == other {
            return Some(self);
        }
        match (self.numeric_rank(), other.numeric_rank()) {
            (Some(a), Some(b)) => Some(if a >= b { self } else { other }),
            _ => match (&self, &other) {
                (DataType::Date, DataType::Timestamp) | (DataType::Timestamp, DataType::Date) => {
                    Some(DataType::Timestamp)
                }
                _ => None,
            },
        }
    }

    /// How values of the two types compare, in Postgres' choice of operator; `ordered` if equality is not enough.
    pub fn domain(&self, other: &DataType, ordered: bool) -> Result<Domain, String> {
        use DataType::*;
        Ok(match (self, other) {
            (a, b) if a.is_float() && b.numeric_rank().is_some() => Domain::Float,
            (a, b) if b.is_float() && a.numeric_rank().is_some() => Domain::Float,
            (a, b) if a.numeric_rank().is_some() && b.numeric_rank().is_some() => Domain::Number,
            (Oid, Oid) => Domain::Number,
            (Bool, Bool) => Domain::Bool,
            (Text | Name, Text | Name) | (Char, Char) | (Uuid, Uuid) | (Bytea, Bytea) => {
                Domain::Bytes
            }
            (Enum(a), Enum(b)) if a.oid == b.oid => match ordered {
                true => Domain::Rank(Arc::clone(&a.labels)),
                false => Domain::Label,
            },
            (Timestamptz, Timestamptz) | (Date | Timestamp, Date | Timestamp) => Domain::Instant,
            (Time, Time) => Domain::Time,
            (Char, Text | Name) | (Text | Name, Char) => {
                return Err(
                    "char(n) and text are not compared: whether trailing blanks count would depend on their types' \
                     spelling; cast the constant to bpchar"
                        .to_owned(),
                );
            }
            (Timestamptz, Date | Timestamp) | (Date | Timestamp, Timestamptz) => {
                return Err(format!(
                    "{} and {} are not compared: that depends on the session's time zone",
                    self.sql(),
                    other.sql()
                ));
            }
            (Oid, b) if b.is_integer() => return Err(OID.to_owned()),
            (a, Oid) if a.is_integer() => return Err(OID.to_owned()),
            _ => {
                return Err(format!(
                    "{} and {} can't be compared",
                    self.sql(),
                    other.sql()
                ));
            }
        })
    }
}

const OID: &str = "oid and other integers are not compared: Postgres would wrap negative ones; cast the constant to oid";

/// Whether `format`, as `format_type()` prints a type, is what `name` names.
fn is_named(format: &str, name: &TypeName) -> bool {
    let mut parts = unquoted_parts(format);
    let Some(last) = parts.pop() else {
        return false;
    };
    if last != name.name {
        return false;
    }
    match (parts.pop(), &name.schema) {
        (_, None) => true,
        (Some(schema), Some(named)) => schema == *named,
        // Printed without schema, it is in the search path: in `public`, as it is for tables.
        (None, Some(named)) => named == "public",
    }
}

/// `"My Schema".status` → `My Schema`, `status`.
fn unquoted_parts(format: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut chars = format.chars().peekable();
    while let Some(char) = chars.next() {
        let last = parts.last_mut().expect("it starts with one part");
        match char {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                last.push('"');
            }
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            char => last.push(char),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_enums_match_as_format_type_prints_them() {
        let name = |schema: Option<&str>, name: &str| TypeName {
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
            length: None,
            array: false,
        };
        assert!(is_named("status", &name(None, "status")));
        assert!(is_named("app.status", &name(None, "status")));
        assert!(is_named("app.status", &name(Some("app"), "status")));
        assert!(is_named(
            "\"My \"\"App\".\"St.atus\"",
            &name(Some("My \"App"), "St.atus")
        ));
        assert!(is_named("status", &name(Some("public"), "status")));
        assert!(!is_named("app.status", &name(Some("public"), "status")));
        assert!(!is_named("status", &name(Some("app"), "status")));
        assert!(!is_named("status", &name(None, "Status")));
    }
}
