//! What happens to orders, as order-svc and payment-svc tell it: the histories of many orders, mixed as they come in time.

use chrono::{DateTime, TimeDelta, Utc};
use contracts::catalogue::{EVENTS, order as order_types, payment as payment_types};
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as order_events;
use contracts::shop::payment::events::v1 as payment_events;
use contracts::wire::timestamp;
use envelope::Envelope;
use prost::Message as _;
use uuid::Uuid;

/// Orders a second at which they were placed.
const RATE: u64 = 500;
/// Who they are of.
const USERS: u64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Placed,
    Reserved,
    Received,
    Declined,
    Paid,
    Confirmed,
    Shipped,
    Completed,
    Cancelled,
    Refunded,
}

/// What happens, and how many orders are placed between the first event and this one.
type Story = &'static [(u64, Step)];

/// Eight in ten.
const DELIVERED: Story = &[
    (0, Step::Placed),
    (20, Step::Reserved),
    (400, Step::Received),
    (420, Step::Paid),
    (430, Step::Confirmed),
    (8_000, Step::Shipped),
    (20_000, Step::Completed),
];
const DECLINED: Story = &[
    (0, Step::Placed),
    (20, Step::Reserved),
    (400, Step::Declined),
    (900, Step::Cancelled),
];
const GIVEN_BACK: Story = &[
    (0, Step::Placed),
    (20, Step::Reserved),
    (400, Step::Received),
    (420, Step::Paid),
    (430, Step::Confirmed),
    (3_000, Step::Cancelled),
    (3_400, Step::Refunded),
];

fn story(order: u64) -> Story {
    match order % 10 {
        3 => DECLINED,
        6 => GIVEN_BACK,
        _ => DELIVERED,
    }
}

/// Which of the two topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Order,
    Payment,
}

impl Step {
    fn source(self) -> Source {
        match self {
            Self::Received | Self::Declined | Self::Refunded => Source::Payment,
            _ => Source::Order,
        }
    }

    fn event_type(self) -> &'static str {
        match self {
            Self::Placed => order_types::PLACED,
            Self::Reserved => order_types::RESERVED,
            Self::Paid => order_types::PAID,
            Self::Confirmed => order_types::CONFIRMED,
            Self::Shipped => order_types::SHIPPED,
            Self::Completed => order_types::COMPLETED,
            Self::Cancelled => order_types::CANCELLED,
            Self::Received => payment_types::RECEIVED,
            Self::Declined => payment_types::FAILED,
            Self::Refunded => payment_types::REFUNDED,
        }
    }
}

/// Whether some keys are bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poison {
    None,
    /// The first event of one order in a hundred and of one payment in a hundred cannot be read, each of a different order.
    OneInHundred,
}

impl Poison {
    /// Whether this is a bad key, whose records all park.
    fn hits(self, order: u64, source: Source) -> bool {
        let bad = match source {
            Source::Order => 25,
            Source::Payment => 75,
        };
        self == Self::OneInHundred && order % 100 == bad
    }
}

/// An event as it is published.
pub(crate) struct Event {
    pub(crate) source: Source,
    pub(crate) envelope: Envelope,
    pub(crate) payload: Vec<u8>,
    /// Its key is not poisoned.
    pub(crate) is_good: bool,
}

/// The events of so many orders, in the order in which they happen; the last ones just now.
pub(crate) fn events(orders: u64, poison: Poison) -> impl Iterator<Item = Event> {
    let longest = [DELIVERED, DECLINED, GIVEN_BACK].into_iter().flatten();
    let longest = longest.map(|(delay, _)| *delay).max().unwrap_or_default();
    let turns = orders + longest;
    let began = Utc::now() - time_of(turns);
    // The delays of all stories: which of them an order's story has is looked up.
    let mut delays: Vec<u64> = [DELIVERED, DECLINED, GIVEN_BACK]
        .into_iter()
        .flatten()
        .map(|(delay, _)| *delay)
        .collect();
    delays.sort_unstable();
    delays.dedup();
    (0..turns).flat_map(move |turn| {
        let of_delay = move |delay: &u64| {
            let order = turn.checked_sub(*delay).filter(|order| *order < orders)?;
            let position = story(order).iter().position(|(at, _)| at == delay)?;
            Some(event(order, position, began, poison))
        };
        delays.iter().filter_map(of_delay).collect::<Vec<_>>()
    })
}

