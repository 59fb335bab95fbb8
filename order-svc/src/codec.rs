//! The domain as Protobuf: events as they are stored and published, orders as they are answered.
//!
//! New major versions of a schema get an arm in [`decode`] that turns their predecessors into today's event (an upcaster).

use chrono::{DateTime, Utc};
use contracts::catalogue::order as names;
use contracts::shop::order::events::v1 as proto;
use contracts::shop::order::v1 as api;
use contracts::wire::{self, time, timestamp};
use event_store::NewEvent;
use prost::Message as _;
use uuid::Uuid;

use crate::domain::{
    Cancellation, CancelledBy, Event, Items, Line, NewOrder, Order, OrderId, Payment, PaymentMethodId,
    ProductId, Shipment, Status, UserId,
};

/// Why stored bytes are not an event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("there is no event {event_type} of version {schema_version}")]
    Unknown { event_type: String, schema_version: i32 },
    #[error("the payload is not Protobuf")]
    Protobuf(#[from] prost::DecodeError),
    #[error("field {0} of the payload is missing or not valid")]
    Field(&'static str),
    #[error("the payload is of order {0}")]
    OtherOrder(String),
}

/// Encodes an event of an order.
pub fn encode(id: OrderId, event: &Event) -> NewEvent {
    let order_id = id.to_string();
    let (event_type, payload) = match event {
        Event::Placed { order, at } => (names::PLACED, placed(order, *at).encode_to_vec()),
        Event::Reserved { at } => (
            names::RESERVED,
            proto::OrderReserved {
                order_id,
                reserved_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Overdue { at } => (
            names::OVERDUE,
            proto::OrderOverdue {
                order_id,
                overdue_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Paid { payment, at } => {
            let method = proto::PaymentMethodSummary {
                brand: payment.brand.clone(),
                last_four: payment.last_four.clone(),
            };
            let paid = proto::OrderPaid {
                order_id,
                payment_id: payment.payment_id.to_string(),
                amount: Some(payment.amount.into()),
                payment_method: Some(method),
                paid_at: Some(timestamp(*at)),
            };
            (names::PAID, paid.encode_to_vec())
        }
        Event::Confirmed { at } => (
            names::CONFIRMED,
            proto::OrderConfirmed {
                order_id,
                confirmed_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Shipped { shipment, at } => {
            let shipped = proto::OrderShipped {
                order_id,
                tracking_number: shipment.tracking_number.clone(),
                carrier: shipment.carrier.clone(),
                shipped_at: Some(timestamp(*at)),
            };
            (names::SHIPPED, shipped.encode_to_vec())
        }
        Event::Completed { at } => (
            names::COMPLETED,
            proto::OrderCompleted {
                order_id,
                delivered_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Cancelled { cancellation, at } => {
            let by = match cancellation.by {
                CancelledBy::User => proto::CancelledBy::User,
                CancelledBy::OutOfStock => proto::CancelledBy::OutOfStock,
                CancelledBy::NotPaidInTime => proto::CancelledBy::NotPaidInTime,
                CancelledBy::PaymentFailed => proto::CancelledBy::PaymentFailed,
                CancelledBy::Refund => proto::CancelledBy::Refund,
            };
            let cancelled = proto::OrderCancelled {
                order_id,
                cancelled_by: by.into(),
                reason: cancellation.reason.clone(),
                cancelled_at: Some(timestamp(*at)),
            };
            (names::CANCELLED, cancelled.encode_to_vec())
        }
    };
    let data_schema = contracts::catalogue::message_name(event_type, 1);
    NewEvent {
        event_type,
        schema_version: 1,
        data_schema,
        payload,
        occurred_at: event.at(),
    }
}

/// Decodes an event of an order.
///
/// # Errors
/// When the bytes are not such an event, or one of another order.
pub fn decode(
    id: OrderId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Event, DecodeError> {
    use DecodeError::Field;
    let expected = id.to_string();
    let same = |order_id: String| {
        if order_id == expected {
            Ok(())
        } else {
            Err(DecodeError::OtherOrder(order_id))
        }
    };
    match (event_type, schema_version) {
        (names::PLACED, 1) => {
            let message = proto::OrderPlaced::decode(payload)?;
            same(message.order_id.clone())?;
            let at = time(message.created_at.as_ref()).ok_or(Field("created_at"))?;
            Ok(Event::Placed {
                order: new_order(id, message)?,
                at,
            })
        }
        (names::RESERVED, 1) => {
            let message = proto::OrderReserved::decode(payload)?;
            same(message.order_id)?;
            Ok(Event::Reserved {
                at: time(message.reserved_at.as_ref()).ok_or(Field("reserved_at"))?,
            })
        }
        (names::OVERDUE, 1) => {
            let message = proto::OrderOverdue::decode(payload)?;
            same(message.order_id)?;
            Ok(Event::Overdue {
                at: time(message.overdue_at.as_ref()).ok_or(Field("overdue_at"))?,
            })
        }
        (names::PAID, 1) => {
            let message = proto::OrderPaid::decode(payload)?;
            same(message.order_id)?;
            let method = message.payment_method.unwrap_or_default();
            let payment = Payment {
                payment_id: uuid(&message.payment_id).ok_or(Field("payment_id"))?,
                amount: wire::money(message.amount.as_ref()).ok_or(Field("amount"))?,
                brand: method.brand,
                last_four: method.last_four,
            };
            Ok(Event::Paid {
                payment,
                at: time(message.paid_at.as_ref()).ok_or(Field("paid_at"))?,
            })
        }
        (names::CONFIRMED, 1) => {
            let message = proto::OrderConfirmed::decode(payload)?;
            same(message.order_id)?;
            Ok(Event::Confirmed {
                at: time(message.confirmed_at.as_ref()).ok_or(Field("confirmed_at"))?,
            })
        }
        (names::SHIPPED, 1) => {
            let message = proto::OrderShipped::decode(payload)?;
            same(message.order_id)?;
            let shipment = Shipment {
                tracking_number: message.tracking_number,
                carrier: message.carrier,
            };
            Ok(Event::Shipped {
                shipment,
                at: time(message.shipped_at.as_ref()).ok_or(Field("shipped_at"))?,
            })
        }
        (names::COMPLETED, 1) => {
            let message = proto::OrderCompleted::decode(payload)?;
            same(message.order_id)?;
            Ok(Event::Completed {
                at: time(message.delivered_at.as_ref()).ok_or(Field("delivered_at"))?,
            })
        }
        (names::CANCELLED, 1) => {
            let message = proto::OrderCancelled::decode(payload)?;
            let by = match message.cancelled_by() {
                proto::CancelledBy::Unspecified => return Err(Field("cancelled_by")),
                proto::CancelledBy::User => CancelledBy::User,
                proto::CancelledBy::OutOfStock => CancelledBy::OutOfStock,
                proto::CancelledBy::NotPaidInTime => CancelledBy::NotPaidInTime,
                proto::CancelledBy::PaymentFailed => CancelledBy::PaymentFailed,
                proto::CancelledBy::Refund => CancelledBy::Refund,
            };
            same(message.order_id)?;
            let at = time(message.cancelled_at.as_ref()).ok_or(Field("cancelled_at"))?;
            Ok(Event::Cancelled {
                cancellation: Cancellation {
                    by,
                    reason: message.reason,
                },
                at,
            })
        }
        _ => Err(DecodeError::Unknown {
            event_type: event_type.to_owned(),
            schema_version,
        }),
    }
}

fn placed(order: &NewOrder, at: DateTime<Utc>) -> proto::OrderPlaced {
    let line = |line: &Line| proto::OrderLine {
        product_id: line.product_id.to_string(),
        quantity: line.quantity,
        unit_price_minor_units: line.unit_price,
    };
    proto::OrderPlaced {
        order_id: order.id.to_string(),
        user_id: order.user_id.to_string(),
        items: order.items.lines().iter().map(line).collect(),
        total: Some(order.items.total().into()),
        user_email: order.user_email.clone(),
        payment_method_id: order.payment_method_id.map(|id| id.to_string()),
        pay_by: Some(timestamp(order.pay_by)),
        created_at: Some(timestamp(at)),
    }
}

fn new_order(id: OrderId, message: proto::OrderPlaced) -> Result<NewOrder, DecodeError> {
    use DecodeError::Field;
    let total = wire::money(message.total.as_ref()).ok_or(Field("total"))?;
    let line = |line: &proto::OrderLine| {
        let product_id = ProductId(uuid(&line.product_id)?);
        Some(Line {
            product_id,
            quantity: line.quantity,
            unit_price: line.unit_price_minor_units,
        })
    };
    let lines = message
        .items
        .iter()
        .map(line)
        .collect::<Option<Vec<_>>>()
        .ok_or(Field("items"))?;
    let items = Items::new(lines, total.currency()).map_err(|_| Field("items"))?;
    if items.total() != total {
        return Err(Field("total"));
    }
    let payment_method_id = match message.payment_method_id.as_deref() {
        None => None,
        Some(text) => Some(PaymentMethodId(uuid(text).ok_or(Field("payment_method_id"))?)),
    };
    Ok(NewOrder {
        id,
        user_id: UserId(uuid(&message.user_id).ok_or(Field("user_id"))?),
        items,
        user_email: message.user_email,
        payment_method_id,
        pay_by: time(message.pay_by.as_ref()).ok_or(Field("pay_by"))?,
    })
}

impl From<&Order> for api::Order {
    fn from(order: &Order) -> Self {
        let status = match order.status {
            Status::Pending => api::OrderStatus::Pending,
            Status::Paid => api::OrderStatus::Paid,
            Status::Confirmed => api::OrderStatus::Confirmed,
            Status::Shipped => api::OrderStatus::Shipped,
            Status::Delivered => api::OrderStatus::Delivered,
            Status::Cancelled => api::OrderStatus::Cancelled,
        };
        let item = |line: &Line| api::OrderItem {
            product_id: line.product_id.to_string(),
            quantity: line.quantity,
            unit_price_minor_units: line.unit_price,
        };
        let cancel_reason = match &order.cancelled {
            None => String::new(),
            Some((cancellation, _)) if !cancellation.reason.is_empty() => cancellation.reason.clone(),
            Some((cancellation, _)) => cancellation.by.reason().to_owned(),
        };
        let (shipment, _) = order.shipped.clone().unzip();
        let (tracking_number, carrier) = shipment
            .map(|shipment| (shipment.tracking_number, shipment.carrier))
            .unwrap_or_default();
        Self {
            order_id: order.id.to_string(),
            user_id: order.user_id.to_string(),
            status: status.into(),
            items: order.items.lines().iter().map(item).collect(),
            total: Some(order.items.total().into()),
            version: order.version,
            user_email: order.user_email.clone().unwrap_or_default(),
            payment_method_id: order
                .payment_method_id
                .map(|id| id.to_string())
                .unwrap_or_default(),
            pay_by: Some(timestamp(order.pay_by)),
            created_at: Some(timestamp(order.created_at)),
            updated_at: Some(timestamp(order.updated_at)),
            cancel_reason,
            tracking_number,
            carrier,
            payment_id: order
                .paid
                .as_ref()
                .map(|(payment, _)| payment.payment_id.to_string())
                .unwrap_or_default(),
        }
    }
}

fn uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Currency, Money};

    const AT: i64 = 1_800_000_000_123_456;

    fn at() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(AT).expect("in range")
    }

    fn id() -> OrderId {
        OrderId(Uuid::from_u128(1))
    }

    fn every_event() -> Vec<Event> {
        let amount = Money::new(1299, Currency::from_code("JPY").expect("known")).expect("positive");
        let line = Line {
            product_id: ProductId(Uuid::from_u128(3)),
            quantity: 3,
            unit_price: 433,
        };
        let order = NewOrder {
            id: id(),
            user_id: UserId(Uuid::from_u128(2)),
            items: Items::new(vec![line], amount.currency()).expect("valid"),
            user_email: Some("a@example.org".to_owned()),
            payment_method_id: Some(PaymentMethodId(Uuid::from_u128(4))),
            pay_by: at(),
        };
        let bare = NewOrder {
            user_email: None,
            payment_method_id: None,
            ..order.clone()
        };
        let payment_id = Uuid::from_u128(5);
        let payment = Payment {
            payment_id,
            amount,
            brand: "visa".to_owned(),
            last_four: "4242".to_owned(),
        };
        let shipment = Shipment {
            tracking_number: "T".to_owned(),
            carrier: "C".to_owned(),
        };
        let mut events = vec![
            Event::Placed { order, at: at() },
            Event::Placed {
                order: bare,
                at: at(),
            },
            Event::Reserved { at: at() },
            Event::Overdue { at: at() },
            Event::Paid { payment, at: at() },
            Event::Confirmed { at: at() },
            Event::Shipped { shipment, at: at() },
            Event::Completed { at: at() },
        ];
        for by in [
            CancelledBy::User,
            CancelledBy::OutOfStock,
            CancelledBy::NotPaidInTime,
            CancelledBy::PaymentFailed,
            CancelledBy::Refund,
        ] {
            let cancellation = Cancellation {
                by,
                reason: "r".to_owned(),
            };
            events.push(Event::Cancelled {
                cancellation,
                at: at(),
            });
        }
        events
    }

    #[test]
    fn every_event_comes_back() {
        for event in every_event() {
            let encoded = encode(id(), &event);
            assert!(
                encoded.data_schema.is_some(),
                "{} is in the catalogue",
                encoded.event_type
            );
            let decoded = decode(id(), encoded.event_type, encoded.schema_version, &encoded.payload);
            assert_eq!(decoded.expect("decodable"), event);
        }
    }

    #[test]
    fn what_is_not_an_event_is_refused() {
        for event in every_event() {
            let NewEvent {
                event_type, payload, ..
            } = encode(id(), &event);
            assert!(
                decode(id(), event_type, 2, &payload).is_err(),
                "another version of {event_type}"
            );
            assert!(decode(id(), "order.eaten", 1, &payload).is_err());
            assert!(decode(id(), event_type, 1, &[0xff]).is_err());
            assert!(decode(id(), event_type, 1, &[]).is_err());
            let other = OrderId(Uuid::from_u128(9));
            assert!(matches!(
                decode(other, event_type, 1, &payload),
                Err(DecodeError::OtherOrder(_))
            ));
        }
    }

    #[test]
    fn a_total_that_is_not_the_sum_is_refused() {
        let encoded = encode(id(), &every_event()[0]);
        let mut message = proto::OrderPlaced::decode(encoded.payload.as_slice()).expect("ours");
        message.items[0].quantity += 1;
        let error = decode(id(), encoded.event_type, 1, &message.encode_to_vec()).expect_err("tampered");
        assert!(matches!(error, DecodeError::Field("total")), "{error}");
    }
}
