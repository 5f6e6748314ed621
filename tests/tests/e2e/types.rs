//! Every type that a column may have, with values that have gone wrong somewhere, in a database whose settings spoil
//! the text of them all: what `convert` makes of it, on the way of COPY and on that of the stream, must be what
//! Postgres itself says of the value by other ways (casts, `to_char`, `float8send`, `to_json`, `unnest`).

mod file;

use std::collections::{BTreeMap, HashMap};

use anabranch_proto::record::{Builder, ValueRef, value};
use anabranch_streamer::{
    postgres::{
        catalog::{Name, read},
        convert,
        sql::Client,
        target::Target,
    },
    table::{Kind, Table},
};
use anabranch_tests::{
    postgres::{Database, Server},
    types::{SETUP, TYPES},
};
use tokio_stream::StreamExt;

/// What spoils the text of values. None of it may reach us.
const HOSTILE: &str = "
    SET DateStyle = 'German, DMY';
    SET TimeZone = 'Asia/Kathmandu';
    SET IntervalStyle = 'iso_8601';
    SET extra_float_digits = -15;
    SET bytea_output = 'escape';
    SET xmloption = 'document';
    SET quote_all_identifiers = on;
    SET search_path = pg_catalog";

/// The settings under which Postgres' own text is what `convert` documents; set by hand, not by our client.
const PINNED: &str = "
    SET DateStyle = 'ISO';
    SET TimeZone = 'UTC';
    SET IntervalStyle = 'postgres';
    SET extra_float_digits = 3;
    SET bytea_output = 'hex';
    SET lc_monetary = 'C';
    SET xmloption = 'content';
    SET quote_all_identifiers = off;
    SET search_path = public";

/// A column's type and its values.
struct Case {
    sql_type: String,
    values: Vec<String>,
}

/// The table of types, and of each of them that has arrays an array of all its values.
async fn cases(database: &Database) -> Vec<Case> {
    let mut cases = Vec::new();
    for (sql_type, values) in TYPES {
        cases.push(Case {
            sql_type: (*sql_type).into(),
            values: values.iter().map(|value| (*value).into()).collect(),
        });
        let plain = sql_type.split(" COLLATE ").next().unwrap_or(sql_type);
        let has_arrays = database
            .query(
                "SELECT typarray <> 0 FROM pg_type WHERE oid = pg_catalog.to_regtype($1)",
                &[&plain],
            )
            .await;
        if !plain.ends_with(']') && has_arrays.first().is_some_and(|row| row.get(0)) {
            let all: Vec<_> = values
                .iter()
                .map(|value| format!("CAST({value} AS {plain})"))
                .collect();
            cases.push(Case {
                sql_type: format!("{plain}[]"),
                values: vec![format!("ARRAY[{}, NULL]", all.join(", "))],
            });
        }
    }
    cases
}

/// A table `t0`, `t1`, … for each case, of which `v` has the type: NULL is row 0, and the values come after it.
async fn make_tables(database: &Database) -> Vec<Case> {
    let cases = cases(database).await;
    for (i, case) in cases.iter().enumerate() {
        let Case { sql_type, values } = case;
        let mut sql = format!(
            "CREATE TABLE t{i} (id int PRIMARY KEY, v {sql_type});\nINSERT INTO t{i} VALUES (0, NULL);\n"
        );
        let plain = sql_type.split(" COLLATE ").next().unwrap_or(sql_type);
        for (id, value) in values.iter().enumerate() {
            sql += &format!(
                "INSERT INTO t{i} VALUES ({}, CAST({value} AS {plain}));\n",
                id + 1
            );
        }
        database.execute(&sql).await;
    }
    cases
}

/// Gives the database hostile defaults. Connections that are open already keep theirs.
async fn spoil(database: &Database) {
    for setting in HOSTILE.split(';') {
        database
            .execute(&format!("ALTER DATABASE {} {setting}", database.name()))
            .await;
    }
    // lc_monetary needs a locale that is there; which is the machine's affair.
    let sql = "SELECT collcollate::text FROM pg_catalog.pg_collation WHERE collprovider = 'c' AND collcollate ~ '_' LIMIT 1";
    match database.query(sql, &[]).await.first() {
        Some(row) => {
            let (name, locale) = (database.name(), row.get::<_, String>(0));
            database
                .execute(&format!(
                    "ALTER DATABASE {name} SET lc_monetary = '{locale}'"
                ))
                .await;
        }
        None => {
            anabranch_tests::announce("no locale on this server but C: lc_monetary is not spoilt")
        }
    }
}

