//! Everything that needs a real Postgres, in one program, so that one process owns the one server.

mod catalog;
mod columns;
mod conditions;
mod copies;
mod faults;
mod harness;
mod history;
mod identity;
mod kills;
mod ledger;
mod pages;
mod parameters;
mod pgbench;
mod queues;
mod refused;
mod road;
mod roles;
mod shapes;
mod source;
mod tls;
mod tokens;
mod types;
mod writer;
mod writes;
