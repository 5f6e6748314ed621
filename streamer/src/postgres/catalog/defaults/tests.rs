use anabranch_proto::record::{self, ValueRef};
use proptest::prelude::*;

use super::*;
use crate::table::Collation;

fn column(postgres_type: &str, kind: Kind, typmod: i32) -> Column {
    Column {
        name: "c".into(),
        attnum: 1,
        type_oid: 1,
        base_oid: 1,
        typmod,
        postgres_type: postgres_type.into(),
        kind,
        not_null: false,
        collation: Collation::Bytes,
    }
}

fn kind_of(postgres_type: &str) -> Kind {
    match without_modifier(postgres_type).as_str() {
        "integer" | "bigint" | "smallint" => Kind::Integer,
        "boolean" => Kind::Bool,
        "real" => Kind::Float4,
        "double precision" => Kind::Float8,
        "numeric" => Kind::Numeric,
        "text" | "character varying" => Kind::Text,
        "character" => Kind::Char,
        "uuid" => Kind::Uuid,
        "bytea" => Kind::Bytea,
        "jsonb" => Kind::Json,
        "timestamp with time zone" => Kind::Timestamptz,
        "timestamp without time zone" => Kind::Timestamp,
        "date" => Kind::Date,
        "status" => Kind::Enum(vec!["new".into(), "it's".into()]),
        "text[]" => Kind::Array(Box::new(Kind::Text), ','),
        _ => Kind::Other,
    }
}

#[track_caller]
fn check(postgres_type: &str, typmod: i32, expression: &str, expected: LeftOut) {
    let column = column(postgres_type, kind_of(postgres_type), typmod);
    let found = of_expression(&column, expression);
    assert_eq!(found, expected, "{postgres_type} DEFAULT {expression}");
}

fn value(value: ValueRef<'_>) -> LeftOut {
    LeftOut::Value(record::build([value]).to_vec())
}

fn text(text: &str) -> LeftOut {
    value(ValueRef::Text(text))
}

