//! Messages in zstd: each for itself, so that nobody keeps a window of them in memory, and only where it gains.

use prost::Message;

use crate::{MESSAGE_BYTES_MAX, down::Encoded, v1::Down};

/// Smaller messages are not packed: live transactions are, and would pay with latency.
pub const PACKED_BYTES_MIN: usize = 4 * 1024;

/// The fastest level proper: rows shrink to about a third, at some 400 MB/s.
const LEVEL: i32 = 1;

/// Unpacked messages are at most this.
const UNPACKED_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 64 * 1024;

/// What was packed can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not zstd, or more than a message may be.
    #[error("a message can't be unpacked: {0}")]
    Zstd(#[from] std::io::Error),
    /// Not a message.
    #[error("a packed message can't be read: {0}")]
    Decode(#[from] prost::DecodeError),
    /// Messages are packed once.
    #[error("a message was packed twice")]
    Twice,
}

/// The message, packed if that makes it smaller by an eighth at least.
pub fn pack(message: Encoded) -> Encoded {
    if message.len() < PACKED_BYTES_MIN {
        return message;
    }
    let bytes = message.bytes();
    match zstd::bulk::compress(&bytes, LEVEL) {
        Ok(packed) if packed.len() <= bytes.len() - bytes.len() / 8 => Encoded::packed(&packed),
        // Without memory for it, it goes as it is.
        _ => bytes.into(),
    }
}

/// The message as it was before [`pack`].
pub fn unpack(message: Down) -> Result<Down, Error> {
    if message.zstd.is_empty() {
        return Ok(message);
    }
    // No more is reserved than the message says that it takes; if it takes more after all, that is an error.
    let says = zstd::zstd_safe::get_frame_content_size(&message.zstd).unwrap_or_default();
    let size = says.map_or(UNPACKED_BYTES_MAX, |says| {
        usize::try_from(says).map_or(UNPACKED_BYTES_MAX, |says| says.min(UNPACKED_BYTES_MAX))
    });
    let bytes = zstd::bulk::decompress(&message.zstd, size)?;
    let message = Down::decode(bytes::Bytes::from(bytes))?;
    if message.zstd.is_empty() {
        Ok(message)
    } else {
        Err(Error::Twice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Element, Rows, element::Kind};

    fn rows(ops: Vec<u8>) -> Down {
        let rows = Rows {
            table: 1,
            ops: ops.into(),
            continued: false,
        };
        Down {
            elements: vec![Element {
                kind: Some(Kind::Rows(rows)),
            }],
            ..Down::default()
        }
    }

    #[test]
    fn what_gains_is_packed_and_comes_out_as_it_was() {
        let pack = |message: Down| Down::decode(super::pack(message.into()).bytes()).unwrap();
        let large = rows(b"a row like the one before ".repeat(1000));
        let packed = pack(large.clone());
        assert!(packed.elements.is_empty());
        assert!(packed.encoded_len() < large.encoded_len() / 10);
        assert_eq!(unpack(packed).unwrap(), large);
        for kept in [
            rows(b"a row ".repeat(10)),
            rows((0..100_000).map(|_| rand::random()).collect()),
        ] {
            assert_eq!(pack(kept.clone()), kept);
            assert_eq!(unpack(kept.clone()).unwrap(), kept);
        }
    }

    #[test]
    fn what_is_damaged_or_too_large_is_refused() {
        let packed = Down::decode(pack(rows(vec![7; 100_000]).into()).bytes()).unwrap();
        for at in 0..packed.zstd.len() {
            let mut bytes = packed.zstd.to_vec();
            bytes.truncate(at);
            let cut = Down {
                zstd: bytes.into(),
                ..Down::default()
            };
            assert!(at == 0 || unpack(cut).is_err());
        }
        let zstd = |bytes: &[u8]| Down {
            zstd: zstd::bulk::compress(bytes, LEVEL).unwrap().into(),
            ..Down::default()
        };
        let bomb = zstd(&vec![0; 100 << 20]);
        assert!(matches!(unpack(bomb), Err(Error::Zstd(_))));
        let twice = zstd(&packed.encode_to_vec());
        assert!(matches!(unpack(twice), Err(Error::Twice)));
        assert!(matches!(unpack(zstd(b"\xff\xff")), Err(Error::Decode(_))));
    }
}
