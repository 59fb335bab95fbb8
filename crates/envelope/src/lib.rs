//! The envelope of an event on Kafka: CloudEvents 1.0 in binary mode, plus what ordering, tracing and replay need.
//!
//! The relay writes these headers and consumers read them. Nothing here does I/O or knows a Kafka client: headers come
//! in and go out as names and bytes.

pub mod time;

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

/// Names of the Kafka headers.
pub mod header {
    /// CloudEvents specification version, always [`super::SPEC_VERSION`].
    pub const CE_SPECVERSION: &str = "ce_specversion";
    /// Event id, a UUID.
    pub const CE_ID: &str = "ce_id";
    /// Who emitted it: `/order-svc`.
    pub const CE_SOURCE: &str = "ce_source";
    /// Event type: `order.placed`.
    pub const CE_TYPE: &str = "ce_type";
    /// `<entity type>/<entity id>`.
    pub const CE_SUBJECT: &str = "ce_subject";
    /// When it happened, RFC 3339 in UTC.
    pub const CE_TIME: &str = "ce_time";
    /// Full name of the payload's schema.
    pub const CE_DATASCHEMA: &str = "ce_dataschema";
    /// Media type of the payload.
    pub const CONTENT_TYPE: &str = "content-type";
    /// W3C trace context of the command that caused the event.
    pub const TRACEPARENT: &str = "traceparent";
    /// Vendor part of the trace context.
    pub const TRACESTATE: &str = "tracestate";
    /// Version of the entity: counts its events from 1 without gaps.
    pub const AGGREGATE_VERSION: &str = "aggregate-version";
    /// Major version of the payload's schema.
    pub const SCHEMA_VERSION: &str = "schema-version";
    /// Joins everything that happens for one business process.
    pub const CORRELATION_ID: &str = "correlation-id";
    /// The event or command that caused this one.
    pub const CAUSATION_ID: &str = "causation-id";
    /// Id of the outbox row.
    pub const OUTBOX_ID: &str = "outbox-id";
    /// Prefix of metadata that the writer added.
    pub const META_PREFIX: &str = "meta-";
}

/// The CloudEvents version that is written and accepted.
pub const SPEC_VERSION: &str = "1.0";
/// Media type of Protobuf payloads.
pub const CONTENT_TYPE_PROTOBUF: &str = "application/protobuf";
/// Media type of JSON payloads.
pub const CONTENT_TYPE_JSON: &str = "application/json";

/// Everything about an event but its payload. Text is owned, or borrowed from wherever the event is written from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope<S = String> {
    pub event_id: Uuid,
    pub event_type: S,
    pub source: S,
    pub entity_type: S,
    pub entity_id: S,
    /// From 1; 0: its source does not count, which only [`Envelope::read_uncounted`] accepts.
    pub version: i64,
    /// Major version of the payload's schema, from 1.
    pub schema_version: i32,
    pub occurred_at: DateTime<Utc>,
    pub content_type: S,
    pub data_schema: Option<S>,
    pub correlation_id: Option<Uuid>,
    pub causation_id: Option<Uuid>,
    pub traceparent: Option<S>,
    pub tracestate: Option<S>,
    /// Id of the outbox row; absent when the event did not come through an outbox.
    pub outbox_id: Option<i64>,
    pub metadata: BTreeMap<String, String>,
}

