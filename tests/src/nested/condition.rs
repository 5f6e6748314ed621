//! Conditions: as SQL, and what they are of a row.

use std::cmp::Ordering;

use super::{Data, Principal, Row, Schema, Value};

/// A condition over the rows of one table.
#[derive(Clone, Debug)]
pub enum Condition {
    /// All of them.
    And(Vec<Condition>),
    /// Any of them.
    Or(Vec<Condition>),
    /// Not.
    Not(Box<Condition>),
    /// `IS [NOT] TRUE`, `FALSE` or `UNKNOWN`.
    Is(Box<Condition>, bool, Truth),
    /// A column and something.
    Compare(usize, Comparison, Operand),
    /// `column = ANY ($them)`.
    IsAny(usize),
    /// `column IS [NOT] NULL`.
    IsNull(usize, bool),
    /// `(…) [NOT] IN (SELECT …)`.
    In(Vec<Operand>, bool, Box<Inner>),
    /// `EXISTS (SELECT …)`.
    Exists(Box<Inner>),
}

/// What IS asks.
#[derive(Clone, Copy, Debug)]
pub enum Truth {
    /// TRUE
    True,
    /// FALSE
    False,
    /// UNKNOWN
    Unknown,
}

/// A comparison.
#[derive(Clone, Copy, Debug)]
pub enum Comparison {
    /// =
    Equal,
    /// <>
    Unequal,
    /// <
    Less,
    /// <=
    NotGreater,
    /// >
    Greater,
    /// >=
    NotLess,
}

/// What is compared.
#[derive(Clone, Debug)]
pub enum Operand {
    /// A column of the same row.
    Column(usize),
    /// A constant.
    Constant(Value),
    /// `$me`
    Me,
    /// `$top`
    Top,
    /// `$num`
    Num,
    /// `$name`
    Name,
}

/// The SELECT of a subquery.
#[derive(Clone, Debug)]
pub struct Inner {
    /// Place of its table.
    pub table: usize,
    /// Of that, what IN compares.
    pub columns: Vec<usize>,
    /// Columns of it that equal columns of the row outside.
    pub correlations: Vec<(usize, usize)>,
    /// What else its rows meet.
    pub condition: Option<Condition>,
}

impl Operand {
    fn value(&self, principal: &Principal, row: &Row) -> Value {
        match self {
            Operand::Column(place) => row[*place].clone(),
            Operand::Constant(value) => value.clone(),
            Operand::Me => Value::Number(principal.me, 0),
            Operand::Top => Value::Number(principal.top, 0),
            Operand::Num => Value::Number(principal.num, 0),
            Operand::Name => Value::Text(principal.name.clone()),
        }
    }

    fn sql(&self, columns: &dyn Fn(usize) -> String, principal: Option<&Principal>) -> String {
        match (self, principal) {
            (Operand::Column(place), _) => columns(*place),
            (Operand::Constant(value), _) => value.sql(),
            (Operand::Me, None) => "$me".into(),
            (Operand::Top, None) => "$top".into(),
            (Operand::Num, None) => "$num".into(),
            (Operand::Name, None) => "$name".into(),
            (Operand::Me, Some(principal)) => format!("'{}'", principal.me),
            (Operand::Top, Some(principal)) => format!("'{}'", principal.top),
            (Operand::Num, Some(principal)) => format!("'{}'", principal.num),
            (Operand::Name, Some(principal)) => format!("'{}'", principal.name),
        }
    }
}

/// NULL compares with nothing.
fn compare(one: &Value, other: &Value) -> Option<Ordering> {
    match (one, other) {
        (Value::Null, _) | (_, Value::Null) => None,
        (Value::Number(one, _), Value::Number(other, _)) => Some(one.cmp(other)),
        (Value::Text(one), Value::Text(other)) => Some(one.as_bytes().cmp(other.as_bytes())),
        _ => panic!("{one:?} with {other:?}"),
    }
}

