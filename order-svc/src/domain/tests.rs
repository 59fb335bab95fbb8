//! The status machine as a table, and as a property over everything that may be asked in any order.

use chrono::TimeDelta;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use uuid::Uuid;

use super::*;

fn time(minute: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000, 0).expect("in range") + TimeDelta::minutes(minute)
}

/// The minute by which orders of these tests must be paid.
const PAY_BY: i64 = 30;

fn money(minor_units: i64) -> Money {
    Money::new(minor_units, Currency::from_code("EUR").expect("known")).expect("positive")
}

fn new_order() -> NewOrder {
    let line = |product, quantity, unit_price| Line {
        product_id: ProductId(Uuid::from_u128(product)),
        quantity,
        unit_price,
    };
    NewOrder {
        id: OrderId(Uuid::from_u128(1)),
        user_id: UserId(Uuid::from_u128(2)),
        items: Items::new(vec![line(3, 2, 500), line(4, 1, 299)], money(1).currency()).expect("valid"),
        user_email: None,
        payment_method_id: None,
        pay_by: time(PAY_BY),
    }
}

fn payment(id: u128) -> Payment {
    Payment {
        payment_id: Uuid::from_u128(id),
        amount: money(1299),
        brand: "visa".to_owned(),
        last_four: "4242".to_owned(),
    }
}

fn shipment() -> Shipment {
    Shipment {
        tracking_number: "T1".to_owned(),
        carrier: "Post".to_owned(),
    }
}

fn cancel() -> Command {
    Command::Cancel {
        reason: "because".to_owned(),
    }
}

/// What led to the state before the command, each by its usual command at minute 0, or at [`PAY_BY`] if it cannot be before.
const PLACED: &[&str] = &["place"];
const RESERVED: &[&str] = &["place", "reserve"];
const PAID: &[&str] = &["place", "pay"];
const CONFIRMED: &[&str] = &["place", "reserve", "pay"];
const SHIPPED: &[&str] = &["place", "pay", "reserve", "ship"];
const DELIVERED: &[&str] = &["place", "reserve", "pay", "ship", "deliver"];
const CANCELLED: &[&str] = &["place", "cancel"];
const CANCELLED_PAID: &[&str] = &["place", "pay", "cancel"];
const OVERDUE: &[&str] = &["place", "overdue"];
const OVERDUE_RESERVED: &[&str] = &["place", "reserve", "overdue"];

fn usual(name: &str) -> Command {
    match name {
        "place" => Command::Place(new_order()),
        "reserve" => Command::RecordReserved,
        "pay" => Command::RecordPaid(payment(5)),
        "ship" => Command::Ship(shipment()),
        "deliver" => Command::MarkDelivered,
        "cancel" => cancel(),
        "overdue" => Command::RecordOverdue,
        "fail" => Command::RecordPaymentFailed,
        "refund" => Command::RecordRefunded(payment(5).payment_id),
        "out of stock" => Command::RecordOutOfStock,
        other => panic!("no command {other}"),
    }
}

fn given(names: &[&str]) -> Option<Order> {
    names.iter().fold(None, |state, name| {
        Some(
            Change::make(
                state,
                usual(name),
                time(if *name == "overdue" { PAY_BY } else { 0 }),
            )
            .expect("the usual way")
            .into_order(),
        )
    })
}

fn names(events: &[Event]) -> Vec<&'static str> {
    let name = |event: &Event| match event {
        Event::Placed { .. } => "placed",
        Event::Reserved { .. } => "reserved",
        Event::Overdue { .. } => "overdue",
        Event::Paid { .. } => "paid",
        Event::Confirmed { .. } => "confirmed",
        Event::Shipped { .. } => "shipped",
        Event::Completed { .. } => "completed",
        Event::Cancelled { .. } => "cancelled",
    };
    events.iter().map(name).collect()
}

/// At minute 10, before the order must be paid.
#[track_caller]
fn check(state: &[&str], command: Command, expect: Result<(&[&str], Status), Refusal>) {
    check_at(10, state, command, expect);
}

