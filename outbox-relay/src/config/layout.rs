//! How rows of an outbox table become records: which column is what, and which headers there are.

use service::config::{Reader, Reported};

/// Columns and headers of an outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The table is the one that `init` makes; otherwise it is somebody else's, and `init` adds what it lacks.
    pub owned: bool,
    pub columns: Columns,
    pub headers: Headers,
}

/// The names of a table's columns; `None` where it has none for that purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// Given in the order of the inserts.
    pub id: String,
    pub event_id: Option<String>,
    pub aggregate_type: Option<String>,
    /// The Kafka key.
    pub aggregate_id: String,
    pub aggregate_version: Option<String>,
    pub event_type: Option<String>,
    pub schema_version: Option<String>,
    pub topic: Option<String>,
    pub source: Option<String>,
    pub content_type: Option<String>,
    pub data_schema: Option<String>,
    pub correlation_id: Option<String>,
    pub causation_id: Option<String>,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    pub metadata: Option<String>,
    pub occurred_at: Option<String>,
    pub payload: String,
}

/// The headers of every record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    pub style: HeaderStyle,
    /// The same on every record.
    pub fixed: Vec<(String, String)>,
    /// Header and the column that it comes from; where that is NULL it is left out, or, as Debezium has it, without a value.
    pub columns: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeaderStyle {
    /// CloudEvents 1.0 in binary mode, and what ordering, tracing and replay need.
    #[default]
    CloudEvents,
    /// `id`, as Debezium's EventRouter has it.
    Debezium,
}

/// `profile`: what everything else starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Profile {
    #[default]
    CloudEvents,
    Debezium,
}

impl std::str::FromStr for Profile {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cloudevents" => Ok(Self::CloudEvents),
            "debezium" => Ok(Self::Debezium),
            _ => Err("must be cloudevents or debezium"),
        }
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self::of(Profile::CloudEvents)
    }
}

impl Layout {
    /// The layout of a profile as it is.
    pub fn of(profile: Profile) -> Self {
        let own = |name: &str| Some(name.to_owned());
        match profile {
            Profile::CloudEvents => Self {
                owned: true,
                columns: Columns {
                    id: "id".to_owned(),
                    event_id: own("event_id"),
                    aggregate_type: own("aggregate_type"),
                    aggregate_id: "aggregate_id".to_owned(),
                    aggregate_version: own("aggregate_version"),
                    event_type: own("event_type"),
                    schema_version: own("schema_version"),
                    topic: own("topic"),
                    source: own("source"),
                    content_type: own("content_type"),
                    data_schema: own("data_schema"),
                    correlation_id: own("correlation_id"),
                    causation_id: own("causation_id"),
                    traceparent: own("traceparent"),
                    tracestate: own("tracestate"),
                    metadata: own("metadata"),
                    occurred_at: own("occurred_at"),
                    payload: "payload".to_owned(),
                },
                headers: Headers::default(),
            },
            Profile::Debezium => Self {
                owned: false,
                columns: Columns {
                    id: "seq".to_owned(),
                    event_id: own("id"),
                    aggregate_type: own("aggregatetype"),
                    aggregate_id: "aggregateid".to_owned(),
                    aggregate_version: None,
                    event_type: own("type"),
                    schema_version: None,
                    topic: None,
                    source: None,
                    content_type: None,
                    data_schema: None,
                    correlation_id: None,
                    causation_id: None,
                    traceparent: None,
                    tracestate: None,
                    metadata: None,
                    occurred_at: None,
                    payload: "payload".to_owned(),
                },
                headers: Headers {
                    style: HeaderStyle::Debezium,
                    ..Headers::default()
                },
            },
        }
    }

    /// Reads `columns.*` and `headers.*` of `section`, on top of `profile`.
    pub(super) fn read(reader: &mut Reader, section: &str, profile: Profile) -> Result<Self, Reported> {
        let mut layout = Self::of(profile);
        let columns = &mut layout.columns;
        for (name, column) in reader.map(&format!("{section}.columns")) {
            layout.owned = false;
            let optional = match name.as_str() {
                "id" => {
                    columns.id = column;
                    continue;
                }
                "aggregate_id" => {
                    columns.aggregate_id = column;
                    continue;
                }
                "payload" => {
                    columns.payload = column;
                    continue;
                }
                "event_id" => &mut columns.event_id,
                "aggregate_type" => &mut columns.aggregate_type,
                "aggregate_version" => &mut columns.aggregate_version,
                "event_type" => &mut columns.event_type,
                "schema_version" => &mut columns.schema_version,
                "topic" => &mut columns.topic,
                "source" => &mut columns.source,
                "content_type" => &mut columns.content_type,
                "data_schema" => &mut columns.data_schema,
                "correlation_id" => &mut columns.correlation_id,
                "causation_id" => &mut columns.causation_id,
                "traceparent" => &mut columns.traceparent,
                "tracestate" => &mut columns.tracestate,
                "metadata" => &mut columns.metadata,
                "occurred_at" => &mut columns.occurred_at,
                _ => {
                    return reader.reject(
                        &format!("{section}.columns.{name}"),
                        "is no column that the relay knows; see docs/relay.md for the list",
                    );
                }
            };
            // An empty name: the table has no such column.
            *optional = Some(column).filter(|column| !column.is_empty());
        }
        layout.headers.fixed = reader
            .map(&format!("{section}.headers.static"))
            .into_iter()
            .collect();
        layout.headers.columns = reader
            .map(&format!("{section}.headers.columns"))
            .into_iter()
            .collect();
        Ok(layout)
    }
}
