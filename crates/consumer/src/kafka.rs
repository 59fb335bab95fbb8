//! The Kafka client's side: callbacks that only take notes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::intake::PartitionId;
use crate::lane::Lane;
use crate::metrics::Metrics;

/// A change of the assignment.
#[derive(Debug)]
pub(crate) enum Change {
    Assigned(Vec<PartitionId>),
    Revoked(Vec<PartitionId>),
}

/// The context that the client calls back. Callbacks run while the runtime polls; none of them waits.
pub(crate) struct Callbacks {
    topics: Vec<String>,
    /// Unbounded because a callback must not wait; there is one change per rebalance.
    changes: mpsc::UnboundedSender<Change>,
    metrics: Metrics,
    /// When a broker was last found to be away.
    broker_away: Mutex<Option<Instant>>,
}

/// Makes a client, and gives what it tells about its assignment.
///
/// # Errors
/// When librdkafka refuses a property, or cannot start.
pub(crate) fn connect(
    config: &Config,
    lane: &Lane,
    metrics: &Metrics,
) -> KafkaResult<(StreamConsumer<Callbacks>, mpsc::UnboundedReceiver<Change>)> {
    let (sender, changes) = mpsc::unbounded_channel();
    let callbacks = Callbacks {
        topics: config.topics.iter().map(|topic| topic.name.clone()).collect(),
        changes: sender,
        metrics: metrics.clone(),
        broker_away: Mutex::default(),
    };
    let mut client = config.client();
    client.set("group.id", lane.group(&config.group));
    Ok((client.create_with_context(callbacks)?, changes))
}

impl Callbacks {
    /// Whether a broker was found to be away within this time.
    pub(crate) fn missed_a_broker_within(&self, time: Duration) -> bool {
        let away = self.broker_away.lock().unwrap_or_else(PoisonError::into_inner);
        away.is_some_and(|at| at.elapsed() <= time)
    }

    fn ids(&self, list: &TopicPartitionList) -> Vec<PartitionId> {
        let elements = list.elements();
        elements
            .iter()
            .filter_map(|element| id(&self.topics, element))
            .collect()
    }
}

fn id(topics: &[String], element: &TopicPartitionListElem<'_>) -> Option<PartitionId> {
    let topic = topics.iter().position(|topic| topic == element.topic())?;
    Some(PartitionId {
        topic,
        partition: element.partition(),
    })
}

/// How far the client has read in each of its partitions, what it does not deliver included.
///
/// # Errors
/// When the client has no assignment to tell of.
pub(crate) fn positions(
    topics: &[String],
    client: &StreamConsumer<Callbacks>,
) -> KafkaResult<Vec<(PartitionId, i64)>> {
    let list = client.position()?;
    let known = list.elements().into_iter().filter_map(|element| {
        let Offset::Offset(position) = element.offset() else {
            return None;
        };
        Some((id(topics, &element)?, position))
    });
    Ok(known.collect())
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error => tracing::warn!(kafka.facility = facility, "kafka client: {message}"),
            RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                tracing::info!(kafka.facility = facility, "kafka client: {message}");
            }
            RDKafkaLogLevel::Debug => tracing::debug!(kafka.facility = facility, "kafka client: {message}"),
        }
    }

    fn stats(&self, statistics: Statistics) {
        let up = statistics
            .brokers
            .values()
            .filter(|broker| broker.state == "UP")
            .count();
        self.metrics.brokers_up.set(up as i64);
        for topic in self
            .topics
            .iter()
            .filter_map(|topic| statistics.topics.get(topic))
        {
            for (partition, figures) in &topic.partitions {
                // -1: unknown, or not assigned here.
                if *partition >= 0 && figures.consumer_lag_stored >= 0 {
                    self.metrics
                        .lag_records
                        .with_label_values(&[topic.topic.as_str(), &partition.to_string()])
                        .set(figures.consumer_lag_stored);
                }
            }
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure};
        if matches!(
            error.rdkafka_error_code(),
            Some(AllBrokersDown | BrokerTransportFailure)
        ) {
            let mut away = self.broker_away.lock().unwrap_or_else(PoisonError::into_inner);
            *away = Some(Instant::now());
        }
        self.metrics.error("kafka");
        tracing::warn!(error.message = %error, "kafka client: {reason}");
    }
}

impl ConsumerContext for Callbacks {
    /// Offsets of finished work are stored at once, whenever a batch ends, so there is nothing to wait for here: the client
    /// commits what is stored as part of giving the partitions back.
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let change = match rebalance {
            Rebalance::Assign(list) => Change::Assigned(self.ids(list)),
            Rebalance::Revoke(list) => Change::Revoked(self.ids(list)),
            Rebalance::Error(error) => {
                self.metrics.error("kafka");
                tracing::warn!(error.message = %error, "the rebalance failed");
                return;
            }
        };
        // The runtime has ended when nobody listens.
        let _ = self.changes.send(change);
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        match result {
            Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
            // Stored offsets stay stored and go with the next commit; after a rebalance they are the next owner's.
            Err(error) => tracing::debug!(error.message = %error, "offsets were not committed this time"),
        }
    }
}

/// A list of partitions, by their topics' names.
pub(crate) fn list(topics: &[String], ids: &[PartitionId]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(ids.len());
    for id in ids {
        list.add_partition(&topics[id.topic], id.partition);
    }
    list
}

/// A list of offsets to continue from.
///
/// # Errors
/// When the client takes an offset for invalid, which no offset that was read is.
pub(crate) fn offsets(topics: &[String], next: &[(PartitionId, i64)]) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(next.len());
    for (id, offset) in next {
        list.add_partition_offset(&topics[id.topic], id.partition, Offset::Offset(*offset))?;
    }
    Ok(list)
}
