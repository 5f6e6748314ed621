//! Subqueries: what is refused and where, what NULLs do, and that whoever a change of an inner row concerns is found by
//! walking backwards from it.

mod walk;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
    sync::Arc,
};

use anabranch_proto::record::{self, ValueRef};
use bytes::Bytes;
use serde_json::{Map, Value as Json, json};

use super::{claim, column, source};
use crate::{
    lookup::{Each, Error, Index, Lookup},
    shape::{Bound, Refused, SUBQUERIES_MAX, Shape, Step, check_depth, compile, tables_named},
    table::{Collation, Column, Identity, Kind, Oid, Table},
};

/// Rows by their keys.
type Keys = Rc<BTreeMap<Vec<u8>, Vec<Bytes>>>;

/// Rows of tables, in memory.
#[derive(Default)]
pub struct Rows {
    tables: BTreeMap<Oid, Vec<Bytes>>,
    found: RefCell<HashMap<(Oid, String), Keys>>,
}

impl Rows {
    fn new(tables: BTreeMap<Oid, Vec<Bytes>>) -> Rows {
        let found = RefCell::default();
        Rows { tables, found }
    }

    fn of(&self, table: Oid) -> &[Bytes] {
        self.tables.get(&table).map_or(&[], Vec::as_slice)
    }

    fn index(&self, index: &Index) -> Result<Keys, Error> {
        let name = (index.table, index.name());
        if let Some(known) = self.found.borrow().get(&name) {
            return Ok(Rc::clone(known));
        }
        let mut keys: BTreeMap<Vec<u8>, Vec<Bytes>> = BTreeMap::new();
        for row in self.of(index.table) {
            keys.entry(index.key(row)?).or_default().push(row.clone());
        }
        let keys = Rc::new(keys);
        self.found.borrow_mut().insert(name, Rc::clone(&keys));
        Ok(keys)
    }
}

