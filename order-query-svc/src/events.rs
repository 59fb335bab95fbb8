//! From records of `events.order`, `events.payment`, `events.inventory` and `events.notification` to what the domain knows.

use consumer::Record;
use contracts::catalogue::{
    inventory as reservation_types, notification as mail_types, order as types, payment as payment_types,
};
use contracts::shop::common::v1::Money;
use contracts::shop::inventory::events::v1 as inventory_wire;
use contracts::shop::notification::events::v1 as mail_wire;
use contracts::shop::order::events::v1 as wire;
use contracts::shop::payment::events::v1 as payment_wire;
use contracts::wire::time;
use prost::Message;
use uuid::Uuid;

use crate::domain::journey::ReservationStatus;
use crate::domain::{Change, Event, Failure, Item, Payment, PaymentStatus, Placed, Shipment};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// What a record tells.
#[derive(Debug)]
pub enum Told {
    Order(Event),
    Payment(Payment),
    /// What became of the stock for an order.
    Reservation {
        order_id: Uuid,
    },
    /// A mail about an order was sent.
    Mail {
        order_id: Uuid,
        /// The number that notification-svc gave, passed on as it is.
        template: i32,
    },
    /// Something that came into the world after this code. Whose it is its correlation id says.
    Other {
        order_id: Option<Uuid>,
    },
}

impl Told {
    /// The order that it is about.
    pub(crate) fn order_id(&self) -> Option<Uuid> {
        match self {
            Self::Order(event) => Some(event.order_id),
            Self::Payment(payment) => Some(payment.order_id),
            Self::Reservation { order_id } | Self::Mail { order_id, .. } => Some(*order_id),
            Self::Other { order_id } => *order_id,
        }
    }
}

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

/// Reads what `record` tells.
///
/// # Errors
/// When the record can never be understood by this code.
pub(crate) fn parse(record: &Record) -> Result<Told, EventError> {
    let envelope = &record.envelope;
    let known = contracts::catalogue::EVENTS
        .iter()
        .any(|(name, ..)| *name == envelope.event_type);
    if known && envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let id = entity_id(record)?;
    let other = || Told::Other {
        order_id: envelope.correlation_id,
    };
    match envelope.entity_type.as_str() {
        types::ENTITY_TYPE => Ok(Told::Order(order(record, id)?)),
        payment_types::ENTITY_TYPE => Ok(payment(record, id)?.map_or_else(other, Told::Payment)),
        reservation_types::ENTITY_TYPE => reservation(record, id),
        mail_types::ENTITY_TYPE => Ok(mail(record)?.unwrap_or_else(other)),
        _ => Err(EventError::Entity),
    }
}

/// The entity of a record, which has a UUID in this shop.
pub(crate) fn entity_id(record: &Record) -> Result<Uuid, EventError> {
    Uuid::try_parse(&record.envelope.entity_id).map_err(|_| EventError::EntityId)
}

/// What became of the stock for an order; types that are not in the catalogue are of the order as well. No more of the payload is kept
/// than its type says, but it has to be one.
fn reservation(record: &Record, order_id: Uuid) -> Result<Told, EventError> {
    use inventory_wire::{InventoryCommitted, InventoryRejected, InventoryReleased, InventoryReserved};
    let payload = record.payload.as_slice();
    match record.envelope.event_type.as_str() {
        reservation_types::RESERVED => drop(InventoryReserved::decode(payload)?),
        reservation_types::REJECTED => drop(InventoryRejected::decode(payload)?),
        reservation_types::RELEASED => drop(InventoryReleased::decode(payload)?),
        reservation_types::COMMITTED => drop(InventoryCommitted::decode(payload)?),
        _ => {}
    }
    Ok(Told::Reservation { order_id })
}

/// How it is with the stock for an order after an event of this type; nothing when it is of another kind, or not in the catalogue.
pub(crate) fn reservation_status(event_type: &str) -> Option<ReservationStatus> {
    match event_type {
        reservation_types::RESERVED => Some(ReservationStatus::Reserved),
        reservation_types::REJECTED => Some(ReservationStatus::Rejected),
        reservation_types::RELEASED => Some(ReservationStatus::Released),
        reservation_types::COMMITTED => Some(ReservationStatus::Committed),
        _ => None,
    }
}

