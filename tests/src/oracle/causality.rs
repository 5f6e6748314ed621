//! What programs may see that write through several replicas, checked on all that they saw.
//!
//! Each replica has one *writer*, whose local transactions are numbered from 1. The data:
//!
//! - *Registers*: a row for each key, with a column for each writer, which nobody else writes. So rows are shared, and no
//!   write is ever overwritten by another writer's: what is seen can only grow. A [`Value`] holds the number of its
//!   transaction and what its writer saw when it wrote, itself included: so each read tells by itself whether something
//!   is in sight without what led to it, in the manner of the vectors of jepsen-powersync.
//! - Each row has one more column, `top`, that all writers write, and of which the greatest wins (a policy of the user's).
//! - A *log*: another table, with a row for each transaction.
//!
//! A transaction writes some keys and its row of the log. Some are *doomed*: Postgres refuses their row of the log. They are
//! in sight of their own replica until they are listed as rejected, and nowhere else. They don't write `top`, and what
//! *lasts* of a doomed value is what was there before it.
//!
//! While a write is pending it hides what Postgres has of that column; so of `top` only a program's own order is checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

#[cfg(test)]
mod tests;

/// The number of a writer's local transaction; 0: none.
pub type Number = i64;

/// Of each key and writer the newest transaction that lasts; place `key * writers + writer`.
pub type Seen = Vec<Number>;

/// What a writer puts into its column of a register.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Value {
    /// Which of its transactions it was.
    pub number: Number,
    /// Postgres will refuse it.
    pub doomed: bool,
    /// What its writer saw, with this transaction unless it is doomed. Empty: the value that was there from the start.
    pub seen: Seen,
}

impl Value {
    /// In one piece of text, as it is in the table.
    pub fn text(&self) -> String {
        let seen: Vec<String> = self.seen.iter().map(Number::to_string).collect();
        let doomed = if self.doomed { "!" } else { "" };
        format!("{}{doomed}|{}", self.number, seen.join(","))
    }

    /// From that text; NULL and what is no such text are what was there from the start.
    pub fn parse(text: Option<&str>) -> Self {
        let Some((number, seen)) = text.and_then(|text| text.split_once('|')) else {
            return Self::default();
        };
        Self {
            number: number.trim_end_matches('!').parse().unwrap_or_default(),
            doomed: number.ends_with('!'),
            seen: seen
                .split(',')
                .map(|number| number.parse().unwrap_or_default())
                .collect(),
        }
    }

    /// What is there when all doomed transactions are undone.
    fn lasting(&self, place: usize) -> Number {
        match self.doomed {
            true => self.seen.get(place).copied().unwrap_or_default(),
            false => self.number,
        }
    }
}

/// All that a program saw in one snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Of each key and writer, as in [`Seen`].
    pub values: Vec<Value>,
    /// Of each key.
    pub tops: Vec<i64>,
    /// Of each writer its transactions in the log, and whether they are doomed.
    pub log: Vec<BTreeMap<Number, bool>>,
    /// The transactions of this replica's writer that are listed as rejected.
    pub rejected: BTreeSet<Number>,
}

impl Read {
    /// What lasts of it.
    pub fn lasting(&self) -> Seen {
        let places = self.values.iter().enumerate();
        places.map(|(place, value)| value.lasting(place)).collect()
    }
}

/// A local transaction that was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrote {
    /// Its number.
    pub number: Number,
    /// Postgres will refuse it.
    pub doomed: bool,
    /// Which keys it wrote.
    pub keys: BTreeSet<usize>,
    /// What it wrote to their `top`, unless it is doomed.
    pub top: i64,
}

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It read everything.
    Read(Read),
    /// It wrote.
    Wrote(Wrote),
}

/// All that one program did, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Which replica's file it used.
    pub replica: usize,
    /// In its order.
    pub events: Vec<Event>,
}

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    /// What the program wrote is not there.
    ReadYourWrites,
    /// What it saw of another writer is not there any more.
    MonotonicReads,
    /// What it saw of this replica's own writer is not there any more, and was not rejected.
    Flicker,
    /// A transaction is there without an earlier one of its writer.
    MonotonicWrites,
    /// A transaction is there without what its writer had seen.
    WritesFollowReads,
    /// A part of a transaction is there without the others.
    AtomicReads,
    /// What Postgres refuses is in sight of another replica, or is listed as rejected and not undone.
    AbortedReads,
    /// What can't be refused was rejected.
    Rejected,
    /// At the end, all answered, something is other than it must be.
    Outcome,
}

