//! The event store of a service: the append-only history of its entities.
//!
//! [`append`] writes the history and the outbox together, so that what is remembered and what is published cannot
//! differ. [`load`] reads an entity's history back.

use chrono::{DateTime, Utc};
use diesel::prelude::{ExpressionMethods, Insertable, QueryDsl, Queryable, Selectable, SelectableHelper};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use uuid::Uuid;

pub mod verify;

/// Creates the table of events. [`outbox::MIGRATIONS`] are needed too.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../../migrations/event-store");

/// The table, for services that check their history as a whole.
pub mod schema {
    diesel::table! {
        events (entity_type, entity_id, version) {
            entity_type -> Text,
            entity_id -> Text,
            version -> BigInt,
            event_id -> Uuid,
            event_type -> Text,
            schema_version -> Integer,
            payload -> Binary,
            occurred_at -> Timestamptz,
            correlation_id -> Uuid,
            causation_id -> Nullable<Uuid>,
            traceparent -> Nullable<Text>,
        }
    }
}

use schema::events;

/// The entity that events belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    pub entity_type: &'static str,
    pub entity_id: String,
    /// The topic of its events, where it is not `events.<entity type>`.
    pub topic: Option<&'static str>,
}

/// An event that has just been decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub event_type: &'static str,
    /// Major version of the payload's schema, from 1.
    pub schema_version: i32,
    /// Full name of the payload's message.
    pub data_schema: Option<&'static str>,
    /// Protobuf.
    pub payload: Vec<u8>,
    pub occurred_at: DateTime<Utc>,
}

/// Why events happened, the same for all events of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Who emits them: `/order-svc`.
    pub source: &'static str,
    /// Joins everything that happens for one business process.
    pub correlation_id: Uuid,
    /// The event or request that caused them.
    pub causation_id: Option<Uuid>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

/// An event of the history.
#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable)]
#[diesel(table_name = events)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub struct StoredEvent {
    pub event_id: Uuid,
    pub version: i64,
    pub event_type: String,
    pub schema_version: i32,
    pub payload: Vec<u8>,
    pub occurred_at: DateTime<Utc>,
    pub correlation_id: Uuid,
    pub causation_id: Option<Uuid>,
    pub traceparent: Option<String>,
}

/// Why events were not appended. The caller's transaction must be rolled back.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("an entity has moved on from the version that was expected")]
    Conflict,
    #[error("the event store could not be written")]
    Database(#[source] DieselError),
}

#[derive(Insertable)]
#[diesel(table_name = events)]
// NULL rather than DEFAULT, with which diesel would prepare every insert anew.
#[diesel(treat_none_as_default_value = false)]
#[diesel(check_for_backend(diesel::pg::Pg))]
struct EventRow<'a> {
    entity_type: &'a str,
    entity_id: &'a str,
    version: i64,
    event_id: Uuid,
    event_type: &'a str,
    schema_version: i32,
    payload: &'a [u8],
    occurred_at: DateTime<Utc>,
    correlation_id: Uuid,
    causation_id: Option<Uuid>,
    traceparent: Option<&'a str>,
}

/// An event of an entity on its way into the history.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    pub entity: &'a Entity,
    /// The entity's version after it.
    pub version: i64,
    pub event: &'a NewEvent,
    pub cause: &'a Cause,
}

/// PostgreSQL takes 65,535 parameters a statement, and a row has 11.
const ROWS_PER_STATEMENT: usize = 1_000;

/// Appends events to the history of an entity at `expected_version` (0: it has none yet), and to the outbox, within the
/// caller's transaction. Returns the ids of the events. The caller has locked the entity, or writes its first row in the same
/// transaction: with a shared connection, all of that can be sent together.
///
/// # Errors
/// [`AppendError::Conflict`] when the entity already has a later version.
pub async fn append(
    conn: &AsyncPgConnection,
    entity: &Entity,
    expected_version: i64,
    new_events: &[NewEvent],
    cause: &Cause,
) -> Result<Vec<Uuid>, AppendError> {
    let entries: Vec<Entry<'_>> = (expected_version + 1..)
        .zip(new_events)
        .map(|(version, event)| Entry {
            entity,
            version,
            event,
            cause,
        })
        .collect();
    append_all(conn, &entries).await
}

/// The same for events of many entities, each entity's versions ascending.
///
/// # Errors
/// [`AppendError::Conflict`] when one of the entities already has a later version.
pub async fn append_all(conn: &AsyncPgConnection, entries: &[Entry<'_>]) -> Result<Vec<Uuid>, AppendError> {
    let ids: Vec<Uuid> = entries.iter().map(|_| Uuid::now_v7()).collect();
    let rows: Vec<EventRow<'_>> = entries
        .iter()
        .zip(&ids)
        .map(|(entry, event_id)| EventRow {
            entity_type: entry.entity.entity_type,
            entity_id: &entry.entity.entity_id,
            version: entry.version,
            event_id: *event_id,
            event_type: entry.event.event_type,
            schema_version: entry.event.schema_version,
            payload: &entry.event.payload,
            occurred_at: entry.event.occurred_at,
            correlation_id: entry.cause.correlation_id,
            causation_id: entry.cause.causation_id,
            traceparent: entry.cause.traceparent.as_deref(),
        })
        .collect();
    let messages: Vec<outbox::Message> = rows
        .iter()
        .zip(entries)
        .map(
            |(
                row,
                Entry {
                    entity, event, cause, ..
                },
            )| outbox::Message {
                event_id: row.event_id,
                aggregate_type: row.entity_type.to_owned(),
                aggregate_id: row.entity_id.to_owned(),
                aggregate_version: row.version,
                event_type: row.event_type.to_owned(),
                schema_version: row.schema_version,
                topic: entity.topic.map(str::to_owned),
                source: cause.source.to_owned(),
                content_type: "application/protobuf".to_owned(),
                data_schema: event.data_schema.map(str::to_owned),
                correlation_id: Some(row.correlation_id),
                causation_id: row.causation_id,
                traceparent: cause.traceparent.clone(),
                tracestate: cause.tracestate.clone(),
                metadata: serde_json::Value::Object(serde_json::Map::new()),
                occurred_at: row.occurred_at,
                payload: Some(event.payload.clone()),
            },
        )
        .collect();
    let history = async {
        for rows in rows.chunks(ROWS_PER_STATEMENT) {
            let insert = diesel::insert_into(events::table);
            let inserted = match rows {
                // Unlike an insert of several rows, this statement is prepared once per connection.
                [row] => insert.values(row).execute(&mut &*conn).await,
                rows => insert.values(rows).execute(&mut &*conn).await,
            };
            inserted.map_err(|error| match error {
                DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _) => AppendError::Conflict,
                error => AppendError::Database(error),
            })?;
        }
        Ok(())
    };
    let outbox = async {
        let appended = outbox::append(conn, &messages).await;
        appended.map_err(AppendError::Database)
    };
    // One round trip. After the first error PostgreSQL refuses the rest, so that the first one is what went wrong.
    tokio::try_join!(biased; history, outbox)?;
    Ok(ids)
}

/// The events of an entity after `after_version`, oldest first, at most `limit`.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn load(
    conn: &mut AsyncPgConnection,
    entity_type: &str,
    entity_id: &str,
    after_version: i64,
    limit: i64,
) -> diesel::QueryResult<Vec<StoredEvent>> {
    events::table
        .filter(events::entity_type.eq(entity_type))
        .filter(events::entity_id.eq(entity_id))
        .filter(events::version.gt(after_version))
        .order(events::version)
        .limit(limit)
        .select(StoredEvent::as_select())
        .load(conn)
        .await
}
