//! How much the engine does for one transaction before it leaves it to catch-ups, which others do.
//!
//! All is counted and nothing is timed, so that the same transactions give the same deliveries.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use foldhash::fast::RandomState;

use crate::{
    lookup::{ANSWERS_BYTES_MAX, Reads},
    shape::Select,
};

/// Rows that are looked at for one transaction beside those that it changed, at most: what is beyond would keep the engine
/// for more than about a second, and is as well told by a catch-up.
pub const STEPS_MAX: usize = 100_000;

/// Rows that conditions read for one transaction, at most about: half a second's work.
pub const READS_MAX: usize = 200_000;

/// Times that the bound SELECTs of one SELECT are asked one after the other in one transaction, as nothing leads from its rows to
/// them, at most: as much.
pub const SCANS_MAX: usize = 1_000_000;

/// Ops of one transaction for all sessions, at most: about 24 MB beside the rows, which they share. All queues together hold hardly
/// more.
pub const OPS_MAX: usize = 500_000;

/// Bytes of the rows that are looked at beside those that changed, which are held meanwhile, at most.
pub(super) const WALK_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How much is done for one transaction.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// [`STEPS_MAX`]
    pub steps_max: usize,
    /// [`READS_MAX`]
    pub reads_max: usize,
    /// [`SCANS_MAX`]
    pub scans_max: usize,
    /// [`OPS_MAX`]
    pub ops_max: usize,
    /// [`ANSWERS_BYTES_MAX`]
    pub answers_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            steps_max: STEPS_MAX,
            reads_max: READS_MAX,
            scans_max: SCANS_MAX,
            ops_max: OPS_MAX,
            answers_bytes_max: ANSWERS_BYTES_MAX,
        }
    }
}

/// What may be read for one transaction, in equal parts for the SELECTs that it concerns.
pub(super) struct Shares {
    share: usize,
    /// What the present one has left.
    reads: Reads,
    present: Cell<Option<u32>>,
    /// What the others have.
    left: RefCell<HashMap<u32, usize, RandomState>>,
    /// How often more each may be asked one after the other.
    scans: RefCell<HashMap<u32, usize, RandomState>>,
    scans_max: usize,
}

impl Shares {
    /// For so many SELECTs that read.
    pub fn new(limits: &Limits, selects: usize) -> Shares {
        Shares {
            share: limits.reads_max / selects.max(1),
            reads: Reads::new(0),
            present: Cell::new(None),
            left: RefCell::default(),
            scans: RefCell::default(),
            scans_max: limits.scans_max,
        }
    }

    /// The reads of the present one.
    pub fn reads(&self) -> &Reads {
        &self.reads
    }

    /// From here on, what is read is read for this one.
    pub fn begin(&self, select: &Select) {
        if self.present.get() == Some(select.id) || select.subqueries().is_empty() {
            return;
        }
        let mut left = self.left.borrow_mut();
        if let Some(before) = self.present.replace(Some(select.id)) {
            left.insert(before, self.reads.left());
        }
        let of_it = left.get(&select.id).copied();
        self.reads.set(of_it.unwrap_or(self.share));
    }

    /// Whether so many bound SELECTs of this one may be asked, one after the other.
    pub fn scan(&self, select: &Select, count: usize) -> bool {
        let mut scans = self.scans.borrow_mut();
        let left = scans.entry(select.id).or_insert(self.scans_max);
        let rest = left.checked_sub(count);
        *left = rest.unwrap_or(0);
        rest.is_some()
    }
}
