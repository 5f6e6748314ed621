//! Shapes: named, parameterised sets of SELECTs, compiled once at start-up.
//!
//! ```text
//! SQL ──parse──▶ Statement ──typing──▶ Condition ──bind──▶ Program ──▶ is the row in it?
//!    lex, cursor,          names, term,           params,         value, numeric, moment,
//!    typename, syntax      literal, datatype,     select          pattern, inner
//!                          correlate, subquery    path    ──▶ who may have the row?
//!                                                 deparse ──▶ SQL for Postgres, fingerprint
//!                                                 explain ──▶ what each part of it says of a row
//! ```
//!
//! It is exact or it is refused: a condition means what Postgres means by it (three-valued logic, types, promotion,
//! collations), and what can't be evaluated exactly is refused when the config is read, with its place and the
//! reason. No I/O, no clock: the same rows give the same answer. Nothing can fail when rows come, besides a record that
//! is not of its table.
//!
//! **Subqueries.** `[NOT] IN (SELECT …)` and `[NOT] EXISTS (SELECT …)`, correlated by equality, are conditions whose answer
//! needs rows of other tables. [`Bound::contains`] takes a [`Lookup`](crate::lookup::Lookup) of them, which is one state of the
//! mirror: one condition is asked of the state before a transaction and of that after it, and `delta` gets two
//! answers. [`Select`] says how it goes backwards, from a changed row of an inner table to the rows and the replicas
//! that it may concern; that is always a superset, about which [`Bound::contains`] decides.

mod bind;
mod condition;
mod correlate;
mod cursor;
mod datatype;
mod deparse;
mod evaluate;
mod explain;
mod inner;
mod lex;
mod literal;
mod moment;
mod names;
mod numeric;
mod params;
mod parse;
mod path;
mod pattern;
mod select;
mod subquery;
mod syntax;
mod term;
#[cfg(test)]
mod tests;
mod typename;
mod typing;
mod value;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

pub use bind::PARAM_BYTES_MAX;
pub use cursor::{DEPTH_MAX, SUBQUERIES_MAX};
pub use explain::{Explanation, INNER_COUNTED_MAX, INNER_SHOWN_MAX, InnerRow, InnerRows};
pub use lex::SQL_BYTES_MAX;
pub use literal::ARRAY_ELEMENTS_MAX;
pub use moment::Zone;
pub use path::{Path, RouteKey, RouteRange};
pub use select::{Bound, Select, Step};
use serde::{Deserialize, Serialize};
pub use subquery::{IN_COLUMNS_MAX, Subquery};
pub use value::{Reading, Value};

use self::{
    condition::Condition,
    datatype::DataType,
    names::Names,
    params::{Param, Params},
    syntax::{Columns, Fault, Name, Place, Statement},
    term::Scope,
};
use crate::{lookup::Index, table::Table};

/// A shape as the config has it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its parameters, and where each comes from.
    pub params: BTreeMap<String, ParamSource>,
    /// One SELECT per table; tables that only subqueries name have none.
    pub tables: Vec<String>,
    /// Which of them the replica may write; those beyond its end it may not.
    pub writable: Vec<bool>,
}

/// Where the value of a parameter comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParamSource {
    /// This claim of the verified token.
    Claim(String),
    /// The replica chooses it; this is its type in Postgres.
    Client(String),
}

/// A shape can't be used as it is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shape {shape}, table {index}, {line}:{column}: {reason}")]
pub struct Refused {
    /// The shape.
    pub shape: String,
    /// Which of its SELECTs, from 0.
    pub index: usize,
    /// Line within the SQL, from 1.
    pub line: u64,
    /// Column within the SQL, from 1.
    pub column: u64,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// A subscription can't be bound to a principal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// The token lacks a claim: refused, never NULL.
    #[error("the token has no claim `{0}`, which shape `{1}` needs")]
    MissingClaim(String, String),
    /// A value that is not of the parameter's type, a parameter missing or unknown. Never shows the value.
    #[error("shape `{0}`, parameter `{1}`: {2}")]
    Parameter(String, String, String),
}

/// A compiled shape.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its name.
    pub name: String,
    /// Its SELECTs.
    pub selects: Vec<Arc<Select>>,
    params: Arc<[Param]>,
}

/// The tables (schema, name) that the SELECTs of `sources` name, also in subqueries; unqualified names are in `public`.
pub fn tables_named(sources: &[Source]) -> Result<Vec<(String, String)>, Vec<Refused>> {
    let mut tables = BTreeSet::new();
    let mut refused = Vec::new();
    for source in sources {
        for (index, sql) in source.tables.iter().enumerate() {
            let statement = match parse::statement(sql) {
                Ok(statement) => statement,
                Err(fault) => {
                    refused.push(source.refused(index, fault));
                    continue;
                }
            };
            for statement in statement.all() {
                if statement.schema == crate::receipts::SCHEMA {
                    let place = statement.table.place;
                    let reason = "the tables of schema anabranch are Anabranch's own: no shape can have them";
                    refused.push(source.refused(index, place.fault(reason.to_owned())));
                } else {
                    tables.insert((statement.schema.clone(), statement.table.text.clone()));
                }
            }
        }
    }
    if refused.is_empty() {
        Ok(tables.into_iter().collect())
    } else {
        Err(refused)
    }
}

