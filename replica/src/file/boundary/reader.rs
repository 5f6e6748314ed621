//! What is known of the file at one moment: through SQLite, and from the `-wal` itself.

use std::{
    fs, io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::{
    super::{
        Error, Following,
        error::{Doing, is_full},
        transaction::{self, LOCK_WAIT_MAX},
    },
    page,
    wal::{HEADER_BYTES, Header, NotNext, Resume, Scan},
};

/// Memory for frames on their way through the checksum; one frame may take 64 KiB.
const CHUNK_BYTES: usize = 1 << 20;

/// How often the length of the WAL is asked for: a writer may be just about to write it down, or start the WAL over. Both
/// take no time, unless that process is held up just then; so after some tries each one comes a millisecond later.
const TRIES_MAX: usize = 1_000;

/// Tries without a pause.
const TRIES_AT_ONCE: usize = 10;

/// Page cache of each of our connections: they read three pages.
const CACHE_KIB: i64 = 64;

/// A connection that only reads.
pub(super) fn connect(path: &Path) -> Result<Connection, Error> {
    const OPENING: &str = "open the file for reading";
    // Not SQLITE_OPEN_READ_ONLY: such a connection can't ask for the length of the WAL.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).doing(OPENING)?;
    transaction::wait_for_locks(&mut connection, LOCK_WAIT_MAX, &Following::default())?;
    let configure = || -> rusqlite::Result<()> {
        connection.pragma_update(None, "trusted_schema", false)?;
        // Of checkpoints: they sync with NORMAL as well, but that is not to depend on how SQLite was built.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "query_only", true)?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)
    };
    configure().doing(OPENING)?;
    Ok(connection)
}

/// What a read transaction sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// `PRAGMA schema_version`.
    pub cookie: u32,
    /// The only page of the head table; `None`: there is no such table.
    pub root: Option<u32>,
    /// Id of the newest entry; 0: none.
    pub last: i64,
}

/// Begins a read transaction, which stays open.
pub(super) fn begin(connection: &Connection) -> Result<Snapshot, Error> {
    end(connection)?;
    let read = || -> rusqlite::Result<Snapshot> {
        connection.prepare_cached("BEGIN")?.execute([])?;
        let cookie = connection
            .prepare_cached("PRAGMA schema_version")?
            .query_row([], |row| row.get::<_, i64>(0))?;
        let root: Option<u32> = connection
            .prepare_cached(
                "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name = '_anabranch_head'",
            )?
            .query_row([], |row| row.get(0))
            .optional()?;
        let last = match root {
            None => None,
            Some(_) => connection
                .prepare_cached("SELECT last FROM _anabranch_head WHERE id = 1")?
                .query_row([], |row| row.get(0))
                .optional()?,
        };
        Ok(Snapshot {
            // A number of 32 bits that SQLite shows with a sign.
            cookie: cookie as u32,
            root,
            last: last.unwrap_or(0),
        })
    };
    read().doing("begin to read")
}

/// Ends its read transaction, if there is one.
pub(super) fn end(connection: &Connection) -> Result<(), Error> {
    if connection.is_autocommit() {
        return Ok(());
    }
    connection
        .prepare_cached("ROLLBACK")
        .and_then(|mut rollback| rollback.execute([]))
        .map(drop)
        .doing("end reading")
}

/// Writes the WAL back as far as readers allow, without waiting for them. False: somebody else does just that.
pub(super) fn write_back(connection: &Connection) -> Result<bool, Error> {
    connection
        .prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")
        .and_then(|mut checkpoint| checkpoint.query_row([], |row| row.get(0)))
        .map(|is_busy: bool| !is_busy)
        .doing("write the WAL back")
}

/// What SQLite has told everybody of the WAL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Published {
    /// What the file begins with; `None`: with nothing, or nothing valid.
    pub header: Option<Header>,
    /// Frames that are committed. There may be more in the file: of a transaction that is not committed yet, that was
    /// rolled back, or whose writer was killed just before it would have been committed.
    pub frames: u32,
    /// Of these, those that are in the database file as well.
    pub written_back: u32,
}

/// The groups that say something, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// `PRAGMA schema_version` as of this group, if it has the first page.
    pub cookie: Option<u32>,
    /// For each page that may be that of the head table, if the group has it: the id of the newest entry, if the page
    /// is one of a head table.
    pub heads: [Option<Option<i64>>; 2],
}

/// How a scan ended.
pub(super) enum Scanned {
    /// Where it was to. `broken`: from this frame on, the file would not be read after a power cut.
    Whole {
        end: Resume,
        told: Vec<Told>,
        broken: Option<u32>,
    },
    /// It did not get there: the bytes are not the frames that SQLite told of.
    Broken,
}

/// The `-wal`, by a descriptor of our own. SQLite holds no lock on this file, so closing it takes none away.
pub(super) struct Wal {
    path: PathBuf,
    file: fs::File,
    file_is: (u64, u64),
    buffer: Vec<u8>,
}

