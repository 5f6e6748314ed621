//! Tables with policies and grants, and what programs write to them, by chance.

use anabranch_proto::record::ValueRef;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::writer::fixture::{Made, delete, insert, update};

/// What all tables have, in their order.
pub const COLUMNS: [&str; 6] = ["id", "owner", "team", "note", "n", "d"];

/// `d` has a default and may be NULL: what a program writes there is never left out.
const D: usize = 5;

/// Ids that are in use, or may be.
const IDS: i64 = 12;

/// Conditions of shapes.
const SHOWN: &[&str] = &[
    "team IN (1, 2)",
    "owner = 'edge-1'",
    "n < 7 AND NOT team = 3",
    "id < 8 OR note IS NULL",
    "d IS NOT NULL AND team = 1 OR n = 5",
];

/// A value of SQLite.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Integer(i64),
    Text(String),
}

/// What a program does to one row.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    Insert(Vec<Value>),
    Update {
        id: i64,
        /// By place.
        set: Vec<(usize, Value)>,
    },
    Delete {
        id: i64,
    },
}

impl Value {
    pub fn of(&self) -> ValueRef<'_> {
        match self {
            Value::Null => ValueRef::Null,
            Value::Integer(value) => ValueRef::Integer(*value),
            Value::Text(text) => ValueRef::Text(text),
        }
    }

    /// As a literal, for SQLite and Postgres.
    pub fn literal(&self) -> String {
        match self {
            Value::Null => "NULL".into(),
            Value::Integer(value) => value.to_string(),
            Value::Text(text) => format!("'{}'", text.replace('\'', "''")),
        }
    }
}

impl Write {
    /// As an entry. `masks` holds the masks.
    pub fn made<'a>(&'a self, mask: &'a str) -> Made<'a> {
        match self {
            Write::Insert(row) => insert(0, &row.iter().map(Value::of).collect::<Vec<_>>()),
            Write::Update { id, set } => {
                let values: Vec<_> = set.iter().map(|(_, value)| value.of()).collect();
                update(0, &[ValueRef::Integer(*id)], mask, &values)
            }
            Write::Delete { id } => delete(0, &[ValueRef::Integer(*id)]),
        }
    }

    /// Which columns an UPDATE sets.
    pub fn mask(&self) -> String {
        let Write::Update { set, .. } = self else {
            return String::new();
        };
        let bit = |place| {
            if set.iter().any(|(set, _)| *set == place) {
                '1'
            } else {
                '0'
            }
        };
        (0..COLUMNS.len()).map(bit).collect()
    }

    /// As somebody would write it; `and` is more for its WHERE. What a program leaves out is NULL in its file, so NULL is
    /// left out here, but where Postgres would put something else.
    pub fn sql(&self, table: &str, and: &str) -> String {
        match self {
            Write::Insert(row) => {
                let named = (0..).zip(row);
                let named = named.filter(|(place, value)| **value != Value::Null || *place == D);
                let (names, values): (Vec<_>, Vec<_>) = named
                    .map(|(place, value): (usize, _)| (COLUMNS[place], value.literal()))
                    .unzip();
                let (names, values) = (names.join(", "), values.join(", "));
                format!("INSERT INTO {table} ({names}) VALUES ({values})")
            }
            Write::Update { id, set } => {
                let set = set
                    .iter()
                    .map(|(place, value)| format!("{} = {}", COLUMNS[*place], value.literal()));
                let set: Vec<_> = set.collect();
                format!("UPDATE {table} SET {} WHERE id = {id}{and}", set.join(", "))
            }
            Write::Delete { id } => format!("DELETE FROM {table} WHERE id = {id}{and}"),
        }
    }
}

/// Makes one kind after another.
pub struct Generator {
    rng: StdRng,
}

impl Generator {
    pub fn new(rng: StdRng) -> Generator {
        Generator { rng }
    }

