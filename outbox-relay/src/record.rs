//! A row of the outbox as a Kafka record.

use std::borrow::Cow;
use std::collections::BTreeMap;

use envelope::header;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};
use uuid::Uuid;

use crate::config::{Columns, HeaderStyle, Layout, TopicTemplate};
use crate::row::{Id, NotText, OutboxRow};
use crate::sql::identifier;
use crate::time::Micros;

/// What Kafka adds to a record in a batch of its own, at the most: batch header, lengths, offsets, timestamps.
const RECORD_OVERHEAD: usize = 128;

/// What is read of a row.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    /// As it stands in SQL behind SELECT.
    pub(crate) list: String,
    /// Bit `n` is set when column `n` is a UUID.
    pub(crate) uuids: u32,
}

/// The columns of table `t`, in the order that [`Record::from_row`] expects, under the names `c0`, `c1` …
///
/// `types` are those that the table has. A type that is not the expected one is cast, and a column that there is not is
/// NULL.
pub(crate) fn select_list(layout: &Layout, types: &BTreeMap<String, String>) -> Selection {
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
    // What only CloudEvents have is not read for others.
    let in_cloud_events = |name| match layout.headers.style {
        HeaderStyle::CloudEvents => name,
        HeaderStyle::Debezium => &None,
    };
    let type_of = |name: &str| types.get(name).map_or("", String::as_str);
    // An expression, and whether it is a UUID.
    let cast = |name: &Option<String>, wanted: &str| match name {
        None => (format!("NULL::{wanted}"), false),
        Some(name) if type_of(name) == wanted => (format!("t.{}", identifier(name)), wanted == "uuid"),
        Some(name) => (format!("t.{}::{wanted}", identifier(name)), false),
    };
    // A UUID is smaller as it is.
    let uuid = |name: &Option<String>| match name {
        Some(column) if type_of(column) == "uuid" => cast(name, "uuid"),
        _ => cast(name, "text"),
    };
    let time = match occurred_at {
        Some(name) if type_of(name) == "timestamp without time zone" => {
            (format!("t.{} AT TIME ZONE 'UTC'", identifier(name)), false)
        }
        Some(name) if matches!(type_of(name), "bigint" | "integer" | "numeric") => {
            (format!("to_timestamp(t.{} / 1000.0)", identifier(name)), false)
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
        cast(in_cloud_events(event_type), "text"),
        cast(in_cloud_events(schema_version), "integer"),
        cast(topic, "text"),
        cast(in_cloud_events(source), "text"),
        cast(in_cloud_events(content_type), "text"),
        cast(in_cloud_events(data_schema), "text"),
        uuid(in_cloud_events(correlation_id)),
        uuid(in_cloud_events(causation_id)),
        cast(in_cloud_events(traceparent), "text"),
        cast(in_cloud_events(tracestate), "text"),
        cast(in_cloud_events(metadata), "jsonb"),
        time,
        (bytes, false),
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
        .map(|(position, (expression, _))| format!("{expression} AS c{position}"))
        .collect();
    // All of them are among the first columns.
    let uuids = (0..u32::BITS).zip(&list).filter(|(_, (_, is_uuid))| *is_uuid);
    Selection {
        list: named.join(", "),
        uuids: uuids.fold(0, |bits, (position, _)| bits | 1 << position),
    }
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
    pub(crate) occurred_at: Option<Micros>,
    /// Upper bound of its size on the wire, uncompressed.
    pub(crate) bytes: usize,
    /// Why it can never be published as it is.
    pub(crate) problem: Option<String>,
}

/// Headers as they are collected, with their size.
struct Collected {
    /// `None` only while one is added.
    headers: Option<OwnedHeaders>,
    bytes: usize,
}

impl Collected {
    fn with_capacity(count: usize) -> Self {
        Self {
            headers: Some(OwnedHeaders::new_with_capacity(count)),
            bytes: 0,
        }
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        self.put_or_null(name, Some(value));
    }

    /// A header that is there, perhaps without a value.
    fn put_or_null(&mut self, name: &str, value: Option<&[u8]>) {
        self.bytes += name.len() + value.map_or(0, <[u8]>::len) + 4;
        let headers = self.headers.take().unwrap_or_default();
        self.headers = Some(headers.insert(Header { key: name, value }));
    }

    fn put_id(&mut self, name: &str, id: &Id<'_>) {
        match id {
            Id::Uuid(id) => {
                let mut text = Uuid::encode_buffer();
                self.put(name, id.as_hyphenated().encode_lower(&mut text).as_bytes());
            }
            Id::Text(text) => self.put(name, text),
        }
    }

    fn put_number(&mut self, name: &str, number: i64) {
        self.put(name, itoa::Buffer::new().format(number).as_bytes());
    }

    /// `FIRST/SECOND`, without an allocation where it is short.
    fn put_path(&mut self, name: &str, first: &str, second: &str) {
        let parts = [first.as_bytes(), b"/", second.as_bytes()];
        let length = parts.iter().map(|part| part.len()).sum();
        let mut short = [0; 128];
        let Some(path) = short.get_mut(..length) else {
            return self.put(name, &parts.concat());
        };
        let mut rest = &mut *path;
        for part in parts {
            // They are as long together as the path is.
            let (place, behind) = rest.split_at_mut(part.len());
            place.copy_from_slice(part);
            rest = behind;
        }
        self.put(name, path);
    }
}

/// Headers that most records have at the most; of more, librdkafka makes room as they come.
const USUAL_HEADERS: usize = 16;

impl<'a> Record<'a> {
    /// Makes the record of a row. The same row always gives the same bytes.
    pub(crate) fn from_row(row: &'a OutboxRow, rendering: &'a Rendering) -> Self {
        let mut problem = None;
        let mut text = |text: Result<Option<&'a str>, NotText>, what: &str| {
            text.unwrap_or_else(|NotText| {
                problem = Some(format!("its {what} is not UTF-8"));
                None
            })
        };
        // In the order of `select_list`.
        let mut columns = row.columns();
        let id = columns.int8().unwrap_or_default();
        let event_id = columns.id();
        let aggregate_type = text(columns.text(), "type of entity").unwrap_or_default();
        let key = text(columns.text(), "key").unwrap_or_default();
        let version = columns.int8();
        let event_type = columns.bytes();
        let schema_version = columns.int4();
        let topic = text(columns.text(), "topic");
        let source = columns.bytes();
        let content_type = columns.bytes();
        let data_schema = columns.bytes();
        let correlation_id = columns.id();
        let causation_id = columns.id();
        let traceparent = columns.bytes();
        let tracestate = columns.bytes();
        let metadata = columns.jsonb();
        let occurred_at = columns.int8();
        let payload = columns.bytes();

        if key.is_empty() && problem.is_none() {
            problem = Some("its key is empty".to_owned());
        }
        let topic = match topic {
            Some(topic) => Cow::Borrowed(topic),
            None => rendering.topic.topic_of(aggregate_type),
        };
        let occurred_at = occurred_at.and_then(|micros| {
            let time = Micros::from_postgres(micros);
            if time.is_none() {
                problem = Some("its time is infinite".to_owned());
            }
            time
        });
        let mut headers = Collected::with_capacity(USUAL_HEADERS);
        match rendering.layout.headers.style {
            // CloudEvents in binary mode; the bytes are those of `envelope::Envelope::write`.
            HeaderStyle::CloudEvents => {
                headers.put(header::CE_SPECVERSION, envelope::SPEC_VERSION.as_bytes());
                if let Some(id) = &event_id {
                    headers.put_id(header::CE_ID, id);
                }
                headers.put(header::CE_SOURCE, source.unwrap_or(rendering.source.as_bytes()));
                if let Some(kind) = event_type {
                    headers.put(header::CE_TYPE, kind);
                }
                headers.put_path(header::CE_SUBJECT, aggregate_type, key);
                if let Some(time) = occurred_at {
                    envelope::time::rfc3339(time.0, |text| headers.put(header::CE_TIME, text));
                }
                for (name, value) in [
                    (header::CE_DATASCHEMA, data_schema),
                    (header::CONTENT_TYPE, content_type),
                ] {
                    if let Some(value) = value {
                        headers.put(name, value);
                    }
                }
                for (name, number) in [
                    (header::AGGREGATE_VERSION, version),
                    (header::SCHEMA_VERSION, schema_version.map(i64::from)),
                ] {
                    if let Some(number) = number {
                        headers.put_number(name, number);
                    }
                }
                for (name, id) in [
                    (header::CORRELATION_ID, correlation_id),
                    (header::CAUSATION_ID, causation_id),
                ] {
                    if let Some(id) = id {
                        headers.put_id(name, &id);
                    }
                }
                for (name, value) in [
                    (header::TRACEPARENT, traceparent),
                    (header::TRACESTATE, tracestate),
                ] {
                    if let Some(value) = value {
                        headers.put(name, value);
                    }
                }
                headers.put_number(header::OUTBOX_ID, id);
                if let Some(metadata) = metadata
                    && let Err(why) = put_metadata(metadata, &mut headers)
                {
                    problem = Some(why);
                }
            }
            HeaderStyle::Debezium => {
                if let Some(id) = &event_id {
                    headers.put_id("id", id);
                }
            }
        }
        for (name, value) in &rendering.layout.headers.fixed {
            headers.put(name, value.as_bytes());
        }
        for (name, _) in &rendering.layout.headers.columns {
            let value = columns.bytes();
            // Debezium has a header without a value there.
            if value.is_some() || rendering.layout.headers.style == HeaderStyle::Debezium {
                headers.put_or_null(name, value);
            }
        }
        Self {
            id,
            aggregate_type,
            bytes: RECORD_OVERHEAD + key.len() + payload.map_or(0, <[u8]>::len) + headers.bytes,
            topic,
            key,
            version,
            payload,
            headers: headers.headers,
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
        let mut collected = Collected::with_capacity(headers.len());
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
            headers: collected.headers,
            occurred_at: None,
            problem: None,
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

/// Metadata as headers `meta-NAME`.
fn put_metadata(json: &[u8], headers: &mut Collected) -> Result<(), String> {
    if json == b"{}" {
        return Ok(());
    }
    let Ok(serde_json::Value::Object(object)) = serde_json::from_slice(json) else {
        return Err("its metadata is not an object".to_owned());
    };
    for (name, value) in object {
        let name = format!("{}{name}", header::META_PREFIX);
        match value {
            serde_json::Value::String(value) => headers.put(&name, value.as_bytes()),
            other => headers.put(&name, other.to_string().as_bytes()),
        }
    }
    Ok(())
}

/// Whether Kafka takes this as the name of a topic.
pub(crate) fn is_topic_name(name: &str) -> bool {
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
        let list = select_list(&layout, &types).list;
        for part in [
            "t.seq AS c0",
            "t.id AS c1",
            "t.aggregatetype::text AS c2",
            "NULL::bigint AS c4",
            "NULL::text AS c5",
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
