//! How values of Postgres look in a replica's file, said in SQL.
//!
//! The README's "Types", written down a second time: each type as an expression by which Postgres itself
//! prints the value in the documented form, as text that [`Form::cell`] takes without looking into it.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::{Cell, hex, unhex};

/// Under these, Postgres prints what has no form of its own. Every session of an oracle starts with them, since a
/// database or role may set others.
pub const SESSION: &str = "SET DateStyle = 'ISO, MDY'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres';
    SET bytea_output = 'hex'; SET extra_float_digits = 1; SET lc_monetary = 'C'; SET xmlbinary = 'base64';
    SET statement_timeout = 0; SET synchronous_commit = on";

/// The form of a type's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// int2, int4, int8, oid.
    Integer,
    /// 0 or 1.
    Bool,
    /// float4, float8: NaN is NULL, −0.0 is 0.0.
    Real {
        /// float4. In an array `1.1` and `1.100000023841858` both are its value.
        single: bool,
    },
    /// bytea.
    Blob,
    /// `YYYY-MM-DD HH:MM:SS.ffffffZ`.
    Timestamptz,
    /// `YYYY-MM-DD HH:MM:SS.ffffff`.
    Timestamp,
    /// `YYYY-MM-DD`.
    Date,
    /// `HH:MM:SS.ffffff`.
    Time,
    /// What Postgres prints. Of char(n), `::text` drops the trailing blanks.
    Text,
    /// A JSON array.
    Array(Box<Form>),
}

/// The types of a database.
#[derive(Clone, Debug)]
pub struct Types(HashMap<u32, Type>);

#[derive(Clone, Debug)]
struct Type {
    /// Of a type of Postgres' own, else empty.
    name: String,
    /// Of a domain; else 0.
    base: u32,
    /// Of an array; else 0.
    element: u32,
}

impl Types {
    /// Asks for all of them.
    pub async fn load(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let rows = client
            .query(
                "SELECT t.oid, CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname::text ELSE '' END,
                        t.typbasetype, coalesce(e.oid, 0::oid)
                 FROM pg_type t LEFT JOIN pg_type e ON e.typarray = t.oid",
                &[],
            )
            .await?;
        let types = rows.iter().map(|row| {
            let kind = Type {
                name: row.get(1),
                base: row.get(2),
                element: row.get(3),
            };
            (row.get(0), kind)
        });
        Ok(Self(types.collect()))
    }

    /// The form of a type's values.
    pub fn form(&self, oid: u32) -> Form {
        let Some(kind) = self.0.get(&oid) else {
            return Form::Text;
        };
        if kind.base != 0 {
            return self.form(kind.base);
        }
        if kind.element != 0 {
            return Form::Array(Box::new(self.form(kind.element)));
        }
        match kind.name.as_str() {
            "int2" | "int4" | "int8" | "oid" => Form::Integer,
            "bool" => Form::Bool,
            "float4" => Form::Real { single: true },
            "float8" => Form::Real { single: false },
            "bytea" => Form::Blob,
            "timestamptz" => Form::Timestamptz,
            "timestamp" => Form::Timestamp,
            "date" => Form::Date,
            "time" => Form::Time,
            _ => Form::Text,
        }
    }
}

