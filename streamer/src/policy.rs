//! How conflicting writes to each table are settled: the config's policies, by the tables as they are.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    table::{Column, Kind, Oid, Table},
    write::{Conflict, Policy},
};

/// The tables that the config has a policy for, by schema and name.
pub type Wanted = BTreeMap<(String, String), Policy>;

/// The policy of each table; of one that is not there the last write counts.
#[derive(Clone, Debug, Default)]
pub struct Policies(HashMap<Oid, Arc<Policy>>);

impl Policies {
    /// Refuses a policy for what is not there, or for what it can't be exact on.
    pub fn new(wanted: &Wanted, tables: &[Arc<Table>]) -> Result<Policies, Vec<String>> {
        let mut policies = HashMap::new();
        let mut refused = Vec::new();
        for ((schema, name), policy) in wanted {
            let mut refuse = |what: String| {
                refused.push(format!("[table.\"{schema}.{name}\"]: {what}"));
            };
            let is_it = |table: &&Arc<Table>| table.schema == *schema && table.name == *name;
            let Some(table) = tables.iter().find(is_it) else {
                refuse("no shape has a table of that name".into());
                continue;
            };
            for (column, conflict) in &policy.columns {
                match table.columns.iter().position(|known| known.name == *column) {
                    None => refuse(format!("it has no column `{column}`")),
                    Some(place) if *conflict == Conflict::Add && !adds(table, place) => {
                        refuse(format!(
                            "column `{column}` can't have \"add\": only of integer and numeric columns outside of the key \
                             sums are exact"
                        ));
                    }
                    Some(_) => {}
                }
            }
            policies.insert(table.oid, Arc::new(resolved(policy, table)));
        }
        match refused.is_empty() {
            true => Ok(Policies(policies)),
            false => Err(refused),
        }
    }

    /// That of a table.
    pub fn of(&self, table: Oid) -> Option<&Arc<Policy>> {
        self.0.get(&table)
    }
}

/// By column. What is said of a whole table means those of its columns for which it can be exact.
fn resolved(policy: &Policy, table: &Table) -> Policy {
    let of_column = |(place, column): (usize, &Column)| {
        let conflict = match policy.of(&column.name) {
            Conflict::Add if !adds(table, place) => Conflict::LastWrite,
            conflict => conflict.clone(),
        };
        (column.name.clone(), conflict)
    };
    match &policy.table {
        function @ Conflict::Function(_) => Policy {
            table: function.clone(),
            columns: HashMap::new(),
        },
        _ => Policy {
            table: Conflict::LastWrite,
            columns: table.columns.iter().enumerate().map(of_column).collect(),
        },
    }
}

/// Whether differences of a column add up exactly, here and in Postgres.
fn adds(table: &Table, place: usize) -> bool {
    let kind = &table.columns[place].kind;
    matches!(kind, Kind::Integer | Kind::Numeric) && !table.key.contains(&place)
}
