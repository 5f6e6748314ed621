//! Processes of the operating system, as `/proc` tells of them.

use std::fs;

use rustix::process::{Pid, RawPid};

/// The processes whose parent is `parent`.
pub fn children(parent: Pid) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<RawPid>().ok())
        .filter_map(Pid::from_raw)
        .filter(|&pid| stat(pid).is_some_and(|(_, of)| of == parent.as_raw_nonzero().get()))
        .collect()
}

/// Whether a process runs: not one that ended and waits to be reaped.
pub fn is_alive(pid: Pid) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// Its state and parent.
fn stat(pid: Pid) -> Option<(char, RawPid)> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is the program's name in parentheses, and may hold anything, parentheses too.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

/// The memory that a process has resident now, in bytes.
pub fn memory_bytes(pid: Pid) -> Option<u64> {
    status_bytes(pid, "VmRSS:")
}

/// Forgets the peak of [`memory_peak_bytes`]: from here on it is counted anew.
pub fn forget_memory_peak(pid: Pid) {
    let file = format!("/proc/{}/clear_refs", pid.as_raw_nonzero());
    fs::write(file, "5").expect("a process of our own");
}

/// The most memory that a process has ever had resident, in bytes.
pub fn memory_peak_bytes(pid: Pid) -> Option<u64> {
    status_bytes(pid, "VmHWM:")
}

/// The same for the largest of a process and all below it that run, each without the shared memory that it has resident.
pub fn private_peak_bytes_of_tree(pid: Pid) -> u64 {
    let shared = status_bytes(pid, "RssShmem:").unwrap_or_default();
    let own = memory_peak_bytes(pid)
        .unwrap_or_default()
        .saturating_sub(shared);
    let below = children(pid).into_iter().map(private_peak_bytes_of_tree);
    below.fold(own, u64::max)
}

/// A line of `/proc/PID/status` that is in kB.
fn status_bytes(pid: Pid, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// CPU seconds that a process has used, of its ended and awaited children too.
pub fn cpu_seconds(pid: Pid) -> f64 {
    cpu_seconds_in(&format!("/proc/{}/stat", pid.as_raw_nonzero()), 4)
}

/// CPU seconds of the threads of this process that have this name.
pub fn cpu_seconds_of_threads(name: &str) -> f64 {
    let threads = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let paths = threads.map(|entry| entry.path());
    let named = paths.filter(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    });
    named
        .map(|path| cpu_seconds_in(&path.join("stat").to_string_lossy(), 2))
        .sum()
}

/// utime, stime, cutime, cstime, as many of them as are wanted: fields 14 to 17 of a line.
fn cpu_seconds_in(file: &str, fields_wanted: usize) -> f64 {
    let stat = fs::read_to_string(file).unwrap_or_default();
    let fields = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(fields_wanted)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The same with all processes below it that run.
pub fn cpu_seconds_of_tree(pid: Pid) -> f64 {
    let below = children(pid).into_iter().map(cpu_seconds_of_tree);
    cpu_seconds(pid) + below.sum::<f64>()
}
