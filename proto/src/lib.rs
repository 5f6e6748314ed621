//! The wire between Anabranch's streamer and its replicas.
//!
//! - [`v1`]: the messages, generated from `anabranch/v1/anabranch.proto`, which is the reference.
//! - [`position`]: [`Lsn`], [`Epoch`], [`Position`]: places in the history of a source.
//! - [`record`]: rows as packed records, and [`ops`]: runs of row operations made of them.
//! - [`packed`]: messages in zstd. [`codec`]: how gRPC carries them.
//! - [`local`]: what both sides must spell alike of local transactions.
//!
//! This crate knows neither side: it has no I/O, and no opinion on what is streamed.

pub mod codec;
pub mod down;
pub mod local;
pub mod ops;
pub mod packed;
pub mod position;
pub mod record;

pub use local::Nonce;
pub use position::{Epoch, Lsn, Position};

/// Generated messages and gRPC stubs. What the server sends down is [`down::Encoded`].
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("anabranch.v1");
    include!(concat!(env!("OUT_DIR"), "/server/anabranch.v1.rs"));
}

/// The descriptors of [`v1`], for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/anabranch.bin"));

/// The version of the protocol that both sides must speak.
///
/// - 1: first version.
/// - 2: local writes: the call `Write`; tables with a purpose, which an older replica would show to programs.
/// - 3: entries have a nonce, and the hash covers what their tables are; a replica asks what became of its entries elsewhere;
///   defaults of columns, and leases of ids.
/// - 4: a call's token is renewed while it goes on (`Renew`), which an older streamer would take for an error; the pause that
///   RESOURCE_EXHAUSTED asks for.
pub const PROTOCOL_VERSION: u32 = 4;

/// Largest gRPC message either side sends or accepts. A row above it travels in pieces, so this bounds
/// memory per connection, not what can be streamed.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// At this size a message is sent although more could be added. Large enough that its overhead vanishes,
/// small enough that both sides work at the same time.
pub const MESSAGE_BYTES_TARGET: usize = 256 * 1024;

/// The largest row that is ever streamed: SQLite's own limit on a string or blob (`SQLITE_MAX_LENGTH`).
pub const ROW_BYTES_MAX: usize = 1_000_000_000;

/// Shapes that one replica may subscribe to: more than any sensible one has. It bounds `Hello`.
pub const SUBSCRIPTIONS_MAX: usize = 100;

/// Entries that a replica asks for at once when its file is a copy: one message of [`MESSAGE_BYTES_TARGET`].
pub const JUDGED_MAX: usize = MESSAGE_BYTES_TARGET / Nonce::BYTES;

/// Silence on a stream, in either direction, after which it is taken to be dead.
pub const SILENCE_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// How often an idle replica says [`v1::Ack`].
pub const ACK_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

/// Where a status says when to come back: its metadata has this, in milliseconds, as gRPC's own retries know it
/// (<https://github.com/grpc/proposal/blob/master/A6-client-retries.md>, "server pushback").
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// How often an idle streamer says [`v1::Heartbeat`].
pub const HEARTBEAT_EVERY: std::time::Duration = std::time::Duration::from_secs(1);
