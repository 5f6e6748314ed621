//! The replica: keeps a plain SQLite file equal to shapes of a Postgres database, and sends what programs write to it.
//!
//! One row's way down, file by file:
//!
//! ```text
//! streamer ──gRPC──▶ client ──queue──▶ keeper ──▶ file ──▶ app.db ◀── any program, with its own SQLite
//!                      ▲                  │
//!                      └───── acks ── board ──▶ http ──▶ /status /wait /flush /changes /metrics
//! ```
//!
//! One local write's way up:
//!
//! ```text
//! program ──SQL──▶ file/capture   its triggers queue entries, in the program's own transaction
//!                  file/boundary  which entries were one transaction, by the -wal; made durable
//!                  file/outbox    numbered and hashed, durably, before it is sent; encoded
//!                  client/write   sent in order, without waiting ──gRPC──▶ streamer
//! streamer ──as rows──▶ file/receipts  what became of it, in the commit that has the effects
//!                       file/overlay   rows rebuilt from what Postgres has and what is still pending
//! ```
//!
//! - [`config`] – `replica.toml`.
//! - [`client`] – the gRPC rim. Connects, says `Hello`, hands messages on, acknowledges, connects again; beside that it forwards
//!   local transactions. tonic occurs only here.
//! - [`keeper`] – the one thread that owns the file, and the bounded queue before it.
//! - [`file`](mod@file) – the SQLite file: tables, apply, state, local writes. No async, no network.
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
