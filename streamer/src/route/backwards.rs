//! From a changed row of an inner table to the rows of a SELECT whose answer it may have changed.
//!
//! One step of the walk goes from a row of a subquery's table to the rows that it goes with in the table around it. It is only
//! asked whether the two go together, not what the rest of the condition says; so it may find too many.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use foldhash::fast::RandomState;

use super::{
    BindingId, Inner, Router,
    limits::WALK_BYTES_MAX,
    routes::{Routes, is_known},
    tell::States,
};
use crate::{
    lookup::Error,
    mirror::{Key, Net},
    shape::{Select, Subquery},
    table::{Oid, Table},
};

/// A row that did not change, and the bindings whose answer may have.
pub(super) struct Found {
    pub table: Arc<Table>,
    pub row: Bytes,
    /// Ascending.
    pub bindings: Vec<BindingId>,
}

/// The walks of one transaction.
pub(super) struct Walk<'a> {
    router: &'a Router,
    states: &'a States<'a>,
    /// Rows that changed: they are candidates by themselves, and their own walks begin at them, where they changed in anything
    /// that the subquery reads.
    changed: HashMap<(Oid, &'a Key), &'a Net, RandomState>,
    found: BTreeMap<(Oid, Key), Found>,
    behind: BTreeSet<BindingId>,
    steps: usize,
    /// Of rows that are held.
    bytes: usize,
}

/// One walk: from one changed row.
struct Way<'a> {
    routes: &'a Routes,
    /// The bindings that the rows on the way lead to; `None`: nothing is known of them yet.
    bindings: Option<Vec<BindingId>>,
}

impl<'a> Walk<'a> {
    pub fn new(router: &'a Router, nets: &'a [Net], states: &'a States<'a>) -> Walk<'a> {
        Walk {
            router,
            states,
            changed: (nets.iter().map(|net| ((net.table.oid, &net.key), net))).collect(),
            found: BTreeMap::new(),
            behind: BTreeSet::new(),
            steps: 0,
            bytes: 0,
        }
    }

    /// Walks from a changed row of a subquery's table.
    pub fn start(&mut self, inner: &Inner, net: &Net) -> Result<(), Error> {
        let Some(routes) = self.router.routes(&inner.select) else {
            return Ok(());
        };
        let subquery = &inner.select.subqueries()[inner.step].subquery;
        if is_same(subquery, net)? {
            return Ok(());
        }
        self.states.shares.begin(&inner.select);
        let way = Way {
            routes,
            bindings: None,
        };
        let rows = [net.before.as_deref(), net.after.as_deref()];
        self.step(&way, inner.step, rows)
    }

    /// What was found, and whom there is more for than was looked at.
    pub fn finish(self) -> (BTreeMap<(Oid, Key), Found>, BTreeSet<BindingId>) {
        (self.found, self.behind)
    }

    /// One step backwards, from a row of a step's table as it was and as it is.
    fn step(
        &mut self,
        way: &Way<'a>,
        step: usize,
        [was, is]: [Option<&[u8]>; 2],
    ) -> Result<(), Error> {
        let select: &Select = &way.routes.select;
        let found = &select.subqueries()[step];
        let mut bindings = way.bindings.clone();
        if bindings.is_none()
            && let Some(path) = &found.path
        {
            let mut keys = Vec::new();
            let mut all = true;
            for (row, state) in [(was, &self.states.before), (is, &self.states.now)] {
                if let (Some(row), true) = (row, all) {
                    all = is_known(path.keys_of(row, state, &mut keys, way.routes.keys_max()))?;
                }
            }
            let mut led_to = Vec::new();
            if all {
                way.routes.add_keyed(&keys, &mut led_to);
                led_to.sort_unstable();
                led_to.dedup();
            } else {
                led_to.extend(&way.routes.all);
            }
            bindings = Some(led_to);
        }
        if bindings.as_ref().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        if self.is_too_much() {
            self.give_up(way, bindings.as_deref());
            return Ok(());
        }
        let around = found
            .parent
            .map(|parent| &*select.subqueries()[parent].subquery);
        let outer = around.map_or(&select.table, |around| &around.table);
        let mut rows: HashMap<Key, Bytes, RandomState> = HashMap::default();
        let (mut steps, mut bytes) = (self.steps, self.bytes);
        for row in [was, is.filter(|_| was != is)].into_iter().flatten() {
            // Counted as steps.
            found
                .subquery
                .outer_rows(row, self.states.now.of, &mut |row| {
                    steps += 1;
                    let key = Key::of_row(outer, row)?;
                    let begins = match (self.changed.get(&(outer.oid, &key)), around) {
                        (None, _) => false,
                        (Some(_), None) => true,
                        (Some(net), Some(around)) => !is_same(around, net)?,
                    };
                    if !begins {
                        bytes += row.len();
                        rows.entry(key)
                            .or_insert_with(|| Bytes::copy_from_slice(row));
                    }
                    Ok(steps <= self.router.limits.steps_max && bytes <= WALK_BYTES_MAX)
                })?;
        }
        (self.steps, self.bytes) = (steps, bytes);
        if self.is_too_much() {
            self.give_up(way, bindings.as_deref());
            return Ok(());
        }
        match found.parent {
            Some(parent) => {
                let way = Way {
                    routes: way.routes,
                    bindings,
                };
                for row in rows.into_values() {
                    self.step(&way, parent, [Some(&row), Some(&row)])?;
                }
            }
            None => {
                for (key, row) in rows {
                    if self.is_too_much() {
                        self.give_up(way, bindings.as_deref());
                        return Ok(());
                    }
                    self.arrive(way.routes, key, row, bindings.as_deref())?;
                }
            }
        }
        Ok(())
    }

    /// A row of the SELECT's own table, for these bindings; `None`: for those that it leads to by itself.
    fn arrive(
        &mut self,
        routes: &Routes,
        key: Key,
        row: Bytes,
        bindings: Option<&[BindingId]>,
    ) -> Result<(), Error> {
        let mut all = match bindings {
            Some(bindings) => bindings.to_vec(),
            None => {
                let mut all = Vec::new();
                let led = routes.find(Some(&row), &self.states.before, &mut all)?
                    && routes.find(Some(&row), &self.states.now, &mut all)?;
                if !led {
                    all.extend(&routes.all);
                }
                all
            }
        };
        let table = &routes.select.table;
        let found = self.found.entry((table.oid, key)).or_insert_with(|| Found {
            table: table.clone(),
            row,
            bindings: Vec::new(),
        });
        self.steps += all.len();
        found.bindings.append(&mut all);
        found.bindings.sort_unstable();
        found.bindings.dedup();
        Ok(())
    }

    fn is_too_much(&self) -> bool {
        self.steps > self.router.limits.steps_max || self.bytes > WALK_BYTES_MAX
    }

    fn give_up(&mut self, way: &Way<'_>, bindings: Option<&[BindingId]>) {
        match bindings {
            Some(bindings) => self.behind.extend(bindings),
            None => self.behind.extend(&way.routes.all),
        }
    }
}

/// Whether a row of a subquery's table changed in nothing that the subquery reads.
fn is_same(subquery: &Subquery, net: &Net) -> Result<bool, Error> {
    match (&net.before, &net.after) {
        (Some(was), Some(is)) => Ok(subquery.same(was, is)?),
        _ => Ok(false),
    }
}
