//! How the bound SELECTs that may have a row are found: from the row's values, through rows of inner tables, to the
//! value of a parameter. By that, they are hashed; or to a value between two parameters, or to one side of one: they are
//! found in the order of their ranges.

use std::{ops, sync::Arc};

use anabranch_proto::record;

use super::{
    condition::{Condition, List, Operand},
    datatype::Domain,
    evaluate::{Argument, Unfit},
    subquery::{Subquery, Test},
    syntax::{Comparison, Truth},
    value::{Comparable, Reading},
};
use crate::{
    lookup::{Error, Lookup},
    table::Table,
};

/// A value that a parameter may have, such that values equal by Postgres' meaning are equal here, and those of two
/// parameters never are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    /// Which of the SELECT's leaves it is a value for.
    leaf: u16,
    value: Vec<u8>,
}

/// The values for which a bound SELECT may have a row, by one of its leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRange {
    /// Which of the SELECT's leaves.
    pub leaf: u16,
    /// Where it begins, in the order of [`RouteKey::value`].
    pub low: ops::Bound<Vec<u8>>,
    /// Where it ends.
    pub high: ops::Bound<Vec<u8>>,
}

/// From a row to the [`RouteKey`]s of all bound SELECTs of which a condition may be true for it: never too few, maybe
/// too many.
#[derive(Debug)]
pub enum Path {
    /// The value of a column.
    Key(Route),
    /// The value of a column, as one that lies in a range.
    Within(Within),
    /// By the rows of the subquery's inner table that have the row's key, and from there.
    Through {
        /// The subquery: a condition that must be true.
        subquery: Arc<Subquery>,
        /// From rows of the inner table.
        then: Box<Path>,
    },
    /// By each of these, as any of them may be what makes the condition true.
    Any(Vec<Path>),
}

/// The end of a path: a conjunct `column = $param` or `column = ANY ($param)`.
#[derive(Debug)]
pub struct Route {
    column: usize,
    reading: Reading,
    domain: Domain,
    param: usize,
    /// `=`, not `= ANY`.
    one: bool,
    /// Its place in [`Leaves`].
    leaf: u16,
}

/// The end of a path: conjuncts `column > $param`, `column <= $param`, or both; or `column = $param` where equal values have
/// several forms.
#[derive(Debug)]
pub struct Within {
    column: usize,
    reading: Reading,
    ends: Ends,
    /// Its place in [`Leaves`].
    leaf: u16,
}

/// A range: at least one of both ends is there.
#[derive(Clone, Debug, PartialEq)]
struct Ends {
    domain: Domain,
    low: Option<End>,
    high: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct End {
    param: usize,
    /// Its value is within.
    included: bool,
}

/// The parameters by which bound SELECTs are found, each with how it compares. Paths that end at the same have the same
/// leaf: its value is the same.
#[derive(Debug, Default)]
pub(super) struct Leaves(Vec<Leaf>);

#[derive(Debug, PartialEq)]
enum Leaf {
    /// Equal to a parameter, or to one of an array.
    Equal(usize, Domain),
    Within(Ends),
}

impl RouteKey {
    /// Which of the SELECT's leaves it is a value for.
    pub fn leaf(&self) -> u16 {
        self.leaf
    }

    /// The value: for the leaf of a range, in the order of the values.
    pub fn value(&self) -> &[u8] {
        &self.value
    }
}

impl RouteRange {
    /// Whether a row's key lies in it.
    pub fn holds(&self, key: &RouteKey) -> bool {
        let range = (self.low.as_ref(), self.high.as_ref());
        self.leaf == key.leaf && ops::RangeBounds::<Vec<u8>>::contains(&range, &key.value)
    }
}

impl Path {
    /// The best path by `condition`, of rows of `table`.
    pub(super) fn find(condition: &Condition, table: &Table, leaves: &mut Leaves) -> Option<Path> {
        let mut path = by(condition, table)?;
        path.number(leaves);
        Some(path)
    }

    /// The best path for rows of the subquery's inner table, by the subquery alone: to the bound SELECTs for which such a row
    /// may decide what the subquery says of some outer row.
    pub(super) fn within(subquery: &Subquery, leaves: &mut Leaves) -> Option<Path> {
        let mut path = inside(subquery)?;
        path.number(leaves);
        Some(path)
    }

