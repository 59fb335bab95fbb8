//! Compares the parts with each other. Pure: what was read comes in, figures and differences go out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::OrderView;
use envelope::header;
use serde::Serialize;

use crate::databases::{Committed, EventRow, OutboxRow};
use crate::topic::Record;

/// Everything that was read.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    /// The orders as clients were told they are.
    pub(crate) told: Vec<Order>,
    /// The rows of state.
    pub(crate) state: Vec<Order>,
    pub(crate) events: Vec<EventRow>,
    pub(crate) outbox: Vec<OutboxRow>,
    pub(crate) records: Vec<Record>,
    /// GetOrderView's answers.
    pub(crate) views: Vec<OrderView>,
    /// ListOrders' answers, page after page, by user.
    pub(crate) lists: BTreeMap<String, Vec<OrderView>>,
    /// When the read model's rows were last written.
    pub(crate) view_commits: Vec<Committed>,
}

/// What `./dev demo` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figures {
    pub(crate) placed: u64,
    pub(crate) cancelled: u64,
    pub(crate) outbox_rows: u64,
    pub(crate) kafka_records: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    pub(crate) out_of_order: u64,
    pub(crate) projected: u64,
    pub(crate) kafka_p50_ms: f64,
    pub(crate) kafka_p99_ms: f64,
    pub(crate) view_p50_ms: f64,
    pub(crate) view_p99_ms: f64,
    pub(crate) reconciled: bool,
}

/// The figures, and in words whatever does not fit.
pub(crate) fn reconcile(parts: &Parts, mut problems: Vec<String>) -> (Figures, Vec<String>) {
    compare_state(parts, &mut problems);
    compare_events(parts, &mut problems);
    let kafka = compare_topic(parts, &mut problems);
    let projected = compare_views(parts, &mut problems);
    if kafka.lost > 0 {
        problems.push(format!("{} outbox rows have no record on Kafka", kafka.lost));
    }
    if kafka.out_of_order > 0 {
        problems.push(format!(
            "{} orders have records that are out of order",
            kafka.out_of_order
        ));
    }
    if projected != count(parts.state.len()) {
        problems.push(format!(
            "the read model has {projected} of {} orders right",
            parts.state.len()
        ));
    }
    let view = view_latencies(parts);
    let cancelled = parts
        .state
        .iter()
        .filter(|order| order.status() == OrderStatus::Cancelled)
        .count();
    let figures = Figures {
        placed: count(parts.told.len()),
        cancelled: count(cancelled),
        outbox_rows: count(parts.outbox.len()),
        kafka_records: count(parts.records.len()),
        lost: kafka.lost,
        repeated: kafka.repeated,
        out_of_order: kafka.out_of_order,
        projected,
        kafka_p50_ms: percentile(&kafka.latencies, 50),
        kafka_p99_ms: percentile(&kafka.latencies, 99),
        view_p50_ms: percentile(&view, 50),
        view_p99_ms: percentile(&view, 99),
        reconciled: problems.is_empty(),
    };
    (figures, problems)
}

/// What clients were told is what the rows of state say.
fn compare_state(parts: &Parts, problems: &mut Vec<String>) {
    let state: HashMap<&str, &Order> = parts
        .state
        .iter()
        .map(|order| (order.order_id.as_str(), order))
        .collect();
    for told in &parts.told {
        match state.get(told.order_id.as_str()) {
            Some(row) if **row == *told => {}
            Some(row) => problems.push(format!(
                "clients were told {told:?}, and the row of state is {row:?}"
            )),
            None => problems.push(format!(
                "order {} was acknowledged and is not there",
                told.order_id
            )),
        }
    }
    let told: BTreeSet<&str> = parts.told.iter().map(|order| order.order_id.as_str()).collect();
    if told.len() != parts.told.len() {
        problems.push("two requests were told of the same order".to_owned());
    }
    for row in parts
        .state
        .iter()
        .filter(|row| !told.contains(row.order_id.as_str()))
    {
        problems.push(format!("order {} is there and nobody placed it", row.order_id));
    }
}

