//! What the streamer does with a local transaction: one transaction of Postgres, or a rejection.
//!
//! ```text
//! BEGIN
//! SELECT anabranch.claim(…), become the role, with its claims     exactly once: contiguous, and chained by hashes
//! the effects, in order                                           as the role; of rows that the replica is shown
//! SET CONSTRAINTS ALL IMMEDIATE; become the login role again      deferred triggers run as the role too
//! refuse rows that are not seen to be shown                       as the login role
//! COMMIT
//! ```
//!
//! **Exactly once.** The claim moves the replica's row of `anabranch.replicas` from the transaction before to this one,
//! or fails; it commits with the effects, or not at all. So a transaction that comes again is known for one, and nothing
//! is remembered here. The claim also notes the nonces of what was written, and fails where one is noted already: a copy of
//! the file sent it, under whatever id. A rejection is a claim too, or a transaction sent behind a rejected one would have to be held
//! until that is recorded: instead all are sent without waiting, and those behind one that failed fail at their claim.
//!
//! **Durable.** Of transactions that are sent together only the last one's COMMIT waits until it is as durable as the server
//! says, and all before it with it: so a disk that syncs 500 times a second does not make 500 transactions of it. If the
//! last one fails, its rejection waits, or an empty transaction does, before anything is told to be applied.
//!
//! **Shown before.** The design asks for a look at the rows before the effects. Between that look and the effect another
//! transaction may move the row, so the condition is part of the effect itself (see [`statement`]), which saves the look
//! too. Later statements that touch the row may also change what this transaction made of it.
//!
//! **Shown afterwards.** A row that the transaction wrote, and did not take away again, must be *seen* to be shown, by the
//! login role: what is not seen is refused as what is seen and not shown is. A policy hides it, and then it may be any row
//! (where no policy shows the login role anything, that is an error of the set-up, and nothing is lost); or a trigger
//! removed it or put it at another key, and then the replica would write by the trigger what it may not write. So a
//! table with such triggers can only be written by replicas that are shown all of it: for them nothing is looked at.
//! What triggers make of rows that the transaction did not write is the application's own doing.
//!
//! **The role** needs rights on the tables, on the columns of the conditions (to read), and USAGE of the schema
//! `anabranch`; the login role needs SELECT for the last look, and where it is under row-level security a policy that
//! shows it all rows (`CREATE POLICY … FOR SELECT TO login USING (true)`), or BYPASSRLS. The claims are in force as it looks.
//!
//! **Errors** that are the transaction's own reject it, those of the way to Postgres are the caller's to wait out, and those
//! of the set-up (the claim may not be called, the role is not there) are [`Error::Definite`]: no write is lost by them.
//!
//! What is *not* here: sessions, gRPC, and which replica may write what ([`Rules`] is given in).

mod books;
mod facts;
mod flight;
mod outcome;
mod rules;
mod statement;
mod value;

