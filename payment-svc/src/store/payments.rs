//! Payments, and the work on them that is left.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::dsl::sql;
use diesel::prelude::{
    AsChangeset, ExpressionMethods, Identifiable, Insertable, OptionalExtension, QueryDsl, Queryable,
    QueryableByName, Selectable, SelectableHelper,
};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::sql_types::{BigInt, Bool, Double};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use event_store::{AppendError, Entity, NewEvent, StoredEvent};
use money::{Currency, Money};
use serde::Serialize;
use uuid::Uuid;

use super::schema::{due_in, payments};
use super::{ENTITY_TYPE, Lock, MAX_ROWS, SOURCE, StoreError};
use crate::codec;
use crate::domain::{
    CardSummary, Change, Event, Failure, Method, OrderId, Payment, PaymentId, PaymentMethodId, Reason,
    Status, UserId,
};

/// The index that lets an order have one payment that has not failed.
const ONE_PER_ORDER: &str = "payments_one_per_order";

/// Why something happens to a payment. All that happens for an order is joined by the order's own id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The request or the event.
    pub causation_id: Uuid,
    /// W3C trace context.
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

/// What is kept of an unfinished payment besides its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Part of the keys by which the provider recognises repeats; from 1.
    pub tries: i32,
    /// How often nothing could be learnt.
    pub delays: i32,
    /// What caused what happens next.
    pub cause: Cause,
}

/// A payment as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub payment: Payment,
    pub work: Work,
}

/// A change of a payment's status that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    pub payment_id: PaymentId,
    pub order_id: OrderId,
    pub status: Status,
    /// The payment's version.
    pub version: i64,
    /// Id and type of the event, where the change is one.
    pub event: Option<(Uuid, &'static str)>,
}

/// The payment, if there is one.
///
/// # Errors
/// [`StoreError::Broken`] when the row cannot be a payment's.
pub async fn load_payment(
    conn: &AsyncPgConnection,
    id: PaymentId,
    lock: Lock,
) -> Result<Option<Stored>, StoreError> {
    let query = payments::table
        .find(id.0)
        .select((PaymentRow::as_select(), WorkRow::as_select()));
    let row = match lock {
        Lock::None => query.first(&mut &*conn).await.optional()?,
        Lock::Update => {
            let query = query.for_no_key_update();
            query.first(&mut &*conn).await.optional()?
        }
    };
    row.map(stored).transpose()
}

/// The payments of these orders that have not failed: one at most of each. Their orders' rows are locked by the caller.
///
/// # Errors
/// [`StoreError::Broken`] when a row cannot be a payment's.
pub async fn live_payments(conn: &AsyncPgConnection, orders: &[OrderId]) -> Result<Vec<Stored>, StoreError> {
    let ids: Vec<Uuid> = orders.iter().map(|id| id.0).collect();
    let rows = payments::table
        .filter(payments::order_id.eq_any(ids))
        // Not by a parameter: a plan that is kept could not use the partial index.
        .filter(sql::<Bool>("status <> 'failed'"))
        .select((PaymentRow::as_select(), WorkRow::as_select()))
        .load(&mut &*conn)
        .await?;
    rows.into_iter().map(stored).collect()
}

