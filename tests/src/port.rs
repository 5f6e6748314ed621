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

/// A port of loopback that nobody listens on, and that no other test gets.
pub fn free() -> u16 {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let dir = std::env::temp_dir().join("anabranch-ports");
    fs::create_dir_all(&dir).expect("make a directory for held ports");
    loop {
        let port = rand::rng().random_range(RANGE);
        // Another user's file can't be opened: that port is not ours to take.
        let Ok(file) = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join(port.to_string()))
        else {
            continue;
        };
        if file.try_lock().is_err() || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err() {
            continue;
        }
        HELD.lock()
            .expect("no panic while the lock is held")
            .push(file);
        return port;
    }
}
