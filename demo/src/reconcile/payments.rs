//! Payments: the rows of state, the topic, the provider's ledger, and what clients were told.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contracts::catalogue::payment as types;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::payment::events::v1::{
    FailureReason, PaymentFailed, PaymentMethodSummary, PaymentReceived, PaymentRefunded,
};
use contracts::shop::payment::v1::{Payment, PaymentFailure, PaymentStatus};
use envelope::header;
use prost::Message as _;

use super::Parts;
use crate::load::ToldTry;
use crate::plan::Outcome;
use crate::topic::Record;

/// The rows are what the topic tells, and what GetPayment answers.
pub(super) fn compare_rows(parts: &Parts, problems: &mut Vec<String>) {
    let told_by_topic = fold(parts, problems);
    for row in &parts.payments {
        match told_by_topic.get(row.payment_id.as_str()) {
            Some(told) => {
                // What events do not tell.
                let told = Payment {
                    user_id: row.user_id.clone(),
                    created_at: row.created_at,
                    ..told.clone()
                };
                if told != *row {
                    problems.push(format!(
                        "the topic tells {told:?}, and the row of state is {row:?}"
                    ));
                }
            }
            None => problems.push(format!("the topic does not tell of the payment {row:?}")),
        }
    }
    let rows: HashMap<&str, &Payment> = parts
        .payments
        .iter()
        .map(|payment| (payment.payment_id.as_str(), payment))
        .collect();
    for id in told_by_topic.keys().filter(|id| !rows.contains_key(id.as_str())) {
        problems.push(format!(
            "the topic tells of payment {id}, and there is no row of state"
        ));
    }
    for answer in &parts.answers {
        if rows.get(answer.payment_id.as_str()) != Some(&answer) {
            problems.push(format!(
                "GetPayment answers {answer:?}, which is not the row of state"
            ));
        }
    }
    let mut standing: HashMap<&str, u32> = HashMap::new();
    for payment in &parts.payments {
        if payment.status() != PaymentStatus::Failed {
            *standing.entry(&payment.order_id).or_default() += 1;
        }
        let ended = [
            PaymentStatus::Received,
            PaymentStatus::Failed,
            PaymentStatus::Refunded,
        ];
        if !ended.contains(&payment.status()) {
            problems.push(format!("a payment has not come to its end: {payment:?}"));
        }
    }
    for (order, payments) in standing.into_iter().filter(|(_, payments)| *payments > 1) {
        problems.push(format!(
            "order {order} has {payments} payments that have not failed"
        ));
    }
}

/// The payments as the topic tells of them.
fn fold(parts: &Parts, problems: &mut Vec<String>) -> BTreeMap<String, Payment> {
    let mut payments: BTreeMap<String, Payment> = BTreeMap::new();
    let records = parts.sources.iter().flat_map(|source| &source.records);
    for record in records {
        let Some(event) = record.header(header::CE_TYPE) else {
            continue;
        };
        match payment_after(event, record) {
            // A repeat may come after what has happened since.
            Ok(Some(payment)) => match payments.get(&payment.payment_id) {
                Some(Payment { version, .. }) if *version > payment.version => {}
                _ => drop(payments.insert(payment.payment_id.clone(), payment)),
            },
            Ok(None) => {}
            Err(error) => problems.push(format!("a record of {event} is not understood: {error}")),
        }
    }
    payments
}

