//! What Postgres answers to statements, read from its bytes as they come.
//!
//! Rows, notices and reports of settings are skipped, whatever their size. Of an error the fields are kept that somebody
//! asks for, up to a limit each: Postgres quotes the whole of a value that it can't read.

use bytes::{Buf, BytesMut};

use crate::postgres::sql::Error;

/// As much of a field of an error is kept.
const FIELD_BYTES_MAX: usize = 4 * 1024;

/// The longest tag of a command that there is has 64.
const TAG_BYTES_MAX: usize = 256;

/// Tag and length.
const HEADER_BYTES: usize = 5;

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// A statement is prepared.
    Parsed,
    /// A statement has done what it should.
    Done {
        /// It ended its transaction by taking it back.
        rolled_back: bool,
    },
    /// A statement failed. What was sent behind it is skipped up to the next Sync.
    Failed(Box<Said>),
    /// All up to a Sync, or of a simple query, is answered.
    Ready {
        /// No transaction is open.
        idle: bool,
    },
}

/// An error of Postgres. What it said of values (DETAIL, HINT) is not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Never translated.
    pub severity: String,
    /// Five characters.
    pub sqlstate: String,
    /// The primary message, or the beginning of a long one: what it quotes ends there then.
    pub message: String,
    /// A column, or what a function says with `COLUMN`.
    pub column: Option<String>,
    /// A type, or what a function says with `DATATYPE`.
    pub datatype: Option<String>,
    /// The constraint that was violated.
    pub constraint: Option<String>,
    /// The function of the server that raised it.
    pub routine: Option<String>,
}

impl Said {
    /// For our own log.
    pub fn error(&self) -> Error {
        Error::of_postgres(&self.severity, &self.sqlstate, &self.message)
    }
}

/// It sent what the protocol does not allow.
#[derive(Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Reads answers.
#[derive(Default)]
pub struct Answers {
    /// Bytes that are skipped next.
    skip: usize,
    /// An error that has begun.
    error: Option<Reading>,
}

#[derive(Default)]
struct Reading {
    /// Bytes to come.
    left: usize,
    /// The field that has begun.
    field: Option<u8>,
    kept: Vec<u8>,
    cut: bool,
    said: Said,
}

impl Answers {
    /// Takes the next answer off `read`, if it is there.
    pub fn next(&mut self, read: &mut BytesMut) -> Result<Option<Answer>, Unexpected> {
        loop {
            let skipped = self.skip.min(read.len());
            read.advance(skipped);
            self.skip -= skipped;
            if self.skip > 0 {
                return Ok(None);
            }
            if let Some(error) = &mut self.error {
                if !error.take(read) {
                    return Ok(None);
                }
                let read = self.error.take().unwrap_or_default();
                return Ok(Some(Answer::Failed(Box::new(read.said))));
            }
            let Some(header) = read.first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            let [tag, length @ ..] = *header;
            let body = u32::from_be_bytes(length).checked_sub(4);
            let body = body.ok_or(Unexpected)? as usize;
            let answer = match tag {
                b'1' => Some(Answer::Parsed),
                b'I' => Some(Answer::Done { rolled_back: false }),
                b'Z' => match read.get(HEADER_BYTES) {
                    None => return Ok(None),
                    Some(status) => Some(Answer::Ready {
                        idle: *status == b'I',
                    }),
                },
                b'C' if body > TAG_BYTES_MAX => return Err(Unexpected),
                b'C' => match read.get(HEADER_BYTES..HEADER_BYTES + body) {
                    None => return Ok(None),
                    Some(tag) => Some(Answer::Done {
                        rolled_back: tag == b"ROLLBACK\0",
                    }),
                },
                b'E' => {
                    read.advance(HEADER_BYTES);
                    self.error = Some(Reading {
                        left: body,
                        ..Reading::default()
                    });
                    continue;
                }
                // Bound, closed, no data; rows and what they are; notices, settings, notifications.
                b'2' | b'3' | b'n' | b't' | b'T' | b'D' | b'N' | b'S' | b'A' => None,
                _ => return Err(Unexpected),
            };
            self.skip = HEADER_BYTES + body;
            if answer.is_some() {
                return Ok(answer);
            }
        }
    }
}

