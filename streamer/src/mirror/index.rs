//! The change index: what the mirror's rows were before each transaction.
//!
//! One entry for each (transaction, table, key), the first wins: the row before the transaction, or that there was
//! none. Transactions are counted by an ordinal of the mirror's own, since entries of a large one are written before
//! its LSN is known; `txn` says which ordinal is which LSN, and since both grow within an epoch, a position is
//! found by binary search, without a second index. Entries are only ever appended, and trimmed by dropping whole
//! segments: nothing is deleted row by row but the short table `txn`.
//!
//! Its clock is the commit time of the transactions, so that the same WAL gives the same index. A source whose clock
//! jumps ahead loses history that was only kept to be kind; order never depends on it.

use anabranch_proto::{Epoch, Lsn};
use rusqlite::Connection;

use super::{Error, Key, Settings, schema};
use crate::{table::Oid, transaction::End};

/// The index is cut in about this many segments, so a trim takes about this part of it.
const SEGMENTS: u64 = 16;

/// A segment is closed at this size at the latest: dropping one reads all its pages, while the engine waits.
const SEGMENT_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// And no earlier than at this one, however small the index is to be.
const SEGMENT_BYTES_MIN: u64 = 4096;

/// What an entry takes beside its key and row.
const ENTRY_BYTES: u64 = 16;

/// A transaction that ends in more segments than this at once is trimmed over several commits.
const DROPPED_AT_ONCE_MAX: usize = 4;

#[derive(Debug)]
pub(super) struct Index {
    bytes_max: u64,
    age_max: i64,
    /// Oldest first; never empty.
    segments: Vec<Segment>,
    /// Of the last transaction that has entries; 0 before the first.
    last: i64,
    /// Entries reach back to here, and no further: trimmed up to here, or the epoch began here.
    pub floor: Lsn,
    insert: String,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    n: i64,
    first: i64,
    bytes: u64,
    /// Commit time of its first transaction.
    began: Option<i64>,
    /// `bytes` or `began` differ from the file.
    changed: bool,
}

impl Index {
    /// Reads what the file says of it. An empty one gets its first segment with the first group.
    pub fn load(sqlite: &Connection, floor: Lsn, settings: &Settings) -> Result<Index, Error> {
        let segments = sqlite
            .prepare("SELECT n, first, bytes, began FROM segment ORDER BY n")?
            .query_map([], |row| {
                Ok(Segment {
                    n: row.get(0)?,
                    first: row.get(1)?,
                    bytes: row.get::<_, i64>(2)? as u64,
                    began: row.get(3)?,
                    changed: false,
                })
            })?
            .collect::<Result<Vec<_>, _>>()?;
        let last: Option<i64> =
            sqlite.query_row("SELECT max(ordinal) FROM txn", [], |row| row.get(0))?;
        // Trimming may leave no transaction at all, but ordinals are never used twice.
        let last = last.unwrap_or_else(|| segments.last().map_or(0, |segment| segment.first - 1));
        let mut index = Index {
            bytes_max: settings.index_bytes_max,
            age_max: i64::from(settings.index_hours_max).saturating_mul(3_600_000_000),
            segments,
            last,
            floor,
            insert: String::new(),
        };
        index.aim();
        Ok(index)
    }

    fn aim(&mut self) {
        if let Some(segment) = self.segments.last() {
            self.insert = format!(
                "INSERT OR IGNORE INTO changes_{}(txn, tbl, k, version, old) VALUES(?1, ?2, ?3, ?4, ?5)",
                segment.n
            );
        }
    }

    /// The ordinal that the next transaction with entries gets. Makes the first segment if there is none.
    pub fn begin(&mut self, sqlite: &Connection) -> Result<i64, rusqlite::Error> {
        if self.segments.is_empty() {
            self.add_segment(sqlite)?;
        }
        Ok(self.last + 1)
    }

    /// Adds an entry, unless there is one.
    pub fn add(
        &mut self,
        sqlite: &Connection,
        ordinal: i64,
        (oid, version): (Oid, u32),
        key: &Key,
        old: Option<&[u8]>,
    ) -> Result<(), rusqlite::Error> {
        let mut insert = sqlite.prepare_cached(&self.insert)?;
        insert.raw_bind_parameter(1, ordinal)?;
        insert.raw_bind_parameter(2, oid)?;
        insert.raw_bind_parameter(3, key)?;
        insert.raw_bind_parameter(4, version)?;
        insert.raw_bind_parameter(5, old)?;
        if insert.raw_execute()? == 1 {
            self.grew(key.bytes() as u64 + old.map_or(0, <[u8]>::len) as u64 + ENTRY_BYTES);
        }
        Ok(())
    }

    /// Adds an entry for each row of a table, unless there is one.
    pub fn add_all(
        &mut self,
        sqlite: &Connection,
        ordinal: i64,
        (oid, version): (Oid, u32),
    ) -> Result<(), rusqlite::Error> {
        let segment = self.current();
        let bytes: i64 = sqlite.query_row(
            &format!(
                "SELECT coalesce(sum(length(r) + length(k) + {ENTRY_BYTES}), 0) FROM rows_{oid}"
            ),
            [],
            |row| row.get(0),
        )?;
        sqlite.execute(
            &format!(
                "INSERT OR IGNORE INTO changes_{segment}(txn, tbl, k, version, old)
                 SELECT ?1, ?2, k, ?3, r FROM rows_{oid}"
            ),
            (ordinal, oid, version),
        )?;
        self.grew(bytes as u64);
        Ok(())
    }

    /// The number of the segment that is written.
    pub fn current(&self) -> i64 {
        self.segments.last().map_or(0, |segment| segment.n)
    }

