//! Events applied to orders and figures, a batch at a time.

use std::collections::BTreeSet;

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::domain::{self, Changes, Event};
use crate::{events, store};

/// Keeps what is known of orders, and the figures of the windows in which they were placed.
///
/// Whoever writes takes the same rows in the same order: those of orders by id, then those of figures by window and currency. An order
/// may be written by two at once, since its payments come by another topic; the lock on its row is what keeps a difference from being
/// counted on an old state.
#[derive(Debug, Clone, Copy)]
pub struct Projection;

impl Handler for Projection {
    type Event = Option<Event>;
    type Effect = ();

    fn read(&self, record: &Record) -> Result<Option<Event>, BoxError> {
        Ok(events::parse(record)?)
    }

    /// A fixed number of statements per batch, and one update per batch of each row.
    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Option<Event>>],
    ) -> Result<(), HandlerError> {
        let events = || {
            let events = batch.iter().enumerate();
            events.filter_map(|(position, incoming)| Some((position, incoming.event.as_ref()?)))
        };
        let ids: BTreeSet<Uuid> = events().map(|(_, event)| event.order_id).collect();
        let mut orders = store::lock_orders(connection, &ids).await?;
        let mut changes = Changes::default();
        for (position, event) in events() {
            let refused = |error| HandlerError::permanent(position, error);
            let order = orders.entry(event.order_id).or_default();
            let after = domain::apply(order.clone(), &event.change).map_err(refused)?;
            changes
                .note(order, &after)
                .map_err(|error| refused(error.into()))?;
            *order = after;
        }
        store::save_orders(connection, &orders).await?;
        store::add(connection, &changes).await?;
        Ok(())
    }
}
