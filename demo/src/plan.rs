//! What the load consists of: the same seed gives the same orders, paid in the same ways.

use std::collections::BTreeMap;

use contracts::shop::inventory::v1::{AdjustStockRequest, SetStockRequest};
use contracts::shop::order::v1::{OrderItem, PlaceOrderRequest};
use contracts::shop::payment::v1::Card;
use contracts::shop::user::v1::{CreateUserRequest, UpdateUserRequest};
use local_stack::cards::{self, Fault};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

const CURRENCIES: [&str; 6] = ["EUR", "USD", "GBP", "JPY", "CHF", "PLN"];
/// The most pieces of one product in an order.
const MAX_QUANTITY: i32 = 12;
const PRODUCTS: usize = 200;
/// Every so many products there is one of which there is not enough for most.
const SCARCE_EVERY: usize = 40;
/// The most pieces of such a one, and the most that come later.
const SCARCE: i32 = 3;
const CARRIERS: [&str; 3] = ["Post", "Paketdienst Süd", "Bike & Co"];
const FIRST_NAMES: [&str; 5] = ["Ann", "Bjørn", "Chloé", "Dmitri", "美咲"];
const LAST_NAMES: [&str; 5] = ["O'Neill", "Åkesson", "Müller-Lüdenscheidt", "佐藤", "Lee"];
const REASONS: [&str; 4] = [
    "changed my mind",
    "found it cheaper",
    "ordered twice",
    "Lieferung dauert zu lange ☹",
];

/// One order with all that happens around it.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// A payment method of [`Pay::WithOrder`] is filled in once it is made.
    pub(crate) place: PlaceOrderRequest,
    pub(crate) repeat: Repeat,
    /// Something that must be refused, tried between placing and paying.
    pub(crate) probe: Option<Probe>,
    pub(crate) pay: Pay,
    pub(crate) cancel: Option<(When, Cancel)>,
    /// RefundPayment, once it is paid.
    pub(crate) refund: Option<Refund>,
    /// ShipOrder, once it is confirmed.
    pub(crate) ship: Option<Ship>,
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

/// How an order is paid, if at all.
#[derive(Debug, Clone)]
pub(crate) enum Pay {
    Never,
    /// By a payment method that comes with the order; if that is declined, by these one after the other.
    WithOrder(Try, Vec<Try>),
    /// By ProcessPayment, one try after the other until one does not fail.
    ByCall(Vec<Try>),
    /// By two calls of ProcessPayment at once; with the same request_id, if there is one try only.
    TwiceAtOnce(Try, Option<Try>),
}

/// A try to pay.
#[derive(Debug, Clone)]
pub(crate) struct Try {
    pub(crate) request_id: String,
    /// Of CreatePaymentMethod, if it is called.
    pub(crate) method_request_id: String,
    pub(crate) card: Card,
    pub(crate) outcome: Outcome,
    pub(crate) means: Means,
    pub(crate) repeat: Repeat,
}

/// What the card's bank says, sooner or later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Approved,
    Declined,
    /// Declined for good: the order is over.
    Blocked,
}

/// How a call of ProcessPayment names its card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Means {
    /// The card is in the call.
    Inline,
    /// By a payment method made before.
    Method,
}

/// When an order is cancelled: before it is paid, at the same time, or afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    AtOnce,
    After,
}

#[derive(Debug, Clone)]
pub(crate) struct Cancel {
    pub(crate) request_id: String,
    pub(crate) reason: String,
    /// Whether it names the version that it expects.
    pub(crate) expects_version: bool,
    pub(crate) repeat: Repeat,
}

#[derive(Debug, Clone)]
pub(crate) struct Refund {
    pub(crate) request_id: String,
    pub(crate) repeat: Repeat,
}

#[derive(Debug, Clone)]
pub(crate) struct Ship {
    pub(crate) request_id: String,
    pub(crate) carrier: String,
    pub(crate) tracking_number: String,
    /// Whether it names the version that it expects.
    pub(crate) expects_version: bool,
    pub(crate) repeat: Repeat,
    /// The request_id of MarkDelivered, if it arrives.
    pub(crate) deliver: Option<String>,
}

/// A product in the warehouse.
#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    /// SetStock, before anybody orders anything.
    pub(crate) set: SetStockRequest,
    pub(crate) set_repeat: Repeat,
    /// AdjustStock, while they do.
    pub(crate) adjust: Option<(AdjustStockRequest, Repeat)>,
}

