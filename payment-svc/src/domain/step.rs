//! Which step brings an unfinished payment on.
//!
//! The provider is the judge: nothing is taken for done or undone but by its word. A driver that knows nothing yet asks
//! before it acts. A charge is confirmed only after it was stored as this payment's, and only while the order is not cancelled.
//! Whatever two drivers do at once is harmless: a charge can be taken once, or cancelled, and the provider says which.

use chrono::{DateTime, Utc};

use super::{Change, Command, Failure, KnownOrder, Payment, Reason, Refusal, Status};

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

/// What a driver has decided: what is to be stored, and what is to be done then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    pub change: Change,
    pub step: Step,
    /// Whether no further payment of the order is taken from now on.
    pub closes_order: bool,
    /// Whether the step must have a key that was not used before: the provider has just said that nothing was done, and under
    /// the old key it may repeat an old answer.
    pub needs_new_key: bool,
}

/// A driver's turn at a payment, as it is stored, under the locks of the order and the payment. `made` is a charge that this driver
/// has just had made.
///
/// # Errors
/// Never, unless this module is wrong.
pub fn take_turn(
    payment: Payment,
    order: &KnownOrder,
    seen: &Seen,
    made: Option<&str>,
    now: DateTime<Utc>,
) -> Result<Turn, Refusal> {
    let mut change = Change::of(payment);
    let mut seen = seen;
    if let Some(made) = made
        && change.payment().status == Status::Pending
    {
        match &change.payment().intent {
            None => change = change.with_intent(made)?,
            // Another driver's came first. What was seen is of this one, which is never confirmed.
            Some(known) if known != made => seen = &Seen::Nothing,
            Some(_) => {}
        }
    }
    let step = next(change.payment(), order, seen);
    let mut closes_order = false;
    match &step {
        Step::Receive => {
            change = change.then(Command::Receive, now)?;
            // A late success: the money goes back at once.
            if order.cancelled {
                change = change.refunding(now)?;
            }
        }
        Step::Fail(failure) => {
            change = change.then(Command::Fail(*failure), now)?;
            closes_order = !failure.another_try;
        }
        Step::CompleteRefund(refund) => {
            change = change.then(Command::CompleteRefund(refund.clone()), now)?;
        }
        _ => {}
    }
    Ok(Turn {
        change,
        needs_new_key: matches!(step, Step::Confirm | Step::Cancel(_) | Step::Refund),
        step,
        closes_order,
    })
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
