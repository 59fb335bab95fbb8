//! Brings one payment on, step by step, until it is settled or the provider has to be asked again later.
//!
//! A step is a transaction that decides, and a call to the provider outside of any transaction. What the provider says is
//! brought into the next step's transaction, which locks the order and the payment and decides anew: so it does not matter how
//! many drivers there are, or where one of them was killed. What is to be called, and under which key, is stored before the call.

use std::convert::Infallible;
use std::time::Duration;

use chrono::{DateTime, SubsecRound as _, Utc};
use diesel_async::AsyncPgConnection;
use rand::Rng as _;
use service::admin::Check;
use service::db::Db;
use service::deadline::Deadline;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;

use crate::domain::{ChargeState, Failure, KnownOrder, Payment, Reason, RefundState, Seen, Step, take_turn};
use crate::facts::Facts;
use crate::failpoints::{self, pass};
use crate::provider::{
    CallError, Charge, Decline, DeclineReason, Intent, IntentId, IntentState, MethodToken, Provider, Refund,
    RefundStatus,
};
use crate::store::{self, Due, Fact, Lock, StoreError, Stored};

/// Steps that a driver takes in one go. An ordinary payment has three; many more mean that the provider goes round in circles.
const STEPS: usize = 12;

/// How long a step may wait for a connection.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a provider that did not let us in is asked whether it does now.
const KNOCK_EVERY: Duration = Duration::from_secs(5);

/// Whether the provider lets us in, for readiness.
#[derive(Debug, Clone)]
pub struct Access(Check);

impl Access {
    /// Supposes that it does, until it has said otherwise.
    pub fn new(check: Check) -> Self {
        check.set(Ok(()));
        Self(check)
    }

    /// Asks a provider that has shut us out until it lets us in: a replica that is not ready gets no calls from which to learn it.
    pub async fn watch(self, provider: Provider) -> Result<(), Infallible> {
        loop {
            tokio::time::sleep(KNOCK_EVERY).await;
            if !self.0.holds() {
                let answer = provider.list_intents(None, 1).await;
                self.saw(&answer);
            }
        }
    }

    /// Learns from an answer.
    pub fn saw<T>(&self, answer: &Result<T, CallError>) {
        match answer {
            Err(error @ CallError::Unauthorized) => {
                tracing::error!(error = %chain(error), "no payment can be taken or given back");
                self.0.set(Err(error.to_string()));
            }
            // Tells nothing about the key.
            Err(CallError::Unknown(_)) => {}
            Ok(_) | Err(_) => self.0.set(Ok(())),
        }
    }
}

/// When to come back to a payment.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long a payment belongs to a driver, from step to step.
    pub lease: Duration,
    /// First and longest pause before the provider is asked again.
    pub retry: (Duration, Duration),
}

