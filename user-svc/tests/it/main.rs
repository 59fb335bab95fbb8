//! user-svc on real PostgreSQL.

mod bad_input;
mod commands;
mod common;
mod process;
mod verify;
