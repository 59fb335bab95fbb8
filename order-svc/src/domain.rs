//! What an order is and what may happen to it. Pure: no clock, no I/O; time is an argument.
//!
//! [`decide`] says which events a command leads to, [`apply`] what an event changes. Nothing else changes an order, so
//! its history rebuilds it.

pub use money::{Currency, Money};
pub use order::{
    ApplyError, Cancellation, CancelledBy, Command, Event, MAX_QUANTITY, NewOrder, Order, Payment, Refusal,
    Shipment, Status, apply, decide, rebuild,
};
pub use values::{Items, ItemsError, Line, MAX_ITEMS, OrderId, PaymentMethodId, ProductId, UserId};

mod order;
#[cfg(test)]
mod tests;
mod values;

use chrono::{DateTime, Utc};

/// What a command did: the order as it is now, and the events that made it so. The order's version counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    order: Order,
    events: Vec<Event>,
}

impl Change {
    /// Decides and applies. A command that finds its work done already gives a change without events.
    ///
    /// # Errors
    /// When the order's state does not allow the command.
    pub fn make(state: Option<Order>, command: Command, now: DateTime<Utc>) -> Result<Self, Refusal> {
        let events = decide(state.as_ref(), command, now)?;
        let mut state = state;
        for event in &events {
            state = Some(apply(state, event).map_err(Refusal::Inconsistent)?);
        }
        let order = state.ok_or(Refusal::Unknown)?;
        Ok(Self { order, events })
    }

    /// The order after the change.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// The order after the change, alone.
    pub fn into_order(self) -> Order {
        self.order
    }

    /// What happened, oldest first.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The version that the order had before; 0 when it did not exist.
    pub fn version_before(&self) -> i64 {
        self.order.version - i64::try_from(self.events.len()).unwrap_or(i64::MAX)
    }
}
