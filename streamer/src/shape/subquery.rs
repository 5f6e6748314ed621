//! A subquery with its types: whether rows of another table go with a row, and which.
//!
//! `[NOT] IN (SELECT …)` and `[NOT] EXISTS (SELECT …)` become one [`Subquery`] each (NOT is a condition of its own). The
//! table in it is *inner*, that of the SELECT around it *outer*. Rows of the two go together by their keys in two
//! indexes: [`Subquery::outer`] on the outer table and [`Subquery::inner`] on the inner one, with parts that are made to
//! be compared with each other. So the inner rows of an outer one are found by its key, and, when an inner row
//! changes, the outer rows that it may concern by the inner row's key: [`Subquery::outer_rows`].
//!
//! Behind these parts the inner index has those of which the values are known once parameters are bound: where `person =
//! $me` must hold, only rows of one person are read, and not all of a project to look for it.

use std::sync::Arc;

use anabranch_proto::record::{self, Malformed};

use super::{
    condition::{Condition, Operand},
    datatype::Domain,
    value::{Reading, Value},
};
use crate::{
    lookup::{self, Each, Error, Index, Lookup, Part},
    table::Table,
};

/// Most columns that one IN compares. Where NULLs may be among them, there are two keys to look for by each.
pub const IN_COLUMNS_MAX: usize = 8;

/// Most conditions `column = $param` that find inner rows: more would hardly leave fewer of them.
const BOUND_MAX: usize = 4;

/// A subquery: its inner table, and how rows of it go with rows of the outer one.
#[derive(Debug)]
pub struct Subquery {
    /// The inner table.
    pub table: Arc<Table>,
    /// Of the inner table: the columns of the correlations, then those that IN compares with columns; those that it compares
    /// with something else; those that the condition wants equal to a parameter. There may be more of another subquery behind
    /// them. Without parts it is the whole table.
    pub inner: Index,
    /// Of the outer table: the columns that the first of `inner` are compared with, in the same order; and maybe more.
    pub outer: Index,
    /// Whether false and unknown must be told apart where it stands: below NOT, IS FALSE, IS UNKNOWN. Elsewhere a row is
    /// only asked whether the subquery is true of it, and what is unknown may be taken for false.
    pub exact: bool,
    /// The columns of the inner table whose values decide anything, ascending.
    reads: Vec<usize>,
    /// How many parts of the two indexes are compared with each other.
    tied: usize,
    /// What the next parts of `inner` are equal to, or not different from, by IN.
    pub(super) given: Vec<(Operand, Domain)>,
    /// What those behind are equal to.
    pub(super) wanted: Vec<(Operand, Domain)>,
    pub(super) correlations: Vec<Correlation>,
    pub(super) test: Test,
    /// What else inner rows must meet; of the inner table, with the subqueries in it.
    pub(super) condition: Option<Condition>,
}

/// `inner column = outer column`
#[derive(Clone, Debug)]
pub(super) struct Correlation {
    /// Place in the inner table.
    pub inner: usize,
    /// Place in the outer table.
    pub outer: usize,
    /// How they compare.
    pub domain: Domain,
}

/// What is asked of the inner rows that the correlations and the condition leave.
#[derive(Clone, Debug)]
pub(super) enum Test {
    /// Whether there is one.
    Exists,
    /// Whether there is one that equals.
    In(Vec<Pair>),
}

/// A column of an inner row, and what IN compares it with.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    /// A column of the outer table, a constant or a parameter.
    pub left: Operand,
    /// Place in the inner table.
    pub column: usize,
    /// How they compare.
    pub domain: Domain,
}

impl Subquery {
    pub(super) fn new(
        outer: &Table,
        table: Arc<Table>,
        correlations: Vec<Correlation>,
        test: Test,
        condition: Option<Condition>,
        exact: bool,
    ) -> Subquery {
        let correlated = correlations
            .iter()
            .map(|correlation| (correlation.inner, correlation.outer, &correlation.domain));
        let compared = test.pairs().iter().filter_map(|pair| match pair.left {
            Operand::Column(left) => Some((pair.column, left, &pair.domain)),
            _ => None,
        });
        let part = |table: &Table, column: usize, domain: &Domain| Part {
            column,
            reading: Reading::new(&table.columns[column].kind, domain),
        };
        let (mut inner_parts, mut outer_parts) = (Vec::new(), Vec::new());
        for (inner, of_outer, domain) in correlated.chain(compared) {
            inner_parts.push(part(&table, inner, domain));
            outer_parts.push(part(outer, of_outer, domain));
        }
        let (mut given, mut wanted) = (Vec::new(), Vec::new());
        for pair in test.pairs().iter().filter(|pair| pair.is_given()) {
            inner_parts.push(part(&table, pair.column, &pair.domain));
            given.push((pair.left.clone(), pair.domain.clone()));
        }
        for (column, operand, domain) in condition.iter().flat_map(Condition::wanted) {
            let is_there = inner_parts.iter().any(|part| part.column == column);
            if !is_there && is_indexed(domain) && wanted.len() < BOUND_MAX {
                inner_parts.push(part(&table, column, domain));
                wanted.push((operand.clone(), domain.clone()));
            }
        }
        let mut reads: Vec<usize> = (correlations.iter().map(|correlation| correlation.inner))
            .chain(test.pairs().iter().map(|pair| pair.column))
            .collect();
        if let Some(condition) = &condition {
            condition.columns(&mut reads);
        }
        reads.sort_unstable();
        reads.dedup();
        Subquery {
            reads,
            tied: outer_parts.len(),
            given,
            wanted,
            inner: Index {
                table: table.oid,
                parts: inner_parts,
            },
            outer: Index {
                table: outer.oid,
                parts: outer_parts,
            },
            table,
            exact,
            correlations,
            test,
            condition,
        }
    }

