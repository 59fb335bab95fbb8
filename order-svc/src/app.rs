//! What order-svc does: a function per command and per query.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use contracts::shop::order::v1 as proto;
use diesel_async::AsyncPgConnection;
use event_store::{Cause, StoredEvent};
use service::command::Commands;
use service::db::{Db, DbError, TransactionError};
use service::deadline::Deadline;
use service::requests::{self, Claim, RequestError, RequestKey};
use service::telemetry;
use tracing::{Instrument as _, Span};
use uuid::Uuid;

use crate::domain::{
    Change, Command, Items, NewOrder, Order, OrderId, PaymentMethodId, Refusal, Shipment, UserId,
};
use crate::store::{self, Due, Lock, Recorded, StoreError};

/// The source in the envelopes of this service's events.
const SOURCE: &str = "/order-svc";

/// Why a command or a query did not succeed. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("there is no such order")]
    NotFound,
    #[error("the order is at another version than expected")]
    VersionMismatch,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<DbError> for CommandError {
    fn from(error: DbError) -> Self {
        Self::Store(error.into())
    }
}

impl TransactionError for CommandError {
    fn database(&self) -> Option<&DbError> {
        match self {
            Self::Request(RequestError::Database(error)) | Self::Store(StoreError::Database(error)) => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// A valid PlaceOrder.
#[derive(Debug)]
pub struct PlaceOrder {
    pub request: RequestKey,
    pub user_id: UserId,
    pub items: Items,
    pub user_email: Option<String>,
    pub payment_method_id: Option<PaymentMethodId>,
}

/// A valid CancelOrder.
#[derive(Debug)]
pub struct CancelOrder {
    pub request: RequestKey,
    pub user_id: UserId,
    pub order_id: OrderId,
    pub reason: String,
    /// The version that the order must be at, if that matters.
    pub expected_version: Option<i64>,
}

/// A valid ShipOrder.
#[derive(Debug)]
pub struct ShipOrder {
    pub request: RequestKey,
    pub order_id: OrderId,
    pub shipment: Shipment,
    /// The version that the order must be at, if that matters.
    pub expected_version: Option<i64>,
}

/// A valid MarkDelivered.
#[derive(Debug)]
pub struct MarkDelivered {
    pub request: RequestKey,
    pub order_id: OrderId,
    /// The version that the order must be at, if that matters.
    pub expected_version: Option<i64>,
}

/// The commands and queries on orders. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Orders {
    db: Db,
    commands: Commands,
    pay_within: TimeDelta,
}

impl Orders {
    /// `pay_within` is how long users have to pay.
    pub fn new(db: Db, commands: Commands, pay_within: Duration) -> Self {
        Self {
            db,
            commands,
            pay_within: TimeDelta::from_std(pay_within).unwrap_or(TimeDelta::MAX),
        }
    }

    /// Places an order.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn place(
        &self,
        deadline: Deadline,
        command: PlaceOrder,
    ) -> Result<proto::PlaceOrderResponse, CommandError> {
        // Chosen here, so that it stays the same when the transaction has to be begun again.
        let id = OrderId(Uuid::now_v7());
        let input = (command, id, self.pay_within);
        let db = self.db.clone();
        let command = async move {
            loop {
                let done = db.transaction(deadline, &input, |conn, (command, id, pay_within)| {
                    Box::pin(place(conn, command, *id, *pay_within))
                });
                match done.await {
                    Err(CommandError::Request(RequestError::Recorded)) => {}
                    done => return Ok(done?.committed()),
                }
                let stored = db.read(deadline, &input.0.request, |conn, request| {
                    Box::pin(async { Ok::<_, CommandError>(requests::find(conn, request).await?) })
                });
                // It may have been cleaned away between the two: then it is a new one.
                if let Some(response) = stored.await? {
                    return Ok(response);
                }
            }
        };
        self.commands.run(command).await
    }

    /// Cancels an order of this user.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn cancel(
        &self,
        deadline: Deadline,
        command: CancelOrder,
    ) -> Result<proto::CancelOrderResponse, CommandError> {
        let CancelOrder {
            request,
            user_id,
            order_id,
            reason,
            expected_version,
        } = command;
        let asked = Asked {
            request,
            by: Some(user_id),
            order_id,
            command: Command::Cancel { reason },
            expected_version,
        };
        self.change(deadline, asked, |order| proto::CancelOrderResponse { order })
            .await
    }

