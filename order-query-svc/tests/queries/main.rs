//! The service over gRPC, on a real PostgreSQL and a real Kafka, mostly with two replicas.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod journey;
mod list;
mod payments;
mod rebuild;
mod stage;
mod view;
mod watch;
