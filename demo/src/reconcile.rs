//! Compares the parts with each other. Pure: what was read comes in, figures and differences go out.

mod analytics;
mod journeys;
mod mails;
mod orders;
mod payments;
mod sources;
mod stock;
#[cfg(test)]
mod tests;
mod users;
mod views;

pub(crate) use analytics::{Answer, SIZES, span};

use std::collections::{BTreeMap, HashMap};

use contracts::shop::inventory::v1::Stock;
use contracts::shop::order::events::v1::CancelledBy;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::{GetOrderJourneyResponse, OrderView};
use contracts::shop::payment::v1::{Payment, PaymentStatus};
use contracts::shop::user::v1::User;
use local_stack::measure::Figures;
use local_stack::smtp::Mail;

use crate::databases::{EventRow, MailRow, Mark, Open, OutboxRow, Reservation};
use crate::ledger::Ledger;
use crate::load::ToldOrder;
use crate::topic::Record;
use crate::users::ToldUser;

/// The events of one kind of entity, everywhere where they are.
#[derive(Debug, Default)]
pub(crate) struct Source {
    pub(crate) topic: &'static str,
    pub(crate) events: Vec<EventRow>,
    pub(crate) outbox: Vec<OutboxRow>,
    pub(crate) records: Vec<Record>,
}

/// Everything that was read.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) told: Vec<ToldOrder>,
    /// The rows of state of orders.
    pub(crate) orders: Vec<Order>,
    /// The rows of state of payments.
    pub(crate) payments: Vec<Payment>,
    /// By product, how many pieces the warehouse has put there and taken away.
    pub(crate) stocked: BTreeMap<String, i64>,
    /// The rows of state of stock.
    pub(crate) stock: Vec<Stock>,
    /// GetStock's answers.
    pub(crate) stock_answers: Vec<Stock>,
    /// The rows of state of reservations.
    pub(crate) reservations: Vec<Reservation>,
    pub(crate) users: Vec<ToldUser>,
    /// The rows of state of users.
    pub(crate) user_rows: Vec<User>,
    /// GetUser's answers.
    pub(crate) user_answers: Vec<User>,
    pub(crate) mails: Vec<MailRow>,
    /// What the mail server has taken.
    pub(crate) received: Vec<Mail>,
    /// Windows that events have told of, and the version of the last event.
    pub(crate) windows: Vec<(String, i64)>,
    /// GetSalesSummary's answers.
    pub(crate) summaries: Vec<Answer>,
    /// What has not come to its end.
    pub(crate) open: Open,
    pub(crate) sources: Vec<Source>,
    /// What the provider has done.
    pub(crate) ledger: Ledger,
    /// GetPayment's answers.
    pub(crate) answers: Vec<Payment>,
    /// GetOrderView's answers.
    pub(crate) views: Vec<OrderView>,
    /// GetOrderJourney's answers, by order.
    pub(crate) journeys: BTreeMap<String, GetOrderJourneyResponse>,
    /// ListOrders' answers, page after page, by user.
    pub(crate) lists: BTreeMap<String, Vec<OrderView>>,
    /// How far the read model has come with each entity, and when.
    pub(crate) view_marks: Vec<Mark>,
}

impl Parts {
    fn of_topic(&self, topic: &str) -> impl Iterator<Item = &Source> {
        self.sources.iter().filter(move |source| source.topic == topic)
    }

    fn events_of(&self, topic: &str) -> impl Iterator<Item = &EventRow> {
        self.of_topic(topic).flat_map(|source| &source.events)
    }

    fn records_of(&self, topic: &str) -> impl Iterator<Item = &Record> {
        self.of_topic(topic).flat_map(|source| &source.records)
    }
}

