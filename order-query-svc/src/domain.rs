//! What the read model says about an order, and how events change it. Pure: no clock, no I/O.
//!
//! The events were decided by order-svc, which owns the rules; here they are only folded.

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// Where an order stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Pending,
    Paid,
    Confirmed,
    Shipped,
    Delivered,
    Cancelled,
}

impl Status {
    /// Whether nothing changes any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Delivered | Self::Cancelled)
    }
}

/// One product of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub product_id: Uuid,
    pub quantity: i32,
    /// In minor units of the order's currency.
    pub unit_price_minor_units: i64,
}

/// An order as readers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderView {
    pub order_id: Uuid,
    pub user_id: Uuid,
    pub status: Status,
    pub items: Vec<Item>,
    pub total_minor_units: i64,
    /// ISO 4217.
    pub currency_code: String,
    /// Version of the order that this view has reached.
    pub version: i64,
    pub placed_at: DateTime<Utc>,
    /// When the last event seen happened.
    pub updated_at: DateTime<Utc>,
    pub pay_by: Option<DateTime<Utc>>,
    /// Empty unless cancelled.
    pub cancel_reason: String,
    /// Empty until shipped.
    pub tracking_number: String,
    /// Empty until shipped.
    pub carrier: String,
}

/// What `order.placed` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub user_id: Uuid,
    pub items: Vec<Item>,
    pub total_minor_units: i64,
    pub currency_code: String,
    pub placed_at: DateTime<Utc>,
    pub pay_by: Option<DateTime<Utc>>,
}

/// What happened to an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Placed(Placed),
    Reserved,
    Paid,
    Confirmed,
    Shipped {
        tracking_number: String,
        carrier: String,
    },
    Completed,
    Cancelled {
        reason: String,
    },
    /// An event of a type that came into the world after this code: it counts as a version and changes nothing else.
    Unknown,
}

/// An event of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub order_id: Uuid,
    pub version: i64,
    pub occurred_at: DateTime<Utc>,
    pub change: Change,
}

/// An event that cannot follow what was seen before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("the order was not placed before this event")]
    NotPlaced,
    #[error("the order was placed before")]
    PlacedTwice,
}

/// The view after `event`.
///
/// # Errors
/// When `order.placed` is not the first event, or not the only one of its kind.
pub fn apply(view: Option<OrderView>, event: &Event) -> Result<OrderView, ApplyError> {
    let mut view = match (view, &event.change) {
        (None, Change::Placed(placed)) => return Ok(place(event, placed)),
        (None, _) => return Err(ApplyError::NotPlaced),
        (Some(_), Change::Placed(_)) => return Err(ApplyError::PlacedTwice),
        (Some(view), _) => view,
    };
    match &event.change {
        Change::Placed(_) | Change::Reserved | Change::Unknown => {}
        Change::Paid => view.status = Status::Paid,
        Change::Confirmed => view.status = Status::Confirmed,
        Change::Shipped {
            tracking_number,
            carrier,
        } => {
            view.status = Status::Shipped;
            view.tracking_number.clone_from(tracking_number);
            view.carrier.clone_from(carrier);
        }
        Change::Completed => view.status = Status::Delivered,
        Change::Cancelled { reason } => {
            view.status = Status::Cancelled;
            view.cancel_reason.clone_from(reason);
        }
    }
    view.version = event.version;
    view.updated_at = event.occurred_at;
    Ok(view)
}

fn place(event: &Event, placed: &Placed) -> OrderView {
    OrderView {
        order_id: event.order_id,
        user_id: placed.user_id,
        status: Status::Pending,
        items: placed.items.clone(),
        total_minor_units: placed.total_minor_units,
        currency_code: placed.currency_code.clone(),
        version: event.version,
        placed_at: placed.placed_at,
        updated_at: event.occurred_at,
        pay_by: placed.pay_by,
        cancel_reason: String::new(),
        tracking_number: String::new(),
        carrier: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + second, 0).expect("in range")
    }

    fn placed() -> Change {
        Change::Placed(Placed {
            user_id: Uuid::from_u128(7),
            items: vec![Item {
                product_id: Uuid::from_u128(8),
                quantity: 2,
                unit_price_minor_units: 500,
            }],
            total_minor_units: 1000,
            currency_code: "EUR".into(),
            placed_at: at(1),
            pay_by: Some(at(900)),
        })
    }

    fn fold(changes: impl IntoIterator<Item = Change>) -> Result<OrderView, ApplyError> {
        let mut view = None;
        for (change, version) in changes.into_iter().zip(1..) {
            let event = Event {
                order_id: Uuid::from_u128(1),
                version,
                occurred_at: at(version),
                change,
            };
            view = Some(apply(view, &event)?);
        }
        Ok(view.expect("at least one event"))
    }

    #[track_caller]
    fn check(changes: impl IntoIterator<Item = Change>, status: Status, version: i64) -> OrderView {
        let view = fold(changes).expect("a history that order-svc can write");
        assert_eq!(
            (view.status, view.version, view.updated_at),
            (status, version, at(version))
        );
        assert_eq!(view.placed_at, at(1));
        view
    }

    #[test]
    fn the_whole_way_to_delivery() {
        let shipped = Change::Shipped {
            tracking_number: "T1".into(),
            carrier: "DHL".into(),
        };
        let way = [
            placed(),
            Change::Reserved,
            Change::Paid,
            Change::Confirmed,
            shipped,
            Change::Completed,
        ];
        let expected = [
            Status::Pending,
            Status::Pending,
            Status::Paid,
            Status::Confirmed,
            Status::Shipped,
            Status::Delivered,
        ];
        for (steps, status) in (1..).zip(expected) {
            check(way[..steps].to_vec(), status, steps as i64);
        }
        let view = fold(way).expect("as above");
        assert_eq!(
            (view.tracking_number.as_str(), view.carrier.as_str()),
            ("T1", "DHL")
        );
        assert_eq!(
            (view.total_minor_units, view.currency_code.as_str()),
            (1000, "EUR")
        );
        assert!(view.status.is_final());
    }

    #[test]
    fn a_cancelled_order_says_why() {
        let view = check(
            [
                placed(),
                Change::Cancelled {
                    reason: "changed my mind".into(),
                },
            ],
            Status::Cancelled,
            2,
        );
        assert_eq!(view.cancel_reason, "changed my mind");
        assert!(view.status.is_final());
    }

    #[test]
    fn an_event_of_an_unknown_type_counts_as_a_version() {
        let before = fold([placed()]).expect("placed");
        let after = check([placed(), Change::Unknown], Status::Pending, 2);
        assert_eq!(
            OrderView {
                version: 2,
                updated_at: at(2),
                ..before
            },
            after
        );
    }

    #[test]
    fn placed_comes_first_and_once() {
        assert_eq!(fold([Change::Paid]), Err(ApplyError::NotPlaced));
        assert_eq!(fold([placed(), placed()]), Err(ApplyError::PlacedTwice));
    }
}
