//! Many replicas that are a little behind, served by one pass over the change index.
//!
//! When thousands come back at once, all of them miss about the same transactions. For each of them by itself, what changed
//! would be listed and gone through as often as there are replicas. Here it is gone through once: for each changed row those
//! are found, by hashing as for live transactions, that may have seen any of its states; and what each is told follows from what
//! the row was at *its* position and is now, by the same [`delta::decide`](crate::delta::decide). Members need not stand at the
//! same position.
//!
//! Who needs more than its part of the memory, stands where the change index does not reach, or has conditions that look into
//! other tables, is left to a catch-up of its own.

use std::sync::Arc;

use anabranch_proto::Position;
use bytes::Bytes;

use super::{COLLECTED_MAX, OP_BYTES, View, new_list, told};
use crate::{
    delta::Op,
    lookup::Nothing,
    mirror::{Error, Key, Place, Reader},
    table::{Oid, Table},
};

/// Bytes that all members are told together, at most: they are in memory until each has sent its own.
pub const TOLD_BYTES_MAX: usize = 8 * 1024 * 1024;

/// One of those who are served.
pub struct Member<V> {
    /// What it may see, in the order of OIDs.
    pub views: Vec<Arc<V>>,
    /// Where it stands, with all of it.
    pub from: Position,
}

/// What one of them is told.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// This makes its tables what they are in the snapshot: place of the view, and op.
    All(Vec<(usize, Op)>),
    /// It must catch up by itself.
    Alone,
}

/// Who may have seen a row of a table, by place: too many, never too few.
pub type MaySee<'a> = dyn Fn(Oid, &[u8], &mut Vec<u64>) -> Result<(), Error> + 'a;

/// What each member is told, in the snapshot that `reader` has open. `bytes_max` is for all of them.
pub fn pass<V: View>(
    reader: &mut Reader,
    members: &[Member<V>],
    may_see: &MaySee<'_>,
    bytes_max: usize,
) -> Result<Vec<Told>, Error> {
    pass_limited(reader, members, may_see, bytes_max, COLLECTED_MAX)
}

/// The same, with what is listed at once at most as in tests.
pub(crate) fn pass_limited<V: View>(
    reader: &mut Reader,
    members: &[Member<V>],
    may_see: &MaySee<'_>,
    bytes_max: usize,
    entries_max: usize,
) -> Result<Vec<Told>, Error> {
    let alone = || members.iter().map(|_| Told::Alone).collect();
    let mut served = Served::new(reader, members, bytes_max)?;
    let Some(oldest) = served.as_of.iter().flatten().min().copied() else {
        return Ok(alone());
    };
    let tables: Vec<Oid> = served.tables.iter().map(|table| table.oid).collect();
    let behind = Place {
        ordinal: oldest,
        entry: None,
    };
    let more = reader.collect(new_list(), &tables, &[], &behind, entries_max)?;
    if more.is_some() {
        // So much is better gone through round by round.
        reader.forget_collected()?;
        return Ok(alone());
    }
    let now = reader.snapshot()?.last;
    for table in served.tables.clone() {
        served.table(reader, &table, (oldest, now), may_see)?;
    }
    reader.forget_collected()?;
    Ok(served.told)
}

/// A pass in progress.
struct Served<'a, V> {
    members: &'a [Member<V>],
    /// The last transaction that each knows; `None`: it is left alone.
    as_of: Vec<Option<i64>>,
    /// Tables of those that are not.
    tables: Vec<Arc<Table>>,
    told: Vec<Told>,
    /// Bytes of each, and their limit.
    bytes: Vec<usize>,
    member_bytes_max: usize,
}

/// What a row was before each of the transactions that changed it, and what it is.
struct States {
    before: Vec<(i64, Option<Bytes>)>,
    now: Option<Bytes>,
}