use std::{
    borrow::Cow,
    collections::HashMap,
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use anabranch_proto::{Nonce, record};
pub use books::{Block, Books, Claimed, Judged};
pub use outcome::{Error, Outcome, Rejection};
pub use rules::{Rule, Rules};
pub(super) use value::Param;

use self::{
    flight::{Cause, Failure, Flight, Step},
    outcome::{Class, bounded, classify, told},
    statement::{GONE, HIDDEN, Left, OUT_OF_SHAPE, Sql, Target, Touch, UNREADABLE},
};
use super::{
    pipeline::Pipeline,
    setup::{ALREADY_CLAIMED, FORKED, OTHER_SUBJECT, OUT_OF_ORDER, REFUSED},
    sql,
    target::Target as Server,
};
use crate::write::{Change, Entry, Hash, Kind, LocalTransaction, WriteTable};

/// How often a transaction is tried that others keep from its locks.
const ATTEMPTS_MAX: u32 = 6;

/// How long the first wait between attempts is, at most; each is twice the one before.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// As many transactions are sent together: one that fails makes those behind it be sent again.
const TOGETHER_MAX: usize = 128;

/// As many rows are looked at by one statement after the effects.
const CHECKED_AT_ONCE: usize = 1000;

/// Of a standby, or a primary whose disk is full.
const READ_ONLY: &str = "25006";

/// An UPDATE that found no row.
const UPDATE_MISSING: &str = "update_missing";

/// Insufficient privilege.
const NOT_ALLOWED: &str = "42501";

/// Does not happen twice: the second time none is prepared.
const NOT_PREPARED: &str = "a prepared statement is not there any more";

/// A limit of Postgres is reached.
const LIMIT: &str = "54000";

/// The database's encoding has no such character.
const UNTRANSLATABLE: &str = "22P05";

/// Errors that an old idea of a table's schema, or of the rights to it, may be the reason of.
const STALE: &[&str] = &[
    "0A000",
    "23502",
    "428C9",
    NOT_ALLOWED,
    "42703",
    "42704",
    "42804",
    "42846",
    "42883",
    "42P01",
    "42P18",
];

/// The function of the server that PL/pgSQL's RAISE is, which errors name whatever language they are in.
const RAISE: &str = "exec_stmt_raise";

const CLAIM: &str = "SELECT anabranch.claim($1::pg_catalog.text, $2::pg_catalog.text, $3::pg_catalog.int8, $4::pg_catalog.bytea, $5::pg_catalog.bytea, \
     $6::pg_catalog.uuid[]), \
     pg_catalog.set_config('role', $7::pg_catalog.text, true), \
     pg_catalog.set_config('request.jwt.claims', $8::pg_catalog.text, true)";

/// Of a transaction behind which another is sent at once: that one's COMMIT waits for both to be durable.
const CLAIM_NOT_LAST: &str = "SELECT anabranch.claim($1::pg_catalog.text, $2::pg_catalog.text, $3::pg_catalog.int8, $4::pg_catalog.bytea, $5::pg_catalog.bytea, \
     $6::pg_catalog.uuid[]), \
     pg_catalog.set_config('role', $7::pg_catalog.text, true), \
     pg_catalog.set_config('request.jwt.claims', $8::pg_catalog.text, true), \
     pg_catalog.set_config('synchronous_commit', 'off', true)";

/// Commits something, so that all that was committed before is durable. Nobody reads the message.
const FLUSH: &str = "SELECT pg_catalog.pg_logical_emit_message(true, 'anabranch', '')";

const REJECT: &str = "SELECT anabranch.reject($1::pg_catalog.text, $2::pg_catalog.text, $3::pg_catalog.int8, $4::pg_catalog.bytea, $5::pg_catalog.bytea, \
     $6::pg_catalog.uuid[], $7::pg_catalog.int4, $8::pg_catalog.text, $9::pg_catalog.text, $10::pg_catalog.text, \
     $11::pg_catalog.text)";

/// Behind what may have run a function of the application. One that ends with `RESET ROLE`, as it would where the role itself logs in,
/// leaves the login role, which may more.
const AS_BEFORE: &str = "SELECT pg_catalog.set_config('role', $1::pg_catalog.text, true), \
     pg_catalog.set_config('request.jwt.claims', $2::pg_catalog.text, true)";

/// Claims stay in force for the last look: policies for everybody read them, for the login role too, and may fail without.
/// The role is not set for the transaction only: what a trigger set for longer would come back with its end.
const AFTER: [&str; 2] = ["SET CONSTRAINTS ALL IMMEDIATE", "SET ROLE NONE"];

/// Compiling takes longer than any of our statements. And a streamer whose machine is gone must be noticed where Postgres
/// waits for the rest of a group, too.
const SETTINGS: &str = "SET jit = off; SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 5; \
     SET tcp_keepalives_count = 4";

/// Without it what was given up goes on in Postgres, behind a lock say, with a connection of the server's.
/// Since Postgres 14, and not on every system.
const NOTICES: &str = "SET client_connection_check_interval = '1s'";

/// A connection that writes. One transaction at a time: a second replica needs a second one, or waits.
pub struct Writer {
    pipeline: Pipeline,
    books: Arc<Books>,
    /// A transaction is under way, or was when its future was dropped.
    busy: bool,
    /// Something was committed that may not be durable yet.
    unflushed: bool,
    /// Whose transactions it makes, with these rights.
    replica: Option<Replica>,
    /// What makes it as good as new for another replica: functions of the application may have changed settings of the
    /// session, which others' policies may read.
    renewal: String,
    /// The server can't be written to. Its name may stand for another one by now.
    read_only: bool,
}

/// Who writes.
#[derive(Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its id.
    pub id: String,
    /// The subject of its token, which the id belongs to from the first claim on.
    pub subject: String,
    /// The role that its effects run as; `None`: the login role.
    pub role: Option<String>,
    /// The claims of its token, as JSON, for `current_setting('request.jwt.claims')`.
    pub claims_json: String,
}

