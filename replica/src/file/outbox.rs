//! Local transactions on their way out: entries are grouped, numbered and hashed once, and encoded as often as they
//! are sent.
//!
//! Entries of all entries tables are read side by side in the order of their ids, one of each table at a time, so a
//! transaction of any size takes the memory of a few rows and of the pieces that are asked for. Both the hash and the
//! pieces are made by that one encoder: what is sent again is the same bytes.

mod encode;

use anabranch_proto::{MESSAGE_BYTES_TARGET, Nonce, v1};
use aws_lc_rs::digest;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Error, File,
    error::Doing,
    layout::{self, Layout},
    names::quote,
    receipts,
    transaction::Write,
};
use encode::Entries;
pub(super) use encode::nonce;

/// SELECTs that are joined by UNION ALL in one; SQLite takes 500.
const UNION_MAX: usize = 200;

/// The hash before the first local transaction.
pub(super) const NO_HASH: [u8; 32] = [0; 32];

/// How far local transactions were handed out. It goes on within a transaction.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// All up to this one were handed out as a whole.
    seq: u64,
    within: Option<Within>,
}

/// The next transaction was handed out in part.
#[derive(Clone, Debug)]
struct Within {
    /// Entries up to this one were encoded.
    entry: i64,
    /// Of that one.
    nonce: Nonce,
    /// What was encoded of them, but not handed out.
    rest: Bytes,
}

impl Outgoing {
    /// Begins behind this transaction.
    pub fn after(seq: u64) -> Outgoing {
        Outgoing { seq, within: None }
    }

    /// All up to this one were handed out as a whole.
    pub fn seq(&self) -> u64 {
        self.seq
    }
}

/// A row of `_anabranch_local`.
struct Local {
    seq: i64,
    last: i64,
    hash: Vec<u8>,
    merged: bool,
}

fn newest(connection: &Connection) -> rusqlite::Result<Option<Local>> {
    local(connection, "ORDER BY seq DESC LIMIT 1", None)
}

fn local(
    connection: &Connection,
    condition: &str,
    seq: Option<i64>,
) -> rusqlite::Result<Option<Local>> {
    let sql = format!("SELECT seq, last, hash, merged FROM _anabranch_local {condition}");
    connection
        .prepare_cached(&sql)?
        .query_row(rusqlite::params_from_iter(seq), |row| {
            Ok(Local {
                seq: row.get(0)?,
                last: row.get(1)?,
                hash: row.get(2)?,
                merged: row.get(3)?,
            })
        })
        .optional()
}

impl File {
    /// Makes local transactions of entries that are in none yet: one up to each of these ids, which ascend. It is
    /// durable when this returns, and what was written before it is too. Ids that are in a transaction already are passed
    /// over, so that it can be done again after an error. `merged`: several transactions of programs may be in each.
    pub fn assign(&mut self, ends: &[i64], merged: bool) -> Result<(), Error> {
        self.guard.still_there()?;
        let chain_seq = self.state.chain_seq;
        let done = self.with_sync(|file| assign(&file.connection, chain_seq, ends, merged));
        self.make_room_if_full(done)
    }

    /// NORMAL does not sync at a commit; a commit that others come to know of must not be lost afterwards.
    pub(super) fn with_sync<T>(
        &mut self,
        mut commit: impl FnMut(&mut File) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let synchronous = |file: &File, how: &str| {
            file.connection
                .pragma_update(None, "synchronous", how)
                .doing("make local writes durable")
        };
        synchronous(self, "FULL")?;
        let done = commit(self);
        synchronous(self, "NORMAL")?;
        done
    }

    /// The last local transaction, and its last entry; zeroes if there is none.
    pub fn assigned(&self) -> Result<(u64, i64), Error> {
        assigned(&self.connection)
    }

    /// The last local transaction that is answered, with its hash; 0 if none is. Rejections up to it are in
    /// `_anabranch_rejected`.
    pub fn answered(&self) -> Result<(u64, Option<[u8; 32]>), Error> {
        let answered = receipts::answered(&self.connection).doing("read local transactions")?;
        Ok(answered.map_or((0, None), |(seq, hash)| (seq as u64, hash.try_into().ok())))
    }

