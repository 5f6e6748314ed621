//! When to look at the WAL.
//!
//! Writes to the `-wal` are told by inotify. That comes too early rather than too late: a commit is published only after
//! its last frame was written, with `synchronous=FULL` after a sync of the disk. So the first look may find nothing, and is
//! repeated, at first after a quarter of a millisecond and then less and less often. The slow pace at which that ends is also the
//! safety net for what inotify did not tell, and what lets our reader go to mark 0 after somebody's checkpoint.
//!
//! Writes to the database file are told as well: they are of checkpoints, and one that is to start the WAL over waits, with the write
//! lock, until our reader has gone to mark 0. That is possible as soon as all is written back, shortly after the last write.
//!
//! Our own commits can't be told from others'. They are many where the replica has a backlog, so one wake stands for
//! all writes of [`PACE`]. After one that found nothing it is [`IDLE_PACE`]: a program that writes next must not wait because
//! of our own commits.

use std::{
    ffi::OsString,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{super::Error, timer::Timer};

/// Two wakes are at least this far apart.
pub const PACE: Duration = Duration::from_millis(5);

/// The same after a wake that found nothing, which costs less.
pub const IDLE_PACE: Duration = Duration::from_micros(500);

/// The pause after a wake; it doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_micros(250);

/// Room for some dozens of events, each with a name of the longest kind there is.
const EVENTS_BYTES: usize = 16 * 1_024;

/// Wakes its thread when something may have been committed.
pub struct Watch {
    events: AsyncFd<OwnedFd>,
    /// What inotify calls the database. It is there for as long as we run: a file that is replaced is an error elsewhere.
    database_watch: i32,
    wal: PathBuf,
    wal_name: OsString,
    /// What inotify calls the file, while it is there.
    wal_watch: Option<i32>,
    /// The pause ends when it has reached this.
    pause_max: Duration,
    pause: Duration,
    due: Instant,
    /// Set by whoever waits.
    timer: Timer,
    heard: bool,
    woke: Instant,
    /// As long at least until the next wake.
    pace: Duration,
}

impl Watch {
    /// Watches the WAL of a database, whether it is there already or not; wakes at least every `pause_max`. Needs a tokio runtime
    /// with I/O enabled.
    pub fn new(database: &Path, pause_max: Duration) -> Result<Watch, Error> {
        let mut wal = database.as_os_str().to_owned();
        wal.push("-wal");
        let wal = PathBuf::from(wal);
        let failed = |error: &dyn std::fmt::Display| {
            Error::Transient(format!("watch {}: {error}", wal.display()))
        };
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .map_err(|error| failed(&error))?;
        let directory = wal.parent().filter(|parent| *parent != Path::new(""));
        let made = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        inotify::add_watch(&events, directory.unwrap_or(Path::new(".")), made)
            .map_err(|error| failed(&error))?;
        let database_watch = inotify::add_watch(&events, database, WatchFlags::MODIFY)
            .map_err(|error| failed(&error))?;
        let wal_name = wal
            .file_name()
            .ok_or_else(|| failed(&"it is no name of a file"))?
            .to_owned();
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for descriptors that do not own themselves; an OwnedFd does"
        )]
        let events =
            AsyncFd::with_interest(events, Interest::READABLE).map_err(|error| failed(&error))?;
        let now = Instant::now();
        let mut watch = Watch {
            events,
            database_watch,
            wal,
            wal_name,
            wal_watch: None,
            pause_max,
            pause: FIRST_PAUSE,
            due: now,
            timer: Timer::new()?,
            heard: false,
            woke: now - PACE,
            pace: PACE,
        };
        watch.watch_wal();
        Ok(watch)
    }

    /// Returns when it is time to look: at once after a write or checkpoint, again shortly after that, and now and then. Dropping it
    /// loses nothing.
    pub async fn changed(&mut self) -> Result<(), Error> {
        self.set(self.due)?;
        while !self.heard {
            tokio::select! {
                biased;
                rung = self.timer.rings() => {
                    rung?;
                    self.pause = (self.pause * 2).min(self.pause_max);
                    if self.wal_watch.is_none() {
                        self.watch_wal();
                    }
                    self.wake();
                    return Ok(());
                }
                ready = self.events.readable() => match ready {
                    Ok(mut ready) => {
                        ready.clear_ready();
                        self.hear();
                    }
                    // The runtime ends.
                    Err(error) => return Err(Error::Transient(format!("inotify: {error}"))),
                },
            }
        }
        let next = self.woke + self.pace;
        if next > Instant::now() {
            self.set(next)?;
            self.timer.rings().await?;
        }
        // What came meanwhile is looked at now.
        self.hear();
        self.heard = false;
        self.pause = FIRST_PAUSE;
        self.wake();
        Ok(())
    }

    fn set(&self, at: Instant) -> Result<(), Error> {
        self.timer.set(at.saturating_duration_since(Instant::now()))
    }

    /// The wake that was last found nothing.
    pub fn found_nothing(&mut self) {
        self.pace = IDLE_PACE;
    }

    /// Who wrote what was found waits for longer anyway: the next wake is that much later.
    pub fn found_crowd(&mut self, pace: Duration) {
        self.pace = pace;
        self.due = self.due.max(self.woke + pace);
    }

    fn wake(&mut self) {
        self.woke = Instant::now();
        self.pace = PACE;
        self.due = self.woke + self.pause;
    }

    /// Reads all events there are.
    fn hear(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
        let (mut is_gone, mut is_new, mut is_written) = (false, false, false);
        loop {
            match reader.next() {
                Ok(event) => {
                    let what = event.events();
                    if event.wd() == self.database_watch {
                        is_written |= what.contains(ReadFlags::MODIFY);
                    } else if Some(event.wd()) == self.wal_watch {
                        is_written |= what.contains(ReadFlags::MODIFY);
                        is_gone |= what.intersects(ReadFlags::MOVE_SELF | ReadFlags::IGNORED);
                    }
                    is_new |= event
                        .file_name()
                        .is_some_and(|name| name.to_bytes() == self.wal_name.as_bytes());
                    // Events were dropped, perhaps those of a new file.
                    is_new |= what.contains(ReadFlags::QUEUE_OVERFLOW);
                }
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if is_gone {
            self.wal_watch = None;
        }
        if is_new {
            self.watch_wal();
        }
        self.heard |= is_gone || is_new || is_written;
    }

    /// Watches the file that has the name now. The one before, if it is another one, has no name any more.
    fn watch_wal(&mut self) {
        let flags = WatchFlags::MODIFY | WatchFlags::MOVE_SELF;
        // Not there yet: the directory tells when it is.
        self.wal_watch = inotify::add_watch(self.events.get_ref(), &self.wal, flags).ok();
    }
}
