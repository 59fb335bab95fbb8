//! What inventory-svc does: a function per command and per query, and one for the news of orders.

use std::collections::BTreeSet;

use chrono::{DateTime, SubsecRound as _, Utc};
use contracts::shop::inventory::v1 as proto;
use diesel_async::AsyncPgConnection;
use event_store::Cause;
use service::command::Commands;
use service::db::{Db, DbError, TransactionError};
use service::deadline::Deadline;
use service::requests::{self, Claim, RequestError, RequestKey};
use service::telemetry::{self, TraceContext};
use tracing::Span;
use uuid::Uuid;

use crate::domain::reservation::{self, Command};
use crate::domain::{Batch, Changes, OrderId, ProductId, Stock, StockChange, stock};
use crate::store::{self, Lock, Recorded, StoreError};

/// The source in the envelopes of this service's events.
const SOURCE: &str = "/inventory-svc";

/// Why a command or a query did not succeed. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("the stock is at another version than expected")]
    VersionMismatch,
    #[error(transparent)]
    Refused(#[from] stock::Refusal),
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

/// A valid SetStock or AdjustStock.
#[derive(Debug)]
pub struct ChangeStock {
    pub request: RequestKey,
    pub product_id: ProductId,
    pub command: stock::Command,
    /// The version that the stock must be at, if that matters; 0: the product must not be known.
    pub expected_version: Option<i64>,
}

/// The commands and queries on stock. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Inventory {
    db: Db,
    commands: Commands,
}

impl Inventory {
    pub fn new(db: Db, commands: Commands) -> Self {
        Self { db, commands }
    }

    /// SetStock.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn set(
        &self,
        deadline: Deadline,
        command: ChangeStock,
    ) -> Result<proto::SetStockResponse, CommandError> {
        self.change(deadline, command, |stock| proto::SetStockResponse { stock })
            .await
    }

    /// AdjustStock.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn adjust(
        &self,
        deadline: Deadline,
        command: ChangeStock,
    ) -> Result<proto::AdjustStockResponse, CommandError> {
        self.change(deadline, command, |stock| proto::AdjustStockResponse { stock })
            .await
    }

    async fn change<R>(
        &self,
        deadline: Deadline,
        command: ChangeStock,
        respond: fn(Option<proto::Stock>) -> R,
    ) -> Result<R, CommandError>
    where
        R: prost::Message + Default + 'static,
    {
        let db = self.db.clone();
        let input = (command, respond);
        let command = async move {
            let done = db.transaction(deadline, &input, |conn, (command, respond)| {
                Box::pin(change(conn, command, *respond))
            });
            let (response, recorded) = done.await?;
            log(&recorded);
            Ok(response)
        };
        self.commands.run(command).await
    }

    /// The stock of a product.
    ///
    /// # Errors
    /// [`stock::Refusal::Unknown`] when the product is not known.
    pub async fn get(&self, deadline: Deadline, id: ProductId) -> Result<Stock, CommandError> {
        self.db
            .read(deadline, &id, |conn, id| {
                Box::pin(async move {
                    let stock = store::load_stock(conn, *id, Lock::None).await?;
                    Ok(stock.ok_or(stock::Refusal::Unknown)?)
                })
            })
            .await
    }
}

async fn change<R: prost::Message + Default>(
    conn: &mut AsyncPgConnection,
    command: &ChangeStock,
    respond: fn(Option<proto::Stock>) -> R,
) -> Result<(R, Vec<Recorded>), CommandError> {
    let ticket = match requests::claim(conn, &command.request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => return Ok((response, Vec::new())),
    };
    let stock = store::load_stock(conn, command.product_id, Lock::Update).await?;
    let version = stock.as_ref().map_or(0, |stock| stock.version);
    if command
        .expected_version
        .is_some_and(|expected| expected != version)
    {
        return Err(CommandError::VersionMismatch);
    }
    let change = StockChange::make(stock, command.product_id, command.command, now())?;
    let response = respond(Some(change.stock().into()));
    ticket.complete(conn, &response).await?;
    let changes = Changes {
        stock: vec![change],
        ..Changes::default()
    };
    let trace = telemetry::current_trace_context();
    let recorded = store::save(conn, &changes, |_, _, id| {
        cause(id, command.request.request_id(), trace.clone())
    });
    Ok((response, recorded.await?))
}

