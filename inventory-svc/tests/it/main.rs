//! inventory-svc on real PostgreSQL and Kafka.

mod bad_input;
mod commands;
mod common;
mod orders;
mod process;
mod verify;
