//! An entry becomes one statement, with its values as parameters. Pure.
//!
//! A statement that touches a row which the transaction did not touch before has the replica's condition in its WHERE:
//! so a row is only changed as long as the replica may see it, whatever others do to it at the same time. What such a
//! statement does not find it refuses by itself, with `anabranch.refuse`, and says whether the row is missing, out of
//! the shape, or not what the program saw. Every table is named with ONLY: what inherits from it is another table.
//!
//! A function that decides (`conflict = { function = … }`) is called as `f(old, new, current)` with rows of the table's
//! type: the current row with the changed columns as the program saw them, as it left them, and as it is. What it
//! returns becomes the row, but for its key; NULL keeps the row as it is. It is not asked about deletes.

use std::{fmt::Write, sync::Arc};

use anabranch_proto::record::ValueRef;

use super::{
    facts::Facts,
    rules::Rule,
    value::{Param, Unwritable, literal, param, text},
};
use crate::{
    postgres::sql::identifier,
    table::Kind,
    write::{Change, Conflict, Set, WriteTable},
};

/// A table as a transaction names it, found in the database.
pub struct Target {
    /// What the replica may do with it.
    pub rule: Arc<Rule>,
    /// What the catalogs say.
    pub facts: Arc<Facts>,
    /// The place in the table of each column that the transaction names.
    pub places: Vec<usize>,
    /// The places in the table of the key, in the transaction's order.
    pub key: Vec<usize>,
}

/// SQL and its parameters.
#[derive(Debug, Default)]
pub struct Sql {
    /// The statement.
    pub text: String,
    /// Its parameters.
    pub params: Vec<Param>,
}

const NO_KEY: Unwritable = Unwritable {
    sqlstate: "23502",
    message: "a column of the key is NULL",
};

impl Sql {
    /// Adds a parameter; how it is written.
    fn bind(
        &mut self,
        target: &Target,
        place: usize,
        value: ValueRef<'_>,
    ) -> Result<String, Unwritable> {
        let column = &target.rule.table.columns[place];
        let type_name = &target.facts.columns[place].type_name;
        // What a byte above 127 looks like since Postgres 16; older ones know it as a number only.
        if column.base_oid == CHAR_OID
            && let ValueRef::Text(text) = value
            && let Some(byte) = octal(text)
        {
            return Ok(format!("({})::pg_catalog.int4::{type_name}", byte as i8));
        }
        self.params.push(param(&column.kind, value)?);
        Ok(format!("${}::{type_name}", self.params.len()))
    }

    /// `t.k0 = $1 AND t.k1 = $2`.
    fn key(&mut self, target: &Target, key: &[ValueRef<'_>]) -> Result<String, Unwritable> {
        let mut condition = String::new();
        for (place, value) in target.key.iter().zip(key) {
            let name = target.name(*place);
            let value = self.bind(target, *place, *value)?;
            let and = if condition.is_empty() { "" } else { " AND " };
            let _ = write!(condition, "{and}t.{name} = {value}");
        }
        Ok(condition)
    }
}

/// OID of `"char"`.
const CHAR_OID: u32 = 18;

fn octal(text: &str) -> Option<u8> {
    let digits = text.strip_prefix('\\').filter(|digits| digits.len() == 3)?;
    u8::from_str_radix(digits, 8)
        .ok()
        .filter(|byte| *byte > 127)
}

impl Target {
    fn name(&self, place: usize) -> String {
        identifier(&self.rule.table.columns[place].name)
    }

    fn kind(&self, place: usize) -> &Kind {
        &self.rule.table.columns[place].kind
    }

    /// Whether the table's key has this column.
    fn is_key(&self, place: usize) -> bool {
        self.key.contains(&place)
    }

