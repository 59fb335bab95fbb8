//! The stock of a product: how many pieces there are, and where they are.

use chrono::{DateTime, Utc};

use super::ProductId;

/// The most pieces that may be said to be available.
pub const MAX_AVAILABLE: i64 = 1_000_000_000_000;

/// Pieces of a product. None of the three is ever negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// They can be ordered.
    pub available: i64,
    /// They are held for orders.
    pub reserved: i64,
    /// They belong to orders that are confirmed.
    pub sold: i64,
}

/// What an order does to pieces: from where to where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Movement {
    /// Available, then reserved.
    Reserve,
    /// Reserved, then sold.
    Sell,
    /// Reserved, then available again.
    Release,
    /// Sold, then available again.
    Return,
}

impl Counts {
    /// After so many pieces have moved. `None` when there are not as many to move.
    pub fn moved(self, movement: Movement, quantity: i32) -> Option<Self> {
        let mut counts = self;
        let (from, to) = match movement {
            Movement::Reserve => (&mut counts.available, &mut counts.reserved),
            Movement::Sell => (&mut counts.reserved, &mut counts.sold),
            Movement::Release => (&mut counts.reserved, &mut counts.available),
            Movement::Return => (&mut counts.sold, &mut counts.available),
        };
        let quantity = i64::from(quantity);
        if !(0..=*from).contains(&quantity) {
            return None;
        }
        *from -= quantity;
        *to = to.checked_add(quantity)?;
        Some(counts)
    }
}

/// The stock of a product at one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stock {
    pub product_id: ProductId,
    /// How many events it has had.
    pub version: i64,
    pub counts: Counts,
    /// When the last event happened.
    pub updated_at: DateTime<Utc>,
}

/// What the warehouse may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// So many pieces are available; makes a product that is not known. 0 to [`MAX_AVAILABLE`].
    Set(i64),
    /// So many pieces more are available, or less.
    Adjust(i64),
}

/// The stock is this from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Updated {
    pub counts: Counts,
    pub at: DateTime<Utc>,
}

/// Why a command is refused. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no such product")]
    Unknown,
    #[error("fewer pieces are available than are to be taken away")]
    TooFew,
    #[error("more than {MAX_AVAILABLE} pieces would be available")]
    TooMany,
}

/// What a command leads to; nothing when the stock is like that already.
///
/// # Errors
/// When the stock does not allow it.
pub fn decide(
    state: Option<&Stock>,
    command: Command,
    now: DateTime<Utc>,
) -> Result<Option<Updated>, Refusal> {
    let (before, available) = match (command, state) {
        (Command::Set(available), state) => (state, available),
        (Command::Adjust(_), None) => return Err(Refusal::Unknown),
        (Command::Adjust(change), Some(stock)) => {
            let available = stock.counts.available.checked_add(change);
            (state, available.ok_or(Refusal::TooMany)?)
        }
    };
    if available < 0 {
        return Err(Refusal::TooFew);
    }
    if available > MAX_AVAILABLE {
        return Err(Refusal::TooMany);
    }
    let counts = Counts {
        available,
        ..before.map(|stock| stock.counts).unwrap_or_default()
    };
    let changes = before.is_none_or(|stock| stock.counts != counts);
    Ok(changes.then_some(Updated { counts, at: now }))
}

/// The stock after an event.
pub fn apply(state: Option<&Stock>, product_id: ProductId, event: Updated) -> Stock {
    Stock {
        product_id,
        version: state.map_or(0, |stock| stock.version) + 1,
        counts: event.counts,
        updated_at: event.at,
    }
}

/// The stock that a history leads to; `None` for an empty one.
pub fn rebuild(product_id: ProductId, events: impl IntoIterator<Item = Updated>) -> Option<Stock> {
    events.into_iter().fold(None, |state: Option<Stock>, event| {
        Some(apply(state.as_ref(), product_id, event))
    })
}
