//! Looks for orders whose `pay_by` has passed, and has that recorded.
//!
//! Nothing is decided here about a customer's money: `order.overdue` makes payment-svc take no further payment of the order and
//! say how the last one ended, and only that answer cancels the order or not. So an order that was paid is never cancelled for
//! being late, however long Kafka, a relay or this task was away.

use std::convert::Infallible;
use std::time::Duration;

use service::db::{DbError, TransactionError as _};
use service::deadline::Deadline;
use service::telemetry::chain;
use tracing::Instrument as _;

use crate::app::{CommandError, Orders};
use crate::domain::OrderId;

/// Orders that are looked for at a time.
const BATCH: u16 = 200;
/// For one statement or one order.
const PATIENCE: Duration = Duration::from_secs(5);

/// Has overdue orders recorded for ever, looking for them every `interval`. Replicas share the work: what one of them is at, the
/// others pass over.
pub async fn run(orders: Orders, interval: Duration) -> Result<(), Infallible> {
    let mut trouble = None;
    loop {
        let found = sweep(&orders).await.err().map(|error| chain(&error).to_string());
        if found != trouble {
            match &found {
                Some(error) => tracing::error!(error, "overdue orders cannot be recorded"),
                None => tracing::info!("overdue orders are recorded again"),
            }
            trouble = found;
        }
        tokio::time::sleep(interval).await;
    }
}

/// Has everything recorded that is overdue now. One order that cannot be is no reason to leave out the others.
async fn sweep(orders: &Orders) -> Result<(), CommandError> {
    let mut outcome = Ok(());
    let mut after = None;
    loop {
        let due = orders.due(Deadline::after(PATIENCE), after, BATCH).await?;
        for due in &due {
            let span = tracing::info_span!(parent: None, "record overdue");
            let recorded = orders
                .record_overdue(Deadline::after(PATIENCE), OrderId(due.order_id))
                .instrument(span)
                .await;
            match recorded {
                Err(error) if is_away(&error) => return Err(error),
                recorded => outcome = outcome.and(recorded),
            }
        }
        match due.last() {
            Some(last) if due.len() == usize::from(BATCH) => after = Some(*last),
            _ => return outcome,
        }
    }
}

/// Whether the database is in trouble, which is every order's, and not one order.
fn is_away(error: &CommandError) -> bool {
    !matches!(error.database(), None | Some(DbError::Refused(_)))
}