/// Writes what was done to a payment: its row, its events and their outbox rows, in the caller's transaction, which has locked
/// the order's row. If something is left to be done, it is due in `due`.
///
/// # Errors
/// [`StoreError::Conflict`] when the payment is not as it was before the change, [`StoreError::OtherPayment`] when the order
/// has one already that has not failed.
pub async fn save(
    conn: &AsyncPgConnection,
    change: &Change,
    cause: &Cause,
    due: Duration,
) -> Result<Vec<Fact>, StoreError> {
    let payment = change.payment();
    let row = PaymentRow::from(payment);
    let due = due_in(payment.is_unfinished().then_some(due.as_secs_f64()));
    let state = async {
        let written = match change.before() {
            None => {
                let work = WorkRow::new(cause);
                diesel::insert_into(payments::table)
                    .values((&row, &work, payments::next_step_at.eq(due)))
                    .execute(&mut &*conn)
                    .await
            }
            Some((status, version)) => {
                let target = payments::table
                    .find(payment.id.0)
                    .filter(payments::status.eq(name_of(&STATUSES, status)))
                    .filter(payments::version.eq(version));
                let begins = status != payment.status && payment.status == Status::RefundPending;
                let changes = (
                    &row,
                    payments::next_step_at.eq(due),
                    // A refund has a cause of its own, and begins with patience.
                    begins.then(|| {
                        (
                            payments::delays.eq(0),
                            payments::causation_id.eq(cause.causation_id),
                            payments::traceparent.eq(&cause.traceparent),
                            payments::tracestate.eq(&cause.tracestate),
                        )
                    }),
                );
                diesel::update(target).set(changes).execute(&mut &*conn).await
            }
        };
        match written {
            Ok(1) => Ok(()),
            Ok(_) => Err(StoreError::Conflict(payment.id)),
            Err(error) => Err(refused(error, payment.id)),
        }
    };
    let new_events: Vec<NewEvent> = change
        .events()
        .iter()
        .map(|event| codec::encode(payment.id, event))
        .collect();
    let before = change.before().map_or(0, |(_, version)| version);
    let entity = Entity {
        entity_type: ENTITY_TYPE,
        entity_id: payment.id.to_string(),
        topic: None,
    };
    let caused = event_store::Cause {
        source: SOURCE,
        correlation_id: payment.order_id.0,
        causation_id: Some(cause.causation_id),
        traceparent: cause.traceparent.clone(),
        tracestate: cause.tracestate.clone(),
    };
    let events_and_outbox = async {
        let appended = event_store::append(conn, &entity, before, &new_events, &caused).await;
        appended.map_err(|error| match error {
            AppendError::Conflict => StoreError::Conflict(payment.id),
            AppendError::Database(error) => error.into(),
        })
    };
    let ((), ids) = tokio::try_join!(biased; state, events_and_outbox)?;
    Ok(facts(change, &new_events, &ids))
}

/// Writes payments that have just been started, due at once, in the caller's transaction, which has locked their orders' rows.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn start_all(
    conn: &mut AsyncPgConnection,
    started: &[(Change, Cause)],
) -> Result<Vec<Fact>, StoreError> {
    for started in started.chunks(MAX_ROWS) {
        let rows: Vec<_> = started
            .iter()
            .map(|(change, cause)| {
                let due = payments::next_step_at.eq(due_in(Some(0.0)));
                (PaymentRow::from(change.payment()), WorkRow::new(cause), due)
            })
            .collect();
        // Their ids are fresh and their orders locked, so that no constraint can be in the way.
        diesel::insert_into(payments::table)
            .values(rows)
            .execute(conn)
            .await?;
    }
    Ok(started
        .iter()
        .flat_map(|(change, _)| facts(change, &[], &[]))
        .collect())
}

fn refused(error: DieselError, id: PaymentId) -> StoreError {
    match &error {
        DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, information) => {
            match information.constraint_name() {
                Some(ONE_PER_ORDER) => StoreError::OtherPayment,
                Some("payments_pkey") => StoreError::Conflict(id),
                _ => error.into(),
            }
        }
        _ => error.into(),
    }
}

