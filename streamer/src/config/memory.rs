//! How `memory_max` is divided. Everything that grows with data, replicas or their slowness has a share here; what is
//! not listed (code, stacks, SQLite's schema, sockets) is small and lives in the headroom.

use super::MIB;

/// Rows of the largest size that can be held at a time: one as it comes from Postgres or is made into a record, and
/// one copy of it on its way into SQLite.
const LARGE_ROWS: u64 = 2;

/// Connections that catch-ups read the mirror with. Each has a page cache of its own; two cores are kept busy by two,
/// and two more hide the disk.
const READERS: usize = 4;

/// Least that a session's queue holds: two full messages, so that one can be sent while the next is filled.
const QUEUE_BYTES_MIN: u64 = 512 << 10;

/// Most that a session's queue holds. A replica that is further behind catches up from the mirror, which is cheaper
/// than holding it in memory.
const QUEUE_BYTES_MAX: u64 = 4 << 20;

/// The shares of `memory_max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Page cache of the mirror's writing connection. The largest share: it doubles the rate of random upserts.
    pub mirror_cache_bytes: usize,
    /// How many readers there are at most.
    pub readers: usize,
    /// Page cache of each reader. Small: a catch-up goes through a table once, in key order.
    pub reader_cache_bytes: usize,
    /// What the queue of one session holds; what was taken from it to be sent does not count.
    pub queue_bytes_max: usize,
    /// What the queues of all sessions hold together; above it the one that is pushed to is dropped, and catches up.
    pub queues_bytes_max: usize,
    /// What rounds of catch-ups hold until replicas take them, of all sessions together; above it they get small.
    pub rounds_bytes_max: usize,
    /// What decoded changes of transactions in progress hold; above it they go to files.
    pub spool_bytes_max: usize,
    /// What decoded changes of transactions that committed hold until the engine takes them.
    pub events_bytes_max: usize,
    /// A transaction up to this is held whole and routed; a larger one is applied in chunks of this.
    pub chunk_bytes_max: usize,
    /// What copied rows hold between Postgres and the mirror. Only used before streaming, when the queues are empty:
    /// it is part of their share.
    pub copy_bytes_max: usize,
    /// A row above this stops its table.
    pub row_bytes_max: usize,
    /// A local transaction above this is rejected.
    pub transaction_bytes_max: usize,
}

impl Memory {
    /// Divides `memory_max`. What remains after the largest rows is split in sixteenths.
    pub(super) fn new(memory_max: u64, row_bytes_max: u64) -> Memory {
        let rest = memory_max.saturating_sub(LARGE_ROWS * row_bytes_max);
        let share = |sixteenths: u64| rest / 16 * sixteenths;
        let queues = share(3);
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Memory {
            mirror_cache_bytes: size(share(6)),
            readers: READERS,
            reader_cache_bytes: size(share(1) / READERS as u64),
            queue_bytes_max: size((queues / 8).clamp(QUEUE_BYTES_MIN, QUEUE_BYTES_MAX)),
            queues_bytes_max: size(queues),
            rounds_bytes_max: size(share(1)),
            spool_bytes_max: size(share(1) / 2),
            events_bytes_max: size(share(1) / 2),
            // A transaction costs about three times its own size while it is applied: its changes, the rows before
            // and after, and what is encoded of them. That makes 1.5 sixteenths.
            chunk_bytes_max: size(share(1) / 2),
            copy_bytes_max: size(queues / 2),
            row_bytes_max: size(row_bytes_max),
            transaction_bytes_max: size(row_bytes_max),
        }
        // That is 13.5 sixteenths; 2.5 are left to the allocator's slack, the code, the stacks and the sockets.
    }

    /// What all shares come to, at most.
    pub fn total(&self) -> usize {
        self.mirror_cache_bytes
            + self.readers * self.reader_cache_bytes
            + self.queues_bytes_max
            + self.rounds_bytes_max
            + self.spool_bytes_max
            + self.events_bytes_max
            + 3 * self.chunk_bytes_max
            + LARGE_ROWS as usize * self.row_bytes_max
    }
}

/// The largest `row_bytes_max` that leaves room for the rest.
pub(super) fn row_bytes_limit(memory_max: u64) -> u64 {
    (memory_max / 3).min(anabranch_proto::ROW_BYTES_MAX as u64)
}

/// Default of `row_bytes_max`: a value of 64 MiB and the other columns of its row, or less where `memory_max` is small.
pub(super) fn row_bytes_default(memory_max: u64) -> u64 {
    (68 * MIB).min(row_bytes_limit(memory_max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_stay_below_the_cap_with_headroom_whatever_the_cap() {
        for memory_max in [64 * MIB, 100 * MIB, 256 * MIB, 1024 * MIB, 65536 * MIB] {
            for row in [
                MIB,
                row_bytes_default(memory_max),
                row_bytes_limit(memory_max),
            ] {
                let memory = Memory::new(memory_max, row);
                let headroom = (memory_max - LARGE_ROWS * row) / 8;
                assert!(
                    memory.total() as u64 + headroom <= memory_max,
                    "{memory_max} {memory:?}"
                );
                assert!(memory.queue_bytes_max <= memory.queues_bytes_max);
                assert!(memory.chunk_bytes_max >= 512 << 10, "{memory:?}");
                assert!(memory.reader_cache_bytes >= 256 << 10, "{memory:?}");
            }
        }
    }
}
