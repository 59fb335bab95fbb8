use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use uuid::Uuid;

use super::reservation::{self, Command, Event, Refusal, Status};
use super::stock::{self, MAX_AVAILABLE, Updated};
use super::*;

fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
}

fn product(number: u128) -> ProductId {
    ProductId(Uuid::from_u128(number))
}

fn order(number: u128) -> OrderId {
    OrderId(Uuid::from_u128(number))
}

/// Pieces by product.
fn lines(pieces: &[(u128, i32)]) -> Lines {
    let line = |&(number, quantity): &(u128, i32)| Line {
        product_id: product(number),
        quantity,
    };
    Lines::new(pieces.iter().map(line).collect()).expect("valid")
}

fn stock_of(number: u128, available: i64, reserved: i64, sold: i64) -> Stock {
    Stock {
        product_id: product(number),
        version: 1,
        counts: Counts {
            available,
            reserved,
            sold,
        },
        updated_at: at(0),
    }
}

/// What the warehouse's command makes of stock, as (available, reserved, sold).
#[track_caller]
fn check_stock(
    given: Option<(i64, i64, i64)>,
    command: stock::Command,
    expect: Result<Option<(i64, i64, i64)>, stock::Refusal>,
) {
    let given = given.map(|(available, reserved, sold)| stock_of(1, available, reserved, sold));
    let event = stock::decide(given.as_ref(), command, at(1));
    let told = event.map(|event| {
        event.map(|Updated { counts, at: when }| {
            assert_eq!(when, at(1));
            (counts.available, counts.reserved, counts.sold)
        })
    });
    assert_eq!(told, expect);
}

#[test]
fn the_warehouse_sets_and_adjusts_what_is_available_alone() {
    use stock::Command::{Adjust, Set};
    use stock::Refusal::{TooFew, TooMany, Unknown};
    check_stock(None, Set(0), Ok(Some((0, 0, 0))));
    check_stock(None, Set(7), Ok(Some((7, 0, 0))));
    check_stock(None, Adjust(7), Err(Unknown));
    check_stock(Some((5, 3, 2)), Set(7), Ok(Some((7, 3, 2))));
    check_stock(Some((5, 3, 2)), Set(5), Ok(None));
    check_stock(Some((5, 3, 2)), Set(0), Ok(Some((0, 3, 2))));
    check_stock(Some((5, 3, 2)), Adjust(-5), Ok(Some((0, 3, 2))));
    check_stock(Some((5, 3, 2)), Adjust(-6), Err(TooFew));
    check_stock(Some((5, 3, 2)), Adjust(i64::MIN), Err(TooFew));
    check_stock(Some((5, 3, 2)), Set(-1), Err(TooFew));
    check_stock(
        Some((5, 3, 2)),
        Adjust(MAX_AVAILABLE - 5),
        Ok(Some((MAX_AVAILABLE, 3, 2))),
    );
    check_stock(Some((5, 3, 2)), Adjust(MAX_AVAILABLE - 4), Err(TooMany));
    check_stock(Some((5, 3, 2)), Adjust(i64::MAX), Err(TooMany));
    check_stock(None, Set(MAX_AVAILABLE + 1), Err(TooMany));
}

/// What a database would hold.
#[derive(Debug, Default)]
struct World {
    reservations: BTreeMap<OrderId, Reservation>,
    stock: BTreeMap<ProductId, Stock>,
    events: BTreeMap<OrderId, Vec<Event>>,
    updates: BTreeMap<ProductId, Vec<Updated>>,
}

impl World {
    /// With so many pieces available of products 1, 2, ….
    fn with(available: &[i64]) -> Self {
        let mut world = Self::default();
        for (number, available) in (1..).zip(available) {
            world
                .command(number, stock::Command::Set(*available))
                .expect("allowed");
        }
        world
    }

    fn command(&mut self, number: u128, command: stock::Command) -> Result<(), stock::Refusal> {
        let id = product(number);
        let change = StockChange::make(self.stock.get(&id).cloned(), id, command, at(0))?;
        self.keep(&change);
        Ok(())
    }

    fn keep(&mut self, change: &StockChange) {
        let id = change.stock().product_id;
        let before = self.stock.insert(id, change.stock().clone());
        assert_eq!(before.map_or(0, |stock| stock.version), change.version_before());
        self.updates.entry(id).or_default().extend(change.event());
    }