#[test]
fn a_constant_is_another_value_than_in_postgres() {
    check("integer", -1, "0", value(ValueRef::Integer(0)));
    check("integer", -1, "'-1'::integer", value(ValueRef::Integer(-1)));
    check("bigint", -1, "'-7'::integer", value(ValueRef::Integer(-7)));
    check("bigint", -1, "(5)::bigint", value(ValueRef::Integer(5)));
    check("boolean", -1, "false", value(ValueRef::Integer(0)));
    check("boolean", -1, "true", value(ValueRef::Integer(1)));
    check("double precision", -1, "1.5", value(ValueRef::Real(1.5)));
    check("real", -1, "(0)::real", value(ValueRef::Real(0.0)));
    check("numeric", -1, "1.50", text("1.50"));
    check("text", -1, "'draft'::text", text("draft"));
    check("text", -1, "''::text", text(""));
    check("text", -1, "'it''s'::text", text("it's"));
    check("text", -1, r"E'a\\b'::text", text(r"a\b"));
    check("text", -1, r"'a\b'::text", text(r"a\b"));
    check(
        "character varying(20)",
        24,
        "'a'::character varying",
        text("a"),
    );
    check("character(5)", 9, "'ab   '::bpchar", text("ab"));
    check("status", -1, "'it''s'::status", text("it's"));
    check("jsonb", -1, "'{}'::jsonb", text("{}"));
    check("text[]", -1, "'{a,b}'::text[]", text(r#"["a","b"]"#));
    check("text[]", -1, "ARRAY[]::text[]", text("[]"));
    check(
        "bytea",
        -1,
        r"'\x00ff'::bytea",
        value(ValueRef::Blob(&[0, 255])),
    );
    check(
        "timestamp with time zone",
        -1,
        "'2024-02-29 18:30:00+00'::timestamp with time zone",
        text("2024-02-29 18:30:00.000000Z"),
    );
    check("date", -1, "'2024-02-29'::date", text("2024-02-29"));
    check("interval", -1, "'1 day'::interval", text("1 day"));
    check("text", -1, "NULL::text", LeftOut::Null);
    check("text", -1, "NULL", LeftOut::Null);
}

#[test]
fn a_numeric_has_another_scale_than_in_postgres() {
    let numeric = |precision: i32, scale: i32| ((precision << 16) | scale) + 4;
    check("numeric(10,2)", numeric(10, 2), "0", text("0.00"));
    check(
        "numeric(10,2)",
        numeric(10, 2),
        "'-1.5'::numeric",
        text("-1.50"),
    );
    check("numeric(10,2)", numeric(10, 2), "0.00", text("0.00"));
    check("numeric(10,0)", numeric(10, 0), "7", text("7"));
    // It is rounded.
    check("numeric(10,2)", numeric(10, 2), "0.005", LeftOut::Other);
    // -2: rounded to hundreds.
    check(
        "numeric(10,-2)",
        ((10 << 16) | 0x7fe) + 4,
        "123",
        LeftOut::Other,
    );
}

#[test]
fn what_only_postgres_knows_is_mirrored() {
    for (postgres_type, typmod, expression) in [
        ("integer", -1, "(1 + 1)"),
        ("integer", -1, "1.5"),
        ("integer", -1, "length('a'::text)"),
        ("integer", -1, "nextval('s'::regclass)"),
        ("text", -1, "CURRENT_USER"),
        ("text", -1, "0"),
        ("text", -1, "('a'::text || 'b'::text)"),
        ("text", -1, "lower('A'::text)"),
        ("text", -1, "'a'::text COLLATE \"C\""),
        ("text", -1, "'a  '::bpchar"),
        ("text", -1, "'a"),
        ("text", -1, ""),
        ("date", -1, "CURRENT_DATE"),
        ("date", -1, "now()"),
        ("timestamp without time zone", -1, "now()"),
        (
            "timestamp without time zone",
            -1,
            "'2024-02-29 18:30:00+00'::timestamp with time zone",
        ),
        ("timestamp with time zone", 0, "now()"),
        (
            "timestamp with time zone",
            0,
            "'2024-02-29 18:30:00+00'::timestamp with time zone",
        ),
        (
            "timestamp with time zone",
            -1,
            "(now() + '1 day'::interval)",
        ),
        ("text", -1, "gen_random_uuid()"),
        ("double precision", -1, "0.1234567890123456"),
        ("double precision", -1, "'NaN'::double precision"),
        ("double precision", -1, "'1.1'::real"),
        ("status", -1, "'gone'::status"),
        ("jsonb", -1, "jsonb_build_object()"),
        ("bytea", -1, "'abc'::bytea"),
    ] {
        check(postgres_type, typmod, expression, LeftOut::Other);
    }
    let long = format!("'{}'::text", "x".repeat(VALUE_BYTES_MAX));
    check("text", -1, &long, LeftOut::Other);
}

#[test]
fn times_and_uuids_are_not_recognized() {
    for expression in ["now()", "CURRENT_TIMESTAMP", "clock_timestamp()"] {
        check("timestamp with time zone", -1, expression, LeftOut::Now);
        check("timestamp(3) with time zone", 3, expression, LeftOut::Now);
    }
    for expression in [
        "gen_random_uuid()",
        "uuid_generate_v4()",
        "extensions.uuid_generate_v4()",
    ] {
        check("uuid", -1, expression, LeftOut::Uuid);
    }
}

#[test]
fn a_sequence_with_something_around_it_is_leased() {
    for text in [
        "nextval('tasks_id_seq'::regclass)",
        "nextval('s.\"It''s\"'::regclass)",
    ] {
        assert!(is_nextval(text), "{text}");
    }
    for text in [
        "(nextval('s'::regclass) * 2)",
        "nextval('s'::regclass)::integer",
        "nextval(('s'::text)::regclass)",
        "nextval('s'::regclass) + nextval('s'::regclass)",
        "currval('s'::regclass)",
    ] {
        assert!(!is_nextval(text), "{text}");
    }
}

proptest! {
    /// As Postgres quotes it (`simple_quote_literal`).
    #[test]
    fn a_quoted_text_is_read_as_another(content in any::<String>().prop_filter("Postgres has none", |s| !s.contains('\0'))) {
        let mark = if content.contains('\\') { "E" } else { "" };
        let inside = content.replace('\\', r"\\").replace('\'', "''");
        let expression = format!("{mark}'{inside}'::text");
        let column = column("text", Kind::Text, -1);
        prop_assert_eq!(of_expression(&column, &expression), text(&content));
    }

    #[test]
    fn a_text_of_a_catalog_makes_it_panic(expression in "[E']?('|\\\\|::|[(]|[)]|text|1|[.]|NULL|é| ){0,12}") {
        for postgres_type in ["integer", "text", "numeric(10,2)", "text[]", "bytea"] {
            of_expression(&column(postgres_type, kind_of(postgres_type), 1234), &expression);
        }
    }
}