    fn one_of(&mut self, of: u32) -> bool {
        self.rng.random_range(0..of) == 0
    }

    fn pick(&mut self, some: &[&'static str]) -> &'static str {
        some.choose(&mut self.rng).unwrap()
    }

    /// The condition of a shape.
    pub fn shown(&mut self) -> &'static str {
        self.pick(SHOWN)
    }

    /// SQL that makes a table, fills it, and says who may do what with it. `{t}` is the table, `{app}` who writes,
    /// `{login}` who logs in to write.
    pub fn table(&mut self) -> String {
        let mut sql = "CREATE TABLE {t} (id int PRIMARY KEY, owner text, team int, \
             note text UNIQUE DEFERRABLE INITIALLY DEFERRED, n int NOT NULL DEFAULT 5 CHECK (n < 10), d text DEFAULT 'd');\n"
            .to_owned();
        for id in 1..=IDS {
            if !self.one_of(3) {
                let mut row = self.row(id);
                // What the constraints allow.
                row[3] = Value::Text(format!("note {id}"));
                row[4] = Value::Integer(self.rng.random_range(0..10));
                sql += &format!("{};\n", Write::Insert(row).sql("{t}", ""));
            }
        }
        sql += "GRANT SELECT ON {t} TO {login};\n";
        if !self.one_of(6) {
            sql += "ALTER TABLE {t} ENABLE ROW LEVEL SECURITY;\n\
                    CREATE POLICY looks ON {t} FOR SELECT TO {login} USING (true);\n";
        }
        if self.one_of(2) {
            sql += "CREATE POLICY wide ON {t} TO {app} USING (true);\n";
        }
        for number in 0..self.rng.random_range(1..5) {
            sql += &self.policy(number);
        }
        sql + &self.grants()
    }

    fn policy(&mut self, number: u32) -> String {
        let kind = self.pick(&["PERMISSIVE", "PERMISSIVE", "PERMISSIVE", "RESTRICTIVE"]);
        let command = self.pick(&[
            "ALL", "ALL", "SELECT", "INSERT", "UPDATE", "UPDATE", "DELETE",
        ]);
        let to = self.pick(&["{app}", "{app}", "PUBLIC"]);
        let mut sql = format!("CREATE POLICY p{number} ON {{t}} AS {kind} FOR {command} TO {to}");
        if command != "INSERT" {
            sql += &format!(" USING ({})", self.condition(2));
        }
        let checks = matches!(command, "ALL" | "UPDATE") && self.one_of(2);
        if command == "INSERT" || checks {
            sql += &format!(" WITH CHECK ({})", self.condition(2));
        }
        // One that is also the login role's would keep it from seeing what it must.
        sql.replace(
            "RESTRICTIVE FOR ALL TO PUBLIC",
            "RESTRICTIVE FOR ALL TO {app}",
        )
        .replace(
            "RESTRICTIVE FOR SELECT TO PUBLIC",
            "RESTRICTIVE FOR SELECT TO {app}",
        ) + ";\n"
    }

    fn condition(&mut self, depth: u32) -> String {
        if depth == 0 || self.one_of(2) {
            let some = [
                "true",
                "owner = current_setting('request.jwt.claims')::json->>'sub'",
                "team = (current_setting('request.jwt.claims')::json->>'team')::int",
                "team IN (SELECT m.team FROM public.members m WHERE m.who = current_setting('request.jwt.claims')::json->>'sub')",
                "team <> 3",
                "n > 3",
                "n BETWEEN 2 AND 8",
                "note IS NOT NULL",
                "id % 2 = 0",
                "current_user = '{bare app}'",
                "session_user = '{bare login}'",
                "pg_has_role({quoted app}, 'USAGE')",
            ];
            return self.pick(&some).to_owned();
        }
        let (a, b) = (self.condition(depth - 1), self.condition(depth - 1));
        match self.rng.random_range(0..5) {
            0 => format!("NOT ({a})"),
            1 | 2 => format!("({a}) AND ({b})"),
            _ => format!("({a}) OR ({b})"),
        }
    }

    /// On all of it, or on some columns.
    fn grants(&mut self) -> String {
        if self.one_of(2) {
            return "GRANT ALL ON {t} TO {app};\n".into();
        }
        let mut sql = String::new();
        for right in ["SELECT", "INSERT", "UPDATE"] {
            match self.rng.random_range(0..7) {
                0 => continue,
                1..4 => sql += &format!("GRANT {right} ON {{t}} TO {{app}};\n"),
                _ => {
                    let mut columns = COLUMNS.to_vec();
                    columns.retain(|column| match *column {
                        "id" => !self.one_of(8),
                        _ => !self.one_of(3),
                    });
                    if !columns.is_empty() {
                        let columns = columns.join(", ");
                        sql += &format!("GRANT {right} ({columns}) ON {{t}} TO {{app}};\n");
                    }
                }
            }
        }
        if !self.one_of(4) {
            sql += "GRANT DELETE ON {t} TO {app};\n";
        }
        sql
    }

    fn row(&mut self, id: i64) -> Vec<Value> {
        let rest = (1..COLUMNS.len()).map(|place| self.value(place));
        let mut row: Vec<_> = rest.collect();
        row.insert(0, Value::Integer(id));
        row
    }

    fn value(&mut self, place: usize) -> Value {
        let text = |text: &str| Value::Text(text.to_owned());
        match place {
            0 => Value::Integer(self.rng.random_range(1..=IDS)),
            _ if self.one_of(5) => Value::Null,
            1 => text(self.pick(&["edge-1", "edge-1", "edge-2"])),
            2 => Value::Integer(self.rng.random_range(1..4)),
            3 => Value::Text(format!("note {}", self.rng.random_range(0..60))),
            4 => Value::Integer(self.rng.random_range(0..11)),
            _ => text(self.pick(&["d", "e"])),
        }
    }

    /// What one transaction does.
    pub fn writes(&mut self) -> Vec<Write> {
        let count = *[1, 1, 1, 2, 3].choose(&mut self.rng).unwrap();
        let mut writes = Vec::new();
        let (mut there, mut gone): (Vec<i64>, Vec<i64>) = Default::default();
        while writes.len() < count {
            // What it wrote before it writes again; what it took away no program can write.
            let again = there.choose(&mut self.rng).copied();
            let id = match again.filter(|_| self.one_of(2)) {
                Some(id) => id,
                None => self.rng.random_range(1..=IDS),
            };
            let write = self.write(id);
            if gone.contains(&id) && !matches!(write, Write::Insert(_)) {
                continue;
            }
            there.retain(|there| *there != id);
            gone.retain(|gone| *gone != id);
            match &write {
                Write::Insert(_) => there.push(id),
                Write::Delete { .. } => gone.push(id),
                Write::Update { set, .. } => match set.first() {
                    Some((0, Value::Integer(after))) if *after != id => {
                        gone.push(id);
                        gone.retain(|gone| gone != after);
                        there.push(*after);
                    }
                    _ => there.push(id),
                },
            }
            writes.push(write);
        }
        writes
    }

    fn write(&mut self, id: i64) -> Write {
        match self.rng.random_range(0..10) {
            0..3 => Write::Insert(self.row(id)),
            3..8 => {
                let mut places = vec![self.rng.random_range(1..COLUMNS.len())];
                if self.one_of(2) {
                    places.push(self.rng.random_range(1..COLUMNS.len()));
                }
                if self.one_of(5) {
                    places.push(0);
                }
                places.sort_unstable();
                places.dedup();
                let set = places.into_iter().map(|place| (place, self.value(place)));
                let set = set.collect();
                Write::Update { id, set }
            }
            _ => Write::Delete { id },
        }
    }
}
