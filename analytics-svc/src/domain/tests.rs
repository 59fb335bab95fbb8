//! The figures, whatever the order in which topics are heard.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use money::{Currency, Money};
use proptest::prelude::*;
use proptest::sample::Index;
use uuid::Uuid;

use super::*;

fn currency(code: &str) -> Currency {
    Currency::from_code(code).expect("known")
}

fn euros(minor_units: i64) -> Money {
    Money::new(minor_units, currency("EUR")).expect("positive")
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + second, 0).expect("in range")
}

fn placed(second: i64, product: u128, quantity: i64, revenue: i64) -> Change {
    Change::Placed(Placed {
        at: at(second),
        currency: currency("EUR"),
        sales: BTreeMap::from([(Uuid::from_u128(product), Sales { quantity, revenue })]),
    })
}

fn fold(changes: &[Change]) -> Result<Order, ApplyError> {
    changes.iter().try_fold(Order::default(), apply)
}

#[track_caller]
fn check_refused(changes: &[Change], why: ApplyError) {
    let (last, before) = changes.split_last().expect("some");
    let before = fold(before).expect("possible so far");
    assert_eq!(apply(before, last), Err(why));
}

#[test]
fn what_cannot_have_happened_is_refused() {
    let order = || placed(0, 1, 1, 10);
    check_refused(&[Change::Confirmed], ApplyError::NotPlaced);
    check_refused(&[Change::Cancelled], ApplyError::NotPlaced);
    check_refused(&[order(), order()], ApplyError::PlacedTwice);
    check_refused(&[Change::Refunded(euros(1))], ApplyError::NotReceived);
    check_refused(
        &[Change::Received(euros(5)), Change::Refunded(euros(6))],
        ApplyError::NotReceived,
    );
    let francs = Money::new(5, currency("CHF")).expect("positive");
    check_refused(
        &[Change::Received(euros(5)), Change::Received(francs)],
        ApplyError::OtherCurrency,
    );
    check_refused(
        &[Change::Received(euros(i64::MAX)), Change::Received(euros(1))],
        ApplyError::Overflow(Overflow),
    );
}

/// What an order adds to the figures of its day.
#[track_caller]
fn check_day(changes: &[Change], expected: Counts, sold: i64) {
    let mut noted = Changes::default();
    noted
        .note(&Order::default(), &fold(changes).expect("possible"))
        .expect("small");
    let day = Window::of(Size::Day, at(0));
    let counts = noted.counts.get(&(day, currency("EUR"))).copied();
    assert_eq!(counts.unwrap_or_default(), expected, "{changes:?}");
    let sales = noted.sales.get(&(day, currency("EUR"), Uuid::from_u128(1)));
    assert_eq!(sales.copied().unwrap_or_default().quantity, sold, "{changes:?}");
}

#[test]
fn an_order_counts_for_what_has_become_of_it() {
    let order = || placed(0, 1, 3, 30);
    let received = || Change::Received(euros(30));
    let one = Counts {
        placed: 1,
        ..Counts::default()
    };
    check_day(&[received()], Counts::default(), 0);
    check_day(&[order()], one, 0);
    check_day(&[received(), order()], Counts { received: 30, ..one }, 0);
    let confirmed = Counts {
        confirmed: 1,
        received: 30,
        ..one
    };
    check_day(&[order(), received(), Change::Confirmed], confirmed, 3);
    let cancelled = Counts {
        cancelled: 1,
        ..confirmed
    };
    let way = [order(), received(), Change::Confirmed, Change::Cancelled];
    check_day(&way, cancelled, 0);
    let refunded = Counts {
        refunded: 30,
        ..cancelled
    };
    let way = [&way[..], &[Change::Refunded(euros(30))]].concat();
    check_day(&way, refunded, 0);
    assert_eq!(refunded.revenue(), 0);
}

