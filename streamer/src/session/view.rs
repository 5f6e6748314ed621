//! What one replica sees of one table.

use std::sync::Arc;

use anabranch_proto::record::Malformed;
use aws_lc_rs::digest;
use bytes::Bytes;

use crate::{
    catchup::View,
    lookup::{self, Lookup},
    policy::Policies,
    postgres::writer::Rule,
    shape::Bound,
    table::Table,
    write::Policy,
};

/// What one replica sees of one table: a row is in if any of its SELECTs has it.
pub struct TableView {
    table: Arc<Table>,
    bounds: Vec<Bound>,
    policy: Option<Arc<Policy>>,
}

impl TableView {
    /// One view for each table of `bounds` (each with its shape's name), in the order of OIDs. The columns of all
    /// SELECTs of a table must be the same, since its rows are one table in the replica.
    pub fn of(
        bounds: &[(String, Bound)],
        policies: &Policies,
    ) -> Result<Vec<Arc<TableView>>, ColumnsDiffer> {
        let mut bounds: Vec<_> = bounds.iter().collect();
        bounds.sort_by_key(|(_, bound)| bound.select.table.oid);
        bounds
            .chunk_by(|(_, a), (_, b)| a.select.table.oid == b.select.table.oid)
            .map(|of_table| {
                let (shape, first) = of_table[0];
                let columns = &first.select.columns;
                if let Some((other, _)) =
                    of_table.iter().find(|(_, b)| b.select.columns != *columns)
                {
                    return Err(ColumnsDiffer {
                        shapes: [shape.clone(), other.clone()],
                        table: first.select.table.full_name(),
                    });
                }
                Ok(Arc::new(TableView {
                    table: first.select.table.clone(),
                    bounds: of_table.iter().map(|(_, bound)| bound.clone()).collect(),
                    policy: policies.of(first.select.table.oid).cloned(),
                }))
            })
            .collect()
    }

    /// Places of the columns that the replica gets.
    pub fn columns(&self) -> &[usize] {
        &self.bounds[0].select.columns
    }

    /// Whether the replica may write rows of this table.
    pub fn is_writable(&self) -> bool {
        self.bounds.iter().any(|bound| bound.select.writable)
    }

    /// What it may write of it, if anything: rows that its writable SELECTs show.
    pub fn rule(&self) -> Option<Rule> {
        let writable = self.bounds.iter().filter(|bound| bound.select.writable);
        let bounds: Vec<Bound> = writable.cloned().collect();
        (!bounds.is_empty()).then(|| {
            Rule::new(
                self.table.clone(),
                self.columns().to_vec(),
                &bounds,
                self.policy().cloned().unwrap_or_default(),
            )
        })
    }

    /// How conflicting writes are settled; `None`: by the last write.
    pub fn policy(&self) -> Option<&Policy> {
        self.policy.as_deref()
    }

    /// Tells what the replica holds of this table if it is up to date: the fingerprints of its SELECTs.
    pub fn fingerprint(&self) -> [u8; 16] {
        let mut fingerprints: Vec<_> = self.bounds.iter().map(Bound::fingerprint).collect();
        fingerprints.sort_unstable();
        fingerprints.dedup();
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.table.oid.to_be_bytes());
        fingerprints.iter().for_each(|one| context.update(one));
        let digest = context.finish();
        let mut first = [0; 16];
        first.copy_from_slice(&digest.as_ref()[..16]);
        first
    }
}

/// Two subscriptions of one replica name different columns of one table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "shapes `{}` and `{}` name different columns of table {table}; in one replica they must be the same",
    shapes[0], shapes[1]
)]
pub struct ColumnsDiffer {
    /// Their names.
    pub shapes: [String; 2],
    /// The table.
    pub table: String,
}

impl View for TableView {
    fn table(&self) -> &Arc<Table> {
        &self.table
    }

    fn contains(&self, row: &[u8], lookup: &dyn Lookup) -> Result<bool, lookup::Error> {
        for bound in &self.bounds {
            if bound.contains(row, lookup)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn project(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        self.bounds[0].select.project(row)
    }

    fn bounds(&self) -> &[Bound] {
        &self.bounds
    }
}