    /// Tells news of orders in one batch, all of it locked as the service does; what was refused is left out. What became of each.
    fn batch(&mut self, news: &[(u128, Command)]) -> Vec<Result<(), Refusal>> {
        let orders: BTreeSet<OrderId> = news.iter().map(|(number, _)| order(*number)).collect();
        let known = self.reservations.iter().filter(|(id, _)| orders.contains(id));
        let known = known
            .map(|(id, reservation)| (*id, reservation.clone()))
            .collect();
        let mut batch = Batch::new(known, self.stock.clone());
        let tell = |(position, (number, command)): (usize, &(u128, Command))| {
            batch.tell(order(*number), command.clone(), position, at(1))
        };
        let told = news.iter().enumerate().map(tell).collect();
        let changes = batch.finish(at(2));
        for change in &changes.reservations {
            let reservation = change.reservation();
            let before = self
                .reservations
                .insert(reservation.order_id, reservation.clone());
            assert_eq!(before.map_or(0, |before| before.version), change.version_before());
            for (event, cause) in change.events() {
                assert_eq!(
                    order(news[*cause].0),
                    reservation.order_id,
                    "it is caused by its own news"
                );
                self.events
                    .entry(reservation.order_id)
                    .or_default()
                    .push(event.clone());
            }
        }
        let mut changed = BTreeSet::new();
        for change in &changes.stock {
            assert!(
                changed.insert(change.stock().product_id),
                "one change per product"
            );
            assert!(change.event().is_some(), "what is as it was has no change");
            self.keep(change);
        }
        told
    }

    fn counts(&self, number: u128) -> (i64, i64, i64) {
        let Counts {
            available,
            reserved,
            sold,
        } = self.stock[&product(number)].counts;
        (available, reserved, sold)
    }

    /// Histories rebuild what is there.
    fn assert_rebuilt(&self) {
        for (id, reservation) in &self.reservations {
            let rebuilt = reservation::rebuild(*id, &self.events[id]).expect("sound");
            assert_eq!(rebuilt.as_ref(), Some(reservation));
        }
        for (id, stock) in &self.stock {
            let rebuilt = stock::rebuild(*id, self.updates[id].iter().copied());
            assert_eq!(rebuilt.as_ref(), Some(stock));
        }
    }
}

fn short(event: &Event) -> &'static str {
    match event {
        Event::Reserved { .. } => "reserved",
        Event::Rejected { .. } => "rejected",
        Event::Committed { .. } => "committed",
        Event::Released { was_sold: false, .. } => "released",
        Event::Released { was_sold: true, .. } => "returned",
    }
}

/// An order of 3 of 5 pieces of product 1, and so many of 2 pieces of product 2: what happens to it, the last refusal, and what there
/// is in the end. In one batch or in many, it is the same.
#[track_caller]
fn check_order(
    second: i32,
    commands: &[&str],
    expect: &[&str],
    refusal: Option<Refusal>,
    counts: [(i64, i64, i64); 2],
) {
    let command = |name: &&str| match *name {
        "place" => Command::Reserve(lines(&[(1, 3), (2, second)])),
        "place another" => Command::Reserve(lines(&[(1, 1)])),
        "confirm" => Command::Commit,
        _ => Command::Release,
    };
    let news: Vec<(u128, Command)> = commands.iter().map(|name| (1, command(name))).collect();
    for chunk in [news.len(), 1] {
        let mut world = World::with(&[5, 2]);
        let told = news.chunks(chunk).flat_map(|news| world.batch(news));
        let told = told.collect::<Vec<_>>().into_iter().find_map(Result::err);
        assert_eq!(told, refusal);
        let events = world.events.get(&order(1)).map_or(&[][..], Vec::as_slice);
        assert_eq!(events.iter().map(short).collect::<Vec<_>>(), expect);
        assert_eq!([world.counts(1), world.counts(2)], counts, "{commands:?}");
        world.assert_rebuilt();
    }
}

#[test]
fn an_order_has_all_of_its_lines_or_none() {
    let untouched = [(5, 0, 0), (2, 0, 0)];
    let held = [(2, 3, 0), (0, 2, 0)];
    let sold = [(2, 0, 3), (0, 0, 2)];
    check_order(2, &["place"], &["reserved"], None, held);
    check_order(3, &["place"], &["rejected"], None, untouched);
    check_order(2, &["place", "confirm"], &["reserved", "committed"], None, sold);
    check_order(
        2,
        &["place", "cancel"],
        &["reserved", "released"],
        None,
        untouched,
    );
    check_order(
        2,
        &["place", "confirm", "cancel"],
        &["reserved", "committed", "returned"],
        None,
        untouched,
    );
    check_order(3, &["place", "cancel"], &["rejected"], None, untouched);
    check_order(2, &["cancel"], &[], None, untouched);
}

