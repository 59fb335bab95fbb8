//! State, history, outbox and topic of one kind of entity.

use std::collections::{BTreeSet, HashMap};

use envelope::header;

use super::{Source, count};
use crate::databases::OutboxRow;
use crate::topic::Record;

/// Each entity's version counts its events, and each event has its row in the outbox.
pub(super) fn compare_history(source: &Source, state: &HashMap<&str, i64>, problems: &mut Vec<String>) {
    let mut versions: HashMap<&str, Vec<i64>> = HashMap::new();
    for event in &source.events {
        versions.entry(&event.entity_id).or_default().push(event.version);
    }
    for (entity, version) in state {
        let mut found = versions.remove(entity).unwrap_or_default();
        found.sort_unstable();
        if !found.iter().copied().eq(1..=*version) {
            problems.push(format!(
                "{}: {entity} is at version {version}, and its events are {found:?}",
                source.topic
            ));
        }
    }
    for entity in versions.keys() {
        problems.push(format!(
            "{}: there are events of {entity} and no row of state",
            source.topic
        ));
    }

    let mut outbox: HashMap<_, &OutboxRow> = source
        .outbox
        .iter()
        .map(|row| (row.event.event_id, row))
        .collect();
    for event in &source.events {
        match outbox.remove(&event.event_id) {
            Some(row) if row.event == *event => {}
            Some(row) => problems.push(format!(
                "event {event:?} differs from its outbox row {:?}",
                row.event
            )),
            None => problems.push(format!("event {} has no outbox row", event.event_id)),
        }
    }
    for row in outbox.values() {
        problems.push(format!(
            "{}: outbox row {} has no event, or there are two with its event id",
            source.topic, row.id
        ));
    }
}

/// What is on Kafka.
#[derive(Debug, Default)]
pub(super) struct Kafka {
    pub(super) records: u64,
    pub(super) lost: u64,
    pub(super) repeated: u64,
    pub(super) out_of_order: u64,
    /// From commit to append, in milliseconds.
    pub(super) latencies: Vec<f64>,
}

impl Kafka {
    pub(super) fn add(&mut self, other: Self) {
        self.records += other.records;
        self.lost += other.lost;
        self.repeated += other.repeated;
        self.out_of_order += other.out_of_order;
        self.latencies.extend(other.latencies);
    }
}

/// Every outbox row has its record, as it is and in its place.
pub(super) fn compare_topic(source: &Source, problems: &mut Vec<String>) -> Kafka {
    let rows: HashMap<i64, &OutboxRow> = source.outbox.iter().map(|row| (row.id, row)).collect();
    let mut first: HashMap<i64, &Record> = HashMap::new();
    // Per key: its partitions, and its versions in the order of their first records.
    let mut keys: HashMap<&str, (BTreeSet<i32>, Vec<i64>)> = HashMap::new();
    let mut repeated = 0;
    let mut latencies = Vec::new();
    for record in &source.records {
        let place = format!("record {}/{}/{}", source.topic, record.partition, record.offset);
        let key = keys.entry(record.key_text()).or_default();
        key.0.insert(record.partition);
        let row = record
            .header(header::OUTBOX_ID)
            .and_then(|id| rows.get(&id.parse().ok()?));
        let Some(row) = row else {
            problems.push(format!("{place} comes from no outbox row"));
            continue;
        };
        match first.get(&row.id) {
            Some(original) => {
                repeated += 1;
                let same = (&original.key, &original.payload, &original.headers)
                    == (&record.key, &record.payload, &record.headers);
                if !same {
                    problems.push(format!("{place} repeats outbox row {} with other bytes", row.id));
                }
            }
            None => {
                first.insert(row.id, record);
                key.1.push(row.event.version);
                let append = record.appended_at_ms as f64;
                latencies.push((append - row.committed_at_us as f64 / 1e3).max(0.0));
                if let Some(what) = difference(row, record) {
                    problems.push(format!("{place} differs from outbox row {} in {what}", row.id));
                }
            }
        }
    }
    let in_order = |(partitions, versions): &(BTreeSet<i32>, Vec<i64>)| {
        partitions.len() == 1 && versions.iter().copied().eq(1..=versions.len() as i64)
    };
    let kafka = Kafka {
        records: count(source.records.len()),
        lost: count(rows.keys().filter(|id| !first.contains_key(id)).count()),
        repeated,
        out_of_order: count(keys.values().filter(|key| !in_order(key)).count()),
        latencies,
    };
    if kafka.lost > 0 {
        problems.push(format!(
            "{} outbox rows have no record in {}",
            kafka.lost, source.topic
        ));
    }
    if kafka.out_of_order > 0 {
        problems.push(format!(
            "{} keys of {} have records that are out of order",
            kafka.out_of_order, source.topic
        ));
    }
    kafka
}

/// In what a record differs from its outbox row.
fn difference(row: &OutboxRow, record: &Record) -> Option<&'static str> {
    let event = &row.event;
    let subject = format!("{}/{}", event.entity_type, event.entity_id);
    let fields = [
        ("its key", record.key_text() == event.entity_id),
        (
            "its payload",
            record.payload.as_deref() == Some(event.payload.as_slice()),
        ),
        (
            header::CE_SPECVERSION,
            record.header(header::CE_SPECVERSION) == Some("1.0"),
        ),
        (
            header::CE_ID,
            record.header(header::CE_ID) == Some(&event.event_id.to_string()),
        ),
        (
            header::CE_TYPE,
            record.header(header::CE_TYPE) == Some(&event.event_type),
        ),
        (
            header::CE_SUBJECT,
            record.header(header::CE_SUBJECT) == Some(&subject),
        ),
        (
            header::AGGREGATE_VERSION,
            record.header(header::AGGREGATE_VERSION) == Some(&event.version.to_string()),
        ),
        (
            header::SCHEMA_VERSION,
            record.header(header::SCHEMA_VERSION) == Some(&event.schema_version.to_string()),
        ),
        (
            header::TRACEPARENT,
            record.header(header::TRACEPARENT) == event.traceparent.as_deref(),
        ),
        (
            header::CORRELATION_ID,
            record.header(header::CORRELATION_ID) == event.correlation_id.map(|id| id.to_string()).as_deref(),
        ),
    ];
    fields.into_iter().find(|(_, same)| !same).map(|(name, _)| name)
}
