//! A condition with its types: what [`super::typing`] makes, and what evaluation, SQL and fingerprints are made of.

use std::sync::Arc;

use super::{
    datatype::{DataType, Domain},
    literal::Constant,
    subquery::Subquery,
    syntax::{Comparison, Truth},
};

/// A condition over one row, and what goes with it: true, false or unknown.
#[derive(Clone, Debug)]
pub enum Condition {
    /// TRUE, FALSE, or NULL.
    Fixed(Option<bool>),
    /// A boolean column, constant or parameter.
    Flag(Operand),
    /// `left comparison right`
    Compare {
        /// The comparison.
        comparison: Comparison,
        /// Left side.
        left: Operand,
        /// Right side.
        right: Operand,
        /// How they compare.
        domain: Domain,
    },
    /// `left comparison ANY (list)`, and ALL. `IN` and `NOT IN` become one of these.
    Quantified {
        /// The comparison.
        comparison: Comparison,
        /// ALL.
        all: bool,
        /// Left side.
        left: Operand,
        /// The elements.
        list: List,
        /// How they compare.
        domain: Domain,
    },
    /// `left LIKE pattern`
    Like {
        /// Left side.
        left: Operand,
        /// The pattern: never a column.
        pattern: Operand,
        /// The escape character, if there is any.
        escape: Option<char>,
    },
    /// `left IS NULL`
    IsNull(Operand),
    /// `left IS NOT DISTINCT FROM NULL`: differs from IS NULL for composites.
    IsNothing(Operand),
    /// `left IS NOT DISTINCT FROM right`
    Same {
        /// Left side.
        left: Operand,
        /// Right side.
        right: Operand,
        /// How they compare.
        domain: Domain,
    },
    /// Whether rows of another table go with this one.
    Subquery(Arc<Subquery>),
    /// `inner IS TRUE` and the like.
    Is(Box<Condition>, Truth),
    /// All of these.
    And(Vec<Condition>),
    /// Any of these.
    Or(Vec<Condition>),
    /// Not this.
    Not(Box<Condition>),
}

/// What is compared.
#[derive(Clone, Debug)]
pub enum Operand {
    /// A column: its place in the table.
    Column(usize),
    /// A constant.
    Constant(Constant),
    /// NULL of a type.
    Null(Option<DataType>),
    /// A parameter of the shape: its place there.
    Param(usize),
}

/// The right side of ANY and ALL.
#[derive(Clone, Debug)]
pub enum List {
    /// These: constants, NULLs and parameters, all of one type.
    Of(Vec<Operand>, DataType),
    /// An array parameter: its place in the shape.
    Param(usize),
}

impl Condition {
    /// `NOT self`, if asked for.
    pub fn negated_if(self, negated: bool) -> Condition {
        if negated {
            Condition::Not(Box::new(self))
        } else {
            self
        }
    }

    /// Adds the columns whose values it reads: of its own table, not of those in subqueries. Some maybe more than once.
    pub fn columns(&self, found: &mut Vec<usize>) {
        let mut read = |operands: &mut dyn Iterator<Item = &Operand>| {
            found.extend(operands.filter_map(|operand| match operand {
                Operand::Column(column) => Some(*column),
                _ => None,
            }));
        };
        match self {
            Condition::Fixed(_) => {}
            Condition::Flag(one) | Condition::IsNull(one) | Condition::IsNothing(one) => {
                read(&mut [one].into_iter());
            }
            Condition::Compare { left, right, .. } | Condition::Same { left, right, .. } => {
                read(&mut [left, right].into_iter());
            }
            Condition::Like { left, pattern, .. } => read(&mut [left, pattern].into_iter()),
            Condition::Quantified { left, list, .. } => {
                read(&mut [left].into_iter());
                if let List::Of(elements, _) = list {
                    read(&mut elements.iter());
                }
            }
            Condition::Subquery(subquery) => {
                found.extend(subquery.outer_parts().iter().map(|part| part.column));
            }
            Condition::Is(inner, _) | Condition::Not(inner) => inner.columns(found),
            Condition::And(parts) | Condition::Or(parts) => {
                parts.iter().for_each(|part| part.columns(found));
            }
        }
    }

