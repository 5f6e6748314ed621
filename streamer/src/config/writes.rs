//! What the config says of local writes: who makes them in Postgres, and how conflicts are settled.

use super::{
    read,
    tree::{self, Complaints, Entry, Node, Section, Value},
};
use crate::{
    policy::Wanted,
    write::{Conflict, Policy},
};

/// `auth.role`: the role of Postgres that writes run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// The claim that names it.
    pub claim: String,
    /// The names that it may have. Nobody becomes any other role, whatever the token says.
    pub allowed: Vec<String>,
}

const CONFLICTS: &str =
    "must be \"last-write\", \"first-write\", \"add\" or { function = \"schema.name\" }";
const COLUMN_CONFLICTS: &str = "must be \"last-write\", \"first-write\" or \"add\"";

/// `schema.name`, or a name in `public`.
pub(super) fn qualified(name: &str) -> (String, String) {
    match name.split_once('.') {
        Some((schema, name)) => (schema.to_owned(), name.to_owned()),
        None => ("public".to_owned(), name.to_owned()),
    }
}

pub(super) fn role(mut section: Section<'_>, complaints: &Complaints) -> Option<Role> {
    let origin = section.origin.clone();
    let claim = section.text("claim").map(|claim| claim.text);
    let field = section.field("allowed");
    let allowed: Vec<String> = section
        .list("allowed")
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .filter_map(|(i, node)| tree::text(node, &format!("{field}[{i}]"), complaints))
        .map(|role| role.text)
        .collect();
    let path = section.path.clone();
    section.finish();
    match claim {
        Some(claim) if !claim.is_empty() && !allowed.is_empty() => Some(Role { claim, allowed }),
        _ => {
            let message = "must be { claim = \"NAME\", allowed = [\"ROLE\", …] }: a token names the role, and nobody \
                           becomes one that is not listed";
            complaints.add(&origin, &path, message);
            None
        }
    }
}

pub(super) fn policies(mut section: Section<'_>, complaints: &Complaints) -> Wanted {
    let mut policies = Wanted::new();
    for (name, Entry { key, node }) in section.rest() {
        let field = section.field(&name);
        let Some(mut table) = Section::new(&field, node, complaints) else {
            continue;
        };
        let mut policy = Policy::default();
        if let Some(node) = table.take("conflict") {
            policy.table = conflict(node, &table.field("conflict"), true, complaints);
        }
        if let Some(mut columns) = table.section("column") {
            for (column, entry) in columns.rest() {
                let field = columns.field(&column);
                let conflict = conflict(entry.node, &field, false, complaints);
                policy.columns.insert(column, conflict);
            }
        }
        table.finish();
        if matches!(policy.table, Conflict::Function(_)) && !policy.columns.is_empty() {
            let message = "a function decides on whole rows: its table can't have columns of their own policy";
            complaints.add(&key, &field, message);
        }
        if policies.insert(qualified(&name), policy).is_some() {
            complaints.add(&key, &field, "the same table is named twice");
        }
    }
    policies
}

/// `is_table`: of a whole table, which alone may have a function.
fn conflict(node: Node, field: &str, is_table: bool, complaints: &Complaints) -> Conflict {
    let origin = node.origin.clone();
    let found = match node.value {
        Value::Text(text) | Value::Variable(text) => match &*text {
            "last-write" => Some(Conflict::LastWrite),
            "first-write" => Some(Conflict::FirstWrite),
            "add" => Some(Conflict::Add),
            _ => None,
        },
        Value::Table(mut entries) if is_table && entries.len() == 1 => {
            match entries.remove("function").map(|entry| entry.node.value) {
                Some(Value::Text(name)) if is_function(&name) => {
                    let (schema, name) = qualified(&name);
                    Some(Conflict::Function(format!("{schema}.{name}")))
                }
                _ => None,
            }
        }
        _ => None,
    };
    found.unwrap_or_else(|| {
        let message = if is_table {
            CONFLICTS
        } else {
            COLUMN_CONFLICTS
        };
        complaints.add(&origin, field, message);
        Conflict::default()
    })
}

fn is_function(name: &str) -> bool {
    let (schema, name) = qualified(name);
    [schema, name]
        .iter()
        .all(|part| (1..=read::NAME_BYTES_MAX).contains(&part.len()) && !part.contains(['.', '\0']))
}