/// The statuses that a change led through, with the events that led there.
fn facts(change: &Change, new_events: &[NewEvent], ids: &[Uuid]) -> Vec<Fact> {
    let payment = change.payment();
    let fact = |status, version, event| Fact {
        payment_id: payment.id,
        order_id: payment.order_id,
        status,
        version,
        event,
    };
    let before = change.before().map_or(0, |(_, version)| version);
    let mut facts: Vec<Fact> = (before + 1..)
        .zip(change.events())
        .zip(new_events.iter().zip(ids))
        .map(|((version, event), (new, id))| {
            let status = match event {
                Event::Received { .. } => Status::Received,
                Event::Failed { .. } => Status::Failed,
                Event::Refunded { .. } => Status::Refunded,
            };
            fact(status, version, Some((*id, new.event_type)))
        })
        .collect();
    let last = facts.last().map(|fact| fact.status);
    if last.or(change.before().map(|(status, _)| status)) != Some(payment.status) {
        facts.push(fact(payment.status, payment.version, None));
    }
    facts
}

/// A stored event as the domain knows it.
///
/// # Errors
/// [`StoreError::Undecodable`]
pub fn decode(id: PaymentId, stored: &StoredEvent) -> Result<Event, StoreError> {
    codec::decode(id, &stored.event_type, stored.schema_version, &stored.payload).map_err(|source| {
        StoreError::Undecodable {
            id,
            version: stored.version,
            source,
        }
    })
}

/// Says when the next step of a payment is due, and under which counts. Nothing is said of one that is finished.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn reschedule(
    conn: &mut AsyncPgConnection,
    id: PaymentId,
    due: Duration,
    tries: i32,
    delays: i32,
) -> Result<(), StoreError> {
    let target = payments::table
        .find(id.0)
        .filter(payments::next_step_at.is_not_null());
    diesel::update(target)
        .set((
            payments::next_step_at.eq(due_in(Some(due.as_secs_f64()))),
            payments::tries.eq(tries),
            payments::delays.eq(delays),
        ))
        .execute(conn)
        .await?;
    Ok(())
}

/// Makes the next step of an unfinished payment due at once.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn hurry(conn: &mut AsyncPgConnection, id: PaymentId) -> Result<(), StoreError> {
    let target = payments::table
        .find(id.0)
        .filter(payments::next_step_at.is_not_null());
    diesel::update(target)
        .set((
            payments::next_step_at.eq(due_in(Some(0.0))),
            payments::delays.eq(0),
        ))
        .execute(conn)
        .await?;
    Ok(())
}

/// A payment whose next step is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    pub payment_id: PaymentId,
    pub order_id: OrderId,
}

#[derive(QueryableByName)]
struct DueRow {
    #[diesel(sql_type = diesel::sql_types::Uuid)]
    payment_id: Uuid,
    #[diesel(sql_type = diesel::sql_types::Uuid)]
    order_id: Uuid,
}

/// Takes payments: `$1` is the lease in seconds, `$2` the most that are taken. What others are taking is left to them.
///
/// Materialized, since a plan that ran the inner query once per outer row would take more than the limit.
pub const CLAIM_DUE: &str = "WITH due AS MATERIALIZED (
         SELECT payment_id FROM payments WHERE next_step_at <= now()
         ORDER BY next_step_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED)
     UPDATE payments p SET next_step_at = due_in($1) FROM due WHERE p.payment_id = due.payment_id
     RETURNING p.payment_id, p.order_id";

/// Takes payments whose next step is due, at most `limit`. Nobody else takes them before `lease` is over.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn claim_due(
    conn: &mut AsyncPgConnection,
    lease: Duration,
    limit: i64,
) -> Result<Vec<Due>, StoreError> {
    let claimed: Vec<DueRow> = diesel::sql_query(CLAIM_DUE)
        .bind::<Double, _>(lease.as_secs_f64())
        .bind::<BigInt, _>(limit)
        .load(conn)
        .await?;
    let due = |row: DueRow| Due {
        payment_id: PaymentId(row.payment_id),
        order_id: OrderId(row.order_id),
    };
    Ok(claimed.into_iter().map(due).collect())
}

