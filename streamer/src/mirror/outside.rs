//! The mirror of a streamer that runs, read by another process of the same user: for commands that look and compute, which
//! must not cost the streamer memory or time.
//!
//! SQLite's WAL lets both work at the same time; what must be heeded is that a snapshot keeps the log from being used
//! anew, so whoever reads takes a new one after [`SNAPSHOT_HOLD_MAX`].
//!
//! Conditions may look for rows by indexes that the mirror does not have: those of shapes that are not in force yet. They are
//! made in temporary tables of this process, in files, for as long as it runs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rusqlite::Connection;

use super::{
    Error, Key, Keys, Reader,
    lookup::{Now, Range, blob},
    secondary,
};
use crate::{
    lookup::{self, Each, Index, Lookup},
    table::Oid,
};

/// How long one snapshot is held, about. Five seconds is what any may be.
pub const SNAPSHOT_HOLD_MAX: Duration = Duration::from_secs(2);

/// How often that time is looked at, in rows.
const LOOK_EVERY: u64 = 256;

/// A mirror that belongs to another process.
pub struct Outside {
    reader: Reader,
    made: Vec<Index>,
}

/// The rows of its snapshot, also by indexes that were made here.
pub struct Here<'a> {
    now: Now<'a>,
    sqlite: &'a Connection,
    made: &'a [Index],
}

impl Outside {
    /// Opens the mirror in a streamer's `data_dir`.
    pub fn open(directory: &Path, cache_bytes: usize) -> Result<Outside, Error> {
        let file = directory.join("mirror.db");
        Ok(Outside {
            reader: Reader::open(&file, cache_bytes)?,
            made: Vec::new(),
        })
    }

    /// Opens a snapshot with [`Reader::begin`], reads with the others, and ends it.
    pub fn reader(&mut self) -> &mut Reader {
        &mut self.reader
    }

    /// The rows as of the open snapshot.
    pub fn here(&self) -> Result<Here<'_>, Error> {
        Ok(Here {
            now: self.reader.now()?,
            sqlite: self.reader.sqlite(),
            made: &self.made,
        })
    }

    /// Makes those of the indexes that the mirror does not have. The tables are there and complete.
    pub fn make_indexes<'i>(
        &mut self,
        indexes: impl IntoIterator<Item = &'i Index>,
    ) -> Result<(), Error> {
        let there = self.reader.indexes()?;
        for index in indexes {
            if index.parts.is_empty() || self.made.contains(index) || there.contains(index) {
                continue;
            }
            self.reader.sqlite().execute_batch(&format!(
                "CREATE TEMP TABLE {}(key BLOB NOT NULL, r BLOB NOT NULL)",
                table_of(index)
            ))?;
            self.scan(index.table, &mut |here, _, row| {
                let key = index.key(&row).map_err(|error| {
                    Error::Damaged(format!("a row of table {}: {error}", index.table))
                })?;
                here.sqlite
                    .prepare_cached(&format!(
                        "INSERT INTO temp.{} VALUES(?1, ?2)",
                        table_of(index)
                    ))?
                    .execute((key, &row[..]))?;
                Ok(())
            })?;
            let name = table_of(index);
            self.reader
                .sqlite()
                .execute_batch(&format!("CREATE INDEX temp.by_{name} ON {name}(key)"))?;
            self.made.push(index.clone());
        }
        Ok(())
    }

    /// Gives all rows of a table in key order, in as many snapshots as it takes: each is open while `each` is called.
    pub fn scan(
        &mut self,
        table: Oid,
        each: &mut dyn FnMut(&Here<'_>, &Key, Bytes) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut after: Option<Key> = None;
        loop {
            self.reader.begin()?;
            let began = Instant::now();
            let (mut rows, mut more) = (0u64, false);
            let keys = Keys {
                after: after.as_ref(),
                upto: None,
            };
            let mut last = None;
            let here = self.here()?;
            let scanned = self.reader.scan(table, keys, |key, row| {
                each(&here, &key, row)?;
                last = Some(key);
                rows += 1;
                more = rows.is_multiple_of(LOOK_EVERY) && began.elapsed() >= SNAPSHOT_HOLD_MAX;
                Ok(!more)
            });
            self.reader.end();
            scanned?;
            if !more {
                return Ok(());
            }
            after = last;
        }
    }
}

fn table_of(index: &Index) -> String {
    format!("made_{}", secondary::suffix(index))
}

impl Lookup for Here<'_> {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), lookup::Error> {
        if !self.made.contains(index) {
            return self.now.rows(index, prefix, each);
        }
        let range = Range::new(prefix)?;
        let condition = match range.bounds {
            Some(_) => "key >= ?1 AND key < ?2",
            None => "?1 IS NULL AND ?2 IS NULL",
        };
        let sql = format!(
            "SELECT key, r FROM temp.{} WHERE {condition}",
            table_of(index)
        );
        range.search(self.sqlite, &sql, &[], &mut |row| each(blob(row)?))
    }
}
