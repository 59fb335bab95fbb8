//! order-svc on real PostgreSQL.

mod bad_input;
mod commands;
mod common;
mod faults;
mod process;
mod verify;
