//! A compiled SELECT, and one that is bound to a principal's parameters.
//!
//! **From a row to those who may have it.** [`Select::route_keys_of`] gives, for a row of the SELECT's own table, keys
//! among which every bound SELECT that has the row has one of its [`Bound::route_keys`], or one that lies in one of its
//! [`Bound::route_ranges`]; unless the SELECT is not
//! [`Select::is_routable`]: then all of them must be asked.
//!
//! **From a row of an inner table.** [`Select::subqueries`] are the steps between tables. A row of the inner table of a step
//! that comes, goes or changes may change the answer for the outer rows that [`Subquery::outer_rows`] gives (of the row
//! as it was, in the state before, and as it is, in the state after), and for those bound SELECTs only that have a key
//! of the step's [`Path`]. The outer rows are of the SELECT's own table, or else rows whose condition may have changed, of
//! the inner table of the step's parent: from there it goes on in the same way, with what the parent's path says.

use std::sync::Arc;

use anabranch_proto::record::{self, Malformed};
use aws_lc_rs::digest;
use bytes::Bytes;

use super::{
    condition::Condition,
    deparse,
    evaluate::{Argument, Program, Unfit},
    explain::{self, Explanation},
    params::Param,
    path::{Leaves, Path, RouteKey, RouteRange},
    subquery::Subquery,
};
use crate::{
    lookup::{Error, Index, Lookup},
    table::Table,
};

/// One compiled SELECT.
#[derive(Debug)]
pub struct Select {
    /// Unique among all selects of the compiled shapes.
    pub id: u32,
    /// Over this table.
    pub table: Arc<Table>,
    /// Places of the chosen columns, in the table's order (`*` is all of them); the key's are among them.
    pub columns: Vec<usize>,
    /// The replica may write the rows that it sees by this one.
    pub writable: bool,
    condition: Option<Condition>,
    params: Arc<[Param]>,
    path: Option<Path>,
    exact: bool,
    steps: Vec<Step>,
    leaves: Leaves,
}

/// A SELECT with its parameters bound: what one replica may see of one table.
#[derive(Clone)]
pub struct Bound {
    /// The SELECT.
    pub select: Arc<Select>,
    arguments: Arc<[Argument]>,
    program: Option<Arc<Program>>,
    route_keys: Arc<[RouteKey]>,
    route_ranges: Arc<[RouteRange]>,
    fingerprint: [u8; 16],
}

/// Never shows what the parameters are bound to.
impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound")
            .field("select", &self.select.id)
            .field("table", &self.select.table.full_name())
            .finish_non_exhaustive()
    }
}

/// One subquery of a SELECT: a step between rows of two tables.
#[derive(Debug)]
pub struct Step {
    /// The subquery, with its inner table.
    pub subquery: Arc<Subquery>,
    /// The step whose inner table is the outer one of this; `None`: that is the SELECT's own table.
    pub parent: Option<usize>,
    /// From a row of the inner table to the bound SELECTs for which it may decide an answer; `None`: the subquery tells
    /// nothing of parameters, and it may for all of them.
    pub path: Option<Path>,
}

impl Select {
    pub(super) fn new(
        id: u32,
        table: Arc<Table>,
        columns: Vec<usize>,
        condition: Option<Condition>,
        params: Arc<[Param]>,
        writable: bool,
    ) -> Select {
        let mut leaves = Leaves::default();
        let path = condition
            .as_ref()
            .and_then(|condition| Path::find(condition, &table, &mut leaves));
        let exact = (condition.as_ref().zip(path.as_ref()))
            .is_some_and(|(condition, path)| path.is_exact(condition));
        let steps = steps(condition.as_ref(), &mut leaves);
        Select {
            id,
            table,
            columns,
            writable,
            condition,
            params,
            path,
            exact,
            steps,
            leaves,
        }
    }

    /// Whether the bound SELECTs that may have a row are found by [`Select::route_keys_of`].
    pub fn is_routable(&self) -> bool {
        self.path.is_some()
    }

