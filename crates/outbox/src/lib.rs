//! The transactional outbox: an event is written in the same PostgreSQL transaction as the change that it tells of, and
//! a relay publishes it to Kafka afterwards. Either both happen or neither.
//!
//! ```no_run
//! # use diesel_async::{AsyncConnection, AsyncPgConnection};
//! # async fn example(conn: &mut AsyncPgConnection) -> diesel::QueryResult<()> {
//! conn.transaction(async |conn| {
//!     // First change the entity, which locks its row …
//!     // … then, as the last statement, append what happened.
//!     let message = outbox::Message::new("order", "7f0c", 1, "order.placed", b"payload".to_vec());
//!     outbox::append(conn, &[message]).await
//! })
//! .await
//! # }
//! ```
//!
//! # Rules
//! Order per entity holds when a row's id is taken while its entity is locked. So: lock the entity's row or read the
//! version that the write is checked against, append last, and give several events of one entity in the order of their
//! versions. Nothing here knows Kafka.

use chrono::{DateTime, Utc};
use diesel::QueryResult;
use diesel::prelude::Insertable;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use uuid::Uuid;

/// Creates the outbox table and the relay's progress table.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

mod schema {
    diesel::table! {
        outbox (id) {
            id -> BigInt,
            event_id -> Uuid,
            aggregate_type -> Text,
            aggregate_id -> Text,
            aggregate_version -> BigInt,
            event_type -> Text,
            schema_version -> Integer,
            topic -> Nullable<Text>,
            source -> Text,
            content_type -> Text,
            data_schema -> Nullable<Text>,
            correlation_id -> Nullable<Uuid>,
            causation_id -> Nullable<Uuid>,
            traceparent -> Nullable<Text>,
            tracestate -> Nullable<Text>,
            metadata -> Jsonb,
            occurred_at -> Timestamptz,
            payload -> Nullable<Binary>,
        }
    }
}

/// One event on its way to Kafka.
#[derive(Debug, Clone, PartialEq, Insertable)]
#[diesel(table_name = schema::outbox)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub struct Message {
    /// Unique per event; `ce_id` on Kafka.
    pub event_id: Uuid,
    /// Kind of entity, `order`; names the topic unless [`Message::topic`] does.
    pub aggregate_type: String,
    /// The entity; the Kafka key.
    pub aggregate_id: String,
    /// Counts the entity's events from 1 without gaps.
    pub aggregate_version: i64,
    /// What happened: `order.placed`.
    pub event_type: String,
    /// Major version of the payload's schema, from 1.
    pub schema_version: i32,
    /// Overrides the relay's topic template.
    pub topic: Option<String>,
    /// Who emits it: `/order-svc`.
    pub source: String,
    /// Media type of the payload.
    pub content_type: String,
    /// Full name of the payload's schema.
    pub data_schema: Option<String>,
    /// Joins everything that happens for one business process.
    pub correlation_id: Option<Uuid>,
    /// The event or command that caused this one.
    pub causation_id: Option<Uuid>,
    /// W3C trace context of the command.
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    /// An object of strings, published as `meta-<name>` headers.
    pub metadata: serde_json::Value,
    pub occurred_at: DateTime<Utc>,
    /// `None` publishes a tombstone.
    pub payload: Option<Vec<u8>>,
}

impl Message {
    /// A Protobuf message with a fresh event id, occurred now, and nothing optional set.
    pub fn new(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        aggregate_version: i64,
        event_type: impl Into<String>,
        payload: Vec<u8>,
    ) -> Self {
        Self {
            event_id: Uuid::now_v7(),
            aggregate_type: aggregate_type.into(),
            aggregate_id: aggregate_id.into(),
            aggregate_version,
            event_type: event_type.into(),
            schema_version: 1,
            topic: None,
            source: String::new(),
            content_type: "application/protobuf".to_owned(),
            data_schema: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            metadata: serde_json::Value::Object(serde_json::Map::new()),
            occurred_at: Utc::now(),
            payload: Some(payload),
        }
    }
}

/// Appends messages within the caller's transaction, ids in the order of the slice.
///
/// # Errors
/// Whatever PostgreSQL says; the caller's transaction must then be rolled back.
pub async fn append(conn: &mut AsyncPgConnection, messages: &[Message]) -> QueryResult<()> {
    match messages {
        [] => {}
        // The usual case; unlike an insert of several rows, its statement is prepared once per connection.
        [message] => {
            diesel::insert_into(schema::outbox::table)
                .values(message)
                .execute(conn)
                .await?;
        }
        _ => {
            diesel::insert_into(schema::outbox::table)
                .values(messages)
                .execute(conn)
                .await?;
        }
    }
    Ok(())
}
