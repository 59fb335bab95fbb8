//! order-svc on real PostgreSQL and Kafka.

mod bad_input;
mod commands;
mod common;
mod expiry;
mod faults;
mod inventory;
mod payments;
mod process;
mod shipping;
mod verify;
