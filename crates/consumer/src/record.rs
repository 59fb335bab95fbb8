//! One record of a topic, copied out of the Kafka client and decoded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use envelope::{Envelope, EnvelopeError, header};
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Headers as _};

use crate::config::Start;

/// The longest key that names an entity, in bytes: it has to fit into an index.
pub(crate) const MAX_KEY_BYTES: usize = 512;

/// An event as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Everything about the event but its payload. Its entity id is the record's key; its version is 0 where the topic is read by event
    /// id.
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

impl Record {
    /// The trace that it belongs to: the 32 hexadecimal digits in its `traceparent`.
    pub fn trace_id(&self) -> Option<&str> {
        let id = self.envelope.traceparent.as_deref()?.split('-').nth(1)?;
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (id.len() == 32 && id.bytes().all(is_digit) && id.bytes().any(|byte| byte != b'0')).then_some(id)
    }
}

/// Why a record is none that a handler could be given. Values are not echoed: they may be personal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("it has no value")]
    NoValue,
    #[error("it has no key")]
    NoKey,
    #[error("its key is no text of 1 to {MAX_KEY_BYTES} bytes")]
    UnusableKey,
    #[error("its key is not the entity id of its envelope")]
    KeyIsNotEntity,
    #[error("it has {bytes} bytes, and {limit} are allowed")]
    TooLarge { bytes: usize, limit: usize },
    #[error("its headers cannot be read")]
    Headers,
    #[error("its headers are no envelope")]
    Envelope(#[from] EnvelopeError),
    #[error("its headers hold a zero byte")]
    ZeroByte,
}

/// Name and value of a header.
pub(crate) type Header = (String, Option<Vec<u8>>);

/// A record that cannot be decoded, as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawRecord {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp: Option<DateTime<Utc>>,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    /// Empty when they cannot be read at all.
    pub(crate) headers: Vec<Header>,
}

/// Either, from Kafka or from the table of parked records.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are records, and a box would cost each an allocation"
)]
pub(crate) enum Decoded {
    Record(Record),
    Not(Box<RawRecord>, RecordError),
}

impl RawRecord {
    /// Copies `message`.
    pub(crate) fn copy(topic: &Arc<str>, message: &BorrowedMessage<'_>) -> Self {
        // The client panics on a header whose name is not UTF-8: one such record must not end the process.
        let headers = catch_unwind(AssertUnwindSafe(|| {
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            headers
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect()
        }));
        Self {
            topic: Arc::clone(topic),
            partition: message.partition(),
            offset: message.offset(),
            timestamp: timestamp(message),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: headers.unwrap_or_default(),
        }
    }

    /// What its key names; nothing when it names nothing that could be told from others.
    pub(crate) fn entity(&self) -> Option<&str> {
        usable_key(self.key.as_deref()?)
    }

    /// Decodes it, after it was kept somewhere.
    pub(crate) fn decode(self, limit: usize, start: Start) -> Decoded {
        let headers = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_deref()));
        match envelope_of(self.key.as_deref(), self.value.as_deref(), limit, || {
            Ok(read_envelope(headers, start)?)
        }) {
            Ok(envelope) => Decoded::Record(Record {
                envelope,
                payload: self.value.unwrap_or_default(),
                topic: self.topic,
                partition: self.partition,
                offset: self.offset,
                timestamp: self.timestamp,
            }),
            Err(error) => Decoded::Not(Box::new(self), error),
        }
    }
}

/// Copies and decodes `message`, which may have `limit` bytes of key and value.
pub(crate) fn decode(topic: &Arc<str>, message: &BorrowedMessage<'_>, limit: usize, start: Start) -> Decoded {
    let read = || {
        catch_unwind(AssertUnwindSafe(|| {
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            read_envelope(headers.map(|header| (header.key, header.value)), start)
        }))
        .map_err(|_| RecordError::Headers)?
        .map_err(RecordError::Envelope)
    };
    match envelope_of(message.key(), message.payload(), limit, read) {
        Ok(envelope) => Decoded::Record(Record {
            envelope,
            payload: message.payload().unwrap_or_default().to_vec(),
            topic: Arc::clone(topic),
            partition: message.partition(),
            offset: message.offset(),
            timestamp: timestamp(message),
        }),
        Err(error) => Decoded::Not(Box::new(RawRecord::copy(topic, message)), error),
    }
}

fn read_envelope<'a>(
    headers: impl Iterator<Item = (&'a str, Option<&'a [u8]>)>,
    start: Start,
) -> Result<Envelope, EnvelopeError> {
    match start {
        Start::Beginning | Start::Baseline => Envelope::read(headers),
        Start::Uncounted => {
            Envelope::read_uncounted(headers.filter(|(name, _)| *name != header::AGGREGATE_VERSION))
        }
    }
}

fn envelope_of(
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    limit: usize,
    read: impl FnOnce() -> Result<Envelope, RecordError>,
) -> Result<Envelope, RecordError> {
    let key = key.ok_or(RecordError::NoKey)?;
    let value = value.ok_or(RecordError::NoValue)?;
    let bytes = key.len() + value.len();
    if bytes > limit {
        return Err(RecordError::TooLarge { bytes, limit });
    }
    let entity = usable_key(key).ok_or(RecordError::UnusableKey)?;
    let envelope = read()?;
    if envelope.entity_id != entity {
        return Err(RecordError::KeyIsNotEntity);
    }
    if has_zero_byte(&envelope) {
        return Err(RecordError::ZeroByte);
    }
    Ok(envelope)
}

