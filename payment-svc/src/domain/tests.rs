use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use money::{Currency, Money};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

const ORDER: OrderId = OrderId(Uuid::from_u128(1));
const USER: UserId = UserId(Uuid::from_u128(2));
const METHOD: PaymentMethodId = PaymentMethodId(Uuid::from_u128(3));

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
}

fn amount(minor_units: i64) -> Money {
    Money::new(minor_units, Currency::from_code("EUR").expect("known")).expect("positive")
}

fn order() -> KnownOrder {
    let news = OrderNews::Placed {
        user_id: USER,
        total: amount(1299),
        payment_method_id: Some(METHOD),
    };
    KnownOrder::learn(None, ORDER, 1, &news).expect("new")
}

fn new_payment() -> NewPayment {
    NewPayment {
        id: PaymentId(Uuid::from_u128(4)),
        order_id: ORDER,
        user_id: USER,
        amount: amount(1299),
        method: Some(Method {
            id: METHOD,
            card: CardSummary {
                brand: "visa".into(),
                last_four: "4242".into(),
            },
        }),
    }
}

fn declined(another_try: bool) -> Failure {
    Failure {
        reason: Reason::Declined,
        another_try,
    }
}

fn with_status(status: Status) -> Payment {
    let pending = Change::start(new_payment(), at(1))
        .with_intent("pi_1")
        .expect("fresh");
    let made = match status {
        Status::Pending => Ok(pending),
        Status::Failed => pending.then(Command::Fail(declined(true)), at(2)),
        Status::Received => pending.then(Command::Receive, at(2)),
        Status::RefundPending => pending
            .then(Command::Receive, at(2))
            .and_then(|c| c.refunding(at(3))),
        Status::Refunded => pending
            .then(Command::Receive, at(2))
            .and_then(|c| c.refunding(at(3)))
            .and_then(|c| c.then(Command::CompleteRefund("re_1".into()), at(4))),
    };
    made.expect("possible").into_payment()
}

#[test]
fn only_what_may_happen_happens() {
    use Status::{Failed, Pending, Received, RefundPending, Refunded};
    for status in Status::ALL {
        let payment = with_status(status);
        let then = |command| {
            Change::of(payment.clone())
                .then(command, at(9))
                .map(|c| c.payment().status)
        };
        assert_eq!(
            then(Command::Receive).ok(),
            (status == Pending).then_some(Received),
            "{status:?}"
        );
        let failed = then(Command::Fail(declined(false)));
        assert_eq!(failed.ok(), (status == Pending).then_some(Failed), "{status:?}");
        let refunded = then(Command::CompleteRefund("re_1".into()));
        assert_eq!(
            refunded.ok(),
            (status == RefundPending).then_some(Refunded),
            "{status:?}"
        );
        let refunding = Change::of(payment.clone())
            .refunding(at(9))
            .map(|c| c.payment().status);
        let expected = match status {
            Received => Ok(RefundPending),
            Pending | Failed => Err(Refusal::NotReceived),
            RefundPending | Refunded => Err(Refusal::Settled(status)),
        };
        assert_eq!(refunding, expected, "{status:?}");
    }
    let no_intent = Change::start(new_payment(), at(1)).then(Command::Receive, at(2));
    assert_eq!(no_intent, Err(Refusal::NoIntent));
    let other = Change::of(with_status(Pending)).with_intent("pi_2");
    assert_eq!(other, Err(Refusal::OtherIntent));
}

#[test]
fn histories_rebuild_and_broken_ones_are_noticed() {
    let begun = Payment::pending(new_payment(), at(1));
    let received = Change::of(with_status(Status::Pending))
        .then(Command::Receive, at(2))
        .expect("possible");
    let refunded = Change::of(with_status(Status::RefundPending))
        .then(Command::CompleteRefund("re_1".into()), at(4))
        .expect("possible");
    let history: Vec<Event> = received
        .events()
        .iter()
        .chain(refunded.events())
        .cloned()
        .collect();
    assert_eq!(
        rebuild(begun.clone(), &history),
        Ok(with_status(Status::Refunded))
    );
    assert!(rebuild(begun.clone(), history.iter().rev()).is_err());
    assert!(rebuild(begun.clone(), [&history[0], &history[0]]).is_err());
    let other = Payment {
        amount: amount(1),
        ..begun
    };
    assert!(rebuild(other, &history).is_err());
}