fn and(truths: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let mut all = Some(true);
    for truth in truths {
        match truth {
            Some(false) => return Some(false),
            None => all = None,
            Some(true) => {}
        }
    }
    all
}

impl Condition {
    /// What it is of a row, in a state of all tables.
    pub fn truth(&self, data: &Data, principal: &Principal, row: &Row) -> Option<bool> {
        let of = |condition: &Condition| condition.truth(data, principal, row);
        let not = |truth: Option<bool>| truth.map(|truth| !truth);
        match self {
            Condition::And(parts) => and(parts.iter().map(of)),
            Condition::Or(parts) => not(and(parts.iter().map(|part| not(of(part))))),
            Condition::Not(inner) => not(of(inner)),
            Condition::Is(inner, is, truth) => {
                let wanted = match truth {
                    Truth::True => Some(true),
                    Truth::False => Some(false),
                    Truth::Unknown => None,
                };
                Some((of(inner) == wanted) == *is)
            }
            Condition::Compare(column, comparison, operand) => {
                let order = compare(&row[*column], &operand.value(principal, row))?;
                Some(match comparison {
                    Comparison::Equal => order.is_eq(),
                    Comparison::Unequal => order.is_ne(),
                    Comparison::Less => order.is_lt(),
                    Comparison::NotGreater => order.is_le(),
                    Comparison::Greater => order.is_gt(),
                    Comparison::NotLess => order.is_ge(),
                })
            }
            Condition::IsAny(column) => {
                let equals = |number: &i64| {
                    compare(&row[*column], &Value::Number(*number, 0)).map(|o| o.is_eq())
                };
                not(and(principal.them.iter().map(|number| not(equals(number)))))
            }
            Condition::IsNull(column, is) => Some((row[*column] == Value::Null) == *is),
            Condition::In(left, is, inner) => {
                let left: Vec<Value> = left
                    .iter()
                    .map(|operand| operand.value(principal, row))
                    .collect();
                let mut found = Some(false);
                for other in inner.rows(data, principal, row) {
                    let pairs = left.iter().zip(&inner.columns);
                    let equal = and(pairs
                        .map(|(left, column)| compare(left, &other[*column]).map(Ordering::is_eq)));
                    match equal {
                        Some(true) => {
                            found = Some(true);
                            break;
                        }
                        None => found = None,
                        Some(false) => {}
                    }
                }
                if *is { found } else { not(found) }
            }
            Condition::Exists(inner) => Some(inner.rows(data, principal, row).next().is_some()),
        }
    }

    /// As the condition of a SELECT from a table, by its own name.
    pub fn sql(&self, schema: &Schema, table: usize, principal: Option<&Principal>) -> String {
        let name = schema.tables[table].name.clone();
        self.sql_in(schema, table, &name, 0, principal)
    }

    fn sql_in(
        &self,
        schema: &Schema,
        table: usize,
        alias: &str,
        level: usize,
        principal: Option<&Principal>,
    ) -> String {
        let of = |condition: &Condition| condition.sql_in(schema, table, alias, level, principal);
        let column = |place: usize| format!("{alias}.{}", schema.tables[table].columns[place].name);
        let join = |parts: &[Condition], with: &str| {
            let parts: Vec<String> = parts.iter().map(of).collect();
            format!("({})", parts.join(with))
        };
        match self {
            Condition::And(parts) => join(parts, " AND "),
            Condition::Or(parts) => join(parts, " OR "),
            Condition::Not(inner) => format!("(NOT {})", of(inner)),
            Condition::Is(inner, is, truth) => {
                let truth = match truth {
                    Truth::True => "TRUE",
                    Truth::False => "FALSE",
                    Truth::Unknown => "UNKNOWN",
                };
                let not = if *is { "" } else { "NOT " };
                format!("(({}) IS {not}{truth})", of(inner))
            }
            Condition::Compare(place, comparison, operand) => {
                let sign = match comparison {
                    Comparison::Equal => "=",
                    Comparison::Unequal => "<>",
                    Comparison::Less => "<",
                    Comparison::NotGreater => "<=",
                    Comparison::Greater => ">",
                    Comparison::NotLess => ">=",
                };
                format!(
                    "{} {sign} {}",
                    column(*place),
                    operand.sql(&column, principal)
                )
            }
            Condition::IsAny(place) => {
                let list = match principal {
                    None => "$them".into(),
                    Some(principal) => {
                        let them: Vec<String> = principal.them.iter().map(i64::to_string).collect();
                        format!("'{{{}}}'", them.join(","))
                    }
                };
                format!("{} = ANY ({list})", column(*place))
            }
            Condition::IsNull(place, is) => {
                let not = if *is { "" } else { "NOT " };
                format!("{} IS {not}NULL", column(*place))
            }
            Condition::In(left, is, inner) => {
                let left: Vec<String> = left
                    .iter()
                    .map(|operand| operand.sql(&column, principal))
                    .collect();
                let left = match &left[..] {
                    [one] => one.clone(),
                    many => format!("({})", many.join(", ")),
                };
                let not = if *is { "" } else { "NOT " };
                let inner = inner.sql(schema, &column, level + 1, principal);
                format!("{left} {not}IN ({inner})")
            }
            Condition::Exists(inner) => {
                format!(
                    "EXISTS ({})",
                    inner.sql(schema, &column, level + 1, principal)
                )
            }
        }
    }

