//! A transaction held in memory: what becomes of each row that it touches, in the end.
//!
//! Only reads the mirror until all of it is known; so a table that must be stopped just drops its part, and a
//! transaction that turns out too large is handed to `direct` with nothing to undo.

use std::collections::HashMap;

use bytes::Bytes;
use foldhash::fast::FixedState;
use rusqlite::Connection;

use super::{
    Error, Key, Net,
    change::{Failure, Work},
    index::Index,
    rows::Rows,
};
use crate::table::Oid;

/// More net changes than this are not held, nor routed: routing them would cost more than the catch-up of those
/// who are concerned.
pub const NETS_MAX: usize = 100_000;

/// Nor more bytes of old rows than this: a DELETE of few bytes may name a row of many.
pub const NETS_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Up to here, slots are found by looking at each: most transactions change a row or two.
const SLOTS_SEARCHED: usize = 8;

/// A transaction in memory.
pub(super) struct Fold<'a> {
    sqlite: &'a Connection,
    slots: Vec<Slot>,
    /// Filled once there are more than [`SLOTS_SEARCHED`].
    places: HashMap<(Oid, Key), usize, FixedState>,
    /// Replica identities that the transaction touched, and who has them now.
    identities: HashMap<(Oid, Bytes), Option<Key>, FixedState>,
    bytes: usize,
    nets_max: usize,
}

struct Slot {
    oid: Oid,
    key: Key,
    before: Option<Bytes>,
    now: Option<Bytes>,
}

impl<'a> Fold<'a> {
    pub fn new(sqlite: &'a Connection, nets_max: usize) -> Fold<'a> {
        Fold {
            sqlite,
            slots: Vec::new(),
            places: HashMap::default(),
            identities: HashMap::default(),
            bytes: 0,
            nets_max,
        }
    }

    fn place(&self, oid: Oid, key: &Key) -> Option<usize> {
        if self.slots.len() <= SLOTS_SEARCHED {
            (self.slots.iter()).position(|slot| slot.oid == oid && slot.key == *key)
        } else {
            self.places.get(&(oid, key.clone())).copied()
        }
    }

    fn add(&mut self, oid: Oid, key: &Key, before: Option<Bytes>) -> Result<usize, Failure> {
        self.bytes += before.as_ref().map_or(0, Bytes::len);
        if self.slots.len() >= self.nets_max || self.bytes > NETS_BYTES_MAX {
            return Err(Failure::TooLarge);
        }
        let place = self.slots.len();
        self.slots.push(Slot {
            oid,
            key: key.clone(),
            now: before.clone(),
            before,
        });
        if self.slots.len() == SLOTS_SEARCHED + 1 {
            let all = self.slots.iter().enumerate();
            self.places
                .extend(all.map(|(place, slot)| ((slot.oid, slot.key.clone()), place)));
        } else if self.slots.len() > SLOTS_SEARCHED {
            self.places.insert((oid, key.clone()), place);
        }
        Ok(place)
    }

    fn touch(&mut self, rows: &Rows, key: &Key) -> Result<usize, Failure> {
        let oid = rows.table().oid;
        match self.place(oid, key) {
            Some(place) => Ok(place),
            None => {
                let before = rows.get(self.sqlite, key)?;
                self.add(oid, key, before)
            }
        }
    }

    /// Writes rows and index entries, and returns what became of each touched row. Slots of tables for which `rows`
    /// has no answer are dropped: they were stopped.
    pub fn write<'r>(
        self,
        index: &mut Index,
        rows: impl Fn(Oid) -> Option<&'r Rows>,
    ) -> Result<(Vec<Net>, Option<i64>), Error> {
        let mut ordinal = None;
        let mut nets = Vec::with_capacity(self.slots.len());
        // Identities that rows leave are free before others take them.
        let mut taken = Vec::new();
        for slot in self.slots {
            if slot.before == slot.now {
                continue;
            }
            let Some(rows) = rows(slot.oid) else { continue };
            let ordinal = match ordinal {
                Some(ordinal) => ordinal,
                None => *ordinal.insert(index.begin(self.sqlite)?),
            };
            let table = rows.table();
            let written = match (&slot.before, &slot.now) {
                (None, Some(now)) => rows.insert(self.sqlite, &slot.key, now)?,
                (Some(_), Some(now)) => rows.update(self.sqlite, &slot.key, now)?,
                (_, None) => rows.delete(self.sqlite, &slot.key)?,
            };
            if !written {
                return Err(Error::Damaged(format!(
                    "{} changed between reading and writing a row",
                    table.full_name()
                )));
            }
            let named = (table.oid, table.version);
            index.add(
                self.sqlite,
                ordinal,
                named,
                &slot.key,
                slot.before.as_deref(),
            )?;
            if rows.has_identity() {
                let identity = |row: &Option<Bytes>| match row {
                    Some(row) => rows.identity(row).map_err(|error| damaged(rows, &error)),
                    None => Ok(None),
                };
                let (left, kept) = (identity(&slot.before)?, identity(&slot.now)?);
                if let Some(left) = left {
                    rows.delete_identity(self.sqlite, &left)?;
                }
                if let Some(kept) = kept {
                    taken.push((slot.oid, kept, slot.key.clone()));
                }
            }
            nets.push(Net {
                table: table.clone(),
                key: slot.key,
                before: slot.before,
                after: slot.now,
            });
        }
        for (oid, identity, key) in taken {
            if let Some(rows) = rows(oid)
                && !rows.insert_identity(self.sqlite, &identity, &key)?
            {
                return Err(Error::Damaged(format!(
                    "two rows of {} have the same replica identity",
                    rows.table().full_name()
                )));
            }
        }
        Ok((nets, ordinal))
    }
}

