//! Postgres' text of a value becomes a value of a record.
//!
//! COPY and the stream use the same function, so a row is the same bytes whichever way it came. The text is what
//! Postgres prints under the settings that every connection of ours pins: `DateStyle=ISO`, `TimeZone=UTC`,
//! `IntervalStyle=postgres`, `extra_float_digits` of at least 1, `bytea_output=hex`, `client_encoding=UTF8`. Text
//! that these settings cannot produce (an offset other than `+00`, bytea as `escape`) is refused, never stored as
//! garbage.
//!
//! What the table of types leaves open is settled here:
//!
//! - **Floats.** A record keeps what Postgres has, NaN and −0.0 included. SQLite stores NaN as NULL and −0.0 as 0.0
//!   where the replica binds them; the mirror, which stores records, loses neither.
//! - **Times** have six digits always, `24:00:00.000000` too. Infinities, dates BC and years of more than four digits
//!   are in Postgres' own text.
//! - **Arrays**: see [`array`].
//! - **`"char"`** above 127 is a byte that is not UTF-8. Postgres 16 and later print it as `\377`; what older ones send
//!   gets that form too.
//!
//! The way back is `writer::value`.

mod array;
mod clock;

use std::{borrow::Cow, str};

use anabranch_proto::record::Builder;

use crate::table::Kind;

/// Postgres sent a text that its type cannot have: a bug, or the type was altered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a value of this type can't have the text that Postgres sent")]
pub struct Unconvertible;

/// Up to this size a bytea is decoded on the stack.
const SMALL_BYTES_MAX: usize = 512;

/// Adds the value that Postgres prints as `text` to a record.
pub fn push(builder: &mut Builder, kind: &Kind, text: &[u8]) -> Result<(), Unconvertible> {
    match kind {
        Kind::Integer => builder.push_integer(integer(text)?),
        Kind::Bool => builder.push_integer(boolean(text)?.into()),
        Kind::Float4 => builder.push_real(float::<f32>(text)?.into()),
        Kind::Float8 => builder.push_real(float::<f64>(text)?),
        Kind::Bytea => {
            let digits = text.strip_prefix(b"\\x").ok_or(Unconvertible)?;
            let mut small = [0; SMALL_BYTES_MAX];
            if digits.len() / 2 <= small.len() {
                let bytes = &mut small[..digits.len() / 2];
                unhex(digits, bytes)?;
                builder.push_blob(bytes);
            } else {
                let mut bytes = vec![0; digits.len() / 2];
                unhex(digits, &mut bytes)?;
                builder.push_blob(&bytes);
            }
        }
        Kind::Array(element, delimiter) => {
            builder.push_text(&array::json(element, *delimiter, text)?)
        }
        _ => builder.push_text(&form(kind, text, &mut clock::Buffer::default())?),
    }
    Ok(())
}

/// The form that the text of a value has, for the kinds that are stored as text and are no arrays.
fn form<'a>(
    kind: &Kind,
    text: &'a [u8],
    buffer: &'a mut clock::Buffer,
) -> Result<Cow<'a, str>, Unconvertible> {
    Ok(Cow::Borrowed(match kind {
        Kind::Timestamptz => clock::timestamptz(text, buffer)?,
        Kind::Timestamp => clock::timestamp(text, buffer)?,
        Kind::Time => clock::time(text, buffer)?,
        Kind::Date => clock::date(text)?,
        Kind::Numeric => numeric(text)?,
        // One that came after the table was read would be compared by nobody knows what rank.
        Kind::Enum(labels) => {
            let text = utf8(text)?;
            let known = labels.iter().any(|label| label == text);
            known.then_some(text).ok_or(Unconvertible)?
        }
        // Blanks only: bpchar's own comparison ignores nothing else.
        Kind::Char => utf8(without_blanks(text))?,
        Kind::Other => match (utf8(text), text) {
            (Ok(text), _) => text,
            (Err(_), [byte]) => return Ok(Cow::Owned(format!("\\{byte:o}"))),
            (Err(error), _) => return Err(error),
        },
        _ => utf8(text)?,
    }))
}