/// The unfinished payments as a whole.
#[derive(Debug, Clone, Copy, PartialEq, QueryableByName)]
pub struct Unfinished {
    #[diesel(sql_type = BigInt)]
    pub count: i64,
    /// How long the oldest of them has been in its status; 0 when there is none.
    #[diesel(sql_type = Double)]
    pub oldest_seconds: f64,
}

/// # Errors
/// Whatever PostgreSQL says.
pub async fn unfinished(conn: &mut AsyncPgConnection) -> Result<Unfinished, StoreError> {
    let summary = diesel::sql_query(
        "SELECT count(*) AS count,
                greatest(coalesce(extract(epoch FROM now() - min(updated_at)), 0), 0)::double precision AS oldest_seconds
         FROM payments WHERE next_step_at IS NOT NULL",
    );
    Ok(summary.get_result(conn).await?)
}

/// The payments that have these charges at the provider.
///
/// # Errors
/// [`StoreError::Broken`] when a row cannot be a payment's.
pub async fn of_intents(conn: &mut AsyncPgConnection, intents: &[&str]) -> Result<Vec<Payment>, StoreError> {
    let rows = payments::table
        .filter(payments::intent.eq_any(intents))
        .select(PaymentRow::as_select())
        .load(conn)
        .await?;
    rows.into_iter().map(PaymentRow::into_payment).collect()
}

/// Payments in the order of their ids, at most `limit`.
///
/// # Errors
/// [`StoreError::Broken`] when a row cannot be a payment's.
pub async fn payments_after(
    conn: &mut AsyncPgConnection,
    after: Uuid,
    limit: i64,
) -> Result<Vec<Payment>, StoreError> {
    let rows = PaymentRow::after(conn, after, limit).await?;
    rows.into_iter().map(PaymentRow::into_payment).collect()
}

/// A payment's state as a row.
#[derive(
    Debug, Clone, PartialEq, Eq, Queryable, Selectable, Identifiable, Insertable, AsChangeset, Serialize,
)]
#[diesel(table_name = payments)]
#[diesel(primary_key(payment_id))]
#[diesel(treat_none_as_null = true)]
// NULL rather than DEFAULT, with which diesel would prepare every insert anew.
#[diesel(treat_none_as_default_value = false)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub(crate) struct PaymentRow {
    pub(crate) payment_id: Uuid,
    pub(crate) version: i64,
    order_id: Uuid,
    user_id: Uuid,
    amount_minor_units: i64,
    currency: String,
    payment_method_id: Option<Uuid>,
    brand: Option<String>,
    last_four: Option<String>,
    status: String,
    intent: Option<String>,
    refund: Option<String>,
    failure_reason: Option<String>,
    another_try: Option<bool>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// The work that is left, but for when it is due.
#[derive(Debug, Queryable, Selectable, Insertable)]
#[diesel(table_name = payments)]
#[diesel(treat_none_as_default_value = false)]
#[diesel(check_for_backend(diesel::pg::Pg))]
struct WorkRow {
    tries: i32,
    delays: i32,
    causation_id: Uuid,
    traceparent: Option<String>,
    tracestate: Option<String>,
}

impl WorkRow {
    fn new(cause: &Cause) -> Self {
        Self {
            tries: 1,
            delays: 0,
            causation_id: cause.causation_id,
            traceparent: cause.traceparent.clone(),
            tracestate: cause.tracestate.clone(),
        }
    }
}

fn stored((payment, work): (PaymentRow, WorkRow)) -> Result<Stored, StoreError> {
    Ok(Stored {
        payment: payment.into_payment()?,
        work: Work {
            tries: work.tries,
            delays: work.delays,
            cause: Cause {
                causation_id: work.causation_id,
                traceparent: work.traceparent,
                tracestate: work.tracestate,
            },
        },
    })
}

const STATUSES: [(Status, &str); 5] = [
    (Status::Pending, "pending"),
    (Status::Received, "received"),
    (Status::Failed, "failed"),
    (Status::RefundPending, "refund_pending"),
    (Status::Refunded, "refunded"),
];

