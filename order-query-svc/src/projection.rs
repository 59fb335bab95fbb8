//! Events applied to the views, a batch at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use consumer::{Handler, HandlerError, Record};
use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::domain::{self, OrderView};
use crate::waits::Waits;
use crate::{events, store};

/// Keeps `order_views`, and wakes those who wait for them here.
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
    type Effect = ();

    /// One read and one write per batch.
    async fn handle(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[&Record],
    ) -> Result<(), HandlerError> {
        let mut events = Vec::with_capacity(batch.len());
        for (position, record) in batch.iter().enumerate() {
            events.push(events::parse(record).map_err(|error| HandlerError::permanent(position, error))?);
        }
        let mut orders: Vec<Uuid> = events.iter().map(|event| event.order_id).collect();
        orders.sort_unstable();
        orders.dedup();
        let mut stored = store::load(connection, &orders).await?;
        let mut changed: BTreeMap<Uuid, OrderView> = BTreeMap::new();
        for (position, event) in events.iter().enumerate() {
            let before = changed
                .remove(&event.order_id)
                .or_else(|| stored.remove(&event.order_id));
            let after =
                domain::apply(before, event).map_err(|error| HandlerError::permanent(position, error))?;
            changed.insert(event.order_id, after);
        }
        // In the order of their ids, as every writer takes them.
        let changed: Vec<OrderView> = changed.into_values().collect();
        store::save(connection, &changed).await?;
        Ok(())
    }

    fn committed(&self, batch: &[&Record], (): ()) {
        for record in batch {
            if let Ok(order_id) = Uuid::try_parse(&record.envelope.entity_id) {
                self.waits.reached(order_id, record.envelope.version);
            }
        }
    }
}
