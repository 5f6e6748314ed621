//! Tables in which every row is full of canaries, what shapes show of them, and random transactions.
//!
//! A row version has canaries of its own: whatever writes a row writes new ones. `members` and `hidden` are only looked into by
//! conditions; `secret` is a column that most SELECTs leave out.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use super::canary::Canaries;

/// Those that have rows for replicas.
pub const TABLES: [&str; 6] = [
    "projects", "tasks", "comments", "notes", "bookings", "number",
];

/// What may be in `me` and `team` of a token.
pub const PERSONS: i64 = 4;
pub const TEAMS: i64 = 3;

/// Bookings of a team at the beginning; their ids are 100 times the team, and up.
const BOOKINGS: i64 = 4;

/// Rows of each table at most, about.
const ROWS_MAX: i64 = 24;

/// Two rows of `bookings` must not overlap, and Postgres then tells the span of the other one in DETAIL; where CHECK fails, it
/// tells the row with the secret that the trigger gave it. `words` is not published.
const SETUP: &str = "
    CREATE TYPE textrange AS RANGE (subtype = text);
    CREATE TABLE projects (id text PRIMARY KEY, team int NOT NULL, archived bool NOT NULL, name text, secret text);
    CREATE TABLE members (id int PRIMARY KEY, project text REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE,
      person int, word text);
    CREATE TABLE tasks (id text PRIMARY KEY, project text REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE,
      owner int, title text, secret text);
    CREATE TABLE comments (id text PRIMARY KEY, task text REFERENCES tasks ON DELETE CASCADE ON UPDATE CASCADE, body text,
      secret text);
    CREATE TABLE hidden (id int PRIMARY KEY, project text, person int, word text);
    CREATE TABLE notes (id text PRIMARY KEY, project text, body text, secret text);
    CREATE TABLE bookings (id int PRIMARY KEY, team int NOT NULL, span textrange, slot int UNIQUE,
      note text CHECK (note NOT LIKE 'no %'), secret text, EXCLUDE USING gist (span WITH &&));
    CREATE TABLE number (n int PRIMARY KEY);
    CREATE TABLE words (word text);
    INSERT INTO words VALUES ('');
    CREATE FUNCTION secret() RETURNS trigger LANGUAGE plpgsql AS
      'BEGIN NEW.secret := coalesce(NEW.secret, (SELECT word FROM public.words)); RETURN NEW; END';
    CREATE TRIGGER secret BEFORE INSERT ON bookings FOR EACH ROW EXECUTE FUNCTION secret();
    INSERT INTO number VALUES (0);";

/// What a table's shape may be defined as; `$me` and `$team` are of the token.
const DEFINITIONS: [&[&str]; 6] = [
    &[
        "SELECT id, team, name FROM projects WHERE team = $team AND NOT archived",
        "SELECT id, name, secret FROM projects WHERE team = $team AND archived",
        "SELECT id, archived, name FROM projects WHERE NOT archived AND EXISTS \
         (SELECT 1 FROM members m WHERE m.project = projects.id AND m.person = $me)",
    ],
    &[
        "SELECT id, project, owner, title FROM tasks WHERE project IN (SELECT project FROM members WHERE person = $me) \
         OR owner = $me",
        "SELECT id, owner, title FROM tasks WHERE project IN (SELECT id FROM projects WHERE team = $team AND NOT archived)",
        "SELECT id, title, secret FROM tasks WHERE owner = $me",
    ],
    &[
        "SELECT id, task, body FROM comments WHERE EXISTS (SELECT 1 FROM tasks t WHERE t.id = comments.task AND t.project IN \
         (SELECT p.id FROM projects p WHERE (p.id, $me) IN (SELECT m.project, m.person FROM members m)))",
        "SELECT id, body FROM comments WHERE task IN (SELECT id FROM tasks WHERE owner = $me)",
    ],
    &[
        "SELECT id, project, body FROM notes WHERE project NOT IN (SELECT project FROM hidden WHERE person = $me)",
        "SELECT id, body FROM notes WHERE project IN (SELECT id FROM projects WHERE team = $team) AND NOT EXISTS \
         (SELECT 1 FROM hidden h WHERE h.project = notes.project AND h.person = $me)",
    ],
    &["SELECT id, team, span, slot, note FROM bookings WHERE team = $team"],
    &["SELECT * FROM number"],
];

/// Which definition each table has.
#[derive(Clone, Copy, Default)]
pub struct Definitions([usize; TABLES.len()]);

impl Definitions {
    /// Others, of one table at least.
    pub fn change(&mut self, rng: &mut StdRng) {
        let before = self.0;
        while self.0 == before {
            for (chosen, all) in self.0.iter_mut().zip(DEFINITIONS) {
                if rng.random_bool(0.4) {
                    *chosen = rng.random_range(0..all.len());
                }
            }
        }
    }

