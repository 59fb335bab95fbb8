//! What other services tell orders: events of `events.inventory` and `events.payment`, a batch at a time, on the crate `consumer`.
//!
//! Other services say what they have done; what that means for the order is decided here, by the domain: order-svc is the saga's only
//! coordinator. The batch's transaction holds the marks, the orders, their events and their outbox rows.

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use service::db::DbError;
use uuid::Uuid;

use crate::app::{self, CommandError, Heard, Told};
use crate::domain::{Command, OrderId};
use crate::store::StoreError;

mod inventory;
mod payments;

/// Why a record is no event of a payment or of a reservation.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    #[error("major version {0} of the payload's schema is not known")]
    SchemaVersion(i32),
    #[error("the payload is not what its type says")]
    Payload(#[from] prost::DecodeError),
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
    #[error("the payload is of another entity than the record")]
    OtherEntity,
}

/// Tells orders of their reservations and payments.
#[derive(Debug)]
pub struct News;

impl Handler for News {
    /// What is asked of which order, if anything is.
    type Event = Option<(OrderId, Command)>;
    type Effect = Vec<Heard>;

    fn read(&self, record: &Record) -> Result<Self::Event, BoxError> {
        Ok(match payments::parse(record)? {
            None => inventory::parse(record)?,
            told => told,
        })
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> Result<Vec<Heard>, HandlerError> {
        let (positions, told): (Vec<usize>, Vec<Told>) = batch
            .iter()
            .enumerate()
            .filter_map(|(position, incoming)| {
                let (order_id, command) = incoming.event.clone()?;
                let told = Told {
                    order_id,
                    command,
                    event_id: incoming.record.envelope.event_id,
                    span: subscription::hear_span(incoming.record),
                };
                Some((position, told))
            })
            .unzip();
        app::hear(connection, told)
            .await
            .map_err(|(told, error)| refused(positions[told], error))
    }

    fn committed(&self, _: &[Incoming<'_, Self::Event>], heard: Vec<Heard>) {
        heard.iter().for_each(Heard::committed);
    }
}

/// The order that an event is about.
fn order_id(text: &str) -> Result<OrderId, EventError> {
    Uuid::try_parse(text)
        .map(OrderId)
        .map_err(|_| EventError::Field("order_id"))
}

/// Tells what would be refused again from what is the database's trouble.
fn refused(position: usize, error: CommandError) -> HandlerError {
    match error {
        // The consumer knows which of these come from the data.
        CommandError::Store(StoreError::Database(DbError::Refused(error) | DbError::Collision(error))) => {
            HandlerError::Database(error)
        }
        CommandError::Store(StoreError::Database(error)) => HandlerError::Transient(error.into()),
        error => HandlerError::permanent(position, error),
    }
}
