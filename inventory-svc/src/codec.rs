//! The domain as Protobuf: events as they are stored and published, stock as it is answered, and events of orders as they are heard.
//!
//! New major versions of a schema get an arm in the functions that decode, which turns their predecessors into today's event (an
//! upcaster).

use chrono::{DateTime, Utc};
use contracts::catalogue::{inventory, order, stock};
use contracts::shop::inventory::events::v1 as proto;
use contracts::shop::inventory::v1 as api;
use contracts::shop::order::events::v1 as orders;
use contracts::wire::{time, timestamp};
use event_store::NewEvent;
use prost::Message as _;
use uuid::Uuid;

use crate::domain::reservation::{Command, Event};
use crate::domain::stock::Updated;
use crate::domain::{Counts, Line, Lines, OrderId, ProductId, Shortage, Stock};

/// Why bytes are not an event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("there is no event {event_type} of version {schema_version}")]
    Unknown { event_type: String, schema_version: i32 },
    #[error("the payload is not Protobuf")]
    Protobuf(#[from] prost::DecodeError),
    #[error("field {0} of the payload is missing or not valid")]
    Field(&'static str),
    #[error("the payload is of another entity")]
    OtherEntity,
}

/// Encodes an event of a reservation.
pub fn encode_reservation(id: OrderId, event: &Event) -> NewEvent {
    let order_id = id.to_string();
    let (event_type, payload) = match event {
        Event::Reserved { lines, at } => (
            inventory::RESERVED,
            proto::InventoryReserved {
                order_id,
                lines: lines_to(lines),
                reserved_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Rejected { lines, shortages, at } => {
            let shortage = |shortage: &Shortage| proto::Shortage {
                product_id: shortage.product_id.to_string(),
                wanted: shortage.wanted,
                available: shortage.available,
            };
            let rejected = proto::InventoryRejected {
                order_id,
                lines: lines_to(lines),
                shortages: shortages.iter().map(shortage).collect(),
                rejected_at: Some(timestamp(*at)),
            };
            (inventory::REJECTED, rejected.encode_to_vec())
        }
        Event::Committed { lines, at } => (
            inventory::COMMITTED,
            proto::InventoryCommitted {
                order_id,
                lines: lines_to(lines),
                committed_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
        Event::Released { lines, was_sold, at } => (
            inventory::RELEASED,
            proto::InventoryReleased {
                order_id,
                lines: lines_to(lines),
                was_sold: *was_sold,
                released_at: Some(timestamp(*at)),
            }
            .encode_to_vec(),
        ),
    };
    new_event(event_type, payload, event.at())
}

/// Encodes an event of a product's stock.
pub fn encode_stock(id: ProductId, event: Updated) -> NewEvent {
    let Updated { counts, at } = event;
    let updated = proto::StockUpdated {
        product_id: id.to_string(),
        available: counts.available,
        reserved: counts.reserved,
        sold: counts.sold,
        updated_at: Some(timestamp(at)),
    };
    new_event(stock::UPDATED, updated.encode_to_vec(), at)
}

fn new_event(event_type: &'static str, payload: Vec<u8>, occurred_at: DateTime<Utc>) -> NewEvent {
    NewEvent {
        event_type,
        schema_version: 1,
        data_schema: contracts::catalogue::message_name(event_type, 1),
        payload,
        occurred_at,
    }
}

/// Decodes an event of a reservation.
///
/// # Errors
/// When the bytes are not such an event, or one of another order.
pub fn decode_reservation(
    id: OrderId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Event, DecodeError> {
    use DecodeError::Field;
    match (event_type, schema_version) {
        (inventory::RESERVED, 1) => {
            let message = proto::InventoryReserved::decode(payload)?;
            same(id.0, &message.order_id)?;
            Ok(Event::Reserved {
                lines: lines_of(&message.lines)?,
                at: time(message.reserved_at.as_ref()).ok_or(Field("reserved_at"))?,
            })
        }
        (inventory::REJECTED, 1) => {
            let message = proto::InventoryRejected::decode(payload)?;
            same(id.0, &message.order_id)?;
            let shortage = |shortage: &proto::Shortage| {
                Some(Shortage {
                    product_id: ProductId(uuid(&shortage.product_id)?),
                    wanted: shortage.wanted,
                    available: shortage.available,
                })
            };
            let shortages = message.shortages.iter().map(shortage).collect::<Option<_>>();
            Ok(Event::Rejected {
                lines: lines_of(&message.lines)?,
                shortages: shortages.ok_or(Field("shortages"))?,
                at: time(message.rejected_at.as_ref()).ok_or(Field("rejected_at"))?,
            })
        }
        (inventory::COMMITTED, 1) => {
            let message = proto::InventoryCommitted::decode(payload)?;
            same(id.0, &message.order_id)?;
            Ok(Event::Committed {
                lines: lines_of(&message.lines)?,
                at: time(message.committed_at.as_ref()).ok_or(Field("committed_at"))?,
            })
        }
        (inventory::RELEASED, 1) => {
            let message = proto::InventoryReleased::decode(payload)?;
            same(id.0, &message.order_id)?;
            Ok(Event::Released {
                lines: lines_of(&message.lines)?,
                was_sold: message.was_sold,
                at: time(message.released_at.as_ref()).ok_or(Field("released_at"))?,
            })
        }
        _ => Err(unknown(event_type, schema_version)),
    }
}

/// Decodes an event of a product's stock.
///
/// # Errors
/// When the bytes are not such an event, or one of another product.
pub fn decode_stock(
    id: ProductId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Updated, DecodeError> {
    if (event_type, schema_version) != (stock::UPDATED, 1) {
        return Err(unknown(event_type, schema_version));
    }
    let message = proto::StockUpdated::decode(payload)?;
    same(id.0, &message.product_id)?;
    Ok(Updated {
        counts: Counts {
            available: message.available,
            reserved: message.reserved,
            sold: message.sold,
        },
        at: time(message.updated_at.as_ref()).ok_or(DecodeError::Field("updated_at"))?,
    })
}

/// What an event of an order asks of its reservation, if anything.
///
/// # Errors
/// When the bytes are not such an event, or one of another order.
pub fn decode_order(
    id: OrderId,
    event_type: &str,
    schema_version: i32,
    payload: &[u8],
) -> Result<Option<Command>, DecodeError> {
    match (event_type, schema_version) {
        (order::PLACED, 1) => {
            let message = orders::OrderPlaced::decode(payload)?;
            same(id.0, &message.order_id)?;
            let line = |line: &orders::OrderLine| {
                Some(Line {
                    product_id: ProductId(uuid(&line.product_id)?),
                    quantity: line.quantity,
                })
            };
            let lines = message.items.iter().map(line).collect::<Option<_>>();
            let lines = lines.and_then(|lines| Lines::new(lines).ok());
            Ok(Some(Command::Reserve(lines.ok_or(DecodeError::Field("items"))?)))
        }
        (order::CONFIRMED, 1) => {
            same(id.0, &orders::OrderConfirmed::decode(payload)?.order_id)?;
            Ok(Some(Command::Commit))
        }
        (order::CANCELLED, 1) => {
            same(id.0, &orders::OrderCancelled::decode(payload)?.order_id)?;
            Ok(Some(Command::Release))
        }
        (order::PLACED | order::CONFIRMED | order::CANCELLED, _) => Err(unknown(event_type, schema_version)),
        // Of no interest here, or not known yet.
        _ => Ok(None),
    }
}

fn unknown(event_type: &str, schema_version: i32) -> DecodeError {
    DecodeError::Unknown {
        event_type: event_type.to_owned(),
        schema_version,
    }
}

fn same(id: Uuid, told: &str) -> Result<(), DecodeError> {
    if uuid(told) == Some(id) {
        Ok(())
    } else {
        Err(DecodeError::OtherEntity)
    }
}

fn lines_to(lines: &Lines) -> Vec<proto::ReservationLine> {
    let line = |line: &Line| proto::ReservationLine {
        product_id: line.product_id.to_string(),
        quantity: line.quantity,
    };
    lines.iter().map(line).collect()
}

fn lines_of(lines: &[proto::ReservationLine]) -> Result<Lines, DecodeError> {
    let line = |line: &proto::ReservationLine| {
        Some(Line {
            product_id: ProductId(uuid(&line.product_id)?),
            quantity: line.quantity,
        })
    };
    let lines = lines.iter().map(line).collect::<Option<_>>();
    lines
        .and_then(|lines| Lines::new(lines).ok())
        .ok_or(DecodeError::Field("lines"))
}

fn uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok()
}

impl From<&Stock> for api::Stock {
    fn from(stock: &Stock) -> Self {
        let Stock {
            product_id,
            version,
            counts,
            updated_at,
        } = stock;
        Self {
            product_id: product_id.to_string(),
            available: counts.available,
            reserved: counts.reserved,
            sold: counts.sold,
            version: *version,
            updated_at: Some(timestamp(*updated_at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: i64 = 1_800_000_000_123_456;

    fn at() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(AT).expect("in range")
    }

    fn id() -> OrderId {
        OrderId(Uuid::from_u128(1))
    }

    fn product() -> ProductId {
        ProductId(Uuid::from_u128(3))
    }

    fn lines() -> Lines {
        let line = |product, quantity| Line {
            product_id: ProductId(Uuid::from_u128(product)),
            quantity,
        };
        Lines::new(vec![line(3, 7), line(2, 1)]).expect("valid")
    }

    fn every_event() -> [Event; 5] {
        let (lines, at) = (lines(), at());
        let shortages = vec![Shortage {
            product_id: product(),
            wanted: 7,
            available: 6,
        }];
        [
            Event::Reserved {
                lines: lines.clone(),
                at,
            },
            Event::Rejected {
                lines: lines.clone(),
                shortages,
                at,
            },
            Event::Committed {
                lines: lines.clone(),
                at,
            },
            Event::Released {
                lines: lines.clone(),
                was_sold: false,
                at,
            },
            Event::Released {
                lines,
                was_sold: true,
                at,
            },
        ]
    }

    fn updated() -> Updated {
        let counts = Counts {
            available: 3,
            reserved: 2,
            sold: 1,
        };
        Updated { counts, at: at() }
    }

    #[test]
    fn every_event_comes_back() {
        for event in every_event() {
            let encoded = encode_reservation(id(), &event);
            assert!(
                encoded.data_schema.is_some(),
                "{} is in the catalogue",
                encoded.event_type
            );
            let decoded = decode_reservation(id(), encoded.event_type, 1, &encoded.payload);
            assert_eq!(decoded.expect("decodable"), event);
        }
        let encoded = encode_stock(product(), updated());
        assert!(encoded.data_schema.is_some(), "it is in the catalogue");
        let decoded = decode_stock(product(), encoded.event_type, 1, &encoded.payload);
        assert_eq!(decoded.expect("decodable"), updated());
    }

    #[test]
    fn what_is_not_an_event_is_refused() {
        for event in every_event() {
            let NewEvent {
                event_type, payload, ..
            } = encode_reservation(id(), &event);
            assert!(decode_reservation(id(), event_type, 2, &payload).is_err());
            assert!(decode_reservation(id(), stock::UPDATED, 1, &payload).is_err());
            assert!(decode_reservation(id(), event_type, 1, &[0xff]).is_err());
            assert!(decode_reservation(id(), event_type, 1, &[]).is_err());
            let other = decode_reservation(OrderId(Uuid::from_u128(9)), event_type, 1, &payload);
            assert!(matches!(other, Err(DecodeError::OtherEntity)));
        }
        let NewEvent {
            event_type, payload, ..
        } = encode_stock(product(), updated());
        assert!(decode_stock(product(), event_type, 2, &payload).is_err());
        assert!(decode_stock(product(), event_type, 1, &[0xff]).is_err());
        let other = decode_stock(ProductId(Uuid::from_u128(9)), event_type, 1, &payload);
        assert!(matches!(other, Err(DecodeError::OtherEntity)));
    }

    #[test]
    fn orders_are_heard() {
        let order_id = id().to_string();
        let line = |product: u128, quantity| orders::OrderLine {
            product_id: Uuid::from_u128(product).to_string(),
            quantity,
            unit_price_minor_units: 5,
        };
        let placed = |items| {
            let placed = orders::OrderPlaced {
                order_id: order_id.clone(),
                items,
                ..Default::default()
            };
            decode_order(id(), order::PLACED, 1, &placed.encode_to_vec())
        };
        let told = placed(vec![line(3, 7), line(2, 1)]).expect("valid");
        assert_eq!(told, Some(Command::Reserve(lines())));
        for items in [vec![], vec![line(1, 0)], vec![line(1, 1), line(1, 1)]] {
            assert!(matches!(placed(items), Err(DecodeError::Field("items"))));
        }
        let confirmed = orders::OrderConfirmed {
            order_id: order_id.clone(),
            ..Default::default()
        };
        let cancelled = orders::OrderCancelled {
            order_id,
            ..Default::default()
        };
        for (event_type, payload, expected) in [
            (order::CONFIRMED, confirmed.encode_to_vec(), Command::Commit),
            (order::CANCELLED, cancelled.encode_to_vec(), Command::Release),
        ] {
            let told = decode_order(id(), event_type, 1, &payload).expect("valid");
            assert_eq!(told, Some(expected));
            assert!(decode_order(id(), event_type, 2, &payload).is_err());
            assert!(decode_order(OrderId(Uuid::from_u128(9)), event_type, 1, &payload).is_err());
        }
        for event_type in [
            order::RESERVED,
            order::PAID,
            order::SHIPPED,
            "order.of.the.future",
        ] {
            assert_eq!(
                decode_order(id(), event_type, 7, &[0xff]).expect("passed over"),
                None
            );
        }
    }
}