    /// The statement for a change; `None`: there is nothing to do. `first`: the transaction did not touch the row yet.
    pub fn statement(
        &self,
        table: &WriteTable,
        change: &Change<'_>,
        first: bool,
    ) -> Result<Option<Sql>, Unwritable> {
        let shown = self.rule.shown().filter(|_| first);
        match change {
            Change::Insert { row } => self.insert(row).map(Some),
            Change::Update { key, set } => {
                let generated =
                    |set: &Set<'_>| self.facts.columns[self.places[set.column]].generated;
                let set: Vec<_> = set.iter().filter(|set| !generated(set)).copied().collect();
                if set.is_empty() {
                    return Ok(None);
                }
                let function = set
                    .iter()
                    .find_map(|set| match &table.conflicts[set.column] {
                        Conflict::Function(name) => Some(name),
                        _ => None,
                    });
                match function {
                    Some(function) => self.merge(function, key, &set, shown),
                    None => self.update(table, key, &set, shown),
                }
                .map(Some)
            }
            Change::Delete { key, old } => {
                let compared = old
                    .iter()
                    .flatten()
                    .enumerate()
                    .filter(|(column, _)| table.conflicts[*column] == Conflict::FirstWrite);
                self.delete(key, compared.map(|(column, old)| (column, *old)), shown)
                    .map(Some)
            }
        }
    }