impl Lookup for Rows {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        let keys = self.index(index)?;
        for (key, rows) in keys.range(prefix.to_vec()..) {
            if !key.starts_with(prefix) {
                break;
            }
            for row in rows {
                if !each(row)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

const TASKS: Oid = 1;
const MEMBERS: Oid = 2;
const PROJECTS: Oid = 3;

fn table(oid: Oid, name: &str, columns: Vec<Column>) -> Arc<Table> {
    Arc::new(Table {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        columns,
        key: vec![0],
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    })
}

fn tables() -> Vec<Arc<Table>> {
    let int = |name| column(name, 23, "integer", Kind::Integer);
    let local = || Column {
        collation: Collation::Deterministic,
        ..column("local", 25, "text", Kind::Text)
    };
    let text = |name| column(name, 25, "text", Kind::Text);
    let float = || column("ratio", 701, "double precision", Kind::Float8);
    vec![
        table(
            TASKS,
            "tasks",
            vec![
                column("id", 20, "bigint", Kind::Integer),
                int("project"),
                int("owner"),
                text("title"),
                local(),
                float(),
                column("due", 1114, "timestamp without time zone", Kind::Timestamp),
                column("payload", 3802, "jsonb", Kind::Json),
            ],
        ),
        table(
            MEMBERS,
            "members",
            vec![
                int("id"),
                column("project", 1700, "numeric", Kind::Numeric),
                int("person"),
                text("title"),
                local(),
                float(),
                column("since", 1082, "date", Kind::Date),
            ],
        ),
        table(
            PROJECTS,
            "projects",
            vec![int("id"), int("org"), int("parent")],
        ),
    ]
}

fn int(value: Option<i64>) -> ValueRef<'static> {
    value.map_or(ValueRef::Null, ValueRef::Integer)
}

fn task(id: i64, project: Option<i64>, owner: Option<i64>) -> Bytes {
    let mut values = [ValueRef::Null; 8];
    values[..3].copy_from_slice(&[ValueRef::Integer(id), int(project), int(owner)]);
    record::build(values)
}

/// Of two forms of equal numerics, each is there sometimes.
fn member(id: i64, project: Option<i64>, person: Option<i64>) -> Bytes {
    let text = project.map(|project| format!("{project}{}", [".00", ""][(id % 2) as usize]));
    let project = text.as_deref().map_or(ValueRef::Null, ValueRef::Text);
    let mut values = [ValueRef::Null; 7];
    values[..3].copy_from_slice(&[ValueRef::Integer(id), project, int(person)]);
    record::build(values)
}

fn project(id: i64, org: Option<i64>, parent: Option<i64>) -> Bytes {
    record::build([ValueRef::Integer(id), int(org), int(parent)])
}

fn try_shape(condition: &str) -> Result<Shape, Vec<Refused>> {
    let sql = format!("SELECT * FROM tasks WHERE {condition}");
    let params: Vec<_> = ["me", "org", "orgs"]
        .into_iter()
        .filter(|name| {
            let param = format!("${name}");
            sql.match_indices(&param)
                .any(|(at, _)| !sql[at + param.len()..].starts_with('s'))
        })
        .map(|name| (name, claim(name)))
        .collect();
    compile(&[source(&params, &[&sql])], &tables()).map(|mut shapes| shapes.remove(0))
}

fn claims(me: i64, org: i64) -> Map<String, Json> {
    let json = json!({"me": me, "org": org, "orgs": [org, org + 1]});
    json.as_object().unwrap().clone()
}

fn bound(condition: &str) -> Bound {
    let shape = try_shape(condition).unwrap_or_else(|refused| panic!("{condition}: {refused:?}"));
    let bound = shape.bind(&claims(1, 1), &HashMap::new());
    bound.unwrap().remove(0)
}

/// What is wrong, if `marked` is not refused for that reason at the place that `‸` marks.
fn check_refused(marked: &str, reason: &str) -> Option<String> {
    let condition = marked.replace('‸', "");
    let before = "SELECT * FROM tasks WHERE ".len();
    let column = before + 1 + marked.chars().position(|c| c == '‸').unwrap();
    let refused = match try_shape(&condition) {
        Ok(_) => return Some(format!("not refused: {condition}")),
        Err(mut refused) => refused.remove(0),
    };
    let is_right =
        refused.reason.contains(reason) && (refused.line, refused.column) == (1, column as u64);
    (!is_right).then(|| format!("{marked}: {refused}"))
}

#[test]
fn what_is_not_exact_in_a_subquery_is_refused_with_its_place() {
    let around = "is a column of the SELECT around this one";
    let mut wrong = Vec::new();
    for (condition, reason) in [
        ("project IN (SELECT * FROM ‸members)", "name the columns"),
        (
            "project IN (SELECT members.* FROM ‸members)",
            "name the columns",
        ),
        (
            "‸project IN (SELECT project, person FROM members)",
            "is 2 in the subquery, and 1",
        ),
        (
            "‸(project, owner) IN (SELECT project FROM members)",
            "is 1 in the subquery, and 2",
        ),
        (
            "project IN (SELECT project FROM members WHERE ‸owner = 1)",
            "must be written with its table's name",
        ),
        (
            "project IN (SELECT project FROM members WHERE ‸nothing = 1)",
            "has no column \"nothing\"",
        ),
        (
            "project IN (SELECT ‸owner FROM members)",
            "must be written with its table's name",
        ),
        ("project IN (SELECT ‸tasks.id FROM members)", around),
        (
            "project IN (SELECT person FROM members WHERE ‸tasks.owner = 1)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE person > ‸tasks.owner)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE NOT person = ‸tasks.owner)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE person = ‸tasks.owner OR id = 1)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE person IN (‸tasks.owner, 1))",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸tasks.owner = tasks.project)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸tasks.owner IS NULL)",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸public.tasks.owner IS NULL)",
            around,
        ),
        ("EXISTS (SELECT ‸tasks.id FROM members)", around),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸tasks.owner IN (SELECT id FROM projects))",
            around,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE EXISTS (SELECT 1 FROM projects WHERE projects.id = ‸tasks.project))",
            "of a SELECT further out",
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸other.id = person)",
            "no table of this name",
        ),
        // The inner table hides the outer one, and so does an alias.
        (
            "EXISTS (SELECT 1 FROM members tasks WHERE person = tasks.‸owner)",
            "public.members has no column",
        ),
        (
            "project IN (SELECT project FROM ‸nothing)",
            "there is no table public.nothing",
        ),
        (
            "project IN (SELECT ‸DISTINCT project FROM members)",
            "DISTINCT",
        ),
        (
            "project IN (SELECT project FROM members ‸ORDER BY project)",
            "ORDER",
        ),
        ("project IN (SELECT project FROM members ‸LIMIT 1)", "LIMIT"),
        (
            "project IN (SELECT project FROM members ‸GROUP BY project)",
            "GROUP",
        ),
        (
            "project IN (SELECT project FROM members ‸UNION SELECT id FROM projects)",
            "UNION",
        ),
        (
            "project IN (SELECT project FROM members‸, projects)",
            "joins",
        ),
        (
            "project IN (SELECT project FROM members ‸JOIN projects ON true)",
            "joins",
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE person = 1 ‸FOR UPDATE)",
            "FOR",
        ),
        (
            "project IN (SELECT ‸max(project) FROM members)",
            "functions",
        ),
        ("EXISTS (SELECT ‸count(*) FROM members)", "functions"),
        (
            "project IN (SELECT project ‸+ 1 FROM members)",
            "no expressions",
        ),
        (
            "project IN (SELECT ‸1 FROM members)",
            "only columns of the table can be chosen",
        ),
        ("EXISTS (SELECT 1 ‸x FROM members)", "expected FROM"),
        ("EXISTS (SELECT ‸$me FROM members)", "only columns"),
        (
            "project IN (SELECT project FROM ‸(SELECT 1) x)",
            "subqueries in FROM",
        ),
        (
            "project = ‸(SELECT project FROM members)",
            "can stand only in the parentheses",
        ),
        (
            "project IN (‸(SELECT project FROM members))",
            "can stand only in the parentheses",
        ),
        (
            "project IN (1, ‸(SELECT project FROM members))",
            "can stand only in the parentheses",
        ),
        (
            "project = ANY (‸ARRAY(SELECT project FROM members))",
            "an array of a subquery",
        ),
        (
            "project IN (1, ‸SELECT project FROM members)",
            "SELECT can stand only",
        ),
        (
            "project < ANY ‸(SELECT project FROM members)",
            "only IN, NOT IN, = ANY and <> ALL",
        ),
        (
            "project = ALL ‸(SELECT project FROM members)",
            "only IN, NOT IN, = ANY and <> ALL",
        ),
        ("‸ratio IN (SELECT ratio FROM members)", "floats"),
        ("‸project IN (SELECT ratio FROM members)", "floats"),
        ("‸ratio IN (SELECT project FROM members)", "float8"),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸members.ratio = tasks.ratio)",
            "floats",
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸title = tasks.local)",
            "two collations",
        ),
        ("‸title IN (SELECT local FROM members)", "two collations"),
        ("‸title IN (SELECT person FROM members)", "text and int4"),
        (
            "‸'x' IN (SELECT person FROM members)",
            "not a value of type int4",
        ),
        ("‸payload IN (SELECT person FROM members)", "jsonb"),
        (
            "EXISTS (SELECT 1 FROM members WHERE ‸person = tasks.payload)",
            "jsonb",
        ),
        ("‸(project, owner) = (1, 2)", "compare each column"),
        ("‸(project, owner) IN ((1, 2))", "compare each column"),
        (
            "(‸project IN (SELECT project FROM members)) IN (TRUE)",
            "not conditions",
        ),
        (
            "(‸project IN (SELECT project FROM members)) = TRUE",
            "not conditions",
        ),
        (
            "project IN (SELECT project FROM members) ‸IN (TRUE)",
            "twice in a row",
        ),
        (
            "project = ANY (SELECT project FROM members) ‸= TRUE",
            "two comparisons in a row",
        ),
    ] {
        wrong.extend(check_refused(condition, reason));
    }
    let many = ["project"; 9].join(", ");
    let condition = format!("‸({many}) IN (SELECT {many} FROM members)");
    wrong.extend(check_refused(&condition, "more than 8 columns"));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn subqueries_are_bounded_in_depth_and_number() {
    let nested = |depth: usize| {
        let begin = "EXISTS (SELECT 1 FROM members WHERE ".repeat(depth);
        format!("{begin}person = 1{}", ")".repeat(depth))
    };
    for levels in [1, 4, SUBQUERIES_MAX] {
        let sql = |depth| format!("SELECT * FROM tasks WHERE FALSE OR NOT {}", nested(depth));
        let fits = source(&[], &["SELECT * FROM projects", &sql(levels)]);
        assert_eq!(check_depth(&[fits], levels), Ok(()));
        let deeper = source(&[], &["SELECT * FROM projects", &sql(levels + 1)]);
        let refused = check_depth(&[deeper], levels);
        if levels < SUBQUERIES_MAX {
            let refused = refused.unwrap_err().remove(0);
            let reason = format!("deeper than {levels} levels, which is what `subquery_depth_max`");
            assert!(refused.reason.contains(&reason), "{refused}");
            assert_eq!(refused.index, 1);
        }
        bound(&nested(levels));
    }
    let joined = |count| vec!["EXISTS (SELECT FROM members)"; count].join(" OR ");
    bound(&joined(SUBQUERIES_MAX));
    let refused = try_shape(&joined(SUBQUERIES_MAX + 1))
        .unwrap_err()
        .remove(0);
    assert!(refused.reason.contains("more than 16"), "{refused}");
}