/// A hostile database with the tables, and a slot that has all their rows.
async fn fill(database: &Database) -> Vec<Case> {
    database.execute(SETUP).await;
    database
        .execute("CREATE PUBLICATION p FOR ALL TABLES")
        .await;
    database
        .execute(
            "SELECT pg_create_logical_replication_slot(current_database() || '_s', 'pgoutput')",
        )
        .await;
    let cases = make_tables(database).await;
    spoil(database).await;
    cases
}

/// What `convert` made, in words that Postgres can say too.
fn shown(kind: &Kind, text: Option<&[u8]>) -> String {
    let mut builder = Builder::new();
    match text {
        None => builder.push_null(),
        Some(text) => {
            if convert::push(&mut builder, kind, text).is_err() {
                return format!("refused: {}", String::from_utf8_lossy(text));
            }
        }
    }
    match value(&builder.finish(), 0).expect("a record of one value") {
        ValueRef::Null => "NULL".into(),
        ValueRef::Integer(value) => format!("integer {value}"),
        ValueRef::Real(value) => format!("real {:016x}", value.to_bits()),
        ValueRef::Text(value) => format!("text {value}"),
        ValueRef::Blob(value) => {
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("blob {hex}")
        }
    }
}

/// By table: what `convert` made of each row, by id.
type Converted = HashMap<String, BTreeMap<i32, String>>;

/// The way of COPY.
async fn copied(client: &Client, tables: &[Table]) -> Converted {
    let mut converted = Converted::new();
    for table in tables {
        let sql = format!("COPY public.{} TO STDOUT", table.name);
        let mut stream = Box::pin(client.client.copy_out(&sql).await.unwrap());
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.unwrap());
        }
        for line in bytes
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
        {
            let tab = line.iter().position(|byte| *byte == b'\t').unwrap();
            let id = std::str::from_utf8(&line[..tab]).unwrap().parse().unwrap();
            let text = unescaped(&line[tab + 1..]);
            let shown = shown(&table.columns[1].kind, text.as_deref());
            converted
                .entry(table.name.clone())
                .or_default()
                .insert(id, shown);
        }
    }
    converted
}

/// A field of COPY's text format: the manual's table of backslash sequences.
fn unescaped(field: &[u8]) -> Option<Vec<u8>> {
    if field == b"\\N" {
        return None;
    }
    let mut text = Vec::new();
    let mut bytes = field.iter();
    while let Some(&byte) = bytes.next() {
        text.push(match byte {
            b'\\' => match bytes.next().unwrap() {
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'v' => 11,
                other => *other,
            },
            byte => byte,
        });
    }
    Some(text)
}

/// The way of the stream: INSERT messages of pgoutput, read by twenty lines of the test's own.
async fn streamed(client: &Client, tables: &[Table]) -> Converted {
    let sql = "SELECT data FROM pg_logical_slot_get_binary_changes(current_database() || '_s', NULL, NULL,
        'proto_version', '1', 'publication_names', 'p')";
    let mut converted = Converted::new();
    for row in client.client.query(sql, &[]).await.unwrap() {
        let message: &[u8] = row.get(0);
        let [b'I', rest @ ..] = message else { continue };
        let (oid, mut rest) = rest.split_first_chunk().unwrap();
        let oid = u32::from_be_bytes(*oid);
        let Some(table) = tables.iter().find(|table| table.oid == oid) else {
            continue;
        };
        // N, count of columns; then each one's format, length and bytes.
        rest = &rest[3..];
        let mut fields = Vec::new();
        while let [format, after @ ..] = rest {
            rest = after;
            fields.push(if *format == b't' {
                let (length, after) = rest.split_first_chunk().unwrap();
                let (text, after) = after.split_at(u32::from_be_bytes(*length) as usize);
                rest = after;
                Some(text)
            } else {
                assert_eq!(*format, b'n');
                None
            });
        }
        let id = std::str::from_utf8(fields[0].unwrap())
            .unwrap()
            .parse()
            .unwrap();
        let shown = shown(&table.columns[1].kind, fields[1]);
        converted
            .entry(table.name.clone())
            .or_default()
            .insert(id, shown);
    }
    converted
}

/// What a type is to the test: the name of the type under its domains, and that of its elements.
async fn named(
    client: &tokio_postgres::Client,
    table: &str,
) -> (String, Option<String>, Option<String>) {
    let sql = "
        WITH RECURSIVE under(oid, depth, elements) AS (
            SELECT atttypid, 0, 0 FROM pg_attribute WHERE attrelid = $1::text::regclass AND attname = 'v'
            UNION ALL
            SELECT CASE WHEN typtype = 'd' THEN typbasetype ELSE typelem END, depth + 1,
                elements + (typtype <> 'd')::int
            FROM under JOIN pg_type USING (oid)
            WHERE typtype = 'd' OR typoutput = 'array_out'::regproc
        )
        SELECT DISTINCT ON (elements) typname::text FROM under JOIN pg_type USING (oid) ORDER BY elements, depth DESC";
    let rows = client.query(sql, &[&table]).await.unwrap();
    let mut names = rows.iter().map(|row| row.get(0));
    (names.next().unwrap(), names.next(), names.next())
}

