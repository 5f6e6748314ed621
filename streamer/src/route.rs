//! Which sessions does a change concern, and what are they told?
//!
//! The index finds *candidates*: for a SELECT with a conjunct `column = $param` the bound SELECTs are found by
//! hashing the changed row's value, old and new; all others of the table are looked at one by one. It may find too
//! many, never too few. Whether a row is in a shape is decided by [`Bound::contains`] alone, on the row before the
//! transaction and on the row after it, and what follows by [`delta`](crate::delta).
//!
//! Sessions with the same SELECT bound to the same values share one [`Binding`]: it is evaluated once for them all.
//!
//! Conditions with subqueries will add candidates here: rows that no change touched, found backwards from the
//! changed inner row to the parameter. What a candidate is, and what is decided about it, stays the same.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use foldhash::fast::RandomState;

use crate::{
    delta::{self, Op},
    lookup,
    mirror::Net,
    shape::{Bound, RouteKey, Select},
    table::Oid,
};

type Map<K, V> = HashMap<K, V, RandomState>;

/// A connected session.
pub type SessionId = u64;

/// Who subscribed to what.
#[derive(Default)]
pub struct Router {
    tables: Map<Oid, Vec<Routes>>,
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
    scanned: Vec<BindingId>,
}

/// What one transaction means to one session: ops on its tables.
pub type Ops = Vec<(Oid, Op)>;

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

    /// The sessions that have any of these tables.
    pub fn sessions_of(&self, tables: &[Oid]) -> Vec<SessionId> {
        let mut sessions: Vec<_> = tables
            .iter()
            .filter_map(|table| self.tables.get(table))
            .flatten()
            .flat_map(Routes::all)
            .filter_map(|id| self.slots[id].as_ref())
            .flat_map(|binding| binding.sessions.iter().copied())
            .collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// What a transaction means to each session that it concerns.
    pub fn route(&self, nets: &[Net]) -> Result<Map<SessionId, Ops>, lookup::Error> {
        let mut routed = Map::default();
        for net in nets {
            self.route_one(net, &mut routed)?;
        }
        Ok(routed)
    }

    fn route_one(&self, net: &Net, routed: &mut Map<SessionId, Ops>) -> Result<(), lookup::Error> {
        let Some(selects) = self.tables.get(&net.table.oid) else {
            return Ok(());
        };
        // (session, was in one of its SELECTs, is in one, the SELECT that projects): of the few that are concerned.
        let mut concerned: Vec<(SessionId, bool, bool, &Arc<Select>)> = Vec::new();
        for routes in selects {
            for id in routes.candidates(net)? {
                let binding = self.slots[id].as_ref().expect("indexed");
                let contains = |row: &Option<Bytes>| match row {
                    Some(row) => binding.bound.contains(row, &lookup::Nothing),
                    None => Ok(false),
                };
                let (was, is) = (contains(&net.before)?, contains(&net.after)?);
                if !was && !is {
                    continue;
                }
                concerned.extend(
                    binding
                        .sessions
                        .iter()
                        .map(|session| (*session, was, is, &routes.select)),
                );
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
                    let before = net.before.as_ref().filter(|_| was);
                    let after = net.after.as_ref().filter(|_| is);
                    let op = delta::decide(&net.table, before, after, |row| select.project(row))?;
                    told.push((select_at, was, is, op.clone()));
                    op
                }
            };
            if let Some(op) = op {
                routed.entry(session).or_default().push((net.table.oid, op));
            }
        }
        Ok(())
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
        let selects = self.tables.entry(bound.select.table.oid).or_default();
        let routes = match selects
            .iter_mut()
            .position(|routes| routes.select.id == bound.select.id)
        {
            Some(at) => &mut selects[at],
            None => {
                selects.push(Routes::new(bound.select.clone()));
                selects.last_mut().expect("just pushed")
            }
        };
        routes.insert(id, bound);
        id
    }

    fn forget(&mut self, id: BindingId) {
        let binding = self.slots[id].take().expect("indexed");
        self.free.push(id);
        self.bindings.remove(&binding.bound.fingerprint());
        let oid = binding.bound.select.table.oid;
        if let Some(selects) = self.tables.get_mut(&oid) {
            selects
                .iter_mut()
                .for_each(|routes| routes.remove(id, &binding.bound));
            selects.retain(|routes| routes.all().next().is_some());
            if selects.is_empty() {
                self.tables.remove(&oid);
            }
        }
    }
}

impl Routes {
    fn new(select: Arc<Select>) -> Self {
        Routes {
            select,
            keyed: Map::default(),
            scanned: Vec::new(),
        }
    }

    fn insert(&mut self, id: BindingId, bound: &Bound) {
        if self.select.is_routable() {
            for key in bound.route_keys() {
                self.keyed.entry(key).or_default().push(id);
            }
        } else {
            self.scanned.push(id);
        }
    }

    fn remove(&mut self, id: BindingId, bound: &Bound) {
        if bound.select.id != self.select.id {
            return;
        }
        self.scanned.retain(|other| *other != id);
        if self.select.is_routable() {
            for key in bound.route_keys() {
                if let Some(ids) = self.keyed.get_mut(&key) {
                    ids.retain(|other| *other != id);
                    if ids.is_empty() {
                        self.keyed.remove(&key);
                    }
                }
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = BindingId> + '_ {
        self.scanned
            .iter()
            .chain(self.keyed.values().flatten())
            .copied()
    }

    fn candidates(&self, net: &Net) -> Result<Vec<BindingId>, lookup::Error> {
        if !self.select.is_routable() {
            return Ok(self.scanned.clone());
        }
        let mut found: Vec<BindingId> = Vec::new();
        let mut keys = Vec::new();
        for row in [&net.before, &net.after].into_iter().flatten() {
            self.select
                .route_keys_of(row, &lookup::Nothing, &mut keys)?;
        }
        for key in &keys {
            found.extend(self.keyed.get(key).into_iter().flatten());
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use anabranch_proto::record::{self, ValueRef};

    use super::*;
    use crate::{
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
        let routed = router.route(&[net]).unwrap();
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