    /// The columns that must be equal to a parameter for it to be true, each with that.
    pub fn wanted(&self) -> Vec<(usize, &Operand, &Domain)> {
        match self {
            Condition::And(parts) => parts.iter().flat_map(Condition::wanted).collect(),
            Condition::Is(inner, Truth::True) => inner.wanted(),
            Condition::Compare {
                comparison: Comparison::Equal,
                left: Operand::Column(column),
                right: param @ Operand::Param(_),
                domain,
            }
            | Condition::Compare {
                comparison: Comparison::Equal,
                left: param @ Operand::Param(_),
                right: Operand::Column(column),
                domain,
            } => vec![(*column, param, domain)],
            _ => Vec::new(),
        }
    }

    /// Whether what it says depends on a parameter, also in its subqueries.
    pub fn has_params(&self) -> bool {
        let is_param = |operand: &Operand| matches!(operand, Operand::Param(_));
        match self {
            Condition::Fixed(_) => false,
            Condition::Flag(one) | Condition::IsNull(one) | Condition::IsNothing(one) => {
                is_param(one)
            }
            Condition::Compare { left, right, .. } | Condition::Same { left, right, .. } => {
                is_param(left) || is_param(right)
            }
            Condition::Like { left, pattern, .. } => is_param(left) || is_param(pattern),
            Condition::Quantified { left, list, .. } => {
                is_param(left)
                    || match list {
                        List::Of(elements, _) => elements.iter().any(is_param),
                        List::Param(_) => true,
                    }
            }
            Condition::Subquery(subquery) => {
                subquery
                    .test
                    .pairs()
                    .iter()
                    .any(|pair| is_param(&pair.left))
                    || subquery
                        .condition
                        .as_ref()
                        .is_some_and(Condition::has_params)
            }
            Condition::Is(inner, _) | Condition::Not(inner) => inner.has_params(),
            Condition::And(parts) | Condition::Or(parts) => parts.iter().any(Condition::has_params),
        }
    }

    /// Why nothing leads from a row's values to the parameters for which it may be true.
    pub fn scan_reason(&self) -> &'static str {
        match self {
            Condition::Or(_) => {
                "one side of its OR compares no column with a parameter by =, = ANY, <, <=, > or >="
            }
            Condition::Not(_) => {
                "it says with NOT for whom a row is not meant, and that leads to nobody for whom it is"
            }
            Condition::Is(inner, Truth::True) => inner.scan_reason(),
            _ => {
                "no part of it that AND joins compares a column with a parameter by =, = ANY, <, <=, > or >="
            }
        }
    }

    /// Changes the subqueries that stand in it, and those in them. Only before anybody else has any of them.
    pub fn change_subqueries(&mut self, change: &mut dyn FnMut(&mut Subquery)) {
        match self {
            Condition::Subquery(subquery) => {
                let subquery = Arc::get_mut(subquery).expect("nobody else has it yet");
                change(subquery);
                if let Some(condition) = &mut subquery.condition {
                    condition.change_subqueries(change);
                }
            }
            Condition::Is(inner, _) | Condition::Not(inner) => inner.change_subqueries(change),
            Condition::And(parts) | Condition::Or(parts) => {
                parts
                    .iter_mut()
                    .for_each(|part| part.change_subqueries(change));
            }
            _ => {}
        }
    }

    /// Adds the subqueries that stand in it, not those in them.
    pub fn subqueries(&self, found: &mut Vec<Arc<Subquery>>) {
        match self {
            Condition::Subquery(subquery) => found.push(Arc::clone(subquery)),
            Condition::Is(inner, _) | Condition::Not(inner) => inner.subqueries(found),
            Condition::And(parts) | Condition::Or(parts) => {
                parts.iter().for_each(|part| part.subqueries(found));
            }
            Condition::Fixed(_)
            | Condition::Flag(_)
            | Condition::Compare { .. }
            | Condition::Quantified { .. }
            | Condition::Like { .. }
            | Condition::IsNull(_)
            | Condition::IsNothing(_)
            | Condition::Same { .. } => {}
        }
    }
}