/// What became of transactions that were sent together.
#[derive(Debug)]
pub struct Applied {
    /// Of the first ones, in order.
    pub outcomes: Vec<Outcome>,
    /// Why there are not as many as transactions: what stopped the next one.
    pub error: Option<Error>,
}

/// What is to be done about a failure.
enum Verdict {
    Answered,
    /// Again, at once; if that does not help, it is rejected, or it waits.
    Retry(String, Option<Rejection>),
    /// Again, at once: statements were missing.
    Again,
    Reject(Rejection),
    Fail(Error),
}

impl Writer {
    /// Connects, with books of its own.
    pub async fn connect(server: &Server) -> Result<Writer, sql::Error> {
        Self::connect_with(server, Arc::new(Books::new(server.clone()))).await
    }

    /// Connects.
    pub async fn connect_with(server: &Server, books: Arc<Books>) -> Result<Writer, sql::Error> {
        let connected =
            Pipeline::connect_to_write(server, "anabranch writer", SETTINGS, &[NOTICES]);
        let (pipeline, set) = connected.await?;
        Ok(Writer {
            renewal: format!("{}; {set}", sql::renewal(pipeline.server_version())),
            pipeline,
            books,
            replica: None,
            busy: false,
            unflushed: false,
            read_only: false,
        })
    }

    /// What is asked beside writing.
    pub fn books(&self) -> &Books {
        &self.books
    }

    /// Whether it can be used: the connection is there, to a server that takes writes, and no transaction was given up in
    /// its middle.
    pub fn is_usable(&mut self) -> bool {
        !self.busy && !self.read_only && self.pipeline.is_open()
    }

    /// Whether the last transactions that it made were this replica's, with the same rights.
    pub fn is_of(&self, replica: &Replica) -> bool {
        self.replica.as_ref() == Some(replica)
    }

