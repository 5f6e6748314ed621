//! Which sessions does a transaction concern, and what are they told?
//!
//! The index finds *candidates*: rows that may be told of, and for each the bound SELECTs that may have it. It may find
//! too many, never too few. Whether a row is in a shape is decided by [`Bound::contains`] alone, in the state before the
//! transaction and in the one after it, and what follows by [`delta`](crate::delta).
//!
//! - A row that changed is a candidate. Its bound SELECTs are found by hashing: for a conjunct `column = $param` the row's
//!   value, old and new; through a subquery the values of the inner rows that it leads to. For `column > $param` and the like,
//!   by the order of the parameters (`intervals`). SELECTs without such a way are looked at one by one.
//! - A row that did not change is one if an inner row did that may decide its answer. Then the way is walked *backwards*
//!   ([`backwards`]): from the inner row, as it was and as it is, to the rows that it goes with, and on to those of the
//!   SELECT. Only those bound SELECTs are asked that the inner row leads to as well, if it tells anything of their parameters.
//!
//! Why no transaction is missed: an answer changes only if the row changes, or an inner row that goes with it. A row that went
//! with another one only because one of the two was changed is found by the changed one's old values; so it is enough to
//! look for rows that did *not* change in the state after the transaction.
//!
//! Sessions with the same SELECT bound to the same values share one [`Binding`]: it is evaluated once for them all, and what a
//! subquery says is found out once in each of the two states, whoever asks. What is too much for one transaction is not
//! routed, and its sessions catch up: rows to be looked at ([`Limits::steps_max`], `WALK_BYTES_MAX`), and rows that conditions
//! read to be evaluated ([`Limits::reads_max`]), of which each SELECT has its part, so that one that is dear leaves the others'
//! alone; bound SELECTs that are asked one after the other ([`Limits::scans_max`]); and what is told ([`Limits::ops_max`]).

mod backwards;
mod few;
mod intervals;
mod limits;
mod routes;
mod tell;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use foldhash::fast::RandomState;

pub use self::limits::{Limits, OPS_MAX, READS_MAX, SCANS_MAX, STEPS_MAX};
use self::{
    backwards::{Found, Walk},
    few::Few,
    limits::Shares,
    routes::Routes,
    tell::{Candidate, States, Told, concern},
};
use crate::{
    delta::Op,
    lookup::{Answers, Error, Lookup, Moment},
    mirror::Net,
    shape::{Bound, Select},
    table::Oid,
};

type Map<K, V> = HashMap<K, V, RandomState>;

/// A connected session.
pub type SessionId = u64;

/// Who subscribed to what.
#[derive(Default)]
pub struct Router {
    /// As by default, but in tests.
    pub limits: Limits,
    tables: Map<Oid, Vec<Routes>>,
    /// Tables that subqueries read: of which SELECTs, over which tables, as which of their steps.
    inner: Map<Oid, Vec<Inner>>,
    bindings: Map<[u8; 16], BindingId>,
    slots: Vec<Option<Binding>>,
    free: Vec<BindingId>,
    sessions: Map<SessionId, Vec<BindingId>>,
}

type BindingId = usize;

/// One SELECT, bound to values, and the sessions that have it.
struct Binding {
    bound: Bound,
    sessions: Few<SessionId>,
}

/// A subquery of a SELECT.
struct Inner {
    select: Arc<Select>,
    step: usize,
}

/// What one transaction means to one session: ops on its tables.
pub type Ops = Vec<(Oid, Op)>;

/// What one transaction means to all.
#[derive(Default)]
pub struct Routed {
    /// To each session that it concerns.
    pub ops: Map<SessionId, Ops>,
    /// To these it means more than was found out: they must catch up. What there is in `ops` for them is a part.
    pub behind: BTreeSet<SessionId>,
    /// How many ops there are.
    told: usize,
}

impl Router {
    /// A session gets, from here on, what its bound SELECTs show.
    pub fn add(&mut self, session: SessionId, bounds: &[Bound]) {
        self.remove(session);
        let mut held = Vec::with_capacity(bounds.len());
        for bound in bounds {
            let id = self.binding(bound);
            let binding = self.slots[id].as_mut().expect("just found or made");
            if binding.sessions.insert(session) {
                held.push(id);
            }
        }
        self.sessions.insert(session, held);
    }

    /// A session is gone.
    pub fn remove(&mut self, session: SessionId) {
        for id in self.sessions.remove(&session).unwrap_or_default() {
            let binding = self.slots[id].as_mut().expect("held by the session");
            binding.sessions.remove(session);
            if binding.sessions.is_empty() {
                self.forget(id);
            }
        }
    }

