//! The commands that look beside a streamer that runs: `shapes diff` and `explain`. They ask it who is connected, read its
//! mirror by themselves, and print.

use std::{collections::HashSet, process::ExitCode, sync::Arc};

use anabranch_streamer::{
    config::Config,
    connected, diff,
    explain::{self, Question},
    lookup::Index,
    mirror::{Entry, Outside, State},
    policy::Policies,
    postgres::{
        catalog::{self, Name},
        check,
        sql::{self, Client},
    },
    shape::{self, Shape},
    table::Table,
};

use crate::{FAILED, USAGE, fail};

/// Page cache of this process. A table is read once, in key order; what subqueries look for may be anywhere.
const CACHE_BYTES: usize = 32 << 20;

/// Behind everything else on the machine, above all the streamer.
const NICE: i32 = 10;

/// Why a command gave up.
enum Failure {
    /// As for the other commands: a definite error.
    Failed(String),
    /// What `check` would say.
    Findings(Vec<check::Finding>),
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Failed(error.to_string())
    }
}

/// `shapes diff`: what connected replicas would gain and lose under `config`. 1 if one of them would be refused.
pub async fn diff(config: &Config, json: bool) -> ExitCode {
    match diffed(config).await {
        Ok(diff) => {
            print(&diff, json);
            if diff.refuses() {
                ExitCode::from(FAILED)
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(failure) => told(failure),
    }
}

async fn diffed(config: &Config) -> Result<diff::Diff, Failure> {
    let _ = rustix::process::nice(NICE);
    let answer = connected::ask(&config.data_dir, None).await?;
    let mut outside = Outside::open(&config.data_dir, CACHE_BYTES)?;
    let (_, entries) = diff::entries(&mut outside)?;
    let indexes = outside.reader().indexes()?;
    let shapes = compiled(config, &entries, &indexes).await?;
    Ok(diff::compute(&mut outside, &answer, &shapes)?)
}

/// The shapes of a config, against the mirror's tables, and what Postgres says of those that it does not have.
async fn compiled(
    config: &Config,
    entries: &[Entry],
    indexes: &[Index],
) -> Result<Vec<Shape>, Failure> {
    let findings = |refused: Vec<shape::Refused>| {
        let finding = |refused| check::of_shape(config, refused);
        Failure::Findings(refused.iter().map(finding).collect())
    };
    let named = shape::tables_named(&config.shapes).map_err(findings)?;
    let mut tables: Vec<Arc<Table>> = entries
        .iter()
        .filter(|entry| entry.state != State::Copying)
        .map(|entry| entry.table.clone())
        .collect();
    let there: HashSet<_> = tables
        .iter()
        .map(|table| (table.schema.clone(), table.name.clone()))
        .collect();
    let missing: Vec<Name> = named
        .into_iter()
        .filter(|name| !there.contains(name))
        .map(|(schema, name)| Name { schema, name })
        .collect();
    if !missing.is_empty() {
        let (new, refused) = described(config, &missing).await?;
        if !refused.is_empty() {
            return Err(Failure::Findings(refused));
        }
        tables.extend(new);
    }
    let shapes = shape::compile_with(&config.shapes, &tables, indexes).map_err(findings)?;
    Policies::new(&config.policies, &tables).map_err(|refused| {
        let finding = |what| check::Finding {
            severity: check::Severity::Error,
            what,
            remedy: None,
        };
        Failure::Findings(refused.into_iter().map(finding).collect())
    })?;
    Ok(shapes)
}

async fn described(
    config: &Config,
    names: &[Name],
) -> Result<(Vec<Arc<Table>>, Vec<check::Finding>), sql::Error> {
    let client = Client::connect(&config.postgres.target, "anabranch shapes diff").await?;
    let (mut tables, mut refused) = (Vec::new(), Vec::new());
    for read in catalog::read(&client, names).await? {
        match read {
            Ok(table) => tables.push(Arc::new(table)),
            Err(refusal) => refused.push(check::of_table(&refusal)),
        }
    }
    Ok((tables, refused))
}

/// `explain`: why a row is there or not.
pub async fn explain(config: &Config, question: &Question, json: bool) -> ExitCode {
    let right = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if question.replica.is_empty() || !question.replica.chars().all(right) {
        return fail(
            USAGE,
            &"--replica is the replica's id, as `anabranch-replica status` shows it: letters, digits, - and _",
        );
    }
    match explained(config, question).await {
        Ok(Ok(explained)) => {
            print(&explained, json);
            ExitCode::SUCCESS
        }
        Ok(Err(wrong)) => fail(USAGE, &wrong),
        Err(failure) => told(failure),
    }
}

async fn explained(
    config: &Config,
    question: &Question,
) -> Result<Result<explain::Explained, String>, Failure> {
    let answer = connected::ask(&config.data_dir, Some(&question.replica)).await?;
    let mut outside = Outside::open(&config.data_dir, CACHE_BYTES)?;
    match explain::explain(&mut outside, &answer, question) {
        Ok(explained) => Ok(Ok(explained)),
        Err(explain::Error::Question(wrong)) => Ok(Err(wrong)),
        Err(error) => Err(error.into()),
    }
}

fn print(answer: &(impl serde::Serialize + std::fmt::Display), json: bool) {
    match serde_json::to_string_pretty(answer) {
        Ok(text) if json => println!("{text}"),
        _ => print!("{answer}"),
    }
}

fn told(failure: Failure) -> ExitCode {
    match failure {
        Failure::Failed(error) => fail(FAILED, &error),
        Failure::Findings(findings) => {
            for finding in &findings {
                println!("{finding}\n");
            }
            ExitCode::from(FAILED)
        }
    }
}
