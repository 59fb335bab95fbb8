//! Events applied to the views, a batch at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::domain::{self, Event, OrderView, Reached};
use crate::events::{self, Told};
use crate::store::{self, Paying};
use crate::waits::Waits;

/// Keeps `order_views` and `order_payments`, and wakes those who wait for an order here.
#[derive(Debug)]
pub struct Projection {
    waits: Arc<Waits>,
}

impl Projection {
    pub fn new(waits: Arc<Waits>) -> Self {
        Self { waits }
    }
}

impl Handler for Projection {
    type Event = Told;
    /// The versions that orders have reached.
    type Effect = Vec<(Uuid, i64)>;

    fn read(&self, record: &Record) -> Result<Told, BoxError> {
        Ok(events::parse(record)?)
    }

    /// One read of orders, and one write of orders and of payments, per batch.
    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Told>],
    ) -> Result<Self::Effect, HandlerError> {
        let mut events: Vec<(usize, &Event)> = Vec::with_capacity(batch.len());
        let mut payments: BTreeMap<Uuid, Paying<'_>> = BTreeMap::new();
        for (position, Incoming { event, .. }) in batch.iter().enumerate() {
            match event {
                Told::Order(event) => events.push((position, event)),
                // Each event of a payment says all there is: the last one stands.
                Told::Payment(payment) => {
                    let paying = payments.entry(payment.payment_id).or_insert(Paying {
                        first_event_at: payment.updated_at,
                        payment,
                    });
                    paying.payment = payment;
                }
                Told::Nothing => {}
            }
        }
        let mut orders: Vec<Uuid> = events.iter().map(|(_, event)| event.order_id).collect();
        orders.sort_unstable();
        orders.dedup();
        let mut stored = store::load(connection, &orders).await?;
        let mut changed: BTreeMap<Uuid, OrderView> = BTreeMap::new();
        for (position, event) in &events {
            let before = changed
                .remove(&event.order_id)
                .or_else(|| stored.remove(&event.order_id));
            let after =
                domain::apply(before, event).map_err(|error| HandlerError::permanent(*position, error))?;
            changed.insert(event.order_id, after);
        }
        // In the order of their ids, as every writer takes them.
        let changed: Vec<OrderView> = changed.into_values().collect();
        let payments: Vec<Paying<'_>> = payments.into_values().collect();
        store::save(connection, &changed).await?;
        store::save_payments(connection, &payments).await?;
        Ok(changed.iter().map(|view| (view.order_id, view.version)).collect())
    }

    fn committed(&self, _: &[Incoming<'_, Told>], orders: Self::Effect) {
        for (order_id, order) in orders {
            let payments = 0; // Not known here: that takes all of its payments, whoever applied them.
            self.waits.reached(order_id, Reached { order, payments });
        }
    }
}
