//! What is measured, and the watch over mails whose senders have died.

use std::convert::Infallible;
use std::time::Duration;

use prometheus::{Gauge, IntCounterVec, IntGaugeVec, Opts, Registry};
use service::db::Db;
use service::deadline::Deadline;
use service::telemetry::chain;

use crate::domain::{Next, State};
use crate::store;

/// Deadline of one look.
const PATIENCE: Duration = Duration::from_secs(5);

/// Clones share the counts.
#[derive(Debug, Clone)]
pub struct Metrics {
    attempts: IntCounterVec,
    mails: IntGaugeVec,
    oldest: Gauge,
}

impl Metrics {
    /// # Errors
    /// When the metrics are registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let attempts = IntCounterVec::new(
            Opts::new(
                "mail_attempts_total",
                "Attempts to send a mail, by what they led to.",
            ),
            &["outcome"],
        )?;
        let mails = IntGaugeVec::new(
            Opts::new("mails", "Mails that are not sent, by their state."),
            &["state"],
        )?;
        let oldest = Gauge::new(
            "oldest_unsent_mail_seconds",
            "For how long the oldest mail that has an address is to be sent; 0 when there is none.",
        )?;
        registry.register(Box::new(attempts.clone()))?;
        registry.register(Box::new(mails.clone()))?;
        registry.register(Box::new(oldest.clone()))?;
        // From zero, so that the first of them is seen to rise.
        for outcome in ["sent", "again", "failed", "unknown"] {
            attempts.with_label_values(&[outcome]);
        }
        Ok(Self {
            attempts,
            mails,
            oldest,
        })
    }

    /// Counts an attempt.
    pub(crate) fn ended(&self, next: Next) {
        let outcome = match next {
            Next::Sent => "sent",
            Next::Again { .. } => "again",
            Next::Failed(_) => "failed",
            Next::Unknown(_) => "unknown",
        };
        self.attempts.with_label_values(&[outcome]).inc();
    }

    /// Every so often, makes mails unknown whose lease has passed, and counts; for ever.
    pub async fn watch(self, db: Db, every: Duration) -> Result<(), Infallible> {
        loop {
            let expired = db.transaction(Deadline::after(PATIENCE), &(), |conn, ()| {
                Box::pin(store::expire(conn))
            });
            match expired.await {
                Ok(expired) => {
                    for mail in expired {
                        tracing::error!(
                            entity.id = %mail.notification_id, order.id = %mail.order_id, mail.attempt_by = mail.attempt_by,
                            "whoever was sending a mail is gone, and nobody knows whether it was taken: it is not sent again by itself"
                        );
                    }
                }
                // The database's absence is reported elsewhere.
                Err(error) => tracing::debug!(error = %chain(&error), "leases cannot be looked at"),
            }
            let counted = db.read(Deadline::after(PATIENCE), &(), |conn, ()| {
                Box::pin(store::count(conn))
            });
            // The last figures stay.
            if let Ok(counts) = counted.await {
                for state in State::ALL.into_iter().filter(|state| *state != State::Sent) {
                    let mails = counts.mails.get(state.name()).copied().unwrap_or(0);
                    self.mails.with_label_values(&[state.name()]).set(mails);
                }
                self.oldest.set(counts.oldest_seconds);
            }
            tokio::time::sleep(every).await;
        }
    }
}
