//! Amounts of money: minor units and an ISO 4217 currency; never a float. Pure.

/// An ISO 4217 currency that amounts can be given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Currency(iso_currency::Currency);

impl Currency {
    /// From its upper-case code. Codes without minor units (gold, test codes) are no currencies to pay in.
    pub fn from_code(code: &str) -> Option<Self> {
        let currency = iso_currency::Currency::from_code(code)?;
        let is_usable = code.len() == 3 && currency.exponent().is_some() && !currency.is_fund();
        is_usable.then_some(Self(currency))
    }

    /// Its upper-case code.
    pub fn code(self) -> &'static str {
        self.0.code()
    }
}

/// A positive amount in the currency's minor units: 1299 is 12.99 EUR, and 1299 JPY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Money {
    minor_units: i64,
    currency: Currency,
}

impl Money {
    /// `None` unless it is positive.
    pub fn new(minor_units: i64, currency: Currency) -> Option<Self> {
        (minor_units > 0).then_some(Self {
            minor_units,
            currency,
        })
    }

    /// How many of the currency's smallest pieces.
    pub fn minor_units(self) -> i64 {
        self.minor_units
    }

    /// The currency.
    pub fn currency(self) -> Currency {
        self.currency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn currencies() {
        for code in ["EUR", "USD", "JPY", "KWD", "CHF"] {
            assert_eq!(Currency::from_code(code).map(Currency::code), Some(code));
        }
        for code in ["", "eur", "EURO", "XAU", "XTS", "XXX", "ZZZ", "EU\0"] {
            assert_eq!(Currency::from_code(code), None, "{code}");
        }
    }

    #[test]
    fn amounts_are_positive() {
        let currency = Currency::from_code("EUR").expect("known");
        assert!(Money::new(1, currency).is_some());
        assert_eq!(Money::new(0, currency), None);
        assert_eq!(Money::new(-1, currency), None);
    }
}