/// The figures, and in words whatever does not fit.
pub(crate) fn reconcile(parts: &Parts, mut problems: Vec<String>) -> (Figures, Vec<String>) {
    orders::compare_told(parts, &mut problems);
    orders::compare_ends(parts, &mut problems);
    payments::compare_rows(parts, &mut problems);
    payments::compare_told(parts, &mut problems);
    let (charges, refunds) = (payments::compare_charges(parts), payments::compare_refunds(parts));
    let (charges_match, refunds_match) = (charges.is_empty(), refunds.is_empty());
    problems.extend(charges);
    problems.extend(refunds);

    let stock = stock::compare(parts);
    let stock_conserved = stock.is_empty();
    problems.extend(stock);
    users::compare(parts, &mut problems);
    let mails = mails::compare(parts);
    let mails_match = mails.is_empty();
    problems.extend(mails);
    let analytics = analytics::compare(parts);
    let analytics_match = analytics.is_empty();
    problems.extend(analytics);
    if parts.open != Open::default() {
        problems.push(format!("not everything has come to its end: {:?}", parts.open));
    }

    let versions = versions(parts);
    let mut kafka = sources::Kafka::default();
    for source in &parts.sources {
        let nothing = HashMap::new();
        let state = versions.get(source.topic).unwrap_or(&nothing);
        sources::compare_history(source, state, &mut problems);
        kafka.add(sources::compare_topic(source, &mut problems));
    }
    let projected = views::compare_views(parts, &mut problems);
    if projected != count(parts.orders.len()) {
        problems.push(format!(
            "the read model has {projected} of {} orders right",
            parts.orders.len()
        ));
    }
    journeys::compare(parts, &mut problems);
    let to_kafka = ascending(kafka.latencies);
    let to_view = ascending(views::latencies(parts));
    let cancelled = |order: &&Order| order.status() == OrderStatus::Cancelled;
    let shipped = |order: &&Order| matches!(order.status(), OrderStatus::Shipped | OrderStatus::Delivered);
    let declined = |payment: &&Payment| {
        let failure = payment.failure;
        failure.is_some_and(|failure| payments::is_decline(failure.reason()))
    };
    let refunded = |payment: &&Payment| payment.status() == PaymentStatus::Refunded;
    let mails_in = |state: &str| count(parts.mails.iter().filter(|mail| mail.state == state).count());
    let outbox_rows = parts.sources.iter().map(|source| source.outbox.len()).sum();
    let figures = Figures {
        placed: count(parts.told.len()),
        cancelled: count(parts.orders.iter().filter(cancelled).count()),
        out_of_stock: count(orders::cancelled_by(parts, CancelledBy::OutOfStock)),
        shipped: count(parts.orders.iter().filter(shipped).count()),
        paid: count(
            parts
                .payments
                .iter()
                .filter(|payment| payments::is_taken(payment))
                .count(),
        ),
        declined: count(parts.payments.iter().filter(declined).count()),
        refunded: count(parts.payments.iter().filter(refunded).count()),
        outbox_rows: count(outbox_rows),
        kafka_records: kafka.records,
        lost: kafka.lost,
        repeated: kafka.repeated,
        out_of_order: kafka.out_of_order,
        projected,
        charges_match,
        refunds_match,
        stock_conserved,
        mails_match,
        mails_sent: mails_in("sent"),
        mails_unknown: mails_in("unknown"),
        analytics_match,
        sagas_open: parts.open.sagas,
        kafka_p50_ms: percentile(&to_kafka, 50),
        kafka_p99_ms: percentile(&to_kafka, 99),
        view_p50_ms: percentile(&to_view, 50),
        view_p99_ms: percentile(&to_view, 99),
        reconciled: problems.is_empty(),
    };
    (figures, problems)
}

/// By topic, the version that each entity's row of state has reached.
fn versions(parts: &Parts) -> HashMap<&'static str, HashMap<&str, i64>> {
    let orders = parts.orders.iter();
    let orders = orders.map(|order| (order.order_id.as_str(), order.version));
    let payments = parts.payments.iter();
    let payments = payments.map(|payment| (payment.payment_id.as_str(), payment.version));
    let reservations = parts.reservations.iter();
    let reservations = reservations.map(|reservation| (reservation.order_id.as_str(), reservation.version));
    let stock = parts.stock.iter();
    let stock = stock.map(|stock| (stock.product_id.as_str(), stock.version));
    let users = parts.user_rows.iter();
    let users = users.map(|user| (user.user_id.as_str(), user.version));
    // Of a mail there is nothing to tell but that it was sent: what the events say, the comparison of mails holds against the rows.
    let sent = parts.events_of(contracts::topics::NOTIFICATION);
    let sent = sent.map(|event| (event.entity_id.as_str(), 1));
    let windows = parts.windows.iter();
    let windows = windows.map(|(window, version)| (window.as_str(), *version));
    HashMap::from([
        (contracts::topics::ORDER, orders.collect()),
        (contracts::topics::PAYMENT, payments.collect()),
        (contracts::topics::INVENTORY, reservations.collect()),
        (contracts::topics::STOCK, stock.collect()),
        (contracts::topics::USER, users.collect()),
        (contracts::topics::NOTIFICATION, sent.collect()),
        (contracts::topics::ORDER_ANALYTICS, windows.collect()),
    ])
}

fn ascending(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
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
