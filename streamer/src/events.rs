//! What was decoded, on its way to the engine: in batches, so that a backlog does not cost a wake-up for each
//! transaction, and bounded in bytes.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::transaction::Event;

/// What an event holds beside its changes.
const EVENT_BYTES: usize = size_of::<Event>();

/// Events in order. They count as waiting until this is dropped.
pub struct Events {
    /// At least one.
    pub events: Vec<Event>,
    bytes: usize,
    waiting: Arc<Waiting>,
}

/// How much waits for the engine.
pub struct Waiting {
    bytes: Mutex<usize>,
    bytes_max: usize,
    freed: Condvar,
}

impl Waiting {
    /// Nothing yet.
    pub fn new(bytes_max: usize) -> Arc<Waiting> {
        Arc::new(Waiting {
            bytes: Mutex::new(0),
            bytes_max,
            freed: Condvar::new(),
        })
    }

    /// How many bytes wait.
    pub fn bytes(&self) -> usize {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room. What is larger than all of it gets by alone.
    pub fn admit(self: &Arc<Self>, events: Vec<Event>) -> Events {
        let bytes = events.iter().map(bytes).sum();
        let mut waiting = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        while *waiting > 0 && *waiting + bytes > self.bytes_max {
            waiting = (self.freed.wait(waiting)).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting += bytes;
        Events {
            events,
            bytes,
            waiting: self.clone(),
        }
    }
}

/// What an event holds in memory, about.
pub fn bytes(event: &Event) -> usize {
    EVENT_BYTES
        + match event {
            Event::Chunk(chunk) => chunk.bytes,
            Event::Idle { .. } | Event::Lost => 0,
        }
}

impl Drop for Events {
    fn drop(&mut self) {
        let waiting = &self.waiting;
        *waiting.bytes.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        waiting.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transaction::Chunk;

    fn of(bytes: usize) -> Vec<Event> {
        vec![Event::Chunk(Chunk {
            bytes,
            ..Chunk::default()
        })]
    }

    #[test]
    fn what_waits_is_bounded_and_what_is_larger_gets_by_alone() {
        let waiting = Waiting::new(1000);
        let large = waiting.admit(of(5000));
        let (told, heard) = std::sync::mpsc::channel();
        let thread = {
            let waiting = waiting.clone();
            let send = move || {
                told.send(waiting.admit(of(500))).unwrap();
                told.send(waiting.admit(of(900))).unwrap();
            };
            (std::thread::Builder::new().name("sender".into()))
                .spawn(send)
                .unwrap()
        };
        let none = || heard.recv_timeout(std::time::Duration::from_millis(50));
        assert!(none().is_err(), "nothing fits beside what is too large");
        drop(large);
        let first = heard.recv().unwrap();
        assert!(none().is_err(), "both are above the limit");
        drop(first);
        drop(heard.recv().unwrap());
        thread.join().unwrap();
        assert_eq!(waiting.bytes(), 0);
    }
}
