//! What changed lately: tables and keys of each commit, for `/changes`.
//!
//! A ring bounded by count and bytes. Readers hold nothing but a place in it, so one that does not read costs nothing;
//! when the ring went past it, it is told to read the tables again (*resync*). No values travel here, only keys: who wants
//! the row opens the file.
//!
//! Collecting keys costs time at each commit, so it is only done while somebody reads, and a while after.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anabranch_proto::Position;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::file::TableChanges;

/// Commits kept: some seconds at full speed, hours when it is quiet.
pub const EVENTS_MAX: usize = 10_000;

/// An event above this names its tables only.
pub const EVENT_BYTES_MAX: usize = 256 * 1024;

/// How long changes are still collected after the last reader went: one that connects again goes on where it was.
const COLLECT_AFTER: Duration = Duration::from_secs(60);

/// What an event costs beside its text.
const EVENT_OVERHEAD_BYTES: usize = 64;

/// The ring.
#[derive(Debug)]
pub struct Changes {
    ring: Mutex<Ring>,
    /// The number of the next event: moves when there is something to read.
    next: watch::Sender<u64>,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Event>,
    /// Number of the first event in the ring; numbers never repeat.
    first: u64,
    bytes: usize,
    /// What the ring knows of begins after here.
    floor: Option<Position>,
    /// Where the file is; it may be beyond the last event.
    position: Option<Position>,
    readers: usize,
    /// When the last reader went.
    left: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Event {
    position: Position,
    data: Arc<str>,
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A commit: JSON, a list of `{table, keys}`.
    Changed {
        /// The file's position with it.
        position: Position,
        /// The JSON.
        data: Arc<str>,
    },
    /// Changes were missed: read the tables again. The file was at this position, or beyond.
    Resync(Option<Position>),
}

impl Changes {
    /// An empty ring over a file at `position`.
    pub fn new(bytes_max: usize, position: Option<Position>) -> Self {
        Changes {
            ring: Mutex::new(Ring {
                floor: position,
                position,
                ..Ring::default()
            }),
            next: watch::Sender::new(0),
            bytes_max,
        }
    }

    /// The file came to `position`, with these changes or none.
    pub fn push(&self, position: Position, changes: &[TableChanges]) {
        let data = (!changes.is_empty()).then(|| to_data(changes));
        let mut ring = self.lock();
        let same_epoch = ring
            .position
            .is_some_and(|before| before.epoch == position.epoch);
        ring.position = Some(position);
        if !same_epoch {
            // Positions of before don't compare with those from now on.
            while ring.drop_first() {}
            ring.floor = Some(position);
        }
        let Some(data) = data else { return };
        ring.bytes += data.len() + EVENT_OVERHEAD_BYTES;
        ring.events.push_back(Event { position, data });
        while (ring.bytes > self.bytes_max && ring.events.len() > 1)
            || ring.events.len() > EVENTS_MAX
        {
            ring.drop_first();
        }
        let next = ring.first + ring.events.len() as u64;
        drop(ring);
        self.next.send_replace(next);
    }

    /// The file came to `position`, and its changes were not collected. Readers that came too late for that must read
    /// the tables again.
    pub fn skip(&self, position: Position) {
        let mut ring = self.lock();
        ring.position = Some(position);
        while ring.drop_first() {}
        ring.floor = Some(position);
        // A number that nobody gets: whoever waits for it learns that he missed something.
        ring.first += 1;
        let next = ring.first;
        drop(ring);
        self.next.send_replace(next);
    }

    /// Whether somebody reads, or did a moment ago.
    pub fn wanted(&self) -> bool {
        let ring = self.lock();
        ring.readers > 0 || ring.left.is_some_and(|left| left.elapsed() < COLLECT_AFTER)
    }

    /// How many read.
    pub fn readers(&self) -> usize {
        self.lock().readers
    }

