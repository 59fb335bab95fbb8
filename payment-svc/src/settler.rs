//! Brings on, in the background, every payment whose next step is due: those that calls have left, those that came with an order,
//! and those of processes that have died. Several replicas share the work: each takes what nobody else has taken.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{Gauge, IntGauge, Registry};
use service::db::Db;
use service::deadline::Deadline;
use service::telemetry::{chain, set_parent};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::attempt::Driver;
use crate::store::{self, Due, Lock, StoreError};

/// Deadline of one look for work.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the unfinished payments are counted.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// Settles payments.
#[derive(Debug)]
pub struct Settler {
    db: Db,
    driver: Driver,
    wake: Arc<Notify>,
    concurrency: usize,
    every: Duration,
}

impl Settler {
    /// Brings on `concurrency` payments at once; looks for more `every` so often, and whenever `wake` says so.
    pub fn new(db: Db, driver: Driver, wake: Arc<Notify>, concurrency: usize, every: Duration) -> Self {
        Self {
            db,
            driver,
            wake,
            concurrency,
            every,
        }
    }

    /// Settles until `shutdown`; then lets what is under way end at its next step.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let mut driving: JoinSet<()> = JoinSet::new();
        let mut failing = false;
        while !shutdown.is_cancelled() {
            let free = self.concurrency.saturating_sub(driving.len());
            let mut found = 0;
            match self.claim(free).await {
                Ok(claimed) => {
                    found = claimed.len();
                    for due in claimed {
                        driving.spawn(settle(
                            self.db.clone(),
                            self.driver.clone(),
                            due,
                            shutdown.clone(),
                        ));
                    }
                    failing = false;
                }
                Err(error) if failing => {
                    tracing::debug!(error = %chain(&error), "still no look for due payments")
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "due payments cannot be looked for");
                    failing = true;
                }
            }
            if found > 0 && found == free {
                // There may be more: as soon as one of these has ended.
                tokio::select! {
                    ended = driving.join_next() => notice(ended),
                    () = shutdown.cancelled() => {}
                }
                continue;
            }
            tokio::select! {
                Some(ended) = driving.join_next(), if driving.len() == self.concurrency => notice(Some(ended)),
                () = self.wake.notified(), if driving.len() < self.concurrency => {}
                () = tokio::time::sleep(self.every), if driving.len() < self.concurrency => {}
                () = shutdown.cancelled() => {}
            }
            while let Some(ended) = driving.try_join_next() {
                notice(Some(ended));
            }
        }
        while let Some(ended) = driving.join_next().await {
            notice(Some(ended));
        }
        Ok(())
    }

    async fn claim(&self, free: usize) -> Result<Vec<Due>, StoreError> {
        if free == 0 {
            return Ok(Vec::new());
        }
        let limit = i64::try_from(free).unwrap_or(i64::MAX);
        let input = (self.driver.lease(), limit);
        self.db
            .transaction(Deadline::after(PATIENCE), &input, |conn, &(lease, limit)| {
                Box::pin(store::claim_due(conn, lease, limit))
            })
            .await
    }
}

/// A defect in one payment must not stop the others; its lease brings it back.
fn notice(ended: Option<Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = ended {
        tracing::error!(error = %chain(&error), "the settling of a payment panicked");
    }
}

/// Brings one payment on, within the trace that began it.
async fn settle(db: Db, driver: Driver, due: Due, stop: CancellationToken) {
    let stored = db
        .read(Deadline::after(PATIENCE), &due, |conn, due| {
            Box::pin(store::load_payment(conn, due.payment_id, Lock::None))
        })
        .await;
    let span = tracing::info_span!("settle", entity.id = %due.payment_id, order.id = %due.order_id);
    if let Ok(Some(stored)) = &stored {
        let cause = &stored.work.cause;
        set_parent(&span, cause.traceparent.as_deref(), cause.tracestate.as_deref());
    }
    let driven = driver.drive(due, &stop).instrument(span).await;
    if let Err(error) = driven {
        tracing::warn!(
            entity.id = %due.payment_id, error = %chain(&error),
            "a payment cannot be brought on, and is taken up again later"
        );
    }
}

/// Counts the unfinished payments for ever.
#[derive(Debug, Clone)]
pub struct Gauges {
    pending: IntGauge,
    oldest: Gauge,
}

impl Gauges {
    /// # Errors
    /// When the metrics are registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let pending = IntGauge::new(
            "payments_pending",
            "Payments and refunds that are under way, or whose outcome is not known.",
        )?;
        let oldest = Gauge::new(
            "oldest_pending_age_seconds",
            "How long the oldest of them has been so; 0 when there is none.",
        )?;
        registry.register(Box::new(pending.clone()))?;
        registry.register(Box::new(oldest.clone()))?;
        Ok(Self { pending, oldest })
    }

    /// Keeps them up to date.
    pub async fn watch(self, db: Db) -> Result<(), Infallible> {
        loop {
            let counted = db.read(Deadline::after(PATIENCE), &(), |conn, ()| {
                Box::pin(store::unfinished(conn))
            });
            // The database's absence is reported elsewhere; the last figures stay.
            if let Ok(unfinished) = counted.await {
                self.pending.set(unfinished.count);
                self.oldest.set(unfinished.oldest_seconds);
            }
            tokio::time::sleep(COUNT_EVERY).await;
        }
    }
}
