//! Plays engine, sessions and kills against the model, and compares at every step.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anabranch_proto::{
    Epoch, Lsn, Position, record,
    record::{Malformed, ValueRef},
};
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{
    model::{
        Content, ROW_BYTES_MAX, Row, RowKey, Source, Tables, Value, decode, encode, grp, key_of,
    },
    probe::{self, Historian},
};
use crate::{
    catchup::{
        Catchup, Item, Round, View,
        together::{self, Member, Told},
    },
    delta::Op,
    lookup::{self, Index},
    mirror::{Applied, Error, Mirror, Reader, Settings, State},
    table::{Oid, Table},
    transaction::Chunk,
};

pub const EPOCH: Epoch = Epoch(0xF000_0000_0000_0001);

/// What the mirror must be at some point.
#[derive(Clone, Default)]
pub struct Expected {
    /// Transactions of the log that are applied.
    applied: usize,
    pub lsn: Lsn,
    pub tables: Tables,
    stopped: BTreeSet<Oid>,
    pub floors: BTreeMap<Oid, Lsn>,
}

/// What one replica sees of one table.
struct Filter {
    table: Arc<Table>,
    groups: BTreeSet<i64>,
    columns: Vec<usize>,
}

impl Filter {
    fn any(rng: &mut StdRng, table: &Arc<Table>) -> Filter {
        let all = rng.random_range(0..3) == 0;
        Filter {
            table: table.clone(),
            groups: (0..4).filter(|_| all || rng.random()).collect(),
            columns: (0..4)
                .filter(|column| all || table.key.contains(column) || rng.random())
                .collect(),
        }
    }

    /// What the replica should have, by the model.
    fn of(&self, content: &Content) -> Content {
        let sees = |row: &Row| match row[grp(&self.table)] {
            Value::Integer(group) => self.groups.contains(&group),
            _ => false,
        };
        let chosen = |row: &Row| self.columns.iter().map(|&c| row[c].clone()).collect();
        (content.iter())
            .filter(|(_, row)| sees(row))
            .map(|(key, row)| (key.clone(), chosen(row)))
            .collect()
    }

    /// The key of a projected row.
    fn key(&self, projected: &Row) -> RowKey {
        (self.table.key.iter())
            .map(|key| projected[self.columns.iter().position(|c| c == key).unwrap()].clone())
            .collect()
    }
}

impl View for Filter {
    fn table(&self) -> &Arc<Table> {
        &self.table
    }
    fn contains(&self, row: &[u8], _: &dyn lookup::Lookup) -> Result<bool, lookup::Error> {
        Ok(match record::value(row, grp(&self.table))? {
            ValueRef::Integer(group) => self.groups.contains(&group),
            _ => false,
        })
    }
    fn project(&self, row: &Bytes) -> Result<Bytes, Malformed> {
        let row = decode(row);
        Ok(encode(
            &self
                .columns
                .iter()
                .map(|&c| row[c].clone())
                .collect::<Row>(),
        ))
    }
}

/// A replica, and its catch-up if one is under way.
struct Replica {
    filters: Vec<Arc<Filter>>,
    at: Option<Position>,
    has: Vec<Content>,
    reader: Reader,
    catchup: Option<Catchup>,
    /// Keys that were in its shape since the catch-up began, and so may be told.
    tellable: Vec<BTreeSet<RowKey>>,
}

struct Driver {
    rng: StdRng,
    directory: tempfile::TempDir,
    settings: Settings,
    source: Source,
    mirror: Option<Mirror>,
    nets_max: usize,
    now: Expected,
    durable: Expected,
    /// What the mirror was at each committed position.
    history: Vec<Expected>,
    /// And after each transaction.
    states: BTreeMap<Lsn, Expected>,
    /// How often each table was copied anew.
    copies: BTreeMap<Oid, usize>,
    /// That the mirror is to have.
    indexes: Vec<Index>,
    historian: Historian,
    replicas: Vec<Replica>,
    completed: usize,
    reset: usize,
    /// Replicas that were served together with others, and told something.
    together: usize,
}

