//! What a consumer counts. No label is an id or a key.

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, core::Collector,
};

use crate::{config::Config, rebuild::Progress};

/// What records may turn out to be.
const OUTCOMES: [&str; 4] = ["applied", "repeat", "discarded", "parked"];
/// What may go wrong.
const ERRORS: [&str; 6] = ["database", "timeout", "handler", "conflict", "refused", "kafka"];

/// The metrics of one consumer; all carry the label `consumer`.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    /// Records done, by what they were: one of `OUTCOMES`.
    pub(crate) messages: IntCounterVec,
    /// From when the event happened to when its effect had committed.
    pub(crate) end_to_end_seconds: HistogramVec,
    /// Records per transaction that committed.
    pub(crate) batch_records: Histogram,
    /// Duration of transactions that committed.
    pub(crate) batch_seconds: Histogram,
    /// What went wrong: one of `ERRORS`.
    pub(crate) errors: IntCounterVec,
    /// Attempts of a batch after the first.
    pub(crate) retries: IntCounter,
    /// Same version, other event: history was rewritten upstream.
    pub(crate) ghosts: IntCounter,
    /// Records parked by this process, by what failed.
    pub(crate) parked: IntCounterVec,
    /// Dead letters written by this process.
    pub(crate) dead_letters: IntCounter,
    /// Records that are parked now, by any process.
    pub(crate) parked_records: IntGauge,
    /// Entities that are parked now, by any process.
    pub(crate) parked_entities: IntGauge,
    /// How long the first of them has been parked; 0 when there is none.
    pub(crate) oldest_parked_seconds: IntGauge,
    /// Partitions assigned to this process.
    pub(crate) assigned_partitions: IntGauge,
    /// Changes of the assignment.
    pub(crate) rebalances: IntCounter,
    /// Records held in memory.
    pub(crate) in_flight_records: IntGauge,
    /// Records in the topic behind the last stored offset.
    pub(crate) lag_records: IntGaugeVec,
    /// Brokers that a connection is up to.
    pub(crate) brokers_up: IntGauge,
}

/// Figures of a rebuild; all carry the label `consumer`.
#[derive(Debug, Clone)]
pub(crate) struct RebuildMetrics {
    pub(crate) generation: IntGauge,
    /// Records done, over all partitions and runs.
    pub(crate) done: IntGauge,
    /// Records that the topics have.
    pub(crate) total: IntGauge,
    pub(crate) rate: Gauge,
}

impl RebuildMetrics {
    /// # Errors
    /// When the registry has a rebuild of that consumer already.
    pub(crate) fn register(consumer: &str, registry: &Registry) -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(name, help).const_label("consumer", consumer);
        let gauge = |name: &str, help: &str| add(registry, IntGauge::with_opts(opts(name, help))?);
        Ok(Self {
            generation: gauge(
                "consumer_rebuild_generation",
                "The generation that is being built.",
            )?,
            done: gauge("consumer_rebuild_done_records", "Records that it has.")?,
            total: gauge("consumer_rebuild_total_records", "Records that the topics have.")?,
            rate: add(
                registry,
                Gauge::with_opts(opts(
                    "consumer_rebuild_records_per_second",
                    "Since its process began.",
                ))?,
            )?,
        })
    }

    pub(crate) fn tell(&self, progress: Progress) {
        self.generation.set(progress.generation.into());
        self.done.set(progress.done.cast_signed());
        self.total.set(progress.total.cast_signed());
        self.rate.set(progress.rate);
    }
}

impl Metrics {
    /// The counters that one alerts on begin at 0 for each of their labels: a counter that first appears as 1 has no rate.
    ///
    /// # Errors
    /// When the registry has a consumer of that name already.
    pub(crate) fn register(config: &Config, registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self::empty(&config.group, registry)?;
        for topic in &config.topics {
            for outcome in OUTCOMES {
                metrics.messages.with_label_values(&[&*topic.name, outcome]);
            }
        }
        for kind in ERRORS {
            metrics.errors.with_label_values(&[kind]);
        }
        Ok(metrics)
    }

