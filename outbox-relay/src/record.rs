//! A row of the outbox as a Kafka record.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use chrono::{DateTime, SecondsFormat, Utc};
use envelope::header;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};
use uuid::Uuid;

use crate::config::{Columns, HeaderStyle, Layout, TopicTemplate};
use crate::sql::identifier;

/// What Kafka adds to a record in a batch of its own, at the most: batch header, lengths, offsets, timestamps.
const RECORD_OVERHEAD: usize = 128;

/// Positions in a row that was read by [`select_list`].
mod column {
    pub(super) const ID: usize = 0;
    pub(super) const EVENT_ID: usize = 1;
    pub(super) const AGGREGATE_TYPE: usize = 2;
    pub(super) const AGGREGATE_ID: usize = 3;
    pub(super) const AGGREGATE_VERSION: usize = 4;
    pub(super) const EVENT_TYPE: usize = 5;
    pub(super) const SCHEMA_VERSION: usize = 6;
    pub(super) const TOPIC: usize = 7;
    pub(super) const SOURCE: usize = 8;
    pub(super) const CONTENT_TYPE: usize = 9;
    pub(super) const DATA_SCHEMA: usize = 10;
    pub(super) const CORRELATION_ID: usize = 11;
    pub(super) const CAUSATION_ID: usize = 12;
    pub(super) const TRACEPARENT: usize = 13;
    pub(super) const TRACESTATE: usize = 14;
    pub(super) const METADATA: usize = 15;
    pub(super) const OCCURRED_AT: usize = 16;
    pub(super) const PAYLOAD: usize = 17;
    /// Columns for headers begin here.
    pub(super) const HEADERS: usize = 18;
}

/// The columns of table `t`, in the order that [`Record::from_row`] expects, under the names `c0`, `c1` …
///
/// `types` are those that the table has. A type that is not the expected one is cast, and a column that there is not is
/// NULL.
pub(crate) fn select_list(layout: &Layout, types: &BTreeMap<String, String>) -> String {
    let Columns {
        id,
        event_id,
        aggregate_type,
        aggregate_id,
        aggregate_version,
        event_type,
        schema_version,
        topic,
        source,
        content_type,
        data_schema,
        correlation_id,
        causation_id,
        traceparent,
        tracestate,
        metadata,
        occurred_at,
        payload,
    } = &layout.columns;
    let type_of = |name: &str| types.get(name).map_or("", String::as_str);
    let cast = |name: &Option<String>, wanted: &str| match name {
        None => format!("NULL::{wanted}"),
        Some(name) if type_of(name) == wanted => format!("t.{}", identifier(name)),
        Some(name) => format!("t.{}::{wanted}", identifier(name)),
    };
    // A UUID is smaller as it is.
    let uuid = |name: &Option<String>| match name {
        Some(column) if type_of(column) == "uuid" => format!("t.{}", identifier(column)),
        other => cast(other, "text"),
    };
    let time = match occurred_at {
        Some(name) if type_of(name) == "timestamp without time zone" => {
            format!("t.{} AT TIME ZONE 'UTC'", identifier(name))
        }
        Some(name) if matches!(type_of(name), "bigint" | "integer" | "numeric") => {
            format!("to_timestamp(t.{} / 1000.0)", identifier(name))
        }
        other => cast(other, "timestamp with time zone"),
    };
    let bytes = match type_of(payload) {
        "bytea" => format!("t.{}", identifier(payload)),
        _ => format!("convert_to(t.{}::text, 'UTF8')", identifier(payload)),
    };
    let mut list = vec![
        cast(&Some(id.clone()), "bigint"),
        uuid(event_id),
        cast(aggregate_type, "text"),
        cast(&Some(aggregate_id.clone()), "text"),
        cast(aggregate_version, "bigint"),
        cast(event_type, "text"),
        cast(schema_version, "integer"),
        cast(topic, "text"),
        cast(source, "text"),
        cast(content_type, "text"),
        cast(data_schema, "text"),
        uuid(correlation_id),
        uuid(causation_id),
        cast(traceparent, "text"),
        cast(tracestate, "text"),
        cast(metadata, "jsonb"),
        time,
        bytes,
    ];
    list.extend(
        layout
            .headers
            .columns
            .iter()
            .map(|(_, name)| cast(&Some(name.clone()), "text")),
    );
    let named: Vec<String> = list
        .iter()
        .enumerate()
        .map(|(position, expression)| format!("{expression} AS c{position}"))
        .collect();
    named.join(", ")
}

