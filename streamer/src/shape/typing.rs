//! An expression as written becomes a typed [`Condition`]: each operand gets the type that Postgres gives it.
//!
//! The rules are those of Postgres (<https://www.postgresql.org/docs/15/typeconv.html>): a constant in quotes, NULL
//! and a parameter have the type of the other side; the elements of an IN list have a common type if there are
//! several; numbers are promoted. What Postgres refuses is refused, and also what it would decide by the session's
//! settings, or what could fail for some rows (a numeric that is no float8).

use super::{
    condition::{Condition, List, Operand},
    datatype::{DataType, Domain},
    literal::{self, ARRAY_ELEMENTS_MAX},
    pattern::Pattern,
    syntax::{Comparison, Expression, Fault, Node, Place, Truth},
    term::{Scope, Term, Untyped, common_type},
    value::Comparable,
};
use crate::table::{Collation, Column, Kind};

impl Scope<'_> {
    /// The typed condition.
    pub fn condition(&mut self, expression: &Expression) -> Result<Condition, Fault> {
        let place = expression.place;
        Ok(match &expression.node {
            Node::And(parts) => Condition::And(self.conditions(parts)?),
            Node::Or(parts) => Condition::Or(self.conditions(parts)?),
            Node::Not(inner) => Condition::Not(Box::new(self.condition_as(inner, true)?)),
            Node::Compare(comparison, left, right) => {
                let (left, right) = (self.term(left)?, self.term(right)?);
                self.compare(*comparison, left, right, place)?
            }
            Node::Quantified {
                comparison,
                all,
                left,
                array,
            } => self.quantified(*comparison, *all, left, array)?,
            Node::In {
                negated,
                left,
                list,
            } => self.in_list(*negated, left, list, place)?,
            Node::Between {
                negated,
                symmetric,
                left,
                low,
                high,
            } => {
                let left = self.term(left)?;
                let (low, high) = (self.term(low)?, self.term(high)?);
                let mut parts = vec![self.between(&left, &low, &high, place)?];
                if *symmetric {
                    parts.push(self.between(&left, &high, &low, place)?);
                }
                let one = if parts.len() == 1 {
                    parts.remove(0)
                } else {
                    Condition::Or(parts)
                };
                one.negated_if(*negated)
            }
            Node::Like {
                negated,
                left,
                pattern,
                escape,
            } => self
                .like(left, pattern, escape.as_deref())?
                .negated_if(*negated),
            Node::IsNull { negated, left } => self.is_null(left)?.negated_if(*negated),
            Node::IsTruth {
                negated,
                truth,
                left,
            } => {
                let exact = *truth != Truth::True;
                let inner = Box::new(self.condition_as(left, exact)?);
                Condition::Is(inner, *truth).negated_if(*negated)
            }
            Node::InSelect {
                negated,
                left,
                select,
            } => {
                let exact = self.exact || *negated;
                let before = std::mem::replace(&mut self.exact, exact);
                let subquery = self.in_select(left, select, place);
                self.exact = before;
                subquery?.negated_if(*negated)
            }
            Node::Exists(select) => self.exists(select)?,
            Node::Distinct {
                negated,
                left,
                right,
            } => self.same(left, right, place)?.negated_if(!negated),
            _ => self.flag(expression)?,
        })
    }

    /// The condition, where it does, or does not, matter whether it is false or unknown.
    fn condition_as(&mut self, expression: &Expression, exact: bool) -> Result<Condition, Fault> {
        let before = std::mem::replace(&mut self.exact, exact);
        let condition = self.condition(expression);
        self.exact = before;
        condition
    }

    fn conditions(&mut self, parts: &[Expression]) -> Result<Vec<Condition>, Fault> {
        parts.iter().map(|part| self.condition(part)).collect()
    }

    /// A boolean column, constant or parameter.
    fn flag(&mut self, expression: &Expression) -> Result<Condition, Fault> {
        let term = self.term(expression)?;
        let operand = match term.data_type() {
            None | Some(DataType::Bool) => self.operand(term, &DataType::Bool)?,
            Some(other) => {
                let other = other.sql().to_owned();
                return Err(expression
                    .place
                    .fault(format!("a condition is needed, and this is {other}")));
            }
        };
        Ok(match operand {
            Operand::Null(_) => Condition::Fixed(None),
            Operand::Constant(constant) => Condition::Fixed(Some(constant.text == "true")),
            operand => Condition::Flag(operand),
        })
    }

    fn compare(
        &mut self,
        comparison: Comparison,
        left: Term,
        right: Term,
        place: Place,
    ) -> Result<Condition, Fault> {
        let (left, right, domain) = self.pair(left, right, comparison.needs_order(), place)?;
        Ok(Condition::Compare {
            comparison,
            left,
            right,
            domain,
        })
    }

    /// Two sides of a comparison, and how they compare.
    fn pair(
        &mut self,
        left: Term,
        right: Term,
        ordered: bool,
        place: Place,
    ) -> Result<(Operand, Operand, Domain), Fault> {
        let (left_is_oid, right_is_oid) = (left.is_oid(), right.is_oid());
        let left = left.beside(right_is_oid, place)?;
        let right = right.beside(left_is_oid, place)?;
        let left_type = left
            .data_type()
            .or(right.data_type())
            .cloned()
            .unwrap_or(DataType::Text);
        let right_type = right
            .data_type()
            .cloned()
            .unwrap_or_else(|| left_type.clone());
        let domain = self.domain((&left, &left_type), (&right, &right_type), ordered, place)?;
        let left = self.operand(left, &left_type)?;
        let right = self.operand(right, &right_type)?;
        check_constant(&left, &domain, place)?;
        check_constant(&right, &domain, place)?;
        Ok((left, right, domain))
    }

    fn domain(
        &self,
        (left, left_type): (&Term, &DataType),
        (right, right_type): (&Term, &DataType),
        ordered: bool,
        place: Place,
    ) -> Result<Domain, Fault> {
        let columns: Vec<&Column> = [left, right]
            .into_iter()
            .filter_map(|term| match term {
                Term::Column(index, _) => Some(&self.names.table.columns[*index]),
                _ => None,
            })
            .collect();
        domain_of(left_type, right_type, &columns, ordered, place)
    }

    fn between(
        &mut self,
        left: &Term,
        low: &Term,
        high: &Term,
        place: Place,
    ) -> Result<Condition, Fault> {
        Ok(Condition::And(vec![
            self.compare(Comparison::GreaterOrEqual, left.clone(), low.clone(), place)?,
            self.compare(Comparison::LessOrEqual, left.clone(), high.clone(), place)?,
        ]))
    }

    /// As Postgres does: several elements that are no columns get a common type with the left side; else, and for
    /// columns, each is compared by itself. (That is why `float4 = 0.1` and `float4 IN (0.1)` are false where
    /// `float4 IN (0.1, 0.1)` is true.)
    fn in_list(
        &mut self,
        negated: bool,
        left: &Expression,
        list: &[Expression],
        place: Place,
    ) -> Result<Condition, Fault> {
        let comparison = if negated {
            Comparison::NotEqual
        } else {
            Comparison::Equal
        };
        let left = self.term(left)?;
        let (mut columns, mut others) = (Vec::new(), Vec::new());
        for element in list {
            match self.term(element)? {
                column @ Term::Column(..) => columns.push(column),
                other => others.push(other),
            }
        }
        let mut parts = Vec::new();
        if others.len() > 1
            && let Some(common) = common_type(std::iter::once(&left).chain(&others))
        {
            let elements = std::mem::take(&mut others);
            parts.push(self.quantified_over(
                comparison,
                negated,
                left.clone(),
                elements,
                common,
                place,
            )?);
        }
        for element in others.into_iter().chain(columns) {
            parts.push(self.compare(comparison, left.clone(), element, place)?);
        }
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ if negated => Condition::And(parts),
            _ => Condition::Or(parts),
        })
    }

    fn quantified(
        &mut self,
        comparison: Comparison,
        all: bool,
        left: &Expression,
        array: &Expression,
    ) -> Result<Condition, Fault> {
        let left = self.term(left)?;
        let place = array.place;
        let (array, element_type) = match &array.node {
            Node::Cast(inner, name) if name.array => {
                if name.length.is_some() {
                    return Err(place.fault("only strings can be cast to a type with a length"));
                }
                (&**inner, Some(self.named_type(name, place)?))
            }
            _ => (array, None),
        };
        let untyped = || {
            element_type
                .clone()
                .or_else(|| left.data_type().cloned())
                .unwrap_or(DataType::Text)
        };
        let (elements, element_type) = match &array.node {
            Node::Param(name) => {
                let element_type = untyped();
                let index = self.params.use_as(name, place, &element_type, true)?;
                let stand_in = Term::Param(index, element_type.clone());
                let (left, _, domain) =
                    self.pair(left, stand_in, comparison.needs_order(), place)?;
                return Ok(Condition::Quantified {
                    comparison,
                    all,
                    left,
                    list: List::Param(index),
                    domain,
                });
            }
            Node::Text(text) => {
                let elements = literal::elements(text).map_err(|reason| place.fault(reason))?;
                let term = |element| match element {
                    Some(text) => Term::Untyped(Untyped::Text(text, place)),
                    None => Term::Untyped(Untyped::Null),
                };
                (elements.into_iter().map(term).collect(), untyped())
            }
            Node::Array(elements) => {
                if elements.len() > ARRAY_ELEMENTS_MAX {
                    return Err(place.fault(format!(
                        "an array has more than {ARRAY_ELEMENTS_MAX} elements"
                    )));
                }
                let mut terms = Vec::new();
                for element in elements {
                    match self.term(element)? {
                        Term::Column(..) => {
                            return Err(element
                                .place
                                .fault("columns can't be elements of an array"));
                        }
                        term => terms.push(term),
                    }
                }
                if terms.is_empty() && element_type.is_none() {
                    return Err(
                        place.fault("the type of an empty array is unknown: write ARRAY[]::type[]")
                    );
                }
                let common = match element_type {
                    Some(element_type) => element_type,
                    None => common_type(terms.iter()).ok_or_else(|| {
                        place.fault("the elements of the array have no common type")
                    })?,
                };
                (terms, common)
            }
            Node::Column(_) => {
                return Err(place.fault("comparisons with array columns are not supported"));
            }
            _ => return Err(place.fault("ANY (…) and ALL (…) take a parameter, ARRAY[…] or '{…}'")),
        };
        self.quantified_over(comparison, all, left, elements, element_type, place)
    }

    fn quantified_over(
        &mut self,
        comparison: Comparison,
        all: bool,
        left: Term,
        elements: Vec<Term>,
        element_type: DataType,
        place: Place,
    ) -> Result<Condition, Fault> {
        let left_type = left
            .data_type()
            .cloned()
            .unwrap_or_else(|| element_type.clone());
        let stand_in = Term::Null(element_type.clone());
        let ordered = comparison.needs_order();
        let domain = self.domain(
            (&left, &left_type),
            (&stand_in, &element_type),
            ordered,
            place,
        )?;
        let left = self.operand(left, &left_type)?;
        check_constant(&left, &domain, place)?;
        let mut list = Vec::with_capacity(elements.len());
        for element in elements {
            let operand = match self.operand(element, &element_type)? {
                Operand::Constant(constant) => {
                    let constant = literal::cast(constant, &element_type)
                        .map_err(|reason| place.fault(reason))?;
                    Operand::Constant(constant)
                }
                Operand::Null(_) => Operand::Null(Some(element_type.clone())),
                Operand::Param(index) if self.params.0[index].is_other_than(&element_type) => {
                    return Err(place.fault(format!(
                        "the elements here are {}: cast the parameter to that",
                        element_type.sql()
                    )));
                }
                operand => operand,
            };
            check_constant(&operand, &domain, place)?;
            list.push(operand);
        }
        Ok(Condition::Quantified {
            comparison,
            all,
            left,
            list: List::Of(list, element_type),
            domain,
        })
    }

    fn like(
        &mut self,
        left: &Expression,
        pattern: &Expression,
        escape: Option<&str>,
    ) -> Result<Condition, Fault> {
        let place = pattern.place;
        let left_term = self.term(left)?;
        let pattern = self.term(pattern)?;
        let mut chars = escape.unwrap_or("\\").chars();
        let escape = chars.next();
        if chars.next().is_some() {
            return Err(place.fault("ESCAPE takes one character, or none"));
        }
        match left_term.data_type() {
            None | Some(DataType::Text | DataType::Name) => {}
            Some(DataType::Char) => {
                return Err(left
                    .place
                    .fault("LIKE on char(n) is not supported: its trailing blanks would count"));
            }
            Some(other) => {
                return Err(left
                    .place
                    .fault(format!("LIKE does not work on {}", other.sql())));
            }
        }
        if let Term::Column(index, _) = left_term {
            check_collation(&[&self.names.table.columns[index]], false, left.place)?;
        }
        match &pattern {
            Term::Column(..) => {
                return Err(place.fault(
                    "a column can't be a pattern: for some row it could be an invalid one",
                ));
            }
            term if matches!(term.data_type(), None | Some(DataType::Text)) => {}
            _ => return Err(place.fault("a pattern is a text")),
        }
        let left = self.operand(left_term, &DataType::Text)?;
        let pattern = self.operand(pattern, &DataType::Text)?;
        if let Operand::Constant(constant) = &pattern {
            Pattern::new(&constant.text, escape).map_err(|reason| place.fault(reason))?;
        }
        Ok(Condition::Like {
            left,
            pattern,
            escape,
        })
    }

    fn is_null(&mut self, left: &Expression) -> Result<Condition, Fault> {
        if let Node::Column(name) = &left.node {
            let index = self.names.own(name)?;
            let column = &self.names.table.columns[index];
            if may_be_composite(column) {
                return Err(left.place.fault(format!(
                    "IS NULL of a composite looks at its fields, and \"{}\" may be one: write IS NOT DISTINCT FROM NULL",
                    column.name
                )));
            }
            return Ok(Condition::IsNull(Operand::Column(index)));
        }
        if !left.node.is_operand() {
            return Ok(Condition::Is(
                Box::new(self.condition_as(left, true)?),
                Truth::Unknown,
            ));
        }
        match self.term(left)? {
            Term::Untyped(Untyped::Param(name, place)) => Err(place.fault(format!(
                "the type of ${name} is unknown here: a parameter is never NULL, leave it out"
            ))),
            Term::Untyped(Untyped::Null) | Term::Null(_) => Ok(Condition::Fixed(Some(true))),
            _ => Ok(Condition::Fixed(Some(false))),
        }
    }

    /// `left IS NOT DISTINCT FROM right`
    fn same(
        &mut self,
        left: &Expression,
        right: &Expression,
        place: Place,
    ) -> Result<Condition, Fault> {
        for (one, other) in [(left, right), (right, left)] {
            if matches!(one.node, Node::Null)
                && let Node::Column(name) = &other.node
            {
                return Ok(Condition::IsNothing(Operand::Column(self.names.own(name)?)));
            }
        }
        let (left, right) = (self.term(left)?, self.term(right)?);
        let (left, right, domain) = self.pair(left, right, false, place)?;
        Ok(Condition::Same {
            left,
            right,
            domain,
        })
    }
}

