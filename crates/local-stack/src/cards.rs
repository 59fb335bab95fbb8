//! Card numbers for the payment sandbox: each says by itself how the sandbox behaves when it is charged or refunded.
//!
//! A fault card is `40000088 PP RR SSS C`: the fault when paying, the fault when refunding, a serial that makes it one of
//! many, and the Luhn check digit. Every other number that Luhn accepts is a card that never fails, except Stripe's own test
//! cards below.

/// Pays.
pub const VISA: &str = "4242424242424242";
/// Declined, without a reason.
pub const DECLINED: &str = "4000000000000002";
/// Declined: the account is empty.
pub const INSUFFICIENT_FUNDS: &str = "4000000000009995";
/// Declined for good.
pub const LOST: &str = "4000000000009987";
/// Declined for good.
pub const STOLEN: &str = "4000000000009979";
/// Declined for good, as fraudulent.
pub const FRAUDULENT: &str = "4100000000000019";
/// Declined as expired, whatever expiry is given.
pub const EXPIRED: &str = "4000000000000069";
/// Declined for its CVC, whatever is given.
pub const INCORRECT_CVC: &str = "4000000000000127";
/// Declined for now: the bank could not work on it.
pub const PROCESSING_ERROR: &str = "4000000000000119";
/// Wants its customer to confirm the payment.
pub const AUTHENTICATION_REQUIRED: &str = "4000002760003184";

const FAULT_PREFIX: &str = "40000088";
const FINE_PREFIX: &str = "4539";

/// What goes wrong, once for each payment intent (`pay`) or each intent's refund (`refund`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing.
    None = 0,
    /// Declined without a reason. As a refund: made, and failed.
    Declined = 1,
    /// Done and answered after a few seconds (`faults.slow` of the sandbox); until then it is under way.
    Slow = 2,
    /// Done, and never answered.
    HangAfter = 3,
    /// Not done, answered with 500.
    ErrorBefore = 4,
    /// Done, answered with 500.
    ErrorAfter = 5,
    /// The request arrives twice.
    Twice = 6,
    /// Done, and the connection is dropped.
    DropAfter = 7,
    /// Not done, and never answered.
    HangBefore = 8,
    /// Declined as stolen, for good. As a refund: like [`Declined`](Self::Declined).
    Stolen = 9,
    /// As [`HangAfter`](Self::HangAfter), when the intent is created.
    CreateHangAfter = 13,
    /// As [`ErrorAfter`](Self::ErrorAfter), when the intent is created.
    CreateErrorAfter = 15,
    /// As [`HangBefore`](Self::HangBefore), when the intent is created.
    CreateHangBefore = 18,
}

impl Fault {
    /// Every fault, with `None`.
    pub const ALL: [Self; 13] = [
        Self::None,
        Self::Declined,
        Self::Slow,
        Self::HangAfter,
        Self::ErrorBefore,
        Self::ErrorAfter,
        Self::Twice,
        Self::DropAfter,
        Self::HangBefore,
        Self::Stolen,
        Self::CreateHangAfter,
        Self::CreateErrorAfter,
        Self::CreateHangBefore,
    ];
}

/// A card that misbehaves when it is charged and when it is refunded. Only the last three digits of `serial` count.
pub fn fault(pay: Fault, refund: Fault, serial: u16) -> String {
    with_check_digit(&format!(
        "{FAULT_PREFIX}{:02}{:02}{:03}",
        pay as u8,
        refund as u8,
        serial % 1000
    ))
}

/// A card that never fails, with a number that looks like any other: another one for each serial below 10^11.
pub fn fine(serial: u64) -> String {
    // Multiplying by an odd number that 5 does not divide permutes the eleven digits.
    let digits = (u128::from(serial) * 48_271_996_471 + 70_412_233_907) % 100_000_000_000;
    with_check_digit(&format!("{FINE_PREFIX}{digits:011}"))
}

/// Luhn's check digit at the end (ISO/IEC 7812-1, annex B).
fn with_check_digit(digits: &str) -> String {
    let sum: u32 = digits
        .bytes()
        .rev()
        .zip([2, 1].into_iter().cycle())
        .map(|(byte, weight)| {
            let product = u32::from(byte - b'0') * weight;
            product / 10 + product % 10
        })
        .sum();
    format!("{digits}{}", (10 - sum % 10) % 10)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const STRIPES_OWN: [&str; 10] = [
        VISA,
        DECLINED,
        INSUFFICIENT_FUNDS,
        LOST,
        STOLEN,
        FRAUDULENT,
        EXPIRED,
        INCORRECT_CVC,
        PROCESSING_ERROR,
        AUTHENTICATION_REQUIRED,
    ];

    #[test]
    fn check_digits_are_those_of_real_cards() {
        for card in STRIPES_OWN
            .into_iter()
            .chain(["5555555555554444", "378282246310005"])
        {
            assert_eq!(with_check_digit(&card[..card.len() - 1]), card);
        }
    }

    #[test]
    fn a_fault_card_says_its_faults() {
        let card = fault(Fault::HangAfter, Fault::CreateHangBefore, 1007);
        assert_eq!(&card[..15], "400000880318007");
        let all: HashSet<String> = Fault::ALL
            .iter()
            .flat_map(|pay| Fault::ALL.map(|refund| fault(*pay, refund, 7)))
            .collect();
        assert_eq!(all.len(), Fault::ALL.len() * Fault::ALL.len());
        assert!(all.iter().all(|card| card.len() == 16));
    }

    #[test]
    fn fine_cards_are_many_and_none_of_the_special_ones() {
        let cards: HashSet<String> = (0..10_000).map(fine).collect();
        assert_eq!(cards.len(), 10_000);
        for card in &cards {
            assert_eq!(card.len(), 16);
            assert!(!card.starts_with(FAULT_PREFIX) && !STRIPES_OWN.contains(&card.as_str()));
            assert_eq!(&with_check_digit(&card[..15]), card);
        }
    }
}
