//! A typed condition as canonical SQL, which Postgres reads with the same meaning: every operand has its type
//! written, every operator its parentheses. Fingerprints are made of it, and `check` and the tests ask Postgres with it.

use std::cell::Cell;

use aws_lc_rs::digest;

use super::{
    condition::{Condition, List, Operand},
    datatype::DataType,
    evaluate::Argument,
    literal::Constant,
    params::Param,
    subquery::{Subquery, Test},
    syntax::{Comparison, Truth},
};
use crate::table::Table;

/// Writes conditions over a table.
struct Writer<'a> {
    table: &'a Table,
    /// What the table is called, in SQL.
    name: &'a str,
    /// Columns are qualified, as it is not the only table.
    qualified: bool,
    params: &'a [Param],
    /// What they are bound to; without, each is written as NULL of its type.
    arguments: Option<&'a [Argument]>,
    /// Before an inner table. `ONLY` is for Postgres: a shape can't say it, and means it.
    only: &'static str,
    /// So many inner tables were given a name.
    named: &'a Cell<usize>,
}

/// Writes `condition` over `table`, which is called `name` where it will stand.
pub fn condition(
    condition: &Condition,
    table: &Table,
    name: &str,
    params: &[Param],
    arguments: Option<&[Argument]>,
) -> String {
    let writer = Writer {
        table,
        name,
        qualified: false,
        params,
        arguments,
        only: "ONLY ",
        named: &Cell::new(0),
    };
    writer.condition(condition)
}

/// The same for subqueries that say the same of each row of `table`: of 128 bits of SHA-256, as what replicas choose is in it.
pub fn identity(subquery: &Subquery, table: &Table, arguments: &[Argument]) -> u128 {
    let writer = Writer {
        table,
        name: "t",
        qualified: true,
        params: &[],
        arguments: Some(arguments),
        only: "ONLY ",
        named: &Cell::new(0),
    };
    let sql = writer.subquery(subquery);
    // Where unknown may be taken for false, it is.
    let whole = format!("{} {} {sql}", table.oid, subquery.exact);
    let digest = digest::digest(&digest::SHA256, whole.as_bytes());
    let mut first = [0; 16];
    first.copy_from_slice(&digest.as_ref()[..16]);
    u128::from_be_bytes(first)
}

/// Writes the SELECT of these columns with its parameters filled in, to be read by [`super::compile`] again.
pub fn select(
    columns: &[usize],
    condition: Option<&Condition>,
    table: &Table,
    params: &[Param],
    arguments: &[Argument],
) -> String {
    let columns: Vec<_> = columns
        .iter()
        .map(|column| identifier(&table.columns[*column].name))
        .collect();
    let mut sql = format!(
        "SELECT {} FROM {}.{} AS \"_0\"",
        columns.join(", "),
        identifier(&table.schema),
        identifier(&table.name)
    );
    if let Some(condition) = condition {
        let writer = Writer {
            table,
            name: "\"_0\"",
            qualified: false,
            params,
            arguments: Some(arguments),
            only: "",
            named: &Cell::new(0),
        };
        sql.push_str(" WHERE ");
        sql.push_str(&writer.condition(condition));
    }
    sql
}

