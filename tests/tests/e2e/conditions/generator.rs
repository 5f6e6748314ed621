//! Random conditions: mostly ones that mean something, and some that mix what does not go together.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Value, json};

mod subqueries;

use super::fixture::{CLASSES, Class, OTHERS, identifier, quote};

/// A condition for us, with parameters, and the same for Postgres, with constants.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// With `$p0`, `$p1`, …
    pub ours: String,
    /// With `'…'` instead: to Postgres both are of a type not known yet.
    pub theirs: String,
    /// What the parameters are.
    pub claims: Map<String, Value>,
}

/// Numbers as SQL has them: each has a type of its own.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "7",
    "100",
    "1.0",
    "0.1",
    "1.5",
    "1e3",
    ".5",
    "5.",
    "32768",
    "2147483647",
    "2147483648",
    "-2147483648",
    "9223372036854775807",
    "-9223372036854775808",
    "9223372036854775808",
    "16777217",
    "0.10000000149011612",
    "1e30",
    "- 7",
    "-(1)",
    "+1",
    "1e400",
    "1e-400",
];

const COMPARISONS: &[&str] = &["=", "<>", "!=", "<", "<=", ">", ">="];

const PATTERNS: &[&str] = &[
    "%", "a%", "%a", "%a%", "_", "__", "a_", "a\\%b", "a\\_b", "\\\\", "%\\\\%", "", "ä", "_%_",
    "%b", "日_", "%!%%", "a\\", "x%y", "%'%", "😀",
];

pub struct Generator<'a> {
    rng: &'a mut StdRng,
    sample: Sample,
    /// How the tables are called whose columns may be named here; the innermost is last.
    scopes: Vec<String>,
    /// So many levels of subqueries may come.
    levels: u32,
}