#[test]
fn nothing_ends_before_it_began() {
    let change = Change::of(with_status(Status::Pending))
        .then(Command::Receive, at(0))
        .expect("possible");
    assert_eq!(change.events()[0].at(), at(1));
}

#[test]
fn an_order_takes_one_payment_of_its_whole_amount() {
    use StartRefusal::{Cancelled, Closed, InProgress, Paid, Refunded, WrongAmount};
    #[track_caller]
    fn check(order: &KnownOrder, minor_units: i64, live: Option<Status>, expect: Result<(), StartRefusal>) {
        assert_eq!(order.may_start(amount(minor_units), live), expect);
    }
    let open = order();
    let closed = KnownOrder {
        closed: true,
        ..open.clone()
    };
    let cancelled = KnownOrder {
        cancelled: true,
        ..closed.clone()
    };
    check(&open, 1299, None, Ok(()));
    check(&open, 1299, Some(Status::Failed), Ok(()));
    check(&open, 1298, None, Err(WrongAmount));
    check(&open, 1299, Some(Status::Pending), Err(InProgress));
    check(&open, 1299, Some(Status::Received), Err(Paid));
    check(&open, 1299, Some(Status::RefundPending), Err(Refunded));
    check(&open, 1299, Some(Status::Refunded), Err(Refunded));
    check(&closed, 1299, None, Err(Closed));
    check(&closed, 1299, Some(Status::Received), Err(Paid));
    for live in [None, Some(Status::Pending), Some(Status::Received)] {
        check(&cancelled, 1299, live, Err(Cancelled));
    }
}

#[test]
fn news_of_an_order_lead_where_they_should() {
    use OrderNews::{Cancelled, Other, Overdue, Reserved};
    let order = order();
    let placed = OrderNews::Placed {
        user_id: USER,
        total: amount(1299),
        payment_method_id: Some(METHOD),
    };
    let (now, later) = (ChargeAt::Placed, ChargeAt::Reserved);
    let react = |news: &OrderNews, was_closed, live: Option<Status>, charge_at| {
        order.react(news, was_closed, live.map(with_status).as_ref(), charge_at)
    };
    assert_eq!(react(&placed, false, None, now), Reaction::Charge(METHOD));
    assert_eq!(react(&placed, false, None, later), Reaction::Nothing);
    assert_eq!(react(&Reserved, false, None, later), Reaction::Charge(METHOD));
    assert_eq!(react(&Reserved, false, None, now), Reaction::Nothing);
    assert_eq!(
        react(&Reserved, false, Some(Status::Received), later),
        Reaction::Nothing
    );
    assert_eq!(react(&Overdue, false, None, now), Reaction::AnswerNotPaid);
    assert_eq!(react(&Overdue, true, None, now), Reaction::Nothing);
    for live in [
        Status::Pending,
        Status::Received,
        Status::RefundPending,
        Status::Refunded,
    ] {
        assert_eq!(
            react(&Overdue, false, Some(live), now),
            Reaction::Nothing,
            "{live:?}"
        );
    }
    assert_eq!(react(&Cancelled, false, None, now), Reaction::Nothing);
    assert_eq!(
        react(&Cancelled, false, Some(Status::Pending), now),
        Reaction::Hurry
    );
    assert_eq!(
        react(&Cancelled, false, Some(Status::Received), now),
        Reaction::Refund
    );
    assert_eq!(
        react(&Cancelled, false, Some(Status::RefundPending), now),
        Reaction::Nothing
    );
    assert_eq!(
        react(&Other, false, Some(Status::Received), now),
        Reaction::Nothing
    );

    assert_eq!(
        KnownOrder::learn(None, ORDER, 2, &Reserved),
        Err(Untold::NotPlaced)
    );
    assert_eq!(
        KnownOrder::learn(Some(order.clone()), ORDER, 2, &placed),
        Err(Untold::Placed)
    );
    let cancelled = KnownOrder::learn(Some(order), ORDER, 2, &Cancelled).expect("known");
    assert!(cancelled.closed && cancelled.cancelled && cancelled.version == 2);
}

