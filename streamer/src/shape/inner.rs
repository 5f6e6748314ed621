//! A subquery with its parameters bound, ready to be asked of rows of the outer table.
//!
//! What it says depends on the state, on what its parameters are bound to, and on the values of the outer row that tie it to
//! that row: a state that [remembers](crate::lookup::Moment) is asked first.

use std::sync::Arc;

use anabranch_proto::record::{self, ValueRef};

use super::{
    evaluate::{Failure, Program},
    subquery::{Subquery, key_of, probe},
    value::{Comparable, Reading, Value},
};
use crate::lookup::{self, Error, Lookup};

/// A [`Subquery`], built.
#[derive(Clone)]
pub struct Inner {
    /// What it is built of.
    pub of: Arc<Subquery>,
    /// The same for those that say the same of the same row: made of all that it says, with what parameters are bound to.
    pub identity: u128,
    /// Where the outer row's values are that make its key: slots, and how they are read.
    pub key: Vec<(usize, Reading)>,
    /// What IN compares columns of the inner rows with that is no column, by the index.
    pub given: Vec<Comparable>,
    /// The end of the keys of inner rows that meet the condition.
    pub wanted: Vec<u8>,
    /// What else IN compares columns of the inner rows with that is no column.
    pub fixed: Vec<Fixed>,
    /// What else inner rows must meet.
    pub condition: Option<Program>,
}

/// A constant (none is NULL) that IN compares with a column of the inner table.
#[derive(Clone)]
pub struct Fixed {
    /// The column's place.
    pub column: usize,
    /// How it is read.
    pub reading: Reading,
    /// The constant.
    pub value: Option<Comparable>,
}

impl Inner {
    /// What the subquery says of the row that has `slots`.
    pub fn evaluate<'a>(
        &'a self,
        slots: &[ValueRef<'a>],
        lookup: &dyn Lookup,
    ) -> Result<Option<bool>, Failure> {
        let mut values = Vec::with_capacity(self.key.len());
        for (slot, reading) in &self.key {
            values.push(reading.read(slots[*slot])?);
        }
        let Some(answers) = lookup.answers() else {
            return self.find(&values, lookup);
        };
        let mut asked = Vec::with_capacity(16 * values.len());
        for value in &values {
            lookup::push(&mut asked, *value);
        }
        if let Some(known) = answers.get(self.identity, &asked) {
            return Ok(known);
        }
        let answer = self.find(&values, lookup)?;
        answers.put(self.identity, asked, answer);
        Ok(answer)
    }

    /// What it says of a row with these values.
    fn find(
        &self,
        values: &[Option<Value<'_>>],
        lookup: &dyn Lookup,
    ) -> Result<Option<bool>, Failure> {
        let (correlated, tied) = values.split_at(self.of.correlated());
        let given = self.given.iter().map(|value| Some(value.value()));
        let compared: Vec<_> = tied.iter().copied().chain(given).collect();
        let Some(mut key) = key_of(correlated) else {
            return Ok(Some(false));
        };
        let exact = self.of.exact;
        let has_null = self.fixed.iter().any(|fixed| fixed.value.is_none());
        if has_null && !exact {
            return Ok(Some(false));
        }
        let mut answer = Some(false);
        probe(&mut key, &compared, exact, &mut |probe| {
            let first = correlated.len() + probe.fixed;
            let compared = &compared[probe.fixed..];
            let may_be_true = probe.may_be_equal && !has_null;
            // What the condition wants comes behind all that is compared.
            let whole;
            let prefix = match compared.is_empty() {
                true => {
                    whole = [probe.prefix, &self.wanted].concat();
                    &whole
                }
                false => probe.prefix,
            };
            lookup.rows(&self.of.inner, prefix, &mut |row| {
                let equal = match probe.may_be_equal {
                    true => Some(true),
                    false => None,
                };
                let truth = self.compare(equal, first, compared, row)?;
                // Another unknown one adds nothing.
                let adds = truth == Some(true) || (truth.is_none() && exact && answer.is_some());
                if !adds || !self.meets(row, lookup)? {
                    return Ok(true);
                }
                answer = truth;
                Ok(may_be_true && truth != Some(true))
            })?;
            Ok::<_, Failure>(answer == Some(false))
        })?;
        Ok(answer)
    }

    /// The comparison by IN: `equal`, of the parts that the key has, and those of `compared`, which come behind them from
    /// part `first` on, and of what is fixed. False as soon as one is.
    fn compare(
        &self,
        mut equal: Option<bool>,
        first: usize,
        compared: &[Option<Value<'_>>],
        row: &[u8],
    ) -> Result<Option<bool>, Error> {
        let compared = self.of.inner.parts[first..]
            .iter()
            .zip(compared)
            .map(|(part, value)| (part.column, &part.reading, *value));
        let fixed = self.fixed.iter().map(|fixed| {
            let value = fixed.value.as_ref().map(Comparable::value);
            (fixed.column, &fixed.reading, value)
        });
        for (column, reading, left) in compared.chain(fixed) {
            match (left, reading.read(record::value(row, column)?)?) {
                (Some(left), Some(right)) if left.compare(right)?.is_ne() => {
                    return Ok(Some(false));
                }
                (Some(_), Some(_)) => {}
                _ => equal = None,
            }
        }
        Ok(equal)
    }

    fn meets(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, Error> {
        match &self.condition {
            Some(condition) => condition.is_true(row, lookup),
            None => Ok(true),
        }
    }
}
