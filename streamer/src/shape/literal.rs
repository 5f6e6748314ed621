//! Constants: the text of a value becomes one of a type, as the type's input function in Postgres reads it.
//!
//! Where Postgres' input depends on settings or is lax, only the plain form is read; the rest is refused.

use super::{
    datatype::DataType,
    moment::{self, Zone},
    numeric,
};

/// Longest value of type `name`.
const NAME_BYTES_MAX: usize = 63;

/// Most elements of an array, constant or parameter.
pub const ARRAY_ELEMENTS_MAX: usize = 10_000;

/// A value of a type.
#[derive(Clone, PartialEq, Eq)]
pub struct Constant {
    /// Its type.
    pub data_type: DataType,
    /// What Postgres reads it from: the same for the same spelling of a value, and for most equal values.
    pub text: String,
}

/// Never shows the value: it may be a claim of somebody's token.
impl std::fmt::Debug for Constant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a constant of type {}", self.data_type.sql())
    }
}

/// What Postgres' input functions skip around numbers.
pub fn is_blank(char: char) -> bool {
    matches!(char, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// Reads a value of type `data_type`. The error never shows it.
pub fn read(data_type: &DataType, text: &str) -> Result<Constant, String> {
    let invalid = || format!("not a value of type {}", data_type.sql());
    if text.contains('\0') {
        return Err("Postgres' text has no NUL character".to_owned());
    }
    let canonical = match data_type {
        DataType::Int2 | DataType::Int4 | DataType::Int8 | DataType::Oid => {
            let value = integer(text).ok_or_else(invalid)?;
            check_integer(data_type, value)?;
            value.to_string()
        }
        DataType::Bool => boolean(text).ok_or_else(invalid)?.to_string(),
        DataType::Float4 | DataType::Float8 => float(data_type, text)?,
        DataType::Numeric => numeric::canonical(text).ok_or_else(invalid)?,
        DataType::Text => text.to_owned(),
        DataType::Name if text.len() > NAME_BYTES_MAX => {
            return Err(format!("longer than the {NAME_BYTES_MAX} bytes of a name"));
        }
        DataType::Name => text.to_owned(),
        DataType::Char => text.trim_end_matches(' ').to_owned(),
        DataType::Enum(of) => {
            if !of.labels.iter().any(|label| label == text) {
                return Err(format!("not a label of the enum {}", of.name));
            }
            text.to_owned()
        }
        DataType::Uuid => uuid(text).ok_or_else(invalid)?,
        DataType::Bytea => hex(&bytea(text).ok_or_else(invalid)?),
        DataType::Timestamptz => {
            moment::check_timestamp(text, Zone::Needed)?;
            text.to_owned()
        }
        DataType::Timestamp => {
            moment::check_timestamp(text, Zone::None)?;
            text.to_owned()
        }
        DataType::Date => {
            moment::check_date(text)?;
            text.to_owned()
        }
        DataType::Time => {
            moment::time(text).ok_or("write a time as 'HH:MM:SS'")?;
            text.to_owned()
        }
    };
    Ok(Constant {
        data_type: data_type.clone(),
        text: canonical,
    })
}

/// A number as SQL has it: int4, int8 or numeric, the first that has it.
pub fn number(text: &str) -> Result<Constant, String> {
    let is_integer = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'-');
    let data_type = match text.parse::<i64>() {
        Ok(value) if is_integer && i32::try_from(value).is_ok() => DataType::Int4,
        Ok(_) if is_integer => DataType::Int8,
        _ => DataType::Numeric,
    };
    read(&data_type, text)
}

/// Casts a constant.
pub fn cast(constant: Constant, to: &DataType) -> Result<Constant, String> {
    let from = &constant.data_type;
    if from == to {
        return Ok(constant);
    }
    let is_number = |of: &DataType| of.is_integer() || *of == DataType::Numeric;
    let castable = match to {
        DataType::Oid => from.is_integer(),
        DataType::Int2 | DataType::Int4 | DataType::Int8 => is_number(from),
        DataType::Numeric | DataType::Float4 | DataType::Float8 => is_number(from),
        _ => false,
    };
    if !castable {
        return Err(format!(
            "a cast from {} to {} is not supported: write '…'::{1}",
            from.sql(),
            to.sql()
        ));
    }
    let text = constant.text.strip_suffix(".0").unwrap_or(&constant.text);
    if text.contains('.') && !matches!(to, DataType::Numeric | DataType::Float4 | DataType::Float8)
    {
        return Err(format!(
            "this number would be rounded to {}: write an integer",
            to.sql()
        ));
    }
    read(to, text)
}

/// The elements of an array constant `{…}` of one dimension; NULL elements are `None`.
/// Source: <https://www.postgresql.org/docs/15/arrays.html#ARRAYS-IO>.
pub fn elements(text: &str) -> Result<Vec<Option<String>>, String> {
    let invalid = || "write an array of one dimension as '{a,b}'".to_owned();
    let inner = text
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'))
        .ok_or_else(invalid)?;
    let mut elements = Vec::new();
    let mut chars = inner.chars().peekable();
    if chars.peek().is_none() {
        return Ok(elements);
    }
    loop {
        let mut element = String::new();
        let quoted = chars.next_if_eq(&'"').is_some();
        if quoted {
            loop {
                match chars.next().ok_or_else(invalid)? {
                    '"' => break,
                    '\\' => element.push(chars.next().ok_or_else(invalid)?),
                    char => element.push(char),
                }
            }
        } else {
            while let Some(char) = chars.next_if(|char| *char != ',') {
                // Blanks, quotes and braces outside of quotes have rules of their own, which nobody needs here.
                if matches!(char, '"' | '{' | '}' | '\\') || is_blank(char) {
                    return Err(
                        "put elements of an array in double quotes that have blanks or signs"
                            .to_owned(),
                    );
                }
                element.push(char);
            }
            if element.is_empty() {
                return Err(invalid());
            }
        }
        let is_null = !quoted && element.eq_ignore_ascii_case("null");
        elements.push(if is_null { None } else { Some(element) });
        if elements.len() > ARRAY_ELEMENTS_MAX {
            return Err(format!(
                "an array has more than {ARRAY_ELEMENTS_MAX} elements"
            ));
        }
        match chars.next() {
            None => return Ok(elements),
            Some(',') => {}
            Some(_) => return Err(invalid()),
        }
    }
}

fn integer(text: &str) -> Option<i64> {
    let text = text.trim_matches(is_blank);
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn check_integer(data_type: &DataType, value: i64) -> Result<(), String> {
    let fits = match data_type {
        DataType::Int2 => i16::try_from(value).is_ok(),
        DataType::Int4 => i32::try_from(value).is_ok(),
        DataType::Oid => u32::try_from(value).is_ok(),
        _ => true,
    };
    if fits {
        Ok(())
    } else {
        Err(format!("out of the range of {}", data_type.sql()))
    }
}

/// Source: `parse_bool()` of Postgres: any unique beginning of these words, in any case.
fn boolean(text: &str) -> Option<bool> {
    let text = text.trim_matches(is_blank).to_ascii_lowercase();
    let begins = |word: &str, least: usize| text.len() >= least && word.starts_with(text.as_str());
    if begins("true", 1) || begins("yes", 1) || begins("on", 2) || text == "1" {
        Some(true)
    } else if begins("false", 1) || begins("no", 1) || begins("off", 2) || text == "0" {
        Some(false)
    } else {
        None
    }
}

/// The value as the shortest text that reads as the same float.
fn float(data_type: &DataType, text: &str) -> Result<String, String> {
    let text = text.trim_matches(is_blank);
    let unsigned = text
        .strip_prefix(['-', '+'])
        .unwrap_or(text)
        .to_ascii_lowercase();
    let negative = text.starts_with('-');
    match unsigned.as_str() {
        "nan" if unsigned.len() == text.len() => return Ok("NaN".to_owned()),
        "inf" | "infinity" => return Ok(if negative { "-Infinity" } else { "Infinity" }.to_owned()),
        _ => {}
    }
    let is_decimal = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned
            .bytes()
            .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'+' | b'-'));
    let invalid = || format!("not a value of type {}", data_type.sql());
    if !is_decimal {
        return Err(invalid());
    }
    let (is_finite, is_zero, shortest) = if *data_type == DataType::Float4 {
        let value: f32 = text.parse().map_err(|_| invalid())?;
        (value.is_finite(), value == 0.0, format!("{value:e}"))
    } else {
        let value: f64 = text.parse().map_err(|_| invalid())?;
        (value.is_finite(), value == 0.0, format!("{value:e}"))
    };
    let mantissa = unsigned.split('e').next().unwrap_or_default();
    let says_zero = mantissa.bytes().all(|byte| matches!(byte, b'0' | b'.'));
    if !is_finite || is_zero != says_zero {
        return Err(format!("out of the range of {}", data_type.sql()));
    }
    Ok(shortest)
}

