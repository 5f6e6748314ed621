//! Messages about rows become changes with packed records.
//!
//! Knows which tables are followed, and how Postgres described each on this connection. What can't be understood
//! stops its table; what does not fit the description at all is an error, since then nothing can be trusted.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use anabranch_proto::record::{Builder, ValueRef};
use bytes::Bytes;

use super::{
    assemble::{Error, Open, Sink},
    convert,
    pgoutput::{Malformed, Message, OldTuple, Relation, Tuple, Value},
    relation::{Described, compare},
};
use crate::{
    table::{Identity, Oid, Table},
    transaction::{Change, Old},
};

/// Turns messages about rows into changes.
pub(super) struct Rows {
    /// Those to follow.
    tables: HashMap<Oid, Arc<Table>>,
    /// The followed tables that Postgres has described on this connection.
    described: HashMap<Oid, Described>,
    /// Tables that are not ours.
    ignored: HashSet<Oid>,
    /// Tables whose last description did not fit.
    misfit: HashSet<Oid>,
    builder: Builder,
    descriptions: u64,
}

impl Rows {
    pub fn new(tables: HashMap<Oid, Arc<Table>>) -> Self {
        Rows {
            tables,
            described: HashMap::new(),
            ignored: HashSet::new(),
            misfit: HashSet::new(),
            builder: Builder::new(),
            descriptions: 0,
        }
    }

    /// How often a followed table was described.
    pub fn descriptions(&self) -> u64 {
        self.descriptions
    }

    /// Adds to the transaction what a message says that was sent inside of it.
    pub fn apply(
        &mut self,
        message: Message<'_>,
        open: &mut Open,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let (relation, row) = match message {
            Message::Insert { relation, new } => (relation, Row::Insert(new)),
            Message::Update { relation, old, new } => (relation, Row::Update(old, new)),
            Message::Delete { relation, old } => (relation, Row::Delete(old)),
            Message::Relation(relation) => return self.describe(&relation, open, sink),
            Message::Truncate { relations, .. } => {
                for oid in relations.iter() {
                    if let Some(described) = self.described(oid)? {
                        let table = described.table.clone();
                        open.push(Change::Truncate { table }, 0, sink)?;
                    }
                }
                return Ok(());
            }
            Message::Type { .. } | Message::Origin { .. } | Message::Logical { .. } => {
                return Ok(());
            }
            _ => return Err(Error::Unexpected("in a transaction")),
        };
        if self.described(relation)?.is_none() {
            return Ok(());
        }
        let described = &self.described[&relation];
        match change(described, &mut self.builder, &row) {
            Ok((change, bytes)) => open.push(change, bytes, sink),
            Err(Failed::Count) => Err(Malformed("a row has not the columns described").into()),
            Err(Failed::Unusable(reason)) => stop(relation, reason, open, sink),
        }
    }

    /// Only the beginning of this message is there: its table is stopped.
    pub fn apply_cut(
        &mut self,
        head: &[u8],
        streamed: bool,
        open: &mut Open,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let start = if streamed { 5 } else { 1 };
        let oid = match (head.first(), head.get(start..start + 4)) {
            (Some(b'I' | b'U' | b'D'), Some(&[a, b, c, d])) => Oid::from_be_bytes([a, b, c, d]),
            // We ask for no logical messages; one that is too large is none of ours anyway.
            (Some(b'M'), _) => return Ok(()),
            _ => return Err(Malformed("too large").into()),
        };
        match self.described(oid)? {
            None => Ok(()),
            Some(_) => {
                let reason = "a row is larger than row_bytes_max".to_owned();
                stop(oid, reason, open, sink)
            }
        }
    }

    /// `None`: to be ignored.
    fn described(&self, oid: Oid) -> Result<Option<&Described>, Error> {
        match self.described.get(&oid) {
            None if self.ignored.contains(&oid) || self.misfit.contains(&oid) => Ok(None),
            None => Err(Error::Unexpected("a row of a table that was not described")),
            described => Ok(described),
        }
    }

    fn describe(
        &mut self,
        relation: &Relation<'_>,
        open: &mut Open,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let oid = relation.oid;
        if self.ignored.contains(&oid) {
            return Ok(());
        }
        let Some(table) = self.tables.get(&oid) else {
            let (schema, name) = (relation.schema, relation.name);
            tracing::info!(
                oid,
                "changes of {schema}.{name} are ignored: it is not followed"
            );
            self.ignored.insert(oid);
            return Ok(());
        };
        self.descriptions += 1;
        match compare(table, relation) {
            Ok(described) => {
                self.misfit.remove(&oid);
                self.described.insert(oid, described);
                Ok(())
            }
            Err(reason) => {
                self.described.remove(&oid);
                self.misfit.insert(oid);
                stop(oid, reason, open, sink)
            }
        }
    }
}