impl Driver {
    fn new(seed: u64) -> Driver {
        let mut rng = StdRng::seed_from_u64(seed);
        let source = Source::new(&mut rng);
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings {
            directory: directory.path().into(),
            cache_bytes: 1 << 20,
            reader_cache_bytes: 1 << 18,
            index_bytes_max: *[2_000, 20_000, u64::MAX].choose(&mut rng).unwrap(),
            index_hours_max: 24,
            row_bytes_max: ROW_BYTES_MAX,
        };
        let mut mirror = Mirror::open(&settings).unwrap();
        let mut now = Expected {
            lsn: source.start,
            tables: source.initial.clone(),
            ..Expected::default()
        };
        mirror.sample_rows = rng.random_range(1..10);
        let indexes = probe::any_indexes(&mut rng, &source.tables);
        mirror.set_indexes(&indexes).unwrap();
        let mut replicas = Vec::new();
        if rng.random() {
            replicas.push(Replica::early(&mut rng, &source, &mirror));
        }
        fill(&mut mirror, &mut rng, &source, &mut replicas);
        for table in &source.tables {
            now.floors.insert(table.oid, source.start);
        }
        let nets_max = *[3, 100_000].choose(&mut rng).unwrap();
        mirror.nets_max = nets_max;
        Driver {
            rng,
            directory,
            settings,
            source,
            states: BTreeMap::from([(now.lsn, now.clone())]),
            copies: BTreeMap::new(),
            indexes,
            historian: Historian::new(&mirror),
            mirror: Some(mirror),
            nets_max,
            durable: now.clone(),
            history: vec![now.clone()],
            now,
            replicas,
            completed: 0,
            reset: 0,
            together: 0,
        }
    }