    /// Records that an order was shipped.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn ship(
        &self,
        deadline: Deadline,
        command: ShipOrder,
    ) -> Result<proto::ShipOrderResponse, CommandError> {
        let asked = Asked {
            request: command.request,
            by: None,
            order_id: command.order_id,
            command: Command::Ship(command.shipment),
            expected_version: command.expected_version,
        };
        self.change(deadline, asked, |order| proto::ShipOrderResponse { order })
            .await
    }

    /// Records that an order was delivered.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn mark_delivered(
        &self,
        deadline: Deadline,
        command: MarkDelivered,
    ) -> Result<proto::MarkDeliveredResponse, CommandError> {
        let asked = Asked {
            request: command.request,
            by: None,
            order_id: command.order_id,
            command: Command::MarkDelivered,
            expected_version: command.expected_version,
        };
        self.change(deadline, asked, |order| proto::MarkDeliveredResponse { order })
            .await
    }

    async fn change<R>(
        &self,
        deadline: Deadline,
        asked: Asked,
        respond: fn(Option<proto::Order>) -> R,
    ) -> Result<R, CommandError>
    where
        R: prost::Message + Default + 'static,
    {
        let db = self.db.clone();
        let input = (asked, respond);
        let command = async move {
            let done = db.transaction(deadline, &input, |conn, (asked, respond)| {
                Box::pin(change(conn, asked, *respond))
            });
            Ok(done.await?.committed())
        };
        self.commands.run(command).await
    }

    /// Orders that had to be paid by now and are not known to be, after one of them, at most `limit`.
    ///
    /// # Errors
    /// [`CommandError::Store`]
    pub async fn due(
        &self,
        deadline: Deadline,
        after: Option<Due>,
        limit: u16,
    ) -> Result<Vec<Due>, CommandError> {
        let input = (now(), after, limit);
        self.db
            .read(deadline, &input, |conn, &(now, after, limit)| {
                Box::pin(async move { Ok(store::due(conn, now, after, limit).await?) })
            })
            .await
    }

    /// Records that an order is overdue, if nobody else is at it or has done it. Only that: a payment may be under way, so
    /// it is payment-svc that answers this event with what becomes of the order.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn record_overdue(&self, deadline: Deadline, id: OrderId) -> Result<(), CommandError> {
        let db = self.db.clone();
        let command = async move {
            let done = db.transaction(deadline, &id, |conn, id| Box::pin(overdue(conn, *id)));
            done.await?.committed();
            Ok(())
        };
        self.commands.run(command).await
    }

    /// An order of this user.
    ///
    /// # Errors
    /// [`CommandError::NotFound`], also when it is someone else's.
    pub async fn get(&self, deadline: Deadline, user_id: UserId, id: OrderId) -> Result<Order, CommandError> {
        self.db
            .read(deadline, &(user_id, id), |conn, (user_id, id)| {
                Box::pin(find(conn, *user_id, *id))
            })
            .await
    }

    /// Events of an order of this user after a version, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`CommandError::NotFound`], also when it is someone else's.
    pub async fn history(
        &self,
        deadline: Deadline,
        user_id: UserId,
        id: OrderId,
        after_version: i64,
        limit: u16,
    ) -> Result<Vec<StoredEvent>, CommandError> {
        let input = (user_id, id, after_version, limit);
        self.db
            .read(deadline, &input, |conn, &(user_id, id, after, limit)| {
                Box::pin(async move {
                    find(conn, user_id, id).await?;
                    Ok(store::history(conn, id, after, limit).await?)
                })
            })
            .await
    }
}

/// What a transaction leads to if it commits.
struct Done<R> {
    response: R,
    /// None for a repeat, and when nothing had to be done.
    recorded: Vec<Recorded>,
}

impl<R> Done<R> {
    fn repeat(response: R) -> Self {
        Self {
            response,
            recorded: Vec::new(),
        }
    }

    fn committed(self) -> R {
        log(&self.recorded);
        self.response
    }
}

/// Logs what is a fact now, within the current span.
fn log(recorded: &[Recorded]) {
    for Recorded {
        event_id,
        event_type,
        entity_id,
        version,
    } in recorded
    {
        tracing::info!(
            event.id = %event_id,
            event.r#type = event_type,
            entity.r#type = store::ENTITY_TYPE,
            entity.id = %entity_id,
            entity.version = version,
            "recorded {event_type}"
        );
    }
}

/// What an event of another service asks of an order.
#[derive(Debug)]
pub struct Told {
    pub order_id: OrderId,
    pub command: Command,
    /// The event: it causes what is recorded.
    pub event_id: Uuid,
    /// Continues the event's trace.
    pub span: Span,
}

/// What was recorded because of an event of another service.
#[derive(Debug)]
pub struct Heard {
    span: Span,
    recorded: Vec<Recorded>,
}

impl Heard {
    /// Logs it, once it has committed.
    pub fn committed(&self) {
        self.span.in_scope(|| log(&self.recorded));
    }
}

