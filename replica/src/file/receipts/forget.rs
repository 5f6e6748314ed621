//! Answered entries that nobody will ask for again are removed.

use anabranch_proto::Lsn;
use rusqlite::Connection;

use super::super::{
    Error, File, error::Doing, layout, names::quote, outbox, schema, state::replace_view,
    transaction::Write,
};

/// Entries that are removed in one write transaction.
const FORGET_ROWS: usize = 10_000;

impl File {
    /// Removes answered entries whose answers came up to `up_to`, in steps: they can't be lost any more, since that is on
    /// all standbys, or so long ago that nobody would fail over to before it. Those of rejected transactions stay until
    /// their rows in `_anabranch_rejected` are gone, to be tried again.
    pub fn forget_answered(&mut self, up_to: Lsn) -> Result<(), Error> {
        let connection = &self.connection;
        let (newest, last) = forgettable(connection, up_to).doing("look for answered entries")?;
        if newest == 0 {
            return Ok(());
        }
        // Transactions first: one that is not whole any more must not be sent again.
        let mut steps = vec![
            (
                format!(
                    "DELETE FROM _anabranch_local WHERE seq IN \
                     (SELECT seq FROM _anabranch_local WHERE seq < ?1 ORDER BY seq DESC LIMIT {FORGET_ROWS})"
                ),
                newest,
            ),
            // They can't be answered anew.
            (
                format!(
                    "DELETE FROM _anabranch_decided WHERE id IN \
                     (SELECT id FROM _anabranch_decided WHERE id <= ?1 LIMIT {FORGET_ROWS})"
                ),
                last,
            ),
        ];
        for source in layout::having(connection, 0, last).doing("look for answered entries")? {
            let entries = quote(&source.entries);
            let step = format!(
                "DELETE FROM {entries} WHERE id IN (SELECT id FROM {entries} WHERE id <= ?1 \
                 AND id NOT IN (SELECT id FROM _anabranch_rejected) LIMIT {FORGET_ROWS})"
            );
            steps.push((step, last));
        }
        for (step, up_to) in &steps {
            loop {
                let write = Write::begin(connection)?;
                let deleted = connection
                    .execute(step, [up_to])
                    .doing("forget answered entries")?;
                write.commit()?;
                if deleted < FORGET_ROWS {
                    break;
                }
            }
        }
        self.drop_empty_layouts()
    }

    fn drop_empty_layouts(&mut self) -> Result<(), Error> {
        let connection = &self.connection;
        let write = Write::begin(connection)?;
        self.version.look(connection)?;
        let drop_empty = || {
            if layout::drop_empty(connection)? {
                replace_view(connection, "_anabranch_outbox", &outbox::view(connection)?)?;
            }
            Ok(())
        };
        drop_empty().doing("drop entries tables that are not used any more")?;
        let moved = schema::read_version(connection)?;
        write.commit()?;
        self.version.moved(moved);
        Ok(())
    }
}

/// The newest local transaction that can be forgotten, and its last entry.
fn forgettable(connection: &Connection, up_to: Lsn) -> rusqlite::Result<(i64, i64)> {
    let mut answered = connection
        .prepare_cached("SELECT seq, last, answered_lsn FROM _anabranch_local ORDER BY seq")?;
    let mut rows = answered.query([])?;
    let mut newest = (0, 0);
    while let Some(row) = rows.next()? {
        let lsn: Option<String> = row.get(2)?;
        if lsn
            .and_then(|lsn| lsn.parse::<Lsn>().ok())
            .is_none_or(|lsn| lsn > up_to)
        {
            break;
        }
        newest = (row.get(0)?, row.get(1)?);
    }
    // The first would look as if nothing was forgotten.
    Ok(if newest.0 > 1 { newest } else { (0, 0) })
}
