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
//! Of a table whose condition looks into others, the rows that did not change, but the condition's answer may have, are looked at
//! as well (`affected`): before and after are two states of all these tables, and the condition is asked in both.
//!
//! Where the replica was shown a table by another definition than now ([`View::former`]), each range begins as what that one showed:
//! of such a range all keys are looked at that have a row or were changed since, was and is being asked of two conditions.
//! From the first time that it was brought on, a range is like any other.
//!
//! A mirror that is still being filled may be read as well: rows of tables that are open to readers are given out up
//! to the highest key that is there so far (see `mirror::copy`). The mirror has no position then, so no round is complete;
//! when the history has begun, the rounds go on in it.
//!
//! Nothing here waits, looks at a clock, or writes to the mirror.

mod affected;
pub mod together;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anabranch_proto::{Position, record::Malformed};
use bytes::Bytes;

use self::affected::Noted;
use crate::{
    delta::{self, Op},
    lookup::{self, ANSWERS_BYTES_MAX, Answers, Index, Lookup, Moment, Nothing, Reads},
    mirror::{Error, Key, Keys, Place, Reader},
    shape::Bound,
    table::{Oid, Table},
};

/// What an op costs beside its record.
const OP_BYTES: usize = 16;

/// What is looked at counts as this part of what is given out, so that a round ends in reasonable time
/// also where the replica sees little of a large table.
const LOOK_PART: usize = 16;

/// What so many transactions changed is merged as it is read; of more, the changed keys are listed first.
const MERGED_MAX: i64 = 8;

/// Entries of the change index that one round lists at most: less than a second's work.
const COLLECTED_MAX: usize = 200_000;

/// The same where old rows of tables that conditions look into are listed with them.
const COLLECTED_WITH_ROWS_MAX: usize = 50_000;

/// Rows of other tables that conditions read in one round, at most: less than a second's work.
const READS_MAX: usize = 50_000;

/// What one replica sees of one table: the union of its subscriptions.
pub trait View: Send + Sync {
    /// The table.
    fn table(&self) -> &Arc<Table>;
    /// Whether the replica sees this row, in the state that `lookup` shows.
    fn contains(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, lookup::Error>;
    /// The record that it gets.
    fn project(&self, row: &Bytes) -> Result<Bytes, Malformed>;
    /// Its SELECTs whose conditions look into other tables, and maybe others.
    fn bounds(&self) -> &[Bound] {
        &[]
    }
    /// What the replica was shown at the position that it comes from, where that is something else.
    fn former(&self) -> Option<&dyn View> {
        None
    }
    /// What the replica has of a row that [`View::former`] showed it, in the form of [`View::project`].
    fn held(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        self.project(row)
    }
}

/// Its own table, and those that its conditions look into; none twice.
pub fn tables_of(view: &dyn View) -> Vec<&Arc<Table>> {
    let mut tables = vec![view.table()];
    add_inner_tables(view.bounds(), &mut tables);
    tables
}

/// Those, and the ones of what the replica was shown before.
fn all_tables_of(view: &dyn View) -> Vec<&Arc<Table>> {
    let mut tables = tables_of(view);
    if let Some(former) = view.former() {
        add_inner_tables(former.bounds(), &mut tables);
    }
    tables
}

/// Adds the tables that conditions of these look into, where they are not there yet.
fn add_inner_tables<'a>(bounds: &'a [Bound], tables: &mut Vec<&'a Arc<Table>>) {
    let steps = bounds.iter().flat_map(|bound| bound.select.subqueries());
    for table in steps.map(|step| &step.subquery.table) {
        if !tables.iter().any(|other| other.oid == table.oid) {
            tables.push(table);
        }
    }
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
    /// How it is brought on; as by default, but in tests.
    pub limits: Limits,
}

