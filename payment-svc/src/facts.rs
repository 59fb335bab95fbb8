//! What follows from changes that have committed: they are logged, counted, and told to those who wait for them.

use std::sync::Arc;

use prometheus::{IntCounterVec, Opts, Registry};

use crate::domain::Status;
use crate::store::{self, Fact};
use crate::waits::Waits;

/// Where committed changes are told. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Facts {
    total: IntCounterVec,
    waits: Arc<Waits>,
}

impl Facts {
    /// # Errors
    /// When the metrics are registered already.
    pub fn new(registry: &Registry, waits: Arc<Waits>) -> prometheus::Result<Self> {
        let opts = Opts::new("payments_total", "Payments that have come to this status.");
        let total = IntCounterVec::new(opts, &["status"])?;
        registry.register(Box::new(total.clone()))?;
        // From zero, so that the first of them is seen to rise.
        for status in Status::ALL {
            total.with_label_values(&[status.name()]);
        }
        Ok(Self { total, waits })
    }

    /// Tells what is a fact now.
    pub fn committed(&self, facts: &[Fact]) {
        for fact in facts {
            let status = fact.status.name();
            self.total.with_label_values(&[status]).inc();
            match fact.event {
                Some((event_id, event_type)) => tracing::info!(
                    event.id = %event_id,
                    event.r#type = event_type,
                    entity.r#type = store::ENTITY_TYPE,
                    entity.id = %fact.payment_id,
                    entity.version = fact.version,
                    order.id = %fact.order_id,
                    "recorded {event_type}"
                ),
                None => tracing::info!(
                    entity.r#type = store::ENTITY_TYPE,
                    entity.id = %fact.payment_id,
                    order.id = %fact.order_id,
                    payment.status = status,
                    "a payment is {status}"
                ),
            }
            self.waits.wake(fact.payment_id.0);
        }
    }
}