    /// Whether a bound SELECT has a row just where it [has](Bound::has_route_key) the row's key, of which there is one at most: it
    /// need not be asked.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// Why each change of the table must be looked at for each of the bound SELECTs; `None`: it need not, as they are found by
    /// the row's values, or there is only one for all, as nothing in it depends on who asks.
    pub fn scan_reason(&self) -> Option<&'static str> {
        let condition = self.condition.as_ref()?;
        (!self.is_routable() && condition.has_params()).then(|| condition.scan_reason())
    }

    /// Adds keys, none twice, for `row` of the SELECT's table in the state that `lookup` shows: every bound SELECT that has
    /// the row then [has](Bound::has_route_key) one of them. None where the SELECT is not routable. False: there are
    /// more than `max`, and some are missing.
    pub fn route_keys_of(
        &self,
        row: &[u8],
        lookup: &dyn Lookup,
        keys: &mut Vec<RouteKey>,
        max: usize,
    ) -> Result<bool, Error> {
        let Some(path) = &self.path else {
            return Ok(true);
        };
        let all = path.keys_of(row, lookup, keys, max)?;
        keys.sort_unstable();
        keys.dedup();
        Ok(all)
    }

    /// The subqueries, those further out first: so parents come before their children.
    pub fn subqueries(&self) -> &[Step] {
        &self.steps
    }

    /// The indexes that a lookup of rows must have for this SELECT, each once; besides the one without columns, by which all
    /// rows of a table are found.
    pub fn indexes(&self) -> Vec<Index> {
        let mut indexes: Vec<Index> = Vec::new();
        for step in &self.steps {
            for index in [&step.subquery.inner, &step.subquery.outer] {
                if !index.parts.is_empty() && !indexes.contains(index) {
                    indexes.push(index.clone());
                }
            }
        }
        indexes
    }

    /// The record of the chosen columns. Shares the buffer where all columns are chosen.
    pub fn project(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        if self.columns.len() == self.table.columns.len() {
            return Ok(row.clone());
        }
        let mut builder = record::Builder::new();
        let mut values = record::values(row)?;
        let mut next = 0;
        for &column in &self.columns {
            let value = values.nth(column - next);
            builder.push(value.unwrap_or(Err(Malformed("fewer values than columns")))?);
            next = column + 1;
        }
        Ok(builder.finish())
    }

    /// The condition as SQL that Postgres reads with the same meaning; parameters are NULLs of their types.
    /// For asking Postgres whether it takes it. `name` is as in [`Bound::condition_sql`].
    pub fn condition_sql(&self, name: &str) -> String {
        self.sql(name, None)
    }

    fn sql(&self, name: &str, arguments: Option<&[Argument]>) -> String {
        match &self.condition {
            Some(condition) => {
                deparse::condition(condition, &self.table, name, &self.params, arguments)
            }
            None => "TRUE".to_owned(),
        }
    }

    pub(super) fn bind(self: &Arc<Self>, arguments: &Arc<[Argument]>) -> Result<Bound, Unfit> {
        let program = match &self.condition {
            Some(condition) => Some(Arc::new(Program::new(condition, &self.table, arguments)?)),
            None => None,
        };
        let (route_keys, route_ranges) = self.leaves.bind(arguments)?;
        Ok(Bound {
            select: Arc::clone(self),
            arguments: Arc::clone(arguments),
            program,
            route_keys: route_keys.into(),
            route_ranges: route_ranges.into(),
            fingerprint: self.fingerprint(arguments),
        })
    }

    fn fingerprint(&self, arguments: &[Argument]) -> [u8; 16] {
        let mut hash = digest::Context::new(&digest::SHA256);
        // Each part with its length before it, so that no two definitions make the same bytes.
        let mut part = |text: &str| {
            hash.update(&(text.len() as u64).to_be_bytes());
            hash.update(text.as_bytes());
        };
        part("anabranch shape 1");
        part(&format!(
            "{} {} {}",
            self.table.oid,
            self.table.version,
            self.columns.len()
        ));
        for &index in &self.columns {
            let column = &self.table.columns[index];
            part(&column.name);
            part(&format!(
                "{} {} {}",
                column.postgres_type, column.type_oid, column.typmod
            ));
        }
        for step in &self.steps {
            part(&format!(
                "{} {}",
                step.subquery.table.oid, step.subquery.table.version
            ));
        }
        part(&self.sql("t", Some(arguments)));
        let mut fingerprint = [0; 16];
        fingerprint.copy_from_slice(&hash.finish().as_ref()[..16]);
        fingerprint
    }
}