/// Refuses subqueries that are nested deeper than `levels`.
pub fn check_depth(sources: &[Source], levels: usize) -> Result<(), Vec<Refused>> {
    let mut refused = Vec::new();
    for source in sources {
        for (index, sql) in source.tables.iter().enumerate() {
            let Ok(statement) = parse::statement(sql) else {
                continue;
            };
            if let Some(deep) = statement.deeper_than(levels) {
                let reason = format!(
                    "subqueries are nested deeper than {levels} levels, which is what `subquery_depth_max` allows: write \
                     the condition with fewer, or allow more (up to {SUBQUERIES_MAX})"
                );
                refused.push(source.refused(index, deep.table.place.fault(reason)));
            }
        }
    }
    match refused.is_empty() {
        true => Ok(()),
        false => Err(refused),
    }
}

/// The tables (schema, name) that replicas may write.
pub fn tables_writable(sources: &[Source]) -> BTreeSet<(String, String)> {
    let of_source = |source: &Source| -> Vec<_> {
        let both = source.tables.iter().zip(&source.writable);
        let writable = both.filter(|(_, writable)| **writable);
        writable.filter_map(|(sql, _)| table_named(sql)).collect()
    };
    sources.iter().flat_map(of_source).collect()
}

/// The table (schema, name) whose rows a SELECT has; `None` where it is none that can be read.
pub fn table_named(sql: &str) -> Option<(String, String)> {
    let statement = parse::statement(sql).ok()?;
    Some((statement.schema, statement.table.text))
}

/// Compiles all shapes against the tables that they name. Says all that is wrong, not only the first.
pub fn compile(sources: &[Source], tables: &[Arc<Table>]) -> Result<Vec<Shape>, Vec<Refused>> {
    compile_with(sources, tables, &[])
}

/// The same, where there are `indexes` already, which will do in the place of others.
pub fn compile_with(
    sources: &[Source],
    tables: &[Arc<Table>],
    indexes: &[Index],
) -> Result<Vec<Shape>, Vec<Refused>> {
    let mut compiled = Vec::new();
    let mut refused = Vec::new();
    for source in sources {
        match source.compile(tables) {
            Ok(drafts) => compiled.push((source, drafts)),
            Err(faults) => refused.extend(faults),
        }
    }
    if !refused.is_empty() {
        return Err(refused);
    }
    let drafts = compiled.iter_mut().flat_map(|(_, (drafts, _))| drafts);
    share_indexes(drafts, indexes);
    let mut next_id = 0;
    let shape = |(source, (drafts, params)): (&Source, Drafts)| {
        let selects = drafts.into_iter().map(|draft| {
            let id = next_id;
            next_id += 1;
            Arc::new(Select::new(
                id,
                draft.table,
                draft.columns,
                draft.condition,
                Arc::clone(&params),
                source.writable.get(draft.index) == Some(&true),
            ))
        });
        Shape {
            name: source.name.clone(),
            selects: selects.collect(),
            params: Arc::clone(&params),
        }
    };
    Ok(compiled.into_iter().map(shape).collect())
}

/// By the first parts of an index rows are found too: who needs an index that begins another one takes that.
fn share_indexes<'a>(drafts: impl Iterator<Item = &'a mut Draft>, made: &[Index]) {
    let mut conditions: Vec<&mut Condition> = drafts
        .filter_map(|draft| draft.condition.as_mut())
        .collect();
    let mut all = made.to_vec();
    for condition in &mut conditions {
        condition.change_subqueries(&mut |subquery| {
            all.extend([&subquery.inner, &subquery.outer].map(Clone::clone));
        });
    }
    // The longest first, of those the first that was needed.
    all.sort_by_key(|index| std::cmp::Reverse(index.parts.len()));
    for condition in &mut conditions {
        condition.change_subqueries(&mut |subquery| {
            for index in [&mut subquery.inner, &mut subquery.outer] {
                let begins = |longer: &&Index| {
                    longer.table == index.table && longer.parts.starts_with(&index.parts)
                };
                if let Some(longer) = all.iter().find(begins).filter(|_| !index.parts.is_empty()) {
                    *index = longer.clone();
                }
            }
        });
    }
}

/// Those of a shape, with its parameters.
type Drafts = (Vec<Draft>, Arc<[Param]>);

/// A SELECT whose names and types are known.
struct Draft {
    /// Its place in the shape.
    index: usize,
    table: Arc<Table>,
    columns: Vec<usize>,
    condition: Option<Condition>,
}

impl Source {
    fn refused(&self, index: usize, fault: Fault) -> Refused {
        Refused {
            shape: self.name.clone(),
            index,
            line: fault.place.line,
            column: fault.place.column,
            reason: fault.reason,
        }
    }

