//! Deliveries become messages of the wire. Pure.
//!
//! What is given in travels together until a message has [`MESSAGE_BYTES_TARGET`]; a row larger than twice that is
//! cut in pieces of it.

use std::{collections::VecDeque, sync::Arc};

use anabranch_proto::{
    Lsn, MESSAGE_BYTES_TARGET, Position,
    down::{Elements, Encoded},
    ops, v1,
};
use bytes::Bytes;

use crate::{
    delta::Op,
    engine::Source,
    receipts,
    route::Ops,
    table::{Column, Defaults, LeftOut, Oid, Table},
    write::{Conflict, Policy},
};

/// Where a session is after a transaction.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// The transaction's end.
    pub position: Position,
    /// How far Postgres' WAL had come.
    pub source_lsn: Lsn,
}

/// The end of a transaction: the same for all whom it concerns, so it is written once.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Where it is.
    pub at: At,
    commit: Arc<Elements>,
}

impl Ending {
    /// `commit_time`: microseconds since 1970.
    pub fn new(position: Position, commit_time: i64, source_lsn: Lsn) -> Ending {
        let mut commit = Elements::default();
        commit.push(v1::element::Kind::Commit(v1::Commit {
            position: Some(position.into()),
            commit_time,
            source_lsn: source_lsn.0,
        }));
        Ending {
            at: At {
                position,
                source_lsn,
            },
            commit: Arc::new(commit),
        }
    }
}

/// What a session is told.
#[derive(Debug)]
pub enum Told {
    /// Small transactions, and where it is after the last of them.
    Small(Transactions, At),
    /// A large one: in any order; no key of a table twice.
    Large(Ops, Ending),
}

/// Whole transactions, as one session sees them, written.
#[derive(Debug, Default)]
pub struct Transactions(Elements);

impl Transactions {
    /// Adds one. `id_of`: the ids of declared tables; of others nothing is told. All ops together must be small: they are not cut.
    pub fn push(&mut self, ops: &[(Oid, Op)], ending: &Ending, id_of: impl Fn(Oid) -> Option<u32>) {
        let elements = &mut self.0;
        elements.push(v1::element::Kind::Begin(v1::Begin::default()));
        let end_run = |elements: &mut Elements| {
            elements.end_run(|_| unreachable!("it is far too small to be cut"));
        };
        for (oid, op) in ops {
            let Some(id) = id_of(*oid) else { continue };
            if elements.run_of().is_some_and(|open| open != id) {
                end_run(elements);
            }
            write(elements, id, op);
        }
        end_run(elements);
        elements.repeat(&ending.commit);
    }

    /// Bytes of memory that they take.
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// There is a message's worth of them.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MESSAGE_BYTES_TARGET
    }
}

fn write(elements: &mut Elements, table: u32, op: &Op) {
    match op {
        Op::Upsert(record) => elements.op(table, ops::Kind::Upsert, record),
        Op::Delete(key) => elements.op(table, ops::Kind::Delete, key),
    }
}

/// Builds messages. Finished ones wait in it until they are taken.
#[derive(Default)]
pub struct Encoder {
    elements: Elements,
    /// Boxed: a session keeps the room of those that it had at once.
    ready: VecDeque<Box<Encoded>>,
}

impl Encoder {
    /// Starts a transaction.
    pub fn begin(&mut self, first: bool, reset: Vec<u32>) {
        self.push(v1::element::Kind::Begin(v1::Begin { first, reset }));
    }

