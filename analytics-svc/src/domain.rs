//! The figures of sales, and how events change them. Pure: no clock, no I/O.
//!
//! Figures of a window are sums over the orders that were placed in it. So an event never changes figures by itself: it changes what is
//! known of one order ([`apply`]), and the figures change by the difference between what that order counted for before and what it
//! counts for after ([`Changes::note`]). Whatever the order in which sources are heard, the differences add up to the same sums.

mod figures;
mod order;
mod window;

#[cfg(test)]
mod tests;

pub use figures::{BestSeller, Changes, Counts, Figures, Overflow, Sales, WindowFigures, total};
pub use order::{ApplyError, Change, Event, Order, Paid, Placed, apply};
pub use window::{Size, Window, is_in_calendar};
