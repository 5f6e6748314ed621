//! `shapes diff`: what each connected replica would gain and lose if the streamer were started with another config.
//!
//! Computed in the mirror by the process of the command (`connected` says why): one pass over each table for all replicas
//! together, and replicas that are shown the same are computed once. Both definitions are asked of the rows as they are now:
//! a restart sends what differs between the old one at the replica's position and the new one then, which is the same, but for
//! what is written meanwhile.
//!
//! A table that the mirror does not have yet, or that a new condition looks into without its being there, is copied at the
//! start: of it nothing can be counted, and that is said.
//!
//! It reads and counts, and shows no value of a row, a claim or a parameter.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt,
    sync::Arc,
};

use anabranch_proto::Position;
use bytes::Bytes;
use serde::Serialize;

use crate::{
    catchup::{View, of_rows, tables_of},
    connected::{self, Answer, Replica},
    delta::{self, Op},
    lookup,
    mirror::{self, Outside, State},
    policy::Policies,
    session::{TableView, former::Changed},
    shape::{self, Shape},
    table::Oid,
    token::Fingerprint,
};

/// Rows, and the bytes of their records. On the wire they may be compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Rows.
    pub rows: u64,
    /// Bytes of their records.
    pub bytes: u64,
}

/// What becomes of what a replica has of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Rows that it is not shown now, and would be.
    pub gained: Count,
    /// Rows that it is shown now, and would not be.
    pub lost: Count,
    /// Rows that it would still be shown, and be sent again since their columns are others.
    pub resent: Count,
}

/// One table of one replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableDiff {
    /// `schema.name`.
    pub table: String,
    /// `None`: it can't be said; `note` has the reason.
    pub figures: Option<Figures>,
    /// What else is to be known.
    pub note: Option<String>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReplicaDiff {
    /// Its id.
    pub replica: String,
    /// It would not be served any more: why.
    pub refused: Option<String>,
    /// The tables of which something changes.
    pub tables: Vec<TableDiff>,
    /// The sum of what is known.
    pub total: Figures,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// Where the mirror was when it was begun to be looked at, and when that was done: `epoch@lsn`.
    pub from: String,
    /// See `from`.
    pub to: String,
    /// The connected replicas.
    pub replicas: Vec<ReplicaDiff>,
    /// Over all of them.
    pub total: Figures,
}

/// It can't be computed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mirror can't be read.
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    /// The mirror changed in a way that shapes do not fit any more.
    #[error("the shapes in force don't fit the mirror: {0}")]
    Shapes(String),
}

/// What a replica is shown of a table, and what it would be; not both are `None`.
type Pair = (Option<Arc<TableView>>, Option<Arc<TableView>>);

/// What tells pairs apart.
type PairKey = (Oid, Option<Fingerprint>, Option<Fingerprint>);

/// Pairs to be counted, by their table.
#[derive(Default)]
struct Jobs {
    of_table: BTreeMap<Oid, Vec<PairKey>>,
    pairs: HashMap<PairKey, (Pair, Option<Figures>, Option<String>)>,
}

/// The tables of the mirror.
pub fn entries(outside: &mut Outside) -> Result<(Position, Vec<mirror::Entry>), Error> {
    let reader = outside.reader();
    let position = reader.begin()?;
    let entries = reader.entries();
    reader.end();
    Ok((position, entries?))
}

