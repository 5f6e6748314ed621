//! Which sessions does a transaction concern, and what are they told?
//!
//! The index finds *candidates*: rows that may be told of, and for each the bound SELECTs that may have it. It may find
//! too many, never too few. Whether a row is in a shape is decided by [`Bound::contains`] alone, in the state before the
//! transaction and in the one after it, and what follows by [`delta`](crate::delta).
//!
//! - A row that changed is a candidate. Its bound SELECTs are found by hashing: for a conjunct `column = $param` the row's
//!   value, old and new; through a subquery the values of the inner rows that it leads to. For `column > $param` and the like,
//!   by the order of the parameters ([`Intervals`]). SELECTs without such a way are looked at one by one.
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
//! alone; and bound SELECTs that are asked one after the other ([`Limits::scans_max`]).

mod backwards;
mod intervals;
mod limits;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use foldhash::fast::RandomState;

pub use self::limits::{Limits, READS_MAX, SCANS_MAX, STEPS_MAX};
use self::{
    backwards::{Found, Walk},
    intervals::Intervals,
    limits::Shares,
};
use crate::{
    delta::{self, Op},
    lookup::{Answers, Error, Lookup, Moment},
    mirror::Net,
    shape::{Bound, RouteKey, RouteRange, Select},
    table::{Oid, Table},
};

type Map<K, V> = HashMap<K, V, RandomState>;

/// A connected session.
pub type SessionId = u64;

/// Who subscribed to what.
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

/// Keys that a row may lead to beyond one for each binding.
const KEYS_MORE: usize = 64;

/// One SELECT, bound to values, and the sessions that have it.
struct Binding {
    bound: Bound,
    sessions: BTreeSet<SessionId>,
}

/// The bindings of one SELECT.
struct Routes {
    select: Arc<Select>,
    keyed: Map<RouteKey, Vec<BindingId>>,
    /// By leaf; of few SELECTs there are any.
    ranges: BTreeMap<u16, Intervals>,
    /// All of them. Where no row's values lead to any, these are looked at one by one.
    all: BTreeSet<BindingId>,
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
#[derive(Clone, Copy)]
struct Candidate<'a> {
    table: &'a Arc<Table>,
    before: Option<&'a Bytes>,
    after: Option<&'a Bytes>,
    /// Those that may have it: all of them if it changed, else all whose answer may have. Ascending.
    bindings: &'a [BindingId],
    changed: bool,
}

/// The states that a transaction is between, and what conditions may still read of them.
struct States<'a> {
    before: Moment<'a>,
    now: Moment<'a>,
    shares: &'a Shares,
}

/// What is told of one row, by the columns that are told of: encoded once, however many get it.
#[derive(Default)]
struct Told<'a> {
    ops: Vec<(&'a [usize], bool, bool, Option<Op>)>,
    /// The row as it is.
    after: Vec<(&'a [usize], Bytes)>,
}

impl Default for Router {
    fn default() -> Self {
        Router {
            limits: Limits::default(),
            tables: Map::default(),
            inner: Map::default(),
            bindings: Map::default(),
            slots: Vec::new(),
            free: Vec::new(),
            sessions: Map::default(),
        }
    }
}

impl States<'_> {
    /// Whether a row was, and is, in a bound SELECT; `None`: to find out is too much.
    fn ask(&self, bound: &Bound, candidate: Candidate<'_>) -> Result<Option<(bool, bool)>, Error> {
        self.shares.begin(&bound.select);
        let contains = |row: Option<&Bytes>, state| match row {
            Some(row) => bound.contains(row, state),
            None => Ok(false),
        };
        let both = || {
            let was = contains(candidate.before, &self.before)?;
            Ok((was, contains(candidate.after, &self.now)?))
        };
        match both() {
            Err(Error::TooMuch) => Ok(None),
            answers => answers.map(Some),
        }
    }
}

/// Notes whom a row concerns.
fn concern<'a>(
    concerned: &mut Vec<(SessionId, bool, bool, &'a Select)>,
    binding: &'a Binding,
    was: bool,
    is: bool,
) {
    if was || is {
        let sessions = binding.sessions.iter();
        concerned.extend(sessions.map(|session| (*session, was, is, &*binding.bound.select)));
    }
}

