//! Which step brings an unfinished payment on.
//!
//! The provider is the judge: nothing is taken for done or undone but by its word. A driver that knows nothing yet asks
//! before it acts. A charge is confirmed only after it was stored as this payment's, and only while the order is not cancelled.
//! Whatever two drivers do at once is harmless: a charge can be taken once, or cancelled, and the provider says which.

use super::{Failure, KnownOrder, Payment, Reason, Status};

/// What the provider has said of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeState {
    /// No money was taken.
    Unconfirmed,
    Processing,
    /// The money was taken.
    Taken,
    /// No money was taken, and none can be, for a reason that the bank or the provider gave.
    Declined(Failure),
    /// No money was taken, and none can be.
    Canceled,
}

/// What the provider has said of giving a charge back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefundState {
    /// Nothing of it was given back, and nothing is under way.
    None,
    Processing,
    /// Done, under this id.
    Done(String),
}

/// What a driver has learnt from the provider since it last decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Nothing.
    Nothing,
    /// The charge could not be made, and was not.
    Refused(Failure),
    /// The charge stands so.
    Charge(ChargeState),
    /// No money was taken, and confirming leads to none: it has to be cancelled.
    Unconfirmable(Failure),
    Refund(RefundState),
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing is left to do.
    Done,
    /// The provider needs time.
    Wait,
    /// Make a charge that is not confirmed.
    Create,
    /// Ask how the charge stands.
    Ask,
    /// Take the money.
    Confirm,
    /// Make sure that the money is not taken; the payment fails so, once that is sure.
    Cancel(Failure),
    /// Ask what was given back.
    AskRefund,
    /// Give the money back.
    Refund,
    /// Record that the money was taken.
    Receive,
    /// Record that it was not, and will not be.
    Fail(Failure),
    /// Record that the money was given back.
    CompleteRefund(String),
}

/// The next step, from what is stored and what was seen.
pub fn next(payment: &Payment, order: &KnownOrder, seen: &Seen) -> Step {
    match payment.status {
        Status::Received | Status::Failed | Status::Refunded => Step::Done,
        Status::RefundPending => match seen {
            Seen::Refund(RefundState::None) => Step::Refund,
            Seen::Refund(RefundState::Processing) => Step::Wait,
            Seen::Refund(RefundState::Done(refund)) => Step::CompleteRefund(refund.clone()),
            _ => Step::AskRefund,
        },
        Status::Pending if payment.intent.is_none() => match seen {
            // Nobody confirms a charge that was not stored.
            _ if order.cancelled => Step::Fail(cancelled(order)),
            Seen::Refused(refused) => Step::Fail(failure(order, refused.reason, refused.another_try)),
            _ => Step::Create,
        },
        Status::Pending => match seen {
            Seen::Charge(ChargeState::Taken) => Step::Receive,
            Seen::Charge(ChargeState::Declined(declined)) => {
                Step::Fail(failure(order, declined.reason, declined.another_try))
            }
            Seen::Charge(ChargeState::Canceled) if order.cancelled => Step::Fail(cancelled(order)),
            // At the provider: by hand, or because it was too old.
            Seen::Charge(ChargeState::Canceled) => Step::Fail(failure(order, Reason::NotSupported, true)),
            Seen::Charge(ChargeState::Processing) => Step::Wait,
            Seen::Charge(ChargeState::Unconfirmed) | Seen::Unconfirmable(_) if order.cancelled => {
                Step::Cancel(cancelled(order))
            }
            Seen::Charge(ChargeState::Unconfirmed) => Step::Confirm,
            Seen::Unconfirmable(refused) => Step::Cancel(failure(order, refused.reason, refused.another_try)),
            _ => Step::Ask,
        },
    }
}

/// A failure of a payment of this order: another try makes sense only while the order takes payments.
fn failure(order: &KnownOrder, reason: Reason, another_try: bool) -> Failure {
    Failure {
        reason,
        another_try: another_try && !order.closed,
    }
}

fn cancelled(order: &KnownOrder) -> Failure {
    failure(order, Reason::OrderCancelled, false)
}