#[test]
fn repeats_change_nothing_and_lies_are_refused() {
    let untouched = [(5, 0, 0), (2, 0, 0)];
    let held = [(2, 3, 0), (0, 2, 0)];
    let sold = [(2, 0, 3), (0, 0, 2)];
    check_order(2, &["place", "place"], &["reserved"], None, held);
    check_order(3, &["place", "place"], &["rejected"], None, untouched);
    check_order(
        2,
        &["place", "confirm", "confirm", "place"],
        &["reserved", "committed"],
        None,
        sold,
    );
    check_order(
        2,
        &["place", "cancel", "cancel", "place"],
        &["reserved", "released"],
        None,
        untouched,
    );
    let other = Some(Refusal::OtherLines);
    check_order(2, &["place", "place another"], &["reserved"], other, held);
    let not_reserved = Some(Refusal::NotReserved);
    check_order(2, &["confirm"], &[], not_reserved, untouched);
    check_order(3, &["place", "confirm"], &["rejected"], not_reserved, untouched);
    check_order(
        2,
        &["place", "cancel", "confirm"],
        &["reserved", "released"],
        not_reserved,
        untouched,
    );
}

#[test]
fn a_rejection_says_what_was_short_and_lets_the_next_one_in() {
    let mut world = World::with(&[5, 2]);
    let told = world.batch(&[
        (1, Command::Reserve(lines(&[(1, 4), (2, 3), (3, 1)]))),
        (2, Command::Reserve(lines(&[(1, 4)]))),
        (3, Command::Reserve(lines(&[(1, 2)]))),
    ]);
    assert_eq!(told, [Ok(()), Ok(()), Ok(())]);
    let short = |number, wanted, available| Shortage {
        product_id: product(number),
        wanted,
        available,
    };
    let statuses: Vec<&Status> = world
        .reservations
        .values()
        .map(|reservation| &reservation.status)
        .collect();
    assert_eq!(
        statuses,
        [
            &Status::Rejected(vec![short(2, 3, 2), short(3, 1, 0)]),
            &Status::Reserved,
            &Status::Rejected(vec![short(1, 2, 1)]),
        ]
    );
    assert_eq!(world.counts(1), (1, 4, 0));
}

#[test]
fn what_a_batch_takes_and_gives_back_is_no_change() {
    let mut world = World::with(&[5]);
    let told = world.batch(&[(1, Command::Reserve(lines(&[(1, 5)]))), (1, Command::Release)]);
    assert_eq!(told, [Ok(()), Ok(())]);
    assert_eq!(world.stock[&product(1)].version, 1);
    assert_eq!(world.events[&order(1)].len(), 2);
}

#[test]
fn clocks_that_go_back_do_not_take_history_with_them() {
    let mut world = World::with(&[5]);
    assert_eq!(world.batch(&[(1, Command::Reserve(lines(&[(1, 5)])))]), [Ok(())]);
    let known = world.reservations.clone();
    let mut batch = Batch::new(known, world.stock.clone());
    batch.tell(order(1), Command::Commit, 0, at(0)).expect("allowed");
    let changes = batch.finish(at(0));
    assert_eq!(changes.reservations[0].reservation().committed_at, Some(at(1)));
    assert_eq!(changes.stock[0].stock().updated_at, at(2));
}

/// What may happen: to an order, or in the warehouse.
#[derive(Debug, Clone)]
enum Step {
    Tell(u128, Command),
    Stock(u128, stock::Command),
}

const PRODUCTS: u128 = 4;
const ORDERS: u128 = 8;

fn step() -> impl Strategy<Value = Step> {
    let wanted = proptest::collection::btree_map(1..=PRODUCTS, 1..6i32, 1..4);
    let place = wanted.prop_map(|wanted| Command::Reserve(lines(&wanted.into_iter().collect::<Vec<_>>())));
    let command = prop_oneof![2 => place, 1 => Just(Command::Commit), 1 => Just(Command::Release)];
    let warehouse = prop_oneof![
        (0..20i64).prop_map(stock::Command::Set),
        (-8..8i64).prop_map(stock::Command::Adjust),
    ];
    prop_oneof![
        5 => (1..=ORDERS, command).prop_map(|(order, command)| Step::Tell(order, command)),
        1 => (1..=PRODUCTS, warehouse).prop_map(|(product, command)| Step::Stock(product, command)),
    ]
}