impl<'a> Told<'a> {
    /// What they are told who see it by `select`.
    fn op(
        &mut self,
        candidate: Candidate<'_>,
        select: &'a Select,
        was: bool,
        is: bool,
    ) -> Result<Option<Op>, Error> {
        let columns = &*select.columns;
        let known = (self.ops.iter()).find(|(of, w, i, _)| (*of, *w, *i) == (columns, was, is));
        if let Some((.., op)) = known {
            return Ok(op.clone());
        }
        let before = candidate.before.filter(|_| was);
        let after = candidate.after.filter(|_| is);
        let encoded = RefCell::new(&mut self.after);
        let op = delta::decide(candidate.table, before, after, |row| {
            // What it was is not told.
            if !after.is_some_and(|after| std::ptr::eq(after, row)) {
                return select.project(row);
            }
            let mut encoded = encoded.borrow_mut();
            if let Some((_, record)) = encoded.iter().find(|(of, _)| *of == columns) {
                return Ok(record.clone());
            }
            let record = select.project(row)?;
            encoded.push((columns, record.clone()));
            Ok(record)
        })?;
        self.ops.push((columns, was, is, op.clone()));
        Ok(op)
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
            binding.sessions.remove(&session);
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
        let states = States {
            before: moment(before, &answers[0]),
            now: moment(now, &answers[1]),
            shares: &shares,
        };
        for net in nets {
            let mut bindings = Vec::new();
            for routes in self.tables.get(&net.table.oid).into_iter().flatten() {
                shares.begin(&routes.select);
                let led = routes.find(net.before.as_deref(), &states.before, &mut bindings)?
                    && routes.find(net.after.as_deref(), &states.now, &mut bindings)?;
                if !led && shares.scan(&routes.select, routes.all.len()) {
                    bindings.extend(&routes.all);
                } else if !led {
                    self.give_up(&routes.all, &mut routed);
                }
            }
            if !bindings.is_empty() {
                bindings.sort_unstable();
                bindings.dedup();
                let candidate = Candidate {
                    table: &net.table,
                    before: net.before.as_ref(),
                    after: net.after.as_ref(),
                    bindings: &bindings,
                    changed: true,
                };
                self.tell(candidate, &states, &mut routed)?;
            }
        }
        let mut found = BTreeMap::new();
        if nets
            .iter()
            .any(|net| self.inner.contains_key(&net.table.oid))
        {
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
                changed: false,
            };
            self.tell(candidate, &states, &mut routed)?;
        }
        Ok(routed)
    }

    /// These must catch up: nobody finds out now what it means to them.
    fn give_up(&self, bindings: &BTreeSet<BindingId>, routed: &mut Routed) {
        for id in bindings {
            routed.behind.extend(&self.binding_of(*id).sessions);
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
                routed.behind.extend(&binding.sessions);
                continue;
            };
            if !candidate.changed && was != is {
                others.extend(self.others(&binding.sessions, table.oid, candidate.bindings));
            }
            concern(&mut concerned, binding, was, is);
        }
        // Of a row that did not change only those SELECTs were found whose answer may have: another one may show it as before.
        for id in others {
            let binding = self.binding_of(id);
            match states.ask(&binding.bound, candidate)? {
                Some((was, is)) => concern(&mut concerned, binding, was, is),
                None => routed.behind.extend(&binding.sessions),
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
                routed.ops.entry(session).or_default().push((table.oid, op));
            }
        }
        Ok(())
    }

    /// What else these sessions have of a table.
    fn others<'a>(
        &'a self,
        sessions: &'a BTreeSet<SessionId>,
        table: Oid,
        known: &'a [BindingId],
    ) -> impl Iterator<Item = BindingId> + 'a {
        let held = sessions
            .iter()
            .filter_map(|session| self.sessions.get(session));
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
            sessions: BTreeSet::new(),
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

/// Whether all was found out; not if that was too much.
fn is_known(found: Result<bool, Error>) -> Result<bool, Error> {
    match found {
        Err(Error::TooMuch) => Ok(false),
        found => found,
    }
}

