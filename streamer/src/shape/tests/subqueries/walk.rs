//! Whoever a change concerns is found: by a row of the SELECT's own table, and backwards from rows of inner tables.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use anabranch_proto::record::{self, ValueRef};
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{MEMBERS, PROJECTS, Rows, TASKS, claims, member, project, task, try_shape};
use crate::{
    definition::Definition,
    lookup::Error,
    shape::{Bound, Explanation, INNER_SHOWN_MAX, Path, RouteKey, Select, Shape},
    table::Oid,
};

const CONDITIONS: [&str; 21] = [
    "project > $me AND project <= $org",
    "owner < $me OR project IN (SELECT id FROM projects WHERE $org <= org)",
    "EXISTS (SELECT 1 FROM members WHERE project = tasks.project AND person BETWEEN $me AND $org)",
    "project NOT IN (SELECT project FROM members WHERE person >= $me)",
    "project IN (SELECT project FROM members WHERE person < $me AND project >= 1)",
    "project IN (SELECT id FROM projects WHERE org = $org)",
    "project NOT IN (SELECT project FROM members WHERE person = $me)",
    "owner = $me OR project IN (SELECT id FROM projects WHERE org = ANY ($orgs))",
    "EXISTS (SELECT 1 FROM members WHERE project = tasks.project AND person = $me)",
    "NOT EXISTS (SELECT 1 FROM members WHERE project = tasks.project AND person = $me)",
    "$me IN (SELECT person FROM members WHERE project = tasks.project)",
    "$me NOT IN (SELECT person FROM members WHERE project = tasks.project)",
    "(project, owner) IN (SELECT project, person FROM members)",
    "(project, owner) NOT IN (SELECT project, person FROM members WHERE id > 2)",
    "(project, $me) NOT IN (SELECT project, person FROM members) AND owner = 1",
    "project IN (SELECT id FROM projects WHERE org IN (SELECT person FROM members WHERE project = $org))",
    "project IN (SELECT id FROM projects WHERE parent NOT IN (SELECT id FROM projects WHERE org = $org))",
    "EXISTS (SELECT 1 FROM projects p WHERE p.id = tasks.project AND NOT EXISTS (SELECT 1 FROM projects q WHERE q.id = \
     p.parent AND EXISTS (SELECT 1 FROM members WHERE project = q.id AND person = $me)))",
    "(project IN (SELECT parent FROM projects WHERE org = $org)) IS UNKNOWN",
    "EXISTS (SELECT 1 FROM members WHERE person = $me)",
    "owner = $me AND NOT (EXISTS (SELECT 1 FROM tasks t WHERE t.project = tasks.project AND t.owner = 0) AND project IN \
     (SELECT parent FROM projects))",
];

type Tables = BTreeMap<Oid, BTreeMap<i64, Bytes>>;

/// Few values, so that they meet.
fn random_row(rng: &mut StdRng, table: Oid, id: i64) -> Bytes {
    let mut value = || rng.random_ratio(4, 5).then(|| rng.random_range(0..4));
    let (a, b) = (value(), value());
    match table {
        TASKS => task(id, a, b),
        MEMBERS => member(id, a, b),
        _ => project(id, a, b),
    }
}

fn change(rng: &mut StdRng, tables: &mut Tables, changes: usize) {
    for _ in 0..changes {
        let table = [TASKS, MEMBERS, PROJECTS][rng.random_range(0..3)];
        let id = rng.random_range(0..6);
        let row = random_row(rng, table, id);
        let rows = tables.entry(table).or_default();
        if rng.random_ratio(1, 3) {
            rows.remove(&id);
        } else {
            rows.insert(id, row);
        }
    }
}

fn rows(tables: &Tables) -> Rows {
    let rows = { tables.iter() }.map(|(oid, rows)| (*oid, rows.values().cloned().collect()));
    Rows::new(rows.collect())
}

fn id(row: &[u8]) -> i64 {
    match record::value(row, 0) {
        Ok(ValueRef::Integer(id)) => id,
        other => panic!("{other:?}"),
    }
}

/// What may have changed: a task, and for whom; `None`: for all.
type Candidates = BTreeSet<(i64, Option<Vec<RouteKey>>)>;

struct Walk<'a> {
    select: &'a Select,
    states: [&'a Rows; 2],
    found: Candidates,
}