/// Does what events of other services ask, in their order, within the caller's transaction. All their orders are locked before,
/// in the order of their ids: an order is told of by events of several partitions, and so in several transactions at once.
///
/// # Errors
/// Why, and which one could not be done. The transaction must be rolled back.
pub async fn hear(
    conn: &mut AsyncPgConnection,
    told: Vec<Told>,
) -> Result<Vec<Heard>, (usize, CommandError)> {
    if told.is_empty() {
        return Ok(Vec::new());
    }
    let ids: BTreeSet<OrderId> = told.iter().map(|told| told.order_id).collect();
    let mut orders = store::lock(conn, &ids).await.map_err(|error| {
        let is_broken = |told: &Told| matches!(&error, StoreError::Broken { id, .. } if *id == told.order_id);
        (told.iter().position(is_broken).unwrap_or(0), error.into())
    })?;
    let mut heard = Vec::with_capacity(told.len());
    for (position, told) in told.into_iter().enumerate() {
        let order = orders.remove(&told.order_id);
        let cause = told.span.in_scope(|| cause(told.order_id, Some(told.event_id)));
        let now = order.as_ref().map_or_else(now, now_after);
        let change = Change::make(order, told.command, now).map_err(|refusal| (position, refusal.into()))?;
        let recorded = store::save(conn, &change, &cause)
            .instrument(told.span.clone())
            .await
            .map_err(|error| (position, error.into()))?;
        orders.insert(told.order_id, change.into_order());
        heard.push(Heard {
            span: told.span,
            recorded,
        });
    }
    Ok(heard)
}

async fn place(
    conn: &AsyncPgConnection,
    command: &PlaceOrder,
    id: OrderId,
    pay_within: TimeDelta,
) -> Result<Done<proto::PlaceOrderResponse>, CommandError> {
    let now = now();
    let order = NewOrder {
        id,
        user_id: command.user_id,
        items: command.items.clone(),
        user_email: command.user_email.clone(),
        payment_method_id: command.payment_method_id,
        pay_by: now + pay_within,
    };
    let change = Change::make(None, Command::Place(order), now)?;
    let response = proto::PlaceOrderResponse {
        order: Some(change.order().into()),
    };
    let request = async { Ok(requests::record(conn, &command.request, &response).await?) };
    let cause = cause(id, Some(command.request.request_id()));
    let order = async { Ok::<_, CommandError>(store::save(conn, &change, &cause).await?) };
    // Nothing here depends on an answer of the database: one round trip. The request comes first: it waits for the same one in
    // another transaction.
    let ((), recorded) = tokio::try_join!(biased; request, order)?;
    Ok(Done { response, recorded })
}

/// What is asked of an order that there is.
#[derive(Debug)]
struct Asked {
    request: RequestKey,
    /// Whose order it must be, if it is a user who asks.
    by: Option<UserId>,
    order_id: OrderId,
    command: Command,
    expected_version: Option<i64>,
}

async fn change<R: prost::Message + Default>(
    conn: &mut AsyncPgConnection,
    asked: &Asked,
    respond: fn(Option<proto::Order>) -> R,
) -> Result<Done<R>, CommandError> {
    let ticket = match requests::claim(conn, &asked.request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => return Ok(Done::repeat(response)),
    };
    let order = store::load(conn, asked.order_id, Lock::Update)
        .await?
        .filter(|order| asked.by.is_none_or(|user| user == order.user_id))
        .ok_or(CommandError::NotFound)?;
    if asked
        .expected_version
        .is_some_and(|expected| expected != order.version)
    {
        return Err(CommandError::VersionMismatch);
    }
    let now = now_after(&order);
    let change = Change::make(Some(order), asked.command.clone(), now)?;
    let response = respond(Some(change.order().into()));
    let request = async { Ok(ticket.complete(conn, &response).await?) };
    let cause = cause(asked.order_id, Some(asked.request.request_id()));
    let order = async { Ok::<_, CommandError>(store::save(conn, &change, &cause).await?) };
    let ((), recorded) = tokio::try_join!(biased; request, order)?;
    Ok(Done { response, recorded })
}

async fn overdue(conn: &mut AsyncPgConnection, id: OrderId) -> Result<Done<()>, CommandError> {
    let response = ();
    // Whoever holds it is about to change it, most likely to this very effect. If not, it is found again.
    let Some(order) = store::load(conn, id, Lock::UpdateIfFree).await? else {
        return Ok(Done::repeat(response));
    };
    let now = now_after(&order);
    let change = Change::make(Some(order), Command::RecordOverdue, now)?;
    let recorded = store::save(conn, &change, &cause(id, None)).await?;
    Ok(Done { response, recorded })
}

/// The order, if it is this user's.
async fn find(conn: &mut AsyncPgConnection, user_id: UserId, id: OrderId) -> Result<Order, CommandError> {
    store::load(conn, id, Lock::None)
        .await?
        .filter(|order| order.user_id == user_id)
        .ok_or(CommandError::NotFound)
}

/// All that happens to an order is joined by the order's own id. What caused it is the id of a request or of another service's
/// event; nothing when it was time alone.
fn cause(id: OrderId, causation_id: Option<Uuid>) -> Cause {
    let trace = telemetry::current_trace_context();
    Cause {
        source: SOURCE,
        correlation_id: id.0,
        causation_id,
        traceparent: trace.traceparent,
        tracestate: trace.tracestate,
    }
}

/// The time, as exactly as PostgreSQL keeps it.
fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}

/// The same, but not before the order's last event, whatever the clocks of two replicas say.
fn now_after(order: &Order) -> DateTime<Utc> {
    now().max(order.updated_at)
}