/// Somebody who orders.
#[derive(Debug, Clone)]
pub(crate) struct User {
    /// What orders call him until user-svc has given him an id.
    pub(crate) stand_in: String,
    pub(crate) create: CreateUserRequest,
    pub(crate) repeat: Repeat,
    /// Whether somebody else tries to take his address.
    pub(crate) is_tried_again: bool,
    /// UpdateUser, while orders are placed: he has another address from then on.
    pub(crate) relocate: Option<(UpdateUserRequest, Repeat)>,
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
    /// It is cancelled at a version that it never has.
    WrongVersion,
    /// The reason has a NUL in it.
    NulInReason,
    /// Somebody else pays it.
    PaidByAnother,
    /// More than it costs is paid.
    WrongAmount,
    /// It is paid in a currency that it does not have.
    WrongCurrency,
    /// It is paid by a payment method that nobody has.
    UnknownMethod,
    /// It is paid by a card whose number has a typing error.
    MistypedCard,
}

impl Probe {
    const ALL: [Self; 10] = [
        Self::RequestIdReused,
        Self::ReadByAnother,
        Self::CancelledByAnother,
        Self::WrongVersion,
        Self::NulInReason,
        Self::PaidByAnother,
        Self::WrongAmount,
        Self::WrongCurrency,
        Self::UnknownMethod,
        Self::MistypedCard,
    ];
}

/// A whole load.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) users: Vec<User>,
    pub(crate) stock: Vec<Shelf>,
    pub(crate) orders: Vec<Order>,
    /// Requests to place an order that must be refused as invalid, and what is wrong with them.
    pub(crate) invalid: Vec<(PlaceOrderRequest, &'static str)>,
}

impl Load {
    /// `orders` varied orders of many users, paid in every way; about a fifth is cancelled by its user, some find a product sold out, some
    /// are shipped, 15 % of the requests are sent twice, and 5 % invalid ones come on top.
    pub(crate) fn generate(orders: u32, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let users: Vec<User> = (0..(orders / 5).max(3)).map(|_| user(&mut rng)).collect();
        let products: Vec<Uuid> = (0..PRODUCTS).map(|_| uuid(&mut rng)).collect();
        let stock = (0..)
            .zip(&products)
            .map(|(turn, product)| shelf(&mut rng, turn, *product, orders))
            .collect();
        let orders: Vec<Order> = (0..orders).map(|_| order(&mut rng, &users, &products)).collect();
        let invalid = (0..orders.len().div_ceil(20))
            .map(|kind| invalid(order(&mut rng, &users, &products).place, kind))
            .collect();
        Self {
            users,
            stock,
            orders,
            invalid,
        }
    }

    /// Calls users by the ids that they have.
    pub(crate) fn call_users(&mut self, ids: &BTreeMap<String, String>) {
        let orders = self.orders.iter_mut().map(|order| &mut order.place.user_id);
        let moves = self.users.iter_mut().filter_map(|user| user.relocate.as_mut());
        for user_id in orders.chain(moves.map(|(request, _)| &mut request.user_id)) {
            if let Some(id) = ids.get(user_id) {
                user_id.clone_from(id);
            }
        }
    }

    /// The numbers of all cards that are used.
    pub(crate) fn card_numbers(&self) -> impl Iterator<Item = &str> {
        let tries = self.orders.iter().flat_map(|order| match &order.pay {
            Pay::Never => Vec::new(),
            Pay::WithOrder(first, rest) => [first].into_iter().chain(rest).collect(),
            Pay::ByCall(tries) => tries.iter().collect(),
            Pay::TwiceAtOnce(first, second) => [first].into_iter().chain(second).collect(),
        });
        tries.map(|attempt| attempt.card.number.as_str())
    }
}

fn user(rng: &mut StdRng) -> User {
    /// What the mail server does with some of the addresses, and only the first time. After the last one, nobody knows whether it has the
    /// mail.
    const FAULTS: [&str; 4] = [
        "rcpt-451-once",
        "data-451-once",
        "rcpt-drop-once",
        "take-drop-once",
    ];
    let email = |rng: &mut StdRng| {
        let name = uuid(rng).simple().to_string();
        match rng.random_bool(0.15) {
            true => format!("{}+{name}@example.org", FAULTS.choose(rng).unwrap_or(&FAULTS[0])),
            false => format!("{name}@example.org"),
        }
    };
    let stand_in = uuid(rng).to_string();
    let create = CreateUserRequest {
        request_id: uuid(rng).to_string(),
        email: email(rng),
        first_name: (*FIRST_NAMES.choose(rng).unwrap_or(&"Ann")).to_owned(),
        last_name: (*LAST_NAMES.choose(rng).unwrap_or(&"Lee")).to_owned(),
    };
    let relocate = rng.random_bool(0.2).then(|| {
        let request = UpdateUserRequest {
            request_id: uuid(rng).to_string(),
            user_id: stand_in.clone(),
            email: Some(email(rng)),
            first_name: None,
            last_name: None,
            expected_version: i64::from(rng.random_bool(0.5)),
        };
        (request, repeat(rng))
    });
    User {
        stand_in,
        create,
        repeat: repeat(rng),
        is_tried_again: rng.random_bool(0.1),
        relocate,
    }
}

