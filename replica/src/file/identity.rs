//! The identity of a file: what is done where it is a copy, or was restored from a backup.
//!
//! A file sends under its replica's id, and what it sends is chained by hashes. A copy goes on from where the file was, so sooner or
//! later Postgres has something under that id that one of the two does not know. That one *forks*: it asks which of its
//! pending entries were answered, whichever copy sent them ([`judge`]), and takes a new id.
//!
//! ```text
//! answered │ answered elsewhere │ nobody can tell │ free
//!          └ rows behind the chain: they have     └ numbered anew, chained anew, sent under the new id
//!            answers when the position reaches
//!            what the judgement says
//! ```
//!
//! Numbers go on, so `_anabranch_local` stays one table: `chain_seq` says behind which number the chain of today's id begins.
//! What was answered elsewhere stays pending until its effects are here: the restored file may be far behind, and own
//! values would flicker back. All is one durable SQLite transaction, so a kill leaves either the fork to be noticed again or the new
//! id. If another copy is faster meanwhile, its claim is in the way (`anabranch.claims`), and the file forks again.

mod judge;

use anabranch_proto::{JUDGED_MAX, Nonce, Position};
use rusqlite::{Connection, params};

pub use self::judge::{Claim, Judged, Judgement};
use super::{
    Error, File, Outgoing,
    error::Doing,
    layout, leases,
    names::quote,
    outbox::{NO_HASH, nonce, number},
    receipts,
    state::State,
    transaction::Write,
};

/// What is said of an entry of which nobody can tell whether it was made.
pub(super) const UNKNOWN: &str = "unknown";

/// A new identity was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// The id before.
    pub former: String,
    /// Local transactions that are sent under the new id.
    pub free: u64,
    /// Entries that were answered elsewhere.
    pub elsewhere: u64,
    /// Entries of which nobody can tell.
    pub unknown: u64,
}

/// Where a run of entries ends that become one row of `_anabranch_local`.
#[derive(Debug)]
struct Run {
    last: i64,
    /// Why its entries are to be listed as rejected.
    outcome: Option<(String, Option<String>)>,
}

impl File {
    /// Where sending goes on after the local transaction that Postgres has as the last of this id (0: none). `None`: it is one
    /// that this file did not send, or what comes behind it is forgotten here: it is to be judged.
    pub fn go_on(&mut self, seq: u64, hash: &[u8]) -> Result<Option<Outgoing>, Error> {
        if self.state.settles_elsewhere() {
            return Ok(None);
        }
        let chain_seq = self.state.chain_seq;
        let look = || -> rusqlite::Result<_> {
            if seq > 0 {
                let is_known = receipts::is_known(&self.connection, chain_seq, seq as i64, hash)?;
                return Ok(is_known.then(|| Outgoing::after(seq)));
            }
            let is_whole = receipts::forgotten(&self.connection)? <= chain_seq;
            Ok(is_whole.then(|| Outgoing::after(chain_seq as u64)))
        };
        let on = look().doing("look where local writes stand")?;
        let answered = self.answered()?.0;
        let forgotten = receipts::forgotten(&self.connection).doing("look")?;
        if on.is_none() && seq < forgotten as u64 && chain_seq <= forgotten {
            tracing::error!(
                from = seq + 1,
                upto = answered,
                "Postgres has lost local transactions that it had answered, and the file has forgotten them: was the database put \
                 back to before them? What they wrote is gone"
            );
        }
        Ok(on)
    }

    /// The pending entries after this one, some of them, in their order.
    pub fn pending(&self, after: i64) -> Result<Vec<(i64, Nonce)>, Error> {
        pending(&self.connection, after).doing("read pending entries")
    }

    /// Takes a new id, if anything is as `judgement` says; without one only if nothing is pending that was never answered, else
    /// it says `None`.
    /// The stream is over: it was this replica's under the former id.
    pub fn adopt(&mut self, judgement: Option<&Judgement>) -> Result<Option<Adopted>, Error> {
        self.guard.still_there()?;
        let adopted = self.with_sync(|file| file.take_new_id(judgement));
        self.make_room_if_full(adopted)
    }

