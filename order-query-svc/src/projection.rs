//! Events applied to the views, a batch at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::domain::{ApplyError, Moves, OrderView, Reached, Story};
use crate::events::{self, Told};
use crate::store::{self, Paying};
use crate::waits::Waits;

/// Keeps `order_views`, `order_payments` and `order_journey`, and wakes those who wait for an order here.
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

    /// Nothing is read: one write of orders that are new, one of those that go on, one of payments, and one of where all of them were,
    /// per batch.
    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Told>],
    ) -> Result<Self::Effect, HandlerError> {
        // In the order of their ids, as every writer takes them.
        let mut stories: BTreeMap<Uuid, (usize, Option<Story>)> = BTreeMap::new();
        let mut payments: BTreeMap<Uuid, Paying<'_>> = BTreeMap::new();
        for (position, Incoming { event, .. }) in batch.iter().enumerate() {
            match event {
                Told::Order(event) => {
                    let (_, story) = stories.entry(event.order_id).or_insert((position, None));
                    let then = Story::then(story.take(), event);
                    *story = Some(then.map_err(|error| HandlerError::permanent(position, error))?);
                }
                // Each event of a payment says all there is: the last one stands.
                Told::Payment(payment) => {
                    let paying = payments.entry(payment.payment_id).or_insert(Paying {
                        first_event_at: payment.updated_at,
                        payment,
                    });
                    paying.payment = payment;
                }
                Told::Reservation { .. } | Told::Mail { .. } | Told::Other { .. } => {}
            }
        }
        let mut reached: Vec<(Uuid, i64)> = Vec::with_capacity(stories.len());
        let mut begun: Vec<OrderView> = Vec::new();
        let mut moved: Vec<(Uuid, Moves)> = Vec::new();
        let mut positions: Vec<usize> = Vec::new();
        for (order_id, (position, story)) in stories {
            match story {
                Some(Story::Begun(view)) => {
                    reached.push((order_id, view.version));
                    begun.push(view);
                }
                Some(Story::GoesOn(moves)) => {
                    reached.push((order_id, moves.version));
                    moved.push((order_id, moves));
                    positions.push(position);
                }
                None => {}
            }
        }
        let payments: Vec<Paying<'_>> = payments.into_values().collect();
        store::begin(connection, &begun).await?;
        if let Some(unknown) = store::go_on(connection, &moved).await? {
            return Err(HandlerError::permanent(positions[unknown], ApplyError::NotPlaced));
        }
        store::save_payments(connection, &payments).await?;
        store::go_along(connection, batch).await?;
        Ok(reached)
    }

    fn committed(&self, _: &[Incoming<'_, Told>], orders: Self::Effect) {
        for (order_id, order) in orders {
            // The rest is not known here: that takes all of its payments, whoever applied them.
            let reached = Reached {
                order,
                ..Reached::default()
            };
            self.waits.reached(order_id, reached);
        }
    }
}
