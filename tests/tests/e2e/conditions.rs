//! Conditions of shapes mean what Postgres means by them: Postgres itself is asked, with the words as they are
//! written and with our canonical SQL.

mod fixture;
mod generator;

use std::collections::{BTreeMap, HashMap};

use anabranch_streamer::shape::{self, ParamSource, Source};
use anabranch_tests::{postgres::Server, seed::Seed};
use rand::rngs::StdRng;
use tokio_postgres::Client;

use self::{
    fixture::Fixture,
    generator::{Generator, Sample},
};

/// Rows that each condition is asked of.
const ROWS: usize = 1_000;

/// Conditions that are tried.
const CONDITIONS: usize = 1_500;

/// What came out.
#[derive(Debug, Default)]
pub struct Counts {
    /// (condition, row) pairs on which we and Postgres agree.
    pub pairs: usize,
    /// Pairs that the condition is true of.
    pub trues: usize,
    /// Conditions that both take.
    pub accepted: usize,
    /// Of these, those that can be routed.
    pub routed: usize,
    /// Conditions that both refuse.
    pub refused_by_both: usize,
    /// Conditions that only we refuse, by reason.
    pub refused_by_us: BTreeMap<String, usize>,
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_mean_what_postgres_means() {
    let seed = Seed::new();
    let database = Server::shared().await.database().await;
    let client = database.connect().await;
    let counts = compare(&client, &mut seed.rng("conditions"), ROWS, CONDITIONS).await;
    println!("{counts:#?}");
    assert!(
        counts.pairs >= 200_000,
        "too few pairs to prove anything: {}",
        counts.pairs
    );
    assert!(
        counts.trues * 20 > counts.pairs,
        "nearly no row is in any shape: {}",
        counts.trues
    );
}

/// Compares our answer with that of the database behind `client`, and panics at the first difference.
pub async fn compare(client: &Client, rng: &mut StdRng, rows: usize, conditions: usize) -> Counts {
    let fixture = Fixture::create(client, rng, rows).await;
    let mut counts = Counts::default();
    for _ in 0..conditions {
        let sample = Generator::sample(rng);
        let theirs = ask(client, &sample.theirs).await;
        match (evaluate(&fixture, &sample, &mut counts), theirs) {
            (Ok(answer), Ok(truth)) => {
                assert_same(&sample.theirs, &answer.bits, &truth);
                let canonical = ask(client, &answer.sql).await;
                match canonical {
                    Ok(truth) => assert_same(&answer.sql, &answer.bits, &truth),
                    Err(error) => panic!(
                        "Postgres refuses our canonical SQL: {error}\n{sample:#?}\n{}",
                        answer.sql
                    ),
                }
                // Without values, `check` asks Postgres with NULLs.
                if let Err(error) = ask(client, &answer.unbound_sql).await {
                    panic!(
                        "Postgres refuses NULLs for parameters: {error}\n{}",
                        answer.unbound_sql
                    );
                }
                counts.accepted += 1;
                counts.pairs += answer.bits.len();
                counts.trues += answer.bits.matches('1').count();
            }
            (Ok(_), Err(error)) => panic!("we take what Postgres refuses: {error}\n{sample:#?}"),
            (Err(reason), Ok(_)) => {
                assert!(!reason.is_empty());
                *counts.refused_by_us.entry(reason).or_default() += 1;
            }
            (Err(_), Err(_)) => counts.refused_by_both += 1,
        }
    }
    counts
}

#[track_caller]
fn assert_same(sql: &str, ours: &str, theirs: &str) {
    assert_eq!(ours.len(), theirs.len());
    if let Some(id) = ours.bytes().zip(theirs.bytes()).position(|(a, b)| a != b) {
        panic!(
            "row {id}: we say {}, Postgres {}\n{sql}",
            &ours[id..=id],
            &theirs[id..=id]
        );
    }
}

/// One digit for each row, in the order of ids: whether the condition is true.
async fn ask(client: &Client, condition: &str) -> Result<String, String> {
    let sql = format!(
        "SELECT string_agg(CASE WHEN ({condition}) IS TRUE THEN '1' ELSE '0' END, '' ORDER BY id) FROM samples"
    );
    match client.query_one(&sql, &[]).await {
        Ok(row) => Ok(row.get(0)),
        Err(error) => Err(format!("{:?}", error.as_db_error())),
    }
}

struct Answer {
    bits: String,
    sql: String,
    unbound_sql: String,
}

fn evaluate(fixture: &Fixture, sample: &Sample, counts: &mut Counts) -> Result<Answer, String> {
    let source = Source {
        name: "sample".to_owned(),
        params: sample
            .claims
            .keys()
            .map(|name| (name.clone(), ParamSource::Claim(name.clone())))
            .collect(),
        tables: vec![format!("SELECT * FROM samples WHERE {}", sample.ours)],
        writable: Vec::new(),
    };
    let tables = [fixture.table.clone()];
    let shapes = shape::compile(&[source], &tables).map_err(|refused| refused[0].reason.clone())?;
    let bound = shapes[0]
        .bind(&sample.claims, &HashMap::new())
        .map_err(|error| error.to_string())?;
    let bound = &bound[0];
    let keys = bound.route_keys();
    counts.routed += usize::from(bound.select.is_routable());
    let mut bits = String::new();
    for row in &fixture.rows {
        let is_in = bound
            .contains(row)
            .expect("a row of Postgres is of its table");
        if is_in && bound.select.is_routable() {
            let key = bound
                .select
                .route_key(row)
                .expect("a row of Postgres is of its table");
            let found = key.is_some_and(|key| keys.contains(&key));
            assert!(
                found,
                "routing does not find a row that is in the shape: {sample:#?}"
            );
        }
        bits.push(if is_in { '1' } else { '0' });
    }
    Ok(Answer {
        bits,
        sql: bound.condition_sql(),
        unbound_sql: bound.select.condition_sql(),
    })
}
