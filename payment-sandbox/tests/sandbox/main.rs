//! The process over HTTP.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod api;
mod crash;
mod faults;
mod process;
mod stage;