    /// Declares a table with the columns at `columns`. `policy`: how conflicts are settled; `defaults`: what columns hold
    /// that an INSERT leaves out. `reshaped`: the replica has it with other columns.
    #[expect(clippy::too_many_arguments)]
    pub fn table(
        &mut self,
        id: u32,
        table: &Table,
        columns: &[usize],
        reshaped: bool,
        writable: bool,
        policy: Option<&Policy>,
        defaults: &Defaults,
    ) {
        let place = |column: &usize| columns.iter().position(|other| other == column);
        let key_position = |column: usize| {
            let at = table.key.iter().position(|key| *key == column);
            at.map_or(0, |at| at as u32 + 1)
        };
        let of_table = defaults.get(&table.oid);
        let left_out = |column: &Column| {
            let left_out = of_table.and_then(|of_table| of_table.get(&column.attnum));
            left_out.unwrap_or(&LeftOut::Null)
        };
        let declared = v1::Table {
            id,
            schema: table.schema.clone(),
            name: table.name.clone(),
            columns: columns
                .iter()
                .map(|at| v1::Column {
                    conflict: conflict(policy, &table.columns[*at].name).into(),
                    ..declare(
                        &table.columns[*at],
                        key_position(*at),
                        left_out(&table.columns[*at]),
                    )
                })
                .collect(),
            indexes: table
                .indexes
                .iter()
                .filter_map(|index| {
                    let columns: Option<Vec<_>> = index.columns.iter().map(place).collect();
                    Some(v1::Index {
                        name: index.name.clone(),
                        columns: columns?.into_iter().map(|at| at as u32).collect(),
                    })
                })
                .collect(),
            purpose: receipts::purpose(table).into(),
            writable,
            reshaped,
        };
        self.push(v1::element::Kind::Table(declared));
    }

    /// Adds an op on a declared table.
    pub fn op(&mut self, table: u32, op: &Op) {
        if self.elements.run_of().is_some_and(|open| open != table) {
            self.end_run();
        }
        write(&mut self.elements, table, op);
        if self.is_full() {
            self.end_message(&[]);
        }
    }

    /// Tells that a table is not followed any more.
    pub fn stopped(&mut self, table: u32, reason: &str) {
        let state = v1::TableState {
            table,
            state: v1::table_state::State::Stopped.into(),
            reason: reason.to_owned(),
        };
        self.push(v1::element::Kind::State(state));
    }

    /// Ends a transaction.
    pub fn end(&mut self, ending: &Ending) {
        self.end_run();
        self.elements.repeat(&ending.commit);
    }

    /// Adds whole transactions; tells where the session is after them. `id_of`: the ids of declared tables; of others nothing is told.
    pub fn told(&mut self, told: Told, id_of: impl Fn(Oid) -> Option<u32>) -> At {
        match told {
            Told::Small(Transactions(elements), at) => {
                self.end_run();
                self.elements.append(elements);
                at
            }
            Told::Large(ops, ending) => {
                self.begin(false, Vec::new());
                for (oid, op) in &ops {
                    if let Some(id) = id_of(*oid) {
                        self.op(id, op);
                    }
                }
                self.end(&ending);
                ending.at
            }
        }
    }

    /// Says that nothing changed up to a position.
    pub fn heartbeat(&mut self, position: Position, source: Source) {
        let heartbeat = v1::Heartbeat {
            position: Some(position.into()),
            source_lsn: source.lsn.0,
            source_connected: source.connected,
        };
        self.push(v1::element::Kind::Heartbeat(heartbeat));
    }

    /// Ends the message in hand, if there is one. `resume_token` speaks of its last element, a Commit or Heartbeat;
    /// it is empty within a transaction.
    pub fn end_message(&mut self, resume_token: &[u8]) {
        self.end_run();
        if !self.elements.is_empty() {
            let message = self.elements.finish(resume_token);
            self.ready.push_back(Box::new(message));
        }
    }

    /// A message without elements: within a transaction, where no heartbeat may be, it says that the streamer lives.
    pub fn sign_of_life(&mut self) {
        self.ready.push_back(Box::default());
    }

    /// The message in hand is large enough to be sent.
    pub fn is_full(&self) -> bool {
        self.elements.len() >= MESSAGE_BYTES_TARGET
    }

    /// Takes the oldest finished message.
    pub fn take(&mut self) -> Option<Box<Encoded>> {
        self.ready.pop_front()
    }

    fn push(&mut self, kind: v1::element::Kind) {
        self.end_run();
        self.elements.push(kind);
    }

    fn end_run(&mut self) {
        let ready = &mut self.ready;
        self.elements
            .end_run(|message| ready.push_back(Box::new(message)));
    }
}

