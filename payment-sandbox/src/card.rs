//! Cards: whether a number can be one, whose it is, and how it behaves. The number itself goes no further than this.

use serde::{Deserialize, Serialize};
use service::validate::has_check_digit;

/// Why a bank says no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    Generic,
    InsufficientFunds,
    Lost,
    Stolen,
    Fraudulent,
    Expired,
    IncorrectCvc,
    ProcessingError,
    /// The customer has to confirm, and the caller asked not to have to wait for that.
    AuthenticationRequired,
}

impl Refusal {
    /// Stripe's code, decline code and message.
    pub fn codes(self) -> (&'static str, &'static str, &'static str) {
        const DECLINED: &str = "Your card was declined.";
        match self {
            Self::Generic => ("card_declined", "generic_decline", DECLINED),
            Self::InsufficientFunds => (
                "card_declined",
                "insufficient_funds",
                "Your card has insufficient funds.",
            ),
            Self::Lost => ("card_declined", "lost_card", DECLINED),
            Self::Stolen => ("card_declined", "stolen_card", DECLINED),
            Self::Fraudulent => ("card_declined", "fraudulent", DECLINED),
            Self::Expired => ("expired_card", "expired_card", "Your card has expired."),
            Self::IncorrectCvc => (
                "incorrect_cvc",
                "incorrect_cvc",
                "Your card's security code is incorrect.",
            ),
            Self::ProcessingError => (
                "processing_error",
                "processing_error",
                "An error occurred while processing your card. Try again in a little bit.",
            ),
            Self::AuthenticationRequired => (
                "authentication_required",
                "authentication_required",
                "Your card was declined. This transaction requires authentication.",
            ),
        }
    }
}

/// What happens instead of a plain yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    None,
    Refused(Refusal),
    /// Under way for some seconds, then done and answered.
    Slow,
    HangAfter,
    ErrorBefore,
    ErrorAfter,
    Twice,
    DropAfter,
    HangBefore,
    /// The customer has to confirm.
    AskCustomer,
}

/// How a card behaves. A fault strikes once for each intent, except refusals, which stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behaviour {
    /// When an intent to charge it is created.
    pub create: Fault,
    /// When the intent is confirmed.
    pub pay: Fault,
    /// When the charge is refunded.
    pub refund: Fault,
}

impl Behaviour {
    /// By the number: Stripe's own test cards, our fault cards (`40000088 PP RR SSS C`), and all others, which are fine.
    pub fn of(number: &str) -> Self {
        let (mut create, mut refund) = (Fault::None, Fault::None);
        let pay = match number {
            "4000000000000002" => Fault::Refused(Refusal::Generic),
            "4000000000009995" => Fault::Refused(Refusal::InsufficientFunds),
            "4000000000009987" => Fault::Refused(Refusal::Lost),
            "4000000000009979" => Fault::Refused(Refusal::Stolen),
            "4100000000000019" => Fault::Refused(Refusal::Fraudulent),
            "4000000000000069" => Fault::Refused(Refusal::Expired),
            "4000000000000127" => Fault::Refused(Refusal::IncorrectCvc),
            "4000000000000119" => Fault::Refused(Refusal::ProcessingError),
            "4000002760003184" => Fault::AskCustomer,
            _ => match number.strip_prefix("40000088") {
                Some(rest) if rest.len() == 8 => {
                    refund = fault(&rest[2..4]);
                    match &rest[..2] {
                        "13" => create = Fault::HangAfter,
                        "15" => create = Fault::ErrorAfter,
                        "18" => create = Fault::HangBefore,
                        _ => {}
                    }
                    fault(&rest[..2])
                }
                _ => Fault::None,
            },
        };
        Self { create, pay, refund }
    }
}

fn fault(code: &str) -> Fault {
    match code {
        "01" => Fault::Refused(Refusal::Generic),
        "02" => Fault::Slow,
        "03" => Fault::HangAfter,
        "04" => Fault::ErrorBefore,
        "05" => Fault::ErrorAfter,
        "06" => Fault::Twice,
        "07" => Fault::DropAfter,
        "08" => Fault::HangBefore,
        "09" => Fault::Refused(Refusal::Stolen),
        _ => Fault::None,
    }
}

/// Whether a number can be a card's: 12 to 19 digits, the last of which is Luhn's check digit.
pub fn is_valid(number: &str) -> bool {
    (12..=19).contains(&number.len()) && has_check_digit(number)
}

/// Whose card it is, by its first digits.
pub fn brand(number: &str) -> &'static str {
    match number.as_bytes() {
        [b'4', ..] => "visa",
        [b'5', b'1'..=b'5', ..] | [b'2', b'2'..=b'7', ..] => "mastercard",
        [b'3', b'4' | b'7', ..] => "amex",
        [b'6', ..] => "discover",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_checked() {
        for good in ["4242424242424242", "5555555555554444", "378282246310005"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in [
            "",
            "4242424242424241",
            "424242424242424x",
            "0",
            "00000000000000000000",
        ] {
            assert!(!is_valid(bad), "{bad}");
        }
    }

    #[test]
    fn a_number_says_how_it_behaves() {
        let check = |number: &str, create, pay, refund| {
            assert_eq!(
                Behaviour::of(number),
                Behaviour { create, pay, refund },
                "{number}"
            );
        };
        check("4242424242424242", Fault::None, Fault::None, Fault::None);
        check("4000008800000000", Fault::None, Fault::None, Fault::None);
        check(
            "4000008803050000",
            Fault::None,
            Fault::HangAfter,
            Fault::ErrorAfter,
        );
        check(
            "4000008802010000",
            Fault::None,
            Fault::Slow,
            Fault::Refused(Refusal::Generic),
        );
        check("4000008818020000", Fault::HangBefore, Fault::None, Fault::Slow);
        check("40000088030500000", Fault::None, Fault::None, Fault::None);
        check(
            "4000000000009979",
            Fault::None,
            Fault::Refused(Refusal::Stolen),
            Fault::None,
        );
    }
}
