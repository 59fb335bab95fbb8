//! Amounts as Stripe counts them: mostly, and not always, in ISO 4217's minor units.
//! <https://docs.stripe.com/currencies#minor-units> and the "special cases" below it.

use money::Money;

/// How Stripe's unit of a currency compares with ISO 4217's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Same,
    /// ISO 4217 has no decimals; Stripe wants two, which are zero.
    Hundredth,
    /// ISO 4217 has two decimals; Stripe has none.
    Hundredfold,
    /// Both have three decimals, and Stripe wants the last one to be zero.
    Tens,
    /// Stripe does not have it; and one that has three decimals must not be taken for one that has two.
    Unsupported,
}

fn unit(currency: &str) -> Unit {
    match currency {
        "ISK" | "UGX" => Unit::Hundredth,
        "MGA" => Unit::Hundredfold,
        "BHD" | "JOD" | "KWD" | "OMR" | "TND" => Unit::Tens,
        "IQD" | "LYD" => Unit::Unsupported,
        _ => Unit::Same,
    }
}

/// Stripe's `amount`; `None` if Stripe cannot take this amount.
pub(super) fn to_provider(money: Money) -> Option<i64> {
    let amount = money.minor_units();
    let multiple_of = |divisor: i64| (amount % divisor == 0).then_some(amount);
    match unit(money.currency().code()) {
        Unit::Same => Some(amount),
        Unit::Hundredth => amount.checked_mul(100),
        Unit::Hundredfold => multiple_of(100).map(|amount| amount / 100),
        Unit::Tens => multiple_of(10),
        Unit::Unsupported => None,
    }
}

/// ISO 4217's minor units of Stripe's `amount` in the currency of this upper-case code; `None` if there is no such amount.
pub(super) fn from_provider(amount: i64, currency: &str) -> Option<i64> {
    match unit(currency) {
        Unit::Same | Unit::Tens => Some(amount),
        Unit::Hundredth => (amount % 100 == 0).then_some(amount / 100),
        Unit::Hundredfold => amount.checked_mul(100),
        Unit::Unsupported => None,
    }
}

#[cfg(test)]
mod tests {
    use money::Currency;

    use super::*;

    #[test]
    fn amounts_are_converted_there_and_back_or_refused() {
        for (currency, ours, theirs) in [
            ("EUR", 1299, Some(1299)),
            ("USD", 1, Some(1)),
            ("HUF", 1299, Some(1299)),
            ("TWD", 1299, Some(1299)),
            // Without decimals on both sides.
            ("JPY", 1299, Some(1299)),
            ("KRW", 50_000, Some(50_000)),
            ("CLP", 7, Some(7)),
            // Without decimals in ISO 4217 only.
            ("ISK", 5, Some(500)),
            ("UGX", 1299, Some(129_900)),
            ("ISK", i64::MAX, None),
            // Without decimals at Stripe only.
            ("MGA", 129_900, Some(1_299)),
            ("MGA", 129_920, None),
            // With three.
            ("KWD", 1_290, Some(1_290)),
            ("KWD", 1_299, None),
            ("BHD", 5_120, Some(5_120)),
            ("JOD", 5_123, None),
            ("OMR", 10, Some(10)),
            ("TND", 1, None),
            ("IQD", 1_000, None),
            ("LYD", 1_000, None),
        ] {
            let currency = Currency::from_code(currency).expect("known");
            let money = Money::new(ours, currency).expect("positive");
            assert_eq!(to_provider(money), theirs, "{money:?}");
            if let Some(theirs) = theirs {
                assert_eq!(from_provider(theirs, currency.code()), Some(ours), "{money:?}");
            }
        }
        assert_eq!(from_provider(550, "ISK"), None);
        assert_eq!(from_provider(550, "IQD"), None);
    }
}