/// Computes it. `new` was compiled against the mirror's tables, and those that are new.
pub fn compute(outside: &mut Outside, answer: &Answer, new: &[Shape]) -> Result<Diff, Error> {
    let (from, entries) = entries(outside)?;
    let tables: Vec<_> = entries.iter().map(|entry| entry.table.clone()).collect();
    let old = shape::compile(&answer.shapes, &tables).map_err(|refused| {
        let reasons: Vec<_> = refused.iter().map(ToString::to_string).collect();
        Error::Shapes(reasons.join("; "))
    })?;
    let mut jobs = Jobs::default();
    let mut planned = Vec::with_capacity(answer.replicas.len());
    for replica in &answer.replicas {
        planned.push(jobs.plan(replica, &old, new));
    }
    jobs.count(outside, &entries)?;
    let mut replicas = Vec::with_capacity(planned.len());
    let mut total = Figures::default();
    for (replica, planned) in answer.replicas.iter().zip(planned) {
        let of = jobs.of_replica(replica, planned);
        total.add(&of.total);
        replicas.push(of);
    }
    let to = outside.reader().begin()?;
    outside.reader().end();
    Ok(Diff {
        from: from.to_string(),
        to: to.to_string(),
        replicas,
        total,
    })
}

fn views(shapes: &[Shape], replica: &Replica) -> Result<Vec<Arc<TableView>>, String> {
    let bounds = connected::bind(shapes, replica).map_err(|error| error.to_string())?;
    TableView::of(&bounds, &Policies::default()).map_err(|error| error.to_string())
}

impl Jobs {
    /// What is to be counted for a replica; or why it would be refused.
    fn plan(
        &mut self,
        replica: &Replica,
        old: &[Shape],
        new: &[Shape],
    ) -> Result<Vec<PairKey>, String> {
        // It is connected, so they were bound before.
        let before = views(old, replica).unwrap_or_default();
        let after = views(new, replica)?;
        let mut pairs: BTreeMap<Oid, Pair> = BTreeMap::new();
        for view in before {
            let table = view.table().oid;
            pairs.entry(table).or_default().0 = Some(view);
        }
        for view in after {
            let table = view.table().oid;
            pairs.entry(table).or_default().1 = Some(view);
        }
        let mut keys = Vec::new();
        for (table, pair) in pairs {
            let fingerprint =
                |view: &Option<Arc<TableView>>| view.as_ref().map(|v| v.fingerprint());
            let key = (table, fingerprint(&pair.0), fingerprint(&pair.1));
            if key.1 == key.2 {
                continue;
            }
            if let Entry::Vacant(new) = self.pairs.entry(key) {
                new.insert((pair, None, None));
                self.of_table.entry(table).or_default().push(key);
            }
            keys.push(key);
        }
        Ok(keys)
    }

    /// Goes over each table once.
    fn count(&mut self, outside: &mut Outside, entries: &[mirror::Entry]) -> Result<(), Error> {
        for (table, keys) in std::mem::take(&mut self.of_table) {
            let mut countable = Vec::new();
            for key in keys {
                let Some((pair, _, note)) = self.pairs.get_mut(&key) else {
                    continue;
                };
                *note = why_not(pair, entries);
                if note.is_none() {
                    for view in [&pair.0, &pair.1].into_iter().flatten() {
                        let steps = view.bounds().iter().flat_map(|b| b.select.subqueries());
                        outside.make_indexes(steps.map(|step| &step.subquery.inner))?;
                    }
                    countable.push((key, pair.clone(), Figures::default()));
                }
            }
            if countable.is_empty() {
                continue;
            }
            let changed: Vec<_> = countable.iter().map(|(_, pair, _)| changed(pair)).collect();
            outside.scan(table, &mut |here, _, row| {
                for ((_, pair, figures), changed) in countable.iter_mut().zip(&changed) {
                    let looked = look(pair, changed.as_ref(), figures, &row, here);
                    let view = pair.0.as_ref().or(pair.1.as_ref());
                    if let (Err(error), Some(view)) = (looked, view) {
                        return Err(of_rows(view.table(), error));
                    }
                }
                Ok(())
            })?;
            for (key, _, figures) in countable {
                if let Some((_, counted, _)) = self.pairs.get_mut(&key) {
                    *counted = Some(figures);
                }
            }
        }
        Ok(())
    }

