//! What conditions with subqueries cost: counted in rows that are read, not in time.

use std::sync::Arc;

use anabranch_streamer::{
    catchup::{Catchup, Item, Round},
    delta::Op,
    policy::Policies,
    session::TableView,
};

use super::scene::{Scene, row};

/// Rows of an inner table.
const MANY: i64 = 1_000;

fn rows(count: i64, row: impl Fn(i64) -> [i64; 4]) -> Vec<[i64; 4]> {
    (0..count).map(row).collect()
}

#[test]
fn a_subquery_that_is_the_same_for_all_is_read_once_and_not_for_each_row_and_session() {
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE person <> $me AND NOT EXISTS (SELECT 1 FROM settings WHERE v > 5)",
            "SELECT * FROM tasks WHERE v = $me AND NOT EXISTS (SELECT 1 FROM settings WHERE v > 5)",
        ],
        &[
            ("tasks", Vec::new()),
            ("settings", rows(MANY, |id| [id, 0, 0, 0])),
        ],
    );
    for id in 0..50 {
        scene.join(id, (id % 2) as usize, id as i64);
    }
    let changes = (0..100).map(|id| scene.insert("tasks", [id, 0, id, 1]));
    let changes = changes.collect();
    let (routed, read) = scene.commit(changes);
    assert!(routed.behind.is_empty());
    // All but those with `v = $me`, of which one is told.
    assert_eq!(routed.ops.len(), 25 + 1);
    assert!((1_000..1_100).contains(&read), "{read}");
    // Not across transactions: what was said is not true any more.
    let now_some = scene.insert("settings", [MANY, 0, 0, 6]);
    let (routed, read) = scene.commit(vec![now_some]);
    assert_eq!(routed.ops.len(), 25 + 1);
    assert!(read < 5_000, "{read}");
}

#[test]
fn three_levels_cost_each_row_once_and_not_their_product() {
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE EXISTS (SELECT 1 FROM a WHERE v >= 0 AND EXISTS (SELECT 1 FROM b WHERE v >= 0 \
           AND EXISTS (SELECT 1 FROM c WHERE v < 0)))",
        ],
        &[
            ("tasks", Vec::new()),
            ("a", rows(MANY, |id| [id, 0, 0, 0])),
            ("b", rows(MANY, |id| [id, 0, 0, 0])),
            ("c", rows(MANY, |id| [id, 0, 0, 0])),
        ],
    );
    scene.join(1, 0, 0);
    let changes = (0..10).map(|id| scene.insert("tasks", [id, 0, 0, 0]));
    let changes = changes.collect();
    let (routed, read) = scene.commit(changes);
    assert!(routed.ops.is_empty() && routed.behind.is_empty());
    assert!(read < 3_100, "{read}");
}

#[test]
fn what_reads_too_much_is_left_to_catch_ups_and_nobody_elses_share_is_taken() {
    // Another `v` for each row: nothing can be remembered. The other is about one row each.
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE EXISTS (SELECT 1 FROM members WHERE members.project = tasks.project AND v < 0)",
            "SELECT * FROM tasks WHERE EXISTS (SELECT 1 FROM projects WHERE projects.id = tasks.project AND person = $me)",
        ],
        &[
            ("tasks", Vec::new()),
            ("members", rows(MANY, |id| [id, id % 10, 0, 0])),
            ("projects", rows(10, |id| [id, 0, id, 0])),
        ],
    );
    scene.join(1, 0, 0);
    scene.join(2, 1, 7);
    scene.router.limits.reads_max = 400;
    let changes: Vec<_> = (0..10)
        .map(|id| scene.insert("tasks", [id, id, 0, 0]))
        .collect();
    let (routed, read) = scene.commit(changes);
    assert!(routed.behind.iter().eq(&[1]), "{:?}", routed.behind);
    assert!(routed.ops.keys().eq(&[2]));
    assert!(read <= 400, "{read}");
    // What is within the limit is told as ever.
    let (routed, _) = scene.commit(vec![scene.delete("tasks", 7)]);
    assert!(routed.behind.is_empty() && routed.ops.keys().eq(&[2]));
}

