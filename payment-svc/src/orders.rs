//! Events of orders, applied to what payments know of them, a batch at a time; and what follows from them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use service::db::DbError;
use service::telemetry::chain;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::attempt::now;
use crate::codec::{self, DecodeError};
use crate::domain::{
    Change, ChargeAt, Command, Failure, KnownOrder, NewPayment, OrderId, OrderNews, Payment, PaymentId,
    PaymentMethodId, Reaction, Reason, Refusal, Status,
};
use crate::facts::Facts;
use crate::failpoints::{self, pass};
use crate::store::{self, Cause, Fact, KnownMethod, StoreError, Stored};
use crate::waits::Waits;

/// Applies `events.order`.
#[derive(Debug)]
pub struct Orders {
    charge_at: ChargeAt,
    facts: Facts,
    waits: Arc<Waits>,
    wake: Arc<Notify>,
}

/// What a batch did.
#[derive(Debug, Default)]
pub struct Effect {
    facts: Vec<Fact>,
    /// Whether payments are due now.
    is_due: bool,
}

/// Why a record is no event of an order.
#[derive(Debug, thiserror::Error)]
enum RecordError {
    #[error("the order id is not a UUID")]
    OrderId,
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl Orders {
    /// `wake` is notified when payments are due; those who wait for an order are woken when it is known.
    pub fn new(charge_at: ChargeAt, facts: Facts, waits: Arc<Waits>, wake: Arc<Notify>) -> Self {
        Self {
            charge_at,
            facts,
            waits,
            wake,
        }
    }
}

impl Handler for Orders {
    type Event = (OrderId, OrderNews);
    type Effect = Effect;

    fn read(&self, record: &Record) -> Result<Self::Event, BoxError> {
        Ok(read(record)?)
    }