/// `orders` is how many there will be at most of each product.
fn shelf(rng: &mut StdRng, turn: usize, product: Uuid, orders: u32) -> Shelf {
    let is_scarce = turn.is_multiple_of(SCARCE_EVERY);
    let available = if is_scarce {
        i64::from(rng.random_range(0..=SCARCE))
    } else {
        // Enough for everybody, also when some are found to be missing.
        i64::from(MAX_QUANTITY) * (i64::from(orders) + 1)
    };
    let set = SetStockRequest {
        request_id: uuid(rng).to_string(),
        product_id: product.to_string(),
        available,
        expected_version: Some(0),
    };
    let change = match is_scarce {
        true => rng.random_range(1..=SCARCE),
        false => -rng.random_range(1..=MAX_QUANTITY),
    };
    let change = i64::from(change);
    let adjust = AdjustStockRequest {
        request_id: uuid(rng).to_string(),
        product_id: product.to_string(),
        change,
        expected_version: None,
    };
    let adjusts = is_scarce || rng.random_bool(0.1);
    Shelf {
        set,
        set_repeat: repeat(rng),
        adjust: adjusts.then(|| (adjust, repeat(rng))),
    }
}

fn order(rng: &mut StdRng, users: &[User], products: &[Uuid]) -> Order {
    let user = &users[rng.random_range(0..users.len())];
    let lines = *[1, 1, 1, 2, 2, 3, 4, 5, 8].choose(rng).unwrap_or(&1);
    let items = products
        .choose_multiple(rng, lines)
        .map(|product| OrderItem {
            product_id: product.to_string(),
            quantity: rng.random_range(1..=MAX_QUANTITY),
            unit_price_minor_units: rng.random_range(1..=50_000),
        })
        .collect();
    let place = PlaceOrderRequest {
        request_id: uuid(rng).to_string(),
        user_id: user.stand_in.clone(),
        items,
        currency_code: (*CURRENCIES.choose(rng).unwrap_or(&"EUR")).to_owned(),
        user_email: if rng.random_bool(0.3) {
            "somebody@example.com".to_owned()
        } else {
            String::new()
        },
        payment_method_id: String::new(),
    };
    let probe = rng
        .random_bool(0.08)
        .then(|| *Probe::ALL.choose(rng).unwrap_or(&Probe::ReadByAnother));
    let cancel = rng.random_bool(0.2).then(|| {
        let when = [When::Before, When::AtOnce, When::After];
        let cancel = Cancel {
            request_id: uuid(rng).to_string(),
            reason: (*REASONS.choose(rng).unwrap_or(&"")).to_owned(),
            expects_version: rng.random_bool(0.5),
            repeat: repeat(rng),
        };
        (*when.choose(rng).unwrap_or(&When::After), cancel)
    });
    let refund = (cancel.is_none() && rng.random_bool(0.06)).then(|| Refund {
        request_id: uuid(rng).to_string(),
        repeat: repeat(rng),
    });
    let ship = (cancel.is_none() && refund.is_none() && rng.random_bool(0.4)).then(|| Ship {
        request_id: uuid(rng).to_string(),
        carrier: (*CARRIERS.choose(rng).unwrap_or(&"Post")).to_owned(),
        tracking_number: format!("T{:08}", rng.random_range(0..100_000_000)),
        expects_version: rng.random_bool(0.5),
        repeat: repeat(rng),
        deliver: rng.random_bool(0.6).then(|| uuid(rng).to_string()),
    });
    Order {
        place,
        repeat: repeat(rng),
        probe,
        pay: pay(rng),
        cancel,
        refund,
        ship,
    }
}

fn pay(rng: &mut StdRng) -> Pay {
    use Outcome::{Approved, Blocked, Declined};
    match rng.random_range(0..100) {
        0..20 => Pay::WithOrder(attempt(rng, Approved), Vec::new()),
        20..25 => Pay::WithOrder(attempt(rng, Declined), vec![attempt(rng, Approved)]),
        25..28 => Pay::WithOrder(attempt(rng, Blocked), Vec::new()),
        28..65 => Pay::ByCall(vec![attempt(rng, Approved)]),
        65..74 => Pay::ByCall(vec![attempt(rng, Declined), attempt(rng, Approved)]),
        74..77 => Pay::ByCall(vec![attempt(rng, Declined), attempt(rng, Declined)]),
        77..81 => Pay::ByCall(vec![attempt(rng, Blocked), attempt(rng, Approved)]),
        81..87 => Pay::TwiceAtOnce(attempt(rng, Approved), Some(attempt(rng, Approved))),
        87..90 => Pay::TwiceAtOnce(attempt(rng, Approved), None),
        90..92 => Pay::TwiceAtOnce(attempt(rng, Declined), Some(attempt(rng, Approved))),
        _ => Pay::Never,
    }
}

