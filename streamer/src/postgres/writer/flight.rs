//! Statements that were sent and not answered yet.
//!
//! Postgres answers in order, so statements are sent without waiting, within limits, and a batch of transactions costs one
//! round trip. They are sent in groups (see [`pipeline`](super::super::pipeline)): the last statement of a transaction, and
//! the next one up to where it is to be committed, or a part of a large one. A group whose statement fails is skipped from
//! there on. What comes behind it of the transaction is refused by Postgres, which makes a ROLLBACK of its COMMIT; and the
//! next one fails at its claim, or goes on where the one before was answered already.
//!
//! **No group but the first of a transaction is sent before it is known to have begun.** Its BEGIN may be skipped, behind a COMMIT
//! that fails: whatever came in a group of its own would be executed then, and stay, without a claim and as another role.
//!
//! **Where we wait** is between groups: then Postgres has read all that it was sent, and knows for a transaction that is open how
//! long nothing has come (`idle_in_transaction_session_timeout`), which in the middle of a group it does not.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, ready},
};

use super::{facts::Facts, outcome::Rejection, rules::Rule, value::Param};
use crate::postgres::{
    pipeline::{Answer, Pipeline, Said},
    sql,
};

/// As many statements may be under way, and as many bytes of their parameters.
const STATEMENTS_MAX: usize = 1024;
const BYTES_MAX: usize = 4 << 20;

/// As many are in a group.
const GROUP_STATEMENTS_MAX: usize = 128;
const GROUP_BYTES_MAX: usize = 64 << 10;

/// Written as soon as there is as much, so that Postgres begins while we go on.
const WRITE_BYTES: usize = 16 << 10;

/// What a statement takes beside its parameters, about.
const STATEMENT_BYTES: usize = 64;

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

impl Failure {
    /// Whether Postgres said this SQLSTATE.
    pub fn is_of(&self, sqlstate: &str) -> bool {
        matches!(&self.cause, Cause::Said(said) if said.sqlstate == sqlstate)
    }
}

/// What failed.
#[derive(Debug)]
pub enum Cause {
    /// The statement.
    Said(Box<Said>),
    /// The connection: nobody knows what became of it.
    Broken(String),
    /// It can't even be asked of Postgres.
    Rejected(Rejection),
    /// A statement is not there that was prepared: or was to be, by a transaction before it that was skipped; or a function of
    /// the application dropped it.
    Unprepared,
}

/// What an answer is expected to.
enum Sent {
    /// A statement, and its text until it is prepared.
    Statement(Option<String>),
    /// Statements without parameters, which are a group.
    Simple,
    /// The end of a group.
    Sync,
}

struct Flying {
    /// By number.
    transaction: usize,
    step: Step,
    bytes: usize,
    sent: Sent,
}

/// Sends, and keeps what failed.
pub struct Flight<'a> {
    pipeline: &'a mut Pipeline,
    flying: VecDeque<Flying>,
    /// Of what is flying.
    bytes: usize,
    /// Of the group that is not ended: statements and bytes.
    group: (usize, usize),
    /// By transaction: the first error of it.
    failures: Vec<Option<Failure>>,
    /// The transaction in hand is known to have begun, or to have failed.
    begun: bool,
    /// A transaction was open when all was answered that was last.
    open: bool,
}

impl<'a> Flight<'a> {
    /// Nothing sent yet.
    pub fn new(pipeline: &'a mut Pipeline) -> Self {
        Flight {
            pipeline,
            flying: VecDeque::new(),
            bytes: 0,
            group: (0, 0),
            failures: Vec::new(),
            begun: false,
            open: false,
        }
    }

    /// What is sent from here on belongs to another transaction.
    pub async fn next_transaction(&mut self) {
        self.failures.push(None);
        self.begun = false;
        if let Some(sql) = self.pipeline.tidy() {
            self.simple(Step::Begin, sql).await;
        }
    }

    /// Whether the transaction is known to have failed.
    pub fn has_failed(&self) -> bool {
        self.failures.last().is_some_and(Option::is_some)
    }

    /// Whether any transaction is known to have failed: those behind it are in vain.
    pub fn is_in_vain(&self) -> bool {
        self.failures.iter().any(Option::is_some)
    }

    /// Sends statements without parameters, which are not prepared.
    pub async fn simple(&mut self, step: Step, sql: &str) {
        self.end_group().await;
        match self.pipeline.simple(sql) {
            Ok(()) => self.push(step, 0, Sent::Simple),
            Err(error) => self.fail(step, Cause::Broken(error.to_string())),
        }
    }

