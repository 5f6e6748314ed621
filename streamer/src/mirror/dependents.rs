//! Tables that can't be told of without others, as conditions of their shapes look into those. Where such another one stops,
//! nobody knows any more which of their rows who may see: so they stop with it, in the same transaction.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use super::{Error, Mirror, State, rows::Rows};
use crate::table::Oid;

/// By table: those that can't be told of without it.
pub(super) type Dependents = HashMap<Oid, Vec<Oid>, FixedState>;

impl Mirror {
    /// From here on, each of these tables (the second) is stopped when that which it can't do without (the first) is; at once,
    /// where that one is stopped already. To be said at each start. Durable when it returns.
    pub fn set_dependents(&mut self, pairs: &[(Oid, Oid)]) -> Result<(), Error> {
        self.dependents.clear();
        for (needed, dependent) in pairs
            .iter()
            .filter(|(needed, dependent)| needed != dependent)
        {
            let dependents = self.dependents.entry(*needed).or_default();
            if !dependents.contains(dependent) {
                dependents.push(*dependent);
            }
        }
        let is_stopped = |rows: &&Rows| matches!(rows.entry.state, State::Stopped { .. });
        let stopped: Vec<Oid> = (self.tables.values().filter(is_stopped))
            .map(|rows| rows.table().oid)
            .collect();
        for table in stopped {
            for (dependent, reason) in with(&self.tables, &self.dependents, table) {
                self.stop_table(dependent, &reason)?;
            }
        }
        self.commit()
    }
}

/// What must stop with a table: those that are followed, or still being copied, each with the reason.
pub(super) fn with(
    tables: &HashMap<Oid, Rows, FixedState>,
    dependents: &Dependents,
    table: Oid,
) -> Vec<(Oid, String)> {
    let mut found: Vec<(Oid, String)> = Vec::new();
    let mut stopping = vec![table];
    while let Some(needed) = stopping.pop() {
        let Some(name) = tables.get(&needed).map(|rows| rows.table().full_name()) else {
            continue;
        };
        for dependent in dependents.get(&needed).into_iter().flatten() {
            let is_new = *dependent != table && !found.iter().any(|(other, _)| other == dependent);
            let stands = tables.get(dependent).map(|rows| &rows.entry.state);
            if is_new && matches!(stands, Some(State::Live | State::Copying)) {
                let reason =
                    format!("a condition of its shape looks into {name}, which is stopped");
                found.push((*dependent, reason));
                stopping.push(*dependent);
            }
        }
    }
    found
}
