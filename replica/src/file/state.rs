//! Our own tables in the file, and the one row that says where the file is.
//!
//! `_anabranch_state` (one row), `_anabranch_synced` (a row for each table of the streamer's) and `_anabranch_indexes`
//! are ours alone; programs read the views `_anabranch_status` and `_anabranch_tables`, and the tables
//! `_anabranch_columns` and `_anabranch_dropped`. `PRAGMA user_version` and `application_id` belong to the program that
//! the file is for: our version is a column.

use anabranch_proto::{Lsn, Position};
use bytes::Bytes;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Error, capture,
    error::{self, Doing},
    leases, outbox, receipts,
    status::{self, micros_text, time_text},
};

/// Version of our own tables.
///
/// - 1: first version.
/// - 2: entries have a nonce, and the file knows where the chain of its id begins.
const FORMAT: i64 = 2;

/// Longest text kept in `last_error`.
const LAST_ERROR_BYTES_MAX: usize = 4096;

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS _anabranch_state(
    id INTEGER PRIMARY KEY CHECK(id = 1),
    format INTEGER NOT NULL,
    replica_id TEXT NOT NULL,
    chain_seq INTEGER NOT NULL,
    settle TEXT,
    answered_once INTEGER NOT NULL DEFAULT 0,
    epoch TEXT,
    lsn TEXT,
    resume_token BLOB NOT NULL,
    token_id TEXT,
    commit_time TEXT,
    received_time TEXT,
    heartbeat_time TEXT,
    connected INTEGER NOT NULL,
    caught_up INTEGER NOT NULL,
    last_error TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS _anabranch_synced(
    table_name TEXT PRIMARY KEY,
    postgres_schema TEXT NOT NULL,
    postgres_name TEXT NOT NULL,
    definition TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    lsn TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _anabranch_indexes(
    index_name TEXT PRIMARY KEY,
    table_name TEXT NOT NULL,
    postgres_name TEXT NOT NULL,
    columns TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _anabranch_columns(
    table_name TEXT NOT NULL,
    column_name TEXT NOT NULL,
    postgres_type TEXT NOT NULL,
    position INTEGER NOT NULL,
    is_key INTEGER NOT NULL,
    PRIMARY KEY(table_name, column_name)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _anabranch_dropped(
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    table_name TEXT NOT NULL,
    sql TEXT NOT NULL,
    reason TEXT NOT NULL,
    dropped_time TEXT NOT NULL
) STRICT;
";

/// A live table is as of the file's position; a stopped one as of its own. Tables of ours are not for programs.
const TABLES_VIEW: &str = "CREATE VIEW _anabranch_tables AS SELECT table_name, state, reason, \
    CASE state WHEN 'live' THEN (SELECT lsn FROM _anabranch_state) ELSE lsn END AS lsn \
    FROM _anabranch_synced WHERE table_name NOT IN ('_anabranch_receipts', '_anabranch_rejections')";

/// The row of `_anabranch_state`, as last committed.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub replica_id: String,
    /// Behind this local transaction the chain of this id begins.
    pub chain_seq: i64,
    /// From here on those up to there have their effects in the file, or are given up: see `identity`.
    pub settle: Option<Position>,
    /// Up to this local transaction they were answered once, though no receipt says so any more: Postgres lost it, or does not
    /// show it to the subject of today's token.
    pub answered_once: i64,
    /// The id that the token was given to, if that was another.
    pub token_id: Option<String>,
    pub position: Option<Position>,
    pub resume_token: Bytes,
    pub commit_time: Option<String>,
    pub received_time: Option<String>,
    pub connected: bool,
    pub caught_up: bool,
    pub last_error: Option<String>,
}

/// Makes what is missing of our own tables. Within a write transaction.
pub(super) fn create(connection: &Connection, replica_id: &str) -> rusqlite::Result<()> {
    connection.execute_batch(TABLES)?;
    connection.execute_batch(receipts::TABLES)?;
    connection.execute_batch(leases::TABLES)?;
    capture::create_shared(connection)?;
    for (name, sql) in [
        ("_anabranch_status", status::view()),
        ("_anabranch_tables", TABLES_VIEW.to_owned()),
        ("_anabranch_outbox", outbox::view(connection)?),
        ("_anabranch_ids", leases::view()),
    ] {
        replace_view(connection, name, &sql)?;
    }
    connection.execute(
        "INSERT INTO _anabranch_state(id, format, replica_id, chain_seq, resume_token, connected, caught_up) \
         VALUES(1, ?1, ?2, 0, x'', 0, 0) ON CONFLICT DO NOTHING",
        params![FORMAT, replica_id],
    )?;
    Ok(())
}

/// Makes a view be as `sql` says, without writing if it is.
pub(super) fn replace_view(connection: &Connection, name: &str, sql: &str) -> rusqlite::Result<()> {
    let there: Option<String> = connection
        .prepare_cached(
            "SELECT sql FROM sqlite_schema WHERE type = 'view' AND name = ?1 COLLATE NOCASE",
        )?
        .query_row([name], |row| row.get(0))
        .optional()?;
    if there.as_deref() == Some(sql) {
        return Ok(());
    }
    if there.is_some() {
        drop_view(connection, name)?;
    }
    connection.execute_batch(sql)
}

/// Drops a view of ours.
pub(super) fn drop_view(connection: &Connection, name: &str) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "DROP VIEW IF EXISTS {}",
        super::names::quote(name)
    ))
}