/// A provider that does what Stripe does, as far as it matters: an intent takes money at most once, and says so for ever.
#[derive(Debug, Default)]
struct Provider {
    intents: BTreeMap<String, Intent>,
    /// By their keys.
    made: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Intent {
    state: ChargeState,
    taken: u32,
    refunds: Vec<String>,
    /// How the bank answers.
    bank: Bank,
}

#[derive(Debug, Clone, Copy)]
enum Bank {
    Pays,
    Declines {
        another_try: bool,
    },
    /// The provider will not confirm it.
    Unconfirmable,
}

impl Provider {
    /// What a call does, and what its answer would tell.
    fn call(&mut self, step: &Step, payment: &Payment, tries: u32, bank: Bank) -> Answer {
        if *step == Step::Create {
            let next = format!("pi_{}", self.intents.len());
            let id = self.made.entry(format!("create-{tries}")).or_insert(next).clone();
            let intent = self.intents.entry(id.clone()).or_insert(Intent {
                state: ChargeState::Unconfirmed,
                taken: 0,
                refunds: Vec::new(),
                bank,
            });
            return Answer {
                made: Some(id),
                seen: Seen::Charge(intent.state),
            };
        }
        let id = payment.intent.as_ref().expect("stored before");
        let intent = self.intents.get_mut(id).expect("made before");
        let is_open = intent.state == ChargeState::Unconfirmed;
        let seen = match step {
            Step::Ask => Seen::Charge(intent.state),
            Step::Confirm if is_open => match intent.bank {
                Bank::Pays => {
                    intent.taken += 1;
                    intent.state = ChargeState::Taken;
                    Seen::Charge(intent.state)
                }
                Bank::Declines { another_try } => {
                    intent.state = ChargeState::Declined(declined(another_try));
                    Seen::Charge(intent.state)
                }
                Bank::Unconfirmable => Seen::Unconfirmable(Failure {
                    reason: Reason::NotSupported,
                    another_try: true,
                }),
            },
            Step::Confirm => Seen::Charge(intent.state),
            Step::Cancel(failure) => {
                if is_open {
                    intent.state = ChargeState::Canceled;
                }
                match intent.state {
                    ChargeState::Canceled => Seen::Charge(ChargeState::Declined(*failure)),
                    state => Seen::Charge(state),
                }
            }
            Step::AskRefund => Seen::Refund(match intent.refunds.first() {
                Some(id) => RefundState::Done(id.clone()),
                None => RefundState::None,
            }),
            Step::Refund => {
                assert_eq!(intent.taken, 1, "nothing is refunded that was not taken");
                if intent.refunds.is_empty() {
                    intent.refunds.push(format!("re_{id}"));
                    Seen::Refund(RefundState::Done(format!("re_{id}")))
                } else {
                    Seen::Nothing // refused: it was refunded
                }
            }
            other => panic!("{other:?} is no call"),
        };
        Answer { made: None, seen }
    }
}

#[derive(Debug, Clone)]
struct Answer {
    made: Option<String>,
    seen: Seen,
}

#[derive(Debug, Clone)]
enum Driver {
    /// Knows nothing: about to begin, also after it was killed.
    Idle,
    Calling(Step, Payment, u32),
    /// The provider has done it; the answer is on its way.
    Answered(Answer),
}

#[derive(Debug, Clone, Copy)]
enum Act {
    /// A driver does what it would do next.
    Go(usize),
    /// A driver is killed, or its answer is lost.
    Kill(usize),
    /// A request that was given up arrives late.
    Late(usize),
    Cancel,
    Overdue,
    RefundByHand,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0..3usize).prop_map(Act::Go),
        3 => (0..3usize).prop_map(Act::Kill),
        2 => (0..3usize).prop_map(Act::Late),
        1 => Just(Act::Cancel),
        1 => Just(Act::Overdue),
        1 => Just(Act::RefundByHand),
    ]
}

fn bank() -> impl Strategy<Value = Bank> {
    prop_oneof![
        4 => Just(Bank::Pays),
        1 => any::<bool>().prop_map(|another_try| Bank::Declines { another_try }),
        1 => Just(Bank::Unconfirmable),
    ]
}

struct World {
    payment: Payment,
    order: KnownOrder,
    tries: u32,
    provider: Provider,
    drivers: [Driver; 3],
    events: Vec<Event>,
    bank: Bank,
    clock: i64,
}

