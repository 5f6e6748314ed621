//! Epochs, holes and facts.

use anabranch_proto::{Epoch, Lsn, Position};
use rusqlite::OptionalExtension;

use super::{Error, Mirror, schema};

impl Mirror {
    /// A small durable fact, by name.
    pub fn fact(&self, name: &str) -> Result<Option<String>, Error> {
        Ok(self
            .sqlite
            .prepare_cached("SELECT value FROM fact WHERE name = ?1")?
            .query_row([name], |row| row.get(0))
            .optional()?)
    }

    /// Sets facts (`None` removes), durable when it returns. An open group is committed before.
    pub fn set_facts(&mut self, facts: &[(&str, Option<&str>)]) -> Result<(), Error> {
        self.alone(|mirror| {
            for (name, value) in facts {
                match value {
                    Some(value) => mirror.sqlite.execute(
                        "INSERT INTO fact(name, value) VALUES(?1, ?2)
                         ON CONFLICT(name) DO UPDATE SET value = excluded.value",
                        (name, value),
                    )?,
                    None => (mirror.sqlite).execute("DELETE FROM fact WHERE name = ?1", [name])?,
                };
            }
            Ok(())
        })
    }

    /// Forgets everything: tables, index, facts, position. Durable when it returns.
    pub fn clear(&mut self) -> Result<(), Error> {
        self.alone(|mirror| {
            schema::clear(&mirror.sqlite)?;
            mirror.load()
        })
    }

    /// Starts a history at a position (after the initial copy): durable when it returns.
    ///
    /// `parent` is where it left an earlier one. The present epoch again, at a later LSN, leaves a hole in the change
    /// index between the two: a replica inside it is out of reach.
    pub fn begin_epoch(
        &mut self,
        epoch: Epoch,
        parent: Option<Position>,
        at: Lsn,
    ) -> Result<(), Error> {
        if epoch == self.position.epoch && at < self.position.lsn {
            return Err(Error::Misused(
                "the present epoch begins below its position",
            ));
        }
        self.alone(|mirror| {
            let sqlite = &mirror.sqlite;
            // What was copied late belongs to the first history: catch-ups that began before it go on in it.
            let first = match mirror.has_begun() {
                true => mirror.index.next(),
                false => mirror.index.first(),
            };
            let known: Option<i64> = sqlite
                .query_row(
                    "SELECT id FROM epoch WHERE id = ?1",
                    [epoch.0 as i64],
                    |row| row.get(0),
                )
                .optional()?;
            if known.is_some() && epoch == mirror.position.epoch {
                sqlite.execute(
                    "INSERT INTO hole(epoch, after, upto) VALUES(?1, ?2, ?3)",
                    (epoch.0 as i64, mirror.position.lsn.0 as i64, at.0 as i64),
                )?;
            } else {
                sqlite.execute(
                    "INSERT OR REPLACE INTO epoch(id, began, first, parent, parent_left)
                     VALUES(?1, ?2, ?3, ?4, ?5)",
                    (
                        epoch.0 as i64,
                        at.0 as i64,
                        first,
                        parent.map(|parent| parent.epoch.0 as i64),
                        parent.map(|parent| parent.lsn.0 as i64),
                    ),
                )?;
                // Of what was before, no entry reaches into this epoch.
                mirror.index.floor = at;
                sqlite.execute("UPDATE state SET index_floor = ?1", [at.0 as i64])?;
            }
            sqlite.execute(
                "UPDATE state SET epoch = ?1, histories = histories + 1",
                [epoch.0 as i64],
            )?;
            mirror.position = Position { epoch, lsn: at };
            Ok(())
        })
    }
}
