//! Protobuf: what events of other services tell, and the event of a mail that was sent.

use chrono::{DateTime, Utc};
use contracts::catalogue::{notification, order, payment, user};
use contracts::shop::notification::events::v1 as proto;
use contracts::shop::order::events::v1 as orders;
use contracts::shop::payment::events::v1 as payments;
use contracts::shop::user::events::v1 as users;
use contracts::wire::{money, time, timestamp};
use event_store::NewEvent;
use prost::Message as _;
use uuid::Uuid;

use crate::domain::{
    CancelledBy, Content, Email, Line, MailId, Money, Name, News, OrderId, Template, UserId,
};

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// Why bytes are not what their type says. Never says what is in them.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("major version {0} of the payload's schema is not known")]
    SchemaVersion(i32),
    #[error("there is no mail for an event of this type")]
    Type,
    #[error("the payload is not what its type says")]
    Protobuf(#[from] prost::DecodeError),
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
    #[error("the payload is of another entity than the record")]
    OtherEntity,
}

/// What an event of `entity_id` tells. Types that are not known are of no interest.
///
/// # Errors
/// When this code can never understand it.
pub fn read(
    event_type: &str,
    schema_version: i32,
    entity_id: &str,
    payload: &[u8],
) -> Result<News, DecodeError> {
    let is_same = |id: &str| {
        if id == entity_id {
            Ok(())
        } else {
            Err(DecodeError::OtherEntity)
        }
    };
    match event_type {
        user::CREATED => {
            check(schema_version)?;
            let event = users::UserCreated::decode(payload)?;
            is_same(&event.user_id)?;
            address(&event.user_id, &event.email, &event.first_name)
        }
        user::UPDATED => {
            check(schema_version)?;
            let event = users::UserUpdated::decode(payload)?;
            is_same(&event.user_id)?;
            address(&event.user_id, &event.email, &event.first_name)
        }
        order::PLACED => {
            check(schema_version)?;
            let event = orders::OrderPlaced::decode(payload)?;
            is_same(&event.order_id)?;
            placed(&event)?;
            let email = match &event.user_email {
                None => None,
                Some(text) => Some(Email::parse(text).ok_or(DecodeError::Field("user_email"))?),
            };
            Ok(News::Order {
                order_id: order_id(&event.order_id)?,
                user_id: user_id(&event.user_id)?,
                email,
            })
        }
        order::CONFIRMED | order::SHIPPED | order::CANCELLED => {
            let (order_id, _) = content(event_type, schema_version, payload)?;
            is_same(&order_id.to_string())?;
            Ok(News::ToAnswer { order_id })
        }
        payment::REFUNDED => {
            let (order_id, _) = content(event_type, schema_version, payload)?;
            is_same(&payments::PaymentRefunded::decode(payload)?.payment_id)?;
            Ok(News::ToAnswer { order_id })
        }
        _ => Ok(News::Nothing),
    }
}

