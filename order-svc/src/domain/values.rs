//! Values that are valid once they exist.

use std::collections::HashSet;
use std::fmt;

use money::{Currency, Money};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(OrderId);
id!(UserId);
id!(ProductId);
id!(
    /// payment-svc's own id of a payment method; never a card or a provider's token.
    PaymentMethodId
);

/// The most products that an order may have.
pub const MAX_ITEMS: usize = 100;

/// So many pieces of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub product_id: ProductId,
    /// 1 to [`MAX_QUANTITY`](super::MAX_QUANTITY).
    pub quantity: i32,
    /// Minor units of the order's currency, positive.
    pub unit_price: i64,
}

impl Line {
    /// Quantity times price; `None` when it overflows.
    pub fn total(&self) -> Option<i64> {
        self.unit_price.checked_mul(i64::from(self.quantity))
    }
}

/// The lines of an order: 1 to [`MAX_ITEMS`], distinct products, and a total that an i64 can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Items {
    lines: Vec<Line>,
    total: Money,
}

/// Why lines are not those of an order. Indexes count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ItemsError {
    #[error("an order has 1 to 100 items")]
    Count,
    #[error("the product of item {0} appears before")]
    Repeated(usize),
    #[error("the quantity of item {0} must be 1 to 10000")]
    Quantity(usize),
    #[error("the price of item {0} must be positive")]
    Price(usize),
    #[error("quantity times price of item {0} is too large")]
    LineTotal(usize),
    #[error("the total is too large")]
    Total,
}

impl Items {
    /// # Errors
    /// The first thing that is wrong.
    pub fn new(lines: Vec<Line>, currency: Currency) -> Result<Self, ItemsError> {
        if lines.is_empty() || lines.len() > MAX_ITEMS {
            return Err(ItemsError::Count);
        }
        let mut products = HashSet::with_capacity(lines.len());
        let mut total = 0i64;
        for (index, line) in lines.iter().enumerate() {
            if !products.insert(line.product_id) {
                return Err(ItemsError::Repeated(index));
            }
            if !(1..=super::MAX_QUANTITY).contains(&line.quantity) {
                return Err(ItemsError::Quantity(index));
            }
            if line.unit_price <= 0 {
                return Err(ItemsError::Price(index));
            }
            let line_total = line.total().ok_or(ItemsError::LineTotal(index))?;
            total = total.checked_add(line_total).ok_or(ItemsError::Total)?;
        }
        let total = Money::new(total, currency).ok_or(ItemsError::Total)?;
        Ok(Self { lines, total })
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub fn total(&self) -> Money {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn currency(code: &str) -> Currency {
        Currency::from_code(code).expect("known")
    }

    fn line(product: u128, quantity: i32, unit_price: i64) -> Line {
        Line {
            product_id: ProductId(Uuid::from_u128(product)),
            quantity,
            unit_price,
        }
    }

    #[track_caller]
    fn check(lines: Vec<Line>, expect: Result<i64, ItemsError>) {
        let total = Items::new(lines, currency("JPY")).map(|items| items.total().minor_units());
        assert_eq!(total, expect);
    }

    #[test]
    fn totals_are_exact_or_refused() {
        check(vec![line(1, 3, 1299), line(2, 1, 1)], Ok(3898));
        check(vec![line(1, 1, i64::MAX)], Ok(i64::MAX));
        check(vec![line(1, 2, i64::MAX / 2), line(2, 1, 1)], Ok(i64::MAX));
        check(
            vec![line(1, 2, i64::MAX / 2), line(2, 1, 2)],
            Err(ItemsError::Total),
        );
        check(
            vec![line(1, 1, 1), line(2, 2, i64::MAX)],
            Err(ItemsError::LineTotal(1)),
        );
        check(vec![], Err(ItemsError::Count));
        check((0..100).map(|n| line(n, 1, 1)).collect(), Ok(100));
        check((0..101).map(|n| line(n, 1, 1)).collect(), Err(ItemsError::Count));
        check(vec![line(1, 1, 1), line(1, 1, 1)], Err(ItemsError::Repeated(1)));
        for quantity in [0, -1, 10_001, i32::MIN] {
            check(vec![line(1, quantity, 1)], Err(ItemsError::Quantity(0)));
        }
        for price in [0, -1, i64::MIN] {
            check(vec![line(1, 1, price)], Err(ItemsError::Price(0)));
        }
    }
}
