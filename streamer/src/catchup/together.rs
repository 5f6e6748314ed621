//! Many replicas that are a little behind, served by one pass over the change index.
//!
//! When thousands come back at once, all of them miss about the same transactions. For each of them by itself, what changed
//! would be listed and gone through as often as there are replicas. Here it is gone through once: for each changed row those
//! are found, by hashing as for live transactions, that may have seen any of its states; and what each is told follows from what
//! the row was at *its* position and is now, by the same [`delta::decide`](crate::delta::decide). Members need not stand at the
//! same position.
//!
//! The same for those who come for the first time: the rows of their tables are gone through once for all of them.
//!
//! Who needs more than its part of the memory, stands where the change index does not reach, or has conditions that look into
//! other tables, is left to a catch-up of its own.

use std::sync::Arc;

use anabranch_proto::Position;
use bytes::Bytes;

use super::{COLLECTED_MAX, OP_BYTES, View, new_list, of_rows, told};
use crate::{
    delta::Op,
    lookup::{self, Nothing},
    mirror::{Error, Key, Keys, Place, Reader},
    table::{Oid, Table},
};

/// Bytes that all members are told together, at most: they are in memory until each has sent its own.
pub const TOLD_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Rows that are gone through for those who come for the first time, at most: less than a second's work. Of larger tables each
/// gets its rows round by round.
pub const SCANNED_MAX: usize = 300_000;

/// One of those who are served.
pub struct Member<V> {
    /// What it may see, in the order of OIDs.
    pub views: Vec<Arc<V>>,
    /// Where it stands, with all of it; `None`: it has nothing of it, or nothing that is proved.
    pub from: Option<Position>,
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
pub type MaySee<'a> = dyn Fn(Oid, &[u8], &mut Vec<u64>) -> Result<(), lookup::Error> + 'a;

/// What each member is told, in the snapshot that `reader` has open. `bytes_max` is for all of them.
pub fn pass<V: View>(
    reader: &mut Reader,
    members: &[Member<V>],
    may_see: &MaySee<'_>,
    bytes_max: usize,
) -> Result<Vec<Told>, Error> {
    let limits = Limits {
        entries_max: COLLECTED_MAX,
        scanned_max: SCANNED_MAX,
    };
    pass_limited(reader, members, may_see, bytes_max, limits)
}

/// How much is done at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Entries of the change index.
    pub entries_max: usize,
    /// Rows.
    pub scanned_max: usize,
}

/// The same, with what is listed at once at most as in tests.
pub(crate) fn pass_limited<V: View>(
    reader: &mut Reader,
    members: &[Member<V>],
    may_see: &MaySee<'_>,
    bytes_max: usize,
    limits: Limits,
) -> Result<Vec<Told>, Error> {
    let mut served = Served::new(reader, members, bytes_max)?;
    served.bring(reader, may_see, limits.entries_max)?;
    served.fill(reader, may_see, limits.scanned_max)?;
    Ok(served.told)
}

/// A pass in progress.
struct Served<'a, V> {
    members: &'a [Member<V>],
    stands: Vec<Stand>,
    told: Vec<Told>,
    /// Bytes of each, and their limit.
    bytes: Vec<usize>,
    member_bytes_max: usize,
}

