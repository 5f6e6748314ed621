//! Any schema, any shape, any row.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use super::{
    Column, Comparison, Condition, Inner, Kind, Link, OnDelete, Operand, Principal, Row, Schema,
    Shape, Table, Truth, Value,
};

/// How deep subqueries are nested at most.
pub const LEVELS_MAX: usize = 3;

/// How many a shape has at most: as many as are taken.
const SUBQUERIES_MAX: usize = 16;

/// As many tables.
pub fn schema(rng: &mut StdRng, tables: usize, width: i64) -> Schema {
    let mut schema = Schema {
        tables: Vec::new(),
        width,
    };
    for place in 0..tables {
        let table = table(rng, &schema, place);
        schema.tables.push(table);
    }
    schema
}

fn table(rng: &mut StdRng, schema: &Schema, place: usize) -> Table {
    let mut columns = Vec::new();
    let composite = rng.random_ratio(1, 3);
    let whole = |rng: &mut StdRng| *[Kind::Int4, Kind::Int8].choose(rng).expect("two");
    let mut column = |name: &str, kind| {
        columns.push(Column {
            name: name.into(),
            kind,
        });
    };
    // The key does not always come first, nor in the order of its columns.
    let behind = rng.random_bool(0.3);
    if behind {
        column("z", Kind::Text);
    }
    column("k", whole(rng));
    if composite {
        let kind = *[Kind::Int4, Kind::Int8, Kind::Text]
            .choose(rng)
            .expect("three");
        column("l", kind);
    }
    for name in ["p", "q", "r"] {
        let kind = [
            Kind::Int4,
            Kind::Int4,
            Kind::Int8,
            Kind::Numeric,
            Kind::Text,
        ];
        column(name, *kind.choose(rng).expect("five"));
    }
    let first = usize::from(behind);
    let key = match (composite, rng.random_bool(0.5)) {
        (false, _) => vec![first],
        (true, false) => vec![first, first + 1],
        (true, true) => vec![first + 1, first],
    };
    let mut links = Vec::new();
    let targets: Vec<usize> = (0..schema.tables.len())
        .filter(|to| schema.tables[*to].key.len() == 1)
        .collect();
    for (column, of) in columns.iter_mut().enumerate() {
        if !["p", "q"].contains(&of.name.as_str()) || !rng.random_ratio(2, 5) {
            continue;
        }
        if let Some(to) = targets.choose(rng) {
            let target = &schema.tables[*to];
            of.kind = target.columns[target.key[0]].kind;
            links.push(Link {
                column,
                to: *to,
                on_delete: match rng.random_bool(0.6) {
                    true => OnDelete::Cascade,
                    false => OnDelete::SetNull,
                },
            });
        }
    }
    let chosen = rng.random_ratio(1, 4).then(|| {
        (0..columns.len())
            .filter(|place| key.contains(place) || rng.random_bool(0.6))
            .collect()
    });
    Table {
        name: format!("t{place}"),
        columns,
        key,
        links,
        chosen,
    }
}

/// A value of a type; NULL now and then.
pub fn value(rng: &mut StdRng, kind: Kind, width: i64) -> Value {
    if rng.random_ratio(1, 6) {
        return Value::Null;
    }
    not_null(rng, kind, width)
}

fn not_null(rng: &mut StdRng, kind: Kind, width: i64) -> Value {
    let number = rng.random_range(0..width);
    match kind {
        Kind::Text => Value::Text(char::from(b'a' + (number % 26) as u8).to_string()),
        Kind::Numeric => Value::Number(number, rng.random_range(0..3)),
        _ => Value::Number(number, 0),
    }
}