    fn mirror(&mut self) -> &mut Mirror {
        self.mirror.as_mut().unwrap()
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..45 => self.apply_next(),
            45..55 => self.commit(),
            55..60 => self.kill(),
            60..63 => self.idle(),
            63..66 => self.copy_again(),
            66..70 if self.replicas.len() < 3 => self.join(),
            70..82 => self.look_back(),
            82..84 => self.set_indexes(),
            84..88 => self.serve_together(),
            _ => self.round(),
        }
        self.look(None);
        let position = self.mirror.as_ref().unwrap().position();
        assert_eq!(
            position,
            Position {
                epoch: EPOCH,
                lsn: self.now.lsn
            }
        );
    }

    /// The next transaction of the log; a new one if there is none.
    fn apply_next(&mut self) {
        if self.now.applied == self.source.log.len() {
            self.source.commit(&mut self.rng);
        }
        let transaction = self.source.log[self.now.applied].clone();
        let before = self.now.clone();
        let mut after = before.clone();
        after.applied += 1;
        after.lsn = transaction.end.lsn;
        let mut stopped = BTreeSet::new();
        for table in &self.source.tables {
            let oid = table.oid;
            if before.stopped.contains(&oid) || transaction.commit_lsn < before.floors[&oid] {
                continue;
            }
            if transaction.broken.contains(&oid) {
                after.stopped.insert(oid);
                stopped.insert(oid);
            } else {
                after.tables.insert(oid, transaction.after[&oid].clone());
            }
        }
        let whole = Chunk {
            changes: transaction.changes.clone(),
            bytes: 0,
            first: true,
            commit_lsn: transaction.commit_lsn,
            end: Some(transaction.end),
        };
        let in_parts = self.rng.random_range(0..3) == 0;
        let applied = if in_parts {
            if self.rng.random_range(0..4) == 0 {
                // The connection is lost in the middle.
                self.apply_parts(&whole, false);
                self.mirror().abort_large().unwrap();
            }
            self.apply_parts(&whole, true).unwrap()
        } else {
            self.mirror().apply(&whole).unwrap()
        };
        let told: BTreeSet<Oid> = applied.stopped.iter().map(|(oid, _)| *oid).collect();
        assert_eq!(told, stopped);
        if in_parts {
            assert!(applied.nets.is_empty());
        }
        if applied.large.is_empty() && !in_parts {
            check_nets(&self.source.tables, &applied, &before.tables, &after.tables);
        } else {
            for (oid, content) in &after.tables {
                assert!(*content == before.tables[oid] || applied.large.contains(oid));
            }
        }
        self.now = after;
        self.states.insert(self.now.lsn, self.now.clone());
        if applied.large.is_empty() && !in_parts {
            self.look(Some((&applied, &before.tables)));
        }
        if in_parts {
            assert_eq!(self.mirror().durable(), self.mirror().position());
            self.committed();
        }
        // The same again does nothing.
        if self.rng.random_range(0..10) == 0 {
            let again = self.mirror().apply(&whole).unwrap();
            assert!(again.nets.is_empty() && again.large.is_empty() && again.stopped.is_empty());
        }
    }

    fn apply_parts(&mut self, whole: &Chunk, to_its_end: bool) -> Option<Applied> {
        let mut changes = whole.changes.clone();
        let mut first = true;
        loop {
            let some = self.rng.random_range(0..=changes.len());
            let rest = changes.split_off(some);
            let last = rest.is_empty();
            let part = Chunk {
                changes,
                bytes: 0,
                first,
                commit_lsn: whole.commit_lsn,
                end: whole.end.filter(|_| last),
            };
            let open = self.mirror().is_open();
            self.mirror().apply_part(&part).unwrap();
            if first && open {
                self.committed();
            }
            first = false;
            if last {
                return to_its_end.then(|| self.mirror().end_large(whole.end.unwrap()).unwrap());
            }
            if !to_its_end && self.rng.random() {
                return None;
            }
            changes = rest;
        }
    }

    fn idle(&mut self) {
        if self.now.applied == self.source.log.len() {
            let lsn = Lsn(self.now.lsn.0 + 1);
            self.mirror().advance(lsn).unwrap();
            self.now.lsn = lsn;
            // The source must not commit below what it called idle.
            if let Some(last) = self.source.log.last_mut() {
                last.end.lsn = last.end.lsn.max(lsn);
            } else {
                self.source.start = lsn;
            }
        }
    }

    fn commit(&mut self) {
        self.mirror().commit().unwrap();
        self.committed();
    }

    fn committed(&mut self) {
        self.durable = self.now.clone();
        self.history.push(self.now.clone());
        self.states.insert(self.now.lsn, self.now.clone());
        assert_eq!(self.mirror().durable().lsn, self.now.lsn);
        let (directory, index_bytes_max) = (self.directory.path(), self.settings.index_bytes_max);
        let _ = (directory, index_bytes_max);
    }

    /// The process dies without a word: the open group is gone, and comes again.
    fn kill(&mut self) {
        if self.rng.random_range(0..3) == 0 && self.now.applied < self.source.log.len() {
            let transaction = &self.source.log[self.now.applied];
            let part = Chunk {
                changes: transaction.changes.clone(),
                bytes: 0,
                first: true,
                commit_lsn: transaction.commit_lsn,
                end: None,
            };
            let open = self.mirror().is_open();
            self.mirror().apply_part(&part).unwrap();
            if open {
                self.committed();
            }
        }
        self.mirror = None;
        let mut mirror = Mirror::open(&self.settings).unwrap();
        mirror.nets_max = self.nets_max;
        assert_eq!(mirror.position().lsn, self.durable.lsn);
        assert_eq!(mirror.durable(), mirror.position());
        // Postgres sends again from somewhere before; what is there already is skipped.
        let from = self
            .durable
            .applied
            .saturating_sub(self.rng.random_range(0..4));
        for transaction in &self.source.log[from..self.durable.applied] {
            let chunk = Chunk {
                changes: transaction.changes.clone(),
                bytes: 0,
                first: true,
                commit_lsn: transaction.commit_lsn,
                end: Some(transaction.end),
            };
            assert!(mirror.apply(&chunk).unwrap().nets.is_empty());
            mirror.apply_part(&chunk).unwrap();
            assert!(mirror.end_large(transaction.end).unwrap().large.is_empty());
        }
        assert!(!mirror.is_open());
        self.mirror = Some(mirror);
        self.now = self.durable.clone();
        self.states.retain(|lsn, _| *lsn <= self.now.lsn);
        self.check();
        // What the file has is there, also before it is said what is wanted.
        self.look(None);
        if self.rng.random() {
            self.indexes = probe::any_indexes(&mut self.rng, &self.source.tables);
        }
        let mirror = self.mirror.as_mut().unwrap();
        mirror.set_indexes(&self.indexes).unwrap();
    }

    fn set_indexes(&mut self) {
        self.indexes = probe::any_indexes(&mut self.rng, &self.source.tables);
        let mirror = self.mirror.as_mut().unwrap();
        mirror.set_indexes(&self.indexes).unwrap();
        if !mirror.is_open() {
            self.committed();
        }
    }

    /// Looks rows up as they are, and before a transaction that was just applied to tables that were so.
    fn look(&mut self, last: Option<(&Applied, &Tables)>) {
        let (mirror, tables) = (self.mirror.as_ref().unwrap(), &self.source.tables);
        let rng = &mut self.rng;
        probe::look(rng, tables, &self.indexes, mirror, &self.now, last);
    }

    fn look_back(&mut self) {
        self.historian.step(
            &mut self.rng,
            &self.source.tables,
            &self.indexes,
            &self.durable,
            &self.states,
            &self.copies,
        );
    }

    /// A table is copied anew, as of now or of some transactions ahead; those then belong to the copy.
    fn copy_again(&mut self) {
        let table = match self.now.stopped.iter().next() {
            Some(stopped) => (self.source.tables.iter())
                .find(|t| t.oid == *stopped)
                .unwrap()
                .clone(),
            None if self.rng.random_range(0..4) == 0 => {
                self.source.tables.choose(&mut self.rng).unwrap().clone()
            }
            None => return,
        };
        let oid = table.oid;
        self.mirror().begin_copy(&table).unwrap();
        self.committed();
        for _ in 0..self.rng.random_range(0..3) {
            self.source.commit(&mut self.rng);
        }
        let as_of = self
            .rng
            .random_range(self.now.applied..=self.source.log.len());
        let (content, at) = match as_of.checked_sub(1) {
            Some(last) => (
                self.source.log[last].after[&oid].clone(),
                self.source.log[last].end.lsn,
            ),
            None => (self.source.initial[&oid].clone(), self.source.start),
        };
        let at = at.max(self.now.lsn);
        copy(
            self.mirror.as_mut().unwrap(),
            &mut self.rng,
            &table,
            &content,
        );
        self.mirror().end_copy(oid, at).unwrap();
        *self.copies.entry(oid).or_default() += 1;
        self.now.stopped.remove(&oid);
        self.now.floors.insert(oid, at);
        self.now.tables.insert(oid, content);
        self.committed();
    }

    /// What is committed is what the model has, and no more.
    fn check(&mut self) {
        let mut reader = self.mirror().reader().unwrap();
        let position = reader.begin().unwrap();
        assert_eq!(position.lsn, self.durable.lsn);
        for table in &self.source.tables {
            let mut found = Content::new();
            let mut last = None;
            let everything = crate::mirror::Keys {
                after: None,
                upto: None,
            };
            reader
                .scan(table.oid, everything, |key, row| {
                    assert!(last.as_ref() < Some(&key), "not in key order");
                    let row = decode(&row);
                    found.insert(key_of(table, &row), row);
                    last = Some(key);
                    Ok(true)
                })
                .unwrap();
            assert_eq!(found, self.durable.tables[&table.oid], "{}", table.name);
        }
        reader.end();
        if self.now.applied == self.durable.applied {
            for entry in self.mirror().tables() {
                let oid = entry.table.oid;
                let stopped = matches!(entry.state, State::Stopped { .. });
                assert_eq!(
                    stopped,
                    self.now.stopped.contains(&oid),
                    "{:?}",
                    entry.state
                );
                assert_eq!(entry.floor, self.now.floors[&oid]);
            }
        }
    }

    /// Replicas at any earlier positions are told, in one pass, what makes them what they should be now, and no more.
    fn serve_together(&mut self) {
        let mut members = Vec::new();
        let mut stands = Vec::new();
        for _ in 0..self.rng.random_range(1..6) {
            let from = match self.rng.random_range(0..4) {
                0 => None,
                _ => self.history.choose(&mut self.rng),
            };
            let views: Vec<_> = (self.source.tables.iter())
                .map(|table| Arc::new(Filter::any(&mut self.rng, table)))
                .collect();
            let mut views: Vec<_> = views.into_iter().filter(|_| self.rng.random()).collect();
            views.sort_by_key(|view| view.table.oid);
            stands.push(from.cloned());
            members.push(Member {
                views,
                from: from.map(|from| Position {
                    epoch: EPOCH,
                    lsn: from.lsn,
                }),
            });
        }
        let mut reader = self.mirror().reader().unwrap();
        reader.begin().unwrap();
        let bytes_max = *[members.len() * 60, 1 << 20].choose(&mut self.rng).unwrap();
        let most = *[5, 1 << 20].choose(&mut self.rng).unwrap();
        let limits = together::Limits {
            entries_max: most,
            scanned_max: most,
        };
        let all = |_: Oid, _: &[u8], found: &mut Vec<u64>| {
            found.extend(0..members.len() as u64);
            Ok(())
        };
        let told = together::pass_limited(&mut reader, &members, &all, bytes_max, limits);
        for ((member, from), told) in members.iter().zip(&stands).zip(told.unwrap()) {
            let reached = member.views.iter().all(|view| {
                let oid = view.table.oid;
                self.durable.floors[&oid] <= self.durable.lsn
                    && (member.from).is_none_or(|from| reader.reaches(oid, from).unwrap())
            });
            let Told::All(ops) = told else {
                assert!(!reached || bytes_max < 1 << 20 || most == 5);
                continue;
            };
            assert!(reached, "told although nothing is known of what was before");
            self.together += usize::from(!ops.is_empty());
            let shape = |state: &Expected| -> Vec<Content> {
                let views = member.views.iter();
                views
                    .map(|view| view.of(&state.tables[&view.table.oid]))
                    .collect()
            };
            let is = shape(&self.durable);
            let was = (from.as_ref()).map_or_else(|| vec![Content::new(); is.len()], shape);
            let mut has = was.clone();
            for (at, op) in ops {
                let view = &member.views[at];
                let key = match op {
                    Op::Upsert(record) => {
                        let row = decode(&record);
                        let key = view.key(&row);
                        has[at].insert(key.clone(), row);
                        key
                    }
                    Op::Delete(record) => {
                        let key = decode(&record);
                        has[at].remove(&key);
                        key
                    }
                };
                assert!(
                    was[at].contains_key(&key) || is[at].contains_key(&key),
                    "told of a key that is in the shape at neither end"
                );
            }
            assert_eq!(has, is);
        }
        reader.end();
    }

    fn join(&mut self) {
        let mut filters = Vec::new();
        for table in &self.source.tables {
            if self.rng.random() {
                filters.push(Arc::new(Filter::any(&mut self.rng, table)));
            }
        }
        let reader = self.mirror().reader().unwrap();
        self.replicas.push(Replica {
            has: vec![Content::new(); filters.len()],
            tellable: vec![BTreeSet::new(); filters.len()],
            filters,
            at: None,
            reader,
            catchup: None,
        });
    }

    /// One replica gets one round; one that has caught up begins another catch-up, or leaves.
    fn round(&mut self) {
        let Some(which) = (0..self.replicas.len())
            .collect::<Vec<_>>()
            .choose(&mut self.rng)
            .copied()
        else {
            return;
        };
        // Readers are shared: a catch-up gets another one for each round.
        let other = self.rng.random_range(0..self.replicas.len());
        if which != other {
            let (one, two) = (which.min(other), which.max(other));
            let (left, right) = self.replicas.split_at_mut(two);
            std::mem::swap(&mut left[one].reader, &mut right[0].reader);
        }
        let bytes_max = *[1, 60, 500, 100_000].choose(&mut self.rng).unwrap();
        let replica = &mut self.replicas[which];
        let position = replica.reader.begin().unwrap();
        assert_eq!(
            position.lsn, self.durable.lsn,
            "a snapshot shows more or less than the last commit"
        );
        if replica.at.is_some_and(|at| at.lsn > position.lsn) {
            replica.reader.end();
            return;
        }
        let shape: Vec<Content> = (replica.filters.iter())
            .map(|filter| filter.of(&self.durable.tables[&filter.table.oid]))
            .collect();
        if replica.catchup.is_none() {
            let mut items = Vec::new();
            for (place, filter) in replica.filters.iter().enumerate() {
                let oid = filter.table.oid;
                let reaches = |from| replica.reader.reaches(oid, from).unwrap();
                let from = replica.at.filter(|at| reaches(*at));
                if let (Some(at), None) = (replica.at, from) {
                    self.reset += 1;
                    let trimmed = self.settings.index_bytes_max != u64::MAX;
                    assert!(
                        trimmed || at.lsn <= self.durable.floors[&oid],
                        "out of reach without a reason"
                    );
                }
                if from.is_none() {
                    // A reset: the replica drops by itself what does not come.
                    replica.has[place].clear();
                }
                replica.tellable[place] = replica.has[place].keys().cloned().collect();
                items.push(Item {
                    view: filter.clone(),
                    from,
                });
            }
            // Every state since where it stands may be told.
            for state in self
                .history
                .iter()
                .filter(|state| replica.at.is_none_or(|at| state.lsn >= at.lsn))
            {
                for (place, filter) in replica.filters.iter().enumerate() {
                    if items[place].from.is_some() {
                        replica.tellable[place]
                            .extend(filter.of(&state.tables[&filter.table.oid]).into_keys());
                    }
                }
            }
            let mut catchup = Catchup::new(items);
            catchup.limits.merged_max = *[0, 2, 8].choose(&mut self.rng).unwrap();
            replica.catchup = Some(catchup);
        }
        for (tellable, shape) in replica.tellable.iter_mut().zip(&shape) {
            tellable.extend(shape.keys().cloned());
        }
        let Replica {
            filters,
            has,
            reader,
            catchup,
            tellable,
            ..
        } = replica;
        let mut given = 0;
        let mut largest = 0;
        let round = catchup
            .as_mut()
            .unwrap()
            .round(reader, bytes_max, &mut |item, op| {
                let filter = &filters[item];
                let key = match op {
                    Op::Upsert(record) => {
                        given += record.len();
                        largest = largest.max(record.len());
                        let row = decode(&record);
                        let key = filter.key(&row);
                        assert_eq!(
                            shape[item].get(&key),
                            Some(&row),
                            "an upsert of what is not so"
                        );
                        has[item].insert(key.clone(), row);
                        key
                    }
                    Op::Delete(record) => {
                        given += record.len();
                        let key = decode(&record);
                        assert_eq!(shape[item].get(&key), None, "a delete of what is there");
                        has[item].remove(&key);
                        key
                    }
                };
                assert!(
                    tellable[item].contains(&key),
                    "told of a key that was never in the shape"
                );
            });
        assert!(given <= bytes_max + largest.max(64));
        replica.reader.end();
        let not_ready = |oid: &Oid| self.durable.floors[oid] > self.durable.lsn;
        match round {
            Ok(Round::More) => {}
            Ok(Round::Filling) => panic!("the mirror is filled"),
            Ok(Round::Complete(at)) => {
                assert_eq!(at, position);
                assert_eq!(replica.has, shape);
                replica.at = Some(at);
                replica.catchup = None;
                self.completed += 1;
                if self.rng.random_range(0..5) == 0 {
                    self.replicas.remove(which);
                }
            }
            Err(Error::OutOfReach(_)) => {
                // Trimmed or copied again under way: all is sent anew.
                replica.at = None;
                replica.catchup = None;
                self.reset += 1;
            }
            Err(Error::NotReady(_)) => {
                assert!(
                    replica
                        .filters
                        .iter()
                        .any(|filter| not_ready(&filter.table.oid))
                );
                replica.catchup = None;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

impl Replica {
    /// One that comes before anything was copied.
    fn early(rng: &mut StdRng, source: &Source, mirror: &Mirror) -> Replica {
        let filters: Vec<_> = (source.tables.iter())
            .map(|table| Arc::new(Filter::any(rng, table)))
            .collect();
        let items = filters.iter().map(|filter| Item {
            view: filter.clone(),
            from: None,
        });
        Replica {
            at: None,
            has: vec![Content::new(); filters.len()],
            tellable: (filters.iter())
                .map(|filter| {
                    let seen = filter.of(&source.initial[&filter.table.oid]);
                    seen.into_keys().collect()
                })
                .collect(),
            reader: mirror.reader().unwrap(),
            catchup: Some(Catchup::new(items.collect())),
            filters,
        }
    }

    /// A round while the mirror is being filled.
    fn early_round(&mut self, rng: &mut StdRng, source: &Source) {
        let bytes_max = *[1, 60, 500, 100_000].choose(rng).unwrap();
        self.reader.begin().unwrap();
        let (filters, has) = (&self.filters, &mut self.has);
        let catchup = self.catchup.as_mut().unwrap();
        let round = catchup.round(&mut self.reader, bytes_max, &mut |item, op| {
            let Op::Upsert(record) = op else {
                panic!("a delete of what was copied");
            };
            let row = decode(&record);
            let key = filters[item].key(&row);
            let shape = filters[item].of(&source.initial[&filters[item].table.oid]);
            assert_eq!(shape.get(&key), Some(&row));
            has[item].insert(key, row);
        });
        assert!(matches!(round, Ok(Round::More | Round::Filling)));
        self.reader.end();
    }
}

/// The initial copy of all tables, a batch of any of them at a time, in an order that is that of the keys or not.
fn fill(mirror: &mut Mirror, rng: &mut StdRng, source: &Source, early: &mut [Replica]) {
    let mut copies = Vec::new();
    for table in &source.tables {
        let content = &source.initial[&table.oid];
        let mut rows: Vec<Bytes> = content.values().map(|row| encode(row)).collect();
        for _ in 0..rng.random_range(0..=rows.len()) / 4 {
            let (one, other) = (
                rng.random_range(0..rows.len()),
                rng.random_range(0..rows.len()),
            );
            rows.swap(one, other);
        }
        copies.push((table.oid, rows));
        mirror.begin_copy(table).unwrap();
    }
    while !copies.is_empty() {
        let at = rng.random_range(0..copies.len());
        let (oid, rows) = &mut copies[at];
        let batch: Vec<Bytes> = rows
            .drain(..rng.random_range(0..=rows.len().min(9)))
            .collect();
        mirror.copy_rows(*oid, &batch).unwrap();
        if rows.is_empty() {
            mirror.end_copy(*oid, source.start).unwrap();
            copies.remove(at);
        }
        for replica in early.iter_mut() {
            if rng.random() {
                replica.early_round(rng, source);
            }
        }
    }
    mirror.begin_epoch(EPOCH, None, source.start).unwrap();
}

fn copy(mirror: &mut Mirror, rng: &mut StdRng, table: &Table, content: &Content) {
    let rows: Vec<Bytes> = content.values().map(|row| encode(row)).collect();
    for batch in rows.chunks(rng.random_range(1..20)) {
        mirror.copy_rows(table.oid, batch).unwrap();
    }
}

/// The net changes are exactly the difference of the model's states.
fn check_nets(tables: &[Arc<Table>], applied: &Applied, before: &Tables, after: &Tables) {
    let mut expected = BTreeMap::new();
    for table in tables {
        let (before, after) = (&before[&table.oid], &after[&table.oid]);
        for key in before.keys().chain(after.keys()) {
            if before.get(key) != after.get(key) {
                let change = (before.get(key).cloned(), after.get(key).cloned());
                expected.insert((table.oid, key.clone()), change);
            }
        }
    }
    let mut found = BTreeMap::new();
    for net in &applied.nets {
        let (before, after) = (
            net.before.as_ref().map(|row| decode(row)),
            net.after.as_ref().map(|row| decode(row)),
        );
        let key = decode(&net.key.record());
        for row in before.iter().chain(&after) {
            assert_eq!(key_of(&net.table, row), key);
        }
        assert_eq!(
            found.insert((net.table.oid, key), (before, after)),
            None,
            "one net change for each row"
        );
    }
    assert_eq!(found, expected);
}

/// Random histories, with kills, lost connections, repeated copies, trimming and replicas that catch up meanwhile:
/// `ANABRANCH_HISTORIES` of them, 60 if it is not set.
#[test]
fn whatever_happens_the_mirror_and_its_replicas_equal_the_source() {
    let seeds = match std::env::var("ANABRANCH_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            let histories = std::env::var("ANABRANCH_HISTORIES").map_or(60, |n| n.parse().unwrap());
            let first: u64 = rand::rng().random();
            (0..histories).map(|n| first.wrapping_add(n)).collect()
        }
    };
    let (mut completed, mut reset, mut looks, mut together) = (0, 0, 0, 0);
    for seed in seeds {
        println!("ANABRANCH_SEED={seed}");
        let mut driver = Driver::new(seed);
        for _ in 0..300 {
            driver.step();
        }
        driver.commit();
        driver.check();
        completed += driver.completed;
        reset += driver.reset;
        looks += driver.historian.looks;
        together += driver.together;
    }
    println!(
        "{completed} catch-ups were completed, {reset} tables were reset, {looks} earlier states were looked at, {together} \
         replicas were served together with others"
    );
    assert!(completed > 0 && looks > 0 && together > 0);
}
