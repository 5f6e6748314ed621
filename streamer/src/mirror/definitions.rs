//! What replicas were told that they hold: definitions of shapes with their parameters filled in, by fingerprint.
//!
//! A resume token has the fingerprint of each table's definition. When a definition is another one now, the difference is
//! between what the old one had at the replica's position and what the new one has now, so the old one must be known; the
//! mirror keeps what it is given, and knows nothing of what it means. Beside each are the secondary indexes that it
//! is evaluated with: a start makes those too (see [`Mirror::definition_indexes`]).
//!
//! They are kept for as long as the change index keeps what rows were: longer would be of no use. Losing one is no
//! harm: the table is sent in full, of which the replica keeps what is equal. So they need not be durable before a
//! token is given out, and a limit of bytes drops those that were used the longest time ago.

use rusqlite::{Connection, OptionalExtension};

use super::{Entry, Error, Mirror, Reader, load_tables, secondary};
use crate::lookup::Index;

/// Most bytes of all definitions. A hundred thousand of usual length: ten for each session that there can be.
pub const DEFINITIONS_BYTES_MAX: u64 = 64 << 20;

/// A definition that is longer is not kept. That is some hundred elements of an array, or a very long condition.
pub const DEFINITION_BYTES_MAX: usize = 16 << 10;

/// When a definition is used again, that is written down if it was not within this time, in seconds.
const USED_EVERY: i64 = 3600;

/// How often all of them are looked at, in definitions that were added.
const LOOK_EVERY: usize = 4096;

pub(super) const TABLE: &str = "
    CREATE TABLE IF NOT EXISTS definition(
        fingerprint BLOB PRIMARY KEY NOT NULL, text TEXT NOT NULL, indexes TEXT NOT NULL, used INTEGER NOT NULL
    ) WITHOUT ROWID;
";

/// A definition, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What tells it from all others.
    pub fingerprint: [u8; 16],
    /// It. Holds values of parameters: never for logs.
    pub text: String,
    /// The indexes of inner tables that it is evaluated with.
    pub indexes: Vec<Index>,
}

impl Mirror {
    /// Keeps definitions that are used at `now` (in seconds, of any clock that goes on). Durable when it returns.
    pub fn keep_definitions(&mut self, definitions: &[Kept], now: i64) -> Result<(), Error> {
        let mut added = 0;
        self.alone(|mirror| {
            let mut keep = mirror.sqlite.prepare_cached(
                "INSERT INTO definition(fingerprint, text, indexes, used) VALUES(?1, ?2, ?3, ?4)
                 ON CONFLICT DO UPDATE SET used = excluded.used WHERE used < excluded.used - ?5",
            )?;
            for kept in definitions {
                if kept.text.len() > DEFINITION_BYTES_MAX {
                    continue;
                }
                added += keep.execute((
                    &kept.fingerprint[..],
                    &kept.text,
                    names(&kept.indexes),
                    now,
                    USED_EVERY,
                ))?;
            }
            Ok(())
        })?;
        self.definitions_added += added;
        if self.definitions_added >= LOOK_EVERY {
            self.trim_definitions(now, DEFINITIONS_BYTES_MAX)?;
        }
        Ok(())
    }

    /// Drops what is older than the change index may be, and what is above `bytes_max`.
    pub fn trim_definitions(&mut self, now: i64, bytes_max: u64) -> Result<(), Error> {
        self.definitions_added = 0;
        let hours = i64::from(self.settings.index_hours_max);
        let oldest = now.saturating_sub(hours.saturating_mul(3600).saturating_add(USED_EVERY));
        let bytes_max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
        self.alone(|mirror| {
            mirror
                .sqlite
                .execute("DELETE FROM definition WHERE used < ?1", [oldest])?;
            mirror.sqlite.execute(
                "DELETE FROM definition WHERE fingerprint IN (
                    SELECT fingerprint FROM (
                        SELECT fingerprint, sum(length(text)) OVER (ORDER BY used DESC, fingerprint) AS bytes
                        FROM definition)
                    WHERE bytes > ?1)",
                [bytes_max],
            )?;
            Ok(())
        })
    }

    /// The indexes that definitions are evaluated with, as far as their tables are there and have such columns.
    pub fn definition_indexes(&self) -> Result<Vec<Index>, Error> {
        let lists: Vec<String> = self
            .sqlite
            .prepare("SELECT DISTINCT indexes FROM definition WHERE indexes <> ''")?
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let mut indexes: Vec<Index> = Vec::new();
        for index in lists.iter().flat_map(|list| parse(list)) {
            let fits = self.tables.get(&index.table).is_some_and(|rows| {
                let columns = rows.table().columns.len();
                index.parts.iter().all(|part| part.column < columns)
            });
            if fits && !indexes.contains(&index) {
                indexes.push(index);
            }
        }
        Ok(indexes)
    }
}

impl Reader {
    /// A definition that was kept. Within a snapshot or not.
    pub(crate) fn definition(&self, fingerprint: &[u8; 16]) -> Result<Option<String>, Error> {
        Ok(self
            .sqlite()
            .prepare_cached("SELECT text FROM definition WHERE fingerprint = ?1")?
            .query_row([&fingerprint[..]], |row| row.get(0))
            .optional()?)
    }