#[test]
fn every_form_of_a_subquery_is_read() {
    let rows = Rows::new(BTreeMap::from([
        (MEMBERS, vec![member(1, Some(5), Some(1))]),
        (PROJECTS, vec![project(5, Some(1), None)]),
    ]));
    let row = task(1, Some(5), Some(1));
    for (condition, expected) in [
        ("project IN (SELECT project FROM members)", true),
        ("project NOT IN (SELECT project FROM members)", false),
        ("NOT project IN (SELECT project FROM members)", false),
        ("project = ANY (SELECT project FROM members)", true),
        ("project = SOME (SELECT project FROM members)", true),
        ("project <> ALL (SELECT project FROM members)", false),
        (
            "(project, owner) IN (SELECT project, person FROM members)",
            true,
        ),
        (
            "(project, owner) <> ALL (SELECT project, person FROM members)",
            false,
        ),
        (
            "((project, owner)) IN (SELECT project, id FROM members)",
            true,
        ),
        (
            "(owner, project) IN (SELECT project, person FROM members)",
            false,
        ),
        (
            "(project) IN (SELECT ALL m.project FROM public.members AS m)",
            true,
        ),
        ("EXISTS (SELECT FROM members)", true),
        (
            "EXISTS (SELECT 1, NULL, 'x', person, m.*, * FROM members m)",
            true,
        ),
        ("NOT EXISTS (SELECT * FROM members)", false),
        (
            "EXISTS (SELECT * FROM members WHERE tasks.owner = person AND (project = tasks.project AND id = 1))",
            true,
        ),
        (
            "EXISTS (SELECT 1 FROM tasks t WHERE t.id = tasks.id)",
            false,
        ),
        (
            "EXISTS (SELECT 1 FROM members WHERE EXISTS (SELECT 1 FROM projects members WHERE org = members.id))",
            false,
        ),
        (
            "EXISTS (SELECT 1 FROM members m WHERE m.project = public.tasks.project AND m.project IN \
             (SELECT p.id FROM projects p WHERE p.org = $org AND p.org = m.person))",
            true,
        ),
        (
            "$me IN (SELECT person FROM members WHERE project = tasks.project)",
            true,
        ),
        ("($org, project) IN (SELECT org, id FROM projects)", true),
        ("2 IN (SELECT person FROM members)", false),
        ("'1' IN (SELECT person FROM members)", true),
        ("1.0 IN (SELECT person FROM members)", true),
        ("1 IN (SELECT ratio FROM members)", false),
        ("(EXISTS (SELECT FROM members)) IS TRUE", true),
        ("EXISTS (SELECT FROM members) IS NOT FALSE", true),
        ("EXISTS (SELECT FROM members WHERE FALSE) IS UNKNOWN", false),
    ] {
        let answer = bound(condition).contains(&row, &rows).unwrap();
        assert_eq!(answer, expected, "{condition}");
    }
}

