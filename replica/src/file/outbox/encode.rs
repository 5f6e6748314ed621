//! Encodes entries as they travel: see `LocalTransaction.entries` in the protocol.

use anabranch_proto::{Nonce, local, record::Builder, v1};
use jiff::Timestamp;
use rusqlite::{CachedStatement, Connection};

use super::super::{
    layout::{self, Layout, Source},
    names::quote,
    overlay::{Entry, Operation, in_record},
    table::Conflict,
};

/// All entries tables, to be read side by side.
pub(super) struct Entries<'c> {
    connection: &'c Connection,
    sources: Vec<Source>,
}

/// One entry, encoded.
pub(super) struct Encoded {
    pub id: i64,
    pub nonce: Nonce,
    pub bytes: Vec<u8>,
    pub captured_time: String,
}

/// Reads the entries of one transaction in the order of their ids.
pub(super) struct Encoder<'e> {
    /// By their place in the transaction: in the order of their first entries.
    cursors: Vec<Cursor<'e>>,
    records: Builder,
    last: i64,
}

/// One entries table that the transaction has entries of.
struct Cursor<'e> {
    layout: &'e Layout,
    /// Finds the first entry behind some id. A statement that stays open would hold up whoever changes the schema.
    statement: CachedStatement<'e>,
    /// Up to here it was handed out.
    at: i64,
    next: Option<Encoded>,
    is_at_end: bool,
}

impl<'c> Entries<'c> {
    /// To read entries above `after` and up to `last`.
    pub(super) fn new(
        connection: &'c Connection,
        after: i64,
        last: i64,
    ) -> rusqlite::Result<Entries<'c>> {
        Ok(Entries {
            sources: layout::having(connection, after, last)?,
            connection,
        })
    }

    /// Reads the transaction that has the entries above `after` and up to `last`, from behind `read` on.
    pub(super) fn read(&self, after: i64, read: i64, last: i64) -> rusqlite::Result<Encoder<'_>> {
        let mut cursors = Vec::new();
        for source in &self.sources {
            let entries = quote(&source.entries);
            let first: Option<i64> = self
                .connection
                .prepare_cached(&format!(
                    "SELECT min(id) FROM {entries} WHERE id > ?1 AND id <= ?2"
                ))?
                .query_row([after, last], |row| row.get(0))?;
            let Some(first) = first else {
                continue;
            };
            let statement = self.connection.prepare_cached(&format!(
                "SELECT {}, captured_time, nonce FROM {entries} WHERE id > ?1 AND id <= ?2 ORDER BY id LIMIT 1",
                Entry::columns(&source.layout)
            ))?;
            let cursor = Cursor {
                layout: &source.layout,
                statement,
                at: read,
                next: None,
                is_at_end: false,
            };
            cursors.push((first, cursor));
        }
        cursors.sort_by_key(|(first, _)| *first);
        Ok(Encoder {
            cursors: cursors.into_iter().map(|(_, cursor)| cursor).collect(),
            records: Builder::new(),
            last,
        })
    }
}

impl Encoder<'_> {
    /// What the hash covers of them.
    pub(super) fn tables_hashed(&self) -> Vec<u8> {
        let mut out = Vec::new();
        local::push_number(&mut out, self.cursors.len());
        for Cursor { layout, .. } in &self.cursors {
            local::push_table(
                &mut out,
                &layout.schema,
                &layout.name,
                layout.columns.iter().map(|field| field.name.as_str()),
                layout.key.iter().copied(),
            );
        }
        out
    }

    /// The tables that the entries name.
    pub(super) fn tables(&self) -> Vec<v1::WriteTable> {
        let table = |cursor: &Cursor<'_>| {
            let layout = cursor.layout;
            v1::WriteTable {
                schema: layout.schema.clone(),
                name: layout.name.clone(),
                columns: layout.columns.iter().map(|f| f.name.clone()).collect(),
                key: layout.key.iter().map(|&place| place as u32).collect(),
            }
        };
        self.cursors.iter().map(table).collect()
    }

    /// The next entry.
    pub(super) fn next(&mut self) -> rusqlite::Result<Option<Encoded>> {
        for (place, cursor) in self.cursors.iter_mut().enumerate() {
            cursor.advance(place as u64, self.last, &mut self.records)?;
        }
        let first = self
            .cursors
            .iter_mut()
            .filter(|cursor| cursor.next.is_some())
            .min_by_key(|cursor| cursor.next.as_ref().map(|next| next.id));
        Ok(first.and_then(|cursor| cursor.next.take()))
    }
}

impl Cursor<'_> {
    /// Reads the next entry, unless it was read already.
    fn advance(&mut self, place: u64, last: i64, records: &mut Builder) -> rusqlite::Result<()> {
        if self.next.is_some() || self.is_at_end {
            return Ok(());
        }
        let mut rows = self.statement.query([self.at, last])?;
        let Some(row) = rows.next()? else {
            self.is_at_end = true;
            return Ok(());
        };
        let entry = Entry::read(row, self.layout)?;
        self.at = entry.id;
        let behind = 3 + 2 * self.layout.columns.len();
        let captured_time: String = row.get(behind)?;
        let nonce = nonce(&captured_time, row.get(behind + 1)?);
        self.next = Some(Encoded {
            id: entry.id,
            nonce,
            bytes: encode(&entry, nonce, self.layout, place, records),
            captured_time,
        });
        Ok(())
    }
}

/// Of an entry. A clock that stands before 1970 is no reason to fail.
pub(in crate::file) fn nonce(captured_time: &str, random: i64) -> Nonce {
    let time: Timestamp = captured_time.parse().unwrap_or_default();
    Nonce::new(
        u64::try_from(time.as_second()).unwrap_or_default(),
        random.cast_unsigned(),
    )
}

fn encode(
    entry: &Entry,
    nonce: Nonce,
    layout: &Layout,
    place: u64,
    record: &mut Builder,
) -> Vec<u8> {
    let is_compared = |place: usize| layout.columns[place].conflict != Conflict::LastWrite;
    let kind = match entry.operation {
        Operation::Insert => {
            entry
                .new
                .iter()
                .for_each(|value| record.push(in_record(value)));
            0
        }
        Operation::Update => {
            for &place in &layout.key {
                record.push(in_record(&entry.old[place]));
            }
            let changed: String = entry
                .changed
                .iter()
                .map(|changed| if *changed { '1' } else { '0' })
                .collect();
            record.push_text(&changed);
            for place in (0..layout.columns.len()).filter(|&place| entry.changed[place]) {
                record.push(in_record(&entry.new[place]));
                if is_compared(place) {
                    record.push(in_record(&entry.old[place]));
                }
            }
            1
        }
        Operation::Delete => {
            for &place in &layout.key {
                record.push(in_record(&entry.old[place]));
            }
            if (0..layout.columns.len()).any(is_compared) {
                entry
                    .old
                    .iter()
                    .for_each(|value| record.push(in_record(value)));
            }
            2
        }
    };
    let record = record.finish();
    let mut bytes = Vec::with_capacity(record.len() + Nonce::BYTES + 12);
    for number in [place, kind, record.len() as u64] {
        push_varint(&mut bytes, number);
    }
    bytes.extend_from_slice(&nonce.to_bytes());
    bytes.extend_from_slice(&record);
    bytes
}

/// As in protobuf.
fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
