//! Orders, as clients were told, as they are, and by their payments.

use std::collections::{BTreeSet, HashMap};

use contracts::catalogue::order::CANCELLED;
use contracts::shop::order::events::v1::{CancelledBy, OrderCancelled};
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::payment::events::v1::FailureReason;
use contracts::shop::payment::v1::{Payment, PaymentStatus};
use prost::Message as _;

use super::Parts;
use crate::load::ToldOrder;

/// What clients were told is what the rows of state say, as far as nothing has happened since.
pub(super) fn compare_told(parts: &Parts, problems: &mut Vec<String>) {
    let state: HashMap<&str, &Order> = parts
        .orders
        .iter()
        .map(|order| (order.order_id.as_str(), order))
        .collect();
    for told in &parts.told {
        match state.get(told.placed.order_id.as_str()) {
            Some(row) => compare(told, row, problems),
            None => problems.push(format!(
                "order {} was acknowledged and is not there",
                told.placed.order_id
            )),
        }
    }
    let told: BTreeSet<&str> = parts
        .told
        .iter()
        .map(|order| order.placed.order_id.as_str())
        .collect();
    if told.len() != parts.told.len() {
        problems.push("two requests were told of the same order".to_owned());
    }
    for row in parts
        .orders
        .iter()
        .filter(|row| !told.contains(row.order_id.as_str()))
    {
        problems.push(format!("order {} is there and nobody placed it", row.order_id));
    }
}

fn compare(told: &ToldOrder, row: &Order, problems: &mut Vec<String>) {
    // What an order is at its beginning; the rest is what happens to it.
    let as_placed = Order {
        status: told.placed.status,
        version: told.placed.version,
        updated_at: told.placed.updated_at,
        cancel_reason: String::new(),
        payment_id: String::new(),
        tracking_number: String::new(),
        carrier: String::new(),
        ..row.clone()
    };
    if as_placed != told.placed || row.version < told.placed.version {
        problems.push(format!(
            "a client was told {:?}, and the row of state is {row:?}",
            told.placed
        ));
    }
    // Nothing happens any more to an order that is cancelled or delivered, and to one that is shipped only that.
    let shipped = told.shipped.as_ref().filter(|_| told.delivered.is_none());
    for last in [&told.cancelled, &told.delivered]
        .into_iter()
        .flatten()
        .chain(shipped)
    {
        if last != row {
            problems.push(format!(
                "a client was told {last:?}, and the row of state is {row:?}"
            ));
        }
    }
    let status = row.status();
    if told.shipped.is_none() && [OrderStatus::Shipped, OrderStatus::Delivered].contains(&status) {
        problems.push(format!("nobody has shipped {row:?}"));
    }
}

/// Every order has come to its end, and by its payments to the right one.
pub(super) fn compare_ends(parts: &Parts, problems: &mut Vec<String>) {
    let mut payments: HashMap<&str, Vec<&Payment>> = HashMap::new();
    for payment in &parts.payments {
        payments.entry(&payment.order_id).or_default().push(payment);
    }
    let told: HashMap<&str, &ToldOrder> = parts
        .told
        .iter()
        .map(|told| (told.placed.order_id.as_str(), told))
        .collect();
    let cancellations = cancellations(parts);
    let reservations: HashMap<&str, &str> = parts
        .reservations
        .iter()
        .map(|reservation| (reservation.order_id.as_str(), reservation.status.as_str()))
        .collect();
    for order in &parts.orders {
        let id = order.order_id.as_str();
        let payments = payments.remove(id).unwrap_or_default();
        let wrong = match (order.status(), cancellations.get(id)) {
            (OrderStatus::Confirmed | OrderStatus::Shipped | OrderStatus::Delivered, None) => {
                paid(order, &payments)
            }
            (OrderStatus::Cancelled, Some(cancelled)) => cancelled_rightly(
                order,
                &payments,
                cancelled,
                told.get(id).copied(),
                reservations.get(id).copied(),
            ),
            (status, _) => Some(format!("has not come to its end, but is {status:?}")),
        };
        if let Some(wrong) = wrong {
            problems.push(format!("order {id} {wrong}; its payments are {payments:?}"));
        }
    }
    for (order, payments) in payments {
        problems.push(format!(
            "there is no order {order}, and there are payments {payments:?}"
        ));
    }
}

/// How many orders were cancelled so.
pub(super) fn cancelled_by(parts: &Parts, by: CancelledBy) -> usize {
    let cancellations = cancellations(parts);
    let so = cancellations
        .values()
        .filter(|cancelled| cancelled.cancelled_by() == by);
    so.count()
}

/// By order, its cancellation.
fn cancellations(parts: &Parts) -> HashMap<&str, OrderCancelled> {
    let events = parts.sources.iter().flat_map(|source| &source.events);
    events
        .filter(|event| event.event_type == CANCELLED)
        .filter_map(|event| {
            let cancelled = OrderCancelled::decode(event.payload.as_slice()).ok()?;
            Some((event.entity_id.as_str(), cancelled))
        })
        .collect()
}

fn with_status<'a>(payments: &[&'a Payment], status: PaymentStatus) -> Vec<&'a Payment> {
    payments
        .iter()
        .filter(|payment| payment.status() == status)
        .copied()
        .collect()
}

fn paid(order: &Order, payments: &[&Payment]) -> Option<String> {
    match with_status(payments, PaymentStatus::Received).as_slice() {
        [payment] if payment.payment_id == order.payment_id && payment.amount == order.total => None,
        _ => Some(format!("is paid by {:?}, which does not fit", order.payment_id)),
    }
}

fn cancelled_rightly(
    order: &Order,
    payments: &[&Payment],
    cancelled: &OrderCancelled,
    told: Option<&ToldOrder>,
    reservation: Option<&str>,
) -> Option<String> {
    if !with_status(payments, PaymentStatus::Received).is_empty() {
        return Some("is cancelled, and its money is kept".to_owned());
    }
    let refunded = with_status(payments, PaymentStatus::Refunded);
    let last_word = |reason: Option<FailureReason>| {
        payments.iter().any(|payment| {
            payment.failure.is_some_and(|failure| {
                !failure.another_try && reason.is_none_or(|reason| failure.reason() == reason)
            })
        })
    };
    let by = cancelled.cancelled_by();
    let rightly = match by {
        CancelledBy::User => told.is_some_and(|told| told.cancelled.is_some()),
        CancelledBy::OutOfStock => reservation == Some("rejected"),
        CancelledBy::NotPaidInTime => refunded.is_empty() && last_word(None),
        CancelledBy::PaymentFailed => refunded.is_empty() && last_word(None),
        CancelledBy::Refund => refunded.len() == 1 && refunded[0].payment_id == order.payment_id,
        _ => false,
    };
    if !rightly {
        return Some(format!("was cancelled by {by:?}, which does not fit"));
    }
    if told.is_some_and(|told| told.cancelled.is_some()) && by != CancelledBy::User {
        return Some(format!("was cancelled by its user, and the event says {by:?}"));
    }
    if !order.payment_id.is_empty() && refunded.is_empty() {
        return Some("was paid and cancelled, and nothing was given back".to_owned());
    }
    None
}