impl Form {
    /// The expression that gives a value, itself given by the expression `x`, as text for [`cell`](Self::cell).
    pub fn sql(&self, x: &str) -> String {
        // Years that the form has room for; all else is as Postgres prints it.
        let within = |first: &str, end: &str, form: String| {
            format!(
                "CASE WHEN isfinite({x}) AND {x} >= '{first}' AND {x} < '{end}' THEN {form} ELSE {x}::text END"
            )
        };
        match self {
            Form::Integer => format!("({x})::int8::text"),
            Form::Bool => format!("({x})::bool::int::text"),
            Form::Real { .. } => format!(
                "CASE WHEN {x} = 'NaN' THEN NULL ELSE encode(float8send({x}::float8 + '0'::float8), 'hex') END"
            ),
            Form::Blob => format!("encode({x}, 'hex')"),
            Form::Timestamptz => within(
                "0001-01-01 00:00:00+00",
                "10000-01-01 00:00:00+00",
                format!("to_char({x} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US\"Z\"')"),
            ),
            Form::Timestamp => within(
                "0001-01-01 00:00:00",
                "10000-01-01 00:00:00",
                format!("to_char({x}, 'YYYY-MM-DD HH24:MI:SS.US')"),
            ),
            Form::Date => within(
                "0001-01-01",
                "10000-01-01",
                format!("to_char({x}, 'YYYY-MM-DD')"),
            ),
            // There is a 24:00:00, but no such time of any day.
            Form::Time => format!(
                "CASE WHEN {x} = '24:00:00' THEN '24:00:00.000000'
                      ELSE to_char('2000-01-01'::date + {x}, 'HH24:MI:SS.US') END"
            ),
            Form::Text => format!("({x})::text"),
            Form::Array(element) => {
                // The elements are numbered as they lie in memory, whatever the dimensions. Of those that are printed
                // as they are, `unnest` would take composites apart.
                let elements = match **element {
                    Form::Text => format!("({x})::text[]"),
                    _ => x.to_owned(),
                };
                // NaN has a spelling in an array, and is told from NULL by it.
                let form = match **element {
                    Form::Real { .. } => {
                        "CASE WHEN e IS NOT NULL THEN encode(float8send(e::float8), 'hex') END"
                            .into()
                    }
                    _ => element.sql("e"),
                };
                format!(
                    "CASE WHEN {x} IS NOT NULL THEN jsonb_build_object(
                       'lengths', (SELECT coalesce(jsonb_agg(array_length({x}, d) ORDER BY d), '[]')
                                   FROM generate_series(1, array_ndims({x})) d),
                       'elements', (SELECT coalesce(jsonb_agg({form} ORDER BY o), '[]')
                                    FROM unnest({elements}) WITH ORDINALITY u(e, o)))::text END"
                )
            }
        }
    }

    /// The value that [`sql`](Self::sql) printed, as it lies in a file.
    pub fn cell(&self, text: Option<&str>) -> Cell {
        let Some(text) = text else { return Cell::Null };
        let cell = match self {
            Form::Integer | Form::Bool => text.parse().ok().map(Cell::Integer),
            Form::Real { .. } => u64::from_str_radix(text, 16).ok().map(Cell::Real),
            Form::Blob => unhex(text).map(Cell::Blob),
            Form::Array(element) => array(element, text).map(|json| Cell::Array(json.to_string())),
            _ => Some(Cell::Text(text.to_owned())),
        };
        cell.unwrap_or_else(|| panic!("Postgres printed a value of {self:?} as {text}"))
    }

    /// A value that was read from a file, for comparison with one of [`cell`](Self::cell).
    pub fn found(&self, cell: Cell) -> Cell {
        match (self, cell) {
            (Form::Array(element), Cell::Text(text)) => {
                match serde_json::from_str(&text)
                    .ok()
                    .and_then(|json| canonical(element, json))
                {
                    Some(json) => Cell::Array(json.to_string()),
                    None => Cell::Text(text),
                }
            }
            (_, cell) => cell,
        }
    }
}

/// The JSON that an array must be.
fn array(element: &Form, text: &str) -> Option<serde_json::Value> {
    let parts: serde_json::Value = serde_json::from_str(text).ok()?;
    let mut elements = parts["elements"].as_array()?.iter();
    let lengths: Option<Vec<_>> = parts["lengths"]
        .as_array()?
        .iter()
        .map(|n| n.as_u64())
        .collect();
    nested(element, &lengths?, &mut elements)
}

fn nested<'a>(
    element: &Form,
    lengths: &[u64],
    elements: &mut impl Iterator<Item = &'a serde_json::Value>,
) -> Option<serde_json::Value> {
    let Some((length, inner)) = lengths.split_first() else {
        return Some(serde_json::json!([]));
    };
    let mut one = || match inner {
        [] => Some(leaf(element, element.cell(elements.next()?.as_str()))),
        _ => nested(element, inner, elements),
    };
    (0..*length).map(|_| one()).collect()
}

/// An element as JSON, from its form outside of arrays.
fn leaf(element: &Form, cell: Cell) -> serde_json::Value {
    match (element, cell) {
        (_, Cell::Null) => serde_json::Value::Null,
        (Form::Bool, Cell::Integer(value)) => (value != 0).into(),
        (_, Cell::Integer(value)) => value.into(),
        (_, Cell::Real(bits)) => real(f64::from_bits(bits)),
        (_, Cell::Blob(bytes)) => format!("\\x{}", hex(&bytes)).into(),
        (_, Cell::Text(text) | Cell::Array(text)) => text.into(),
    }
}

fn real(value: f64) -> serde_json::Value {
    match value {
        _ if value.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        // −0.0 is equal to 0.0, and is spelled like it.
        _ => (value + 0.0).into(),
    }
}

/// JSON from a file, with each float spelled as [`leaf`] spells it. `None`: not an array.
fn canonical(element: &Form, json: serde_json::Value) -> Option<serde_json::Value> {
    let serde_json::Value::Array(items) = json else {
        return None;
    };
    let item = |item: serde_json::Value| match item {
        serde_json::Value::Array(_) => canonical(element, item),
        serde_json::Value::Number(number) => match element {
            Form::Real { single: true } => number.as_f64().map(|n| real(f64::from(n as f32))),
            Form::Real { single: false } => number.as_f64().map(real),
            _ => Some(number.into()),
        },
        item => Some(item),
    };
    items.into_iter().map(item).collect()
}