/// One finding.
#[derive(Clone, PartialEq, Eq)]
pub struct Violation {
    /// What was broken.
    pub broken: Broken,
    /// Where: the place of the session, and of the event in it.
    pub at: (usize, usize),
    /// For a person.
    pub what: String,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (session, event) = self.at;
        let Self { broken, what, .. } = self;
        write!(f, "{broken:?} in session {session}, event {event}: {what}")
    }
}

/// Checks a whole run of `writers` writers.
#[derive(Debug)]
pub struct Checker<'a> {
    writers: usize,
    sessions: &'a [Session],
    /// Of each writer.
    written: Vec<BTreeMap<Number, &'a Wrote>>,
    violations: Vec<Violation>,
    at: (usize, usize),
}

impl<'a> Checker<'a> {
    /// `sessions`: of all programs of the run, so that all that was written is known.
    pub fn new(writers: usize, sessions: &'a [Session]) -> Self {
        let mut written = vec![BTreeMap::new(); writers];
        for session in sessions {
            for event in &session.events {
                if let Event::Wrote(wrote) = event {
                    written[session.replica].insert(wrote.number, wrote);
                }
            }
        }
        Self {
            writers,
            sessions,
            written,
            violations: Vec::new(),
            at: (0, 0),
        }
    }

    /// All that is wrong, in no session's favour. `ended`: everything was answered before the last read of each session.
    pub fn check(mut self, ended: bool) -> Vec<Violation> {
        for (place, session) in self.sessions.iter().enumerate() {
            self.session(place, session);
            if let (true, Some(Event::Read(last))) = (ended, session.events.last()) {
                self.outcome(session.replica, last);
            }
        }
        self.violations
    }

    fn found(&mut self, broken: Broken, what: String) {
        let at = self.at;
        self.violations.push(Violation { broken, at, what });
    }

    fn session(&mut self, place: usize, session: &Session) {
        let mut before: Option<Expected> = None;
        for (event_place, event) in session.events.iter().enumerate() {
            self.at = (place, event_place);
            match event {
                Event::Wrote(wrote) => {
                    if let Some(expected) = &mut before {
                        expected.wrote(session.replica, self.writers, wrote);
                    }
                }
                Event::Read(read) => {
                    self.by_itself(session.replica, read);
                    match &mut before {
                        Some(expected) => {
                            self.in_order(session.replica, expected, read);
                            expected.read(session.replica, self.writers, read);
                        }
                        None => {
                            before = Some(Expected::of(session.replica, self.writers, read));
                        }
                    }
                }
            }
        }
    }

    /// What one read tells alone: nothing is in sight without what led to it.
    fn by_itself(&mut self, replica: usize, read: &Read) {
        let lasting = read.lasting();
        for (place, value) in read.values.iter().enumerate() {
            let writer = place % self.writers;
            if value.doomed && (writer != replica || read.rejected.contains(&value.number)) {
                let what = format!("writer {writer}'s {} at {place}", value.number);
                self.found(Broken::AbortedReads, what);
            }
            for (of, (&needed, &there)) in value.seen.iter().zip(&lasting).enumerate() {
                if needed <= there {
                    continue;
                }
                let broken = match (of % self.writers == writer, needed == value.number) {
                    (true, true) => Broken::AtomicReads,
                    (true, false) => Broken::MonotonicWrites,
                    (false, _) => Broken::WritesFollowReads,
                };
                let what = format!(
                    "writer {writer}'s {} at {place} had seen {needed} at {of}, where {there} is",
                    value.number
                );
                self.found(broken, what);
            }
        }
        for writer in 0..self.writers {
            self.log(replica, writer, read, &lasting);
        }
        for number in &read.rejected {
            let wrote = self.written[replica].get(number);
            if wrote.is_some_and(|wrote| !wrote.doomed) {
                self.found(Broken::Rejected, format!("{number} of writer {replica}"));
            }
        }
    }

    /// The log has exactly the transactions that the registers show.
    fn log(&mut self, replica: usize, writer: usize, read: &Read, lasting: &Seen) {
        let of_writer = lasting.iter().skip(writer).step_by(self.writers);
        let newest = of_writer.copied().max().unwrap_or_default();
        let good = self.written[writer]
            .range(..=newest)
            .filter(|(_, wrote)| !wrote.doomed);
        let expected: BTreeSet<Number> = good.map(|(number, _)| *number).collect();
        let log = &read.log[writer];
        let there: BTreeSet<Number> = log
            .iter()
            .filter(|(_, doomed)| !**doomed)
            .map(|(n, _)| *n)
            .collect();
        if there != expected {
            let differ: Vec<_> = there.symmetric_difference(&expected).collect();
            let what = format!(
                "the log of writer {writer} and its registers up to {newest} differ in {differ:?}"
            );
            self.found(Broken::AtomicReads, what);
        }
        for number in log.iter().filter(|(_, doomed)| **doomed).map(|(n, _)| n) {
            if writer != replica || read.rejected.contains(number) {
                let what = format!("writer {writer}'s {number} is in the log");
                self.found(Broken::AbortedReads, what);
            }
        }
    }

