//! Lookups in the three states, compared with the model's, in the middle of random histories.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{Lsn, Position, record};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use super::{
    driver::{EPOCH, Expected},
    model::{Row, Tables, Value, decode, encode, key_of},
};
use crate::{
    lookup::{self, Index, Lookup, Part, push},
    mirror::{Applied, At, Before, EachKeyed, Error, Mirror, Now, Place, Reader},
    shape::Reading,
    table::{Kind, Oid, Table},
};

/// Old rows are collected entry by entry and looked up from many histories; what so many entries make is enough.
const COLLECTED: [usize; 3] = [1, 7, 1000];

/// Random indexes of a model's tables: none, or some by up to three columns.
pub fn any_indexes(rng: &mut StdRng, tables: &[std::sync::Arc<Table>]) -> Vec<Index> {
    let mut indexes = Vec::new();
    for table in tables {
        for _ in 0..rng.random_range(0..3) {
            indexes.push(any_index(rng, table));
        }
    }
    indexes
}

fn any_index(rng: &mut StdRng, table: &Table) -> Index {
    let mut columns: Vec<usize> = (0..table.columns.len()).collect();
    let mut parts = Vec::new();
    for _ in 0..rng.random_range(0..4) {
        let column = columns.swap_remove(rng.random_range(0..columns.len()));
        let reading = match table.columns[column].kind {
            Kind::Integer => Reading::Integer,
            _ => Reading::Bytes,
        };
        parts.push(Part { column, reading });
    }
    Index {
        table: table.oid,
        parts,
    }
}

/// One of the states.
trait State: Lookup {
    fn keyed(&self, index: &Index, prefix: &[u8], each: EachKeyed<'_>)
    -> Result<(), lookup::Error>;
}

impl State for Now<'_> {
    fn keyed(
        &self,
        index: &Index,
        prefix: &[u8],
        each: EachKeyed<'_>,
    ) -> Result<(), lookup::Error> {
        self.find(index, prefix, each)
    }
}

impl State for Before<'_> {
    fn keyed(
        &self,
        index: &Index,
        prefix: &[u8],
        each: EachKeyed<'_>,
    ) -> Result<(), lookup::Error> {
        self.find(index, prefix, each)
    }
}

impl State for At<'_> {
    fn keyed(
        &self,
        index: &Index,
        prefix: &[u8],
        each: EachKeyed<'_>,
    ) -> Result<(), lookup::Error> {
        self.find(index, prefix, each)
    }
}

/// The first values of an index' key: of a row that is there (now, or at some time), or any.
fn any_values(rng: &mut StdRng, index: &Index, states: &[&Tables]) -> Vec<Value> {
    let rows: Vec<&Row> = (states.iter())
        .flat_map(|tables| tables[&index.table].values())
        .collect();
    let count = rng.random_range(0..=index.parts.len());
    let of = rows.choose(rng);
    (index.parts[..count].iter())
        .map(|part| match (of, rng.random_range(0..8)) {
            (_, 0) | (None, _) => Value::Null,
            (Some(row), _) => row[part.column].clone(),
        })
        .collect()
}

/// One random lookup by each index, with and without keys.
fn check(
    rng: &mut StdRng,
    tables: &[std::sync::Arc<Table>],
    indexes: &[Index],
    state: &dyn State,
    expected: &Tables,
    other: &Tables,
) {
    for index in indexes {
        let table = tables
            .iter()
            .find(|table| table.oid == index.table)
            .unwrap();
        let values = any_values(rng, index, &[expected, other]);
        let mut prefix = Vec::new();
        let record = encode(&values);
        for (part, value) in index.parts.iter().zip(record::values(&record).unwrap()) {
            push(&mut prefix, part.reading.read(value.unwrap()).unwrap());
        }
        let is_found = |row: &&Row| {
            (index.parts.iter().zip(&values)).all(|(part, value)| row[part.column] == *value)
        };
        let mut expected: Vec<Row> = (expected[&index.table].values())
            .filter(is_found)
            .cloned()
            .collect();
        expected.sort_unstable();
        let mut found = Vec::new();
        let mut each = |row: &[u8]| {
            found.push(decode(row));
            Ok(true)
        };
        state.rows(index, &prefix, &mut each).unwrap();
        found.sort_unstable();
        assert_eq!(found, expected, "{index:?} by {values:?}");
        // As many as are asked for, with their keys.
        let enough = rng.random_range(1..4);
        let mut found = Vec::new();
        let mut each = |key: crate::mirror::Key, row: &[u8]| {
            let row = decode(row);
            assert_eq!(decode(&key.record()), key_of(table, &row));
            found.push(row);
            Ok(found.len() < enough)
        };
        state.keyed(index, &prefix, &mut each).unwrap();
        assert_eq!(found.len(), expected.len().min(enough));
        assert!(found.iter().all(|row| expected.contains(row)));
    }
}

/// Those of tables that may be seen.
fn seen(indexes: &[Index], at: &Expected) -> Vec<Index> {
    let of_seen = |index: &&Index| at.floors[&index.table] <= at.lsn;
    indexes.iter().filter(of_seen).cloned().collect()
}

