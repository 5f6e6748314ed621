//! What one replica may write. Pure.

use std::{collections::HashMap, sync::Arc};

use super::super::sql::identifier;
use crate::{shape::Bound, table::Table, write::Policy};

/// What one replica may write: a table that is not in it may not be written.
#[derive(Debug, Default)]
pub struct Rules {
    tables: HashMap<String, HashMap<String, Arc<Rule>>>,
}

/// What one replica may write of one table.
pub struct Rule {
    /// The table.
    pub table: Arc<Table>,
    /// Places of the columns that may be written.
    pub columns: Vec<usize>,
    /// What happens where Postgres has changed the same.
    pub policy: Policy,
    /// The condition that its rows must meet, before and after; it holds values of parameters.
    shown: Option<String>,
}

impl Rule {
    /// `bounds` are the SELECTs over the table that the replica is bound to: a row may be written that any of them
    /// shows.
    pub fn new(table: Arc<Table>, columns: Vec<usize>, bounds: &[Bound], policy: Policy) -> Rule {
        let condition = |bound: &Bound| bound.condition_sql(super::statement::TABLE);
        let conditions: Vec<_> = bounds.iter().map(condition).collect();
        let shown = if conditions.is_empty() {
            // It is bound to nothing, so it is shown nothing.
            Some("FALSE".to_owned())
        } else if conditions.iter().any(|condition| condition == "TRUE") {
            None
        } else {
            Some(format!("(({}) IS TRUE)", conditions.join(" OR ")))
        };
        Rule {
            table,
            columns,
            policy,
            shown,
        }
    }

    /// The condition, true or false, over the table's columns; `None`: every row meets it.
    pub(super) fn shown(&self) -> Option<&str> {
        self.shown.as_deref()
    }

    /// The table's name, quoted.
    pub(super) fn qualified(&self) -> String {
        let Table { schema, name, .. } = &*self.table;
        format!("{}.{}", identifier(schema), identifier(name))
    }
}

/// Never shows the condition.
impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rule")
            .field("table", &self.table.full_name())
            .finish_non_exhaustive()
    }
}

impl Rules {
    /// Allows what `rule` says; replaces what was said of the table.
    pub fn allow(&mut self, rule: Rule) {
        let tables = self.tables.entry(rule.table.schema.clone()).or_default();
        tables.insert(rule.table.name.clone(), Arc::new(rule));
    }

    /// What may be done with a table.
    pub fn of(&self, schema: &str, name: &str) -> Option<&Arc<Rule>> {
        self.tables.get(schema)?.get(name)
    }
}
