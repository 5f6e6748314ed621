//! Whether a table is still what we believe it is: Postgres' Relation message against the known [`Table`].
//!
//! Postgres describes a table before its first row on a connection, and again after anything about it may have
//! changed. Whatever differs and could change the meaning of a row is a reason to stop the table, and is named. The
//! order of columns is not: rows are read by name.
//!
//! What a Relation message does not tell, and thus is not noticed here: defaults, a column that was dropped and
//! added again with the same name and type, a primary key that is not the replica identity.

use std::sync::Arc;

use super::pgoutput::{Column, Relation};
use crate::table::{Identity, Table};

/// A followed table, and how its tuples come at present.
pub(super) struct Described {
    pub table: Arc<Table>,
    /// For each column of the table its place in a tuple; `None`: the same place.
    pub order: Option<Vec<usize>>,
    /// For each column of the table whether it is part of the replica identity.
    pub identity: Vec<bool>,
}

/// The differences, for a person, or how to read the rows.
pub(super) fn compare(table: &Arc<Table>, relation: &Relation<'_>) -> Result<Described, String> {
    let mut differences = Vec::new();
    if (relation.schema, relation.name) != (&table.schema, &table.name) {
        let (schema, name) = (relation.schema, relation.name);
        differences.push(format!("it is now called {schema}.{name}"));
    }

    let now: Vec<Column<'_>> = relation.columns.iter().collect();
    let mut order = Vec::with_capacity(now.len());
    let mut identity = vec![false; table.columns.len()];
    for place in table.identity_columns() {
        identity[place] = true;
    }
    let mut identity_differs = false;
    for (place, column) in table.columns.iter().enumerate() {
        let name = &column.name;
        let Some(index) = now.iter().position(|c| c.name == name) else {
            differences.push(format!(
                "column {name:?} was dropped, renamed or unpublished"
            ));
            continue;
        };
        order.push(index);
        if now[index].type_oid != column.type_oid {
            differences.push(format!(
                "the type of column {name:?} is no longer {} (OID {}), but that of OID {}",
                column.postgres_type, column.type_oid, now[index].type_oid
            ));
        } else if now[index].typmod != column.typmod {
            differences.push(format!(
                "the type modifier of column {name:?} ({}) changed from {} to {}",
                column.postgres_type, column.typmod, now[index].typmod
            ));
        }
        identity_differs |= now[index].key != identity[place];
    }
    for column in &now {
        if !table.columns.iter().any(|c| c.name == column.name) {
            differences.push(format!("column {:?} is new", column.name));
        }
    }
    let full = table.identity == Identity::Full;
    if identity_differs || full != (relation.identity == b'f') || relation.identity == b'n' {
        let keys = now.iter().filter(|c| c.key).map(|c| c.name);
        let columns = keys.collect::<Vec<_>>().join(", ");
        differences.push(match relation.identity {
            b'n' => "its replica identity is now NOTHING".to_owned(),
            b'f' => "its replica identity is now FULL".to_owned(),
            _ => format!("its replica identity is now ({columns})"),
        });
    }

    if !differences.is_empty() {
        return Err(differences.join("; "));
    }
    let in_order = order
        .iter()
        .enumerate()
        .all(|(place, index)| place == *index);
    Ok(Described {
        table: table.clone(),
        order: (!in_order).then_some(order),
        identity,
    })
}
