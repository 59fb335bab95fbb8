//! Compares the parts with each other. Pure: what was read comes in, figures and differences go out.

mod journeys;
mod orders;
mod payments;
mod sources;
mod stock;
#[cfg(test)]
mod tests;
mod views;

use std::collections::{BTreeMap, HashMap};

use contracts::shop::inventory::v1::Stock;
use contracts::shop::order::events::v1::CancelledBy;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::{GetOrderJourneyResponse, OrderView};
use contracts::shop::payment::v1::{Payment, PaymentStatus};
use local_stack::measure::Figures;

use crate::databases::{EventRow, Mark, OutboxRow, Reservation};
use crate::ledger::Ledger;
use crate::load::ToldOrder;
use crate::topic::Record;

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
    HashMap::from([
        (contracts::topics::ORDER, orders.collect()),
        (contracts::topics::PAYMENT, payments.collect()),
        (contracts::topics::INVENTORY, reservations.collect()),
        (contracts::topics::STOCK, stock.collect()),
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
