//! Cards are not shown.

use std::fmt;

use crate::shop::payment::v1::Card;

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Card(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shop::payment::v1::{
        CreatePaymentMethodRequest, ProcessPaymentRequest, process_payment_request,
    };

    #[test]
    fn requests_show_no_card() {
        let card = Card {
            number: "4242424242424242".into(),
            expiry_month: 12,
            expiry_year: 2030,
            cvv: "917".into(),
        };
        let method = CreatePaymentMethodRequest {
            card: Some(card.clone()),
            ..Default::default()
        };
        let payment = ProcessPaymentRequest {
            method: Some(process_payment_request::Method::Card(card)),
            ..Default::default()
        };
        let shown = format!("{method:?} {payment:?}");
        assert!(
            !shown.contains("4242") && !shown.contains("917") && !shown.contains("2030"),
            "{shown}"
        );
    }
}
