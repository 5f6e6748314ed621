//! What each part of a condition says of a row, for a person.
//!
//! Nothing is decided here: what a part says was asked by the function that decides (see [`Program::trace`]); this puts words to
//! it, by the typed condition that the program was built of. Parameters are named and never shown: what a claim is, is between
//! the replica and whoever made its token. Values of rows are shown, so an explanation is never for logs.
//!
//! [`Program::trace`]: super::evaluate::Program::trace

use std::sync::Arc;

use anabranch_proto::record::{self, ValueRef};
use bytes::Bytes;

use super::{
    condition::{Condition, List, Operand},
    evaluate::{Inside, Trace},
    literal::Constant,
    params::Param,
    subquery::{Subquery, Test},
    syntax::Truth,
};
use crate::{delta, lookup::Error, table::Table};

/// Rows of a subquery's table that are shown at most: enough to see why, and few enough to be read.
pub const INNER_SHOWN_MAX: usize = 3;

/// Rows of a subquery's table that are counted at most, so that a row that all others go with does not take minutes.
pub const INNER_COUNTED_MAX: usize = 1_000;

/// Elements of a list that are written at most.
const ELEMENTS_WRITTEN_MAX: usize = 5;

/// What a part of a condition says of a row.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The part: SQL, with parameters by name. Of AND, OR, NOT and IS only that word: what they are made of is in `parts`.
    pub part: String,
    /// True, false, or unknown.
    pub truth: Option<bool>,
    /// The values of the row that it looks at itself: column, and value as text; `None`: NULL.
    pub values: Vec<(String, Option<String>)>,
    /// What it is made of.
    pub parts: Vec<Explanation>,
    /// Of a subquery: the rows that go with this one.
    pub inner: Option<InnerRows>,
}

/// The rows of a subquery's table that are equal to the outer row in the columns that are compared with it. (Where NOT IN
/// is unknown because of a NULL, the row that has it is not among them.)
#[derive(Clone, Debug)]
pub struct InnerRows {
    /// The table.
    pub table: Arc<Table>,
    /// How many, up to [`INNER_COUNTED_MAX`].
    pub count: usize,
    /// How many of these meet the subquery's own condition.
    pub met: usize,
    /// The first [`INNER_SHOWN_MAX`].
    pub rows: Vec<InnerRow>,
}

/// A row of a subquery's table.
#[derive(Clone, Debug)]
pub struct InnerRow {
    /// A record of its key.
    pub key: Bytes,
    /// What the subquery's own condition says of it; `None`: it has none.
    pub condition: Option<Explanation>,
}

/// Where a condition stands.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    /// The table whose row it is asked of.
    pub table: &'a Table,
    /// The parameters of the shape.
    pub params: &'a [Param],
}