/// The version of our tables in this file, if it has any. Refuses a newer one.
pub(super) fn check_format(connection: &Connection) -> Result<bool, Error> {
    let is_ours = connection
        .query_row(
            "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '_anabranch_state'",
            [],
            |_| Ok(()),
        )
        .optional()
        .doing("read the file's schema")?
        .is_some();
    if !is_ours {
        return Ok(false);
    }
    let format: Option<i64> = connection
        .query_row("SELECT format FROM _anabranch_state", [], |row| row.get(0))
        .optional()
        .doing("read the version of the file")?;
    match format {
        Some(format) if format > FORMAT => Err(Error::Definite(format!(
            "the file was written by a newer replica (its format is {format}, this program knows up to {FORMAT}): update this program"
        ))),
        Some(format) if format < FORMAT => Err(Error::Definite(format!(
            "the file was written by an older replica (its format is {format}, this program writes {FORMAT}): let that one \
             send what is pending in it, then remove it; its content is sent anew"
        ))),
        _ => Ok(true),
    }
}

impl State {
    /// Reads the row.
    pub(super) fn load(connection: &Connection) -> Result<State, Error> {
        connection
            .query_row(
                "SELECT replica_id, epoch, lsn, resume_token, commit_time, received_time, connected, caught_up, \
                 last_error, chain_seq, settle, token_id, answered_once FROM _anabranch_state",
                [],
                |row| {
                    let epoch: Option<String> = row.get(1)?;
                    let lsn: Option<String> = row.get(2)?;
                    let position = epoch.zip(lsn).and_then(|(epoch, lsn)| {
                        Some(Position {
                            epoch: epoch.parse().ok()?,
                            lsn: lsn.parse().ok()?,
                        })
                    });
                    let token: Vec<u8> = row.get(3)?;
                    Ok(State {
                        replica_id: row.get(0)?,
                        chain_seq: row.get(9)?,
                        settle: row
                            .get::<_, Option<String>>(10)?
                            .and_then(|settle| settle.parse().ok()),
                        answered_once: row.get(12)?,
                        token_id: row.get(11)?,
                        // Without a position that can be read, the token proves nothing.
                        resume_token: if position.is_some() { token.into() } else { Bytes::new() },
                        position,
                        commit_time: row.get(4)?,
                        received_time: row.get(5)?,
                        connected: row.get(6)?,
                        caught_up: row.get(7)?,
                        last_error: row.get(8)?,
                    })
                },
            )
            .doing("read the state of the file")
    }

