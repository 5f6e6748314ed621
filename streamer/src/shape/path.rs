//! How the bound SELECTs that may have a row are found: from the row's values, through rows of inner tables, to the
//! value of a parameter. By that, they are hashed.

use std::sync::Arc;

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

/// From a row to the [`RouteKey`]s of all bound SELECTs of which a condition may be true for it: never too few, maybe
/// too many.
#[derive(Debug)]
pub enum Path {
    /// The value of a column.
    Key(Route),
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

/// The parameters by which bound SELECTs are found, each with how it compares. Paths that end at the same have the same
/// leaf: its value is the same.
#[derive(Debug, Default)]
pub(super) struct Leaves(Vec<(usize, Domain)>);

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

    /// Whether a row's own values are enough: its keys are the same in all states.
    pub fn is_direct(&self) -> bool {
        match self {
            Path::Key(_) => true,
            Path::Through { .. } => false,
            Path::Any(paths) => paths.iter().all(Path::is_direct),
        }
    }

    /// Few keys come before many, and few rows to be read before many: the least is best.
    fn cost(&self) -> (u8, usize) {
        match self {
            Path::Key(Route { one: true, .. }) => (0, 0),
            Path::Key(_) => (1, 0),
            Path::Through { .. } => (2, self.steps()),
            Path::Any(_) => (3, self.steps()),
        }
    }

    fn steps(&self) -> usize {
        match self {
            Path::Key(_) => 0,
            Path::Through { then, .. } => 1 + then.steps(),
            Path::Any(paths) => paths.iter().map(Path::steps).sum(),
        }
    }

    fn number(&mut self, leaves: &mut Leaves) {
        match self {
            Path::Key(route) => route.leaf = leaves.number(route.param, &route.domain),
            Path::Through { then, .. } => then.number(leaves),
            Path::Any(paths) => paths.iter_mut().for_each(|path| path.number(leaves)),
        }
    }
}

fn by(condition: &Condition, table: &Table) -> Option<Path> {
    match condition {
        Condition::And(parts) => best(parts.iter().filter_map(|part| by(part, table))),
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
        } => key(table, *column, *param, domain, true),
        Condition::Quantified {
            comparison: Comparison::Equal,
            all: false,
            left: Operand::Column(column),
            list: List::Param(param),
            domain,
        } => key(table, *column, *param, domain, false),
        _ => None,
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
    fn number(&mut self, param: usize, domain: &Domain) -> u16 {
        let leaf = (param, domain.clone());
        let known = self.0.iter().position(|known| *known == leaf);
        let place = known.unwrap_or_else(|| {
            self.0.push(leaf);
            self.0.len() - 1
        });
        u16::try_from(place).expect("the SQL of a SELECT is too short for so many parameters")
    }

    /// The keys of all leaves, by what the parameters are bound to.
    pub fn keys(&self, arguments: &[Argument]) -> Result<Vec<RouteKey>, Unfit> {
        let mut keys = Vec::new();
        for (leaf, (param, domain)) in self.0.iter().enumerate() {
            let constants = match arguments.get(*param) {
                Some(Argument::One(constant)) => std::slice::from_ref(constant),
                Some(Argument::Many(constants)) => constants,
                None => &[],
            };
            for constant in constants {
                let comparable = Comparable::new(constant, domain).map_err(|reason| Unfit {
                    param: Some(*param),
                    reason,
                })?;
                keys.push(RouteKey {
                    leaf: leaf as u16,
                    value: comparable.value().route_bytes(),
                });
            }
        }
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }
}