/// What `project [NOT] IN (SELECT project FROM members …)` is, for rows that are hard to tell from each other.
#[test]
fn null_in_a_subquery_makes_in_unknown_unless_it_is_empty() {
    let members = |projects: &[Option<i64>]| {
        let member = |(id, project): (usize, &Option<i64>)| member(id as i64, *project, Some(1));
        let rows = projects.iter().enumerate().map(member).collect();
        Rows::new(BTreeMap::from([(MEMBERS, rows)]))
    };
    let in_them = "project IN (SELECT project FROM members WHERE person = 1)";
    for (members, project, expected) in [
        (members(&[]), Some(1), Some(false)),
        (members(&[]), None, Some(false)),
        (members(&[Some(1)]), Some(1), Some(true)),
        (members(&[Some(1)]), Some(2), Some(false)),
        (members(&[Some(1)]), None, None),
        (members(&[Some(2), None]), Some(1), None),
        (members(&[None, Some(1)]), Some(1), Some(true)),
        (members(&[None]), None, None),
    ] {
        let row = task(1, project, None);
        for (condition, holds) in [
            (in_them.to_owned(), expected == Some(true)),
            (format!("NOT {in_them}"), expected == Some(false)),
            (format!("({in_them}) IS UNKNOWN"), expected.is_none()),
            (format!("({in_them}) IS FALSE"), expected == Some(false)),
            (format!("({in_them}) IS NOT TRUE"), expected != Some(true)),
            (format!("NOT ({in_them} OR FALSE)"), expected == Some(false)),
            (in_them.replace("person = 1", "person = 2"), false),
            (
                in_them
                    .replace("IN", "NOT IN")
                    .replace("person = 1", "person = 2"),
                true,
            ),
        ] {
            let answer = bound(&condition).contains(&row, &members).unwrap();
            assert_eq!(answer, holds, "{condition}: {project:?}");
        }
    }
}