    /// How many subqueries are in it.
    pub fn subqueries(&self) -> usize {
        match self {
            Condition::And(parts) | Condition::Or(parts) => {
                parts.iter().map(Condition::subqueries).sum()
            }
            Condition::Not(inner) | Condition::Is(inner, ..) => inner.subqueries(),
            Condition::In(_, _, inner) | Condition::Exists(inner) => {
                1 + inner.condition.as_ref().map_or(0, Condition::subqueries)
            }
            _ => 0,
        }
    }

    /// How deep subqueries are nested in it.
    pub fn levels(&self) -> usize {
        match self {
            Condition::And(parts) | Condition::Or(parts) => {
                parts.iter().map(Condition::levels).max().unwrap_or(0)
            }
            Condition::Not(inner) | Condition::Is(inner, ..) => inner.levels(),
            Condition::In(_, _, inner) | Condition::Exists(inner) => {
                1 + inner.condition.as_ref().map_or(0, Condition::levels)
            }
            _ => 0,
        }
    }
}

impl Inner {
    /// Its rows for a row outside.
    fn rows<'a>(
        &'a self,
        data: &'a Data,
        principal: &'a Principal,
        outer: &'a Row,
    ) -> impl Iterator<Item = &'a Row> {
        data[self.table].values().filter(move |row| {
            let correlates = self.correlations.iter().all(|(inner, of_outer)| {
                compare(&row[*inner], &outer[*of_outer]).is_some_and(Ordering::is_eq)
            });
            let meets = |condition: &Condition| condition.truth(data, principal, row) == Some(true);
            correlates && self.condition.as_ref().is_none_or(meets)
        })
    }

    fn sql(
        &self,
        schema: &Schema,
        outer: &dyn Fn(usize) -> String,
        level: usize,
        principal: Option<&Principal>,
    ) -> String {
        let table = &schema.tables[self.table];
        let alias = format!("x{level}");
        let column = |place: &usize| format!("{alias}.{}", table.columns[*place].name);
        let chosen: Vec<String> = self.columns.iter().map(column).collect();
        let chosen = match &chosen[..] {
            [] => "1".into(),
            some => some.join(", "),
        };
        let mut parts: Vec<String> = self
            .correlations
            .iter()
            .map(|(inner, of_outer)| format!("{} = {}", column(inner), outer(*of_outer)))
            .collect();
        if let Some(condition) = &self.condition {
            parts.push(condition.sql_in(schema, self.table, &alias, level, principal));
        }
        let condition = match &parts[..] {
            [] => String::new(),
            some => format!(" WHERE {}", some.join(" AND ")),
        };
        format!("SELECT {chosen} FROM {} {alias}{condition}", table.name)
    }
}