#[test]
fn bound_selects_are_not_asked_one_after_the_other_without_end() {
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE person <> $me",
            "SELECT * FROM tasks WHERE person = $me",
        ],
        &[("tasks", Vec::new())],
    );
    for me in 0..10 {
        scene.join(me as u64, 0, me);
        scene.join(100 + me as u64, 1, me);
    }
    scene.router.limits.scans_max = 50;
    let insert = |scene: &Scene, from: i64| -> Vec<_> {
        let ids = from..from + 6;
        ids.map(|id| scene.insert("tasks", [id, 0, id, 0]))
            .collect()
    };
    let changes = insert(&scene, 0);
    let (routed, _) = scene.commit(changes);
    assert!(routed.behind.into_iter().eq(0..10));
    assert!((100..106).all(|id| routed.ops[&id].len() == 1));
    scene.router.limits.scans_max = 60;
    let changes = insert(&scene, 6);
    let (routed, _) = scene.commit(changes);
    assert!(routed.behind.is_empty() && routed.ops[&0].len() == 6 && routed.ops[&7].len() == 5);
}

#[test]
fn a_row_with_which_thousands_go_is_cheap_where_few_have_subscribed() {
    let mut scene = Scene::new(
        &["SELECT * FROM tasks WHERE project IN (SELECT project FROM members WHERE person = $me)"],
        &[
            ("tasks", Vec::new()),
            ("members", rows(MANY, |id| [id, 1, id, 0])),
        ],
    );
    for me in [3, 5, 2_000] {
        scene.join(me as u64, 0, me);
    }
    let (routed, read) = scene.commit(vec![scene.insert("tasks", [1, 1, 0, 0])]);
    let mut told: Vec<_> = routed.ops.keys().copied().collect();
    told.sort_unstable();
    assert_eq!(told, [3, 5]);
    assert!(read < 200, "{read}");
}

#[test]
fn a_round_of_a_catch_up_that_reads_much_ends_and_the_next_goes_on() {
    // Each task asks for its own project's hundred members.
    let scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE NOT EXISTS (SELECT 1 FROM members WHERE members.project = tasks.project AND v < 0)",
        ],
        &[
            ("tasks", rows(20, |id| [id, id % 10, 0, 0])),
            ("members", rows(MANY, |id| [id, id % 10, 0, 0])),
        ],
    );
    let bound = ("s0".to_owned(), scene.bound(0, 0, 0, 0));
    let views = TableView::of(&[bound], &Policies::default()).unwrap();
    let mut reader = scene.mirror.reader().unwrap();
    let mut rounds_of = |reads_max: usize| {
        let view: Arc<TableView> = views[0].clone();
        let mut catchup = Catchup::new(vec![Item { view, from: None }]);
        catchup.limits.reads_max = reads_max;
        let (mut rounds, mut told) = (0, Vec::new());
        loop {
            reader.begin().unwrap();
            rounds += 1;
            let round = catchup.round(&mut reader, 1 << 20, &mut |_, op| told.push(op));
            reader.end();
            if matches!(round.unwrap(), Round::Complete(_)) {
                break;
            }
        }
        let expected: Vec<Op> = (0..20)
            .map(|id| Op::Upsert(row([id, id % 10, 0, 0])))
            .collect();
        assert!(told == expected);
        rounds
    };
    assert_eq!(rounds_of(100_000), 1);
    // 101 for each project: the second ten tasks ask what was answered already.
    assert_eq!(rounds_of(1_010), 1);
    // Nothing is remembered from round to round.
    assert_eq!(rounds_of(505), 4);
    // Never less than a row.
    assert_eq!(rounds_of(0), 20);
}