const REASONS: [(Reason, &str); 10] = [
    (Reason::Declined, "declined"),
    (Reason::InsufficientFunds, "insufficient_funds"),
    (Reason::ExpiredCard, "expired_card"),
    (Reason::IncorrectCardDetails, "incorrect_card_details"),
    (Reason::CardBlocked, "card_blocked"),
    (Reason::AuthenticationRequired, "authentication_required"),
    (Reason::UnknownPaymentMethod, "unknown_payment_method"),
    (Reason::NotSupported, "not_supported"),
    (Reason::OrderCancelled, "order_cancelled"),
    (Reason::NotPaidInTime, "not_paid_in_time"),
];

fn name_of<T: Copy + PartialEq>(names: &[(T, &'static str)], value: T) -> &'static str {
    names
        .iter()
        .find(|(known, _)| *known == value)
        .map_or("", |(_, name)| name)
}

fn value_of<T: Copy>(names: &[(T, &'static str)], name: &str) -> Option<T> {
    names
        .iter()
        .find(|(_, known)| *known == name)
        .map(|(value, _)| *value)
}

impl Status {
    /// Its name, as it is stored and counted.
    pub(crate) fn name(self) -> &'static str {
        name_of(&STATUSES, self)
    }
}

impl From<&Payment> for PaymentRow {
    fn from(payment: &Payment) -> Self {
        let method = payment.method.as_ref();
        Self {
            payment_id: payment.id.0,
            version: payment.version,
            order_id: payment.order_id.0,
            user_id: payment.user_id.0,
            amount_minor_units: payment.amount.minor_units(),
            currency: payment.amount.currency().code().to_owned(),
            payment_method_id: method.map(|method| method.id.0),
            brand: method.map(|method| method.card.brand.clone()),
            last_four: method.map(|method| method.card.last_four.clone()),
            status: payment.status.name().to_owned(),
            intent: payment.intent.clone(),
            refund: payment.refund.clone(),
            failure_reason: payment
                .failure
                .map(|failure| name_of(&REASONS, failure.reason).to_owned()),
            another_try: payment.failure.map(|failure| failure.another_try),
            created_at: payment.created_at,
            updated_at: payment.updated_at,
        }
    }
}

impl PaymentRow {
    /// Rows in the order of their ids, at most `limit`.
    pub(crate) async fn after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<Self>> {
        payments::table
            .filter(payments::payment_id.gt(after))
            .order(payments::payment_id)
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
            .await
    }

    pub(crate) fn into_payment(self) -> Result<Payment, StoreError> {
        let id = PaymentId(self.payment_id);
        let broken = |column| StoreError::Broken { id, column };
        let currency = Currency::from_code(&self.currency).ok_or(broken("currency"))?;
        let method = match (self.payment_method_id, self.brand, self.last_four) {
            (Some(method_id), Some(brand), Some(last_four)) => Some(Method {
                id: PaymentMethodId(method_id),
                card: CardSummary { brand, last_four },
            }),
            (None, None, None) => None,
            _ => return Err(broken("payment_method_id")),
        };
        let failure = match (self.failure_reason, self.another_try) {
            (Some(reason), Some(another_try)) => Some(Failure {
                reason: value_of(&REASONS, &reason).ok_or(broken("failure_reason"))?,
                another_try,
            }),
            (None, None) => None,
            _ => return Err(broken("failure_reason")),
        };
        Ok(Payment {
            id,
            order_id: OrderId(self.order_id),
            user_id: UserId(self.user_id),
            amount: Money::new(self.amount_minor_units, currency).ok_or(broken("amount_minor_units"))?,
            method,
            status: value_of(&STATUSES, &self.status).ok_or(broken("status"))?,
            version: self.version,
            intent: self.intent,
            failure,
            refund: self.refund,
            created_at: self.created_at,
            updated_at: self.updated_at,
        })
    }
}
