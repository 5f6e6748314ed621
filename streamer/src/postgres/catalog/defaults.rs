//! What Postgres puts into columns that an INSERT leaves out: read from the catalogs, and told as far as SQLite can do the
//! same.
//!
//! A default is an expression. Of these only a few forms mean the same in a replica's file: a constant, the time, a random
//! uuid, the next of a sequence. They are recognized by how `pg_get_expr` prints them, under the settings that our
//! connections pin. The text is read by a parser of exactly those forms, and a constant in it, which is printed by its
//! type's output function, becomes a value as rows do (`convert`). Whatever is not understood, or would be rounded or
//! cast on its way into the column, is [`LeftOut::Other`]: then the column is left to Postgres.

use anabranch_proto::record::Builder;

use tokio_postgres::Client;

use super::super::{convert, sql::Error};
use crate::table::{Column, Defaults, Kind, LeftOut, Oid, Table};

/// A longer constant is left to Postgres: it would be part of the schema of each file.
const VALUE_BYTES_MAX: usize = 8 * 1024;

/// Digits of a float that every SQLite reads exactly: older ones round the last bit of longer ones otherwise.
const FLOAT_DIGITS_MAX: usize = 15;

/// Reads them, for tables that are known.
pub async fn read<'t>(
    client: &Client,
    tables: impl Iterator<Item = &'t Table> + Clone,
) -> Result<Defaults, Error> {
    let oids: Vec<Oid> = tables.clone().map(|table| table.oid).collect();
    // A domain's default counts where the column has none of its own.
    let rows = client
        .query(
            "SELECT a.attrelid, a.attnum, a.attidentity <> '',
                    coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), pg_catalog.pg_get_expr(t.typdefaultbin, 0))
               FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
              WHERE a.attrelid = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
                AND (a.attidentity <> '' OR d.oid IS NOT NULL OR t.typtype = 'd' AND t.typdefaultbin IS NOT NULL)",
            &[&oids],
        )
        .await?;
    let mut defaults = Defaults::new();
    for table in tables {
        let of_table = defaults.entry(table.oid).or_default();
        for row in rows.iter().filter(|row| row.get::<_, Oid>(0) == table.oid) {
            let attnum: i16 = row.get(1);
            let place = (table.columns.iter()).position(|column| column.attnum == attnum);
            let Some(place) = place else { continue };
            let is_key = table.integer_key() == Some(place);
            let left_out = match (row.get(2), row.get::<_, Option<&str>>(3)) {
                (true, _) if is_key => LeftOut::Sequence,
                (false, Some(text)) if is_key && is_nextval(text) => LeftOut::Sequence,
                (false, Some(text)) => of_expression(&table.columns[place], text),
                _ => LeftOut::Other,
            };
            if left_out != LeftOut::Null {
                of_table.insert(attnum, left_out);
            }
        }
    }
    Ok(defaults)
}

/// `nextval('schema.name'::regclass)`, and nothing around it.
fn is_nextval(text: &str) -> bool {
    let inside = text
        .strip_prefix("nextval(")
        .and_then(|text| text.strip_suffix(')'));
    inside
        .and_then(quoted)
        .is_some_and(|(_, rest)| rest == "::regclass")
}

/// What an expression, as Postgres prints it, puts into a column.
fn of_expression(column: &Column, text: &str) -> LeftOut {
    if is_now(text) {
        // A replica's clock has milliseconds.
        return match column.kind {
            Kind::Timestamptz if column.typmod == -1 || column.typmod >= 3 => LeftOut::Now,
            _ => LeftOut::Other,
        };
    }
    if is_uuid(text) {
        return match column.kind {
            Kind::Uuid => LeftOut::Uuid,
            _ => LeftOut::Other,
        };
    }
    let Some(constant) = Constant::read(text) else {
        return LeftOut::Other;
    };
    if constant.value == Value::Null {
        return LeftOut::Null;
    }
    match constant.in_column(column) {
        Some(record) if record.len() <= VALUE_BYTES_MAX => LeftOut::Value(record),
        _ => LeftOut::Other,
    }
}

fn is_now(text: &str) -> bool {
    matches!(
        text,
        "now()"
            | "CURRENT_TIMESTAMP"
            | "transaction_timestamp()"
            | "statement_timestamp()"
            | "clock_timestamp()"
    )
}

/// The extensions that have these may be in any schema.
fn is_uuid(text: &str) -> bool {
    let name = text.rsplit_once('.').map_or(text, |(_, name)| name);
    matches!(name, "gen_random_uuid()" | "uuid_generate_v4()")
}

/// A constant of an expression.
#[derive(Debug, PartialEq, Eq)]
struct Constant<'t> {
    value: Value,
    /// The type that it is cast to, as it is printed.
    cast: Option<&'t str>,
}

#[derive(Debug, PartialEq, Eq)]
enum Value {
    Null,
    Bool(bool),
    Number(String),
    Quoted(String),
    /// `ARRAY[]`.
    NoElements,
}