/// How much is done in which way, and how much at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// What so many transactions changed is merged as it is read; of more, the changed keys are listed first.
    pub merged_max: i64,
    /// Entries of the change index that one round lists at most.
    pub collected_max: usize,
    /// The same where old rows are listed with them.
    pub collected_with_rows_max: usize,
    /// Rows that one round looks at at most, for what changes of inner tables concern.
    pub looked_max: usize,
    /// Rows that conditions read in one round at most, but for its first row.
    pub reads_max: usize,
    /// What the answers of subqueries hold, in each of the two states of a round.
    pub answers_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            merged_max: MERGED_MAX,
            collected_max: COLLECTED_MAX,
            collected_with_rows_max: COLLECTED_WITH_ROWS_MAX,
            looked_max: affected::LOOKED_MAX,
            reads_max: READS_MAX,
            answers_bytes_max: ANSWERS_BYTES_MAX,
        }
    }
}

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// Everything that was given out makes the replica's tables what they are at this position.
    Complete(Position),
    /// The budget was used up; give another round.
    More,
    /// All that is there was given out, but the mirror is still being filled.
    Filling,
}

struct Walk {
    /// What the first round found; a later one that finds otherwise has lost its footing.
    histories: i64,
    /// The mirror was filled in the last round.
    filled: bool,
    /// Of each table: the copy that its rows come from. `None`: it was not begun yet.
    copies: HashMap<Oid, Option<i64>>,
    /// Of each item.
    ranges: Vec<Ranges>,
    /// The next round goes on behind this key (`None`: at the first) of this item.
    item: usize,
    after: Option<Key>,
    /// The list of the change index by key that a reader has.
    collected: Option<Collected>,
}

/// What a reader has listed of the change index.
struct Collected {
    list: u64,
    /// How far it goes.
    upto: Place,
    /// Which changes of inner tables were followed to the rows that they concern.
    noted: Noted,
}

/// One round.
struct Turn<'a> {
    reader: &'a mut Reader,
    /// The last transaction of its snapshot.
    now: i64,
    budget: Budget,
    sink: &'a mut dyn FnMut(usize, Op),
    /// Rows that conditions may still read.
    reads: Reads,
    /// What subqueries say in its snapshot.
    answers: Answers,
    /// And said after a transaction, the one that ranges are as of which are brought on now.
    past_answers: (Option<i64>, Answers),
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
    /// It has them as the view's former one showed them.
    former: bool,
}

