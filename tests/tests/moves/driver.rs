//! Plays engine and sessions.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use anabranch_proto::{Epoch, Position};
use anabranch_streamer::{
    catchup::{Catchup, Item, Limits, Round, View, tables_of},
    definition::Definition,
    delta::{self, Op},
    lookup::Index,
    mirror::{Error, Mirror, Reader, Settings},
    policy::Policies,
    route::Router,
    session::{TableView, former::Changed},
    shape::{self, Bound, ParamSource, Source as ShapeSource},
    transaction::Chunk,
};
use anabranch_tests::nested::{Principal, Schema, Shape, generator};
use bytes::Bytes;
use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{IndexedMutRandom, IndexedRandom},
};

use super::source::{Source, encode};

/// Shapes of each history.
const SHAPES: usize = 12;

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub shapes: usize,
    pub transactions: usize,
    /// Comparisons of a replica's table with what its shapes mean.
    pub compared: usize,
    /// Rows in these.
    pub rows: usize,
    /// Ops that live replicas got.
    pub told: usize,
    /// Of these, of rows that did not change themselves.
    pub moved: usize,
    /// Catch-ups that were completed.
    pub caught_up: usize,
    pub rounds: usize,
    /// Ops of catch-ups.
    pub caught_up_ops: usize,
    pub kills: usize,
    /// Transactions that were too much to be routed to somebody: too many rows to look at.
    pub given_up: usize,
    /// Conditions read too much.
    pub given_up_reading: usize,
    /// Too many bound SELECTs were to be asked.
    pub given_up_asking: usize,
    /// Too much was to be told.
    pub given_up_telling: usize,
    /// Views of which all was sent again, as the change index did not reach them.
    pub reset: usize,
    /// Tables that were copied anew.
    pub copied: usize,
    /// Rounds while the tables were copied.
    pub early: usize,
    /// Views of which the difference was sent to what they were with other claims.
    pub reshaped: usize,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        self.shapes += other.shapes;
        self.transactions += other.transactions;
        self.compared += other.compared;
        self.rows += other.rows;
        self.told += other.told;
        self.moved += other.moved;
        self.caught_up += other.caught_up;
        self.rounds += other.rounds;
        self.caught_up_ops += other.caught_up_ops;
        self.kills += other.kills;
        self.given_up += other.given_up;
        self.given_up_reading += other.given_up_reading;
        self.given_up_asking += other.given_up_asking;
        self.given_up_telling += other.given_up_telling;
        self.reset += other.reset;
        self.copied += other.copied;
        self.early += other.early;
        self.reshaped += other.reshaped;
    }
}

/// What a replica has of one table: by the record of the key, that of the row.
type Content = BTreeMap<Bytes, Bytes>;

enum Standing {
    /// Gets ops.
    Live,
    /// At a position, or nowhere.
    Away,
    /// Has been told something that it has not committed.
    CatchingUp(Box<Catchup>, Vec<Content>),
}

struct Session {
    id: u64,
    principal: Principal,
    bounds: Vec<Bound>,
    views: Vec<Arc<TableView>>,
    /// For each of `views`: what it shows.
    shapes: Vec<Vec<Shape>>,
    /// For each of `views`: what `has` was shown by, where that is another one.
    former: Vec<Option<Arc<TableView>>>,
    has: Vec<Content>,
    at: Option<Position>,
    standing: Standing,
}

pub struct Driver {
    rng: StdRng,
    _directory: tempfile::TempDir,
    settings: Settings,
    source: Source,
    mirror: Option<Mirror>,
    router: Router,
    indexes: Vec<Index>,
    readers: Vec<Reader>,
    sessions: Vec<Session>,
    shapes: Vec<(Shape, shape::Shape)>,
    pub counts: Counts,
}

/// As the config would have it.
fn written(schema: &Schema, shape: &Shape) -> ShapeSource {
    let params = shape.params(schema).into_iter();
    ShapeSource {
        name: shape.name.clone(),
        params: params
            .map(|name| (name.to_owned(), ParamSource::Claim(name.to_owned())))
            .collect(),
        tables: vec![shape.sql(schema)],
        writable: Vec::new(),
    }
}

