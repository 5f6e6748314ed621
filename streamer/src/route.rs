//! Which sessions does a transaction concern, and what are they told?
//!
//! The index finds *candidates*: rows that may be told of, and for each the bound SELECTs that may have it. It may find
//! too many, never too few. Whether a row is in a shape is decided by [`Bound::contains`] alone, in the state before the
//! transaction and in the one after it, and what follows by [`delta`](crate::delta).
//!
//! - A row that changed is a candidate. Its bound SELECTs are found by hashing: for a conjunct `column = $param` the row's
//!   value, old and new; through a subquery the values of the inner rows that it leads to. SELECTs without such a way are
//!   looked at one by one.
//! - A row that did not change is one if an inner row did that may decide its answer. Then the way is walked *backwards*
//!   ([`backwards`]): from the inner row, as it was and as it is, to the rows that it goes with, and on to those of the
//!   SELECT. Only those bound SELECTs are asked that the inner row leads to as well, if it tells anything of their parameters.
//!
//! Why no transaction is missed: an answer changes only if the row changes, or an inner row that goes with it. A row that went
//! with another one only because one of the two was changed is found by the changed one's old values; so it is enough to
//! look for rows that did *not* change in the state after the transaction.
//!
//! Sessions with the same SELECT bound to the same values share one [`Binding`]: it is evaluated once for them all. What is
//! too much for one transaction ([`STEPS_MAX`], [`WALK_BYTES_MAX`]) is not routed: its sessions catch up.

mod backwards;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use foldhash::fast::RandomState;

use self::backwards::{Found, Walk};
use crate::{
    delta::{self, Op},
    lookup::{Error, Lookup},
    mirror::Net,
    shape::{Bound, RouteKey, Select},
    table::{Oid, Table},
};

type Map<K, V> = HashMap<K, V, RandomState>;

/// A connected session.
pub type SessionId = u64;

/// Rows that are looked at for one transaction beside those that it changed, at most: what is beyond would keep the engine
/// for more than about a second, and is as well told by a catch-up.
pub const STEPS_MAX: usize = 100_000;

/// Bytes of such rows that are held meanwhile, at most.
const WALK_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Who subscribed to what.
pub struct Router {
    /// [`STEPS_MAX`], but in tests.
    pub steps_max: usize,
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
    sessions: Vec<SessionId>,
}

/// The bindings of one SELECT.
struct Routes {
    select: Arc<Select>,
    keyed: Map<RouteKey, Vec<BindingId>>,
    /// Those that no row's values lead to.
    scanned: Vec<BindingId>,
    /// All of them.
    all: Vec<BindingId>,
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
    /// To these it means more than was found out: they must catch up.
    pub behind: BTreeSet<SessionId>,
}

/// A row that may be told of.
struct Candidate {
    table: Arc<Table>,
    before: Option<Bytes>,
    after: Option<Bytes>,
    /// Those that may have it: all of them if it changed, else all whose answer may have.
    bindings: Vec<BindingId>,
    changed: bool,
}

impl Default for Router {
    fn default() -> Self {
        Router {
            steps_max: STEPS_MAX,
            tables: Map::default(),
            inner: Map::default(),
            bindings: Map::default(),
            slots: Vec::new(),
            free: Vec::new(),
            sessions: Map::default(),
        }
    }
}

impl Router {
    /// A session gets, from here on, what its bound SELECTs show.
    pub fn add(&mut self, session: SessionId, bounds: &[Bound]) {
        self.remove(session);
        let mut held = Vec::with_capacity(bounds.len());
        for bound in bounds {
            let id = self.binding(bound);
            let binding = self.slots[id].as_mut().expect("just found or made");
            if !binding.sessions.contains(&session) {
                binding.sessions.push(session);
                held.push(id);
            }
        }
        self.sessions.insert(session, held);
    }

