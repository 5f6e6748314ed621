//! The SQL of the triggers, and of the tables that they write to.
//!
//! What it relies on of SQLite is pinned by tests (`tests/facts`):
//!
//! - The newest trigger fires first. So ours see a row before a program's AFTER triggers go on from it, and entries are in
//!   the order in which rows changed.
//! - What a BEFORE trigger did stays when the row is then skipped (OR IGNORE, a program's RAISE(IGNORE)). So BEFORE only
//!   saves what is there, which is harmless; what happened is told by AFTER.
//! - An OR clause of the outer statement overrides those in a trigger. So there are none: conditions are in the WHERE.
//!   RAISE(ABORT) is not overridden.
//! - A row that REPLACE deletes fires DELETE triggers with `recursive_triggers` only. So BEFORE notes in the table of prior
//!   rows what is at the new key, and AFTER compares. Where a DELETE trigger did fire, it left the id of its entry there: an
//!   INSERT takes that entry back, so that it is one `update` in both cases; an UPDATE finds that it need not write
//!   it.
//! - `UPDATE OF id` does not fire for `SET rowid = …`. So it is not used.
//! - A BEFORE INSERT trigger sees −1 where an integer key is left out, as if it were given. So −1 is noted as well, and AFTER
//!   sees that another key came of it.
//! - A comparison of a column without affinity (`k0 ANY`) with a column that has one can't use an index. `+` takes the
//!   affinity away.
//!
//! What a program's BEFORE triggers do to the very row that is being written, SQLite calls undefined. Then entries still end
//! in the row that the table holds, but old values may be of before that trigger; and an INSERT OR REPLACE whose own
//! BEFORE INSERT trigger inserts the same key is two `insert` entries.

use std::fmt::Write;

use super::{Captured, key, quiet::NESTED};
use crate::file::{
    leases,
    names::{self, literal, quote},
};

/// Columns that are compared in one row value: an AND for each would nest deeper than SQLite allows.
const COMPARED_COLUMNS_MAX: usize = 100;

/// Columns whose marks are joined without parentheses, for the same reason.
const MARKED_COLUMNS_MAX: usize = 30;

/// What `entry` of a prior row is where there is no row, and the key was −1 or left out.
const NO_ROW: i64 = -1;

/// The time, as timestamps are written.
const NOW: &str = "strftime('%Y-%m-%d %H:%M:%f000Z', 'now')";

/// A program writes.
const BY_PROGRAM: &str = "total_changes() >= 0";

/// A trigger of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trigger {
    pub name: String,
    /// As SQLite keeps it.
    pub sql: String,
}

/// What all names of triggers on synced tables begin with. None is the beginning of another.
const NAMES: [&str; 14] = [
    "insert_before",
    "insert_after",
    "update_before",
    "update_after",
    "move_before",
    "move_after",
    "delete_before",
    "delete_after",
    "refuse_insert",
    "refuse_update",
    "refuse_delete",
    "guard_insert",
    "guard_update",
    "guard_delete",
];

/// The names of all triggers that we may ever have on a table.
pub(super) fn names(table: &str) -> impl Iterator<Item = String> {
    NAMES.iter().map(move |what| name(what, table))
}

fn name(what: &str, table: &str) -> String {
    format!("_anabranch_{what}_{table}")
}

/// The triggers of a table, in the order in which they are to be made.
pub(super) fn all(captured: &Captured, guarded: bool) -> Vec<Trigger> {
    let sql = Sql::new(captured);
    let mut all = match &captured.refusal {
        None => sql.capture(),
        Some(why) => sql.refuse(why),
    };
    // Last, so that they fire first.
    if guarded {
        all.extend(sql.guards());
    }
    all
}