impl<'t> Constant<'t> {
    /// `0`, `'a'::text`, `(0)::numeric`, `NULL::text`, `true`, `ARRAY[]::text[]`: a constant with at most one cast.
    fn read(text: &'t str) -> Option<Constant<'t>> {
        let (value, rest) = match text.strip_prefix('(') {
            Some(inside) => {
                let (value, rest) = value(inside)?;
                (value, rest.strip_prefix(')')?)
            }
            None => value(text)?,
        };
        let cast = match rest {
            "" => None,
            rest => Some(rest.strip_prefix("::").filter(|cast| is_type(cast))?),
        };
        Some(Constant { value, cast })
    }

    /// A record of what it is in a column.
    fn in_column(&self, column: &Column) -> Option<Vec<u8>> {
        let is_cast_to = |types: &[&str]| self.cast.is_some_and(|cast| types.contains(&cast));
        let is_bare = self.cast.is_none();
        const INTEGERS: [&str; 3] = ["smallint", "integer", "bigint"];
        let is_own = self.cast == Some(without_modifier(&column.postgres_type).as_str());
        let text = match (&column.kind, &self.value) {
            (Kind::Bool, Value::Bool(value)) if is_bare => {
                if *value { "t" } else { "f" }.to_owned()
            }
            (Kind::Integer, Value::Number(text) | Value::Quoted(text))
                if is_bare || is_own || is_cast_to(&INTEGERS) =>
            {
                text.clone()
            }
            (Kind::Float4 | Kind::Float8, Value::Number(text) | Value::Quoted(text))
                if is_bare || is_own || is_cast_to(&INTEGERS) || is_cast_to(&["numeric"]) =>
            {
                float(text)?
            }
            (Kind::Numeric, Value::Number(text) | Value::Quoted(text))
                if is_bare || is_own || is_cast_to(&INTEGERS) || is_cast_to(&["numeric"]) =>
            {
                scaled(text, column.typmod)?
            }
            (Kind::Array(..), Value::NoElements) if is_own => "{}".to_owned(),
            (Kind::Text, Value::Quoted(text))
                if is_own || is_cast_to(&["text", "character varying"]) =>
            {
                text.clone()
            }
            (Kind::Char, Value::Quoted(text)) if is_own || is_cast_to(&["bpchar"]) => text.clone(),
            // What has a precision is rounded to it.
            (
                Kind::Citext
                | Kind::Enum(_)
                | Kind::Uuid
                | Kind::Bytea
                | Kind::Json
                | Kind::Timestamptz
                | Kind::Timestamp
                | Kind::Date
                | Kind::Time
                | Kind::Array(..)
                | Kind::Other,
                Value::Quoted(text),
            ) if is_own && column.typmod == -1 => text.clone(),
            _ => return None,
        };
        let mut builder = Builder::new();
        convert::push(&mut builder, &column.kind, text.as_bytes()).ok()?;
        Some(builder.finish().to_vec())
    }
}

/// A constant, and what follows it.
fn value(text: &str) -> Option<(Value, &str)> {
    for (word, value) in [
        ("NULL", Value::Null),
        ("true", Value::Bool(true)),
        ("false", Value::Bool(false)),
        ("ARRAY[]", Value::NoElements),
    ] {
        if let Some(rest) = text.strip_prefix(word) {
            return Some((value, rest));
        }
    }
    if let Some((text, rest)) = quoted(text) {
        return Some((Value::Quoted(text), rest));
    }
    let is_number = |char: char| char.is_ascii_digit() || char == '.';
    let end = text.find(|char| !is_number(char)).unwrap_or(text.len());
    let number = text.get(..end).filter(|number| !number.is_empty())?;
    Some((Value::Number(number.to_owned()), &text[end..]))
}

/// A quoted text, and what follows it. With a backslash in it, Postgres prints it as `E'…'`.
fn quoted(text: &str) -> Option<(String, &str)> {
    let (escaped, mut rest) = match text.strip_prefix("E'") {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('\'')?),
    };
    let mut value = String::new();
    loop {
        let end = rest.find(['\'', '\\'])?;
        value.push_str(&rest[..end]);
        let (special, after) = rest[end..].split_at(1);
        match (special, after.chars().next()) {
            ("'", Some('\'')) => value.push('\''),
            ("'", _) => return Some((value, after)),
            (_, Some('\\')) if escaped => value.push('\\'),
            (_, _) if escaped => return None,
            _ => {
                value.push('\\');
                rest = after;
                continue;
            }
        }
        rest = &after[1..];
    }
}

/// The name of a type, and nothing else.
fn is_type(text: &str) -> bool {
    let is_part = |char: char| char.is_alphanumeric() || "_ .,()[]\"$".contains(char);
    !text.is_empty() && text.chars().all(is_part)
}

/// `character varying(20)` is `character varying`; `timestamp(3) with time zone` is `timestamp with time zone`.
fn without_modifier(postgres_type: &str) -> String {
    match (postgres_type.find('('), postgres_type.find(')')) {
        (Some(open), Some(close)) if open < close && !postgres_type.contains('"') => {
            format!("{}{}", &postgres_type[..open], &postgres_type[close + 1..])
        }
        _ => postgres_type.to_owned(),
    }
}

/// A decimal that every SQLite reads as the float that Postgres reads.
fn float(text: &str) -> Option<String> {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    (digits <= FLOAT_DIGITS_MAX && is_decimal(text)).then(|| text.to_owned())
}

/// A decimal, with as many digits behind the point as a numeric of this modifier has. What would be rounded is none.
fn scaled(text: &str, typmod: i32) -> Option<String> {
    if !is_decimal(text) {
        return None;
    }
    // `atttypmod` of a numeric: 4 more than precision << 16 | scale, of which the scale has 11 bits, with a sign.
    let scale = match typmod {
        -1 => return Some(text.to_owned()),
        typmod => (typmod - 4) & 0x7ff,
    };
    let behind = text.split_once('.').map_or(0, |(_, digits)| digits.len());
    let missing = usize::try_from(scale).ok()?.checked_sub(behind)?;
    if scale > 1000 {
        return None;
    }
    let point = if behind == 0 && missing > 0 { "." } else { "" };
    Some(format!("{text}{point}{}", "0".repeat(missing)))
}

/// Digits, with a minus before, and a point between.
fn is_decimal(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (before, behind) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    is_number(before) && is_number(behind)
}

#[cfg(test)]
mod tests;