/// Whether it shows some of the rows to somebody, and not all of them.
fn tells(rng: &mut StdRng, source: &Source, shape: &Shape) -> bool {
    let rows = &source.data[shape.table];
    (0..3).any(|_| {
        let principal = generator::principal(rng, source.schema.width);
        let shows = |row: &&_| shape.shows(&source.data, &principal, row);
        let shown = rows.values().filter(shows).count();
        0 < shown && shown < rows.len()
    })
}

impl Driver {
    pub fn new(seed: u64) -> Driver {
        let mut rng = StdRng::seed_from_u64(seed);
        let source = Source::new(&mut rng);
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings {
            directory: directory.path().into(),
            cache_bytes: 1 << 20,
            reader_cache_bytes: 1 << 18,
            index_bytes_max: *[3_000, 20_000, u64::MAX, u64::MAX]
                .choose(&mut rng)
                .expect("four"),
            index_hours_max: 24,
            row_bytes_max: 1 << 20,
        };
        let mut counts = Counts::default();
        let mut shapes = Vec::new();
        while shapes.len() < SHAPES {
            let name = format!("s{}", shapes.len());
            let shape = generator::shape(&mut rng, &source.schema, name);
            if !tells(&mut rng, &source, &shape) && rng.random_ratio(9, 10) {
                continue;
            }
            shapes.push(shape);
        }
        // All at once: what is told apart by its number must not be compiled twice.
        let sources = shapes.iter().map(|shape| written(&source.schema, shape));
        let compiled = shape::compile(&sources.collect::<Vec<_>>(), &source.tables).unwrap();
        let shapes: Vec<_> = shapes.into_iter().zip(compiled).collect();
        counts.shapes = shapes.len();
        let mut indexes = Vec::new();
        for select in shapes.iter().flat_map(|(_, compiled)| &compiled.selects) {
            indexes.extend(select.indexes());
        }
        let mut mirror = Mirror::open(&settings).unwrap();
        mirror.set_indexes(&indexes).unwrap();
        for table in &source.tables {
            mirror.begin_copy(table).unwrap();
        }
        let mut router = Router::default();
        match rng.random_range(0..8) {
            0 | 1 => router.limits.steps_max = rng.random_range(0..30),
            2 | 3 => router.limits.reads_max = rng.random_range(0..300),
            4 => router.limits.scans_max = rng.random_range(0..5),
            5 => router.limits.ops_max = rng.random_range(0..20),
            _ => {}
        }
        if rng.random_bool(0.5) {
            router.limits.answers_bytes_max = rng.random_range(0..500);
        }
        let readers = (0..2).map(|_| mirror.reader().unwrap()).collect();
        let mut driver = Driver {
            rng,
            _directory: directory,
            settings,
            source,
            mirror: Some(mirror),
            router,
            indexes,
            readers,
            sessions: Vec::new(),
            shapes,
            counts,
        };
        for id in 0..5 {
            driver.subscribe(id);
        }
        driver.fill();
        driver
    }

    /// The first copy; who is there gets what may be had of it.
    fn fill(&mut self) {
        let mut rows = Vec::new();
        for place in 0..self.source.tables.len() {
            let all = self.source.data[place].values();
            rows.push(
                all.map(|row| self.source.encode(place, row))
                    .collect::<Vec<_>>(),
            );
        }
        let mut left: Vec<usize> = (0..rows.len()).collect();
        while let Some(turn) = (0..left.len()).collect::<Vec<_>>().choose(&mut self.rng) {
            let place = left[*turn];
            let (oid, at) = (self.source.tables[place].oid, self.source.lsn);
            let some = self.rng.random_range(0..=rows[place].len());
            let batch: Vec<Bytes> = rows[place].drain(..some).collect();
            self.mirror().copy_rows(oid, &batch).unwrap();
            if rows[place].is_empty() {
                self.mirror().end_copy(oid, at).unwrap();
                left.retain(|other| *other != place);
            }
            if self.rng.random_ratio(1, 3) {
                self.counts.early += 1;
                let which = self.rng.random_range(0..self.sessions.len());
                self.round(which);
            }
        }
        let at = self.source.lsn;
        self.mirror().begin_epoch(Epoch(7), None, at).unwrap();
    }

