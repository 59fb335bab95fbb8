//! One record of a topic, copied out of the Kafka client and decoded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use envelope::{Envelope, EnvelopeError};
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Headers as _};

/// An event as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Everything about the event but its payload. Its entity id is the record's key.
    pub envelope: Envelope,
    /// The payload, in the format that the envelope names.
    pub payload: Vec<u8>,
    /// Where it was read.
    pub topic: Arc<str>,
    /// Where it was read.
    pub partition: i32,
    /// Where it was read.
    pub offset: i64,
    /// When Kafka or the producer stamped it, as the topic is configured.
    pub timestamp: Option<DateTime<Utc>>,
}

/// Why a record is none that a handler could be given. Values are not echoed: they may be personal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("it has no value")]
    NoValue,
    #[error("it has no key")]
    NoKey,
    #[error("its key is not the entity id of its envelope")]
    KeyIsNotEntity,
    #[error("its headers cannot be read")]
    Headers,
    #[error("its headers are no envelope")]
    Envelope(#[from] EnvelopeError),
}

/// Copies and decodes `message`.
pub(crate) fn decode(topic: &Arc<str>, message: &BorrowedMessage<'_>) -> Result<Record, RecordError> {
    let payload = message.payload().ok_or(RecordError::NoValue)?;
    let key = message.key().ok_or(RecordError::NoKey)?;
    // The client panics on a header whose name is not UTF-8: one such record must not end the process.
    let envelope =
        catch_unwind(AssertUnwindSafe(|| read_envelope(message))).map_err(|_| RecordError::Headers)??;
    if envelope.entity_id.as_bytes() != key {
        return Err(RecordError::KeyIsNotEntity);
    }
    Ok(Record {
        envelope,
        payload: payload.to_vec(),
        topic: Arc::clone(topic),
        partition: message.partition(),
        offset: message.offset(),
        timestamp: message
            .timestamp()
            .to_millis()
            .and_then(DateTime::from_timestamp_millis),
    })
}

/// Bytes that holding `message` takes, roughly: key, value and a typical set of headers.
pub(crate) fn size(message: &BorrowedMessage<'_>) -> usize {
    const HEADERS_AND_OVERHEAD: usize = 1024;
    message.key_len() + message.payload_len() + HEADERS_AND_OVERHEAD
}

fn read_envelope(message: &BorrowedMessage<'_>) -> Result<Envelope, EnvelopeError> {
    let headers = message.headers();
    Envelope::read(
        headers
            .into_iter()
            .flat_map(|headers| headers.iter())
            .map(|header| (header.key, header.value)),
    )
}
