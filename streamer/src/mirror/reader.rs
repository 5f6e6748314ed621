//! Snapshots of the mirror for catch-ups: a read-only connection of its own.
//!
//! What it offers beyond opening and closing is for `catchup`: rows in key order, and what the change index has on a
//! range of keys. It decides nothing about what a replica may see.

use std::{collections::HashSet, path::Path};

use anabranch_proto::{Epoch, Lsn, Position};
use bytes::Bytes;
use foldhash::fast::FixedState;
use rusqlite::{Connection, OptionalExtension, Rows, types::ValueRef};

use super::{Error, Key, index::ordinal_at, list::List, schema};
use crate::table::{Oid, Table};

/// A read-only connection, for one catch-up at a time.
pub struct Reader {
    sqlite: Connection,
    snapshot: Option<Snapshot>,
    /// The list that was filled last. Readers are handed about, and most have none.
    pub(super) list: Option<Box<List>>,
}

/// What an open snapshot says of the whole mirror.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub position: Position,
    /// Changes whenever history was broken: what was found before does not hold any more.
    pub histories: i64,
    /// The first ordinal of this epoch that the change index still has, or the next one.
    pub first: i64,
    /// The last ordinal there is; `first - 1` if none.
    pub last: i64,
    /// Where the change index begins.
    floor: Lsn,
    /// Segments and their first ordinals, oldest first.
    pub(super) segments: Vec<(i64, i64)>,
}

/// What a snapshot says of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Its copy is complete.
    pub copied: bool,
    /// It may be read although its copy is not complete.
    pub open: bool,
    /// It is not followed any more.
    pub stopped: bool,
    /// The number of the copy that its rows come from.
    pub copy: i64,
    pub floor: Lsn,
    /// The lowest position from which the change index has it.
    pub reach: Lsn,
    pub version: u32,
}

/// A range of keys: above `after`, up to and with `upto`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys<'a> {
    pub after: Option<&'a Key>,
    pub upto: Option<&'a Key>,
}

impl Reader {
    pub(super) fn open(file: &Path, cache_bytes: usize) -> Result<Reader, Error> {
        Ok(Reader {
            sqlite: schema::open_reader(file, cache_bytes)?,
            snapshot: None,
            list: None,
        })
    }

    /// Opens a snapshot: the mirror as of its last committed group. Returns its position.
    pub fn begin(&mut self) -> Result<Position, Error> {
        self.end();
        self.sqlite.prepare_cached("BEGIN")?.execute([])?;
        match self.look() {
            Ok(snapshot) => {
                let position = snapshot.position;
                self.snapshot = Some(snapshot);
                Ok(position)
            }
            Err(error) => {
                self.end();
                Err(error)
            }
        }
    }

    /// The first read takes the snapshot.
    fn look(&self) -> Result<Snapshot, Error> {
        let (position, floor, histories) = self
            .sqlite
            .prepare_cached("SELECT epoch, lsn, index_floor, histories FROM state")?
            .query_row([], |row| {
                let position = Position {
                    epoch: Epoch(row.get::<_, i64>(0)? as u64),
                    lsn: Lsn(row.get::<_, i64>(1)? as u64),
                };
                Ok((position, Lsn(row.get::<_, i64>(2)? as u64), row.get(3)?))
            })?;
        let segments: Vec<(i64, i64)> = self
            .sqlite
            .prepare_cached("SELECT n, first FROM segment ORDER BY n")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        let of_epoch: Option<i64> = self
            .sqlite
            .prepare_cached("SELECT first FROM epoch WHERE id = ?1")?
            .query_row([position.epoch.0 as i64], |row| row.get(0))
            .optional()?;
        let kept = segments.first().map_or(1, |(_, first)| *first);
        let first = of_epoch.map_or(kept, |first| first.max(kept));
        let last: Option<i64> = self
            .sqlite
            .prepare_cached("SELECT max(ordinal) FROM txn")?
            .query_row([], |row| row.get(0))?;
        Ok(Snapshot {
            position,
            histories,
            first,
            last: last.unwrap_or(0).max(first - 1),
            floor,
            segments,
        })
    }

    /// Ends the snapshot.
    pub fn end(&mut self) {
        self.snapshot = None;
        if !self.sqlite.is_autocommit() {
            // COMMIT, so that temporary tables outlive the snapshot. It can't fail for what was only read; if it does,
            // the snapshot must not stay open whatever becomes of those.
            if self.sqlite.execute_batch("COMMIT").is_err() {
                let _ = self.forget_collected();
                let _ = self.sqlite.execute_batch("ROLLBACK");
            }
        }
    }