    /// A table is copied anew. Nobody is connected meanwhile.
    fn copy_again(&mut self) {
        self.counts.copied += 1;
        let place = self.rng.random_range(0..self.source.tables.len());
        let table = self.source.tables[place].clone();
        let rows = self.source.data[place].values();
        let rows: Vec<Bytes> = rows.map(|row| self.source.encode(place, row)).collect();
        let at = self.source.lsn;
        self.mirror().begin_copy(&table).unwrap();
        self.mirror().copy_rows(table.oid, &rows).unwrap();
        self.mirror().end_copy(table.oid, at).unwrap();
    }

    fn subscribe(&mut self, id: u64) {
        let principal = generator::principal(&mut self.rng, self.source.schema.width);
        let count = self.rng.random_range(3..=8);
        let chosen: Vec<&(Shape, shape::Shape)> =
            self.shapes.choose_multiple(&mut self.rng, count).collect();
        let claims = principal.claims("somebody");
        let mut bounds = Vec::new();
        for (shape, compiled) in &chosen {
            let bound = compiled.bind(&claims, &HashMap::new()).unwrap().remove(0);
            bounds.push((shape.name.clone(), bound));
        }
        let views = TableView::of(&bounds, &Policies::default()).unwrap();
        let shapes = views.iter().map(|view| {
            let shown = chosen
                .iter()
                .filter(|(shape, _)| self.source.tables[shape.table].oid == view.table().oid);
            shown.map(|(shape, _)| shape.clone()).collect()
        });
        self.sessions.push(Session {
            id,
            principal,
            shapes: shapes.collect(),
            bounds: bounds.into_iter().map(|(_, bound)| bound).collect(),
            former: vec![None; views.len()],
            has: vec![Content::new(); views.len()],
            views,
            at: None,
            standing: Standing::Away,
        });
    }

    /// A session that is away gets other claims.
    fn reshape(&mut self, which: usize) {
        let principal = generator::principal(&mut self.rng, self.source.schema.width);
        let claims = principal.claims("somebody");
        let indexes = self.readers[0].indexes().unwrap();
        let session = &mut self.sessions[which];
        let mut bounds = Vec::new();
        for shape in session.shapes.iter().flatten() {
            let mut shapes = self.shapes.iter();
            let (_, compiled) = shapes.find(|(other, _)| other.name == shape.name).unwrap();
            let bound = compiled.bind(&claims, &HashMap::new()).unwrap().remove(0);
            bounds.push((shape.name.clone(), bound));
        }
        let views = TableView::of(&bounds, &Policies::default()).unwrap();
        for (former, (old, new)) in
            (session.former.iter_mut()).zip(session.views.iter().zip(&views))
        {
            let had = former.take().unwrap_or_else(|| {
                // As the mirror keeps it.
                let text = serde_json::to_string(&Definition::of(old.bounds())).unwrap();
                let kept: Definition = serde_json::from_str(&text).unwrap();
                let again = kept
                    .bounds(&self.source.tables, &indexes)
                    .expect("it is read again");
                let named: Vec<_> = again.into_iter().map(|b| (String::new(), b)).collect();
                TableView::of(&named, &Policies::default())
                    .unwrap()
                    .remove(0)
            });
            *former = (had.fingerprint() != new.fingerprint()).then_some(had);
        }
        session.views = views;
        session.bounds = bounds.into_iter().map(|(_, bound)| bound).collect();
        session.principal = principal;
    }

    fn mirror(&mut self) -> &mut Mirror {
        self.mirror.as_mut().unwrap()
    }