#[test]
fn a_row_is_different_as_soon_as_one_of_its_columns_is() {
    let one = |project, person| {
        let rows = vec![member(1, project, person)];
        Rows::new(BTreeMap::from([(MEMBERS, rows)]))
    };
    let row = task(1, Some(1), Some(2));
    for (rows, expected) in [
        (one(Some(1), Some(2)), Some(true)),
        (one(Some(1), None), None),
        (one(None, None), None),
        (one(None, Some(2)), None),
        (one(None, Some(3)), Some(false)),
        (one(Some(2), None), Some(false)),
    ] {
        for left in [
            "(project, owner)",
            "(1, owner)",
            "(project, 2)",
            "(1, $two)",
        ] {
            let left = left.replace("$two", "'2'");
            let in_them = format!("{left} IN (SELECT project, person FROM members)");
            let is = |condition: String| bound(&condition).contains(&row, &rows).unwrap();
            assert_eq!(is(in_them.clone()), expected == Some(true), "{in_them}");
            assert_eq!(
                is(format!("NOT {in_them}")),
                expected == Some(false),
                "{in_them}"
            );
            assert_eq!(
                is(format!("({in_them}) IS NULL")),
                expected.is_none(),
                "{in_them}"
            );
        }
        let null = "(NULL, owner) IN (SELECT project, person FROM members)";
        let is = |condition: String| bound(&condition).contains(&row, &rows).unwrap();
        assert!(!is(null.to_owned()));
        assert_eq!(
            is(format!("NOT {null}")),
            rows.of(MEMBERS)[0] == member(1, None, Some(3))
        );
    }
}

