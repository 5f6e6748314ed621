//! Dates and times: Postgres' ISO text, with always six digits of a second and `Z` for UTC, so that it sorts as bytes
//! and SQLite's date functions read it.
//!
//! What cannot have that form stays as Postgres prints it: `infinity`, `-infinity`, ` BC`, and years of more than four
//! digits. Ranges are not checked (`2024-02-31` passes): Postgres knows its calendar, and only the form is ours.

use super::{Unconvertible, utf8};

/// Holds one date and time in our form.
#[derive(Default)]
pub(super) struct Buffer([u8; 27]);

/// `2024-01-02 03:04:05.5+00` becomes `2024-01-02 03:04:05.500000Z`.
pub(super) fn timestamptz<'a>(
    text: &'a [u8],
    buffer: &'a mut Buffer,
) -> Result<&'a str, Unconvertible> {
    timestamp_with(text, b"+00", buffer)
}

/// `2024-01-02 03:04:05.5` becomes `2024-01-02 03:04:05.500000`.
pub(super) fn timestamp<'a>(
    text: &'a [u8],
    buffer: &'a mut Buffer,
) -> Result<&'a str, Unconvertible> {
    timestamp_with(text, b"", buffer)
}

fn timestamp_with<'a>(
    text: &'a [u8],
    zone: &[u8],
    Buffer(buffer): &'a mut Buffer,
) -> Result<&'a str, Unconvertible> {
    if let Some((date, b' ', rest)) = split_date(text)
        && let Some((clock, micros, rest)) = split_time(rest)
    {
        let rest = rest.strip_prefix(zone).ok_or(Unconvertible)?;
        if rest.is_empty() {
            buffer[..10].copy_from_slice(date);
            buffer[10] = b' ';
            buffer[11..19].copy_from_slice(clock);
            buffer[19] = b'.';
            buffer[20..26].copy_from_slice(&micros);
            buffer[26] = b'Z';
            return utf8(&buffer[..if zone.is_empty() { 26 } else { 27 }]);
        }
    }
    // Rare from here on.
    if is_infinite(text) {
        return utf8(text);
    }
    let rest = skip_long_date(text).and_then(|rest| rest.strip_prefix(b" "));
    let (_, _, rest) = rest.and_then(split_time).ok_or(Unconvertible)?;
    let rest = rest.strip_prefix(zone).ok_or(Unconvertible)?;
    verbatim(text, rest)
}

/// `2024-01-02` stays.
pub(super) fn date(text: &[u8]) -> Result<&str, Unconvertible> {
    if is_infinite(text) {
        return utf8(text);
    }
    verbatim(text, skip_long_date(text).ok_or(Unconvertible)?)
}

/// `03:04:05.5` becomes `03:04:05.500000`.
pub(super) fn time<'a>(
    text: &[u8],
    Buffer(buffer): &'a mut Buffer,
) -> Result<&'a str, Unconvertible> {
    match split_time(text) {
        Some((clock, micros, [])) => {
            buffer[..8].copy_from_slice(clock);
            buffer[8] = b'.';
            buffer[9..15].copy_from_slice(&micros);
            utf8(&buffer[..15])
        }
        _ => Err(Unconvertible),
    }
}

/// `text`, if nothing or the era is left of it.
fn verbatim<'a>(text: &'a [u8], rest: &[u8]) -> Result<&'a str, Unconvertible> {
    match rest {
        b"" | b" BC" => utf8(text),
        _ => Err(Unconvertible),
    }
}

fn is_infinite(text: &[u8]) -> bool {
    matches!(text, b"infinity" | b"-infinity")
}

fn all_digits<const N: usize>(text: &[u8], places: [usize; N]) -> bool {
    places.iter().all(|&place| text[place].is_ascii_digit())
}

/// A date with a year of four digits, the byte after it, and what follows.
fn split_date(text: &[u8]) -> Option<(&[u8], u8, &[u8])> {
    let (date, rest) = text.split_at_checked(10)?;
    let form = date[4] == b'-' && date[7] == b'-' && all_digits(date, [0, 1, 2, 3, 5, 6, 8, 9]);
    let (&after, rest) = rest.split_first()?;
    form.then_some((date, after, rest))
}

/// What follows a date with a year of four digits or more.
fn skip_long_date(text: &[u8]) -> Option<&[u8]> {
    let year = text.iter().take_while(|b| b.is_ascii_digit()).count();
    let (day, rest) = text[year..].split_at_checked(6)?;
    let form = year >= 4 && day[0] == b'-' && day[3] == b'-' && all_digits(day, [1, 2, 4, 5]);
    form.then_some(rest)
}

/// A time without its fraction, the six digits of that, and what follows.
fn split_time(text: &[u8]) -> Option<(&[u8], [u8; 6], &[u8])> {
    let (clock, mut rest) = text.split_at_checked(8)?;
    if clock[2] != b':' || clock[5] != b':' || !all_digits(clock, [0, 1, 3, 4, 6, 7]) {
        return None;
    }
    let mut micros = *b"000000";
    if let [b'.', fraction @ ..] = rest {
        let count = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
        if !(1..=6).contains(&count) {
            return None;
        }
        micros[..count].copy_from_slice(&fraction[..count]);
        rest = &fraction[count..];
    }
    Some((clock, micros, rest))
}