/// Why headers are not an envelope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("header {0} is missing")]
    Missing(&'static str),
    #[error("header {0} appears more than once")]
    Repeated(&'static str),
    #[error("header {name} is not {expected}")]
    Malformed {
        name: &'static str,
        expected: &'static str,
    },
}

impl<S: AsRef<str>> Envelope<S> {
    /// Calls `put` with each header's name and value, in a fixed order: the same envelope always gives the same bytes.
    pub fn write(&self, mut put: impl FnMut(&str, &[u8])) {
        use header::*;
        put(CE_SPECVERSION, SPEC_VERSION.as_bytes());
        put(
            CE_ID,
            self.event_id
                .as_hyphenated()
                .encode_lower(&mut Uuid::encode_buffer())
                .as_bytes(),
        );
        put(CE_SOURCE, self.source.as_ref().as_bytes());
        put(CE_TYPE, self.event_type.as_ref().as_bytes());
        put(
            CE_SUBJECT,
            format!("{}/{}", self.entity_type.as_ref(), self.entity_id.as_ref()).as_bytes(),
        );
        put(
            CE_TIME,
            self.occurred_at
                .to_rfc3339_opts(SecondsFormat::Micros, true)
                .as_bytes(),
        );
        if let Some(schema) = &self.data_schema {
            put(CE_DATASCHEMA, schema.as_ref().as_bytes());
        }
        put(CONTENT_TYPE, self.content_type.as_ref().as_bytes());
        if self.version != 0 {
            put(AGGREGATE_VERSION, self.version.to_string().as_bytes());
        }
        put(SCHEMA_VERSION, self.schema_version.to_string().as_bytes());
        if let Some(id) = &self.correlation_id {
            put(
                CORRELATION_ID,
                id.as_hyphenated()
                    .encode_lower(&mut Uuid::encode_buffer())
                    .as_bytes(),
            );
        }
        if let Some(id) = &self.causation_id {
            put(
                CAUSATION_ID,
                id.as_hyphenated()
                    .encode_lower(&mut Uuid::encode_buffer())
                    .as_bytes(),
            );
        }
        if let Some(trace) = &self.traceparent {
            put(TRACEPARENT, trace.as_ref().as_bytes());
        }
        if let Some(state) = &self.tracestate {
            put(TRACESTATE, state.as_ref().as_bytes());
        }
        if let Some(id) = self.outbox_id {
            put(OUTBOX_ID, id.to_string().as_bytes());
        }
        for (name, value) in &self.metadata {
            put(&format!("{META_PREFIX}{name}"), value.as_bytes());
        }
    }
}

impl Envelope {
    /// Reads an envelope from a record's headers; unknown headers are passed over.
    ///
    /// # Errors
    /// [`EnvelopeError`] names the first header that is missing, repeated or malformed. Values are not echoed.
    pub fn read<'a>(
        headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>,
    ) -> Result<Self, EnvelopeError> {
        let envelope = Self::read_uncounted(headers)?;
        if envelope.version == 0 {
            return Err(EnvelopeError::Missing(header::AGGREGATE_VERSION));
        }
        Ok(envelope)
    }

    /// The same of a source that need not count the versions of its entities: the version is 0 where there is none.
    ///
    /// # Errors
    /// As of [`Envelope::read`].
    pub fn read_uncounted<'a>(
        headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>,
    ) -> Result<Self, EnvelopeError> {
        use header::*;
        const KNOWN: [&str; 15] = [
            CE_SPECVERSION,
            CE_ID,
            CE_SOURCE,
            CE_TYPE,
            CE_SUBJECT,
            CE_TIME,
            CE_DATASCHEMA,
            CONTENT_TYPE,
            AGGREGATE_VERSION,
            SCHEMA_VERSION,
            CORRELATION_ID,
            CAUSATION_ID,
            TRACEPARENT,
            TRACESTATE,
            OUTBOX_ID,
        ];
        let mut found = Found {
            values: [None; KNOWN.len()],
            names: KNOWN,
        };
        let mut metadata = BTreeMap::new();
        for (name, value) in headers {
            let Some(value) = value else { continue };
            if let Some(slot) = KNOWN.iter().position(|known| *known == name) {
                let text = std::str::from_utf8(value).map_err(|_| EnvelopeError::Malformed {
                    name: KNOWN[slot],
                    expected: "UTF-8",
                })?;
                if found.values[slot].replace(text).is_some() {
                    return Err(EnvelopeError::Repeated(KNOWN[slot]));
                }
            } else if let Some(name) = name.strip_prefix(META_PREFIX) {
                metadata.insert(name.to_owned(), String::from_utf8_lossy(value).into_owned());
            }
        }

        if found.required(CE_SPECVERSION)? != SPEC_VERSION {
            return Err(EnvelopeError::Malformed {
                name: CE_SPECVERSION,
                expected: "1.0",
            });
        }
        let (entity_type, entity_id) = found
            .required(CE_SUBJECT)?
            .split_once('/')
            .filter(|(kind, id)| !kind.is_empty() && !id.is_empty())
            .ok_or(EnvelopeError::Malformed {
                name: CE_SUBJECT,
                expected: "<entity type>/<entity id>",
            })?;
        let version: Option<i64> = found.optional_as(AGGREGATE_VERSION, "a positive integer")?;
        if version.is_some_and(|version| version < 1) {
            return Err(EnvelopeError::Malformed {
                name: AGGREGATE_VERSION,
                expected: "a positive integer",
            });
        }
        let schema_version: i32 = found
            .optional_as(SCHEMA_VERSION, "a positive integer")?
            .unwrap_or(1);
        if schema_version < 1 {
            return Err(EnvelopeError::Malformed {
                name: SCHEMA_VERSION,
                expected: "a positive integer",
            });
        }
        Ok(Self {
            event_id: found.required_as(CE_ID, "a UUID")?,
            event_type: found.required(CE_TYPE)?.to_owned(),
            source: found.required(CE_SOURCE)?.to_owned(),
            entity_type: entity_type.to_owned(),
            entity_id: entity_id.to_owned(),
            version: version.unwrap_or(0),
            schema_version,
            occurred_at: DateTime::parse_from_rfc3339(found.required(CE_TIME)?)
                .map_err(|_| EnvelopeError::Malformed {
                    name: CE_TIME,
                    expected: "an RFC 3339 time",
                })?
                .with_timezone(&Utc),
            content_type: found
                .optional(CONTENT_TYPE)
                .unwrap_or(CONTENT_TYPE_PROTOBUF)
                .to_owned(),
            data_schema: found.optional(CE_DATASCHEMA).map(str::to_owned),
            correlation_id: found.optional_as(CORRELATION_ID, "a UUID")?,
            causation_id: found.optional_as(CAUSATION_ID, "a UUID")?,
            traceparent: found.optional(TRACEPARENT).map(str::to_owned),
            tracestate: found.optional(TRACESTATE).map(str::to_owned),
            outbox_id: found.optional_as(OUTBOX_ID, "an integer")?,
            metadata,
        })
    }
}

