//! Shapes as a whole: what is accepted, what is refused and where, and what rows are in them. That conditions mean what
//! Postgres means is asked of Postgres itself, in the end-to-end tests.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use anabranch_proto::record::{self, ValueRef};
use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Map, Value as Json, json};

use super::{
    ARRAY_ELEMENTS_MAX, BindError, Bound, DEPTH_MAX, PARAM_BYTES_MAX, ParamSource, Refused,
    RouteKey, SQL_BYTES_MAX, Select, Shape, Source, compile, tables_named,
};
use crate::{
    lookup::{Error, Lookup, Nothing},
    table::{Collation, Column, Identity, Kind, Table},
};

mod subqueries;

use subqueries::Rows;

fn column(name: &str, type_oid: u32, postgres_type: &str, kind: Kind) -> Column {
    Column {
        name: name.to_owned(),
        attnum: 1,
        type_oid,
        base_oid: type_oid,
        typmod: -1,
        postgres_type: postgres_type.to_owned(),
        kind,
        not_null: false,
        collation: Collation::Bytes,
    }
}

fn issues() -> Table {
    let collated = |name, collation| Column {
        collation,
        ..column(name, 25, "text", Kind::Text)
    };
    let mood = Kind::Enum(vec!["open".to_owned(), "closed".to_owned()]);
    Table {
        oid: 16_400,
        schema: "public".to_owned(),
        name: "issues".to_owned(),
        columns: vec![
            column("id", 20, "bigint", Kind::Integer),
            column("team_id", 23, "integer", Kind::Integer),
            column("title", 25, "text", Kind::Text),
            column("archived", 16, "boolean", Kind::Bool),
            column("price", 1700, "numeric(10,2)", Kind::Numeric),
            column("ratio", 701, "double precision", Kind::Float8),
            column("status", 16_500, "app.status", mood.clone()),
            column("owner", 2950, "uuid", Kind::Uuid),
            column("made", 1184, "timestamp with time zone", Kind::Timestamptz),
            column("payload", 3802, "jsonb", Kind::Json),
            column("code", 1042, "character(6)", Kind::Char),
            column("Größe", 23, "integer", Kind::Integer),
            collated("local", Collation::Deterministic),
            collated("fuzzy", Collation::NonDeterministic),
            column("pair", 16_600, "pair", Kind::Other),
            column("mood", 16_501, "mood", mood),
            column("day", 1082, "date", Kind::Date),
            column("nick", 19, "name", Kind::Text),
            column("due", 1114, "timestamp without time zone", Kind::Timestamp),
            column("object", 26, "oid", Kind::Integer),
            column("email", 16_700, "citext", Kind::Citext),
        ],
        key: vec![0],
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    }
}

