//! A condition with its parameters bound, ready to be asked of rows: the hot path.
//!
//! The columns that it needs are read in one pass over the record; constants were parsed when it was built. What a
//! row can't have by the type of its columns is [`Malformed`]. Nothing else can fail, besides the lookup of the rows that
//! subqueries ask for.

use std::{cmp::Ordering, sync::Arc};

use anabranch_proto::record::{self, Malformed, ValueRef};

use super::{
    condition::{Condition, List, Operand},
    datatype::Domain,
    deparse,
    explain::{INNER_COUNTED_MAX, INNER_SHOWN_MAX},
    inner::{Fixed, Inner},
    literal::Constant,
    pattern::Pattern,
    subquery::Subquery,
    syntax::{Comparison, Truth},
    value::{Comparable, Reading, Value},
};
use crate::{
    lookup::{self, Error, Lookup},
    table::Table,
};

/// So many columns of a row are read without allocation.
const INLINE_COLUMNS: usize = 12;

/// Lists up to this length are searched from their start.
const LINEAR_LIST_MAX: usize = 8;

/// What a parameter was bound to.
#[derive(Clone)]
pub enum Argument {
    /// A value.
    One(Constant),
    /// The elements of an array.
    Many(Vec<Constant>),
}

/// A parameter's value can't be used where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// The parameter's place in the shape.
    pub param: Option<usize>,
    /// Why; never shows the value.
    pub reason: String,
}

/// The condition, built.
#[derive(Clone)]
pub struct Program {
    /// Places of the columns that are read, ascending. A slot is a place in this list.
    columns: Vec<usize>,
    root: Node,
}

#[derive(Clone)]
enum Source {
    Slot(usize, Reading),
    Constant(Comparable),
    Null,
}

#[derive(Clone)]
enum Node {
    Fixed(Option<bool>),
    Flag(Source),
    Compare(Comparison, Source, Source),
    /// `= ANY` or `<> ALL`: `elements` ascend; `null`: one of them is NULL.
    Among {
        all: bool,
        left: Source,
        elements: Vec<Comparable>,
        null: bool,
    },
    Quantified {
        comparison: Comparison,
        all: bool,
        left: Source,
        elements: Vec<Option<Comparable>>,
    },
    Like(Text, Option<Pattern>),
    IsNull(usize),
    Same(Source, Source),
    Subquery(Box<Inner>),
    Is(Box<Node>, Truth),
    And(Box<[Node]>),
    Or(Box<[Node]>),
    Not(Box<Node>),
}

/// What a condition and each of its parts said of one row: each was asked as [`Program::is_true`] asks it.
pub struct Trace {
    /// What it said.
    pub truth: Option<bool>,
    /// Of what AND, OR, NOT and IS are made of, in the order of the [`Condition`]; all of them, also where the first decides.
    pub parts: Vec<Trace>,
    /// Of a subquery.
    pub inner: Option<Inside>,
}

/// The rows of a subquery's table that are equal to the outer row in what the two are found by.
#[derive(Default)]
pub struct Inside {
    /// How many; counting stops at [`INNER_COUNTED_MAX`].
    pub count: usize,
    /// Those whose condition is true of them, among the ones counted.
    pub met: usize,
    /// The first of them, and what the subquery's own condition said of each; `None`: it has none.
    pub rows: Vec<(Vec<u8>, Option<Trace>)>,
}

/// An error on its way up, small: nearly all answers are none.
pub struct Failure(Box<Error>);

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Failure(Box::new(malformed.into()))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure(Box::new(error))
    }
}

/// The left side of LIKE.
#[derive(Clone)]
enum Text {
    Slot(usize),
    Constant(String),
    Null,
}

impl Program {
    /// Builds `condition` over `table`.
    pub fn new(
        condition: &Condition,
        table: &Table,
        arguments: &[Argument],
    ) -> Result<Program, Unfit> {
        let mut columns = Vec::new();
        collect_columns(condition, &mut columns);
        columns.sort_unstable();
        columns.dedup();
        let builder = Builder {
            columns: &columns,
            table,
            arguments,
        };
        let root = builder.node(condition)?;
        Ok(Program { columns, root })
    }

