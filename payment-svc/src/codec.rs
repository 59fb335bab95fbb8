//! The domain as Protobuf: events as they are stored and published, payments as they are answered, and what others publish.
//!
//! New major versions of a schema get an arm in [`decode`] that turns their predecessors into today's event (an upcaster).

use contracts::catalogue::{order as order_names, payment as names};
use contracts::shop::order::events::v1 as order_proto;
use contracts::shop::payment::events::v1 as proto;
use contracts::shop::payment::v1 as api;
use contracts::wire::{self, time, timestamp};
use event_store::NewEvent;
use prost::Message as _;
use uuid::Uuid;

use crate::domain::{
    CardSummary, Event, Facts, Failure, OrderId, OrderNews, Payment, PaymentId, PaymentMethodId, Reason,
    Status, UserId,
};

/// Why bytes are not an event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("there is no event {event_type} of version {schema_version}")]
    Unknown { event_type: String, schema_version: i32 },
    #[error("the payload is not Protobuf")]
    Protobuf(#[from] prost::DecodeError),
    #[error("field {0} of the payload is missing or not valid")]
    Field(&'static str),
    #[error("the payload is about something else")]
    OtherEntity,
}

/// Encodes an event of a payment.
pub fn encode(id: PaymentId, event: &Event) -> NewEvent {
    let payment_id = id.to_string();
    let facts = event.facts();
    let order_id = facts.order_id.to_string();
    let amount = Some(facts.amount.into());
    let payment_method = facts.card.as_ref().map(|card| proto::PaymentMethodSummary {
        brand: card.brand.clone(),
        last_four: card.last_four.clone(),
    });
    let at = Some(timestamp(event.at()));
    let (event_type, payload) = match event {
        Event::Received { .. } => (
            names::RECEIVED,
            proto::PaymentReceived {
                payment_id,
                order_id,
                amount,
                payment_method,
                provider_reference: facts.intent.clone().unwrap_or_default(),
                received_at: at,
            }
            .encode_to_vec(),
        ),
        Event::Failed { failure, .. } => (
            names::FAILED,
            proto::PaymentFailed {
                payment_id,
                order_id,
                amount,
                payment_method,
                reason: reason_to_wire(failure.reason).into(),
                another_try: failure.another_try,
                provider_reference: facts.intent.clone(),
                failed_at: at,
            }
            .encode_to_vec(),
        ),
        Event::Refunded { refund, .. } => (
            names::REFUNDED,
            proto::PaymentRefunded {
                payment_id,
                order_id,
                amount,
                payment_method,
                provider_reference: facts.intent.clone().unwrap_or_default(),
                refund_reference: refund.clone(),
                refunded_at: at,
            }
            .encode_to_vec(),
        ),
    };
    NewEvent {
        event_type,
        schema_version: 1,
        data_schema: contracts::catalogue::message_name(event_type, 1),
        payload,
        occurred_at: event.at(),
    }
}

/// Decodes an event of a payment.
///
/// # Errors
/// When the bytes are not such an event, or one of another payment.
pub fn decode(
    id: PaymentId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Event, DecodeError> {
    use DecodeError::Field;
    let same = |payment_id: &str| match uuid(payment_id) {
        Some(other) if other == id.0 => Ok(()),
        _ => Err(DecodeError::OtherEntity),
    };
    match (event_type, schema_version) {
        (names::RECEIVED, 1) => {
            let message = proto::PaymentReceived::decode(payload)?;
            same(&message.payment_id)?;
            Ok(Event::Received {
                facts: Facts {
                    order_id: order_id(&message.order_id)?,
                    amount: wire::money(message.amount.as_ref()).ok_or(Field("amount"))?,
                    card: message.payment_method.map(card),
                    intent: some_text(message.provider_reference),
                },
                at: time(message.received_at.as_ref()).ok_or(Field("received_at"))?,
            })
        }
        (names::FAILED, 1) => {
            let message = proto::PaymentFailed::decode(payload)?;
            let reason = reason_from_wire(message.reason()).ok_or(Field("reason"))?;
            same(&message.payment_id)?;
            Ok(Event::Failed {
                facts: Facts {
                    order_id: order_id(&message.order_id)?,
                    amount: wire::money(message.amount.as_ref()).ok_or(Field("amount"))?,
                    card: message.payment_method.map(card),
                    intent: message.provider_reference,
                },
                failure: Failure {
                    reason,
                    another_try: message.another_try,
                },
                at: time(message.failed_at.as_ref()).ok_or(Field("failed_at"))?,
            })
        }
        (names::REFUNDED, 1) => {
            let message = proto::PaymentRefunded::decode(payload)?;
            same(&message.payment_id)?;
            Ok(Event::Refunded {
                facts: Facts {
                    order_id: order_id(&message.order_id)?,
                    amount: wire::money(message.amount.as_ref()).ok_or(Field("amount"))?,
                    card: message.payment_method.map(card),
                    intent: some_text(message.provider_reference),
                },
                refund: some_text(message.refund_reference).ok_or(Field("refund_reference"))?,
                at: time(message.refunded_at.as_ref()).ok_or(Field("refunded_at"))?,
            })
        }
        _ => Err(DecodeError::Unknown {
            event_type: event_type.to_owned(),
            schema_version,
        }),
    }
}

/// Reads what an event of an order tells payments. Types that are not known tell nothing; a known type of an unknown major
/// version cannot be passed over.
///
/// # Errors
/// When the record can never be understood by this code.
pub fn decode_order(
    id: OrderId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<OrderNews, DecodeError> {
    use DecodeError::Field;
    let same = |other: &str| match uuid(other) {
        Some(other) if other == id.0 => Ok(()),
        _ => Err(DecodeError::OtherEntity),
    };
    match (event_type, schema_version) {
        (order_names::PLACED, 1) => {
            let message = order_proto::OrderPlaced::decode(payload)?;
            same(&message.order_id)?;
            let payment_method_id = match message.payment_method_id.as_deref() {
                None => None,
                Some(text) => Some(PaymentMethodId(uuid(text).ok_or(Field("payment_method_id"))?)),
            };
            Ok(OrderNews::Placed {
                user_id: UserId(uuid(&message.user_id).ok_or(Field("user_id"))?),
                total: wire::money(message.total.as_ref()).ok_or(Field("total"))?,
                payment_method_id,
            })
        }
        (order_names::RESERVED, 1) => {
            same(&order_proto::OrderReserved::decode(payload)?.order_id)?;
            Ok(OrderNews::Reserved)
        }
        (order_names::OVERDUE, 1) => {
            same(&order_proto::OrderOverdue::decode(payload)?.order_id)?;
            Ok(OrderNews::Overdue)
        }
        (order_names::CANCELLED, 1) => {
            same(&order_proto::OrderCancelled::decode(payload)?.order_id)?;
            Ok(OrderNews::Cancelled)
        }
        (
            order_names::PLACED | order_names::RESERVED | order_names::OVERDUE | order_names::CANCELLED,
            schema_version,
        ) => Err(DecodeError::Unknown {
            event_type: event_type.to_owned(),
            schema_version,
        }),
        _ => Ok(OrderNews::Other),
    }
}

impl From<&Payment> for api::Payment {
    fn from(payment: &Payment) -> Self {
        let status = match payment.status {
            Status::Pending => api::PaymentStatus::Pending,
            Status::Received => api::PaymentStatus::Received,
            Status::Failed => api::PaymentStatus::Failed,
            Status::RefundPending => api::PaymentStatus::RefundPending,
            Status::Refunded => api::PaymentStatus::Refunded,
        };
        let card = payment.method.as_ref().map(|method| method.card.clone());
        let (brand, last_four) = card.map(|card| (card.brand, card.last_four)).unwrap_or_default();
        Self {
            payment_id: payment.id.to_string(),
            order_id: payment.order_id.to_string(),
            user_id: payment.user_id.to_string(),
            status: status.into(),
            amount: Some(payment.amount.into()),
            brand,
            last_four,
            failure: payment.failure.map(|failure| api::PaymentFailure {
                reason: reason_to_wire(failure.reason).into(),
                another_try: failure.another_try,
            }),
            provider_reference: payment.intent.clone().unwrap_or_default(),
            version: payment.version,
            created_at: Some(timestamp(payment.created_at)),
            updated_at: Some(timestamp(payment.updated_at)),
        }
    }
}

const REASONS: [(Reason, proto::FailureReason); 10] = [
    (Reason::Declined, proto::FailureReason::Declined),
    (Reason::InsufficientFunds, proto::FailureReason::InsufficientFunds),
    (Reason::ExpiredCard, proto::FailureReason::ExpiredCard),
    (
        Reason::IncorrectCardDetails,
        proto::FailureReason::IncorrectCardDetails,
    ),
    (Reason::CardBlocked, proto::FailureReason::CardBlocked),
    (
        Reason::AuthenticationRequired,
        proto::FailureReason::AuthenticationRequired,
    ),
    (
        Reason::UnknownPaymentMethod,
        proto::FailureReason::UnknownPaymentMethod,
    ),
    (Reason::NotSupported, proto::FailureReason::NotSupported),
    (Reason::OrderCancelled, proto::FailureReason::OrderCancelled),
    (Reason::NotPaidInTime, proto::FailureReason::NotPaidInTime),
];

fn reason_to_wire(reason: Reason) -> proto::FailureReason {
    REASONS
        .iter()
        .find(|(known, _)| *known == reason)
        .map_or(proto::FailureReason::Unspecified, |(_, wire)| *wire)
}

fn reason_from_wire(reason: proto::FailureReason) -> Option<Reason> {
    REASONS
        .iter()
        .find(|(_, wire)| *wire == reason)
        .map(|(known, _)| *known)
}

fn card(summary: proto::PaymentMethodSummary) -> CardSummary {
    CardSummary {
        brand: summary.brand,
        last_four: summary.last_four,
    }
}

fn order_id(text: &str) -> Result<OrderId, DecodeError> {
    uuid(text).map(OrderId).ok_or(DecodeError::Field("order_id"))
}

fn some_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|id| !id.is_nil())
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use money::{Currency, Money};

    use super::*;

    fn at() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_800_000_000_123_456).expect("in range")
    }

    fn facts(card: bool, intent: bool) -> Facts {
        Facts {
            order_id: OrderId(Uuid::from_u128(7)),
            amount: Money::new(1299, Currency::from_code("EUR").expect("known")).expect("positive"),
            card: card.then(|| CardSummary {
                brand: "visa".into(),
                last_four: "4242".into(),
            }),
            intent: intent.then(|| "pi_1".into()),
        }
    }

    #[test]
    fn events_come_back() {
        let id = PaymentId(Uuid::from_u128(1));
        let mut events = vec![
            Event::Received {
                facts: facts(true, true),
                at: at(),
            },
            Event::Refunded {
                facts: facts(true, true),
                refund: "re_1".into(),
                at: at(),
            },
        ];
        for (reason, _) in REASONS {
            for another_try in [true, false] {
                events.push(Event::Failed {
                    facts: facts(another_try, !another_try),
                    failure: Failure { reason, another_try },
                    at: at(),
                });
            }
        }
        for event in events {
            let encoded = encode(id, &event);
            assert!(encoded.data_schema.is_some());
            let decoded = decode(id, encoded.event_type, encoded.schema_version, &encoded.payload);
            assert_eq!(decoded.expect("decodes"), event);
            let other = PaymentId(Uuid::from_u128(2));
            assert!(matches!(
                decode(other, encoded.event_type, 1, &encoded.payload),
                Err(DecodeError::OtherEntity)
            ));
            assert!(matches!(
                decode(id, encoded.event_type, 2, &encoded.payload),
                Err(DecodeError::Unknown { .. })
            ));
        }
    }

    #[test]
    fn news_of_orders_are_understood_or_refused() {
        let id = OrderId(Uuid::from_u128(7));
        let order_id = id.to_string();
        let placed = order_proto::OrderPlaced {
            order_id: order_id.clone(),
            user_id: Uuid::from_u128(8).to_string(),
            total: Some(facts(false, false).amount.into()),
            ..Default::default()
        };
        let read = |event_type, version, payload: &[u8]| decode_order(id, event_type, version, payload);
        let news = read(order_names::PLACED, 1, &placed.encode_to_vec()).expect("news");
        assert!(matches!(
            news,
            OrderNews::Placed {
                payment_method_id: None,
                ..
            }
        ));
        for broken in [
            order_proto::OrderPlaced {
                user_id: "x".into(),
                ..placed.clone()
            },
            order_proto::OrderPlaced {
                total: None,
                ..placed.clone()
            },
            order_proto::OrderPlaced {
                payment_method_id: Some("x".into()),
                ..placed.clone()
            },
            order_proto::OrderPlaced {
                order_id: Uuid::from_u128(9).to_string(),
                ..placed
            },
        ] {
            assert!(
                read(order_names::PLACED, 1, &broken.encode_to_vec()).is_err(),
                "{broken:?}"
            );
        }
        let cancelled = order_proto::OrderCancelled {
            order_id,
            ..Default::default()
        };
        let cancelled = cancelled.encode_to_vec();
        assert_eq!(
            read(order_names::CANCELLED, 1, &cancelled).expect("news"),
            OrderNews::Cancelled
        );
        assert!(read(order_names::CANCELLED, 2, &cancelled).is_err());
        assert!(read(order_names::CANCELLED, 1, &[0xff]).is_err());
        assert_eq!(
            read(order_names::SHIPPED, 9, &[0xff]).expect("passed over"),
            OrderNews::Other
        );
        assert_eq!(
            read("order.painted", 1, &[0xff]).expect("passed over"),
            OrderNews::Other
        );
    }
}
