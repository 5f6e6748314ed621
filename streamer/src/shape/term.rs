//! Operands: what the names and constants of a condition are, before the other side gives them a type.

use std::sync::Arc;

use super::{
    condition::Operand,
    correlate::comparable,
    datatype::DataType,
    literal::{self, Constant},
    names::Names,
    params::Params,
    syntax::{Expression, Fault, Node, Place, TypeName},
};
use crate::table::Table;

/// What is known where a condition stands.
pub struct Scope<'a> {
    /// What names mean.
    pub names: Names<'a>,
    /// The parameters of the shape.
    pub params: &'a mut Params,
    /// The tables that there are.
    pub tables: &'a [Arc<Table>],
    /// Whether it matters if what stands here is false or unknown; else only whether it is true.
    pub exact: bool,
}

/// An operand before the other side gives it a type.
#[derive(Clone)]
pub enum Term {
    /// A column: its place in the table.
    Column(usize, DataType),
    /// A constant.
    Constant(Constant),
    /// NULL with a type.
    Null(DataType),
    /// A parameter whose type a cast says.
    Param(usize, DataType),
    /// Of no type yet.
    Untyped(Untyped),
}

/// An operand that has no type by itself.
#[derive(Clone)]
pub enum Untyped {
    /// A string.
    Text(String, Place),
    /// NULL.
    Null,
    /// A parameter.
    Param(String, Place),
}

impl Term {
    /// Its type, if it has one by itself.
    pub fn data_type(&self) -> Option<&DataType> {
        match self {
            Term::Column(_, data_type) | Term::Null(data_type) | Term::Param(_, data_type) => {
                Some(data_type)
            }
            Term::Constant(constant) => Some(&constant.data_type),
            Term::Untyped(_) => None,
        }
    }

    /// Whether it is an oid.
    pub fn is_oid(&self) -> bool {
        self.data_type() == Some(&DataType::Oid)
    }

    /// A plain integer beside an oid is one.
    pub fn beside(self, an_oid: bool, place: Place) -> Result<Term, Fault> {
        match self {
            Term::Constant(constant) if an_oid && constant.data_type.is_integer() => {
                let oid = literal::cast(constant, &DataType::Oid)
                    .map_err(|reason| place.fault(reason))?;
                Ok(Term::Constant(oid))
            }
            term => Ok(term),
        }
    }
}

impl Scope<'_> {
    /// What `expression` is as an operand; conditions are none.
    pub fn term(&mut self, expression: &Expression) -> Result<Term, Fault> {
        let place = expression.place;
        let constant = |result: Result<Constant, String>| match result {
            Ok(constant) => Ok(Term::Constant(constant)),
            Err(reason) => Err(place.fault(reason)),
        };
        match &expression.node {
            Node::Column(name) => {
                let index = self.names.own(name)?;
                let data_type = comparable(&self.names.table.columns[index], place)?;
                Ok(Term::Column(index, data_type))
            }
            Node::Text(text) => Ok(Term::Untyped(Untyped::Text(text.clone(), place))),
            Node::Null => Ok(Term::Untyped(Untyped::Null)),
            Node::Param(name) => Ok(Term::Untyped(Untyped::Param(name.clone(), place))),
            Node::Number(number) => constant(literal::number(number)),
            Node::Boolean(value) => constant(literal::read(&DataType::Bool, &value.to_string())),
            Node::Cast(inner, name) => self.cast(inner, name, place),
            Node::Negate(inner) => match self.term(inner)? {
                Term::Constant(Constant { data_type, text })
                    if data_type.is_negatable() && text != "NaN" =>
                {
                    let negated = match text.strip_prefix('-') {
                        Some(positive) => positive.to_owned(),
                        None => format!("-{text}"),
                    };
                    constant(literal::read(&data_type, &negated))
                }
                _ => Err(place.fault("arithmetic (`-`) is not supported")),
            },
            Node::Array(_) => Err(place.fault("an array can only stand in ANY (…) and ALL (…)")),
            Node::Row(_) => {
                Err(place.fault("rows can't be compared, but with a subquery; compare each column"))
            }
            _ => Err(place
                .fault("only columns, constants and parameters can be compared, not conditions")),
        }
    }

    /// The type that `name` names.
    pub fn named_type(&self, name: &TypeName, place: Place) -> Result<DataType, Fault> {
        DataType::named(name, self.names.tables()).map_err(|reason| place.fault(reason))
    }

    fn cast(&mut self, inner: &Expression, name: &TypeName, place: Place) -> Result<Term, Fault> {
        if name.array {
            return Err(place.fault("an array can only stand in ANY (…) and ALL (…)"));
        }
        let data_type = self.named_type(name, place)?;
        let fault = |reason: String| place.fault(reason);
        match (&inner.node, name.length) {
            (Node::Column(_), _) => Err(place.fault("casts of columns are not supported")),
            (Node::Text(text), Some(length)) => {
                // An explicit cast cuts what is too long.
                let cut: String = text.chars().take(length).collect();
                literal::read(&data_type, &cut)
                    .map(Term::Constant)
                    .map_err(fault)
            }
            (Node::Text(text), None) => literal::read(&data_type, text)
                .map(Term::Constant)
                .map_err(fault),
            (Node::Null, _) => Ok(Term::Null(data_type)),
            (_, Some(_)) => Err(place.fault("only strings can be cast to a type with a length")),
            (Node::Param(name), None) => {
                let index = self.params.use_as(name, inner.place, &data_type, false)?;
                Ok(Term::Param(index, data_type))
            }
            _ => match self.term(inner)? {
                Term::Constant(constant) => literal::cast(constant, &data_type)
                    .map(Term::Constant)
                    .map_err(fault),
                Term::Null(_) => Ok(Term::Null(data_type)),
                _ => Err(place.fault("only constants and parameters can be cast")),
            },
        }
    }

    /// `term` as an operand of `data_type`, which it gets if it has none yet.
    pub fn operand(&mut self, term: Term, data_type: &DataType) -> Result<Operand, Fault> {
        Ok(match term {
            Term::Column(index, _) => Operand::Column(index),
            Term::Constant(constant) => Operand::Constant(constant),
            Term::Null(data_type) => Operand::Null(Some(data_type)),
            Term::Param(index, _) => Operand::Param(index),
            Term::Untyped(Untyped::Null) => Operand::Null(Some(data_type.clone())),
            Term::Untyped(Untyped::Param(name, place)) => {
                Operand::Param(self.params.use_as(&name, place, data_type, false)?)
            }
            Term::Untyped(Untyped::Text(text, place)) => Operand::Constant(
                literal::read(data_type, &text).map_err(|reason| place.fault(reason))?,
            ),
        })
    }
}

/// The type that a list of these has: of those that have one.
pub fn common_type<'a>(mut terms: impl Iterator<Item = &'a Term>) -> Option<DataType> {
    let common = terms.try_fold(None, |common: Option<DataType>, term| {
        match (common, term.data_type()) {
            (common, None) => Some(common),
            (None, Some(data_type)) => Some(Some(data_type.clone())),
            (Some(common), Some(data_type)) => common.common(data_type.clone()).map(Some),
        }
    })?;
    Some(common.unwrap_or(DataType::Text))
}