    /// Whether the condition is true of `row`, in the state that `lookup` shows: not false, not unknown.
    pub fn is_true(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, Error> {
        let mut inline = [ValueRef::Null; INLINE_COLUMNS];
        let mut heap;
        let slots = match inline.get_mut(..self.columns.len()) {
            Some(slots) => slots,
            None => {
                heap = vec![ValueRef::Null; self.columns.len()];
                &mut heap[..]
            }
        };
        let mut values = record::values(row)?;
        let mut next = 0;
        for (slot, &column) in slots.iter_mut().zip(&self.columns) {
            *slot = values
                .nth(column - next)
                .unwrap_or(Err(Malformed("fewer values than columns")))?;
            next = column + 1;
        }
        match self.root.evaluate(slots, lookup) {
            Ok(truth) => Ok(truth == Some(true)),
            Err(Failure(error)) => Err(*error),
        }
    }
}

impl Program {
    /// Asks the condition and all its parts of `row`. Slow: each part is asked anew below each one that it is a part of.
    pub fn trace(&self, row: &[u8], lookup: &dyn Lookup) -> Result<Trace, Error> {
        let mut slots = Vec::with_capacity(self.columns.len());
        for &column in &self.columns {
            slots.push(record::value(row, column)?);
        }
        self.root.trace(row, &slots, lookup)
    }
}

impl Node {
    fn trace<'a>(
        &'a self,
        row: &[u8],
        slots: &[ValueRef<'a>],
        lookup: &dyn Lookup,
    ) -> Result<Trace, Error> {
        let truth = self
            .evaluate(slots, lookup)
            .map_err(|Failure(error)| *error)?;
        let part = |part: &'a Node| part.trace(row, slots, lookup);
        let (mut parts, mut inner) = (Vec::new(), None);
        match self {
            Node::And(all) | Node::Or(all) => {
                parts = all.iter().map(part).collect::<Result<_, _>>()?;
            }
            Node::Not(one) | Node::Is(one, _) => parts.push(part(one)?),
            Node::Subquery(subquery) => inner = Some(inside(subquery, row, lookup)?),
            Node::Fixed(_)
            | Node::Flag(_)
            | Node::Compare(..)
            | Node::Among { .. }
            | Node::Quantified { .. }
            | Node::Like(..)
            | Node::IsNull(_)
            | Node::Same(..) => {}
        }
        Ok(Trace {
            truth,
            parts,
            inner,
        })
    }
}

fn inside(subquery: &Inner, outer: &[u8], lookup: &dyn Lookup) -> Result<Inside, Error> {
    let mut inside = Inside::default();
    subquery.of.inner_rows(outer, lookup, &mut |row| {
        if inside.count == INNER_COUNTED_MAX {
            return Ok(false);
        }
        inside.count += 1;
        let met = match &subquery.condition {
            Some(condition) => condition.is_true(row, lookup)?,
            None => true,
        };
        inside.met += usize::from(met);
        if inside.rows.len() < INNER_SHOWN_MAX {
            let condition = subquery.condition.as_ref();
            let trace = condition.map(|condition| condition.trace(row, lookup));
            inside.rows.push((row.to_vec(), trace.transpose()?));
        }
        Ok(true)
    })?;
    Ok(inside)
}

struct Builder<'a> {
    columns: &'a [usize],
    table: &'a Table,
    arguments: &'a [Argument],
}