    fn insert(&self, row: &[ValueRef<'_>]) -> Result<Sql, Unwritable> {
        let mut sql = Sql::default();
        let (mut names, mut values) = (String::new(), String::new());
        let mut overriding = "";
        for (&place, value) in self.places.iter().zip(row) {
            let facts = &self.facts.columns[place];
            let is_null = *value == ValueRef::Null;
            if is_null && self.is_key(place) {
                return Err(NO_KEY);
            }
            // A column that the program left out can't be told from NULL, which this one can't be.
            let left_out = is_null && facts.has_default && self.rule.table.columns[place].not_null;
            if facts.generated || left_out {
                continue;
            }
            if facts.always {
                overriding = " OVERRIDING SYSTEM VALUE";
            }
            let comma = if names.is_empty() { "" } else { ", " };
            let value = sql.bind(self, place, *value)?;
            let _ = write!(names, "{comma}{}", self.name(place));
            let _ = write!(values, "{comma}{value}");
        }
        let table = self.rule.qualified();
        // The key is never left out, so there is at least one column.
        sql.text = format!("INSERT INTO {table} ({names}){overriding} VALUES ({values})");
        Ok(sql)
    }

    fn update(
        &self,
        table: &WriteTable,
        key: &[ValueRef<'_>],
        set: &[Set<'_>],
        shown: Option<&str>,
    ) -> Result<Sql, Unwritable> {
        let mut sql = Sql::default();
        let key = sql.key(self, key)?;
        let mut found = key.clone();
        if let Some(shown) = shown {
            let _ = write!(found, " AND {shown}");
        }
        let (mut assignments, mut compares) = (String::new(), false);
        for set in set {
            let place = self.places[set.column];
            let name = self.name(place);
            let new = sql.bind(self, place, set.new)?;
            let comma = if assignments.is_empty() { "" } else { ", " };
            let _ = write!(assignments, "{comma}{name} = ");
            match (&table.conflicts[set.column], set.old) {
                (Conflict::Add, Some(old)) => {
                    let old = sql.bind(self, place, old)?;
                    let _ = write!(
                        assignments,
                        "CASE WHEN t.{name} IS NULL OR {old} IS NULL OR {new} IS NULL THEN {new} \
                         ELSE t.{name} + ({new} - {old}) END"
                    );
                }
                (Conflict::FirstWrite, Some(old)) => {
                    compares = true;
                    let same = self.same(&mut sql, place, old)?;
                    let _ = write!(found, " AND {same}");
                    assignments += &new;
                }
                _ => assignments += &new,
            }
        }
        let table = self.rule.qualified();
        let why = why(&table, &key, shown, compares);
        // Where a trigger may suppress an update that changes nothing, one that hit nothing is not one that missed.
        let suppressed = if self.facts.suppresses && !compares {
            format!(" AND NOT EXISTS (SELECT FROM ONLY {table} AS t WHERE {found})")
        } else {
            String::new()
        };
        sql.text = format!(
            "WITH changed AS (UPDATE ONLY {table} AS t SET {assignments} WHERE {found} RETURNING 1) \
             SELECT anabranch.refuse({why}, NULL) WHERE NOT EXISTS (SELECT FROM changed){suppressed}"
        );
        Ok(sql)
    }

    fn merge(
        &self,
        function: &str,
        key: &[ValueRef<'_>],
        set: &[Set<'_>],
        shown: Option<&str>,
    ) -> Result<Sql, Unwritable> {
        let mut sql = Sql::default();
        let key = sql.key(self, key)?;
        let (mut old, mut new, mut current) = (Vec::new(), Vec::new(), Vec::new());
        let mut assignments = Vec::new();
        for (name, generated) in &self.facts.row {
            let quoted = identifier(name);
            let now = format!("c.{quoted}");
            let place = (self.rule.table.columns.iter()).position(|column| column.name == *name);
            let set = place.and_then(|place| {
                let set = set.iter().find(|set| self.places[set.column] == place);
                set.map(|set| (place, set))
            });
            let mut written = None;
            match set {
                Some((place, set)) => {
                    let value = sql.bind(self, place, set.new)?;
                    old.push(match set.old {
                        Some(old) => sql.bind(self, place, old)?,
                        None => now.clone(),
                    });
                    written = self.is_key(place).then(|| value.clone());
                    new.push(value);
                }
                None => {
                    old.push(now.clone());
                    new.push(now.clone());
                }
            }
            current.push(now);
            let is_key = place.is_some_and(|place| self.is_key(place));
            let always = place.is_some_and(|place| self.facts.columns[place].always);
            if let Some(value) = written {
                assignments.push(format!("{quoted} = {value}"));
            } else if !is_key && !generated && !always {
                assignments.push(format!("{quoted} = (m.r).{quoted}"));
            }
        }
        let table = self.rule.qualified();
        let row = |values: &[String]| format!("ROW({})::{table}", values.join(", "));
        let found = match shown {
            Some(shown) => format!("{key} AND {shown}"),
            None => key.clone(),
        };
        let function: Vec<_> = function.split('.').map(identifier).collect();
        sql.text = format!(
            "WITH found AS MATERIALIZED (SELECT t.* FROM ONLY {table} AS t WHERE {found} FOR UPDATE), \
             merged AS MATERIALIZED (SELECT {}({}, {}, {}) AS r FROM found AS c), \
             changed AS (UPDATE ONLY {table} AS t SET {} FROM merged AS m WHERE {key} AND NOT (m.r IS NULL)) \
             SELECT anabranch.refuse({}, NULL) WHERE NOT EXISTS (SELECT FROM found)",
            function.join("."),
            row(&old),
            row(&new),
            row(&current),
            assignments.join(", "),
            why(&table, &key, shown, false),
        );
        Ok(sql)
    }

    fn delete<'v>(
        &self,
        key: &[ValueRef<'_>],
        compared: impl Iterator<Item = (usize, ValueRef<'v>)>,
        shown: Option<&str>,
    ) -> Result<Sql, Unwritable> {
        let mut sql = Sql::default();
        let key = sql.key(self, key)?;
        let mut found = key.clone();
        if let Some(shown) = shown {
            let _ = write!(found, " AND {shown}");
        }
        let mut compares = false;
        for (column, old) in compared {
            compares = true;
            let same = self.same(&mut sql, self.places[column], old)?;
            let _ = write!(found, " AND {same}");
        }
        let table = self.rule.qualified();
        sql.text = if shown.is_none() && !compares {
            format!("DELETE FROM ONLY {table} AS t WHERE {key}")
        } else {
            // A row that is not there is as it should be.
            let why = why(&table, &key, shown, compares);
            let hidden = match shown {
                Some(shown) if !compares => format!(" AND NOT {shown}"),
                _ => String::new(),
            };
            format!(
                "WITH gone AS (DELETE FROM ONLY {table} AS t WHERE {found} RETURNING 1) \
                 SELECT anabranch.refuse({why}, NULL) WHERE NOT EXISTS (SELECT FROM gone) \
                 AND EXISTS (SELECT FROM ONLY {table} AS t WHERE {key}{hidden})"
            )
        };
        Ok(sql)
    }

    /// Whether a column is what the program saw.
    fn same(&self, sql: &mut Sql, place: usize, old: ValueRef<'_>) -> Result<String, Unwritable> {
        let name = self.name(place);
        let old = sql.bind(self, place, old)?;
        Ok(match self.kind(place) {
            // The program saw NaN as NULL.
            Kind::Float4 | Kind::Float8 => format!(
                "(t.{name} IS NOT DISTINCT FROM {old} OR {old} IS NULL AND t.{name} = 'NaN')"
            ),
            // Not all of these have an equality.
            Kind::Json | Kind::Other | Kind::Array(..) => {
                format!("t.{name}::pg_catalog.text IS NOT DISTINCT FROM ({old})::pg_catalog.text")
            }
            _ => format!("t.{name} IS NOT DISTINCT FROM {old}"),
        })
    }

    /// The key of the row that a change leaves, if it leaves one: a text for each column.
    pub fn key_after(
        &self,
        table: &WriteTable,
        change: &Change<'_>,
    ) -> Result<Option<Vec<String>>, Unwritable> {
        let Some(values) = key_after(table, change) else {
            return Ok(None);
        };
        let texts = values
            .iter()
            .zip(&self.key)
            .map(|(value, place)| text(self.kind(*place), *value)?.ok_or(NO_KEY));
        texts.collect::<Result<_, _>>().map(Some)
    }

    /// Refuses if a row with one of these keys is not shown; `None`: all rows of the table are.
    pub fn check(&self, keys: &Keys) -> Option<Sql> {
        let shown = self.rule.shown()?;
        let (mut arrays, mut names, mut condition) = (String::new(), String::new(), String::new());
        for (i, &place) in self.key.iter().enumerate() {
            let _ = write!(arrays, ", pg_catalog.unnest(${}::pg_catalog.text[])", i + 2);
            let _ = write!(names, ", k{i}");
            let (and, name) = (if i == 0 { "" } else { " AND " }, self.name(place));
            let type_name = &self.facts.columns[place].type_name;
            let _ = write!(condition, "{and}t.{name} = k.k{i}::{type_name}");
        }
        let table = self.rule.qualified();
        let entries: Vec<_> = keys.0.iter().map(|(entry, _)| entry.to_string()).collect();
        let mut params = vec![literal(entries.iter().map(String::as_str))];
        for i in 0..self.key.len() {
            params.push(literal(keys.0.iter().map(|(_, key)| key[i].as_str())));
        }
        // OFFSET keeps the planner from looking at the whole table, whatever it believes about the arrays.
        Some(Sql {
            text: format!(
                "SELECT anabranch.refuse('out_of_shape', k.entry) \
                 FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.int4[]){arrays}) AS k(entry{names}) \
                 CROSS JOIN LATERAL (SELECT {shown} AS shown FROM ONLY {table} AS t WHERE {condition} OFFSET 0) AS s \
                 WHERE NOT s.shown"
            ),
            params,
        })
    }
}

/// Keys of rows that a transaction left, each with the entry that did.
#[derive(Debug, Default)]
pub struct Keys(pub Vec<(u32, Vec<String>)>);

/// The key of the row that a change leaves, if it leaves one.
pub fn key_after<'a>(table: &WriteTable, change: &Change<'a>) -> Option<Vec<ValueRef<'a>>> {
    match change {
        Change::Insert { row } => Some(table.key.iter().map(|column| row[*column]).collect()),
        Change::Update { key, set } => {
            let value = |(column, before): (&usize, &ValueRef<'a>)| {
                let set = set.iter().find(|set| set.column == *column);
                set.map_or(*before, |set| set.new)
            };
            Some(table.key.iter().zip(key).map(value).collect())
        }
        Change::Delete { .. } => None,
    }
}

/// SQL for why a row was not found.
fn why(table: &str, key: &str, shown: Option<&str>, compares: bool) -> String {
    let otherwise = if compares {
        "conflict"
    } else {
        "update_missing"
    };
    let reason = match shown {
        Some(shown) => {
            format!("CASE WHEN {shown} THEN '{otherwise}' ELSE 'out_of_shape' END")
        }
        None => format!("'{otherwise}'"),
    };
    format!("coalesce((SELECT {reason} FROM ONLY {table} AS t WHERE {key}), 'update_missing')")
}