#[test]
fn a_sum_that_does_not_fit_is_an_error() {
    let much = fold(&[placed(0, 1, 1, i64::MAX), Change::Confirmed]).expect("possible");
    let mut changes = Changes::default();
    changes.note(&Order::default(), &much).expect("fits");
    assert_eq!(changes.note(&Order::default(), &much), Err(Overflow));
    let window = |received| WindowFigures {
        window: Window::of(Size::Day, at(0)),
        figures: vec![Figures {
            currency: currency("EUR"),
            counts: Counts {
                received,
                ..Counts::default()
            },
            best_sellers: Vec::new(),
        }],
    };
    assert_eq!(total(&[window(i64::MAX), window(1)]), Err(Overflow));
    let sum = total(&[window(2), window(3)]).expect("fits");
    assert_eq!(sum[0].counts.received, 5);
}

#[test]
fn windows_are_whole_minutes_hours_and_days_of_utc() {
    let time = DateTime::parse_from_rfc3339("2026-11-21T19:23:45.678+01:00")
        .expect("a time")
        .to_utc();
    for (size, name) in [
        (Size::Minute, "minute/2026-11-21T18:23:00Z"),
        (Size::Hour, "hour/2026-11-21T18:00:00Z"),
        (Size::Day, "day/2026-11-21T00:00:00Z"),
    ] {
        let window = Window::of(size, time);
        assert_eq!(window.to_string(), name);
        let last = window.start() + size.length() - TimeDelta::nanoseconds(1);
        assert_eq!(Window::of(size, window.start()), window);
        assert_eq!(Window::of(size, last), window);
        assert_ne!(Window::of(size, window.start() + size.length()), window);
        assert_ne!(
            Window::of(size, window.start() - TimeDelta::nanoseconds(1)),
            window
        );
    }
    // Before the epoch, too.
    let early = DateTime::from_timestamp(-1, 0).expect("in range");
    assert_eq!(
        Window::of(Size::Day, early).to_string(),
        "day/1969-12-31T00:00:00Z"
    );
    assert!(!is_in_calendar(early) && is_in_calendar(time));
    let last = DateTime::parse_from_rfc3339("9999-12-31T23:59:59Z").expect("a time");
    assert!(is_in_calendar(last.to_utc()));
    assert!(!is_in_calendar(last.to_utc() + TimeDelta::seconds(1)));
}

/// All that ever happens to an order.
#[derive(Debug, Clone)]
struct Story {
    second: i64,
    currency: Currency,
    /// Product, pieces, price of one.
    lines: Vec<(u128, i64, i64)>,
    is_confirmed: bool,
    is_cancelled: bool,
    /// How much, and whether it was given back.
    payments: Vec<(i64, bool)>,
}

fn story() -> impl Strategy<Value = Story> {
    let lines = prop::collection::vec((0..4_u128, 1..5_i64, 0..1_000_i64), 1..4);
    let payments = prop::collection::vec((1..10_000_i64, any::<bool>()), 0..3);
    (
        0..200_000_i64,
        prop::sample::select(vec!["EUR", "JPY"]),
        lines,
        any::<bool>(),
        any::<bool>(),
        payments,
    )
        .prop_map(
            |(second, code, lines, is_confirmed, is_cancelled, payments)| Story {
                second,
                currency: currency(code),
                lines,
                is_confirmed,
                is_cancelled,
                payments,
            },
        )
}

impl Story {
    /// The histories of the order and of its payments, each in its order.
    fn histories(&self) -> Vec<Vec<Change>> {
        let mut sales: BTreeMap<Uuid, Sales> = BTreeMap::new();
        for (product, quantity, price) in &self.lines {
            let sum = sales.entry(Uuid::from_u128(*product)).or_default();
            sum.quantity += quantity;
            sum.revenue += quantity * price;
        }
        let placed = Placed {
            at: at(self.second),
            currency: self.currency,
            sales,
        };
        let mut order = vec![Change::Placed(placed)];
        order.extend(self.is_confirmed.then_some(Change::Confirmed));
        order.extend(self.is_cancelled.then_some(Change::Cancelled));
        let payment = |(amount, is_refunded): &(i64, bool)| {
            let money = Money::new(*amount, self.currency).expect("positive");
            let mut payment = vec![Change::Received(money)];
            payment.extend(is_refunded.then_some(Change::Refunded(money)));
            payment
        };
        [order]
            .into_iter()
            .chain(self.payments.iter().map(payment))
            .collect()
    }
}

