//! Operands: what the names and constants of a condition are, before the other side gives them a type.

use super::{
    condition::Operand,
    datatype::DataType,
    literal::{self, Constant},
    params::Params,
    syntax::{Expression, Fault, Name, Node, Place, Statement, TypeName},
};
use crate::table::Table;

/// What names mean in a SELECT.
pub struct Scope<'a> {
    /// Its table.
    pub table: &'a Table,
    statement: &'a Statement,
    /// The parameters of the shape.
    pub params: &'a mut Params,
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

impl<'a> Scope<'a> {
    /// The scope of `statement`, which selects from `table`.
    pub fn new(table: &'a Table, statement: &'a Statement, params: &'a mut Params) -> Self {
        Scope {
            table,
            statement,
            params,
        }
    }

    /// The place in the table of the column that `name` names, qualified or not.
    pub fn column(&self, name: &[Name]) -> Result<usize, Fault> {
        let (column, qualifier) = name.split_last().expect("a name has a part");
        self.check_qualifier(qualifier)?;
        let found = self
            .table
            .columns
            .iter()
            .position(|known| known.name == column.text);
        found.ok_or_else(|| {
            column.place.fault(format!(
                "{} has no column \"{}\" that is replicated: it does not exist, or it is generated",
                self.table.full_name(),
                column.text
            ))
        })
    }

    /// Whether `qualifier` (nothing, `table`, or `schema.table`) means this table.
    pub fn check_qualifier(&self, qualifier: &[Name]) -> Result<(), Fault> {
        let statement = self.statement;
        let known = match (qualifier, &statement.alias) {
            ([], _) => true,
            ([table], Some(alias)) => table.text == *alias,
            ([table], None) => table.text == statement.table.text,
            ([schema, table], None) => {
                table.text == statement.table.text && schema.text == statement.schema
            }
            _ => false,
        };
        match qualifier.first() {
            Some(first) if !known => Err(first.place.fault("the SELECT has no table of this name")),
            _ => Ok(()),
        }
    }

    /// What `expression` is as an operand; conditions are none.
    pub fn term(&mut self, expression: &Expression) -> Result<Term, Fault> {
        let place = expression.place;
        let constant = |result: Result<Constant, String>| match result {
            Ok(constant) => Ok(Term::Constant(constant)),
            Err(reason) => Err(place.fault(reason)),
        };
        match &expression.node {
            Node::Column(name) => {
                let index = self.column(name)?;
                let column = &self.table.columns[index];
                match DataType::of(column) {
                    Some(data_type) => Ok(Term::Column(index, data_type)),
                    None => Err(place.fault(format!(
                        "column \"{}\" has type {}, which can't be compared exactly: only IS NULL works on it",
                        column.name, column.postgres_type
                    ))),
                }
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
            _ => Err(place
                .fault("only columns, constants and parameters can be compared, not conditions")),
        }
    }

    /// The type that `name` names.
    pub fn named_type(&self, name: &TypeName, place: Place) -> Result<DataType, Fault> {
        DataType::named(name, std::iter::once(self.table)).map_err(|reason| place.fault(reason))
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
