//! A compiled SELECT, and one that is bound to a principal's parameters.

use std::sync::Arc;

use anabranch_proto::record::{self, Malformed};
use aws_lc_rs::digest;
use bytes::Bytes;

use super::{
    condition::{Condition, List, Operand},
    datatype::Domain,
    deparse::Writer,
    evaluate::{Argument, Program, Unfit},
    params::Param,
    syntax::Comparison,
    value::{Comparable, Reading},
};
use crate::table::Table;

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
    route: Option<Route>,
}

/// A SELECT with its parameters bound: what one replica may see of one table.
#[derive(Clone)]
pub struct Bound {
    /// The SELECT.
    pub select: Arc<Select>,
    arguments: Arc<[Argument]>,
    program: Option<Arc<Program>>,
    route_keys: Arc<[RouteKey]>,
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

/// The value of a routing column, such that values equal by Postgres' meaning are equal here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey(pub Vec<u8>);

/// A conjunct `column = $param` or `column = ANY ($param)`.
#[derive(Debug)]
struct Route {
    column: usize,
    reading: Reading,
    domain: Domain,
    param: usize,
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
        let route = condition
            .as_ref()
            .and_then(|condition| Route::find(condition, &table));
        Select {
            id,
            table,
            columns,
            writable,
            condition,
            params,
            route,
        }
    }

    /// If the condition has a conjunct `column = $param` (or `= ANY ($param)`): the value of that column in `row`;
    /// None where it is NULL (then no bound SELECT has the row). `is_routable` says whether there is such a conjunct.
    pub fn route_key(&self, row: &[u8]) -> Result<Option<RouteKey>, Malformed> {
        let Some(route) = &self.route else {
            return Ok(None);
        };
        let value = route.reading.read(record::value(row, route.column)?)?;
        Ok(value.map(|value| RouteKey(value.route_bytes())))
    }

    /// Whether the condition can be indexed by `route_key`.
    pub fn is_routable(&self) -> bool {
        self.route.is_some()
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
    /// For asking Postgres whether it takes it.
    pub fn condition_sql(&self) -> String {
        self.sql(None)
    }

    fn sql(&self, arguments: Option<&[Argument]>) -> String {
        let writer = Writer {
            table: &self.table,
            params: &self.params,
            arguments,
        };
        match &self.condition {
            Some(condition) => writer.condition(condition),
            None => "TRUE".to_owned(),
        }
    }

    pub(super) fn bind(self: &Arc<Self>, arguments: &Arc<[Argument]>) -> Result<Bound, Unfit> {
        let program = match &self.condition {
            Some(condition) => Some(Arc::new(Program::new(condition, &self.table, arguments)?)),
            None => None,
        };
        let route_keys = match &self.route {
            Some(route) => route.keys(arguments)?,
            None => Vec::new(),
        };
        Ok(Bound {
            select: Arc::clone(self),
            arguments: Arc::clone(arguments),
            program,
            route_keys: route_keys.into(),
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
        part(&self.sql(Some(arguments)));
        let mut fingerprint = [0; 16];
        fingerprint.copy_from_slice(&hash.finish().as_ref()[..16]);
        fingerprint
    }
}

impl Bound {
    /// Whether the condition is true (not false, not unknown) of `row`, as Postgres would say.
    pub fn contains(&self, row: &[u8]) -> Result<bool, Malformed> {
        match &self.program {
            Some(program) => program.is_true(row),
            None => Ok(true),
        }
    }

    /// The keys under which a routable SELECT is to be found: several for an array parameter.
    pub fn route_keys(&self) -> Vec<RouteKey> {
        self.route_keys.to_vec()
    }

    /// Tells definition, bound parameters and schema version apart: 16 bytes of SHA-256. The shape's name is no part
    /// of it: renaming a shape costs nothing.
    pub fn fingerprint(&self) -> [u8; 16] {
        self.fingerprint
    }

    /// The condition as SQL that Postgres reads with the same meaning. It holds the values of the parameters: never
    /// for logs or errors.
    pub fn condition_sql(&self) -> String {
        self.select.sql(Some(&self.arguments))
    }
}

impl Route {
    /// The best conjunct to route by: `=` finds fewer rows than `= ANY`.
    fn find(condition: &Condition, table: &Table) -> Option<Route> {
        let mut found: Option<Route> = None;
        for part in condition.conjuncts() {
            let (column, param, domain, one) = match part {
                Condition::And(_) => match Route::find(part, table) {
                    Some(route) => return Some(route),
                    None => continue,
                },
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
                } => (*column, *param, domain, true),
                Condition::Quantified {
                    comparison: Comparison::Equal,
                    all: false,
                    left: Operand::Column(column),
                    list: List::Param(param),
                    domain,
                } => (*column, *param, domain, false),
                _ => continue,
            };
            // Equal floats have many forms, and what is compared as a float is equal to several integers.
            if *domain == Domain::Float || (!one && found.is_some()) {
                continue;
            }
            found = Some(Route {
                column,
                reading: Reading::new(&table.columns[column].kind, domain),
                domain: domain.clone(),
                param,
            });
            if one {
                break;
            }
        }
        found
    }

    fn keys(&self, arguments: &[Argument]) -> Result<Vec<RouteKey>, Unfit> {
        let constants = match arguments.get(self.param) {
            Some(Argument::One(constant)) => std::slice::from_ref(constant),
            Some(Argument::Many(constants)) => constants,
            None => &[],
        };
        let mut keys = Vec::with_capacity(constants.len());
        for constant in constants {
            let comparable = Comparable::new(constant, &self.domain).map_err(|reason| Unfit {
                param: Some(self.param),
                reason,
            })?;
            keys.push(RouteKey(comparable.value().route_bytes()));
        }
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }
}