    fn of_replica(&self, replica: &Replica, planned: Result<Vec<PairKey>, String>) -> ReplicaDiff {
        let mut of = ReplicaDiff {
            replica: replica.replica.clone(),
            refused: None,
            tables: Vec::new(),
            total: Figures::default(),
        };
        match planned {
            Err(reason) => of.refused = Some(reason),
            Ok(keys) => {
                for key in keys {
                    let Some((pair, figures, note)) = self.pairs.get(&key) else {
                        continue;
                    };
                    if let Some(figures) = figures {
                        of.total.add(figures);
                    }
                    of.tables.push(TableDiff {
                        table: name_of(pair),
                        figures: *figures,
                        note: note.clone(),
                    });
                }
            }
        }
        of
    }
}

fn name_of((old, new): &Pair) -> String {
    let view = old.as_ref().or(new.as_ref());
    view.map_or_else(String::new, |view| view.table().full_name())
}

fn changed((old, new): &Pair) -> Option<Changed> {
    Some(Changed::new(new.clone()?, old.clone()?))
}

/// Why a pair can't be counted.
fn why_not((old, new): &Pair, entries: &[mirror::Entry]) -> Option<String> {
    for view in [old, new].into_iter().flatten() {
        for table in tables_of(&**view) {
            let entry = entries.iter().find(|entry| entry.table.oid == table.oid);
            let name = table.full_name();
            match entry.map(|entry| &entry.state) {
                None | Some(State::Copying) => {
                    return Some(format!(
                        "{name} is not in the mirror: it is copied from Postgres when the streamer starts"
                    ));
                }
                Some(State::Stopped { .. }) => {
                    return Some(format!(
                        "{name} is stopped: its rows stay as they are ({})",
                        mirror::REMEDY
                    ));
                }
                Some(State::Live) => {}
            }
        }
    }
    None
}

/// One row: what a restart would tell, and how much that is.
fn look(
    (old, new): &Pair,
    changed: Option<&Changed>,
    figures: &mut Figures,
    row: &Bytes,
    here: &dyn lookup::Lookup,
) -> Result<(), lookup::Error> {
    let seen = |view: &Option<Arc<TableView>>| match view {
        Some(view) => view.contains(row, here),
        None => Ok(false),
    };
    let (was, is) = (seen(old)?, seen(new)?);
    match (was, is) {
        (false, false) => {}
        (true, false) => {
            let held = old.as_ref().map(|old| old.project(row)).transpose()?;
            figures.lost.one(held.map_or(0, |held| held.len()));
        }
        (false, true) => {
            let sent = new.as_ref().map(|new| new.project(row)).transpose()?;
            figures.gained.one(sent.map_or(0, |sent| sent.len()));
        }
        (true, true) => {
            let Some(changed) = changed else {
                return Ok(());
            };
            let told = delta::decide_changed(
                changed.table(),
                Some(row),
                Some(row),
                |row| changed.held(row),
                |row| changed.project(row),
            )?;
            if let Some(Op::Upsert(sent)) = told {
                figures.resent.one(sent.len());
            }
        }
    }
    Ok(())
}

impl Count {
    fn one(&mut self, bytes: usize) {
        self.rows += 1;
        self.bytes += bytes as u64;
    }

    fn add(&mut self, other: &Count) {
        self.rows += other.rows;
        self.bytes += other.bytes;
    }
}

impl Figures {
    fn add(&mut self, other: &Figures) {
        self.gained.add(&other.gained);
        self.lost.add(&other.lost);
        self.resent.add(&other.resent);
    }

    fn cells(&self) -> [String; 3] {
        [self.gained, self.lost, self.resent].map(|count| count.to_string())
    }
}