fn conflict(policy: Option<&Policy>, column: &str) -> v1::Conflict {
    match policy.map(|policy| policy.of(column)) {
        None | Some(Conflict::LastWrite) => v1::Conflict::LastWrite,
        Some(Conflict::FirstWrite) => v1::Conflict::FirstWrite,
        Some(Conflict::Add) => v1::Conflict::Add,
        Some(Conflict::Function(_)) => v1::Conflict::Function,
    }
}

fn declare(column: &Column, key_position: u32, left_out: &LeftOut) -> v1::Column {
    let storage = column.kind.storage();
    let default = match left_out {
        LeftOut::Null => v1::DefaultKind::None,
        LeftOut::Value(_) => v1::DefaultKind::Value,
        LeftOut::Now => v1::DefaultKind::Now,
        LeftOut::Uuid => v1::DefaultKind::Uuid,
        LeftOut::Sequence => v1::DefaultKind::Sequence,
        LeftOut::Other => v1::DefaultKind::Other,
    };
    let default_value = match left_out {
        LeftOut::Value(record) => Bytes::copy_from_slice(record),
        _ => Bytes::new(),
    };
    v1::Column {
        name: column.name.clone(),
        postgres_type: column.postgres_type.clone(),
        storage: storage.into(),
        // A NaN is NULL in SQLite; and so is what only Postgres can fill in.
        not_null: column.not_null && storage != v1::Storage::Real && *left_out != LeftOut::Other,
        key_position,
        default_kind: default.into(),
        default_value,
        ..v1::Column::default()
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use prost::Message;

    use super::*;

    fn taken(encoder: &mut Encoder) -> Vec<v1::Down> {
        let messages = std::iter::from_fn(|| encoder.take());
        let read = messages.map(|message| v1::Down::decode(message.bytes()).unwrap());
        read.collect()
    }

    #[test]
    fn a_row_larger_than_a_message_travels_in_pieces() {
        let row = Bytes::from(vec![7; 5 * MESSAGE_BYTES_TARGET / 2]);
        let mut encoder = Encoder::default();
        encoder.begin(false, Vec::new());
        encoder.op(1, &Op::Delete(Bytes::from_static(b"small")));
        encoder.op(1, &Op::Upsert(row.clone()));
        encoder.op(2, &Op::Delete(Bytes::from_static(b"after")));
        encoder.end(&Ending::new(Position::default(), 0, Lsn(0)));
        encoder.end_message(b"token");

        let (mut joined, mut messages, mut continued) = (BytesMut::new(), 0, false);
        for message in taken(&mut encoder) {
            messages += 1;
            for element in message.elements {
                match element.kind.unwrap() {
                    v1::element::Kind::Rows(rows) if rows.table == 1 => {
                        assert!(rows.ops.len() <= 2 * MESSAGE_BYTES_TARGET);
                        joined.extend_from_slice(&rows.ops);
                        continued = rows.continued;
                    }
                    _ => assert!(!continued, "a cut row is followed by its rest"),
                }
            }
        }
        assert_eq!(messages, 3);
        let mut joined = joined.freeze();
        assert_eq!(
            ops::take(&mut joined),
            Ok(Some((ops::Kind::Delete, Bytes::from_static(b"small"))))
        );
        assert_eq!(ops::take(&mut joined), Ok(Some((ops::Kind::Upsert, row))));
        assert!(joined.is_empty());
    }

    #[test]
    fn many_small_rows_are_cut_at_the_target() {
        let row = Op::Upsert(Bytes::from(vec![7; 200]));
        let mut encoder = Encoder::default();
        encoder.begin(false, Vec::new());
        (0..10_000).for_each(|_| encoder.op(1, &row));
        encoder.end(&Ending::new(Position::default(), 0, Lsn(0)));
        encoder.end_message(b"token");
        let messages = taken(&mut encoder);
        assert!((7..=9).contains(&messages.len()), "{}", messages.len());
        let (last, rest) = messages.split_last().unwrap();
        assert!(rest.iter().all(|message| message.resume_token.is_empty()));
        assert_eq!(last.resume_token, "token");
    }
}
