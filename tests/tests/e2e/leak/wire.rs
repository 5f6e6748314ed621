//! What HTTP/2 carried: the bodies of its streams, each in one piece, and its headers.
//!
//! A body is cut into frames of up to 16 KiB, so that a word may be in two of them; and headers, in which gRPC tells errors, are
//! packed by Huffman's code of RFC 7541. Nothing is decompressed here: rows are asked for as they are.

use std::collections::BTreeMap;

/// Length, type, flags, stream.
const HEAD_BYTES: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;

/// The letters that RFC 7541 has five bits for, by their code.
const FIVE_BITS: &[u8] = b"012aceiost";

/// One direction of a connection, whose bytes come in pieces.
#[derive(Default)]
pub struct Connection {
    /// A frame that is not complete.
    rest: Vec<u8>,
}

/// What it carried.
#[derive(Default)]
pub struct Carried {
    bodies: BTreeMap<u32, Vec<u8>>,
    headers: Vec<u8>,
    /// All of it, as it came.
    raw: Vec<u8>,
}

impl Connection {
    /// What the frames that are complete with these bytes carry.
    pub fn read(&mut self, bytes: &[u8]) -> Carried {
        let mut carried = Carried {
            raw: bytes.to_owned(),
            ..Carried::default()
        };
        self.rest.extend_from_slice(bytes);
        let mut at = 0;
        while let Some((kind, stream, payload)) = frame(&self.rest[at..]) {
            at += HEAD_BYTES + payload.len();
            match kind {
                DATA => carried.bodies.entry(stream).or_default().extend(payload),
                HEADERS | CONTINUATION => carried.headers.extend(payload),
                _ => {}
            }
        }
        self.rest.drain(..at);
        carried
    }
}

fn frame(bytes: &[u8]) -> Option<(u8, u32, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u32::from(*byte))
    };
    let payload = rest.get(..number(&head[..3]) as usize)?;
    Some((head[3], number(&head[5..]), payload))
}

impl Carried {
    /// All that a word may be in.
    pub fn texts(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let bodies = self.bodies.values().cloned();
        let headers = (0..5).map(|first| five_bits(&self.headers, first));
        bodies.chain(headers).chain([self.raw.clone()])
    }

    /// Bytes of bodies.
    pub fn body_bytes(&self) -> usize {
        self.bodies.values().map(Vec::len).sum()
    }
}

/// The letters, from this bit on; what is none is a blank.
fn five_bits(bytes: &[u8], first: usize) -> Vec<u8> {
    let bit = |at: usize| usize::from(bytes[at / 8] >> (7 - at % 8) & 1);
    let starts = (first..bytes.len() * 8).step_by(5);
    let whole = starts.take_while(|start| start + 5 <= bytes.len() * 8);
    whole
        .map(|start| (start..start + 5).fold(0, |code, at| code << 1 | bit(at)))
        .map(|code| FIVE_BITS.get(code).copied().unwrap_or(b' '))
        .collect()
}