/// Keeps the count of entries from being deleted: without it nothing could be captured.
pub(super) const HEAD_GUARD: (&str, &str) = (
    "_anabranch_head_guard",
    "CREATE TRIGGER \"_anabranch_head_guard\" BEFORE DELETE ON \"_anabranch_head\" WHEN total_changes() >= 0 BEGIN \
     SELECT RAISE(ABORT, 'anabranch: _anabranch_head is the replica''s own'); END",
);

/// The table of prior rows, and its SQL as SQLite keeps it.
pub(super) fn prior(captured: &Captured) -> (String, String) {
    let keys = captured.key.len();
    let any = |prefix: &str, count: usize| list(count, |i| format!("{prefix}{i} ANY"));
    let name = names::prior(&captured.table);
    let sql = format!(
        "CREATE TABLE {}({}, entry INTEGER, {}, PRIMARY KEY({})) STRICT, WITHOUT ROWID",
        quote(&name),
        any("k", keys),
        any("v", captured.columns.len()),
        list(keys, |i| format!("k{i}")),
    );
    (name, sql)
}

fn list(count: usize, one: impl FnMut(usize) -> String) -> String {
    list_by(count, ", ", one)
}

fn list_by(count: usize, between: &str, one: impl FnMut(usize) -> String) -> String {
    (0..count).map(one).collect::<Vec<_>>().join(between)
}

/// OLD or NEW.
type Row = &'static str;
const OLD: Row = "OLD";
const NEW: Row = "NEW";

struct Sql<'c> {
    captured: &'c Captured,
    /// Quoted.
    table: String,
    entries: String,
    base: String,
    prior: String,
    /// Column names, quoted.
    columns: Vec<String>,
}

