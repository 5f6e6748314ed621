//! Statements that were sent and not answered yet.
//!
//! Postgres answers in order, so statements are sent without waiting, within limits, and a transaction costs one round
//! trip. A statement behind one that failed does nothing: Postgres refuses it until the transaction ends, and makes a
//! ROLLBACK of its COMMIT.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use tokio_postgres::{Client, Statement};

use super::{facts::Facts, outcome::Rejection, statement::Sql, value::Param};

/// As many statements may be under way, and as many bytes of their parameters.
const STATEMENTS_MAX: usize = 1024;
const BYTES_MAX: usize = 4 << 20;

/// As many prepared statements are kept.
const PREPARED_MAX: usize = 512;

/// A part of the transaction, for telling what an error means.
#[derive(Clone, Debug)]
pub enum Step {
    /// It begins.
    Begin,
    /// Claims its number, and becomes the role.
    Claim,
    /// An entry; the table, if it inserts.
    Effect(u32, Option<Arc<Facts>>),
    /// Deferred constraints, as the role still; and becomes the login role again.
    Constraints,
    /// Looks whether what was written is shown.
    Check,
    /// It ends.
    Commit,
}

/// Why a transaction failed.
#[derive(Debug)]
pub struct Failure {
    /// Where.
    pub step: Step,
    /// What.
    pub cause: Cause,
}

/// What failed.
#[derive(Debug)]
pub enum Cause {
    /// Postgres, or the connection.
    Sql(tokio_postgres::Error),
    /// It can't even be asked of Postgres.
    Rejected(Rejection),
}

type Waiting<'a> = Pin<Box<dyn Future<Output = Result<(), tokio_postgres::Error>> + Send + 'a>>;

enum Answer<'a> {
    Waiting(Waiting<'a>),
    Here(Result<(), tokio_postgres::Error>),
}

struct Flying<'a> {
    transaction: usize,
    step: Step,
    bytes: usize,
    answer: Answer<'a>,
}

/// Prepared statements, by their text.
#[derive(Default)]
pub struct Prepared(HashMap<String, Statement>);

impl Prepared {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The statement, prepared now if it was not.
    pub async fn get(
        &mut self,
        client: &Client,
        text: &str,
    ) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.0.get(text) {
            return Ok(statement.clone());
        }
        let statement = client.prepare(text).await?;
        if self.0.len() >= PREPARED_MAX {
            self.0.clear();
        }
        self.0.insert(text.to_owned(), statement.clone());
        Ok(statement)
    }
}

/// Sends, and keeps what failed.
pub struct Flight<'a> {
    client: &'a Client,
    prepared: &'a mut Prepared,
    flying: VecDeque<Flying<'a>>,
    bytes: usize,
    /// By transaction: the first error of it.
    failures: Vec<Option<Failure>>,
}

impl<'a> Flight<'a> {
    /// Nothing sent yet.
    pub fn new(client: &'a Client, prepared: &'a mut Prepared) -> Self {
        Flight {
            client,
            prepared,
            flying: VecDeque::new(),
            bytes: 0,
            failures: Vec::new(),
        }
    }

    /// What is sent from here on belongs to another transaction.
    pub fn next_transaction(&mut self) {
        self.failures.push(None);
    }

    /// Whether the transaction is known to have failed.
    pub fn has_failed(&self) -> bool {
        self.failures.last().is_some_and(Option::is_some)
    }

    /// Whether any transaction is known to have failed: those behind it are in vain.
    pub fn is_in_vain(&self) -> bool {
        self.failures.iter().any(Option::is_some)
    }

    /// Sends statements without parameters.
    pub async fn simple(&mut self, step: Step, sql: &'static str) {
        let client = self.client;
        self.send(step, 0, Box::pin(client.batch_execute(sql)))
            .await;
    }

    /// Sends a statement, which is prepared if it was not yet.
    pub async fn statement(&mut self, step: Step, sql: Sql) {
        let client = self.client;
        let statement = match self.prepared.get(client, &sql.text).await {
            Ok(statement) => statement,
            Err(error) => {
                // What was sent before may be why, and is then what counts.
                self.land().await;
                self.fail(step, Cause::Sql(error));
                return;
            }
        };
        let params: Vec<Param> = sql.params;
        let bytes = params.iter().map(|param| param.len() + 16).sum();
        let answer = Box::pin(async move {
            client.execute_raw(&statement, params).await?;
            Ok(())
        });
        self.send(step, bytes, answer).await;
    }

    /// Fails the transaction, if nothing that was sent did.
    pub async fn reject(&mut self, step: Step, rejection: Rejection) {
        self.land().await;
        self.fail(step, Cause::Rejected(rejection));
    }

    /// Waits for all answers. By transaction: the first error of it.
    pub async fn finish(mut self) -> Vec<Option<Failure>> {
        self.land().await;
        self.failures
    }

    fn fail(&mut self, step: Step, cause: Cause) {
        if let Some(failure @ None) = self.failures.last_mut() {
            *failure = Some(Failure { step, cause });
        }
    }

    async fn send(&mut self, step: Step, bytes: usize, mut answer: Waiting<'a>) {
        // It is sent when it is polled first.
        let polled = std::future::poll_fn(|context| Poll::Ready(answer.as_mut().poll(context)));
        let answer = match polled.await {
            Poll::Ready(answer) => Answer::Here(answer),
            Poll::Pending => Answer::Waiting(answer),
        };
        self.bytes += bytes;
        self.flying.push_back(Flying {
            transaction: self.failures.len() - 1,
            step,
            bytes,
            answer,
        });
        while self.flying.len() > STATEMENTS_MAX || self.bytes > BYTES_MAX {
            self.land_first().await;
        }
    }

    async fn land(&mut self) {
        while !self.flying.is_empty() {
            self.land_first().await;
        }
    }

    async fn land_first(&mut self) {
        let Some(first) = self.flying.pop_front() else {
            return;
        };
        self.bytes -= first.bytes;
        let answer = match first.answer {
            Answer::Here(answer) => answer,
            Answer::Waiting(answer) => answer.await,
        };
        if let Err(error) = answer
            && let Some(failure @ None) = self.failures.get_mut(first.transaction)
        {
            *failure = Some(Failure {
                step: first.step,
                cause: Cause::Sql(error),
            });
        }
    }
}