/// A row of [`issues`] with `set` columns, all others NULL.
fn row(set: &[(usize, ValueRef<'_>)]) -> Bytes {
    let mut values = [ValueRef::Null; 21];
    set.iter()
        .for_each(|(index, value)| values[*index] = *value);
    record::build(values)
}

fn source(params: &[(&str, ParamSource)], tables: &[&str]) -> Source {
    Source {
        name: "team".to_owned(),
        params: params
            .iter()
            .map(|(name, source)| ((*name).to_owned(), source.clone()))
            .collect(),
        tables: tables.iter().map(|&sql| sql.to_owned()).collect(),
        writable: Vec::new(),
    }
}

fn claim(name: &str) -> ParamSource {
    ParamSource::Claim(name.to_owned())
}

fn client(data_type: &str) -> ParamSource {
    ParamSource::Client(data_type.to_owned())
}

fn try_compile(source: Source) -> Result<Shape, Vec<Refused>> {
    compile(&[source], &[Arc::new(issues())]).map(|mut shapes| shapes.remove(0))
}

/// With the claims `team` = 7, `teams` = [7, 8], `text` = "x".
fn bound(sql: &str) -> Bound {
    let names = ["team", "teams", "text"];
    let used = names.iter().filter(|name| {
        let placeholder = format!("${name}");
        sql.match_indices(&placeholder).any(|(at, _)| {
            !sql[at + placeholder.len()..].starts_with(|c: char| c.is_alphanumeric())
        })
    });
    let params: Vec<_> = used.map(|&name| (name, claim(name))).collect();
    let shape =
        try_compile(source(&params, &[sql])).unwrap_or_else(|refused| panic!("{sql}: {refused:?}"));
    shape.bind(&claims(), &HashMap::new()).unwrap().remove(0)
}

fn claims() -> Map<String, Json> {
    let json = json!({"team": 7, "teams": [7, 8], "text": "x"});
    json.as_object().unwrap().clone()
}

fn is_in(condition: &str, row: &Bytes) -> bool {
    bound(&format!("SELECT * FROM issues WHERE {condition}"))
        .contains(row, &Nothing)
        .unwrap()
}

fn keys_of(select: &Select, row: &[u8], lookup: &dyn Lookup) -> Result<Vec<RouteKey>, Error> {
    let mut keys = Vec::new();
    select.route_keys_of(row, lookup, &mut keys, usize::MAX)?;
    Ok(keys)
}

/// Place and reason why `sql` is refused.
fn refused(sql: &str) -> Refused {
    let params = [("team", claim("team"))];
    let params = if sql.contains("$team") {
        &params[..]
    } else {
        &[]
    };
    match try_compile(source(params, &[sql])) {
        Ok(_) => panic!("not refused: {sql}"),
        Err(mut refused) => refused.remove(0),
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_place() {
    for (sql, line, column, reason) in [
        (
            "SELECT * FROM issues ORDER BY id",
            1,
            22,
            "ORDER is not supported",
        ),
        (
            "SELECT * FROM issues\nLIMIT 5",
            2,
            1,
            "LIMIT is not supported",
        ),
        ("SELECT * FROM issues OFFSET 5", 1, 22, "OFFSET"),
        ("SELECT * FROM issues GROUP BY id", 1, 22, "GROUP"),
        ("SELECT * FROM issues HAVING true", 1, 22, "HAVING"),
        ("SELECT * FROM issues FETCH FIRST ROW ONLY", 1, 22, "FETCH"),
        (
            "SELECT * FROM issues WHERE id = 1 UNION SELECT 1",
            1,
            35,
            "UNION",
        ),
        ("SELECT DISTINCT id FROM issues", 1, 8, "DISTINCT"),
        ("SELECT * FROM issues FOR UPDATE", 1, 22, "FOR"),
        ("SELECT * FROM ONLY issues", 1, 15, "ONLY"),
        (
            "SELECT * FROM issues TABLESAMPLE SYSTEM (10)",
            1,
            22,
            "TABLESAMPLE",
        ),
        ("SELECT * INTO x FROM issues", 1, 10, "INTO"),
        ("SELECT * FROM issues, issues b", 1, 21, "joins"),
        (
            "SELECT * FROM issues a JOIN issues b ON true",
            1,
            24,
            "joins",
        ),
        ("SELECT * FROM issues NATURAL JOIN issues", 1, 22, "joins"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", 1, 1, "WITH"),
        (
            "SELECT * FROM (SELECT 1) x",
            1,
            15,
            "subqueries in FROM are not supported",
        ),
        (
            "SELECT * FROM issues WHERE id IN (SELECT 1)",
            1,
            42,
            "only columns of the table can be chosen",
        ),
        (
            "SELECT * FROM issues WHERE EXISTS (SELECT 1)",
            1,
            44,
            "expected FROM",
        ),
        ("SELECT count(*) FROM issues", 1, 8, "functions"),
        ("SELECT id + 1 FROM issues", 1, 11, "no expressions"),
        ("SELECT id AS x FROM issues", 1, 11, "renaming"),
        ("SELECT id x FROM issues", 1, 11, "renaming"),
        ("SELECT id::text FROM issues", 1, 10, "casts of columns"),
        ("SELECT 1 FROM issues", 1, 8, "only columns"),
        ("SELECT *, id FROM issues", 1, 9, "either * or columns"),
        ("SELECT id, id FROM issues", 1, 12, "chosen twice"),
        ("SELECT FROM issues", 1, 8, "only columns"),
        ("SELECT title FROM issues", 1, 1, "\"id\" is not"),
        (
            "SELECT id, total FROM issues",
            1,
            12,
            "does not exist, or it is generated",
        ),
        ("SELECT other.id FROM issues", 1, 8, "no table of this name"),
        (
            "SELECT issues.id FROM issues i",
            1,
            8,
            "no table of this name",
        ),
        (
            "SELECT * FROM projects",
            1,
            15,
            "there is no table public.projects",
        ),
        (
            "SELECT * FROM issues; DROP TABLE issues",
            1,
            21,
            "one SELECT only",
        ),
        ("DELETE FROM issues", 1, 1, "expected SELECT"),
        ("", 1, 1, "expected SELECT"),
        (
            "SELECT * FROM issues WHERE",
            1,
            22,
            "expected a column, a constant or a parameter",
        ),
        (
            "SELECT * FROM issues WHERE id = 1 1",
            1,
            35,
            "expected AND, OR or the end",
        ),
        ("SELECT * FROM issues WHERE id == 1", 1, 31, "`==`"),
    ] {
        let refused = refused(sql);
        assert!(refused.reason.contains(reason), "{sql}: {}", refused.reason);
        assert_eq!(
            (refused.line, refused.column),
            (line, column),
            "{sql}: {}",
            refused.reason
        );
    }
}

#[test]
fn conditions_that_can_not_be_exact_are_refused() {
    for (condition, reason) in [
        ("made > now()", "functions are not supported: now()"),
        ("made > current_timestamp", "when time passes"),
        ("title = current_user", "claim of the token"),
        ("title = user", "claim of the token"),
        ("lower(title) = 'x'", "functions"),
        ("random() < 0.5", "functions"),
        ("id + 1 = 2", "arithmetic"),
        ("id = 2 - 1", "arithmetic"),
        ("id = 2 * 1", "arithmetic"),
        ("id % 2 = 0", "arithmetic"),
        ("-id = 2", "arithmetic"),
        ("title || 'x' = 'y'", "`||`"),
        ("title ~ 'x'", "regular expressions"),
        ("title ~~ 'x'", "LIKE"),
        ("title ILIKE 'x'", "ILIKE"),
        ("title SIMILAR TO 'x'", "SIMILAR"),
        ("title LIKE nick", "pattern"),
        ("title LIKE 'x\\'", "escape character"),
        ("title LIKE 'x' ESCAPE 'ab'", "one character"),
        ("title LIKE ANY (ARRAY['x'])", "LIKE ANY"),
        ("code LIKE 'x'", "char(n)"),
        ("id LIKE 'x'", "does not work on int8"),
        ("title COLLATE \"C\" < 'x'", "COLLATE"),
        ("local < 'x'", "collation"),
        ("local BETWEEN 'a' AND 'b'", "collation"),
        ("fuzzy = 'x'", "non-deterministic"),
        ("fuzzy LIKE 'x'", "non-deterministic"),
        ("'a' < 'b'", "collation"),
        ("title = local", "two collations"),
        ("payload = '{}'", "jsonb, which can't be compared exactly"),
        ("payload ->> 'a' = 'b'", "`->>`"),
        ("email = 'x'", "citext"),
        ("code = title", "trailing blanks"),
        ("made = due", "time zone"),
        ("made > day", "time zone"),
        ("made > '2024-01-01'", "zone"),
        ("made > 'now'", "zone"),
        ("day = 'today'", "YYYY-MM-DD"),
        ("day = '01/02/2024'", "YYYY-MM-DD"),
        ("day = date 'tomorrow'", "YYYY-MM-DD"),
        ("due = '2024-01-01 00:00:00Z'", "zone"),
        ("price = ratio", "float"),
        ("ratio = 1e400", "out of the range of float8"),
        ("team_id = 'x'", "not a value of type int4"),
        ("team_id = '3000000000'", "out of the range of int4"),
        ("team_id = 3000000000::int4", "out of the range of int4"),
        ("team_id = 1.5::int4", "rounded"),
        ("team_id = title", "int4 and text can't be compared"),
        ("archived = 1", "can't be compared"),
        ("archived", ""),
        ("id", "a condition is needed"),
        ("1", "a condition is needed"),
        ("id = id::int4", "casts of columns"),
        ("id = '5'::text::int4", "not supported"),
        ("id = '5'::numeric(5,2)", "precision"),
        ("id = '5'::interval", "interval is not supported here"),
        ("id = interval '1 day'", "interval is not supported here"),
        ("status = 'lost'", "not a label"),
        ("status = mood", "can't be compared"),
        ("status = 'open'::mood", "can't be compared"),
        ("status = 'open'::weather", "weather is not supported"),
        ("object = -1", "out of the range of oid"),
        ("object = id", "oid"),
        ("object = 1.0::oid", "a cast from numeric to oid"),
        (
            "object <> ALL (ARRAY['7', 1.0]::oid[])",
            "a cast from numeric to oid",
        ),
        ("pair IS NULL", "IS NOT DISTINCT FROM NULL"),
        ("issues IS NULL", "does not exist"),
        ("issues.* IS NULL", "whole rows"),
        ("ctid = '(0,1)'", "does not exist"),
        ("(id, team_id) = (1, 2)", "compare each column"),
        ("ROW(id) = ROW(1)", "compare each column"),
        ("(archived AND true) = true", "not conditions"),
        ("id = 1 = true", "two comparisons in a row"),
        ("id IN (1) IN (true)", "twice in a row"),
        ("id IS DISTINCT FROM 1 IS NULL", "parentheses"),
        ("CASE WHEN true THEN true END", "CASE"),
        ("id = ANY (payload)", "array columns"),
        ("id = ANY (1)", "take a parameter, ARRAY"),
        ("id = ANY ('{1,{2}}')", "array"),
        ("id = ANY (ARRAY[])", "empty array"),
        ("id = ARRAY[1]", "array"),
        ("id = x'1F'", "bit strings"),
        ("title = E'x'", "strings"),
        ("title = $$x$$", "strings"),
        ("title = U&'x'", "strings"),
        ("title = 'a' 'b'", "two strings"),
        (
            "nick = 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'",
            "63 bytes",
        ),
        ("id = $1", "a parameter is $ and a name"),
        ("id = $team AND title = $team", "one type only"),
        ("id = $team AND id = ANY ($team)", "one type only"),
        ("id = $team::text", "can't be compared"),
        ("$team IS NULL", "never NULL"),
        ("id = 1AND archived", "followed by a blank"),
        ("id = 1_000", "not"),
        ("id\u{b}= 1", "plain ones"),
        // To Postgres, a no-break space is a letter.
        ("id\u{a0}= 1", "does not exist"),
        ("order = 1", "ORDER"),
        ("id = other.id", "no table of this name"),
    ] {
        if reason.is_empty() {
            bound(&format!("SELECT * FROM issues WHERE {condition}"));
            continue;
        }
        let refused = refused(&format!("SELECT * FROM issues WHERE {condition}"));
        assert!(
            refused.reason.contains(reason),
            "{condition}: {}",
            refused.reason
        );
    }
}

#[test]
fn names_are_folded_and_quoted_as_in_postgres() {
    let row = row(&[(0, ValueRef::Integer(1)), (11, ValueRef::Integer(5))]);
    for condition in [
        "ID = 1",
        "Issues.Id = 1",
        "public.issues.id = 1",
        "\"id\" = 1",
        "\"Größe\" = 5",
        "ıd IS NULL OR id = 1".trim_start_matches("ıd IS NULL OR "),
        "id = 1 -- and nothing else",
        "id /* a /* nested */ comment */ = 1;",
    ] {
        assert!(is_in(condition, &row), "{condition}");
    }
    // Only ASCII is folded.
    assert!(
        refused("SELECT * FROM issues WHERE GRÖSSE = 5")
            .reason
            .contains("grÖsse")
    );
    assert!(
        refused("SELECT * FROM issues WHERE \"ID\" = 5")
            .reason
            .contains("\"ID\"")
    );
    for sql in [
        "SELECT i.* FROM issues i WHERE i.id = 1",
        "SELECT i.id FROM public.issues AS i WHERE id = 1",
        "select all issues.id from issues where not archived",
    ] {
        bound(sql);
    }
}

#[test]
fn null_makes_conditions_unknown_and_not_false() {
    let null = row(&[]);
    for (condition, expected) in [
        ("archived", false),
        ("NOT archived", false),
        ("archived IS UNKNOWN", true),
        ("archived IS NOT TRUE", true),
        ("id = 1 OR TRUE", true),
        ("id = 1 AND FALSE", false),
        ("NOT (id = 1 AND FALSE)", true),
        ("NOT (id = 1 AND TRUE)", false),
        ("id = NULL", false),
        ("id <> NULL", false),
        ("id IS NULL", true),
        ("id IS NOT DISTINCT FROM NULL", true),
        ("id IS DISTINCT FROM 1", true),
        ("pair IS NOT DISTINCT FROM NULL", true),
        ("payload IS NULL", true),
        ("1 IN (1, NULL)", true),
        ("2 IN (1, NULL)", false),
        ("2 NOT IN (1, NULL)", false),
        ("(2 NOT IN (1, NULL)) IS UNKNOWN", true),
        ("2 NOT IN (1, 3)", true),
        ("id = ANY ('{}')", false),
        ("(id = ANY ('{}')) IS FALSE", true),
        ("id <> ALL ('{}')", true),
        ("NULL", false),
        ("(id = 1) IS NULL", true),
        ("title LIKE '%'", false),
        ("title LIKE NULL", false),
        ("id BETWEEN 1 AND 2 OR id NOT BETWEEN 1 AND 2", false),
    ] {
        assert_eq!(is_in(condition, &null), expected, "{condition}");
    }
}

#[test]
fn precedence_is_that_of_postgres() {
    let row = row(&[(0, ValueRef::Integer(1)), (3, ValueRef::Integer(0))]);
    // Each would be the other way round if it were read otherwise.
    for (condition, expected) in [
        ("TRUE OR TRUE AND FALSE", true),
        ("NOT TRUE AND FALSE", false),
        ("NOT FALSE OR TRUE", true),
        ("NOT id = 2", true),
        ("NOT archived IS NULL", true),
        ("id = 2 IS FALSE", true),
        ("id IS DISTINCT FROM 2 AND archived", false),
        ("id BETWEEN 0 AND 2 AND archived", false),
        ("NOT id IN (2)", true),
        ("id NOT IN (2) AND TRUE", true),
        ("id = -1::int8 OR id = - -1", true),
    ] {
        assert_eq!(is_in(condition, &row), expected, "{condition}");
    }
}

#[test]
fn a_list_has_a_common_type_where_a_comparison_has_not() {
    let row = record::build([ValueRef::Real(f64::from(0.1f32))]);
    let table = Table {
        columns: vec![column("f", 700, "real", Kind::Float4)],
        ..issues()
    };
    let contains = |condition: &str| {
        let source = source(&[], &[&format!("SELECT * FROM issues WHERE {condition}")]);
        let shapes = compile(&[source], &[Arc::new(table.clone())]).unwrap();
        let bound = shapes[0]
            .bind(&Map::new(), &HashMap::new())
            .unwrap()
            .remove(0);
        bound.contains(&row, &Nothing).unwrap()
    };
    // As Postgres 15 answers.
    assert!(!contains("f = 0.1"));
    assert!(contains("f = '0.1'"));
    assert!(!contains("f IN (0.1)"));
    assert!(contains("f IN (0.1, 0.2)"));
    assert!(!contains("f = ANY (ARRAY[0.1, 0.2])"));
}

#[test]
fn parameters_must_be_declared_used_and_of_one_type() {
    let sql = "SELECT * FROM issues WHERE team_id = $team";
    let reason = |params: &[(&str, ParamSource)], sql: &str| {
        try_compile(source(params, &[sql]))
            .unwrap_err()
            .remove(0)
            .reason
    };
    assert!(reason(&[], sql).contains("declares no parameter `team`"));
    let unused = reason(&[("team", claim("team")), ("other", claim("x"))], sql);
    assert!(unused.contains("no SELECT uses the parameter `other`"));
    for agrees in ["int8", "integer", "smallint"] {
        try_compile(source(&[("team", client(agrees))], &[sql])).unwrap();
    }
    for other in ["text", "numeric", "int8[]", "float8"] {
        assert!(
            reason(&[("team", client(other))], sql).contains("one type only"),
            "{other}"
        );
    }
    assert!(reason(&[("team", client("whatever"))], sql).contains("whatever is not supported"));
    assert!(reason(&[("team", client("int4 int4"))], sql).contains("expected the end"));
    assert!(reason(&[("team", client("varchar(3)"))], sql).contains("has no length"));
    try_compile(source(
        &[("mood", client("status"))],
        &["SELECT * FROM issues WHERE status = $mood"],
    ))
    .unwrap();
    try_compile(source(
        &[("team", client("int4[]"))],
        &["SELECT * FROM issues WHERE team_id = ANY ($team)"],
    ))
    .unwrap();
}

fn bind_error(data_type: &str, json: Json) -> Option<BindError> {
    let sql = format!(
        "SELECT * FROM issues WHERE $value::{data_type} IS NOT DISTINCT FROM $value::{data_type}"
    );
    let shape = try_compile(source(&[("value", claim("value"))], &[&sql])).unwrap();
    let claims = Map::from_iter([("value".to_owned(), json)]);
    shape.bind(&claims, &HashMap::new()).err()
}

#[test]
fn claims_become_values_of_their_types_only() {
    for (data_type, json) in [
        ("int4", json!(7)),
        ("int4", json!("7")),
        ("int8", json!(-9_223_372_036_854_775_808i64)),
        ("bool", json!(true)),
        ("bool", json!("off")),
        ("float8", json!(0.1)),
        ("float8", json!("NaN")),
        ("numeric", json!(7)),
        ("numeric", json!("0.1")),
        ("text", json!("7")),
        ("uuid", json!("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11")),
        ("date", json!("2024-01-01")),
        ("timestamptz", json!("2024-01-01T00:00:00Z")),
        ("bytea", json!("\\x00")),
        ("app.status", json!("open")),
    ] {
        assert_eq!(
            bind_error(data_type, json.clone()),
            None,
            "{data_type} {json}"
        );
    }
    for (data_type, json) in [
        ("int4", json!(2_147_483_648i64)),
        ("int4", json!(7.0)),
        ("int4", json!(7.5)),
        ("int4", json!(true)),
        ("int4", json!("secret")),
        ("int4", json!([7])),
        ("int4", json!({"a": 7})),
        ("int8", json!(18_446_744_073_709_551_615u64)),
        ("bool", json!(1)),
        ("bool", json!("secret")),
        ("float8", json!("1e400")),
        ("numeric", json!(0.1)),
        ("text", json!(7)),
        ("text", json!("secret\0")),
        ("uuid", json!("secret")),
        ("date", json!("now")),
        ("timestamptz", json!("2024-01-01")),
        ("app.status", json!("secret")),
    ] {
        let error = bind_error(data_type, json.clone());
        let Some(BindError::Parameter(shape, param, reason)) = &error else {
            panic!("{data_type} {json}: {error:?}");
        };
        assert_eq!((shape.as_str(), param.as_str()), ("team", "value"));
        assert!(!reason.contains("secret"), "{reason}");
    }
    let missing = Some(BindError::MissingClaim(
        "value".to_owned(),
        "team".to_owned(),
    ));
    assert_eq!(bind_error("int4", Json::Null), missing);
}

#[test]
fn a_missing_claim_refuses_the_subscription() {
    let shape = try_compile(source(
        &[("team", claim("team_id"))],
        &["SELECT * FROM issues WHERE team_id = $team"],
    ))
    .unwrap();
    let error = shape.bind(&Map::new(), &HashMap::new()).unwrap_err();
    assert_eq!(
        error,
        BindError::MissingClaim("team_id".to_owned(), "team".to_owned())
    );
}

#[test]
fn a_replica_chooses_only_what_it_may() {
    let sql = "SELECT * FROM issues WHERE team_id = $team AND id = $id";
    let shape = try_compile(source(
        &[("team", claim("team")), ("id", client("int8"))],
        &[sql],
    ))
    .unwrap();
    let bind = |chosen: &[(&str, &str)]| {
        let chosen = chosen
            .iter()
            .map(|&(name, json)| (name.to_owned(), json.to_owned()))
            .collect();
        shape.bind(&claims(), &chosen)
    };
    assert!(bind(&[("id", "5")]).is_ok());
    assert!(bind(&[("id", "\"5\"")]).is_ok());
    let long = format!("\"{}\"", "5".repeat(PARAM_BYTES_MAX));
    let deep = "[".repeat(10_000);
    for wrong in [
        &[][..],
        &[("id", "5"), ("team", "8")],
        &[("id", "5"), ("more", "8")],
        &[("id", "null")],
        &[("id", "secret")],
        &[("id", "[5]")],
        &[("id", &long)],
        &[("id", &deep)],
    ] {
        let error = bind(wrong).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn array_claims_are_used_with_any_only() {
    let shape = |sql: &str| try_compile(source(&[("teams", claim("teams"))], &[sql])).unwrap();
    let any = shape("SELECT * FROM issues WHERE team_id = ANY ($teams)");
    let bind = |shape: &Shape, json: Json| {
        shape.bind(
            &Map::from_iter([("teams".to_owned(), json)]),
            &HashMap::new(),
        )
    };
    let many = bind(&any, json!([7, "8", 7])).unwrap().remove(0);
    assert!(
        many.contains(&row(&[(1, ValueRef::Integer(8))]), &Nothing)
            .unwrap()
    );
    assert!(
        !many
            .contains(&row(&[(1, ValueRef::Integer(9))]), &Nothing)
            .unwrap()
    );
    assert_eq!(many.route_keys().len(), 2);
    let none = bind(&any, json!([])).unwrap().remove(0);
    assert!(
        !none
            .contains(&row(&[(1, ValueRef::Integer(8))]), &Nothing)
            .unwrap()
    );
    assert!(none.route_keys().is_empty());
    for wrong in [
        json!(7),
        json!([null]),
        json!([[7]]),
        json!(["x"]),
        json!(vec![7; ARRAY_ELEMENTS_MAX + 1]),
    ] {
        assert!(bind(&any, wrong).is_err());
    }
    let one = shape("SELECT * FROM issues WHERE team_id = $teams");
    assert!(bind(&one, json!([7])).is_err());
}

#[test]
fn routing_takes_the_best_conjunct() {
    let seven = row(&[
        (0, ValueRef::Integer(1)),
        (1, ValueRef::Integer(7)),
        (4, ValueRef::Text("7.00")),
    ]);
    for (condition, routable) in [
        ("team_id = $team", true),
        ("$team = team_id", true),
        ("team_id = $team AND NOT archived", true),
        ("(NOT archived AND (id = 1 AND team_id = $team))", true),
        ("team_id = ANY ($teams)", true),
        ("team_id = ANY ($teams) AND price = $team::numeric", true),
        ("price = $team::int4", true),
        ("team_id = $team::numeric", true),
        ("team_id = $team OR id = $team OR id = ANY ($teams)", true),
        ("(team_id = $team) IS TRUE", true),
        ("team_id = $team OR archived", false),
        ("NOT team_id = $team", false),
        ("team_id >= $team", true),
        ("$team::numeric <= price", true),
        (
            "(price BETWEEN $team::numeric AND $team::numeric) IS TRUE",
            true,
        ),
        ("team_id <> $team", false),
        ("team_id > $team OR archived", false),
        ("team_id <> ALL ($teams)", false),
        ("team_id = $team::float8", true),
        ("ratio = ANY ($teams)", false),
        ("team_id = 7", false),
    ] {
        let bound = bound(&format!("SELECT * FROM issues WHERE {condition}"));
        assert_eq!(bound.select.is_routable(), routable, "{condition}");
        let keys = keys_of(&bound.select, &seven, &Nothing).unwrap();
        let is_found = keys.iter().any(|key| bound.has_route_key(key));
        assert_eq!(is_found, routable, "{condition}");
        assert_eq!(keys_of(&bound.select, &row(&[]), &Nothing).unwrap(), []);
    }
    let both = bound("SELECT * FROM issues WHERE id = ANY ($teams) AND team_id = $team");
    assert_eq!(
        both.route_keys(),
        keys_of(&both.select, &seven, &Nothing).unwrap()
    );
}

/// Such a SELECT is not asked: the key alone decides.
#[test]
fn a_row_has_the_key_of_a_select_that_does_not_have_the_row() {
    let numbers = ["7", "7.00", "-7", "0", "-0", "7.5", "1e2", "100", "NaN"];
    let texts = ["", "a", "A", "a ", "a  ", "\u{e4}", "open", "closed"];
    let uuids = [
        "00000000-0000-0000-0000-00000000000a",
        "00000000-0000-0000-0000-00000000000A",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ];
    let times = [
        "2024-02-29",
        "2024-02-29 00:00:00",
        "2024-02-29T00:00:00Z",
        "2024-02-29T01:00:00+01:00",
        "infinity",
    ];
    let all: Vec<&str> = [&numbers[..], &texts, &uuids, &times].concat();
    let (mut had, mut not) = (0, 0);
    for (place, column) in issues().columns.iter().enumerate() {
        for of in [
            "int8",
            "int4",
            "numeric",
            "text",
            "bpchar",
            "uuid",
            "date",
            "timestamp",
            "timestamptz",
            "bool",
        ] {
            let sql = format!("SELECT * FROM issues WHERE \"{}\" = $p", column.name);
            let Ok(shape) = try_compile(source(&[("p", client(of))], &[&sql])) else {
                continue;
            };
            for value in &all {
                let value = HashMap::from([("p".to_owned(), json!(value).to_string())]);
                let Ok(mut bound) = shape.bind(&Map::new(), &value) else {
                    continue;
                };
                let bound = bound.remove(0);
                if column.kind == Kind::Float8 {
                    assert!(!bound.select.is_exact());
                    continue;
                }
                assert!(bound.select.is_exact(), "{sql} {of}");
                let integers = [-7, 0, 1, 7, 100].map(ValueRef::Integer);
                let stored = all.iter().map(|text| ValueRef::Text(text)).chain(integers);
                for stored in stored.chain([ValueRef::Null]) {
                    let row = row(&[(place, stored)]);
                    // What the column can't have is an error either way.
                    let Ok(contains) = bound.contains(&row, &Nothing) else {
                        continue;
                    };
                    let keys = keys_of(&bound.select, &row, &Nothing).unwrap();
                    let has = keys.iter().any(|key| bound.has_route_key(key));
                    assert_eq!(has, contains, "{sql} {of} {value:?} {stored:?}");
                    assert!(keys.len() <= 1);
                    had += usize::from(has);
                    not += usize::from(!has);
                }
            }
        }
    }
    assert!(had > 100 && not > 1000, "{had} {not}");
    for condition in [
        "team_id = $team AND NOT archived",
        "(team_id = $team) IS TRUE",
        "team_id = $team OR id = $team",
        "team_id = ANY ($teams)",
        "team_id <= $team",
        "team_id = $team::float8",
        "team_id = id",
        "team_id = 7",
        "NOT team_id = $team",
    ] {
        let bound = bound(&format!("SELECT * FROM issues WHERE {condition}"));
        assert!(!bound.select.is_exact(), "{condition}");
    }
}

#[test]
fn a_value_leads_to_the_ranges_that_hold_it_and_to_no_others() {
    let shape = |condition: &str| {
        let params = [("low", client("numeric")), ("high", client("numeric"))];
        let params = params
            .into_iter()
            .filter(|(name, _)| condition.contains(&format!("${name}")));
        let sql = format!("SELECT * FROM issues WHERE {condition}");
        try_compile(source(&params.collect::<Vec<_>>(), &[&sql]))
            .unwrap_or_else(|r| panic!("{r:?}"))
    };
    let ends = [
        "-Infinity",
        "-7.25",
        "0",
        "6.999",
        "7",
        "7.00",
        "7.5",
        "100",
        "NaN",
    ];
    for condition in [
        "team_id > $low::numeric",
        "team_id < $high::numeric AND NOT archived",
        "price >= $low",
        "$low <= price AND price < $high AND NOT archived",
        "price > $low AND (archived OR price <= $high)",
        "team_id BETWEEN $low::numeric AND $high::numeric",
        "(team_id > $low::numeric AND (price >= $low) IS TRUE) AND team_id <= $high::numeric",
        "price > $low OR team_id < $high::numeric",
    ] {
        let shape = shape(condition);
        let (mut shown, mut hidden) = (0, 0);
        for low in ends {
            for high in ends {
                let chosen = [("low", low), ("high", high)]
                    .map(|(name, value)| (name.to_owned(), format!("\"{value}\"")));
                let chosen = chosen
                    .into_iter()
                    .filter(|(name, _)| condition.contains(&format!("${name}")));
                let bound = shape
                    .bind(&Map::new(), &chosen.collect())
                    .unwrap()
                    .remove(0);
                assert!(bound.select.is_routable(), "{condition}");
                for (team, price) in [(7, "7.00"), (-7, "-7.250"), (0, "1e0"), (8, "99.9")] {
                    let price = if price == "1e0" { "NaN" } else { price };
                    let row = row(&[
                        (1, ValueRef::Integer(team)),
                        (4, ValueRef::Text(price)),
                        (3, ValueRef::Integer(0)),
                    ]);
                    let keys = keys_of(&bound.select, &row, &Nothing).unwrap();
                    let is_found = keys.iter().any(|key| bound.has_route_key(key));
                    if bound.contains(&row, &Nothing).unwrap() {
                        assert!(is_found, "{condition} {low} {high} {team} {price}");
                        shown += 1;
                    } else {
                        hidden += usize::from(!is_found);
                    }
                }
            }
        }
        assert!(shown > 20 && hidden > 20, "{condition}: {shown} {hidden}");
    }
}

#[test]
fn what_is_looked_at_for_each_session_says_why() {
    let reason = |condition: &str| {
        bound(&format!("SELECT * FROM issues WHERE {condition}"))
            .select
            .scan_reason()
    };
    for fine in [
        "team_id = $team",
        "team_id >= $team",
        "team_id = 7",
        "archived OR id = 3",
        "id IN (SELECT id FROM issues)",
    ] {
        assert_eq!(reason(fine), None, "{fine}");
    }
    for (condition, expected) in [
        ("team_id <> $team", "no part of it"),
        ("archived AND title LIKE $text", "no part of it"),
        (
            "id NOT IN (SELECT id FROM issues WHERE team_id = $team)",
            "with NOT",
        ),
        ("archived OR team_id = $team", "one side of its OR"),
    ] {
        let reason = reason(condition).unwrap_or_default();
        assert!(reason.contains(expected), "{condition}: {reason}");
    }
}

#[test]
fn fingerprints_tell_what_matters_and_nothing_else() {
    let fingerprint = |sql: &str| bound(sql).fingerprint();
    let base = fingerprint("SELECT * FROM issues WHERE team_id = $team AND NOT archived");
    for same in [
        "select issues.* from public.issues\n where (team_id = $team) AND (NOT archived) -- x",
        "SELECT * FROM issues AS i WHERE i.\"team_id\" = $team AND NOT archived",
        "SELECT * FROM issues WHERE team_id = 7 AND NOT archived",
    ] {
        assert_eq!(fingerprint(same), base, "{same}");
    }
    for other in [
        "SELECT * FROM issues WHERE team_id = 8 AND NOT archived",
        "SELECT * FROM issues WHERE team_id = $team",
        "SELECT id, team_id, archived FROM issues WHERE team_id = $team AND NOT archived",
        "SELECT * FROM issues WHERE team_id = $team OR NOT archived",
        "SELECT * FROM issues",
    ] {
        assert_ne!(fingerprint(other), base, "{other}");
    }
    let order = |sql| fingerprint(sql);
    assert_eq!(
        order("SELECT id, title FROM issues"),
        order("SELECT title, id FROM issues")
    );
    let newer = Arc::new(Table {
        version: 2,
        ..issues()
    });
    let shapes = compile(&[source(&[], &["SELECT * FROM issues"])], &[newer]).unwrap();
    let newer = shapes[0]
        .bind(&Map::new(), &HashMap::new())
        .unwrap()
        .remove(0);
    assert_ne!(newer.fingerprint(), fingerprint("SELECT * FROM issues"));
}

#[test]
fn canonical_sql_has_every_type_written() {
    let sql = |condition: &str| {
        bound(&format!("SELECT * FROM issues WHERE {condition}")).condition_sql("issues")
    };
    assert_eq!(
        sql("team_id = $team AND \"Größe\" IN (1, 2.5) AND title LIKE $text"),
        "((\"team_id\" = '7'::int4) AND (\"Größe\" = ANY (ARRAY['1'::numeric, '2.5'::numeric]::numeric[])) \
         AND (\"title\" LIKE 'x'::text ESCAPE E'\\\\'))"
    );
    assert_eq!(
        sql("status = 'open' AND title = 'it''s \\'"),
        "((\"status\" = 'open'::app.status) AND (\"title\" = E'it''s \\\\'::text))"
    );
    let unbound = bound("SELECT * FROM issues WHERE team_id = $team AND id = ANY ($teams)");
    assert_eq!(
        unbound.select.condition_sql("issues"),
        "((\"team_id\" = NULL::int4) AND (\"id\" = ANY (ARRAY[NULL]::int8[])))"
    );
    assert!(!format!("{unbound:?}").contains('7'));
    assert!(!format!("{:?}", unbound.select).contains("'7'"));
}

#[test]
fn chosen_columns_are_projected_in_the_tables_order() {
    let full = row(&[
        (0, ValueRef::Integer(1)),
        (2, ValueRef::Text("x")),
        (5, ValueRef::Real(0.5)),
    ]);
    let all = bound("SELECT * FROM issues");
    let same = all.select.project(&full).unwrap();
    assert_eq!(same.as_ptr(), full.as_ptr());
    let some = bound("SELECT ratio, title, id FROM issues");
    assert_eq!(some.select.columns, [0, 2, 5]);
    let expected = record::build([
        ValueRef::Integer(1),
        ValueRef::Text("x"),
        ValueRef::Real(0.5),
    ]);
    assert_eq!(some.select.project(&full).unwrap(), expected);
    assert!(
        some.select
            .project(&record::build([ValueRef::Integer(1)]))
            .is_err()
    );
}

#[test]
fn a_record_of_another_table_is_an_error() {
    let bound = bound("SELECT * FROM issues WHERE team_id = $team");
    assert!(
        bound
            .contains(&record::build([ValueRef::Integer(1)]), &Nothing)
            .is_err()
    );
    assert!(
        bound
            .contains(&row(&[(1, ValueRef::Text("7"))]), &Nothing)
            .is_err()
    );
    assert!(bound.contains(&[], &Nothing).is_err());
}

#[test]
fn the_tables_of_all_shapes_are_named() {
    let one = source(
        &[],
        &[
            "SELECT * FROM issues",
            "SELECT * FROM app.\"Teams\" WHERE x = $y",
        ],
    );
    let two = source(&[], &["SELECT id FROM Issues"]);
    let named = tables_named(&[one, two]).unwrap();
    let expected = [("app", "Teams"), ("public", "issues")]
        .map(|(schema, name)| (schema.to_owned(), name.to_owned()));
    assert_eq!(named, expected);
    let wrong = source(
        &[],
        &["SELECT * FROM issues", "SELECT now()", "SELECT * FROM"],
    );
    let refused = tables_named(&[wrong]).unwrap_err();
    assert_eq!(
        refused
            .iter()
            .map(|refused| refused.index)
            .collect::<Vec<_>>(),
        [1, 2]
    );
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let wrong = source(
        &[],
        &[
            "SELECT * FROM nothing",
            "SELECT * FROM issues",
            "SELECT * FROM public.issues",
        ],
    );
    let other = source(&[], &[]);
    let refused = compile(&[wrong, other], &[Arc::new(issues())]).unwrap_err();
    let reasons: Vec<_> = refused
        .iter()
        .map(|refused| refused.reason.as_str())
        .collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons[0].contains("public.nothing"));
    assert!(reasons[1].contains("already"));
    assert!(reasons[2].contains("no SELECT"));
    assert_eq!(
        refused[0].to_string(),
        "shape team, table 0, 1:15: there is no table public.nothing that can be replicated"
    );
}

#[test]
fn a_parameter_is_as_wide_as_its_widest_use() {
    let sources = source(
        &[("team", claim("team"))],
        &["SELECT * FROM issues WHERE team_id = $team AND id = $team"],
    );
    let shape = try_compile(sources).unwrap();
    let claims = json!({"team": 3_000_000_000i64});
    let bound = shape
        .bind(claims.as_object().unwrap(), &HashMap::new())
        .unwrap()
        .remove(0);
    assert!(
        !bound
            .contains(
                &row(&[
                    (0, ValueRef::Integer(3_000_000_000)),
                    (1, ValueRef::Integer(1))
                ]),
                &Nothing
            )
            .unwrap()
    );
}

#[test]
fn deep_and_long_conditions_are_bounded() {
    let nested = |depth: usize| {
        format!(
            "SELECT * FROM issues WHERE {}archived{}",
            "(".repeat(depth),
            ")".repeat(depth)
        )
    };
    bound(&nested(DEPTH_MAX - 1));
    for deep in [
        nested(DEPTH_MAX),
        nested(20_000),
        format!(
            "SELECT * FROM issues WHERE {} archived",
            "NOT ".repeat(10_000)
        ),
        format!("SELECT * FROM issues WHERE id = {} 1", "- ".repeat(10_000)),
        format!(
            "SELECT * FROM issues WHERE archived {}",
            "IS NULL ".repeat(5_000)
        ),
        format!(
            "SELECT * FROM issues WHERE id = 1{}",
            "::int4".repeat(5_000)
        ),
    ] {
        assert!(refused(&deep).reason.contains("nested deeper"));
    }
    let long = format!(
        "SELECT * FROM issues WHERE {}",
        vec!["id=1"; 7_000].join(" OR ")
    );
    assert!(!bound(&long).contains(&row(&[]), &Nothing).unwrap());
    assert!(
        refused(&" ".repeat(SQL_BYTES_MAX + 1))
            .reason
            .contains("longer than")
    );
}

#[test]
fn more_columns_than_are_held_inline_are_read() {
    let condition: Vec<_> = issues()
        .columns
        .iter()
        .map(|c| format!("\"{}\" IS NOT DISTINCT FROM NULL", c.name))
        .collect();
    assert!(is_in(&condition.join(" AND "), &row(&[])));
    assert!(!is_in(
        &condition.join(" AND "),
        &row(&[(20, ValueRef::Text("x"))])
    ));
}

const PIECES: [&str; 65] = [
    "SELECT",
    "EXISTS",
    "(SELECT 1 FROM issues i WHERE",
    "(SELECT id FROM issues i WHERE",
    "i.id = issues.id",
    "issues.id",
    "*",
    "FROM",
    "issues",
    "WHERE",
    "id",
    "team_id",
    "title",
    "archived",
    "made",
    "status",
    "code",
    "price",
    "=",
    "<>",
    "<",
    ">=",
    "IN",
    "(",
    ")",
    ",",
    "NOT",
    "AND",
    "OR",
    "LIKE",
    "BETWEEN",
    "SYMMETRIC",
    "IS",
    "NULL",
    "TRUE",
    "DISTINCT",
    "UNKNOWN",
    "ANY",
    "ALL",
    "ARRAY",
    "[",
    "]",
    "$team",
    "1",
    "-",
    "+",
    "2.5",
    "1e9",
    "'x'",
    "'1'",
    "'{1,2}'",
    "::",
    "int4",
    "text",
    "date",
    "timestamp",
    "CAST",
    "AS",
    "ESCAPE",
    "\"",
    "'",
    ".",
    "/*",
    "$",
    "\u{a0}",
];

proptest! {
    #[test]
    fn any_words_are_compiled_or_refused_without_panic(
        words in prop::collection::vec(0..PIECES.len(), 0..25),
        whole in any::<bool>(),
        bytes in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let words: Vec<_> = words.into_iter().map(|index| PIECES[index]).collect();
        let start = if whole { "SELECT * FROM issues WHERE " } else { "" };
        let sql = format!("{start}{}", words.join(" "));
        let params = BTreeMap::from([("team".to_owned(), claim("team"))]);
        let source = Source { name: "x".to_owned(), params, tables: vec![sql], writable: Vec::new() };
        let _ = tables_named(std::slice::from_ref(&source));
        if let Ok(shapes) = compile(&[source], &[Arc::new(issues())])
            && let Ok(bound) = shapes[0].bind(&claims(), &HashMap::new())
        {
            // Any bytes are a row, or an error.
            let _ = bound[0].contains(&bytes, &Rows::default());
            let _ = keys_of(&bound[0].select, &bytes, &Rows::default());
            let _ = bound[0].select.project(&bytes.into());
            bound[0].contains(&row(&[]), &Rows::default()).unwrap();
        }
    }

    #[test]
    fn any_text_is_compiled_or_refused_without_panic(sql in any::<String>()) {
        let _ = tables_named(&[source(&[], &[&sql, &format!("SELECT * FROM issues WHERE {sql}")])]);
    }
}
