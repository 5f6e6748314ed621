//! How the values of a key must be spelled.
//!
//! A key that a program spells otherwise than Postgres does would come back as another row: `…AB` and `…ab` are one uuid
//! in Postgres, and two texts in SQLite. So what can be told by its form is refused where it is written. A value that no
//! such type has at all (the 40th of May) is not told apart here: Postgres rejects it.

use super::super::names::literal;

/// A condition that is true where `value`, an SQL expression, is spelled as Postgres' values of that type are; and how
/// that is, for a person. `None`: any value of the column's storage is.
pub(super) fn spelled(postgres_type: &str, value: &str) -> Option<(String, &'static str)> {
    let (name, precision) = split(postgres_type);
    let glob = |pattern: String| format!("{value} GLOB {}", literal(&pattern));
    let (condition, form) = match name.as_str() {
        "boolean" => (format!("{value} IN (0, 1)"), "0 or 1"),
        "uuid" => {
            let groups = [8, 4, 4, 4, 12].map(|digits| "[0-9a-f]".repeat(digits));
            (
                fixed(value, &glob(groups.join("-"))),
                "lower case, as in 5e1f7a9c-0d2b-4c8e-9f3a-1b6d4e8c2a70",
            )
        }
        "timestamp with time zone" => {
            let pattern = format!("{DATE} {TIME}.{}Z", fraction(precision));
            (
                moment(value, &glob(pattern)),
                "UTC, as in 2024-02-29 18:30:00.000000Z",
            )
        }
        "timestamp without time zone" => {
            let pattern = format!("{DATE} {TIME}.{}", fraction(precision));
            (
                moment(value, &glob(pattern)),
                "as in 2024-02-29 18:30:00.000000",
            )
        }
        "date" => (
            or_infinity(value, &fixed(value, &glob(DATE.to_owned()))),
            "as in 2024-02-29",
        ),
        "time without time zone" => {
            let pattern = format!("{TIME}.{}", fraction(precision));
            (fixed(value, &glob(pattern)), "as in 18:30:00.000000")
        }
        "character" => (
            format!("{value} = rtrim({value}, ' ')"),
            "without trailing blanks",
        ),
        _ => match scale(postgres_type)? {
            Some(0) => (number(value, Some(0)), "as Postgres prints it, as in 42"),
            scale => (
                number(value, scale),
                "as Postgres prints it, as in 4.20: all digits behind the point that the type has, none too many before",
            ),
        },
    };
    Some((condition, form))
}

const DATE: &str = "[0-9][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]";
const TIME: &str = "[0-2][0-9]:[0-5][0-9]:[0-5][0-9]";

/// `timestamp(3) with time zone` is `timestamp with time zone`, and 3.
fn split(postgres_type: &str) -> (String, Option<usize>) {
    match (postgres_type.split_once('('), postgres_type.split_once(')')) {
        (Some((before, _)), Some((inside, after))) => (
            format!("{before}{after}"),
            inside
                .split_once('(')
                .and_then(|(_, digits)| digits.parse().ok()),
        ),
        _ => (postgres_type.to_owned(), None),
    }
}

/// Of a numeric the digits behind the point; inside `None`: as many as it is given. `None`: it is no numeric.
fn scale(postgres_type: &str) -> Option<Option<usize>> {
    let modifier = postgres_type.strip_prefix("numeric")?;
    if modifier.is_empty() {
        return Some(None);
    }
    let inside = modifier.strip_prefix('(')?.strip_suffix(')')?;
    let (_, scale) = inside.split_once(',')?;
    // One below 0 rounds to tens or hundreds.
    Some(Some(
        scale.parse::<i32>().ok()?.max(0).unsigned_abs() as usize
    ))
}

/// As `numeric_out` prints it: no exponent, no plus, no zeros before, no minus before zero.
fn number(value: &str, scale: Option<usize>) -> String {
    let digits = format!("ltrim({value}, '-')");
    let behind = match scale {
        None => format!("{digits} NOT GLOB '*.'"),
        Some(0) => format!("{digits} NOT GLOB '*.*'"),
        Some(scale) => format!(
            "{digits} GLOB {}",
            literal(&format!("*.{}", "[0-9]".repeat(scale)))
        ),
    };
    format!(
        "({value} IN ('NaN', 'Infinity', '-Infinity') OR (instr({value}, char(0)) = 0 \
         AND {digits} GLOB '[0-9]*' AND {digits} NOT GLOB '*[^0-9.]*' AND {digits} NOT GLOB '*.*.*' \
         AND {digits} NOT GLOB '0[0-9]*' AND {behind} AND {value} NOT GLOB '--*' \
         AND ({value} NOT GLOB '-*' OR {digits} GLOB '*[1-9]*')))"
    )
}

/// Six digits, of which Postgres keeps the first.
fn fraction(precision: Option<usize>) -> String {
    let kept = precision.map_or(6, |digits| digits.min(6));
    format!("{}{}", "[0-9]".repeat(kept), "0".repeat(6 - kept))
}

/// GLOB ends at a NUL. A length in bytes would tell that too, but of a file in UTF-16 it is another one.
fn fixed(value: &str, condition: &str) -> String {
    format!("(instr({value}, char(0)) = 0 AND {condition})")
}

/// 24:00:00 is midnight of the next day.
fn moment(value: &str, condition: &str) -> String {
    let condition = format!("{condition} AND substr({value}, 12, 2) < '24'");
    or_infinity(value, &fixed(value, &condition))
}

fn or_infinity(value: &str, condition: &str) -> String {
    format!("({condition} OR {value} IN ('infinity', '-infinity'))")
}
