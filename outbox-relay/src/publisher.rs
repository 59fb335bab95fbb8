//! The Kafka side: an idempotent producer that is thrown away at the first error.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{
    BaseProducer, BaseRecord, DeliveryResult, NoCustomPartitioner, Producer, ProducerContext,
};

use crate::record::Record;

/// Why records cannot be published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    /// Kafka is away or busy: wait, then read again from the database.
    #[error("Kafka: {doing}")]
    Transient { doing: &'static str, source: KafkaError },
    /// No acknowledgement for so long that the producer is given up.
    #[error("Kafka acknowledged nothing for {0:?}")]
    Stalled(Duration),
    /// This very row will never be taken.
    #[error("outbox row {id}: {problem}")]
    Permanent { id: i64, problem: String },
}

/// What was acknowledged or refused since it was last asked.
#[derive(Debug, Default)]
struct Deliveries {
    acknowledged: Vec<i64>,
    /// The first failure; what follows it is its consequence.
    failed: Option<(i64, KafkaError)>,
}

struct Context {
    deliveries: Mutex<Deliveries>,
}

impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        // librdkafka goes on by itself; what it cannot mend comes back with a record.
        tracing::warn!(kafka.error = %error, kafka.reason = reason, "Kafka client reports an error");
    }
}

impl ProducerContext<NoCustomPartitioner> for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, id: usize) {
        let id = i64::try_from(id).unwrap_or(i64::MAX);
        let mut deliveries = self.deliveries.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(_) => deliveries.acknowledged.push(id),
            Err((error, _)) => {
                deliveries.failed.get_or_insert_with(|| (id, error.clone()));
            }
        }
    }
}

/// Publishes records in the order in which they are handed over, per partition.
pub(crate) struct Publisher {
    producer: Arc<BaseProducer<Context>>,
    known_topics: HashSet<String>,
    max_record_bytes: usize,
}

/// How long to wait for a topic's metadata.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

impl Publisher {
    /// # Errors
    /// [`PublishError::Transient`] when the configuration is refused: it was checked at start.
    pub(crate) fn new(config: &ClientConfig, max_record_bytes: usize) -> Result<Self, PublishError> {
        let context = Context {
            deliveries: Mutex::default(),
        };
        let producer = config
            .create_with_context(context)
            .map_err(|source| PublishError::Transient {
                doing: "make the producer",
                source,
            })?;
        Ok(Self {
            producer: Arc::new(producer),
            known_topics: HashSet::new(),
            max_record_bytes,
        })
    }

    /// Checks topic and size of a record, before any record after it is handed over.
    ///
    /// # Errors
    /// [`PublishError::Permanent`] for a record that Kafka would never take.
    pub(crate) async fn admit(&mut self, record: &Record<'_>) -> Result<(), PublishError> {
        let refused = |problem| {
            Err(PublishError::Permanent {
                id: record.id,
                problem,
            })
        };
        if record.bytes > self.max_record_bytes {
            return refused(format!(
                "its record has {} bytes, and message.max.bytes is {}",
                record.bytes, self.max_record_bytes
            ));
        }
        if self.known_topics.contains(&record.topic) {
            return Ok(());
        }
        let (producer, topic) = (Arc::clone(&self.producer), record.topic.clone());
        let metadata = tokio::task::spawn_blocking(move || {
            producer
                .client()
                .fetch_metadata(Some(&topic), METADATA_TIMEOUT)
                .map(|metadata| {
                    metadata
                        .topics()
                        .iter()
                        .find(|found| found.name() == topic)
                        .map(|found| {
                            (
                                found.error().map(RDKafkaErrorCode::from),
                                found.partitions().len(),
                            )
                        })
                })
        })
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        match metadata {
            Err(source) => Err(PublishError::Transient {
                doing: "ask for the topic",
                source,
            }),
            Ok(Some((None, partitions))) if partitions > 0 => {
                self.known_topics.insert(record.topic.clone());
                Ok(())
            }
            Ok(Some((Some(code), _))) if !is_permanent(code) => Err(PublishError::Transient {
                doing: "ask for the topic",
                source: KafkaError::MetadataFetch(code),
            }),
            Ok(Some((Some(RDKafkaErrorCode::TopicAuthorizationFailed), _))) => refused(format!(
                "the broker does not let the relay write to topic {}",
                record.topic
            )),
            Ok(_) => refused(format!(
                "topic {} does not exist: create it, for example with `outbox-relay create-topics {}=6`",
                record.topic, record.topic
            )),
        }
    }

