//! A value of SQLite becomes a parameter of Postgres: the inverse of [`convert`](super::super::convert).
//!
//! Every parameter has the column's own type (a domain's base) and travels as text, so that Postgres' input function
//! reads what its output function printed, without a typmod: an assignment then refuses what is too long, where a cast
//! would cut it. Only bytea travels as bytes.

use std::{error::Error, fmt::Write};

use anabranch_proto::record::ValueRef;
use bytes::BytesMut;
use tokio_postgres::types::{Format, IsNull, ToSql, Type};

use crate::table::Kind;

/// A value that no column of its type can have. SQLSTATE and message, as Postgres would say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unwritable {
    /// SQLSTATE.
    pub sqlstate: &'static str,
    /// Never shows the value.
    pub message: &'static str,
}

const STORAGE: Unwritable = Unwritable {
    sqlstate: "22018",
    message: "the value does not have the storage class of its column",
};
const ARRAY: Unwritable = Unwritable {
    sqlstate: "22P02",
    message: "the text is not a JSON array that the type of its column can have",
};

/// Postgres' MAXDIM.
const DIMENSIONS_MAX: usize = 6;

/// A parameter.
#[derive(Clone, PartialEq, Eq)]
pub enum Param {
    /// NULL.
    Null,
    /// In the text format.
    Text(String),
    /// In the binary format.
    Bytes(Vec<u8>),
}

impl Param {
    /// What travels, in its format; `None` for NULL.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Param::Null => None,
            Param::Text(text) => Some(text.as_bytes()),
            Param::Bytes(bytes) => Some(bytes),
        }
    }

    /// Whether it travels in the binary format.
    pub fn is_binary(&self) -> bool {
        matches!(self, Param::Bytes(_))
    }

    /// About how many bytes it takes.
    pub fn len(&self) -> usize {
        self.bytes().map_or(0, <[u8]>::len)
    }
}

/// Never shows the value: `tokio-postgres` would log it.
impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl ToSql for Param {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let Some(bytes) = self.bytes() else {
            return Ok(IsNull::Yes);
        };
        out.extend_from_slice(bytes);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        match self.is_binary() {
            true => Format::Binary,
            false => Format::Text,
        }
    }

    fn to_sql_checked(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        self.to_sql(ty, out)
    }
}

/// The parameter for a value of a column.
pub fn param(kind: &Kind, value: ValueRef<'_>) -> Result<Param, Unwritable> {
    if let (Kind::Bytea, ValueRef::Blob(bytes)) = (kind, value) {
        return Ok(Param::Bytes(bytes.to_vec()));
    }
    Ok(text(kind, value)?.map_or(Param::Null, Param::Text))
}

/// Postgres' text of a value; `None` for NULL.
pub fn text(kind: &Kind, value: ValueRef<'_>) -> Result<Option<String>, Unwritable> {
    Ok(Some(match (kind, value) {
        (_, ValueRef::Null) => return Ok(None),
        (Kind::Integer, ValueRef::Integer(value)) => value.to_string(),
        (Kind::Bool, ValueRef::Integer(value @ (0 | 1))) => value.to_string(),
        (Kind::Float4, ValueRef::Real(value)) => float4(value),
        (Kind::Float8, ValueRef::Real(value)) => float(value),
        (Kind::Bytea, ValueRef::Blob(bytes)) => {
            let mut hex = String::with_capacity(bytes.len() * 2 + 2);
            hex.push_str("\\x");
            for byte in bytes {
                let _ = write!(hex, "{byte:02x}");
            }
            hex
        }
        (Kind::Array(element, delimiter), ValueRef::Text(text)) => {
            array(element, *delimiter, text)?
        }
        (
            Kind::Integer
            | Kind::Bool
            | Kind::Float4
            | Kind::Float8
            | Kind::Bytea
            | Kind::Array(..),
            _,
        ) => return Err(STORAGE),
        (_, ValueRef::Text(text)) => text.to_owned(),
        _ => return Err(STORAGE),
    }))
}

fn float(value: f64) -> String {
    if value.is_infinite() {
        let sign = if value < 0.0 { "-" } else { "" };
        return format!("{sign}Infinity");
    }
    // The fewest digits that name it.
    format!("{value:e}")
}

