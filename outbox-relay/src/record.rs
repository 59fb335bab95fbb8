//! A row of the outbox as a Kafka record.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use envelope::Envelope;
use rdkafka::message::{Header, OwnedHeaders};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::config::TopicTemplate;
use crate::source::column;

/// What Kafka adds to a record in a batch of its own, at the most: batch header, lengths, offsets, timestamps.
const RECORD_OVERHEAD: usize = 128;

/// Why a row cannot become a record, whatever is tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("column {column} cannot be read")]
    Unreadable {
        column: &'static str,
        source: tokio_postgres::Error,
    },
    #[error("its metadata must be an object of strings")]
    Metadata,
    #[error("its topic {0:?} is not a name that Kafka takes")]
    Topic(String),
}

/// A record about to be handed to the producer; borrows from its row.
pub(crate) struct Record<'a> {
    pub(crate) id: i64,
    pub(crate) topic: String,
    pub(crate) key: &'a str,
    pub(crate) payload: Option<&'a [u8]>,
    /// Taken when the record is handed over.
    pub(crate) headers: Option<OwnedHeaders>,
    pub(crate) occurred_at: DateTime<Utc>,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: &'a str,
    pub(crate) version: i64,
    pub(crate) traceparent: Option<&'a str>,
    pub(crate) tracestate: Option<&'a str>,
    /// Upper bound of its size on the wire, uncompressed.
    pub(crate) bytes: usize,
}

impl<'a> Record<'a> {
    /// Makes the record of a row. The same row always gives the same bytes.
    ///
    /// # Errors
    /// [`RecordError`] when no try can ever succeed.
    pub(crate) fn from_row(row: &'a Row, topics: &TopicTemplate) -> Result<Self, RecordError> {
        let text = |index, column| -> Result<&'a str, RecordError> {
            row.try_get(index)
                .map_err(|source| RecordError::Unreadable { column, source })
        };
        let optional = |index, column| -> Result<Option<&'a str>, RecordError> {
            row.try_get(index)
                .map_err(|source| RecordError::Unreadable { column, source })
        };
        let key = text(column::AGGREGATE_ID, "aggregate_id")?;
        let entity_type = text(column::AGGREGATE_TYPE, "aggregate_type")?;
        let topic = match optional(column::TOPIC, "topic")? {
            Some(topic) => topic.to_owned(),
            None => topics.topic_of(entity_type),
        };
        if !is_topic_name(&topic) {
            return Err(RecordError::Topic(topic));
        }
        let payload: Option<&[u8]> =
            row.try_get(column::PAYLOAD)
                .map_err(|source| RecordError::Unreadable {
                    column: "payload",
                    source,
                })?;
        let metadata: serde_json::Value =
            row.try_get(column::METADATA)
                .map_err(|source| RecordError::Unreadable {
                    column: "metadata",
                    source,
                })?;
        let occurred_at = row
            .try_get(column::OCCURRED_AT)
            .map_err(|source| RecordError::Unreadable {
                column: "occurred_at",
                source,
            })?;
        let envelope = Envelope {
            event_id: row.get(column::EVENT_ID),
            event_type: text(column::EVENT_TYPE, "event_type")?,
            source: text(column::SOURCE, "source")?,
            entity_type,
            entity_id: key,
            version: row.get(column::AGGREGATE_VERSION),
            schema_version: row.get(column::SCHEMA_VERSION),
            occurred_at,
            content_type: text(column::CONTENT_TYPE, "content_type")?,
            data_schema: optional(column::DATA_SCHEMA, "data_schema")?,
            correlation_id: row.get(column::CORRELATION_ID),
            causation_id: row.get(column::CAUSATION_ID),
            traceparent: optional(column::TRACEPARENT, "traceparent")?,
            tracestate: optional(column::TRACESTATE, "tracestate")?,
            outbox_id: Some(row.get(column::ID)),
            metadata: metadata_of(metadata)?,
        };
        let mut headers = OwnedHeaders::new_with_capacity(16);
        let mut bytes = RECORD_OVERHEAD + key.len() + payload.map_or(0, <[u8]>::len);
        envelope.write(|name, value| {
            bytes += name.len() + value.len() + 4;
            headers = std::mem::take(&mut headers).insert(Header {
                key: name,
                value: Some(value),
            });
        });
        Ok(Self {
            id: row.get(column::ID),
            topic,
            key,
            payload,
            headers: Some(headers),
            occurred_at,
            event_id: envelope.event_id,
            event_type: envelope.event_type,
            version: envelope.version,
            traceparent: envelope.traceparent,
            tracestate: envelope.tracestate,
            bytes,
        })
    }
}

fn metadata_of(json: serde_json::Value) -> Result<BTreeMap<String, String>, RecordError> {
    let serde_json::Value::Object(object) = json else {
        return Err(RecordError::Metadata);
    };
    object
        .into_iter()
        .map(|(name, value)| match value {
            serde_json::Value::String(value) => Ok((name, value)),
            _ => Err(RecordError::Metadata),
        })
        .collect()
}

fn is_topic_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 249
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_names_are_kafkas() {
        for good in ["events.order", "a", "A-b_c.9"] {
            assert!(is_topic_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a b", "ä", &"x".repeat(250)] {
            assert!(!is_topic_name(bad), "{bad}");
        }
    }

    #[test]
    fn metadata_is_an_object_of_strings() {
        assert!(metadata_of(serde_json::json!({"a": "b"})).is_ok());
        assert!(metadata_of(serde_json::json!({"a": 1})).is_err());
        assert!(metadata_of(serde_json::json!([])).is_err());
    }
}