type Table = (
    BTreeMap<(Window, Currency), Counts>,
    BTreeMap<(Window, Currency, Uuid), Sales>,
);

/// The figures by the rules in words, from whole stories.
fn expected(stories: &[Story]) -> Table {
    let mut table = Table::default();
    for story in stories {
        for size in Size::ALL {
            let window = Window::of(size, at(story.second));
            let counts = table.0.entry((window, story.currency)).or_default();
            counts.placed += 1;
            counts.confirmed += i64::from(story.is_confirmed);
            counts.cancelled += i64::from(story.is_cancelled);
            for (amount, is_refunded) in &story.payments {
                counts.received += amount;
                counts.refunded += if *is_refunded { *amount } else { 0 };
            }
            for (product, quantity, price) in &story.lines {
                if story.is_confirmed && !story.is_cancelled {
                    let key = (window, story.currency, Uuid::from_u128(*product));
                    let sales = table.1.entry(key).or_default();
                    sales.quantity += quantity;
                    sales.revenue += quantity * price;
                }
            }
        }
    }
    table
}

/// A history on a topic, as the consumer sees it: what comes next, and the order that it belongs to.
struct Entity {
    order: usize,
    history: Vec<Change>,
    mark: usize,
}

proptest! {
    #[test]
    fn any_interleaving_of_the_topics_with_repeats_gives_the_figures_of_the_whole(
        stories in prop::collection::vec(story(), 1..8),
        deliveries in prop::collection::vec((any::<Index>(), any::<Index>()), 0..80),
        batch in 1..10_usize,
    ) {
        let mut entities: Vec<Entity> = stories
            .iter()
            .enumerate()
            .flat_map(|(order, story)| {
                story.histories().into_iter().map(move |history| Entity { order, history, mark: 0 })
            })
            .collect();
        // Any entity's next event or one that came before; and in the end all that is left, payments first.
        let mut arrivals: Vec<(usize, usize)> = Vec::new();
        let mut seen: Vec<usize> = vec![0; entities.len()];
        for (entity, version) in &deliveries {
            let entity = entity.index(entities.len());
            let version = version.index(seen[entity] + 1).min(entities[entity].history.len() - 1);
            seen[entity] = seen[entity].max(version + 1);
            arrivals.push((entity, version));
        }
        for entity in (0..entities.len()).rev() {
            arrivals.extend((0..entities[entity].history.len()).map(|version| (entity, version)));
        }
        let mut orders: Vec<Order> = vec![Order::default(); stories.len()];
        let mut table = Table::default();
        for arrivals in arrivals.chunks(batch) {
            let mut changes = Changes::default();
            for (entity, version) in arrivals {
                let entity = &mut entities[*entity];
                if *version < entity.mark {
                    continue; // The consumer recognises repeats by their version.
                }
                prop_assert_eq!(*version, entity.mark, "no gaps");
                entity.mark += 1;
                let before = &orders[entity.order];
                let after = apply(before.clone(), &entity.history[*version]).expect("possible");
                changes.note(before, &after).expect("small");
                orders[entity.order] = after;
            }
            prop_assert!(changes.counts.values().all(|counts| *counts != Counts::default()));
            prop_assert!(changes.sales.values().all(|sales| *sales != Sales::default()));
            prop_assert!(changes.sales.keys().all(|(window, ..)| changes.windows().contains(window)));
            for (key, difference) in changes.counts {
                let sum = table.0.entry(key).or_default();
                *sum = sum.checked_add(difference).expect("small");
            }
            for (key, difference) in changes.sales {
                let sum = table.1.entry(key).or_default();
                *sum = sum.checked_add(difference).expect("small");
                prop_assert!(sum.quantity >= 0 && sum.revenue >= 0);
            }
        }
        table.1.retain(|_, sales| *sales != Sales::default());
        let expected = expected(&stories);
        prop_assert_eq!(table, expected);
    }
}
