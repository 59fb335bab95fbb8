//! The payment: its status machine.

use chrono::{DateTime, Utc};
use money::Money;

use super::{CardSummary, Method, OrderId, PaymentId, UserId};

/// Where a payment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Under way, or its outcome is not known.
    Pending,
    /// The money was taken.
    Received,
    /// The money was not taken, and never will be by this payment.
    Failed,
    /// The money was taken and is on its way back.
    RefundPending,
    /// All of the money was given back.
    Refunded,
}

impl Status {
    /// Every one.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Received,
        Self::Failed,
        Self::RefundPending,
        Self::Refunded,
    ];
}

/// Why money was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    Declined,
    InsufficientFunds,
    ExpiredCard,
    IncorrectCardDetails,
    CardBlocked,
    AuthenticationRequired,
    UnknownPaymentMethod,
    NotSupported,
    OrderCancelled,
    NotPaidInTime,
}

/// How a payment failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    pub reason: Reason,
    /// False: no further payment of the order is taken.
    pub another_try: bool,
}

/// An attempt that is about to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPayment {
    pub id: PaymentId,
    pub order_id: OrderId,
    pub user_id: UserId,
    /// The order's total.
    pub amount: Money,
    /// None only for one that fails at once.
    pub method: Option<Method>,
}

/// A payment at one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    pub id: PaymentId,
    pub order_id: OrderId,
    pub user_id: UserId,
    pub amount: Money,
    pub method: Option<Method>,
    pub status: Status,
    /// How many events it has had.
    pub version: i64,
    /// The provider's id of the charge.
    pub intent: Option<String>,
    pub failure: Option<Failure>,
    /// The provider's id of the refund.
    pub refund: Option<String>,
    pub created_at: DateTime<Utc>,
    /// When the status last changed.
    pub updated_at: DateTime<Utc>,
}

impl Payment {
    /// A payment before anything has happened.
    pub fn pending(new: NewPayment, now: DateTime<Utc>) -> Self {
        Self {
            id: new.id,
            order_id: new.order_id,
            user_id: new.user_id,
            amount: new.amount,
            method: new.method,
            status: Status::Pending,
            version: 0,
            intent: None,
            failure: None,
            refund: None,
            created_at: now,
            updated_at: now,
        }
    }

    /// Whether something is left to be done.
    pub fn is_unfinished(&self) -> bool {
        matches!(self.status, Status::Pending | Status::RefundPending)
    }

    fn facts(&self) -> Facts {
        Facts {
            order_id: self.order_id,
            amount: self.amount,
            card: self.method.as_ref().map(|method| method.card.clone()),
            intent: self.intent.clone(),
        }
    }
}

/// What may be asked of a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The provider has taken the money.
    Receive,
    /// The money was not taken, and will not be.
    Fail(Failure),
    /// The provider has given the money back, under this id.
    CompleteRefund(String),
}

/// What every event says of its payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub order_id: OrderId,
    pub amount: Money,
    pub card: Option<CardSummary>,
    /// The provider's id of the charge.
    pub intent: Option<String>,
}

/// What happened to a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Received {
        facts: Facts,
        at: DateTime<Utc>,
    },
    Failed {
        facts: Facts,
        failure: Failure,
        at: DateTime<Utc>,
    },
    Refunded {
        facts: Facts,
        refund: String,
        at: DateTime<Utc>,
    },
}

impl Event {
    /// When it happened.
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::Received { at, .. } | Self::Failed { at, .. } | Self::Refunded { at, .. } => *at,
        }
    }

    /// What it says of its payment.
    pub fn facts(&self) -> &Facts {
        match self {
            Self::Received { facts, .. } | Self::Failed { facts, .. } | Self::Refunded { facts, .. } => facts,
        }
    }
}

/// Why a command is refused. Nothing has happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the payment was not received")]
    NotReceived,
    #[error("the payment is settled already, as {0:?}")]
    Settled(Status),
    #[error("the payment has no charge at the provider")]
    NoIntent,
    #[error("the payment has another charge at the provider already")]
    OtherIntent,
    #[error("the payment is not in a state that its events lead to")]
    Inconsistent(#[source] ApplyError),
}

/// What a command leads to.
///
/// # Errors
/// When the payment's state does not allow it.
pub fn decide(payment: &Payment, command: Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
    let facts = payment.facts();
    // Nothing ends before it began, whatever the clocks of two replicas say.
    let at = now.max(payment.updated_at);
    match (command, payment.status) {
        (Command::Receive, Status::Pending) if facts.intent.is_none() => Err(Refusal::NoIntent),
        (Command::Receive, Status::Pending) => Ok(vec![Event::Received { facts, at }]),
        (Command::Fail(failure), Status::Pending) => Ok(vec![Event::Failed { facts, failure, at }]),
        (Command::CompleteRefund(refund), Status::RefundPending) => {
            Ok(vec![Event::Refunded { facts, refund, at }])
        }
        (Command::CompleteRefund(_), Status::Pending | Status::Received | Status::Failed) => {
            Err(Refusal::NotReceived)
        }
        (_, status) => Err(Refusal::Settled(status)),
    }
}

/// An event that cannot follow the state that it is applied to: the history is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("{event} cannot follow status {status:?}")]
    Order { event: &'static str, status: Status },
    #[error("{event} is not about this payment")]
    Facts { event: &'static str },
}

/// The payment after an event. A refund follows a payment that was received, whether or not it is known to have begun.
///
/// # Errors
/// When the event cannot have happened to this payment.
pub fn apply(mut payment: Payment, event: &Event) -> Result<Payment, ApplyError> {
    let name = match event {
        Event::Received { .. } => "payment.received",
        Event::Failed { .. } => "payment.failed",
        Event::Refunded { .. } => "payment.refunded",
    };
    let facts = event.facts();
    let same_intent = payment.intent.is_none() || payment.intent == facts.intent;
    let known = Facts {
        intent: facts.intent.clone(),
        ..payment.facts()
    };
    if *facts != known || !same_intent {
        return Err(ApplyError::Facts { event: name });
    }
    match (event, payment.status) {
        (Event::Received { .. }, Status::Pending) if facts.intent.is_some() => {
            payment.status = Status::Received;
        }
        (Event::Failed { failure, .. }, Status::Pending) => {
            payment.status = Status::Failed;
            payment.failure = Some(*failure);
        }
        (Event::Refunded { refund, .. }, Status::Received | Status::RefundPending) => {
            payment.status = Status::Refunded;
            payment.refund = Some(refund.clone());
        }
        (_, status) => return Err(ApplyError::Order { event: name, status }),
    }
    payment.intent.clone_from(&facts.intent);
    payment.version += 1;
    payment.updated_at = event.at();
    Ok(payment)
}

/// The payment that a history leads to, from how it was before anything had happened.
///
/// # Errors
/// When an event cannot follow those before it.
pub fn rebuild<'e>(
    pending: Payment,
    events: impl IntoIterator<Item = &'e Event>,
) -> Result<Payment, ApplyError> {
    events.into_iter().try_fold(pending, apply)
}
