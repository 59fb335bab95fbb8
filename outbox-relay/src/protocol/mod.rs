//! The protocol by which an outbox is read, as pure state: no clock, no I/O.

mod breaker;
#[cfg(test)]
mod model;
mod ranges;
mod tracker;
mod versions;

pub use breaker::{Breaker, Cause};
pub use ranges::RangeSet;
pub use tracker::{Progress, Read, Seen, Tracker};
pub use versions::{Entity, Follows, Versions};
