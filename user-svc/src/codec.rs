//! The domain as Protobuf: events as they are stored and published, users as they are answered.
//!
//! New major versions of a schema get an arm in [`decode`] that turns their predecessors into today's event (an upcaster).

use contracts::catalogue::user as names;
use contracts::shop::user::events::v1 as proto;
use contracts::shop::user::v1 as api;
use contracts::wire::{time, timestamp};
use event_store::NewEvent;
use prost::Message as _;

use crate::domain::{Details, Email, Event, Name, User, UserId};

/// Why stored bytes are not an event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("there is no event {event_type} of version {schema_version}")]
    Unknown { event_type: String, schema_version: i32 },
    #[error("the payload is not Protobuf")]
    Protobuf(#[from] prost::DecodeError),
    #[error("field {0} of the payload is missing or not valid")]
    Field(&'static str),
    #[error("the payload is of another user")]
    OtherUser,
}

/// Encodes an event of a user.
pub fn encode(id: UserId, event: &Event) -> NewEvent {
    let user_id = id.to_string();
    let text = |details: &Details| {
        [
            details.email.as_str(),
            details.first_name.as_str(),
            details.last_name.as_str(),
        ]
        .map(str::to_owned)
    };
    let (event_type, payload) = match event {
        Event::Created { details, at, .. } => {
            let [email, first_name, last_name] = text(details);
            let created = proto::UserCreated {
                user_id,
                email,
                first_name,
                last_name,
                created_at: Some(timestamp(*at)),
            };
            (names::CREATED, created.encode_to_vec())
        }
        Event::Updated { details, at } => {
            let [email, first_name, last_name] = text(details);
            let updated = proto::UserUpdated {
                user_id,
                email,
                first_name,
                last_name,
                updated_at: Some(timestamp(*at)),
            };
            (names::UPDATED, updated.encode_to_vec())
        }
    };
    NewEvent {
        event_type,
        schema_version: 1,
        data_schema: contracts::catalogue::message_name(event_type, 1),
        payload,
        occurred_at: event.at(),
    }
}

/// Decodes an event of a user.
///
/// # Errors
/// When the bytes are not such an event, or one of another user.
pub fn decode(
    id: UserId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Event, DecodeError> {
    use DecodeError::Field;
    let expected = id.to_string();
    let same = |user_id: &str| {
        if user_id == expected {
            Ok(())
        } else {
            Err(DecodeError::OtherUser)
        }
    };
    match (event_type, schema_version) {
        (names::CREATED, 1) => {
            let message = proto::UserCreated::decode(payload)?;
            same(&message.user_id)?;
            Ok(Event::Created {
                id,
                details: details(&message.email, &message.first_name, &message.last_name)?,
                at: time(message.created_at.as_ref()).ok_or(Field("created_at"))?,
            })
        }
        (names::UPDATED, 1) => {
            let message = proto::UserUpdated::decode(payload)?;
            same(&message.user_id)?;
            Ok(Event::Updated {
                details: details(&message.email, &message.first_name, &message.last_name)?,
                at: time(message.updated_at.as_ref()).ok_or(Field("updated_at"))?,
            })
        }
        _ => Err(DecodeError::Unknown {
            event_type: event_type.to_owned(),
            schema_version,
        }),
    }
}

fn details(email: &str, first_name: &str, last_name: &str) -> Result<Details, DecodeError> {
    Ok(Details {
        email: Email::parse(email).ok_or(DecodeError::Field("email"))?,
        first_name: Name::parse(first_name).ok_or(DecodeError::Field("first_name"))?,
        last_name: Name::parse(last_name).ok_or(DecodeError::Field("last_name"))?,
    })
}

impl From<&User> for api::User {
    fn from(user: &User) -> Self {
        let Details {
            email,
            first_name,
            last_name,
        } = &user.details;
        Self {
            user_id: user.id.to_string(),
            email: email.as_str().to_owned(),
            first_name: first_name.as_str().to_owned(),
            last_name: last_name.as_str().to_owned(),
            version: user.version,
            created_at: Some(timestamp(user.created_at)),
            updated_at: Some(timestamp(user.updated_at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use uuid::Uuid;

    use super::*;

    fn at() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_800_000_000_123_456).expect("in range")
    }

    fn id() -> UserId {
        UserId(Uuid::from_u128(1))
    }

    fn every_event() -> [Event; 2] {
        let details = details("ann@example.org", "Ann", "Lee").expect("valid");
        [
            Event::Created {
                id: id(),
                details: details.clone(),
                at: at(),
            },
            Event::Updated { details, at: at() },
        ]
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
            assert!(decode(id(), event_type, 2, &payload).is_err());
            assert!(decode(id(), "user.eaten", 1, &payload).is_err());
            assert!(decode(id(), event_type, 1, &[0xff]).is_err());
            assert!(decode(id(), event_type, 1, &[]).is_err());
            let other = UserId(Uuid::from_u128(9));
            assert!(matches!(
                decode(other, event_type, 1, &payload),
                Err(DecodeError::OtherUser)
            ));
            let message = proto::UserUpdated {
                user_id: id().to_string(),
                email: "nobody".to_owned(),
                ..proto::UserUpdated::default()
            };
            let error = decode(id(), names::UPDATED, 1, &message.encode_to_vec()).expect_err("no address");
            assert!(!error.to_string().contains("nobody"), "{error}");
        }
    }
}
