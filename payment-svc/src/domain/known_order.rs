//! What payments know of an order, and what follows from it.

use money::Money;

use super::{OrderId, Payment, PaymentMethodId, Status, UserId};

/// An order, as far as events.order has told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownOrder {
    pub id: OrderId,
    pub user_id: UserId,
    pub total: Money,
    /// What it was placed with; not necessarily a method that exists.
    pub payment_method_id: Option<PaymentMethodId>,
    /// Its stock is held.
    pub reserved: bool,
    /// No further payment of it is started.
    pub closed: bool,
    pub cancelled: bool,
    /// The order's version up to which this is known.
    pub version: i64,
}

/// When an order that names a payment method is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeAt {
    Placed,
    Reserved,
}

/// What an event of an order tells payments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderNews {
    Placed {
        user_id: UserId,
        total: Money,
        payment_method_id: Option<PaymentMethodId>,
    },
    Reserved,
    /// It should have been paid by now.
    Overdue,
    Cancelled,
    /// Nothing that matters here.
    Other,
}

/// An event of an order that was never placed, or that was placed twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untold {
    #[error("the order was not placed before")]
    NotPlaced,
    #[error("the order was placed before")]
    Placed,
}

/// What an event of an order leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    Nothing,
    /// Start a payment by the method that the order was placed with.
    Charge(PaymentMethodId),
    /// Say that nobody has paid, and nobody will.
    AnswerNotPaid,
    /// Give the money back.
    Refund,
    /// What is under way has changed its aim: bring it on at once.
    Hurry,
}

/// Why no payment of an order is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartRefusal {
    #[error("the order has been cancelled")]
    Cancelled,
    #[error("a payment of the order is under way")]
    InProgress,
    #[error("the order is paid")]
    Paid,
    #[error("the order was paid and refunded")]
    Refunded,
    #[error("no further payment of the order is taken")]
    Closed,
    #[error("the amount is not the order's total")]
    WrongAmount,
}

impl KnownOrder {
    /// The order after an event.
    ///
    /// # Errors
    /// When the event does not fit what is known.
    pub fn learn(known: Option<Self>, id: OrderId, version: i64, news: &OrderNews) -> Result<Self, Untold> {
        let mut order = match (known, news) {
            (
                None,
                OrderNews::Placed {
                    user_id,
                    total,
                    payment_method_id,
                },
            ) => Self {
                id,
                user_id: *user_id,
                total: *total,
                payment_method_id: *payment_method_id,
                reserved: false,
                closed: false,
                cancelled: false,
                version,
            },
            (None, _) => return Err(Untold::NotPlaced),
            (Some(_), OrderNews::Placed { .. }) => return Err(Untold::Placed),
            (Some(order), _) => order,
        };
        match news {
            OrderNews::Reserved => order.reserved = true,
            OrderNews::Overdue => order.closed = true,
            OrderNews::Cancelled => {
                order.cancelled = true;
                order.closed = true;
            }
            OrderNews::Placed { .. } | OrderNews::Other => {}
        }
        order.version = version;
        Ok(order)
    }

    /// What an event leads to. `was_closed` is how it was before; `live` the order's payment that has not failed.
    pub fn react(
        &self,
        news: &OrderNews,
        was_closed: bool,
        live: Option<&Payment>,
        charge_at: ChargeAt,
    ) -> Reaction {
        match (news, live.map(|payment| payment.status)) {
            (OrderNews::Placed { .. }, None) if charge_at == ChargeAt::Placed => self.charge(),
            (OrderNews::Reserved, None) if charge_at == ChargeAt::Reserved && !self.closed => self.charge(),
            // One that was closed by a failure has had its last word.
            (OrderNews::Overdue, None) if !was_closed => Reaction::AnswerNotPaid,
            (OrderNews::Cancelled, Some(Status::Received)) => Reaction::Refund,
            (OrderNews::Cancelled, Some(Status::Pending)) => Reaction::Hurry,
            _ => Reaction::Nothing,
        }
    }

    fn charge(&self) -> Reaction {
        self.payment_method_id.map_or(Reaction::Nothing, Reaction::Charge)
    }

    /// Whether a payment of this amount may be started. `live` is the status of the order's payment that has not failed.
    ///
    /// # Errors
    /// Why not.
    pub fn may_start(&self, amount: Money, live: Option<Status>) -> Result<(), StartRefusal> {
        match live {
            _ if self.cancelled => Err(StartRefusal::Cancelled),
            Some(Status::Pending) => Err(StartRefusal::InProgress),
            Some(Status::Received) => Err(StartRefusal::Paid),
            Some(Status::RefundPending | Status::Refunded) => Err(StartRefusal::Refunded),
            None | Some(Status::Failed) if self.closed => Err(StartRefusal::Closed),
            None | Some(Status::Failed) if self.total != amount => Err(StartRefusal::WrongAmount),
            None | Some(Status::Failed) => Ok(()),
        }
    }
}
