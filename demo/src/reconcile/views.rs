//! What the read model answers.

use std::collections::HashMap;

use contracts::shop::order::v1::Order;
use contracts::shop::orderquery::v1::{OrderView, PaymentView};
use contracts::shop::payment::v1::Payment;

use super::Parts;

/// How many orders the read model answers as they are, by both of its calls.
pub(super) fn compare_views(parts: &Parts, problems: &mut Vec<String>) -> u64 {
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
    let payments = payments_by_order(parts);
    for order in &parts.orders {
        let expected = expected_view(
            order,
            payments.get(order.order_id.as_str()).map_or(&[], Vec::as_slice),
        );
        let mut both = true;
        for (call, found) in [("GetOrderView", &views), ("ListOrders", &listed)] {
            match found.get(order.order_id.as_str()) {
                Some(view) if sorted(view) == expected => {}
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
    if listed.len() > parts.orders.len() {
        problems.push("ListOrders lists orders that nobody placed".to_owned());
    }
    right
}

/// Payments that have had an event, by their order.
fn payments_by_order(parts: &Parts) -> HashMap<&str, Vec<&Payment>> {
    let mut by_order: HashMap<&str, Vec<&Payment>> = HashMap::new();
    for payment in parts.payments.iter().filter(|payment| payment.version > 0) {
        by_order.entry(&payment.order_id).or_default().push(payment);
    }
    by_order
}

/// What the read model has to say about an order; its payments by their ids.
pub(super) fn expected_view(order: &Order, payments: &[&Payment]) -> OrderView {
    let payments = payments.iter().map(|payment| PaymentView {
        payment_id: payment.payment_id.clone(),
        status: payment.status,
        amount: payment.amount.clone(),
        brand: payment.brand.clone(),
        last_four: payment.last_four.clone(),
        failure: payment.failure,
        version: payment.version,
        updated_at: payment.updated_at,
    });
    sorted(&OrderView {
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
        payments: payments.collect(),
        parked: false,
    })
}

/// Payments of one order may have happened at one moment: here their order does not count.
fn sorted(view: &OrderView) -> OrderView {
    let mut view = view.clone();
    view.payments
        .sort_by(|one, other| one.payment_id.cmp(&other.payment_id));
    view
}

/// From the commit of an entity's last event to the commit of what the read model made of it, in milliseconds.
pub(super) fn latencies(parts: &Parts) -> Vec<f64> {
    let rows = parts.sources.iter().flat_map(|source| {
        let of_topic = |row| (source.topic, row);
        source.outbox.iter().map(of_topic)
    });
    let written: HashMap<(&str, &str, i64), i64> = rows
        .map(|(topic, row)| {
            let event = &row.event;
            (
                (topic, event.entity_id.as_str(), event.version),
                row.committed_at_us,
            )
        })
        .collect();
    let latency = |mark: &crate::databases::Mark| {
        let written = written.get(&(mark.topic.as_str(), mark.entity_id.as_str(), mark.version))?;
        Some(((mark.committed_at_us - written) as f64 / 1e3).max(0.0))
    };
    parts.view_marks.iter().filter_map(latency).collect()
}
