//! What events of reservations ask of orders. inventory-svc says whether an order's goods are held; what that means for the order, the
//! domain decides.

use consumer::Record;
use contracts::catalogue::inventory as types;
use contracts::shop::inventory::events::v1 as proto;
use prost::Message as _;

use super::{EventError, order_id};
use crate::domain::{Command, OrderId};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// What a record asks of which order; nothing when it is of no interest to orders: what is committed or released follows from what
/// order-svc has said itself.
///
/// # Errors
/// When the record can never be understood by this code.
pub(super) fn parse(record: &Record) -> Result<Option<(OrderId, Command)>, EventError> {
    let envelope = &record.envelope;
    let payload = record.payload.as_slice();
    let event_type = envelope.event_type.as_str();
    if ![types::RESERVED, types::REJECTED].contains(&event_type) {
        return Ok(None);
    }
    if envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let (told, command) = if event_type == types::RESERVED {
        (
            proto::InventoryReserved::decode(payload)?.order_id,
            Command::RecordReserved,
        )
    } else {
        (
            proto::InventoryRejected::decode(payload)?.order_id,
            Command::RecordOutOfStock,
        )
    };
    if told != envelope.entity_id {
        return Err(EventError::OtherEntity);
    }
    Ok(Some((order_id(&told)?, command)))
}