/// Its own type has no other form; across types equal values must be found by the same key.
#[test]
fn equal_values_of_two_types_are_found() {
    let mut due = [ValueRef::Null; 8];
    due[0] = ValueRef::Integer(1);
    due[6] = ValueRef::Text("2024-02-29 00:00:00.000000");
    let mut since = [ValueRef::Null; 7];
    since[6] = ValueRef::Text("2024-02-29");
    let rows = Rows::new(BTreeMap::from([(MEMBERS, vec![record::build(since)])]));
    for condition in [
        "due IN (SELECT since FROM members)",
        "EXISTS (SELECT 1 FROM members WHERE since = tasks.due)",
    ] {
        let row = record::build(due);
        assert!(bound(condition).contains(&row, &rows).unwrap());
    }
}

#[test]
fn only_what_needs_it_is_exact() {
    let exact = |condition: &str| {
        let bound = bound(condition);
        let steps = bound.select.subqueries();
        steps
            .iter()
            .map(|step| step.subquery.exact)
            .collect::<Vec<_>>()
    };
    let one = "project IN (SELECT project FROM members)";
    for (condition, expected) in [
        (one.to_owned(), false),
        (format!("owner = 1 AND ({one} OR owner = 2)"), false),
        (format!("({one}) IS TRUE"), false),
        (format!("({one}) IS NOT TRUE"), false),
        (format!("NOT ({one} IS TRUE)"), false),
        (format!("NOT {one}"), true),
        (one.replace("IN", "NOT IN"), true),
        (format!("NOT (owner = 1 OR NOT {one})"), true),
        (format!("({one}) IS FALSE"), true),
        (format!("({one}) IS NULL"), true),
        (format!("({one}) IS NOT UNKNOWN"), true),
    ] {
        assert_eq!(exact(&condition), [expected], "{condition}");
    }
    // Of inner rows it is only asked whether they are there.
    assert_eq!(
        exact("NOT EXISTS (SELECT 1 FROM members WHERE project IN (SELECT id FROM projects))"),
        [true, false]
    );
}

