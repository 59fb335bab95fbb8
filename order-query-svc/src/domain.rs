//! What the read model says about an order, and how events change it. Pure: no clock, no I/O.
//!
//! The events were decided by order-svc and payment-svc, which own the rules; here they are only folded. The two come by different
//! topics, so what they say is kept apart: either may be ahead of the other.

pub mod journey;

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

/// One product of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub product_id: Uuid,
    pub quantity: i32,
    /// In minor units of the order's currency.
    pub unit_price_minor_units: i64,
}

/// What became of a payment. One that is under way has no event yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PaymentStatus {
    Received,
    Failed(Failure),
    Refunded,
}

/// Why a payment failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The number that payment-svc gave, passed on as it is: there may be more reasons by now than this code knows.
    pub reason: i32,
    /// Whether the order can still be paid.
    pub another_try: bool,
}

/// A payment of an order, as its last event tells it. Each event of a payment says all there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    pub payment_id: Uuid,
    pub order_id: Uuid,
    pub status: PaymentStatus,
    pub amount_minor_units: i64,
    /// ISO 4217.
    pub currency_code: String,
    /// Empty when it is not known.
    pub brand: String,
    /// Empty when it is not known.
    pub last_four: String,
    /// Version of the payment.
    pub version: i64,
    /// When the event happened.
    pub updated_at: DateTime<Utc>,
}

/// An order with its payments, as readers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub order: OrderView,
    /// Oldest first.
    pub payments: Vec<Payment>,
    /// Records about it wait for an operator, so it may be behind.
    pub is_parked: bool,
}

impl View {
    /// How far each of the sources of this view has come.
    pub fn reached(&self) -> Reached {
        Reached {
            order: self.order.version,
            payments: self.payments.iter().map(|payment| payment.version).sum(),
            parked: Some(self.is_parked),
        }
    }

    /// Whether nothing more is to be expected. A cancelled order that was paid is waiting for its money to go back, also while the
    /// payment itself has not been heard of here. Money that comes in after the cancellation is not foreseen: it is seen by who asks
    /// again.
    pub fn is_final(&self) -> bool {
        let is_refunded = |payment_id| {
            let mut payments = self.payments.iter();
            payments
                .any(|payment| payment.payment_id == payment_id && payment.status == PaymentStatus::Refunded)
        };
        let is_held = |payment: &Payment| payment.status == PaymentStatus::Received;
        match self.order.status {
            Status::Delivered => true,
            Status::Cancelled => {
                self.order.payment_id.is_none_or(is_refunded) && !self.payments.iter().any(is_held)
            }
            Status::Pending | Status::Paid | Status::Confirmed | Status::Shipped => false,
        }
    }
}

/// How far a view has come, by source; versions never go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// The version of the order.
    pub order: i64,
    /// The sum of the versions of its payments.
    pub payments: i64,
    /// Whether it is parked; `None` where that was not asked.
    pub parked: Option<bool>,
}

impl Reached {
    /// Whether it is further than `other` by any source, or is parked otherwise.
    pub fn is_beyond(self, other: Self) -> bool {
        self.order > other.order
            || self.payments > other.payments
            || self.parked.is_some_and(|parked| other.parked != Some(parked))
    }

    /// After `now` was heard: the further one, source by source, and parked or not as it is now.
    #[must_use]
    pub fn then(self, now: Self) -> Self {
        Self {
            order: self.order.max(now.order),
            payments: self.payments.max(now.payments),
            parked: now.parked.or(self.parked),
        }
    }
}

/// What is known of an order from its own events.
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
    /// The payment by which it was paid.
    pub payment_id: Option<Uuid>,
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
    /// It goes on as it is: what follows is for its payments to decide.
    Overdue,
    Paid {
        payment_id: Uuid,
    },
    Confirmed,
    Shipped(Shipment),
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

/// What some events of an order say, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Story {
    /// All of them are known, from the first on.
    Begun(OrderView),
    /// Those before are in the view.
    GoesOn(Moves),
}

/// What events after its placing say of an order. What none of them tells stays as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moves {
    pub version: i64,
    pub updated_at: DateTime<Utc>,
    pub status: Option<Status>,
    pub payment_id: Option<Uuid>,
    pub shipment: Option<Shipment>,
    pub cancel_reason: Option<String>,
}

