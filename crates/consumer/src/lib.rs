//! Applies events from Kafka to a PostgreSQL database: every effect once, in order per entity.
//!
//! # What it promises
//! - **The effect happens once per consumer database**, through repeats on the topic, crashes, rebalances and processes that were
//!   stopped and come back. What a [`Handler`] writes, and the [version mark](#marks) that recognises repeats, commit in one transaction.
//! - **Order per entity.** Records of one key are handled in the order of the topic, on one worker.
//! - **Nothing is skipped.** A Kafka offset is stored only after everything before it in its partition has committed. A
//!   dependency that is away is waited for, however long. A record that can never be handled stops its partition, loudly, and no other.
//! - **Bounds.** Records and bytes in memory, the duration of an attempt, and the duration of a shutdown are bounded.
//!
//! It promises nothing about effects outside the database: a handler that sends mail sends it at least once.
//!
//! # How it works
//! One task polls Kafka and keeps the books: which partitions are assigned, which records wait for which worker, and how far each
//! partition is done. Workers, each with at most one batch, apply records through a connection of the pool. A key always goes to
//! the same worker; while that is busy its records gather, so batches grow with the load and are small when latency matters.
//!
//! When a partition has too much in memory it is paused, but polling goes on: it keeps the membership in the group. When a partition
//! is revoked, nothing waits for its records: what is under way may still commit, which is harmless, and its completion counts for
//! nothing in a later assignment. See [`Config`] for the bounds.
//!
//! # Marks
//! Events carry the version of their entity, counted from 1 without gaps. The mark of (consumer, topic, entity) is the last version
//! applied: a version up to the mark is a repeat, the next one is fresh, and one further ahead is a gap. Marks advance on every record,
//! whether the handler had a use for it or not. The same version in another event than before is reported as an error and counted,
//! since it means that the history was rewritten upstream.
//!
//! # Records that cannot be handled
//! A record without an [envelope](envelope::Envelope), one ahead of a gap, and one that the handler refuses for good
//! ([`HandlerError::Permanent`]) halt their partition: an error is logged once, [`Status::problems`] tells it, and the offset stays.
//!
//! # Metrics
//! `consumer_` + `messages_total{topic,outcome}`, `end_to_end_seconds{topic}`, `batch_records`, `batch_seconds`, `errors_total{kind}`,
//! `retries_total`, `ghosts_total`, `halted_partitions`, `assigned_partitions`, `rebalances_total`, `in_flight_records`,
//! `lag_records{topic,partition}`, `brokers_up`; all with the label `consumer`, the group.
//!
//! # Tracing
//! The span `process {topic}` continues the event's trace (`traceparent` header) when it is alone in its batch, and links to each
//! event's otherwise.
//!
//! # Example
//! ```no_run
//! use consumer::{Config, Consumer, Handler, HandlerError, Record, Topic};
//! use diesel_async::pooled_connection::deadpool::Pool;
//! use diesel_async::{AsyncPgConnection, RunQueryDsl};
//! use tokio_util::sync::CancellationToken;
//!
//! struct CountOrders;
//!
//! impl Handler for CountOrders {
//!     type Effect = ();
//!
//!     async fn handle(
//!         &self,
//!         connection: &mut AsyncPgConnection,
//!         batch: &[&Record],
//!     ) -> Result<(), HandlerError> {
//!         let placed = batch.iter().filter(|record| record.envelope.event_type == "order.placed").count();
//!         diesel::sql_query("UPDATE totals SET orders = orders + $1")
//!             .bind::<diesel::sql_types::BigInt, _>(placed as i64)
//!             .execute(connection)
//!             .await?;
//!         Ok(())
//!     }
//! }
//!
//! # async fn example(pool: Pool<AsyncPgConnection>) -> Result<(), Box<dyn std::error::Error>> {
//! let topics = vec![Topic::from_beginning("events.order")];
//! let config = Config::new("localhost:9092", "order-totals", topics);
//! let consumer = Consumer::new(config, pool, CountOrders, &prometheus::Registry::new())?;
//! let shutdown = CancellationToken::new();
//! consumer.run(shutdown).await?;
//! # Ok(())
//! # }
//! ```

mod config;
mod handler;
mod record;
mod runtime;
mod status;

mod intake;
mod kafka;
mod marks;
mod metrics;
mod trace;
mod tracker;
mod worker;

pub use config::{Config, Start, Topic};
pub use handler::{BoxError, Handler, HandlerError};
pub use record::{Record, RecordError};
pub use runtime::{BuildError, Consumer, RunError};
pub use status::Status;

/// The tables of this crate; they live in the consumer's own database.
pub const MIGRATIONS: diesel_migrations::EmbeddedMigrations =
    diesel_migrations::embed_migrations!("../../migrations/consumer");
