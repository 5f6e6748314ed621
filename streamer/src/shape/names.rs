//! What names mean: those of the SELECT that they stand in, and of the SELECTs around it.
//!
//! Postgres looks for a name without qualifier in the innermost SELECT first, in columns too that we do not know (generated
//! ones, those of the system), and then further out. What it would find can only be said of the innermost table's own
//! columns; so all others must be written with a qualifier, which means the innermost table of that name, as in Postgres.

use super::syntax::{Fault, Name, Statement};
use crate::table::{Column, Table};

/// The names of a SELECT.
#[derive(Clone, Copy)]
pub struct Names<'a> {
    /// Its table.
    pub table: &'a Table,
    statement: &'a Statement,
    around: Option<&'a Names<'a>>,
}

/// A column that a name means.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    /// How many SELECTs further out its table is.
    pub level: usize,
    /// Its place in the table.
    pub index: usize,
    /// The column.
    pub column: &'a Column,
}

impl<'a> Names<'a> {
    /// Of `statement`, which selects from `table`, within another.
    pub fn new(
        table: &'a Table,
        statement: &'a Statement,
        around: Option<&'a Names<'a>>,
    ) -> Names<'a> {
        Names {
            table,
            statement,
            around,
        }
    }

    /// The tables of this SELECT and of those around it.
    pub fn tables(&self) -> impl Iterator<Item = &'a Table> {
        self.levels().map(|names| names.table)
    }

    /// The column of this SELECT's own table that `name` names.
    pub fn own(&self, name: &[Name]) -> Result<usize, Fault> {
        let found = self.find(name)?;
        let place = name[0].place;
        let written: Vec<_> = name.iter().map(|part| part.text.as_str()).collect();
        let written = written.join(".");
        match found.level {
            0 => Ok(found.index),
            1 => Err(place.fault(format!(
                "{written} is a column of the SELECT around this one: it can stand here only in a condition \
                 `column = {written}` that AND joins to the rest of WHERE"
            ))),
            _ => Err(place.fault(format!(
                "{written} is a column of a SELECT further out: a subquery can use only columns of the SELECT \
                 immediately around it"
            ))),
        }
    }

    /// The column that `name` names, of this SELECT or one around it.
    pub fn find(&self, name: &[Name]) -> Result<Found<'a>, Fault> {
        let (column, qualifier) = name.split_last().expect("a name has a part");
        let (level, of) = match qualifier.first() {
            None => (0, *self),
            Some(first) => self
                .levels()
                .enumerate()
                .find(|(_, names)| names.is_called(qualifier))
                .ok_or_else(|| first.place.fault("the SELECT has no table of this name"))?,
        };
        if let Some(index) = of.place_of(&column.text) {
            let column = &of.table.columns[index];
            return Ok(Found {
                level,
                index,
                column,
            });
        }
        let is_elsewhere = qualifier.is_empty()
            && self
                .levels()
                .skip(1)
                .any(|names| names.place_of(&column.text).is_some());
        let hint = match is_elsewhere {
            true => {
                "; a column of the SELECT around this one must be written with its table's name"
            }
            false => "",
        };
        Err(column.place.fault(format!(
            "{} has no column \"{}\" that is replicated: it does not exist, or it is generated{hint}",
            of.table.full_name(),
            column.text
        )))
    }

    /// Whether `qualifier` (nothing, `table`, or `schema.table`) means this SELECT's own table.
    pub fn check_qualifier(&self, qualifier: &[Name]) -> Result<(), Fault> {
        match qualifier.first() {
            Some(first) if !self.is_called(qualifier) => {
                Err(first.place.fault("the SELECT has no table of this name"))
            }
            _ => Ok(()),
        }
    }

    fn levels(&self) -> impl Iterator<Item = Names<'a>> {
        std::iter::successors(Some(*self), |names| names.around.copied())
    }

    fn is_called(&self, qualifier: &[Name]) -> bool {
        let statement = self.statement;
        match (qualifier, &statement.alias) {
            ([table], Some(alias)) => table.text == *alias,
            ([table], None) => table.text == statement.table.text,
            ([schema, table], None) => {
                table.text == statement.table.text && schema.text == statement.schema
            }
            _ => false,
        }
    }

    fn place_of(&self, column: &str) -> Option<usize> {
        self.table
            .columns
            .iter()
            .position(|known| known.name == column)
    }
}