impl Builder<'_> {
    fn node(&self, condition: &Condition) -> Result<Node, Unfit> {
        Ok(match condition {
            Condition::Fixed(truth) => Node::Fixed(*truth),
            Condition::Flag(operand) => Node::Flag(self.source(operand, &Domain::Bool)?),
            Condition::Compare {
                comparison,
                left,
                right,
                domain,
            } => Node::Compare(
                *comparison,
                self.source(left, domain)?,
                self.source(right, domain)?,
            ),
            Condition::Quantified {
                comparison,
                all,
                left,
                list,
                domain,
            } => self.quantified(*comparison, *all, self.source(left, domain)?, list, domain)?,
            Condition::Like {
                left,
                pattern,
                escape,
            } => self.like(left, pattern, *escape)?,
            Condition::IsNull(operand) | Condition::IsNothing(operand) => match operand {
                Operand::Column(index) => Node::IsNull(self.slot(*index)),
                Operand::Null(_) => Node::Fixed(Some(true)),
                _ => Node::Fixed(Some(false)),
            },
            Condition::Same {
                left,
                right,
                domain,
            } => Node::Same(self.source(left, domain)?, self.source(right, domain)?),
            Condition::Subquery(subquery) => Node::Subquery(Box::new(self.inner(subquery)?)),
            Condition::Is(inner, truth) => Node::Is(Box::new(self.node(inner)?), *truth),
            Condition::And(parts) => Node::And(self.nodes(parts)?),
            Condition::Or(parts) => Node::Or(self.nodes(parts)?),
            Condition::Not(inner) => Node::Not(Box::new(self.node(inner)?)),
        })
    }

    fn nodes(&self, parts: &[Condition]) -> Result<Box<[Node]>, Unfit> {
        parts.iter().map(|part| self.node(part)).collect()
    }

    fn inner(&self, subquery: &Arc<Subquery>) -> Result<Inner, Unfit> {
        let key = (subquery.outer_parts().iter())
            .map(|part| (self.slot(part.column), part.reading.clone()));
        let mut fixed = Vec::new();
        for pair in subquery.test.pairs() {
            let value = match &pair.left {
                Operand::Column(_) => continue,
                _ if pair.is_given() => continue,
                Operand::Null(_) => None,
                left => Some(self.comparable(left, &pair.domain)?),
            };
            let column = &subquery.table.columns[pair.column];
            fixed.push(Fixed {
                column: pair.column,
                reading: Reading::new(&column.kind, &pair.domain),
                value,
            });
        }
        let given = (subquery.given.iter()).map(|(left, domain)| self.comparable(left, domain));
        let mut wanted = Vec::new();
        for (left, domain) in &subquery.wanted {
            let value = self.comparable(left, domain)?;
            lookup::push(&mut wanted, Some(value.value()));
        }
        let condition = subquery.condition.as_ref();
        let condition =
            condition.map(|condition| Program::new(condition, &subquery.table, self.arguments));
        Ok(Inner {
            of: Arc::clone(subquery),
            identity: deparse::identity(subquery, self.table, self.arguments),
            key: key.collect(),
            given: given.collect::<Result<_, _>>()?,
            wanted,
            fixed,
            condition: condition.transpose()?,
        })
    }

    fn slot(&self, column: usize) -> usize {
        self.columns
            .binary_search(&column)
            .expect("the columns of the condition were collected from it")
    }

    fn source(&self, operand: &Operand, domain: &Domain) -> Result<Source, Unfit> {
        Ok(match operand {
            Operand::Column(index) => Source::Slot(
                self.slot(*index),
                Reading::new(&self.table.columns[*index].kind, domain),
            ),
            Operand::Null(_) => Source::Null,
            operand => Source::Constant(self.comparable(operand, domain)?),
        })
    }

    /// The constant that a constant or a parameter is.
    fn constant<'b>(&'b self, operand: &'b Operand) -> Option<(&'b Constant, Option<usize>)> {
        match operand {
            Operand::Constant(constant) => Some((constant, None)),
            Operand::Param(index) => match self.arguments.get(*index)? {
                Argument::One(constant) => Some((constant, Some(*index))),
                Argument::Many(_) => None,
            },
            _ => None,
        }
    }

    fn comparable(&self, operand: &Operand, domain: &Domain) -> Result<Comparable, Unfit> {
        let (constant, param) = self.constant(operand).ok_or_else(not_bound)?;
        Comparable::new(constant, domain).map_err(|reason| Unfit { param, reason })
    }

    fn quantified(
        &self,
        comparison: Comparison,
        all: bool,
        left: Source,
        list: &List,
        domain: &Domain,
    ) -> Result<Node, Unfit> {
        let elements: Vec<Option<Comparable>> = match list {
            List::Of(operands, _) => operands
                .iter()
                .map(|operand| match operand {
                    Operand::Null(_) => Ok(None),
                    operand => self.comparable(operand, domain).map(Some),
                })
                .collect::<Result<_, _>>()?,
            List::Param(index) => {
                let Some(Argument::Many(constants)) = self.arguments.get(*index) else {
                    return Err(not_bound());
                };
                let param = Some(*index);
                constants
                    .iter()
                    .map(|constant| Comparable::new(constant, domain).map(Some))
                    .collect::<Result<_, _>>()
                    .map_err(|reason| Unfit { param, reason })?
            }
        };
        let expected = if all {
            Comparison::NotEqual
        } else {
            Comparison::Equal
        };
        if comparison != expected {
            return Ok(Node::Quantified {
                comparison,
                all,
                left,
                elements,
            });
        }
        let null = elements.iter().any(Option::is_none);
        let mut elements: Vec<Comparable> = elements.into_iter().flatten().collect();
        // Of one domain, they compare.
        let order = |a: &Comparable, b: &Comparable| {
            a.value().compare(b.value()).unwrap_or(Ordering::Equal)
        };
        elements.sort_unstable_by(order);
        elements.dedup_by(|a, b| order(a, b) == Ordering::Equal);
        Ok(Node::Among {
            all,
            left,
            elements,
            null,
        })
    }

    fn like(&self, left: &Operand, pattern: &Operand, escape: Option<char>) -> Result<Node, Unfit> {
        let left = match left {
            Operand::Column(index) => Text::Slot(self.slot(*index)),
            Operand::Null(_) => Text::Null,
            operand => Text::Constant(self.constant(operand).ok_or_else(not_bound)?.0.text.clone()),
        };
        let pattern = match pattern {
            Operand::Null(_) => None,
            operand => {
                let (constant, param) = self.constant(operand).ok_or_else(not_bound)?;
                let unfit = |reason: &str| Unfit {
                    param,
                    reason: reason.to_owned(),
                };
                Some(Pattern::new(&constant.text, escape).map_err(unfit)?)
            }
        };
        Ok(Node::Like(left, pattern))
    }
}

