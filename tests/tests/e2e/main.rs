//! Everything that needs a real Postgres, in one program, so that one process owns the one server.

mod catalog;
mod conditions;
mod copies;
mod faults;
mod harness;
mod history;
mod kills;
mod pgbench;
mod refused;
mod road;
mod shapes;
mod tls;
mod tokens;
mod types;