impl Diff {
    /// Whether a replica would be refused.
    pub fn refuses(&self) -> bool {
        self.replicas.iter().any(|of| of.refused.is_some())
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Count { rows, bytes } = *self;
        if rows == 0 {
            return f.write_str("-");
        }
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let rows = format!("{rows} row{}", if rows == 1 { "" } else { "s" });
        match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
            Some((shift, unit)) => {
                write!(
                    f,
                    "{rows}, {:.1} {unit}",
                    bytes as f64 / (1u64 << shift) as f64
                )
            }
            None => write!(f, "{rows}, {bytes} B"),
        }
    }
}

/// A table for people.
impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from == self.to {
            true => writeln!(f, "as of {}", self.to)?,
            false => writeln!(f, "as of {} to {}", self.from, self.to)?,
        }
        let is_changed = |of: &&ReplicaDiff| of.refused.is_some() || !of.tables.is_empty();
        let changed: Vec<_> = self.replicas.iter().filter(is_changed).collect();
        writeln!(
            f,
            "{} connected replica{}, of which {} would not notice anything",
            self.replicas.len(),
            if self.replicas.len() == 1 { "" } else { "s" },
            self.replicas.len() - changed.len()
        )?;
        if changed.is_empty() {
            return Ok(());
        }
        let head = ["gains", "loses", "is sent again"].map(String::from);
        let mut lines = vec![(String::new(), head, None)];
        for of in &changed {
            lines.push((format!("replica {}", of.replica), Default::default(), None));
            if let Some(reason) = &of.refused {
                let reason = format!("would be refused: {reason}");
                lines.push((String::new(), Default::default(), Some(reason)));
            }
            for table in &of.tables {
                let cells = (table.figures.as_ref()).map_or_else(Default::default, Figures::cells);
                lines.push((format!("  {}", table.table), cells, table.note.clone()));
            }
        }
        lines.push(("all of them".to_owned(), self.total.cells(), None));
        let mut widths = [0; 4];
        for (name, cells, _) in &lines {
            widths[0] = widths[0].max(name.chars().count());
            for (width, cell) in widths[1..].iter_mut().zip(cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (name, cells, note) in lines {
            let mut line = format!("{name:0$}", widths[0]);
            match note {
                Some(note) => line.push_str(&format!("  {note}")),
                None => {
                    for (cell, width) in cells.iter().zip(&widths[1..]) {
                        line.push_str(&format!("  {cell:width$}"));
                    }
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(rows: u64, bytes: u64) -> Count {
        Count { rows, bytes }
    }

    #[test]
    fn figures_are_for_people_and_their_columns_stand_below_each_other() {
        let figures = Figures {
            gained: count(1204, 317_645),
            lost: count(1, 44),
            resent: count(0, 0),
        };
        let table = |table: &str, figures, note: Option<&str>| TableDiff {
            table: table.into(),
            figures,
            note: note.map(Into::into),
        };
        let diff = Diff {
            from: "5@0/10".into(),
            to: "5@0/20".into(),
            replicas: vec![
                ReplicaDiff {
                    replica: "a".into(),
                    refused: None,
                    tables: vec![
                        table("public.issues", Some(figures), None),
                        table("public.new", None, Some("it is copied")),
                    ],
                    total: figures,
                },
                ReplicaDiff {
                    replica: "b".into(),
                    refused: Some("the token has no claim `org`".into()),
                    tables: Vec::new(),
                    total: Figures::default(),
                },
                ReplicaDiff {
                    replica: "c".into(),
                    refused: None,
                    tables: Vec::new(),
                    total: Figures::default(),
                },
            ],
            total: figures,
        };
        assert!(diff.refuses());
        let expected = "\
as of 5@0/10 to 5@0/20
3 connected replicas, of which 1 would not notice anything
                 gains                 loses        is sent again
replica a
  public.issues  1204 rows, 310.2 KiB  1 row, 44 B  -
  public.new     it is copied
replica b
                 would be refused: the token has no claim `org`
all of them      1204 rows, 310.2 KiB  1 row, 44 B  -
";
        assert_eq!(diff.to_string(), expected);
    }
}