/// Says that the table can't be followed. Whether that stops it is for the mirror to say: of a table that was copied after
/// this transaction it has what came of it, and takes what comes later, which is why the table is not forgotten here.
fn stop(table: Oid, reason: String, open: &mut Open, sink: &mut Sink<'_>) -> Result<(), Error> {
    let bytes = reason.len();
    open.push(Change::Stop { table, reason }, bytes, sink)
}

/// Why there is no change.
enum Failed {
    /// The tuple has not the columns that were described: the stream can't be trusted.
    Count,
    /// The table can't be followed; why, for a person.
    Unusable(String),
}

/// Which columns of a tuple are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    All,
    Identity,
}

/// What happened to one row.
enum Row<'a> {
    Insert(Tuple<'a>),
    Update(Option<OldTuple<'a>>, Tuple<'a>),
    Delete(OldTuple<'a>),
}

/// The change that this is, and the bytes that its records hold.
fn change(
    described: &Described,
    builder: &mut Builder,
    row: &Row<'_>,
) -> Result<(Change, usize), Failed> {
    let table = described.table.clone();
    Ok(match row {
        Row::Insert(new) => {
            let new = record(described, builder, new, Wanted::All, None)?;
            let bytes = new.len();
            (Change::Insert { table, new }, bytes)
        }
        Row::Update(old, new) => {
            let old = old.as_ref().map(|old| old_row(described, builder, old));
            let old = old.transpose()?;
            let mut unchanged = Vec::new();
            let new = record(described, builder, new, Wanted::All, Some(&mut unchanged))?;
            let bytes = new.len() + old.as_ref().map_or(0, old_bytes);
            let change = Change::Update {
                table,
                old,
                new,
                unchanged,
            };
            (change, bytes)
        }
        Row::Delete(old) => {
            let old = old_row(described, builder, old)?;
            let bytes = old_bytes(&old);
            (Change::Delete { table, old }, bytes)
        }
    })
}

fn old_bytes(old: &Old) -> usize {
    match old {
        Old::Identity(record) | Old::Full(record) => record.len(),
    }
}

fn old_row(
    described: &Described,
    builder: &mut Builder,
    old: &OldTuple<'_>,
) -> Result<Old, Failed> {
    match old {
        OldTuple::Full(tuple) => {
            let row = record(described, builder, tuple, Wanted::All, None)?;
            Ok(Old::Full(row))
        }
        OldTuple::Key(_) if described.table.identity == Identity::Full => Err(Failed::Unusable(
            "Postgres sent only a key, although the replica identity is FULL".to_owned(),
        )),
        OldTuple::Key(tuple) => {
            let row = record(described, builder, tuple, Wanted::Identity, None)?;
            Ok(Old::Identity(row))
        }
    }
}

/// Builds the record of a tuple. Values that were not sent are NULL in it, and their places go to `unchanged`; without
/// that they can't be.
fn record(
    described: &Described,
    builder: &mut Builder,
    tuple: &Tuple<'_>,
    wanted: Wanted,
    mut unchanged: Option<&mut Vec<u16>>,
) -> Result<Bytes, Failed> {
    let columns = &described.table.columns;
    if tuple.len() != columns.len() {
        return Err(Failed::Count);
    }
    builder.clear();
    let mut add = |place: usize, value: Value<'_>| {
        if wanted == Wanted::Identity && !described.identity[place] {
            return Ok(());
        }
        let column = &columns[place];
        let unusable = |what: &str| {
            let (name, kind) = (&column.name, &column.postgres_type);
            Err(Failed::Unusable(format!(
                "a value of column {name:?} ({kind}) {what}"
            )))
        };
        match value {
            Value::Text(text) => match convert::push(builder, &column.kind, text) {
                Ok(()) => Ok(()),
                Err(convert::Unconvertible) => unusable("can't be converted"),
            },
            Value::Null => {
                builder.push(ValueRef::Null);
                Ok(())
            }
            Value::Unchanged => match &mut unchanged {
                Some(unchanged) => {
                    builder.push(ValueRef::Null);
                    unchanged.push(place as u16);
                    Ok(())
                }
                None => unusable("was not sent"),
            },
            Value::Binary(_) => unusable("came in binary form"),
        }
    };
    match &described.order {
        None => {
            for (place, value) in tuple.values().enumerate() {
                add(place, value)?;
            }
        }
        Some(order) => {
            let values: Vec<_> = tuple.values().collect();
            for (place, index) in order.iter().enumerate() {
                add(place, values[*index])?;
            }
        }
    }
    Ok(builder.finish())
}