#[test]
fn who_is_a_member_of_a_project_of_thousands_costs_a_row() {
    for condition in [
        "EXISTS (SELECT 1 FROM members WHERE members.project = tasks.project AND person = $me)",
        "project IN (SELECT project FROM members WHERE $me = person AND v = 0)",
        "$me IN (SELECT person FROM members WHERE members.project = tasks.project)",
        "(project, $me) IN (SELECT project, person FROM members)",
        "project NOT IN (SELECT project FROM members WHERE person = $me) AND id < 0",
        "$me NOT IN (SELECT person FROM members WHERE members.project = tasks.project) AND id < 0",
    ] {
        let mut scene = Scene::new(
            &[&format!("SELECT * FROM tasks WHERE {condition}")],
            &[
                ("tasks", Vec::new()),
                ("members", rows(MANY, |id| [id, 1, id, 0])),
            ],
        );
        for me in 0..5 {
            scene.join(me as u64, 0, me * 300);
        }
        let (routed, read) = scene.commit(vec![scene.insert("tasks", [1, 1, 0, 0])]);
        // Three hundred, six hundred, nine hundred and none, and not one thousand two hundred.
        let told = if condition.contains("id < 0") { 0 } else { 4 };
        assert_eq!(routed.ops.len(), told, "{condition}");
        assert!(read < 100, "{condition}: {read}");
    }
}

#[test]
fn an_index_that_begins_another_one_is_not_made() {
    let scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE project IN (SELECT project FROM members)",
            "SELECT * FROM tasks WHERE project IN (SELECT project FROM members WHERE person = $me)",
            "SELECT * FROM tasks WHERE (project, person) IN (SELECT project, person FROM members WHERE v = $me)",
        ],
        &[("tasks", Vec::new()), ("members", Vec::new())],
    );
    let selects = scene.shapes.iter().flat_map(|shape| &shape.selects);
    let mut names: Vec<_> = selects
        .flat_map(|select| select.indexes())
        .map(|index| format!("{}:{}", index.table, index.name()))
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names, ["100:1i,2i", "101:1i,2i,3i"]);
}

#[test]
fn a_change_is_evaluated_for_those_only_whose_range_holds_the_value() {
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks WHERE v >= $min AND v < $max AND EXISTS (SELECT 1 FROM settings WHERE settings.v = tasks.v AND person = $me)",
            "SELECT * FROM tasks WHERE v > $min AND EXISTS (SELECT 1 FROM settings WHERE settings.v = tasks.v)",
        ],
        &[
            ("tasks", Vec::new()),
            ("settings", rows(MANY, |id| [id, 0, id / 10, id])),
        ],
    );
    // A window each, and a beginning each.
    for id in 0..MANY {
        let window = scene.bound(0, id / 10, id, id + 2);
        let beginning = scene.bound(1, 0, id, 0);
        scene.router.add(id as u64, &[window]);
        scene.router.add((MANY + id) as u64, &[beginning]);
    }
    let (routed, read) = scene.commit(vec![scene.insert("tasks", [1, 0, 0, 500])]);
    let told = |id: i64| routed.ops.contains_key(&(id as u64));
    for id in 0..MANY {
        assert_eq!(told(id), id == 500, "{id}");
        assert_eq!(told(MANY + id), id < 500, "{id}");
    }
    // Of both windows that hold it, one is of somebody else.
    assert!(read < 20, "{read}");
    for id in 0..2 * MANY as u64 {
        scene.router.remove(id);
    }
    assert!(
        scene
            .router
            .sessions_of(&[scene.table("tasks").oid])
            .is_empty()
    );
}

#[test]
fn what_one_transaction_tells_many_is_held_up_to_a_limit_and_the_others_catch_up() {
    let mut scene = Scene::new(
        &[
            "SELECT * FROM tasks",
            "SELECT * FROM tasks WHERE person = $me",
        ],
        &[("tasks", Vec::new())],
    );
    for id in 0..10 {
        scene.join(id, 0, 0);
        scene.join(100 + id, 1, id as i64);
    }
    scene.router.limits.ops_max = 50;
    let changes: Vec<_> = (0..10)
        .map(|id| scene.insert("tasks", [id, 0, id, 0]))
        .collect();
    let (routed, _) = scene.commit(changes);
    let whole: Vec<usize> = (routed.ops.iter())
        .filter(|(session, _)| !routed.behind.contains(session))
        .map(|(session, ops)| {
            if *session < 100 {
                ops.len() - 9
            } else {
                ops.len()
            }
        })
        .collect();
    assert_eq!(whole.len() + routed.behind.len(), 20);
    assert!(
        whole.iter().all(|ops| *ops == 1) && whole.len() > 5,
        "{whole:?}"
    );
    assert!(routed.ops.values().map(Vec::len).sum::<usize>() <= 50);
    assert!(!routed.behind.is_empty());
}