    fn compile(&self, tables: &[Arc<Table>]) -> Result<Drafts, Vec<Refused>> {
        let mut refused = Vec::new();
        let mut statements = Vec::new();
        for (index, sql) in self.tables.iter().enumerate() {
            let found = parse::statement(sql).and_then(|statement| {
                let table = find_table(&statement, tables)?;
                Ok((statement, table))
            });
            match found {
                Ok((_, table))
                    if statements
                        .iter()
                        .any(|(_, _, other): &(_, _, Arc<Table>)| other.oid == table.oid) =>
                {
                    refused.push(self.refused(
                        index,
                        Place::START.fault(format!(
                            "{} has a SELECT in this shape already: join their conditions with OR",
                            table.full_name()
                        )),
                    ));
                }
                Ok((statement, table)) => statements.push((index, statement, table)),
                Err(fault) => refused.push(self.refused(index, fault)),
            }
        }
        if self.tables.is_empty() {
            refused.push(self.refused(0, Place::START.fault("the shape has no SELECT")));
        }
        let named: Vec<Arc<Table>> = statements
            .iter()
            .flat_map(|(_, statement, _)| statement.all())
            .filter_map(|statement| find_table(statement, tables).ok())
            .collect();
        let known = |name: &_| DataType::named(name, named.iter().map(|table| &**table));
        let mut params = match Params::new(&self.params, known) {
            Ok(params) => params,
            Err(fault) => {
                refused.push(self.refused(0, fault));
                return Err(refused);
            }
        };
        let mut drafts = Vec::new();
        for (index, statement, table) in &statements {
            match draft(*index, statement, table, tables, &mut params) {
                Ok(draft) => drafts.push(draft),
                Err(fault) => refused.push(self.refused(*index, fault)),
            }
        }
        // Where something else is wrong, a use may be hidden in it.
        if refused.is_empty()
            && let Err(fault) = params.check_all_used()
        {
            refused.push(self.refused(0, fault));
        }
        if !refused.is_empty() {
            return Err(refused);
        }
        Ok((drafts, params.0.into()))
    }
}

fn find_table(statement: &Statement, tables: &[Arc<Table>]) -> Result<Arc<Table>, Fault> {
    let found = tables
        .iter()
        .find(|table| table.schema == statement.schema && table.name == statement.table.text);
    match found {
        Some(table) => Ok(Arc::clone(table)),
        None => Err(statement.table.place.fault(format!(
            "there is no table {}.{} that can be replicated",
            statement.schema, statement.table.text
        ))),
    }
}

fn draft(
    index: usize,
    statement: &Statement,
    table: &Arc<Table>,
    tables: &[Arc<Table>],
    params: &mut Params,
) -> Result<Draft, Fault> {
    let mut scope = Scope {
        names: Names::new(table, statement, None),
        params,
        tables,
        exact: false,
    };
    let columns = match &statement.columns {
        Columns::All(qualifier) => {
            scope.names.check_qualifier(qualifier)?;
            (0..table.columns.len()).collect()
        }
        Columns::Named(names) => chosen(names, &scope.names)?,
        Columns::Ignored { .. } => return Err(Place::START.fault("no columns are chosen")),
    };
    let condition = match &statement.condition {
        Some(expression) => Some(scope.condition(expression)?),
        None => None,
    };
    Ok(Draft {
        index,
        table: Arc::clone(table),
        columns,
        condition,
    })
}

/// The places of the columns that `names` choose, ascending.
fn chosen(chosen: &[Vec<Name>], names: &Names<'_>) -> Result<Vec<usize>, Fault> {
    let table = names.table;
    let mut columns = Vec::with_capacity(chosen.len());
    for name in chosen {
        let index = names.own(name)?;
        if columns.contains(&index) {
            let place = name[0].place;
            return Err(place.fault(format!(
                "column \"{}\" is chosen twice",
                table.columns[index].name
            )));
        }
        columns.push(index);
    }
    if let Some(missing) = table.key.iter().find(|key| !columns.contains(key)) {
        return Err(Place::START.fault(format!(
            "the columns of the key must be chosen, and \"{}\" is not",
            table.columns[*missing].name
        )));
    }
    columns.sort_unstable();
    Ok(columns)
}

impl Shape {
    /// Binds the parameters: claims of the verified token, and JSON texts from the replica. `bind` has the rules by
    /// which a JSON value becomes one of Postgres.
    pub fn bind(
        &self,
        claims: &serde_json::Map<String, serde_json::Value>,
        params: &HashMap<String, String>,
    ) -> Result<Vec<Bound>, BindError> {
        let arguments: Arc<[_]> = bind::arguments(&self.name, &self.params, claims, params)?.into();
        let bound = |select: &Arc<Select>| {
            select.bind(&arguments).map_err(|unfit| {
                let param = unfit.param.and_then(|index| self.params.get(index));
                let param = param.map_or_else(String::new, |param| param.name.clone());
                BindError::Parameter(self.name.clone(), param, unfit.reason)
            })
        };
        self.selects.iter().map(bound).collect()
    }
}