/// Quotes an identifier.
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a string, whatever `standard_conforming_strings` says.
fn string(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!("E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

impl Writer<'_> {
    fn condition(&self, condition: &Condition) -> String {
        match condition {
            Condition::Fixed(truth) => match truth {
                Some(true) => "TRUE".to_owned(),
                Some(false) => "FALSE".to_owned(),
                None => "NULL::bool".to_owned(),
            },
            Condition::Flag(operand) => self.operand(operand),
            Condition::Compare {
                comparison,
                left,
                right,
                ..
            } => format!(
                "({} {} {})",
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
            } => self.quantified(*comparison, *all, left, list),
            Condition::Like {
                left,
                pattern,
                escape,
            } => {
                let escape = escape.map(String::from).unwrap_or_default();
                format!(
                    "({} LIKE {} ESCAPE {})",
                    self.operand(left),
                    self.operand(pattern),
                    string(&escape)
                )
            }
            Condition::IsNull(operand) => format!("({} IS NULL)", self.operand(operand)),
            Condition::IsNothing(operand) => {
                format!("({} IS NOT DISTINCT FROM NULL)", self.operand(operand))
            }
            Condition::Same { left, right, .. } => {
                format!(
                    "({} IS NOT DISTINCT FROM {})",
                    self.operand(left),
                    self.operand(right)
                )
            }
            Condition::Subquery(subquery) => self.subquery(subquery),
            Condition::Is(inner, truth) => {
                let truth = match truth {
                    Truth::True => "TRUE",
                    Truth::False => "FALSE",
                    Truth::Unknown => "UNKNOWN",
                };
                format!("({} IS {truth})", self.condition(inner))
            }
            Condition::And(parts) => self.chain(parts, " AND "),
            Condition::Or(parts) => self.chain(parts, " OR "),
            Condition::Not(inner) => format!("(NOT {})", self.condition(inner)),
        }
    }

    /// Each inner table has a name that none else has, so that whatever it hides is not meant.
    fn subquery(&self, subquery: &Subquery) -> String {
        self.named.set(self.named.get() + 1);
        let name = identifier(&format!("_{}", self.named.get()));
        let inner = Writer {
            table: &subquery.table,
            name: &name,
            qualified: true,
            ..*self
        };
        let mut parts: Vec<_> = subquery
            .correlations
            .iter()
            .map(|c| format!("({} = {})", inner.column(c.inner), self.column(c.outer)))
            .collect();
        parts.extend(
            subquery
                .condition
                .iter()
                .map(|condition| inner.condition(condition)),
        );
        let condition = match parts.is_empty() {
            true => String::new(),
            false => format!(" WHERE {}", parts.join(" AND ")),
        };
        let from = format!(
            "FROM {}{}.{} AS {name}{condition}",
            self.only,
            identifier(&subquery.table.schema),
            identifier(&subquery.table.name)
        );
        let pairs = match &subquery.test {
            Test::Exists => return format!("(EXISTS (SELECT 1 {from}))"),
            Test::In(pairs) => pairs,
        };
        let left: Vec<_> = pairs.iter().map(|pair| self.operand(&pair.left)).collect();
        let columns: Vec<_> = pairs.iter().map(|pair| inner.column(pair.column)).collect();
        format!(
            "(({}) IN (SELECT {} {from}))",
            left.join(", "),
            columns.join(", ")
        )
    }

    /// A column, qualified.
    fn column(&self, index: usize) -> String {
        let column = &self.table.columns[index];
        format!("{}.{}", self.name, identifier(&column.name))
    }

    fn chain(&self, parts: &[Condition], operator: &str) -> String {
        let parts: Vec<_> = parts.iter().map(|part| self.condition(part)).collect();
        format!("({})", parts.join(operator))
    }

    fn quantified(&self, comparison: Comparison, all: bool, left: &Operand, list: &List) -> String {
        let (elements, data_type): (Vec<String>, Option<&DataType>) = match list {
            List::Of(operands, data_type) => (
                operands
                    .iter()
                    .map(|operand| self.operand(operand))
                    .collect(),
                Some(data_type),
            ),
            List::Param(index) => {
                let data_type = self.param_type(*index);
                match self.argument(*index) {
                    Some(Argument::Many(constants)) => {
                        (constants.iter().map(constant).collect(), data_type)
                    }
                    _ => (vec!["NULL".to_owned()], data_type),
                }
            }
        };
        format!(
            "({} {} {} (ARRAY[{}]::{}[]))",
            self.operand(left),
            comparison.sql(),
            if all { "ALL" } else { "ANY" },
            elements.join(", "),
            data_type.map_or("text", DataType::sql)
        )
    }

    fn operand(&self, operand: &Operand) -> String {
        match operand {
            Operand::Column(index) if self.qualified => self.column(*index),
            Operand::Column(index) => identifier(&self.table.columns[*index].name),
            Operand::Constant(of) => constant(of),
            Operand::Null(data_type) => null(data_type.as_ref()),
            Operand::Param(index) => match self.argument(*index) {
                Some(Argument::One(of)) => constant(of),
                _ => null(self.param_type(*index)),
            },
        }
    }

    fn argument(&self, index: usize) -> Option<&Argument> {
        self.arguments?.get(index)
    }

    fn param_type(&self, index: usize) -> Option<&DataType> {
        Some(&self.params.get(index)?.usage.as_ref()?.data_type)
    }
}

fn constant(constant: &Constant) -> String {
    format!("{}::{}", string(&constant.text), constant.data_type.sql())
}

fn null(data_type: Option<&DataType>) -> String {
    match data_type {
        Some(data_type) => format!("NULL::{}", data_type.sql()),
        None => "NULL".to_owned(),
    }
}