/// PostgreSQL has no text with a zero byte.
fn has_zero_byte(envelope: &Envelope) -> bool {
    let optional = [&envelope.data_schema, &envelope.traceparent, &envelope.tracestate];
    [
        &envelope.event_type,
        &envelope.source,
        &envelope.entity_type,
        &envelope.content_type,
    ]
    .into_iter()
    .chain(optional.into_iter().flatten())
    .chain(envelope.metadata.iter().flat_map(|(name, value)| [name, value]))
    .any(|text| text.contains('\0'))
}

fn usable_key(key: &[u8]) -> Option<&str> {
    let usable = (1..=MAX_KEY_BYTES).contains(&key.len()) && !key.contains(&0);
    usable.then(|| std::str::from_utf8(key).ok()).flatten()
}

fn timestamp(message: &BorrowedMessage<'_>) -> Option<DateTime<Utc>> {
    message
        .timestamp()
        .to_millis()
        .and_then(DateTime::from_timestamp_millis)
}

/// Bytes that holding `message` takes, roughly: key, value and a typical set of headers.
pub(crate) fn size(message: &BorrowedMessage<'_>) -> usize {
    const HEADERS_AND_OVERHEAD: usize = 1024;
    message.key_len() + message.payload_len() + HEADERS_AND_OVERHEAD
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Of the first event of an entity.
    pub(crate) fn envelope(entity_id: &str) -> Envelope {
        Envelope {
            event_id: uuid::Uuid::nil(),
            event_type: "order.placed".to_owned(),
            source: "/test".to_owned(),
            entity_type: "order".to_owned(),
            entity_id: entity_id.to_owned(),
            version: 1,
            schema_version: 1,
            occurred_at: DateTime::UNIX_EPOCH,
            content_type: "application/protobuf".to_owned(),
            data_schema: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            outbox_id: None,
            metadata: BTreeMap::new(),
        }
    }

    fn raw(key: Option<&[u8]>, value: Option<&[u8]>) -> RawRecord {
        let mut headers = Vec::new();
        envelope("a").write(|name, value| headers.push((name.to_owned(), Some(value.to_vec()))));
        RawRecord {
            topic: "t".into(),
            partition: 0,
            offset: 0,
            timestamp: None,
            key: key.map(<[u8]>::to_vec),
            value: value.map(<[u8]>::to_vec),
            headers,
        }
    }

    #[track_caller]
    fn refused(raw: RawRecord) -> RecordError {
        match raw.decode(100, Start::Beginning) {
            Decoded::Not(_, error) => error,
            Decoded::Record(record) => panic!("{record:?}"),
        }
    }

    #[test]
    fn a_record_is_read_or_says_why_not() {
        assert!(
            matches!(raw(Some(b"a"), Some(b"x")).decode(100, Start::Beginning), Decoded::Record(record) if record.payload == b"x")
        );
        assert_eq!(refused(raw(None, Some(b"x"))), RecordError::NoKey);
        assert_eq!(refused(raw(Some(b"a"), None)), RecordError::NoValue);
        assert_eq!(refused(raw(Some(b"b"), Some(b"x"))), RecordError::KeyIsNotEntity);
        let large = RecordError::TooLarge {
            bytes: 101,
            limit: 100,
        };
        assert_eq!(refused(raw(Some(b"a"), Some(&[0; 100]))), large);
        for key in [&b""[..], b"a\0b", b"\xff", &[b'a'; MAX_KEY_BYTES + 1]] {
            let limit = 10_000;
            let Decoded::Not(raw, error) = raw(Some(key), Some(b"x")).decode(limit, Start::Beginning) else {
                panic!("{key:?}")
            };
            assert_eq!((error, raw.entity()), (RecordError::UnusableKey, None));
        }
    }

    #[test]
    fn versions_are_not_looked_at_where_the_source_does_not_count() {
        for version in [Some(b"3".to_vec()), Some(b"x".to_vec()), None] {
            let mut raw = raw(Some(b"a"), Some(b"x"));
            for (name, value) in &mut raw.headers {
                if name == header::AGGREGATE_VERSION {
                    value.clone_from(&version);
                }
            }
            let Decoded::Record(record) = raw.decode(100, Start::Uncounted) else {
                panic!("{version:?}")
            };
            assert_eq!(record.envelope.version, 0);
        }
    }

    #[test]
    fn a_trace_id_is_one_or_there_is_none() {
        const ID: &str = "0af7651916cd43dd8448eb211c80319c";
        let id_of = |traceparent: Option<String>| {
            let Decoded::Record(mut record) = raw(Some(b"a"), Some(b"x")).decode(100, Start::Beginning)
            else {
                panic!("it is an event")
            };
            record.envelope.traceparent = traceparent;
            record.trace_id().map(str::to_owned)
        };
        assert_eq!(
            id_of(Some(format!("00-{ID}-b7ad6b7169203331-01"))).as_deref(),
            Some(ID)
        );
        let zero = "0".repeat(32);
        for bad in ["", "00", &ID[1..], &ID.to_uppercase(), &zero] {
            assert_eq!(
                id_of(Some(format!("00-{bad}-b7ad6b7169203331-01"))),
                None,
                "{bad}"
            );
        }
        assert_eq!(id_of(None), None);
    }

    #[test]
    fn what_the_database_cannot_keep_is_no_event() {
        let mut zero = raw(Some(b"a"), Some(b"x"));
        for (name, value) in &mut zero.headers {
            if name == header::CE_TYPE {
                *value = Some(b"a\0b".to_vec());
            }
        }
        assert_eq!(refused(zero), RecordError::ZeroByte);
    }
}
