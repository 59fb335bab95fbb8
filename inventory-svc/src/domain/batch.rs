//! News of many orders, decided one after the other against the stock as it is by then.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::reservation::{self, Command, Event, Refusal, Reservation};
use super::stock::{self, Counts, Stock, Updated};
use super::{OrderId, ProductId};

/// Reservations and stock as they were when the batch began, and what news have made of them.
///
/// However many orders want a product, its stock changes once.
#[derive(Debug)]
pub struct Batch {
    reservations: BTreeMap<OrderId, Reservation>,
    stock: BTreeMap<ProductId, Shelf>,
    events: BTreeMap<OrderId, Vec<(Event, usize)>>,
}

/// The stock of a product.
#[derive(Debug)]
struct Shelf {
    before: Stock,
    counts: Counts,
    /// Which news moved something last.
    moved_by: usize,
}

/// What a batch comes to.
#[derive(Debug, Default)]
pub struct Changes {
    /// In the order of their ids.
    pub reservations: Vec<ReservationChange>,
    /// In the order of their ids.
    pub stock: Vec<StockChange>,
}

/// A reservation as it is now, and the events that made it so. Its version counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationChange {
    reservation: Reservation,
    events: Vec<(Event, usize)>,
}

/// The stock of a product as it is now, and the event that made it so, if it is not as before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockChange {
    stock: Stock,
    event: Option<Updated>,
    cause: usize,
}

impl Batch {
    /// `reservations` are those of the news' orders that there are, `stock` that of all their products that there is.
    pub fn new(reservations: BTreeMap<OrderId, Reservation>, stock: BTreeMap<ProductId, Stock>) -> Self {
        let shelf = |before: Stock| Shelf {
            counts: before.counts,
            before,
            moved_by: 0,
        };
        Self {
            reservations,
            stock: stock.into_iter().map(|(id, stock)| (id, shelf(stock))).collect(),
            events: BTreeMap::new(),
        }
    }

    /// Takes in news of an order. `cause` is what the caller knows them by. Nothing has changed when they are refused.
    ///
    /// # Errors
    /// When they cannot be true.
    pub fn tell(
        &mut self,
        order_id: OrderId,
        command: Command,
        cause: usize,
        now: DateTime<Utc>,
    ) -> Result<(), Refusal> {
        let known = self.reservations.get(&order_id);
        // Not before its last event, whatever the clocks of two replicas say.
        let now = known.map_or(now, |known| now.max(known.updated_at()));
        let available = |product| self.stock.get(&product).map_or(0, |shelf| shelf.counts.available);
        let Some(event) = reservation::decide(known, command, available, now)? else {
            return Ok(());
        };
        let after = reservation::apply(known, order_id, &event).map_err(Refusal::Inconsistent)?;
        let mut moved = Vec::new();
        if let Some((movement, lines)) = event.movement() {
            for line in lines {
                let shelf = self.stock.get(&line.product_id).ok_or(Refusal::NotThere)?;
                let counts = shelf.counts.moved(movement, line.quantity);
                moved.push((line.product_id, counts.ok_or(Refusal::NotThere)?));
            }
        }
        for (product_id, counts) in moved {
            if let Some(shelf) = self.stock.get_mut(&product_id) {
                shelf.counts = counts;
                shelf.moved_by = cause;
            }
        }
        self.events.entry(order_id).or_default().push((event, cause));
        self.reservations.insert(order_id, after);
        Ok(())
    }

    /// What it all comes to. What ends as it began has no change.
    pub fn finish(self, now: DateTime<Utc>) -> Changes {
        let Self {
            mut reservations,
            stock,
            events,
        } = self;
        let reservations = events.into_iter().filter_map(|(order_id, events)| {
            let reservation = reservations.remove(&order_id)?;
            Some(ReservationChange { reservation, events })
        });
        let stock = stock
            .into_values()
            .filter(|shelf| shelf.counts != shelf.before.counts)
            .map(|shelf| {
                let event = Updated {
                    counts: shelf.counts,
                    at: now.max(shelf.before.updated_at),
                };
                StockChange {
                    stock: stock::apply(Some(&shelf.before), shelf.before.product_id, event),
                    event: Some(event),
                    cause: shelf.moved_by,
                }
            });
        Changes {
            reservations: reservations.collect(),
            stock: stock.collect(),
        }
    }
}

impl ReservationChange {
    /// After the change.
    pub fn reservation(&self) -> &Reservation {
        &self.reservation
    }

    /// What happened, oldest first, and which news caused it.
    pub fn events(&self) -> &[(Event, usize)] {
        &self.events
    }

    /// The version that the reservation had before; 0 when it did not exist.
    pub fn version_before(&self) -> i64 {
        self.reservation.version - i64::try_from(self.events.len()).unwrap_or(i64::MAX)
    }
}

impl StockChange {
    /// Decides and applies what the warehouse asks of a product.
    ///
    /// # Errors
    /// When the stock does not allow it.
    pub fn make(
        state: Option<Stock>,
        product_id: ProductId,
        command: stock::Command,
        now: DateTime<Utc>,
    ) -> Result<Self, stock::Refusal> {
        let now = state.as_ref().map_or(now, |stock| now.max(stock.updated_at));
        let event = stock::decide(state.as_ref(), command, now)?;
        let stock = match event {
            Some(event) => stock::apply(state.as_ref(), product_id, event),
            None => state.ok_or(stock::Refusal::Unknown)?,
        };
        Ok(Self {
            stock,
            event,
            cause: 0,
        })
    }

    /// After the change.
    pub fn stock(&self) -> &Stock {
        &self.stock
    }

    /// What happened, if anything.
    pub fn event(&self) -> Option<Updated> {
        self.event
    }

    /// Which news caused it last.
    pub fn cause(&self) -> usize {
        self.cause
    }

    /// The version that the stock had before; 0 when the product was not known.
    pub fn version_before(&self) -> i64 {
        self.stock.version - i64::from(self.event.is_some())
    }
}
