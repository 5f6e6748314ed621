//! Which captured entries were one local transaction of a program, and whether they would survive a power cut.
//!
//! The capture triggers change the one row of `_anabranch_head`, whose `last` is the id of the newest entry, in each
//! transaction that captures anything. SQLite writes a transaction to the `-wal` as one *commit group*: the pages that it
//! changed, the last of them with a mark. So the groups that hold the head table's page, with their values of `last`, are
//! the local transactions, exactly. Nothing is asked of programs, and nothing is told by us to them.
//!
//! - `wal`, `page`: the bytes of a `-wal` and of its pages. No I/O.
//! - `reader`: snapshots, what SQLite tells of the WAL, and the file itself by a descriptor of our own.
//! - `notify`: when to look. `following`: also while their thread waits for a lock.
//!
//! It does not assign numbers to local transactions, and does not read entries.
//!
//! # One group is one transaction
//!
//! A WAL has one writer, who holds WAL_WRITE_LOCK from its first page to its commit, so frames of two transactions never
//! mix. `walFrames` marks the last frame of a commit, and only that one. Two exceptions are harmless: where a
//! device can't overwrite safely (`psow=0`) the last frame is written again, with its mark, up to the end of a sector: groups that
//! change nothing. And frames of a transaction that spilled its cache, or rolled back, have no mark; they are overwritten by
//! the next one. `BEGIN CONCURRENT` and WAL2 are not in stock SQLite, and such a WAL would not be opened by ours. A
//! transaction over several attached databases is a group in the WAL of each. A `SAVEPOINT` without `BEGIN` is a transaction as
//! any other. A group of ours never has entries of a program: our writing connection captures nothing.
//!
//! # No group is missed
//!
//! A group is *published* when its number of frames (`mxFrame`) is written to the `-shm`. Until then it is not committed, even
//! if all of it is in the file: its writer may be killed in between, and the next one then overwrites it. So frames are
//! read up to `mxFrame` and no further; a checkpoint that does nothing (`NOOP`) tells it without a lock.
//! Published frames are not changed as long as the WAL is not started over. That takes (`walRestartLog`,
//! `walCheckpoint`; all in SQLite's `wal.c`):
//!
//! 1. all frames written back to the database: `nBackfill == mxFrame`;
//! 2. no reader on the marks 1 to 4: these locks are taken exclusively.
//!
//! A read transaction that begins when all is written back takes mark 0, otherwise one of 1 to 4. To write anything
//! back a checkpoint needs mark 0 exclusively. We always keep a read transaction open, the *holder*; it began when the WAL
//! had M frames, and we have read at least those. So:
//!
//! - holder on marks 1 to 4: the WAL is not started over, by (2).
//! - holder on mark 0: then `nBackfill` was M, and stays M as long as we hold it. By (1) the WAL can be started over
//!   only while it has M frames, all of which we have read. Afterwards `nBackfill` is 0 and stays 0, so it can't be
//!   started over again as soon as there is one frame in it.
//!
//! At the next look a second connection begins a read transaction, then frames are read up to `mxFrame`, which is at
//! least what the new transaction sees, and only then the old one ends: now the new one is the holder, and the same is
//! true of it. In any case the frames that we have not read are either behind our place in the same file, or are all
//! frames of a file with other salts. Recovery after a kill lowers `nBackfill`, and does not change the file. The
//! last connection to close removes the WAL, but ours are open; nobody can leave WAL mode meanwhile, which takes an exclusive lock.
//!
//! What was read is compared with what the snapshot says, and checksums are followed from frame to frame. If anything
//! is not as it should be the newest value still is right, and [`Look::proved`] says that there may have been more before it.
//!
//! # The WAL does not grow for ever
//!
//! A holder on marks 1 to 4 does no harm until everything is written back; then it is what keeps the WAL from being
//! started over. So a look that finds everything written back lets the holder begin again, which gets it to mark 0. Where a
//! program writes all the time there may be no such moment: [`Following::make_way`] makes one.
//!
//! # Pages move
//!
//! `VACUUM` and `auto_vacuum` give the head table another root page. Both change the schema's cookie on page 1, which is
//! then in the group. So the root as of the snapshot is good from the last change of the cookie on, and the root that
//! we knew before the first.
//!
//! # Durable
//!
//! With `synchronous=NORMAL` SQLite does not sync a commit, with `FULL` it does, before it publishes. Either way
//! [`Boundaries::make_durable`] syncs the `-wal` itself: what was read from it before is durable then, or
//! was written back and overwritten since. For that, a checkpoint syncs the WAL before it writes to the database, and the
//! database before it says that all is written back, with NORMAL and FULL alike. A program with `synchronous=OFF` that
//! checkpoints does neither, and nobody can see its setting: if it also starts the WAL over, then a power cut before
//! the next sync of the database can take what was sent, and harm the file as a whole. What the file lost then shows
//! when its entries come again under the same numbers with another hash.
//!
//! Older SQLites (3.40 for one; *ran*) leave frames without checksum where a transaction spilled its cache and rolled back a savepoint.
//! Such a WAL ends there when it is read after a power cut, so what comes after is durable only in the database:
//! then `make_durable` has it written back. A sync that failed is never taken back: the kernel may
//! have dropped what it could not write, and would report success the next time.