/// A mail that was sent; nothing when the event is not in the catalogue.
fn mail(record: &Record) -> Result<Option<Told>, EventError> {
    if record.envelope.event_type != mail_types::SENT {
        return Ok(None);
    }
    let event = mail_wire::NotificationSent::decode(record.payload.as_slice())?;
    Ok(Some(Told::Mail {
        order_id: uuid("order_id", &event.order_id)?,
        template: event.template,
    }))
}

/// An event of an order. Types that are not in the catalogue become [`Change::Unknown`].
fn order(record: &Record, order_id: Uuid) -> Result<Event, EventError> {
    let envelope = &record.envelope;
    let payload = record.payload.as_slice();
    let change = match envelope.event_type.as_str() {
        types::PLACED => Change::Placed(placed(&wire::OrderPlaced::decode(payload)?)?),
        types::RESERVED => wire::OrderReserved::decode(payload).map(|_| Change::Reserved)?,
        types::OVERDUE => wire::OrderOverdue::decode(payload).map(|_| Change::Overdue)?,
        types::PAID => Change::Paid {
            payment_id: uuid("payment_id", &wire::OrderPaid::decode(payload)?.payment_id)?,
        },
        types::CONFIRMED => wire::OrderConfirmed::decode(payload).map(|_| Change::Confirmed)?,
        types::SHIPPED => {
            let wire::OrderShipped {
                tracking_number,
                carrier,
                ..
            } = wire::OrderShipped::decode(payload)?;
            Change::Shipped(Shipment {
                tracking_number,
                carrier,
            })
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
            product_id: uuid("items.product_id", &line.product_id)?,
            quantity: line.quantity,
            unit_price_minor_units: line.unit_price_minor_units,
        })
    });
    Ok(Placed {
        user_id: uuid("user_id", &event.user_id)?,
        items: items.collect::<Result<_, EventError>>()?,
        total_minor_units: total.minor_units,
        currency_code: total.currency_code.clone(),
        placed_at: time(event.created_at.as_ref()).ok_or(EventError::Field("created_at"))?,
        pay_by: time(event.pay_by.as_ref()),
    })
}

/// A payment after an event of it; nothing when the event is not in the catalogue.
fn payment(record: &Record, payment_id: Uuid) -> Result<Option<Payment>, EventError> {
    let payload = record.payload.as_slice();
    let (order_id, amount, method, status) = match record.envelope.event_type.as_str() {
        payment_types::RECEIVED => {
            let event = payment_wire::PaymentReceived::decode(payload)?;
            let status = PaymentStatus::Received;
            (event.order_id, event.amount, event.payment_method, status)
        }
        payment_types::FAILED => {
            let event = payment_wire::PaymentFailed::decode(payload)?;
            let status = PaymentStatus::Failed(Failure {
                reason: event.reason,
                another_try: event.another_try,
            });
            (event.order_id, event.amount, event.payment_method, status)
        }
        payment_types::REFUNDED => {
            let event = payment_wire::PaymentRefunded::decode(payload)?;
            let status = PaymentStatus::Refunded;
            (event.order_id, event.amount, event.payment_method, status)
        }
        _ => return Ok(None),
    };
    let Money {
        minor_units,
        currency_code,
    } = amount.ok_or(EventError::Field("amount"))?;
    let method = method.unwrap_or_default();
    Ok(Some(Payment {
        payment_id,
        order_id: uuid("order_id", &order_id)?,
        status,
        amount_minor_units: minor_units,
        currency_code,
        brand: method.brand,
        last_four: method.last_four,
        version: record.envelope.version,
        updated_at: record.envelope.occurred_at,
    }))
}

fn uuid(field: &'static str, text: &str) -> Result<Uuid, EventError> {
    Uuid::try_parse(text).map_err(|_| EventError::Field(field))
}