impl<'a, V: View> Served<'a, V> {
    fn new(reader: &Reader, members: &'a [Member<V>], bytes_max: usize) -> Result<Self, Error> {
        let mut served = Served {
            members,
            as_of: Vec::with_capacity(members.len()),
            tables: Vec::new(),
            told: Vec::with_capacity(members.len()),
            bytes: vec![0; members.len()],
            member_bytes_max: bytes_max / members.len().max(1),
        };
        for member in members {
            let as_of = match served.can_serve(reader, member)? {
                true => Some(reader.ordinal_at(member.from.lsn)?),
                false => None,
            };
            served.told.push(match as_of {
                Some(_) => Told::All(Vec::new()),
                None => Told::Alone,
            });
            served.as_of.push(as_of);
            for view in member.views.iter().filter(|_| as_of.is_some()) {
                let table = view.table();
                if !served.tables.iter().any(|known| known.oid == table.oid) {
                    served.tables.push(table.clone());
                }
            }
        }
        Ok(served)
    }

    fn can_serve(&self, reader: &Reader, member: &Member<V>) -> Result<bool, Error> {
        let at = reader.snapshot()?.position;
        if member.from.epoch != at.epoch || member.from.lsn > at.lsn {
            return Ok(false);
        }
        for view in &member.views {
            let looks_into_others =
                (view.bounds().iter()).any(|bound| !bound.select.subqueries().is_empty());
            let table = view.table();
            let ready = reader.standing(table.oid)?.is_some_and(|standing| {
                standing.copied && standing.floor <= at.lsn && standing.version == table.version
            });
            if looks_into_others || !ready || !reader.reaches(table.oid, member.from)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// All that changed of one table.
    fn table(
        &mut self,
        reader: &Reader,
        table: &Table,
        between: (i64, i64),
        may_see: &MaySee<'_>,
    ) -> Result<(), Error> {
        let mut key: Option<Key> = None;
        let mut ordinals: Vec<i64> = Vec::new();
        reader.changes_between(table.oid, between, None, |next, ordinal| {
            if key.as_ref() != Some(&next) {
                if let Some(key) = key.replace(next) {
                    self.row(reader, table, &key, &ordinals, may_see)?;
                }
                ordinals.clear();
            }
            ordinals.push(ordinal);
            Ok(true)
        })?;
        match key {
            Some(key) => self.row(reader, table, &key, &ordinals, may_see),
            None => Ok(()),
        }
    }

    /// What became of one row, whoever it concerns.
    fn row(
        &mut self,
        reader: &Reader,
        table: &Table,
        key: &Key,
        ordinals: &[i64],
        may_see: &MaySee<'_>,
    ) -> Result<(), Error> {
        let before = ordinals
            .iter()
            .map(|ordinal| Ok((*ordinal, reader.old(table, *ordinal, key)?)));
        let states = States {
            before: before.collect::<Result<_, Error>>()?,
            now: reader.row(table.oid, key)?,
        };
        let mut concerned = Vec::new();
        for row in states.all() {
            may_see(table.oid, row, &mut concerned)?;
        }
        concerned.sort_unstable();
        concerned.dedup();
        for place in concerned {
            self.tell(place as usize, table, &states)?;
        }
        Ok(())
    }

    fn tell(&mut self, place: usize, table: &Table, states: &States) -> Result<(), Error> {
        let Some(as_of) = self.as_of[place] else {
            return Ok(());
        };
        let Some(was) = states.at(as_of) else {
            return Ok(());
        };
        let views = &self.members[place].views;
        let Ok(at) = views.binary_search_by_key(&table.oid, |view| view.table().oid) else {
            return Ok(());
        };
        let is = states.now.as_ref();
        let Some(op) = told(&*views[at], (was, &Nothing), (is, &Nothing))? else {
            return Ok(());
        };
        let (Op::Upsert(record) | Op::Delete(record)) = &op;
        self.bytes[place] += record.len() + OP_BYTES;
        match &mut self.told[place] {
            Told::All(ops) if self.bytes[place] <= self.member_bytes_max => ops.push((at, op)),
            told => {
                *told = Told::Alone;
                self.as_of[place] = None;
            }
        }
        Ok(())
    }
}

impl States {
    /// All that it ever was.
    fn all(&self) -> impl Iterator<Item = &Bytes> {
        let before = self.before.iter().filter_map(|(_, row)| row.as_ref());
        before.chain(&self.now)
    }

    /// What it was after a transaction, if it changed since.
    fn at(&self, as_of: i64) -> Option<Option<&Bytes>> {
        let next = self.before.iter().find(|(ordinal, _)| *ordinal > as_of);
        next.map(|(_, row)| row.as_ref())
    }
}
