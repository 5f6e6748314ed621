//! Everything that speaks with Postgres. The Postgres crates occur nowhere else.

pub mod assemble;
pub mod catalog;
pub mod check;
pub mod convert;
pub mod copy;
mod dial;
mod feedback;
pub mod history;
pub mod pgoutput;
mod pipeline;
mod reader;
mod relation;
pub mod replication;
mod rows;
#[cfg(test)]
mod seed;
pub mod setup;
pub mod spool;
pub mod sql;
pub mod stream;
pub mod target;
pub mod tls;
mod wire;
pub mod witness;
pub mod writer;
