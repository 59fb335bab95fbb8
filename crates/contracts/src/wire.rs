//! Times and amounts on the wire.

use chrono::{DateTime, Utc};
use money::{Currency, Money};
use prost_types::Timestamp;

use crate::shop::common::v1 as common;

/// A time on the wire.
pub fn timestamp(time: DateTime<Utc>) -> Timestamp {
    Timestamp {
        seconds: time.timestamp(),
        // A leap second is counted as more than a second's worth by chrono, and is none in Protobuf.
        nanos: time.timestamp_subsec_nanos().min(999_999_999).cast_signed(),
    }
}

/// A time from the wire; `None` when it is missing or out of range.
pub fn time(timestamp: Option<&Timestamp>) -> Option<DateTime<Utc>> {
    let timestamp = timestamp?;
    DateTime::from_timestamp(timestamp.seconds, u32::try_from(timestamp.nanos).ok()?)
}

impl From<Money> for common::Money {
    fn from(money: Money) -> Self {
        Self {
            minor_units: money.minor_units(),
            currency_code: money.currency().code().to_owned(),
        }
    }
}

/// An amount from the wire; `None` when it is missing, not positive, or in no currency to pay in.
pub fn money(amount: Option<&common::Money>) -> Option<Money> {
    let amount = amount?;
    Money::new(amount.minor_units, Currency::from_code(&amount.currency_code)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_amounts_come_back() {
        let now = DateTime::from_timestamp_micros(1_800_000_000_123_456).expect("in range");
        assert_eq!(time(Some(&timestamp(now))), Some(now));
        let amount = Money::new(1299, Currency::from_code("JPY").expect("known")).expect("positive");
        assert_eq!(money(Some(&amount.into())), Some(amount));
    }

    #[test]
    fn what_is_none_is_none() {
        assert_eq!(time(None), None);
        assert_eq!(
            time(Some(&Timestamp {
                seconds: 0,
                nanos: -1
            })),
            None
        );
        for (minor_units, currency_code) in [(0, "EUR"), (-1, "EUR"), (1, "EURO"), (1, "eur"), (1, "XAU")] {
            let amount = common::Money {
                minor_units,
                currency_code: currency_code.to_owned(),
            };
            assert_eq!(money(Some(&amount)), None, "{amount:?}");
        }
    }
}
