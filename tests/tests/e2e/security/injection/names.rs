//! Names of schemas, tables, columns and indexes, which are in the text of statements on both sides.

use anabranch_tests::oracle::quote;

use super::*;

/// A table of Postgres and what is in it: schema, name, two columns, and an index.
struct Named {
    schema: String,
    names: [String; 4],
}

impl Named {
    fn all(names: &[String], schemas: usize) -> Vec<Named> {
        let (schemas, names) = names.split_at(schemas);
        let tables = names.chunks_exact(4).enumerate().map(|(i, names)| Named {
            // Every second one is where most are.
            schema: match i % 2 {
                0 => "public".into(),
                _ => unreserved(&schemas[i / 2 % schemas.len()]),
            },
            names: std::array::from_fn(|i| names[i].clone()),
        });
        tables.collect()
    }

    fn qualified(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.names[0]))
    }

    fn select(&self) -> String {
        format!("SELECT * FROM {}", self.qualified())
    }

    /// What it is called in a file.
    fn in_file(&self) -> String {
        match &*self.schema {
            "public" => self.names[0].clone(),
            schema => format!("{schema}.{}", self.names[0]),
        }
    }
}

/// Schemas of what begins like this are Postgres' own.
fn unreserved(schema: &str) -> String {
    match schema.strip_prefix("pg_") {
        Some(rest) => format!("Pg_{rest}"),
        None => schema.to_owned(),
    }
}

/// Tables in one database, and databases: 500 of each kind of name.
const TABLES: usize = 125;
const ROUNDS: usize = 4;

/// Tables that programs write, of all: to make what captures that takes the longest.
const WRITTEN: usize = 25;

async fn mirror(server: &Server, publication: &str, tables: &[Named]) -> BTreeSet<String> {
    let writable = tables.len().min(WRITTEN);
    let began = server.log().await.len();
    let database = server.database().await;
    for some in tables.chunks(100) {
        let made = some.iter().map(|named| {
            let (table, [_, key, value, index]) = (named.qualified(), &named.names);
            let [schema, key, value, index] =
                [&named.schema, key, value, index].map(|name| quote(name));
            format!(
                "CREATE SCHEMA IF NOT EXISTS {schema};
                 CREATE TABLE {table} ({key} text PRIMARY KEY, {value} text);
                 CREATE INDEX {index} ON {table} ({value});
                 INSERT INTO {table} VALUES ('copied', 'one'), ('kept', 'two');"
            )
        });
        database.execute(&made.collect::<String>()).await;
    }
    let selects: Vec<_> = tables.iter().map(Named::select).collect();
    let selects: Vec<_> = selects.iter().map(|select| &**select).collect();
    let streamer = Streamer::config(&database)
        .set("postgres.publication", publication)
        .shape("written", &selects[..writable])
        .set("shape.written.writable", true)
        .shape("read", &selects[writable - 1..])
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .subscribe("written")
        .subscribe("read")
        .prepare();
    replica.spawn();
    let names: Vec<_> = tables.iter().map(Named::in_file).collect();
    let all: Vec<_> = (names.iter().map(|name| &**name)).zip(selects).collect();
    replica.until_equal(&database, &all).await;
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '\\_anabranch\\_%' ESCAPE '\\'";
    let file = replica.open();
    let mut statement = file.prepare(sql).unwrap();
    let found = statement.query_map([], |row| row.get::<_, String>(0));
    let found: BTreeSet<_> = found.unwrap().map(Result::unwrap).collect();
    assert_eq!(found, set(&names));

    // Changes, from both sides.
    for some in tables.chunks(100) {
        let changed = some.iter().map(|named| {
            let (table, key, value) = (
                named.qualified(),
                quote(&named.names[1]),
                quote(&named.names[2]),
            );
            format!(
                "UPDATE {table} SET {value} = 'changed' WHERE {key} = 'copied';
                 UPDATE {table} SET {key} = 'moved' WHERE {key} = 'kept';"
            )
        });
        database.execute(&changed.collect::<String>()).await;
    }
    replica.until_equal(&database, &all).await;
    let mut file = program(&replica);
    let written = file.transaction().unwrap();
    for (named, name) in tables[..writable].iter().zip(&names) {
        let [table, key, value] = [name, &named.names[1], &named.names[2]].map(|name| quote(name));
        written
            .execute_batch(&format!(
                "INSERT INTO {table} ({key}, {value}) VALUES ('written', 'by a program');
                 UPDATE {table} SET {value} = 'overwritten' WHERE {key} = 'copied';
                 DELETE FROM {table} WHERE {key} = 'moved'"
            ))
            .unwrap();
    }
    written.commit().unwrap();
    super::until_all_is_taken(&replica).await;
    for named in &tables[..writable] {
        let [key, value] = [&named.names[1], &named.names[2]].map(|name| quote(name));
        let sql = format!(
            "SELECT string_agg({key} || ' ' || {value}, ', ' ORDER BY {key}) FROM {}",
            named.qualified()
        );
        let rows: String = database.query(&sql, &[]).await[0].get(0);
        assert_eq!(
            rows, "copied overwritten, written by a program",
            "{:?}",
            named.names
        );
    }
    replica.until_equal(&database, &all).await;
    // A start that finds all of it there.
    streamer.kill();
    streamer.start().await;
    replica.until_equal(&database, &all).await;
    shapes(&server.log().await[began..])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_becomes_a_part_of_a_statement_or_another_name() {
    let server = Server::start(logged()).await;
    let plain = harmless(4 + 4 * 10, 0);
    let harmless = mirror(&server, "anabranch", &Named::all(&plain, 4)).await;
    let mut corpus = Corpus::new(Seed::new().rng("names"));
    // Several databases: what one file takes for its schema grows faster than its tables.
    for _ in 0..ROUNDS {
        let names = corpus.names(5 + 4 * TABLES);
        let publication = corpus.names(1).remove(0);
        let asked = mirror(&server, &publication, &Named::all(&names, 5)).await;
        assert_no_other(&harmless, &asked);
    }
}