fn damaged(rows: &Rows, error: &dyn std::fmt::Display) -> Error {
    Error::Damaged(format!("a row of {}: {error}", rows.table().full_name()))
}

impl Work for Fold<'_> {
    fn get(&mut self, rows: &Rows, key: &Key) -> Result<Option<Bytes>, Failure> {
        let place = self.touch(rows, key)?;
        Ok(self.slots[place].now.clone())
    }

    fn find(&mut self, rows: &Rows, identity: &Bytes) -> Result<Option<Key>, Failure> {
        match self.identities.get(&(rows.table().oid, identity.clone())) {
            Some(key) => Ok(key.clone()),
            None => Ok(rows.find(self.sqlite, identity)?),
        }
    }

    fn put(
        &mut self,
        rows: &Rows,
        key: &Key,
        old: Option<&Bytes>,
        new: Option<&Bytes>,
    ) -> Result<(), Failure> {
        let place = self.touch(rows, key)?;
        if rows.has_identity() {
            let oid = rows.table().oid;
            if let Some(old) = old
                && let Some(identity) = rows.identity(old)?
            {
                self.identities.insert((oid, identity), None);
            }
            if let Some(new) = new
                && let Some(identity) = rows.identity(new)?
            {
                self.identities.insert((oid, identity), Some(key.clone()));
            }
        }
        self.slots[place].now = new.cloned();
        Ok(())
    }

    fn truncate(&mut self, rows: &Rows) -> Result<(), Failure> {
        let oid = rows.table().oid;
        let mut touched: Vec<(Key, Option<Bytes>)> = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.oid == oid) {
            touched.push((slot.key.clone(), slot.now.clone()));
        }
        for (key, now) in touched {
            self.put(rows, &key, now.as_ref(), None)?;
        }
        let mut statement = self
            .sqlite
            .prepare(&format!("SELECT k, r FROM rows_{oid}"))?;
        let mut all = statement.query([])?;
        while let Some(row) = all.next()? {
            let key: Key = row.get(0)?;
            if self.place(oid, &key).is_none() {
                let before = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
                let before = Bytes::copy_from_slice(before);
                self.add(oid, &key, Some(before.clone()))?;
                self.put(rows, &key, Some(&before), None)?;
            }
        }
        Ok(())
    }
}