/// The values found, by position of their names.
struct Found<'a, const N: usize> {
    names: [&'static str; N],
    values: [Option<&'a str>; N],
}

impl<'a, const N: usize> Found<'a, N> {
    fn optional(&self, name: &'static str) -> Option<&'a str> {
        self.names
            .iter()
            .position(|known| *known == name)
            .and_then(|slot| self.values[slot])
    }

    fn required(&self, name: &'static str) -> Result<&'a str, EnvelopeError> {
        self.optional(name).ok_or(EnvelopeError::Missing(name))
    }

    fn optional_as<T: std::str::FromStr>(
        &self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, EnvelopeError> {
        self.optional(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| EnvelopeError::Malformed { name, expected })
            })
            .transpose()
    }

    fn required_as<T: std::str::FromStr>(
        &self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<T, EnvelopeError> {
        self.optional_as(name, expected)?
            .ok_or(EnvelopeError::Missing(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Envelope {
        Envelope {
            event_id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001),
            event_type: "order.placed".into(),
            source: "/order-svc".into(),
            entity_type: "order".into(),
            entity_id: "a/b".into(),
            version: 3,
            schema_version: 2,
            occurred_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("in range"),
            content_type: CONTENT_TYPE_PROTOBUF.into(),
            data_schema: Some("shop.order.events.v2.OrderPlaced".into()),
            correlation_id: Some(Uuid::from_u128(7)),
            causation_id: None,
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            tracestate: None,
            outbox_id: Some(42),
            metadata: BTreeMap::from([("tenant".to_owned(), "t1".to_owned())]),
        }
    }

    fn written(envelope: &Envelope) -> Vec<(String, Vec<u8>)> {
        let mut headers = Vec::new();
        envelope.write(|name, value| headers.push((name.to_owned(), value.to_vec())));
        headers
    }

    fn read(headers: &[(String, Vec<u8>)]) -> Result<Envelope, EnvelopeError> {
        Envelope::read(
            headers
                .iter()
                .map(|(name, value)| (name.as_str(), Some(value.as_slice()))),
        )
    }

    #[test]
    fn what_is_written_is_read_back() {
        let envelope = sample();
        assert_eq!(read(&written(&envelope)), Ok(envelope));
    }

    #[test]
    fn every_required_header_is_missed_when_it_is_away() {
        use header::*;
        for name in [
            CE_SPECVERSION,
            CE_ID,
            CE_SOURCE,
            CE_TYPE,
            CE_SUBJECT,
            CE_TIME,
            AGGREGATE_VERSION,
        ] {
            let headers: Vec<_> = written(&sample())
                .into_iter()
                .filter(|(n, _)| n != name)
                .collect();
            assert_eq!(read(&headers), Err(EnvelopeError::Missing(name)));
        }
    }

    #[test]
    fn a_source_that_does_not_count_is_read_where_it_is_expected() {
        let uncounted = Envelope {
            version: 0,
            ..sample()
        };
        let headers = written(&uncounted);
        assert!(headers.iter().all(|(name, _)| name != header::AGGREGATE_VERSION));
        let borrowed = headers
            .iter()
            .map(|(name, value)| (name.as_str(), Some(value.as_slice())));
        assert_eq!(Envelope::read_uncounted(borrowed), Ok(uncounted));
    }

    #[test]
    fn a_repeated_header_is_refused() {
        let mut headers = written(&sample());
        headers.push((header::CE_ID.to_owned(), Uuid::nil().to_string().into_bytes()));
        assert_eq!(read(&headers), Err(EnvelopeError::Repeated(header::CE_ID)));
    }

    #[test]
    fn malformed_values_are_named_and_not_echoed() {
        use header::*;
        for (name, value) in [
            (CE_SPECVERSION, "0.3"),
            (CE_ID, "secret"),
            (CE_SUBJECT, "order"),
            (CE_SUBJECT, "/1"),
            (CE_TIME, "yesterday"),
            (AGGREGATE_VERSION, "0"),
            (AGGREGATE_VERSION, "-1"),
            (SCHEMA_VERSION, "0"),
            (OUTBOX_ID, "x"),
            (CORRELATION_ID, "x"),
        ] {
            let headers: Vec<_> = written(&sample())
                .into_iter()
                .map(|(n, v)| {
                    if n == name {
                        (n, value.as_bytes().to_vec())
                    } else {
                        (n, v)
                    }
                })
                .collect();
            let error = read(&headers).expect_err(name);
            assert!(
                matches!(error, EnvelopeError::Malformed { name: n, .. } if n == name),
                "{name}: {error}"
            );
            assert!(!error.to_string().contains("secret"));
        }
    }
}
