//! Orders and payments of every kind as events, and the figures that must come of them, computed from the whole of it.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use contracts::catalogue::{order as types, payment as payment_types};
use contracts::shop::analytics::events::v1::{ProductSales, SalesFigures, WindowSize};
use contracts::shop::analytics::v1::SalesWindow;
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as events;
use contracts::shop::payment::events::v1 as payments;
use contracts::wire::timestamp;
use envelope::Envelope;
use futures::future::join_all;
use local_stack::testing::events::envelope;
use prost::Message as _;
use uuid::Uuid;

use crate::stage::Stage;

/// What becomes of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Pending,
    Confirmed,
    /// After it was confirmed; its money goes back.
    Returned,
    /// Before it was paid.
    Cancelled,
    /// The same; the money comes all the same, and goes back.
    PaidTooLate,
}

/// An order with all that happens to it.
#[derive(Debug, Clone)]
pub(crate) struct Story {
    pub(crate) order: Uuid,
    pub(crate) placed_at: DateTime<Utc>,
    pub(crate) currency: &'static str,
    /// Product, pieces, price of one.
    pub(crate) lines: Vec<(u128, i32, i64)>,
    pub(crate) fate: Fate,
    /// The first payment failed.
    pub(crate) failed_first: bool,
}

pub(crate) type Event = (Envelope, Vec<u8>);

impl Story {
    pub(crate) fn new(placed_at: DateTime<Utc>, fate: Fate) -> Self {
        Self {
            order: Uuid::now_v7(),
            placed_at,
            currency: "EUR",
            lines: vec![(1, 2, 250)],
            fate,
            failed_first: false,
        }
    }

    /// One of many: of every kind, over some hours around midnight.
    pub(crate) fn numbered(number: i64) -> Self {
        let fates = [
            Fate::Pending,
            Fate::Confirmed,
            Fate::Returned,
            Fate::Cancelled,
            Fate::PaidTooLate,
        ];
        let pick = |modulus: i64| usize::try_from(number % modulus).unwrap();
        let quantity = i32::try_from(1 + number % 7).unwrap();
        Self {
            currency: ["EUR", "JPY", "EUR"][pick(3)],
            lines: vec![
                (u128::from(number.unsigned_abs() % 6), quantity, 100 + number % 13),
                (7 + u128::from(number.unsigned_abs() % 4), 1, 0),
            ],
            failed_first: number % 4 == 0,
            ..Self::new(at(number * 37), fates[pick(5)])
        }
    }

    pub(crate) fn total(&self) -> i64 {
        let lines = self.lines.iter();
        let total = lines.map(|(_, quantity, price)| i128::from(*quantity) * i128::from(*price));
        total.sum::<i128>().try_into().unwrap()
    }

    fn money(&self) -> Option<Money> {
        Some(Money {
            minor_units: self.total(),
            currency_code: self.currency.to_owned(),
        })
    }

    pub(crate) fn placed(&self) -> Vec<u8> {
        let line = |(product, quantity, price): &(u128, i32, i64)| events::OrderLine {
            product_id: Uuid::from_u128(*product).to_string(),
            quantity: *quantity,
            unit_price_minor_units: *price,
        };
        events::OrderPlaced {
            user_id: Uuid::from_u128(9).to_string(),
            items: self.lines.iter().map(line).collect(),
            total: self.money(),
            created_at: Some(timestamp(self.placed_at)),
            ..Default::default()
        }
        .encode_to_vec()
    }

    /// Of the order.
    pub(crate) fn history(&self) -> Vec<Event> {
        let mut events = vec![(types::PLACED, self.placed())];
        let empty = |types: &[&'static str]| types.iter().map(|name| (*name, Vec::new())).collect::<Vec<_>>();
        let paid = events::OrderPaid {
            payment_id: Uuid::from_u128(3).to_string(),
            ..Default::default()
        };
        if matches!(self.fate, Fate::Confirmed | Fate::Returned) {
            events.extend(empty(&[types::RESERVED]));
            events.push((types::PAID, paid.encode_to_vec()));
            events.extend(empty(&[types::CONFIRMED]));
        }
        if matches!(self.fate, Fate::Returned | Fate::Cancelled | Fate::PaidTooLate) {
            events.extend(empty(&[types::CANCELLED]));
        }
        versions(types::ENTITY_TYPE, self.order, events)
    }

    /// Of each of its payments.
    pub(crate) fn payments(&self) -> Vec<Vec<Event>> {
        let (order_id, amount) = (self.order.to_string(), self.money());
        let failed = payments::PaymentFailed {
            order_id: order_id.clone(),
            amount: amount.clone(),
            another_try: true,
            ..Default::default()
        };
        let mut histories = Vec::new();
        if self.failed_first {
            let events = vec![(payment_types::FAILED, failed.encode_to_vec())];
            histories.push(versions(payment_types::ENTITY_TYPE, Uuid::now_v7(), events));
        }
        let received = payments::PaymentReceived {
            order_id: order_id.clone(),
            amount: amount.clone(),
            ..Default::default()
        };
        let refunded = payments::PaymentRefunded {
            order_id,
            amount,
            ..Default::default()
        };
        let mut events = Vec::new();
        if self.received() > 0 {
            events.push((payment_types::RECEIVED, received.encode_to_vec()));
        }
        if self.refunded() > 0 {
            events.push((payment_types::REFUNDED, refunded.encode_to_vec()));
        }
        histories.push(versions(payment_types::ENTITY_TYPE, Uuid::now_v7(), events));
        histories
    }

    fn received(&self) -> i64 {
        match self.fate {
            Fate::Pending | Fate::Cancelled => 0,
            Fate::Confirmed | Fate::Returned | Fate::PaidTooLate => self.total(),
        }
    }

    fn refunded(&self) -> i64 {
        match self.fate {
            Fate::Pending | Fate::Cancelled | Fate::Confirmed => 0,
            Fate::Returned | Fate::PaidTooLate => self.total(),
        }
    }
}

/// The beginning of the stories: a quarter to midnight of UTC.
pub(crate) fn at(second: i64) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339("2026-03-01T23:45:00Z")
        .unwrap()
        .to_utc()
        + TimeDelta::seconds(second)
}

