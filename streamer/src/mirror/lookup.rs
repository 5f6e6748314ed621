//! Lookups for conditions with subqueries, in the mirror's rows as they are, and as they were before a transaction
//! that has just been applied. (As of an earlier one: `past`.)
//!
//! SQLite is told by name which index to use. One that was not asked for by [`Mirror::set_indexes`] is an error and not a scan of
//! the table, which would be right, and stop the engine for seconds at each row.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    rc::Rc,
};

use foldhash::fast::FixedState;
use rusqlite::{Connection, Row, ToSql};

use super::{Error as MirrorError, Key, Mirror, Net, Reader, State, secondary};
use crate::{
    lookup::{self, Each, Error, Index, Lookup, Part},
    table::Oid,
};

/// Takes rows with their keys until it says that it is enough.
pub type EachKeyed<'a> = &'a mut dyn FnMut(Key, &[u8]) -> Result<bool, Error>;

/// The rows as they are: of the mirror with its open group, or of a reader's snapshot.
///
/// A table that nobody may see yet (it is not there, is being copied, or its copy is ahead of the position) is
/// [`NotReady`](MirrorError::NotReady); one that is stopped has the rows that it had.
pub struct Now<'a> {
    sqlite: &'a Connection,
    seen: Seen<'a>,
}

/// Which tables may be seen.
enum Seen<'a> {
    /// As the mirror says at each lookup.
    By(&'a Mirror),
    /// These.
    These(HashSet<Oid, FixedState>),
}

/// The rows before a transaction, the last one that was applied.
pub struct Before<'a> {
    now: Now<'a>,
    touched: HashMap<Oid, Touched<'a>, FixedState>,
}

/// What the transaction did to one table.
#[derive(Default)]
struct Touched<'a> {
    nets: Vec<&'a Net>,
    keys: HashSet<&'a Key, FixedState>,
    /// By index, those that had a row before, in the order of its key in the index. Made when one is first asked for.
    sorted: RefCell<Vec<(Vec<Part>, Sorted<'a>)>>,
}

type Sorted<'a> = Rc<[(Vec<u8>, &'a Net)]>;

impl Mirror {
    /// The rows as they are, with the open group.
    pub fn now(&self) -> Now<'_> {
        Now {
            sqlite: &self.sqlite,
            seen: Seen::By(self),
        }
    }

    /// The rows before a transaction: `nets` is all that it did, and nothing was applied since. Costs no more than looking at each
    /// of `nets`; a lookup is then a search, however many there are.
    pub fn before<'a>(&'a self, nets: &'a [Net]) -> Before<'a> {
        let mut touched: HashMap<Oid, Touched<'a>, FixedState> = HashMap::default();
        for net in nets {
            let touched = touched.entry(net.table.oid).or_default();
            touched.keys.insert(&net.key);
            touched.nets.push(net);
        }
        Before {
            now: self.now(),
            touched,
        }
    }

    fn check_seen(&self, table: Oid) -> Result<(), MirrorError> {
        self.check()?;
        if self.large.is_some() {
            return Err(MirrorError::Misused("within a large transaction"));
        }
        match self.tables.get(&table).map(|rows| &rows.entry) {
            Some(entry) if entry.state != State::Copying && entry.floor <= self.position.lsn => {
                Ok(())
            }
            Some(entry) => Err(MirrorError::NotReady(entry.table.full_name())),
            None => Err(MirrorError::NotReady(format!("table {table}"))),
        }
    }
}

impl Reader {
    /// The rows as of the snapshot.
    pub fn now(&self) -> Result<Now<'_>, MirrorError> {
        Ok(Now {
            sqlite: self.sqlite(),
            seen: Seen::These(self.complete()?),
        })
    }
}

impl Now<'_> {
    /// As [`Lookup::rows`], with the keys of the rows.
    pub fn find(&self, index: &Index, prefix: &[u8], each: EachKeyed<'_>) -> Result<(), Error> {
        self.search(index, prefix, &mut |row| {
            each(row.get(0).map_err(failed)?, blob(row)?)
        })
    }

    fn search(&self, index: &Index, prefix: &[u8], each: EachFound<'_>) -> Result<(), Error> {
        self.check(index.table)?;
        let range = Range::new(prefix)?;
        range.search(self.sqlite, &now_sql(index, &range), &[], each)
    }

    pub(super) fn check(&self, table: Oid) -> Result<(), Error> {
        match &self.seen {
            Seen::By(mirror) => mirror.check_seen(table)?,
            Seen::These(tables) if tables.contains(&table) => {}
            Seen::These(_) => return Err(MirrorError::NotReady(format!("table {table}")).into()),
        }
        Ok(())
    }
}

impl Lookup for Now<'_> {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        self.search(index, prefix, &mut |row| each(blob(row)?))
    }
}

