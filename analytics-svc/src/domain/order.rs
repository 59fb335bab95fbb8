//! What is known of an order, as far as figures need it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use money::{Currency, Money};
use uuid::Uuid;

use super::figures::{Overflow, Sales};

/// What is known of an order. Nothing, to begin with: its money may be heard of before the order itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Order {
    /// From `events.order`.
    pub placed: Option<Placed>,
    /// It was once, also when it was cancelled later.
    pub is_confirmed: bool,
    pub is_cancelled: bool,
    /// From `events.payment`.
    pub paid: Option<Paid>,
}

/// What `order.placed` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub at: DateTime<Utc>,
    pub currency: Currency,
    /// By product.
    pub sales: BTreeMap<Uuid, Sales>,
}

/// The money of an order, over all of its payments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paid {
    pub currency: Currency,
    /// In minor units.
    pub received: i64,
    /// The part of it that was given back.
    pub refunded: i64,
}

/// Something that happened to an order and counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Placed(Placed),
    Confirmed,
    Cancelled,
    /// By one of its payments, as the next two.
    Received(Money),
    Refunded(Money),
}

/// The same with the order that it happened to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub order_id: Uuid,
    pub change: Change,
}

/// An event that cannot follow what was heard before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("the order was not placed before this event")]
    NotPlaced,
    #[error("the order was placed before")]
    PlacedTwice,
    #[error("the order was paid in another currency before")]
    OtherCurrency,
    #[error("more was given back than was received")]
    NotReceived,
    #[error("the order's money is more than can be counted")]
    Overflow(#[from] Overflow),
}

/// What is known of an order after `change`, which happens once: telling repeats is the caller's.
///
/// # Errors
/// When that cannot have happened.
pub fn apply(mut order: Order, change: &Change) -> Result<Order, ApplyError> {
    match change {
        Change::Placed(_) if order.placed.is_some() => return Err(ApplyError::PlacedTwice),
        Change::Placed(placed) => order.placed = Some(placed.clone()),
        Change::Confirmed | Change::Cancelled if order.placed.is_none() => return Err(ApplyError::NotPlaced),
        Change::Confirmed => order.is_confirmed = true,
        Change::Cancelled => order.is_cancelled = true,
        Change::Received(money) => {
            let paid = paid(&order, *money)?;
            let received = paid.received.checked_add(money.minor_units()).ok_or(Overflow)?;
            order.paid = Some(Paid { received, ..paid });
        }
        Change::Refunded(money) => {
            let paid = paid(&order, *money)?;
            let refunded = paid.refunded.checked_add(money.minor_units()).ok_or(Overflow)?;
            if refunded > paid.received {
                return Err(ApplyError::NotReceived);
            }
            order.paid = Some(Paid { refunded, ..paid });
        }
    }
    Ok(order)
}

/// The money of an order so far, to which more in the same currency comes.
fn paid(order: &Order, money: Money) -> Result<Paid, ApplyError> {
    let paid = order.paid.unwrap_or(Paid {
        currency: money.currency(),
        received: 0,
        refunded: 0,
    });
    if paid.currency == money.currency() {
        Ok(paid)
    } else {
        Err(ApplyError::OtherCurrency)
    }
}