/// SQL for what a value `e` of the type is to become, told by Postgres: its storage and its text.
fn expected(type_name: &str, e: &str) -> (&'static str, String) {
    let finite = |format: &str, at: &str| {
        format!(
            "CASE WHEN isfinite({e}) AND {e} >= '0001-01-01 00:00:00+00' AND {e} < '10000-01-01 00:00:00+00'
             THEN to_char({at}, '{format}') ELSE {e}::text END"
        )
    };
    match type_name {
        "int2" | "int4" | "int8" | "oid" => ("integer", format!("({e}::int8 + 0)::text")),
        "bool" => ("integer", format!("({e}::int)::text")),
        "float4" | "float8" => ("real", format!("encode(float8send({e}::float8), 'hex')")),
        "bytea" => ("blob", format!("encode({e}, 'hex')")),
        "timestamptz" => (
            "text",
            finite("YYYY-MM-DD HH24:MI:SS.US\"Z\"", &format!("{e} AT TIME ZONE 'UTC'")),
        ),
        "timestamp" => ("text", finite("YYYY-MM-DD HH24:MI:SS.US", e)),
        "date" => ("text", finite("YYYY-MM-DD", &format!("{e}::timestamp"))),
        "time" => ("text", format!("to_char({e}::interval, 'HH24:MI:SS.US')")),
        "bpchar" => ("text", format!("rtrim({e}::text, ' ')")),
        // What Postgres 16 and later print. On older ones the text is not UTF-8.
        "char" => (
            "text",
            format!(
                "CASE WHEN {e}::int < 0 THEN '\\' || (256 + {e}::int) / 64 || (256 + {e}::int) / 8 % 8
                 || (256 + {e}::int) % 8 ELSE {e}::text END"
            ),
        ),
        // The output function, as Postgres calls it for COPY: a cast makes another text of inet and xml.
        _ => ("text", format!("CASE WHEN num_nulls({e}) = 0 THEN format('%s', {e}) END")),
    }
}

/// SQL for the JSON of an element `e`.
fn expected_json(type_name: &str, e: &str) -> String {
    match type_name {
        "int2" | "int4" | "int8" | "float4" | "float8" | "bool" => format!("to_json({e})::text"),
        "oid" => format!("to_json({e}::int8)::text"),
        "bytea" => format!("to_json('\\x' || encode({e}, 'hex'))::text"),
        _ => format!("to_json({})::text", expected(type_name, e).1),
    }
}

/// What Postgres says that a table's values are to become, by id.
async fn said(client: &tokio_postgres::Client, table: &str) -> BTreeMap<i32, String> {
    let (name, element, inner) = named(client, table).await;
    let Some(element) = element else {
        let (storage, e) = expected(&name, "v");
        let sql = format!("SELECT id, coalesce('{storage} ' || ({e}), 'NULL') FROM public.{table}");
        let rows = client
            .query(&sql, &[])
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        return rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    };
    let leaf = match inner {
        // A domain over an array as element.
        Some(_) => "to_json(CASE WHEN array_lower(e, 1) <> 1 THEN e::text ELSE array_to_json(e)::text END)::text".into(),
        None => expected_json(&element, "e"),
    };
    let sql = format!(
        "SELECT id, v IS NULL, v::text, ARRAY(SELECT array_lower(v, n) FROM generate_series(1, array_ndims(v)) n),
             ARRAY(SELECT array_length(v, n) FROM generate_series(1, array_ndims(v)) n),
             ARRAY(SELECT CASE WHEN num_nulls(e) = 0 THEN {leaf} ELSE 'null' END
                   FROM unnest(v) WITH ORDINALITY AS u(e, place) ORDER BY place)
         FROM public.{table}"
    )
    .replace("v::text,", if element == "char" { "''," } else { "v::text," });
    let sql = match element.as_str() {
        // unnest() makes columns of a composite.
        "pair" | "nested" => sql.replace(
            "unnest(v) WITH ORDINALITY AS u(e, place)",
            "(SELECT v[place] AS e, place FROM generate_subscripts(v, 1) place) u",
        ),
        _ => sql,
    };
    let rows = client
        .query(&sql, &[])
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    rows.iter()
        .map(|row| {
            let (lower, lengths): (Vec<i32>, Vec<i32>) = (row.get(3), row.get(4));
            let said = if row.get(1) {
                "NULL".into()
            } else if lower.iter().any(|lower| *lower != 1) {
                format!("text {}", row.get::<_, String>(2))
            } else {
                format!("text {}", nested(row.get(5), &lengths))
            };
            (row.get(0), said)
        })
        .collect()
}