/// How two sides of these types compare, of which `columns` are columns.
pub(super) fn domain_of(
    left_type: &DataType,
    right_type: &DataType,
    columns: &[&Column],
    ordered: bool,
    place: Place,
) -> Result<Domain, Fault> {
    let domain = left_type
        .domain(right_type, ordered)
        .map_err(|reason| place.fault(reason))?;
    if domain == Domain::Float && columns.iter().any(|column| column.kind == Kind::Numeric) {
        return Err(place.fault(
            "a numeric column is not compared with a float: Postgres would fail for a row whose number is no float8",
        ));
    }
    let has_collation = matches!(left_type, DataType::Text | DataType::Name | DataType::Char);
    if has_collation {
        check_collation(columns, ordered, place)?;
    }
    Ok(domain)
}

fn check_collation(columns: &[&Column], ordered: bool, place: Place) -> Result<(), Fault> {
    for column in columns {
        if column.collation == Collation::NonDeterministic {
            return Err(place.fault(format!(
                "column \"{}\" has a non-deterministic collation, which can't be compared exactly",
                column.name
            )));
        }
        if ordered && column.collation != Collation::Bytes {
            return Err(place.fault(format!(
                "the order of column \"{}\" is its collation's, which can't be followed exactly: only =, <>, IN \
                 and LIKE work, or a column with COLLATE \"C\"",
                column.name
            )));
        }
    }
    if let [left, right] = columns
        && left.collation != right.collation
    {
        return Err(place.fault(format!(
            "columns \"{}\" and \"{}\" have two collations, between which Postgres may not choose",
            left.name, right.name
        )));
    }
    if ordered && columns.is_empty() {
        return Err(
            place.fault("the order of these texts is the database's collation's; name a column")
        );
    }
    Ok(())
}

/// What could not be compared is refused now, not when a row comes.
pub(super) fn check_constant(
    operand: &Operand,
    domain: &Domain,
    place: Place,
) -> Result<(), Fault> {
    match operand {
        Operand::Constant(constant) => {
            Comparable::new(constant, domain).map_err(|reason| place.fault(reason))?;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// OIDs from here on were not given by hand: row types of catalogs, and what users made.
const FIRST_GENERATED_OID: u32 = 10_000;

/// Row types of catalogs that have an OID given by hand.
const CATALOG_ROW_TYPES: [u32; 9] = [71, 75, 81, 83, 1248, 2842, 2843, 4066, 6101];

fn may_be_composite(column: &Column) -> bool {
    column.kind == Kind::Other
        && (column.type_oid >= FIRST_GENERATED_OID || CATALOG_ROW_TYPES.contains(&column.type_oid))
}
