//! The bindings of one SELECT, and how a row's values lead to those that may have it.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::BuildHasher,
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::{BindingId, Map, few::Few, intervals::Intervals};
use crate::{
    lookup::{Error, Lookup},
    shape::{Bound, RouteKey, RouteRange, Select},
};

/// Keys that a row may lead to beyond one for each binding.
const KEYS_MORE: usize = 64;

/// The bindings of one SELECT.
pub(super) struct Routes {
    pub select: Arc<Select>,
    /// By what keys are hashed to: two that are hashed to the same lead to the bindings of both, which is not wrong.
    keyed: Map<u64, Few<BindingId>>,
    hash: RandomState,
    /// By leaf; of few SELECTs there are any.
    ranges: BTreeMap<u16, Intervals>,
    /// All of them. Where no row's values lead to any, these are looked at one by one.
    pub all: BTreeSet<BindingId>,
}

/// Whether all was found out; not if that was too much.
pub(super) fn is_known(found: Result<bool, Error>) -> Result<bool, Error> {
    match found {
        Err(Error::TooMuch) => Ok(false),
        found => found,
    }
}

impl Routes {
    pub fn new(select: Arc<Select>) -> Self {
        Routes {
            select,
            keyed: Map::default(),
            hash: RandomState::default(),
            ranges: BTreeMap::new(),
            all: BTreeSet::new(),
        }
    }

    pub fn insert(&mut self, id: BindingId, bound: &Bound) {
        self.all.insert(id);
        // Also for SELECTs that are scanned: a changed inner row may lead to their bindings.
        for key in bound.route_keys() {
            let hash = self.hash.hash_one(key);
            self.keyed.entry(hash).or_default().insert(id);
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
            let hash = self.hash.hash_one(key);
            if let Some(ids) = self.keyed.get_mut(&hash) {
                ids.remove(id);
                if ids.is_empty() {
                    self.keyed.remove(&hash);
                }
            }
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
                None => {
                    let few = self.keyed.get(&self.hash.hash_one(key));
                    found.extend(few.into_iter().flat_map(Few::iter));
                }
            }
        }
    }
}
