//! What events of payments ask of orders. payment-svc says how an order's payments end; what that means for the order, the domain
//! decides.

use consumer::Record;
use contracts::catalogue::payment as types;
use contracts::shop::payment::events::v1 as proto;
use contracts::wire;
use prost::Message as _;
use uuid::Uuid;

use super::{EventError, order_id};
use crate::domain::{Command, OrderId, Payment};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// What a record asks of which order; nothing when it is of no interest to orders.
///
/// # Errors
/// When the record can never be understood by this code.
pub(super) fn parse(record: &Record) -> Result<Option<(OrderId, Command)>, EventError> {
    use EventError::Field;
    let envelope = &record.envelope;
    let payload = record.payload.as_slice();
    let event_type = envelope.event_type.as_str();
    if ![types::RECEIVED, types::FAILED, types::REFUNDED].contains(&event_type) {
        return Ok(None);
    }
    if envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let payment = |payment_id: &str| match Uuid::try_parse(payment_id) {
        Ok(id) if payment_id == envelope.entity_id => Ok(id),
        Ok(_) => Err(EventError::OtherEntity),
        Err(_) => Err(Field("payment_id")),
    };
    match event_type {
        types::RECEIVED => {
            let event = proto::PaymentReceived::decode(payload)?;
            let method = event.payment_method.unwrap_or_default();
            let received = Payment {
                payment_id: payment(&event.payment_id)?,
                amount: wire::money(event.amount.as_ref()).ok_or(Field("amount"))?,
                brand: method.brand,
                last_four: method.last_four,
            };
            Ok(Some((order_id(&event.order_id)?, Command::RecordPaid(received))))
        }
        types::FAILED => {
            let event = proto::PaymentFailed::decode(payload)?;
            payment(&event.payment_id)?;
            let order = order_id(&event.order_id)?;
            // Whoever may try again may still pay.
            Ok((!event.another_try).then_some((order, Command::RecordPaymentFailed)))
        }
        _ => {
            let event = proto::PaymentRefunded::decode(payload)?;
            let refunded = Command::RecordRefunded(payment(&event.payment_id)?);
            Ok(Some((order_id(&event.order_id)?, refunded)))
        }
    }
}
