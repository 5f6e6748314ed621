//! Which rule each column of a table has for conflicting writes: the config's policies, by the tables as they are.

use std::{collections::HashMap, sync::Arc};

use crate::{
    config::{Conflict, Policies},
    table::{Kind, Oid, Table},
};

/// The rule of each column, by table; a table without has [`Conflict::LastWrite`] throughout.
#[derive(Clone, Debug, Default)]
pub struct Rules(HashMap<Oid, Arc<[Conflict]>>);

impl Rules {
    /// Refuses a policy for what is not there, or for what it can't be exact on.
    pub fn new(policies: &Policies, tables: &[Arc<Table>]) -> Result<Rules, Vec<String>> {
        let mut rules = HashMap::new();
        let mut refused = Vec::new();
        for ((schema, name), policy) in policies {
            let full_name = format!("{schema}.{name}");
            let found = tables
                .iter()
                .find(|table| table.schema == *schema && table.name == *name);
            let Some(table) = found else {
                refused.push(format!(
                    "[table.\"{full_name}\"]: no shape has a table of that name"
                ));
                continue;
            };
            for column in policy.columns.keys() {
                if !table.columns.iter().any(|other| other.name == *column) {
                    refused.push(format!(
                        "[table.\"{full_name}\"]: it has no column `{column}`"
                    ));
                }
            }
            let rule = |column: &crate::table::Column| {
                (policy.columns.get(&column.name)).unwrap_or(&policy.conflict)
            };
            for (place, column) in table.columns.iter().enumerate() {
                let is_added = *rule(column) == Conflict::Add;
                // A whole table's rule means those that it can.
                let is_named = policy.columns.contains_key(&column.name);
                if is_added && is_named && (!is_number(&column.kind) || table.key.contains(&place))
                {
                    refused.push(format!(
                        "[table.\"{full_name}\"]: column `{}` can't have \"add\": it is no integer or numeric column \
                         outside of the key, for which alone adding is exact",
                        column.name
                    ));
                }
            }
            let of_columns = table.columns.iter().enumerate().map(|(place, column)| {
                let rule = rule(column);
                let can_add = is_number(&column.kind) && !table.key.contains(&place);
                match rule {
                    Conflict::Add if !can_add => Conflict::LastWrite,
                    rule => rule.clone(),
                }
            });
            rules.insert(table.oid, of_columns.collect());
        }
        match refused.is_empty() {
            true => Ok(Rules(rules)),
            false => Err(refused),
        }
    }

    /// The rules of a table's columns; `None`: the last write, for all.
    pub fn of(&self, table: Oid) -> Option<&Arc<[Conflict]>> {
        self.0.get(&table)
    }
}

/// Sums of these are exact, here and in Postgres.
fn is_number(kind: &Kind) -> bool {
    matches!(kind, Kind::Integer | Kind::Numeric)
}