/// A row; whether its key is free, and what it refers to is there, is not looked at.
pub fn row(rng: &mut StdRng, schema: &Schema, table: usize) -> Row {
    let table = &schema.tables[table];
    let of_key = if table.key.len() > 1 {
        (schema.width / 2).max(3)
    } else {
        schema.width
    };
    (table.columns.iter().enumerate())
        .map(|(place, column)| match table.key.contains(&place) {
            true => not_null(rng, column.kind, of_key),
            false if table.links.iter().any(|link| link.column == place) => {
                value(rng, column.kind, schema.width)
            }
            false => value(rng, column.kind, (schema.width / 2).max(3)),
        })
        .collect()
}

/// Somebody.
pub fn principal(rng: &mut StdRng, width: i64) -> Principal {
    let few = (width / 2).max(3);
    Principal {
        me: rng.random_range(0..few),
        top: rng.random_range(0..few),
        num: rng.random_range(0..few),
        name: char::from(b'a' + (rng.random_range(0..few) % 26) as u8).to_string(),
        them: (0..rng.random_range(0..4))
            .map(|_| rng.random_range(0..few))
            .collect(),
    }
}

/// A shape; nearly all have subqueries, as many of each depth.
pub fn shape(rng: &mut StdRng, schema: &Schema, name: String) -> Shape {
    let table = rng.random_range(0..schema.tables.len());
    let levels = match rng.random_ratio(1, 15) {
        true => 0,
        false => rng.random_range(1..=LEVELS_MAX),
    };
    let condition = loop {
        let size = rng.random_range(0..3);
        let condition = Generator { rng, schema }.condition(table, levels, size);
        if condition.levels() == levels && condition.subqueries() <= SUBQUERIES_MAX {
            break condition;
        }
    };
    Shape {
        name,
        table,
        condition,
    }
}

struct Generator<'a> {
    rng: &'a mut StdRng,
    schema: &'a Schema,
}

