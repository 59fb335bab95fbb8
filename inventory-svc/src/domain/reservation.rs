//! The reservation of an order: all of its lines are held, or none.

use chrono::{DateTime, Utc};

use super::{Lines, Movement, OrderId, ProductId};

/// A product of which there was not enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    pub product_id: ProductId,
    pub wanted: i32,
    /// What could have been had; less than `wanted`.
    pub available: i64,
}

/// Where a reservation stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Reserved,
    /// Nothing is held, and nothing will be. At least one product was short.
    Rejected(Vec<Shortage>),
    /// Its order is confirmed: the goods are sold.
    Committed,
    /// Its order is cancelled: the goods are available again.
    Released,
}

/// A reservation at one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    pub order_id: OrderId,
    /// How many events it has had.
    pub version: i64,
    pub lines: Lines,
    pub status: Status,
    /// When it was reserved or rejected.
    pub decided_at: DateTime<Utc>,
    pub committed_at: Option<DateTime<Utc>>,
    pub released_at: Option<DateTime<Utc>>,
}

impl Reservation {
    /// When the last event happened.
    pub fn updated_at(&self) -> DateTime<Utc> {
        self.released_at.or(self.committed_at).unwrap_or(self.decided_at)
    }
}

/// What an order's news ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// It was placed.
    Reserve(Lines),
    /// It was confirmed.
    Commit,
    /// It was cancelled.
    Release,
}

/// What happened to a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Reserved {
        lines: Lines,
        at: DateTime<Utc>,
    },
    Rejected {
        lines: Lines,
        shortages: Vec<Shortage>,
        at: DateTime<Utc>,
    },
    Committed {
        lines: Lines,
        at: DateTime<Utc>,
    },
    Released {
        lines: Lines,
        /// The goods come back from sold.
        was_sold: bool,
        at: DateTime<Utc>,
    },
}

impl Event {
    /// When it happened.
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::Reserved { at, .. }
            | Self::Rejected { at, .. }
            | Self::Committed { at, .. }
            | Self::Released { at, .. } => *at,
        }
    }

    /// What it does to the stock of each of its products, if anything.
    pub fn movement(&self) -> Option<(Movement, &Lines)> {
        match self {
            Self::Reserved { lines, .. } => Some((Movement::Reserve, lines)),
            Self::Rejected { .. } => None,
            Self::Committed { lines, .. } => Some((Movement::Sell, lines)),
            Self::Released {
                lines,
                was_sold: false,
                ..
            } => Some((Movement::Release, lines)),
            Self::Released {
                lines,
                was_sold: true,
                ..
            } => Some((Movement::Return, lines)),
        }
    }
}

/// Why news of an order cannot be true, by what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the order was placed before, with other lines")]
    OtherLines,
    #[error("the order is confirmed, and nothing is held for it")]
    NotReserved,
    #[error("fewer pieces of a product are held or sold than the order has")]
    NotThere,
    #[error("the reservation is not in a state that its events lead to")]
    Inconsistent(#[source] ApplyError),
}

/// What news of an order lead to; nothing when they tell nothing new. `available` says how many pieces of a product can be had.
///
/// # Errors
/// When the news cannot be true.
pub fn decide(
    state: Option<&Reservation>,
    command: Command,
    available: impl Fn(ProductId) -> i64,
    now: DateTime<Utc>,
) -> Result<Option<Event>, Refusal> {
    let at = now;
    match (command, state) {
        (Command::Reserve(lines), None) => {
            let shortages: Vec<Shortage> = lines
                .iter()
                .map(|line| Shortage {
                    product_id: line.product_id,
                    wanted: line.quantity,
                    available: available(line.product_id),
                })
                .filter(|shortage| shortage.available < i64::from(shortage.wanted))
                .collect();
            Ok(Some(if shortages.is_empty() {
                Event::Reserved { lines, at }
            } else {
                Event::Rejected { lines, shortages, at }
            }))
        }
        (Command::Reserve(lines), Some(known)) if known.lines == lines => Ok(None),
        (Command::Reserve(_), Some(_)) => Err(Refusal::OtherLines),

        (Command::Commit, Some(known)) => match known.status {
            Status::Reserved => Ok(Some(Event::Committed {
                lines: known.lines.clone(),
                at,
            })),
            Status::Committed => Ok(None),
            Status::Rejected(_) | Status::Released => Err(Refusal::NotReserved),
        },
        (Command::Commit, None) => Err(Refusal::NotReserved),

        (Command::Release, Some(known)) => match known.status {
            Status::Reserved | Status::Committed => Ok(Some(Event::Released {
                lines: known.lines.clone(),
                was_sold: known.status == Status::Committed,
                at,
            })),
            Status::Rejected(_) | Status::Released => Ok(None),
        },
        // Its placing was never heard, since an operator has discarded it.
        (Command::Release, None) => Ok(None),
    }
}

/// An event that cannot follow the state that it is applied to: the history is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot follow what happened before")]
pub struct ApplyError(&'static str);

/// The reservation after an event.
///
/// # Errors
/// When the event cannot have happened to this reservation.
pub fn apply(
    state: Option<&Reservation>,
    order_id: OrderId,
    event: &Event,
) -> Result<Reservation, ApplyError> {
    let begin = |lines: &Lines, status, at| Reservation {
        order_id,
        version: 1,
        lines: lines.clone(),
        status,
        decided_at: at,
        committed_at: None,
        released_at: None,
    };
    match (event, state) {
        (Event::Reserved { lines, at }, None) => Ok(begin(lines, Status::Reserved, *at)),
        (Event::Rejected { lines, shortages, at }, None) => {
            Ok(begin(lines, Status::Rejected(shortages.clone()), *at))
        }
        (Event::Committed { lines, at }, Some(known))
            if known.status == Status::Reserved && known.lines == *lines =>
        {
            Ok(Reservation {
                version: known.version + 1,
                status: Status::Committed,
                committed_at: Some(*at),
                ..known.clone()
            })
        }
        (Event::Released { lines, was_sold, at }, Some(known))
            if known.lines == *lines
                && known.status
                    == if *was_sold {
                        Status::Committed
                    } else {
                        Status::Reserved
                    } =>
        {
            Ok(Reservation {
                version: known.version + 1,
                status: Status::Released,
                released_at: Some(*at),
                ..known.clone()
            })
        }
        (Event::Reserved { .. }, _) => Err(ApplyError("inventory.reserved")),
        (Event::Rejected { .. }, _) => Err(ApplyError("inventory.rejected")),
        (Event::Committed { .. }, _) => Err(ApplyError("inventory.committed")),
        (Event::Released { .. }, _) => Err(ApplyError("inventory.released")),
    }
}

/// The reservation that a history leads to; `None` for an empty one.
///
/// # Errors
/// When an event cannot follow those before it.
pub fn rebuild<'e>(
    order_id: OrderId,
    events: impl IntoIterator<Item = &'e Event>,
) -> Result<Option<Reservation>, ApplyError> {
    events
        .into_iter()
        .try_fold(None, |state: Option<Reservation>, event| {
            apply(state.as_ref(), order_id, event).map(Some)
        })
}
