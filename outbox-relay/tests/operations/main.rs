//! What operators see and do, on real PostgreSQL and Kafka: quarantine, commands, roles, retention and the admin port.

mod admin;
mod commands;
mod kit;
mod quarantine;
mod rendering;
mod retention;
mod roles;
#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod support;
mod writers;
