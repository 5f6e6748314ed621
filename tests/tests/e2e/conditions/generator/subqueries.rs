//! Random subqueries: IN and EXISTS, of one column and of several, correlated and not, in each other.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use super::{
    super::fixture::{CLASSES, Class, INNER, identifier},
    Generator, Sample,
};

/// Classes whose values Postgres compares with each other.
const RELATED: &[&[&str]] = &[
    &["int2", "integer", "bigint", "numeric"],
    &["text", "name"],
    &["timestamp", "date"],
];

impl Generator<'_> {
    /// One condition that has a subquery.
    pub fn with_subqueries(rng: &mut StdRng) -> Sample {
        let levels = rng.random_range(1..4);
        let mut generator = Generator::new(rng, levels);
        match generator.rng.random_range(0..4) {
            // What most shapes are.
            0 => generator.subquery(),
            1 => {
                generator.subquery();
                let and = generator.one_of(&[" AND ", " OR "]);
                generator.put(and);
                let depth = generator.rng.random_range(0..2);
                generator.put("(");
                generator.condition(depth);
                generator.put(")");
            }
            _ => {
                let not = generator.one_of(&["NOT (", "(", ""]);
                generator.put(not);
                generator.subquery();
                if !not.is_empty() {
                    generator.put(")");
                    let test = generator.one_of(&[
                        "",
                        " IS TRUE",
                        " IS NOT TRUE",
                        " IS FALSE",
                        " IS UNKNOWN",
                        " IS NOT UNKNOWN",
                    ]);
                    generator.put(test);
                }
                let or = generator.one_of(&[" OR ", " AND "]);
                generator.put(or);
                let depth = generator.rng.random_range(0..3);
                generator.put("(");
                generator.condition(depth);
                generator.put(")");
            }
        }
        generator.sample
    }

    pub(super) fn subquery(&mut self) {
        if self.chance(1, 3) {
            if self.chance(1, 2) {
                self.put("NOT ");
            }
            self.put("EXISTS (SELECT ");
            let chosen = self.one_of(&["", "1", "*", "id, t", "NULL, *"]);
            self.put(chosen);
            self.from(1);
            return;
        }
        let columns = match self.rng.random_range(0..10) {
            0..=6 => 1,
            7 | 8 => 2,
            _ => 3,
        };
        let classes: Vec<&Class> = (0..columns).map(|_| self.compared()).collect();
        if columns > 1 {
            self.put("(");
        }
        for (place, class) in classes.iter().enumerate() {
            if place > 0 {
                self.put(", ");
            }
            if self.chance(3, 4) {
                let class = self.related(class);
                self.column(class);
            } else {
                self.operand(class);
            }
        }
        if columns > 1 {
            self.put(")");
        }
        let operator = self.one_of(&["IN", "IN", "NOT IN", "NOT IN", "= ANY", "= SOME", "<> ALL"]);
        self.put(&format!(" {operator} (SELECT "));
        for (place, class) in classes.iter().enumerate() {
            if place > 0 {
                self.put(", ");
            }
            let column = identifier(self.one_of(class.columns));
            self.put(&column);
        }
        self.from(0);
    }

    /// From FROM to the parenthesis, with `least` correlations or more.
    fn from(&mut self, least: usize) {
        let alias = format!("s{}", self.scopes.len());
        // The largest is rare.
        let table = match INNER.choose(self.rng) {
            Some((name, _)) if !self.chance(1, 10) => identifier(name),
            _ => "samples".to_owned(),
        };
        self.put(&format!(" FROM {table}"));
        let name = if self.scopes.contains(&table) || self.chance(1, 2) {
            self.put(&format!(" {alias}"));
            alias
        } else {
            table
        };
        let outer = self.scopes.last().expect("there is a table").clone();
        self.scopes.push(name);
        self.levels -= 1;
        let correlations = self
            .rng
            .random_range(0..3)
            .max(least * self.rng.random_range(0..2));
        let mut and = " WHERE ";
        for _ in 0..correlations {
            self.put(and);
            self.correlation(&outer);
            and = " AND ";
        }
        if self.chance(1, 3) {
            self.put(and);
            self.is_param();
            and = " AND ";
        }
        if self.levels > 0 || self.chance(1, 2) {
            self.put(and);
            self.put("(");
            let depth = self.rng.random_range(0..3);
            self.condition(depth);
            self.put(")");
        }
        self.put(")");
        self.levels += 1;
        self.scopes.pop();
    }

    fn correlation(&mut self, outer: &str) {
        let class = self.compared();
        let own = identifier(self.one_of(class.columns));
        let own = match self.scopes.last() {
            Some(name) if self.rng.random_ratio(1, 2) => format!("{name}.{own}"),
            _ => own,
        };
        let other = self.related(class);
        // Often of the same column, as rows of the inner tables are like those of the outer one.
        let other = match own.rsplit('.').next() {
            Some(same) if self.chance(1, 2) => format!("{outer}.{same}"),
            _ => format!("{outer}.{}", identifier(self.one_of(other.columns))),
        };
        if self.chance(1, 2) {
            self.put(&format!("{own} = {other}"));
        } else {
            self.put(&format!("{other} = {own}"));
        }
    }

    /// Floats are refused, so they are rare.
    fn compared(&mut self) -> &'static Class {
        loop {
            let class = self.class();
            let is_float = matches!(class.type_name, "real" | "double precision");
            if !is_float || self.chance(1, 20) {
                return class;
            }
        }
    }

    /// The class, or one that compares with it, or rarely any other.
    fn related(&mut self, class: &'static Class) -> &'static Class {
        if self.chance(1, 40) {
            return self.class();
        }
        let related = RELATED
            .iter()
            .find(|related| related.contains(&class.type_name));
        match related {
            Some(related) if self.rng.random_ratio(1, 2) => {
                let name = related.choose(self.rng).expect("there are some");
                let found = CLASSES.iter().find(|class| class.type_name == *name);
                found.expect("it is a class")
            }
            _ => class,
        }
    }
}
