//! Where an order's events have been. Pure.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// An event about an order, and where it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub event_id: Uuid,
    pub event_type: String,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// The order, the payment, the order again for its reservation, or the event that a mail answers.
    pub entity_id: Uuid,
    pub version: i64,
    pub occurred_at: DateTime<Utc>,
    /// `None`: it was not traced.
    pub trace_id: Option<String>,
    pub tells: Tells,
}

/// What an event says besides, where that is kept nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tells {
    /// How it is with the stock for the order from here on.
    Reservation(ReservationStatus),
    /// A mail was sent, by the number of its template: there may be more of them by now than this code knows.
    Mail(i32),
    Nothing,
}

/// How it is with the stock for an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservationStatus {
    Reserved,
    Rejected,
    Released,
    Committed,
}

/// The stock for an order, as its last event tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reservation {
    pub status: ReservationStatus,
    pub version: i64,
    pub updated_at: DateTime<Utc>,
}

/// A record that could not be handled, and waits for an operator. Not what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedRecord {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// `None`: it cannot be read.
    pub event_type: Option<String>,
    /// What failed, in a word: see crates/consumer.
    pub error_kind: String,
    pub parked_at: DateTime<Utc>,
}

/// All that happened to an order, as far as it is known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journey {
    /// What happened first comes first.
    steps: Vec<Step>,
    /// There are more events than these.
    pub is_cut: bool,
    /// What was parked first comes first.
    pub parked: Vec<ParkedRecord>,
}

impl Journey {
    pub fn new(steps: Vec<Step>, is_cut: bool, parked: Vec<ParkedRecord>) -> Self {
        Self {
            steps: in_order(steps),
            is_cut,
            parked,
        }
    }

    /// What happened first comes first.
    pub fn into_steps(self) -> Vec<Step> {
        self.steps
    }

    /// `None` when nothing was heard of it.
    pub fn reservation(&self) -> Option<Reservation> {
        let told = self.steps.iter().filter_map(|step| match step.tells {
            Tells::Reservation(status) => Some(Reservation {
                status,
                version: step.version,
                updated_at: step.occurred_at,
            }),
            Tells::Mail(_) | Tells::Nothing => None,
        });
        told.max_by_key(|reservation| reservation.version)
    }

    /// Each mail with the number of its template.
    pub fn mails(&self) -> impl Iterator<Item = (i32, &Step)> {
        self.steps.iter().filter_map(|step| match step.tells {
            Tells::Mail(template) => Some((template, step)),
            Tells::Reservation(_) | Tells::Nothing => None,
        })
    }
}

/// By when they happened. Events of one entity stay in the order of their versions whatever the clocks said of them; where the time does
/// not decide between entities, lower versions come first, and ids, which rise with time, decide the rest.
fn in_order(mut steps: Vec<Step>) -> Vec<Step> {
    steps.sort_by_key(|step| step.version);
    let mut latest: HashMap<(String, Uuid), DateTime<Utc>> = HashMap::new();
    let mut timed: Vec<(DateTime<Utc>, Step)> = steps
        .into_iter()
        .map(|step| {
            let entity = (step.topic.clone(), step.entity_id);
            let at = latest.entry(entity).or_insert(step.occurred_at);
            *at = step.occurred_at.max(*at);
            (*at, step)
        })
        .collect();
    timed.sort_by_key(|(at, step)| (*at, step.version, step.event_id));
    timed.into_iter().map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + second, 0).expect("in range")
    }

    fn step(topic: &str, entity: u128, version: i64, second: i64, tells: Tells) -> Step {
        Step {
            event_id: Uuid::from_u128(entity << 8 | version as u128),
            event_type: format!("{topic}.{version}"),
            topic: topic.to_owned(),
            partition: 0,
            offset: version,
            entity_id: Uuid::from_u128(entity),
            version,
            occurred_at: at(second),
            trace_id: None,
            tells,
        }
    }

    fn journey(steps: Vec<Step>) -> Journey {
        Journey::new(steps, false, Vec::new())
    }

    /// However the steps come, they are told like this.
    #[track_caller]
    fn told_as(steps: &[Step], expected: &[&str]) {
        let mut steps = steps.to_vec();
        for _ in 0..steps.len() {
            steps.rotate_left(1);
            for steps in [steps.clone(), steps.iter().rev().cloned().collect()] {
                let told = journey(steps).into_steps();
                let told: Vec<&str> = told.iter().map(|step| step.event_type.as_str()).collect();
                assert_eq!(told, expected);
            }
        }
    }

    #[test]
    fn what_happened_first_comes_first() {
        let nothing = Tells::Nothing;
        told_as(
            &[
                step("order", 1, 1, 0, nothing),
                step("payment", 2, 1, 5, nothing),
                step("order", 1, 2, 7, nothing),
                step("payment", 2, 2, 9, nothing),
            ],
            &["order.1", "payment.1", "order.2", "payment.2"],
        );
    }

    #[test]
    fn versions_decide_where_the_time_does_not() {
        let nothing = Tells::Nothing;
        told_as(
            &[
                step("order", 1, 1, 0, nothing),
                // One transaction, one time.
                step("order", 1, 2, 3, nothing),
                step("order", 1, 3, 3, nothing),
                // A clock that went back.
                step("payment", 2, 1, 5, nothing),
                step("payment", 2, 2, 1, nothing),
                // At the moment of the second payment's event, as far as anybody can tell.
                step("inventory", 1, 1, 5, nothing),
            ],
            &[
                "order.1",
                "order.2",
                "order.3",
                "inventory.1",
                "payment.1",
                "payment.2",
            ],
        );
    }

    #[test]
    fn the_last_version_says_how_the_reservation_is() {
        use ReservationStatus::{Released, Reserved};
        assert_eq!(
            journey(vec![step("order", 1, 1, 0, Tells::Nothing)]).reservation(),
            None
        );
        let found = journey(vec![
            step("inventory", 1, 2, 1, Tells::Reservation(Released)),
            step("inventory", 1, 1, 4, Tells::Reservation(Reserved)),
            step("inventory", 1, 3, 9, Tells::Nothing),
            step("mail", 7, 1, 5, Tells::Mail(4)),
        ]);
        let reservation = found.reservation().expect("heard of");
        assert_eq!(
            (reservation.status, reservation.version, reservation.updated_at),
            (Released, 2, at(1))
        );
        let mails: Vec<_> = found
            .mails()
            .map(|(template, step)| (template, step.entity_id))
            .collect();
        assert_eq!(mails, [(4, Uuid::from_u128(7))]);
    }
}
