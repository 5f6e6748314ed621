//! The streamer: from Postgres' WAL to the ops of each replica.
//!
//! ```text
//!  one row's way down
//!
//!  postgres/wire, replication   a walsender's bytes            (I/O)
//!  postgres/stream              socket → batches; feedback     (I/O)
//!  postgres/pgoutput, assemble  messages → transaction::Event  (pure; spools what is in progress)
//!  postgres/convert             Postgres' text → values of a record, the same for COPY and stream
//!  events                       batches of them, bounded in bytes
//!  engine                       one thread, commit order; group commit; hand-over
//!  mirror                       rows as records, the change index (SQLite)
//!  route                        whom does a net change concern? (pure)
//!  delta                        was it in, is it in: what is told (pure)
//!  session                      a queue, or a catch-up (catchup) from the mirror
//!  encode, rpc, serve           messages of the wire, gRPC, one port (I/O)
//!
//!  one write's way up
//!
//!  rpc/write                    gRPC → batches of one replica, in order, with a connection for each (I/O)
//!  write                        bytes of a replica → local transactions (pure)
//!  policy, postgres/writer      a transaction of Postgres each: claim, role, effects, checks, commit (I/O)
//!  receipts                     the answer: a row of its own transaction, which goes the way down
//!
//!  a start                      config → postgres/check, setup → start → postgres/copy → mirror → run
//!
//!  a question                   connected (who is here; on a socket in data_dir) and mirror/outside (the rows) → diff, explain:
//!                               of another process, that of the command
//! ```
//!
//! What is *not* so: `shape`, `route`, `delta`, `pgoutput`, `assemble` and `write` do no network I/O, have no clock and no
//! async. The Postgres crates occur only under `postgres`, and SQLite only under `mirror` (tests apart). Messages of
//! the protocol are made and read only in `encode`, `session` and `rpc`; `table` and `receipts` take one enum each from it,
//! the storage of a column and the purpose of a table. No consumer is ever waited for by what reports progress to Postgres.

pub mod auth;
pub mod catchup;
pub mod config;
pub mod connected;
pub mod definition;
pub mod delta;
pub mod diff;
pub mod encode;
pub mod engine;
pub mod events;
pub mod explain;
pub mod http;
pub mod lookup;
pub mod metrics;
pub mod mirror;
pub mod policy;
pub mod postgres;
pub mod receipts;
pub mod route;
pub mod rpc;
pub mod run;
pub mod serve;
pub mod session;
pub mod shape;
pub mod source;
pub mod start;
pub mod table;
pub mod tls;
pub mod token;
pub mod transaction;
pub mod write;
