//! What a replica must be told about one row: the truth table. Pure.
//!
//! It is the one place where exactness is decided, for live transactions and for catch-ups alike. It does not
//! evaluate conditions: whether the row was in the shape, and is in it, was found out before, over two states
//! of the mirror. It knows no replica, so what it says holds for all that see the same columns under that answer.
//!
//! | was | is  | told                                                              |
//! |-----|-----|-------------------------------------------------------------------|
//! | no  | no  | nothing, ever: that the key exists is already more than it may know |
//! | no  | yes | upsert                                                            |
//! | yes | no  | delete: the key, and none of the new values                       |
//! | yes | yes | upsert, or nothing where the columns that it sees are the same     |

use anabranch_proto::record::{self, Malformed, ValueRef};
use bytes::Bytes;

use crate::table::Table;

/// What a replica is told about one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// The row is, or becomes, this: a record of the chosen columns.
    Upsert(Bytes),
    /// The row goes: a record of the key's columns, in key order.
    Delete(Bytes),
}

/// The truth table for the row of one key. `was` is the whole row before, if it was in the shape then; `is` the
/// whole row after, if it is in the shape now; `project` makes the record of the chosen columns.
pub fn decide(
    table: &Table,
    was: Option<&Bytes>,
    is: Option<&Bytes>,
    project: impl Fn(&Bytes) -> Result<Bytes, Malformed>,
) -> Result<Option<Op>, Malformed> {
    Ok(match (was, is) {
        (None, None) => None,
        (None, Some(row)) => Some(Op::Upsert(project(row)?)),
        (Some(row), None) => Some(Op::Delete(key_record(table, row)?)),
        (Some(before), Some(after)) if before == after => None,
        (Some(before), Some(after)) => {
            let after = project(after)?;
            (project(before)? != after).then_some(Op::Upsert(after))
        }
    })
}

/// The same where the replica was shown the row by another definition: what it had of it then is `held(row)`, in the form of
/// what `project` makes of a row now.
pub fn decide_changed(
    table: &Table,
    was: Option<&Bytes>,
    is: Option<&Bytes>,
    held: impl Fn(&Bytes) -> Result<Bytes, Malformed>,
    project: impl Fn(&Bytes) -> Result<Bytes, Malformed>,
) -> Result<Option<Op>, Malformed> {
    match (was, is) {
        (Some(before), Some(after)) => {
            let after = project(after)?;
            Ok((held(before)? != after).then_some(Op::Upsert(after)))
        }
        (was, is) => decide(table, was, is, project),
    }
}

/// The record of the key's columns, in key order, of a row.
pub fn key_record(table: &Table, row: &[u8]) -> Result<Bytes, Malformed> {
    pick(row, &table.key)
}

/// A record of the values at `places` of a row, in that order.
pub(crate) fn pick(row: &[u8], places: &[usize]) -> Result<Bytes, Malformed> {
    let mut picked = vec![None; places.len()];
    let last = places.iter().max().map_or(0, |last| last + 1);
    for (column, value) in record::values(row)?.take(last).enumerate() {
        let value = value?;
        for (picked, _) in (picked.iter_mut().zip(places)).filter(|(_, place)| **place == column) {
            *picked = Some(value);
        }
    }
    let picked: Option<Vec<ValueRef<'_>>> = picked.into_iter().collect();
    picked
        .map(record::build)
        .ok_or(Malformed("fewer values than columns"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Collation, Column, Identity, Kind};

    fn table() -> Table {
        let column = |name: &str, kind| Column {
            name: name.into(),
            attnum: 1,
            type_oid: 25,
            base_oid: 25,
            typmod: -1,
            postgres_type: "text".into(),
            kind,
            not_null: true,
            collation: Collation::Bytes,
        };
        Table {
            oid: 1,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![
                column("a", Kind::Integer),
                column("b", Kind::Text),
                column("secret", Kind::Text),
            ],
            key: vec![1, 0],
            identity: Identity::Key,
            indexes: Vec::new(),
            version: 1,
        }
    }

    fn row(a: i64, b: &str, secret: &str) -> Bytes {
        record::build([
            ValueRef::Integer(a),
            ValueRef::Text(b),
            ValueRef::Text(secret),
        ])
    }

    fn visible(row: &Bytes) -> Result<Bytes, Malformed> {
        pick(row, &[0, 1])
    }

    #[test]
    fn the_truth_table_is_followed() {
        let table = table();
        let (one, other, hidden) = (row(1, "x", "s"), row(2, "x", "s"), row(1, "x", "changed"));
        let check = |was, is, expect| {
            assert_eq!(decide(&table, was, is, visible).unwrap(), expect);
        };
        check(None, None, None);
        check(
            None,
            Some(&one),
            Some(Op::Upsert(record::build([
                ValueRef::Integer(1),
                ValueRef::Text("x"),
            ]))),
        );
        // The key in key order, which is not the order of the columns.
        check(
            Some(&one),
            None,
            Some(Op::Delete(record::build([
                ValueRef::Text("x"),
                ValueRef::Integer(1),
            ]))),
        );
        check(Some(&one), Some(&one), None);
        // Only a column changed that the replica must not see.
        check(Some(&one), Some(&hidden), None);
        check(
            Some(&one),
            Some(&other),
            Some(Op::Upsert(visible(&other).unwrap())),
        );
    }

    #[test]
    fn a_key_that_was_in_neither_is_not_even_projected() {
        let table = table();
        let refuse = |_: &Bytes| panic!("looked at a row that the replica must not know");
        assert_eq!(decide(&table, None, None, refuse).unwrap(), None);
    }

    #[test]
    fn under_another_definition_what_the_replica_has_already_is_not_sent() {
        let table = table();
        // It had the first column only; of the second it has NULL now.
        let held = |row: &Bytes| {
            let first = record::value(row, 0)?;
            Ok(record::build([first, ValueRef::Null]))
        };
        let null = record::build([ValueRef::Integer(1), ValueRef::Null, ValueRef::Null]);
        let check = |was, is, expect| {
            let told = decide_changed(&table, was, is, held, visible);
            assert_eq!(told.unwrap(), expect);
        };
        let (one, other) = (row(1, "x", "s"), row(2, "x", "s"));
        check(Some(&null), Some(&null), None);
        check(
            Some(&one),
            Some(&one),
            Some(Op::Upsert(visible(&one).unwrap())),
        );
        check(
            None,
            Some(&other),
            Some(Op::Upsert(visible(&other).unwrap())),
        );
        check(
            Some(&one),
            None,
            Some(Op::Delete(key_record(&table, &one).unwrap())),
        );
        check(None, None, None);
    }

    #[test]
    fn a_short_row_has_no_key() {
        let short = record::build([ValueRef::Integer(1)]);
        assert!(key_record(&table(), &short).is_err());
        assert!(key_record(&table(), b"").is_err());
    }
}