/// What the mirror has now, and, of a transaction that was routed, before it.
pub fn look(
    rng: &mut StdRng,
    tables: &[std::sync::Arc<Table>],
    indexes: &[Index],
    mirror: &Mirror,
    now: &Expected,
    last: Option<(&Applied, &Tables)>,
) {
    let indexes = seen(indexes, now);
    let before = last.map_or(&now.tables, |(_, before)| before);
    check(rng, tables, &indexes, &mirror.now(), &now.tables, before);
    if let Some((applied, before)) = last {
        let state = mirror.before(&applied.nets);
        check(rng, tables, &indexes, &state, before, &now.tables);
    }
}

/// One that looks at the past: it goes on with its list from snapshot to snapshot.
pub struct Historian {
    reader: Reader,
    list: u64,
    work: Option<Work>,
    /// How often it looked.
    pub looks: usize,
}

struct Work {
    since: Lsn,
    indexes: Vec<Index>,
    place: Place,
    /// Of the tables that the indexes are of, when it began.
    floors: BTreeMap<Oid, (Lsn, usize)>,
}

impl Historian {
    pub fn new(mirror: &Mirror) -> Historian {
        Historian {
            reader: mirror.reader().unwrap(),
            list: 0,
            work: None,
            looks: 0,
        }
    }

    /// Begins a list, or goes on with one, and once that is complete looks at what was. `states` are those after each
    /// transaction that the mirror still knows to have applied; `copies` counts those of each table.
    pub fn step(
        &mut self,
        rng: &mut StdRng,
        tables: &[std::sync::Arc<Table>],
        indexes: &[Index],
        durable: &Expected,
        states: &BTreeMap<Lsn, Expected>,
        copies: &BTreeMap<Oid, usize>,
    ) {
        let position = self.reader.begin().unwrap();
        assert_eq!(position.lsn, durable.lsn);
        self.look(rng, tables, indexes, durable, states, copies);
        self.reader.end();
    }

    fn look(
        &mut self,
        rng: &mut StdRng,
        tables: &[std::sync::Arc<Table>],
        indexes: &[Index],
        durable: &Expected,
        states: &BTreeMap<Lsn, Expected>,
        copies: &BTreeMap<Oid, usize>,
    ) {
        let readable = seen(indexes, durable);
        {
            let now = self.reader.now().unwrap();
            check(
                rng,
                tables,
                &readable,
                &now,
                &durable.tables,
                &durable.tables,
            );
        }
        let known: Vec<Lsn> = (states.range(..=durable.lsn))
            .map(|(lsn, _)| *lsn)
            .collect();
        let standing = |oid: &Oid| {
            (
                durable.floors[oid],
                copies.get(oid).copied().unwrap_or_default(),
            )
        };
        let mut work = match self.work.take() {
            Some(work) if rng.random_range(0..10) > 0 => work,
            _ => {
                let since = *known.choose(rng).unwrap();
                let reached = |index: &Index| self.reaches(index.table, since);
                let chosen: Vec<Index> = (readable.iter())
                    .filter(|index| reached(index) && rng.random_range(0..4) > 0)
                    .cloned()
                    .collect();
                if chosen.is_empty() {
                    return;
                }
                self.list += 1;
                let tables: BTreeSet<Oid> = chosen.iter().map(|index| index.table).collect();
                Work {
                    since,
                    place: Place {
                        ordinal: self.reader.ordinal_at(since).unwrap(),
                        entry: None,
                    },
                    floors: tables.iter().map(|oid| (*oid, standing(oid))).collect(),
                    indexes: chosen,
                }
            }
        };
        // What such a list lacks is for its owner to notice.
        if work.place.ordinal + 1 < self.reader.snapshot().unwrap().first {
            return;
        }
        let copied_anew = work.floors.iter().any(|(oid, was)| standing(oid) != *was);
        let others: Vec<Oid> = tables.iter().map(|table| table.oid).collect();
        let others = &others[..rng.random_range(0..=others.len())];
        let entries_max = *COLLECTED.choose(rng).unwrap();
        let more = self
            .reader
            .collect(self.list, others, &work.indexes, &work.place, entries_max);
        let more = match more {
            Err(Error::OutOfReach(_)) if copied_anew => return,
            more => more.unwrap(),
        };
        assert!(!copied_anew, "a list of two copies goes on");
        let last = self.reader.snapshot().unwrap().last;
        let complete = more.is_none();
        work.place = more.unwrap_or(Place {
            ordinal: last,
            entry: None,
        });
        if complete {
            for _ in 0..3 {
                let at = *known.choose(rng).unwrap();
                // Indexes may be others by now, so that not all of the list's are there.
                let usable =
                    |index: &&Index| self.reaches(index.table, at) && indexes.contains(index);
                let usable: Vec<Index> = work.indexes.iter().filter(usable).cloned().collect();
                if at < work.since || usable.is_empty() {
                    continue;
                }
                let ordinal = self.reader.ordinal_at(at).unwrap();
                let state = self.reader.at(ordinal).unwrap();
                let was = &states[&at].tables;
                check(rng, tables, &usable, &state, was, &durable.tables);
                self.looks += 1;
            }
        } else {
            let refused = self.reader.at(last);
            assert!(matches!(refused, Err(Error::Misused(_))));
        }
        self.work = Some(work);
    }

    fn reaches(&self, table: Oid, lsn: Lsn) -> bool {
        let from = Position { epoch: EPOCH, lsn };
        self.reader.reaches(table, from).unwrap()
    }
}
