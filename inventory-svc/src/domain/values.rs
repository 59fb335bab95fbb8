//! Values that are valid once they exist.

use std::collections::HashSet;
use std::fmt;

use uuid::Uuid;

macro_rules! id {
    ($name:ident) => {
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
id!(ProductId);

/// The most products that an order may have.
const MAX_LINES: usize = 100;
/// The most pieces of one product.
const MAX_QUANTITY: i32 = 10_000;

/// So many pieces of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub product_id: ProductId,
    /// 1 to 10,000.
    pub quantity: i32,
}

/// What an order wants: 1 to 100 lines of distinct products.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lines(Vec<Line>);

/// Why lines are not those of an order. Indexes count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinesError {
    #[error("an order has 1 to {MAX_LINES} lines")]
    Count,
    #[error("the product of line {0} appears before")]
    Repeated(usize),
    #[error("the quantity of line {0} must be 1 to {MAX_QUANTITY}")]
    Quantity(usize),
}

impl Lines {
    /// # Errors
    /// The first thing that is wrong.
    pub fn new(lines: Vec<Line>) -> Result<Self, LinesError> {
        if lines.is_empty() || lines.len() > MAX_LINES {
            return Err(LinesError::Count);
        }
        let mut products = HashSet::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            if !products.insert(line.product_id) {
                return Err(LinesError::Repeated(index));
            }
            if !(1..=MAX_QUANTITY).contains(&line.quantity) {
                return Err(LinesError::Quantity(index));
            }
        }
        Ok(Self(lines))
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Line> {
        self.0.iter()
    }
}

impl<'l> IntoIterator for &'l Lines {
    type Item = &'l Line;
    type IntoIter = std::slice::Iter<'l, Line>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(product: u128, quantity: i32) -> Line {
        Line {
            product_id: ProductId(Uuid::from_u128(product)),
            quantity,
        }
    }

    #[track_caller]
    fn check(lines: Vec<Line>, expect: Result<(), LinesError>) {
        assert_eq!(Lines::new(lines).map(drop), expect);
    }

    #[test]
    fn lines_are_some_of_distinct_products() {
        check(vec![line(1, 1), line(2, 10_000)], Ok(()));
        check((0..100).map(|product| line(product, 1)).collect(), Ok(()));
        check(vec![], Err(LinesError::Count));
        check(
            (0..101).map(|product| line(product, 1)).collect(),
            Err(LinesError::Count),
        );
        check(vec![line(1, 1), line(1, 1)], Err(LinesError::Repeated(1)));
        for quantity in [0, -1, 10_001, i32::MIN] {
            check(vec![line(1, 1), line(2, quantity)], Err(LinesError::Quantity(1)));
        }
    }
}
