//! What a payment is, what may happen to it, and what is to be done next. Pure: no clock, no I/O; time is an argument.
//!
//! A payment is one attempt to pay an order. [`decide`] says which events a command leads to, [`apply`] what an event changes;
//! two things are written ahead and are no events: the provider's intent, and that a refund has begun ([`Change`]).
//! [`take_turn`] says which step brings an unfinished payment on, from what is stored and what the provider has said.

pub use change::Change;
pub use known_order::{ChargeAt, KnownOrder, OrderNews, Reaction, StartRefusal, Untold};
pub use payment::{
    ApplyError, Command, Event, Facts, Failure, NewPayment, Payment, Reason, Refusal, Status, apply, decide,
    rebuild,
};
pub use step::{ChargeState, RefundState, Seen, Step, Turn, next, take_turn};
pub use values::{CardSummary, Method, OrderId, PaymentId, PaymentMethodId, UserId};

mod change;
mod known_order;
mod payment;
mod step;
#[cfg(test)]
mod tests;
mod values;
