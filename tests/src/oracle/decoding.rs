//! The lines of `test_decoding`.

/// A value as the plugin prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// NULL.
    Null,
    /// A TOASTed value that the UPDATE did not change, and that is not printed.
    Unchanged,
    /// What the type's output function gave.
    Text(String),
}

/// Columns by name.
pub(super) type Tuple = Vec<(String, Value)>;

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// `BEGIN`, or one that is not about rows.
    Other,
    /// `COMMIT`.
    Commit,
    /// A row of the table with this place among those asked for.
    Row(usize, Operation),
    /// TRUNCATE of these.
    Truncate(Vec<usize>),
}

/// What happened to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Insert(Tuple),
    /// The old key, if it changed (or all of the old row, under `REPLICA IDENTITY FULL`), and the new row.
    Update(Option<Tuple>, Tuple),
    Delete(Tuple),
}

/// Reads a line. `tables`: names as `quote_ident` writes them, with their schemas. `None`: it can't be read.
pub(super) fn parse(line: &str, tables: &[String]) -> Option<Line> {
    if line == "COMMIT" || line.starts_with("COMMIT ") {
        return Some(Line::Commit);
    }
    let Some(rest) = line.strip_prefix("table ") else {
        return Some(Line::Other);
    };
    // A name may hold anything, so it is looked for, not read.
    for (place, table) in tables.iter().enumerate() {
        let Some(rest) = rest.strip_prefix(table.as_str()) else {
            continue;
        };
        if let Some(row) = rest.strip_prefix(": INSERT: ") {
            return Some(Line::Row(place, Operation::Insert(tuple(row)?)));
        }
        if let Some(row) = rest.strip_prefix(": DELETE: ") {
            return Some(Line::Row(place, Operation::Delete(tuple(row)?)));
        }
        if let Some(rows) = rest.strip_prefix(": UPDATE: ") {
            let operation = match rows.strip_prefix("old-key: ") {
                Some(mut rows) => {
                    let old = columns(&mut rows)?;
                    let new = rows.strip_prefix("new-tuple: ")?;
                    Operation::Update(Some(old), tuple(new)?)
                }
                None => Operation::Update(None, tuple(rows)?),
            };
            return Some(Line::Row(place, operation));
        }
    }
    if let Some((names, _)) = rest.rsplit_once(": TRUNCATE: ") {
        let names: Vec<_> = names.split(", ").collect();
        let ours = (0..tables.len()).filter(|&place| names.contains(&tables[place].as_str()));
        let ours: Vec<_> = ours.collect();
        if !ours.is_empty() {
            return Some(Line::Truncate(ours));
        }
    }
    Some(Line::Other)
}

fn tuple(mut text: &str) -> Option<Tuple> {
    let columns = columns(&mut text)?;
    text.is_empty().then_some(columns)
}

/// Takes `name[type]:value` as long as they come.
fn columns(text: &mut &str) -> Option<Tuple> {
    let mut columns = Vec::new();
    while !text.is_empty() && !text.starts_with("new-tuple: ") {
        let name = name(text)?;
        *text = text.strip_prefix('[')?;
        // A type can end in brackets, but then they are followed by the closing one.
        let (_, rest) = text.split_once("]:")?;
        *text = rest;
        columns.push((name, value(text)?));
        *text = text.strip_prefix(' ').unwrap_or(text);
    }
    Some(columns)
}

fn name(text: &mut &str) -> Option<String> {
    if text.starts_with('"') {
        return quoted(text, '"');
    }
    let (name, _) = text.split_once('[')?;
    *text = &text[name.len()..];
    Some(name.to_owned())
}

fn value(text: &mut &str) -> Option<Value> {
    // Bits are printed as B'…'.
    if text.starts_with("B'") {
        *text = &text[1..];
    }
    if text.starts_with('\'') {
        return quoted(text, '\'').map(Value::Text);
    }
    let end = text.find(' ').unwrap_or(text.len());
    let (bare, rest) = text.split_at(end);
    *text = rest;
    Some(match bare {
        "null" => Value::Null,
        "unchanged-toast-datum" => Value::Unchanged,
        _ => Value::Text(bare.to_owned()),
    })
}

/// Takes a text between two quotes, in which each quote is doubled.
fn quoted(text: &mut &str, quote: char) -> Option<String> {
    let mut rest = text.strip_prefix(quote)?;
    let mut content = String::new();
    loop {
        let (part, after) = rest.split_once(quote)?;
        content.push_str(part);
        match after.strip_prefix(quote) {
            Some(after) => {
                content.push(quote);
                rest = after;
            }
            None => {
                *text = after;
                return Some(content);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.into())
    }

    #[test]
    fn names_and_values_that_hold_the_separators() {
        let tables = ["public.t".into(), r#"public."t: INSERT: x""#.into()];
        let line = r#"table public."t: INSERT: x": INSERT: id[integer]:-1 "a [b]:"[character varying[]]:'{"it''s ]: x"}' n[numeric]:1.50 b[bit]:B'01' x[text]:null"#;
        let expected = vec![
            ("id".into(), text("-1")),
            ("a [b]:".into(), text(r#"{"it's ]: x"}"#)),
            ("n".into(), text("1.50")),
            ("b".into(), text("01")),
            ("x".into(), Value::Null),
        ];
        assert_eq!(
            parse(line, &tables),
            Some(Line::Row(1, Operation::Insert(expected)))
        );
    }

    #[test]
    fn an_update_of_a_key_and_a_value_that_looks_like_one() {
        let tables = ["public.t".into()];
        let line = "table public.t: UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:2 a[text]:' new-tuple: ' b[text]:unchanged-toast-datum";
        let new = vec![
            ("id".into(), text("2")),
            ("a".into(), text(" new-tuple: ")),
            ("b".into(), Value::Unchanged),
        ];
        let old = Some(vec![("id".into(), text("1"))]);
        assert_eq!(
            parse(line, &tables),
            Some(Line::Row(0, Operation::Update(old, new)))
        );
    }

    #[test]
    fn a_truncate_of_several_tables() {
        let tables = ["public.b".into(), "public.a".into()];
        let line = "table public.a, public.c, public.b: TRUNCATE: restart_seqs cascade";
        assert_eq!(parse(line, &tables), Some(Line::Truncate(vec![0, 1])));
        assert_eq!(
            parse("table public.c: TRUNCATE: (no-flags)", &tables),
            Some(Line::Other)
        );
    }
}