    /// The tables.
    pub(crate) fn entries(&self) -> Result<Vec<Entry>, Error> {
        load_tables(self.sqlite())
    }

    /// Those by which rows can be looked for; beside them, of each table the one without parts.
    pub fn indexes(&self) -> Result<Vec<Index>, Error> {
        Ok(secondary::all(self.sqlite())?)
    }
}

/// Makes the table where an older version of the program made the file.
pub(super) fn create(sqlite: &Connection) -> Result<(), rusqlite::Error> {
    sqlite.execute_batch(TABLE)
}

/// `16401 1i,2b;16402 0i`
fn names(indexes: &[Index]) -> String {
    let mut names: Vec<String> = indexes
        .iter()
        .filter(|index| !index.parts.is_empty())
        .map(|index| format!("{} {}", index.table, index.name()))
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(";")
}

fn parse(names: &str) -> Vec<Index> {
    let index = |name: &str| {
        let (table, name) = name.split_once(' ')?;
        Index::parse(table.parse().ok()?, name)
    };
    names.split(';').filter_map(index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lookup::Part,
        mirror::{Settings, State},
        shape::Reading,
    };

    fn settings(directory: &std::path::Path) -> Settings {
        Settings {
            directory: directory.into(),
            cache_bytes: 1 << 20,
            reader_cache_bytes: 1 << 20,
            index_bytes_max: 1 << 30,
            index_hours_max: 2,
            row_bytes_max: 1 << 20,
        }
    }

    fn kept(number: u8, bytes: usize) -> Kept {
        Kept {
            fingerprint: [number; 16],
            text: "x".repeat(bytes),
            indexes: vec![Index {
                table: u32::from(number),
                parts: vec![Part {
                    column: 1,
                    reading: Reading::Integer,
                }],
            }],
        }
    }

    #[test]
    fn what_is_old_or_too_much_is_dropped_the_longest_unused_first() {
        let directory = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(&settings(directory.path())).unwrap();
        let reader = mirror.reader().unwrap();
        let has = |numbers: &[u8]| {
            let is_there = |number: &u8| reader.definition(&[*number; 16]).unwrap().is_some();
            numbers.iter().map(is_there).collect::<Vec<_>>()
        };
        mirror
            .keep_definitions(&[kept(1, 100), kept(2, 100)], 10_000)
            .unwrap();
        mirror.keep_definitions(&[kept(3, 100)], 11_000).unwrap();
        // Used again, and much later.
        mirror.keep_definitions(&[kept(1, 100)], 20_000).unwrap();
        assert_eq!(has(&[1, 2, 3]), [true; 3]);
        mirror.trim_definitions(20_000, 250).unwrap();
        assert_eq!(has(&[1, 2, 3]), [true, false, true]);
        // 2 hours, and the one in which a use may not have been written down.
        mirror.trim_definitions(11_000 + 3 * 3600, 250).unwrap();
        assert_eq!(has(&[1, 3]), [true, true]);
        mirror.trim_definitions(11_001 + 3 * 3600, 250).unwrap();
        assert_eq!(has(&[1, 3]), [true, false]);
    }

    #[test]
    fn one_that_is_too_long_is_not_kept_and_many_are_looked_at_now_and_then() {
        let directory = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(&settings(directory.path())).unwrap();
        let reader = mirror.reader().unwrap();
        let (fits, long) = (DEFINITION_BYTES_MAX, DEFINITION_BYTES_MAX + 1);
        mirror
            .keep_definitions(&[kept(1, fits), kept(2, long)], 0)
            .unwrap();
        assert!(reader.definition(&[1; 16]).unwrap().is_some());
        assert!(reader.definition(&[2; 16]).unwrap().is_none());
        let many: Vec<Kept> = (0..LOOK_EVERY as u64 + 200)
            .map(|number| {
                let mut kept = kept(9, fits);
                kept.fingerprint[..8].copy_from_slice(&number.to_be_bytes());
                kept
            })
            .collect();
        mirror.keep_definitions(&many, 1).unwrap();
        let bytes: i64 = mirror
            .sqlite
            .query_row("SELECT sum(length(text)) FROM definition", [], |row| {
                row.get(0)
            })
            .unwrap();
        assert!(bytes as u64 <= DEFINITIONS_BYTES_MAX, "{bytes}");
        assert!(bytes as u64 > DEFINITIONS_BYTES_MAX / 2, "{bytes}");
    }

    #[test]
    fn the_indexes_of_tables_that_are_gone_are_not_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(&settings(directory.path())).unwrap();
        mirror.keep_definitions(&[kept(1, 10)], 0).unwrap();
        assert!(mirror.tables().iter().all(|e| e.state != State::Live));
        assert_eq!(mirror.definition_indexes().unwrap(), []);
        assert_eq!(parse(&names(&kept(7, 1).indexes)), kept(7, 1).indexes);
        assert_eq!(parse(""), []);
    }
}
