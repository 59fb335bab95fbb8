//! What there is to write to whom, and what becomes of an attempt to send it. Pure: no clock, no I/O.

pub use attempt::{Next, Outcome, Retry, Trouble};
pub use mail::{CancelledBy, Content, Line, News, State, Template};
pub use money::{Currency, Money};
pub use values::{Email, MailId, Name, OrderId, UserId};

mod attempt;
mod mail;
#[cfg(test)]
mod tests;
mod values;
