//! The order: its status machine.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Items, Money, OrderId, PaymentMethodId, UserId};

/// The most pieces of one product.
pub const MAX_QUANTITY: i32 = 10_000;

/// Where an order stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Placed; perhaps its stock is reserved, perhaps it is overdue.
    Pending,
    /// Paid, its stock not reserved yet.
    Paid,
    /// Reserved and paid.
    Confirmed,
    Shipped,
    Delivered,
    Cancelled,
}

/// How an order was paid. Never a card number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    pub payment_id: Uuid,
    pub amount: Money,
    pub brand: String,
    pub last_four: String,
}

/// How an order was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shipment {
    pub tracking_number: String,
    pub carrier: String,
}

/// Who or what ended an order early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CancelledBy {
    User,
    OutOfStock,
    NotPaidInTime,
    PaymentFailed,
    /// Its payment was given back.
    Refund,
}

impl CancelledBy {
    /// In words, for where nobody said more.
    pub fn reason(self) -> &'static str {
        match self {
            Self::User => "cancelled by the user",
            Self::OutOfStock => "out of stock",
            Self::NotPaidInTime => "not paid in time",
            Self::PaymentFailed => "the payment failed",
            Self::Refund => "the payment was given back",
        }
    }
}

/// Why an order was cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancellation {
    pub by: CancelledBy,
    /// Free text, published; nothing personal.
    pub reason: String,
}

/// What a user orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOrder {
    pub id: OrderId,
    pub user_id: UserId,
    pub items: Items,
    pub user_email: Option<String>,
    pub payment_method_id: Option<PaymentMethodId>,
    /// No payment is begun after this.
    pub pay_by: DateTime<Utc>,
}

/// An order at one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub id: OrderId,
    pub user_id: UserId,
    pub items: Items,
    pub user_email: Option<String>,
    pub payment_method_id: Option<PaymentMethodId>,
    pub pay_by: DateTime<Utc>,
    pub status: Status,
    /// How many events it has had.
    pub version: i64,
    pub created_at: DateTime<Utc>,
    /// When the last event happened.
    pub updated_at: DateTime<Utc>,
    pub reserved_at: Option<DateTime<Utc>>,
    pub overdue_at: Option<DateTime<Utc>>,
    pub paid: Option<(Payment, DateTime<Utc>)>,
    pub confirmed_at: Option<DateTime<Utc>>,
    pub shipped: Option<(Shipment, DateTime<Utc>)>,
    pub delivered_at: Option<DateTime<Utc>>,
    pub cancelled: Option<(Cancellation, DateTime<Utc>)>,
}

/// What may be asked of an order: by users, and by what other services tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Place(NewOrder),
    /// Its user wants it no more, for this reason.
    Cancel {
        reason: String,
    },
    /// Its stock is held.
    RecordReserved,
    /// Its stock is not to be had.
    RecordOutOfStock,
    /// The moment by which it must be paid has passed.
    RecordOverdue,
    /// Its money was received.
    RecordPaid(Payment),
    /// No payment of it was received, and none will be taken any more.
    RecordPaymentFailed,
    /// This payment of it was given back.
    RecordRefunded(Uuid),
    Ship(Shipment),
    MarkDelivered,
}

/// What happened to an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Placed {
        order: NewOrder,
        at: DateTime<Utc>,
    },
    Reserved {
        at: DateTime<Utc>,
    },
    /// Not known to be paid when it had to be. It is not cancelled by that: a payment may be under way.
    Overdue {
        at: DateTime<Utc>,
    },
    Paid {
        payment: Payment,
        at: DateTime<Utc>,
    },
    /// Reserved and paid, in whichever order they came.
    Confirmed {
        at: DateTime<Utc>,
    },
    Shipped {
        shipment: Shipment,
        at: DateTime<Utc>,
    },
    /// Delivered.
    Completed {
        at: DateTime<Utc>,
    },
    Cancelled {
        cancellation: Cancellation,
        at: DateTime<Utc>,
    },
}

impl Event {
    /// When it happened.
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::Placed { at, .. }
            | Self::Reserved { at }
            | Self::Overdue { at }
            | Self::Paid { at, .. }
            | Self::Confirmed { at }
            | Self::Shipped { at, .. }
            | Self::Completed { at }
            | Self::Cancelled { at, .. } => *at,
        }
    }
}