impl Reading {
    /// Takes what is there. True: that is all.
    fn take(&mut self, read: &mut BytesMut) -> bool {
        while self.left > 0 && !read.is_empty() {
            let Some(field) = self.field else {
                let field = read.get_u8();
                self.left -= 1;
                // A zero ends them.
                self.field = (field != 0).then_some(field);
                continue;
            };
            let here = &read[..read.len().min(self.left)];
            let end = here.iter().position(|byte| *byte == 0);
            let value = &here[..end.unwrap_or(here.len())];
            let room = FIELD_BYTES_MAX - self.kept.len();
            self.cut |= value.len() > room;
            self.kept.extend_from_slice(&value[..value.len().min(room)]);
            let taken = value.len() + usize::from(end.is_some());
            read.advance(taken);
            self.left -= taken;
            if end.is_some() {
                self.ended(field);
            }
        }
        self.left == 0
    }

    fn ended(&mut self, field: u8) {
        let mut value = String::from_utf8_lossy(&self.kept).into_owned();
        if self.cut {
            // So that whoever leaves out what a message quotes leaves out the rest of it.
            value.push_str("…\"");
        }
        let said = &mut self.said;
        match field {
            b'V' => said.severity = value,
            b'S' if said.severity.is_empty() => said.severity = value,
            b'C' => said.sqlstate = value,
            b'M' => said.message = value,
            b'c' => said.column = Some(value),
            b'd' => said.datatype = Some(value),
            b'n' => said.constraint = Some(value),
            b'R' => said.routine = Some(value),
            _ => {}
        }
        self.kept.clear();
        (self.field, self.cut) = (None, false);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn error(message_of: &str) -> Vec<u8> {
        let fields = format!(
            "SFEHLER\0VERROR\0C22P02\0M{message_of}\0DCANARY\0cone\0dtwo\0nthree\0Rpg_strtoint32\0\0"
        );
        message(b'E', fields.as_bytes())
    }

    /// All answers, of bytes that come in pieces.
    fn answers(bytes: &[u8], piece: usize) -> Result<Vec<Answer>, Unexpected> {
        let (mut answers, mut read) = (Answers::default(), BytesMut::new());
        let mut all = Vec::new();
        for piece in bytes.chunks(piece) {
            read.extend_from_slice(piece);
            while let Some(answer) = answers.next(&mut read)? {
                all.push(answer);
            }
            assert!(read.len() < HEADER_BYTES + TAG_BYTES_MAX, "{}", read.len());
        }
        Ok(all)
    }

    #[test]
    fn answers_are_read_in_pieces_of_any_size_and_large_ones_are_not_kept() {
        let mut bytes = Vec::new();
        bytes.extend(message(b'1', b""));
        bytes.extend(message(b'2', b""));
        bytes.extend(message(b'N', &[b'x'; 100_000]));
        bytes.extend(message(b'D', &[b'x'; 70_000]));
        bytes.extend(message(b'C', b"SELECT 1\0"));
        bytes.extend(message(b'C', b"ROLLBACK\0"));
        bytes.extend(error("no"));
        bytes.extend(message(b'S', b"a\0b\0"));
        bytes.extend(message(b'Z', b"I"));
        let said = Said {
            severity: "ERROR".into(),
            sqlstate: "22P02".into(),
            message: "no".into(),
            column: Some("one".into()),
            datatype: Some("two".into()),
            constraint: Some("three".into()),
            routine: Some("pg_strtoint32".into()),
        };
        let expected = [
            Answer::Parsed,
            Answer::Done { rolled_back: false },
            Answer::Done { rolled_back: true },
            Answer::Failed(Box::new(said)),
            Answer::Ready { idle: true },
        ];
        for piece in [1, 2, 3, 5, 7, 1000, 1_000_000] {
            assert_eq!(answers(&bytes, piece).unwrap(), expected);
        }
    }

    #[test]
    fn a_long_message_is_cut_where_what_it_quotes_ends() {
        let long = format!("invalid input: \"{}\"", "9".repeat(3_000_000));
        let answers = answers(&error(&long), 8192).unwrap();
        let [Answer::Failed(said)] = &answers[..] else {
            panic!("{}", answers.len());
        };
        assert!(said.message.len() < FIELD_BYTES_MAX + 10);
        assert!(said.message.ends_with("9…\""));
        assert_eq!(said.routine.as_deref(), Some("pg_strtoint32"));
    }

    #[test]
    fn what_the_protocol_does_not_allow_is_noticed() {
        for bytes in [
            message(b'G', b""),
            message(b'C', &[b'x'; TAG_BYTES_MAX + 1]),
            vec![b'Z', 0, 0, 0, 3],
        ] {
            assert_eq!(answers(&bytes, 1000), Err(Unexpected));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), piece in 1usize..50) {
            let (mut answers, mut read) = (Answers::default(), BytesMut::new());
            for piece in bytes.chunks(piece) {
                read.extend_from_slice(piece);
                while let Ok(Some(_)) = answers.next(&mut read) {}
            }
        }
    }
}
