//! What the read model tells of where an order's events have been, against the topics themselves.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contracts::catalogue::order::PLACED;
use contracts::shop::notification::events::v1::NotificationSent;
use contracts::shop::orderquery::v1::JourneyEvent;
use contracts::topics::{INVENTORY, NOTIFICATION, ORDER, PAYMENT};
use contracts::wire;
use envelope::header;
use prost::Message as _;

use super::Parts;
use crate::topic::Record;

/// Every order's journey has the first record of each of its events, and nothing else.
pub(super) fn compare(parts: &Parts, problems: &mut Vec<String>) {
    let expected = expected(parts);
    let nothing = Vec::new();
    for order in &parts.orders {
        let id = order.order_id.as_str();
        let Some(journey) = parts.journeys.get(id) else {
            problems.push(format!("GetOrderJourney does not have order {id}"));
            continue;
        };
        if !journey.parked.is_empty() {
            problems.push(format!("records of order {id} are parked: {:?}", journey.parked));
        }
        if journey
            .events
            .first()
            .is_none_or(|event| event.event_type != PLACED)
        {
            problems.push(format!(
                "the journey of order {id} does not begin with its placing"
            ));
        }
        let told: Vec<&JourneyEvent> = by_place(&journey.events);
        let there = by_place(expected.get(id).unwrap_or(&nothing));
        if told != there {
            let missing: Vec<_> = there.iter().filter(|event| !told.contains(event)).collect();
            let wrong: Vec<_> = told.iter().filter(|event| !there.contains(event)).collect();
            problems.push(format!(
                "the journey of order {id} has {} events, and the topics {}; it lacks {missing:?} and has {wrong:?}",
                told.len(),
                there.len()
            ));
        }
    }
}

fn by_place(events: &[JourneyEvent]) -> Vec<&JourneyEvent> {
    let mut events: Vec<&JourneyEvent> = events.iter().collect();
    events.sort_by_key(|event| (&event.topic, event.partition, event.offset));
    events
}

/// By order, what the topics have of it.
pub(super) fn expected(parts: &Parts) -> BTreeMap<String, Vec<JourneyEvent>> {
    let payments = parts.payments.iter();
    let of_payment: HashMap<&str, &str> = payments
        .map(|payment| (payment.payment_id.as_str(), payment.order_id.as_str()))
        .collect();
    let mut journeys: BTreeMap<String, Vec<JourneyEvent>> = BTreeMap::new();
    for source in &parts.sources {
        let mut seen = BTreeSet::new();
        for record in &source.records {
            let order_id = match source.topic {
                ORDER | INVENTORY => Some(record.key_text().to_owned()),
                PAYMENT => of_payment.get(record.key_text()).map(|id| (*id).to_owned()),
                NOTIFICATION => NotificationSent::decode(record.payload.as_deref().unwrap_or_default())
                    .ok()
                    .map(|sent| sent.order_id),
                _ => None,
            };
            if let (Some(order_id), true) = (order_id, seen.insert(record.header(header::CE_ID))) {
                let events = journeys.entry(order_id).or_default();
                events.push(event(source.topic, record));
            }
        }
    }
    journeys
}

fn event(topic: &str, record: &Record) -> JourneyEvent {
    let text = |name| record.header(name).unwrap_or_default().to_owned();
    let time = record.header(header::CE_TIME).and_then(|time| time.parse().ok());
    let trace = text(header::TRACEPARENT);
    JourneyEvent {
        event_id: text(header::CE_ID),
        event_type: text(header::CE_TYPE),
        entity_id: record.key_text().to_owned(),
        version: text(header::AGGREGATE_VERSION).parse().unwrap_or_default(),
        occurred_at: time.map(wire::timestamp),
        topic: topic.to_owned(),
        partition: record.partition,
        offset: record.offset,
        trace_id: trace.split('-').nth(1).unwrap_or_default().to_owned(),
    }
}