/// Why a command is refused. Nothing has happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no such order")]
    Unknown,
    #[error("the order exists already")]
    Exists,
    #[error("the order has been cancelled")]
    Cancelled,
    #[error("the order has been shipped")]
    Shipped,
    #[error("the order has been delivered")]
    Delivered,
    #[error("the order is not confirmed: it must be paid and its stock reserved")]
    NotConfirmed,
    #[error("the order has not been shipped")]
    NotShipped,
    #[error("the order was paid by another payment")]
    PaidOtherwise,
    #[error("the payment is not of the order's amount")]
    WrongAmount,
    #[error("the order may still be paid")]
    NotDue,
    #[error("the moment by which an order must be paid has to be in the future")]
    PayByPassed,
    #[error("the order is not in a state that its events lead to")]
    Inconsistent(#[source] ApplyError),
}

/// What a command leads to. A command from another service that finds its work done or overtaken leads to nothing: such
/// commands may come late and more than once.
///
/// # Errors
/// When the order's state does not allow it.
pub fn decide(state: Option<&Order>, command: Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
    use Status::{Cancelled, Confirmed, Delivered, Paid, Pending, Shipped};
    let at = now;
    let Some(order) = state else {
        return match command {
            Command::Place(order) if order.pay_by <= now => Err(Refusal::PayByPassed),
            Command::Place(order) => Ok(vec![Event::Placed { order, at }]),
            _ => Err(Refusal::Unknown),
        };
    };
    match (command, order.status) {
        (Command::Place(_), _) => Err(Refusal::Exists),

        (Command::RecordReserved, Pending | Paid) if order.reserved_at.is_none() => {
            let reserved = Event::Reserved { at };
            Ok(if order.status == Paid {
                vec![reserved, Event::Confirmed { at }]
            } else {
                vec![reserved]
            })
        }
        (Command::RecordReserved, _) => Ok(vec![]),

        (Command::RecordOutOfStock, Pending | Paid | Confirmed) => Ok(cancelled(CancelledBy::OutOfStock, at)),
        (Command::RecordOutOfStock, Cancelled) => Ok(vec![]),
        (Command::RecordOutOfStock, Shipped | Delivered) => Err(refusal_of(order.status)),

        (Command::RecordOverdue, Pending) if order.overdue_at.is_none() => {
            if now < order.pay_by {
                return Err(Refusal::NotDue);
            }
            Ok(vec![Event::Overdue { at }])
        }
        (Command::RecordOverdue, _) => Ok(vec![]),

        // Also when it is overdue: what payment-svc took in time may be told late, and money is money.
        (Command::RecordPaid(payment), Pending) => {
            if payment.amount != order.items.total() {
                return Err(Refusal::WrongAmount);
            }
            let paid = Event::Paid { payment, at };
            Ok(if order.reserved_at.is_some() {
                vec![paid, Event::Confirmed { at }]
            } else {
                vec![paid]
            })
        }
        // The cancellation, which payment-svc reads, makes it refund.
        (Command::RecordPaid(_), Cancelled) => Ok(vec![]),
        (Command::RecordPaid(payment), Paid | Confirmed | Shipped | Delivered) => match &order.paid {
            Some((known, _)) if known.payment_id == payment.payment_id => Ok(vec![]),
            _ => Err(Refusal::PaidOtherwise),
        },

        (Command::RecordPaymentFailed, Pending) => Ok(cancelled(
            if order.overdue_at.is_some() {
                CancelledBy::NotPaidInTime
            } else {
                CancelledBy::PaymentFailed
            },
            at,
        )),
        (Command::RecordPaymentFailed, _) => Ok(vec![]),

        (Command::RecordRefunded(payment_id), Paid | Confirmed)
            if order
                .paid
                .as_ref()
                .is_some_and(|(paid, _)| paid.payment_id == payment_id) =>
        {
            Ok(cancelled(CancelledBy::Refund, at))
        }
        // It has gone out, and stays with whom it was refunded; or it has ended, which is why it was refunded.
        (Command::RecordRefunded(_), _) => Ok(vec![]),

        (Command::Ship(shipment), Confirmed) => Ok(vec![Event::Shipped { shipment, at }]),
        (Command::Ship(_), Pending | Paid) => Err(Refusal::NotConfirmed),
        (Command::Ship(_), status) => Err(refusal_of(status)),

        (Command::MarkDelivered, Shipped) => Ok(vec![Event::Completed { at }]),
        (Command::MarkDelivered, Pending | Paid | Confirmed) => Err(Refusal::NotShipped),
        (Command::MarkDelivered, status) => Err(refusal_of(status)),

        (Command::Cancel { reason }, Pending | Paid | Confirmed) => {
            let by = CancelledBy::User;
            let cancellation = Cancellation { by, reason };
            Ok(vec![Event::Cancelled { cancellation, at }])
        }
        (Command::Cancel { .. }, status) => Err(refusal_of(status)),
    }
}