/// In the digits of a float4 where it is one; any other is for Postgres to round, or to refuse.
fn float4(value: f64) -> String {
    let narrow = value as f32;
    if f64::from(narrow) == value && value.is_finite() {
        format!("{narrow:e}")
    } else {
        float(value)
    }
}

/// Postgres' literal of an array, from its JSON.
fn array(element: &Kind, delimiter: char, json: &str) -> Result<String, Unwritable> {
    if has_bounds(json) {
        return Ok(json.to_owned());
    }
    let mut literal = String::with_capacity(json.len() + 2);
    let mut rest = json.trim_ascii();
    let mut depth = 0;
    loop {
        // An array begins, or an element.
        if let Some(inner) = rest.strip_prefix('[') {
            depth += 1;
            if depth > DIMENSIONS_MAX {
                return Err(ARRAY);
            }
            literal.push('{');
            rest = inner.trim_ascii_start();
            if !rest.starts_with(']') {
                continue;
            }
        } else if depth == 0 {
            return Err(ARRAY);
        } else {
            rest = push_element(&mut literal, element, rest)?.trim_ascii_start();
        }
        while depth > 0
            && let Some(after) = rest.strip_prefix(']')
        {
            depth -= 1;
            literal.push('}');
            rest = after.trim_ascii_start();
        }
        if depth == 0 {
            return if rest.is_empty() {
                Ok(literal)
            } else {
                Err(ARRAY)
            };
        }
        rest = rest.strip_prefix(',').ok_or(ARRAY)?.trim_ascii_start();
        literal.push(delimiter);
    }
}

/// Whether it is Postgres' own text, `[2:4]={…}`, which no JSON can look like.
fn has_bounds(text: &str) -> bool {
    let Some((bounds, _)) = text.split_once('=') else {
        return false;
    };
    let part = |part: &str| -> bool {
        let digits = part.strip_prefix('-').unwrap_or(part);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    let dimension = |dimension: &str| {
        let bounds = dimension.split_once(':');
        bounds.is_some_and(|(lower, upper)| part(lower) && part(upper))
    };
    let inner = bounds.strip_prefix('[').and_then(|b| b.strip_suffix(']'));
    inner.is_some_and(|inner| inner.split("][").all(dimension))
}

/// Adds the element that `json` begins with; what follows it.
fn push_element<'a>(
    literal: &mut String,
    kind: &Kind,
    json: &'a str,
) -> Result<&'a str, Unwritable> {
    if !json.starts_with('"') {
        let end = json.find([',', ']', ' ', '\t', '\n', '\r']).ok_or(ARRAY)?;
        let (word, rest) = json.split_at(end);
        let number = || matches!(kind, Kind::Integer | Kind::Float4 | Kind::Float8);
        match word {
            "null" => literal.push_str("NULL"),
            "true" | "false" if *kind == Kind::Bool => literal.push_str(&word[..1]),
            // Digits and what belongs to them: nothing of it means anything to an array.
            _ if number()
                && !word.is_empty()
                && (word.bytes()).all(|b| {
                    b.is_ascii_digit() || matches!(b, b'-' | b'+' | b'.' | b'e' | b'E')
                }) =>
            {
                literal.push_str(word);
            }
            _ => return Err(ARRAY),
        }
        return Ok(rest);
    }
    let (string, rest) = take_string(json)?;
    literal.push('"');
    let nested;
    let text = match kind {
        Kind::Array(element, delimiter) => {
            nested = array(element, *delimiter, &string)?;
            &nested
        }
        _ => &string,
    };
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            literal.push('\\');
        }
        literal.push(character);
    }
    literal.push('"');
    Ok(rest)
}

/// The JSON string that `json` begins with, and what follows it.
fn take_string(json: &str) -> Result<(String, &str), Unwritable> {
    let mut escaped = false;
    for (at, byte) in json.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => {
                let (string, rest) = json.split_at(at + 1);
                return Ok((serde_json::from_str(string).map_err(|_| ARRAY)?, rest));
            }
            _ => {}
        }
    }
    Err(ARRAY)
}

