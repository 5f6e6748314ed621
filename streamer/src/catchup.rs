//! The difference of one replica's tables between its position and now.
//!
//! A catch-up goes in rounds, each in a fresh snapshot, so that no snapshot is held while a client is waited for. It
//! remembers, for each table, ranges of keys and as of which transaction the replica has each (or will have, once it
//! got what was given out). A round walks on in key order from where the last one stopped, around in a circle over all
//! tables, and brings each range that it comes by to its own snapshot. It is complete when one round leaves
//! every range at its snapshot. So every key is looked at once on each way round, however long the whole takes; the first
//! way round does the work, the next brings what changed meanwhile, and each is shorter than the one before. (To bring
//! all earlier ranges up to date at the start of each round would send hot rows once a round, and never get
//! ahead if they fill the round.)
//!
//! A range that the replica has nothing of is scanned, and gives no deletes. One that it has as of a transaction
//! gives those keys that have entries in the change index after it: what the row was is told by the first of them, what
//! it is by the mirror. [`delta::decide`] says what the replica is told.
//!
//! Nothing here waits, looks at a clock, or writes to the mirror.

use std::sync::Arc;

use anabranch_proto::{Position, record::Malformed};
use bytes::Bytes;

use crate::{
    delta::{self, Op},
    mirror::{Error, Key, Keys, Place, Reader, Standing},
    table::{Oid, Table},
};

/// What an op costs beside its record.
const OP_BYTES: usize = 16;

/// What is looked at counts as this part of what is given out, so that a round ends in reasonable time
/// also where the replica sees little of a large table.
const LOOK_PART: usize = 16;

/// Entries of the change index that one round lists at most: less than a second's work.
const COLLECTED_MAX: usize = 200_000;

/// What one replica sees of one table: the union of its subscriptions.
pub trait View: Send + Sync {
    /// The table.
    fn table(&self) -> &Arc<Table>;
    /// Whether the replica sees this row.
    fn contains(&self, row: &[u8]) -> Result<bool, Malformed>;
    /// The record that it gets.
    fn project(&self, row: &Bytes) -> Result<Bytes, Malformed>;
}

/// One table to catch up with.
pub struct Item {
    /// What the replica sees.
    pub view: Arc<dyn View>,
    /// Where it stands; `None`: it has nothing, or nothing that is proved: all rows are sent, and no deletes.
    pub from: Option<Position>,
}

/// A catch-up in progress: which ranges of keys were sent as of which position.
pub struct Catchup {
    items: Vec<Item>,
    /// From the first round on.
    walk: Option<Walk>,
}

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// Everything that was given out makes the replica's tables what they are at this position.
    Complete(Position),
    /// The budget was used up; give another round.
    More,
}

struct Walk {
    /// What the first round found; a later one that finds otherwise has lost its footing.
    histories: i64,
    standings: Vec<Standing>,
    /// Of each item.
    ranges: Vec<Ranges>,
    /// The next round goes on behind this key (`None`: at the first) of this item.
    item: usize,
    after: Option<Key>,
    /// How far the change index is listed by key.
    collected: Option<Place>,
}

/// One round.
struct Turn<'a> {
    reader: &'a mut Reader,
    /// The last transaction of its snapshot.
    now: i64,
    budget: Budget,
    sink: &'a mut dyn FnMut(usize, Op),
}

/// As of which transaction the replica has the keys of a table.
#[derive(Debug)]
struct Ranges(Vec<Range>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    /// Begins behind the range before it, and ends with this key; `None`: at the end.
    upto: Option<Key>,
    /// `None`: it has none of them.
    as_of: Option<i64>,
}

/// How far a stretch was brought.
enum Stretch {
    /// To its end.
    Done,
    /// The budget is used up, and there is more behind this key; `None`: all of it.
    Stopped(Option<Key>),
}

/// What is left of a round.
struct Budget {
    bytes_max: usize,
    used: usize,
}

impl Catchup {
    /// Starts one. Items in any order.
    pub fn new(items: Vec<Item>) -> Catchup {
        Catchup { items, walk: None }
    }

    /// One round, within the snapshot that `reader` has open. Gives at most about `bytes_max` to `sink`
    /// (index of the item, op), in key order within a table but for the turn at its end. A key may be given again, in
    /// a later round: the last that was said of it holds.
    ///
    /// After an error the catch-up is void; [`Error::OutOfReach`] tells that it must start again with a reset.
    pub fn round(
        &mut self,
        reader: &mut Reader,
        bytes_max: usize,
        sink: &mut dyn FnMut(usize, Op),
    ) -> Result<Round, Error> {
        let mut walk = match self.walk.take() {
            Some(walk) => walk,
            None => self.start(reader)?,
        };
        self.check(&walk, reader)?;
        let (position, now) = (reader.snapshot()?.position, reader.snapshot()?.last);
        let mut round = Turn {
            reader,
            now,
            budget: Budget { bytes_max, used: 0 },
            sink,
        };
        let complete = self.turn(&mut walk, &mut round)?;
        if complete {
            reader.forget_collected()?;
            walk.collected = None;
        }
        self.walk = Some(walk);
        Ok(if complete {
            Round::Complete(position)
        } else {
            Round::More
        })
    }

