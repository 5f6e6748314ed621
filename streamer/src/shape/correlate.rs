//! Subqueries get their types: which conditions tie them to the SELECT around them, and what IN compares.
//!
//! An operator is chosen for what is left of IN and the column as for `=` between the two, as Postgres does; a constant
//! in quotes and a parameter have the type of the column.

use std::sync::Arc;

use super::{
    condition::Condition,
    datatype::{DataType, Domain},
    names::Names,
    subquery::{Correlation, IN_COLUMNS_MAX, Pair, Subquery, Test},
    syntax::{Columns, Comparison, Expression, Fault, Name, Node, Place, Statement},
    term::{Scope, Term},
    typing::{self, domain_of},
};
use crate::table::{Column, Table};

const FLOAT: &str = "floats are not compared across tables: equal ones have many forms (0 and -0), and no index finds them";

impl Scope<'_> {
    /// `EXISTS (select)`
    pub fn exists(&mut self, select: &Statement) -> Result<Condition, Fault> {
        let table = super::find_table(select, self.tables)?;
        let names = Names::new(&table, select, Some(&self.names));
        if let Columns::Ignored { named, all } = &select.columns {
            for name in named {
                names.own(name)?;
            }
            for qualifier in all {
                names.check_qualifier(qualifier)?;
            }
        }
        self.subquery(select, &table, Test::Exists)
    }

    /// `left IN (select)`
    pub fn in_select(
        &mut self,
        left: &[Expression],
        select: &Statement,
        place: Place,
    ) -> Result<Condition, Fault> {
        let table = super::find_table(select, self.tables)?;
        let columns = chosen(select, &Names::new(&table, select, Some(&self.names)))?;
        if left.len() > IN_COLUMNS_MAX {
            return Err(place.fault(format!("IN compares more than {IN_COLUMNS_MAX} columns")));
        }
        if left.len() != columns.len() {
            return Err(place.fault(format!(
                "the number of columns is {} in the subquery, and {} to the left of it",
                columns.len(),
                left.len()
            )));
        }
        let mut pairs = Vec::with_capacity(left.len());
        for (left, (index, place)) in left.iter().zip(columns) {
            pairs.push(self.pair_with(left, &table, index, place)?);
        }
        self.subquery(select, &table, Test::In(pairs))
    }

    fn pair_with(
        &mut self,
        left: &Expression,
        inner: &Table,
        index: usize,
        place: Place,
    ) -> Result<Pair, Fault> {
        let column = &inner.columns[index];
        let data_type = comparable(column, place)?;
        let left_place = left.place;
        let left = self
            .term(left)?
            .beside(data_type == DataType::Oid, left_place)?;
        let left_type = left.data_type().unwrap_or(&data_type).clone();
        let mut columns = vec![column];
        if let Term::Column(index, _) = &left {
            columns.insert(0, &self.names.table.columns[*index]);
        }
        let domain = domain_of(&left_type, &data_type, &columns, false, left_place)?;
        if domain == Domain::Float && columns.len() > 1 {
            return Err(left_place.fault(FLOAT));
        }
        let left = self.operand(left, &left_type)?;
        typing::check_constant(&left, &domain, left_place)?;
        Ok(Pair {
            left,
            column: index,
            domain,
        })
    }

    fn subquery(
        &mut self,
        select: &Statement,
        table: &Arc<Table>,
        test: Test,
    ) -> Result<Condition, Fault> {
        let around = self.names;
        let mut inner = Scope {
            names: Names::new(table, select, Some(&around)),
            params: self.params,
            tables: self.tables,
            exact: false,
        };
        let (mut correlations, mut rest) = (Vec::new(), Vec::new());
        let mut parts = Vec::new();
        if let Some(condition) = &select.condition {
            condition.conjuncts(&mut parts);
        }
        for part in parts {
            match inner.correlation(part)? {
                Some(correlation) => correlations.push(correlation),
                None => rest.push(inner.condition(part)?),
            }
        }
        let condition = match rest.len() {
            0 => None,
            1 => rest.pop(),
            _ => Some(Condition::And(rest)),
        };
        Ok(Condition::Subquery(Arc::new(Subquery::new(
            around.table,
            Arc::clone(table),
            correlations,
            test,
            condition,
            self.exact,
        ))))
    }

    /// `part`, if it is `column = column of the SELECT around this one`.
    fn correlation(&self, part: &Expression) -> Result<Option<Correlation>, Fault> {
        let Node::Compare(Comparison::Equal, left, right) = &part.node else {
            return Ok(None);
        };
        let (Node::Column(left), Node::Column(right)) = (&left.node, &right.node) else {
            return Ok(None);
        };
        let place = part.place;
        let [left, right] = [self.names.find(left)?, self.names.find(right)?];
        let (own, outer) = match (left.level, right.level) {
            (0, 1) => (left, right),
            (1, 0) => (right, left),
            _ => return Ok(None),
        };
        let domain = domain_of(
            &comparable(left.column, place)?,
            &comparable(right.column, place)?,
            &[left.column, right.column],
            false,
            place,
        )?;
        if domain == Domain::Float {
            return Err(place.fault(FLOAT));
        }
        Ok(Some(Correlation {
            inner: own.index,
            outer: outer.index,
            domain,
        }))
    }
}

/// The columns that the subquery of IN selects, and where each is named.
fn chosen(select: &Statement, names: &Names<'_>) -> Result<Vec<(usize, Place)>, Fault> {
    let Columns::Named(named) = &select.columns else {
        return Err(select.table.place.fault(
            "in the subquery of IN, name the columns: `*` has those too that are not replicated",
        ));
    };
    let column = |name: &Vec<Name>| Ok((names.own(name)?, name[0].place));
    named.iter().map(column).collect()
}

/// The type of a column that is compared.
pub(super) fn comparable(column: &Column, place: Place) -> Result<DataType, Fault> {
    DataType::of(column).ok_or_else(|| {
        place.fault(format!(
            "column \"{}\" has type {}, which can't be compared exactly: only IS NULL works on it",
            column.name, column.postgres_type
        ))
    })
}