/// The same by pen and paper, one step at a time: a word and the lines of each order, and three numbers of each product.
#[derive(Debug, Default)]
struct Paper {
    orders: BTreeMap<u128, (&'static str, Lines)>,
    stock: BTreeMap<u128, [i64; 3]>,
}

impl Paper {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Tell(number, Command::Reserve(wanted)) => {
                if self.orders.contains_key(number) {
                    return;
                }
                let mut after = self.stock.clone();
                let mut enough = true;
                for line in wanted {
                    match after.get_mut(&line.product_id.0.as_u128()) {
                        Some(counts) => {
                            counts[0] -= i64::from(line.quantity);
                            counts[1] += i64::from(line.quantity);
                            enough &= counts[0] >= 0;
                        }
                        None => enough = false,
                    }
                }
                if enough {
                    self.stock = after;
                }
                let word = if enough { "reserved" } else { "rejected" };
                self.orders.insert(*number, (word, wanted.clone()));
            }
            Step::Tell(number, command) => {
                let Some((word, wanted)) = self.orders.get_mut(number) else {
                    return;
                };
                let (from, to, next) = match (command, *word) {
                    (Command::Commit, "reserved") => (1, 2, "committed"),
                    (Command::Release, "reserved") => (1, 0, "released"),
                    (Command::Release, "committed") => (2, 0, "released"),
                    _ => return,
                };
                *word = next;
                for line in &*wanted {
                    let counts = self.stock.entry(line.product_id.0.as_u128()).or_default();
                    counts[from] -= i64::from(line.quantity);
                    counts[to] += i64::from(line.quantity);
                }
            }
            Step::Stock(number, stock::Command::Set(available)) => {
                self.stock.entry(*number).or_default()[0] = *available;
            }
            Step::Stock(number, stock::Command::Adjust(change)) => {
                if let Some(counts) = self.stock.get_mut(number)
                    && counts[0] + change >= 0
                {
                    counts[0] += change;
                }
            }
        }
    }
}

proptest! {
    /// Whatever happens, and however it falls into batches: nothing is ever negative, orders make and lose no pieces, and it is as if
    /// everything had been decided one by one.
    #[test]
    fn batches_decide_as_one_by_one(
        steps in proptest::collection::vec(step(), 0..80),
        sizes in proptest::collection::vec(1..12usize, 80),
    ) {
        let (mut world, mut paper) = (World::default(), Paper::default());
        let mut steps = steps.as_slice();
        for size in sizes {
            let mut news: Vec<(u128, Command)> = Vec::new();
            while let [Step::Tell(number, command), rest @ ..] = steps
                && news.len() < size
            {
                paper.take(&steps[0]);
                news.push((*number, command.clone()));
                steps = rest;
            }
            let total = |world: &World| -> i64 {
                world.stock.values().map(|stock| stock.counts.available + stock.counts.reserved + stock.counts.sold).sum()
            };
            let before = total(&world);
            world.batch(&news);
            prop_assert_eq!(total(&world), before);
            if let [step @ Step::Stock(number, command), rest @ ..] = steps {
                // Refused or not, the paper knows.
                let _ = world.command(*number, *command);
                paper.take(step);
                steps = rest;
            }
            for (number, counts) in &paper.stock {
                prop_assert!(counts.iter().all(|count| *count >= 0));
                let (available, reserved, sold) = world.counts(*number);
                prop_assert_eq!([available, reserved, sold], *counts);
            }
        }
        prop_assert!(steps.is_empty());
        let words: BTreeMap<u128, &str> = world
            .reservations
            .values()
            .map(|reservation| {
                let word = match reservation.status {
                    Status::Reserved => "reserved",
                    Status::Rejected(_) => "rejected",
                    Status::Committed => "committed",
                    Status::Released => "released",
                };
                (reservation.order_id.0.as_u128(), word)
            })
            .collect();
        let on_paper: BTreeMap<u128, &str> = paper.orders.iter().map(|(number, (word, _))| (*number, *word)).collect();
        prop_assert_eq!(words, on_paper);
        world.assert_rebuilt();
    }
}
