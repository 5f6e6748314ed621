//! What changed about a table, for a person. Pure.

use crate::table::{Column, Identity, Table};

/// The first change that matters for rows that are already here: to their table's name, columns, key or identity.
/// `None`: rows of `known` and `now` mean the same. Indexes do not matter for that, nor does how a table counts its
/// versions.
pub fn difference(known: &Table, now: &Table) -> Option<String> {
    if known.oid != now.oid {
        return Some(format!("{} was dropped, and made again", known.full_name()));
    }
    if (&known.schema, &known.name) != (&now.schema, &now.name) {
        return Some(format!(
            "it was renamed from {} to {}",
            known.full_name(),
            now.full_name()
        ));
    }
    let same = |column: &Column, table: &Table| {
        table
            .columns
            .iter()
            .find(|other| other.attnum == column.attnum)
            .cloned()
    };
    for column in &known.columns {
        match same(column, now) {
            None => return Some(format!("the column {} was dropped", column.name)),
            Some(now) => {
                if let Some(changed) = column_difference(column, &now) {
                    return Some(changed);
                }
            }
        }
    }
    if let Some(column) = now
        .columns
        .iter()
        .find(|column| same(column, known).is_none())
    {
        return Some(format!("the column {} was added", column.name));
    }
    if known.key != now.key {
        return Some(format!(
            "its key changed from ({}) to ({})",
            names(known, &known.key),
            names(now, &now.key)
        ));
    }
    if known.identity != now.identity {
        return Some(format!(
            "its replica identity changed from {} to {}",
            identity(known),
            identity(now)
        ));
    }
    None
}

fn column_difference(known: &Column, now: &Column) -> Option<String> {
    let name = &known.name;
    if *name != now.name {
        return Some(format!("the column {name} was renamed to {}", now.name));
    }
    if (known.type_oid, known.typmod) != (now.type_oid, now.typmod) {
        let (from, to) = (&known.postgres_type, &now.postgres_type);
        return Some(format!(
            "the type of the column {name} changed from {from} to {to}"
        ));
    }
    if known.kind != now.kind {
        // The type is the same, so what it is made of changed: labels of an enum, the base of a domain.
        return Some(format!(
            "the type {} of the column {name} was altered",
            now.postgres_type
        ));
    }
    if known.collation != now.collation {
        return Some(format!("the collation of the column {name} changed"));
    }
    match (known.not_null, now.not_null) {
        (true, false) => Some(format!("the column {name} may be NULL now")),
        (false, true) => Some(format!("the column {name} is NOT NULL now")),
        _ => None,
    }
}

fn names(table: &Table, places: &[usize]) -> String {
    let names = places.iter().filter_map(|place| table.columns.get(*place));
    names
        .map(|column| column.name.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

fn identity(table: &Table) -> String {
    match &table.identity {
        Identity::Key => "the key".to_owned(),
        Identity::Index(columns) => format!("an index on ({})", names(table, columns)),
        Identity::Full => "FULL".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Collation, Index, Kind};

    fn table() -> Table {
        let column = |attnum: i16, name: &str| Column {
            name: name.into(),
            attnum,
            type_oid: 25,
            base_oid: 25,
            typmod: -1,
            postgres_type: "text".into(),
            kind: Kind::Text,
            not_null: false,
            collation: Collation::Deterministic,
        };
        Table {
            oid: 100_000,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![column(1, "a"), column(3, "b")],
            key: vec![0],
            identity: Identity::Key,
            indexes: vec![],
            version: 1,
        }
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Table), expect: &str) {
        let mut now = table();
        change(&mut now);
        assert_eq!(difference(&table(), &now).as_deref(), Some(expect));
    }

    #[test]
    fn every_change_that_matters_is_named() {
        check(|t| t.oid = 7, "public.t was dropped, and made again");
        check(
            |t| t.name = "u".into(),
            "it was renamed from public.t to public.u",
        );
        check(
            |t| t.schema = "s".into(),
            "it was renamed from public.t to s.t",
        );
        check(|t| drop(t.columns.pop()), "the column b was dropped");
        check(
            |t| {
                let mut added = t.columns[1].clone();
                (added.attnum, added.name) = (4, "c".into());
                t.columns.push(added);
            },
            "the column c was added",
        );
        // Dropped and added again under its name: not the same column.
        check(|t| t.columns[1].attnum = 4, "the column b was dropped");
        check(
            |t| t.columns[1].name = "c".into(),
            "the column b was renamed to c",
        );
        check(
            |t| (t.columns[1].type_oid, t.columns[1].postgres_type) = (1043, "varchar".into()),
            "the type of the column b changed from text to varchar",
        );
        check(
            |t| (t.columns[1].typmod, t.columns[1].postgres_type) = (9, "varchar(5)".into()),
            "the type of the column b changed from text to varchar(5)",
        );
        check(
            |t| t.columns[1].kind = Kind::Enum(vec!["x".into()]),
            "the type text of the column b was altered",
        );
        check(
            |t| t.columns[1].collation = Collation::Bytes,
            "the collation of the column b changed",
        );
        check(
            |t| t.columns[1].not_null = true,
            "the column b is NOT NULL now",
        );
        check(|t| t.key = vec![1, 0], "its key changed from (a) to (b, a)");
        check(
            |t| t.identity = Identity::Index(vec![0, 1]),
            "its replica identity changed from the key to an index on (a, b)",
        );
        check(
            |t| t.identity = Identity::Full,
            "its replica identity changed from the key to FULL",
        );
        let mut strict = table();
        strict.columns[1].not_null = true;
        assert_eq!(
            difference(&strict, &table()).as_deref(),
            Some("the column b may be NULL now")
        );
    }

    #[test]
    fn what_does_not_change_rows_is_no_difference() {
        let mut now = table();
        now.version = 7;
        now.indexes.push(Index {
            name: "i".into(),
            columns: vec![1],
        });
        // As `format_type()` prints it under another search path.
        now.columns[0].postgres_type = "pg_catalog.text".into();
        assert_eq!(difference(&table(), &now), None);
    }
}
