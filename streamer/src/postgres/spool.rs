//! Changes of transactions that are still in progress, until they commit or are rolled back.
//!
//! Postgres streams large transactions before they commit, several at a time in turns. Their messages are kept as
//! they came, in order, one run for each top-level transaction: in memory while all together fit into
//! `memory_bytes_max`, then in a file that has no name, so that nothing is left behind whatever kills us. At the
//! commit they are read once, in order, leaving out those of subtransactions that were rolled back; a rollback of
//! the top-level transaction drops all. Nothing here survives its connection: Postgres streams what was in progress
//! again, from the start, on the next one.
//!
//! An entry is: id of the (sub)transaction, length, message; numbers big-endian. The highest bit of the length marks
//! an entry of which only the beginning was kept, since it was too large (see `assemble`). Entries of a
//! subtransaction that was rolled back stay in the file until the whole transaction ends, and are skipped then.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// How much of the file is read at once.
const READ_BYTES: usize = 256 * 1024;

/// The least by which a transaction's memory grows.
const GROWTH_BYTES_MIN: usize = 8 * 1024;

/// Length of what precedes a message.
const HEADER_BYTES: usize = 8;

/// Marks an entry that is only the beginning of a message.
const CUT: u32 = 1 << 31;

/// All streamed transactions of one connection.
pub struct Spool {
    directory: PathBuf,
    memory_bytes_max: usize,
    /// Capacity of all buffers.
    memory_bytes: usize,
    transactions: HashMap<u32, Streamed>,
}

/// One of them.
#[derive(Default)]
struct Streamed {
    /// Older entries.
    file: Option<File>,
    /// Newer entries.
    memory: Vec<u8>,
    aborted: HashSet<u32>,
}

/// A message of a streamed transaction.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// Whole.
    Message(&'a [u8]),
    /// Only its beginning: it was too large.
    Cut(&'a [u8]),
}

impl Spool {
    /// Files are made in `directory`. Beyond memory, `memory_bytes_max` is what the buffers of all transactions may
    /// hold together.
    pub fn new(directory: &Path, memory_bytes_max: usize) -> Self {
        Spool {
            directory: directory.to_owned(),
            memory_bytes_max,
            memory_bytes: 0,
            transactions: HashMap::new(),
        }
    }

    /// Begins a transaction. `false`: it is there already.
    #[must_use]
    pub fn begin(&mut self, xid: u32) -> bool {
        if self.transactions.contains_key(&xid) {
            return false;
        }
        self.transactions.insert(xid, Streamed::default());
        true
    }

    /// Whether this transaction was begun.
    pub fn contains(&self, xid: u32) -> bool {
        self.transactions.contains_key(&xid)
    }

    /// Keeps a message of transaction `xid`, made by its subtransaction `subxid` or, if equal, by itself.
    pub fn push(&mut self, xid: u32, subxid: u32, entry: &Entry<'_>) -> io::Result<()> {
        let (message, mark) = match *entry {
            Entry::Message(message) => (message, 0),
            Entry::Cut(message) => (message, CUT),
        };
        let length = u32::try_from(message.len())
            .ok()
            .filter(|length| length & CUT == 0)
            .ok_or_else(|| io::Error::other("a message of 2 GiB"))?;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&subxid.to_be_bytes());
        header[4..].copy_from_slice(&(length | mark).to_be_bytes());

        let needed = HEADER_BYTES + message.len();
        if self.make_room(xid, needed)? {
            let streamed = self.of(xid)?;
            streamed.memory.extend_from_slice(&header);
            streamed.memory.extend_from_slice(message);
        } else {
            // Larger than all memory that we may use: what is in memory was written by `make_room`.
            let directory = self.directory.clone();
            let file = self.of(xid)?.file(&directory)?;
            file.write_all(&header)?;
            file.write_all(message)?;
        }
        Ok(())
    }

    /// Forgets what a subtransaction did, or, if `subxid` is `xid`, the whole transaction.
    pub fn abort(&mut self, xid: u32, subxid: u32) {
        if xid == subxid {
            drop(self.take(xid));
        } else if let Some(streamed) = self.transactions.get_mut(&xid) {
            streamed.aborted.insert(subxid);
        }
    }

    /// Takes a transaction out, to read it. `None`: it was not begun.
    pub fn take(&mut self, xid: u32) -> Option<Replay> {
        let streamed = self.transactions.remove(&xid)?;
        self.memory_bytes -= streamed.memory.capacity();
        Some(Replay {
            file: streamed.file.map(|file| (file, None)),
            memory: streamed.memory,
            read: 0,
            aborted: streamed.aborted,
            message: Vec::new(),
        })
    }

    fn of(&mut self, xid: u32) -> io::Result<&mut Streamed> {
        self.transactions
            .get_mut(&xid)
            .ok_or_else(|| io::Error::other("a transaction that was not begun"))
    }

    /// Lets the transaction's buffer grow by `needed`, writing the largest buffers to their files until that fits.
    /// `false`: it can never fit, and its own buffer is empty now.
    fn make_room(&mut self, xid: u32, needed: usize) -> io::Result<bool> {
        loop {
            let memory = &self.of(xid)?.memory;
            let spare = memory.capacity() - memory.len();
            if needed <= spare {
                return Ok(true);
            }
            let growth = (needed - spare)
                .max(memory.capacity())
                .max(GROWTH_BYTES_MIN);
            for growth in [growth, needed - spare] {
                if self.memory_bytes + growth <= self.memory_bytes_max {
                    let memory = &mut self.of(xid)?.memory;
                    let before = memory.capacity();
                    memory.reserve_exact(spare + growth);
                    let grown = memory.capacity() - before;
                    self.memory_bytes += grown;
                    return Ok(true);
                }
            }
            let capacity = |(_, s): &(&u32, &mut Streamed)| s.memory.capacity();
            let Some((_, largest)) = self.transactions.iter_mut().max_by_key(capacity) else {
                return Ok(false);
            };
            if largest.memory.capacity() == 0 {
                return Ok(false);
            }
            let memory = std::mem::take(&mut largest.memory);
            self.memory_bytes -= memory.capacity();
            largest.file(&self.directory)?.write_all(&memory)?;
        }
    }
}