/// The payment after an event of it; each tells all of it.
fn payment_after(event: &str, record: &Record) -> Result<Option<Payment>, prost::DecodeError> {
    let payload = record.payload.as_deref().unwrap_or_default();
    let method = |method: Option<PaymentMethodSummary>| {
        let method = method.unwrap_or_default();
        (method.brand, method.last_four)
    };
    let version = record
        .header(header::AGGREGATE_VERSION)
        .and_then(|version| version.parse().ok());
    let version = version.unwrap_or_default();
    Ok(match event {
        types::RECEIVED => {
            let event = PaymentReceived::decode(payload)?;
            let (brand, last_four) = method(event.payment_method);
            Some(Payment {
                payment_id: event.payment_id,
                order_id: event.order_id,
                status: PaymentStatus::Received.into(),
                amount: event.amount,
                brand,
                last_four,
                provider_reference: event.provider_reference,
                version,
                updated_at: event.received_at,
                ..Payment::default()
            })
        }
        types::FAILED => {
            let event = PaymentFailed::decode(payload)?;
            let failure = PaymentFailure {
                reason: event.reason,
                another_try: event.another_try,
            };
            let (brand, last_four) = method(event.payment_method);
            Some(Payment {
                payment_id: event.payment_id,
                order_id: event.order_id,
                status: PaymentStatus::Failed.into(),
                amount: event.amount,
                brand,
                last_four,
                failure: Some(failure),
                provider_reference: event.provider_reference.unwrap_or_default(),
                version,
                updated_at: event.failed_at,
                ..Payment::default()
            })
        }
        types::REFUNDED => {
            let event = PaymentRefunded::decode(payload)?;
            let (brand, last_four) = method(event.payment_method);
            Some(Payment {
                payment_id: event.payment_id,
                order_id: event.order_id,
                status: PaymentStatus::Refunded.into(),
                amount: event.amount,
                brand,
                last_four,
                provider_reference: event.provider_reference,
                version,
                updated_at: event.refunded_at,
                ..Payment::default()
            })
        }
        _ => None,
    })
}

/// What clients were told of their payments has become of them, and it is what their cards' banks say.
pub(super) fn compare_told(parts: &Parts, problems: &mut Vec<String>) {
    let rows: HashMap<&str, &Payment> = parts
        .payments
        .iter()
        .map(|payment| (payment.payment_id.as_str(), payment))
        .collect();
    for tried in parts.told.iter().flat_map(|order| &order.tries) {
        let Some(told) = &tried.payment else {
            continue;
        };
        match rows.get(told.payment_id.as_str()) {
            Some(row) if follows(told, row) => {
                if let Some(wrong) = not_as_the_bank_says(tried, row) {
                    problems.push(format!("{wrong}: {row:?}"));
                }
            }
            row => problems.push(format!(
                "a client was told of {told:?}, and the row of state is {row:?}"
            )),
        }
    }
    // Of orders that came with a payment method: whichever of their payments succeeded, the bank must have agreed.
    for order in &parts.told {
        let mine = parts
            .payments
            .iter()
            .filter(|payment| payment.order_id == order.placed.order_id && is_taken(payment));
        let approved = order.with_order == Some(Outcome::Approved)
            || order.tries.iter().any(|tried| tried.outcome == Outcome::Approved);
        if !approved && mine.count() > 0 {
            problems.push(format!(
                "order {} is paid, and no bank has agreed",
                order.placed.order_id
            ));
        }
    }
}

/// Whether a payment can have become this.
fn follows(told: &Payment, row: &Payment) -> bool {
    use PaymentStatus::{Failed, Received, RefundPending, Refunded};
    let same = (&told.order_id, &told.user_id, &told.amount, told.created_at)
        == (&row.order_id, &row.user_id, &row.amount, row.created_at);
    let status = row.status();
    same && row.version >= told.version
        && match told.status() {
            PaymentStatus::Pending => true,
            Received => [Received, Refunded].contains(&status),
            RefundPending => status == Refunded,
            Failed | Refunded => told == row,
            PaymentStatus::Unspecified => false,
        }
}

fn not_as_the_bank_says(tried: &ToldTry, row: &Payment) -> Option<String> {
    let reason = row.failure.map(|failure| failure.reason());
    if reason == Some(FailureReason::OrderCancelled) {
        return None;
    }
    let right = match tried.outcome {
        Outcome::Approved => is_taken(row),
        // Whether another try makes sense depends on the order, too.
        Outcome::Declined => reason.is_some_and(is_decline),
        Outcome::Blocked => reason == Some(FailureReason::CardBlocked),
    };
    (!right).then(|| format!("the bank says {:?}, and the payment is", tried.outcome))
}

/// Whether its money was taken, also if it was given back.
pub(super) fn is_taken(payment: &Payment) -> bool {
    use PaymentStatus::{Received, RefundPending, Refunded};
    [Received, RefundPending, Refunded].contains(&payment.status())
}