/// The literal of an array of texts: quoted, so that nothing in them means anything.
pub fn literal<'a>(texts: impl Iterator<Item = &'a str>) -> Param {
    let mut literal = String::from("{");
    for text in texts {
        if literal.len() > 1 {
            literal.push(',');
        }
        literal.push('"');
        for character in text.chars() {
            if matches!(character, '"' | '\\') {
                literal.push('\\');
            }
            literal.push(character);
        }
        literal.push('"');
    }
    literal.push('}');
    Param::Text(literal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ValueRef::{Blob, Integer, Null, Real, Text};

    fn check(kind: &Kind, value: ValueRef<'_>, expect: &str) {
        let text = text(kind, value).unwrap();
        assert_eq!(text.as_deref(), Some(expect), "{kind:?}");
    }

    fn of(kind: Kind) -> Kind {
        Kind::Array(Box::new(kind), ',')
    }

    #[test]
    fn values_become_what_postgres_reads() {
        check(&Kind::Integer, Integer(i64::MIN), "-9223372036854775808");
        check(&Kind::Bool, Integer(1), "1");
        check(&Kind::Float8, Real(0.1), "1e-1");
        check(&Kind::Float8, Real(f64::INFINITY), "Infinity");
        check(&Kind::Float4, Real(f64::from(0.1f32)), "1e-1");
        check(&Kind::Float4, Real(1e300), "1e300");
        check(&Kind::Bytea, Blob(&[0, 255]), "\\x00ff");
        check(&Kind::Numeric, Text("1.00"), "1.00");
        assert_eq!(
            param(&Kind::Bytea, Blob(&[0, 255])),
            Ok(Param::Bytes(vec![0, 255]))
        );
        assert_eq!(param(&Kind::Bytea, Null), Ok(Param::Null));
    }

    #[test]
    fn arrays_come_back_from_json() {
        let int = of(Kind::Integer);
        check(&int, Text("[]"), "{}");
        check(&int, Text(" [ 1 , null, -3 ] "), "{1,NULL,-3}");
        check(&int, Text("[[1,2],[3,null]]"), "{{1,2},{3,NULL}}");
        check(&int, Text("[2:4]={1,2,3}"), "[2:4]={1,2,3}");
        check(
            &int,
            Text("[-1:0][5:6]={{1,2},{3,4}}"),
            "[-1:0][5:6]={{1,2},{3,4}}",
        );
        check(&of(Kind::Bool), Text("[true,false]"), "{t,f}");
        check(&of(Kind::Float8), Text("[1e20,\"NaN\"]"), "{1e20,\"NaN\"}");
        check(
            &of(Kind::Text),
            Text(r#"["a\"b\\c","","NULL","\u00e4\n"]"#),
            "{\"a\\\"b\\\\c\",\"\",\"NULL\",\"ä\n\"}",
        );
        check(&of(Kind::Text), Text(r#"["[1:1]={x}"]"#), "{\"[1:1]={x}\"}");
        check(
            &of(of(Kind::Integer)),
            Text(r#"["[1,2]",null]"#),
            r#"{"{1,2}",NULL}"#,
        );
        check(
            &Kind::Array(Box::new(Kind::Other), ';'),
            Text(r#"["(1,2)","(3,4)"]"#),
            r#"{"(1,2)";"(3,4)"}"#,
        );
    }

    #[test]
    fn what_is_no_value_of_the_type_is_refused() {
        for (kind, value) in [
            (Kind::Integer, Text("1")),
            (Kind::Bool, Integer(2)),
            (Kind::Text, Integer(1)),
            (Kind::Bytea, Text("x")),
            (of(Kind::Integer), Text("")),
            (of(Kind::Integer), Text("1")),
            (of(Kind::Integer), Text("[1")),
            (of(Kind::Integer), Text("[1,]")),
            (of(Kind::Integer), Text("[1]]")),
            (of(Kind::Integer), Text("[{1,2}]")),
            (of(Kind::Integer), Text("[1}]")),
            (of(Kind::Text), Text("[1]")),
            (of(Kind::Text), Text("[\"a]")),
            (of(Kind::Text), Text("[\"\\x\"]")),
            (of(Kind::Integer), Text("[[[[[[[1]]]]]]]")),
        ] {
            assert!(text(&kind, value).is_err(), "{kind:?} {value:?}");
        }
    }

    #[test]
    fn a_literal_of_texts_is_quoted() {
        let Param::Text(text) = literal(["a\"b", "\\", ""].into_iter()) else {
            panic!("a text");
        };
        assert_eq!(text, r#"{"a\"b","\\",""}"#);
    }
}
