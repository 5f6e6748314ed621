//! Doctored histories: each is right until one thing is changed, and then just that is found.

use super::*;

const WRITERS: usize = 2;
const KEYS: usize = 2;

/// A run of two writers and two keys that keeps every promise: `a` writes both keys, `b` sees that and writes one, `a` sees
/// it, and a doomed transaction of `a` comes and goes.
fn right() -> Vec<Session> {
    let mut run = Run::default();
    run.reads(0);
    run.reads(1);
    run.writes(0, false, &[0, 1]);
    run.reads(0);
    run.arrive();
    run.reads(1);
    run.writes(1, false, &[1]);
    run.reads(1);
    run.writes(0, true, &[0]);
    run.reads(0);
    run.arrive();
    run.writes(0, false, &[1]);
    run.reads(0);
    run.answer();
    run.reads(0);
    run.reads(1);
    run.sessions.to_vec()
}

/// The simplest system that keeps all promises: one table, and a local one for each writer on top.
struct Run {
    postgres: Read,
    local: [Read; WRITERS],
    numbers: [Number; WRITERS],
    sessions: [Session; WRITERS],
}

impl Default for Run {
    fn default() -> Self {
        let empty = Read {
            values: vec![Value::default(); KEYS * WRITERS],
            tops: vec![0; KEYS],
            log: vec![BTreeMap::new(); WRITERS],
            rejected: BTreeSet::new(),
        };
        Self {
            postgres: empty.clone(),
            local: [empty.clone(), empty],
            numbers: [0; WRITERS],
            sessions: [0, 1].map(|replica| Session {
                replica,
                events: Vec::new(),
            }),
        }
    }
}

impl Run {
    fn reads(&mut self, replica: usize) {
        let read = self.local[replica].clone();
        self.sessions[replica].events.push(Event::Read(read));
    }

    fn writes(&mut self, replica: usize, doomed: bool, keys: &[usize]) {
        self.numbers[replica] += 1;
        let number = self.numbers[replica];
        let top = self.local[replica].tops.iter().max().unwrap() + 1;
        let mut seen = self.local[replica].lasting();
        if !doomed {
            keys.iter()
                .for_each(|key| seen[key * WRITERS + replica] = number);
        }
        let value = Value {
            number,
            doomed,
            seen,
        };
        let put = |read: &mut Read| {
            for key in keys {
                read.values[key * WRITERS + replica] = value.clone();
                if !doomed {
                    read.tops[*key] = top;
                }
            }
            read.log[replica].insert(number, doomed);
        };
        put(&mut self.local[replica]);
        if !doomed {
            put(&mut self.postgres);
        }
        let keys = keys.iter().copied().collect();
        self.sessions[replica].events.push(Event::Wrote(Wrote {
            number,
            doomed,
            keys,
            top,
        }));
    }

    /// What is in Postgres is seen by all, under what is pending.
    fn arrive(&mut self) {
        for (replica, local) in self.local.iter_mut().enumerate() {
            for (place, value) in self.postgres.values.iter().enumerate() {
                if place % WRITERS != replica {
                    local.values[place] = value.clone();
                }
            }
            let own = local.log[replica].clone();
            local.log = self.postgres.log.clone();
            local.log[replica] = own;
            for (top, arrived) in local.tops.iter_mut().zip(&self.postgres.tops) {
                *top = (*top).max(*arrived);
            }
        }
    }

    /// Everything is answered.
    fn answer(&mut self) {
        for (replica, local) in self.local.iter_mut().enumerate() {
            let doomed = local.log[replica].iter().filter(|(_, doomed)| **doomed);
            let rejected = doomed.map(|(number, _)| *number).collect();
            *local = self.postgres.clone();
            local.rejected = rejected;
        }
    }
}

fn found(sessions: &[Session]) -> BTreeSet<Broken> {
    let violations = Checker::new(WRITERS, sessions).check(true);
    violations.iter().map(|found| found.broken).collect()
}

/// The events of a session that are reads, with their order.
fn read(sessions: &mut [Session], session: usize, which: usize) -> &mut Read {
    let reads = sessions[session]
        .events
        .iter_mut()
        .filter_map(|event| match event {
            Event::Read(read) => Some(read),
            Event::Wrote(_) => None,
        });
    reads.skip(which).next().expect("so many reads")
}

/// Changes a right history, and looks that this is found, maybe with others.
#[track_caller]
fn finds(broken: Broken, doctor: impl FnOnce(&mut Vec<Session>)) {
    let mut sessions = right();
    doctor(&mut sessions);
    let found = found(&sessions);
    assert!(found.contains(&broken), "{broken:?} is not in {found:?}");
}

