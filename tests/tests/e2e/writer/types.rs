//! Every value of every type goes up as it came down.

use anabranch_proto::record::{
    self, Builder,
    ValueRef::{Integer, Null, Text},
};
use anabranch_streamer::{
    postgres::{convert, writer::Outcome},
    write::{NO_HASH, Policy},
};
use anabranch_tests::{
    postgres::Server,
    types::{SETUP, TYPES},
};

use super::fixture::{Fixture, Program, insert};

/// Postgres itself reads no values of these.
const NOT_READ: &[&str] = &[
    "gtsvector",
    "pg_node_tree",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_value_goes_up_as_it_came_down() {
    let fixture = Fixture::new(SETUP).await;
    let client = fixture.client().await;
    let version = client.server_version();
    let mut sql = String::new();
    let mut cases = Vec::new();
    for (sql_type, values) in TYPES {
        // Bytes above 127 in an array have a form that older servers do not read.
        if NOT_READ.contains(sql_type) || version < 160_000 && *sql_type == "\"char\"[]" {
            continue;
        }
        let table = format!("t{}", cases.len());
        let plain = sql_type.split(" COLLATE ").next().unwrap_or(sql_type);
        sql += &format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v {sql_type});\nINSERT INTO {table} VALUES (0, NULL);\n"
        );
        for (id, value) in (1..).zip(*values) {
            sql += &format!("INSERT INTO {table} VALUES ({id}, CAST({value} AS {plain}));\n");
        }
        cases.push((table, *sql_type));
    }
    fixture.database.execute(&sql).await;
    fixture
        .grant("GRANT ALL ON ALL TABLES IN SCHEMA public TO {app}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {login};
                GRANT USAGE ON SCHEMA \"Odd \"\"schema\"\"\" TO {app}, {login}")
        .await;
    let names: Vec<_> = cases.iter().map(|(table, _)| &**table).collect();
    let allowed = fixture.rules(&names, &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let (mut previous, mut wrong) = (NO_HASH, Vec::new());
    let mut program = Program::new(&allowed, &[]);
    for (table, sql_type) in &cases {
        program = program.over(&allowed, &[table]);
        let kind = allowed.kind(table, 1);
        let rows = client
            .client
            .simple_query(&format!("SELECT id, v FROM {table} ORDER BY id"))
            .await
            .unwrap();
        let mut records = Vec::new();
        for row in &rows {
            let tokio_postgres::SimpleQueryMessage::Row(row) = row else {
                continue;
            };
            let mut builder = Builder::new();
            builder.push_integer(row.get(0).unwrap().parse::<i64>().unwrap() + 1000);
            match row.get(1) {
                Some(text) => convert::push(&mut builder, &kind, text.as_bytes()).unwrap(),
                None => builder.push_null(),
            }
            records.push(builder.finish());
        }
        let entries: Vec<_> = records
            .iter()
            .map(|record| {
                let values: Vec<_> = record::values(record)
                    .unwrap()
                    .map(Result::unwrap)
                    .collect();
                insert(0, &values)
            })
            .collect();
        let transaction = program.transaction(&entries);
        let outcome = writer
            .apply(&replica, &previous, &transaction, &allowed.rules)
            .await;
        previous = transaction.hash;
        let outcome = outcome.unwrap_or_else(|error| panic!("{sql_type}: {error}"));
        if outcome != Outcome::Applied {
            wrong.push(format!("{sql_type}: {outcome:?}"));
            continue;
        }
        let differ = format!(
            "SELECT count(*)::text FROM {table} a LEFT JOIN {table} b ON b.id = a.id + 1000
              WHERE a.id < 1000 AND (b.id IS NULL OR (a.v::text IS NULL) <> (b.v::text IS NULL) OR rtrim(format('%s', a.v)) <> rtrim(format('%s', b.v)))"
        );
        let differ = fixture.text(&differ).await;
        if differ != "0" {
            wrong.push(format!("{sql_type}: {differ} values differ"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Neither what a program writes nor what we say of it must be of the database's letters.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_that_the_encoding_has_no_letters_for_blocks_what_is_behind() {
    let latin = "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0";
    let database = Server::shared().await.database_with(latin).await;
    let fixture = Fixture::of(
        database,
        "CREATE TABLE t (id int PRIMARY KEY, n numeric, note text)",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut program = Program::new(&rules, &["t"]);
    let all = [
        program.transaction(&[insert(0, &[Integer(1), Null, Text("5 €")])]),
        program.transaction(&[insert(0, &[Integer(2), Text("five"), Null])]),
        program.transaction(&[insert(0, &[Integer(3), Text("5"), Text("né")])]),
    ];
    let mut writer = fixture.writer().await;
    let replica = fixture.replica("r1");
    let applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert_eq!(applied.error, None);
    let sqlstates = applied.outcomes.iter().map(|outcome| match outcome {
        Outcome::Rejected(rejection) => &*rejection.sqlstate,
        _ => "",
    });
    assert_eq!(sqlstates.collect::<Vec<_>>(), ["22P05", "22P02", ""]);
    let rows = "SELECT (SELECT string_agg(id || ' ' || note, ', ') FROM t) || '; ' || count(*) FROM anabranch.rejections";
    assert_eq!(fixture.text(rows).await, "3 né; 2");
}