/// The end of an order by something that needs no further words.
fn cancelled(by: CancelledBy, at: DateTime<Utc>) -> Vec<Event> {
    let reason = by.reason().to_owned();
    vec![Event::Cancelled {
        cancellation: Cancellation { by, reason },
        at,
    }]
}

fn refusal_of(status: Status) -> Refusal {
    match status {
        Status::Cancelled => Refusal::Cancelled,
        Status::Shipped => Refusal::Shipped,
        Status::Delivered => Refusal::Delivered,
        Status::Pending | Status::Paid | Status::Confirmed => Refusal::NotConfirmed,
    }
}

/// An event that cannot follow the state that it is applied to: the history is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event {event} cannot follow status {status:?}")]
pub struct ApplyError {
    event: &'static str,
    status: Option<Status>,
}

/// The order after an event.
///
/// # Errors
/// When the event cannot have happened to this order.
pub fn apply(state: Option<Order>, event: &Event) -> Result<Order, ApplyError> {
    use Status::{Confirmed, Paid, Pending, Shipped};
    let status = state.as_ref().map(|order| order.status);
    let broken = |event| ApplyError { event, status };
    let Some(mut order) = state else {
        return match event {
            Event::Placed { order, at } => Ok(place(order, *at)),
            _ => Err(broken("before order.placed")),
        };
    };
    match (event, order.status) {
        (Event::Reserved { at }, Pending | Paid) if order.reserved_at.is_none() => {
            order.reserved_at = Some(*at)
        }
        (Event::Overdue { at }, Pending) if order.overdue_at.is_none() && *at >= order.pay_by => {
            order.overdue_at = Some(*at);
        }
        (Event::Paid { payment, at }, Pending) => {
            order.status = Paid;
            order.paid = Some((payment.clone(), *at));
        }
        (Event::Confirmed { at }, Paid) if order.reserved_at.is_some() => {
            order.status = Confirmed;
            order.confirmed_at = Some(*at);
        }
        (Event::Shipped { shipment, at }, Confirmed) => {
            order.status = Shipped;
            order.shipped = Some((shipment.clone(), *at));
        }
        (Event::Completed { at }, Shipped) => {
            order.status = Status::Delivered;
            order.delivered_at = Some(*at);
        }
        (Event::Cancelled { cancellation, at }, Pending | Paid | Confirmed) => {
            order.status = Status::Cancelled;
            order.cancelled = Some((cancellation.clone(), *at));
        }
        (Event::Placed { .. }, _) => return Err(broken("order.placed")),
        (Event::Reserved { .. }, _) => return Err(broken("order.reserved")),
        (Event::Overdue { .. }, _) => return Err(broken("order.overdue")),
        (Event::Paid { .. }, _) => return Err(broken("order.paid")),
        (Event::Confirmed { .. }, _) => return Err(broken("order.confirmed")),
        (Event::Shipped { .. }, _) => return Err(broken("order.shipped")),
        (Event::Completed { .. }, _) => return Err(broken("order.completed")),
        (Event::Cancelled { .. }, _) => return Err(broken("order.cancelled")),
    }
    order.version += 1;
    order.updated_at = event.at();
    Ok(order)
}

fn place(new: &NewOrder, at: DateTime<Utc>) -> Order {
    Order {
        id: new.id,
        user_id: new.user_id,
        items: new.items.clone(),
        user_email: new.user_email.clone(),
        payment_method_id: new.payment_method_id,
        pay_by: new.pay_by,
        status: Status::Pending,
        version: 1,
        created_at: at,
        updated_at: at,
        reserved_at: None,
        overdue_at: None,
        paid: None,
        confirmed_at: None,
        shipped: None,
        delivered_at: None,
        cancelled: None,
    }
}

/// The order that a history leads to; `None` for an empty one.
///
/// # Errors
/// When an event cannot follow those before it.
pub fn rebuild<'e>(events: impl IntoIterator<Item = &'e Event>) -> Result<Option<Order>, ApplyError> {
    events
        .into_iter()
        .try_fold(None, |state, event| apply(state, event).map(Some))
}
