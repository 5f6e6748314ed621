//! What Postgres says to the same writes, as plain SQL by the same role with the same claims.

use std::collections::HashSet;

use tokio_postgres::{Client, Error};

use super::generator::{Value, Write};

/// What became of a transaction.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Accepted,
    /// SQLSTATE, or our name of what Postgres has no error for.
    Refused {
        why: String,
        /// Not told of what is found at the end.
        entry: Option<u32>,
    },
}

/// Somebody who writes to the table by hand.
pub struct Oracle<'a> {
    pub client: &'a Client,
    pub role: String,
    pub claims: &'a str,
    pub table: String,
    /// A replica may only write what its shape shows.
    pub shown: Option<&'a str>,
}

fn refused(why: &str, entry: Option<usize>) -> Verdict {
    let entry = entry.map(|entry| entry as u32);
    let why = why.to_owned();
    Verdict::Refused { why, entry }
}

fn sqlstate(error: &Error) -> String {
    error.code().expect("Postgres says why").code().to_owned()
}

impl Oracle<'_> {
    /// Makes a transaction, or finds out why not.
    pub async fn run(&self, writes: &[Write]) -> Verdict {
        let begin = format!(
            "BEGIN; SET LOCAL ROLE \"{}\"; SET LOCAL request.jwt.claims = '{}'",
            self.role, self.claims
        );
        self.client.batch_execute(&begin).await.unwrap();
        let verdict = self.effects(writes).await;
        let end = match verdict {
            Verdict::Accepted => "COMMIT",
            Verdict::Refused { .. } => "ROLLBACK",
        };
        self.client.batch_execute(end).await.unwrap();
        verdict
    }

    async fn effects(&self, writes: &[Write]) -> Verdict {
        // Ids of rows that this transaction wrote: it sees them, whatever they are.
        let mut own = HashSet::new();
        for (entry, write) in writes.iter().enumerate() {
            let and = |id| match self.shown {
                Some(shown) if !own.contains(id) => format!(" AND (({shown}) IS TRUE)"),
                _ => String::new(),
            };
            let and = match write {
                Write::Insert(_) => String::new(),
                Write::Update { id, .. } | Write::Delete { id } => and(id),
            };
            match self
                .client
                .execute(&write.sql(&self.table, &and), &[])
                .await
            {
                Err(error) => return refused(&sqlstate(&error), Some(entry)),
                Ok(0) if matches!(write, Write::Update { .. }) => {
                    return refused("update_missing", Some(entry));
                }
                // A policy may hide the row from it, which is there then.
                Ok(0) => continue,
                Ok(_) => {}
            }
            match write {
                Write::Insert(row) => match row[0] {
                    Value::Integer(id) => own.insert(id),
                    _ => unreachable!("ids are integers"),
                },
                Write::Update { id, set } => {
                    own.remove(id);
                    own.insert(match set.first() {
                        Some((0, Value::Integer(id))) => *id,
                        _ => *id,
                    })
                }
                Write::Delete { id } => own.remove(id),
            };
        }
        let constraints = "SET CONSTRAINTS ALL IMMEDIATE; RESET ROLE";
        if let Err(error) = self.client.batch_execute(constraints).await {
            return refused(&sqlstate(&error), None);
        }
        let own: Vec<_> = own.iter().map(i64::to_string).collect();
        if let (Some(shown), false) = (self.shown, own.is_empty()) {
            let outside = format!(
                "SELECT count(*) FROM {} WHERE id IN ({}) AND ({shown}) IS NOT TRUE",
                self.table,
                own.join(", ")
            );
            let row = self.client.query_one(&outside, &[]).await.unwrap();
            if row.get::<_, i64>(0) > 0 {
                return refused("out_of_shape", None);
            }
        }
        Verdict::Accepted
    }
}