    /// A session is gone.
    pub fn remove(&mut self, session: SessionId) {
        for id in self.sessions.remove(&session).unwrap_or_default() {
            let binding = self.slots[id].as_mut().expect("held by the session");
            binding.sessions.retain(|other| *other != session);
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
            .flat_map(|binding| binding.sessions.iter().copied())
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
            routes.find(Some(row), &crate::lookup::Nothing, &mut bindings)?;
        }
        for id in bindings {
            found.extend(&self.slots[id].as_ref().expect("indexed").sessions);
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
        let mut candidates = Vec::new();
        for net in nets {
            let mut bindings = Vec::new();
            for routes in self.tables.get(&net.table.oid).into_iter().flatten() {
                routes.find(net.before.as_deref(), before, &mut bindings)?;
                routes.find(net.after.as_deref(), now, &mut bindings)?;
            }
            if !bindings.is_empty() {
                bindings.sort_unstable();
                bindings.dedup();
                candidates.push(Candidate {
                    table: net.table.clone(),
                    before: net.before.clone(),
                    after: net.after.clone(),
                    bindings,
                    changed: true,
                });
            }
        }
        if nets
            .iter()
            .any(|net| self.inner.contains_key(&net.table.oid))
        {
            let mut walk = Walk::new(self, nets, before, now);
            for net in nets {
                for inner in self.inner.get(&net.table.oid).into_iter().flatten() {
                    walk.start(inner, net)?;
                }
            }
            let (found, behind) = walk.finish();
            for Found {
                table,
                row,
                bindings,
            } in found.into_values()
            {
                candidates.push(Candidate {
                    table,
                    before: Some(row.clone()),
                    after: Some(row),
                    bindings,
                    changed: false,
                });
            }
            for id in behind {
                let binding = self.slots[id].as_ref().expect("indexed");
                routed.behind.extend(&binding.sessions);
            }
        }
        for candidate in &candidates {
            self.tell(candidate, before, now, &mut routed)?;
        }
        Ok(routed)
    }

    /// Adds what is to be told of one row.
    fn tell(
        &self,
        candidate: &Candidate,
        before: &dyn Lookup,
        now: &dyn Lookup,
        routed: &mut Routed,
    ) -> Result<(), Error> {
        let table = &candidate.table;
        let answer = |id: BindingId| -> Result<(bool, bool), Error> {
            let bound = &self.slots[id].as_ref().expect("indexed").bound;
            let contains = |row: &Option<Bytes>, lookup| match row {
                Some(row) => bound.contains(row, lookup),
                None => Ok(false),
            };
            Ok((
                contains(&candidate.before, before)?,
                contains(&candidate.after, now)?,
            ))
        };
        // (session, was in one of its SELECTs, is in one, the SELECT that projects): of the few that are concerned.
        let mut concerned: Vec<(SessionId, bool, bool, &Arc<Select>)> = Vec::new();
        let mut others = BTreeSet::new();
        for id in &candidate.bindings {
            let (was, is) = answer(*id)?;
            let binding = self.slots[*id].as_ref().expect("indexed");
            if !candidate.changed && was != is {
                others.extend(self.others(&binding.sessions, table.oid, &candidate.bindings));
            }
            if was || is {
                let sessions = binding.sessions.iter();
                concerned
                    .extend(sessions.map(|session| (*session, was, is, &binding.bound.select)));
            }
        }
        // Of a row that did not change only those SELECTs were found whose answer may have: another one may show it as before.
        for id in others {
            let (was, is) = answer(id)?;
            if was || is {
                let binding = self.slots[id].as_ref().expect("indexed");
                let sessions = binding.sessions.iter();
                concerned
                    .extend(sessions.map(|session| (*session, was, is, &binding.bound.select)));
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
        let mut told: Vec<(*const Select, bool, bool, Option<Op>)> = Vec::new();
        for (session, was, is, select) in concerned {
            let select_at = Arc::as_ptr(select);
            let known = told
                .iter()
                .find(|(at, w, i, _)| (*at, *w, *i) == (select_at, was, is));
            let op = match known {
                Some((.., op)) => op.clone(),
                None => {
                    let before = candidate.before.as_ref().filter(|_| was);
                    let after = candidate.after.as_ref().filter(|_| is);
                    let op = delta::decide(table, before, after, |row| select.project(row))?;
                    told.push((select_at, was, is, op.clone()));
                    op
                }
            };
            if let Some(op) = op {
                routed.ops.entry(session).or_default().push((table.oid, op));
            }
        }
        Ok(())
    }

    /// What else these sessions have of a table.
    fn others<'a>(
        &'a self,
        sessions: &'a [SessionId],
        table: Oid,
        known: &'a [BindingId],
    ) -> impl Iterator<Item = BindingId> + 'a {
        let held = sessions
            .iter()
            .filter_map(|session| self.sessions.get(session));
        held.flatten().copied().filter(move |id| {
            let binding = self.slots[*id].as_ref().expect("indexed");
            binding.bound.select.table.oid == table && known.binary_search(id).is_err()
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
            sessions: Vec::new(),
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

impl Routes {
    fn new(select: Arc<Select>) -> Self {
        Routes {
            select,
            keyed: Map::default(),
            scanned: Vec::new(),
            all: Vec::new(),
        }
    }

    fn insert(&mut self, id: BindingId, bound: &Bound) {
        self.all.push(id);
        // Also for SELECTs that are scanned: a changed inner row may lead to their bindings.
        for key in bound.route_keys() {
            self.keyed.entry(key).or_default().push(id);
        }
        if !self.select.is_routable() {
            self.scanned.push(id);
        }
    }

    fn remove(&mut self, id: BindingId, bound: &Bound) {
        self.all.retain(|other| *other != id);
        self.scanned.retain(|other| *other != id);
        for key in bound.route_keys() {
            if let Some(ids) = self.keyed.get_mut(&key) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.keyed.remove(&key);
                }
            }
        }
    }

    /// Adds those that may have a row of the table, in a state.
    fn find(
        &self,
        row: Option<&[u8]>,
        lookup: &dyn Lookup,
        found: &mut Vec<BindingId>,
    ) -> Result<(), Error> {
        let Some(row) = row else { return Ok(()) };
        if !self.select.is_routable() {
            found.extend(&self.scanned);
            return Ok(());
        }
        let mut keys = Vec::new();
        self.select.route_keys_of(row, lookup, &mut keys)?;
        self.add_keyed(&keys, found);
        Ok(())
    }

    fn add_keyed(&self, keys: &[RouteKey], found: &mut Vec<BindingId>) {
        for key in keys {
            found.extend(self.keyed.get(key).into_iter().flatten());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use anabranch_proto::record::{self, ValueRef};

    use super::*;
    use crate::{
        lookup::Nothing,
        mirror::Key,
        shape::{self, ParamSource, Source},
        table::{Collation, Column, Identity, Kind, Table},
    };

    fn table() -> Arc<Table> {
        let column = |name: &str, attnum| Column {
            name: name.into(),
            attnum,
            type_oid: 23,
            base_oid: 23,
            typmod: -1,
            postgres_type: "integer".into(),
            kind: Kind::Integer,
            not_null: false,
            collation: Collation::Bytes,
        };
        Arc::new(Table {
            oid: 7,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![column("id", 1), column("team", 2), column("v", 3)],
            key: vec![0],
            identity: Identity::Key,
            indexes: Vec::new(),
            version: 1,
        })
    }

    /// `team = $team` (routed), and `v > 10` (looked at one by one).
    fn bound(table: &Arc<Table>, shape: &str, team: i64) -> Bound {
        let team_of_token = ParamSource::Claim("team".into());
        let sources = [
            Source {
                name: "team".into(),
                params: BTreeMap::from([("team".into(), team_of_token)]),
                tables: vec!["SELECT * FROM t WHERE team = $team".into()],
                writable: Vec::new(),
            },
            Source {
                name: "large".into(),
                params: BTreeMap::new(),
                tables: vec!["SELECT * FROM t WHERE v > 10".into()],
                writable: Vec::new(),
            },
        ];
        let shapes = shape::compile(&sources, std::slice::from_ref(table)).unwrap();
        let shape = shapes.iter().find(|one| one.name == shape).unwrap();
        let claims = serde_json::Map::from_iter([("team".into(), team.into())]);
        shape.bind(&claims, &HashMap::new()).unwrap().remove(0)
    }

    fn row(values: [i64; 3]) -> Option<Bytes> {
        Some(record::build(values.map(ValueRef::Integer)))
    }

    fn net(table: &Arc<Table>, before: Option<Bytes>, after: Option<Bytes>) -> Net {
        Net {
            table: table.clone(),
            key: Key::Integer(1),
            before,
            after,
        }
    }

    fn told(router: &Router, net: Net) -> Vec<(SessionId, Op)> {
        let routed = router.route(&[net], &Nothing, &Nothing).unwrap().ops;
        let mut told: Vec<_> = routed
            .into_iter()
            .flat_map(|(session, ops)| ops.into_iter().map(move |(_, op)| (session, op)))
            .collect();
        told.sort_by_key(|(session, _)| *session);
        told
    }

    #[test]
    fn a_change_concerns_those_who_saw_the_row_and_those_who_see_it_now() {
        let table = table();
        let mut router = Router::default();
        router.add(1, &[bound(&table, "team", 1)]);
        router.add(2, &[bound(&table, "team", 2)]);
        router.add(3, &[bound(&table, "team", 3)]);
        router.add(4, &[bound(&table, "large", 0)]);
        let key = record::build([ValueRef::Integer(1)]);
        let after = row([1, 2, 20]);
        assert_eq!(
            told(&router, net(&table, row([1, 1, 0]), after.clone())),
            [
                (1, Op::Delete(key.clone())),
                (2, Op::Upsert(after.clone().unwrap())),
                (4, Op::Upsert(after.clone().unwrap())),
            ]
        );
        assert_eq!(
            told(&router, net(&table, after, None)),
            [(2, Op::Delete(key.clone())), (4, Op::Delete(key))]
        );
    }

    #[test]
    fn a_row_in_two_selects_of_one_session_goes_only_when_it_is_in_neither() {
        let table = table();
        let mut router = Router::default();
        router.add(1, &[bound(&table, "team", 1), bound(&table, "large", 0)]);
        let (both, one, none) = (row([1, 1, 20]), row([1, 2, 20]), row([1, 2, 0]));
        let upsert = |row: &Option<Bytes>| vec![(1, Op::Upsert(row.clone().unwrap()))];
        assert_eq!(told(&router, net(&table, both, one.clone())), upsert(&one));
        let key = record::build([ValueRef::Integer(1)]);
        assert_eq!(
            told(&router, net(&table, one, none)),
            [(1, Op::Delete(key))]
        );
    }

    #[test]
    fn a_session_that_left_is_told_nothing_and_leaves_nothing_behind() {
        let table = table();
        let mut router = Router::default();
        for session in 1..=3 {
            router.add(
                session,
                &[bound(&table, "team", 1), bound(&table, "large", 0)],
            );
        }
        assert_eq!(router.sessions_of(&[7]), [1, 2, 3]);
        router.remove(2);
        assert_eq!(told(&router, net(&table, None, row([1, 1, 0]))).len(), 2);
        router.remove(1);
        router.remove(3);
        assert!(router.sessions_of(&[7]).is_empty());
        assert!(router.tables.is_empty() && router.bindings.is_empty());
        assert!(router.slots.iter().all(Option::is_none));
    }
}