impl World {
    fn go(&mut self, driver: usize) {
        match std::mem::replace(&mut self.drivers[driver], Driver::Idle) {
            Driver::Idle => self.turn(driver, &Seen::Nothing, None),
            Driver::Calling(step, payment, tries) => {
                let answer = self.provider.call(&step, &payment, tries, self.bank);
                self.drivers[driver] = Driver::Answered(answer);
            }
            Driver::Answered(Answer { made, seen }) => self.turn(driver, &seen, made.as_deref()),
        }
    }

    fn turn(&mut self, driver: usize, seen: &Seen, made: Option<&str>) {
        self.clock += 1;
        let turn = take_turn(self.payment.clone(), &self.order, seen, made, at(self.clock));
        let turn = turn.expect("the module is right");
        match &turn.step {
            Step::Confirm => assert!(!self.order.cancelled, "nobody wants it"),
            Step::Fail(failure) => assert!(!(self.order.closed && failure.another_try), "no more is taken"),
            _ => {}
        }
        self.order.closed |= turn.closes_order;
        self.tries += u32::from(turn.needs_new_key);
        self.events.extend(turn.change.events().iter().cloned());
        self.payment = turn.change.into_payment();
        let calls = !matches!(
            turn.step,
            Step::Done | Step::Wait | Step::Receive | Step::Fail(_) | Step::CompleteRefund(_)
        );
        if calls {
            self.drivers[driver] = Driver::Calling(turn.step, self.payment.clone(), self.tries);
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Go(driver) => self.go(driver),
            Act::Kill(driver) => {
                // What the provider was asked for is asked for under another key next time.
                if matches!(self.drivers[driver], Driver::Calling(Step::Create, ..)) {
                    self.tries += 1;
                }
                self.drivers[driver] = Driver::Idle;
            }
            Act::Late(driver) => {
                if let Driver::Calling(step, payment, tries) = self.drivers[driver].clone() {
                    let _ = self.provider.call(&step, &payment, tries, self.bank);
                }
            }
            Act::Cancel if !self.order.cancelled => {
                let news = OrderNews::Cancelled;
                let learnt = KnownOrder::learn(Some(self.order.clone()), ORDER, 2, &news);
                let was_closed = std::mem::replace(&mut self.order, learnt.expect("known")).closed;
                let live = (self.payment.status != Status::Failed).then_some(&self.payment);
                if self.order.react(&news, was_closed, live, ChargeAt::Placed) == Reaction::Refund {
                    self.refund();
                }
            }
            Act::Overdue => self.order.closed = true,
            Act::RefundByHand if self.payment.status == Status::Received => self.refund(),
            Act::Cancel | Act::RefundByHand => {}
        }
    }

    fn refund(&mut self) {
        let change = Change::of(self.payment.clone()).refunding(at(self.clock));
        self.payment = change.expect("received").into_payment();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever drivers do at once, wherever they are killed, whatever arrives late: at most one charge, and the ledgers agree.
    #[test]
    fn a_payment_charges_once_or_not_at_all(bank in bank(), acts in prop::collection::vec(act(), 0..60)) {
        let begun = Payment::pending(new_payment(), at(0));
        let mut world = World {
            payment: begun.clone(),
            order: order(),
            tries: 1,
            provider: Provider::default(),
            drivers: [Driver::Idle, Driver::Idle, Driver::Idle],
            events: Vec::new(),
            bank,
            clock: 0,
        };
        for act in acts {
            world.act(act);
        }
        // Everything heals: the answers under way come, and somebody goes on to the end.
        for driver in [0, 1, 2].into_iter().cycle().take(60) {
            world.go(driver);
        }
        let payment = &world.payment;
        prop_assert!(!payment.is_unfinished(), "{payment:?}");
        let taken: u32 = world.provider.intents.values().map(|intent| intent.taken).sum();
        let refunds: usize = world.provider.intents.values().map(|intent| intent.refunds.len()).sum();
        let expected = match payment.status {
            Status::Received => (1, 0),
            Status::Refunded => (1, 1),
            _ => (0, 0),
        };
        prop_assert_eq!((taken, refunds), expected, "{:?} {:?}", payment, world.provider);
        if world.order.cancelled {
            prop_assert!(payment.status != Status::Received, "money kept for a cancelled order");
        }
        if let Some(failure) = payment.failure {
            prop_assert!(failure.another_try || world.order.closed, "a last word closes the order");
        }
        let rebuilt = rebuild(begun, &world.events);
        prop_assert_eq!(rebuilt.as_ref(), Ok(payment));
    }
}