fn time_of(turns: u64) -> TimeDelta {
    TimeDelta::milliseconds((turns * 1000 / RATE).cast_signed())
}

fn event(order: u64, position: usize, began: DateTime<Utc>, poison: Poison) -> Event {
    let (delay, step) = story(order)[position];
    let source = step.source();
    let before = story(order)[..position].iter();
    let version = 1 + before.filter(|(_, earlier)| earlier.source() == source).count() as i64;
    let placed_at = began + time_of(order);
    let occurred_at = began + time_of(order + delay);
    let ids = Ids::of(order, placed_at);
    let (entity_type, entity_id, emitter) = match source {
        Source::Order => (order_types::ENTITY_TYPE, ids.order, "/order-svc"),
        Source::Payment => (payment_types::ENTITY_TYPE, ids.payment, "/payment-svc"),
    };
    let is_good = !poison.hits(order, source);
    let event_type = step.event_type();
    let schema = EVENTS.iter().find(|(name, ..)| *name == event_type);
    let mut random = Random(order * 16 + position as u64);
    Event {
        source,
        envelope: Envelope {
            event_id: time_ordered(occurred_at, &mut random),
            event_type: event_type.to_owned(),
            source: emitter.to_owned(),
            entity_type: entity_type.to_owned(),
            entity_id: entity_id.to_string(),
            version,
            schema_version: 1,
            occurred_at,
            content_type: envelope::CONTENT_TYPE_PROTOBUF.to_owned(),
            data_schema: schema.map(|(.., message)| (*message).to_owned()),
            correlation_id: Some(ids.order),
            causation_id: Some(random.id()),
            traceparent: Some(format!(
                "00-{}-{:016x}-01",
                random.id().as_simple(),
                random.next() | 1
            )),
            tracestate: None,
            outbox_id: Some((order * 16 + position as u64).cast_signed()),
            metadata: [].into(),
        },
        payload: match is_good || version > 1 {
            true => payload(step, order, &ids, placed_at, occurred_at),
            // Neither an OrderPlaced nor anything else.
            false => b"\xff\xff".to_vec(),
        },
        is_good,
    }
}