    /// Whether the file still says what was last written. Within a write transaction, before anything is written.
    ///
    /// Somebody may have put older content into the file (`.restore`, the backup API), which neither the file's name nor
    /// its inode shows. A row that is gone says nothing of what the tables hold, so it is not what was written either.
    pub(super) fn is_in_file(&self, connection: &Connection) -> Result<bool, Error> {
        let position = self
            .position
            .map(|at| (at.epoch.to_string(), at.lsn.to_string()));
        let (epoch, lsn) = position.unzip();
        let look = || {
            connection
                .prepare_cached(
                    "SELECT replica_id = ?1 AND epoch IS ?2 AND lsn IS ?3 AND resume_token = ?4 \
                     FROM _anabranch_state WHERE id = 1",
                )?
                .query_row(
                    params![self.replica_id, epoch, lsn, &self.resume_token[..]],
                    |row| row.get(0),
                )
                .optional()
        };
        match look() {
            Ok(same) => Ok(same.unwrap_or(false)),
            // There is no such table, or another one.
            Err(error) if error::is_of_statement(&error) => Ok(false),
            Err(error) => Err(error::sqlite("read the state of the file", error)),
        }
    }

    /// Writes the row, with a heartbeat of now. Within a write transaction.
    pub(super) fn store(&self, connection: &Connection) -> rusqlite::Result<()> {
        // An upsert, since a program may have deleted the row.
        connection
            .prepare_cached(
                "INSERT INTO _anabranch_state(id, format, replica_id, epoch, lsn, resume_token, commit_time, \
                 received_time, heartbeat_time, connected, caught_up, last_error, chain_seq, settle, token_id, \
                 answered_once) \
                 VALUES(1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) \
                 ON CONFLICT(id) DO UPDATE SET format = excluded.format, replica_id = excluded.replica_id, \
                 epoch = excluded.epoch, lsn = excluded.lsn, resume_token = excluded.resume_token, \
                 commit_time = excluded.commit_time, received_time = excluded.received_time, \
                 heartbeat_time = excluded.heartbeat_time, connected = excluded.connected, \
                 caught_up = excluded.caught_up, last_error = excluded.last_error, \
                 chain_seq = excluded.chain_seq, settle = excluded.settle, token_id = excluded.token_id, \
                 answered_once = excluded.answered_once",
            )?
            .execute(params![
                FORMAT,
                self.replica_id,
                self.position.map(|position| position.epoch.to_string()),
                self.position.map(|position| position.lsn.to_string()),
                &self.resume_token[..],
                self.commit_time,
                self.received_time,
                time_text(Timestamp::now()),
                self.connected,
                self.caught_up,
                self.last_error,
                self.chain_seq,
                self.settle.map(|settle| settle.to_string()),
                self.token_id,
                self.answered_once,
            ])
            .map(drop)
    }

    /// Takes over a token, which was given to this id.
    pub(super) fn set_token(&mut self, token: Bytes) {
        self.resume_token = token;
        self.token_id = None;
    }

    /// Whether what was answered elsewhere has its effects in the file at this position.
    pub(super) fn settles_at(&self, position: Position) -> bool {
        self.settle.is_some_and(|settle| {
            settle.epoch == position.epoch && status::reaches(position.lsn, settle.lsn)
        })
    }

    /// Whether that can't be told any more: another history goes on, which may lack what was answered.
    pub(super) fn settles_elsewhere(&self) -> bool {
        let settle = self.settle.zip(self.position);
        settle.is_some_and(|(settle, position)| settle.epoch != position.epoch)
    }

    /// Keeps an error for people to read.
    pub(super) fn set_last_error(&mut self, error: Option<&str>) {
        self.last_error = error.map(|error| {
            let mut end = error.len().min(LAST_ERROR_BYTES_MAX);
            while !error.is_char_boundary(end) {
                end -= 1;
            }
            error[..end].to_owned()
        });
    }
}

/// What was last heard of the source: what the status is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    pub source_lsn: Lsn,
    pub source_connected: bool,
    pub time: Timestamp,
}

impl State {
    /// Takes over what was heard, and judges at `now` whether the position is all there is.
    pub(super) fn hear(&mut self, heard: &Heard, now: Timestamp) {
        self.received_time = Some(time_text(heard.time));
        let age = now.duration_since(heard.time).unsigned_abs();
        self.caught_up = heard.source_connected
            && age <= status::HEARD_AGE_MAX
            && self
                .position
                .is_some_and(|position| status::reaches(position.lsn, heard.source_lsn));
    }

    /// Takes over a commit time.
    pub(super) fn committed_at(&mut self, micros: i64) {
        self.commit_time = micros_text(micros);
    }
}