/// How rows become records.
#[derive(Debug, Clone)]
pub(crate) struct Rendering {
    pub(crate) layout: Layout,
    pub(crate) topic: TopicTemplate,
    /// `ce_source` of rows that name none.
    pub(crate) source: String,
}

impl Rendering {
    /// The header by which a record is known again.
    pub(crate) fn event_id_header(&self) -> &'static str {
        match self.layout.headers.style {
            HeaderStyle::CloudEvents => header::CE_ID,
            HeaderStyle::Debezium => "id",
        }
    }
}

/// Name and value of a header as the quarantine keeps it.
pub(crate) type HeaderPair = (String, Option<String>);

/// A record about to be handed to the producer; borrows from its row.
#[derive(Debug)]
pub(crate) struct Record<'a> {
    pub(crate) id: i64,
    pub(crate) aggregate_type: &'a str,
    pub(crate) topic: Cow<'a, str>,
    pub(crate) key: &'a str,
    pub(crate) version: Option<i64>,
    pub(crate) payload: Option<&'a [u8]>,
    /// Taken when the record is handed over.
    pub(crate) headers: Option<OwnedHeaders>,
    pub(crate) occurred_at: Option<DateTime<Utc>>,
    /// Upper bound of its size on the wire, uncompressed.
    pub(crate) bytes: usize,
    /// Why it can never be published as it is.
    pub(crate) problem: Option<String>,
}

/// The id of a row that was read by [`select_list`].
pub(crate) fn id_of(row: &Row) -> i64 {
    row.get(column::ID)
}

/// Type and id of the entity of a row, for those who need no record of it.
pub(crate) fn entity_of(row: &Row) -> (&str, &str) {
    let text = |position| row.try_get::<_, Option<&str>>(position).ok().flatten();
    (
        text(column::AGGREGATE_TYPE).unwrap_or_default(),
        text(column::AGGREGATE_ID).unwrap_or_default(),
    )
}

/// An id as its column has it.
enum Id<'a> {
    Uuid(Uuid),
    Text(&'a str),
}

impl<'a> FromSql<'a> for Id<'a> {
    fn from_sql(kind: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        if *kind == Type::UUID {
            Uuid::from_sql(kind, raw).map(Self::Uuid)
        } else {
            <&str>::from_sql(kind, raw).map(Self::Text)
        }
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::UUID || <&str>::accepts(kind)
    }
}

impl Id<'_> {
    fn put(&self, put: impl FnOnce(&[u8])) {
        match self {
            Self::Uuid(id) => put(id
                .as_hyphenated()
                .encode_lower(&mut Uuid::encode_buffer())
                .as_bytes()),
            Self::Text(text) => put(text.as_bytes()),
        }
    }
}

/// Headers as they are collected, with their size.
struct Collected {
    headers: OwnedHeaders,
    bytes: usize,
}

impl Collected {
    fn put(&mut self, name: &str, value: &[u8]) {
        self.put_or_null(name, Some(value));
    }

    /// A header that is there, perhaps without a value.
    fn put_or_null(&mut self, name: &str, value: Option<&[u8]>) {
        self.bytes += name.len() + value.map_or(0, <[u8]>::len) + 4;
        self.headers = std::mem::take(&mut self.headers).insert(Header { key: name, value });
    }
}