    /// The hash of a local transaction, as long as it is kept.
    pub fn hash_of(&self, seq: u64) -> Result<Option<[u8; 32]>, Error> {
        let local = local(&self.connection, "WHERE seq = ?1", i64::try_from(seq).ok())
            .doing("read local transactions")?;
        Ok(local.and_then(|local| local.hash.try_into().ok()))
    }

    /// The next local transactions, in pieces of about [`MESSAGE_BYTES_TARGET`], about `bytes_max` of them at once. None:
    /// all are handed out. Where an error is returned, `from` is as it was.
    pub fn outgoing(
        &self,
        from: &mut Outgoing,
        bytes_max: usize,
    ) -> Result<Vec<v1::LocalTransaction>, Error> {
        let mut to = from.clone();
        let pieces = outgoing(&self.connection, &mut to, bytes_max)
            .doing("read local transactions that are to be sent")?;
        *from = to;
        Ok(pieces)
    }
}

pub(super) fn assigned(connection: &Connection) -> Result<(u64, i64), Error> {
    let newest = newest(connection).doing("read local transactions")?;
    Ok(newest.map_or((0, 0), |local| (local.seq as u64, local.last)))
}

fn assign(
    connection: &Connection,
    chain_seq: i64,
    ends: &[i64],
    merged: bool,
) -> Result<(), Error> {
    let write = Write::begin(connection)?;
    number(connection, chain_seq, ends.iter().map(|end| (*end, merged)))
        .doing("make local transactions of what programs wrote")?;
    write.commit().map(drop)
}

/// Makes local transactions that end at these entries, and may be several. Within a write transaction.
pub(super) fn number(
    connection: &Connection,
    chain_seq: i64,
    ends: impl Iterator<Item = (i64, bool)> + Clone,
) -> rusqlite::Result<()> {
    let (mut seq, mut last, mut hash) = match newest(connection)? {
        Some(newest) if newest.seq > chain_seq => (newest.seq, newest.last, newest.hash),
        newest => (
            chain_seq,
            newest.map_or(0, |newest| newest.last),
            NO_HASH.to_vec(),
        ),
    };
    let furthest = ends.clone().map(|(end, _)| end).max().unwrap_or(last);
    let entries = Entries::new(connection, last, furthest)?;
    for (end, merged) in ends {
        if end <= last {
            continue;
        }
        seq += 1;
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&hash);
        context.update(&seq.to_be_bytes());
        let mut encoder = entries.read(last, last, end)?;
        context.update(&encoder.tables_hashed());
        let mut time = None;
        while let Some(entry) = encoder.next()? {
            context.update(&entry.bytes);
            time = Some(entry.captured_time);
        }
        hash = context.finish().as_ref().to_vec();
        connection
            .prepare_cached("INSERT INTO _anabranch_local VALUES(?1, ?2, ?3, ?4, ?5, NULL)")?
            .execute(params![seq, end, hash, merged, time.unwrap_or_default()])?;
        last = end;
    }
    Ok(())
}

fn outgoing(
    connection: &Connection,
    from: &mut Outgoing,
    bytes_max: usize,
) -> rusqlite::Result<Vec<v1::LocalTransaction>> {
    let mut pieces = Vec::new();
    let mut bytes = 0;
    let before = receipts::last_of(connection, from.seq as i64)?;
    let entries = Entries::new(connection, before, i64::MAX)?;
    while bytes < bytes_max {
        let next = local(
            connection,
            "WHERE seq > ?1 ORDER BY seq LIMIT 1",
            Some(from.seq as i64),
        )?;
        let Some(next) = next else {
            break;
        };
        let after = receipts::last_of(connection, next.seq - 1)?;
        let (read, mut nonce, mut rest, is_first) = match from.within.take() {
            Some(within) => (within.entry, within.nonce, within.rest, false),
            None => (after, Nonce::new(0, 0), Bytes::new(), true),
        };
        let mut encoder = entries.read(after, read, next.last)?;
        let mut tables = if is_first {
            encoder.tables()
        } else {
            Vec::new()
        };
        let mut at = read;
        // A piece is handed out when the first byte of the next is there, which tells that it is not the last.
        let mut piece: Vec<u8> = Vec::new();
        loop {
            if rest.is_empty() {
                match encoder.next()? {
                    Some(entry) => {
                        at = entry.id;
                        nonce = entry.nonce;
                        rest = entry.bytes.into();
                    }
                    None => break,
                }
            }
            if piece.len() >= MESSAGE_BYTES_TARGET {
                bytes += piece.len();
                pieces.push(message(
                    &next,
                    &mut tables,
                    std::mem::take(&mut piece),
                    true,
                ));
                if bytes >= bytes_max {
                    from.within = Some(Within {
                        entry: at,
                        nonce,
                        rest,
                    });
                    return Ok(pieces);
                }
            }
            let room = MESSAGE_BYTES_TARGET - piece.len();
            piece.extend_from_slice(&rest.split_to(room.min(rest.len())));
        }
        bytes += piece.len() + next.hash.len();
        pieces.push(v1::LocalTransaction {
            nonce: nonce.to_bytes().to_vec().into(),
            ..message(&next, &mut tables, piece, false)
        });
        from.seq = next.seq as u64;
    }
    Ok(pieces)
}