/// Leaves in row-major order become nested JSON.
fn nested(mut parts: Vec<String>, lengths: &[i32]) -> String {
    for length in lengths.iter().rev() {
        parts = parts
            .chunks(usize::try_from(*length).unwrap())
            .map(|parts| format!("[{}]", parts.join(",")))
            .collect();
    }
    match &parts[..] {
        [] => "[]".into(),
        [whole] => whole.clone(),
        _ => panic!("{lengths:?} do not hold {} leaves", parts.len()),
    }
}

#[tokio::test]
async fn every_type_is_exact_under_hostile_settings() {
    let database = Server::shared().await.database().await;
    let cases = fill(&database).await;
    let target = Target::parse(database.url()).unwrap();
    let client = Client::connect(&target, "types").await.unwrap();
    let names: Vec<_> = (0..cases.len())
        .map(|i| Name {
            schema: "public".into(),
            name: format!("t{i}"),
        })
        .collect();
    let tables: Result<Vec<Table>, _> = read(&client, &names).await.unwrap().into_iter().collect();
    let tables = tables.unwrap();
    let (copied, streamed) = (
        copied(&client, &tables).await,
        streamed(&client, &tables).await,
    );

    let judge = database.connect().await;
    // The judge's settings are hostile until it says otherwise: the database's own were not lost.
    let style = judge.query_one("SHOW IntervalStyle", &[]).await.unwrap();
    assert_eq!(style.get::<_, String>(0), "iso_8601");
    judge.batch_execute(PINNED).await.unwrap();

    let mut wrong = Vec::new();
    let mut values = 0;
    for (case, table) in cases.iter().zip(&tables) {
        let said = said(&judge, &table.name).await;
        assert_eq!(said.len(), case.values.len() + 1, "{}", case.sql_type);
        values += said.len();
        for (id, said) in said {
            for (way, converted) in [("copied", &copied), ("streamed", &streamed)] {
                let converted = converted[&table.name].get(&id);
                if converted != Some(&said) {
                    let short = |text: &str| text.chars().take(200).collect::<String>();
                    let converted = converted.map_or("nothing".into(), |text| short(text));
                    wrong.push(format!(
                        "{} {way} row {id}: {converted} instead of {}",
                        case.sql_type,
                        short(&said)
                    ));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {values} values:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    anabranch_tests::announce(&format!(
        "{values} values of {} types are exact both ways",
        cases.len()
    ));
}

/// The table of types must not be outgrown by Postgres.
#[tokio::test]
async fn no_built_in_type_is_forgotten() {
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    let known: Vec<_> = TYPES
        .iter()
        .map(|(name, _)| name.split(" COLLATE ").next().unwrap())
        .collect();
    let sql = "
        SELECT typname::text FROM pg_type t
        WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') AND typcategory <> 'A'
            AND oid NOT IN (SELECT to_regtype(name) FROM unnest($1::text[]) name)";
    let forgotten: Vec<String> = database
        .query(sql, &[&known])
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(forgotten.is_empty(), "{forgotten:?}");
}

/// SQLite's date functions find the same instant as Postgres.
#[tokio::test]
async fn sqlite_reads_times_as_the_same_instant() {
    let database = Server::shared().await.database().await;
    let client = database.connect().await;
    client.batch_execute(PINNED).await.unwrap();
    let sqlite = rusqlite::Connection::open_in_memory().unwrap();
    let sql = "
        SELECT t::text, extract(epoch FROM t)::float8
        FROM generate_series('0001-01-01 00:00:00.25+00'::timestamptz, '9999-12-31 00:00+00', '97 days 05:07:11') t";
    for row in client.query(sql, &[]).await.unwrap() {
        let (text, epoch): (String, f64) = (row.get(0), row.get(1));
        let mut builder = Builder::new();
        convert::push(&mut builder, &Kind::Timestamptz, text.as_bytes()).unwrap();
        let record = builder.finish();
        let Ok(ValueRef::Text(ours)) = value(&record, 0) else {
            panic!("a timestamptz is text");
        };
        let days: f64 = sqlite
            .query_row("SELECT julianday(?1)", [ours], |row| row.get(0))
            .unwrap();
        // 1970-01-01 is Julian day 2440587.5. A double of days has some 40 µs.
        let found = (days - 2_440_587.5) * 86_400.0;
        assert!(
            (found - epoch).abs() < 0.001,
            "{ours}: {found} is not {epoch}"
        );
    }
}