impl Generator<'_> {
    /// One condition.
    pub fn sample(rng: &mut StdRng) -> Sample {
        let mut generator = Generator::new(rng, 0);
        // What most shapes have, and what routing lives on.
        if generator.chance(1, 6) {
            generator.is_param();
            generator.put(" AND ");
        }
        let depth = generator.rng.random_range(0..4);
        generator.condition(depth);
        generator.sample
    }

    fn is_param(&mut self) {
        let class = self.class();
        self.column(class);
        self.put(" = ");
        let value = *class.values.choose(self.rng).unwrap();
        self.param(value, json!(value));
    }

    fn new(rng: &mut StdRng, levels: u32) -> Generator<'_> {
        Generator {
            rng,
            sample: Sample::default(),
            scopes: vec!["samples".to_owned()],
            levels,
        }
    }

    fn put(&mut self, text: &str) {
        self.sample.ours.push_str(text);
        self.sample.theirs.push_str(text);
    }

    fn one_of<'b>(&mut self, choices: &'b [&'b str]) -> &'b str {
        choices.choose(self.rng).unwrap()
    }

    fn chance(&mut self, numerator: u32, denominator: u32) -> bool {
        self.rng.random_ratio(numerator, denominator)
    }

    /// Parentheses are left out at random: precedence must be Postgres', too.
    fn condition(&mut self, depth: u32) {
        if depth == 0 {
            return self.predicate();
        }
        let parentheses = self.chance(1, 2);
        if parentheses {
            self.put("(");
        }
        match self.rng.random_range(0..6) {
            0 | 1 => {
                self.condition(depth - 1);
                self.put(" AND ");
                self.condition(depth - 1);
            }
            2 | 3 => {
                self.condition(depth - 1);
                self.put(" OR ");
                self.condition(depth - 1);
            }
            4 => {
                self.put("NOT ");
                self.condition(depth - 1);
            }
            _ => {
                if self.chance(1, 2) {
                    self.put("(");
                    self.condition(depth - 1);
                    self.put(")");
                } else {
                    self.condition(depth - 1);
                }
                let test = self.one_of(&[
                    " IS TRUE",
                    " IS NOT TRUE",
                    " IS FALSE",
                    " IS NOT FALSE",
                    " IS UNKNOWN",
                    " IS NOT UNKNOWN",
                    " IS NULL",
                    " IS NOT NULL",
                ]);
                self.put(test);
            }
        }
        if parentheses {
            self.put(")");
        }
    }

    fn class(&mut self) -> &'static Class {
        CLASSES.choose(self.rng).unwrap()
    }

    fn column(&mut self, class: &Class) {
        let name = identifier(self.one_of(class.columns));
        if self.chance(1, 10) {
            let table = self.scopes.last().expect("there is a table").clone();
            self.put(&format!("{table}.{name}"));
        } else {
            self.put(&name);
        }
    }

    fn predicate(&mut self) {
        if self.levels > 0 && self.chance(2, 5) {
            return self.subquery();
        }
        let class = self.class();
        match self.rng.random_range(0..20) {
            0..=6 => {
                let comparison = self.one_of(COMPARISONS);
                if self.chance(1, 5) {
                    self.operand(class);
                    self.put(&format!(" {comparison} "));
                    self.column(class);
                } else {
                    self.column(class);
                    self.put(&format!(" {comparison} "));
                    self.operand(class);
                }
            }
            7 => {
                let comparison = self.one_of(COMPARISONS);
                self.column(class);
                self.put(&format!(" {comparison} "));
                self.column(class);
            }
            8..=10 => self.in_list(class),
            11 => self.between(class),
            12 | 13 => self.like(),
            14 => {
                self.column(class);
                let test = self.one_of(&[" IS NULL", " IS NOT NULL", " ISNULL", " NOTNULL"]);
                self.put(test);
            }
            15 => {
                self.column(class);
                let test = self.one_of(&[" IS DISTINCT FROM ", " IS NOT DISTINCT FROM "]);
                self.put(test);
                self.operand(class);
            }
            16 | 17 => self.quantified(class),
            18 => match self.rng.random_range(0..3) {
                0 => {
                    let flag = self.one_of(&["b", "b2", "TRUE", "FALSE", "NULL", "'yes'"]);
                    self.put(flag);
                }
                1 => {
                    let (column, _, _) = OTHERS.choose(self.rng).unwrap();
                    let test = self.one_of(&[" IS NULL", " IS NOT NULL", " IS DISTINCT FROM NULL"]);
                    self.put(&format!("{column}{test}"));
                }
                _ => self.param("t", json!(true)),
            },
            // Whatever with whatever.
            _ => {
                let other = self.class();
                let comparison = self.one_of(COMPARISONS);
                self.column(class);
                self.put(&format!(" {comparison} "));
                if self.chance(1, 2) {
                    self.column(other);
                } else {
                    self.operand(other);
                }
            }
        }
    }

    fn in_list(&mut self, class: &Class) {
        self.column(class);
        let not = self.one_of(&[" IN (", " NOT IN ("]);
        self.put(not);
        let count = self.rng.random_range(1..5);
        self.commas(count, |generator| match generator.chance(1, 12) {
            true => generator.column(class),
            false => generator.operand(class),
        });
        self.put(")");
    }

    fn between(&mut self, class: &Class) {
        self.column(class);
        let between = self.one_of(&[
            " BETWEEN ",
            " NOT BETWEEN ",
            " BETWEEN SYMMETRIC ",
            " NOT BETWEEN SYMMETRIC ",
        ]);
        self.put(between);
        self.operand(class);
        self.put(" AND ");
        self.operand(class);
    }

    fn like(&mut self) {
        let column = self.one_of(&["t", "t2", "td", "vc", "nm", "c", "'a%b'"]);
        let like = self.one_of(&[" LIKE ", " NOT LIKE "]);
        self.put(&format!("{column}{like}"));
        let pattern = self.one_of(PATTERNS);
        match self.rng.random_range(0..4) {
            0 => self.param(pattern, json!(pattern)),
            1 => self.put(&format!("{}::text", quote(pattern))),
            _ => self.put(&quote(pattern)),
        }
        if self.chance(1, 4) {
            let escape = self.one_of(&["!", "", "\\", "ä"]);
            self.put(&format!(" ESCAPE {}", quote(escape)));
        }
    }

    fn quantified(&mut self, class: &Class) {
        let (comparison, all) = match self.rng.random_range(0..4) {
            0 => ("=", "ANY"),
            1 => ("<>", "ALL"),
            _ => (
                self.one_of(COMPARISONS),
                self.one_of(&["ANY", "ALL", "SOME"]),
            ),
        };
        self.column(class);
        self.put(&format!(" {comparison} {all} ("));
        let count = self.rng.random_range(0..12);
        match self.rng.random_range(0..3) {
            0 => {
                self.put("ARRAY[");
                self.commas(count, |generator| generator.operand(class));
                self.put("]");
                if count == 0 || self.chance(1, 2) {
                    self.put(&format!("::{}[]", class.type_name));
                }
            }
            kind => {
                let mut values: Vec<Option<&str>> = (0..count)
                    .map(|_| Some(*class.values.choose(self.rng).unwrap()))
                    .collect();
                if kind == 1 && self.chance(1, 3) {
                    values.push(None);
                }
                let elements: Vec<String> = values
                    .iter()
                    .map(|value| match value {
                        Some(text) => {
                            format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
                        }
                        None => "NULL".to_owned(),
                    })
                    .collect();
                let literal = format!("{{{}}}", elements.join(","));
                if kind == 1 {
                    self.put(&quote(&literal));
                } else {
                    self.param(&literal, json!(values));
                }
                if self.chance(1, 3) {
                    self.put(&format!("::{}[]", class.type_name));
                }
            }
        }
        self.put(")");
    }

    fn commas(&mut self, count: usize, mut part: impl FnMut(&mut Self)) {
        for index in 0..count {
            if index > 0 {
                self.put(", ");
            }
            part(self);
        }
    }

    /// A constant or parameter that goes with `class`, mostly.
    fn operand(&mut self, class: &Class) {
        let value = *class.values.choose(self.rng).unwrap();
        let is_number = matches!(
            class.type_name,
            "int2" | "integer" | "bigint" | "oid" | "real" | "double precision" | "numeric"
        );
        match self.rng.random_range(0..14) {
            0..=3 if is_number => {
                let number = self.one_of(NUMBERS);
                self.put(number);
            }
            0..=4 => self.put(&quote(value)),
            5 => self.put(&format!("{}::{}", quote(value), class.type_name)),
            6 => self.put(&format!("CAST({} AS {})", quote(value), class.type_name)),
            7 => self.put(&format!("{} {}", class.type_name, quote(value))),
            8 => self.put("NULL"),
            9 if is_number => {
                let number = self.one_of(NUMBERS);
                let type_name =
                    self.one_of(&["int8", "numeric", "float8", "float4", "int4", "int2"]);
                self.put(&format!("{number}::{type_name}"));
            }
            9 if class.type_name == "boolean" => self.put("TRUE"),
            10 => {
                let json = match value.parse::<i64>() {
                    Ok(number) if is_number && self.chance(1, 2) => json!(number),
                    _ => json!(value),
                };
                self.param(value, json);
                self.put(&format!("::{}", class.type_name));
            }
            _ => {
                let json = match value.parse::<i64>() {
                    Ok(number) if is_number && self.chance(1, 2) => json!(number),
                    _ => json!(value),
                };
                self.param(value, json);
            }
        }
    }

    fn param(&mut self, text: &str, value: Value) {
        let name = format!("p{}", self.sample.claims.len());
        self.sample.ours.push_str(&format!("${name}"));
        self.sample.theirs.push_str(&quote(text));
        self.sample.claims.insert(name, value);
    }
}
