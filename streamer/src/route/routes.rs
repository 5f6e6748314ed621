//! The bindings of one SELECT, and how a row's values lead to those that may have it.

use std::{
    collections::{BTreeMap, BTreeSet, hash_map::Entry},
    hash::{BuildHasher, Hash},
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::{BindingId, Map, few::Few, intervals::Intervals};
use crate::{
    lookup::{Error, Lookup, Nothing},
    shape::{Bound, RouteKey, RouteRange, Select},
};

/// Keys that a row may lead to beyond one for each binding.
const KEYS_MORE: usize = 64;

/// The bindings of one SELECT.
pub(super) struct Routes {
    pub select: Arc<Select>,
    keyed: Keyed,
    /// By leaf; of few SELECTs there are any.
    ranges: BTreeMap<u16, Intervals>,
    /// All of them. Where no row's values lead to any, these are looked at one by one.
    pub all: BTreeSet<BindingId>,
}

/// Bindings by their keys.
enum Keyed {
    /// By what keys are hashed to: two that are hashed to the same lead to the bindings of both, which is not wrong.
    Hashed(RandomState, Map<u64, Few<BindingId>>),
    /// By the keys themselves, where they decide.
    Exact(Map<Exact, Few<BindingId>>),
}

/// The value of a key; mostly it is where it is looked for.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Exact {
    Short(u8, [u8; SHORT_BYTES]),
    Long(Box<[u8]>),
}

/// Numbers and uuids are shorter.
const SHORT_BYTES: usize = 22;

impl From<&RouteKey> for Exact {
    fn from(key: &RouteKey) -> Exact {
        let value = key.value();
        let mut short = [0; SHORT_BYTES];
        match short.get_mut(..value.len()) {
            Some(same) => {
                same.copy_from_slice(value);
                Exact::Short(value.len() as u8, short)
            }
            None => Exact::Long(value.into()),
        }
    }
}

/// A binding that a row leads to, whether it had the row, and whether it has it.
pub(super) type Certain = (BindingId, bool, bool);

/// Whether all was found out; not if that was too much.
pub(super) fn is_known(found: Result<bool, Error>) -> Result<bool, Error> {
    match found {
        Err(Error::TooMuch) => Ok(false),
        found => found,
    }
}

impl Routes {
    pub fn new(select: Arc<Select>) -> Self {
        let keyed = match select.is_exact() {
            true => Keyed::Exact(Map::default()),
            false => Keyed::Hashed(RandomState::default(), Map::default()),
        };
        Routes {
            select,
            keyed,
            ranges: BTreeMap::new(),
            all: BTreeSet::new(),
        }
    }

    pub fn insert(&mut self, id: BindingId, bound: &Bound) {
        self.all.insert(id);
        // Also for SELECTs that are scanned: a changed inner row may lead to their bindings.
        for key in bound.route_keys() {
            self.keyed.insert(&key, id);
        }
        for RouteRange { leaf, low, high } in bound.route_ranges() {
            let ranges = self.ranges.entry(*leaf).or_default();
            ranges.insert(low, high, id);
        }
    }

    pub fn remove(&mut self, id: BindingId, bound: &Bound) {
        self.all.remove(&id);
        for RouteRange { leaf, low, high } in bound.route_ranges() {
            if let Some(ranges) = self.ranges.get_mut(leaf) {
                ranges.remove(low, high, id);
            }
        }
        self.ranges.retain(|_, ranges| !ranges.is_empty());
        for key in bound.route_keys() {
            self.keyed.remove(&key, id);
        }
    }

    /// Adds those that may have a row of the table, in a state. False: it may be any of all, as nothing leads to them, or too
    /// much would have to be read.
    pub fn find(
        &self,
        row: Option<&[u8]>,
        lookup: &dyn Lookup,
        found: &mut Vec<BindingId>,
    ) -> Result<bool, Error> {
        let Some(row) = row else { return Ok(true) };
        if !self.select.is_routable() {
            return Ok(false);
        }
        let mut keys = Vec::new();
        let max = self.keys_max();
        let all = is_known(self.select.route_keys_of(row, lookup, &mut keys, max))?;
        if all {
            self.add_keyed(&keys, found);
        }
        Ok(all)
    }

    /// A row that leads to more keys than this need not be followed to all of them: to ask all bindings is not dearer. So a row
    /// with which ten thousand inner ones go costs little where few have subscribed.
    pub fn keys_max(&self) -> usize {
        self.all.len() + KEYS_MORE
    }

    pub fn add_keyed(&self, keys: &[RouteKey], found: &mut Vec<BindingId>) {
        for key in keys {
            match self.ranges.get(&key.leaf()) {
                Some(ranges) => {
                    ranges.find(key.value(), found);
                }
                None => found.extend(self.keyed.get(key)),
            }
        }
    }

    /// Adds all that had a row of the table, or have it. Only where the SELECT [is exact](Select::is_exact).
    pub fn decide(
        &self,
        before: Option<&[u8]>,
        after: Option<&[u8]>,
        found: &mut Vec<Certain>,
    ) -> Result<(), Error> {
        let key_of = |row: Option<&[u8]>| {
            let mut keys = Vec::new();
            if let Some(row) = row {
                self.select.route_keys_of(row, &Nothing, &mut keys, 1)?;
            }
            Ok::<_, Error>(keys.pop())
        };
        let (before, after) = (key_of(before)?, key_of(after)?);
        let stays = before == after;
        if let Some(key) = before {
            found.extend(self.keyed.get(&key).map(|id| (id, true, stays)));
        }
        if let Some(key) = after.filter(|_| !stays) {
            found.extend(self.keyed.get(&key).map(|id| (id, false, true)));
        }
        Ok(())
    }
}

impl Keyed {
    fn insert(&mut self, key: &RouteKey, id: BindingId) {
        let few = match self {
            Keyed::Hashed(hash, keyed) => keyed.entry(hash.hash_one(key)).or_default(),
            Keyed::Exact(keyed) => keyed.entry(key.into()).or_default(),
        };
        few.insert(id);
    }

    fn remove(&mut self, key: &RouteKey, id: BindingId) {
        match self {
            Keyed::Hashed(hash, keyed) => remove(keyed, hash.hash_one(key), id),
            Keyed::Exact(keyed) => remove(keyed, key.into(), id),
        }
    }

    fn get(&self, key: &RouteKey) -> impl Iterator<Item = BindingId> {
        let few = match self {
            Keyed::Hashed(hash, keyed) => keyed.get(&hash.hash_one(key)),
            Keyed::Exact(keyed) => keyed.get(&key.into()),
        };
        few.into_iter().flat_map(Few::iter)
    }
}

fn remove<K: Eq + Hash>(keyed: &mut Map<K, Few<BindingId>>, key: K, id: BindingId) {
    if let Entry::Occupied(mut few) = keyed.entry(key) {
        few.get_mut().remove(id);
        if few.get().is_empty() {
            few.remove();
        }
    }
}
