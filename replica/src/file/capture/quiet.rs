//! How our own connection is not captured.
//!
//! All triggers of ours begin with a condition on `total_changes()`: in any program it is what SQLite says, 0 or more; our
//! connection overrides it. So nothing is stored that could be left behind by a crash, and no program can be made quiet by
//! what the file says.
//!
//! | says | means | captured | guards |
//! |---|---|---|---|
//! | 0 or more | a program writes | yes | let it pass |
//! | −1 | we write a row | no | let it pass |
//! | −2 | a program's trigger writes, since we wrote a row | no | skip the row |
//!
//! Where programs have no triggers on synced tables, −1 is the only answer. In fact nothing asks: triggers are switched off
//! for our connection then (`SQLITE_DBCONFIG_ENABLE_TRIGGER`), so that they cost nothing.
//!
//! Where they do have some, each row of ours is written by a statement of its own, with [`Quiet::arm`] before it: the
//! first who asks hears −1, all others −2. The first is always the guard of that very row: a BEFORE trigger that is newer
//! than all others on its table, and the newest fires first. Two things follow for the statement. It must write one row.
//! And it must not be an upsert: that fires BEFORE INSERT, then BEFORE UPDATE for the same row, and the second guard
//! would skip it. So a row is looked for, then updated or inserted (see `write`).

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use rusqlite::{Connection, config::DbConfig, functions::FunctionFlags};

/// We write a row.
const DIRECT: i64 = -1;

/// A program's trigger writes, because we did.
pub(super) const NESTED: i64 = -2;

/// What `total_changes()` answers on our connection.
#[derive(Clone, Debug)]
pub(in super::super) struct Quiet(Arc<Answers>);

#[derive(Debug)]
struct Answers {
    /// To the next question.
    now: AtomicI64,
    /// To those after it.
    then: AtomicI64,
}

/// One statement of ours on one row; ends where it is dropped.
#[must_use]
pub(in super::super) struct Armed<'q>(&'q Quiet);

/// Overrides `total_changes()` on this connection.
pub(in super::super) fn install(connection: &Connection) -> rusqlite::Result<Quiet> {
    let quiet = Quiet(Arc::new(Answers {
        now: AtomicI64::new(DIRECT),
        then: AtomicI64::new(DIRECT),
    }));
    let answers = quiet.0.clone();
    // Innocuous: it is asked by triggers, and we don't trust the schema. Not deterministic: SQLite would ask once.
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_INNOCUOUS;
    connection.create_scalar_function("total_changes", 0, flags, move |_| {
        let then = answers.then.load(Ordering::Relaxed);
        Ok(answers.now.swap(then, Ordering::Relaxed))
    })?;
    Ok(quiet)
}

/// Whether any trigger is run for what our connection writes. SQLite prepares its statements anew where that changes.
pub(in super::super) fn run_triggers(connection: &Connection, run: bool) -> rusqlite::Result<()> {
    let setting = DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER;
    if connection.db_config(setting)? != run {
        connection.set_db_config(setting, run)?;
    }
    Ok(())
}

impl Quiet {
    /// Whatever is written is ours.
    pub(in super::super) fn open(&self) {
        self.0.now.store(DIRECT, Ordering::Relaxed);
        self.0.then.store(DIRECT, Ordering::Relaxed);
    }

    /// The next statement writes one row of ours; what else is written by it, programs' triggers write.
    pub(in super::super) fn arm(&self) -> Armed<'_> {
        self.0.now.store(DIRECT, Ordering::Relaxed);
        self.0.then.store(NESTED, Ordering::Relaxed);
        Armed(self)
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}
