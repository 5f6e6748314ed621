//! Rows in memory, for conditions that ask for rows of other tables.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use anabranch_streamer::{
    lookup::{Each, Error, Index, Lookup},
    table::Oid,
};
use bytes::Bytes;

/// Rows by their keys.
type Keys = Rc<BTreeMap<Vec<u8>, Vec<Bytes>>>;

/// Rows of tables. An index is made when it is first asked for.
#[derive(Default)]
pub struct Rows {
    tables: HashMap<Oid, Vec<Bytes>>,
    indexes: RefCell<HashMap<(Oid, String), Keys>>,
}

impl Rows {
    /// Adds a table.
    pub fn add(&mut self, table: Oid, rows: Vec<Bytes>) {
        self.tables.insert(table, rows);
    }

    fn index(&self, index: &Index) -> Result<Keys, Error> {
        let name = (index.table, index.name());
        if let Some(keys) = self.indexes.borrow().get(&name) {
            return Ok(Rc::clone(keys));
        }
        let mut keys: BTreeMap<_, Vec<Bytes>> = BTreeMap::new();
        for row in &self.tables[&index.table] {
            keys.entry(index.key(row)?).or_default().push(row.clone());
        }
        let keys = Rc::new(keys);
        self.indexes.borrow_mut().insert(name, Rc::clone(&keys));
        Ok(keys)
    }
}

impl Lookup for Rows {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        let keys = self.index(index)?;
        let found = keys
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix));
        for row in found.flat_map(|(_, rows)| rows) {
            if !each(row)? {
                break;
            }
        }
        Ok(())
    }
}