impl<'c> Sql<'c> {
    fn new(captured: &'c Captured) -> Sql<'c> {
        let table = &captured.table;
        Sql {
            captured,
            table: quote(table),
            entries: quote(&names::entries(table)),
            base: quote(&names::base_rows(table)),
            prior: quote(&names::prior(table)),
            columns: captured
                .columns
                .iter()
                .map(|column| quote(&column.name))
                .collect(),
        }
    }

    // The triggers

    fn capture(&self) -> Vec<Trigger> {
        let changed = format!(
            "{BY_PROGRAM} AND ({})",
            self.differ(&self.values(OLD), &self.values(NEW))
        );
        let moved = format!(
            "{BY_PROGRAM} AND ({})",
            self.differ(&self.key(OLD), &self.key(NEW))
        );
        vec![
            self.trigger(
                "insert_before",
                "BEFORE INSERT",
                BY_PROGRAM,
                &self.before_insert(),
            ),
            self.trigger(
                "insert_after",
                "AFTER INSERT",
                BY_PROGRAM,
                &self.after_insert(),
            ),
            self.trigger(
                "update_before",
                "BEFORE UPDATE",
                &changed,
                &[self.save(OLD)],
            ),
            self.trigger(
                "update_after",
                "AFTER UPDATE",
                &changed,
                &self.after_update(),
            ),
            self.trigger("move_before", "BEFORE UPDATE", &moved, &self.before_move()),
            // Newer than `update_after`: the row that was in the way goes first.
            self.trigger("move_after", "AFTER UPDATE", &moved, &self.after_move()),
            self.trigger(
                "delete_before",
                "BEFORE DELETE",
                BY_PROGRAM,
                &[self.save(OLD)],
            ),
            self.trigger(
                "delete_after",
                "AFTER DELETE",
                BY_PROGRAM,
                &self.after_delete(),
            ),
        ]
    }

    fn refuse(&self, why: &str) -> Vec<Trigger> {
        let raise = [raise(why)];
        let refuse = |what, when| self.trigger(what, when, BY_PROGRAM, &raise);
        vec![
            refuse("refuse_insert", "BEFORE INSERT"),
            refuse("refuse_update", "BEFORE UPDATE"),
            refuse("refuse_delete", "BEFORE DELETE"),
        ]
    }

    fn guards(&self) -> Vec<Trigger> {
        let when = format!("total_changes() = {NESTED}");
        let ignore = ["SELECT RAISE(IGNORE)".to_owned()];
        let guard = |what, event| self.trigger(what, event, &when, &ignore);
        vec![
            guard("guard_insert", "BEFORE INSERT"),
            guard("guard_update", "BEFORE UPDATE"),
            guard("guard_delete", "BEFORE DELETE"),
        ]
    }

    fn trigger(&self, what: &str, event: &str, when: &str, steps: &[String]) -> Trigger {
        let name = name(what, &self.captured.table);
        let mut sql = format!(
            "CREATE TRIGGER {} {event} ON {} WHEN {when} BEGIN ",
            quote(&name),
            self.table
        );
        for step in steps {
            let _ = write!(sql, "{step}; ");
        }
        sql.push_str("END");
        Trigger { name, sql }
    }

    // What they do

    fn before_insert(&self) -> Vec<String> {
        let mut steps = self.check_key();
        steps.extend(self.save_at_new_key());
        if self.captured.is_rowid {
            let prior = &self.prior;
            steps.push(format!(
                "DELETE FROM {prior} WHERE k0 = -1 AND +{} <> -1",
                self.key(NEW)[0]
            ));
            steps.push(format!(
                "INSERT INTO {prior}(k0, entry) SELECT -1, {NO_ROW} WHERE +{} = -1 \
                 AND NOT EXISTS (SELECT 1 FROM {prior} WHERE k0 = -1)",
                self.key(NEW)[0]
            ));
        }
        steps
    }

    fn after_insert(&self) -> Vec<String> {
        let (prior, entries) = (&self.prior, &self.entries);
        let here = self.at(NEW);
        let found = format!("{here} AND entry IS NOT {NO_ROW}");
        let (before, after) = (self.prior_values(), self.values(NEW));
        let mut steps = Vec::new();
        if self.captured.is_rowid {
            let key = &self.key(NEW)[0];
            steps.push(format!(
                "{} WHERE +{key} <> -1 AND (EXISTS (SELECT 1 FROM {prior} WHERE k0 = -1) \
                 OR NOT EXISTS (SELECT 1 FROM {} WHERE k0 = +{key}))",
                raise(&self.captured.id_missing()),
                self.base
            ));
        }
        steps.extend([
            format!(
                "UPDATE _anabranch_head SET last = last + 1 WHERE NOT EXISTS (SELECT 1 FROM {prior} WHERE {found} \
                 AND NOT ({}))",
                self.differ(&before, &after)
            ),
            self.entry("insert", &self.all_marks('1'), &[], &after, "", &format!(
                "NOT EXISTS (SELECT 1 FROM {prior} WHERE {found})"
            )),
            self.entry(
                "update",
                &self.marks(&before, &after),
                &self.where_changed(&before, &after, &before),
                &self.where_changed(&before, &after, &after),
                &format!(", {prior}"),
                &format!("{found} AND ({})", self.differ(&before, &after)),
            ),
            format!("DELETE FROM {entries} WHERE id = (SELECT entry FROM {prior} WHERE {here})"),
            format!("DELETE FROM {prior} WHERE {here}"),
        ]);
        steps.extend(self.take_id());
        steps
    }

    fn after_update(&self) -> Vec<String> {
        let (before, after) = (self.values(OLD), self.values(NEW));
        vec![
            "UPDATE _anabranch_head SET last = last + 1".to_owned(),
            self.entry(
                "update",
                &self.marks(&before, &after),
                &self.where_changed(&before, &after, &before),
                &self.where_changed(&before, &after, &after),
                "",
                "",
            ),
            // An INSERT of this key may be waiting for a program's trigger, of which this is a part.
            format!(
                "UPDATE {} SET {} WHERE {}",
                self.prior,
                list(after.len(), |i| format!("v{i} = {}", after[i])),
                self.at(NEW)
            ),
        ]
    }

    fn before_move(&self) -> Vec<String> {
        let mut steps = self.check_key();
        steps.extend(self.save_at_new_key());
        steps
    }

    /// A row was at the new key, and no DELETE trigger fired for it.
    fn after_move(&self) -> Vec<String> {
        let prior = &self.prior;
        let replaced = format!("{} AND entry IS NULL", self.at(NEW));
        let mut steps = vec![
            format!(
                "UPDATE _anabranch_head SET last = last + 1 WHERE EXISTS (SELECT 1 FROM {prior} WHERE {replaced})"
            ),
            self.entry(
                "delete",
                &self.all_marks('0'),
                &self.prior_values(),
                &[],
                &format!(", {prior}"),
                &replaced,
            ),
            format!("DELETE FROM {prior} WHERE {}", self.at(NEW)),
            format!("DELETE FROM {prior} WHERE {}", self.at(OLD)),
        ];
        steps.extend(self.take_id());
        steps
    }

    fn after_delete(&self) -> Vec<String> {
        vec![
            "UPDATE _anabranch_head SET last = last + 1".to_owned(),
            self.entry(
                "delete",
                &self.all_marks('0'),
                &self.values(OLD),
                &[],
                "",
                "",
            ),
            format!(
                "UPDATE {} SET entry = (SELECT last FROM _anabranch_head) WHERE {}",
                self.prior,
                self.at(OLD)
            ),
        ]
    }

    // Their parts

    /// The new key is not offered again.
    fn take_id(&self) -> Option<String> {
        let table = literal(&self.captured.table);
        (self.captured.is_leased).then(|| leases::take(&table, &self.key(NEW)[0]))
    }

    /// Refuses a new key that is not spelled as Postgres does it.
    fn check_key(&self) -> Vec<String> {
        self.captured
            .key
            .iter()
            .filter_map(|&place| {
                let column = &self.captured.columns[place];
                let value = format!("NEW.{}", self.columns[place]);
                let (condition, form) = key::spelled(&column.postgres_type, &value)?;
                let message = format!(
                    "anabranch: the key column {} of {} is a {}, and must be written {form}",
                    column.name, self.captured.table, column.postgres_type
                );
                Some(format!("{} WHERE NOT {condition}", raise(&message)))
            })
            .collect()
    }

    /// Saves the base row of a row that is there.
    fn save(&self, row: Row) -> String {
        let (keys, columns) = (self.captured.key.len(), self.columns.len());
        format!(
            "INSERT INTO {}({}, present, {}) SELECT {}, 1, {} WHERE NOT EXISTS (SELECT 1 FROM {0} WHERE {})",
            self.base,
            list(keys, |i| format!("k{i}")),
            list(columns, |i| format!("v{i}")),
            self.key(row).join(", "),
            self.values(row).join(", "),
            self.at(row)
        )
    }

    /// Saves what is at the new key, or that nothing is; and notes it as the prior row.
    fn save_at_new_key(&self) -> Vec<String> {
        let (keys, columns) = (self.captured.key.len(), self.columns.len());
        let (base, prior, table) = (&self.base, &self.prior, &self.table);
        let k = list(keys, |i| format!("k{i}"));
        let v = list(columns, |i| format!("v{i}"));
        let key = self.key(NEW).join(", ");
        let row = list(columns, |i| format!("r.{}", self.columns[i]));
        let is_key = self.by_key(" AND ", |place, _| {
            format!("r.{0} = NEW.{0}", self.columns[place])
        });
        let is_known = format!("EXISTS (SELECT 1 FROM {base} WHERE {})", self.at(NEW));
        // Without this, a key that is NULL would be refused in the name of a table of ours.
        let is_there = self.by_key(" AND ", |place, _| {
            format!("NEW.{} IS NOT NULL", self.columns[place])
        });
        vec![
            format!(
                "INSERT INTO {base}({k}, present, {v}) SELECT {key}, 1, {row} FROM {table} AS r \
                 WHERE {is_key} AND NOT {is_known}"
            ),
            format!(
                "INSERT INTO {base}({k}, present) SELECT {key}, 0 WHERE {is_there} AND NOT {is_known}"
            ),
            format!("DELETE FROM {prior} WHERE {}", self.at(NEW)),
            format!(
                "INSERT INTO {prior}({k}, {v}) SELECT {key}, {row} FROM {table} AS r WHERE {is_key}"
            ),
        ]
    }

    /// Writes an entry with the newest id. `old` and `new` have a value for each column, or none.
    fn entry(
        &self,
        operation: &str,
        marks: &str,
        old: &[String],
        new: &[String],
        from: &str,
        when: &str,
    ) -> String {
        let mut into = String::from("id, operation, captured_time, changed");
        let mut values = format!("last, '{operation}', {NOW}, {marks}");
        for (prefix, row) in [('o', old), ('n', new)] {
            for (i, value) in row.iter().enumerate() {
                let _ = write!(into, ", {prefix}{i}");
                let _ = write!(values, ", {value}");
            }
        }
        let when = if when.is_empty() {
            String::new()
        } else {
            format!(" WHERE {when}")
        };
        format!(
            "INSERT INTO {}({into}) SELECT {values} FROM _anabranch_head{from}{when}",
            self.entries
        )
    }

    fn by_key(&self, between: &str, one: impl Fn(usize, usize) -> String) -> String {
        list_by(self.captured.key.len(), between, |i| {
            one(self.captured.key[i], i)
        })
    }

    /// The condition that finds a key in the tables of base and prior rows.
    fn at(&self, row: Row) -> String {
        self.by_key(" AND ", |place, i| {
            format!("k{i} = +{row}.{}", self.columns[place])
        })
    }

    fn key(&self, row: Row) -> Vec<String> {
        self.captured
            .key
            .iter()
            .map(|&place| format!("{row}.{}", self.columns[place]))
            .collect()
    }

    fn values(&self, row: Row) -> Vec<String> {
        self.columns
            .iter()
            .map(|column| format!("{row}.{column}"))
            .collect()
    }

    fn prior_values(&self) -> Vec<String> {
        (0..self.columns.len()).map(|i| format!("v{i}")).collect()
    }

    /// The condition that two rows differ.
    fn differ(&self, left: &[String], right: &[String]) -> String {
        left.chunks(COMPARED_COLUMNS_MAX)
            .zip(right.chunks(COMPARED_COLUMNS_MAX))
            .map(|(left, right)| match (left, right) {
                ([left], [right]) => format!("{left} IS NOT {right}"),
                _ => format!("({}) IS NOT ({})", left.join(", "), right.join(", ")),
            })
            .collect::<Vec<_>>()
            .join(" OR ")
    }

    fn all_marks(&self, mark: char) -> String {
        literal(&mark.to_string().repeat(self.columns.len()))
    }

    /// The text that tells which columns changed.
    fn marks(&self, before: &[String], after: &[String]) -> String {
        let marks: Vec<String> = before
            .iter()
            .zip(after)
            .map(|(before, after)| format!("({before} IS NOT {after})"))
            .collect();
        let groups = marks
            .chunks(MARKED_COLUMNS_MAX)
            .map(|group| group.join(" || "));
        // One mark alone would be an integer.
        format!("'' || ({})", groups.collect::<Vec<_>>().join(") || ("))
    }

    /// The values of columns that changed, and of the key; NULL for the others.
    fn where_changed(&self, before: &[String], after: &[String], values: &[String]) -> Vec<String> {
        (0..values.len())
            .map(|i| match self.captured.key.contains(&i) {
                true => values[i].clone(),
                false => format!(
                    "CASE WHEN {} IS NOT {} THEN {} END",
                    before[i], after[i], values[i]
                ),
            })
            .collect()
    }
}

fn raise(message: &str) -> String {
    format!("SELECT RAISE(ABORT, {})", literal(message))
}