    /// Adds the keys to which this path leads from `row`, in the state that `lookup` shows; some maybe more than once. False: it
    /// leads to more than `max`, and not to all of them was gone.
    pub fn keys_of(
        &self,
        row: &[u8],
        lookup: &dyn Lookup,
        keys: &mut Vec<RouteKey>,
        max: usize,
    ) -> Result<bool, Error> {
        match self {
            Path::Key(route) => {
                let value = record::value(row, route.column)?;
                // NULL is equal to nothing: no bound SELECT has the row.
                if let Some(value) = route.reading.read(value)? {
                    keys.push(RouteKey {
                        leaf: route.leaf,
                        value: value.route_bytes(),
                    });
                }
                Ok(keys.len() <= max)
            }
            Path::Within(within) => {
                let value = record::value(row, within.column)?;
                if let Some(value) = within.reading.read(value)? {
                    keys.push(RouteKey {
                        leaf: within.leaf,
                        value: value.order_bytes(),
                    });
                }
                Ok(keys.len() <= max)
            }
            Path::Through { subquery, then } => {
                let mut all = true;
                subquery.inner_rows(row, lookup, &mut |row| {
                    all = then.keys_of(row, lookup, keys, max)?;
                    Ok(all)
                })?;
                Ok(all)
            }
            Path::Any(paths) => {
                for path in paths {
                    if !path.keys_of(row, lookup, keys, max)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        }
    }

    /// Whether the condition that this was found by is true of all rows that lead to a bound SELECT: it is nothing but
    /// `column = $param`.
    pub(super) fn is_exact(&self, condition: &Condition) -> bool {
        matches!(self, Path::Key(Route { one: true, .. }))
            && matches!(condition, Condition::Compare { .. })
    }

    /// Whether a row's own values are enough: its keys are the same in all states.
    pub fn is_direct(&self) -> bool {
        match self {
            Path::Key(_) | Path::Within(_) => true,
            Path::Through { .. } => false,
            Path::Any(paths) => paths.iter().all(Path::is_direct),
        }
    }

    /// Few keys come before many and few rows to be read before many; ranges, which may hold nearly all, come last. The least
    /// is best.
    fn cost(&self) -> (u8, usize) {
        (self.class(), self.steps())
    }

    fn class(&self) -> u8 {
        match self {
            Path::Key(Route { one: true, .. }) => 0,
            Path::Key(_) => 1,
            Path::Through { then, .. } if !then.is_range() => 2,
            Path::Any(_) if !self.is_range() => 3,
            Path::Within(within) if within.ends.low.is_some() && within.ends.high.is_some() => 4,
            Path::Within(_) => 5,
            Path::Through { .. } => 6,
            Path::Any(_) => 7,
        }
    }

    /// Whether a range is at any of its ends.
    fn is_range(&self) -> bool {
        match self {
            Path::Key(_) => false,
            Path::Within(_) => true,
            Path::Through { then, .. } => then.is_range(),
            Path::Any(paths) => paths.iter().any(Path::is_range),
        }
    }

    fn steps(&self) -> usize {
        match self {
            Path::Key(_) | Path::Within(_) => 0,
            Path::Through { then, .. } => 1 + then.steps(),
            Path::Any(paths) => paths.iter().map(Path::steps).sum(),
        }
    }

    fn number(&mut self, leaves: &mut Leaves) {
        match self {
            Path::Key(route) => {
                route.leaf = leaves.number(Leaf::Equal(route.param, route.domain.clone()));
            }
            Path::Within(within) => within.leaf = leaves.number(Leaf::Within(within.ends.clone())),
            Path::Through { then, .. } => then.number(leaves),
            Path::Any(paths) => paths.iter_mut().for_each(|path| path.number(leaves)),
        }
    }
}

fn by(condition: &Condition, table: &Table) -> Option<Path> {
    match condition {
        Condition::And(parts) => {
            let ranges = ranges(condition, table).map(Path::Within);
            best(
                parts
                    .iter()
                    .filter_map(|part| by(part, table))
                    .chain(ranges),
            )
        }
        Condition::Or(parts) => parts
            .iter()
            .map(|part| by(part, table))
            .collect::<Option<_>>()
            .map(Path::Any),
        Condition::Is(inner, Truth::True) => by(inner, table),
        Condition::Subquery(subquery) => Some(Path::Through {
            subquery: Arc::clone(subquery),
            then: Box::new(inside(subquery)?),
        }),
        Condition::Compare {
            comparison: Comparison::Equal,
            left: Operand::Column(column),
            right: Operand::Param(param),
            domain,
        }
        | Condition::Compare {
            comparison: Comparison::Equal,
            left: Operand::Param(param),
            right: Operand::Column(column),
            domain,
        } if *domain != Domain::Float => key(table, *column, *param, domain, true),
        Condition::Quantified {
            comparison: Comparison::Equal,
            all: false,
            left: Operand::Column(column),
            list: List::Param(param),
            domain,
        } => key(table, *column, *param, domain, false),
        Condition::Compare { .. } => best(ranges(condition, table).map(Path::Within)),
        _ => None,
    }
}

/// What the conjuncts of a condition say of the range that a column's value must lie in: of each column the first of each end.
fn ranges(condition: &Condition, table: &Table) -> impl Iterator<Item = Within> {
    let mut found: Vec<Within> = Vec::new();
    add_ranges(condition, table, &mut found);
    found.into_iter()
}

fn add_ranges(condition: &Condition, table: &Table, found: &mut Vec<Within>) {
    let (comparison, column, param, domain) = match condition {
        Condition::And(parts) => {
            return parts.iter().for_each(|part| add_ranges(part, table, found));
        }
        Condition::Is(inner, Truth::True) => return add_ranges(inner, table, found),
        Condition::Compare {
            comparison,
            left: Operand::Column(column),
            right: Operand::Param(param),
            domain,
        } => (*comparison, *column, *param, domain),
        Condition::Compare {
            comparison,
            left: Operand::Param(param),
            right: Operand::Column(column),
            domain,
        } => (comparison.turned(), *column, *param, domain),
        _ => return,
    };
    let end = |included| Some(End { param, included });
    let (low, high) = match comparison {
        Comparison::Equal => (end(true), end(true)),
        Comparison::NotEqual => return,
        Comparison::Less => (None, end(false)),
        Comparison::LessOrEqual => (None, end(true)),
        Comparison::Greater => (end(false), None),
        Comparison::GreaterOrEqual => (end(true), None),
    };
    let same = |within: &&mut Within| within.column == column && within.ends.domain == *domain;
    match found.iter_mut().find(same) {
        Some(Within { ends, .. }) => {
            ends.low = ends.low.or(low);
            ends.high = ends.high.or(high);
        }
        None => found.push(Within {
            column,
            reading: Reading::new(&table.columns[column].kind, domain),
            ends: Ends {
                domain: domain.clone(),
                low,
                high,
            },
            leaf: 0,
        }),
    }
}

fn inside(subquery: &Subquery) -> Option<Path> {
    let table = &*subquery.table;
    let condition = subquery.condition.as_ref();
    let by_condition = condition.and_then(|condition| by(condition, table));
    let pairs = match &subquery.test {
        // There a row with NULL in the column matters to all, whatever their parameter is.
        Test::In(_) if subquery.exact => &[],
        test => test.pairs(),
    };
    let compared = pairs.iter().filter_map(|pair| match pair.left {
        Operand::Param(param) => key(table, pair.column, param, &pair.domain, true),
        _ => None,
    });
    best(by_condition.into_iter().chain(compared))
}

fn best(paths: impl Iterator<Item = Path>) -> Option<Path> {
    paths.min_by_key(Path::cost)
}

fn key(table: &Table, column: usize, param: usize, domain: &Domain, one: bool) -> Option<Path> {
    // Equal floats have many forms, and what is compared as a float is equal to several integers.
    if *domain == Domain::Float {
        return None;
    }
    Some(Path::Key(Route {
        column,
        reading: Reading::new(&table.columns[column].kind, domain),
        domain: domain.clone(),
        param,
        one,
        leaf: 0,
    }))
}

impl Leaves {
    fn number(&mut self, leaf: Leaf) -> u16 {
        let known = self.0.iter().position(|known| *known == leaf);
        let place = known.unwrap_or_else(|| {
            self.0.push(leaf);
            self.0.len() - 1
        });
        u16::try_from(place).expect("the SQL of a SELECT is too short for so many parameters")
    }

    /// The keys and ranges of all leaves, by what the parameters are bound to.
    pub fn bind(&self, arguments: &[Argument]) -> Result<(Vec<RouteKey>, Vec<RouteRange>), Unfit> {
        let (mut keys, mut ranges) = (Vec::new(), Vec::new());
        let comparable = |param, constant: &_, domain: &_| {
            Comparable::new(constant, domain).map_err(|reason| Unfit {
                param: Some(param),
                reason,
            })
        };
        for (leaf, of) in self.0.iter().enumerate() {
            let leaf = leaf as u16;
            match of {
                Leaf::Equal(param, domain) => {
                    let constants = match arguments.get(*param) {
                        Some(Argument::One(constant)) => std::slice::from_ref(constant),
                        Some(Argument::Many(constants)) => constants,
                        None => &[],
                    };
                    for constant in constants {
                        let value = comparable(*param, constant, domain)?;
                        let value = value.value().route_bytes();
                        keys.push(RouteKey { leaf, value });
                    }
                }
                Leaf::Within(ends) => {
                    let bound = |end: Option<End>| {
                        let Some(End { param, included }) = end else {
                            return Ok(ops::Bound::Unbounded);
                        };
                        let Some(Argument::One(constant)) = arguments.get(param) else {
                            return Ok(ops::Bound::Unbounded);
                        };
                        let value = comparable(param, constant, &ends.domain)?;
                        let value = value.value().order_bytes();
                        Ok(match included {
                            true => ops::Bound::Included(value),
                            false => ops::Bound::Excluded(value),
                        })
                    };
                    let (low, high) = (bound(ends.low)?, bound(ends.high)?);
                    ranges.push(RouteRange { leaf, low, high });
                }
            }
        }
        keys.sort_unstable();
        keys.dedup();
        Ok((keys, ranges))
    }
}
