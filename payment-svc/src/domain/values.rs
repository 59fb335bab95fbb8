//! Values that are valid once they exist.

use std::fmt;

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
id!(PaymentId);
id!(
    /// Our own id of a payment method; never a card or a provider's token.
    PaymentMethodId
);

/// What people recognise a card by. Never its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardSummary {
    pub brand: String,
    /// Four digits.
    pub last_four: String,
}

/// A payment method of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    pub id: PaymentMethodId,
    pub card: CardSummary,
}