fn utf8(text: &[u8]) -> Result<&str, Unconvertible> {
    str::from_utf8(text).map_err(|_| Unconvertible)
}

/// As `int8out` and the like print it: digits, with a minus before.
fn integer(text: &[u8]) -> Result<i64, Unconvertible> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if digits.is_empty() || digits.len() > 19 {
        return Err(Unconvertible);
    }
    let mut value = 0u64;
    for digit in digits {
        let digit = digit.wrapping_sub(b'0');
        if digit > 9 {
            return Err(Unconvertible);
        }
        // Nineteen digits are below 2^64.
        value = value * 10 + u64::from(digit);
    }
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
    .ok_or(Unconvertible)
}

fn boolean(text: &[u8]) -> Result<bool, Unconvertible> {
    match text {
        b"t" => Ok(true),
        b"f" => Ok(false),
        _ => Err(Unconvertible),
    }
}

/// A float that Postgres prints in the fewest digits that name it, so the nearest value is the value itself.
fn float<F: str::FromStr + From<f32> + Into<f64> + Copy>(text: &[u8]) -> Result<F, Unconvertible> {
    match text {
        b"NaN" => Ok(F::from(f32::NAN)),
        b"Infinity" => Ok(F::from(f32::INFINITY)),
        b"-Infinity" => Ok(F::from(f32::NEG_INFINITY)),
        _ => {
            if !is_number(text) {
                return Err(Unconvertible);
            }
            let value: F = utf8(text)?.parse().map_err(|_| Unconvertible)?;
            // Digits never name an infinity.
            if value.into().is_finite() {
                Ok(value)
            } else {
                Err(Unconvertible)
            }
        }
    }
}

/// Verbatim: its scale is part of the value.
fn numeric(text: &[u8]) -> Result<&str, Unconvertible> {
    let special = matches!(text, b"NaN" | b"Infinity" | b"-Infinity");
    if special || is_number(text) && !text.iter().any(|b| matches!(b, b'e' | b'E')) {
        utf8(text)
    } else {
        Err(Unconvertible)
    }
}

/// Whether it is a number in the grammar of JSON, which is also how Postgres prints finite numbers.
fn is_number(text: &[u8]) -> bool {
    fn digits(text: &[u8]) -> Option<&[u8]> {
        let count = text.iter().take_while(|b| b.is_ascii_digit()).count();
        (count > 0).then(|| &text[count..])
    }
    let text = text.strip_prefix(b"-").unwrap_or(text);
    if matches!(text, [b'0', b'0'..=b'9', ..]) {
        return false;
    }
    let Some(mut rest) = digits(text) else {
        return false;
    };
    if let [b'.', fraction @ ..] = rest {
        match digits(fraction) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = match exponent {
            [b'+' | b'-', digits @ ..] => digits,
            digits => digits,
        };
        match digits(exponent) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.is_empty()
}

/// The value of a hex digit; 0xFF for any other byte.
const HEX: [u8; 256] = {
    let mut table = [0xFF; 256];
    let mut i = 0;
    while i < 16 {
        table[b"0123456789abcdef"[i] as usize] = i as u8;
        table[b"0123456789ABCDEF"[i] as usize] = i as u8;
        i += 1;
    }
    table
};

/// Decodes hex `digits` into `bytes`, which has half their length.
fn unhex(digits: &[u8], bytes: &mut [u8]) -> Result<(), Unconvertible> {
    if digits.len() != bytes.len() * 2 {
        return Err(Unconvertible);
    }
    let mut wrong = 0;
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (HEX[usize::from(pair[0])], HEX[usize::from(pair[1])]);
        wrong |= high | low;
        *byte = high << 4 | low & 0xF;
    }
    // Only 0xFF of the table has the upper half set.
    if wrong & 0xF0 == 0 {
        Ok(())
    } else {
        Err(Unconvertible)
    }
}

fn without_blanks(text: &[u8]) -> &[u8] {
    let blanks = text.iter().rev().take_while(|b| **b == b' ').count();
    &text[..text.len() - blanks]
}

#[cfg(test)]
mod tests;