    /// By table, as the config says it.
    pub fn selects(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let chosen = DEFINITIONS.iter().zip(self.0);
        TABLES
            .into_iter()
            .zip(chosen.map(|(all, place)| all[place]))
    }

    /// The shapes, each of the name of its table.
    pub fn shapes(self) -> toml::Table {
        let shape = |(table, select): (&'static str, &'static str)| {
            let mut shape = toml::Table::new();
            let used = ["me", "team"]
                .into_iter()
                .filter(|name| select.contains(&format!("${name}")));
            let params: toml::Table = used
                .map(|name| {
                    (
                        name.to_owned(),
                        toml::Table::from_iter([("claim".into(), name.into())]).into(),
                    )
                })
                .collect();
            shape.insert("params".into(), params.into());
            shape.insert("tables".into(), vec![toml::Value::from(select)].into());
            shape.insert("writable".into(), (table == "bookings").into());
            (table.to_owned(), shape.into())
        };
        self.selects().map(shape).collect()
    }
}

/// What is written, by whom it does not matter.
pub struct Data<'a> {
    pub rng: &'a mut StdRng,
    pub canaries: &'a mut Canaries,
    /// The transaction; and of a row that is made in it.
    pub number: i64,
    pub next_id: &'a mut i64,
}

impl Data<'_> {
    /// The tables, and rows in them.
    pub fn setup(&mut self) -> String {
        let mut sql = SETUP.to_owned();
        let tables = [
            "projects", "tasks", "members", "comments", "hidden", "notes",
        ];
        for table in tables {
            for _ in 0..ROWS_MAX * 3 / 4 {
                sql += &self.insert(table);
            }
        }
        for team in 1..=TEAMS {
            for id in team * 100..team * 100 + BOOKINGS {
                let (span, note, secret) = (
                    self.span(id),
                    self.canary("bookings.note"),
                    self.canary("bookings.secret"),
                );
                sql += &format!(
                    "INSERT INTO bookings VALUES ({id}, {team}, '{span}', {id}, '{note}', '{secret}');\n"
                );
            }
        }
        sql
    }

    /// The span of a booking, that no other one's overlaps.
    pub fn span(&mut self, id: i64) -> String {
        let canary = self.canary("bookings.span");
        format!("[{id:04}{canary},{id:04}z)")
    }

    pub fn canary(&mut self, of: &str) -> String {
        self.canaries
            .make(self.rng, &format!("{of} in transaction {}", self.number))
    }

    pub fn id(&mut self) -> i64 {
        *self.next_id += 1;
        *self.next_id
    }

    /// The statements of a transaction. It may be undone.
    pub fn transaction(&mut self) -> String {
        let mut sql = String::new();
        for _ in 0..*[1, 1, 2, 3, 4, 8].choose(self.rng).expect("six") {
            match self.rng.random_ratio(1, 10) {
                true => {
                    let undone = self.statement();
                    sql += &format!("SAVEPOINT s; {undone} ROLLBACK TO s;\n");
                }
                false => sql += &self.statement(),
            }
        }
        sql
    }

    /// Many move at once: by memberships, by what is hidden, and by their teams.
    pub fn moves(&mut self) -> String {
        let mut sql = String::new();
        for _ in 0..6 {
            let table = *["members", "members", "hidden", "projects"]
                .choose(self.rng)
                .expect("four");
            sql += &match self.rng.random_range(0..3) {
                0 => self.insert(table),
                1 => self.delete(table),
                _ => self.update(table),
            };
        }
        sql
    }

    /// Rows of all tables that somebody may see by most definitions; and what takes them away again, or gives them to others.
    pub fn visit(&mut self, me: i64, team: i64) -> (String, String) {
        let mut word = |of: &str| self.canary(&format!("{of}, a visitor,"));
        let (project, task, comment) = (word("projects.id"), word("tasks.id"), word("comments.id"));
        let (note, name, title) = (word("notes.id"), word("projects.name"), word("tasks.title"));
        let (body, text, secret) = (
            word("comments.body"),
            word("notes.body"),
            word("tasks.secret"),
        );
        let member = self.id();
        let comes = format!(
            "INSERT INTO projects VALUES ('{project}', {team}, false, '{name}');
             INSERT INTO members VALUES ({member}, '{project}', {me});
             INSERT INTO tasks VALUES ('{task}', '{project}', {me}, '{title}', '{secret}');
             INSERT INTO comments VALUES ('{comment}', '{task}', '{body}');
             INSERT INTO notes VALUES ('{note}', '{project}', '{text}');\n"
        );
        let goes = match self.rng.random() {
            true => format!(
                "DELETE FROM projects WHERE id = '{project}'; DELETE FROM notes WHERE id = '{note}';\n"
            ),
            false => format!(
                "UPDATE projects SET team = team % {TEAMS} + 1 WHERE id = '{project}';
                 UPDATE members SET person = person % {PERSONS} + 1 WHERE id = {member};
                 UPDATE tasks SET owner = owner % {PERSONS} + 1 WHERE id = '{task}';
                 INSERT INTO hidden VALUES ({member}, '{project}', {me});\n"
            ),
        };
        (comes, goes)
    }

    fn statement(&mut self) -> String {
        let tables = [
            "projects", "members", "members", "tasks", "tasks", "comments", "hidden", "notes",
            "bookings",
        ];
        let table = *tables.choose(self.rng).expect("some");
        match self.rng.random_range(0..20) {
            0..6 if table != "bookings" => self.insert(table),
            6..9 if table != "bookings" => self.delete(table),
            9 if table == "members" => format!(
                "TRUNCATE members;\n{}{}",
                self.insert(table),
                self.insert(table)
            ),
            10 if !["members", "hidden", "bookings"].contains(&table) => {
                let (row, key) = (self.row(table), self.canary(&format!("{table}.id")));
                format!("UPDATE {table} SET id = '{key}' WHERE id = {row};\n")
            }
            _ => self.update(table),
        }
    }

    /// A row more, if there are not too many.
    fn insert(&mut self, table: &str) -> String {
        let id = match table {
            "members" | "hidden" => self.id().to_string(),
            _ => format!("'{}'", self.canary(&format!("{table}.id"))),
        };
        let values: Vec<String> = self
            .values(table)
            .into_iter()
            .map(|(_, value)| value)
            .collect();
        format!(
            "INSERT INTO {table} SELECT {id}, {} WHERE (SELECT count(*) FROM {table}) < {ROWS_MAX};\n",
            values.join(", ")
        )
    }

    /// All columns of a row that words are in, and some of the others.
    fn update(&mut self, table: &str) -> String {
        let mut set = self.values(table);
        set.retain(|(column, value)| {
            value.contains("coati") || self.rng.random_bool(0.6) || column == &"person"
        });
        let set: Vec<_> = set
            .iter()
            .map(|(column, value)| format!("{column} = {value}"))
            .collect();
        format!(
            "UPDATE {table} SET {} WHERE id = {};\n",
            set.join(", "),
            self.row(table)
        )
    }

    fn delete(&mut self, table: &str) -> String {
        format!("DELETE FROM {table} WHERE id = {};\n", self.row(table))
    }

    /// The key of any row, or NULL.
    fn row(&mut self, table: &str) -> String {
        let at = self.rng.random_range(0..ROWS_MAX);
        format!("(SELECT id FROM {table} ORDER BY id OFFSET {at} LIMIT 1)")
    }

    /// What columns may be, but for the key.
    fn values(&mut self, table: &str) -> Vec<(&'static str, String)> {
        let mut word = |column: &str| {
            let canary = self.canary(&format!("{table}.{column}"));
            // Some are long, and begin with the word: what SQLite cuts into pages must not cut that.
            match self.rng.random_ratio(1, 20) {
                true => format!("'{canary}' || repeat(' pad', 3000)"),
                false => format!("'{canary}'"),
            }
        };
        let (one, other) = match table {
            "projects" => (word("name"), word("secret")),
            "members" | "hidden" => (word("word"), String::new()),
            "tasks" => (word("title"), word("secret")),
            "comments" => (word("body"), word("secret")),
            "notes" => (word("body"), word("secret")),
            _ => (word("note"), word("secret")),
        };
        let (person, team) = (self.person().to_string(), self.team().to_string());
        let project = match self.rng.random_ratio(1, 12) {
            true => "NULL".into(),
            false => self.row("projects"),
        };
        match table {
            "projects" => vec![
                ("team", team),
                ("archived", self.rng.random_ratio(1, 4).to_string()),
                ("name", one),
                ("secret", other),
            ],
            "members" | "hidden" => vec![("project", project), ("person", person), ("word", one)],
            "tasks" => vec![
                ("project", project),
                ("owner", person),
                ("title", one),
                ("secret", other),
            ],
            "comments" => vec![
                ("task", self.row("tasks")),
                ("body", one),
                ("secret", other),
            ],
            "notes" => vec![("project", project), ("body", one), ("secret", other)],
            _ => vec![("team", team), ("note", one), ("secret", other)],
        }
    }

    pub fn person(&mut self) -> i64 {
        self.rng.random_range(1..=PERSONS)
    }

    pub fn team(&mut self) -> i64 {
        self.rng.random_range(1..=TEAMS)
    }
}