    /// Applies the transaction that comes after the one with the hash `previous`, or records that it is rejected.
    pub async fn apply(
        &mut self,
        replica: &Replica,
        previous: &Hash,
        transaction: &LocalTransaction,
        rules: &Rules,
    ) -> Result<Outcome, Error> {
        let transactions = std::slice::from_ref(transaction);
        let applied = self
            .apply_many(replica, previous, transactions, rules)
            .await;
        match (applied.outcomes.into_iter().next(), applied.error) {
            (Some(outcome), _) => Ok(outcome),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Error::Definite("nothing to apply".into())),
        }
    }

    /// The same for several that follow each other, sent without waiting: a round trip for all, if none fails.
    pub async fn apply_many<T: AsRef<LocalTransaction>>(
        &mut self,
        replica: &Replica,
        previous: &Hash,
        transactions: &[T],
        rules: &Rules,
    ) -> Applied {
        let mut outcomes = Vec::with_capacity(transactions.len());
        let mut durable = 0;
        let mut error = self
            .run(
                replica,
                previous,
                transactions,
                rules,
                &mut outcomes,
                &mut durable,
            )
            .await
            .err();
        if self.unflushed {
            match self.flush().await {
                Ok(()) => self.unflushed = false,
                Err(lost) => {
                    // They come again, and are known then.
                    outcomes.truncate(durable);
                    error = error.or(Some(lost));
                }
            }
        }
        Applied { outcomes, error }
    }

    async fn run<T: AsRef<LocalTransaction>>(
        &mut self,
        replica: &Replica,
        previous: &Hash,
        transactions: &[T],
        rules: &Rules,
        outcomes: &mut Vec<Outcome>,
        durable: &mut usize,
    ) -> Result<(), Error> {
        let (mut attempt, mut looked_again) = (0, false);
        while outcomes.len() < transactions.len() {
            let first = outcomes.len();
            let before = |outcomes: &Vec<_>| match outcomes.len().checked_sub(1) {
                Some(last) => transactions[last].as_ref().hash,
                None => *previous,
            };
            let rest = &transactions[outcomes.len()..];
            let sent = self.fly(replica, &before(outcomes), rest, rules).await?;
            for (failure, transaction) in sent.into_iter().zip(rest) {
                let transaction = transaction.as_ref();
                let verdict = match failure {
                    None => {
                        outcomes.push(Outcome::Applied);
                        (attempt, looked_again) = (0, false);
                        continue;
                    }
                    Some(failure) => match judge(failure, transaction.seq) {
                        Verdict::Retry(_, Some(rejection)) if attempt + 1 >= ATTEMPTS_MAX => {
                            Verdict::Reject(rejection)
                        }
                        verdict => verdict,
                    },
                };
                match verdict {
                    Verdict::Answered => {
                        outcomes.push(Outcome::AlreadyAnswered);
                        (attempt, looked_again) = (0, false);
                        continue;
                    }
                    Verdict::Fail(error) => return Err(error),
                    // It comes first now; or else it drops statements itself.
                    Verdict::Again if outcomes.len() > first => {}
                    Verdict::Again => {
                        attempt += 1;
                        self.without_prepared(attempt).await?;
                    }
                    Verdict::Retry(why, _) => {
                        attempt += 1;
                        wait(attempt, why).await?;
                    }
                    Verdict::Reject(rejection)
                        if !looked_again
                            && (STALE.contains(&&*rejection.sqlstate)
                                // A trigger that was made since may have suppressed it.
                                || rejection.outcome == UPDATE_MISSING) =>
                    {
                        looked_again = true;
                        self.books.forget_facts();
                        // A statement does not depend on rights but by the facts.
                        if ![NOT_ALLOWED, REFUSED].contains(&&*rejection.sqlstate) {
                            self.pipeline.forget_all();
                        }
                    }
                    Verdict::Reject(rejection) => {
                        let previous = before(outcomes);
                        let named = (transaction.seq, &transaction.hash);
                        let claimed = transaction.claimed().iter().map(Entry::nonce);
                        let claimed: Vec<_> = claimed.collect();
                        let outcome = self
                            .reject(replica, &previous, named, &claimed, rejection)
                            .await?;
                        outcomes.push(outcome);
                        (attempt, looked_again) = (0, false);
                    }
                }
                // Those behind it found that it is missing.
                break;
            }
            if outcomes.len() > first {
                self.pipeline.prepare(true);
            }
            if !self.unflushed {
                *durable = outcomes.len();
            }
        }
        Ok(())
    }

    /// Claims a transaction without effects, and records why. `claimed`: the nonces that are to be remembered.
    pub async fn reject(
        &mut self,
        replica: &Replica,
        previous: &Hash,
        (seq, hash): (u64, &Hash),
        claimed: &[Nonce],
        rejection: Rejection,
    ) -> Result<Outcome, Error> {
        let mut attempt = 0;
        let mut message = bounded(&rejection.message);
        loop {
            self.usable()?;
            let text = |text: &str| Param::Text(text.replace('\0', ""));
            let optional = |text: Option<String>| text.map_or(Param::Null, Param::Text);
            let params = vec![
                text(&replica.id),
                text(&replica.subject),
                Param::Text(seq.to_string()),
                Param::Bytes(previous.to_vec()),
                Param::Bytes(hash.to_vec()),
                nonces(claimed.iter().copied()),
                optional(rejection.entry.map(|entry| entry.to_string())),
                text(&rejection.outcome),
                text(&rejection.sqlstate),
                text(&message),
                optional(rejection.constraint.as_deref().map(bounded)),
            ];
            let Some(failure) = self
                .alone(async |flight| {
                    flight.statement(Step::Claim, REJECT, &params).await;
                })
                .await
            else {
                self.unflushed = false;
                return Ok(Outcome::Rejected(rejection));
            };
            if failure.is_of(UNTRANSLATABLE) && !message.is_ascii() {
                message = message.replace(|c: char| !c.is_ascii(), "?");
                continue;
            }
            match judge(failure, seq) {
                Verdict::Answered => return Ok(Outcome::AlreadyAnswered),
                Verdict::Fail(error) => return Err(error),
                Verdict::Again => {
                    attempt += 1;
                    self.without_prepared(attempt).await?;
                }
                Verdict::Reject(why) => return Err(Error::Definite(why.message)),
                Verdict::Retry(why, _) => {
                    attempt += 1;
                    wait(attempt, why).await?;
                }
            }
        }
    }

    /// Waits before another attempt, for which nothing is prepared.
    async fn without_prepared(&mut self, attempt: u32) -> Result<(), Error> {
        self.pipeline.prepare(false);
        wait(attempt, NOT_PREPARED.into()).await
    }

    /// Makes durable what was committed.
    async fn flush(&mut self) -> Result<(), Error> {
        let failure = self.alone(async |flight| flight.simple(Step::Begin, FLUSH).await);
        match failure.await.map(|failure| failure.cause) {
            None => Ok(()),
            Some(Cause::Said(said)) => Err(said.error().into()),
            Some(Cause::Broken(why)) => Err(Error::Transient(why)),
            Some(Cause::Rejected(rejection)) => Err(Error::Definite(rejection.message)),
            Some(Cause::Unprepared) => Err(Error::Transient(NOT_PREPARED.into())),
        }
    }

    /// Sends what is no local transaction, by itself.
    async fn alone(&mut self, send: impl AsyncFnOnce(&mut Flight<'_>)) -> Option<Failure> {
        self.busy = true;
        let mut flight = Flight::new(&mut self.pipeline);
        flight.next_transaction().await;
        send(&mut flight).await;
        let failures = flight.finish().await;
        self.busy = false;
        self.learn(&failures);
        failures.into_iter().next_back().flatten()
    }

    /// What failures say of the connection.
    fn learn(&mut self, failures: &[Option<Failure>]) {
        self.read_only |= failures.iter().flatten().any(is_of_read_only);
        if failures.iter().flatten().any(is_of_session) {
            self.pipeline.give_up();
        }
    }

    fn usable(&mut self) -> Result<(), Error> {
        if self.is_usable() {
            Ok(())
        } else {
            Err(Error::Transient("the connection to Postgres broke".into()))
        }
    }

    /// Sends transactions, up to the first that is known to fail. By transaction: why it failed.
    async fn fly<T: AsRef<LocalTransaction>>(
        &mut self,
        replica: &Replica,
        previous: &Hash,
        transactions: &[T],
        rules: &Rules,
    ) -> Result<Vec<Option<Failure>>, Error> {
        self.usable()?;
        let transactions = &transactions[..transactions.len().min(TOGETHER_MAX)];
        let mut found = Vec::with_capacity(transactions.len());
        for transaction in transactions {
            let mut targets = Vec::new();
            for table in &transaction.as_ref().tables {
                targets.push(self.target(table, rules, replica.role.as_deref()).await?);
            }
            found.push(targets);
        }
        if !self.is_of(replica) {
            self.replica = None;
            let renewal = self.renewal.clone();
            let failure = self.alone(async |flight| flight.simple(Step::Begin, &renewal).await);
            if let Some(failure) = failure.await {
                // Nothing is executed with what another replica's write has set.
                return Ok(vec![Some(failure)]);
            }
            self.replica = Some(replica.clone());
        }
        self.busy = true;
        let mut flight = Flight::new(&mut self.pipeline);
        let mut previous = *previous;
        let mut last = false;
        for (i, (transaction, targets)) in transactions.iter().zip(&found).enumerate() {
            let transaction = transaction.as_ref();
            last = i + 1 == transactions.len();
            let claim = if last { CLAIM } else { CLAIM_NOT_LAST };
            flight.next_transaction().await;
            send(&mut flight, replica, &previous, transaction, targets, claim).await;
            previous = transaction.hash;
            if flight.is_in_vain() {
                break;
            }
        }
        let failures = flight.finish().await;
        self.busy = false;
        self.learn(&failures);
        if last && matches!(failures.last(), Some(None)) {
            self.unflushed = false;
        } else if failures.iter().any(Option::is_none) {
            self.unflushed = true;
        }
        Ok(failures)
    }

    /// A table that a transaction names; or why its entries are rejected.
    async fn target(
        &mut self,
        table: &WriteTable,
        rules: &Rules,
        role: Option<&str>,
    ) -> Result<Result<Target, Rejection>, Error> {
        let not_writable = |sqlstate: &str, message: String| {
            Ok(Err(Rejection {
                entry: None,
                outcome: Cow::Borrowed("not_writable"),
                sqlstate: sqlstate.into(),
                message: bounded(&message),
                constraint: None,
            }))
        };
        let name = format!("{}.{}", table.schema, table.name);
        let Some(rule) = rules.of(&table.schema, &table.name) else {
            return not_writable("42501", format!("{name} is not writable for this replica"));
        };
        let known = &rule.table.columns;
        let mut places = Vec::with_capacity(table.columns.len());
        for column in &table.columns {
            let place = known.iter().position(|known| known.name == *column);
            match place.filter(|place| rule.columns.contains(place)) {
                Some(place) => places.push(place),
                None => {
                    let message =
                        format!("{name} has no column {column:?} that this replica may write");
                    return not_writable(if place.is_some() { "42501" } else { "42703" }, message);
                }
            }
        }
        let key: Vec<_> = table.key.iter().map(|column| places[*column]).collect();
        let is_key = key.len() == rule.table.key.len()
            && rule.table.key.iter().all(|place| key.contains(place));
        if !is_key {
            return not_writable("42P10", format!("{name} has another key now"));
        }
        Ok(Ok(Target {
            rule: Arc::clone(rule),
            facts: self.books.facts(&rule.table, role).await?,
            places,
            key,
        }))
    }
}