    /// Whether the change index reaches back to `from` for this table (not trimmed, not in a hole, same epoch,
    /// copied before). Within a snapshot.
    pub fn reaches(&self, table: Oid, from: Position) -> Result<bool, Error> {
        let snapshot = self.snapshot()?;
        if from.epoch != snapshot.position.epoch || from.lsn < snapshot.floor {
            return Ok(false);
        }
        let Some(standing) = self.standing(table)? else {
            return Ok(false);
        };
        if !standing.copied || from.lsn < standing.reach {
            return Ok(false);
        }
        let mut holes =
            (self.sqlite).prepare_cached("SELECT after, upto FROM hole WHERE epoch = ?1")?;
        let mut holes = holes.query([from.epoch.0 as i64])?;
        while let Some(hole) = holes.next()? {
            let (after, upto) = (hole.get::<_, i64>(0)? as u64, hole.get::<_, i64>(1)? as u64);
            if after < from.lsn.0 && from.lsn.0 < upto {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The open snapshot.
    pub(crate) fn snapshot(&self) -> Result<&Snapshot, Error> {
        self.snapshot
            .as_ref()
            .ok_or(Error::Misused("no snapshot is open"))
    }

    /// What it says of a table.
    pub(crate) fn standing(&self, table: Oid) -> Result<Option<Standing>, Error> {
        Ok(self
            .sqlite
            .prepare_cached(
                "SELECT state, open, floor, version, reach, stopped, copy FROM tables WHERE oid = ?1",
            )?
            .query_row([table], |row| {
                Ok(Standing {
                    copied: row.get::<_, i64>(0)? != super::State::Copying.columns().0,
                    open: row.get(1)?,
                    floor: Lsn(row.get::<_, i64>(2)? as u64),
                    version: row.get(3)?,
                    reach: Lsn(row.get::<_, i64>(4)? as u64),
                    stopped: row.get::<_, Option<i64>>(5)?.is_some(),
                    copy: row.get(6)?,
                })
            })
            .optional()?)
    }

    /// The tables that may be seen: their copies are complete, and not ahead of the position.
    pub(super) fn complete(&self) -> Result<HashSet<Oid, FixedState>, Error> {
        let position = self.snapshot()?.position;
        let mut statement =
            (self.sqlite).prepare_cached("SELECT oid, floor FROM tables WHERE state <> ?1")?;
        let mut tables = statement.query([super::State::Copying.columns().0])?;
        let mut complete = HashSet::default();
        while let Some(table) = tables.next()? {
            if Lsn(table.get::<_, i64>(1)? as u64) <= position.lsn {
                complete.insert(table.get(0)?);
            }
        }
        Ok(complete)
    }

    /// A table's name, for people.
    pub(super) fn name(&self, table: Oid) -> Result<String, Error> {
        let schema: Option<String> = self
            .sqlite
            .query_row("SELECT schema FROM tables WHERE oid = ?1", [table], |row| {
                row.get(0)
            })
            .optional()?;
        let known = schema.and_then(|schema| serde_json::from_str::<Table>(&schema).ok());
        Ok(known.map_or_else(|| format!("table {table}"), |known| known.full_name()))
    }

    /// The tables that are not followed any more, and why.
    pub(crate) fn stopped(&self) -> Result<Vec<(Oid, String)>, Error> {
        let mut statement = (self.sqlite)
            .prepare_cached("SELECT oid, reason FROM tables WHERE stopped IS NOT NULL")?;
        let stopped = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(stopped.collect::<Result<_, _>>()?)
    }

    /// The ordinal of the last transaction at or below a position of this epoch that the change index reaches.
    pub(crate) fn ordinal_at(&self, lsn: Lsn) -> Result<i64, Error> {
        let snapshot = self.snapshot()?;
        ordinal_at(&self.sqlite, lsn, snapshot.first, snapshot.last)
    }

    /// The highest key of a table's rows.
    pub(crate) fn highest(&self, table: Oid) -> Result<Option<Key>, Error> {
        Ok(self
            .sqlite
            .prepare_cached(&format!("SELECT max(k) FROM rows_{table}"))?
            .query_row([], |row| row.get(0))?)
    }

    /// The row of a key, now.
    pub(crate) fn row(&self, table: Oid, key: &Key) -> Result<Option<Bytes>, Error> {
        Ok(self
            .sqlite
            .prepare_cached(&format!("SELECT r FROM rows_{table} WHERE k = ?1"))?
            .query_row([key], |row| bytes(row.get_ref(0)?))
            .optional()?)
    }

    /// Gives rows in key order until `each` says that it is enough.
    pub(crate) fn scan(
        &self,
        table: Oid,
        keys: Keys<'_>,
        mut each: impl FnMut(Key, Bytes) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = keys.condition();
        let mut statement = self.sqlite.prepare_cached(&format!(
            "SELECT k, r FROM rows_{table} WHERE {range} ORDER BY k"
        ))?;
        let mut rows = statement.query((keys.after, keys.upto))?;
        while let Some(row) = rows.next()? {
            if !each(row.get(0)?, bytes(row.get_ref(1)?)?)? {
                break;
            }
        }
        Ok(())
    }

    /// Gives what transactions after `from`, up to and with `upto`, changed in a table: each key with what its row was
    /// before the first of them, in key order, until `each` says that it is enough. For few transactions: a cursor is open
    /// on each.
    pub(crate) fn changes_of(
        &self,
        table: &Table,
        from: i64,
        upto: i64,
        keys: Keys<'_>,
        mut each: impl FnMut(Key, Option<Bytes>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let range = keys.condition();
        let mut statements = Vec::new();
        for ordinal in from + 1..=upto {
            let segment = self.segment(ordinal)?;
            let statement = self.sqlite.prepare_cached(&format!(
                "SELECT k, old, version FROM changes_{segment} WHERE txn = ?3 AND tbl = ?4 AND {range} ORDER BY k"
            ))?;
            statements.push((ordinal, statement));
        }
        let mut cursors = Vec::new();
        for (ordinal, statement) in &mut statements {
            let mut entries = statement.query((keys.after, keys.upto, *ordinal, table.oid))?;
            if let Some(head) = entry(table, &mut entries)? {
                cursors.push((head, entries));
            }
        }
        // Of entries of one key, that of the first transaction comes first.
        while let Some(first) = (0..cursors.len()).min_by_key(|place| &cursors[*place].0.0) {
            let ((key, old), _) = &cursors[first];
            let (key, old) = (key.clone(), old.clone());
            for place in (first..cursors.len()).rev() {
                let (head, entries) = &mut cursors[place];
                if head.0 == key {
                    match entry(table, entries)? {
                        Some(next) => *head = next,
                        None => drop(cursors.remove(place)),
                    }
                }
            }
            if !each(key, old)? {
                break;
            }
        }
        Ok(())
    }

    /// What the row of a key was before a transaction that has an entry for it.
    pub(crate) fn old(
        &self,
        table: &Table,
        ordinal: i64,
        key: &Key,
    ) -> Result<Option<Bytes>, Error> {
        let segment = self.segment(ordinal)?;
        let found = self
            .sqlite
            .prepare_cached(&format!(
                "SELECT old, version FROM changes_{segment} WHERE txn = ?1 AND tbl = ?2 AND k = ?3"
            ))?
            .query_row((ordinal, table.oid, key), |row| {
                Ok((old(row.get_ref(0)?)?, row.get(1)?))
            })
            .optional()?;
        let Some((old, version)) = found else {
            return Err(Error::Damaged(
                "an entry of the change index is gone".into(),
            ));
        };
        check_version(table, version)?;
        Ok(old)
    }

    fn segment(&self, ordinal: i64) -> Result<i64, Error> {
        let segments = &self.snapshot()?.segments;
        let place = segments.partition_point(|(_, first)| *first <= ordinal);
        match place.checked_sub(1).and_then(|place| segments.get(place)) {
            Some((n, _)) => Ok(*n),
            None => Err(Error::Damaged(
                "a segment of the change index is gone".into(),
            )),
        }
    }

    /// For lookups.
    pub(super) fn sqlite(&self) -> &Connection {
        &self.sqlite
    }
}

impl Keys<'_> {
    /// As a condition on `k`, with the bounds as the first two parameters.
    pub(super) fn condition(&self) -> &'static str {
        match (self.after, self.upto) {
            (Some(_), Some(_)) => "k > ?1 AND k <= ?2",
            (Some(_), None) => "k > ?1 AND ?2 IS NULL",
            (None, Some(_)) => "?1 IS NULL AND k <= ?2",
            (None, None) => "?1 IS NULL AND ?2 IS NULL",
        }
    }
}

/// The next entry of a cursor on the change index: key, and what was before.
fn entry(table: &Table, entries: &mut Rows<'_>) -> Result<Option<(Key, Option<Bytes>)>, Error> {
    let Some(entry) = entries.next()? else {
        return Ok(None);
    };
    check_version(table, entry.get(2)?)?;
    Ok(Some((entry.get(0)?, old(entry.get_ref(1)?)?)))
}

fn check_version(table: &Table, version: u32) -> Result<(), Error> {
    if version == table.version {
        Ok(())
    } else {
        Err(Error::OutOfReach(table.full_name()))
    }
}

fn bytes(value: ValueRef<'_>) -> Result<Bytes, rusqlite::Error> {
    Ok(Bytes::copy_from_slice(value.as_blob()?))
}

fn old(value: ValueRef<'_>) -> Result<Option<Bytes>, rusqlite::Error> {
    Ok(value.as_blob_or_null()?.map(Bytes::copy_from_slice))
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end();
    }
}
