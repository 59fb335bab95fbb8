//! What there is of each product, and what is held for each order. Pure: no clock, no I/O; time is an argument.
//!
//! [`stock`] is what the warehouse does to a product, [`reservation`] what becomes of an order's goods, and [`Batch`] the two together:
//! many orders' news, decided one after the other, with one change per product in the end.

pub use batch::{Batch, Changes, ReservationChange, StockChange};
pub use reservation::{Reservation, Shortage};
pub use stock::{Counts, Movement, Stock};
pub use values::{Line, Lines, LinesError, OrderId, ProductId};

mod batch;
pub mod reservation;
pub mod stock;
#[cfg(test)]
mod tests;
mod values;
