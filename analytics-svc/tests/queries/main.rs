//! The service over gRPC, on a real PostgreSQL and a real Kafka, mostly with two replicas.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod emission;
mod figures;
mod rebuild;
mod shop;
mod stage;
mod summary;
mod watch;