    pub fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..50 => self.transaction(),
            50..55 => self.mirror().commit().unwrap(),
            55..63 => {
                let which = self.rng.random_range(0..self.sessions.len());
                self.leave(which);
            }
            63..65 => self.kill(),
            _ => {
                let away: Vec<usize> = (0..self.sessions.len())
                    .filter(|which| !matches!(self.sessions[*which].standing, Standing::Live))
                    .collect();
                if let Some(which) = away.choose(&mut self.rng).copied() {
                    self.round(which);
                }
            }
        }
    }

    /// All catch up, and are equal.
    pub fn end(&mut self) {
        for which in 0..self.sessions.len() {
            while !matches!(self.sessions[which].standing, Standing::Live) {
                self.round(which);
            }
        }
        self.transaction();
    }

    fn leave(&mut self, which: usize) {
        let session = &mut self.sessions[which];
        self.router.remove(session.id);
        session.standing = Standing::Away;
    }

    fn kill(&mut self) {
        self.counts.kills += 1;
        self.mirror().commit().unwrap();
        for which in 0..self.sessions.len() {
            self.leave(which);
        }
        self.readers.clear();
        self.mirror = None;
        let mut mirror = Mirror::open(&self.settings).unwrap();
        mirror.set_indexes(&self.indexes).unwrap();
        self.readers = (0..2).map(|_| mirror.reader().unwrap()).collect();
        self.mirror = Some(mirror);
        if self.rng.random_ratio(1, 4) {
            self.copy_again();
        }
    }

    fn transaction(&mut self) {
        self.counts.transactions += 1;
        let chunk = self.source.commit(&mut self.rng);
        if self.rng.random_ratio(1, 15) {
            self.large(chunk);
            return;
        }
        let mirror = self.mirror.as_mut().unwrap();
        let applied = mirror.apply(&chunk).unwrap();
        assert!(applied.large.is_empty() && applied.stopped.is_empty());
        let routed = self
            .router
            .route(&applied.nets, &mirror.before(&applied.nets), &mirror.now())
            .unwrap();
        let position = mirror.position();
        if !routed.behind.is_empty() {
            let limits = &self.router.limits;
            let given_up = if limits.reads_max < 1_000 {
                &mut self.counts.given_up_reading
            } else if limits.scans_max < 1_000 {
                &mut self.counts.given_up_asking
            } else if limits.ops_max < 1_000 {
                &mut self.counts.given_up_telling
            } else {
                assert!(limits.steps_max < 1_000, "it was given up too early");
                &mut self.counts.given_up
            };
            *given_up += 1;
        }
        for which in 0..self.sessions.len() {
            // What else there is for it is only a part.
            if routed.behind.contains(&self.sessions[which].id) {
                self.leave(which);
            }
        }
        for session in &mut self.sessions {
            if !matches!(session.standing, Standing::Live) {
                let told = routed.ops.contains_key(&session.id);
                assert!(!told || routed.behind.contains(&session.id));
                continue;
            }
            session.at = Some(position);
            for (oid, op) in routed.ops.get(&session.id).into_iter().flatten() {
                self.counts.told += 1;
                let view = session.views.iter();
                let view = view.clone().position(|view| view.table().oid == *oid);
                let place = view.expect("told of a table that it does not have");
                let table = session.views[place].table();
                let columns = session.views[place].columns();
                let has = &mut session.has[place];
                let key = key_of(table, columns, op);
                let changed = applied.nets.iter().any(|net| {
                    let row = net.before.as_ref().or(net.after.as_ref()).unwrap();
                    net.table.oid == *oid && delta::key_record(table, row).unwrap() == key
                });
                self.counts.moved += usize::from(!changed);
                let before = match op {
                    Op::Upsert(row) => has.insert(key, row.clone()),
                    Op::Delete(_) => Some(has.remove(&key).expect("a delete of what it has not")),
                };
                if let Op::Upsert(row) = op {
                    assert_ne!(before.as_ref(), Some(row), "told what it has");
                }
            }
        }
        self.check("live");
    }

    /// One that comes in parts: all whom it concerns must catch up.
    fn large(&mut self, chunk: Chunk) {
        let mut changes = chunk.changes;
        let rest = changes.split_off(self.rng.random_range(0..=changes.len()));
        let (commit_lsn, end) = (chunk.commit_lsn, chunk.end);
        let mut first = true;
        for (changes, end) in [(changes, None), (rest, end)] {
            let part = Chunk {
                changes,
                bytes: 0,
                first,
                commit_lsn,
                end,
            };
            first = false;
            self.mirror().apply_part(&part).unwrap();
        }
        let applied = self.mirror().end_large(end.unwrap()).unwrap();
        let concerned = self.router.sessions_of(&applied.large);
        let position = self.mirror().position();
        for which in 0..self.sessions.len() {
            if concerned.contains(&self.sessions[which].id) {
                self.leave(which);
            } else if matches!(self.sessions[which].standing, Standing::Live) {
                self.sessions[which].at = Some(position);
            }
        }
        self.check("not concerned");
    }

    /// What live sessions have is what their shapes mean now.
    fn check(&mut self, how: &str) {
        for session in &self.sessions {
            if matches!(session.standing, Standing::Live) {
                for place in 0..session.views.len() {
                    let found = &session.has[place];
                    compare(&self.source, session, place, found, how, &mut self.counts);
                }
            }
        }
    }

    /// One round of a catch-up, with any reader.
    fn round(&mut self, which: usize) {
        self.mirror().commit().unwrap();
        let position = self.mirror().position();
        let session = &mut self.sessions[which];
        if self.rng.random_ratio(1, 20) {
            // What it was told is lost.
            session.standing = Standing::Away;
        }
        let is_away = matches!(session.standing, Standing::Away);
        if is_away && session.at.is_some() && self.rng.random_ratio(1, 6) {
            self.reshape(which);
        }
        let session = &mut self.sessions[which];
        if is_away {
            let mut items = Vec::new();
            let mut has = session.has.clone();
            let reader = &mut self.readers[0];
            reader.begin().unwrap();
            for (place, view) in session.views.iter().enumerate() {
                let former = session.former[place].clone();
                let had = former.clone().unwrap_or_else(|| view.clone());
                let mut needed = tables_of(&*had).into_iter();
                let mut reaches =
                    |from| needed.all(|table| reader.reaches(table.oid, from).unwrap());
                let reached = session.at.filter(|at| reaches(*at));
                self.counts.reset += usize::from(session.at != reached);
                // The fingerprint of one changed, say.
                let from = reached.filter(|_| !self.rng.random_ratio(1, 12));
                if from.is_none() {
                    has[place].clear();
                }
                self.counts.reshaped += usize::from(from.is_some() && former.is_some());
                items.push(Item {
                    view: match former {
                        Some(former) => Arc::new(Changed::new(view.clone(), former)),
                        None => view.clone(),
                    },
                    from,
                });
            }
            reader.end();
            let mut catchup = Catchup::new(items);
            if self.rng.random_bool(0.5) {
                catchup.limits = Limits {
                    merged_max: self.rng.random_range(0..4),
                    collected_max: self.rng.random_range(1..20),
                    collected_with_rows_max: self.rng.random_range(1..20),
                    looked_max: self.rng.random_range(1..10),
                    reads_max: *[0, 20, 1_000].choose(&mut self.rng).expect("three"),
                    answers_bytes_max: self.rng.random_range(0..500),
                };
            }
            session.standing = Standing::CatchingUp(Box::new(catchup), has);
        }
        let Standing::CatchingUp(catchup, has) = &mut session.standing else {
            panic!("it is live");
        };
        let reader = self.readers.choose_mut(&mut self.rng).expect("two");
        assert_eq!(reader.begin().unwrap(), position);
        let bytes_max = *[1, 40, 300, 100_000].choose(&mut self.rng).expect("four");
        let mut ops = Vec::new();
        let round = catchup.round(reader, bytes_max, &mut |item, op| ops.push((item, op)));
        reader.end();
        let round = match round {
            Err(Error::OutOfReach(_)) => {
                // Trimmed under way: it starts again.
                session.standing = Standing::Away;
                return;
            }
            round => round.unwrap(),
        };
        self.counts.rounds += 1;
        self.counts.caught_up_ops += ops.len();
        let mut wrong = None;
        for (item, op) in ops {
            let (table, columns) = (session.views[item].table(), session.views[item].columns());
            let key = key_of(table, columns, &op);
            match op {
                Op::Upsert(row) => drop(has[item].insert(key, row)),
                Op::Delete(_) => {
                    if has[item].remove(&key).is_none() {
                        wrong = Some(item);
                    }
                }
            }
        }
        let session = &self.sessions[which];
        if let Some(item) = wrong {
            let words = describe(&self.source, session, item);
            panic!("a delete of what it has not\n{words}");
        }
        match round {
            Round::More | Round::Filling => {}
            Round::Complete(at) => {
                assert_eq!(at, position);
                let Standing::CatchingUp(_, has) = &session.standing else {
                    panic!("it is live");
                };
                for (place, has) in has.iter().enumerate() {
                    let how = "caught up";
                    compare(&self.source, session, place, has, how, &mut self.counts);
                }
                self.counts.caught_up += 1;
                let session = &mut self.sessions[which];
                let standing = std::mem::replace(&mut session.standing, Standing::Live);
                if let Standing::CatchingUp(_, has) = standing {
                    session.has = has;
                }
                session.former.fill(None);
                session.at = Some(at);
                self.router.add(session.id, &session.bounds);
            }
        }
    }
}