impl AsRef<LocalTransaction> for LocalTransaction {
    fn as_ref(&self) -> &LocalTransaction {
        self
    }
}

/// An array of uuid.
fn nonces(nonces: impl Iterator<Item = Nonce>) -> Param {
    let all: Vec<_> = nonces.map(|nonce| nonce.to_string()).collect();
    Param::Text(format!("{{{}}}", all.join(",")))
}

/// Sends one transaction.
async fn send(
    flight: &mut Flight<'_>,
    replica: &Replica,
    previous: &Hash,
    transaction: &LocalTransaction,
    targets: &[Result<Target, Rejection>],
    claim: &str,
) {
    flight.statement(Step::Begin, "BEGIN READ WRITE", &[]).await;
    let params = [
        Param::Text(replica.id.clone()),
        Param::Text(replica.subject.clone()),
        Param::Text(transaction.seq.to_string()),
        Param::Bytes(previous.to_vec()),
        Param::Bytes(transaction.hash.to_vec()),
        nonces(transaction.claimed().iter().map(Entry::nonce)),
        Param::Text(replica.role.clone().unwrap_or_else(|| "none".into())),
        Param::Text(replica.claims_json.clone()),
    ];
    flight.statement(Step::Claim, claim, &params).await;
    let [.., role, claims] = params;
    let checks = effects(flight, transaction, targets, &[role, claims]).await;
    if !flight.has_failed() {
        for after in AFTER {
            flight.statement(Step::Constraints, after, &[]).await;
        }
        for (rule, check) in checks {
            if flight.has_failed() {
                break;
            }
            flight
                .statement(Step::Check(rule), &check.text, &check.params)
                .await;
        }
    }
    // Its COMMIT goes with the next one's BEGIN: what fails before must not skip it.
    flight.end_group().await;
    // What fails unnoticed makes a ROLLBACK of the COMMIT; what we found ourselves Postgres knows nothing of.
    let end = if flight.has_failed() {
        "ROLLBACK"
    } else {
        "COMMIT"
    };
    flight.statement(Step::Commit, end, &[]).await;
}

