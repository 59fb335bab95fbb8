//! What orders do to stock: events of `events.order`, a batch at a time, on the crate `consumer`.
//!
//! inventory-svc reads that topic alone, so it sees each order's story in order: placed, then perhaps confirmed, then perhaps
//! cancelled. The batch's transaction holds the marks, reservations, stock, their events and their outbox rows.

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use service::db::DbError;
use uuid::Uuid;

use crate::app::{self, HearError, Heard, Told};
use crate::codec::{self, DecodeError};
use crate::domain::OrderId;
use crate::domain::reservation::Command;
use crate::store::StoreError;

/// Why a record is no event of an order.
#[derive(Debug, thiserror::Error)]
enum RecordError {
    #[error("the order id is not a UUID")]
    OrderId,
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Applies `events.order`.
#[derive(Debug)]
pub struct Orders;

impl Handler for Orders {
    /// What is asked of which reservation, if anything is.
    type Event = Option<(OrderId, Command)>;
    type Effect = Heard;

    fn read(&self, record: &Record) -> Result<Self::Event, BoxError> {
        Ok(read(record)?)
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> Result<Heard, HandlerError> {
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
        app::hear(connection, told).await.map_err(|error| match error {
            HearError::Refused { position, source } => HandlerError::permanent(positions[position], source),
            HearError::Store(error) => store_error(error),
        })
    }

    fn committed(&self, _: &[Incoming<'_, Self::Event>], heard: Heard) {
        heard.committed();
    }
}

fn read(record: &Record) -> Result<Option<(OrderId, Command)>, RecordError> {
    let envelope = &record.envelope;
    let id = Uuid::try_parse(&envelope.entity_id).map_err(|_| RecordError::OrderId)?;
    let id = OrderId(id);
    let command = codec::decode_order(id, &envelope.event_type, envelope.schema_version, &record.payload)?;
    Ok(command.map(|command| (id, command)))
}

/// What the database refuses parks. All else is waited out, also a row that cannot be read: an operator has to mend it.
fn store_error(error: StoreError) -> HandlerError {
    match error {
        // The consumer knows which of these come from the data.
        StoreError::Database(DbError::Refused(error) | DbError::Collision(error)) => {
            HandlerError::Database(error)
        }
        error => HandlerError::Transient(error.into()),
    }
}
