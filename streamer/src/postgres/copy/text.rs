//! Rows as COPY prints them in its text format: columns between tabs, `\N` for NULL, backslash escapes.
//!
//! Source: <https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS-TEXT>. COPY TO writes only the
//! escapes `\\`, `\b`, `\f`, `\n`, `\r`, `\t`, `\v` and the NULL marker; any other is refused. Never panics.

use anabranch_proto::record::Builder;

use crate::{postgres::convert, table::Column};

/// A row can't be read. Never says what is in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// It has more or fewer columns than were asked for, or an unknown escape.
    #[error("a row that is not in COPY's text format, or has other columns")]
    Malformed,
    /// A value does not convert.
    #[error("column {0}: {1}")]
    Value(String, convert::Unconvertible),
}

/// Reads one row, with or without its line break, and adds its values to `builder`. `scratch` is kept by the caller
/// only so that it need not be allocated again.
pub fn read(
    line: &[u8],
    columns: &[Column],
    scratch: &mut Vec<u8>,
    builder: &mut Builder,
) -> Result<(), Unreadable> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut fields = line.split(|&byte| byte == b'\t');
    // Most rows have no backslash at all.
    let escaped = line.contains(&b'\\');
    for column in columns {
        let field = fields.next().ok_or(Unreadable::Malformed)?;
        let value = if !escaped || !field.contains(&b'\\') {
            field
        } else if field == b"\\N" {
            builder.push_null();
            continue;
        } else {
            unescape(field, scratch)?;
            &scratch[..]
        };
        convert::push(builder, &column.kind, value)
            .map_err(|error| Unreadable::Value(column.name.clone(), error))?;
    }
    match fields.next() {
        None => Ok(()),
        Some(_) => Err(Unreadable::Malformed),
    }
}

fn unescape(field: &[u8], out: &mut Vec<u8>) -> Result<(), Unreadable> {
    out.clear();
    let mut rest = field;
    while let Some(at) = rest.iter().position(|&byte| byte == b'\\') {
        out.extend_from_slice(&rest[..at]);
        out.push(match rest.get(at + 1) {
            Some(b'\\') => b'\\',
            Some(b'b') => 0x08,
            Some(b'f') => 0x0C,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'v') => 0x0B,
            _ => return Err(Unreadable::Malformed),
        });
        rest = &rest[at + 2..];
    }
    out.extend_from_slice(rest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use anabranch_proto::record::{ValueRef, values};
    use proptest::prelude::*;

    use super::*;
    use crate::table::{Collation, Kind};

    fn columns(count: usize) -> Vec<Column> {
        (0..count)
            .map(|i| Column {
                name: format!("c{i}"),
                attnum: i as i16 + 1,
                type_oid: 25,
                base_oid: 25,
                typmod: -1,
                postgres_type: "text".into(),
                kind: Kind::Text,
                not_null: false,
                collation: Collation::Bytes,
            })
            .collect()
    }

    fn texts(line: &[u8], count: usize) -> Result<Vec<Option<String>>, Unreadable> {
        let mut builder = Builder::new();
        read(line, &columns(count), &mut Vec::new(), &mut builder)?;
        let record = builder.finish();
        Ok(values(&record)
            .expect("record")
            .map(|value| match value.expect("value") {
                ValueRef::Null => None,
                ValueRef::Text(text) => Some(text.to_owned()),
                other => panic!("{other:?}"),
            })
            .collect())
    }

    #[test]
    fn null_is_told_from_an_empty_text_and_from_a_text_that_looks_like_it() {
        let read = texts(b"\\N\t\t\\\\N\tN\n", 4).expect("row");
        assert_eq!(
            read,
            [None, Some("".into()), Some("\\N".into()), Some("N".into())]
        );
    }

    #[test]
    fn all_escapes_are_undone() {
        let read = texts(b"a\\b\\f\\n\\r\\t\\v\\\\z", 1).expect("row");
        assert_eq!(read, [Some("a\u{8}\u{c}\n\r\t\u{b}\\z".into())]);
    }

    #[test]
    fn what_copy_never_writes_is_refused() {
        for (line, count) in [
            (&b"a\tb"[..], 1),
            (b"a", 2),
            (b"", 2),
            (b"\\x41", 1),
            (b"\\101", 1),
            (b"\\", 1),
            (b"\\Nx", 1),
            (b"x\\N", 1),
            (b"\\.", 1),
        ] {
            assert_eq!(texts(line, count), Err(Unreadable::Malformed), "{line:?}");
        }
        let value = texts(b"\xFF", 1);
        assert!(matches!(value, Err(Unreadable::Value(name, _)) if name == "c0"));
    }

    /// As `CopyAttributeOutText` in Postgres' copyto.c does it.
    fn escape(text: &str) -> String {
        let mut out = String::new();
        for char in text.chars() {
            match char {
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{b}' => out.push_str("\\v"),
                '\\' => out.push_str("\\\\"),
                other => out.push(other),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn whatever_is_escaped_is_read_back(row in prop::collection::vec(prop::option::of("[^\0]*"), 1..6)) {
            let line: Vec<String> = row.iter()
                .map(|value| value.as_deref().map_or("\\N".into(), escape))
                .collect();
            let line = format!("{}\n", line.join("\t"));
            prop_assert_eq!(texts(line.as_bytes(), row.len()).expect("row"), row);
        }

        #[test]
        fn any_bytes_are_read_without_panic(line: Vec<u8>, count in 0usize..5) {
            let mut builder = Builder::new();
            let _ = read(&line, &columns(count), &mut Vec::new(), &mut builder);
        }

        #[test]
        fn any_escapes_are_read_without_panic(line in "[\\\\Nbnt\t\n]*", count in 0usize..5) {
            let mut builder = Builder::new();
            let _ = read(line.as_bytes(), &columns(count), &mut Vec::new(), &mut builder);
        }
    }
}
