//! Rows that did not change, of which a condition may say something else since another table's rows did.
//!
//! It is found as for a live transaction (see `route::backwards`), for all that changed since the replica's position at once: from
//! each changed inner row, as it was before each change and as it is now, backwards to the rows that it goes with *now*. An
//! outer row that changed as well needs none of this, as it is looked at for its own sake; so those are enough.
//!
//! What an inner row was leads to those of the replica's SELECTs only that its own values lead to. Through further inner rows
//! it is not followed: they may have been others then.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{add_inner_tables, of_rows};
use crate::{
    lookup::{Error as LookupError, Lookup, Nothing},
    mirror::{Error, Key, Reader},
    shape::{Bound, Subquery},
    table::Table,
};

/// Rows that are looked at in one round, at most: less than a second's work.
pub(super) const LOOKED_MAX: usize = 50_000;

/// How far the changes of inner tables were gone through.
#[derive(Debug)]
pub(super) struct Noted {
    /// All up to this transaction.
    upto: i64,
    /// And, of those up to another one: the tables before this place, and of that table the keys up to this one.
    pass: Option<Pass>,
}

/// Rows that were looked at in this round.
struct Looked {
    rows: usize,
    max: usize,
}

#[derive(Debug)]
struct Pass {
    upto: i64,
    table: usize,
    after: Option<Key>,
}

impl Noted {
    /// Nothing yet, and nothing is asked of what was before.
    pub fn since(ordinal: i64) -> Noted {
        Noted {
            upto: ordinal,
            pass: None,
        }
    }

    /// Goes on, in the changes that the reader has collected up to `now`, the last of its snapshot. `items` are the replica's
    /// bound SELECTs, by item. False: not through yet.
    pub fn go_on(
        &mut self,
        reader: &Reader,
        items: &[&[Bound]],
        now: i64,
        looked_max: usize,
    ) -> Result<bool, Error> {
        let mut tables = Vec::new();
        for bounds in items {
            add_inner_tables(bounds, &mut tables);
        }
        let mut looked = Looked {
            rows: 0,
            max: looked_max,
        };
        while self.upto < now {
            let pass = self.pass.get_or_insert(Pass {
                upto: now,
                table: 0,
                after: None,
            });
            while let Some(table) = tables.get(pass.table) {
                let between = (self.upto, pass.upto);
                let stopped = note_all(reader, items, table, between, pass, &mut looked)?;
                if stopped {
                    return Ok(false);
                }
                (pass.table, pass.after) = (pass.table + 1, None);
            }
            self.upto = pass.upto;
            self.pass = None;
        }
        Ok(true)
    }
}

/// Goes through what was changed of one table. True: stopped, behind `pass.after`.
fn note_all(
    reader: &Reader,
    items: &[&[Bound]],
    table: &Table,
    between: (i64, i64),
    pass: &mut Pass,
    looked: &mut Looked,
) -> Result<bool, Error> {
    let now = reader.now()?;
    let last = reader.snapshot()?.last;
    let mut changes: Vec<(Key, i64)> = Vec::new();
    let mut stopped = false;
    // Read first, as what is noted is written to where it is read from.
    reader.changes_between(table.oid, between, pass.after.as_ref(), |key, ordinal| {
        // Changes of one key stay together.
        if changes.len() >= looked.max && changes.last().is_some_and(|(other, _)| *other != key) {
            stopped = true;
            return Ok(false);
        }
        changes.push((key, ordinal));
        Ok(true)
    })?;
    for of_key in changes.chunk_by(|(one, _), (other, _)| one == other) {
        let key = &of_key[0].0;
        if looked.rows > looked.max {
            return Ok(true);
        }
        let mut states = Vec::with_capacity(of_key.len() + 1);
        for (_, ordinal) in of_key {
            if let Some(old) = reader.old(table, *ordinal, key)? {
                states.push((old, *ordinal));
            }
        }
        if let Some(row) = reader.row(table.oid, key)? {
            // Whatever a range is as of, it is from before now.
            states.push((row, last));
        }
        let was_always_there = states.len() == of_key.len() + 1;
        for (item, bounds) in items.iter().enumerate() {
            let mut affected = BTreeSet::new();
            for bound in *bounds {
                for (step, found) in bound.select.subqueries().iter().enumerate() {
                    if found.subquery.table.oid != table.oid
                        || (was_always_there && same(&found.subquery, &states)?)
                    {
                        continue;
                    }
                    for (row, ordinal) in &states {
                        looked.rows += 1;
                        let climbed = climb(bound, step, row, &now, &mut looked.rows, &mut |key| {
                            affected.insert((key, *ordinal));
                        });
                        climbed.map_err(|error| of_rows(table, error))?;
                    }
                }
            }
            for (key, ordinal) in affected {
                reader.note_affected(item, &key, ordinal)?;
            }
        }
        pass.after = Some(key.clone());
    }
    Ok(stopped)
}

/// Whether a row was the same all the time, in all that decides what a subquery says.
fn same(subquery: &Subquery, states: &[(Bytes, i64)]) -> Result<bool, Error> {
    for pair in states.windows(2) {
        let same = subquery.same(&pair[0].0, &pair[1].0);
        if !same.map_err(|error| of_rows(&subquery.table, error.into()))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// From a row of a step's inner table to the keys of the SELECT's rows that it may concern.
fn climb(
    bound: &Bound,
    step: usize,
    row: &[u8],
    now: &dyn Lookup,
    looked: &mut usize,
    each: &mut dyn FnMut(Key),
) -> Result<(), LookupError> {
    let steps = bound.select.subqueries();
    let found = &steps[step];
    if let Some(path) = found.path.as_ref().filter(|path| path.is_direct()) {
        let mut keys = Vec::new();
        path.keys_of(row, &Nothing, &mut keys, usize::MAX)?;
        if !keys.iter().any(|key| bound.has_route_key(key)) {
            return Ok(());
        }
    }
    let mut rows: Vec<Vec<u8>> = Vec::new();
    found.subquery.outer_rows(row, now, &mut |outer| {
        *looked += 1;
        match found.parent {
            Some(_) => rows.push(outer.to_vec()),
            None => each(Key::of_row(&bound.select.table, outer)?),
        }
        Ok(true)
    })?;
    if let Some(parent) = found.parent {
        for row in rows {
            climb(bound, parent, &row, now, looked, each)?;
        }
    }
    Ok(())
}
