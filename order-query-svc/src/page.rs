//! Page tokens: opaque to clients, bound to the query that they came from.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::DateTime;
use uuid::Uuid;

use crate::store::Position;

const FORMAT: u8 = 1;
const LENGTH: usize = 1 + 16 + 4 + 8 + 16;

/// What a token belongs to: a user and a status as its number on the wire.
///
/// Tokens are not signed: whoever makes one up can only page through what the query gives him anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) user_id: Uuid,
    pub(crate) status: i32,
}

/// The token of the page that begins behind `position`.
pub(crate) fn token(query: Query, position: Position) -> String {
    let mut bytes = Vec::with_capacity(LENGTH);
    bytes.push(FORMAT);
    bytes.extend(query.user_id.as_bytes());
    bytes.extend(query.status.to_be_bytes());
    bytes.extend(position.placed_at.timestamp_micros().to_be_bytes());
    bytes.extend(position.order_id.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Where the page of a token begins; `None` when it is none of ours, or of another query.
pub(crate) fn position(query: Query, token: &str) -> Option<Position> {
    let mut bytes = [0; LENGTH];
    if URL_SAFE_NO_PAD.decode_slice(token, &mut bytes) != Ok(LENGTH) || bytes[0] != FORMAT {
        return None;
    }
    let found = Query {
        user_id: Uuid::from_slice(&bytes[1..17]).ok()?,
        status: i32::from_be_bytes(bytes[17..21].try_into().ok()?),
    };
    let position = Position {
        placed_at: DateTime::from_timestamp_micros(i64::from_be_bytes(bytes[21..29].try_into().ok()?))?,
        order_id: Uuid::from_slice(&bytes[29..]).ok()?,
    };
    (found == query).then_some(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: Query = Query {
        user_id: Uuid::from_u128(1),
        status: 2,
    };

    fn sample() -> Position {
        Position {
            placed_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("in range"),
            order_id: Uuid::from_u128(3),
        }
    }

    #[test]
    fn a_token_leads_back_to_its_position() {
        assert_eq!(position(QUERY, &token(QUERY, sample())), Some(sample()));
    }

    #[test]
    fn a_token_of_another_query_or_none_at_all_is_refused() {
        let token = token(QUERY, sample());
        assert_eq!(position(Query { status: 0, ..QUERY }, &token), None);
        assert_eq!(
            position(
                Query {
                    user_id: Uuid::from_u128(9),
                    ..QUERY
                },
                &token
            ),
            None
        );
        for bad in [
            "",
            "x",
            "\0",
            &token[1..],
            &format!("{token}AA"),
            &"A".repeat(10_000),
            &token.replace('A', "?"),
        ] {
            assert_eq!(position(QUERY, bad), None, "{bad:.20}");
        }
    }
}