/// Where a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// It is left alone.
    Alone,
    /// It has nothing.
    Nowhere,
    /// The last transaction that it knows.
    At(i64),
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
            stands: Vec::with_capacity(members.len()),
            told: Vec::with_capacity(members.len()),
            bytes: vec![0; members.len()],
            member_bytes_max: bytes_max / members.len().max(1),
        };
        for member in members {
            let stand = match (served.can_serve(reader, member)?, member.from) {
                (false, _) => Stand::Alone,
                (true, None) => Stand::Nowhere,
                (true, Some(from)) => Stand::At(reader.ordinal_at(from.lsn)?),
            };
            served.told.push(match stand {
                Stand::Alone => Told::Alone,
                _ => Told::All(Vec::new()),
            });
            served.stands.push(stand);
        }
        Ok(served)
    }

    /// The tables of those who stand so; none twice.
    fn tables(&self, wanted: impl Fn(Stand) -> bool) -> Vec<Arc<Table>> {
        let mut tables: Vec<Arc<Table>> = Vec::new();
        let members = self.members.iter().zip(&self.stands);
        let views = members
            .filter(|(_, stand)| wanted(**stand))
            .flat_map(|(member, _)| &member.views);
        for table in views.map(|view| view.table()) {
            if !tables.iter().any(|known| known.oid == table.oid) {
                tables.push(table.clone());
            }
        }
        tables
    }

    fn leave_alone(&mut self, which: impl Fn(Stand) -> bool) {
        for (stand, told) in self.stands.iter_mut().zip(&mut self.told) {
            if which(*stand) {
                (*stand, *told) = (Stand::Alone, Told::Alone);
            }
        }
    }

    /// Brings those who are somewhere to the snapshot.
    fn bring(
        &mut self,
        reader: &mut Reader,
        may_see: &MaySee<'_>,
        entries_max: usize,
    ) -> Result<(), Error> {
        let is_somewhere = |stand| matches!(stand, Stand::At(_));
        let ordinals = self.stands.iter().filter_map(|stand| match stand {
            Stand::At(ordinal) => Some(*ordinal),
            _ => None,
        });
        let Some(oldest) = ordinals.min() else {
            return Ok(());
        };
        let tables = self.tables(is_somewhere);
        let oids: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
        let behind = Place {
            ordinal: oldest,
            entry: None,
        };
        let more = reader.collect(new_list(), &oids, &[], &behind, entries_max)?;
        if more.is_some() {
            // So much is better gone through round by round.
            self.leave_alone(is_somewhere);
        } else {
            let now = reader.snapshot()?.last;
            for table in tables {
                self.table(reader, &table, (oldest, now), may_see)?;
            }
        }
        reader.forget_collected()
    }

    /// Gives those who have nothing all their rows.
    fn fill(
        &mut self,
        reader: &Reader,
        may_see: &MaySee<'_>,
        scanned_max: usize,
    ) -> Result<(), Error> {
        let is_nowhere = |stand| stand == Stand::Nowhere;
        let mut left = scanned_max;
        let all = Keys {
            after: None,
            upto: None,
        };
        for table in self.tables(is_nowhere) {
            reader.scan(table.oid, all, |_, row| {
                if left == 0 {
                    self.leave_alone(is_nowhere);
                    return Ok(false);
                }
                left -= 1;
                let mut concerned = Vec::new();
                may_see(table.oid, &row, &mut concerned).map_err(|error| of_rows(&table, error))?;
                for place in concerned {
                    if is_nowhere(self.stands[place as usize]) {
                        self.tell(place as usize, &table, None, Some(&row))?;
                    }
                }
                Ok(true)
            })?;
        }
        Ok(())
    }

    fn can_serve(&self, reader: &Reader, member: &Member<V>) -> Result<bool, Error> {
        let at = reader.snapshot()?.position;
        if let Some(from) = member.from
            && (from.epoch != at.epoch || from.lsn > at.lsn)
        {
            return Ok(false);
        }
        for view in &member.views {
            let looks_into_others =
                (view.bounds().iter()).any(|bound| !bound.select.subqueries().is_empty());
            let table = view.table();
            let ready = reader.standing(table.oid)?.is_some_and(|standing| {
                standing.copied && standing.floor <= at.lsn && standing.version == table.version
            });
            let reaches = match member.from {
                Some(from) => reader.reaches(table.oid, from)?,
                None => at != Position::default(),
            };
            if looks_into_others || !ready || !reaches {
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
            may_see(table.oid, row, &mut concerned).map_err(|error| of_rows(table, error))?;
        }
        concerned.sort_unstable();
        concerned.dedup();
        for place in concerned {
            let Stand::At(as_of) = self.stands[place as usize] else {
                continue;
            };
            if let Some(was) = states.at(as_of) {
                self.tell(place as usize, table, was, states.now.as_ref())?;
            }
        }
        Ok(())
    }

    fn tell(
        &mut self,
        place: usize,
        table: &Table,
        was: Option<&Bytes>,
        is: Option<&Bytes>,
    ) -> Result<(), Error> {
        let views = &self.members[place].views;
        let Ok(at) = views.binary_search_by_key(&table.oid, |view| view.table().oid) else {
            return Ok(());
        };
        let op = told((None, &*views[at]), (was, &Nothing), (is, &Nothing));
        let Some(op) = op.map_err(|error| of_rows(table, error))? else {
            return Ok(());
        };
        let (Op::Upsert(record) | Op::Delete(record)) = &op;
        self.bytes[place] += record.len() + OP_BYTES;
        match &mut self.told[place] {
            Told::All(ops) if self.bytes[place] <= self.member_bytes_max => ops.push((at, op)),
            told => {
                *told = Told::Alone;
                self.stands[place] = Stand::Alone;
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