/// The record of the key that an op is of.
fn key_of(table: &anabranch_streamer::table::Table, columns: &[usize], op: &Op) -> Bytes {
    use anabranch_proto::record;
    match op {
        Op::Delete(key) => key.clone(),
        Op::Upsert(row) => {
            let values: Vec<_> = record::values(row).unwrap().map(Result::unwrap).collect();
            let place = |key: &usize| columns.iter().position(|column| column == key).unwrap();
            record::build(table.key.iter().map(|key| values[place(key)]))
        }
    }
}

fn describe(source: &Source, session: &Session, place: usize) -> String {
    let mut words = format!("{:?} after {}\n", session.principal, source.lsn);
    for shape in &session.shapes[place] {
        words += &format!("{}\n", shape.sql_for(&source.schema, &session.principal));
    }
    for (table, rows) in source.schema.tables.iter().zip(&source.data) {
        let names: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
        words += &format!("{} {names:?} key {:?}\n", table.name, table.key);
        for row in rows.values() {
            words += &format!("  {:?}\n", row.iter().map(|v| v.sql()).collect::<Vec<_>>());
        }
    }
    words
}

fn compare(
    source: &Source,
    session: &Session,
    place: usize,
    found: &Content,
    how: &str,
    counts: &mut Counts,
) {
    let shapes = &session.shapes[place];
    let at = shapes[0].table;
    let table = &source.schema.tables[at];
    let mut expected = Content::new();
    for row in source.data[at].values() {
        let shows = |shape: &Shape| shape.shows(&source.data, &session.principal, row);
        if shapes.iter().any(shows) {
            let whole = source.encode(at, row);
            let key = delta::key_record(&source.tables[at], &whole).unwrap();
            let columns: Vec<_> = match &table.chosen {
                None => table.columns.clone(),
                Some(chosen) => chosen.iter().map(|c| table.columns[*c].clone()).collect(),
            };
            expected.insert(key, encode(&table.project(row), &columns));
        }
    }
    counts.compared += 1;
    counts.rows += expected.len();
    if *found != expected {
        let mut differ = String::new();
        for key in expected.keys().chain(found.keys()) {
            let (expected, found) = (expected.get(key), found.get(key));
            if expected != found {
                differ += &format!("key {key:?}: expected {expected:?}, found {found:?}\n");
            }
        }
        panic!(
            "session {} ({how}) differs in {}\n{differ}{}",
            session.id,
            table.name,
            describe(source, session, place)
        );
    }
}