    fn empty(consumer: &str, registry: &Registry) -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(name, help).const_label("consumer", consumer);
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            HistogramOpts::new(name, help)
                .const_label("consumer", consumer)
                .buckets(buckets)
        };
        let latency = prometheus::exponential_buckets(0.001, 2.0, 18)?;
        Ok(Self {
            messages: add(
                registry,
                IntCounterVec::new(
                    opts("consumer_messages_total", "Records done."),
                    &["topic", "outcome"],
                )?,
            )?,
            end_to_end_seconds: add(
                registry,
                HistogramVec::new(
                    histogram(
                        "consumer_end_to_end_seconds",
                        "From the event to its committed effect.",
                        latency.clone(),
                    ),
                    &["topic"],
                )?,
            )?,
            batch_records: add(
                registry,
                Histogram::with_opts(histogram(
                    "consumer_batch_records",
                    "Records per committed transaction.",
                    prometheus::exponential_buckets(1.0, 2.0, 14)?,
                ))?,
            )?,
            batch_seconds: add(
                registry,
                Histogram::with_opts(histogram(
                    "consumer_batch_seconds",
                    "Duration of committed transactions.",
                    latency,
                ))?,
            )?,
            errors: add(
                registry,
                IntCounterVec::new(opts("consumer_errors_total", "What went wrong."), &["kind"])?,
            )?,
            retries: add(
                registry,
                IntCounter::with_opts(opts(
                    "consumer_retries_total",
                    "Attempts of a batch after the first.",
                ))?,
            )?,
            ghosts: add(
                registry,
                IntCounter::with_opts(opts(
                    "consumer_ghosts_total",
                    "Records with a version that another event had.",
                ))?,
            )?,
            parked: add(
                registry,
                IntCounterVec::new(
                    opts("consumer_parked_total", "Records parked by this process."),
                    &["kind"],
                )?,
            )?,
            dead_letters: add(
                registry,
                IntCounter::with_opts(opts(
                    "consumer_dead_letters_total",
                    "Dead letters written by this process.",
                ))?,
            )?,
            parked_records: add(
                registry,
                IntGauge::with_opts(opts("consumer_parked_records", "Records that are parked."))?,
            )?,
            parked_entities: add(
                registry,
                IntGauge::with_opts(opts(
                    "consumer_parked_entities",
                    "Entities of which records are parked.",
                ))?,
            )?,
            oldest_parked_seconds: add(
                registry,
                IntGauge::with_opts(opts(
                    "consumer_oldest_parked_seconds",
                    "How long the first parked record has been parked.",
                ))?,
            )?,
            assigned_partitions: add(
                registry,
                IntGauge::with_opts(opts("consumer_assigned_partitions", "Partitions assigned."))?,
            )?,
            rebalances: add(
                registry,
                IntCounter::with_opts(opts("consumer_rebalances_total", "Changes of the assignment."))?,
            )?,
            in_flight_records: add(
                registry,
                IntGauge::with_opts(opts("consumer_in_flight_records", "Records held in memory."))?,
            )?,
            lag_records: add(
                registry,
                IntGaugeVec::new(
                    opts("consumer_lag_records", "Records behind the last stored offset."),
                    &["topic", "partition"],
                )?,
            )?,
            brokers_up: add(
                registry,
                IntGauge::with_opts(opts("consumer_brokers_up", "Brokers with a connection."))?,
            )?,
        })
    }

    pub(crate) fn error(&self, kind: &str) {
        self.errors.with_label_values(&[kind]).inc();
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

#[cfg(test)]
mod tests {
    use crate::{Config, Topic};

    use super::*;

    #[test]
    fn counters_are_there_before_the_first_record() {
        let registry = Registry::new();
        let config = Config::new(
            "localhost:9092",
            "group",
            vec![Topic::from_beginning("events.order")],
        );
        Metrics::register(&config, &registry).unwrap();
        let series = |name: &str| {
            let families = registry.gather();
            let family = families.iter().find(|family| family.name() == name);
            family.map_or(0, |family| family.get_metric().len())
        };
        assert_eq!(series("consumer_messages_total"), OUTCOMES.len());
        assert_eq!(series("consumer_errors_total"), ERRORS.len());
    }
}