    fn grew(&mut self, bytes: u64) {
        if let Some(segment) = self.segments.last_mut() {
            segment.bytes += bytes;
            segment.changed = true;
        }
    }

    /// The transaction that has the entries under `ordinal` ends.
    pub fn end(
        &mut self,
        sqlite: &Connection,
        ordinal: i64,
        end: End,
        epoch: Epoch,
    ) -> Result<(), rusqlite::Error> {
        let mut insert = sqlite.prepare_cached(
            "INSERT INTO txn(ordinal, epoch, lsn, commit_time) VALUES(?1, ?2, ?3, ?4)",
        )?;
        insert.execute((ordinal, epoch.0 as i64, end.lsn.0 as i64, end.commit_time))?;
        self.last = ordinal;
        if let Some(segment) = self.segments.last_mut()
            && segment.began.is_none()
        {
            segment.began = Some(end.commit_time);
            segment.changed = true;
        }
        Ok(())
    }

    /// A batch of copied rows that has the entries under `ordinal` ends. It is no transaction of the source: it lies below
    /// all of them, and has no time.
    pub fn end_copied(&mut self, sqlite: &Connection, ordinal: i64) -> Result<(), rusqlite::Error> {
        sqlite
            .prepare_cached(
                "INSERT INTO txn(ordinal, epoch, lsn, commit_time) VALUES(?1, 0, 0, 0)",
            )?
            .execute([ordinal])?;
        self.last = ordinal;
        Ok(())
    }

    /// Before a commit: writes down how large it is, starts a new segment where the last is full or old, and drops
    /// what is too much or too old. `now` is the commit time of the last transaction.
    pub fn maintain(&mut self, sqlite: &Connection, now: i64) -> Result<(), Error> {
        for segment in self.segments.iter_mut().filter(|segment| segment.changed) {
            sqlite
                .prepare_cached("UPDATE segment SET bytes = ?2, began = ?3 WHERE n = ?1")?
                .execute((segment.n, segment.bytes as i64, segment.began))?;
            segment.changed = false;
        }
        let Some(current) = self.segments.last() else {
            return Ok(());
        };
        let bytes_max = (self.bytes_max / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
        let age = current.began.map_or(0, |began| now.saturating_sub(began));
        if current.bytes >= bytes_max || age > self.age_max / SEGMENTS as i64 && current.bytes > 0 {
            self.add_segment(sqlite)?;
        }
        for _ in 0..DROPPED_AT_ONCE_MAX {
            if !self.drop_oldest(sqlite, now)? {
                break;
            }
        }
        Ok(())
    }

    fn add_segment(&mut self, sqlite: &Connection) -> Result<(), rusqlite::Error> {
        let segment = Segment {
            n: self.segments.last().map_or(1, |segment| segment.n + 1),
            first: self.last + 1,
            bytes: 0,
            began: None,
            changed: false,
        };
        schema::create_segment(sqlite, segment.n)?;
        sqlite.execute(
            "INSERT INTO segment(n, first, bytes) VALUES(?1, ?2, 0)",
            (segment.n, segment.first),
        )?;
        self.segments.push(segment);
        self.aim();
        Ok(())
    }

    fn drop_oldest(&mut self, sqlite: &Connection, now: i64) -> Result<bool, Error> {
        let [oldest, next, ..] = self.segments[..] else {
            return Ok(false);
        };
        let bytes: u64 = self.segments.iter().map(|segment| segment.bytes).sum();
        // All of a segment is at least as old as the first transaction of the next.
        let age = next.began.map_or(0, |began| now.saturating_sub(began));
        if bytes <= self.bytes_max && age <= self.age_max {
            return Ok(false);
        }
        if next.first > oldest.first {
            let (lsn, epoch): (i64, i64) = sqlite.query_row(
                "SELECT lsn, epoch FROM txn WHERE ordinal = ?1",
                [next.first - 1],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
            // The floor is one of the present epoch; what is left of an older one reaches nobody anyway.
            let current: i64 = sqlite.query_row("SELECT epoch FROM state", [], |row| row.get(0))?;
            if epoch == current {
                self.floor = self.floor.max(Lsn(lsn as u64));
                sqlite.execute("UPDATE state SET index_floor = ?1", [self.floor.0 as i64])?;
            }
        }
        sqlite.execute_batch(&format!("DROP TABLE changes_{}", oldest.n))?;
        sqlite.execute("DELETE FROM segment WHERE n = ?1", [oldest.n])?;
        sqlite.execute("DELETE FROM txn WHERE ordinal < ?1", [next.first])?;
        self.segments.remove(0);
        Ok(true)
    }

    /// The first ordinal that there can still be entries of.
    pub fn first(&self) -> i64 {
        self.segments.first().map_or(1, |segment| segment.first)
    }

    /// The ordinal that the first transaction from here on gets.
    pub fn next(&self) -> i64 {
        self.last + 1
    }
}

/// The ordinal of the last transaction at or below `lsn`, given that those in `first..=last` are of one epoch and
/// there are no others; `first - 1` if none is.
pub(super) fn ordinal_at(
    sqlite: &Connection,
    lsn: Lsn,
    first: i64,
    last: i64,
) -> Result<i64, Error> {
    let mut statement = sqlite.prepare_cached("SELECT lsn FROM txn WHERE ordinal = ?1")?;
    let (mut at_or_below, mut above) = (first - 1, last + 1);
    while at_or_below + 1 < above {
        let middle = at_or_below + (above - at_or_below) / 2;
        let found: i64 = statement.query_row([middle], |row| row.get(0))?;
        if Lsn(found as u64) <= lsn {
            at_or_below = middle;
        } else {
            above = middle;
        }
    }
    Ok(at_or_below)
}