    /// The parts of the outer index that make the key of an outer row.
    pub fn outer_parts(&self) -> &[Part] {
        &self.outer.parts[..self.tied]
    }

    /// Of how many parts of the two indexes an inner row must have the outer row's values to be looked at; the others are
    /// what IN compares.
    pub fn correlated(&self) -> usize {
        self.correlations.len()
    }

    /// Whether it is IN, not EXISTS.
    pub fn is_in(&self) -> bool {
        matches!(self.test, Test::In(_))
    }

    /// Whether two rows of the inner table are the same in all that decides anything: then one in place of the other changes no
    /// answer.
    pub fn same(&self, one: &[u8], other: &[u8]) -> Result<bool, Malformed> {
        for column in &self.reads {
            if record::value(one, *column)? != record::value(other, *column)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The inner rows, in the state that `lookup` shows, that are equal to `row` of the outer table in the parts of the
    /// indexes, until `each` says that it is enough. What the condition says of them is not asked.
    pub fn inner_rows(&self, row: &[u8], lookup: &dyn Lookup, each: Each<'_>) -> Result<(), Error> {
        let mut values = Vec::with_capacity(self.tied);
        for part in self.outer_parts() {
            values.push(part.reading.read(record::value(row, part.column)?)?);
        }
        match key_of(&values) {
            Some(key) => lookup.rows(&self.inner, &key, each),
            None => Ok(()),
        }
    }

    /// The outer rows, in the state that `lookup` shows, for which `row` of the inner table may decide the answer: those
    /// that are equal to it in the parts of the indexes; and where unknown must be told from false, those too for which
    /// the comparison by IN is unknown, as one side is NULL. What the condition says of `row` is not asked. Each is given
    /// once, until `each` says that it is enough.
    pub fn outer_rows(&self, row: &[u8], lookup: &dyn Lookup, each: Each<'_>) -> Result<(), Error> {
        let mut values = Vec::with_capacity(self.tied);
        for part in &self.inner.parts[..self.tied] {
            values.push(part.reading.read(record::value(row, part.column)?)?);
        }
        let (correlated, compared) = values.split_at(self.correlated());
        let Some(mut key) = key_of(correlated) else {
            return Ok(());
        };
        probe::<Error>(&mut key, compared, self.exact, &mut |probe| {
            let mut goes_on = true;
            lookup.rows(&self.outer, probe.prefix, &mut |row| {
                goes_on = each(row)?;
                Ok(goes_on)
            })?;
            Ok(goes_on)
        })?;
        Ok(())
    }
}

impl Pair {
    /// It is compared with a constant or a parameter, and an index finds it.
    pub fn is_given(&self) -> bool {
        let is_fixed = matches!(self.left, Operand::Constant(_) | Operand::Param(_));
        is_fixed && is_indexed(&self.domain)
    }
}

/// Whether equal values have one form, so that an index finds them.
fn is_indexed(domain: &Domain) -> bool {
    !matches!(domain, Domain::Float | Domain::Rank(_))
}

impl Test {
    /// What IN compares.
    pub fn pairs(&self) -> &[Pair] {
        match self {
            Test::Exists => &[],
            Test::In(pairs) => pairs,
        }
    }
}

/// The beginning of a key by the values of correlations; none if one is NULL, which is equal to nothing.
pub(super) fn key_of(correlated: &[Option<Value<'_>>]) -> Option<Vec<u8>> {
    let mut key = Vec::with_capacity(32);
    for value in correlated {
        lookup::push(&mut key, Some((*value)?));
    }
    Some(key)
}

/// A beginning of keys under which rows are to be found.
pub(super) struct Probe<'a> {
    /// The beginning.
    pub prefix: &'a [u8],
    /// How many of the values it has parts for.
    pub fixed: usize,
    /// No NULL is among those values, nor in place of them: the rows may be equal in all of them.
    pub may_be_equal: bool,
}

/// Goes over the beginnings of the keys of all rows that are, in what IN compares, not different from `values`: first of those
/// that are equal; then, if `exact`, of those where it is unknown, as there is a NULL in one of the two. `key` has
/// the parts before. Stops when `each` says false, and then does so, too.
pub(super) fn probe<E>(
    key: &mut Vec<u8>,
    values: &[Option<Value<'_>>],
    exact: bool,
    each: &mut dyn FnMut(Probe<'_>) -> Result<bool, E>,
) -> Result<bool, E> {
    probe_from(key, values, 0, exact, true, each)
}

fn probe_from<E>(
    key: &mut Vec<u8>,
    values: &[Option<Value<'_>>],
    fixed: usize,
    exact: bool,
    may_be_equal: bool,
    each: &mut dyn FnMut(Probe<'_>) -> Result<bool, E>,
) -> Result<bool, E> {
    let value = match values.get(fixed) {
        Some(Some(value)) => *value,
        Some(None) if !exact => return Ok(true),
        // Whatever a row has here, it is not different.
        end => {
            return each(Probe {
                prefix: key,
                fixed,
                may_be_equal: may_be_equal && end.is_none(),
            });
        }
    };
    let length = key.len();
    lookup::push(key, Some(value));
    let mut goes_on = probe_from(key, values, fixed + 1, exact, may_be_equal, each)?;
    key.truncate(length);
    if goes_on && exact {
        lookup::push(key, None);
        goes_on = probe_from(key, values, fixed + 1, exact, false, each)?;
        key.truncate(length);
    }
    Ok(goes_on)
}
