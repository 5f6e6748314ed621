//! The SELECT oracle: what the shape's SQL gives in Postgres is what the file holds.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use tokio_postgres::{Client, IsolationLevel};

use super::{
    Row, compare, file,
    form::{Form, SESSION, Types},
    quote,
};
use crate::postgres::Database;

/// Compares tables of a file with queries in Postgres, each the SQL of a shape with its parameters filled in:
/// `[("issues", "SELECT * FROM issues WHERE team_id = 7")]`. Nothing may be written meanwhile, and the file must have
/// caught up.
pub async fn compare_file(
    database: &Database,
    path: &Path,
    tables: &[(&str, &str)],
) -> anyhow::Result<()> {
    let names: Vec<_> = tables.iter().map(|(name, _)| *name).collect();
    let snapshot = file::read(path, &names)?;
    let mut client = database.try_connect().await?;
    client.batch_execute(SESSION).await?;
    let types = Types::load(&client).await?;
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    for ((name, sql), found) in tables.iter().zip(snapshot.tables) {
        let answer = ask(transaction.client(), &types, sql)
            .await
            .with_context(|| format!("ask Postgres for {name}"))?;
        let found = found.with_context(|| format!("the file has no table {name}"))?;
        let rows = found.project(&answer.columns).map_err(|columns| {
            anyhow!(
                "table {name} has columns {columns:?} instead of {:?}",
                answer.columns
            )
        })?;
        let rows = rows
            .into_iter()
            .map(|row| {
                let cells = row.into_iter().zip(&answer.forms);
                cells.map(|(cell, form)| form.found(cell)).collect()
            })
            .collect();
        compare(name, &answer.columns, answer.rows, rows)?;
    }
    ensure!(!tables.is_empty(), "nothing to compare");
    Ok(())
}

/// What Postgres answers, as a file would hold it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Their forms.
    pub forms: Vec<Form>,
    /// In no order.
    pub rows: Vec<Row>,
}

/// Runs a query. The session's settings must be those of [`SESSION`].
pub async fn ask(client: &Client, types: &Types, sql: &str) -> anyhow::Result<Answer> {
    let statement = client.prepare(sql).await?;
    let columns: Vec<_> = statement
        .columns()
        .iter()
        .map(|column| column.name().to_owned())
        .collect();
    let forms: Vec<_> = statement
        .columns()
        .iter()
        .map(|column| types.form(column.type_().oid()))
        .collect();
    let expressions: Vec<_> = columns
        .iter()
        .zip(&forms)
        .map(|(name, form)| form.sql(&format!("shape.{}", quote(name))))
        .collect();
    let sql = format!("SELECT {} FROM ({sql}) AS shape", expressions.join(", "));
    let rows = client.query(&sql, &[]).await?;
    let rows = rows
        .iter()
        .map(|row| {
            let cells = forms.iter().enumerate();
            cells.map(|(i, form)| form.cell(row.get(i))).collect()
        })
        .collect();
    Ok(Answer {
        columns,
        forms,
        rows,
    })
}