/// Source: `string_to_uuid()` of Postgres: braces around all, hyphens after any four digits.
fn uuid(text: &str) -> Option<String> {
    let inner = match text.strip_prefix('{') {
        Some(rest) => rest.strip_suffix('}')?,
        None => text,
    };
    let mut digits = String::with_capacity(36);
    let mut bytes = inner.bytes().peekable();
    for group in 0..8 {
        for _ in 0..4 {
            let digit = bytes.next().filter(u8::is_ascii_hexdigit)?;
            digits.push(char::from(digit.to_ascii_lowercase()));
        }
        if group < 7 {
            bytes.next_if_eq(&b'-');
        }
        if matches!(group, 1..=4) {
            digits.push('-');
        }
    }
    bytes.next().is_none().then_some(digits)
}

/// Source: <https://www.postgresql.org/docs/15/datatype-binary.html>: both forms of input.
fn bytea(text: &str) -> Option<Vec<u8>> {
    if let Some(digits) = text.strip_prefix("\\x") {
        return unhex(digits);
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match rest {
            [b'\\', after @ ..] => {
                out.push(b'\\');
                rest = after;
            }
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => return None,
        }
    }
    Some(out)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold("\\x".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of pairs of hexadecimal digits. (Postgres allows blanks between them, which nobody needs.)
pub fn unhex(digits: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(digits.len() / 2);
    let mut bytes = digits.bytes();
    while let Some(high) = bytes.next() {
        let digit = |byte: u8| char::from(byte).to_digit(16);
        out.push((digit(high)? << 4 | digit(bytes.next()?)?) as u8);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(data_type: DataType, text: &str) -> Option<String> {
        read(&data_type, text).ok().map(|constant| constant.text)
    }

    #[test]
    fn integers_out_of_range_are_refused() {
        assert_eq!(text(DataType::Int2, " -32768 ").as_deref(), Some("-32768"));
        assert_eq!(text(DataType::Int2, "32768"), None);
        assert_eq!(text(DataType::Int4, "2147483648"), None);
        assert_eq!(
            text(DataType::Int8, "+9223372036854775807").as_deref(),
            Some("9223372036854775807")
        );
        assert_eq!(text(DataType::Int8, "9223372036854775808"), None);
        assert_eq!(
            text(DataType::Oid, "4294967295").as_deref(),
            Some("4294967295")
        );
        assert_eq!(text(DataType::Oid, "-1"), None);
        for bad in ["", "-", "1.0", "1e3", "0x1", "1_0", "--1", "1 2", "１"] {
            assert_eq!(text(DataType::Int4, bad), None, "{bad:?}");
        }
    }

    #[test]
    fn numbers_take_the_first_type_that_has_them() {
        let of = |text| number(text).unwrap().data_type;
        assert_eq!(of("2147483647"), DataType::Int4);
        assert_eq!(of("-2147483648"), DataType::Int4);
        assert_eq!(of("2147483648"), DataType::Int8);
        assert_eq!(of("-9223372036854775808"), DataType::Int8);
        assert_eq!(of("9223372036854775808"), DataType::Numeric);
        assert_eq!(of("1.0"), DataType::Numeric);
        assert_eq!(of("1e3"), DataType::Numeric);
    }

    #[test]
    fn booleans_are_unique_beginnings() {
        for yes in ["t", "TRUE", " tru ", "y", "yes", "on", "1"] {
            assert_eq!(
                text(DataType::Bool, yes).as_deref(),
                Some("true"),
                "{yes:?}"
            );
        }
        for no in ["f", "fal", "NO", "n", "of", "off", "0"] {
            assert_eq!(text(DataType::Bool, no).as_deref(), Some("false"), "{no:?}");
        }
        for bad in ["", "o", "truer", "2", "yess", "10"] {
            assert_eq!(text(DataType::Bool, bad), None, "{bad:?}");
        }
    }

    #[test]
    fn floats_beyond_their_range_are_refused() {
        assert_eq!(text(DataType::Float8, "1e400"), None);
        assert_eq!(text(DataType::Float8, "1e-400"), None);
        assert_eq!(text(DataType::Float4, "1e39"), None);
        assert_eq!(text(DataType::Float4, "1e-46"), None);
        assert_eq!(text(DataType::Float8, "0e-400").as_deref(), Some("0e0"));
        assert_eq!(text(DataType::Float8, "-inf").as_deref(), Some("-Infinity"));
        assert_eq!(text(DataType::Float8, "5e-324").as_deref(), Some("5e-324"));
        assert_eq!(text(DataType::Float8, "-nan"), None);
        assert_eq!(text(DataType::Float8, "0x10"), None);
        assert_eq!(text(DataType::Float8, ""), None);
    }

    #[test]
    fn uuids_are_normalised() {
        let normal = Some("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11".to_owned());
        for spelling in [
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
            "a0eebc999c0b4ef8bb6d6bb9bd380a11",
            "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
        ] {
            assert_eq!(text(DataType::Uuid, spelling), normal, "{spelling}");
        }
        for bad in [
            "",
            "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a1",
            "a0e-ebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            " a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11-",
        ] {
            assert_eq!(text(DataType::Uuid, bad), None, "{bad:?}");
        }
    }

    #[test]
    fn both_forms_of_bytea_are_read() {
        assert_eq!(
            text(DataType::Bytea, "\\xDEadBE").as_deref(),
            Some("\\xdeadbe")
        );
        assert_eq!(
            text(DataType::Bytea, "a\\\\b\\000ä").as_deref(),
            Some("\\x615c6200c3a4")
        );
        for bad in ["\\xa", "\\xzz", "\\", "\\9", "\\400"] {
            assert_eq!(text(DataType::Bytea, bad), None, "{bad:?}");
        }
    }

    #[test]
    fn arrays_are_read_with_their_quotes() {
        let read = |text| elements(text).ok();
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(read("{}"), Some(vec![]));
        assert_eq!(
            read("{1,NULL,null,\"NULL\"}"),
            Some(vec![some("1"), None, None, some("NULL")])
        );
        assert_eq!(
            read(r#"{"a,b","c\"d\\",""}"#),
            Some(vec![some("a,b"), some("c\"d\\"), some("")])
        );
        for bad in [
            "",
            "{",
            "1,2",
            "{1,}",
            "{,1}",
            "{{1}}",
            "{\"a}",
            "{\"a\"b}",
            "[1:1]={1}",
            "{a b}",
        ] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_constant_never_shows_its_value() {
        let secret = read(&DataType::Text, "hunter2").unwrap();
        assert!(!format!("{secret:?}").contains("hunter2"));
        let error = read(&DataType::Int4, "hunter2").unwrap_err();
        assert!(!error.contains("hunter2"));
    }
}