/// Sends what the entries do, until one is known to fail. What is to be looked at afterwards. `author`: what [`AS_BEFORE`] takes.
async fn effects(
    flight: &mut Flight<'_>,
    transaction: &LocalTransaction,
    targets: &[Result<Target, Rejection>],
    author: &[Param],
) -> Vec<(Arc<Rule>, Sql)> {
    let mut written: Vec<Written> = targets.iter().map(|_| Written::default()).collect();
    for (i, entry) in (0..).zip(&transaction.entries) {
        if flight.has_failed() {
            break;
        }
        match effect(transaction, i, targets, &mut written) {
            Ok(Some(sql)) => {
                let target = targets[entry.table()].as_ref().ok();
                let facts = target.map(|target| &target.facts);
                let of_insert = facts.filter(|_| entry.kind() == Kind::Insert).cloned();
                flight
                    .statement(Step::Effect(i, of_insert), &sql.text, &sql.params)
                    .await;
                if facts.is_some_and(|facts| facts.runs_functions) {
                    flight
                        .statement(Step::Effect(i, None), AS_BEFORE, author)
                        .await;
                }
            }
            Ok(None) => {}
            Err(mut rejection) => {
                rejection.entry = Some(i);
                flight.reject(Step::Effect(i, None), rejection).await;
            }
        }
    }
    let mut checks = Vec::new();
    for (target, written) in targets.iter().zip(written) {
        let Ok(target) = target else { continue };
        let mut left: Vec<_> = written.into_values().collect();
        left.sort_unstable_by_key(|left| left.entry);
        let some = left.chunks(CHECKED_AT_ONCE);
        let some = some.filter_map(|some| target.check(some));
        checks.extend(some.map(|sql| (Arc::clone(&target.rule), sql)));
    }
    checks
}