mod following;
mod notify;
mod page;
mod reader;
#[cfg(test)]
mod tests;
mod timer;
mod wal;

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rusqlite::Connection;

pub use following::Following;
pub use notify::Watch;
use reader::{Published, Scanned, Snapshot, Told, Wal};
use wal::Resume;

use super::{Error, transaction::Write};

/// How often a look begins anew when the schema changed, or the WAL was started over, while it was on its way.
const TRIES_MAX: usize = 16;

/// How long somebody else's checkpoint is waited for while no program can write. It was begun before that, and writes back as
/// much as ours would.
const CHECKPOINT_WAIT_MAX: Duration = Duration::from_secs(1);

/// What a look has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// The id of the newest entry after each local transaction since the last look, ascending.
    pub ends: Vec<i64>,
    /// False: the entries up to the first of `ends` may be of more than one local transaction. The others are exact.
    pub proved: bool,
    /// Pages in the WAL.
    pub wal_pages: u32,
    /// We may be what keeps the WAL from being started over, as long as nobody looks again.
    pub is_pinned: bool,
}

/// Follows the `-wal` of a file.
pub struct Boundaries {
    /// Has a read transaction open, from before the last frames were read.
    holder: Connection,
    /// Takes over from it at the next look.
    relief: Connection,
    /// Asks for the length of the WAL; never in a transaction.
    asking: Connection,
    wal: Wal,
    place: Place,
    /// What SQLite told at the last look.
    published: Published,
    /// Looks since the holder is on mark 0; see [`Boundaries::is_pinned`].
    aside: u8,
    /// What was published when we last made way, and nobody was kept from writing.
    way: Option<Published>,
    /// Found, and not told yet.
    found: Chain,
    /// A sync failed: nothing is durable any more.
    sync_failed: bool,
}

/// A holder that began while the last page was being written back may have missed mark 0; the second never does.
const ASIDE_SURE: u8 = 2;

/// Up to where the WAL was read.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The end of the last group that was read; `None`: there was none.
    end: Option<Resume>,
    /// Nothing was missed before.
    is_continuous: bool,
    /// The schema there, and the newest id.
    snapshot: Snapshot,
    /// After the group of this newest id, the checksums in this file don't follow from each other.
    sound: Option<i64>,
}

impl Boundaries {
    /// Opens a file that is in WAL mode. `known`: the id of the newest entry whose local transaction is known, 0 without
    /// any; what the WAL still tells of those after it comes with the first look.
    pub fn open(path: &Path, known: i64) -> Result<Boundaries, Error> {
        let holder = reader::connect(path)?;
        let relief = reader::connect(path)?;
        let asking = reader::connect(path)?;
        reader::begin(&relief)?;
        reader::end(&relief)?;
        let wal = Wal::open(path)?;
        Ok(Boundaries {
            holder,
            relief,
            asking,
            wal,
            place: Place {
                end: None,
                is_continuous: false,
                snapshot: Snapshot {
                    last: known,
                    ..Snapshot::default()
                },
                sound: None,
            },
            published: Published::default(),
            aside: 0,
            way: None,
            found: Chain::default(),
            sync_failed: false,
        })
    }

    /// Local transactions since the last look. Costs some microseconds if nothing happened. After an error nothing is lost: what was
    /// not told comes with the next look.
    pub fn look(&mut self) -> Result<Look, Error> {
        self.go_on()?;
        let found = std::mem::take(&mut self.found);
        Ok(Look {
            ends: found.ends,
            proved: !found.is_doubtful,
            wal_pages: self.published.frames,
            is_pinned: self.is_pinned(),
        })
    }

    /// Reads on, so that the holder is in nobody's way; what is found is told by the next look.
    fn go_on(&mut self) -> Result<(), Error> {
        self.wal.still_there()?;
        if !self.is_idle()? {
            self.follow()?;
        }
        Ok(())
    }

    /// Waits until all that was told by now would survive a power cut; returns the newest id of which that is so. It is lower than
    /// what was told only while a program keeps a WAL from being written back that could not be read after a power cut.
    pub fn make_durable(&mut self) -> Result<i64, Error> {
        let Place {
            snapshot, sound, ..
        } = self.place;
        Ok(match (self.make_all_durable()?, sound) {
            (false, Some(sound)) => sound.min(snapshot.last),
            _ => snapshot.last,
        })
    }

