//! What the load consists of: the same seed gives the same orders.

use contracts::shop::order::v1::{OrderItem, PlaceOrderRequest};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

const CURRENCIES: [&str; 6] = ["EUR", "USD", "GBP", "JPY", "CHF", "PLN"];
const REASONS: [&str; 4] = [
    "changed my mind",
    "found it cheaper",
    "ordered twice",
    "Lieferung dauert zu lange ☹",
];

/// One order with all that happens around it.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) place: PlaceOrderRequest,
    pub(crate) repeat: Repeat,
    /// Something that must be refused, tried between placing and cancelling.
    pub(crate) probe: Option<Probe>,
    pub(crate) cancel: Option<Cancel>,
}

/// Whether a request is sent twice, with the same request_id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    No,
    /// After the first was answered, as a client does that lost the answer.
    Afterwards,
    /// While the first is under way, as an impatient client does.
    AtOnce,
}

#[derive(Debug, Clone)]
pub(crate) struct Cancel {
    pub(crate) request_id: String,
    pub(crate) reason: String,
    /// Whether it names the version that it expects.
    pub(crate) expects_version: bool,
    pub(crate) repeat: Repeat,
}

/// A request about an order that must be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    /// Another order under the request_id of this one.
    RequestIdReused,
    /// Somebody else reads it.
    ReadByAnother,
    /// Somebody else cancels it.
    CancelledByAnother,
    /// It is cancelled at a version that it does not have.
    WrongVersion,
    /// The reason has a NUL in it.
    NulInReason,
}

impl Probe {
    const ALL: [Self; 5] = [
        Self::RequestIdReused,
        Self::ReadByAnother,
        Self::CancelledByAnother,
        Self::WrongVersion,
        Self::NulInReason,
    ];
}

/// A whole load.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) orders: Vec<Order>,
    /// Requests to place an order that must be refused as invalid, and what is wrong with them.
    pub(crate) invalid: Vec<(PlaceOrderRequest, &'static str)>,
}

impl Load {
    /// `orders` varied orders of many users; about a fifth is cancelled, 15 % of the requests are sent twice, and 5 %
    /// invalid ones come on top.
    pub(crate) fn generate(orders: u32, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let users: Vec<Uuid> = (0..(orders / 5).max(3)).map(|_| uuid(&mut rng)).collect();
        let products: Vec<Uuid> = (0..200).map(|_| uuid(&mut rng)).collect();
        let orders: Vec<Order> = (0..orders).map(|_| order(&mut rng, &users, &products)).collect();
        let invalid = (0..orders.len().div_ceil(20))
            .map(|kind| invalid(order(&mut rng, &users, &products).place, kind))
            .collect();
        Self { orders, invalid }
    }
}

fn order(rng: &mut StdRng, users: &[Uuid], products: &[Uuid]) -> Order {
    let user = users[rng.random_range(0..users.len())];
    let lines = *[1, 1, 1, 2, 2, 3, 4, 5, 8].choose(rng).unwrap_or(&1);
    let items = products
        .choose_multiple(rng, lines)
        .map(|product| OrderItem {
            product_id: product.to_string(),
            quantity: rng.random_range(1..=12),
            unit_price_minor_units: rng.random_range(1..=50_000),
        })
        .collect();
    let place = PlaceOrderRequest {
        request_id: uuid(rng).to_string(),
        user_id: user.to_string(),
        items,
        currency_code: (*CURRENCIES.choose(rng).unwrap_or(&"EUR")).to_owned(),
        user_email: if rng.random_bool(0.3) {
            "somebody@example.com".to_owned()
        } else {
            String::new()
        },
        payment_method_id: if rng.random_bool(0.3) {
            uuid(rng).to_string()
        } else {
            String::new()
        },
    };
    let cancel = rng.random_bool(0.2).then(|| Cancel {
        request_id: uuid(rng).to_string(),
        reason: (*REASONS.choose(rng).unwrap_or(&"")).to_owned(),
        expects_version: rng.random_bool(0.5),
        repeat: repeat(rng),
    });
    let probe = rng
        .random_bool(0.05)
        .then(|| *Probe::ALL.choose(rng).unwrap_or(&Probe::ReadByAnother));
    Order {
        place,
        repeat: repeat(rng),
        probe,
        cancel,
    }
}

fn repeat(rng: &mut StdRng) -> Repeat {
    match rng.random_range(0..100) {
        0..8 => Repeat::Afterwards,
        8..15 => Repeat::AtOnce,
        _ => Repeat::No,
    }
}

fn invalid(mut request: PlaceOrderRequest, kind: usize) -> (PlaceOrderRequest, &'static str) {
    const KINDS: usize = 10;
    let what = match kind % KINDS {
        0 => {
            request.items.clear();
            "no items"
        }
        1 => {
            request.currency_code = "EURO".to_owned();
            "a currency that is none"
        }
        2 => {
            request.items[0].quantity = 0;
            "a quantity of zero"
        }
        3 => {
            request.items[0].unit_price_minor_units = -1;
            "a negative price"
        }
        4 => {
            request.items[0].product_id = "chair".to_owned();
            "a product id that is no UUID"
        }
        5 => {
            request.user_id = String::new();
            "no user"
        }
        6 => {
            request.items[0].quantity = 10_000;
            request.items[0].unit_price_minor_units = i64::MAX / 2;
            "a total beyond all bounds"
        }
        7 => {
            let twice = request.items[0].clone();
            request.items.push(twice);
            "a product in two items"
        }
        8 => {
            request.request_id = "again".to_owned();
            "a request_id that is no UUID"
        }
        _ => {
            request.user_email = "a\0b@example.com".to_owned();
            "a NUL"
        }
    };
    (request, what)
}

fn uuid(rng: &mut StdRng) -> Uuid {
    uuid::Builder::from_random_bytes(rng.random()).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_load_again() {
        let [a, b, c] = [1, 1, 2].map(|seed| format!("{:?}", Load::generate(50, seed)));
        assert_eq!(a, b);
        assert_ne!(a, c);
    }

    #[test]
    fn the_load_is_varied() {
        let load = Load::generate(1_000, 7);
        let share = |count: usize| count * 100 / load.orders.len();
        assert!((15..=25).contains(&share(
            load.orders.iter().filter(|order| order.cancel.is_some()).count()
        )));
        assert!(
            (11..=19).contains(&share(
                load.orders
                    .iter()
                    .filter(|order| order.repeat != Repeat::No)
                    .count()
            ))
        );
        assert_eq!(load.invalid.len(), 50);
        assert!(load.orders.iter().any(|order| order.place.items.len() == 8));
        for probe in Probe::ALL {
            assert!(
                load.orders.iter().any(|order| order.probe == Some(probe)),
                "{probe:?}"
            );
        }
    }
}
