//! Tests of the mirror and of catch-ups.
//!
//! - `model`: a source that plays Postgres: tables as plain maps, random transactions, what Postgres would send of them
//! - `driver`: plays engine, sessions and kills against it, and compares at every step
//! - `probe`: lookups by secondary indexes, as part of that
//! - `lookups`: single things that can go wrong with these
//! - `cases`: single things that can go wrong
//! - `crash`: a real process, really killed

mod cases;
mod crash;
mod driver;
mod lookups;
mod model;
mod probe;