#[track_caller]
fn check_at(minute: i64, state: &[&str], command: Command, expect: Result<(&[&str], Status), Refusal>) {
    let before = given(state);
    let version = before.as_ref().map_or(0, |order| order.version);
    let change = Change::make(before.clone(), command, time(minute));
    match (change, expect) {
        (Ok(change), Ok((events, status))) => {
            assert_eq!(names(change.events()), events);
            assert_eq!(change.order().status, status);
            assert_eq!(change.version_before(), version);
            assert_eq!(change.order().version, version + events.len() as i64);
            if events.is_empty() {
                assert_eq!(Some(change.order()), before.as_ref());
            } else {
                assert_eq!(change.order().updated_at, time(minute));
            }
        }
        (Err(refusal), Err(expected)) => assert_eq!(refusal, expected),
        (change, expect) => panic!("{change:?} is not {expect:?}"),
    }
}

#[test]
fn placing() {
    check(
        &[],
        Command::Place(new_order()),
        Ok((&["placed"], Status::Pending)),
    );
    check(PLACED, Command::Place(new_order()), Err(Refusal::Exists));
    check_at(
        PAY_BY,
        &[],
        Command::Place(new_order()),
        Err(Refusal::PayByPassed),
    );
}

#[test]
fn nothing_happens_to_an_unknown_order() {
    for command in [
        "reserve",
        "out of stock",
        "overdue",
        "pay",
        "fail",
        "refund",
        "ship",
        "deliver",
        "cancel",
    ] {
        check(&[], usual(command), Err(Refusal::Unknown));
    }
}

#[test]
fn reserving() {
    let reserve = || Command::RecordReserved;
    check(PLACED, reserve(), Ok((&["reserved"], Status::Pending)));
    check(
        PAID,
        reserve(),
        Ok((&["reserved", "confirmed"], Status::Confirmed)),
    );
    for (state, status) in [
        (RESERVED, Status::Pending),
        (CONFIRMED, Status::Confirmed),
        (SHIPPED, Status::Shipped),
        (DELIVERED, Status::Delivered),
        (CANCELLED, Status::Cancelled),
    ] {
        check(state, reserve(), Ok((&[], status)));
    }
}

#[test]
fn paying() {
    let pay = || Command::RecordPaid(payment(5));
    check(PLACED, pay(), Ok((&["paid"], Status::Paid)));
    check(RESERVED, pay(), Ok((&["paid", "confirmed"], Status::Confirmed)));
    // Money that is told of late is still money.
    check_at(PAY_BY + 1, PLACED, pay(), Ok((&["paid"], Status::Paid)));
    check_at(PAY_BY + 1, OVERDUE, pay(), Ok((&["paid"], Status::Paid)));
    check_at(
        PAY_BY + 1,
        OVERDUE_RESERVED,
        pay(),
        Ok((&["paid", "confirmed"], Status::Confirmed)),
    );
    for (state, status) in [
        (PAID, Status::Paid),
        (CONFIRMED, Status::Confirmed),
        (SHIPPED, Status::Shipped),
        (DELIVERED, Status::Delivered),
        (CANCELLED, Status::Cancelled),
        (CANCELLED_PAID, Status::Cancelled),
    ] {
        check(state, pay(), Ok((&[], status)));
    }
    for state in [PAID, CONFIRMED, SHIPPED, DELIVERED] {
        check(
            state,
            Command::RecordPaid(payment(6)),
            Err(Refusal::PaidOtherwise),
        );
    }
    let usd = Currency::from_code("USD").expect("known");
    for amount in [money(1298), money(1300), Money::new(1299, usd).expect("positive")] {
        check(
            PLACED,
            Command::RecordPaid(Payment { amount, ..payment(5) }),
            Err(Refusal::WrongAmount),
        );
    }
}

#[test]
fn shipping_and_delivering() {
    check(CONFIRMED, usual("ship"), Ok((&["shipped"], Status::Shipped)));
    for state in [PLACED, RESERVED, PAID] {
        check(state, usual("ship"), Err(Refusal::NotConfirmed));
    }
    check(SHIPPED, usual("ship"), Err(Refusal::Shipped));
    check(DELIVERED, usual("ship"), Err(Refusal::Delivered));
    check(CANCELLED, usual("ship"), Err(Refusal::Cancelled));

    check(SHIPPED, usual("deliver"), Ok((&["completed"], Status::Delivered)));
    for state in [PLACED, RESERVED, PAID, CONFIRMED] {
        check(state, usual("deliver"), Err(Refusal::NotShipped));
    }
    check(DELIVERED, usual("deliver"), Err(Refusal::Delivered));
    check(CANCELLED, usual("deliver"), Err(Refusal::Cancelled));
}