    /// A reader of what comes, beginning after the event that it saw last. `None`: there are too many readers.
    pub fn reader(
        self: &Arc<Self>,
        last_event_id: Option<&str>,
        readers_max: usize,
    ) -> Option<Reader> {
        let next = self.next.subscribe();
        let mut ring = self.lock();
        if ring.readers >= readers_max {
            return None;
        }
        ring.readers += 1;
        let end = ring.first + ring.events.len() as u64;
        let (place, resync) = match last_event_id.map(|id| ring.after(id)) {
            None => (end, false),
            Some(None) => (end, true),
            Some(Some(place)) => (place, false),
        };
        drop(ring);
        Some(Reader {
            changes: self.clone(),
            next,
            place,
            resync,
            ended: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // No code that can panic runs under the lock.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn drop_first(&mut self) -> bool {
        let Some(event) = self.events.pop_front() else {
            return false;
        };
        self.bytes -= event.data.len() + EVENT_OVERHEAD_BYTES;
        self.first += 1;
        self.floor = Some(event.position);
        true
    }

    /// The number of the first event after `id`; `None` where the ring does not reach back to it.
    fn after(&self, id: &str) -> Option<u64> {
        let id: Position = id.parse().ok()?;
        let (floor, position) = (self.floor?, self.position?);
        if id.epoch != floor.epoch || id.lsn < floor.lsn || id.lsn > position.lsn {
            return None;
        }
        Some(
            self.first
                + self
                    .events
                    .partition_point(|event| event.position.lsn <= id.lsn) as u64,
        )
    }
}

fn to_data(changes: &[TableChanges]) -> Arc<str> {
    let whole = |keys: bool| {
        let list: Vec<Value> = changes
            .iter()
            .map(|change| json!({ "table": change.table, "keys": change.keys.as_ref().filter(|_| keys) }))
            .collect();
        Value::Array(list).to_string()
    };
    let data = whole(true);
    if data.len() <= EVENT_BYTES_MAX {
        data.into()
    } else {
        whole(false).into()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut ring = self.changes.lock();
        ring.readers -= 1;
        ring.left = Some(Instant::now());
    }
}

/// A place in the ring.
#[derive(Debug)]
pub struct Reader {
    changes: Arc<Changes>,
    next: watch::Receiver<u64>,
    place: u64,
    resync: bool,
    ended: bool,
}

impl Reader {
    /// What comes next; waits for it. A reader that the ring went past gets a last `Resync`, then `None`. May be dropped
    /// while it waits, and called again.
    pub async fn next(&mut self) -> Option<Item> {
        if self.ended {
            return None;
        }
        loop {
            // Marked as seen before looking, so that what comes after the look wakes us.
            self.next.borrow_and_update();
            {
                let ring = self.changes.lock();
                if std::mem::take(&mut self.resync) {
                    return Some(Item::Resync(ring.position));
                }
                if self.place < ring.first {
                    self.ended = true;
                    return Some(Item::Resync(ring.position));
                }
                if let Some(event) = ring.events.get((self.place - ring.first) as usize) {
                    self.place += 1;
                    return Some(Item::Changed {
                        position: event.position,
                        data: event.data.clone(),
                    });
                }
            }
            // The sender is in the ring that we hold.
            self.next.changed().await.ok()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{Epoch, Lsn};

    use super::*;

    fn at(epoch: u64, lsn: u64) -> Position {
        Position {
            epoch: Epoch(epoch),
            lsn: Lsn(lsn),
        }
    }

    fn read(changes: &Arc<Changes>, id: Option<&str>) -> Reader {
        changes.reader(id, 9).expect("there is room")
    }

    fn keys(keys: &[i64]) -> Vec<TableChanges> {
        vec![TableChanges {
            table: "t".into(),
            keys: Some(keys.iter().map(|key| json!([key])).collect()),
        }]
    }

    fn changed(position: Position, data: &str) -> Option<Item> {
        Some(Item::Changed {
            position,
            data: data.into(),
        })
    }

    #[tokio::test]
    async fn a_commit_is_missed_between_two_connections() {
        let changes = Arc::new(Changes::new(1 << 20, Some(at(1, 5))));
        let mut reader = read(&changes, None);
        changes.push(at(1, 10), &keys(&[1, 2]));
        assert_eq!(
            reader.next().await,
            changed(at(1, 10), r#"[{"keys":[[1],[2]],"table":"t"}]"#)
        );
        drop(reader);
        changes.push(at(1, 15), &[]);
        changes.push(at(1, 20), &keys(&[3]));
        let mut reader = read(&changes, Some(&at(1, 10).to_string()));
        assert_eq!(
            reader.next().await,
            changed(at(1, 20), r#"[{"keys":[[3]],"table":"t"}]"#)
        );
        // Any position that the file had will do, not only those of events.
        for (id, expected) in [
            (at(1, 5), at(1, 10)),
            (at(1, 15), at(1, 20)),
            (at(1, 9), at(1, 10)),
        ] {
            let mut reader = read(&changes, Some(&id.to_string()));
            assert!(
                matches!(reader.next().await, Some(Item::Changed { position, .. }) if position == expected),
                "{id}"
            );
        }
    }

    #[tokio::test]
    async fn an_id_that_the_ring_does_not_know_is_believed() {
        let changes = Arc::new(Changes::new(1 << 20, Some(at(1, 5))));
        changes.push(at(1, 10), &keys(&[1]));
        for id in [
            at(1, 4).to_string(),
            at(1, 11).to_string(),
            at(2, 10).to_string(),
            "x".into(),
            String::new(),
        ] {
            let mut reader = read(&changes, Some(&id));
            assert_eq!(
                reader.next().await,
                Some(Item::Resync(Some(at(1, 10)))),
                "{id}"
            );
            // From there on it goes on as usual.
            assert_eq!(reader.place, 1);
        }
        // Before the first commit nothing is known.
        let empty = Arc::new(Changes::new(1 << 20, None));
        assert_eq!(
            read(&empty, Some(&at(1, 4).to_string())).next().await,
            Some(Item::Resync(None))
        );
    }

    #[tokio::test]
    async fn a_reader_that_is_too_slow_misses_events_silently() {
        let changes = Arc::new(Changes::new(300, Some(at(1, 0))));
        let mut slow = read(&changes, None);
        for lsn in 1..=100 {
            changes.push(at(1, lsn), &keys(&[lsn as i64]));
        }
        assert!(changes.lock().bytes <= 300);
        assert_eq!(slow.next().await, Some(Item::Resync(Some(at(1, 100)))));
        assert_eq!(slow.next().await, None);
        assert_eq!(
            read(&changes, Some(&at(1, 50).to_string())).next().await,
            Some(Item::Resync(Some(at(1, 100))))
        );
        let floor = changes.lock().floor.unwrap();
        let mut reader = read(&changes, Some(&floor.to_string()));
        assert!(
            matches!(reader.next().await, Some(Item::Changed { position, .. }) if position.lsn.0 == floor.lsn.0 + 1)
        );
    }

    #[tokio::test]
    async fn the_ring_grows_without_bound() {
        let changes = Arc::new(Changes::new(usize::MAX, Some(at(1, 0))));
        for lsn in 1..=EVENTS_MAX as u64 + 10 {
            changes.push(at(1, lsn), &keys(&[1]));
        }
        assert_eq!(changes.lock().events.len(), EVENTS_MAX);
        // One event alone may be above the ring's bytes, but not above its own limit.
        let changes = Arc::new(Changes::new(100, Some(at(1, 0))));
        let long = vec![TableChanges {
            table: "t".into(),
            keys: Some(vec![json!(["x".repeat(EVENT_BYTES_MAX)])]),
        }];
        let mut reader = read(&changes, None);
        changes.push(at(1, 1), &long);
        assert_eq!(
            reader.next().await,
            changed(at(1, 1), r#"[{"keys":null,"table":"t"}]"#)
        );
    }

    #[test]
    fn readers_come_without_limit() {
        let changes = Arc::new(Changes::new(1 << 20, None));
        let readers: Vec<_> = (0..9).map(|_| read(&changes, None)).collect();
        assert!(changes.reader(None, 9).is_none());
        drop(readers);
        assert!(changes.reader(None, 9).is_some());
    }

    #[tokio::test]
    async fn what_was_not_collected_is_missed_silently() {
        let changes = Arc::new(Changes::new(1 << 20, Some(at(1, 5))));
        assert!(!changes.wanted());
        changes.skip(at(1, 10));
        // This one comes while a commit is under way for which nothing is collected.
        let mut reader = read(&changes, None);
        assert!(changes.wanted());
        changes.skip(at(1, 20));
        assert_eq!(reader.next().await, Some(Item::Resync(Some(at(1, 20)))));
        assert_eq!(reader.next().await, None);
        drop(reader);
        let mut reader = read(&changes, Some(&at(1, 20).to_string()));
        changes.push(at(1, 30), &keys(&[1]));
        assert!(
            matches!(reader.next().await, Some(Item::Changed { position, .. }) if position == at(1, 30))
        );
        assert_eq!(changes.readers(), 1);
        drop(reader);
        assert_eq!(changes.readers(), 0);
        assert!(
            changes.wanted(),
            "one that connects again goes on where it was"
        );
        let mut late = read(&changes, Some(&at(1, 10).to_string()));
        assert_eq!(late.next().await, Some(Item::Resync(Some(at(1, 30)))));
    }

    #[tokio::test]
    async fn a_new_history_continues_the_old_one() {
        let changes = Arc::new(Changes::new(1 << 20, Some(at(1, 5))));
        changes.push(at(1, 10), &keys(&[1]));
        let mut live = read(&changes, Some(&at(1, 10).to_string()));
        changes.push(at(2, 7), &keys(&[2]));
        assert!(
            matches!(live.next().await, Some(Item::Changed { position, .. }) if position == at(2, 7))
        );
        assert_eq!(
            read(&changes, Some(&at(1, 10).to_string())).next().await,
            Some(Item::Resync(Some(at(2, 7))))
        );
        changes.push(at(2, 9), &keys(&[3]));
        let mut resumed = read(&changes, Some(&at(2, 7).to_string()));
        assert!(
            matches!(resumed.next().await, Some(Item::Changed { position, .. }) if position == at(2, 9))
        );
    }
}