#[test]
fn a_right_history_is_accused() {
    let sessions = right();
    assert_eq!(Checker::new(WRITERS, &sessions).check(true), []);
    let events: Vec<usize> = sessions.iter().map(|s| s.events.len()).collect();
    assert_eq!(events, [8, 5]);
}

#[test]
fn a_write_that_is_not_seen_by_its_writer_is_missed() {
    finds(Broken::ReadYourWrites, |sessions| {
        let before = read(sessions, 0, 0).clone();
        *read(sessions, 0, 1) = before;
    });
    // A doomed one as well, as long as it is not listed as rejected.
    finds(Broken::ReadYourWrites, |sessions| {
        let before = read(sessions, 0, 1).clone();
        *read(sessions, 0, 2) = before;
    });
}

#[test]
fn a_write_that_is_gone_again_is_missed() {
    // Of the own replica: the program read it in between, and another program wrote it.
    finds(Broken::Flicker, |sessions| {
        let reads = [1, 0].map(|which| Event::Read(read(sessions, 0, which).clone()));
        sessions.push(Session {
            replica: 0,
            events: reads.to_vec(),
        });
    });
    // Of another.
    finds(Broken::MonotonicReads, |sessions| {
        let reads = [1, 0].map(|which| Event::Read(read(sessions, 1, which).clone()));
        sessions.push(Session {
            replica: 1,
            events: reads.to_vec(),
        });
    });
    finds(Broken::MonotonicReads, |sessions| {
        read(sessions, 1, 3).tops[0] -= 1;
    });
    // A doomed one that another program saw, and that is gone before it is rejected.
    finds(Broken::Flicker, |sessions| {
        let seen = read(sessions, 0, 2).clone();
        let mut gone = read(sessions, 0, 4).clone();
        gone.rejected.clear();
        sessions.push(Session {
            replica: 0,
            events: vec![Event::Read(seen), Event::Read(gone)],
        });
    });
}

#[test]
fn a_part_of_a_transaction_is_taken_for_all_of_it() {
    finds(Broken::AtomicReads, |sessions| {
        read(sessions, 1, 1).values[0] = Value::default();
    });
    // The log is another table.
    finds(Broken::AtomicReads, |sessions| {
        read(sessions, 1, 1).log[0].remove(&1);
    });
    finds(Broken::AtomicReads, |sessions| {
        let first = read(sessions, 1, 0);
        first.log[0].insert(1, false);
    });
}

#[test]
fn a_transaction_without_those_before_it_is_missed() {
    finds(Broken::MonotonicWrites, |sessions| {
        // Writer 0's third wrote key 1; its first wrote key 0 too, and is not there.
        read(sessions, 1, 3).values[0] = Value::default();
    });
    finds(Broken::WritesFollowReads, |sessions| {
        // Writer 1's first had seen writer 0's.
        let read = read(sessions, 1, 2);
        read.values[0] = Value::default();
        read.values[WRITERS] = Value::default();
    });
}

#[test]
fn a_refused_write_in_sight_of_others_is_missed() {
    finds(Broken::AbortedReads, |sessions| {
        let doomed = read(sessions, 0, 2).values[0].clone();
        read(sessions, 1, 3).values[0] = doomed;
    });
    finds(Broken::AbortedReads, |sessions| {
        read(sessions, 1, 3).log[0].insert(2, true);
    });
    // Listed, and not undone.
    finds(Broken::AbortedReads, |sessions| {
        read(sessions, 0, 2).rejected.insert(2);
    });
    finds(Broken::Rejected, |sessions| {
        read(sessions, 0, 4).rejected.insert(1);
    });
}

#[test]
fn an_outcome_that_differs_from_what_was_written_is_missed() {
    for doctor in [
        |read: &mut Read| read.tops[1] += 1,
        |read: &mut Read| read.rejected.clear(),
        |read: &mut Read| read.values[0] = Value::default(),
    ] {
        finds(Broken::Outcome, |sessions| doctor(read(sessions, 0, 4)));
    }
}

#[test]
fn a_value_is_another_when_it_was_text() {
    for value in [
        Value::default(),
        Value {
            number: 7,
            doomed: true,
            seen: vec![0, 12, 3],
        },
    ] {
        let text = value.text();
        let mut read = Value::parse(Some(&text));
        // Nothing seen is written as nothing.
        read.seen.retain(|_| !value.seen.is_empty());
        assert_eq!(read, value, "{text}");
    }
    assert_eq!(Value::parse(None), Value::default());
}