    /// Locks the batch's orders first, in the order of their ids, as everybody does who locks several.
    async fn apply(
        &self,
        conn: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> Result<Effect, HandlerError> {
        let told: Vec<&(OrderId, OrderNews)> = batch.iter().map(|incoming| incoming.event).collect();
        let mut fold = Fold::load(conn, &told).await.map_err(store_error)?;
        for (position, Incoming { record, event }) in batch.iter().enumerate() {
            let (id, news) = event;
            fold.apply(record, *id, news, self.charge_at)
                .map_err(|error| HandlerError::permanent(position, error))?;
        }
        let effect = fold.write(conn).await.map_err(store_error)?;
        pass(failpoints::ORDERS_BEFORE_COMMIT);
        Ok(effect)
    }

    fn committed(&self, batch: &[Incoming<'_, Self::Event>], effect: Effect) {
        self.facts.committed(&effect.facts);
        if effect.is_due {
            self.wake.notify_one();
        }
        for Incoming { event: (id, _), .. } in batch {
            self.waits.wake(id.0);
        }
    }
}

fn read(record: &Record) -> Result<(OrderId, OrderNews), RecordError> {
    let envelope = &record.envelope;
    let id = Uuid::try_parse(&envelope.entity_id).map_err(|_| RecordError::OrderId)?;
    let id = OrderId(id);
    let news = codec::decode_order(id, &envelope.event_type, envelope.schema_version, &record.payload)?;
    Ok((id, news))
}

/// What the database refuses parks. All else is waited out, also a row that cannot be read: an operator has to mend it.
fn store_error(error: StoreError) -> HandlerError {
    match error {
        StoreError::Database(DbError::Refused(error)) => HandlerError::Database(error),
        error => {
            tracing::debug!(error = %chain(&error), "events of orders cannot be applied");
            HandlerError::Transient(error.into())
        }
    }
}

/// A batch on its way into the database.
struct Fold {
    orders: BTreeMap<OrderId, KnownOrder>,
    /// Payments that have not failed, as they were stored.
    stored: BTreeMap<OrderId, Stored>,
    methods: BTreeMap<PaymentMethodId, KnownMethod>,
    /// Begun in this batch.
    started: BTreeMap<OrderId, (Change, Cause)>,
    /// Other changes, in the order of the records.
    changes: Vec<(Change, Cause)>,
    hurried: Vec<PaymentId>,
}

impl Fold {
    async fn load(conn: &mut AsyncPgConnection, told: &[&(OrderId, OrderNews)]) -> Result<Self, StoreError> {
        let mut ids: Vec<OrderId> = told.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        let orders = store::lock_orders(conn, &ids).await?;
        let known: Vec<OrderId> = orders.iter().map(|order| order.id).collect();
        let stored = if known.is_empty() {
            Vec::new()
        } else {
            store::live_payments(conn, &known).await?
        };
        let placed_with = |(_, news): &&(OrderId, OrderNews)| match news {
            OrderNews::Placed {
                payment_method_id, ..
            } => *payment_method_id,
            _ => None,
        };
        let mut wanted: Vec<PaymentMethodId> = told.iter().filter_map(placed_with).collect();
        wanted.extend(orders.iter().filter_map(|order| order.payment_method_id));
        wanted.sort_unstable();
        wanted.dedup();
        let methods = store::find_methods(conn, &wanted).await?;
        Ok(Self {
            orders: orders.into_iter().map(|order| (order.id, order)).collect(),
            stored: stored
                .into_iter()
                .map(|stored| (stored.payment.order_id, stored))
                .collect(),
            methods: methods
                .into_iter()
                .map(|known| (known.method.id, known))
                .collect(),
            started: BTreeMap::new(),
            changes: Vec::new(),
            hurried: Vec::new(),
        })
    }

    fn apply(
        &mut self,
        record: &Record,
        id: OrderId,
        news: &OrderNews,
        charge_at: ChargeAt,
    ) -> Result<(), BoxError> {
        let known = self.orders.remove(&id);
        let was_closed = known.as_ref().is_some_and(|order| order.closed);
        let order = KnownOrder::learn(known, id, record.envelope.version, news)?;
        let reaction = order.react(news, was_closed, self.live(id), charge_at);
        let cause = Cause {
            causation_id: record.envelope.event_id,
            traceparent: record.envelope.traceparent.clone(),
            tracestate: record.envelope.tracestate.clone(),
        };
        match reaction {
            Reaction::Nothing => {}
            Reaction::Charge(method_id) => self.charge(&order, method_id, cause)?,
            Reaction::AnswerNotPaid => {
                let failure = Failure {
                    reason: Reason::NotPaidInTime,
                    another_try: false,
                };
                self.changes.push((failed(&order, failure)?, cause));
            }
            Reaction::Refund => {
                if let Some(stored) = self.stored.get_mut(&id) {
                    let change = Change::of(stored.payment.clone()).refunding(now())?;
                    stored.payment = change.payment().clone();
                    self.changes.push((change, cause));
                }
            }
            // What was started in this batch is due at once anyway.
            Reaction::Hurry => self
                .hurried
                .extend(self.stored.get(&id).map(|stored| stored.payment.id)),
        }
        self.orders.insert(id, order);
        Ok(())
    }

    fn live(&self, id: OrderId) -> Option<&Payment> {
        let started = self.started.get(&id).map(|(change, _)| change.payment());
        started.or_else(|| self.stored.get(&id).map(|stored| &stored.payment))
    }

    fn charge(
        &mut self,
        order: &KnownOrder,
        method_id: PaymentMethodId,
        cause: Cause,
    ) -> Result<(), Refusal> {
        let method = self
            .methods
            .get(&method_id)
            .filter(|known| known.user_id == order.user_id);
        match method {
            Some(known) => {
                let new = NewPayment {
                    method: Some(known.method.clone()),
                    ..payment_of(order)
                };
                self.started.insert(order.id, (Change::start(new, now()), cause));
            }
            None => {
                let failure = Failure {
                    reason: Reason::UnknownPaymentMethod,
                    another_try: !order.closed,
                };
                self.changes.push((failed(order, failure)?, cause));
            }
        }
        Ok(())
    }

    /// Orders first: payments refer to them.
    async fn write(self, conn: &mut AsyncPgConnection) -> Result<Effect, StoreError> {
        let orders: Vec<KnownOrder> = self.orders.into_values().collect();
        store::save_orders(conn, &orders).await?;
        let started: Vec<(Change, Cause)> = self.started.into_values().collect();
        let mut effect = Effect {
            facts: store::start_all(conn, &started).await?,
            is_due: !started.is_empty() || !self.hurried.is_empty(),
        };
        for (change, cause) in &self.changes {
            effect.is_due |= change.payment().status == Status::RefundPending;
            effect
                .facts
                .extend(store::save(conn, change, cause, Duration::ZERO).await?);
        }
        for payment_id in self.hurried {
            store::hurry(conn, payment_id).await?;
        }
        Ok(effect)
    }
}

fn payment_of(order: &KnownOrder) -> NewPayment {
    NewPayment {
        id: PaymentId(Uuid::now_v7()),
        order_id: order.id,
        user_id: order.user_id,
        amount: order.total,
        method: None,
    }
}

/// A payment that fails as it begins.
fn failed(order: &KnownOrder, failure: Failure) -> Result<Change, Refusal> {
    let now = now();
    Change::start(payment_of(order), now).then(Command::Fail(failure), now)
}
