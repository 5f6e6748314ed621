//! What a replica was shown of one table, as text that can be kept and read again.
//!
//! It is the SELECTs with their parameters filled in: the SQL of shapes, so whoever can read a config can read them. Read again, they
//! mean the same only against the same tables, which are named with the versions of their schemas. Where a table is
//! another one now, or the text can't be read by this version, there is no way back, and the replica is sent the table in full.
//!
//! The text holds values of claims: it is kept beside the rows themselves, in the mirror, and never shown or logged.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    catchup::{View, inner_indexes},
    engine::{Input, Inputs},
    lookup::Index,
    mirror::Kept,
    session::{self, TableView},
    shape::{self, Bound, Source},
    table::{Oid, Table},
};

/// How often a session says that its definitions are still used.
const USED_EVERY: Duration = Duration::from_secs(6 * 3600);

/// What a replica was shown of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The table, and its subqueries' ones, with the versions of their schemas.
    tables: Vec<(Oid, u32)>,
    /// A row was shown if any of these has it.
    selects: Vec<String>,
}

impl Definition {
    /// Of these bound SELECTs, which are all over one table.
    pub fn of(bounds: &[Bound]) -> Definition {
        let mut tables = Vec::new();
        for bound in bounds {
            let inner = bound.select.subqueries().iter();
            let inner = inner.map(|step| &step.subquery.table);
            for table in std::iter::once(&bound.select.table).chain(inner) {
                if !tables.contains(&(table.oid, table.version)) {
                    tables.push((table.oid, table.version));
                }
            }
        }
        Definition {
            tables,
            selects: bounds.iter().map(Bound::sql).collect(),
        }
    }

    /// The table whose rows were shown.
    pub fn table(&self) -> Option<Oid> {
        self.tables.first().map(|(table, _)| *table)
    }

    /// The SELECTs, if the tables are still what they were. They look for rows by `indexes` where those will do.
    pub fn bounds(&self, tables: &[Arc<Table>], indexes: &[Index]) -> Option<Vec<Bound>> {
        let is_there = |(oid, version): &(Oid, u32)| {
            let mut same = tables.iter();
            same.any(|table| table.oid == *oid && table.version == *version)
        };
        if !self.tables.iter().all(is_there) {
            return None;
        }
        let mut bounds = Vec::with_capacity(self.selects.len());
        for sql in &self.selects {
            let source = Source {
                tables: vec![sql.clone()],
                ..Source::default()
            };
            let shapes = shape::compile_with(&[source], tables, indexes).ok()?;
            let bound = shapes.first()?.bind(&Default::default(), &HashMap::new());
            bounds.extend(bound.ok()?);
        }
        // By name: a table may have been renamed, and another may have its name.
        let own = self.table()?;
        (bounds.iter())
            .all(|bound| bound.select.table.oid == own)
            .then_some(bounds)
    }
}

/// Has definitions kept in the mirror: those of many sessions at once, as many join at once.
pub struct Keeper {
    inputs: Inputs,
    waiting: Arc<Mutex<Vec<Kept>>>,
}

/// The definitions of one session. They are written down when they are said to be used: there may be thousands of sessions.
pub struct Used {
    keeper: Arc<Keeper>,
    views: Vec<Arc<TableView>>,
    said: Mutex<Option<Instant>>,
}

impl Keeper {
    /// Has them kept by this engine.
    pub fn new(inputs: Inputs) -> Arc<Keeper> {
        Arc::new(Keeper {
            inputs,
            waiting: Arc::default(),
        })
    }

    /// For a session that shows these.
    pub fn used(self: &Arc<Self>, views: Vec<Arc<TableView>>) -> Used {
        Used {
            keeper: self.clone(),
            views,
            said: Mutex::default(),
        }
    }

    fn keep(&self, kept: Vec<Kept>) {
        if kept.is_empty() {
            return;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let is_asked = !waiting.is_empty();
        waiting.extend(kept);
        drop(waiting);
        if is_asked {
            return;
        }
        let waiting = self.waiting.clone();
        let work = Input::Mirror(Box::new(move |mirror| {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = std::mem::take(&mut *waiting);
            drop(waiting);
            mirror.keep_definitions(&kept, now())
        }));
        session::send(&self.inputs, work);
    }
}

impl Used {
    /// They are used now. Costs nothing mostly: to be said with each token that names them.
    pub fn now(&self) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_some_and(|said| said.elapsed() < USED_EVERY) {
            return;
        }
        *said = Some(Instant::now());
        drop(said);
        self.keeper
            .keep(self.views.iter().filter_map(|view| kept(view)).collect());
    }
}

/// The definition of a view, with the fingerprint that tokens name it by.
fn kept(view: &TableView) -> Option<Kept> {
    let bounds = view.bounds();
    Some(Kept {
        fingerprint: view.fingerprint(),
        text: serde_json::to_string(&Definition::of(bounds)).ok()?,
        indexes: inner_indexes(&[bounds]),
    })
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() as i64)
}