impl Bound {
    /// Whether the condition is true (not false, not unknown) of `row`, as Postgres would say in the state that `lookup`
    /// shows.
    pub fn contains(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, Error> {
        match &self.program {
            Some(program) => program.is_true(row, lookup),
            None => Ok(true),
        }
    }

    /// The keys under which it is to be found, by a row of the SELECT's own table and by rows of the inner tables:
    /// for each parameter that a path ends at, its value, or its values for an array.
    pub fn route_keys(&self) -> Vec<RouteKey> {
        self.route_keys.to_vec()
    }

    /// The same for paths that end at a range.
    pub fn route_ranges(&self) -> &[RouteRange] {
        &self.route_ranges
    }

    /// Whether it is found under this key of a row.
    pub fn has_route_key(&self, key: &RouteKey) -> bool {
        let mut ranges = self.route_ranges.iter();
        self.route_keys.contains(key) || ranges.any(|range| range.holds(key))
    }

    /// Tells definition, bound parameters and schema version apart: 16 bytes of SHA-256. The shape's name is no part
    /// of it: renaming a shape costs nothing.
    pub fn fingerprint(&self) -> [u8; 16] {
        self.fingerprint
    }

    /// The SELECT as SQL that [`super::compile`] reads with the same meaning, without parameters, against the same tables. It
    /// holds their values: never for logs or errors.
    pub fn sql(&self) -> String {
        let select = &self.select;
        deparse::select(
            &select.columns,
            select.condition.as_ref(),
            &select.table,
            &select.params,
            &self.arguments,
        )
    }

    /// What the condition says of `row`, part by part; `None`: there is no condition, and all rows are in it.
    pub fn explain(&self, row: &[u8], lookup: &dyn Lookup) -> Result<Option<Explanation>, Error> {
        let (Some(condition), Some(program)) = (&self.select.condition, &self.program) else {
            return Ok(None);
        };
        let trace = program.trace(row, lookup)?;
        let scope = explain::Scope {
            table: &self.select.table,
            params: &self.select.params,
        };
        scope.explanation(condition, row, trace).map(Some)
    }

    /// The condition as SQL that Postgres reads with the same meaning. It holds the values of the parameters: never
    /// for logs or errors.
    ///
    /// `name` is what the table is called where the SQL will stand: its alias, or its quoted name. Columns are qualified
    /// with it within subqueries; elsewhere they are not qualified.
    pub fn condition_sql(&self, name: &str) -> String {
        self.select.sql(name, Some(&self.arguments))
    }
}

fn steps(condition: Option<&Condition>, leaves: &mut Leaves) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut found = Vec::new();
    let mut parent = None;
    let mut condition = condition;
    loop {
        if let Some(condition) = condition {
            condition.subqueries(&mut found);
        }
        for subquery in found.drain(..) {
            steps.push(Step {
                path: Path::within(&subquery, leaves),
                subquery,
                parent,
            });
        }
        // Those that were found are looked into in the same order.
        let next = parent.map_or(0, |parent| parent + 1);
        let Some(step) = steps.get(next) else {
            return steps;
        };
        parent = Some(next);
        condition = step.subquery.condition.as_ref();
    }
}