impl Pace {
    /// The pause after nothing could be learnt `delays` times in a row before.
    fn pause(&self, delays: i32) -> Duration {
        let (first, longest) = self.retry;
        let doublings = u32::try_from(delays).unwrap_or(0).min(20);
        let pause = first.saturating_mul(1 << doublings).min(longest);
        // So that payments that were held up together do not come back together.
        pause.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// Brings payments on. Clones share everything.
#[derive(Debug, Clone)]
pub struct Driver {
    db: Db,
    provider: Provider,
    access: Access,
    facts: Facts,
    pace: Pace,
}

/// What a step's transaction has decided.
struct Turn {
    payment: Payment,
    step: Step,
    tries: i32,
    delays: i32,
    /// The provider's id of the method, for the step that makes a charge.
    token: Option<MethodToken>,
    order_was_cancelled: bool,
    facts: Vec<Fact>,
}

/// What a step's transaction is given.
struct Input {
    due: Due,
    seen: Seen,
    /// A charge that was just made.
    made: Option<IntentId>,
    pace: Pace,
}

/// What came of a call.
enum Learnt {
    Made(IntentId, Seen),
    Seen(Seen),
    /// Nothing. A charge that is made under a new key next time does no harm, since it is not confirmed.
    Nothing,
}

impl Driver {
    pub fn new(db: Db, provider: Provider, access: Access, facts: Facts, pace: Pace) -> Self {
        Self {
            db,
            provider,
            access,
            facts,
            pace,
        }
    }

    /// How long a payment belongs to whoever brings it on.
    pub fn lease(&self) -> Duration {
        self.pace.lease
    }

    /// Brings a payment on as far as it goes. It may be unfinished then: its next step is stored, and due later. Between two
    /// steps it ends when `stop` is cancelled. Must not be dropped midway, for the sake of its transactions.
    ///
    /// # Errors
    /// Whatever keeps the database from working; the payment is brought on when its lease is over.
    pub async fn drive(&self, due: Due, stop: &CancellationToken) -> Result<Payment, StoreError> {
        let mut seen = Seen::Nothing;
        let mut made = None;
        for _ in 0..STEPS {
            let pace = self.pace;
            let has_made = made.is_some();
            let turn = self
                .turn(Input {
                    due,
                    seen,
                    made,
                    pace,
                })
                .await?;
            if has_made {
                pass(failpoints::INTENT_STORED);
            }
            match turn.step {
                Step::Done | Step::Wait => return Ok(turn.payment),
                Step::Receive | Step::Fail(_) => pass(failpoints::OUTCOME_STORED),
                Step::CompleteRefund(_) => pass(failpoints::REFUND_OUTCOME_STORED),
                _ => {}
            }
            if !turn.payment.is_unfinished() || stop.is_cancelled() {
                return Ok(turn.payment);
            }
            if matches!(turn.step, Step::Receive) {
                // Received after its order was cancelled: on with giving it back.
                (made, seen) = (None, Seen::Nothing);
                continue;
            }
            match self.call(&turn).await {
                Learnt::Made(intent, state) => (made, seen) = (Some(intent), state),
                Learnt::Seen(state) => (made, seen) = (None, state),
                Learnt::Nothing => {
                    self.postpone(due, &turn).await?;
                    return Ok(turn.payment);
                }
            }
        }
        tracing::error!(entity.id = %due.payment_id, "a payment goes round in circles");
        let pace = self.pace;
        let turn = self
            .turn(Input {
                due,
                seen,
                made,
                pace,
            })
            .await?;
        self.postpone(due, &turn).await?;
        Ok(turn.payment)
    }

    async fn turn(&self, input: Input) -> Result<Turn, StoreError> {
        let deadline = Deadline::after(PATIENCE);
        let mut turn = self
            .db
            .transaction(deadline, &input, |conn, input| Box::pin(turn(conn, input)))
            .await?;
        self.facts.committed(&std::mem::take(&mut turn.facts));
        Ok(turn)
    }

    async fn postpone(&self, due: Due, turn: &Turn) -> Result<(), StoreError> {
        let input = (due, turn, self.pace);
        let deadline = Deadline::after(PATIENCE);
        self.db
            .transaction(deadline, &input, |conn, (due, turn, pace)| {
                Box::pin(postpone(conn, *due, turn, *pace))
            })
            .await
    }

    async fn call(&self, turn: &Turn) -> Learnt {
        let payment = &turn.payment;
        let key = |step: &str| format!("{}-{step}-{}", payment.id, turn.tries);
        let intent = payment.intent.as_deref().map(IntentId::new);
        match (&turn.step, intent) {
            (Step::Create, _) => {
                let Some(method) = turn.token.clone() else {
                    return Learnt::Nothing;
                };
                let charge = Charge {
                    amount: payment.amount,
                    method,
                    payment_id: payment.id.0,
                    order_id: payment.order_id.0,
                };
                pass(failpoints::BEFORE_CREATE);
                let answer = self.provider.create_intent(&key("create"), &charge).await;
                pass(failpoints::AFTER_CREATE);
                self.access.saw(&answer);
                match answer {
                    Ok(intent) => match state_of(payment, &intent) {
                        Some(seen) => Learnt::Made(intent.id, seen),
                        None => Learnt::Nothing,
                    },
                    Err(CallError::Refused { code, decline }) => {
                        tracing::warn!(
                            entity.id = %payment.id, provider.code = code,
                            "the provider refuses to make a charge"
                        );
                        Learnt::Seen(Seen::Refused(failure(decline)))
                    }
                    Err(error) => nothing(turn, "the making of a charge", &error),
                }
            }
            (Step::Ask, Some(intent)) => {
                let answer = self.provider.intent(&intent).await;
                self.learn(turn, "a charge's state", answer)
            }
            (Step::Confirm, Some(intent)) => {
                pass(failpoints::BEFORE_CONFIRM);
                let answer = self.provider.confirm_intent(&key("confirm"), &intent).await;
                pass(failpoints::AFTER_CONFIRM);
                if let Err(CallError::Refused { code, decline }) = &answer {
                    tracing::warn!(
                        entity.id = %payment.id, provider.code = code,
                        "the provider refuses to confirm a charge"
                    );
                    return Learnt::Seen(Seen::Unconfirmable(failure(*decline)));
                }
                self.learn(turn, "the confirmation of a charge", answer)
            }
            (Step::Cancel(reason), Some(intent)) => {
                let answer = self.provider.cancel_intent(&key("cancel"), &intent).await;
                match self.learn(turn, "the cancellation of a charge", answer) {
                    // Cancelled for this reason.
                    Learnt::Seen(Seen::Charge(ChargeState::Canceled)) => {
                        Learnt::Seen(Seen::Charge(ChargeState::Declined(*reason)))
                    }
                    learnt => learnt,
                }
            }
            (Step::AskRefund, Some(intent)) => {
                let answer = self.provider.refunds(&intent).await;
                self.access.saw(&answer);
                match answer {
                    Ok(refunds) => Learnt::Seen(Seen::Refund(refund_state(payment, &refunds))),
                    Err(error) => nothing(turn, "a charge's refunds", &error),
                }
            }
            (Step::Refund, Some(intent)) => {
                pass(failpoints::BEFORE_REFUND);
                let answer = self.provider.refund(&key("refund"), &intent, payment.id.0).await;
                pass(failpoints::AFTER_REFUND);
                self.access.saw(&answer);
                match answer {
                    // One that the bank did not take back is made again, and not at once.
                    Ok(refund) if refund.status == RefundStatus::Failed => {
                        tracing::warn!(entity.id = %payment.id, "a refund failed, and is tried again");
                        Learnt::Nothing
                    }
                    // The rest of a charge of which somebody gave back a part: all of its refunds have to be looked at.
                    Ok(refund) if refund.amount < payment.amount.minor_units() => {
                        Learnt::Seen(Seen::Refund(RefundState::Processing))
                    }
                    Ok(refund) => Learnt::Seen(Seen::Refund(refund_state(payment, &[refund]))),
                    Err(error) => nothing(turn, "a refund", &error),
                }
            }
            // Such a step is never decided.
            _ => Learnt::Nothing,
        }
    }

    fn learn(&self, turn: &Turn, what: &'static str, answer: Result<Intent, CallError>) -> Learnt {
        self.access.saw(&answer);
        match answer {
            Ok(intent) => match (state_of(&turn.payment, &intent), &turn.step) {
                // As it was before: asking again at once would bring nothing new.
                (Some(Seen::Charge(ChargeState::Unconfirmed)), Step::Confirm | Step::Cancel(_)) => {
                    Learnt::Nothing
                }
                (Some(seen), _) => Learnt::Seen(seen),
                (None, _) => Learnt::Nothing,
            },
            Err(error) => nothing(turn, what, &error),
        }
    }
}

/// Notes that nothing was learnt; loudly if it is a defect, and not at every try if it is not.
fn nothing(turn: &Turn, what: &'static str, error: &CallError) -> Learnt {
    let id = turn.payment.id;
    match error {
        CallError::KeyReused | CallError::Refused { .. } => {
            tracing::error!(entity.id = %id, error = %chain(error), "{what}: the provider does not go along");
        }
        CallError::Unknown(_) if turn.delays == 0 => {
            tracing::warn!(entity.id = %id, error = %chain(error), "{what} is not known: the provider is asked later");
        }
        CallError::Unknown(_) => {
            tracing::debug!(entity.id = %id, error = %chain(error), "{what} is still not known");
        }
        // Logged where it is noticed.
        CallError::Unauthorized => {}
    }
    Learnt::Nothing
}

/// What an answer says of this payment's charge; nothing if it is of another one.
fn state_of(payment: &Payment, intent: &Intent) -> Option<Seen> {
    let is_ours = intent.payment_id == Some(payment.id.0)
        && intent.amount == payment.amount.minor_units()
        && intent.currency == payment.amount.currency().code()
        && payment
            .intent
            .as_ref()
            .is_none_or(|known| known == intent.id.as_str());
    if !is_ours {
        tracing::error!(
            entity.id = %payment.id, provider.intent = %intent.id,
            "the provider's charge is not what this payment asked for"
        );
        return None;
    }
    Some(match intent.state {
        IntentState::RequiresConfirmation => Seen::Charge(ChargeState::Unconfirmed),
        IntentState::Processing => Seen::Charge(ChargeState::Processing),
        IntentState::Succeeded => Seen::Charge(ChargeState::Taken),
        IntentState::Declined(decline) => Seen::Charge(ChargeState::Declined(failure(decline))),
        IntentState::RequiresPaymentMethod => Seen::Charge(ChargeState::Declined(Failure {
            reason: Reason::Declined,
            another_try: true,
        })),
        // Its customer is not here to be asked.
        IntentState::RequiresAction => Seen::Unconfirmable(Failure {
            reason: Reason::AuthenticationRequired,
            another_try: true,
        }),
        IntentState::Canceled => Seen::Charge(ChargeState::Canceled),
    })
}

fn failure(decline: Decline) -> Failure {
    let reason = match decline.reason {
        DeclineReason::Declined => Reason::Declined,
        DeclineReason::InsufficientFunds => Reason::InsufficientFunds,
        DeclineReason::ExpiredCard => Reason::ExpiredCard,
        DeclineReason::IncorrectCardDetails => Reason::IncorrectCardDetails,
        DeclineReason::CardBlocked => Reason::CardBlocked,
        DeclineReason::AuthenticationRequired => Reason::AuthenticationRequired,
        DeclineReason::NotSupported => Reason::NotSupported,
    };
    Failure {
        reason,
        another_try: decline.another_try,
    }
}

/// What the refunds of a charge amount to. Only the whole is ever given back.
fn refund_state(payment: &Payment, refunds: &[Refund]) -> RefundState {
    let done = || {
        refunds
            .iter()
            .filter(|refund| refund.status == RefundStatus::Succeeded)
    };
    // Somebody may have given back a part by hand: then the provider's next refund is of the rest.
    let given_back: i64 = done().map(|refund| refund.amount).fold(0, i64::saturating_add);
    let pending = refunds
        .iter()
        .any(|refund| refund.status == RefundStatus::Pending);
    match done().next() {
        Some(refund) if given_back >= payment.amount.minor_units() => {
            RefundState::Done(refund.id.to_string())
        }
        _ if pending => RefundState::Processing,
        _ => RefundState::None,
    }
}

/// The order and then the payment, locked in one round trip.
async fn lock(
    conn: &AsyncPgConnection,
    due: Due,
) -> Result<(Option<KnownOrder>, Option<Stored>), StoreError> {
    tokio::try_join!(
        biased;
        store::load_order(conn, due.order_id, Lock::Update),
        store::load_payment(conn, due.payment_id, Lock::Update),
    )
}

async fn turn(conn: &mut AsyncPgConnection, input: &Input) -> Result<Turn, StoreError> {
    let Due { payment_id, order_id } = input.due;
    let (order, stored) = lock(conn, input.due).await?;
    let order = order.ok_or(StoreError::NoOrder(payment_id))?;
    let stored = stored.ok_or(StoreError::Conflict(payment_id))?;
    let (delays, cause) = (stored.work.delays, stored.work.cause);
    let before = stored.payment.clone();
    let made = input.made.as_ref().map(IntentId::as_str);
    let turn = take_turn(stored.payment, &order, &input.seen, made, now())
        .map_err(|_| StoreError::Conflict(payment_id))?;
    let (change, step) = (turn.change, turn.step);
    if turn.closes_order {
        store::close_order(conn, order_id).await?;
    }
    let tries = stored.work.tries + i32::from(turn.needs_new_key);
    let (due, delays_now) = match step {
        Step::Wait => (input.pace.pause(delays), delays.saturating_add(1)),
        _ => (input.pace.lease, delays),
    };
    let token = match (&step, &change.payment().method) {
        (Step::Create, Some(method)) => store::find_method(conn, method.id)
            .await?
            .map(|known| MethodToken::new(known.provider_token)),
        _ => None,
    };
    let facts = if *change.payment() == before {
        Vec::new()
    } else {
        store::save(conn, &change, &cause, due).await?
    };
    if change.payment().status == before.status && step != Step::Done {
        store::reschedule(conn, payment_id, due, tries, delays_now).await?;
    }
    Ok(Turn {
        payment: change.into_payment(),
        step,
        tries,
        delays,
        token,
        order_was_cancelled: order.cancelled,
        facts,
    })
}

async fn postpone(conn: &mut AsyncPgConnection, due: Due, turn: &Turn, pace: Pace) -> Result<(), StoreError> {
    let (order, stored) = lock(conn, due).await?;
    let Some(stored) = stored else {
        return Ok(());
    };
    let delays = stored.work.delays;
    // What is to be done may be another thing now, and then need not wait.
    let overtaken = order.is_some_and(|order| order.cancelled != turn.order_was_cancelled);
    let pause = if overtaken {
        Duration::ZERO
    } else {
        pace.pause(delays)
    };
    let tries = match turn.step {
        Step::Create => stored.work.tries.max(turn.tries + 1),
        _ => stored.work.tries,
    };
    store::reschedule(conn, due.payment_id, pause, tries, delays.saturating_add(1)).await
}

/// The time, as exactly as PostgreSQL keeps it.
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}
