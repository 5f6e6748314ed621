//! Arrays: what `array_out` prints becomes JSON.
//!
//! | element | in JSON |
//! |---|---|
//! | NULL | `null` |
//! | int2, int4, int8, oid, bool | JSON's own |
//! | float4, float8 | JSON's own, in the digits that Postgres prints; `"NaN"`, `"Infinity"`, `"-Infinity"` |
//! | bytea | a string of Postgres' hex: `"\\x00ff"` (JSON has no bytes) |
//! | an array, where the element type is a domain over one | a string that holds its JSON; so it is not mistaken for a dimension |
//! | all others | a string, in the form that a column of that type has |
//!
//! The text is compact, and escapes only what JSON demands (`\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`, other control
//! characters as `\u001f`): equal arrays have equal bytes. Dimensions are nested arrays; an empty array is `[]`.
//!
//! An array whose lower bounds are not all 1 keeps **Postgres' own text**, `[2:4]={a,b,c}`. JSON has no bounds, and an
//! array that lost them would be another value. No JSON text can look like it (after `[2` JSON allows no colon), so
//! `json_valid()` tells the two apart, and `json_each()` on it fails loudly instead of giving wrong subscripts.

use std::fmt::Write;

use super::{Kind, Unconvertible, boolean, clock, float, form, integer, is_number, unhex, utf8};

/// Postgres' MAXDIM. More braces than that are not from Postgres.
const DIMENSIONS_MAX: usize = 6;

/// The JSON of an array that Postgres prints as `text`.
pub(super) fn json(element: &Kind, delimiter: char, text: &[u8]) -> Result<String, Unconvertible> {
    if !delimiter.is_ascii() {
        return Err(Unconvertible);
    }
    let mut reader = Reader {
        element,
        delimiter: delimiter as u8,
        rest: text,
        unescaped: Vec::new(),
        json: String::with_capacity(text.len() + text.len() / 4),
    };
    let bounds = reader.bounds()?;
    reader.dimensions()?;
    if bounds {
        // Read all the same, so that it is known to be an array of such elements.
        return utf8(text).map(str::to_owned);
    }
    Ok(reader.json)
}

struct Reader<'a> {
    element: &'a Kind,
    delimiter: u8,
    rest: &'a [u8],
    /// Reused from element to element.
    unescaped: Vec<u8>,
    json: String,
}

impl<'a> Reader<'a> {
    /// Skips `[2:4][-1:0]=`. Postgres prints bounds only where one of the lower ones is not 1.
    fn bounds(&mut self) -> Result<bool, Unconvertible> {
        if !self.rest.starts_with(b"[") {
            return Ok(false);
        }
        let end = self
            .rest
            .iter()
            .position(|b| *b == b'=')
            .ok_or(Unconvertible)?;
        let bounds = self.rest[..end].strip_suffix(b"]").ok_or(Unconvertible)?;
        for dimension in bounds[1..].split(|b| *b == b']') {
            let dimension = dimension.strip_prefix(b"[").unwrap_or(dimension);
            let colon = dimension
                .iter()
                .position(|b| *b == b':')
                .ok_or(Unconvertible)?;
            integer(&dimension[..colon])?;
            integer(&dimension[colon + 1..])?;
        }
        self.rest = &self.rest[end + 1..];
        Ok(true)
    }