impl Streamed {
    /// Its file, at its end.
    fn file(&mut self, directory: &Path) -> io::Result<&mut File> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => Ok(none.insert(nameless(directory)?)),
        }
    }
}

/// Makes a file that nobody else can open, and that is gone with its descriptor.
fn nameless(directory: &Path) -> io::Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("spool-{}-{count}", std::process::id()));
    // One with this name is left by a process with our id that died in the moment before it removed the name.
    let _ = std::fs::remove_file(&path);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// The messages of a committed transaction, in order.
pub struct Replay {
    /// Read first; not yet opened for reading at first.
    file: Option<(File, Option<BufReader<File>>)>,
    memory: Vec<u8>,
    read: usize,
    aborted: HashSet<u32>,
    message: Vec<u8>,
}

impl Replay {
    /// The next message.
    pub fn entry(&mut self) -> io::Result<Option<Entry<'_>>> {
        loop {
            let Some((subxid, length, cut)) = self.header()? else {
                return Ok(None);
            };
            if self.aborted.contains(&subxid) {
                self.skip(length)?;
                continue;
            }
            let message = match &mut self.file {
                Some((_, Some(reader))) => {
                    self.message.resize(length, 0);
                    reader.read_exact(&mut self.message)?;
                    &self.message[..]
                }
                _ => {
                    let start = self.read;
                    self.read = end_of(start, length, self.memory.len())?;
                    &self.memory[start..self.read]
                }
            };
            return Ok(Some(if cut {
                Entry::Cut(message)
            } else {
                Entry::Message(message)
            }));
        }
    }

    /// Reads the next header: subtransaction, length, whether cut. Goes from file to memory.
    fn header(&mut self) -> io::Result<Option<(u32, usize, bool)>> {
        let mut header = [0; HEADER_BYTES];
        if let Some((file, reader)) = &mut self.file {
            let reader = match reader {
                Some(reader) => reader,
                none => {
                    file.seek(SeekFrom::Start(0))?;
                    none.insert(BufReader::with_capacity(READ_BYTES, file.try_clone()?))
                }
            };
            // The end of the file must be the end of an entry.
            match reader.read(&mut header[..1])? {
                0 => self.file = None,
                _ => reader.read_exact(&mut header[1..])?,
            }
        }
        if self.file.is_none() {
            if self.read == self.memory.len() {
                return Ok(None);
            }
            let end = end_of(self.read, HEADER_BYTES, self.memory.len())?;
            header.copy_from_slice(&self.memory[self.read..end]);
            self.read = end;
        }
        let number = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let length = number(4);
        Ok(Some((
            number(0),
            (length & !CUT) as usize,
            length & CUT != 0,
        )))
    }

    fn skip(&mut self, length: usize) -> io::Result<()> {
        match &mut self.file {
            Some((_, Some(reader))) => reader.seek_relative(length as i64),
            _ => {
                self.read = end_of(self.read, length, self.memory.len())?;
                Ok(())
            }
        }
    }
}

