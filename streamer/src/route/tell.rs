//! One row that a transaction may mean something for: for whom, and what they are told.

use std::{cell::RefCell, sync::Arc};

use bytes::Bytes;

use super::{Binding, BindingId, Routed, SessionId, limits::Shares, routes::Certain};
use crate::{
    delta::{self, Op},
    lookup::{Error, Moment},
    shape::{Bound, Select},
    table::{Oid, Table},
};

/// A row that may be told of.
#[derive(Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub table: &'a Arc<Table>,
    pub before: Option<&'a Bytes>,
    pub after: Option<&'a Bytes>,
    /// Those that may have it: all of them if it changed, else all whose answer may have. Ascending.
    pub bindings: &'a [BindingId],
    /// Others of which it is known already. None, if it did not change.
    pub certain: &'a [Certain],
    pub changed: bool,
}

/// The states that a transaction is between, and what conditions may still read of them.
pub(super) struct States<'a> {
    pub before: Moment<'a>,
    pub now: Moment<'a>,
    pub shares: &'a Shares,
}

/// What is told of one row, by the columns that are told of: encoded once, however many get it.
#[derive(Default)]
pub(super) struct Told<'a> {
    ops: Vec<(&'a [usize], bool, bool, Option<Op>)>,
    /// The row as it is.
    after: Vec<(&'a [usize], Bytes)>,
}

impl Routed {
    /// Adds what is told to a session. If there is no more room, it is one that must catch up.
    pub(super) fn tell(&mut self, session: SessionId, op: (Oid, Op), ops_max: usize) {
        if self.told >= ops_max {
            let before = self.ops.remove(&session).map_or(0, |ops| ops.len());
            self.told -= before;
            self.behind.insert(session);
        }
        if !self.behind.contains(&session) {
            // Mostly it is one.
            let ops = self.ops.entry(session);
            ops.or_insert_with(|| Vec::with_capacity(1)).push(op);
            self.told += 1;
        }
    }
}

impl States<'_> {
    /// Whether a row was, and is, in a bound SELECT; `None`: to find out is too much.
    pub fn ask(
        &self,
        bound: &Bound,
        candidate: Candidate<'_>,
    ) -> Result<Option<(bool, bool)>, Error> {
        self.shares.begin(&bound.select);
        let contains = |row: Option<&Bytes>, state| match row {
            Some(row) => bound.contains(row, state),
            None => Ok(false),
        };
        let both = || {
            let was = contains(candidate.before, &self.before)?;
            Ok((was, contains(candidate.after, &self.now)?))
        };
        match both() {
            Err(Error::TooMuch) => Ok(None),
            answers => answers.map(Some),
        }
    }
}

/// Notes whom a row concerns.
pub(super) fn concern<'a>(
    concerned: &mut Vec<(SessionId, bool, bool, &'a Select)>,
    binding: &'a Binding,
    was: bool,
    is: bool,
) {
    if was || is {
        let sessions = binding.sessions.iter();
        concerned.extend(sessions.map(|session| (session, was, is, &*binding.bound.select)));
    }
}

impl<'a> Told<'a> {
    /// What they are told who see it by `select`.
    pub fn op(
        &mut self,
        candidate: Candidate<'_>,
        select: &'a Select,
        was: bool,
        is: bool,
    ) -> Result<Option<Op>, Error> {
        let columns = &*select.columns;
        let known = (self.ops.iter()).find(|(of, w, i, _)| (*of, *w, *i) == (columns, was, is));
        if let Some((.., op)) = known {
            return Ok(op.clone());
        }
        let before = candidate.before.filter(|_| was);
        let after = candidate.after.filter(|_| is);
        let encoded = RefCell::new(&mut self.after);
        let op = delta::decide(candidate.table, before, after, |row| {
            // What it was is not told.
            if !after.is_some_and(|after| std::ptr::eq(after, row)) {
                return select.project(row);
            }
            let mut encoded = encoded.borrow_mut();
            if let Some((_, record)) = encoded.iter().find(|(of, _)| *of == columns) {
                return Ok(record.clone());
            }
            let record = select.project(row)?;
            encoded.push((columns, record.clone()));
            Ok(record)
        })?;
        self.ops.push((columns, was, is, op.clone()));
        Ok(op)
    }
}
