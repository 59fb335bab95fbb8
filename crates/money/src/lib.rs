//! Amounts of money: minor units and an ISO 4217 currency; never a float. Pure.

use std::fmt;

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

    /// How many decimal digits its minor units are: 2 for EUR, 0 for JPY, 3 for KWD.
    pub fn minor_digits(self) -> u32 {
        // Those without are not made by from_code.
        self.0.exponent().map_or(0, u32::from)
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

/// For people: `12.99 EUR`, `1299 JPY`, `1.299 KWD`.
impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.currency.minor_digits();
        let unit = 10i64.pow(digits);
        let (whole, rest) = (self.minor_units / unit, self.minor_units % unit);
        match digits {
            0 => write!(f, "{whole}")?,
            digits => write!(f, "{whole}.{rest:0width$}", width = digits as usize)?,
        }
        write!(f, " {}", self.currency.code())
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

    #[test]
    fn amounts_are_shown_in_their_currencys_units() {
        for (minor_units, code, shown) in [
            (1299, "EUR", "12.99 EUR"),
            (5, "EUR", "0.05 EUR"),
            (100, "USD", "1.00 USD"),
            (1299, "JPY", "1299 JPY"),
            (1299, "KWD", "1.299 KWD"),
            (i64::MAX, "EUR", "92233720368547758.07 EUR"),
        ] {
            let money = Money::new(minor_units, Currency::from_code(code).expect("known")).expect("positive");
            assert_eq!(money.to_string(), shown);
        }
    }
}