fn payload(
    step: Step,
    order: u64,
    ids: &Ids,
    placed_at: DateTime<Utc>,
    occurred_at: DateTime<Utc>,
) -> Vec<u8> {
    let order_id = ids.order.to_string();
    let payment_id = ids.payment.to_string();
    let at = Some(timestamp(occurred_at));
    let items: Vec<order_events::OrderLine> = (0..1 + order % 3)
        .map(|line| order_events::OrderLine {
            product_id: Random(order * 3 + line).id().to_string(),
            quantity: 1 + (order % 4) as i32,
            unit_price_minor_units: 99 + (order * 31 + line * 7) as i64 % 90_000,
        })
        .collect();
    let total = items
        .iter()
        .map(|item| i64::from(item.quantity) * item.unit_price_minor_units);
    let amount = Some(Money {
        minor_units: total.sum(),
        currency_code: ["EUR", "USD", "GBP"][order as usize % 3].to_owned(),
    });
    let (brand, last_four) = ("visa".to_owned(), format!("{:04}", order % 10_000));
    let method = Some(payment_events::PaymentMethodSummary {
        brand: brand.clone(),
        last_four: last_four.clone(),
    });
    let provider_reference = format!("ch_{:024x}", ids.payment.as_u128() & (u128::MAX >> 32));
    match step {
        Step::Placed => order_events::OrderPlaced {
            order_id,
            user_id: Random(order % USERS).id().to_string(),
            items,
            total: amount,
            user_email: None,
            payment_method_id: None,
            pay_by: Some(timestamp(placed_at + TimeDelta::minutes(30))),
            created_at: at,
        }
        .encode_to_vec(),
        Step::Reserved => order_events::OrderReserved {
            order_id,
            reserved_at: at,
        }
        .encode_to_vec(),
        Step::Paid => order_events::OrderPaid {
            order_id,
            payment_id,
            amount,
            payment_method: Some(order_events::PaymentMethodSummary { brand, last_four }),
            paid_at: at,
        }
        .encode_to_vec(),
        Step::Confirmed => order_events::OrderConfirmed {
            order_id,
            confirmed_at: at,
        }
        .encode_to_vec(),
        Step::Shipped => order_events::OrderShipped {
            order_id,
            tracking_number: format!("TRACK-{order:012}"),
            carrier: "DHL".to_owned(),
            shipped_at: at,
        }
        .encode_to_vec(),
        Step::Completed => order_events::OrderCompleted {
            order_id,
            delivered_at: at,
        }
        .encode_to_vec(),
        Step::Cancelled => order_events::OrderCancelled {
            order_id,
            cancelled_by: order_events::CancelledBy::User.into(),
            reason: "changed my mind".to_owned(),
            cancelled_at: at,
        }
        .encode_to_vec(),
        Step::Received => payment_events::PaymentReceived {
            payment_id,
            order_id,
            amount,
            payment_method: method,
            provider_reference,
            received_at: at,
        }
        .encode_to_vec(),
        Step::Declined => payment_events::PaymentFailed {
            payment_id,
            order_id,
            amount,
            payment_method: method,
            reason: payment_events::FailureReason::Declined.into(),
            another_try: true,
            provider_reference: Some(provider_reference),
            failed_at: at,
        }
        .encode_to_vec(),
        Step::Refunded => payment_events::PaymentRefunded {
            payment_id,
            order_id,
            amount,
            payment_method: method,
            refund_reference: provider_reference.replace("ch_", "re_"),
            provider_reference,
            refunded_at: at,
        }
        .encode_to_vec(),
    }
}

/// Those of an order's entities, which carry the time like all that services make.
struct Ids {
    order: Uuid,
    payment: Uuid,
}

impl Ids {
    fn of(order: u64, placed_at: DateTime<Utc>) -> Self {
        let mut random = Random(order << 32);
        Self {
            order: time_ordered(placed_at, &mut random),
            payment: time_ordered(placed_at + TimeDelta::milliseconds(600), &mut random),
        }
    }
}

fn time_ordered(at: DateTime<Utc>, random: &mut Random) -> Uuid {
    let [high, low] = [random.next(), random.next()].map(u64::to_be_bytes);
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&high);
    bytes[8..].copy_from_slice(&low[..2]);
    let millis = u64::try_from(at.timestamp_millis()).unwrap_or_default();
    uuid::Builder::from_unix_timestamp_millis(millis, &bytes).into_uuid()
}

/// SplitMix64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn id(&mut self) -> Uuid {
        let [high, low] = [self.next(), self.next()];
        uuid::Builder::from_random_bytes(((u128::from(high) << 64) | u128::from(low)).to_be_bytes())
            .into_uuid()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn versions_count_and_each_entity_has_a_key_of_its_own() {
        let mut versions: HashMap<String, i64> = HashMap::new();
        let (mut count, mut bad) = (0, 0);
        for event in events(1_000, Poison::OneInHundred) {
            let version = versions.entry(event.envelope.entity_id.clone()).or_default();
            *version += 1;
            assert_eq!(event.envelope.version, *version);
            assert!(event.envelope.occurred_at <= Utc::now());
            count += 1;
            bad += u32::from(!event.is_good);
        }
        assert_eq!((versions.len(), count), (2_000, 6_700));
        assert_eq!(bad, 10 * (6 + 1));
    }
}