impl<'a> Before<'a> {
    /// As [`Lookup::rows`], with the keys of the rows.
    pub fn find(&self, index: &Index, prefix: &[u8], each: EachKeyed<'_>) -> Result<(), Error> {
        let Some(touched) = self.touched.get(&index.table) else {
            return self.now.find(index, prefix, each);
        };
        let mut more = true;
        self.now.find(index, prefix, &mut |key, row| {
            if !touched.keys.contains(&key) {
                more = each(key, row)?;
            }
            Ok(more)
        })?;
        let before = touched.sorted(index)?;
        let first = before.partition_point(|(key, _)| &key[..] < prefix);
        for (key, net) in &before[first..] {
            if !more || !key.starts_with(prefix) {
                break;
            }
            if let Some(row) = &net.before {
                more = each(net.key.clone(), row)?;
            }
        }
        Ok(())
    }
}

impl Lookup for Before<'_> {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        if self.touched.contains_key(&index.table) {
            self.find(index, prefix, &mut |_, row| each(row))
        } else {
            self.now.rows(index, prefix, each)
        }
    }
}

impl<'a> Touched<'a> {
    /// Shared, since a lookup may be made for each row that another one gives.
    fn sorted(&self, index: &Index) -> Result<Sorted<'a>, Error> {
        let mut all = self.sorted.borrow_mut();
        if let Some((_, sorted)) = all.iter().find(|(parts, _)| *parts == index.parts) {
            return Ok(sorted.clone());
        }
        let mut keys = Vec::new();
        for net in &self.nets {
            if let Some(row) = &net.before {
                keys.push((index.key(row)?, *net));
            }
        }
        keys.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let sorted: Sorted<'a> = keys.into();
        all.push((index.parts.clone(), sorted.clone()));
        Ok(sorted)
    }
}

pub(super) fn now_sql(index: &Index, range: &Range<'_>) -> String {
    format!(
        "SELECT k, r FROM rows_{}{} WHERE {}",
        index.table,
        range.indexed_by(index),
        range.condition(index)
    )
}

/// Takes what a statement of `k` and a row finds.
pub(super) type EachFound<'a> = &'a mut dyn FnMut(&Row<'_>) -> Result<bool, Error>;

/// The keys of an index that begin with a prefix.
pub(super) struct Range<'a> {
    /// The first one, and the first behind them. `None`: all keys.
    pub bounds: Option<(&'a [u8], Vec<u8>)>,
}

impl<'a> Range<'a> {
    pub fn new(prefix: &'a [u8]) -> Result<Range<'a>, Error> {
        let bounds = match lookup::behind(prefix) {
            Some(behind) => Some((prefix, behind)),
            None if prefix.is_empty() => None,
            None => return Err(MirrorError::Misused("a prefix of no key").into()),
        };
        Ok(Range { bounds })
    }

    /// Which index SQLite is to use.
    pub fn indexed_by(&self, index: &Index) -> String {
        match self.bounds {
            Some(_) => format!(" INDEXED BY index_{}", secondary::suffix(index)),
            None => String::new(),
        }
    }

    /// That the key of the row `r` is one of them. Has the parameters 1 and 2.
    pub fn condition(&self, index: &Index) -> String {
        match self.bounds {
            Some(_) => {
                let key = secondary::key_sql(index, "r");
                format!("{key} >= ?1 AND {key} < ?2")
            }
            None => "?1 IS NULL AND ?2 IS NULL".into(),
        }
    }

    /// Runs a statement that has the bounds as its first parameters, and `others` behind.
    pub fn search(
        &self,
        sqlite: &Connection,
        sql: &str,
        others: &[&dyn ToSql],
        each: EachFound<'_>,
    ) -> Result<(), Error> {
        let mut statement = sqlite.prepare_cached(sql).map_err(failed)?;
        let mut bind =
            |place, value: &dyn ToSql| statement.raw_bind_parameter(place, value).map_err(failed);
        if let Some((first, behind)) = &self.bounds {
            bind(1, first)?;
            bind(2, &behind)?;
        } else {
            bind(1, &rusqlite::types::Null)?;
            bind(2, &rusqlite::types::Null)?;
        }
        for (place, value) in others.iter().enumerate() {
            bind(place + 3, *value)?;
        }
        let mut found = statement.raw_query();
        while let Some(row) = found.next().map_err(failed)? {
            if !each(row)? {
                break;
            }
        }
        Ok(())
    }
}

/// The row in the second column.
pub(super) fn blob<'r>(row: &'r Row<'_>) -> Result<&'r [u8], Error> {
    let value = row.get_ref(1).map_err(failed)?;
    value.as_blob().map_err(|error| failed(error.into()))
}

pub(super) fn failed(error: rusqlite::Error) -> Error {
    MirrorError::from(error).into()
}
