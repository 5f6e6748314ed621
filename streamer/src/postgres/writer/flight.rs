//! Statements that were sent and not answered yet.
//!
//! Postgres answers in order, so statements are sent without waiting, within limits, and a transaction costs one round
//! trip. A statement behind one that failed does nothing: Postgres refuses it until the transaction ends, and makes a
//! ROLLBACK of its COMMIT.
//!
//! # Why it can't stand still
//!
//! tokio-postgres hands on answers in the order of the statements, each in as many pieces as it comes: one ends where a
//! read of the socket ends, and before each notice and each report of a setting. A statement has room for two pieces that
//! nobody took. At the third (a trigger that warns and sets `application_name`, or an error whose answer is cut by the
//! end of the read buffer, and whose ReadyForQuery comes later) the connection reads no further, until they are taken. So
//! whoever waits for a later answer without taking the earlier ones waits for ever, with Postgres idle in a transaction.
//! That is what a PREPARE in the middle did. Hence one rule: **whoever waits takes the answers, from the oldest on.**
//! There are two places that wait, [`Flight::land_first`], which waits for the oldest itself, and [`Flight::meanwhile`],
//! for everything else. With it nothing stands still:
//!
//! - The answer that the connection is handing on is the oldest one's, or nobody's any more: an answer is let go only when
//!   it is whole, or an error, and pieces for one that was let go are thrown away.
//! - After [`Flight::land_ready`] the oldest has taken all its pieces, and wakes us at the next one. So the connection
//!   stands still for no longer than we take to be polled.
//! - What is sent is put in a queue without a bound, so sending waits for nobody. What is under way is bounded by waiting
//!   for the oldest answer, whose statement was sent.

use std::{
    collections::{HashMap, VecDeque},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use tokio_postgres::{Client, Statement};

use super::{facts::Facts, outcome::Rejection, rules::Rule, statement::Sql, value::Param};

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
    /// Looks whether what was written to a table is shown.
    Check(Arc<Rule>),
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

    /// The statement, prepared now if it was not. Only where nothing is under way.
    pub async fn get(
        &mut self,
        client: &Client,
        text: &str,
    ) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.known(text) {
            return Ok(statement);
        }
        let statement = client.prepare(text).await?;
        self.keep(text, &statement);
        Ok(statement)
    }

    fn known(&self, text: &str) -> Option<Statement> {
        self.0.get(text).cloned()
    }

    fn keep(&mut self, text: &str, statement: &Statement) {
        if self.0.len() >= PREPARED_MAX {
            self.0.clear();
        }
        self.0.insert(text.to_owned(), statement.clone());
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
    pub async fn simple(&mut self, step: Step, sql: &'a str) {
        let client = self.client;
        self.send(step, 0, Box::pin(client.batch_execute(sql)))
            .await;
    }

    /// Sends a statement, which is prepared if it was not yet.
    pub async fn statement(&mut self, step: Step, sql: Sql) {
        let client = self.client;
        let prepared = match self.prepared.known(&sql.text) {
            Some(statement) => Ok(statement),
            None => {
                let made = self.meanwhile(client.prepare(&sql.text)).await;
                made.inspect(|statement| self.prepared.keep(&sql.text, statement))
            }
        };
        let statement = match prepared {
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

    /// Waits for something of the connection that comes behind what is under way.
    async fn meanwhile<T>(&mut self, later: impl Future<Output = T>) -> T {
        let mut later = pin!(later);
        std::future::poll_fn(|context| {
            // It is sent first, and then waits behind them.
            let polled = later.as_mut().poll(context);
            if polled.is_pending() {
                self.land_ready(context);
            }
            polled
        })
        .await
    }

    /// Takes what is here of the answers, from the oldest on; it wakes us when there is more.
    fn land_ready(&mut self, context: &mut Context<'_>) {
        while let Some(first) = self.flying.front_mut() {
            let answer = match &mut first.answer {
                Answer::Here(answer) => std::mem::replace(answer, Ok(())),
                Answer::Waiting(waiting) => match waiting.as_mut().poll(context) {
                    Poll::Ready(answer) => answer,
                    Poll::Pending => return,
                },
            };
            self.landed(answer);
        }
    }

    async fn land(&mut self) {
        while !self.flying.is_empty() {
            self.land_first().await;
        }
    }

    async fn land_first(&mut self) {
        let answer = match self.flying.front_mut().map(|first| &mut first.answer) {
            None => return,
            Some(Answer::Here(answer)) => std::mem::replace(answer, Ok(())),
            Some(Answer::Waiting(waiting)) => waiting.as_mut().await,
        };
        self.landed(answer);
    }

    /// The oldest is answered.
    fn landed(&mut self, answer: Result<(), tokio_postgres::Error>) {
        let Some(first) = self.flying.pop_front() else {
            return;
        };
        self.bytes -= first.bytes;
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
