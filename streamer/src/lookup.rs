//! Rows of a table by the values of some of its columns: what conditions with subqueries ask for, in one state of the
//! mirror. It is the seam between those who evaluate ([`shape`](crate::shape), which knows no mirror) and those who have rows
//! ([`mirror`], which knows no shapes).
//!
//! An [`Index`] says by which columns; its keys are the same for values that are equal in Postgres, and for no others. A key
//! is made of one part for each column, none of which begins as another ends, so that rows are found by the first parts
//! of their keys as well.
//!
//! Whoever asks the same conditions of many rows in one state puts a [`Moment`] around it: what a subquery said is remembered
//! then, and what is read is counted.

mod moment;

use anabranch_proto::record::{self, Malformed};

pub use self::moment::{ANSWERS_BYTES_MAX, Answers, Moment, Reads};
use crate::{
    mirror,
    shape::{Reading, Value, Zone},
    table::Oid,
};

/// By which columns rows of a table are found. Without any, all of them are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Of this table.
    pub table: Oid,
    /// In the order of the key.
    pub parts: Vec<Part>,
}

/// One column of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its place in the table.
    pub column: usize,
    /// How its values are read to be compared; never as floats, whose equal values have several forms.
    pub reading: Reading,
}

/// Rows could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A row is not one of its table.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The mirror failed.
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    /// A [`Moment`] has given as many rows as it may. What was asked has no answer; later, or with more rows, it may have.
    #[error("a condition reads more rows of other tables than may be read at once")]
    TooMuch,
}

/// Takes rows until it says that it is enough.
pub type Each<'a> = &'a mut dyn FnMut(&[u8]) -> Result<bool, Error>;

/// One state of the mirror's rows.
pub trait Lookup {
    /// Gives the rows whose key in `index` begins with `prefix`, in any order, until `each` says false. `each` may ask for
    /// rows itself, of the same index too: subqueries are nested.
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error>;

    /// What subqueries said in this very state, if that is remembered.
    fn answers(&self) -> Option<&Answers> {
        None
    }
}

/// For conditions that have no subquery: there is nothing to be found.
pub struct Nothing;

impl Lookup for Nothing {
    fn rows(&self, _: &Index, _: &[u8], _: Each<'_>) -> Result<(), Error> {
        Err(
            mirror::Error::Misused("rows of another table are asked for where none should be")
                .into(),
        )
    }
}

impl Index {
    /// The key of a row.
    pub fn key(&self, row: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut key = Vec::with_capacity(16 * self.parts.len());
        for part in &self.parts {
            push(
                &mut key,
                part.reading.read(record::value(row, part.column)?)?,
            );
        }
        Ok(key)
    }

    /// What it is made of, but the table, as text: letters, digits, commas. [`Index::parse`] reads it.
    pub fn name(&self) -> String {
        let part = |part: &Part| {
            let reading = match part.reading {
                Reading::Integer => 'i',
                Reading::Decimal => 'n',
                Reading::Bytes => 'b',
                Reading::Date => 'd',
                Reading::Timestamp(Zone::None) => 's',
                Reading::Timestamp(Zone::Needed) => 'z',
                Reading::Time => 't',
                // Refused where the condition is read.
                Reading::Float | Reading::Rank(_) => 'x',
            };
            format!("{}{reading}", part.column)
        };
        let parts: Vec<String> = self.parts.iter().map(part).collect();
        parts.join(",")
    }

    /// Reads what [`Index::name`] wrote.
    pub fn parse(table: Oid, name: &str) -> Option<Index> {
        let part = |text: &str| {
            let (column, reading) = text.split_at_checked(text.len().checked_sub(1)?)?;
            let reading = match reading {
                "i" => Reading::Integer,
                "n" => Reading::Decimal,
                "b" => Reading::Bytes,
                "d" => Reading::Date,
                "s" => Reading::Timestamp(Zone::None),
                "z" => Reading::Timestamp(Zone::Needed),
                "t" => Reading::Time,
                _ => return None,
            };
            let column = column.parse().ok()?;
            Some(Part { column, reading })
        };
        let named = name.split(',').filter(|part| !part.is_empty());
        let parts = named.map(part).collect::<Option<_>>()?;
        Some(Index { table, parts })
    }
}

/// Adds a part to a key; NULL has one of its own.
pub fn push(key: &mut Vec<u8>, value: Option<Value<'_>>) {
    let Some(value) = value else {
        key.push(0);
        return;
    };
    let bytes = value.route_bytes();
    key.push(1);
    key.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    key.extend_from_slice(&bytes);
}

/// The lowest of all keys that come behind those that begin with `prefix`; `None`: none does.
pub fn behind(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte < 0xff)?;
    let mut behind = prefix[..=last].to_vec();
    behind[last] += 1;
    Some(behind)
}