fn versions(entity_type: &str, entity: Uuid, events: Vec<(&'static str, Vec<u8>)>) -> Vec<Event> {
    (1..)
        .zip(events)
        .map(|(version, (name, payload))| {
            (envelope(entity_type, &entity.to_string(), version, name), payload)
        })
        .collect()
}

/// Publishes stories, each topic at its own pace and some events again and again; returns how many events there were, repeats not
/// counted.
pub(crate) async fn publish(stage: &Stage, stories: &[Story]) -> i64 {
    let mut published = 0;
    for few in stories.chunks(40) {
        let histories: Vec<Vec<Event>> = few
            .iter()
            .flat_map(|story| [story.payments(), vec![story.history()]].concat())
            .collect();
        published += histories.iter().map(Vec::len).sum::<usize>();
        join_all(histories.iter().enumerate().map(async |(number, history)| {
            for (envelope, payload) in history {
                stage.publish(envelope, payload).await;
                if number % 4 == 0 {
                    stage.publish(envelope, payload).await;
                }
            }
            // Late, too, when all of it is known.
            if number % 9 == 0 {
                for (envelope, payload) in history {
                    stage.publish(envelope, payload).await;
                }
            }
        }))
        .await;
    }
    i64::try_from(published).unwrap()
}

/// The figures of all windows of a size, by the rules in words.
pub(crate) fn figures_of(stories: &[Story], size: WindowSize) -> Vec<SalesWindow> {
    #[derive(Default)]
    struct Sums {
        figures: SalesFigures,
        products: BTreeMap<Uuid, (i64, i64)>,
    }
    let seconds = match size {
        WindowSize::Minute => 60,
        WindowSize::Hour => 3600,
        _ => 86400,
    };
    let mut windows: BTreeMap<i64, BTreeMap<&str, Sums>> = BTreeMap::new();
    for story in stories {
        let window = windows
            .entry(story.placed_at.timestamp() / seconds * seconds)
            .or_default();
        let Sums { figures, products } = window.entry(story.currency).or_default();
        figures.orders_placed += 1;
        figures.orders_confirmed += i64::from(matches!(story.fate, Fate::Confirmed | Fate::Returned));
        figures.orders_cancelled += i64::from(!matches!(story.fate, Fate::Confirmed | Fate::Pending));
        figures.revenue_minor_units += story.received() - story.refunded();
        figures.refunded_minor_units += story.refunded();
        if story.fate == Fate::Confirmed {
            for (product, quantity, price) in &story.lines {
                let sum = products.entry(Uuid::from_u128(*product)).or_default();
                sum.0 += i64::from(*quantity);
                sum.1 += i64::from(*quantity) * price;
            }
        }
    }
    let window = |(start, currencies): (i64, BTreeMap<&str, Sums>)| {
        let (mut placed, mut confirmed) = (0, 0);
        let figures = currencies.into_iter().map(|(currency, sums)| {
            let Sums { figures, products } = sums;
            placed += figures.orders_placed;
            confirmed += figures.orders_confirmed;
            let mut best: Vec<(Uuid, (i64, i64))> = products.into_iter().collect();
            best.sort_by_key(|(product, (quantity, _))| (-quantity, *product));
            let best = best.into_iter().take(10);
            SalesFigures {
                currency_code: currency.to_owned(),
                best_sellers: best
                    .map(|(product, (quantity, revenue))| ProductSales {
                        product_id: product.to_string(),
                        quantity,
                        revenue_minor_units: revenue,
                    })
                    .collect(),
                ..figures
            }
        });
        let figures = figures.collect();
        SalesWindow {
            window_size: size.into(),
            window_start: DateTime::from_timestamp(start, 0).map(timestamp),
            figures,
            conversion: f64::from(confirmed as i32) / f64::from(placed as i32),
        }
    };
    windows.into_iter().map(window).collect()
}