/// What an event of an order asks of its reservation.
#[derive(Debug)]
pub struct Told {
    pub order_id: OrderId,
    pub command: Command,
    /// The event: it causes what is recorded.
    pub event_id: Uuid,
    /// Continues the event's trace.
    pub span: Span,
}

/// Why news of orders were not taken in. The transaction must be rolled back.
#[derive(Debug, thiserror::Error)]
pub enum HearError {
    #[error("these news cannot be true")]
    Refused {
        /// Which of them, counted from 0.
        position: usize,
        source: reservation::Refusal,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What was recorded because of news of orders.
#[derive(Debug, Default)]
pub struct Heard {
    spans: Vec<Span>,
    recorded: Vec<Recorded>,
}

impl Heard {
    /// Logs it, once it has committed.
    pub fn committed(&self) {
        for recorded in &self.recorded {
            match self.spans.get(recorded.cause) {
                // What is recorded of stock is due to all of the news.
                Some(span) if recorded.entity_type == store::RESERVATION => {
                    span.in_scope(|| log(std::slice::from_ref(recorded)));
                }
                _ => log(std::slice::from_ref(recorded)),
            }
        }
    }
}

/// Decides news of orders in their order, within the caller's transaction. All that they touch is locked before: first their
/// reservations, then the stock of all their products, each in the order of their ids; orders of several batches want the same products.
///
/// # Errors
/// [`HearError`]
pub async fn hear(conn: &mut AsyncPgConnection, told: Vec<Told>) -> Result<Heard, HearError> {
    if told.is_empty() {
        return Ok(Heard::default());
    }
    let orders: BTreeSet<OrderId> = told.iter().map(|told| told.order_id).collect();
    let reservations = store::lock_reservations(conn, &orders).await?;
    let known = reservations.values().flat_map(|reservation| &reservation.lines);
    let placed = told.iter().filter_map(|told| match &told.command {
        Command::Reserve(lines) => Some(lines),
        Command::Commit | Command::Release => None,
    });
    let products: BTreeSet<ProductId> = known
        .chain(placed.flatten())
        .map(|line| line.product_id)
        .collect();
    let stock = store::lock_stock(conn, &products).await?;

    let now = now();
    let mut batch = Batch::new(reservations, stock);
    let mut causes = Vec::with_capacity(told.len());
    let mut spans = Vec::with_capacity(told.len());
    for (position, told) in told.into_iter().enumerate() {
        batch
            .tell(told.order_id, told.command, position, now)
            .map_err(|source| HearError::Refused { position, source })?;
        causes.push((told.event_id, telemetry::trace_context_of(&told.span)));
        spans.push(told.span);
    }
    // Of the whole batch: that of its only event, or one that is linked to each event's.
    let of_batch = telemetry::current_trace_context();
    let changes = batch.finish(now);
    let recorded = store::save(conn, &changes, |news, entity_type, id| {
        let (event_id, trace) = &causes[news];
        let trace = if entity_type == store::RESERVATION {
            trace
        } else {
            &of_batch
        };
        cause(id, *event_id, trace.clone())
    });
    Ok(Heard {
        recorded: recorded.await?,
        spans,
    })
}

/// All that happens to an order is joined by the order's own id, and all that happens to the stock of a product by the product's.
fn cause(id: Uuid, causation_id: Uuid, trace: TraceContext) -> Cause {
    Cause {
        source: SOURCE,
        correlation_id: id,
        causation_id: Some(causation_id),
        traceparent: trace.traceparent,
        tracestate: trace.tracestate,
    }
}

/// Logs what is a fact now, within the current span.
fn log(recorded: &[Recorded]) {
    for Recorded {
        event_id,
        event_type,
        entity_type,
        entity_id,
        version,
        ..
    } in recorded
    {
        tracing::info!(
            event.id = %event_id,
            event.r#type = event_type,
            entity.r#type = entity_type,
            entity.id = %entity_id,
            entity.version = version,
            "recorded {event_type}"
        );
    }
}

/// The time, as exactly as PostgreSQL keeps it.
fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}
