#![doc = include_str!("../README.md")]

mod config;
mod handler;
mod parking;
mod rebuild;
mod record;
mod redrive;
mod runtime;
mod status;

mod inbox;
mod indexes;
mod intake;
mod kafka;
mod lane;
mod marks;
mod metrics;
mod parked;
mod trace;
mod tracker;
mod worker;

pub use config::{Config, Start, Topic};
pub use handler::{BoxError, Handler, HandlerError, Incoming};
pub use parked::DEAD_LETTER_SUFFIX;
pub use parking::{About, Parking};
pub use rebuild::{Progress, Rebuild, RebuildError, Rebuilt};
pub use record::{Record, RecordError};
pub use redrive::{Audit, End, Outcome, Parked, Redrive, RedriveError, Run, Shown, Which};
pub use runtime::{BuildError, Consumer, RunError};
pub use status::Status;

/// Migrations of a projection's own tables.
pub use diesel_migrations::EmbeddedMigrations as Migrations;

/// The tables of this crate; they live in the consumer's own database.
pub const MIGRATIONS: diesel_migrations::EmbeddedMigrations =
    diesel_migrations::embed_migrations!("../../migrations/consumer");
