//! From records of `events.order` to events of the domain.

use consumer::Record;
use contracts::catalogue::order as types;
use contracts::shop::order::events::v1 as wire;
use contracts::wire::time;
use prost::Message;
use uuid::Uuid;

use crate::domain::{Change, Event, Item, Placed};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// Why a record is no event of an order.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventError {
    #[error("the order id is not a UUID")]
    OrderId,
    #[error("major version {0} of the payload's schema is not known")]
    SchemaVersion(i32),
    #[error("the payload is not what its type says")]
    Payload(#[from] prost::DecodeError),
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
}

/// Reads an event out of `record`. Types that are not in the catalogue become [`Change::Unknown`].
///
/// # Errors
/// When the record can never be understood by this code.
pub(crate) fn parse(record: &Record) -> Result<Event, EventError> {
    let envelope = &record.envelope;
    let order_id = Uuid::try_parse(&envelope.entity_id).map_err(|_| EventError::OrderId)?;
    let payload = record.payload.as_slice();
    let known = contracts::catalogue::EVENTS
        .iter()
        .any(|(name, ..)| *name == envelope.event_type);
    if known && envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let change = match envelope.event_type.as_str() {
        types::PLACED => Change::Placed(placed(&wire::OrderPlaced::decode(payload)?)?),
        types::RESERVED => wire::OrderReserved::decode(payload).map(|_| Change::Reserved)?,
        types::PAID => wire::OrderPaid::decode(payload).map(|_| Change::Paid)?,
        types::CONFIRMED => wire::OrderConfirmed::decode(payload).map(|_| Change::Confirmed)?,
        types::SHIPPED => {
            let wire::OrderShipped {
                tracking_number,
                carrier,
                ..
            } = wire::OrderShipped::decode(payload)?;
            Change::Shipped {
                tracking_number,
                carrier,
            }
        }
        types::COMPLETED => wire::OrderCompleted::decode(payload).map(|_| Change::Completed)?,
        types::CANCELLED => Change::Cancelled {
            reason: wire::OrderCancelled::decode(payload)?.reason,
        },
        _ => Change::Unknown,
    };
    Ok(Event {
        order_id,
        version: envelope.version,
        occurred_at: envelope.occurred_at,
        change,
    })
}

fn placed(event: &wire::OrderPlaced) -> Result<Placed, EventError> {
    let total = event.total.as_ref().ok_or(EventError::Field("total"))?;
    let items = event.items.iter().map(|line| {
        Ok(Item {
            product_id: Uuid::try_parse(&line.product_id)
                .map_err(|_| EventError::Field("items.product_id"))?,
            quantity: line.quantity,
            unit_price_minor_units: line.unit_price_minor_units,
        })
    });
    Ok(Placed {
        user_id: Uuid::try_parse(&event.user_id).map_err(|_| EventError::Field("user_id"))?,
        items: items.collect::<Result<_, EventError>>()?,
        total_minor_units: total.minor_units,
        currency_code: total.currency_code.clone(),
        placed_at: time(event.created_at.as_ref()).ok_or(EventError::Field("created_at"))?,
        pay_by: time(event.pay_by.as_ref()),
    })
}
