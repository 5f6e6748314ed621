//! Ports that stay ours.
//!
//! A test restarts servers, and their ports must be free again then. A port that the kernel gives for 0 is one that it
//! also gives to outgoing connections, so it may be taken in between; and of several test processes two may find the
//! same one free. So ports come from below the kernel's range, and each is held by a locked file until this process
//! ends.

use std::{
    fs::{self, File, OpenOptions},
    net::{Ipv4Addr, TcpListener},
    sync::Mutex,
};

use rand::Rng;

/// Below 32768, where Linux starts to give ports to outgoing connections (49152 elsewhere).
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// Ports that are tried until it is certain that something else is wrong.
const TRIES_MAX: usize = 1_000;

/// A port of loopback that nobody listens on, and that no other test of this user gets. Panics if there is none.
pub fn free() -> u16 {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    // Each user has a directory: in another's nothing could be made.
    let user = rustix::process::getuid().as_raw();
    let dir = std::env::temp_dir().join(format!("anabranch-ports.{user}"));
    fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("make {}: {error}", dir.display()));
    for _ in 0..TRIES_MAX {
        let port = rand::rng().random_range(RANGE);
        let path = dir.join(port.to_string());
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        if file.try_lock().is_err() || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err() {
            continue;
        }
        HELD.lock()
            .expect("no panic while the lock is held")
            .push(file);
        return port;
    }
    panic!(
        "of {TRIES_MAX} ports in {RANGE:?} all are in use, or held by {}",
        dir.display()
    );
}
