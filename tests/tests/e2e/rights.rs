//! Whose rights count: what a replica may write is what its role may, with the claims of its token. Postgres itself is asked,
//! with plain SQL by the same role on an equal table, whatever policies and grants there are.
//!
//! `ANABRANCH_RIGHTS=1000` tries as many tables, each with its own rights.

mod generator;
mod oracle;
mod road;

use std::collections::BTreeMap;

use anabranch_streamer::{
    postgres::writer::{Outcome, Rejection, Replica, Writer},
    write::{NO_HASH, Policy},
};
use anabranch_tests::seed::Seed;
use tokio_postgres::Client;

use self::{
    generator::{Generator, Write},
    oracle::{Oracle, Verdict},
};
use crate::writer::fixture::{Fixture, Program};

/// Tables, where nobody says how many.
const TABLES: u64 = 24;

/// Transactions on each.
const TRANSACTIONS: usize = 25;

const CLAIMS: &str = r#"{"sub":"edge-1","team":2}"#;

fn tables() -> u64 {
    std::env::var("ANABRANCH_RIGHTS").map_or(TABLES, |text| text.parse().expect("a number"))
}

/// What is known of what all of the transactions came to, so that a test in which all are refused fails.
#[derive(Debug, Default)]
struct Counts {
    accepted: usize,
    refused: BTreeMap<String, usize>,
}

impl Counts {
    fn count(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Accepted => self.accepted += 1,
            Verdict::Refused { why, .. } => *self.refused.entry(why.clone()).or_default() += 1,
        }
    }

    fn prove_something(&self) {
        println!("{self:#?}");
        let refused: usize = self.refused.values().sum();
        let all = self.accepted + refused;
        // Where rights are drawn by lot, few tables may be hardly writable: of six hundred writes 58 were accepted once.
        assert!(self.accepted * 20 > all && refused * 20 > all, "{self:?}");
        for why in ["42501", "update_missing"] {
            assert!(self.refused.contains_key(why), "{self:?}");
        }
    }
}

async fn database() -> Fixture {
    let fixture = Fixture::new(
        "CREATE SCHEMA oracle;
         CREATE TABLE members (who text, team int, PRIMARY KEY (who, team));
         INSERT INTO members VALUES ('edge-1', 1), ('edge-1', 2), ('edge-2', 3)",
    )
    .await;
    fixture
        .grant("GRANT USAGE ON SCHEMA oracle TO {app}, {login}")
        .await;
    fixture
}

/// Makes a table twice: for us, and to ask Postgres.
async fn make(fixture: &Fixture, table: &str, sql: &str) {
    let sql = sql
        .replace("{bare app}", &fixture.app())
        .replace("{bare login}", &fixture.login())
        .replace("{quoted app}", &format!("'{}'", fixture.app()));
    for schema in ["public", "oracle"] {
        let sql = sql.replace("{t}", &format!("{schema}.{table}"));
        fixture.grant(&sql).await;
    }
}

/// A connection of the role that logs in to write.
async fn by_hand(fixture: &Fixture) -> Client {
    let url = fixture.database.url_as(&fixture.login(), "writer");
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

async fn rows(fixture: &Fixture, schema: &str, table: &str) -> String {
    let sql = format!(
        "SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY id), '') FROM {schema}.{table} t"
    );
    fixture.text(&sql).await
}

fn verdict(outcome: Outcome) -> Verdict {
    match outcome {
        Outcome::Applied => Verdict::Accepted,
        Outcome::Rejected(rejection) => {
            let Rejection {
                entry,
                outcome,
                sqlstate,
                ..
            } = rejection;
            match &*outcome {
                "out_of_shape" => Verdict::Refused {
                    why: outcome.into_owned(),
                    entry: None,
                },
                "error" | "insert_exists" => Verdict::Refused {
                    why: sqlstate,
                    entry,
                },
                _ => Verdict::Refused {
                    why: outcome.into_owned(),
                    entry,
                },
            }
        }
        Outcome::AlreadyAnswered => panic!("it is new"),
    }
}

/// Writes at random to one table, by the writer and by hand.
async fn compare(
    fixture: &Fixture,
    (writer, client): (&mut Writer, &Client),
    number: u64,
    generator: &mut Generator,
    is_restricted: bool,
    counts: &mut Counts,
) {
    let table = format!("t{number}");
    let rights = generator.table();
    make(fixture, &table, &rights).await;
    let shown = is_restricted.then(|| generator.shown());
    let condition = shown.map(|shown| format!(" WHERE {shown}"));
    let select = format!("SELECT * FROM {table}{}", condition.unwrap_or_default());
    let rules = fixture
        .rules_of(&[(&table, &select)], &Policy::default())
        .await;
    let replica = Replica {
        claims_json: CLAIMS.into(),
        ..fixture.replica(&table)
    };
    let oracle = Oracle {
        client,
        role: fixture.app(),
        claims: CLAIMS,
        table: format!("oracle.{table}"),
        shown,
    };
    let mut program = Program::new(&rules, &[&table]);
    let mut previous = NO_HASH;
    for _ in 0..TRANSACTIONS {
        let writes = generator.writes();
        let masks: Vec<_> = writes.iter().map(Write::mask).collect();
        let made: Vec<_> = (writes.iter().zip(&masks))
            .map(|(write, mask)| write.made(mask))
            .collect();
        let transaction = program.transaction(&made);
        let before = rows(fixture, "oracle", &table).await;
        let theirs = oracle.run(&writes).await;
        let outcome = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await
            .unwrap();
        let said = format!("{outcome:?}");
        let ours = verdict(outcome);
        let told = || format!("{rights}\n{select}\n{before}\n{writes:#?}\n{said}");
        assert_eq!(ours, theirs, "{}", told());
        let (here, there) = (
            rows(fixture, "public", &table),
            rows(fixture, "oracle", &table),
        );
        assert_eq!(here.await, there.await, "{}", told());
        counts.count(&ours);
        previous = transaction.hash;
    }
    let drop = format!("DROP TABLE public.{table}, oracle.{table}");
    fixture.database.execute(&drop).await;
}

async fn compare_many(is_restricted: bool) {
    let seed = Seed::new();
    let fixture = database().await;
    let (mut writer, client) = (fixture.writer().await, by_hand(&fixture).await);
    let mut counts = Counts::default();
    for number in 0..tables() {
        // Each by its number, so that one that fails can be had alone.
        let mut generator = Generator::new(seed.rng(&format!("rights {number}")));
        let connections = (&mut writer, &client);
        compare(
            &fixture,
            connections,
            number,
            &mut generator,
            is_restricted,
            &mut counts,
        )
        .await;
    }
    counts.prove_something();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_may_write_more_or_less_than_its_role() {
    compare_many(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shape_gives_rights_or_takes_others_than_those_to_what_it_does_not_show() {
    compare_many(true).await;
}