fn not_bound() -> Unfit {
    Unfit {
        param: None,
        reason: "a parameter is not bound".to_owned(),
    }
}

/// Adds the places of the columns that `condition` names.
fn collect_columns(condition: &Condition, columns: &mut Vec<usize>) {
    let mut add = |operand: &Operand| {
        if let Operand::Column(index) = operand {
            columns.push(*index);
        }
    };
    match condition {
        Condition::Fixed(_) => {}
        Condition::Flag(operand) | Condition::IsNull(operand) | Condition::IsNothing(operand) => {
            add(operand)
        }
        Condition::Compare { left, right, .. }
        | Condition::Same { left, right, .. }
        | Condition::Like {
            left,
            pattern: right,
            ..
        } => {
            add(left);
            add(right);
        }
        Condition::Quantified { left, .. } => add(left),
        Condition::Subquery(subquery) => {
            columns.extend(subquery.outer_parts().iter().map(|part| part.column));
        }
        Condition::Is(inner, _) | Condition::Not(inner) => collect_columns(inner, columns),
        Condition::And(parts) | Condition::Or(parts) => {
            parts.iter().for_each(|part| collect_columns(part, columns));
        }
    }
}

impl Source {
    fn value<'a>(&'a self, slots: &[ValueRef<'a>]) -> Result<Option<Value<'a>>, Malformed> {
        match self {
            Source::Slot(slot, reading) => reading.read(slots[*slot]),
            Source::Constant(constant) => Ok(Some(constant.value())),
            Source::Null => Ok(None),
        }
    }
}

impl Node {
    fn evaluate<'a>(
        &'a self,
        slots: &[ValueRef<'a>],
        lookup: &dyn Lookup,
    ) -> Result<Option<bool>, Failure> {
        Ok(match self {
            Node::Fixed(truth) => *truth,
            Node::Flag(source) => match source.value(slots)? {
                None => None,
                Some(Value::Integer(value)) => Some(value != 0),
                Some(_) => return Err(Malformed("a boolean is no integer").into()),
            },
            Node::Compare(comparison, left, right) => {
                match (left.value(slots)?, right.value(slots)?) {
                    (Some(left), Some(right)) => Some(holds(*comparison, left, right)?),
                    _ => None,
                }
            }
            Node::Among {
                all,
                left,
                elements,
                null,
            } => {
                let value = left.value(slots)?;
                match value {
                    _ if elements.is_empty() && !null => Some(*all),
                    None => None,
                    Some(value) if is_among(value, elements)? => Some(!all),
                    Some(_) if *null => None,
                    Some(_) => Some(*all),
                }
            }
            Node::Quantified {
                comparison,
                all,
                left,
                elements,
            } => {
                let left = left.value(slots)?;
                let mut result = Some(*all);
                for element in elements {
                    match (left, element) {
                        (Some(left), Some(element)) => {
                            if holds(*comparison, left, element.value())? != *all {
                                return Ok(Some(!all));
                            }
                        }
                        _ => result = None,
                    }
                }
                result
            }
            Node::Like(text, pattern) => {
                let text = match text {
                    Text::Null => None,
                    Text::Constant(text) => Some(text.as_str()),
                    Text::Slot(slot) => match slots[*slot] {
                        ValueRef::Null => None,
                        ValueRef::Text(text) => Some(text),
                        _ => return Err(Malformed("a text is none").into()),
                    },
                };
                match (text, pattern) {
                    (Some(text), Some(pattern)) => Some(pattern.matches(text)),
                    _ => None,
                }
            }
            Node::IsNull(slot) => Some(matches!(slots[*slot], ValueRef::Null)),
            Node::Same(left, right) => Some(match (left.value(slots)?, right.value(slots)?) {
                (Some(left), Some(right)) => left.compare(right)?.is_eq(),
                (left, right) => left.is_none() && right.is_none(),
            }),
            Node::Subquery(inner) => inner.evaluate(slots, lookup)?,
            Node::Is(inner, truth) => {
                let wanted = match truth {
                    Truth::True => Some(true),
                    Truth::False => Some(false),
                    Truth::Unknown => None,
                };
                Some(inner.evaluate(slots, lookup)? == wanted)
            }
            Node::And(parts) => decide(parts, slots, lookup, false)?,
            Node::Or(parts) => decide(parts, slots, lookup, true)?,
            Node::Not(inner) => inner.evaluate(slots, lookup)?.map(|truth| !truth),
        })
    }
}

/// AND is decided by the first that is false, OR by the first that is true; else an unknown one makes it unknown.
fn decide<'a>(
    parts: &'a [Node],
    slots: &[ValueRef<'a>],
    lookup: &dyn Lookup,
    decisive: bool,
) -> Result<Option<bool>, Failure> {
    let mut result = Some(!decisive);
    for part in parts {
        match part.evaluate(slots, lookup)? {
            Some(truth) if truth == decisive => return Ok(Some(decisive)),
            Some(_) => {}
            None => result = None,
        }
    }
    Ok(result)
}

fn holds(comparison: Comparison, left: Value<'_>, right: Value<'_>) -> Result<bool, Malformed> {
    // Equality of bytes needs no order: unlike lengths are enough.
    if let (Comparison::Equal, Value::Bytes(left), Value::Bytes(right)) = (comparison, left, right)
    {
        return Ok(left == right);
    }
    let order = left.compare(right)?;
    Ok(match comparison {
        Comparison::Equal => order.is_eq(),
        Comparison::NotEqual => order.is_ne(),
        Comparison::Less => order.is_lt(),
        Comparison::LessOrEqual => order.is_le(),
        Comparison::Greater => order.is_gt(),
        Comparison::GreaterOrEqual => order.is_ge(),
    })
}

fn is_among(value: Value<'_>, elements: &[Comparable]) -> Result<bool, Malformed> {
    if elements.len() <= LINEAR_LIST_MAX {
        for element in elements {
            if holds(Comparison::Equal, value, element.value())? {
                return Ok(true);
            }
        }
        return Ok(false);
    }
    let (mut low, mut high) = (0, elements.len());
    while low < high {
        let middle = low.midpoint(high);
        match value.compare(elements[middle].value())? {
            Ordering::Equal => return Ok(true),
            Ordering::Less => high = middle,
            Ordering::Greater => low = middle + 1,
        }
    }
    Ok(false)
}
