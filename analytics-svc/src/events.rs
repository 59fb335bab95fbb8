//! From records of `events.order` and `events.payment` to what the domain knows.

use std::collections::BTreeMap;

use consumer::Record;
use contracts::catalogue::{order as types, payment as payment_types};
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as wire;
use contracts::shop::payment::events::v1 as payment_wire;
use contracts::wire::{money, time};
use prost::Message;
use uuid::Uuid;

use crate::domain::{Change, Event, Placed, Sales, is_in_calendar};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// Why a record tells nothing that can be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventError {
    #[error("it is of an entity that this service does not know")]
    Entity,
    #[error("its entity's id is not a UUID")]
    EntityId,
    #[error("major version {0} of the payload's schema is not known")]
    SchemaVersion(i32),
    #[error("the payload is not what its type says")]
    Payload(#[from] prost::DecodeError),
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
}

/// Reads what `record` tells; nothing when it is not about anything that is counted, also when its type came into the world after this
/// code.
///
/// # Errors
/// When the record can never be understood by this code.
pub(crate) fn parse(record: &Record) -> Result<Option<Event>, EventError> {
    let envelope = &record.envelope;
    let known = contracts::catalogue::EVENTS
        .iter()
        .any(|(name, ..)| *name == envelope.event_type);
    if known && envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let id = Uuid::try_parse(&envelope.entity_id).map_err(|_| EventError::EntityId)?;
    match envelope.entity_type.as_str() {
        types::ENTITY_TYPE => {
            let event = |change| Event { order_id: id, change };
            Ok(order(&envelope.event_type, &record.payload)?.map(event))
        }
        payment_types::ENTITY_TYPE => payment(&envelope.event_type, &record.payload),
        _ => Err(EventError::Entity),
    }
}

fn order(event_type: &str, payload: &[u8]) -> Result<Option<Change>, EventError> {
    Ok(match event_type {
        types::PLACED => Some(Change::Placed(placed(&wire::OrderPlaced::decode(payload)?)?)),
        types::CONFIRMED => wire::OrderConfirmed::decode(payload).map(|_| Some(Change::Confirmed))?,
        types::CANCELLED => wire::OrderCancelled::decode(payload).map(|_| Some(Change::Cancelled))?,
        _ => None,
    })
}

fn placed(event: &wire::OrderPlaced) -> Result<Placed, EventError> {
    let total = money(event.total.as_ref()).ok_or(EventError::Field("total"))?;
    let at = time(event.created_at.as_ref()).filter(|at| is_in_calendar(*at));
    let mut sales: BTreeMap<Uuid, Sales> = BTreeMap::new();
    for line in &event.items {
        let product = uuid("items.product_id", &line.product_id)?;
        let sum = sales.entry(product).or_default();
        *sum = self::sales(line)
            .and_then(|sold| sum.checked_add(sold).ok())
            .ok_or(EventError::Field("items"))?;
    }
    Ok(Placed {
        at: at.ok_or(EventError::Field("created_at"))?,
        currency: total.currency(),
        sales,
    })
}

/// `None` unless it is of at least one piece, at a price that is not negative.
fn sales(line: &wire::OrderLine) -> Option<Sales> {
    let quantity = i64::from(line.quantity);
    let revenue = quantity.checked_mul(line.unit_price_minor_units)?;
    (quantity > 0 && revenue >= 0).then_some(Sales { quantity, revenue })
}

fn payment(event_type: &str, payload: &[u8]) -> Result<Option<Event>, EventError> {
    let received = match event_type {
        payment_types::RECEIVED => {
            let event = payment_wire::PaymentReceived::decode(payload)?;
            paid(&event.order_id, event.amount.as_ref(), Change::Received)?
        }
        payment_types::REFUNDED => {
            let event = payment_wire::PaymentRefunded::decode(payload)?;
            paid(&event.order_id, event.amount.as_ref(), Change::Refunded)?
        }
        _ => return Ok(None),
    };
    Ok(Some(received))
}

fn paid(
    order_id: &str,
    amount: Option<&Money>,
    change: fn(money::Money) -> Change,
) -> Result<Event, EventError> {
    Ok(Event {
        order_id: uuid("order_id", order_id)?,
        change: change(money(amount).ok_or(EventError::Field("amount"))?),
    })
}

fn uuid(field: &'static str, text: &str) -> Result<Uuid, EventError> {
    Uuid::try_parse(text).map_err(|_| EventError::Field(field))
}