#[test]
fn steps_lead_from_inner_tables_to_the_selects_own() {
    let bound = bound(
        "project IN (SELECT id FROM projects WHERE org = $org AND NOT EXISTS (SELECT 1 FROM members WHERE project = \
         projects.id)) AND owner NOT IN (SELECT person FROM members WHERE id = $me)",
    );
    let steps = bound.select.subqueries();
    let shown: Vec<_> = steps
        .iter()
        .map(|step| {
            let Step {
                subquery,
                parent,
                path,
            } = step;
            let index = |index: &Index| format!("{}:{}", index.table, index.name());
            let name = subquery.table.name.as_str();
            (
                name,
                *parent,
                path.is_some(),
                index(&subquery.inner),
                index(&subquery.outer),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("projects", None, true, "3:0i,1i".into(), "1:1i".into()),
            ("members", None, true, "2:2i,0i".into(), "1:2i".into()),
            ("members", Some(0), false, "2:1n".into(), "3:0i,1i".into()),
        ]
    );
    assert!(steps[0].subquery.is_in() && !steps[2].subquery.is_in());
    assert_eq!(steps[2].subquery.correlated(), 1);
    // 3:0i begins another one.
    assert_eq!(bound.select.indexes().len(), 5);
    assert!(bound.select.is_routable());
    // One for each parameter, however many paths end there.
    assert_eq!(bound.route_keys().len(), 2);
}

#[test]
fn whoever_may_have_a_row_is_found_by_it() {
    for (condition, routable) in [
        (
            "EXISTS (SELECT 1 FROM members WHERE project = tasks.project AND person = $me)",
            true,
        ),
        (
            "$me IN (SELECT person FROM members WHERE project = tasks.project)",
            true,
        ),
        (
            "project IN (SELECT id FROM projects WHERE org = ANY ($orgs))",
            true,
        ),
        (
            "owner = $me OR project IN (SELECT id FROM projects WHERE org = $org)",
            true,
        ),
        (
            "project IN (SELECT id FROM projects WHERE org = $org) IS TRUE",
            true,
        ),
        ("project IN (SELECT id FROM projects) AND owner = $me", true),
        ("project IN (SELECT id FROM projects) OR owner = $me", false),
        (
            "project NOT IN (SELECT id FROM projects WHERE org = $org)",
            false,
        ),
        ("NOT $me IN (SELECT person FROM members)", false),
        ("EXISTS (SELECT 1 FROM members WHERE ratio = $me)", true),
        ("$me IN (SELECT ratio FROM members)", false),
    ] {
        assert_eq!(
            bound(condition).select.is_routable(),
            routable,
            "{condition}"
        );
    }
}

#[test]
fn the_tables_of_subqueries_are_named() {
    let sql = "SELECT * FROM tasks WHERE NOT (project IN (SELECT id FROM app.projects) OR EXISTS (SELECT FROM members m \
               WHERE m.id IN (SELECT id FROM \"Deep\"))) IS TRUE";
    let named = tables_named(&[source(&[], &[sql])]).unwrap();
    let named: Vec<_> = named
        .iter()
        .map(|(schema, name)| format!("{schema}.{name}"))
        .collect();
    assert_eq!(
        named,
        [
            "app.projects",
            "public.Deep",
            "public.members",
            "public.tasks"
        ]
    );
    let own = "SELECT * FROM tasks WHERE id IN (SELECT id FROM anabranch.receipts)";
    let refused = tables_named(&[source(&[], &[own])]).unwrap_err().remove(0);
    assert!(refused.reason.contains("Anabranch's own"), "{refused}");
    assert_eq!(refused.column, 59);
}

#[test]
fn the_fingerprint_tells_what_the_inner_tables_are() {
    let sql = "SELECT * FROM tasks WHERE project IN (SELECT id FROM projects)";
    let fingerprint = |tables: &[Arc<Table>]| {
        let shapes = compile(&[source(&[], &[sql])], tables).unwrap();
        shapes[0].bind(&Map::new(), &HashMap::new()).unwrap()[0].fingerprint()
    };
    let before = fingerprint(&tables());
    assert_eq!(before, fingerprint(&tables()));
    for change in [
        |table: &mut Table| table.version = 2,
        |table: &mut Table| table.oid = 9,
    ] {
        let mut tables = tables();
        change(Arc::make_mut(&mut tables[2]));
        assert_ne!(before, fingerprint(&tables));
    }
}

#[test]
fn canonical_sql_qualifies_what_an_inner_table_could_hide() {
    let bound = bound(
        "owner = $me AND (project, 'x') NOT IN (SELECT project, title FROM members WHERE person = tasks.owner AND \
         EXISTS (SELECT FROM projects WHERE org = $org AND projects.id = members.id))",
    );
    assert_eq!(
        bound.condition_sql("t"),
        "((\"owner\" = '1'::int4) AND (NOT ((\"project\", 'x'::text) IN (SELECT \"_1\".\"project\", \"_1\".\"title\" \
         FROM ONLY \"public\".\"members\" AS \"_1\" WHERE (\"_1\".\"person\" = t.\"owner\") AND (EXISTS (SELECT 1 \
         FROM ONLY \"public\".\"projects\" AS \"_2\" WHERE (\"_2\".\"id\" = \"_1\".\"id\") AND \
         (\"_2\".\"org\" = '1'::int4)))))))"
    );
    assert!(!format!("{bound:?} {:?}", bound.select).contains("'1'"));
}