fn message(
    local: &Local,
    tables: &mut Vec<v1::WriteTable>,
    entries: Vec<u8>,
    continued: bool,
) -> v1::LocalTransaction {
    v1::LocalTransaction {
        seq: local.seq as u64,
        hash: local.hash.clone().into(),
        tables: std::mem::take(tables),
        entries: entries.into(),
        continued,
        merged: local.merged,
        ..v1::LocalTransaction::default()
    }
}

/// The view of what is not answered yet, over all entries tables.
pub(super) fn view(connection: &Connection) -> rusqlite::Result<String> {
    let boundary = receipts::BOUNDARY;
    let selects: Vec<String> = layout::all(connection)?
        .iter()
        .map(|source| {
            format!(
                "SELECT id, (SELECT seq FROM _anabranch_local WHERE last >= id ORDER BY last LIMIT 1) AS txn, \
                 '{}' AS table_name, operation, {} AS key, {} AS changes, captured_time FROM {} WHERE id > {boundary}",
                source.table.replace('\'', "''"),
                key_sql(&source.layout),
                changes_sql(&source.layout),
                quote(&source.entries)
            )
        })
        .collect();
    let mut from: Vec<String> = selects
        .chunks(UNION_MAX)
        .map(|chunk| chunk.join(" UNION ALL "))
        .collect();
    if from.len() > 1 {
        for chunk in &mut from {
            *chunk = format!("SELECT * FROM ({chunk})");
        }
    }
    if from.is_empty() {
        from.push(
            "SELECT 0 AS id, 0 AS txn, '' AS table_name, '' AS operation, '' AS key, '' AS changes, \
             '' AS captured_time WHERE 0"
                .to_owned(),
        );
    }
    Ok(format!(
        "CREATE VIEW _anabranch_outbox AS SELECT id, txn, table_name, operation, key, changes, captured_time, \
         CASE WHEN txn IS NULL THEN 'captured' ELSE 'assigned' END AS state FROM ({})",
        from.join(" UNION ALL ")
    ))
}

/// JSON of a value; of a blob as Postgres prints one.
fn json_sql(value: &str) -> String {
    format!(
        "CASE typeof({value}) WHEN 'blob' THEN json_quote('\\x' || lower(hex({value}))) ELSE json_quote({value}) END"
    )
}

fn key_sql(layout: &Layout) -> String {
    let key: Vec<String> = layout
        .key
        .iter()
        .map(|place| {
            json_sql(&format!(
                "CASE operation WHEN 'insert' THEN n{place} ELSE o{place} END"
            ))
        })
        .collect();
    format!("'[' || {} || ']'", key.join(" || ',' || "))
}

fn changes_sql(layout: &Layout) -> String {
    let changes: Vec<String> = layout
        .columns
        .iter()
        .enumerate()
        .map(|(place, field)| {
            let name = serde_json::Value::from(field.name.as_str()).to_string();
            format!(
                "CASE WHEN operation = 'delete' OR substr(changed, {}, 1) = '1' THEN ',{}:' || {} ELSE '' END",
                place + 1,
                name.replace('\'', "''"),
                json_sql(&format!("CASE operation WHEN 'delete' THEN o{place} ELSE n{place} END"))
            )
        })
        .collect();
    format!("'{{' || substr({}, 2) || '}}'", changes.join(" || "))
}