/// Whether the card's bank said it.
pub(super) fn is_decline(reason: FailureReason) -> bool {
    use FailureReason::{
        AuthenticationRequired, CardBlocked, Declined, ExpiredCard, IncorrectCardDetails, InsufficientFunds,
    };
    [
        Declined,
        InsufficientFunds,
        ExpiredCard,
        IncorrectCardDetails,
        CardBlocked,
        AuthenticationRequired,
    ]
    .contains(&reason)
}

/// The ledger has one charge of each order that was paid, of its total, and no other.
pub(super) fn compare_charges(parts: &Parts) -> Vec<String> {
    let mut problems = Vec::new();
    let orders: HashMap<&str, &Order> = parts
        .orders
        .iter()
        .map(|order| (order.order_id.as_str(), order))
        .collect();
    let taken: HashMap<&str, &Payment> = parts
        .payments
        .iter()
        .filter(|payment| is_taken(payment))
        .map(|payment| (payment.payment_id.as_str(), payment))
        .collect();
    let mut charged: BTreeSet<&str> = BTreeSet::new();
    let mut charged_payments: BTreeSet<&str> = BTreeSet::new();
    for charge in &parts.ledger.charges {
        let order_id = charge.order_id.as_deref().unwrap_or_default();
        let payment_id = charge.payment_id.as_deref().unwrap_or_default();
        if !charged.insert(order_id) {
            problems.push(format!("order {order_id} was charged twice"));
        }
        charged_payments.insert(payment_id);
        let amount = (charge.amount, charge.currency.to_uppercase());
        let as_paid = taken.get(payment_id).is_some_and(|payment| {
            payment.order_id == order_id
                && payment.provider_reference == charge.payment_intent
                && amount_of(payment.amount.as_ref()) == amount
        });
        let as_ordered = orders
            .get(order_id)
            .is_some_and(|order| amount_of(order.total.as_ref()) == amount);
        if !as_paid || !as_ordered {
            problems.push(format!(
                "the provider has a charge that nobody has paid: {charge:?}"
            ));
        }
    }
    for (id, payment) in taken.iter().filter(|(id, _)| !charged_payments.contains(**id)) {
        problems.push(format!(
            "payment {id} was received, and the provider has no charge: {payment:?}"
        ));
    }
    problems
}

/// The ledger has one refund of each cancelled order that was paid, of its total, and no other.
pub(super) fn compare_refunds(parts: &Parts) -> Vec<String> {
    let mut problems = Vec::new();
    let cancelled: HashMap<&str, &Order> = parts
        .orders
        .iter()
        .filter(|order| order.status() == OrderStatus::Cancelled)
        .map(|order| (order.order_id.as_str(), order))
        .collect();
    let paid: BTreeSet<&str> = parts
        .payments
        .iter()
        .filter(|payment| is_taken(payment))
        .map(|payment| payment.order_id.as_str())
        .filter(|order| cancelled.contains_key(order))
        .collect();
    let mut refunded: BTreeSet<&str> = BTreeSet::new();
    for refund in &parts.ledger.refunds {
        let order_id = refund.order_id.as_deref().unwrap_or_default();
        if !refunded.insert(order_id) {
            problems.push(format!("order {order_id} was refunded twice"));
        }
        let amount = (refund.amount, refund.currency.to_uppercase());
        let whole = cancelled
            .get(order_id)
            .is_some_and(|order| amount_of(order.total.as_ref()) == amount);
        if refund.status != "succeeded" || !whole {
            problems.push(format!("the provider has a refund that does not fit: {refund:?}"));
        }
    }
    for order in paid.symmetric_difference(&refunded) {
        let has = if paid.contains(order) { "no" } else { "a" };
        problems.push(format!(
            "order {order} is {}cancelled and paid, and the provider has {has} refund",
            if paid.contains(order) { "" } else { "not " }
        ));
    }
    problems
}

fn amount_of(money: Option<&contracts::shop::common::v1::Money>) -> (i64, String) {
    money
        .map(|money| (money.minor_units, money.currency_code.clone()))
        .unwrap_or_default()
}
