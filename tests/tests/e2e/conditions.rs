//! Conditions of shapes mean what Postgres means by them: Postgres itself is asked, with the words as they are
//! written and with our canonical SQL.

mod fixture;
mod generator;
mod rows;

use std::collections::{BTreeMap, HashMap};

use anabranch_streamer::shape::{self, ParamSource, Source, Step};
use anabranch_tests::{postgres::Server, seed::Seed};
use tokio_postgres::Client;

use self::{
    fixture::Fixture,
    generator::{Generator, Sample},
};

/// Rows that each condition is asked of.
const ROWS: usize = 1_000;

/// Conditions that are tried.
const CONDITIONS: usize = 1_500;

/// Rows that each condition with subqueries is asked of: for each, Postgres goes over inner rows, and for those over others.
const OUTER_ROWS: usize = 80;

/// How long Postgres may take for a condition. Few take longer; they would take most of the time.
const STATEMENT_TIMEOUT: &str = "SET statement_timeout = '1s'";

/// Conditions with subqueries that are tried.
const CONDITIONS_WITH_SUBQUERIES: usize = 4_500;

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
    /// Those that we take, by how deep subqueries are in them.
    pub by_depth: BTreeMap<usize, usize>,
    /// Conditions that Postgres took too long for.
    pub too_slow: usize,
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
    let mut rng = seed.rng("conditions");
    let fixture = Fixture::create(&client, &mut rng, ROWS).await;
    let sample = || Generator::sample(&mut rng);
    let counts = compare(&client, &fixture, CONDITIONS, sample).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn subqueries_mean_what_postgres_means() {
    let seed = Seed::new();
    let database = Server::shared().await.database().await;
    let client = database.connect().await;
    let mut rng = seed.rng("subqueries");
    let fixture = Fixture::with_inner(&client, &mut rng, OUTER_ROWS).await;
    client.batch_execute(STATEMENT_TIMEOUT).await.unwrap();
    let sample = || Generator::with_subqueries(&mut rng);
    let counts = compare(&client, &fixture, CONDITIONS_WITH_SUBQUERIES, sample).await;
    println!("{counts:#?}");
    assert!(
        counts.pairs >= 200_000 && counts.accepted * 2 > CONDITIONS_WITH_SUBQUERIES,
        "too few pairs to prove anything: {}",
        counts.pairs
    );
    assert!(
        counts.trues * 10 > counts.pairs && counts.trues * 10 < counts.pairs * 9,
        "nearly all answers are the same: {}",
        counts.trues
    );
    assert!(
        counts.routed * 20 > counts.accepted,
        "nearly no condition is routed: {}",
        counts.routed
    );
    assert!(
        counts.by_depth.len() == 3 && counts.by_depth.values().all(|count| *count > 50),
        "nearly no subquery is in another: {:?}",
        counts.by_depth
    );
}

/// Compares our answer with that of the database behind `client`, and panics at the first difference.
async fn compare(
    client: &Client,
    fixture: &Fixture,
    conditions: usize,
    mut sample: impl FnMut() -> Sample,
) -> Counts {
    let mut counts = Counts::default();
    for _ in 0..conditions {
        let sample = sample();
        let theirs = ask(client, "samples", &sample.theirs).await;
        if theirs.as_ref().is_err_and(|error| is_timeout(error)) {
            counts.too_slow += 1;
            continue;
        }
        match (evaluate(fixture, &sample, &mut counts), theirs) {
            (Ok(answer), Ok(truth)) => {
                assert_same(&sample.theirs, &answer.bits, &truth);
                // As writes ask it.
                let canonical = ask(client, "ONLY samples AS t", &answer.sql).await;
                match canonical {
                    Ok(truth) => assert_same(&answer.sql, &answer.bits, &truth),
                    Err(error) if is_timeout(&error) => counts.too_slow += 1,
                    Err(error) => panic!(
                        "Postgres refuses our canonical SQL: {error}\n{sample:#?}\n{}",
                        answer.sql
                    ),
                }
                // Without values, `check` asks Postgres with NULLs.
                if let Err(error) = ask(client, "samples", &answer.unbound_sql).await
                    && !is_timeout(&error)
                {
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

fn is_timeout(error: &str) -> bool {
    error.contains("57014")
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

/// One digit for each row of `from`, in the order of ids: whether the condition is true.
async fn ask(client: &Client, from: &str, condition: &str) -> Result<String, String> {
    let sql = format!(
        "SELECT string_agg(CASE WHEN ({condition}) IS TRUE THEN '1' ELSE '0' END, '' ORDER BY id) FROM {from}"
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
    let shapes =
        shape::compile(&[source], &fixture.tables).map_err(|refused| refused[0].reason.clone())?;
    let bound = shapes[0]
        .bind(&sample.claims, &HashMap::new())
        .map_err(|error| error.to_string())?;
    let bound = &bound[0];
    counts.routed += usize::from(bound.select.is_routable());
    let steps = bound.select.subqueries();
    let depth = steps.iter().map(|step| depth(steps, step)).max();
    let depth = depth.unwrap_or(0);
    *counts.by_depth.entry(depth).or_default() += 1;
    let mut bits = String::new();
    for row in &fixture.rows {
        let is_in = bound
            .contains(row, &fixture.lookup)
            .expect("a row of Postgres is of its table");
        let is_exact = bound.select.is_exact();
        if bound.select.is_routable() && (is_in || is_exact) {
            let mut leads_to = Vec::new();
            bound
                .select
                .route_keys_of(row, &fixture.lookup, &mut leads_to, usize::MAX)
                .expect("a row of Postgres is of its table");
            let found = leads_to.iter().any(|key| bound.has_route_key(key));
            assert!(
                found || !is_in,
                "routing does not find a row that is in the shape: {sample:#?}"
            );
            assert!(
                is_in || !found,
                "routing alone decides, and finds a row that is not in the shape: {sample:#?}"
            );
        }
        bits.push(if is_in { '1' } else { '0' });
    }
    Ok(Answer {
        bits,
        sql: bound.condition_sql("t"),
        unbound_sql: bound.select.condition_sql("samples"),
    })
}

/// How many subqueries are around the inner table of `step`.
fn depth(steps: &[Step], step: &Step) -> usize {
    1 + step.parent.map_or(0, |parent| depth(steps, &steps[parent]))
}