impl Generator<'_> {
    fn kind(&self, table: usize, place: usize) -> Kind {
        self.schema.tables[table].columns[place].kind
    }

    fn column(&mut self, table: usize) -> usize {
        self.rng
            .random_range(0..self.schema.tables[table].columns.len())
    }

    /// A column that can be compared with one of a type.
    fn column_for(&mut self, table: usize, kind: Kind) -> Option<usize> {
        let columns = &self.schema.tables[table].columns;
        let fitting: Vec<usize> = (0..columns.len())
            .filter(|place| columns[*place].kind.goes_with(kind))
            .collect();
        fitting.choose(self.rng).copied()
    }

    fn condition(&mut self, table: usize, levels: usize, size: usize) -> Condition {
        if size == 0 {
            return match levels > 0 && self.rng.random_ratio(2, 3) {
                true => self.subquery(table, levels),
                false => self.simple(table),
            };
        }
        let parts = |generator: &mut Self| {
            let count = generator.rng.random_range(2..4);
            (0..count)
                .map(|_| {
                    let size = generator.rng.random_range(0..size);
                    generator.condition(table, levels, size)
                })
                .collect()
        };
        match self.rng.random_range(0..10) {
            0..4 => Condition::And(parts(self)),
            4..7 => Condition::Or(parts(self)),
            7..9 => Condition::Not(Box::new(self.condition(table, levels, size - 1))),
            _ => {
                let truth = [Truth::True, Truth::False, Truth::Unknown];
                let truth = *truth.choose(self.rng).expect("three");
                let is = self.rng.random_bool(0.5);
                Condition::Is(Box::new(self.condition(table, levels, size - 1)), is, truth)
            }
        }
    }

    fn simple(&mut self, table: usize) -> Condition {
        let place = self.column(table);
        let kind = self.kind(table, place);
        match self.rng.random_range(0..12) {
            0..4 => Condition::Compare(place, Comparison::Equal, Self::param(kind)),
            10.. => self.range(place, kind),
            4 if matches!(kind, Kind::Int4 | Kind::Int8) => Condition::IsAny(place),
            5 => Condition::IsNull(place, self.rng.random_bool(0.5)),
            _ => {
                let comparison = [
                    Comparison::Equal,
                    Comparison::Unequal,
                    Comparison::Less,
                    Comparison::NotGreater,
                    Comparison::Greater,
                    Comparison::NotLess,
                ];
                let comparison = *comparison.choose(self.rng).expect("six");
                let operand = match self.rng.random_range(0..5) {
                    0 => self
                        .column_for(table, kind)
                        .map_or_else(|| Self::param(kind), Operand::Column),
                    1 => Self::param(kind),
                    _ => Operand::Constant(self.constant(kind)),
                };
                Condition::Compare(place, comparison, operand)
            }
        }
    }

    /// Above one parameter, below another, or both.
    fn range(&mut self, place: usize, kind: Kind) -> Condition {
        let mut either = |one, other| {
            if self.rng.random_bool(0.5) {
                one
            } else {
                other
            }
        };
        let low = either(Comparison::Greater, Comparison::NotLess);
        let high = either(Comparison::Less, Comparison::NotGreater);
        let low = Condition::Compare(place, low, Self::param(kind));
        let high = match kind {
            Kind::Int4 | Kind::Int8 => Condition::Compare(place, high, Operand::Top),
            _ => Condition::Compare(place, high, Operand::Constant(self.constant(kind))),
        };
        match self.rng.random_range(0..3) {
            0 => low,
            1 => high,
            _ => Condition::And(vec![low, high]),
        }
    }

    fn constant(&mut self, kind: Kind) -> Value {
        not_null(self.rng, kind, (self.schema.width / 2).max(3))
    }

    /// Of the only type that its uses have.
    fn param(kind: Kind) -> Operand {
        match kind {
            Kind::Int4 | Kind::Int8 => Operand::Me,
            Kind::Numeric => Operand::Num,
            Kind::Text => Operand::Name,
        }
    }

    fn subquery(&mut self, table: usize, levels: usize) -> Condition {
        let inner = self.rng.random_range(0..self.schema.tables.len());
        let is_in = self.rng.random_bool(0.6);
        let correlations = match (is_in, self.rng.random_range(0..10)) {
            (true, 0..8) | (false, 0) => 0,
            (false, 9) => 2,
            _ => 1,
        };
        let correlations = (0..correlations)
            .filter_map(|_| {
                let of_outer = self.column(table);
                let kind = self.kind(table, of_outer);
                Some((self.column_for(inner, kind)?, of_outer))
            })
            .collect();
        let (mut columns, mut left) = (Vec::new(), Vec::new());
        if is_in {
            for _ in 0..*[1, 1, 1, 2, 2, 3].choose(self.rng).expect("six") {
                let place = self.column(inner);
                let kind = self.kind(inner, place);
                let operand = match self.rng.random_range(0..10) {
                    0 => Self::param(kind),
                    1 => Operand::Constant(self.constant(kind)),
                    _ => match self.column_for(table, kind) {
                        Some(column) => Operand::Column(column),
                        None => Self::param(kind),
                    },
                };
                columns.push(place);
                left.push(operand);
            }
        }
        let condition = self.rng.random_ratio(4, 5).then(|| {
            let size = *[0, 0, 1, 1, 2].choose(self.rng).expect("five");
            self.condition(inner, levels - 1, size)
        });
        let mut condition = condition;
        // As memberships have it.
        if self.rng.random_ratio(2, 5) {
            let place = self.column(inner);
            let param = Self::param(self.kind(inner, place));
            let wanted = Condition::Compare(place, Comparison::Equal, param);
            condition = Some(match condition {
                None => wanted,
                Some(Condition::And(mut parts)) => {
                    parts.push(wanted);
                    Condition::And(parts)
                }
                Some(other) => Condition::And(vec![other, wanted]),
            });
        }
        let inner = Box::new(Inner {
            table: inner,
            columns,
            correlations,
            condition,
        });
        match is_in {
            true => Condition::In(left, self.rng.random_bool(0.6), inner),
            false => Condition::Exists(inner),
        }
    }
}