    fn take_new_id(&mut self, judgement: Option<&Judgement>) -> Result<Option<Adopted>, Error> {
        let connection = &self.connection;
        let write = Write::begin(connection)?;
        if !self.state.is_in_file(connection)? {
            drop(write);
            return Err(self.start_over());
        }
        let boundary = receipts::boundary(connection).doing("look where local writes stand")?;
        let once = receipts::last_of(connection, self.state.answered_once).doing("look")?;
        if judgement.is_none() && !pending(connection, once).doing("look")?.is_empty() {
            return Ok(None);
        }
        // Their effects were here, and what was rejected of them is listed.
        let answered_once = Judgement {
            upto: once,
            ..Judgement::default()
        };
        if judgement.is_some() {
            // It is listed by what is said of it now.
            receipts::listed_anew(connection, (boundary, i64::MAX), || Ok(()))
                .doing("look what was rejected")?;
        }
        let judgement = judgement.unwrap_or(&answered_once);
        let renumber = || renumber(connection, boundary, judgement);
        let (chain_seq, adopted) = renumber().doing("number local writes anew")?;
        let mut state = self.state.clone();
        let former = std::mem::replace(&mut state.replica_id, uuid::Uuid::new_v4().to_string());
        // An older token that was not used yet is of an older id.
        state.token_id.get_or_insert_with(|| former.clone());
        state.chain_seq = chain_seq;
        state.answered_once = 0;
        state.settle = (adopted.elsewhere + adopted.unknown > 0).then(|| Position {
            lsn: judgement.lsn,
            ..self.state.position.unwrap_or_default()
        });
        on_new_identity(connection, &state).doing("take a new id")?;
        write.commit()?;
        tracing::warn!(
            former,
            replica = state.replica_id,
            free = adopted.free,
            answered_elsewhere = adopted.elsewhere,
            unknown = adopted.unknown,
            "the file was restored from a backup, or copied: it has a new id"
        );
        self.state = state;
        self.stream.noted = None;
        self.stream.is_broken = true;
        Ok(Some(Adopted { former, ..adopted }))
    }
}

/// What belongs to an id ends with it. Within the write transaction that brings the new one.
fn on_new_identity(connection: &Connection, state: &State) -> rusqlite::Result<()> {
    // The other copy uses them too.
    leases::drop_all(connection)?;
    state.store(connection)
}

fn pending(connection: &Connection, after: i64) -> rusqlite::Result<Vec<(i64, Nonce)>> {
    let after = after.max(receipts::boundary(connection)?);
    let mut entries = Vec::new();
    for source in layout::having(connection, after, i64::MAX)? {
        let mut some = connection.prepare_cached(&format!(
            "SELECT id, captured_time, nonce FROM {} WHERE id > ?1 ORDER BY id LIMIT {JUDGED_MAX}",
            quote(&source.entries)
        ))?;
        let mut rows = some.query([after])?;
        while let Some(row) = rows.next()? {
            let captured_time: String = row.get(1)?;
            entries.push((row.get(0)?, nonce(&captured_time, row.get(2)?)));
        }
    }
    entries.sort_unstable_by_key(|(id, _)| *id);
    entries.truncate(JUDGED_MAX);
    Ok(entries)
}

/// Replaces the local transactions that are not answered. Where the new chain begins, and what became of entries.
fn renumber(
    connection: &Connection,
    boundary: i64,
    judgement: &Judgement,
) -> rusqlite::Result<(i64, Adopted)> {
    let answered = receipts::answered(connection)?.map_or(0, |(seq, _)| seq);
    let ends: Vec<(i64, bool)> = connection
        .prepare("SELECT last, merged FROM _anabranch_local WHERE seq > ?1 ORDER BY seq")?
        .query_map([answered], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let greatest: i64 = connection.query_row(
        "SELECT coalesce(max(seq), 0) FROM _anabranch_local",
        [],
        |row| row.get(0),
    )?;
    connection.execute("DELETE FROM _anabranch_judged", [])?;
    connection.execute("DELETE FROM _anabranch_local WHERE seq > ?1", [answered])?;
    let is_empty = !connection
        .prepare("SELECT 1 FROM _anabranch_local")?
        .exists([])?;
    let insert = "INSERT INTO _anabranch_local VALUES(?1, ?2, ?3, 1, '', ?4)";
    if is_empty {
        // The first row is the last of what was forgotten.
        connection.execute(insert, params![0, 0, NO_HASH, "0/0"])?;
    }
    let upto = judgement.upto.max(boundary);
    let unknown = judgement.unknown_upto(upto, &ends);
    let mut chain_seq = greatest;
    for run in runs(boundary, upto, unknown, judgement) {
        chain_seq += 1;
        connection.execute(insert, params![chain_seq, run.last, NO_HASH, None::<&str>])?;
        if let Some((outcome, sqlstate)) = run.outcome {
            connection.execute(
                "INSERT INTO _anabranch_judged VALUES(?1, ?2, ?3)",
                params![chain_seq, outcome, sqlstate],
            )?;
        }
    }
    let free: Vec<(i64, bool)> = ends
        .into_iter()
        .filter(|(last, _)| *last > unknown)
        .collect();
    number(connection, chain_seq, free.iter().copied())?;
    let adopted = Adopted {
        former: String::new(),
        free: free.len() as u64,
        elsewhere: (upto - boundary) as u64,
        unknown: (unknown - upto) as u64,
    };
    Ok((chain_seq, adopted))
}

/// What is not sent: runs of entries that took effect elsewhere, those that were rejected there, and those of which nobody knows.
fn runs(boundary: i64, upto: i64, unknown: i64, judgement: &Judgement) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut at = boundary;
    let mut until = |last: i64, outcome| {
        if last > at {
            runs.push(Run { last, outcome });
            at = last;
        }
    };
    for rejected in &judgement.rejected {
        until(rejected.after, None);
        let outcome = (rejected.outcome.clone(), rejected.sqlstate.clone());
        until(rejected.last, Some(outcome));
    }
    until(upto, None);
    until(unknown, Some((UNKNOWN.to_owned(), None)));
    runs
}