/// By key: what the transaction wrote there.
type Written = HashMap<bytes::Bytes, Left>;

/// The statement for an entry; notes the keys that it writes at.
fn effect(
    transaction: &LocalTransaction,
    number: u32,
    targets: &[Result<Target, Rejection>],
    written: &mut [Written],
) -> Result<Option<Sql>, Rejection> {
    let entry = &transaction.entries[number as usize];
    let rejected = |sqlstate: &str, message: &str| Rejection {
        entry: None,
        outcome: Cow::Borrowed("error"),
        sqlstate: sqlstate.into(),
        message: message.into(),
        constraint: None,
    };
    let target = match &targets[entry.table()] {
        Ok(target) => target,
        Err(rejection) => return Err(rejection.clone()),
    };
    let table = &transaction.tables[entry.table()];
    let change = transaction.change(entry);
    let change = change.map_err(|malformed| rejected("08P01", malformed.0))?;
    let unwritable =
        |unwritable: value::Unwritable| rejected(unwritable.sqlstate, unwritable.message);
    if target.rule.shown().is_none() {
        return target
            .statement(table, &change, Touch::First)
            .map_err(unwritable);
    }
    let written = &mut written[entry.table()];
    let before = match &change {
        Change::Insert { .. } => None,
        Change::Update { key, .. } | Change::Delete { key, .. } => {
            Some(record::build(key.iter().copied()))
        }
    };
    let known = before.as_ref().and_then(|before| written.get(before));
    let touch = known.map_or(Touch::First, |left| target.again(table, left.there));
    let sql = target
        .statement(table, &change, touch)
        .map_err(unwritable)?;
    if sql.is_none() {
        return Ok(sql);
    }
    if let Some(left) = before.and_then(|before| written.get_mut(&before)) {
        (left.entry, left.there) = (number, false);
    }
    if let Some(key) = target.key_after(table, &change).map_err(unwritable)? {
        let after = statement::key_after(table, &change).unwrap_or_default();
        let left = Left {
            entry: number,
            key,
            there: true,
        };
        written.insert(record::build(after), left);
    }
    Ok(sql)
}

