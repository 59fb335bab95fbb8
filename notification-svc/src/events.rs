//! Events of orders, payments and users: what they tell is written, a batch at a time. Nothing is sent here.

use std::sync::Arc;

use consumer::{BoxError, Handler, HandlerError, Incoming, Record};
use diesel_async::AsyncPgConnection;
use service::db::DbError;
use service::telemetry::chain;
use tokio::sync::Notify;

use crate::codec;
use crate::domain::{MailId, News, OrderId};
use crate::failpoints::{self, pass};
use crate::store::{self, StoreError, ToAnswer, Told};

/// Applies `events.order`, `events.payment` and `events.user`.
#[derive(Debug)]
pub struct Events {
    wake: Arc<Notify>,
}

impl Events {
    /// Those who wait on `wake` are notified when there is something to send.
    pub fn new(wake: Arc<Notify>) -> Self {
        Self { wake }
    }
}

impl Handler for Events {
    type Event = News;
    /// How many mails may be sent now that could not before.
    type Effect = usize;

    fn read(&self, record: &Record) -> Result<News, BoxError> {
        let envelope = &record.envelope;
        let news = codec::read(
            &envelope.event_type,
            envelope.schema_version,
            &envelope.entity_id,
            &record.payload,
        );
        Ok(news?)
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, News>],
    ) -> Result<usize, HandlerError> {
        let told = gather(batch);
        if told.is_empty() {
            return Ok(0);
        }
        let released = store::learn(connection, &told).await.map_err(store_error)?;
        pass(failpoints::EVENTS_BEFORE_COMMIT);
        Ok(released)
    }

    fn committed(&self, _: &[Incoming<'_, News>], released: usize) {
        if released > 0 {
            self.wake.notify_waiters();
        }
    }
}

fn gather(batch: &[Incoming<'_, News>]) -> Told {
    let mut told = Told::default();
    for Incoming { record, event } in batch {
        match event {
            News::Nothing => {}
            News::Address {
                user_id,
                email,
                first_name,
            } => {
                let address = (email.clone(), first_name.clone());
                told.addresses.insert(*user_id, address);
            }
            News::Order {
                order_id,
                user_id,
                email,
            } => {
                told.orders.insert(*order_id, (*user_id, email.clone()));
                told.to_answer.push(to_answer(record, *order_id));
            }
            News::ToAnswer { order_id } => told.to_answer.push(to_answer(record, *order_id)),
        }
    }
    told
}

fn to_answer(record: &Record, order_id: OrderId) -> ToAnswer {
    let envelope = &record.envelope;
    ToAnswer {
        id: MailId(envelope.event_id),
        order_id,
        event_type: envelope.event_type.clone(),
        schema_version: envelope.schema_version,
        payload: record.payload.clone(),
        traceparent: envelope.traceparent.clone(),
        tracestate: envelope.tracestate.clone(),
    }
}

/// What the database refuses parks. All else is waited out.
fn store_error(error: StoreError) -> HandlerError {
    match error {
        StoreError::Database(DbError::Refused(error)) => HandlerError::Database(error),
        error => {
            tracing::debug!(error = %chain(&error), "events cannot be applied");
            HandlerError::Transient(error.into())
        }
    }
}