fn end_of(start: usize, length: usize, available: usize) -> io::Result<usize> {
    start
        .checked_add(length)
        .filter(|end| *end <= available)
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;
    use crate::postgres::seed::seeded;

    fn read_all(mut replay: Replay) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while let Some(entry) = replay.entry().unwrap() {
            messages.push(match entry {
                Entry::Message(message) => message.to_vec(),
                Entry::Cut(message) => [b"cut:", message].concat(),
            });
        }
        messages
    }

    #[test]
    fn a_rollback_drops_exactly_its_own_changes_in_memory_and_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        for memory_bytes_max in [0, 50, 20_000, 10_000_000] {
            let mut spool = Spool::new(directory.path(), memory_bytes_max);
            for xid in [1, 2] {
                assert!(spool.begin(xid));
                assert!(!spool.begin(xid));
            }
            let mut kept = Vec::new();
            for round in 0..500u32 {
                let subxid = if round % 3 == 0 { 1 } else { 100 + round / 10 };
                let message = vec![round as u8; round as usize % 97];
                spool.push(1, subxid, &Entry::Message(&message)).unwrap();
                spool.push(2, 2, &Entry::Message(b"other")).unwrap();
                if (subxid / 2) % 2 == 0 || subxid == 1 {
                    kept.push(message);
                }
                assert!(spool.memory_bytes <= memory_bytes_max);
            }
            for subxid in (100..150).filter(|subxid| (subxid / 2) % 2 == 1) {
                spool.abort(1, subxid);
            }
            spool.push(1, 1, &Entry::Cut(b"beginning")).unwrap();
            kept.push(b"cut:beginning".into());
            assert_eq!(read_all(spool.take(1).unwrap()), kept);
            assert!(spool.take(1).is_none());
            spool.abort(2, 2);
            assert!(spool.take(2).is_none());
            assert_eq!(spool.memory_bytes, 0);
            assert_eq!(directory.path().read_dir().unwrap().count(), 0);
        }
    }

    #[test]
    fn many_transactions_share_one_bound() {
        let mut random = seeded();
        let directory = tempfile::tempdir().unwrap();
        let bound = 100_000;
        let mut spool = Spool::new(directory.path(), bound);
        let mut expected: HashMap<u32, Vec<Vec<u8>>> = HashMap::new();
        for _ in 0..3_000 {
            let xid = random.random_range(1..20);
            match random.random_range(0..40) {
                0 => {
                    spool.abort(xid, xid);
                    expected.remove(&xid);
                }
                1 => match (spool.take(xid), expected.remove(&xid)) {
                    (Some(replay), Some(messages)) => assert_eq!(read_all(replay), messages),
                    (None, None) => {}
                    _ => panic!("kept and not kept"),
                },
                _ => {
                    assert_eq!(spool.begin(xid), !expected.contains_key(&xid));
                    let length = random.random_range(0..3_000);
                    // Now and then one that is larger than all memory.
                    let length = if length < 3 { 150_000 } else { length };
                    let message: Vec<u8> = vec![random.random(); length];
                    spool.push(xid, xid, &Entry::Message(&message)).unwrap();
                    expected.entry(xid).or_default().push(message);
                }
            }
            assert!(spool.memory_bytes <= bound);
            let held = spool.transactions.values().map(|s| s.memory.capacity());
            assert_eq!(spool.memory_bytes, held.sum::<usize>());
        }
    }

    #[test]
    fn a_full_or_missing_disk_is_an_error() {
        let mut spool = Spool::new(Path::new("/nonexistent/anabranch"), 0);
        assert!(spool.begin(1));
        spool.push(1, 1, &Entry::Message(b"x")).unwrap_err();
        spool.push(2, 2, &Entry::Message(b"x")).unwrap_err();
    }
}