    /// The same for all that is committed by now, entries or not. False: a program keeps the WAL from being written back.
    pub fn make_all_durable(&mut self) -> Result<bool, Error> {
        self.wal.still_there()?;
        if self.sync_failed {
            return Err(Error::Definite(
                "sync the WAL: it failed before, so nobody can tell what of it is on the disk; restart the replica when the disk is well"
                    .into(),
            ));
        }
        self.wal.sync().inspect_err(|_| self.sync_failed = true)?;
        if self.place.sound.is_none() {
            return Ok(true);
        }
        // Only the database file is read for certain after a power cut. A checkpoint of everything syncs it.
        self.step_aside(Duration::ZERO)?;
        Ok(self.published.written_back == self.published.frames)
    }

    /// The first part of [`Following::make_way`]: most of the work, without a lock. True: that will do. It does unless it did
    /// not the last time: a program that had begun to write before goes on in the same file.
    fn make_way_beside_writers(&mut self) -> Result<bool, Error> {
        self.wal.still_there()?;
        let was = self.way.take();
        if !self.step_aside(Duration::ZERO)? {
            return Ok(false);
        }
        let is_useless = was.is_some_and(|was| {
            was.header == self.published.header && was.frames < self.published.frames
        });
        if !is_useless {
            self.way = Some(self.published);
        }
        Ok(!is_useless)
    }

    /// The second part, while nobody can write.
    fn make_way_without_writers(&mut self, _write: &Write<'_>) -> Result<bool, Error> {
        self.step_aside(CHECKPOINT_WAIT_MAX)
    }

    /// Writes back what there is now, and begins to read after that. A checkpoint of somebody else is waited for.
    fn step_aside(&mut self, patience: Duration) -> Result<bool, Error> {
        // A holder on mark 0 would be in the way, and so would an old one.
        self.follow()?;
        let began = Instant::now();
        while !reader::write_back(&self.relief)? && began.elapsed() < patience {
            // SQLite has no way to be woken when another process is done with it.
            thread::park_timeout(Duration::from_millis(1));
        }
        self.follow()?;
        if self.aside == 0 {
            return Ok(false);
        }
        self.follow()?;
        Ok(!self.is_pinned())
    }

    fn is_pinned(&self) -> bool {
        self.aside < ASIDE_SURE
    }

    /// Nothing was committed since the last look, and the holder is in nobody's way. Another one may be: it may have begun before
    /// the last of the frames that were read, or share the mark of an older reader, and then a checkpoint waits for it.
    fn is_idle(&self) -> Result<bool, Error> {
        if !self.place.is_continuous || self.is_pinned() {
            return Ok(false);
        }
        let now = self.wal.published(&self.asking)?;
        Ok(now.header == self.published.header && now.frames == self.published.frames)
    }

    /// Reads the frames up to now, under a new holder.
    fn follow(&mut self) -> Result<(), Error> {
        for _ in 0..TRIES_MAX {
            let before = self.wal.published(&self.asking)?;
            let snapshot = reader::begin(&self.relief)?;
            let published = self.wal.published(&self.asking)?;
            let Some((place, found)) = self.read(snapshot, published)? else {
                continue;
            };
            std::mem::swap(&mut self.holder, &mut self.relief);
            reader::end(&self.relief)?;
            let is_aside = before == published && published.written_back == published.frames;
            self.aside = match is_aside {
                true => ASIDE_SURE.min(self.aside + 1),
                false => 0,
            };
            self.place = place;
            self.published = published;
            self.found.append(found);
            return Ok(());
        }
        reader::end(&self.relief)?;
        Err(Error::Transient(
            "follow the WAL: the schema changes faster than it can be read".into(),
        ))
    }

    /// Reads what was published, and compares it with a snapshot from shortly before. `None`: they are of too different
    /// times to be compared.
    fn read(
        &mut self,
        snapshot: Snapshot,
        published: Published,
    ) -> Result<Option<(Place, Chain)>, Error> {
        let place = self.place;
        // Pages that may be the head's: before the schema changed, and after.
        let old = place.snapshot.root.filter(|_| place.is_continuous);
        let heads = [old, snapshot.root];
        let scanned = match published.header {
            _ if published.frames == 0 => Some((place.end, Vec::new(), None)),
            None => None,
            Some(header) => {
                let from = place.end.filter(|end| end.is_in(&header));
                let sound = place.sound.filter(|_| from.is_some());
                let from = from.unwrap_or(header.start());
                let scanned = self.wal.scan(header, from, published.frames, heads)?;
                if self.wal.header()? != published.header {
                    return Ok(None);
                }
                match scanned {
                    Scanned::Whole { end, told, broken } => {
                        // Of what this look found nothing counts: breaks are rare, and need no more.
                        let sound = sound.or(broken.map(|_| place.snapshot.last));
                        Some((Some(end), told, sound))
                    }
                    Scanned::Broken => None,
                }
            }
        };
        let Some((end, told, sound)) = scanned else {
            tracing::warn!(
                frames = published.frames,
                from = place.end.map(|end| end.frame),
                "the WAL can't be followed: local transactions may be sent as one"
            );
            return Ok(Some(lost(place, snapshot)));
        };
        let Some(mut chain) = follow(&place, &snapshot, &told) else {
            return Ok(None);
        };
        chain.compare(snapshot.last);
        let now = Place {
            end,
            is_continuous: true,
            snapshot: Snapshot {
                last: chain.last,
                ..snapshot
            },
            sound,
        };
        Ok(Some((now, chain)))
    }
}