/// Each order's version counts its events, and each event has its row in the outbox.
fn compare_events(parts: &Parts, problems: &mut Vec<String>) {
    let mut versions: HashMap<&str, Vec<i64>> = HashMap::new();
    for event in &parts.events {
        versions.entry(&event.entity_id).or_default().push(event.version);
    }
    for order in &parts.state {
        let mut found = versions.remove(order.order_id.as_str()).unwrap_or_default();
        found.sort_unstable();
        if !found.iter().copied().eq(1..=order.version) {
            problems.push(format!(
                "order {} is at version {}, and its events are {found:?}",
                order.order_id, order.version
            ));
        }
    }
    for entity in versions.keys() {
        problems.push(format!("there are events of {entity} and no row of state"));
    }

    let mut outbox: HashMap<_, &OutboxRow> =
        parts.outbox.iter().map(|row| (row.event.event_id, row)).collect();
    for event in &parts.events {
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
            "outbox row {} has no event, or there are two with its event id",
            row.id
        ));
    }
}

struct Kafka {
    lost: u64,
    repeated: u64,
    out_of_order: u64,
    /// From commit to append, in milliseconds, ascending.
    latencies: Vec<f64>,
}

/// Every outbox row has its record, as it is and in its place.
fn compare_topic(parts: &Parts, problems: &mut Vec<String>) -> Kafka {
    let rows: HashMap<i64, &OutboxRow> = parts.outbox.iter().map(|row| (row.id, row)).collect();
    let mut first: HashMap<i64, &Record> = HashMap::new();
    // Per key: its partitions, and its versions in the order of their first records.
    let mut keys: HashMap<&str, (BTreeSet<i32>, Vec<i64>)> = HashMap::new();
    let mut repeated = 0;
    let mut latencies = Vec::new();
    for record in &parts.records {
        let place = format!("record {}/{}", record.partition, record.offset);
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
    latencies.sort_by(f64::total_cmp);
    let in_order = |(partitions, versions): &(BTreeSet<i32>, Vec<i64>)| {
        partitions.len() == 1 && versions.iter().copied().eq(1..=versions.len() as i64)
    };
    Kafka {
        lost: count(rows.keys().filter(|id| !first.contains_key(id)).count()),
        repeated,
        out_of_order: count(keys.values().filter(|key| !in_order(key)).count()),
        latencies,
    }
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

/// How many orders the read model answers as they are, by both of its calls.
fn compare_views(parts: &Parts, problems: &mut Vec<String>) -> u64 {
    let views: HashMap<&str, &OrderView> = parts
        .views
        .iter()
        .map(|view| (view.order_id.as_str(), view))
        .collect();
    let mut listed: HashMap<&str, &OrderView> = HashMap::new();
    for (user, list) in &parts.lists {
        for view in list {
            if view.user_id != *user {
                problems.push(format!(
                    "ListOrders of {user} lists order {} of {}",
                    view.order_id, view.user_id
                ));
            }
            if listed.insert(&view.order_id, view).is_some() {
                problems.push(format!("ListOrders lists order {} twice", view.order_id));
            }
        }
        if !list.is_sorted_by_key(|view| std::cmp::Reverse(view.placed_at.map(|at| (at.seconds, at.nanos)))) {
            problems.push(format!("ListOrders of {user} is not newest first"));
        }
    }
    let mut right = 0;
    for order in &parts.state {
        let expected = expected_view(order);
        let mut both = true;
        for (call, found) in [("GetOrderView", &views), ("ListOrders", &listed)] {
            match found.get(order.order_id.as_str()) {
                Some(view) if **view == expected => {}
                Some(view) => {
                    both = false;
                    problems.push(format!("{call} answers {view:?} instead of {expected:?}"));
                }
                None => {
                    both = false;
                    problems.push(format!("{call} does not have order {}", order.order_id));
                }
            }
        }
        right += u64::from(both);
    }
    if listed.len() > parts.state.len() {
        problems.push("ListOrders lists orders that nobody placed".to_owned());
    }
    right
}

/// What the read model has to say about an order.
fn expected_view(order: &Order) -> OrderView {
    OrderView {
        order_id: order.order_id.clone(),
        user_id: order.user_id.clone(),
        status: order.status,
        items: order.items.clone(),
        total: order.total.clone(),
        version: order.version,
        placed_at: order.created_at,
        updated_at: order.updated_at,
        pay_by: order.pay_by,
        cancel_reason: order.cancel_reason.clone(),
        tracking_number: order.tracking_number.clone(),
        carrier: order.carrier.clone(),
        payments: Vec::new(),
    }
}

/// From the commit of a version to the commit of the view that shows it, in milliseconds, ascending.
fn view_latencies(parts: &Parts) -> Vec<f64> {
    let written: HashMap<(&str, i64), i64> = parts
        .outbox
        .iter()
        .map(|row| {
            (
                (row.event.entity_id.as_str(), row.event.version),
                row.committed_at_us,
            )
        })
        .collect();
    let mut latencies: Vec<f64> = parts
        .view_commits
        .iter()
        .filter_map(|view| {
            let written = written.get(&(view.order_id.as_str(), view.version))?;
            Some(((view.committed_at_us - written) as f64 / 1e3).max(0.0))
        })
        .collect();
    latencies.sort_by(f64::total_cmp);
    latencies
}

/// The nearest rank, rounded to a tenth; 0 of nothing.
fn percentile(ascending: &[f64], percent: usize) -> f64 {
    let rank = (ascending.len() * percent).div_ceil(100);
    let value = rank
        .checked_sub(1)
        .and_then(|index| ascending.get(index))
        .copied()
        .unwrap_or(0.0);
    (value * 10.0).round() / 10.0
}

fn count(length: usize) -> u64 {
    length as u64
}

#[cfg(test)]
mod tests {
    use contracts::shop::common::v1::Money;
    use uuid::Uuid;

    use super::*;

    const USER: &str = "u";

    /// Two orders, of which the second was cancelled, and all went well.
    fn parts() -> Parts {
        let mut parts = Parts::default();
        for (order_id, versions) in [("a", 1), ("b", 2)] {
            let order = Order {
                order_id: order_id.to_owned(),
                user_id: USER.to_owned(),
                status: if versions == 2 {
                    OrderStatus::Cancelled
                } else {
                    OrderStatus::Pending
                }
                .into(),
                total: Some(Money {
                    minor_units: 5,
                    currency_code: "EUR".to_owned(),
                }),
                version: versions,
                ..Order::default()
            };
            for version in 1..=versions {
                let event = event(order_id, version);
                let row = OutboxRow {
                    id: parts.outbox.len() as i64 + 1,
                    event: event.clone(),
                    committed_at_us: 1_000_000,
                };
                parts.records.push(record(&row, parts.records.len() as i64));
                parts.outbox.push(row);
                parts.events.push(event);
            }
            parts.told.push(order.clone());
            parts.views.push(expected_view(&order));
            parts
                .lists
                .entry(USER.to_owned())
                .or_default()
                .push(expected_view(&order));
            parts.view_commits.push(Committed {
                order_id: order_id.to_owned(),
                version: versions,
                committed_at_us: 1_000_000 + 7_000 * versions,
            });
            parts.state.push(order);
        }
        parts
    }

    fn event(order_id: &str, version: i64) -> EventRow {
        EventRow {
            entity_type: "order".to_owned(),
            entity_id: order_id.to_owned(),
            version,
            event_id: Uuid::new_v4(),
            event_type: "order.placed".to_owned(),
            schema_version: 1,
            payload: vec![1, 2, 3],
            correlation_id: None,
            traceparent: None,
        }
    }

    fn record(row: &OutboxRow, offset: i64) -> Record {
        let event = &row.event;
        let headers = [
            (header::CE_SPECVERSION, "1.0".to_owned()),
            (header::CE_ID, event.event_id.to_string()),
            (header::CE_TYPE, event.event_type.clone()),
            (header::CE_SUBJECT, format!("order/{}", event.entity_id)),
            (header::AGGREGATE_VERSION, event.version.to_string()),
            (header::SCHEMA_VERSION, "1".to_owned()),
            (header::OUTBOX_ID, row.id.to_string()),
        ];
        Record {
            partition: 0,
            offset,
            appended_at_ms: 1_003,
            key: Some(event.entity_id.clone().into_bytes()),
            payload: Some(event.payload.clone()),
            headers: headers
                .map(|(name, value)| (name.to_owned(), Some(value.into_bytes())))
                .into(),
        }
    }

    #[test]
    fn what_went_well_reconciles() {
        let (figures, problems) = reconcile(&parts(), Vec::new());
        assert_eq!(problems, Vec::<String>::new());
        let expected = Figures {
            placed: 2,
            cancelled: 1,
            outbox_rows: 3,
            kafka_records: 3,
            lost: 0,
            repeated: 0,
            out_of_order: 0,
            projected: 2,
            kafka_p50_ms: 3.0,
            kafka_p99_ms: 3.0,
            view_p50_ms: 7.0,
            view_p99_ms: 14.0,
            reconciled: true,
        };
        assert_eq!(figures, expected);
    }

    #[test]
    fn an_identical_repeat_is_counted_and_allowed() {
        let mut parts = parts();
        let again = Record {
            offset: 9,
            ..parts.records[1].clone()
        };
        parts.records.push(again);
        let (figures, _) = reconcile(&parts, Vec::new());
        assert!(figures.reconciled);
        assert_eq!(
            (figures.repeated, figures.kafka_records, figures.out_of_order),
            (1, 4, 0)
        );
    }

    #[track_caller]
    fn broken(spoil: impl FnOnce(&mut Parts)) -> Figures {
        let mut parts = parts();
        spoil(&mut parts);
        let (figures, problems) = reconcile(&parts, Vec::new());
        assert!(!figures.reconciled && !problems.is_empty(), "not noticed");
        figures
    }

    #[test]
    fn whatever_does_not_fit_is_noticed() {
        assert_eq!(broken(|parts| drop(parts.records.remove(2))).lost, 1);
        assert_eq!(broken(|parts| parts.records.swap(1, 2)).out_of_order, 1);
        assert_eq!(broken(|parts| parts.records[2].partition = 1).out_of_order, 1);
        broken(|parts| parts.records[0].payload = None);
        broken(|parts| parts.records[0].key = Some(b"b".to_vec()));
        broken(|parts| parts.records[0].headers[1].1 = Some(b"other".to_vec()));
        broken(|parts| parts.records[0].headers[6].1 = Some(b"99".to_vec()));
        broken(|parts| {
            let mut again = parts.records[0].clone();
            again.payload = Some(vec![9]);
            parts.records.push(again);
        });
        broken(|parts| drop(parts.events.pop()));
        broken(|parts| drop(parts.outbox.pop()));
        broken(|parts| parts.events[0].payload = vec![9]);
        broken(|parts| parts.state[0].version = 2);
        broken(|parts| drop(parts.state.pop()));
        broken(|parts| drop(parts.told.pop()));
        broken(|parts| parts.told[0].cancel_reason = "other".to_owned());
        assert_eq!(broken(|parts| drop(parts.views.pop())).projected, 1);
        assert_eq!(broken(|parts| parts.views[1].version = 1).projected, 1);
        assert_eq!(broken(|parts| parts.lists.clear()).projected, 0);
        broken(|parts| {
            let twice = parts.views[0].clone();
            parts.lists.entry(USER.to_owned()).or_default().push(twice);
        });
    }

    #[test]
    fn problems_of_the_load_count() {
        let (figures, _) = reconcile(&parts(), vec!["a repeated request got another answer".to_owned()]);
        assert!(!figures.reconciled);
    }
}