    /// Sends a statement, which is prepared if it was not yet.
    pub async fn statement(&mut self, step: Step, text: &str, params: &[Param]) {
        let bytes = params.iter().map(Param::len).sum::<usize>() + STATEMENT_BYTES;
        match self.pipeline.statement(text, params) {
            Ok(text) => self.push(step, bytes, Sent::Statement(text)),
            Err(error) => {
                // Above a gigabyte, which no transaction may have.
                self.land().await;
                self.fail(step, Cause::Broken(error.to_string()));
                return;
            }
        }
        self.group = (self.group.0 + 1, self.group.1 + bytes);
        if self.group.0 >= GROUP_STATEMENTS_MAX || self.group.1 >= GROUP_BYTES_MAX {
            if self.begun {
                self.end_group().await;
            } else {
                self.land().await;
                self.begun = true;
            }
        }
    }

    /// Ends a group. Waits until there is room for another one.
    pub async fn end_group(&mut self) {
        if self.group == (0, 0) {
            return;
        }
        self.group = (0, 0);
        self.pipeline.sync();
        self.push(Step::Commit, 0, Sent::Sync);
        if self.pipeline.unwritten() >= WRITE_BYTES {
            // Takes what is here already.
            self.land_until(|_| false, true).await;
        }
        self.land_until(
            |flight| flight.flying.len() <= STATEMENTS_MAX && flight.bytes <= BYTES_MAX,
            false,
        )
        .await;
    }

    /// Fails the transaction, if nothing that was sent did.
    pub async fn reject(&mut self, step: Step, rejection: Rejection) {
        self.land().await;
        self.fail(step, Cause::Rejected(rejection));
    }

    /// Waits for all answers. By transaction: the first error of it.
    pub async fn finish(mut self) -> Vec<Option<Failure>> {
        self.land().await;
        if self.open {
            // Its end failed before it was executed.
            self.pipeline.give_up();
        }
        self.failures
    }

    fn fail(&mut self, step: Step, cause: Cause) {
        if let Some(failure @ None) = self.failures.last_mut() {
            *failure = Some(Failure { step, cause });
        }
    }

    fn push(&mut self, step: Step, bytes: usize, sent: Sent) {
        self.bytes += bytes;
        self.flying.push_back(Flying {
            transaction: self.failures.len() - 1,
            step,
            bytes,
            sent,
        });
    }

    async fn land(&mut self) {
        self.end_group().await;
        self.land_until(|flight| flight.flying.is_empty(), false)
            .await;
    }

    /// Writes, and takes answers, until it is enough; or only those that are here.
    async fn land_until(&mut self, enough: impl Fn(&Self) -> bool, only_here: bool) {
        std::future::poll_fn(|context| match self.poll_until(&enough, context) {
            Poll::Pending if only_here => Poll::Ready(()),
            polled => polled,
        })
        .await;
    }

    fn poll_until(
        &mut self,
        enough: impl Fn(&Self) -> bool,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        while !self.flying.is_empty() && !enough(self) {
            match ready!(self.pipeline.poll(context)) {
                Ok(answer) => self.answered(answer),
                Err(error) => self.broke(&error),
            }
        }
        Poll::Ready(())
    }

    /// Of the oldest.
    fn answered(&mut self, answer: Answer) {
        let Some(first) = self.flying.front_mut() else {
            return;
        };
        match (answer, &mut first.sent) {
            (Answer::Parsed, Sent::Statement(text)) => *text = None,
            (Answer::Done { rolled_back }, Sent::Statement(_)) => {
                if rolled_back && matches!(first.step, Step::Commit) {
                    let why = "Postgres took back what it should have committed".into();
                    self.failed(Cause::Broken(why));
                }
                self.pop();
            }
            (Answer::Done { .. }, Sent::Simple) => {}
            (Answer::Failed(said), _) => {
                self.failed(match Pipeline::is_unprepared(&said) {
                    true => Cause::Unprepared,
                    false => Cause::Said(said),
                });
                // The rest of its group is not answered, which may have the beginning of another transaction.
                while let Some(Sent::Statement(_)) = self.flying.front().map(|first| &first.sent) {
                    self.failed(Cause::Broken("skipped behind an error".into()));
                    self.pop();
                }
            }
            (Answer::Ready { idle }, Sent::Simple | Sent::Sync) => {
                self.open = !idle;
                self.pop();
            }
            (Answer::Parsed | Answer::Done { .. } | Answer::Ready { .. }, _) => {
                self.pipeline.give_up();
                self.broke(&sql::Error::Transient(
                    "Postgres answered what was not asked".into(),
                ));
            }
        }
    }

    /// The transaction of the oldest failed.
    fn failed(&mut self, cause: Cause) {
        if let Some(first) = self.flying.front()
            && let Some(failure @ None) = self.failures.get_mut(first.transaction)
        {
            let step = first.step.clone();
            *failure = Some(Failure { step, cause });
        }
    }

    /// Nothing will be answered any more.
    fn broke(&mut self, error: &sql::Error) {
        while !self.flying.is_empty() {
            self.failed(Cause::Broken(error.to_string()));
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(first) = self.flying.pop_front() {
            self.bytes -= first.bytes;
            if let Sent::Statement(Some(text)) = first.sent {
                self.pipeline.forget(&text);
            }
        }
    }
}