impl Walk<'_> {
    /// `row`, of the table that `step` is over (`None`: the SELECT's own), is another one, or what its condition says is.
    fn climb(
        &mut self,
        step: Option<usize>,
        row: &[u8],
        state: &Rows,
        known: Option<&Vec<RouteKey>>,
    ) -> Result<(), Error> {
        let mut keys = Vec::new();
        let mut by = |path: &Path| -> Result<(), Error> {
            for state in self.states {
                path.keys_of(row, state, &mut keys, usize::MAX)?;
            }
            Ok(())
        };
        let Some(step) = step else {
            let known = match known {
                None if self.select.is_routable() => {
                    for state in self.states {
                        self.select
                            .route_keys_of(row, state, &mut keys, usize::MAX)?;
                    }
                    Some(keys)
                }
                known => known.cloned(),
            };
            self.found.insert((id(row), known));
            return Ok(());
        };
        let step = &self.select.subqueries()[step];
        let known = match (&step.path, known) {
            (Some(path), None) => {
                by(path)?;
                Some(keys)
            }
            (_, known) => known.cloned(),
        };
        let mut outer = Vec::new();
        step.subquery.outer_rows(row, state, &mut |row| {
            outer.push(row.to_vec());
            Ok(true)
        })?;
        for row in outer {
            self.climb(step.parent, &row, state, known.as_ref())?;
        }
        Ok(())
    }
}

fn candidates(select: &Select, before: &Tables, after: &Tables) -> Candidates {
    let (old, new) = (rows(before), rows(after));
    let mut walk = Walk {
        select,
        states: [&old, &new],
        found: BTreeSet::new(),
    };
    let mut levels: Vec<_> = vec![(None, TASKS)];
    let steps = select.subqueries().iter().enumerate();
    levels.extend(steps.map(|(place, step)| (Some(place), step.subquery.table.oid)));
    for (step, table) in levels {
        for (state, one, other) in [(&old, before, after), (&new, after, before)] {
            for (id, row) in one.get(&table).into_iter().flatten() {
                if other.get(&table).and_then(|rows| rows.get(id)) != Some(row) {
                    walk.climb(step, row, state, None).unwrap();
                }
            }
        }
    }
    walk.found
}

fn shapes() -> Vec<Shape> {
    let shape = |condition: &&str| try_shape(condition).unwrap_or_else(|r| panic!("{r:?}"));
    CONDITIONS.iter().map(shape).collect()
}

fn bounds(shape: &Shape) -> Vec<Bound> {
    let bind = |me, org| {
        shape
            .bind(&claims(me, org), &HashMap::new())
            .unwrap()
            .remove(0)
    };
    (0..4)
        .flat_map(|me| (0..4).map(move |org| bind(me, org)))
        .collect()
}

#[test]
fn whoever_has_a_row_has_one_of_its_keys() {
    let mut rng = StdRng::seed_from_u64(1);
    for shape in shapes() {
        let bounds = bounds(&shape);
        let select = &bounds[0].select;
        let mut tables = Tables::new();
        for _ in 0..20 {
            change(&mut rng, &mut tables, 12);
            let state = rows(&tables);
            for row in state.of(TASKS) {
                let mut keys = Vec::new();
                select
                    .route_keys_of(row, &state, &mut keys, usize::MAX)
                    .unwrap();
                for bound in &bounds {
                    let is_found = keys.iter().any(|key| bound.has_route_key(key));
                    let is_in = bound.contains(row, &state).unwrap();
                    assert!(!select.is_routable() || !is_in || is_found, "{select:?}");
                }
            }
        }
    }
}

#[test]
fn whoever_a_change_concerns_is_found_backwards_from_it() {
    let mut rng = StdRng::seed_from_u64(2);
    let (mut changed, mut keyed) = (0, 0);
    for shape in shapes() {
        let bounds = bounds(&shape);
        let select = &bounds[0].select;
        let mut before = Tables::new();
        for _ in 0..60 {
            let mut after = before.clone();
            let count = rng.random_range(1..5);
            change(&mut rng, &mut after, count);
            let found = candidates(select, &before, &after);
            let (old, new) = (rows(&before), rows(&after));
            for bound in &bounds {
                let shown = |state: &Rows| -> BTreeMap<i64, Bytes> {
                    let rows = state.of(TASKS).iter();
                    let shown = rows.filter(|row| bound.contains(row, state).unwrap());
                    shown.map(|row| (id(row), row.clone())).collect()
                };
                let (was, is) = (shown(&old), shown(&new));
                for id in was.keys().chain(is.keys()) {
                    if was.get(id) == is.get(id) {
                        continue;
                    }
                    changed += 1;
                    let is_found = found.iter().any(|(candidate, of)| {
                        let is_for =
                            |of: &Vec<RouteKey>| of.iter().any(|key| bound.has_route_key(key));
                        candidate == id && of.as_ref().is_none_or(is_for)
                    });
                    assert!(is_found, "task {id} of {select:?}: {before:?} {after:?}");
                    keyed += usize::from(found.iter().all(|(_, of)| of.is_some()));
                }
            }
            before = after;
        }
    }
    // Otherwise nothing was proved, or all were asked each time.
    assert!(changed > 5_000 && keyed > 1_000, "{changed} {keyed}");
}

