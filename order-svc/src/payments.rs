//! What payments do to orders: events of `events.payment`, a batch at a time, on the crate `consumer`.
//!
//! payment-svc says how an order's payments end; what that means for the order is decided here, by the domain. The batch's
//! transaction holds the marks, the orders, their events and their outbox rows.

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use contracts::catalogue::payment as types;
use contracts::shop::payment::events::v1 as proto;
use contracts::wire;
use diesel_async::AsyncPgConnection;
use prost::Message as _;
use service::db::DbError;
use service::telemetry;
use uuid::Uuid;

use crate::app::{self, CommandError, Heard, Told};
use crate::domain::{Command, OrderId, Payment};
use crate::store::StoreError;

/// The only major version of the payloads so far.
const SCHEMA_VERSION: i32 = 1;

/// Why a record is no event of a payment.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    #[error("major version {0} of the payload's schema is not known")]
    SchemaVersion(i32),
    #[error("the payload is not what its type says")]
    Payload(#[from] prost::DecodeError),
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
    #[error("the payload is of another payment than the record")]
    OtherPayment,
}

/// Tells orders of their payments.
#[derive(Debug)]
pub struct Payments;

impl Handler for Payments {
    /// What is asked of which order, if anything is.
    type Event = Option<(OrderId, Command)>;
    type Effect = Vec<Heard>;

    fn read(&self, record: &Record) -> Result<Self::Event, BoxError> {
        Ok(parse(record)?)
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> Result<Vec<Heard>, HandlerError> {
        let (positions, told): (Vec<usize>, Vec<Told>) = batch
            .iter()
            .enumerate()
            .filter_map(|(position, incoming)| {
                let (order_id, command) = incoming.event.clone()?;
                let told = Told {
                    order_id,
                    command,
                    event_id: incoming.record.envelope.event_id,
                    span: span(incoming.record),
                };
                Some((position, told))
            })
            .unzip();
        app::hear(connection, told)
            .await
            .map_err(|(told, error)| refused(positions[told], error))
    }

    fn committed(&self, _: &[Incoming<'_, Self::Event>], heard: Vec<Heard>) {
        heard.iter().for_each(Heard::committed);
    }
}

/// What a record asks of which order; nothing when it is of no interest to orders.
///
/// # Errors
/// When the record can never be understood by this code.
fn parse(record: &Record) -> Result<Option<(OrderId, Command)>, EventError> {
    use EventError::Field;
    let envelope = &record.envelope;
    let payload = record.payload.as_slice();
    let event_type = envelope.event_type.as_str();
    if ![types::RECEIVED, types::FAILED, types::REFUNDED].contains(&event_type) {
        return Ok(None);
    }
    if envelope.schema_version != SCHEMA_VERSION {
        return Err(EventError::SchemaVersion(envelope.schema_version));
    }
    let payment = |payment_id: &str| match Uuid::try_parse(payment_id) {
        Ok(id) if payment_id == envelope.entity_id => Ok(id),
        Ok(_) => Err(EventError::OtherPayment),
        Err(_) => Err(Field("payment_id")),
    };
    let order = |order_id: &str| {
        Uuid::try_parse(order_id)
            .map(OrderId)
            .map_err(|_| Field("order_id"))
    };
    match event_type {
        types::RECEIVED => {
            let event = proto::PaymentReceived::decode(payload)?;
            let method = event.payment_method.unwrap_or_default();
            let received = Payment {
                payment_id: payment(&event.payment_id)?,
                amount: wire::money(event.amount.as_ref()).ok_or(Field("amount"))?,
                brand: method.brand,
                last_four: method.last_four,
            };
            Ok(Some((order(&event.order_id)?, Command::RecordPaid(received))))
        }
        types::FAILED => {
            let event = proto::PaymentFailed::decode(payload)?;
            payment(&event.payment_id)?;
            let order = order(&event.order_id)?;
            // Whoever may try again may still pay.
            Ok((!event.another_try).then_some((order, Command::RecordPaymentFailed)))
        }
        _ => {
            let event = proto::PaymentRefunded::decode(payload)?;
            let refunded = Command::RecordRefunded(payment(&event.payment_id)?);
            Ok(Some((order(&event.order_id)?, refunded)))
        }
    }
}

/// The span of what an event leads to: a part of the event's trace, not of the batch's.
fn span(record: &Record) -> tracing::Span {
    let envelope = &record.envelope;
    let span = tracing::info_span!(
        parent: None,
        "hear",
        otel.name = format!("hear {}", envelope.event_type),
        cause.event.id = %envelope.event_id,
        cause.event.r#type = envelope.event_type,
    );
    telemetry::set_parent(
        &span,
        envelope.traceparent.as_deref(),
        envelope.tracestate.as_deref(),
    );
    span
}

/// Tells what would be refused again from what is the database's trouble.
fn refused(position: usize, error: CommandError) -> HandlerError {
    match error {
        // The consumer knows which of these come from the data.
        CommandError::Store(StoreError::Database(DbError::Refused(error) | DbError::Collision(error))) => {
            HandlerError::Database(error)
        }
        CommandError::Store(StoreError::Database(error)) => HandlerError::Transient(error.into()),
        error => HandlerError::permanent(position, error),
    }
}
