//! How `memory_max` is divided.
//!
//! The parts are chosen so that their sum stays below the cap even when each of them is full at the same time. What is
//! left over is for what can't be counted: fragments of the allocator, statements, connections of readers.

use anabranch_proto::MESSAGE_BYTES_MAX;

/// The cap, unless told otherwise: an edge node has other things to do.
pub const MEMORY_MAX_DEFAULT: u64 = 128 << 20;

/// Below this the fixed parts leave nothing for the rest.
pub const MEMORY_MAX_MIN: u64 = 48 << 20;

/// The program itself: code, stacks of its threads, TLS.
const PROCESS_BYTES: u64 = 12 << 20;

/// One message being received, one being unpacked, one waiting for room in the queue.
const MESSAGES_BYTES: u64 = 3 * MESSAGE_BYTES_MAX as u64;

/// HTTP/2 window of the one stream: enough for 30 MB/s at 130 ms.
const STREAM_WINDOW_BYTES: u64 = 4 << 20;

/// HTTP/2 window of the connection.
const CONNECTION_WINDOW_BYTES: u64 = 8 << 20;

/// Enough for `/changes` readers that are away for a while; they come back by reading the table.
const CHANGES_BYTES: u64 = 4 << 20;

/// The parts, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The cap itself.
    pub max: u64,
    /// Page cache of the writing connection. The largest part: random upserts into tables larger than it are slow.
    pub cache_bytes: usize,
    /// Above this, what has come of a transaction goes to disk until its commit.
    pub hold_bytes_max: usize,
    /// Messages that wait for the file.
    pub queue_bytes_max: usize,
    /// What the streamer may send on the stream before we read.
    pub stream_window_bytes: u32,
    /// What the streamer may send on the connection before we read.
    pub connection_window_bytes: u32,
    /// Recent changes, for `/changes`.
    pub changes_bytes_max: usize,
}

impl Memory {
    /// Divides `max`, which is at least [`MEMORY_MAX_MIN`].
    pub fn split(max: u64) -> Self {
        let rest = max.saturating_sub(PROCESS_BYTES + MESSAGES_BYTES);
        // Both windows can't be full at once: the stream's is within the connection's.
        let connection_window = CONNECTION_WINDOW_BYTES.min(rest / 12);
        Memory {
            max,
            cache_bytes: (rest / 2) as usize,
            hold_bytes_max: (rest / 5) as usize,
            queue_bytes_max: (rest / 10) as usize,
            stream_window_bytes: STREAM_WINDOW_BYTES.min(connection_window) as u32,
            connection_window_bytes: connection_window as u32,
            changes_bytes_max: CHANGES_BYTES.min(rest / 25) as usize,
        }
    }

    /// All parts together, full.
    pub fn sum(&self) -> u64 {
        PROCESS_BYTES
            + MESSAGES_BYTES
            + self.cache_bytes as u64
            + self.hold_bytes_max as u64
            + self.queue_bytes_max as u64
            + u64::from(self.connection_window_bytes)
            + self.changes_bytes_max as u64
    }
}

/// `128MiB`, `1GiB`, `65536`: the units that the streamer's config has. Units of 1000 are refused: some mean those of
/// 1024 by them, and a limit is not to be guessed.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "`{text}` is not a size; write it such as \"128MiB\" (KiB, MiB, GiB, TiB; not kB, MB, GB), or a number of bytes"
        )
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit: u64 = match text[digits..].trim() {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_all_full_exceed_the_cap() {
        for mib in [48, 49, 64, 128, 200, 256, 1_024, 16_384] {
            let memory = Memory::split(mib << 20);
            assert!(memory.sum() < memory.max, "{memory:?}");
            assert!(memory.hold_bytes_max > 1 << 20, "{memory:?}");
            assert!(memory.stream_window_bytes >= 1 << 20, "{memory:?}");
            assert!(memory.stream_window_bytes <= memory.connection_window_bytes);
        }
        let memory = Memory::split(MEMORY_MAX_DEFAULT);
        assert_eq!(memory.stream_window_bytes, 4 << 20);
        assert_eq!(memory.connection_window_bytes, 8 << 20);
    }

    #[test]
    fn a_size_is_misread() {
        for (text, bytes) in [
            ("128MiB", 128 << 20),
            ("1 GiB", 1 << 30),
            ("65536", 65_536),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in [
            "",
            "MiB",
            "-1MiB",
            "1.5GiB",
            "2GB",
            "500MB",
            "64kB",
            "7B",
            "1TB ",
            "128mib",
            "99999999999999999999",
            "18446744073709551615KiB",
            "12é",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