/// Nothing is known of the WAL but what a snapshot says; the next look begins at its start.
fn lost(place: Place, snapshot: Snapshot) -> (Place, Chain) {
    let mut chain = Chain::from(place.snapshot.last, false);
    chain.compare(snapshot.last);
    let place = Place {
        end: None,
        is_continuous: false,
        snapshot,
        // The frames may be of another file than the one that they seem to be in.
        sound: Some(0),
    };
    (place, chain)
}

/// Makes a chain of what groups told. `None`: the schema changed after the snapshot.
fn follow(place: &Place, snapshot: &Snapshot, told: &[Told]) -> Option<Chain> {
    let mut chain = Chain::from(place.snapshot.last, place.is_continuous);
    let mut cookie = place.is_continuous.then_some(place.snapshot.cookie);
    let mut changes = Vec::new();
    for (index, group) in told.iter().enumerate() {
        if group.cookie.is_some() && group.cookie != cookie {
            changes.push(index);
            cookie = group.cookie;
        }
    }
    if cookie.is_some_and(|cookie| cookie != snapshot.cookie) {
        return None;
    }
    let old_root = place.snapshot.root.filter(|_| place.is_continuous);
    let (known_to, known_from) = match (changes.first(), changes.last()) {
        // The root stayed.
        _ if old_root == snapshot.root => (0, 0),
        (Some(&first), Some(&last)) if place.is_continuous => (first, last),
        (_, Some(&last)) => (0, last),
        // Only the first look gets here: the schema did not change for as long as the WAL tells.
        _ => (0, 0),
    };
    for group in &told[..known_to] {
        chain.tell(group.heads[0]);
    }
    if known_to < known_from {
        chain.lose();
    }
    for group in &told[known_from..] {
        chain.tell(group.heads[1]);
    }
    Some(chain)
}

/// Ids of newest entries, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Chain {
    /// The newest of all.
    last: i64,
    /// The one of the group before, if that is known.
    before: Option<i64>,
    ends: Vec<i64>,
    /// There may be others before the first of `ends`.
    is_doubtful: bool,
    /// All ids that a snapshot from meanwhile may have seen.
    seen: Vec<i64>,
}

impl Chain {
    /// `is_continuous`: the first id to come is the next one after `last`.
    fn from(last: i64, is_continuous: bool) -> Chain {
        Chain {
            last,
            before: is_continuous.then_some(last),
            ends: Vec::new(),
            is_doubtful: false,
            seen: vec![last],
        }
    }

    /// Takes what the next group says.
    fn tell(&mut self, head: Option<Option<i64>>) {
        let id = match head {
            None => return,
            // No head table's page, though it should be: somebody changed the table.
            Some(None) => return self.lose(),
            Some(Some(id)) => id,
        };
        if id > self.last {
            // One entry is of one transaction, whatever came before.
            if self.before != Some(self.last) && id > self.last + 1 {
                self.doubt();
            }
            self.ends.push(id);
            self.last = id;
        } else if self.before.is_some_and(|before| id < before) {
            self.go_back(id);
        }
        self.seen.push(id);
        self.before = Some(id);
    }

    /// What comes may not be the next one.
    fn lose(&mut self) {
        self.before = None;
    }

    fn doubt(&mut self) {
        self.ends.clear();
        self.is_doubtful = true;
    }

    /// Ids only go down if the file's content was replaced.
    fn go_back(&mut self, id: i64) {
        self.doubt();
        self.ends.push(id);
        self.last = id;
    }

    /// Compares with the newest id in a snapshot: it may be older than the last group, not newer.
    fn compare(&mut self, id: i64) {
        if id > self.last {
            self.lose();
            self.tell(Some(Some(id)));
        } else if id < self.last {
            let is_earlier = self.before == Some(self.last) && self.seen.contains(&id);
            if !is_earlier {
                self.go_back(id);
            }
        }
    }

    fn append(&mut self, later: Chain) {
        if later.is_doubtful {
            self.doubt();
        }
        self.ends.extend(later.ends);
    }
}
