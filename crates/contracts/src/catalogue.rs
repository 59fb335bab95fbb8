//! The catalogue of events: which message is the payload of which event type.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage};

/// The type names of the events of entity type [`ORDER`](self::order::ENTITY_TYPE).
pub mod order {
    /// Entity type of orders.
    pub const ENTITY_TYPE: &str = "order";
    pub const PLACED: &str = "order.placed";
    pub const RESERVED: &str = "order.reserved";
    pub const OVERDUE: &str = "order.overdue";
    pub const PAID: &str = "order.paid";
    pub const CONFIRMED: &str = "order.confirmed";
    pub const SHIPPED: &str = "order.shipped";
    pub const COMPLETED: &str = "order.completed";
    pub const CANCELLED: &str = "order.cancelled";
}

/// The type names of the events of entity type [`PAYMENT`](self::payment::ENTITY_TYPE).
pub mod payment {
    /// Entity type of payments.
    pub const ENTITY_TYPE: &str = "payment";
    pub const RECEIVED: &str = "payment.received";
    pub const FAILED: &str = "payment.failed";
    pub const REFUNDED: &str = "payment.refunded";
}

/// The type names of the events of entity type [`USER`](self::user::ENTITY_TYPE).
pub mod user {
    /// Entity type of users.
    pub const ENTITY_TYPE: &str = "user";
    pub const CREATED: &str = "user.created";
    pub const UPDATED: &str = "user.updated";
}

/// The type names of the events of entity type [`RESERVATION`](self::inventory::ENTITY_TYPE).
pub mod inventory {
    /// Entity type of the stock that is held for an order.
    pub const ENTITY_TYPE: &str = "reservation";
    pub const RESERVED: &str = "inventory.reserved";
    pub const REJECTED: &str = "inventory.rejected";
    pub const RELEASED: &str = "inventory.released";
    pub const COMMITTED: &str = "inventory.committed";
}

/// The type names of the events of entity type [`STOCK`](self::stock::ENTITY_TYPE).
pub mod stock {
    /// Entity type of the stock of a product.
    pub const ENTITY_TYPE: &str = "stock";
    pub const UPDATED: &str = "stock.updated";
}

/// The type names of the events of entity type [`NOTIFICATION`](self::notification::ENTITY_TYPE).
pub mod notification {
    /// Entity type of mails.
    pub const ENTITY_TYPE: &str = "notification";
    pub const SENT: &str = "notification.sent";
}

/// The type names of the events of entity type [`ORDER_ANALYTICS`](self::order_analytics::ENTITY_TYPE).
pub mod order_analytics {
    /// Entity type of the figures of a window.
    pub const ENTITY_TYPE: &str = "order_analytics";
    pub const UPDATED: &str = "order_analytics.updated";
}

/// Every event: type name, major version of the schema, full name of the Protobuf message.
pub const EVENTS: [(&str, i32, &str); 20] = [
    (order::PLACED, 1, "shop.order.events.v1.OrderPlaced"),
    (order::RESERVED, 1, "shop.order.events.v1.OrderReserved"),
    (order::OVERDUE, 1, "shop.order.events.v1.OrderOverdue"),
    (order::PAID, 1, "shop.order.events.v1.OrderPaid"),
    (order::CONFIRMED, 1, "shop.order.events.v1.OrderConfirmed"),
    (order::SHIPPED, 1, "shop.order.events.v1.OrderShipped"),
    (order::COMPLETED, 1, "shop.order.events.v1.OrderCompleted"),
    (order::CANCELLED, 1, "shop.order.events.v1.OrderCancelled"),
    (payment::RECEIVED, 1, "shop.payment.events.v1.PaymentReceived"),
    (payment::FAILED, 1, "shop.payment.events.v1.PaymentFailed"),
    (payment::REFUNDED, 1, "shop.payment.events.v1.PaymentRefunded"),
    (user::CREATED, 1, "shop.user.events.v1.UserCreated"),
    (user::UPDATED, 1, "shop.user.events.v1.UserUpdated"),
    (
        inventory::RESERVED,
        1,
        "shop.inventory.events.v1.InventoryReserved",
    ),
    (
        inventory::REJECTED,
        1,
        "shop.inventory.events.v1.InventoryRejected",
    ),
    (
        inventory::RELEASED,
        1,
        "shop.inventory.events.v1.InventoryReleased",
    ),
    (
        inventory::COMMITTED,
        1,
        "shop.inventory.events.v1.InventoryCommitted",
    ),
    (stock::UPDATED, 1, "shop.inventory.events.v1.StockUpdated"),
    (
        notification::SENT,
        1,
        "shop.notification.events.v1.NotificationSent",
    ),
    (
        order_analytics::UPDATED,
        1,
        "shop.analytics.events.v1.OrderAnalyticsUpdated",
    ),
];

/// Full name of the message that an event of this type and major version carries, if the catalogue knows it.
pub fn message_name(event_type: &str, schema_version: i32) -> Option<&'static str> {
    EVENTS
        .iter()
        .find(|(name, version, _)| *name == event_type && *version == schema_version)
        .map(|(_, _, message)| *message)
}

/// Why a payload cannot be shown as JSON.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("the catalogue has no event {event_type} of version {schema_version}")]
    Unknown { event_type: String, schema_version: i32 },
    #[error("the payload is not a {message}")]
    Undecodable {
        message: &'static str,
        source: prost::DecodeError,
    },
    #[error("a {message} cannot be written as JSON")]
    Unprintable {
        message: &'static str,
        source: serde_json::Error,
    },
}

/// A payload in canonical Protobuf JSON.
///
/// # Errors
/// When the catalogue does not know the event, or the bytes are not its message.
pub fn payload_json(
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<serde_json::Value, PayloadError> {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        DescriptorPool::decode(super::FILE_DESCRIPTOR_SET).expect("the build script wrote valid descriptors")
    });
    let unknown = || PayloadError::Unknown {
        event_type: event_type.to_owned(),
        schema_version,
    };
    let message = message_name(event_type, schema_version).ok_or_else(unknown)?;
    let descriptor = POOL.get_message_by_name(message).ok_or_else(unknown)?;
    let decoded = DynamicMessage::decode(descriptor, payload)
        .map_err(|source| PayloadError::Undecodable { message, source })?;
    serde_json::to_value(&decoded).map_err(|source| PayloadError::Unprintable { message, source })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::shop::order::events::v1::OrderConfirmed;

    #[test]
    fn every_event_of_the_catalogue_has_its_message() {
        for (event_type, version, _) in EVENTS {
            payload_json(event_type, version, &[]).unwrap_or_else(|error| panic!("{event_type}: {error}"));
        }
    }

    #[test]
    fn payloads_are_shown_by_name() {
        let payload = OrderConfirmed {
            order_id: "o1".into(),
            confirmed_at: None,
        }
        .encode_to_vec();
        let json = payload_json(order::CONFIRMED, 1, &payload).expect("known");
        assert_eq!(json, serde_json::json!({"orderId": "o1"}));
    }

    #[test]
    fn unknown_versions_and_bad_bytes_are_told_apart() {
        assert!(matches!(
            payload_json(order::PAID, 9, &[]),
            Err(PayloadError::Unknown { .. })
        ));
        assert!(matches!(
            payload_json(order::PAID, 1, &[0xff]),
            Err(PayloadError::Undecodable { .. })
        ));
    }
}