/// What is to be brought to the snapshot: its bounds, and what the replica has of it (see [`Range`]).
type Stale = (Option<Key>, Option<Key>, Option<i64>, bool);

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
        Catchup {
            items,
            walk: None,
            limits: Limits::default(),
        }
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
        self.check(&mut walk, reader)?;
        // Any reader may serve a round: this one may have another list, or an older state of this one's.
        (walk.collected).take_if(|collected| !reader.has_list(collected.list));
        let (position, now) = (reader.snapshot()?.position, reader.snapshot()?.last);
        let mut round = Turn {
            reader,
            now,
            budget: Budget { bytes_max, used: 0 },
            sink,
            reads: Reads::new(self.limits.reads_max),
            answers: Answers::new(self.limits.answers_bytes_max),
            past_answers: (None, Answers::new(self.limits.answers_bytes_max)),
        };
        let complete = self.turn(&mut walk, &mut round)?;
        if complete {
            reader.forget_collected()?;
            walk.collected = None;
        }
        let filling = !walk.filled;
        self.walk = Some(walk);
        Ok(match complete {
            false => Round::More,
            true if filling => Round::Filling,
            true => Round::Complete(position),
        })
    }

    fn start(&self, reader: &Reader) -> Result<Walk, Error> {
        let filled = is_filled(reader)?;
        if filled {
            self.check_ready(reader)?;
        }
        let at = reader.snapshot()?.position;
        let mut ranges = Vec::new();
        for Item { view, from } in &self.items {
            if let Some(from) = *from {
                // Where it was shown something else, that must be known as it was; what it is shown now need not be.
                for table in tables_of(view.former().unwrap_or(&**view)) {
                    if !filled || !reader.reaches(table.oid, from)? {
                        return Err(Error::OutOfReach(table.full_name()));
                    }
                }
            }
            let as_of = match *from {
                None => None,
                Some(from) if from.lsn > at.lsn => return Err(Error::Ahead { from, at }),
                Some(from) => Some(reader.ordinal_at(from.lsn)?),
            };
            ranges.push(Ranges(vec![Range {
                upto: None,
                as_of,
                former: as_of.is_some() && view.former().is_some(),
            }]));
        }
        Ok(Walk {
            histories: reader.snapshot()?.histories,
            filled,
            copies: HashMap::default(),
            ranges,
            item: 0,
            after: None,
            collected: None,
        })
    }

    /// In a mirror that is filled, all tables can be served.
    fn check_ready(&self, reader: &Reader) -> Result<(), Error> {
        let at = reader.snapshot()?.position;
        for table in self.items.iter().flat_map(|item| tables_of(&*item.view)) {
            match reader.standing(table.oid)? {
                Some(standing) if standing.copied && standing.floor <= at.lsn => {}
                _ => return Err(Error::NotReady(table.full_name())),
            }
        }
        Ok(())
    }

    /// What earlier rounds gave out still means what it meant, and the change index still has what is missing.
    fn check(&self, walk: &mut Walk, reader: &Reader) -> Result<(), Error> {
        let snapshot = reader.snapshot()?;
        let was_filled = walk.filled;
        if !walk.filled && is_filled(reader)? {
            // The first history counts as one; another one was not that of these rows.
            walk.histories += 1;
            walk.filled = true;
            self.check_ready(reader)?;
        }
        for (place, item) in self.items.iter().enumerate() {
            let oldest = walk.ranges[place].oldest();
            for table in all_tables_of(&*item.view) {
                let standing = reader.standing(table.oid)?;
                let copy = standing.map(|standing| standing.copy);
                // The change index has nothing of what happened between two copies.
                let before = walk.copies.insert(table.oid, copy).flatten();
                let copied_anew = before.is_some() && before != copy;
                // A copy that was stopped is emptied: rows that were given out before are not told to go.
                let emptied = !was_filled
                    && standing.is_some_and(|standing| standing.stopped)
                    && oldest.is_some();
                if snapshot.histories != walk.histories
                    || oldest.is_some_and(|oldest| oldest + 1 < snapshot.first)
                    || standing.is_some_and(|standing| standing.version != table.version)
                    || copied_anew
                    || emptied
                {
                    return Err(Error::OutOfReach(table.full_name()));
                }
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
            if !self.bring_all(walk, item, after, turn)? {
                return Ok(false);
            }
        }
        for item in 0..first {
            if !self.bring_all(walk, item, None, turn)? {
                return Ok(false);
            }
        }
        match cursor {
            Some(cursor) => self.bring(walk, first, None, Some(&cursor), turn),
            None => Ok(true),
        }
    }

    /// Brings what there is of a table behind a key to the snapshot. False: the budget is used up, and the cursor is set.
    fn bring_all(
        &self,
        walk: &mut Walk,
        item: usize,
        after: Option<Key>,
        turn: &mut Turn<'_>,
    ) -> Result<bool, Error> {
        if walk.filled {
            return self.bring(walk, item, after, None, turn);
        }
        if self.looks_into_others(item) {
            // What those have is not complete: nothing can be said of any row.
            return Ok(true);
        }
        let table = self.items[item].view.table().oid;
        match turn.reader.standing(table)? {
            Some(standing) if standing.copied => self.bring(walk, item, after, None, turn),
            Some(standing) if standing.open => match turn.reader.highest(table)? {
                Some(highest) => self.bring(walk, item, after, Some(&highest), turn),
                None => Ok(true),
            },
            _ => Ok(true),
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
        while let Some((from, to, as_of, former)) =
            walk.ranges[item].stale(after.as_ref(), upto, turn.now)
        {
            let listed = |as_of| {
                former || self.looks_into_others(item) || as_of + self.limits.merged_max < turn.now
            };
            if as_of.is_some_and(listed) && !self.collect(walk, turn)? {
                (walk.item, walk.after) = (item, after);
                return Ok(false);
            }
            let keys = Keys {
                after: from.as_ref(),
                upto: to.as_ref(),
            };
            match self.stretch(item, keys, (as_of, former), turn)? {
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
        (as_of, former): (Option<i64>, bool),
        turn: &mut Turn<'_>,
    ) -> Result<Stretch, Error> {
        let view = &*self.items[item].view;
        let had = if former { view.former() } else { None };
        let table = view.table();
        let looks_into_others = self.looks_into_others(item);
        let Turn {
            reader,
            now,
            budget,
            sink,
            reads,
            answers,
            past_answers,
        } = turn;
        let reader: &Reader = reader;
        if past_answers.0 != as_of {
            *past_answers = (as_of, Answers::new(self.limits.answers_bytes_max));
        }
        // What conditions are asked in: the state that the replica has, and that of the snapshot.
        let (at, there);
        let (before, after): (&dyn Lookup, &dyn Lookup) = if looks_into_others {
            there = reader.now()?;
            match as_of {
                Some(as_of) => {
                    at = reader.at(as_of)?;
                    (&at, &there)
                }
                None => (&Nothing, &there),
            }
        } else {
            (&Nothing, &Nothing)
        };
        let reads: &Reads = reads;
        let moment = |of, answers| Moment { of, answers, reads };
        let (before, after) = (moment(before, &past_answers.1), moment(after, answers));
        let mut behind = None;
        let mut stopped = false;
        let mut look = |key: Key, was: Option<Bytes>, is: Option<Bytes>| {
            // Only where there is more to look at: what just fits is complete.
            if budget.is_used_up() {
                stopped = true;
                return Ok(false);
            }
            // The first row is looked at whatever it takes, or a dear one would never get by.
            let is_first = budget.used == 0;
            if is_first {
                reads.set(usize::MAX);
            }
            let found = told((had, view), (was.as_ref(), &before), (is.as_ref(), &after));
            if is_first {
                let read = usize::MAX - reads.left();
                reads.set(self.limits.reads_max.saturating_sub(read));
            }
            let op = match found {
                Err(lookup::Error::TooMuch) => {
                    stopped = true;
                    return Ok(false);
                }
                found => found.map_err(|error| of_rows(table, error))?,
            };
            budget.look(was.as_ref());
            budget.look(is.as_ref());
            if let Some(op) = op {
                budget.give(&op);
                sink(item, op);
            }
            behind = Some(key);
            Ok(true)
        };
        match as_of {
            None => reader.scan(table.oid, keys, |key, row| look(key, None, Some(row)))?,
            Some(as_of) if former || looks_into_others => {
                let both = |key: Key, ordinal: Option<i64>| {
                    let is = reader.row(table.oid, &key)?;
                    let was = match ordinal {
                        Some(ordinal) => reader.old(table, ordinal, &key)?,
                        None => is.clone(),
                    };
                    look(key, was, is)
                };
                match former {
                    true => reader.all_after(table.oid, as_of, keys, both)?,
                    false => reader.concerned_after(table.oid, item, as_of, keys, both)?,
                }
            }
            Some(as_of) if as_of + self.limits.merged_max >= *now => {
                reader.changes_of(table, as_of, *now, keys, |key, was| {
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
    fn collect(&self, walk: &mut Walk, turn: &mut Turn<'_>) -> Result<bool, Error> {
        let tables: Vec<Oid> = self
            .items
            .iter()
            .map(|item| item.view.table().oid)
            .collect();
        let mut collected = walk.collected.take().unwrap_or_else(|| {
            let oldest = walk.ranges.iter().filter_map(Ranges::oldest).min();
            // From here on ranges only get newer.
            let ordinal = oldest.unwrap_or(turn.now);
            Collected {
                list: new_list(),
                upto: Place {
                    ordinal,
                    entry: None,
                },
                noted: Noted::since(ordinal),
            }
        });
        let bounds: Vec<&[Bound]> = self.items.iter().map(|item| item.view.bounds()).collect();
        let mut all = bounds.clone();
        let formers = self.items.iter().filter_map(|item| item.view.former());
        all.extend(formers.map(View::bounds));
        let past = inner_indexes(&all);
        let entries_max = if past.is_empty() {
            self.limits.collected_max
        } else {
            self.limits.collected_with_rows_max
        };
        let more =
            (turn.reader).collect(collected.list, &tables, &past, &collected.upto, entries_max)?;
        let mut complete = more.is_none();
        collected.upto = more.unwrap_or(Place {
            ordinal: turn.now,
            entry: None,
        });
        if complete {
            complete =
                collected
                    .noted
                    .go_on(turn.reader, &bounds, turn.now, self.limits.looked_max)?;
        }
        walk.collected = Some(collected);
        Ok(complete)
    }

    /// Whether the condition of an item looks into other tables.
    fn looks_into_others(&self, item: usize) -> bool {
        let view = &*self.items[item].view;
        let former = view.former().map_or(&[][..], View::bounds);
        (view.bounds().iter().chain(former)).any(|bound| !bound.select.subqueries().is_empty())
    }
}

/// A number for a list of the change index by key.
fn new_list() -> u64 {
    static LISTS: AtomicU64 = AtomicU64::new(0);
    LISTS.fetch_add(1, Ordering::Relaxed)
}

/// By which rows of inner tables are found.
pub(crate) fn inner_indexes(bounds: &[&[Bound]]) -> Vec<Index> {
    let mut indexes: Vec<Index> = Vec::new();
    for bound in bounds.iter().copied().flatten() {
        for step in bound.select.subqueries() {
            if !indexes.contains(&step.subquery.inner) {
                indexes.push(step.subquery.inner.clone());
            }
        }
    }
    indexes
}

/// The mirror has a position: its initial copy is complete.
fn is_filled(reader: &Reader) -> Result<bool, Error> {
    Ok(reader.snapshot()?.position != Position::default())
}

/// What the replica is told of one row: by the view, and by what it `had` before where that is another one.
fn told(
    (had, view): (Option<&dyn View>, &dyn View),
    (was, before): (Option<&Bytes>, &dyn Lookup),
    (is, after): (Option<&Bytes>, &dyn Lookup),
) -> Result<Option<Op>, lookup::Error> {
    let seen = |view: &dyn View, row: Option<&Bytes>, lookup| match row {
        Some(row) => view.contains(row, lookup),
        None => Ok(false),
    };
    let was_seen = seen(had.unwrap_or(view), was, before)?;
    let is_seen = seen(view, is, after)?;
    let (was, is) = (was.filter(|_| was_seen), is.filter(|_| is_seen));
    let (table, project) = (view.table(), |row: &Bytes| view.project(row));
    Ok(match had {
        None => delta::decide(table, was, is, project)?,
        Some(_) => delta::decide_changed(table, was, is, |row| view.held(row), project)?,
    })
}

/// A lookup's error, in the words of whoever goes through the rows of a table.
pub(crate) fn of_rows(table: &Table, error: lookup::Error) -> Error {
    match error {
        lookup::Error::Mirror(error) => error,
        lookup::Error::Malformed(error) => Error::Damaged(format!(
            "a row of {}, or one that goes with it: {error}",
            table.full_name()
        )),
        lookup::Error::TooMuch => Error::Misused("too much is read where nothing ends it"),
    }
}

impl Ranges {
    /// The oldest transaction that a range is as of.
    fn oldest(&self) -> Option<i64> {
        self.0.iter().filter_map(|range| range.as_of).min()
    }

    /// The first stretch between two keys that is not as of `now`: its bounds, and as of what it is.
    fn stale(&self, after: Option<&Key>, upto: Option<&Key>, now: i64) -> Option<Stale> {
        let mut from: Option<&Key> = None;
        for range in &self.0 {
            let to = range.upto.as_ref();
            let (low, high) = (from.max(after), lower_end(to, upto));
            let is_stale = range.former || range.as_of != Some(now);
            if is_stale && is_stretch(low, high) {
                return Some((low.cloned(), high.cloned(), range.as_of, range.former));
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
                ranges.push(lower_end(to, after), range.as_of, range.former);
            }
            if is_stretch(from.max(after), lower_end(to, upto)) {
                ranges.push(lower_end(to, upto), Some(now), false);
            }
            if upto.is_some() && is_stretch(from.max(upto), to) {
                ranges.push(to, range.as_of, range.former);
            }
            from = to;
        }
        *self = ranges;
    }

    fn push(&mut self, upto: Option<&Key>, as_of: Option<i64>, former: bool) {
        match self.0.last_mut() {
            Some(last) if (last.as_of, last.former) == (as_of, former) => {
                last.upto = upto.cloned();
            }
            _ => self.0.push(Range {
                upto: upto.cloned(),
                as_of,
                former,
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
