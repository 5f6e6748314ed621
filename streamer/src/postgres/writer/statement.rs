//! An entry becomes one statement, with its values as parameters. Pure.
//!
//! A statement that touches a row which the transaction did not touch before has the replica's condition in its WHERE:
//! so a row is only changed as long as the replica may see it, whatever others do to it at the same time. One that touches
//! it again may change what the transaction itself wrote there (`xmin`) too: not whatever is there by then, as a
//! trigger may have put the write elsewhere. (A role that has rights to columns only can't read `xmin`. For it the row is
//! found by its key alone, where the transaction wrote it and nothing can have put it elsewhere.) Where a foreign key that
//! cascades can change the key, even `xmin` proves nothing, and a row must be shown each time it is touched. What such a
//! statement does not find it refuses by itself, with `anabranch.refuse`. A row that the replica is not shown is not there
//! for it, so nothing tells it apart from one that is missing: an UPDATE of either is `update_missing`, a DELETE of
//! either has nothing to do, and only a row that is shown can be a `conflict`. (A key that is taken by a row outside of
//! the shapes shows by the INSERT that fails, as it does under Postgres' row-level security: no answer hides that.)
//! Every table is named with ONLY: what inherits from it is another table.
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

/// What the table of an entry is called in its statements, and so in the condition of the replica.
pub const TABLE: &str = "t";

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

/// Whether the transaction touched a row before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It did not.
    First,
    /// It did, and the row may be its own, or not.
    Again,
    /// It did, and the row is its own.
    Own,
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

const ROUNDED: Unwritable = Unwritable {
    sqlstate: "22003",
    message: "a number of more than 15 digits can't be the base of a sum: SQLite rounds it",
};

/// Digits of a decimal that survive SQLite's arithmetic, which is in doubles.
const EXACT_DIGITS: usize = 15;

/// Whether SQLite's arithmetic on a decimal (a text) may have rounded, so that a difference from it is not exact.
fn is_rounded(value: ValueRef<'_>) -> bool {
    let ValueRef::Text(text) = value else {
        return false;
    };
    let digits = text.bytes().filter(u8::is_ascii_digit);
    let digits = digits.skip_while(|digit| *digit == b'0').count();
    digits > EXACT_DIGITS || text.bytes().any(|byte| matches!(byte, b'e' | b'E'))
}