    /// What the program saw and wrote before is there.
    fn in_order(&mut self, replica: usize, expected: &Expected, read: &Read) {
        let lasting = read.lasting();
        for (place, (&needed, &there)) in expected.lasting.iter().zip(&lasting).enumerate() {
            let writer = place % self.writers;
            if there < needed {
                let broken = match writer == replica {
                    true if expected.written.contains(&needed) => Broken::ReadYourWrites,
                    true => Broken::Flicker,
                    false => Broken::MonotonicReads,
                };
                let what = format!("at {place} there was {needed}, and now {there}");
                self.found(broken, what);
            }
        }
        for (key, (&needed, &there)) in expected.tops.iter().zip(&read.tops).enumerate() {
            if there < needed {
                let what = format!("the top of key {key} was {needed}, and now {there}");
                self.found(Broken::MonotonicReads, what);
            }
        }
        for (&(number, key), by_itself) in &expected.doomed {
            let there = read.values[key * self.writers + replica].number;
            if there < number && !read.rejected.contains(&number) {
                let broken = match by_itself {
                    true => Broken::ReadYourWrites,
                    false => Broken::Flicker,
                };
                let what = format!(
                    "at key {key} there was {number}, now {there}, and it was not rejected"
                );
                self.found(broken, what);
            }
        }
        if let Some(back) = expected.rejected.difference(&read.rejected).next() {
            self.found(Broken::Flicker, format!("{back} is not rejected any more"));
        }
    }

    /// What must be there when everything is answered.
    fn outcome(&mut self, replica: usize, read: &Read) {
        let mut lasting = vec![0; read.values.len()];
        let mut tops = vec![0; read.tops.len()];
        for (writer, written) in self.written.iter().enumerate() {
            for wrote in written.values().filter(|wrote| !wrote.doomed) {
                for &key in &wrote.keys {
                    let place: &mut Number = &mut lasting[key * self.writers + writer];
                    *place = wrote.number.max(*place);
                    tops[key] = wrote.top.max(tops[key]);
                }
            }
        }
        let doomed = self.written[replica].values().filter(|wrote| wrote.doomed);
        let rejected: BTreeSet<Number> = doomed.map(|wrote| wrote.number).collect();
        let numbers: Seen = read.values.iter().map(|value| value.number).collect();
        if numbers != lasting {
            self.found(Broken::Outcome, format!("{numbers:?}, not {lasting:?}"));
        }
        if read.tops != tops {
            self.found(
                Broken::Outcome,
                format!("tops {:?}, not {tops:?}", read.tops),
            );
        }
        if read.rejected != rejected {
            let what = format!("rejected are {:?}, not {rejected:?}", read.rejected);
            self.found(Broken::Outcome, what);
        }
    }
}

/// What a program must find again.
#[derive(Debug)]
struct Expected {
    lasting: Seen,
    tops: Vec<i64>,
    /// Its own transactions.
    written: BTreeSet<Number>,
    /// Doomed transactions of this replica's writer with one of their keys, and whether the program itself wrote it.
    doomed: BTreeMap<(Number, usize), bool>,
    rejected: BTreeSet<Number>,
}

impl Expected {
    fn of(replica: usize, writers: usize, read: &Read) -> Self {
        let mut expected = Self {
            lasting: read.lasting(),
            tops: read.tops.clone(),
            written: BTreeSet::new(),
            doomed: BTreeMap::new(),
            rejected: BTreeSet::new(),
        };
        expected.read(replica, writers, read);
        expected
    }

    fn read(&mut self, replica: usize, writers: usize, read: &Read) {
        for (needed, there) in self.lasting.iter_mut().zip(read.lasting()) {
            *needed = there.max(*needed);
        }
        for (needed, there) in self.tops.iter_mut().zip(&read.tops) {
            *needed = (*needed).max(*there);
        }
        let own = read.values.iter().skip(replica).step_by(writers);
        for (key, value) in own.enumerate().filter(|(_, value)| value.doomed) {
            self.doomed.entry((value.number, key)).or_insert(false);
        }
        self.rejected.extend(&read.rejected);
    }

    fn wrote(&mut self, replica: usize, writers: usize, wrote: &Wrote) {
        self.written.insert(wrote.number);
        for &key in &wrote.keys {
            if wrote.doomed {
                self.doomed.insert((wrote.number, key), true);
            } else {
                self.lasting[key * writers + replica] = wrote.number;
                self.tops[key] = self.tops[key].max(wrote.top);
            }
        }
    }
}