#[test]
fn cancelling() {
    for state in [PLACED, RESERVED, PAID, CONFIRMED] {
        check(state, cancel(), Ok((&["cancelled"], Status::Cancelled)));
    }
    check_at(PAY_BY, OVERDUE, cancel(), Ok((&["cancelled"], Status::Cancelled)));
    check(SHIPPED, cancel(), Err(Refusal::Shipped));
    check(DELIVERED, cancel(), Err(Refusal::Delivered));
    check(CANCELLED, cancel(), Err(Refusal::Cancelled));
}

#[test]
fn being_out_of_stock() {
    let out = || Command::RecordOutOfStock;
    for state in [PLACED, RESERVED, PAID, CONFIRMED] {
        check(state, out(), Ok((&["cancelled"], Status::Cancelled)));
    }
    check(CANCELLED, out(), Ok((&[], Status::Cancelled)));
    check(SHIPPED, out(), Err(Refusal::Shipped));
}

#[test]
fn being_overdue() {
    let overdue = || Command::RecordOverdue;
    for state in [PLACED, RESERVED] {
        check_at(PAY_BY - 1, state, overdue(), Err(Refusal::NotDue));
        check_at(PAY_BY, state, overdue(), Ok((&["overdue"], Status::Pending)));
    }
    for (state, status) in [
        (OVERDUE, Status::Pending),
        (PAID, Status::Paid),
        (CONFIRMED, Status::Confirmed),
        (SHIPPED, Status::Shipped),
        (DELIVERED, Status::Delivered),
        (CANCELLED, Status::Cancelled),
    ] {
        check_at(PAY_BY + 1, state, overdue(), Ok((&[], status)));
    }
}

/// Who the order says has ended it, after a command at [`PAY_BY`].
#[track_caller]
fn check_ended_by(state: &[&str], command: &str, by: Option<CancelledBy>) {
    let before = given(state);
    let change = Change::make(before.clone(), usual(command), time(PAY_BY)).expect("allowed");
    let order = change.order();
    match by {
        Some(by) => {
            assert_eq!(names(change.events()), ["cancelled"]);
            let cancellation = order.cancelled.as_ref().map(|(cancellation, _)| cancellation);
            let reason = by.reason().to_owned();
            assert_eq!(cancellation, Some(&Cancellation { by, reason }));
        }
        None => assert_eq!(Some(order), before.as_ref()),
    }
}

#[test]
fn a_payment_that_failed_for_good_ends_only_what_is_not_paid() {
    for state in [PLACED, RESERVED] {
        check_ended_by(state, "fail", Some(CancelledBy::PaymentFailed));
    }
    for state in [OVERDUE, OVERDUE_RESERVED] {
        check_ended_by(state, "fail", Some(CancelledBy::NotPaidInTime));
    }
    for state in [PAID, CONFIRMED, SHIPPED, DELIVERED, CANCELLED, CANCELLED_PAID] {
        check_ended_by(state, "fail", None);
    }
}

#[test]
fn a_refund_ends_what_was_paid_by_it_and_has_not_gone_out() {
    for state in [PAID, CONFIRMED] {
        check_ended_by(state, "refund", Some(CancelledBy::Refund));
    }
    for state in [
        PLACED,
        RESERVED,
        OVERDUE,
        SHIPPED,
        DELIVERED,
        CANCELLED,
        CANCELLED_PAID,
    ] {
        check_ended_by(state, "refund", None);
    }
    let other = Command::RecordRefunded(payment(6).payment_id);
    check(PAID, other, Ok((&[], Status::Paid)));
}

#[test]
fn a_broken_history_is_noticed() {
    let at = time(0);
    let placed = Event::Placed {
        order: new_order(),
        at,
    };
    for history in [
        vec![Event::Reserved { at }],
        vec![placed.clone(), placed.clone()],
        vec![placed.clone(), Event::Confirmed { at }],
        vec![
            placed.clone(),
            Event::Paid {
                payment: payment(5),
                at,
            },
            Event::Confirmed { at },
        ],
        vec![
            placed.clone(),
            Event::Shipped {
                shipment: shipment(),
                at,
            },
        ],
        vec![placed.clone(), Event::Completed { at }],
        vec![placed.clone(), Event::Reserved { at }, Event::Reserved { at }],
        vec![placed.clone(), Event::Overdue { at }],
        vec![
            placed.clone(),
            Event::Overdue { at: time(PAY_BY) },
            Event::Overdue { at: time(PAY_BY) },
        ],
    ] {
        assert!(rebuild(&history).is_err(), "{history:?}");
    }
    assert_eq!(rebuild(&[]), Ok(None));
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::Place(new_order())),
        Just(Command::RecordReserved),
        (5..7u128, 1299..1301i64).prop_map(|(id, amount)| {
            Command::RecordPaid(Payment {
                amount: money(amount),
                ..payment(id)
            })
        }),
        Just(Command::Ship(shipment())),
        Just(Command::MarkDelivered),
        Just(cancel()),
        Just(Command::RecordOutOfStock),
        Just(Command::RecordOverdue),
        Just(Command::RecordPaymentFailed),
        (5..7u128).prop_map(|id| Command::RecordRefunded(payment(id).payment_id)),
    ]
}