#[test]
fn a_definition_is_read_again_with_the_same_meaning() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut asked = [0, 0];
    for shape in shapes() {
        let all: Vec<_> = bounds(&shape)
            .into_iter()
            .map(|bound| {
                let definition = Definition::of(std::slice::from_ref(&bound));
                let text = serde_json::to_string(&definition).unwrap();
                let read: Definition = serde_json::from_str(&text).unwrap();
                assert_eq!(read.table(), Some(TASKS));
                let again = read.bounds(&super::tables(), &[]);
                let again = again.unwrap_or_else(|| panic!("not read again: {text}"));
                (bound, again)
            })
            .collect();
        let mut tables = Tables::new();
        for _ in 0..20 {
            change(&mut rng, &mut tables, 12);
            let state = rows(&tables);
            for row in state.of(TASKS) {
                for (bound, again) in &all {
                    let is_in = bound.contains(row, &state).unwrap();
                    assert_eq!(again.len(), 1);
                    assert_eq!(again[0].contains(row, &state).unwrap(), is_in);
                    asked[usize::from(is_in)] += 1;
                }
            }
        }
        // Not against tables that are others now.
        let definition = Definition::of(std::slice::from_ref(&all[0].0));
        for place in 0..super::tables().len() {
            let mut tables = super::tables();
            let mut other = (*tables[place]).clone();
            other.version += 1;
            let oid = other.oid;
            tables[place] = Arc::new(other);
            let steps = all[0].0.select.subqueries();
            let needs = oid == TASKS || steps.iter().any(|step| step.subquery.table.oid == oid);
            assert_eq!(definition.bounds(&tables, &[]).is_none(), needs);
        }
    }
    assert!(asked.iter().all(|asked| *asked > 1000), "{asked:?}");
}

/// What the parts of a condition come to, by SQL's rules.
fn come_to(explanation: &Explanation) -> Option<bool> {
    let parts: Vec<_> = explanation.parts.iter().map(come_to).collect();
    let has = |truth| parts.contains(&truth);
    let decided = |by: bool| match () {
        () if has(Some(by)) => Some(by),
        () if has(None) => None,
        () => Some(!by),
    };
    let said = match &*explanation.part {
        "AND" => decided(false),
        "OR" => decided(true),
        "NOT" => parts[0].map(|truth| !truth),
        "IS TRUE" => Some(parts[0] == Some(true)),
        "IS FALSE" => Some(parts[0] == Some(false)),
        "IS UNKNOWN" => Some(parts[0].is_none()),
        _ => explanation.truth,
    };
    assert_eq!(said, explanation.truth, "{explanation:?}");
    if let Some(inner) = &explanation.inner {
        assert!(inner.met <= inner.count && inner.rows.len() <= INNER_SHOWN_MAX);
        let conditions = inner.rows.iter().filter_map(|row| row.condition.as_ref());
        conditions.for_each(|condition| {
            come_to(condition);
        });
    }
    said
}

#[test]
fn the_parts_of_an_explanation_come_to_what_decides() {
    let mut rng = StdRng::seed_from_u64(4);
    let mut said = [0; 3];
    for shape in shapes() {
        let bounds = bounds(&shape);
        let mut tables = Tables::new();
        for _ in 0..10 {
            change(&mut rng, &mut tables, 12);
            let state = rows(&tables);
            for row in state.of(TASKS) {
                for bound in &bounds {
                    let explanation = bound.explain(row, &state).unwrap().unwrap();
                    let truth = come_to(&explanation);
                    let is_in = bound.contains(row, &state).unwrap();
                    assert_eq!(truth == Some(true), is_in);
                    said[truth.map_or(2, usize::from)] += 1;
                }
            }
        }
    }
    assert!(said.iter().all(|said| *said > 10), "{said:?}");
}

#[test]
fn an_explanation_names_parameters_and_does_not_show_them() {
    let shape =
        try_shape("owner = $me OR project IN (SELECT project FROM members WHERE person = $me)");
    let shape = shape.unwrap();
    let claims = claims(424_242, 1);
    let bound = shape.bind(&claims, &HashMap::new()).unwrap().remove(0);
    let mut tables = Tables::new();
    let mut rng = StdRng::seed_from_u64(5);
    change(&mut rng, &mut tables, 40);
    let state = rows(&tables);
    for row in state.of(TASKS) {
        let said = format!("{:?}", bound.explain(row, &state).unwrap().unwrap());
        assert!(said.contains("$me") && !said.contains("424242"), "{said}");
    }
}