/// What a mail that answers an event says, and about which order.
///
/// # Errors
/// When the event has no mail, or is not what its type says.
pub fn content(
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<(OrderId, Content), DecodeError> {
    let template = template(event_type).ok_or(DecodeError::Type)?;
    check(schema_version)?;
    match template {
        Template::OrderPlaced => {
            let event = orders::OrderPlaced::decode(payload)?;
            Ok((order_id(&event.order_id)?, placed(&event)?))
        }
        Template::OrderConfirmed => {
            let event = orders::OrderConfirmed::decode(payload)?;
            Ok((order_id(&event.order_id)?, Content::Confirmed))
        }
        Template::OrderShipped => {
            let event = orders::OrderShipped::decode(payload)?;
            let shipped = Content::Shipped {
                carrier: event.carrier,
                tracking_number: event.tracking_number,
            };
            Ok((order_id(&event.order_id)?, shipped))
        }
        Template::OrderCancelled => {
            let event = orders::OrderCancelled::decode(payload)?;
            let by = match event.cancelled_by() {
                orders::CancelledBy::Unspecified => return Err(DecodeError::Field("cancelled_by")),
                orders::CancelledBy::User => CancelledBy::User,
                orders::CancelledBy::OutOfStock => CancelledBy::OutOfStock,
                orders::CancelledBy::NotPaidInTime => CancelledBy::NotPaidInTime,
                orders::CancelledBy::PaymentFailed => CancelledBy::PaymentFailed,
                orders::CancelledBy::Refund => CancelledBy::Refund,
            };
            let cancelled = Content::Cancelled {
                by,
                reason: event.reason,
            };
            Ok((order_id(&event.order_id)?, cancelled))
        }
        Template::PaymentRefunded => {
            let event = payments::PaymentRefunded::decode(payload)?;
            let method = event.payment_method.unwrap_or_default();
            let refunded = Content::Refunded {
                amount: money(event.amount.as_ref()).ok_or(DecodeError::Field("amount"))?,
                brand: method.brand,
                last_four: method.last_four,
            };
            Ok((order_id(&event.order_id)?, refunded))
        }
    }
}

/// The mail that answers events of a type, if one does.
pub fn template(event_type: &str) -> Option<Template> {
    match event_type {
        order::PLACED => Some(Template::OrderPlaced),
        order::CONFIRMED => Some(Template::OrderConfirmed),
        order::SHIPPED => Some(Template::OrderShipped),
        order::CANCELLED => Some(Template::OrderCancelled),
        payment::REFUNDED => Some(Template::PaymentRefunded),
        _ => None,
    }
}

fn check(schema_version: i32) -> Result<(), DecodeError> {
    if schema_version == SCHEMA_VERSION {
        Ok(())
    } else {
        Err(DecodeError::SchemaVersion(schema_version))
    }
}

fn address(id: &str, email: &str, first_name: &str) -> Result<News, DecodeError> {
    Ok(News::Address {
        user_id: user_id(id)?,
        email: Email::parse(email).ok_or(DecodeError::Field("email"))?,
        first_name: Name::parse(first_name).ok_or(DecodeError::Field("first_name"))?,
    })
}

fn placed(event: &orders::OrderPlaced) -> Result<Content, DecodeError> {
    let total = money(event.total.as_ref()).ok_or(DecodeError::Field("total"))?;
    let line = |line: &orders::OrderLine| {
        Some(Line {
            product_id: Uuid::try_parse(&line.product_id).ok()?,
            quantity: line.quantity,
            unit_price: Money::new(line.unit_price_minor_units, total.currency())?,
        })
    };
    let lines = event.items.iter().map(line).collect::<Option<Vec<_>>>();
    Ok(Content::Placed {
        lines: lines.ok_or(DecodeError::Field("items"))?,
        total,
    })
}

fn order_id(text: &str) -> Result<OrderId, DecodeError> {
    let id = Uuid::try_parse(text).map_err(|_| DecodeError::Field("order_id"))?;
    Ok(OrderId(id))
}

fn user_id(text: &str) -> Result<UserId, DecodeError> {
    let id = Uuid::try_parse(text).map_err(|_| DecodeError::Field("user_id"))?;
    Ok(UserId(id))
}

/// Encodes notification.sent.
pub fn encode_sent(id: MailId, template: Template, order_id: OrderId, at: DateTime<Utc>) -> NewEvent {
    let template = match template {
        Template::OrderPlaced => proto::Template::OrderPlaced,
        Template::OrderConfirmed => proto::Template::OrderConfirmed,
        Template::OrderShipped => proto::Template::OrderShipped,
        Template::OrderCancelled => proto::Template::OrderCancelled,
        Template::PaymentRefunded => proto::Template::PaymentRefunded,
    };
    let sent = proto::NotificationSent {
        notification_id: id.to_string(),
        template: template.into(),
        order_id: order_id.to_string(),
        sent_at: Some(timestamp(at)),
    };
    NewEvent {
        event_type: notification::SENT,
        schema_version: SCHEMA_VERSION,
        data_schema: contracts::catalogue::message_name(notification::SENT, SCHEMA_VERSION),
        payload: sent.encode_to_vec(),
        occurred_at: at,
    }
}

/// Decodes notification.sent: template, order, and when.
///
/// # Errors
/// When the bytes are not such an event of this mail.
pub fn decode_sent(
    id: MailId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<(Template, OrderId, DateTime<Utc>), DecodeError> {
    if event_type != notification::SENT {
        return Err(DecodeError::Type);
    }
    check(schema_version)?;
    let sent = proto::NotificationSent::decode(payload)?;
    if sent.notification_id != id.to_string() {
        return Err(DecodeError::OtherEntity);
    }
    let template = match sent.template() {
        proto::Template::Unspecified => return Err(DecodeError::Field("template")),
        proto::Template::OrderPlaced => Template::OrderPlaced,
        proto::Template::OrderConfirmed => Template::OrderConfirmed,
        proto::Template::OrderShipped => Template::OrderShipped,
        proto::Template::OrderCancelled => Template::OrderCancelled,
        proto::Template::PaymentRefunded => Template::PaymentRefunded,
    };
    let at = time(sent.sent_at.as_ref()).ok_or(DecodeError::Field("sent_at"))?;
    Ok((template, order_id(&sent.order_id)?, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: &str = "00000000-0000-0000-0000-000000000001";
    const USER: &str = "00000000-0000-0000-0000-000000000002";

    #[test]
    fn a_sent_mail_comes_back() {
        let (id, order_id) = (MailId(Uuid::from_u128(7)), OrderId(Uuid::from_u128(1)));
        let at = DateTime::from_timestamp_micros(1_800_000_000_123_456).expect("in range");
        for template in [
            Template::OrderPlaced,
            Template::OrderConfirmed,
            Template::OrderShipped,
            Template::OrderCancelled,
            Template::PaymentRefunded,
        ] {
            let event = encode_sent(id, template, order_id, at);
            assert!(event.data_schema.is_some());
            let decode = |id, version| decode_sent(id, event.event_type, version, &event.payload);
            assert_eq!(decode(id, 1).expect("decodable"), (template, order_id, at));
            assert!(decode(id, 2).is_err());
            assert!(decode(MailId(Uuid::nil()), 1).is_err());
        }
    }

    #[test]
    fn addresses_are_read_and_refused_without_being_shown() {
        let event = |email: &str| users::UserCreated {
            user_id: USER.to_owned(),
            email: email.to_owned(),
            first_name: "Ann".to_owned(),
            last_name: "Lee".to_owned(),
            created_at: None,
        };
        let read = |email: &str, entity| read(user::CREATED, 1, entity, &event(email).encode_to_vec());
        assert!(matches!(
            read("ann@example.org", USER),
            Ok(News::Address { email, .. }) if email.as_str() == "ann@example.org"
        ));
        let error = read("ann@example.org\n", USER).expect_err("a line break");
        assert!(!error.to_string().contains("ann"), "{error}");
        assert!(matches!(
            read("ann@example.org", ORDER),
            Err(DecodeError::OtherEntity)
        ));
    }

    #[test]
    fn what_can_never_be_written_is_refused_at_once() {
        let event = orders::OrderPlaced {
            order_id: ORDER.to_owned(),
            user_id: USER.to_owned(),
            ..orders::OrderPlaced::default()
        };
        let payload = event.encode_to_vec();
        assert!(matches!(
            read(order::PLACED, 1, ORDER, &payload),
            Err(DecodeError::Field("total"))
        ));
        for event_type in [
            user::CREATED,
            user::UPDATED,
            order::PLACED,
            order::CONFIRMED,
            order::SHIPPED,
            order::CANCELLED,
            payment::REFUNDED,
        ] {
            assert!(
                read(event_type, 2, ORDER, &[]).is_err(),
                "another version of {event_type}"
            );
            assert!(read(event_type, 1, ORDER, &[0xff]).is_err(), "{event_type}");
            assert!(read(event_type, 1, ORDER, &[]).is_err(), "{event_type}");
        }
        assert!(matches!(
            read("order.eaten", 9, ORDER, &[0xff]),
            Ok(News::Nothing)
        ));
    }
}
