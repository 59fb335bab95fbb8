//! The runtime on a real PostgreSQL and a real Kafka.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod faults;
mod inbox;
mod order;
mod parking;
mod rebuild;
mod redrive;
mod retention;
mod scale;
mod stage;
mod two;