    /// The sessions that have any of these tables, or whose conditions read one.
    pub fn sessions_of(&self, tables: &[Oid]) -> Vec<SessionId> {
        let outer = tables.iter().filter_map(|table| self.tables.get(table));
        let inner = tables.iter().filter_map(|table| self.inner.get(table));
        let inner = inner
            .flatten()
            .filter_map(|inner| self.routes(&inner.select));
        let mut sessions: Vec<_> = outer
            .flatten()
            .chain(inner)
            .flat_map(|routes| &routes.all)
            .filter_map(|id| self.slots[*id].as_ref())
            .flat_map(|binding| binding.sessions.iter())
            .collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// Adds the sessions that may see this row of a table, in order: too many, never too few. Only for SELECTs that do not look
    /// into other tables.
    pub fn may_see(&self, table: Oid, row: &[u8], found: &mut Vec<SessionId>) -> Result<(), Error> {
        let mut bindings = Vec::new();
        for routes in self.tables.get(&table).into_iter().flatten() {
            if !routes.find(Some(row), &crate::lookup::Nothing, &mut bindings)? {
                bindings.extend(routes.all.iter());
            }
        }
        for id in bindings {
            found.extend(self.slots[id].as_ref().expect("indexed").sessions.iter());
        }
        found.sort_unstable();
        found.dedup();
        Ok(())
    }

    /// Whether any condition looks into other tables, so that [`Router::route`] looks for their rows.
    pub fn looks_into_others(&self) -> bool {
        !self.inner.is_empty()
    }

    /// What a transaction means to each session that it concerns. `nets` is all that it did; `before` and `now` are the states
    /// before it and after it.
    pub fn route(
        &self,
        nets: &[Net],
        before: &dyn Lookup,
        now: &dyn Lookup,
    ) -> Result<Routed, Error> {
        let mut routed = Routed::default();
        let shares = Shares::new(&self.limits, self.readers(nets));
        let answers = [(); 2].map(|()| Answers::new(self.limits.answers_bytes_max));
        let moment = |of, answers| Moment {
            of,
            answers,
            reads: shares.reads(),
        };
        let is_inner = |net: &Net| self.inner.contains_key(&net.table.oid);
        let inner_changed = nets.iter().any(is_inner);
        let states = States {
            // As long as nothing changed that subqueries read, what they said before they say now.
            before: moment(before, &answers[usize::from(!inner_changed)]),
            now: moment(now, &answers[1]),
            shares: &shares,
        };
        for net in nets {
            let (mut bindings, mut certain) = (Vec::new(), Vec::new());
            for routes in self.tables.get(&net.table.oid).into_iter().flatten() {
                let (before, after) = (net.before.as_deref(), net.after.as_deref());
                if routes.select.is_exact() {
                    routes.decide(before, after, &mut certain)?;
                    continue;
                }
                shares.begin(&routes.select);
                let led = routes.find(before, &states.before, &mut bindings)?
                    && routes.find(after, &states.now, &mut bindings)?;
                if !led && shares.scan(&routes.select, routes.all.len()) {
                    bindings.extend(&routes.all);
                } else if !led {
                    self.give_up(&routes.all, &mut routed);
                }
            }
            if !bindings.is_empty() || !certain.is_empty() {
                bindings.sort_unstable();
                bindings.dedup();
                let candidate = Candidate {
                    table: &net.table,
                    before: net.before.as_ref(),
                    after: net.after.as_ref(),
                    bindings: &bindings,
                    certain: &certain,
                    changed: true,
                };
                self.tell(candidate, &states, &mut routed)?;
            }
        }
        let mut found = BTreeMap::new();
        if inner_changed {
            let mut walk = Walk::new(self, nets, &states);
            for net in nets {
                for inner in self.inner.get(&net.table.oid).into_iter().flatten() {
                    walk.start(inner, net)?;
                }
            }
            let behind;
            (found, behind) = walk.finish();
            self.give_up(&behind, &mut routed);
        }
        for Found {
            table,
            row,
            bindings,
        } in found.values()
        {
            let candidate = Candidate {
                table,
                before: Some(row),
                after: Some(row),
                bindings,
                certain: &[],
                changed: false,
            };
            self.tell(candidate, &states, &mut routed)?;
        }
        Ok(routed)
    }

    /// These must catch up: nobody finds out now what it means to them.
    fn give_up(&self, bindings: &BTreeSet<BindingId>, routed: &mut Routed) {
        for id in bindings {
            routed.behind.extend(self.binding_of(*id).sessions.iter());
        }
    }

    /// How many SELECTs may read rows to say what a transaction means to them.
    fn readers(&self, nets: &[Net]) -> usize {
        if !self.looks_into_others() {
            return 0;
        }
        let mut selects = BTreeSet::new();
        let tables: BTreeSet<Oid> = nets.iter().map(|net| net.table.oid).collect();
        for table in &tables {
            let outer = self.tables.get(table).into_iter().flatten();
            let reads = |routes: &&Routes| !routes.select.subqueries().is_empty();
            selects.extend(outer.filter(reads).map(|routes| routes.select.id));
            let inner = self.inner.get(table).into_iter().flatten();
            selects.extend(inner.map(|inner| inner.select.id));
        }
        selects.len()
    }

    fn binding_of(&self, id: BindingId) -> &Binding {
        self.slots[id].as_ref().expect("indexed")
    }

    /// Adds what is to be told of one row.
    fn tell(
        &self,
        candidate: Candidate<'_>,
        states: &States<'_>,
        routed: &mut Routed,
    ) -> Result<(), Error> {
        let table = candidate.table;
        // (session, was in one of its SELECTs, is in one, the SELECT that projects): of the few that are concerned.
        let mut concerned: Vec<(SessionId, bool, bool, &Select)> = Vec::new();
        let mut others = BTreeSet::new();
        for id in candidate.bindings {
            let binding = self.binding_of(*id);
            let Some((was, is)) = states.ask(&binding.bound, candidate)? else {
                routed.behind.extend(binding.sessions.iter());
                continue;
            };
            if !candidate.changed && was != is {
                others.extend(self.others(&binding.sessions, table.oid, candidate.bindings));
            }
            concern(&mut concerned, binding, was, is);
        }
        for (id, was, is) in candidate.certain {
            concern(&mut concerned, self.binding_of(*id), *was, *is);
        }
        // Of a row that did not change only those SELECTs were found whose answer may have: another one may show it as before.
        for id in others {
            let binding = self.binding_of(id);
            match states.ask(&binding.bound, candidate)? {
                Some((was, is)) => concern(&mut concerned, binding, was, is),
                None => routed.behind.extend(binding.sessions.iter()),
            }
        }
        // A row that several SELECTs of one session show is one row: in if it is in any of them.
        concerned.sort_by_key(|(session, ..)| *session);
        concerned.dedup_by(|later, first| {
            let same = later.0 == first.0;
            if same {
                first.1 |= later.1;
                first.2 |= later.2;
            }
            same
        });
        let mut told = Told::default();
        for (session, was, is, select) in concerned {
            if let Some(op) = told.op(candidate, select, was, is)? {
                routed.tell(session, (table.oid, op), self.limits.ops_max);
            }
        }
        Ok(())
    }

    /// What else these sessions have of a table.
    fn others<'a>(
        &'a self,
        sessions: &'a Few<SessionId>,
        table: Oid,
        known: &'a [BindingId],
    ) -> impl Iterator<Item = BindingId> + 'a {
        let held = sessions
            .iter()
            .filter_map(|session| self.sessions.get(&session));
        held.flatten().copied().filter(move |id| {
            let select = &self.binding_of(*id).bound.select;
            select.table.oid == table && known.binary_search(id).is_err()
        })
    }

    fn routes(&self, select: &Select) -> Option<&Routes> {
        let of_table = self.tables.get(&select.table.oid)?;
        of_table.iter().find(|routes| routes.select.id == select.id)
    }

    fn binding(&mut self, bound: &Bound) -> BindingId {
        let fingerprint = bound.fingerprint();
        if let Some(id) = self.bindings.get(&fingerprint) {
            return *id;
        }
        let binding = Binding {
            bound: bound.clone(),
            sessions: Few::None,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id] = Some(binding);
                id
            }
            None => {
                self.slots.push(Some(binding));
                self.slots.len() - 1
            }
        };
        self.bindings.insert(fingerprint, id);
        let select = &bound.select;
        if self.routes(select).is_none() {
            let of_table = self.tables.entry(select.table.oid).or_default();
            of_table.push(Routes::new(select.clone()));
            for (step, found) in select.subqueries().iter().enumerate() {
                let select = select.clone();
                let of_table = self.inner.entry(found.subquery.table.oid).or_default();
                of_table.push(Inner { select, step });
            }
        }
        let of_table = self.tables.get_mut(&select.table.oid).expect("just made");
        for routes in of_table
            .iter_mut()
            .filter(|routes| routes.select.id == select.id)
        {
            routes.insert(id, bound);
        }
        id
    }

    fn forget(&mut self, id: BindingId) {
        let binding = self.slots[id].take().expect("indexed");
        self.free.push(id);
        self.bindings.remove(&binding.bound.fingerprint());
        let select = &binding.bound.select;
        let Some(of_table) = self.tables.get_mut(&select.table.oid) else {
            return;
        };
        for routes in of_table
            .iter_mut()
            .filter(|routes| routes.select.id == select.id)
        {
            routes.remove(id, &binding.bound);
        }
        let before = of_table.len();
        of_table.retain(|routes| !routes.all.is_empty());
        if of_table.len() < before {
            if of_table.is_empty() {
                self.tables.remove(&select.table.oid);
            }
            self.inner.retain(|_, inner| {
                inner.retain(|inner| inner.select.id != select.id);
                !inner.is_empty()
            });
        }
    }
}