/// How an order was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shipment {
    pub tracking_number: String,
    pub carrier: String,
}

impl Story {
    /// What there is to say after `event` of the same order.
    ///
    /// # Errors
    /// When the order is placed once more.
    pub fn then(story: Option<Self>, event: &Event) -> Result<Self, ApplyError> {
        Ok(match (story, &event.change) {
            (None, Change::Placed(placed)) => Self::Begun(place(event, placed)),
            (Some(_), Change::Placed(_)) => return Err(ApplyError::PlacedTwice),
            (None, _) => Self::GoesOn(Moves::of(event)),
            (Some(Self::GoesOn(moves)), _) => Self::GoesOn(moves.then(event)),
            (Some(Self::Begun(view)), _) => Self::Begun(view.after(Moves::of(event))),
        })
    }
}

impl Moves {
    fn of(event: &Event) -> Self {
        let nothing = Self {
            version: event.version,
            updated_at: event.occurred_at,
            status: None,
            payment_id: None,
            shipment: None,
            cancel_reason: None,
        };
        nothing.then(event)
    }

    fn then(mut self, event: &Event) -> Self {
        match &event.change {
            Change::Placed(_) | Change::Reserved | Change::Overdue | Change::Unknown => {}
            Change::Paid { payment_id } => {
                self.status = Some(Status::Paid);
                self.payment_id = Some(*payment_id);
            }
            Change::Confirmed => self.status = Some(Status::Confirmed),
            Change::Shipped(shipment) => {
                self.status = Some(Status::Shipped);
                self.shipment = Some(shipment.clone());
            }
            Change::Completed => self.status = Some(Status::Delivered),
            Change::Cancelled { reason } => {
                self.status = Some(Status::Cancelled);
                self.cancel_reason = Some(reason.clone());
            }
        }
        self.version = event.version;
        self.updated_at = event.occurred_at;
        self
    }
}

impl OrderView {
    /// After what these events say.
    #[must_use]
    pub fn after(self, moves: Moves) -> Self {
        let Moves {
            version,
            updated_at,
            status,
            payment_id,
            shipment,
            cancel_reason,
        } = moves;
        let shipment = shipment.unwrap_or(Shipment {
            tracking_number: self.tracking_number,
            carrier: self.carrier,
        });
        Self {
            version,
            updated_at,
            status: status.unwrap_or(self.status),
            payment_id: payment_id.or(self.payment_id),
            tracking_number: shipment.tracking_number,
            carrier: shipment.carrier,
            cancel_reason: cancel_reason.unwrap_or(self.cancel_reason),
            ..self
        }
    }
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
        payment_id: None,
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

    fn paid() -> Change {
        Change::Paid {
            payment_id: Uuid::from_u128(9),
        }
    }

    fn payment(id: u128, status: PaymentStatus, version: i64) -> Payment {
        Payment {
            payment_id: Uuid::from_u128(id),
            order_id: Uuid::from_u128(1),
            status,
            amount_minor_units: 1000,
            currency_code: "EUR".into(),
            brand: "visa".into(),
            last_four: "4242".into(),
            version,
            updated_at: at(version),
        }
    }

    fn is_final(order: OrderView, payments: Vec<Payment>) -> bool {
        View {
            order,
            payments,
            is_parked: false,
        }
        .is_final()
    }

    fn fold(changes: impl IntoIterator<Item = Change>) -> Result<OrderView, ApplyError> {
        match tell(changes.into_iter().zip(1..))? {
            Story::Begun(view) => Ok(view),
            Story::GoesOn(_) => Err(ApplyError::NotPlaced),
        }
    }

