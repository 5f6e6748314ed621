//! Elements that wait for their commit.
//!
//! They are held as they came, in memory, and applied under one short write transaction when their commit has come:
//! a program must not wait for the write lock while we wait for the network. Above `hold_bytes_max` they go to a
//! temporary file beside the database: same disk, and unlinked at once, so that no crash leaves it behind.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use anabranch_proto::v1;
use bytes::Bytes;
use prost::Message;

use super::{Error, error::is_full};

/// What an element costs in memory beside its bytes, about.
const ELEMENT_BYTES: usize = 160;

/// How much is encoded before it is written.
const WRITE_BYTES: usize = 1024 * 1024;

/// No element can be longer: it came in a message.
const ENCODED_BYTES_MAX: usize = 2 * anabranch_proto::MESSAGE_BYTES_MAX;

pub(super) struct Queue {
    held: Vec<v1::Element>,
    held_bytes: usize,
    hold_bytes_max: usize,
    spool_path: PathBuf,
    spool: Option<Spool>,
}

struct Spool {
    file: File,
    length: u64,
}

impl Queue {
    /// `spool_path` is used for a moment only; what a crash in that moment left is removed here.
    pub(super) fn new(hold_bytes_max: usize, spool_path: PathBuf) -> Queue {
        let _ = fs::remove_file(&spool_path);
        Queue {
            held: Vec::new(),
            held_bytes: 0,
            hold_bytes_max,
            spool_path,
            spool: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.spool.is_none()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
        self.spool = None;
    }

    /// Adds elements at the end: all of them, or none if it fails.
    pub(super) fn push(&mut self, elements: Vec<v1::Element>) -> Result<(), Error> {
        let bytes: usize = elements
            .iter()
            .map(|element| element.encoded_len() + ELEMENT_BYTES)
            .sum();
        if self.spool.is_none() && self.held_bytes + bytes > self.hold_bytes_max {
            self.spill().map_err(|error| self.failed(&error))?;
        }
        match &mut self.spool {
            Some(spool) => spool
                .append(&elements)
                .map_err(|error| self.failed(&error))?,
            None => {
                self.held.extend(elements);
                self.held_bytes += bytes;
            }
        }
        Ok(())
    }

    /// Shows all elements in order, as often as it is called.
    pub(super) fn visit<E: From<Error>>(
        &self,
        mut each: impl FnMut(&v1::Element) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(spool) = &self.spool {
            let mut reader = spool.read().map_err(|error| E::from(self.failed(&error)))?;
            while let Some(element) = reader
                .next()
                .map_err(|error| E::from(self.failed(&error)))?
            {
                each(&element)?;
            }
        }
        self.held.iter().try_for_each(each)
    }

    fn spill(&mut self) -> io::Result<()> {
        // The lock on the database is ours, so a file of this name is what is left of a crash.
        match fs::remove_file(&self.spool_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.spool_path)?;
        fs::remove_file(&self.spool_path)?;
        let mut spool = Spool { file, length: 0 };
        spool.append(&self.held)?;
        self.held = Vec::new();
        self.held_bytes = 0;
        self.spool = Some(spool);
        Ok(())
    }

    fn failed(&self, error: &io::Error) -> Error {
        let text = format!(
            "hold a large transaction in a temporary file beside {}: {error}",
            self.spool_path.display()
        );
        if is_full(error) {
            Error::Full(text)
        } else {
            Error::Transient(text)
        }
    }
}

impl Spool {
    fn append(&mut self, elements: &[v1::Element]) -> io::Result<()> {
        let end = self.write(elements);
        if end.is_err() {
            // What was written of it is written over next time.
            let _ = self.file.set_len(self.length);
        }
        self.length = end?;
        Ok(())
    }

    fn write(&self, elements: &[v1::Element]) -> io::Result<u64> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.length))?;
        let mut length = self.length;
        let mut buffer = Vec::new();
        for (i, element) in elements.iter().enumerate() {
            element
                .encode_length_delimited(&mut buffer)
                .map_err(io::Error::other)?;
            if buffer.len() >= WRITE_BYTES || i + 1 == elements.len() {
                file.write_all(&buffer)?;
                length += buffer.len() as u64;
                buffer.clear();
            }
        }
        Ok(length)
    }

    fn read(&self) -> io::Result<Reader<'_>> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))?;
        Ok(Reader {
            file: BufReader::with_capacity(WRITE_BYTES, file.take(self.length)),
        })
    }
}

struct Reader<'a> {
    file: BufReader<io::Take<&'a File>>,
}

impl Reader<'_> {
    fn next(&mut self) -> io::Result<Option<v1::Element>> {
        let mut length = 0usize;
        for i in 0.. {
            let mut byte = [0];
            if self.file.read(&mut byte)? == 0 {
                return match i {
                    0 => Ok(None),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
            length |= usize::from(byte[0] & 0x7F) << (7 * i);
            if byte[0] & 0x80 == 0 {
                break;
            }
            if i == 4 {
                return Err(io::Error::other("it was changed by somebody"));
            }
        }
        if length > ENCODED_BYTES_MAX {
            return Err(io::Error::other("it was changed by somebody"));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact(&mut bytes)?;
        v1::Element::decode(Bytes::from(bytes))
            .map(Some)
            .map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(table: u32, bytes: usize) -> v1::Element {
        v1::Element {
            kind: Some(v1::element::Kind::Rows(v1::Rows {
                table,
                ops: vec![table as u8; bytes].into(),
                continued: false,
            })),
        }
    }

    fn content(queue: &Queue) -> Vec<v1::Element> {
        let mut all = Vec::new();
        queue
            .visit::<Error>(|element| {
                all.push(element.clone());
                Ok(())
            })
            .unwrap();
        all
    }

    #[test]
    fn order_survives_the_move_to_disk_and_nothing_stays_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut queue = Queue::new(10_000, directory.path().join("spool"));
        let mut expected = Vec::new();
        for i in 0..200 {
            let elements = vec![rows(i, (i as usize * 37) % 3_000), rows(i, 0)];
            expected.extend(elements.clone());
            queue.push(elements).unwrap();
            assert!(queue.held_bytes <= 10_000);
        }
        assert!(queue.spool.is_some());
        assert_eq!(content(&queue), expected);
        assert_eq!(content(&queue), expected, "a second time");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        queue.clear();
        assert_eq!(content(&queue), []);
    }

    #[test]
    fn a_disk_that_refuses_loses_nothing_that_was_held() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("not-there-yet").join("spool");
        let mut queue = Queue::new(1_000, path.clone());
        queue.push(vec![rows(1, 500)]).unwrap();
        assert!(matches!(
            queue.push(vec![rows(2, 5_000)]),
            Err(Error::Transient(_))
        ));
        assert_eq!(content(&queue), [rows(1, 500)]);
        fs::create_dir(path.parent().unwrap()).unwrap();
        queue.push(vec![rows(2, 5_000)]).unwrap();
        assert_eq!(content(&queue), [rows(1, 500), rows(2, 5_000)]);
    }
}