impl Wal {
    /// A connection must have read before: SQLite makes the file with the first read.
    pub(super) fn open(database: &Path) -> Result<Wal, Error> {
        let mut path = database.as_os_str().to_owned();
        path.push("-wal");
        let path = PathBuf::from(path);
        let open = || -> io::Result<_> {
            let file = fs::File::open(&path)?;
            // SQLite syncs the directory only if who made the file writes its header too. Without its name, a file is lost.
            let directory = path.parent().filter(|parent| *parent != Path::new(""));
            fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
            let metadata = file.metadata()?;
            Ok((file, (metadata.dev(), metadata.ino())))
        };
        let (file, file_is) = open().map_err(|error| io_error("open", &path, &error))?;
        Ok(Wal {
            path,
            file,
            file_is,
            buffer: Vec::new(),
        })
    }

    /// Checks that programs that open the database now find the same file.
    pub(super) fn still_there(&self) -> Result<(), Error> {
        match fs::metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == self.file_is => Ok(()),
            _ => Err(Error::Definite(format!(
                "{} was deleted, moved or replaced while the replica had it open: put it back, or restart the replica to start a new file",
                self.path.display()
            ))),
        }
    }

    /// Waits until what is in the file would survive a power cut.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file
            .sync_data()
            .map_err(|error| io_error("sync", &self.path, &error))
    }

    /// What is committed by now.
    ///
    /// Header and length are told by different places. A writer that starts the WAL over first publishes a length of 0,
    /// then writes the header, and publishes a new length after that; so a length that is read between two equal headers
    /// is of the file that begins with that header, or 0.
    pub(super) fn published(&self, connection: &Connection) -> Result<Published, Error> {
        let mut header = self.header()?;
        for tried in 0..TRIES_MAX {
            if tried >= TRIES_AT_ONCE {
                thread::park_timeout(Duration::from_millis(1));
            }
            let (frames, written_back): (i64, i64) = connection
                .prepare_cached("PRAGMA wal_checkpoint(NOOP)")
                .and_then(|mut ask| ask.query_row([], |row| Ok((row.get(1)?, row.get(2)?))))
                .doing("ask for the length of the WAL")?;
            let header_before = std::mem::replace(&mut header, self.header()?);
            let (Ok(frames), Ok(written_back)) = (frames.try_into(), written_back.try_into())
            else {
                // -1: busy.
                continue;
            };
            if header == header_before {
                return Ok(Published {
                    header,
                    frames,
                    written_back,
                });
            }
        }
        Err(Error::Transient(
            "ask for the length of the WAL: another program holds it up".into(),
        ))
    }

    /// What the file begins with now.
    pub(super) fn header(&self) -> Result<Option<Header>, Error> {
        let mut bytes = [0; HEADER_BYTES];
        match self.file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Header::parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(io_error("read", &self.path, &error)),
        }
    }

    /// Goes through the groups from a place up to the frame with a number. `heads`: pages that may be that of the head
    /// table.
    pub(super) fn scan(
        &mut self,
        header: Header,
        from: Resume,
        to: u32,
        heads: [Option<u32>; 2],
    ) -> Result<Scanned, Error> {
        let wanted = [Some(1), heads[0], heads[1]].into_iter().flatten();
        let mut scan = Scan::new(header, from, wanted.collect());
        let (mut end, mut told) = (from, Vec::new());
        let frame_bytes = header.frame_bytes();
        while scan.frame() < to {
            let frames = (CHUNK_BYTES / frame_bytes).min((to - scan.frame()) as usize);
            self.buffer.resize(frames * frame_bytes, 0);
            let offset = header.frame_offset(scan.frame() + 1);
            match self.file.read_exact_at(&mut self.buffer, offset) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(Scanned::Broken);
                }
                Err(error) => return Err(io_error("read", &self.path, &error)),
            }
            for frame in self.buffer.chunks_exact(frame_bytes) {
                let group = match scan.next_published(frame) {
                    Ok(Some(group)) => group,
                    Ok(None) => continue,
                    Err(NotNext) => return Ok(Scanned::Broken),
                };
                end = group.end;
                let one = Told {
                    cookie: group.page(1).and_then(page::cookie),
                    heads: heads.map(|root| Some(page::head(group.page(root?)?))),
                };
                if one != Told::default() {
                    told.push(one);
                }
            }
        }
        if end.frame == to {
            Ok(Scanned::Whole {
                end,
                told,
                broken: scan.broken(),
            })
        } else {
            Ok(Scanned::Broken)
        }
    }
}

fn io_error(doing: &str, path: &Path, error: &io::Error) -> Error {
    let text = format!("{doing} {}: {error}", path.display());
    if is_full(error) {
        Error::Full(text)
    } else {
        Error::Definite(text)
    }
}