    fn start(&self, reader: &Reader) -> Result<Walk, Error> {
        reader.forget_collected()?;
        let at = reader.snapshot()?.position;
        let mut standings = Vec::new();
        let mut ranges = Vec::new();
        for Item { view, from } in &self.items {
            let table = view.table();
            let name = || table.full_name();
            let standing = (reader.standing(table.oid)?).ok_or_else(|| Error::NotReady(name()))?;
            if !standing.copied || standing.floor > at.lsn {
                return Err(Error::NotReady(name()));
            }
            let as_of = match *from {
                None => None,
                Some(from) if !reader.reaches(table.oid, from)? => {
                    return Err(Error::OutOfReach(name()));
                }
                Some(from) if from.lsn > at.lsn => return Err(Error::Ahead { from, at }),
                Some(from) => Some(reader.ordinal_at(from.lsn)?),
            };
            standings.push(standing);
            ranges.push(Ranges(vec![Range { upto: None, as_of }]));
        }
        Ok(Walk {
            histories: reader.snapshot()?.histories,
            standings,
            ranges,
            item: 0,
            after: None,
            collected: None,
        })
    }

    /// What earlier rounds gave out still means what it meant, and the change index still has what is missing.
    fn check(&self, walk: &Walk, reader: &Reader) -> Result<(), Error> {
        let snapshot = reader.snapshot()?;
        let all = self.items.iter().zip(&walk.standings).zip(&walk.ranges);
        for ((item, standing), ranges) in all {
            let table = item.view.table();
            if snapshot.histories != walk.histories
                || ranges
                    .oldest()
                    .is_some_and(|oldest| oldest + 1 < snapshot.first)
                || reader.standing(table.oid)? != Some(*standing)
                || standing.version != table.version
            {
                return Err(Error::OutOfReach(table.full_name()));
            }
        }
        Ok(())
    }

    /// Once around, from the cursor back to the cursor. False: the budget was used up on the way.
    fn turn(&self, walk: &mut Walk, turn: &mut Turn<'_>) -> Result<bool, Error> {
        let (first, cursor) = (walk.item, walk.after.clone());
        let count = self.items.len();
        for item in first..count {
            let after = if item == first { cursor.clone() } else { None };
            if !self.bring(walk, item, after, None, turn)? {
                return Ok(false);
            }
        }
        for item in 0..first {
            if !self.bring(walk, item, None, None, turn)? {
                return Ok(false);
            }
        }
        match cursor {
            Some(cursor) => self.bring(walk, first, None, Some(&cursor), turn),
            None => Ok(true),
        }
    }

    /// Brings a stretch of a table to the snapshot. False: the budget is used up, and the cursor is set.
    fn bring(
        &self,
        walk: &mut Walk,
        item: usize,
        mut after: Option<Key>,
        upto: Option<&Key>,
        turn: &mut Turn<'_>,
    ) -> Result<bool, Error> {
        while let Some((from, to, as_of)) = walk.ranges[item].stale(after.as_ref(), upto, turn.now)
        {
            if as_of.is_some_and(|as_of| as_of + 1 < turn.now) && !self.collect(walk, turn)? {
                (walk.item, walk.after) = (item, after);
                return Ok(false);
            }
            let keys = Keys {
                after: from.as_ref(),
                upto: to.as_ref(),
            };
            match self.stretch(item, keys, as_of, turn)? {
                Stretch::Stopped(behind) => {
                    if behind.is_some() {
                        walk.ranges[item].set(from.as_ref(), behind.as_ref(), turn.now);
                    }
                    (walk.item, walk.after) = (item, behind.or(from));
                    return Ok(false);
                }
                Stretch::Done => walk.ranges[item].set(from.as_ref(), to.as_ref(), turn.now),
            }
            match to {
                Some(to) => after = Some(to),
                None => break,
            }
        }
        Ok(true)
    }

    /// Gives out what brings keys that the replica has as of one transaction to the snapshot.
    fn stretch(
        &self,
        item: usize,
        keys: Keys<'_>,
        as_of: Option<i64>,
        turn: &mut Turn<'_>,
    ) -> Result<Stretch, Error> {
        let view = &*self.items[item].view;
        let table = view.table();
        let Turn {
            reader,
            now,
            budget,
            sink,
        } = turn;
        let reader: &Reader = reader;
        let mut behind = None;
        let mut stopped = false;
        let mut look = |key: Key, was: Option<Bytes>, is: Option<Bytes>| {
            // Only where there is more to look at: what just fits is complete.
            if budget.is_used_up() {
                stopped = true;
                return Ok(false);
            }
            budget.look(was.as_ref());
            budget.look(is.as_ref());
            if let Some(op) = told(view, was.as_ref(), is.as_ref())? {
                budget.give(&op);
                sink(item, op);
            }
            behind = Some(key);
            Ok(true)
        };
        match as_of {
            None => reader.scan(table.oid, keys, |key, row| look(key, None, Some(row)))?,
            Some(as_of) if as_of + 1 == *now => {
                reader.changes_of(table, *now, keys, |key, was| {
                    let is = reader.row(table.oid, &key)?;
                    look(key, was, is)
                })?;
            }
            Some(as_of) => reader.changed_after(table.oid, as_of, keys, |key, ordinal| {
                let was = reader.old(table, ordinal, &key)?;
                let is = reader.row(table.oid, &key)?;
                look(key, was, is)
            })?,
        }
        Ok(if stopped {
            Stretch::Stopped(behind)
        } else {
            Stretch::Done
        })
    }