impl Routes {
    fn new(select: Arc<Select>) -> Self {
        Routes {
            select,
            keyed: Map::default(),
            ranges: BTreeMap::new(),
            all: BTreeSet::new(),
        }
    }

    fn insert(&mut self, id: BindingId, bound: &Bound) {
        self.all.insert(id);
        // Also for SELECTs that are scanned: a changed inner row may lead to their bindings.
        for key in bound.route_keys() {
            self.keyed.entry(key).or_default().push(id);
        }
        for RouteRange { leaf, low, high } in bound.route_ranges() {
            let ranges = self.ranges.entry(*leaf).or_default();
            ranges.insert(low, high, id);
        }
    }

    fn remove(&mut self, id: BindingId, bound: &Bound) {
        self.all.remove(&id);
        for RouteRange { leaf, low, high } in bound.route_ranges() {
            if let Some(ranges) = self.ranges.get_mut(leaf) {
                ranges.remove(low, high, id);
            }
        }
        self.ranges.retain(|_, ranges| !ranges.is_empty());
        for key in bound.route_keys() {
            if let Some(ids) = self.keyed.get_mut(&key) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.keyed.remove(&key);
                }
            }
        }
    }

    /// Adds those that may have a row of the table, in a state. False: it may be any of all, as nothing leads to them, or too
    /// much would have to be read.
    fn find(
        &self,
        row: Option<&[u8]>,
        lookup: &dyn Lookup,
        found: &mut Vec<BindingId>,
    ) -> Result<bool, Error> {
        let Some(row) = row else { return Ok(true) };
        if !self.select.is_routable() {
            return Ok(false);
        }
        let mut keys = Vec::new();
        let max = self.keys_max();
        let all = is_known(self.select.route_keys_of(row, lookup, &mut keys, max))?;
        if all {
            self.add_keyed(&keys, found);
        }
        Ok(all)
    }

    /// A row that leads to more keys than this need not be followed to all of them: to ask all bindings is not dearer. So a row
    /// with which ten thousand inner ones go costs little where few have subscribed.
    fn keys_max(&self) -> usize {
        self.all.len() + KEYS_MORE
    }

    fn add_keyed(&self, keys: &[RouteKey], found: &mut Vec<BindingId>) {
        for key in keys {
            match self.ranges.get(&key.leaf()) {
                Some(ranges) => {
                    ranges.find(key.value(), found);
                }
                None => found.extend(self.keyed.get(key).into_iter().flatten()),
            }
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
    fn a_row_is_encoded_once_for_all_who_get_it_whatever_they_had() {
        let table = table();
        let sources = ["team", "other"].map(|name| Source {
            name: name.into(),
            params: BTreeMap::from([("team".into(), ParamSource::Claim("team".into()))]),
            tables: vec![match name {
                "team" => "SELECT id, team FROM t WHERE team = $team".into(),
                _ => "SELECT team, id FROM t WHERE v = $team".into(),
            }],
            writable: Vec::new(),
        });
        let shapes = shape::compile(&sources, std::slice::from_ref(&table)).unwrap();
        let mut router = Router::default();
        for session in 0..20 {
            let team = if session < 10 { 1 } else { 2 };
            let claims = serde_json::Map::from_iter([("team".into(), team.into())]);
            let shape = &shapes[(session % 2) as usize];
            router.add(session, &shape.bind(&claims, &HashMap::new()).unwrap());
        }
        assert_eq!(router.bindings.len(), 4);
        // By team it moves from the first ten to the others; by v it stays with the first.
        let told = told(&router, net(&table, row([1, 1, 1]), row([1, 2, 1])));
        let mut records: HashMap<*const u8, (usize, &Bytes)> = HashMap::new();
        for (_, Op::Upsert(record) | Op::Delete(record)) in &told {
            records.entry(record.as_ptr()).or_insert((0, record)).0 += 1;
        }
        let mut counts: Vec<_> = records.values().map(|(count, _)| *count).collect();
        counts.sort_unstable();
        // A delete for five; the row for five who have it and five who had not.
        assert_eq!(counts, [5, 10]);
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