/// Whether there is a difference from it: NaN and the infinities swallow all that is added.
fn is_finite(value: ValueRef<'_>) -> bool {
    !matches!(value, ValueRef::Text(text) if text.bytes().any(|byte| matches!(byte, b'N' | b'n' | b'I' | b'i')))
}

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

    /// What a statement that touches a row again may find there, if an entry before it left one (`there`).
    pub fn again(&self, table: &WriteTable, there: bool) -> Touch {
        if self.facts.cascades {
            return Touch::First;
        }
        let decides = |conflict: &Conflict| matches!(conflict, Conflict::Function(_));
        let is_sure = there && !self.facts.diverts && !table.conflicts.iter().any(decides);
        if is_sure && !self.facts.reads_xmin {
            Touch::Own
        } else {
            Touch::Again
        }
    }

    /// The statement for a change; `None`: there is nothing to do.
    pub fn statement(
        &self,
        table: &WriteTable,
        change: &Change<'_>,
        touch: Touch,
    ) -> Result<Option<Sql>, Unwritable> {
        let shown = self.rule.shown().and_then(|shown| match touch {
            Touch::First => Some(shown.to_owned()),
            Touch::Own => None,
            Touch::Again => Some(format!(
                "({shown} OR t.xmin = pg_catalog.pg_current_xact_id()::pg_catalog.xid)"
            )),
        });
        let shown = shown.as_deref();
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
            // A column that the program left out can't be told from NULL. This one can't be NULL; or its default is not in
            // the replica's file; or it would be NULL anyway, and the role may not name it.
            let left_out = is_null
                && if facts.has_default {
                    facts.is_filled_in || self.rule.table.columns[place].not_null
                } else {
                    !facts.insertable
                };
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
        let mut found = shown_of(&key, shown);
        let (mut assignments, mut compares) = (String::new(), false);
        for set in set {
            let place = self.places[set.column];
            let name = self.name(place);
            let new = sql.bind(self, place, set.new)?;
            let comma = if assignments.is_empty() { "" } else { ", " };
            let _ = write!(assignments, "{comma}{name} = ");
            match (&table.conflicts[set.column], set.old) {
                (Conflict::Add, Some(old)) if is_finite(old) && is_finite(set.new) => {
                    if [old, set.new].into_iter().any(is_rounded) {
                        return Err(ROUNDED);
                    }
                    let old = sql.bind(self, place, old)?;
                    // Not in the column's type: the difference of two that fit into it may not.
                    let _ = write!(
                        assignments,
                        "CASE WHEN t.{name} IS NULL OR {old} IS NULL OR {new} IS NULL THEN {new} \
                         ELSE t.{name} + ({new}::pg_catalog.numeric - {old}::pg_catalog.numeric) END"
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
        let why = why(&table, &shown_of(&key, shown), compares);
        // Where a trigger may suppress an update that changes nothing, one that hit nothing is not one that missed. By the
        // lock it is the row as it is that counts: the statement's snapshot has one, too, that went while it waited.
        let suppressed = if self.facts.suppresses && !compares {
            format!(
                " AND NOT EXISTS (SELECT FROM ONLY {table} AS t WHERE {found} FOR NO KEY UPDATE)"
            )
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
        let found = shown_of(&key, shown);
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
            why(&table, &found, false),
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
        let seen = shown_of(&key, shown);
        let (mut found, mut compares) = (seen.clone(), false);
        for (column, old) in compared {
            compares = true;
            let same = self.same(&mut sql, self.places[column], old)?;
            let _ = write!(found, " AND {same}");
        }
        let table = self.rule.qualified();
        // A row that is not there, or not for the replica, is as it should be.
        sql.text = if compares {
            format!(
                "WITH gone AS (DELETE FROM ONLY {table} AS t WHERE {found} RETURNING 1) \
                 SELECT anabranch.refuse('conflict', NULL) WHERE NOT EXISTS (SELECT FROM gone) \
                 AND EXISTS (SELECT FROM ONLY {table} AS t WHERE {seen})"
            )
        } else {
            format!("DELETE FROM ONLY {table} AS t WHERE {found}")
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

    /// Refuses unless the rows with these keys are shown; `None`: all rows of the table are. It runs as the login role.
    ///
    /// What is not seen is refused too: a policy may hide it from the login role, or a trigger may have put it where we
    /// do not look, and then nobody knows whether it left the shape.
    pub fn check(&self, left: &[Left]) -> Option<Sql> {
        let shown = self.rule.shown()?;
        let mut condition = String::new();
        for (i, &place) in self.key.iter().enumerate() {
            let (and, name) = (if i == 0 { "" } else { " AND " }, self.name(place));
            let type_name = &self.facts.columns[place].type_name;
            let _ = write!(condition, "{and}t.{name} = k.k{i}::{type_name}");
        }
        let (keys, params) = keys(left, self.key.len());
        let table = self.rule.qualified();
        // Scalar subqueries are only run when a row is not seen: hardly ever.
        let oid = format!("{}::pg_catalog.oid", self.rule.table.oid);
        let active = format!("(SELECT pg_catalog.row_security_active({oid}))");
        let shows = format!(
            "(SELECT EXISTS (SELECT FROM pg_catalog.pg_policy y WHERE y.polrelid = {oid} AND y.polpermissive \
             AND y.polcmd IN ('r', '*') AND EXISTS (SELECT FROM pg_catalog.unnest(y.polroles) AS r(oid) \
                 WHERE CASE WHEN r.oid = 0 THEN true ELSE pg_catalog.pg_has_role(r.oid, 'USAGE') END)))"
        );
        // OFFSET keeps the planner from looking at the whole table, whatever it believes about the arrays.
        Some(Sql {
            text: format!(
                "SELECT anabranch.refuse(CASE WHEN s.shown IS NOT NULL THEN '{OUT_OF_SHAPE}' \
                     WHEN NOT {active} THEN '{GONE}' WHEN {shows} THEN '{HIDDEN}' ELSE '{UNREADABLE}' END, k.entry) \
                 FROM {keys} \
                 LEFT JOIN LATERAL (SELECT {shown} AS shown FROM ONLY {table} AS t WHERE {condition} OFFSET 0) AS s ON true \
                 WHERE s.shown IS NOT TRUE AND (k.there OR s.shown IS NOT NULL OR {active} AND NOT {shows})"
            ),
            params,
        })
    }
}

/// SQL for the keys, as a table `k`, and its parameters. A single one has no arrays: Postgres would plan the statement anew
/// each time, as it does not know how long they are, and that takes five times as long as to run it.
fn keys(left: &[Left], columns: usize) -> (String, Vec<Param>) {
    let there = |left: &Left| if left.there { "t" } else { "f" };
    if let [one] = left {
        let mut params = vec![
            Param::Text(one.entry.to_string()),
            Param::Text(there(one).to_owned()),
        ];
        params.extend(one.key.iter().cloned().map(Param::Text));
        let names: String = (0..columns)
            .map(|i| format!(", ${}::pg_catalog.text AS k{i}", i + 3))
            .collect();
        let keys = format!(
            "(SELECT $1::pg_catalog.int4 AS entry, $2::pg_catalog.bool AS there{names}) AS k"
        );
        return (keys, params);
    }
    let entries: Vec<_> = left.iter().map(|left| left.entry.to_string()).collect();
    let mut params = vec![
        literal(entries.iter().map(String::as_str)),
        literal(left.iter().map(there)),
    ];
    let (mut arrays, mut names) = (String::new(), String::new());
    for i in 0..columns {
        let _ = write!(arrays, ", pg_catalog.unnest(${}::pg_catalog.text[])", i + 3);
        let _ = write!(names, ", k{i}");
        params.push(literal(left.iter().map(|left| left.key[i].as_str())));
    }
    let keys = format!(
        "ROWS FROM (pg_catalog.unnest($1::pg_catalog.int4[]), pg_catalog.unnest($2::pg_catalog.bool[]){arrays}) \
         AS k(entry, there{names})"
    );
    (keys, params)
}

/// Seen, and not shown.
pub const OUT_OF_SHAPE: &str = "out_of_shape";
/// Not seen, where nothing hides rows from the login role: a trigger or a rule removed it, or put it elsewhere.
pub const GONE: &str = "gone";
/// Not seen, where policies show the login role some rows.
pub const HIDDEN: &str = "hidden";
/// Not seen, where row-level security shows the login role no row whatever.
pub const UNREADABLE: &str = "unreadable";

/// A key that a transaction wrote at, as its last entry there leaves it.
#[derive(Debug)]
pub struct Left {
    /// The entry.
    pub entry: u32,
    /// A text for each column.
    pub key: Vec<String>,
    /// A row must be there. Else the transaction had written it before, and then took it away: a trigger may have kept it.
    pub there: bool,
}

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

/// SQL for rows of this key that the replica is shown.
fn shown_of(key: &str, shown: Option<&str>) -> String {
    match shown {
        Some(shown) => format!("{key} AND {shown}"),
        None => key.to_owned(),
    }
}

/// SQL for why a row was not found. `seen`: the row, if the replica is shown it.
fn why(table: &str, seen: &str, compares: bool) -> String {
    if compares {
        format!(
            "CASE WHEN EXISTS (SELECT FROM ONLY {table} AS t WHERE {seen}) THEN 'conflict' ELSE 'update_missing' END"
        )
    } else {
        "'update_missing'".to_owned()
    }
}