/// What a failure of transaction `seq` means.
fn judge(failure: Failure, seq: u64) -> Verdict {
    let is_of_read_only = is_of_read_only(&failure);
    let said = match failure.cause {
        Cause::Rejected(rejection) => return Verdict::Reject(rejection),
        Cause::Unprepared => return Verdict::Again,
        Cause::Broken(why) => return Verdict::Fail(Error::Transient(why)),
        Cause::Said(said) => said,
    };
    let sqlstate = &*said.sqlstate;
    let error = said.error();
    if is_of_read_only {
        return Verdict::Fail(Error::Transient(error.to_string()));
    }
    let stored = || {
        (said.column.as_ref())
            .and_then(|column| column.parse().ok())
            .unwrap_or(0)
    };
    if matches!(failure.step, Step::Claim) {
        match sqlstate {
            OUT_OF_ORDER if stored() >= seq => return Verdict::Answered,
            OUT_OF_ORDER => {
                return Verdict::Fail(Error::OutOfOrder {
                    expected: stored() + 1,
                });
            }
            ALREADY_CLAIMED => return Verdict::Fail(Error::AlreadyClaimed),
            FORKED => return Verdict::Fail(Error::Forked { seq: stored() }),
            OTHER_SUBJECT => return Verdict::Fail(Error::OtherSubject),
            _ => {}
        }
    }
    let rejection = |entry, outcome: &str| Rejection {
        entry,
        outcome: Cow::Owned(outcome.to_owned()),
        sqlstate: sqlstate.to_owned(),
        message: match said.routine.as_deref() {
            // In the words of the application.
            Some(RAISE) => bounded(&said.message),
            _ => bounded(&told(sqlstate, &said.message)),
        },
        constraint: said.constraint.as_deref().map(bounded),
    };
    let own = match &failure.step {
        Step::Effect(entry, _) => Some(rejection(Some(*entry), "error")),
        Step::Constraints | Step::Commit => Some(rejection(None, "error")),
        Step::Begin | Step::Claim | Step::Check(_) => None,
    };
    // A function of the application may raise what it likes, whatever it means by it: no operator will mend that, and it may
    // be raised each time.
    let is_raised = said.routine.as_deref() == Some(RAISE);
    let raised = own.clone().filter(|_| is_raised);
    match classify(sqlstate) {
        // The queue of notifications is full, for all: whoever listens is slow.
        Class::Doubtful if sqlstate == LIMIT && matches!(failure.step, Step::Commit) => {
            return Verdict::Fail(Error::Transient(error.to_string()));
        }
        Class::Doubtful if own.is_some() => {
            return Verdict::Retry(bounded(&error.to_string()), own);
        }
        Class::Final | Class::Doubtful => {}
        Class::Transient if raised.is_none() => return Verdict::Fail(error.into()),
        Class::Retry | Class::Transient => {
            return Verdict::Retry(bounded(&error.to_string()), raised);
        }
    }
    let outcome = said.column.as_deref().unwrap_or("error");
    Verdict::Reject(match &failure.step {
        // Not the transaction's fault.
        Step::Begin | Step::Claim => return Verdict::Fail(error.into()),
        Step::Check(rule) if sqlstate == REFUSED => {
            let entry = (said.datatype.as_ref()).and_then(|entry| entry.parse().ok());
            let table = rule.table.full_name();
            let because = |why: String| Rejection {
                message: bounded(&why),
                ..rejection(entry, OUT_OF_SHAPE)
            };
            match outcome {
                UNREADABLE => {
                    return Verdict::Fail(Error::Definite(format!(
                        "row-level security lets the role that logs in to write see no row of {table}, so nobody can tell \
                         whether replicas write what they may: give that role BYPASSRLS, or \
                         CREATE POLICY … ON {table} FOR SELECT TO … USING (true)"
                    )));
                }
                HIDDEN => because(format!(
                    "anabranch: the role that logs in to write does not see the row in {table} afterwards: a policy hides \
                     it from that role (which needs one FOR SELECT USING (true), or BYPASSRLS), or a trigger moved it"
                )),
                GONE => because(format!(
                    "anabranch: the row is not in {table} afterwards: a trigger or a rule removed or moved it"
                )),
                outcome => rejection(entry, outcome),
            }
        }
        Step::Check(rule) => {
            return Verdict::Fail(Error::Definite(format!(
                "the role that logs in to write can't look at {}: {sqlstate}: {}",
                rule.table.full_name(),
                told(sqlstate, &said.message)
            )));
        }
        Step::Effect(entry, _) if sqlstate == REFUSED => rejection(Some(*entry), outcome),
        Step::Effect(entry, Some(facts))
            if sqlstate == "23505"
                && (said.constraint.as_ref())
                    .is_some_and(|constraint| facts.keys.contains(constraint)) =>
        {
            rejection(Some(*entry), "insert_exists")
        }
        Step::Effect(entry, _) => rejection(Some(*entry), "error"),
        Step::Constraints | Step::Commit => rejection(None, "error"),
    })
}

/// Whether nobody can say that another session would fail too: something of the application may have been left in this one.
fn is_of_session(failure: &Failure) -> bool {
    let Cause::Said(said) = &failure.cause else {
        return false;
    };
    let of_what_is_sent = [
        OUT_OF_ORDER,
        ALREADY_CLAIMED,
        FORKED,
        OTHER_SUBJECT,
        UNTRANSLATABLE,
    ];
    matches!(failure.step, Step::Begin | Step::Claim)
        && !of_what_is_sent.contains(&&*said.sqlstate)
        && matches!(classify(&said.sqlstate), Class::Final | Class::Doubtful)
}

/// Whether it failed as a standby fails, which does not even begin a transaction that writes.
fn is_of_read_only(failure: &Failure) -> bool {
    let Cause::Said(said) = &failure.cause else {
        return false;
    };
    match &failure.step {
        Step::Begin => matches!(&*said.sqlstate, READ_ONLY | "0A000"),
        Step::Claim => said.sqlstate == READ_ONLY,
        _ => false,
    }
}

/// Waits before another attempt: longer each time, and never as long as others do.
async fn wait(attempt: u32, why: String) -> Result<(), Error> {
    if attempt >= ATTEMPTS_MAX {
        return Err(Error::Transient(why));
    }
    let longest = WAIT_MAX * 2u32.pow(attempt - 1);
    let chance = RandomState::new().build_hasher().finish() % 1000;
    tokio::time::sleep(longest * chance as u32 / 1000).await;
    Ok(())
}
