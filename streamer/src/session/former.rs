//! A definition that is another one now: what the replica was shown before, found by what its resume token proves.
//!
//! The token has a fingerprint for each table. Where that of the present definition is not among them, the one that is there for the
//! table may be known to the mirror: then the replica is sent the difference between the two. Where it is not (it is too old, or
//! too long, or a table is another one now), the table is sent in full.

use std::sync::Arc;

use anabranch_proto::{
    Position,
    record::{self, Malformed, ValueRef},
};
use bytes::Bytes;

use super::TableView;
use crate::{
    catchup::{View, tables_of},
    definition::Definition,
    lookup::{self, Index, Lookup},
    mirror::{Error, Reader},
    policy::Policies,
    shape::Bound,
    table::Table,
    token::{Fingerprint, Proof},
};

/// A view whose definition is another one than the replica was shown its rows by.
pub struct Changed {
    view: Arc<TableView>,
    former: Arc<TableView>,
}

impl Changed {
    /// From one to the other, of one table.
    pub fn new(view: Arc<TableView>, former: Arc<TableView>) -> Changed {
        Changed { view, former }
    }
}

impl View for Changed {
    fn table(&self) -> &Arc<Table> {
        self.view.table()
    }

    fn contains(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, lookup::Error> {
        self.view.contains(row, lookup)
    }

    fn project(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        self.view.project(row)
    }

    fn bounds(&self) -> &[Bound] {
        self.view.bounds()
    }

    fn former(&self) -> Option<&dyn View> {
        Some(&*self.former)
    }

    /// Columns that the replica did not have are NULL in its table until it gets something else.
    fn held(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        if self.view.columns() == self.former.columns() {
            return self.view.project(row);
        }
        let had = self.former.columns();
        let mut held = Vec::with_capacity(self.view.columns().len());
        for column in self.view.columns() {
            held.push(match had.binary_search(column) {
                Ok(_) => record::value(row, *column)?,
                Err(_) => ValueRef::Null,
            });
        }
        Ok(record::build(held))
    }
}

/// For each of `views` what the replica was shown at the position of its proof, where that is something else and is known.
/// Within no snapshot.
pub fn find(
    reader: &mut Reader,
    views: &[Arc<TableView>],
    proof: &Proof,
) -> Result<Vec<Option<Arc<TableView>>>, Error> {
    let mut found = vec![None; views.len()];
    let present: Vec<Fingerprint> = views.iter().map(|view| view.fingerprint()).collect();
    let is_present = |fingerprint: &Fingerprint| present.contains(fingerprint);
    let proved = |fingerprint: &Fingerprint| proof.fingerprints.contains(fingerprint);
    if present.iter().all(proved) || proof.fingerprints.iter().all(is_present) {
        return Ok(found);
    }
    reader.begin()?;
    let looked = look(reader, views, proof, &present, &mut found);
    reader.end();
    looked.map(|()| found)
}

fn look(
    reader: &Reader,
    views: &[Arc<TableView>],
    proof: &Proof,
    present: &[Fingerprint],
    found: &mut [Option<Arc<TableView>>],
) -> Result<(), Error> {
    let tables: Vec<Arc<Table>> = (reader.entries()?.into_iter())
        .map(|entry| entry.table)
        .collect();
    let indexes = reader.indexes()?;
    for fingerprint in &proof.fingerprints {
        if present.contains(fingerprint) {
            continue;
        }
        let Some(text) = reader.definition(fingerprint)? else {
            continue;
        };
        let definition: Option<Definition> = serde_json::from_str(&text).ok();
        let Some(definition) = definition else {
            continue;
        };
        let place = (views.iter()).position(|view| Some(view.table().oid) == definition.table());
        let Some(place) = place.filter(|place| !proof.fingerprints.contains(&present[*place]))
        else {
            continue;
        };
        if let Some(former) = former(&definition, &tables, &indexes)
            && is_known(reader, &former, &indexes, proof.position)?
        {
            found[place] = Some(former);
        }
    }
    Ok(())
}

fn former(
    definition: &Definition,
    tables: &[Arc<Table>],
    indexes: &[Index],
) -> Option<Arc<TableView>> {
    let bounds = definition.bounds(tables, indexes)?;
    let named: Vec<_> = bounds
        .into_iter()
        .map(|bound| (String::new(), bound))
        .collect();
    let mut views = TableView::of(&named, &Policies::default()).ok()?;
    views.pop()
}

/// Whether it can be told what it showed at a position.
fn is_known(
    reader: &Reader,
    view: &TableView,
    indexes: &[Index],
    at: Position,
) -> Result<bool, Error> {
    for table in tables_of(view) {
        let is_followed = (reader.standing(table.oid)?).is_some_and(|standing| !standing.stopped);
        if !is_followed || !reader.reaches(table.oid, at)? {
            return Ok(false);
        }
    }
    let mut steps = (view.bounds().iter()).flat_map(|bound| bound.select.subqueries());
    Ok(steps.all(|step| {
        let inner = &step.subquery.inner;
        inner.parts.is_empty() || indexes.contains(inner)
    }))
}