impl<'a> Record<'a> {
    /// Makes the record of a row. The same row always gives the same bytes.
    pub(crate) fn from_row(row: &'a Row, rendering: &Rendering) -> Self {
        let mut problem = None;
        let (aggregate_type, key) = entity_of(row);
        if key.is_empty() {
            problem = Some("its key is empty".to_owned());
        }
        let topic = match row.get::<_, Option<&str>>(column::TOPIC) {
            Some(topic) => Cow::Borrowed(topic),
            None => Cow::Owned(rendering.topic.topic_of(aggregate_type)),
        };
        if !is_topic_name(&topic) {
            problem = Some(format!("its topic {topic:?} is not a name that Kafka takes"));
        }
        let occurred_at = row.try_get(column::OCCURRED_AT).unwrap_or_else(|_| {
            problem = Some("its time is infinite".to_owned());
            None
        });
        let mut collected = Collected {
            headers: OwnedHeaders::new_with_capacity(16),
            bytes: 0,
        };
        match rendering.layout.headers.style {
            HeaderStyle::CloudEvents => {
                if let Err(why) = cloud_events(row, rendering, occurred_at, &mut collected) {
                    problem = Some(why);
                }
            }
            HeaderStyle::Debezium => {
                if let Some(id) = row.get::<_, Option<Id<'_>>>(column::EVENT_ID) {
                    id.put(|value| collected.put("id", value));
                }
            }
        }
        for (name, value) in &rendering.layout.headers.fixed {
            collected.put(name, value.as_bytes());
        }
        for (position, (name, _)) in rendering.layout.headers.columns.iter().enumerate() {
            let value = row.get::<_, Option<&str>>(column::HEADERS + position);
            // Debezium has a header without a value there.
            if value.is_some() || rendering.layout.headers.style == HeaderStyle::Debezium {
                collected.put_or_null(name, value.map(str::as_bytes));
            }
        }
        let payload: Option<&[u8]> = row.get(column::PAYLOAD);
        Self {
            id: id_of(row),
            aggregate_type,
            bytes: RECORD_OVERHEAD + key.len() + payload.map_or(0, <[u8]>::len) + collected.bytes,
            topic,
            key,
            version: row.get(column::AGGREGATE_VERSION),
            payload,
            headers: Some(collected.headers),
            occurred_at,
            problem,
        }
    }

    /// A record as it was kept, with its headers as name and value.
    pub(crate) fn kept(
        id: i64,
        entity: (&'a str, &'a str),
        topic: &'a str,
        version: Option<i64>,
        headers: &[HeaderPair],
        payload: Option<&'a [u8]>,
    ) -> Self {
        let mut collected = Collected {
            headers: OwnedHeaders::new_with_capacity(headers.len()),
            bytes: 0,
        };
        for (name, value) in headers {
            collected.put_or_null(name, value.as_deref().map(str::as_bytes));
        }
        let (aggregate_type, key) = entity;
        Self {
            id,
            aggregate_type,
            topic: Cow::Borrowed(topic),
            key,
            version,
            payload,
            bytes: RECORD_OVERHEAD + key.len() + payload.map_or(0, <[u8]>::len) + collected.bytes,
            headers: Some(collected.headers),
            occurred_at: None,
            problem: (!is_topic_name(topic))
                .then(|| format!("its topic {topic:?} is not a name that Kafka takes")),
        }
    }

    /// The value of a header, while the record has not been handed over.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let headers = self.headers.as_ref()?;
        let found = headers.iter().find(|header| header.key == name)?;
        std::str::from_utf8(found.value?).ok()
    }

    /// Headers as name and value, while the record has not been handed over.
    pub(crate) fn header_pairs(&self) -> Vec<HeaderPair> {
        let headers = self.headers.iter().flat_map(|headers| headers.iter());
        headers
            .map(|header| {
                let value = header
                    .value
                    .map(|value| String::from_utf8_lossy(value).into_owned());
                (header.key.to_owned(), value)
            })
            .collect()
    }
}