/// What must hold of every order.
fn assert_sound(order: &Order) {
    assert_eq!(order.cancelled.is_some(), order.status == Status::Cancelled);
    if matches!(
        order.status,
        Status::Confirmed | Status::Shipped | Status::Delivered
    ) {
        assert!(
            order.paid.is_some() && order.reserved_at.is_some(),
            "goods only for money"
        );
    }
    let complete = order.paid.is_some() && order.reserved_at.is_some();
    assert!(
        !complete || order.confirmed_at.is_some(),
        "confirmed with the second of the pair"
    );
    if let Some((payment, _)) = &order.paid {
        assert_eq!(payment.amount, order.items.total());
    }
    assert!(order.overdue_at.is_none_or(|at| at >= order.pay_by));
    let paid = order.paid.is_some();
    match order.cancelled.as_ref().map(|(cancellation, _)| cancellation.by) {
        Some(CancelledBy::NotPaidInTime) => assert!(!paid && order.overdue_at.is_some()),
        Some(CancelledBy::PaymentFailed) => assert!(!paid),
        Some(CancelledBy::Refund) => assert!(paid),
        Some(CancelledBy::User | CancelledBy::OutOfStock) | None => {}
    }
}

proptest::proptest! {
    #[test]
    fn whatever_is_asked_history_rebuilds_the_order(
        commands in proptest::collection::vec((command(), 0..60i64), 0..20),
        late_start in any::<bool>(),
    ) {
        let mut state = if late_start { None } else { given(PLACED) };
        let mut history: Vec<Event> =
            if late_start { vec![] } else { vec![Event::Placed { order: new_order(), at: time(0) }] };
        for (command, minute) in commands {
            let before = state.clone();
            // A refused command changes nothing.
            let Ok(change) = Change::make(state.clone(), command, time(minute)) else { continue };
            let (order, events) = (change.order().clone(), change.events().to_vec());
            history.extend(events.iter().cloned());

            assert_eq!(order.version, history.len() as i64, "the version counts the events");
            assert_eq!(rebuild(&history).expect("sound").as_ref(), Some(&order));
            let ended = |o: &Order| matches!(o.status, Status::Delivered | Status::Cancelled);
            if before.as_ref().is_some_and(ended) {
                assert!(events.is_empty(), "nothing follows the end");
            }
            assert_sound(&order);
            state = Some(order);
        }
    }
    /// An order's payments are known by their ends: at most one is received, and what ends the order for want of money is only said
    /// when none is. Whatever comes first, in whatever order and how often: who paid has the order, or the money back.
    #[test]
    fn nobody_who_paid_is_cancelled_for_want_of_money(
        tells in proptest::collection::vec((0..5usize, 0..60i64), 0..16),
    ) {
        let mut state = given(PLACED);
        let mut received = false;
        for (tell, minute) in tells {
            let command = ["overdue", "pay", "fail", "refund", "cancel"][tell];
            let before = state.clone();
            received |= command == "pay";
            let order = match Change::make(before.clone(), usual(command), time(minute)) {
                Ok(change) => change.into_order(),
                // Of these, only people and a clock that is early are refused: what payments tell is always taken in.
                Err(refusal) => {
                    assert!(matches!(
                        (command, refusal),
                        ("overdue", Refusal::NotDue) | ("cancel", Refusal::Cancelled)
                    ));
                    continue;
                }
            };
            assert_sound(&order);
            if command == "overdue" {
                assert_eq!(order.status, before.expect("placed").status, "time alone ends nothing");
            }
            if received && order.status != Status::Cancelled {
                assert!(order.paid.is_some(), "money that was received counts");
            }
            state = Some(order);
        }
    }
}