impl Scope<'_> {
    /// Puts words to what was said of `row`.
    pub fn explanation(
        self,
        condition: &Condition,
        row: &[u8],
        trace: Trace,
    ) -> Result<Explanation, Error> {
        let made_of: Vec<&Condition> = match condition {
            Condition::And(parts) | Condition::Or(parts) => parts.iter().collect(),
            Condition::Not(inner) | Condition::Is(inner, _) => vec![inner],
            _ => Vec::new(),
        };
        let mut values = Vec::new();
        if made_of.is_empty() {
            let mut columns = Vec::new();
            condition.columns(&mut columns);
            columns.sort_unstable();
            columns.dedup();
            for column in columns {
                let name = self.table.columns[column].name.clone();
                values.push((name, text(record::value(row, column)?)));
            }
        }
        let mut parts = Vec::with_capacity(made_of.len());
        for (part, trace) in made_of.into_iter().zip(trace.parts) {
            parts.push(self.explanation(part, row, trace)?);
        }
        let inner = match (condition, trace.inner) {
            (Condition::Subquery(subquery), Some(inside)) => Some(self.inner(subquery, inside)?),
            _ => None,
        };
        Ok(Explanation {
            part: self.part(condition),
            truth: trace.truth,
            values,
            parts,
            inner,
        })
    }

    fn inner(self, subquery: &Subquery, inside: Inside) -> Result<InnerRows, Error> {
        let scope = Scope {
            table: &subquery.table,
            params: self.params,
        };
        let mut rows = Vec::with_capacity(inside.rows.len());
        for (row, trace) in inside.rows {
            let condition = match (&subquery.condition, trace) {
                (Some(condition), Some(trace)) => Some(scope.explanation(condition, &row, trace)?),
                _ => None,
            };
            rows.push(InnerRow {
                key: delta::key_record(&subquery.table, &row)?,
                condition,
            });
        }
        Ok(InnerRows {
            table: Arc::clone(&subquery.table),
            count: inside.count,
            met: inside.met,
            rows,
        })
    }

    /// The part alone.
    fn part(self, condition: &Condition) -> String {
        match condition {
            Condition::And(_) => "AND".to_owned(),
            Condition::Or(_) => "OR".to_owned(),
            Condition::Not(_) => "NOT".to_owned(),
            Condition::Is(_, truth) => format!("IS {}", truth_sql(*truth)),
            condition => self.sql(condition),
        }
    }

    /// All of it, for people: Postgres might need casts.
    fn sql(self, condition: &Condition) -> String {
        let chain = |parts: &[Condition], operator: &str| {
            let parts: Vec<_> = parts.iter().map(|part| self.sql(part)).collect();
            format!("({})", parts.join(operator))
        };
        match condition {
            Condition::Fixed(Some(truth)) => truth.to_string().to_uppercase(),
            Condition::Fixed(None) => "NULL".to_owned(),
            Condition::Flag(operand) => self.operand(operand),
            Condition::Compare {
                comparison,
                left,
                right,
                ..
            } => format!(
                "{} {} {}",
                self.operand(left),
                comparison.sql(),
                self.operand(right)
            ),
            Condition::Quantified {
                comparison,
                all,
                left,
                list,
                ..
            } => format!(
                "{} {} {} ({})",
                self.operand(left),
                comparison.sql(),
                if *all { "ALL" } else { "ANY" },
                self.list(list)
            ),
            Condition::Like { left, pattern, .. } => {
                format!("{} LIKE {}", self.operand(left), self.operand(pattern))
            }
            Condition::IsNull(operand) => format!("{} IS NULL", self.operand(operand)),
            Condition::IsNothing(operand) => {
                format!("{} IS NOT DISTINCT FROM NULL", self.operand(operand))
            }
            Condition::Same { left, right, .. } => format!(
                "{} IS NOT DISTINCT FROM {}",
                self.operand(left),
                self.operand(right)
            ),
            Condition::Subquery(subquery) => self.subquery(subquery),
            Condition::Is(inner, truth) => {
                format!("{} IS {}", self.sql(inner), truth_sql(*truth))
            }
            Condition::And(parts) => chain(parts, " AND "),
            Condition::Or(parts) => chain(parts, " OR "),
            Condition::Not(inner) => format!("NOT {}", self.sql(inner)),
        }
    }

    fn subquery(self, subquery: &Subquery) -> String {
        let inner = Scope {
            table: &subquery.table,
            params: self.params,
        };
        let name = subquery.table.full_name();
        let correlations = subquery.correlations.iter().map(|correlation| {
            format!(
                "{}.{} = {}.{}",
                subquery.table.name,
                inner.column(correlation.inner),
                self.table.name,
                self.column(correlation.outer)
            )
        });
        let mut parts: Vec<_> = correlations.collect();
        parts.extend(subquery.condition.as_ref().map(|of| inner.sql(of)));
        let mut from = format!("FROM {name}");
        if !parts.is_empty() {
            from.push_str(&format!(" WHERE {}", parts.join(" AND ")));
        }
        let Test::In(pairs) = &subquery.test else {
            return format!("EXISTS (SELECT {from})");
        };
        let left: Vec<_> = pairs.iter().map(|pair| self.operand(&pair.left)).collect();
        let left = match &left[..] {
            [one] => one.clone(),
            many => format!("({})", many.join(", ")),
        };
        let columns: Vec<_> = pairs.iter().map(|pair| inner.column(pair.column)).collect();
        format!("{left} IN (SELECT {} {from})", columns.join(", "))
    }

    fn list(self, list: &List) -> String {
        match list {
            List::Param(param) => self.param(*param),
            List::Of(operands, _) => {
                let written = operands.iter().take(ELEMENTS_WRITTEN_MAX);
                let mut written: Vec<_> = written.map(|of| self.operand(of)).collect();
                if operands.len() > ELEMENTS_WRITTEN_MAX {
                    written.push(format!("… {} in all", operands.len()));
                }
                written.join(", ")
            }
        }
    }

    fn operand(self, operand: &Operand) -> String {
        match operand {
            Operand::Column(column) => self.column(*column),
            Operand::Constant(Constant { data_type, text }) => {
                let is_word = data_type.is_negatable() || text == "true" || text == "false";
                match is_word {
                    true => text.clone(),
                    false => format!("'{}'", text.replace('\'', "''")),
                }
            }
            Operand::Null(_) => "NULL".to_owned(),
            Operand::Param(param) => self.param(*param),
        }
    }

    fn param(self, param: usize) -> String {
        let param = self.params.get(param);
        format!("${}", param.map_or("", |param| param.name.as_str()))
    }

    fn column(self, column: usize) -> String {
        self.table.columns[column].name.clone()
    }
}

fn truth_sql(truth: Truth) -> &'static str {
    match truth {
        Truth::True => "TRUE",
        Truth::False => "FALSE",
        Truth::Unknown => "UNKNOWN",
    }
}

/// A value as it is shown; `None`: NULL.
fn text(value: ValueRef<'_>) -> Option<String> {
    crate::explain::text(value)
}