    /// Hands a record over; `false` when the producer's queue is full: collect, and try again.
    ///
    /// # Errors
    /// When the producer refuses the record.
    pub(crate) fn send(&mut self, record: &mut Record<'_>) -> Result<bool, PublishError> {
        let opaque = usize::try_from(record.id).map_err(|_| PublishError::Permanent {
            id: record.id,
            problem: "its id is negative".to_owned(),
        })?;
        let mut message =
            BaseRecord::<str, [u8], usize>::with_opaque_to(&record.topic, opaque).key(record.key);
        message.headers = record.headers.take();
        message.payload = record.payload;
        match self.producer.send(message) {
            Ok(()) => Ok(true),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), message)) => {
                record.headers = message.headers;
                Ok(false)
            }
            Err((error, _)) => Err(classify(record.id, error, "hand a record over")),
        }
    }

    /// Serves the producer's callbacks, and returns the ids acknowledged since the last call.
    ///
    /// # Errors
    /// The first refusal. Acknowledgements that came with it are lost: the rows are published again.
    pub(crate) fn collect(&mut self) -> Result<Vec<i64>, PublishError> {
        // One call serves one event, a batch of reports. rdkafka spins through the last millisecond of any other
        // timeout.
        const EVENTS_A_CALL: usize = 64;
        for _ in 0..EVENTS_A_CALL {
            let before = self
                .producer
                .context()
                .deliveries
                .lock()
                .map_or(0, |d| d.acknowledged.len());
            self.producer.poll(Duration::ZERO);
            if self
                .producer
                .context()
                .deliveries
                .lock()
                .map_or(0, |d| d.acknowledged.len())
                == before
            {
                break;
            }
        }
        let deliveries = std::mem::take(
            &mut *self
                .producer
                .context()
                .deliveries
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        if let Some((id, error)) = deliveries.failed {
            return Err(classify(id, error, "publish"));
        }
        Ok(deliveries.acknowledged)
    }

    /// Forgets every record that is not acknowledged yet and closes the producer. What was in flight may still have
    /// been written.
    pub(crate) async fn abandon(self) {
        // Purges, and waits for librdkafka's threads.
        let closed = tokio::task::spawn_blocking(move || drop(self)).await;
        if let Err(panic) = closed {
            std::panic::resume_unwind(panic.into_panic());
        }
    }
}

fn classify(id: i64, error: KafkaError, doing: &'static str) -> PublishError {
    match error.rdkafka_error_code() {
        Some(code) if is_permanent(code) => PublishError::Permanent {
            id,
            problem: error.to_string(),
        },
        _ => PublishError::Transient { doing, source: error },
    }
}

/// Whether an error is about the record itself, or about what an operator must change; all else goes away with waiting.
fn is_permanent(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        code,
        MessageSizeTooLarge
            | MessageBatchTooLarge
            | InvalidMessage
            | InvalidRecord
            | InvalidTimestamp
            | InvalidTopic
            | UnknownTopic
            | UnknownTopicOrPartition
            | UnknownPartition
            | PolicyViolation
            | TopicAuthorizationFailed
            | ClusterAuthorizationFailed
            | UnsupportedForMessageFormat
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_record_are_permanent_and_errors_of_the_broker_are_not() {
        use RDKafkaErrorCode::*;
        for code in [
            MessageSizeTooLarge,
            InvalidRecord,
            TopicAuthorizationFailed,
            UnknownTopicOrPartition,
        ] {
            let error = classify(1, KafkaError::MessageProduction(code), "publish");
            assert!(matches!(error, PublishError::Permanent { id: 1, .. }), "{code:?}");
        }
        for code in [
            BrokerTransportFailure,
            AllBrokersDown,
            NotLeaderForPartition,
            NotEnoughReplicas,
            RequestTimedOut,
            PurgeQueue,
            PurgeInflight,
            OutOfOrderSequenceNumber,
            Fatal,
        ] {
            let error = classify(1, KafkaError::MessageProduction(code), "publish");
            assert!(matches!(error, PublishError::Transient { .. }), "{code:?}");
        }
    }
}
