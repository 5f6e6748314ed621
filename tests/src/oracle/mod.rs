//! What a replica's file must hold, found out without any of our own decoding.
//!
//! - [`select`]: Postgres is quiet; the file equals the shape's SQL, run by Postgres.
//! - [`history`]: at any moment, under any load; the file equals the shape at the file's own position. What Postgres
//!   held at a position comes from `test_decoding`, Postgres' own textual plugin, through a slot of its own.
//! - [`causality`]: writes come from the replicas; each program sees what it wrote and what led to what it sees, always.
//!
//! The first two compare in the values of the file. How a value of Postgres looks there (the README's "Types") is written down
//! a second time in [`form`], as SQL that Postgres runs: our converter is not asked. [`file`] reads the file, with
//! SQLite alone.

use std::fmt;

pub mod causality;
mod decoding;
pub mod file;
pub mod form;
pub mod history;
pub mod select;

/// A value of SQLite, with an equality and an order that are those of its bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cell {
    /// NULL.
    Null,
    /// INTEGER.
    Integer(i64),
    /// REAL, as its bits.
    Real(u64),
    /// TEXT.
    Text(String),
    /// BLOB.
    Blob(Vec<u8>),
    /// TEXT that is a JSON array, in a spelling of our own: blanks and digits of floats may be written in many ways.
    Array(String),
}

/// A row: the columns that both sides agreed on, in order.
pub type Row = Vec<Cell>;

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cell::Null => write!(f, "NULL"),
            Cell::Integer(value) => write!(f, "{value}"),
            Cell::Real(bits) => write!(f, "{:?}", f64::from_bits(*bits)),
            Cell::Text(text) => write!(f, "{text:?}"),
            Cell::Blob(bytes) => write!(f, "x'{}'", hex(bytes)),
            Cell::Array(json) => write!(f, "array {json}"),
        }
    }
}

/// A file does not hold what it must hold.
#[derive(Clone, PartialEq, Eq)]
pub struct Difference {
    /// The table.
    pub table: String,
    /// Its columns, in the order of the rows.
    pub columns: Vec<String>,
    /// Rows that should be there and are not.
    pub missing: Vec<Row>,
    /// Rows that are there and should not be.
    pub extra: Vec<Row>,
}

/// How many rows of each kind a message shows.
const ROWS_SHOWN: usize = 5;

impl fmt::Debug for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {} {:?}", self.table, self.columns)?;
        for (what, rows) in [("missing", &self.missing), ("extra", &self.extra)] {
            write!(f, "\n  {what}: {}", rows.len())?;
            for row in rows.iter().take(ROWS_SHOWN) {
                write!(f, "\n    {row:?}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Difference {}

/// Compares two collections of rows, duplicates counted.
fn compare(
    table: &str,
    columns: &[String],
    mut expected: Vec<Row>,
    mut found: Vec<Row>,
) -> Result<(), Difference> {
    expected.sort_unstable();
    found.sort_unstable();
    if expected == found {
        return Ok(());
    }
    let (mut missing, mut extra) = (Vec::new(), Vec::new());
    let (mut expected, mut found) = (
        expected.into_iter().peekable(),
        found.into_iter().peekable(),
    );
    loop {
        let order = match (expected.peek(), found.peek()) {
            (None, None) => break,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(expected), Some(found)) => expected.cmp(found),
        };
        match order {
            std::cmp::Ordering::Less => missing.extend(expected.next()),
            std::cmp::Ordering::Greater => extra.extend(found.next()),
            std::cmp::Ordering::Equal => {
                expected.next();
                found.next();
            }
        }
    }
    Err(Difference {
        table: table.to_owned(),
        columns: columns.to_vec(),
        missing,
        extra,
    })
}

/// A name as both Postgres and SQLite take it.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| char::from(c).to_digit(16);
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            &[high, low] => u8::try_from(digit(high)? << 4 | digit(low)?).ok(),
            _ => None,
        })
        .collect()
}