    fn tell(changes: impl IntoIterator<Item = (Change, i64)>) -> Result<Story, ApplyError> {
        let mut story = None;
        for (change, version) in changes {
            let event = Event {
                order_id: Uuid::from_u128(1),
                version,
                occurred_at: at(version),
                change,
            };
            story = Some(Story::then(story, &event)?);
        }
        Ok(story.expect("at least one event"))
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
        let shipped = Change::Shipped(Shipment {
            tracking_number: "T1".into(),
            carrier: "DHL".into(),
        });
        let way = [
            placed(),
            Change::Reserved,
            Change::Overdue,
            paid(),
            Change::Confirmed,
            shipped,
            Change::Completed,
        ];
        let expected = [
            Status::Pending,
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
        assert!(is_final(view, vec![]));
    }

    #[test]
    fn a_story_is_the_same_however_it_is_cut() {
        let shipped = Change::Shipped(Shipment {
            tracking_number: "T1".into(),
            carrier: "DHL".into(),
        });
        let cancelled = Change::Cancelled {
            reason: "too late".into(),
        };
        let way = [
            placed(),
            Change::Reserved,
            paid(),
            Change::Confirmed,
            shipped,
            Change::Completed,
            cancelled,
            Change::Unknown,
        ];
        let whole = fold(way.clone()).expect("placed first");
        for cut in 1..way.len() {
            let before = fold(way[..cut].to_vec()).expect("placed first");
            let rest = way[cut..].iter().cloned().zip(cut as i64 + 1..);
            let Ok(Story::GoesOn(moves)) = tell(rest) else {
                panic!("it was not placed again")
            };
            assert_eq!(before.after(moves), whole, "cut at {cut}");
        }
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
        assert!(is_final(view, vec![]));
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
        assert_eq!(fold([paid()]), Err(ApplyError::NotPlaced));
        assert_eq!(fold([placed(), placed()]), Err(ApplyError::PlacedTwice));
    }

    #[test]
    fn a_cancelled_order_ends_when_no_money_is_left_with_us() {
        let cancelled = || Change::Cancelled {
            reason: String::new(),
        };
        let failure = Failure {
            reason: 1,
            another_try: true,
        };
        let failed = payment(8, PaymentStatus::Failed(failure), 1);
        let received = payment(9, PaymentStatus::Received, 1);
        let refunded = payment(9, PaymentStatus::Refunded, 2);
        let unpaid = || fold([placed(), cancelled()]).expect("cancelled");
        let after_paying = || fold([placed(), paid(), cancelled()]).expect("cancelled");
        for (order, payments, end) in [
            (unpaid(), vec![failed.clone()], true),
            // It came too late to pay the order.
            (unpaid(), vec![failed.clone(), received.clone()], false),
            (unpaid(), vec![failed.clone(), refunded.clone()], true),
            // The payment has not been heard of here.
            (after_paying(), vec![failed.clone()], false),
            (after_paying(), vec![failed.clone(), received.clone()], false),
            (after_paying(), vec![failed, refunded.clone()], true),
            (fold([placed(), paid()]).expect("paid"), vec![refunded], false),
        ] {
            assert_eq!(
                is_final(order.clone(), payments.clone()),
                end,
                "{order:?} {payments:?}"
            );
        }
    }

    #[test]
    fn whatever_changes_a_view_takes_it_further() {
        let view = |version: i64, payments: &[i64]| {
            let mut order = fold([placed()]).expect("placed");
            order.version = version;
            let of_version = |version: &i64| payment(1, PaymentStatus::Received, *version);
            View {
                order,
                payments: payments.iter().map(of_version).collect(),
                is_parked: false,
            }
            .reached()
        };
        let before = view(1, &[1]);
        for after in [view(2, &[1]), view(1, &[2]), view(1, &[1, 1])] {
            assert!(after.is_beyond(before) && !before.is_beyond(after));
            assert_eq!(before.then(after), after);
        }
        assert!(!before.is_beyond(before));
    }

    #[test]
    fn parking_and_its_end_are_news_to_whoever_asked() {
        let at = |order, parked| Reached {
            order,
            parked,
            ..Reached::default()
        };
        let (parked, free, unasked) = (at(1, Some(true)), at(1, Some(false)), at(1, None));
        for (now, seen) in [(parked, free), (free, parked), (parked, unasked)] {
            assert!(now.is_beyond(seen));
            assert_eq!(seen.then(now), now);
        }
        for (now, seen) in [(parked, parked), (unasked, parked), (unasked, free)] {
            assert!(!now.is_beyond(seen));
            assert_eq!(seen.then(now), seen, "it is known still");
        }
    }
}
