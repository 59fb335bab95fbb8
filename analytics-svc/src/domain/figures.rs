//! Figures of windows: sums over orders, and differences between sums.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use money::Currency;
use uuid::Uuid;

use super::order::Order;
use super::window::{Size, Window};

/// A sum that an i64 cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sum is too large")]
pub struct Overflow;

/// What is counted of orders in one currency; a difference of such counts where it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub placed: i64,
    /// Those that were confirmed at any time.
    pub confirmed: i64,
    /// Those that were cancelled, confirmed before or not.
    pub cancelled: i64,
    /// In minor units.
    pub received: i64,
    /// The part of it that was given back.
    pub refunded: i64,
}

impl Counts {
    /// Received and not given back, in minor units.
    pub fn revenue(&self) -> i64 {
        // Neither is negative, so this fits.
        self.received - self.refunded
    }

    /// Sum, field by field.
    ///
    /// # Errors
    /// When one does not fit.
    pub fn checked_add(self, other: Self) -> Result<Self, Overflow> {
        self.combine(other, i64::checked_add)
    }

    fn checked_sub(self, other: Self) -> Result<Self, Overflow> {
        self.combine(other, i64::checked_sub)
    }

    fn combine(self, other: Self, operation: fn(i64, i64) -> Option<i64>) -> Result<Self, Overflow> {
        let field = |of: fn(&Self) -> i64| operation(of(&self), of(&other)).ok_or(Overflow);
        Ok(Self {
            placed: field(|counts| counts.placed)?,
            confirmed: field(|counts| counts.confirmed)?,
            cancelled: field(|counts| counts.cancelled)?,
            received: field(|counts| counts.received)?,
            refunded: field(|counts| counts.refunded)?,
        })
    }
}

/// What was sold of a product; a difference of such where it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sales {
    /// Pieces.
    pub quantity: i64,
    /// Pieces times price, in minor units.
    pub revenue: i64,
}

impl Sales {
    /// Sum, field by field.
    ///
    /// # Errors
    /// When one does not fit.
    pub fn checked_add(self, other: Self) -> Result<Self, Overflow> {
        self.combine(other, i64::checked_add)
    }

    fn checked_sub(self, other: Self) -> Result<Self, Overflow> {
        self.combine(other, i64::checked_sub)
    }

    fn combine(self, other: Self, operation: fn(i64, i64) -> Option<i64>) -> Result<Self, Overflow> {
        Ok(Self {
            quantity: operation(self.quantity, other.quantity).ok_or(Overflow)?,
            revenue: operation(self.revenue, other.revenue).ok_or(Overflow)?,
        })
    }
}

/// How figures change by what has become known of orders. Nothing in here is zero.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Differences, by window and currency.
    pub counts: BTreeMap<(Window, Currency), Counts>,
    /// Differences, by window, currency and product.
    pub sales: BTreeMap<(Window, Currency, Uuid), Sales>,
}

impl Changes {
    /// Adds what an order counts for after, and takes away what it counted for before.
    ///
    /// # Errors
    /// When a sum does not fit; these changes are of no use then.
    pub fn note(&mut self, before: &Order, after: &Order) -> Result<(), Overflow> {
        // An order is placed once, so what it counted for before was in the same windows.
        let Some(placed) = &after.placed else {
            return Ok(());
        };
        let (mut counts, were) = (counts(after), counts(before));
        for (currency, were) in were {
            let now = counts.entry(currency).or_default();
            *now = now.checked_sub(were)?;
        }
        let (mut sales, were) = (sales(after), sales(before));
        for (product, were) in were {
            let now = sales.entry(product).or_default();
            *now = now.checked_sub(were)?;
        }
        for window in Size::ALL.map(|size| Window::of(size, placed.at)) {
            for (&currency, &difference) in &counts {
                add(
                    &mut self.counts,
                    (window, currency),
                    difference,
                    Counts::checked_add,
                )?;
            }
            for (&product, &difference) in &sales {
                let key = (window, placed.currency, product);
                add(&mut self.sales, key, difference, Sales::checked_add)?;
            }
        }
        Ok(())
    }

    /// The windows whose figures change. Sales of products never change without a count.
    pub fn windows(&self) -> BTreeSet<Window> {
        self.counts.keys().map(|(window, _)| *window).collect()
    }
}

/// Adds a difference to one of `sums`, none of which is zero.
fn add<K: Ord, V: Copy + Default + PartialEq>(
    sums: &mut BTreeMap<K, V>,
    key: K,
    difference: V,
    plus: fn(V, V) -> Result<V, Overflow>,
) -> Result<(), Overflow> {
    if difference == V::default() {
        return Ok(());
    }
    match sums.entry(key) {
        Entry::Vacant(place) => _ = place.insert(difference),
        Entry::Occupied(mut place) => {
            let sum = plus(*place.get(), difference)?;
            if sum == V::default() {
                place.remove();
            } else {
                *place.get_mut() = sum;
            }
        }
    }
    Ok(())
}

/// What an order counts for in each of its windows, by currency: its money counts in the currency that it came in.
fn counts(order: &Order) -> BTreeMap<Currency, Counts> {
    let mut counts: BTreeMap<Currency, Counts> = BTreeMap::new();
    if let Some(placed) = &order.placed {
        let own = counts.entry(placed.currency).or_default();
        own.placed = 1;
        own.confirmed = i64::from(order.is_confirmed);
        own.cancelled = i64::from(order.is_cancelled);
        if let Some(paid) = &order.paid {
            let money = counts.entry(paid.currency).or_default();
            money.received = paid.received;
            money.refunded = paid.refunded;
        }
    }
    counts
}

/// What was sold by an order: nothing until it is confirmed, and nothing once it is cancelled.
fn sales(order: &Order) -> BTreeMap<Uuid, Sales> {
    match &order.placed {
        Some(placed) if order.is_confirmed && !order.is_cancelled => placed.sales.clone(),
        _ => BTreeMap::new(),
    }
}

/// A product among the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BestSeller {
    pub product_id: Uuid,
    pub sales: Sales,
}

/// The figures of a window in one currency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    pub currency: Currency,
    pub counts: Counts,
    /// By pieces, most first; those that sold alike by id.
    pub best_sellers: Vec<BestSeller>,
}

/// The figures of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowFigures {
    pub window: Window,
    /// By currency code.
    pub figures: Vec<Figures>,
}

/// Counts over several windows, by currency; best sellers are left out, since the best of all are not among the best of each.
///
/// # Errors
/// When a sum does not fit.
pub fn total(windows: &[WindowFigures]) -> Result<Vec<Figures>, Overflow> {
    let mut sums: BTreeMap<&str, Figures> = BTreeMap::new();
    for figures in windows.iter().flat_map(|window| &window.figures) {
        let sum = sums.entry(figures.currency.code()).or_insert_with(|| Figures {
            currency: figures.currency,
            counts: Counts::default(),
            best_sellers: Vec::new(),
        });
        sum.counts = sum.counts.checked_add(figures.counts)?;
    }
    Ok(sums.into_values().collect())
}
