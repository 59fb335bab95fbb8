//! What events ask to be written.

use uuid::Uuid;

use super::{Email, Money, Name, OrderId, UserId};

/// What an event tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Where a user can be reached from now on.
    Address {
        user_id: UserId,
        email: Email,
        first_name: Name,
    },
    /// An order was placed: whose it is, and which address goes before his. It is to be answered.
    Order {
        order_id: OrderId,
        user_id: UserId,
        email: Option<Email>,
    },
    /// Something happened to an order that is to be answered.
    ToAnswer { order_id: OrderId },
    /// Nothing that concerns mails.
    Nothing,
}

/// What a mail says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Placed {
        lines: Vec<Line>,
        total: Money,
    },
    Confirmed,
    Shipped {
        carrier: String,
        tracking_number: String,
    },
    Cancelled {
        by: CancelledBy,
        /// In somebody's words; may be empty.
        reason: String,
    },
    Refunded {
        amount: Money,
        /// What the card is recognised by; may be empty.
        brand: String,
        last_four: String,
    },
}

/// So many pieces of one product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub product_id: Uuid,
    pub quantity: i32,
    pub unit_price: Money,
}

/// Who or what ended an order early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelledBy {
    User,
    OutOfStock,
    NotPaidInTime,
    PaymentFailed,
    Refund,
}

impl CancelledBy {
    /// For the user who ordered, as a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::User => "You asked us to cancel it.",
            Self::OutOfStock => "Something in it is out of stock.",
            Self::NotPaidInTime => "It was not paid in time.",
            Self::PaymentFailed => "Its payment failed.",
            Self::Refund => "Its payment was given back.",
        }
    }
}

/// Which mail it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    OrderPlaced,
    OrderConfirmed,
    OrderShipped,
    OrderCancelled,
    PaymentRefunded,
}

impl Content {
    /// Which mail says this.
    pub fn template(&self) -> Template {
        match self {
            Self::Placed { .. } => Template::OrderPlaced,
            Self::Confirmed => Template::OrderConfirmed,
            Self::Shipped { .. } => Template::OrderShipped,
            Self::Cancelled { .. } => Template::OrderCancelled,
            Self::Refunded { .. } => Template::PaymentRefunded,
        }
    }
}

/// Where a mail stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// For an address.
    Waiting,
    /// To be sent.
    Pending,
    /// Somebody is at it.
    Sending,
    /// The mail server has taken it.
    Sent,
    /// It never will.
    Failed,
    /// It may have taken it.
    Unknown,
}

impl State {
    pub const ALL: [Self; 6] = [
        Self::Waiting,
        Self::Pending,
        Self::Sending,
        Self::Sent,
        Self::Failed,
        Self::Unknown,
    ];

    /// As it is written in the database and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Sending => "sending",
            Self::Sent => "sent",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}
