//! Names in the SQLite file, and the one function that quotes them.
//!
//! SQLite has one namespace for tables, views and indexes, and folds ASCII case in it; Postgres has a namespace for
//! each schema, and folds nothing. So two names of Postgres may meet here: for tables that is an error with both
//! names, an index quietly takes another one, since nobody asks for an index by name.

/// An identifier, quoted for SQL. Every identifier in every statement goes through here.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Identifiers, quoted, with commas between them.
pub(super) fn quote_all<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(quote).collect::<Vec<_>>().join(", ")
}

/// What Postgres' table is called in the file: `public.t` is `t`, `s.t` is `s.t`.
pub(super) fn table(schema: &str, name: &str) -> String {
    match schema {
        "public" => name.to_owned(),
        _ => format!("{schema}.{name}"),
    }
}

/// The view of a table's base rows.
pub(super) fn base_view(table: &str) -> String {
    format!("_anabranch_base_{table}")
}

/// Where the rows of a table of this purpose are kept, whatever it is called in Postgres.
pub(super) const RECEIPTS: &str = "_anabranch_receipts";
pub(super) const RECEIPTS_COLUMNS: [&str; 3] = ["replica", "seq", "hash"];
pub(super) const REJECTIONS: &str = "_anabranch_rejections";
pub(super) const REJECTIONS_COLUMNS: [&str; 8] = [
    "replica",
    "seq",
    "entry",
    "outcome",
    "sqlstate",
    "message",
    "constraint_name",
    "settled",
];

/// Where the triggers put what programs did to a table.
pub(super) fn entries(table: &str) -> String {
    format!("_anabranch_entries_{table}")
}

/// What Postgres has of the rows that programs changed.
pub(super) fn base_rows(table: &str) -> String {
    format!("_anabranch_saved_{table}")
}

/// The table of what an INSERT finds at its key while it runs.
pub(super) fn prior(table: &str) -> String {
    format!("_anabranch_prior_{table}")
}

/// Whether a name is one of ours.
pub(super) fn is_ours(name: &str) -> bool {
    fold(name).starts_with("_anabranch_")
}

/// A text, quoted for SQL.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// What all stages are called before their number.
pub(super) const STAGE_PREFIX: &str = "_anabranch_stage_";

/// Two names are one for SQLite if these are equal.
pub(super) fn fold(name: &str) -> String {
    name.to_ascii_lowercase()
}

/// Names that are SQLite's, or ours.
pub(super) fn is_reserved(name: &str) -> bool {
    let name = fold(name);
    name.starts_with("sqlite_") || name.starts_with("_anabranch_")
}

/// A name for a secondary index that is free: Postgres' own, else with the table's before it, else numbered.
pub(super) fn free_index<E>(
    wanted: &str,
    table: &str,
    mut is_taken: impl FnMut(&str) -> Result<bool, E>,
) -> Result<String, E> {
    if !is_reserved(wanted) && !is_taken(wanted)? {
        return Ok(wanted.to_owned());
    }
    let mut name = format!("{table}_{wanted}");
    let mut number = 1u64;
    while is_taken(&name)? {
        number += 1;
        name = format!("{table}_{wanted}_{number}");
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn a_quote_in_a_name_does_not_end_it() {
        assert_eq!(quote(r#"a"; DROP TABLE b"#), r#""a""; DROP TABLE b""#);
        assert_eq!(quote_all(["a", "b\"c"]), r#""a", "b""c""#);
    }

    #[test]
    fn a_taken_index_name_is_replaced_by_the_same_one_each_time() {
        let free = |taken: &[&str]| {
            free_index("i", "s.t", |name| {
                Ok::<_, Infallible>(taken.contains(&name))
            })
            .unwrap()
        };
        assert_eq!(free(&[]), "i");
        assert_eq!(free(&["i"]), "s.t_i");
        assert_eq!(free(&["i", "s.t_i"]), "s.t_i_2");
        assert_eq!(
            free_index("sqlite_i", "t", |_| Ok::<_, Infallible>(false)),
            Ok("t_sqlite_i".into())
        );
    }
}