    /// Reads to the end. No recursion: the depth is counted.
    fn dimensions(&mut self) -> Result<(), Unconvertible> {
        let mut depth = 0;
        loop {
            // An array begins, or an element.
            if self.take(b'{') {
                depth += 1;
                if depth > DIMENSIONS_MAX {
                    return Err(Unconvertible);
                }
                self.json.push('[');
                // Only a whole array can be empty.
                if !(depth == 1 && self.rest == b"}") {
                    continue;
                }
            } else if depth > 0 {
                self.element()?;
            }
            // What was begun ends, and perhaps what holds it.
            while depth > 0 && self.take(b'}') {
                depth -= 1;
                self.json.push(']');
            }
            if depth == 0 {
                let whole = self.rest.is_empty() && !self.json.is_empty();
                return if whole { Ok(()) } else { Err(Unconvertible) };
            }
            if !self.take(self.delimiter) {
                return Err(Unconvertible);
            }
            self.json.push(',');
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        match self.rest.strip_prefix(&[byte]) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn element(&mut self) -> Result<(), Unconvertible> {
        if self.take(b'"') {
            let end = self.rest.iter().position(|b| matches!(b, b'"' | b'\\'));
            let end = end.ok_or(Unconvertible)?;
            if self.rest[end] == b'"' {
                let text = &self.rest[..end];
                self.rest = &self.rest[end + 1..];
                return value(&mut self.json, self.element, text);
            }
            return self.escaped_element();
        }
        let delimiter = self.delimiter;
        let ends = |b: &u8| matches!(b, b'{' | b'}' | b'"' | b'\\') || *b == delimiter;
        let end = self.rest.iter().position(ends).ok_or(Unconvertible)?;
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        match text {
            // An empty element would have been quoted.
            b"" => Err(Unconvertible),
            b"NULL" => {
                self.json.push_str("null");
                Ok(())
            }
            text => value(&mut self.json, self.element, text),
        }
    }

    /// After the opening quote.
    fn escaped_element(&mut self) -> Result<(), Unconvertible> {
        self.unescaped.clear();
        loop {
            let stop = self.rest.iter().position(|b| matches!(b, b'"' | b'\\'));
            let stop = stop.ok_or(Unconvertible)?;
            self.unescaped.extend_from_slice(&self.rest[..stop]);
            let (mark, rest) = (self.rest[stop], &self.rest[stop + 1..]);
            if mark == b'"' {
                self.rest = rest;
                return value(&mut self.json, self.element, &self.unescaped);
            }
            let (&byte, rest) = rest.split_first().ok_or(Unconvertible)?;
            self.unescaped.push(byte);
            self.rest = rest;
        }
    }
}

/// Adds one element, that is not NULL.
fn value(json: &mut String, kind: &Kind, text: &[u8]) -> Result<(), Unconvertible> {
    match kind {
        Kind::Integer => {
            integer(text)?;
            if !is_number(text) {
                return Err(Unconvertible);
            }
            json.push_str(utf8(text)?);
        }
        Kind::Bool => json.push_str(if boolean(text)? { "true" } else { "false" }),
        Kind::Float4 | Kind::Float8 => {
            if *kind == Kind::Float4 {
                float::<f32>(text)?;
            } else {
                float::<f64>(text)?;
            }
            if is_number(text) {
                json.push_str(utf8(text)?);
            } else {
                string(json, utf8(text)?);
            }
        }
        Kind::Bytea => {
            let digits = text.strip_prefix(b"\\x").ok_or(Unconvertible)?;
            unhex(digits, &mut vec![0; digits.len() / 2])?;
            string(json, utf8(text)?);
        }
        Kind::Array(element, delimiter) => string(json, &self::json(element, *delimiter, text)?),
        _ => string(json, &form(kind, text, &mut clock::Buffer::default())?),
    }
    Ok(())
}

/// Adds a JSON string, as `json_quote()` of SQLite and `JSON.stringify` write it.
fn string(json: &mut String, text: &str) {
    json.push('"');
    let mut rest = text;
    while let Some(at) = rest
        .bytes()
        .position(|b| b < 0x20 || matches!(b, b'"' | b'\\'))
    {
        json.push_str(&rest[..at]);
        match rest.as_bytes()[at] {
            b'"' => json.push_str("\\\""),
            b'\\' => json.push_str("\\\\"),
            0x08 => json.push_str("\\b"),
            0x0C => json.push_str("\\f"),
            b'\n' => json.push_str("\\n"),
            b'\r' => json.push_str("\\r"),
            b'\t' => json.push_str("\\t"),
            byte => write!(json, "\\u{byte:04x}").expect("a String takes everything"),
        }
        rest = &rest[at + 1..];
    }
    json.push_str(rest);
    json.push('"');
}
