#![doc = include_str!("../README.md")]

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::Insertable;
use diesel::{Connection, QueryResult};
use diesel_async::AsyncPgConnection;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use serde::Serialize;
use uuid::Uuid;

/// Creates the outbox table and the relay's progress table.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

/// PostgreSQL takes 65,535 parameters a statement, and a row has 17.
const ROWS_PER_STATEMENT: usize = 1_000;

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

/// One event on its way to Kafka: a row of the outbox.
///
/// Made by [`Message::new`], [`Message::json`] or [`Message::tombstone`]; the methods named like fields set what is
/// optional.
///
/// ```
/// # let (transfer, command) = (uuid::Uuid::now_v7(), uuid::Uuid::now_v7());
/// let message = outbox::Message::new("account", "a1", 7, "account.debited", vec![8, 5])
///     .source("/bank")
///     .data_schema("bank.events.v1.AccountDebited")
///     .correlated(transfer, command)
///     .metadata("tenant", "t1");
/// assert_eq!(message.metadata, serde_json::json!({"tenant": "t1"}));
/// ```
#[derive(Debug, Clone, PartialEq, Insertable)]
#[diesel(table_name = schema::outbox)]
// NULL rather than DEFAULT, with which diesel would prepare every insert anew.
#[diesel(treat_none_as_default_value = false)]
#[diesel(check_for_backend(Pg))]
#[must_use = "a message does nothing until it is appended"]
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

    /// The same with `payload` as JSON.
    ///
    /// # Errors
    /// When `payload` has no form in JSON: a map whose keys are not strings, or a `Serialize` that fails.
    pub fn json(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        aggregate_version: i64,
        event_type: impl Into<String>,
        payload: &(impl Serialize + ?Sized),
    ) -> serde_json::Result<Self> {
        let payload = serde_json::to_vec(payload)?;
        let message = Self::new(
            aggregate_type,
            aggregate_id,
            aggregate_version,
            event_type,
            payload,
        );
        Ok(message.content_type("application/json"))
    }

    /// A message without a payload: on a compacted topic Kafka forgets the entity's earlier records by it.
    pub fn tombstone(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        aggregate_version: i64,
        event_type: impl Into<String>,
    ) -> Self {
        Self {
            payload: None,
            ..Self::new(
                aggregate_type,
                aggregate_id,
                aggregate_version,
                event_type,
                Vec::new(),
            )
        }
    }

    /// Who emits it: `/order-svc`.
    pub fn source(self, source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            ..self
        }
    }

    /// The topic, instead of the one that the relay's template gives.
    pub fn topic(self, topic: impl Into<String>) -> Self {
        Self {
            topic: Some(topic.into()),
            ..self
        }
    }

    /// Media type of the payload, where it is neither Protobuf nor JSON.
    pub fn content_type(self, content_type: impl Into<String>) -> Self {
        Self {
            content_type: content_type.into(),
            ..self
        }
    }

    /// Full name of the payload's schema: `shop.order.events.v1.OrderPlaced`.
    pub fn data_schema(self, name: impl Into<String>) -> Self {
        Self {
            data_schema: Some(name.into()),
            ..self
        }
    }

    /// The business process that it belongs to, and the event or command that caused it.
    pub fn correlated(self, correlation_id: Uuid, causation_id: impl Into<Option<Uuid>>) -> Self {
        Self {
            correlation_id: Some(correlation_id),
            causation_id: causation_id.into(),
            ..self
        }
    }

    /// The W3C trace context of the command, as its headers have it.
    pub fn trace(self, traceparent: impl Into<String>, tracestate: Option<String>) -> Self {
        Self {
            traceparent: Some(traceparent.into()),
            tracestate,
            ..self
        }
    }

    /// Adds a header `meta-<name>`.
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        // Whatever else was assigned to the field, PostgreSQL refuses.
        if let Some(object) = self.metadata.as_object_mut() {
            object.insert(name.into(), value.into().into());
        }
        self
    }
}

/// Appends messages within the caller's transaction, ids in the order of the slice. A shared connection, so that it can be sent
/// together with other statements.
///
/// # Errors
/// Whatever PostgreSQL says; the caller's transaction must then be rolled back.
pub async fn append(conn: &AsyncPgConnection, messages: &[Message]) -> QueryResult<()> {
    use diesel_async::RunQueryDsl as _;
    for messages in messages.chunks(ROWS_PER_STATEMENT) {
        let insert = diesel::insert_into(schema::outbox::table);
        match messages {
            // The usual case; unlike an insert of several rows, its statement is prepared once per connection.
            [message] => insert.values(message).execute(&mut &*conn).await?,
            _ => insert.values(messages).execute(&mut &*conn).await?,
        };
    }
    Ok(())
}

/// [`append`] for diesel without async: a `PgConnection`, or whatever wraps one.
///
/// # Errors
/// Whatever PostgreSQL says; the caller's transaction must then be rolled back.
pub fn append_blocking(conn: &mut impl Connection<Backend = Pg>, messages: &[Message]) -> QueryResult<()> {
    use diesel::RunQueryDsl as _;
    for messages in messages.chunks(ROWS_PER_STATEMENT) {
        let insert = diesel::insert_into(schema::outbox::table);
        match messages {
            [message] => insert.values(message).execute(conn)?,
            _ => insert.values(messages).execute(conn)?,
        };
    }
    Ok(())
}
