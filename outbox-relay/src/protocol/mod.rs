//! The protocol by which an outbox is read, as pure state: no clock, no I/O.

#[cfg(test)]
mod model;
mod ranges;
mod tracker;

pub use ranges::RangeSet;
pub use tracker::{Progress, Read, Tracker};
