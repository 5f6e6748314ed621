//! The same through the whole road: a program writes the file, and what comes of it is what Postgres says to the same by hand.

use anabranch_tests::seed::Seed;
use rusqlite::{Connection, OptionalExtension, types::ValueRef};

use super::{
    Counts,
    generator::{COLUMNS, Generator, Value, Write},
    oracle::{Oracle, Verdict},
};
use crate::conflicts::edge::Edge;

/// Tables, each with its own rights.
const TABLES: usize = 6;

/// Transactions on each.
const TRANSACTIONS: usize = 12;

/// What a program makes of a write: what it changes, and how; `None` if the file itself refuses it, or nothing changes.
fn make(program: &Connection, table: &str, write: Write) -> Option<Write> {
    let now = |id: i64| -> Option<Vec<Value>> {
        let sql = format!("SELECT {} FROM {table} WHERE id = {id}", COLUMNS.join(", "));
        let row = program.query_row(&sql, [], |row| {
            let value = |place| {
                Ok(match row.get_ref(place)? {
                    ValueRef::Integer(value) => Value::Integer(value),
                    ValueRef::Text(text) => Value::Text(String::from_utf8_lossy(text).into()),
                    _ => Value::Null,
                })
            };
            (0..COLUMNS.len()).map(value).collect()
        });
        row.optional().unwrap()
    };
    let (sql, write) = match write {
        Write::Insert(mut row) => {
            let Value::Integer(id) = row[0] else {
                unreachable!("ids are integers")
            };
            // The file has the default too.
            if row[4] == Value::Null {
                row[4] = Value::Integer(5);
            }
            let insert = Write::Insert(row.clone());
            match now(id) {
                None => (insert.sql(table, ""), insert),
                Some(before) => {
                    let set = changed(&before, (0..).zip(row).collect());
                    let sql = insert.sql(table, "");
                    let sql = sql.replacen("INSERT", "INSERT OR REPLACE", 1);
                    (sql, Write::Update { id, set })
                }
            }
        }
        Write::Update { id, set } => {
            let write = Write::Update {
                id,
                set: changed(&now(id)?, set),
            };
            (write.sql(table, ""), write)
        }
        Write::Delete { id } => {
            now(id)?;
            (write.sql(table, ""), write)
        }
    };
    match &write {
        Write::Update { set, .. } if set.is_empty() => None,
        // NOT NULL and the key are the file's too.
        _ => program.execute(&sql, []).ok().map(|_| write),
    }
}

fn changed(before: &[Value], set: Vec<(usize, Value)>) -> Vec<(usize, Value)> {
    let is_new = |(place, value): &(usize, Value)| before[*place] != *value;
    set.into_iter().filter(is_new).collect()
}

/// What became of what was rejected after the first `known`.
fn verdict(edge: &Edge, known: usize) -> Verdict {
    let rejected = edge.rejected().split_off(known);
    let found = (0..).zip(&rejected);
    let mut guilty = found.filter(|(_, one)| one.outcome != "rolled_back");
    let Some((entry, one)) = guilty.next() else {
        assert!(rejected.is_empty(), "{rejected:?}");
        return Verdict::Accepted;
    };
    let is_whole = rejected.iter().all(|one| one.outcome != "rolled_back");
    let why = match &*one.outcome {
        "error" | "insert_exists" => one.sqlstate.clone().unwrap(),
        outcome => outcome.to_owned(),
    };
    // Where all are why, it may be a deferred constraint.
    let entry = (!is_whole || rejected.len() == 1).then_some(entry);
    Verdict::Refused { why, entry }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_may_write_more_or_less_than_its_role() {
    let seed = Seed::new();
    let mut generators: Vec<_> = (0..TABLES)
        .map(|number| Generator::new(seed.rng(&format!("road {number}"))))
        .collect();
    let mut sql = "CREATE SCHEMA oracle; GRANT USAGE ON SCHEMA oracle TO {app};
        CREATE TABLE members (who text, team int, PRIMARY KEY (who, team));
        INSERT INTO members VALUES ('edge-1', 1), ('edge-1', 2), ('edge-2', 3);"
        .to_owned();
    let mut rights = Vec::new();
    for (number, generator) in generators.iter_mut().enumerate() {
        let made = generator.table().replace("{login}", "postgres");
        let made = made
            .replace("{bare login}", "postgres")
            .replace("pg_has_role({quoted app}, 'USAGE')", "true")
            .replace("current_user = '{bare app}'", "true");
        for schema in ["public", "oracle"] {
            sql += &made.replace("{t}", &format!("{schema}.t{number}"));
        }
        rights.push(made);
    }
    let names: Vec<_> = (0..TABLES)
        .map(|number| (format!("t{number}"), format!("SELECT * FROM t{number}")))
        .collect();
    let tables: Vec<_> = names
        .iter()
        .map(|(table, select)| (&**table, &**select))
        .collect();
    let edge = Edge::start(&sql, &tables, "").await;
    let program = edge.program();
    let client = edge.database.connect().await;
    let mut counts = Counts::default();
    for ((table, _), (generator, rights)) in names.iter().zip(generators.iter_mut().zip(&rights)) {
        let oracle = Oracle {
            client: &client,
            role: format!("{} app", edge.database.name()),
            claims: r#"{"sub":"edge-1"}"#,
            table: format!("oracle.{table}"),
            shown: None,
        };
        for _ in 0..TRANSACTIONS {
            program.execute_batch("BEGIN IMMEDIATE").unwrap();
            let writes = generator.writes().into_iter();
            let writes: Vec<_> = writes
                .filter_map(|write| make(&program, table, write))
                .collect();
            let known = edge.rejected().len();
            program.execute_batch("COMMIT").unwrap();
            edge.until_answered().await;
            let (mut ours, theirs) = (verdict(&edge, known), oracle.run(&writes).await);
            // Of one entry that is all of its transaction nobody can tell.
            if let (Verdict::Refused { entry, .. }, Verdict::Refused { entry: None, .. }) =
                (&mut ours, &theirs)
                && writes.len() == 1
            {
                *entry = None;
            }
            assert_eq!(ours, theirs, "{rights}\n{writes:#?}");
            let rows = |schema: &str| {
                format!("SELECT string_agg(t::text, E'\\n' ORDER BY id) FROM {schema}.{table} t")
            };
            let (here, there) = (edge.text(&rows("public")), edge.text(&rows("oracle")));
            assert_eq!(here.await, there.await, "{rights}\n{writes:#?}");
            counts.count(&ours);
        }
    }
    edge.same().await;
    println!("{counts:#?}");
    assert!(
        counts.accepted > 0 && !counts.refused.is_empty(),
        "{counts:?}"
    );
}