/// CloudEvents in binary mode; the bytes are those of [`envelope::Envelope::write`].
fn cloud_events(
    row: &Row,
    rendering: &Rendering,
    occurred_at: Option<DateTime<Utc>>,
    headers: &mut Collected,
) -> Result<(), String> {
    let text = |position| row.get::<_, Option<&str>>(position);
    headers.put(header::CE_SPECVERSION, envelope::SPEC_VERSION.as_bytes());
    if let Some(id) = row.get::<_, Option<Id<'_>>>(column::EVENT_ID) {
        id.put(|value| headers.put(header::CE_ID, value));
    }
    let source = text(column::SOURCE).unwrap_or(&rendering.source);
    headers.put(header::CE_SOURCE, source.as_bytes());
    if let Some(kind) = text(column::EVENT_TYPE) {
        headers.put(header::CE_TYPE, kind.as_bytes());
    }
    let (aggregate_type, key) = entity_of(row);
    let mut scratch = String::with_capacity(64);
    let mut formatted = |headers: &mut Collected, name, arguments: std::fmt::Arguments<'_>| {
        scratch.clear();
        // Writing to a string cannot fail.
        let _ = scratch.write_fmt(arguments);
        headers.put(name, scratch.as_bytes());
    };
    formatted(
        headers,
        header::CE_SUBJECT,
        format_args!("{aggregate_type}/{key}"),
    );
    if let Some(time) = occurred_at {
        let time = time.to_rfc3339_opts(SecondsFormat::Micros, true);
        headers.put(header::CE_TIME, time.as_bytes());
    }
    if let Some(schema) = text(column::DATA_SCHEMA) {
        headers.put(header::CE_DATASCHEMA, schema.as_bytes());
    }
    if let Some(kind) = text(column::CONTENT_TYPE) {
        headers.put(header::CONTENT_TYPE, kind.as_bytes());
    }
    if let Some(version) = row.get::<_, Option<i64>>(column::AGGREGATE_VERSION) {
        formatted(headers, header::AGGREGATE_VERSION, format_args!("{version}"));
    }
    if let Some(version) = row.get::<_, Option<i32>>(column::SCHEMA_VERSION) {
        formatted(headers, header::SCHEMA_VERSION, format_args!("{version}"));
    }
    for (position, name) in [
        (column::CORRELATION_ID, header::CORRELATION_ID),
        (column::CAUSATION_ID, header::CAUSATION_ID),
    ] {
        if let Some(id) = row.get::<_, Option<Id<'_>>>(position) {
            id.put(|value| headers.put(name, value));
        }
    }
    for (position, name) in [
        (column::TRACEPARENT, header::TRACEPARENT),
        (column::TRACESTATE, header::TRACESTATE),
    ] {
        if let Some(value) = text(position) {
            headers.put(name, value.as_bytes());
        }
    }
    formatted(headers, header::OUTBOX_ID, format_args!("{}", id_of(row)));
    match row.get::<_, Option<serde_json::Value>>(column::METADATA) {
        None => Ok(()),
        Some(serde_json::Value::Object(object)) => {
            for (name, value) in object {
                let name = format!("{}{name}", header::META_PREFIX);
                match value {
                    serde_json::Value::String(value) => headers.put(&name, value.as_bytes()),
                    other => headers.put(&name, other.to_string().as_bytes()),
                }
            }
            Ok(())
        }
        Some(_) => Err("its metadata is not an object".to_owned()),
    }
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

/// Type of the record that stands for one that was skipped.
pub(crate) const SKIPPED_TYPE: &str = "outbox.row.skipped";
/// Header with the reason of a skip.
pub(crate) const SKIPPED_REASON: &str = "outbox-skipped";

/// The headers of a marker: those of the record that it stands for, as another type, with the reason.
pub(crate) fn marker_headers(kept: &[HeaderPair], reason: &str) -> Vec<HeaderPair> {
    let mut headers: Vec<HeaderPair> = kept
        .iter()
        .map(|(name, value)| match name.as_str() {
            header::CE_TYPE => (name.clone(), Some(SKIPPED_TYPE.to_owned())),
            _ => (name.clone(), value.clone()),
        })
        .collect();
    headers.push((SKIPPED_REASON.to_owned(), Some(reason.to_owned())));
    headers
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
    fn columns_are_cast_to_what_is_read_and_those_that_are_missing_are_null() {
        let layout = Layout::of(crate::config::Profile::Debezium);
        let types = [
            ("seq", "bigint"),
            ("id", "uuid"),
            ("aggregatetype", "character varying"),
            ("aggregateid", "character varying"),
            ("type", "text"),
            ("payload", "jsonb"),
        ];
        let types = types.map(|(n, t)| (n.to_owned(), t.to_owned())).into();
        let list = select_list(&layout, &types);
        for part in [
            "t.seq AS c0",
            "t.id AS c1",
            "t.aggregatetype::text AS c2",
            "NULL::bigint AS c4",
            "t.type AS c5",
            "convert_to(t.payload::text, 'UTF8') AS c17",
        ] {
            assert!(list.contains(part), "{part}: {list}");
        }
    }

    #[test]
    fn a_marker_keeps_key_and_version_under_another_type() {
        let kept = [(header::CE_TYPE, "a.b"), (header::AGGREGATE_VERSION, "3")];
        let kept = kept.map(|(n, v)| (n.to_owned(), Some(v.to_owned())));
        let marker = marker_headers(&kept, "why");
        assert_eq!(marker[0].1.as_deref(), Some(SKIPPED_TYPE));
        assert_eq!(marker[1].1.as_deref(), Some("3"));
        assert_eq!(marker[2], (SKIPPED_REASON.to_owned(), Some("why".to_owned())));
    }
}
