//! The harness itself: a test that stands on something rotten can't fail.

mod faults;
mod forms;
mod histories;
mod servers;