    /// Lists what changed since the oldest transaction that any range is as of. False: not complete yet.
    fn collect(&self, walk: &mut Walk, turn: &Turn<'_>) -> Result<bool, Error> {
        let tables: Vec<Oid> = self
            .items
            .iter()
            .map(|item| item.view.table().oid)
            .collect();
        let upto = walk.collected.take().unwrap_or_else(|| {
            let oldest = walk.ranges.iter().filter_map(Ranges::oldest).min();
            // From here on ranges only get newer.
            Place {
                ordinal: oldest.unwrap_or(turn.now),
                entry: None,
            }
        });
        let more = turn.reader.collect(&tables, &upto, COLLECTED_MAX)?;
        let complete = more.is_none();
        walk.collected = Some(more.unwrap_or(Place {
            ordinal: turn.now,
            entry: None,
        }));
        Ok(complete)
    }
}

/// What the replica is told of one row.
fn told(view: &dyn View, was: Option<&Bytes>, is: Option<&Bytes>) -> Result<Option<Op>, Error> {
    let told = || {
        let seen = |row: Option<&Bytes>| row.map_or(Ok(false), |row| view.contains(row));
        let (was_seen, is_seen) = (seen(was)?, seen(is)?);
        let (was, is) = (was.filter(|_| was_seen), is.filter(|_| is_seen));
        delta::decide(view.table(), was, is, |row| view.project(row))
    };
    told().map_err(|error: Malformed| {
        Error::Damaged(format!("a row of {}: {error}", view.table().full_name()))
    })
}

impl Ranges {
    /// The oldest transaction that a range is as of.
    fn oldest(&self) -> Option<i64> {
        self.0.iter().filter_map(|range| range.as_of).min()
    }

    /// The first stretch between two keys that is not as of `now`: its bounds, and as of what it is.
    fn stale(
        &self,
        after: Option<&Key>,
        upto: Option<&Key>,
        now: i64,
    ) -> Option<(Option<Key>, Option<Key>, Option<i64>)> {
        let mut from: Option<&Key> = None;
        for range in &self.0 {
            let to = range.upto.as_ref();
            let (low, high) = (from.max(after), lower_end(to, upto));
            if range.as_of != Some(now) && is_stretch(low, high) {
                return Some((low.cloned(), high.cloned(), range.as_of));
            }
            from = to;
        }
        None
    }

    /// The keys above `after`, up to and with `upto`, are as of `now`.
    fn set(&mut self, after: Option<&Key>, upto: Option<&Key>, now: i64) {
        let mut ranges = Ranges(Vec::with_capacity(self.0.len() + 2));
        let mut from: Option<&Key> = None;
        for range in &self.0 {
            let to = range.upto.as_ref();
            if after.is_some() && is_stretch(from, lower_end(to, after)) {
                ranges.push(lower_end(to, after), range.as_of);
            }
            if is_stretch(from.max(after), lower_end(to, upto)) {
                ranges.push(lower_end(to, upto), Some(now));
            }
            if upto.is_some() && is_stretch(from.max(upto), to) {
                ranges.push(to, range.as_of);
            }
            from = to;
        }
        *self = ranges;
    }

    fn push(&mut self, upto: Option<&Key>, as_of: Option<i64>) {
        match self.0.last_mut() {
            Some(last) if last.as_of == as_of => last.upto = upto.cloned(),
            _ => self.0.push(Range {
                upto: upto.cloned(),
                as_of,
            }),
        }
    }
}

/// The lower of two ends, of which `None` is above all keys. (Of two beginnings, `None` is below all keys, as
/// `Option` orders it.)
fn lower_end<'a>(one: Option<&'a Key>, other: Option<&'a Key>) -> Option<&'a Key> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Whether there may be keys above `after`, up to and with `upto`.
fn is_stretch(after: Option<&Key>, upto: Option<&Key>) -> bool {
    match (after, upto) {
        (Some(after), Some(upto)) => after < upto,
        _ => true,
    }
}

impl Budget {
    fn look(&mut self, row: Option<&Bytes>) {
        self.used += row.map_or(0, |row| row.len() / LOOK_PART + 1);
    }

    fn give(&mut self, op: &Op) {
        let (Op::Upsert(record) | Op::Delete(record)) = op;
        self.used += record.len() + OP_BYTES;
    }

    /// Never before anything was looked at, or a row above the budget would never get by.
    fn is_used_up(&self) -> bool {
        self.used > 0 && self.used >= self.bytes_max
    }
}
