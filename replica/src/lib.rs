//! The replica: keeps a plain SQLite file equal to shapes of a Postgres database.
//!
//! One row's way down, file by file:
//!
//! ```text
//! streamer ──gRPC──▶ client ──queue──▶ keeper ──▶ file ──▶ app.db ◀── any program, with its own SQLite
//!                      ▲                  │
//!                      └───── acks ── board ──▶ http ──▶ /status /wait /changes /metrics
//! ```
//!
//! - [`config`] – `replica.toml`.
//! - [`client`] – the gRPC rim. Connects, says `Hello`, hands messages on, acknowledges, connects again. tonic occurs only here.
//! - [`keeper`] – the one thread that owns the file, and the bounded queue before it.
//! - [`file`](mod@file) – the SQLite file: tables, apply, state. No async, no network.
//! - [`board`] – what all parts share: [`status`], [`wait`] (who waits for a position), [`changes`] (what changed lately),
//!   [`metrics`].
//! - [`http`] – the local interface, a view of the board. It never opens the file.
//! - [`sidecar`] – all of it together; the part to embed. It ends as a whole when any part ends.

pub mod board;
pub mod changes;
pub mod client;
pub mod config;
pub mod file;
pub mod http;
pub mod keeper;
pub mod metrics;
pub mod sidecar;
pub mod status;
pub mod wait;

pub use crate::{
    config::Config,
    sidecar::{Error, Sidecar},
};
