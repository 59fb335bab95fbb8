//! Metrics of the relay; every one has the outbox as its label.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

/// The metrics of all outboxes.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    published: IntCounterVec,
    publish_errors: IntCounterVec,
    leader_changes: IntCounterVec,
    backlog: IntGaugeVec,
    oldest_age: GaugeVec,
    end_to_end: HistogramVec,
    fetch: HistogramVec,
    produce: HistogramVec,
    ack: HistogramVec,
    batch: HistogramVec,
    fence_wait: HistogramVec,
    quarantined_keys: IntGaugeVec,
    quarantined_rows: IntGaugeVec,
    in_flight: IntGaugeVec,
    floor_lag: IntGaugeVec,
    leader: IntGaugeVec,
    lease_remaining: GaugeVec,
}

/// The metrics of one outbox.
#[derive(Debug, Clone)]
pub(crate) struct OutboxMetrics {
    pub(crate) published: IntCounter,
    pub(crate) transient_errors: IntCounter,
    pub(crate) permanent_errors: IntCounter,
    pub(crate) leader_changes: IntCounter,
    pub(crate) backlog: IntGauge,
    pub(crate) oldest_age: Gauge,
    pub(crate) end_to_end: Histogram,
    pub(crate) fetch: Histogram,
    pub(crate) produce: Histogram,
    pub(crate) ack: Histogram,
    pub(crate) batch: Histogram,
    pub(crate) fence_wait: Histogram,
    pub(crate) quarantined_keys: IntGauge,
    pub(crate) quarantined_rows: IntGauge,
    pub(crate) in_flight: IntGauge,
    pub(crate) floor_lag: IntGauge,
    pub(crate) leader: IntGauge,
    pub(crate) lease_remaining: Gauge,
}

impl OutboxMetrics {
    /// What only a leader knows is somebody else's to tell from now on.
    pub(crate) fn lead_no_more(&self) {
        for gauge in [
            &self.leader,
            &self.in_flight,
            &self.backlog,
            &self.floor_lag,
            &self.quarantined_keys,
            &self.quarantined_rows,
        ] {
            gauge.set(0);
        }
        self.oldest_age.set(0.0);
        self.lease_remaining.set(0.0);
    }
}

const LABEL: [&str; 1] = ["outbox"];

/// From a quarter of a millisecond to about two minutes.
fn seconds() -> Vec<f64> {
    (0..20).map(|power| 0.000_25 * f64::from(1 << power)).collect()
}

impl Metrics {
    /// # Errors
    /// When a name is registered already.
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauge = |name: &str, help: &str| {
            let metric = GaugeVec::new(Opts::new(name, help), &LABEL)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let int_gauge = |name: &str, help: &str| {
            let metric = IntGaugeVec::new(Opts::new(name, help), &LABEL)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), &LABEL)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let rows = (0..18).map(|power| f64::from(1 << power)).collect();
        Ok(Self {
            published: counter(
                "outbox_relay_published_total",
                "Rows that Kafka acknowledged.",
                &LABEL,
            )?,
            publish_errors: counter(
                "outbox_relay_publish_errors_total",
                "Errors that ended a term, by kind: transient ones are waited out; permanent ones froze an entity or stopped the outbox.",
                &["outbox", "kind"],
            )?,
            leader_changes: counter(
                "outbox_relay_leader_changes_total",
                "Leases taken by this process.",
                &LABEL,
            )?,
            backlog: int_gauge(
                "outbox_relay_backlog_rows",
                "Rows that wait to be published; ids given above the last row read count until it is known what became of them.",
            )?,
            oldest_age: gauge(
                "outbox_relay_oldest_unpublished_age_seconds",
                "0 when nothing waits.",
            )?,
            end_to_end: histogram(
                "outbox_relay_end_to_end_seconds",
                "From occurred_at to the acknowledgement.",
                seconds(),
            )?,
            fetch: histogram("outbox_relay_fetch_seconds", "One read of the outbox.", seconds())?,
            produce: histogram(
                "outbox_relay_produce_seconds",
                "Handing one batch over.",
                seconds(),
            )?,
            ack: histogram(
                "outbox_relay_ack_seconds",
                "From hand-over to the acknowledgement.",
                seconds(),
            )?,
            batch: histogram("outbox_relay_batch_rows", "Rows of one read that had any.", rows)?,
            fence_wait: histogram(
                "outbox_relay_fence_wait_seconds",
                "From a fence's start to its end.",
                seconds(),
            )?,
            quarantined_keys: int_gauge("outbox_relay_quarantined_keys", "Entities that are frozen.")?,
            quarantined_rows: int_gauge(
                "outbox_relay_quarantined_rows",
                "Rows of frozen entities, waiting in quarantine.",
            )?,
            in_flight: int_gauge(
                "outbox_relay_inflight_records",
                "Handed over and not acknowledged.",
            )?,
            floor_lag: int_gauge(
                "outbox_relay_floor_lag_ids",
                "Ids between the floor and the head.",
            )?,
            leader: int_gauge("outbox_relay_leader", "1 while this process leads.")?,
            lease_remaining: gauge(
                "outbox_relay_lease_remaining_seconds",
                "0 when this process does not lead.",
            )?,
        })
    }

    /// The metrics of one outbox, present from now on.
    pub(crate) fn of(&self, outbox: &str) -> OutboxMetrics {
        let label = &[outbox];
        OutboxMetrics {
            published: self.published.with_label_values(label),
            transient_errors: self.publish_errors.with_label_values(&[outbox, "transient"]),
            permanent_errors: self.publish_errors.with_label_values(&[outbox, "permanent"]),
            leader_changes: self.leader_changes.with_label_values(label),
            backlog: self.backlog.with_label_values(label),
            oldest_age: self.oldest_age.with_label_values(label),
            end_to_end: self.end_to_end.with_label_values(label),
            fetch: self.fetch.with_label_values(label),
            produce: self.produce.with_label_values(label),
            ack: self.ack.with_label_values(label),
            batch: self.batch.with_label_values(label),
            fence_wait: self.fence_wait.with_label_values(label),
            quarantined_keys: self.quarantined_keys.with_label_values(label),
            quarantined_rows: self.quarantined_rows.with_label_values(label),
            in_flight: self.in_flight.with_label_values(label),
            floor_lag: self.floor_lag.with_label_values(label),
            leader: self.leader.with_label_values(label),
            lease_remaining: self.lease_remaining.with_label_values(label),
        }
    }
}
