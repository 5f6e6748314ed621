//! What Anabranch's tests, demo and benches stand on.
//!
//! - [`postgres`]: a real Postgres server, and a database of one's own, each in a line of code.
//! - [`peers`]: the real programs as processes: started, killed, stopped, started again.
//! - [`proxy`]: a TCP connection that breaks in the ways that networks break.
//! - [`light`]: thousands of replicas in one process, without files.
//! - [`authority`]: certificates that only a test trusts.
//! - [`caller`]: calls as no replica of ours makes them. [`issuer`]: tokens, and whoever publishes their keys.
//! - [`liar`]: a streamer that says what no streamer of ours says.
//! - [`wait`]: waiting for a condition, never for time. [`seed`]: chance that can be had again.
//! - [`nested`]: random shapes with subqueries, and what they mean.
//! - [`oracle`]: what a replica's file must hold, found out without any of our own decoding.
//!
//! Nothing in here is Anabranch itself, and nothing outside of tests may depend on it. What a test starts is gone
//! when its process is, however it ended ([`watcher`]).

use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

pub mod authority;
pub mod caller;
pub mod http;
pub mod issuer;
pub mod liar;
pub mod light;
pub mod nested;
pub mod oracle;
pub mod peers;
pub mod port;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod proxy;
pub mod seed;
pub mod types;
pub mod wait;
pub mod watcher;

/// The runtime of the harness's own tasks: connections to Postgres, proxies, the Docker client.
///
/// Every test has a runtime of its own that dies with it, and tests share one server: what is shared, or must go on
/// while a test blocks its thread, lives here.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("harness")
            .enable_all()
            .build()
            .expect("a runtime needs nothing but threads")
    })
}

/// Says something to whoever runs the tests, also where the test runner swallows the output of tests that pass.
pub fn announce(line: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
