//! Deliveries become messages of the wire: the only place where generated protobuf types are made. Pure.
//!
//! What is given in travels together until a message has [`MESSAGE_BYTES_TARGET`]; a row larger than twice that is
//! cut in pieces of it.

use std::collections::VecDeque;

use anabranch_proto::{MESSAGE_BYTES_TARGET, Position, ops, v1};
use bytes::{Bytes, BytesMut};

use crate::{
    delta::Op,
    engine::Source,
    receipts,
    table::{Column, Defaults, LeftOut, Table},
    write::{Conflict, Policy},
};

/// Builds messages. Finished ones wait in it until they are taken.
#[derive(Default)]
pub struct Encoder {
    elements: Vec<v1::Element>,
    /// Bytes in `elements`, about.
    bytes: usize,
    /// The run of ops that is open, and its table's id.
    run: Option<(u32, BytesMut)>,
    /// Boxed: a session keeps the room of those that it had at once.
    ready: VecDeque<Box<v1::Down>>,
}

/// What an element costs beside the bytes in it, about.
const ELEMENT_BYTES: usize = 24;

impl Encoder {
    /// Starts a transaction.
    pub fn begin(&mut self, first: bool, reset: Vec<u32>) {
        self.push(v1::element::Kind::Begin(v1::Begin { first, reset }), 0);
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
        let bytes = table.columns.len() * 64;
        self.push(v1::element::Kind::Table(declared), bytes);
    }

    /// Adds an op on a declared table.
    pub fn op(&mut self, table: u32, op: &Op) {
        if self.run.as_ref().is_none_or(|(id, _)| *id != table) {
            self.end_run();
            self.run = Some((table, BytesMut::new()));
        }
        let (_, run) = self.run.as_mut().expect("just set");
        let before = run.len();
        match op {
            Op::Upsert(record) => ops::push(run, ops::Kind::Upsert, record),
            Op::Delete(key) => ops::push(run, ops::Kind::Delete, key),
        }
        self.bytes += run.len() - before;
        if self.bytes >= MESSAGE_BYTES_TARGET {
            self.end_run();
            self.end_message(Bytes::new());
        }
    }

    /// Tells that a table is not followed any more.
    pub fn stopped(&mut self, table: u32, reason: &str) {
        let state = v1::TableState {
            table,
            state: v1::table_state::State::Stopped.into(),
            reason: reason.to_owned(),
        };
        self.push(v1::element::Kind::State(state), reason.len());
    }

    /// Ends a transaction.
    pub fn commit(&mut self, position: Position, commit_time: i64, source_lsn: u64) {
        let commit = v1::Commit {
            position: Some(position.into()),
            commit_time,
            source_lsn,
        };
        self.push(v1::element::Kind::Commit(commit), 40);
    }

    /// Says that nothing changed up to a position.
    pub fn heartbeat(&mut self, position: Position, source: Source) {
        let heartbeat = v1::Heartbeat {
            position: Some(position.into()),
            source_lsn: source.lsn.0,
            source_connected: source.connected,
        };
        self.push(v1::element::Kind::Heartbeat(heartbeat), 40);
    }

    /// Ends the message in hand, if there is one. `resume_token` speaks of its last element, a Commit or Heartbeat;
    /// it is empty within a transaction.
    pub fn end_message(&mut self, resume_token: Bytes) {
        self.end_run();
        if self.elements.is_empty() {
            return;
        }
        self.bytes = 0;
        self.ready.push_back(Box::new(v1::Down {
            elements: std::mem::take(&mut self.elements),
            resume_token,
            ..v1::Down::default()
        }));
    }

    /// A message without elements: within a transaction, where no heartbeat may be, it says that the streamer lives.
    pub fn sign_of_life(&mut self) {
        self.ready.push_back(Box::default());
    }

    /// The message in hand is large enough to be sent.
    pub fn is_full(&self) -> bool {
        self.bytes >= MESSAGE_BYTES_TARGET
    }

    /// Takes the oldest finished message.
    pub fn take(&mut self) -> Option<Box<v1::Down>> {
        self.ready.pop_front()
    }

    fn push(&mut self, kind: v1::element::Kind, bytes: usize) {
        self.end_run();
        self.bytes += bytes + ELEMENT_BYTES;
        self.elements.push(v1::Element { kind: Some(kind) });
    }

    fn end_run(&mut self) {
        let Some((table, run)) = self.run.take() else {
            return;
        };
        let mut rest = run.freeze();
        // What is just above the target stays whole: its rest would be a message of a few bytes.
        while rest.len() > 2 * MESSAGE_BYTES_TARGET {
            let ops = rest.split_to(MESSAGE_BYTES_TARGET);
            self.rows(table, ops, true);
            self.bytes = 0;
            self.ready.push_back(Box::new(v1::Down {
                elements: std::mem::take(&mut self.elements),
                ..v1::Down::default()
            }));
        }
        self.bytes = self
            .bytes
            .min(rest.len() + self.elements.len() * ELEMENT_BYTES);
        self.rows(table, rest, false);
    }

    fn rows(&mut self, table: u32, ops: Bytes, continued: bool) {
        let rows = v1::Rows {
            table,
            ops,
            continued,
        };
        self.elements.push(v1::Element {
            kind: Some(v1::element::Kind::Rows(rows)),
        });
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
    use super::*;

    #[test]
    fn a_row_larger_than_a_message_travels_in_pieces() {
        let row = Bytes::from(vec![7; 5 * MESSAGE_BYTES_TARGET / 2]);
        let mut encoder = Encoder::default();
        encoder.begin(false, Vec::new());
        encoder.op(1, &Op::Delete(Bytes::from_static(b"small")));
        encoder.op(1, &Op::Upsert(row.clone()));
        encoder.op(2, &Op::Delete(Bytes::from_static(b"after")));
        encoder.commit(Position::default(), 0, 0);
        encoder.end_message(Bytes::from_static(b"token"));

        let (mut joined, mut messages, mut continued) = (BytesMut::new(), 0, false);
        while let Some(message) = encoder.take() {
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
        encoder.commit(Position::default(), 0, 0);
        encoder.end_message(Bytes::from_static(b"token"));
        let messages: Vec<_> = std::iter::from_fn(|| encoder.take()).collect();
        assert!((7..=9).contains(&messages.len()), "{}", messages.len());
        let (last, rest) = messages.split_last().unwrap();
        assert!(rest.iter().all(|message| message.resume_token.is_empty()));
        assert_eq!(last.resume_token, "token");
    }
}