fn attempt(rng: &mut StdRng, outcome: Outcome) -> Try {
    let means = match rng.random_bool(0.5) {
        true => Means::Inline,
        false => Means::Method,
    };
    let card = Card {
        number: card_number(rng, outcome),
        expiry_month: rng.random_range(1..=12),
        expiry_year: rng.random_range(2030..=2039),
        cvv: format!("{:03}", rng.random_range(0..1000)),
    };
    Try {
        request_id: uuid(rng).to_string(),
        method_request_id: uuid(rng).to_string(),
        card,
        outcome,
        means,
        repeat: repeat(rng),
    }
}

/// Whatever goes wrong on the way, the outcome is what the bank says.
fn card_number(rng: &mut StdRng, outcome: Outcome) -> String {
    /// Faults after which a client does not know at once what has happened.
    const UNKNOWN: [Fault; 10] = [
        Fault::Slow,
        Fault::HangAfter,
        Fault::ErrorBefore,
        Fault::ErrorAfter,
        Fault::Twice,
        Fault::DropAfter,
        Fault::HangBefore,
        Fault::CreateHangAfter,
        Fault::CreateErrorAfter,
        Fault::CreateHangBefore,
    ];
    const REFUND_UNKNOWN: [Fault; 7] = [
        Fault::Slow,
        Fault::HangAfter,
        Fault::ErrorBefore,
        Fault::ErrorAfter,
        Fault::Twice,
        Fault::DropAfter,
        Fault::HangBefore,
    ];
    let mut fault = |share: f64, faults: &[Fault]| match rng.random_bool(share) {
        true => *faults.choose(rng).unwrap_or(&Fault::None),
        false => Fault::None,
    };
    let (pay, refund) = (fault(0.15, &UNKNOWN), fault(0.25, &REFUND_UNKNOWN));
    let serial: u16 = rng.random_range(0..1000);
    match outcome {
        Outcome::Approved if pay == Fault::None && refund == Fault::None => cards::fine(rng.random()),
        Outcome::Approved => cards::fault(pay, refund, serial),
        Outcome::Declined => {
            let declined = [
                cards::DECLINED,
                cards::INSUFFICIENT_FUNDS,
                cards::PROCESSING_ERROR,
            ];
            match declined.choose(rng).filter(|_| serial.is_multiple_of(2)) {
                Some(card) => (*card).to_owned(),
                None => cards::fault(Fault::Declined, Fault::None, serial),
            }
        }
        Outcome::Blocked => {
            let blocked = [cards::LOST, cards::STOLEN, cards::FRAUDULENT];
            match blocked.choose(rng).filter(|_| serial.is_multiple_of(2)) {
                Some(card) => (*card).to_owned(),
                None => cards::fault(Fault::Stolen, Fault::None, serial),
            }
        }
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
        let users = |is: fn(&User) -> bool| load.users.iter().filter(|user| is(user)).count();
        assert_eq!(load.users.len(), 200);
        assert!((20..=60).contains(&users(|user| user.relocate.is_some())));
        assert!(users(|user| user.is_tried_again) > 5);
        assert!((10..=50).contains(&users(|user| user.create.email.contains("-once"))));
        let ships = |delivers: bool| {
            let ships = load.orders.iter().filter_map(|order| order.ship.as_ref());
            ships.filter(|ship| ship.deliver.is_some() == delivers).count()
        };
        assert!((5..=20).contains(&share(ships(false))) && (10..=30).contains(&share(ships(true))));
        let scarce = |shelf: &&Shelf| shelf.set.available <= i64::from(SCARCE);
        assert_eq!(load.stock.iter().filter(scarce).count(), PRODUCTS / SCARCE_EVERY);
        assert!(load.stock.iter().any(|shelf| shelf.adjust.is_none()));
        assert!(load.orders.iter().any(|order| order.place.items.len() == 8));
        let every_way: [fn(&Pay) -> bool; 5] = [
            |pay| matches!(pay, Pay::Never),
            |pay| matches!(pay, Pay::WithOrder(_, rest) if !rest.is_empty()),
            |pay| matches!(pay, Pay::ByCall(tries) if tries.len() == 2),
            |pay| matches!(pay, Pay::TwiceAtOnce(_, Some(_))),
            |pay| matches!(pay, Pay::TwiceAtOnce(_, None)),
        ];
        for way in every_way {
            assert!(load.orders.iter().any(|order| way(&order.pay)));
        }
        for probe in Probe::ALL {
            assert!(
                load.orders.iter().any(|order| order.probe == Some(probe)),
                "{probe:?}"
            );
        }
    }
}
