//! The Kafka side: an idempotent producer that is thrown away at the first error.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ahash::HashSet;
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
    /// The same, and the client has said why.
    #[error("Kafka: {doing}: {complaint}")]
    Unreachable {
        doing: &'static str,
        complaint: String,
        source: KafkaError,
    },
    /// No acknowledgement for so long that the producer is given up.
    #[error("Kafka acknowledged nothing for {0:?}")]
    Stalled(Duration),
    /// These were refused for what they are; one of a batch is enough to have all of it refused. `certain`: it is this
    /// very one.
    #[error("Kafka refuses {} record(s), of outbox rows {} and on", ids.len(), ids.first().copied().unwrap_or_default())]
    Refused {
        ids: Vec<i64>,
        certain: bool,
        source: KafkaError,
    },
}

/// What was acknowledged or refused since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Deliveries {
    /// The tokens of the records.
    pub(crate) acknowledged: Vec<usize>,
    failed: Vec<(usize, KafkaError)>,
}

impl Deliveries {
    /// The failure, if there was any; `id` knows a record's id by its token. What was acknowledged was all the same.
    pub(crate) fn failure(&mut self, id: impl Fn(usize) -> i64) -> Option<PublishError> {
        let failed = std::mem::take(&mut self.failed);
        let is_refusal = |error: &KafkaError| error.rdkafka_error_code().is_some_and(is_refusal);
        let refused: Vec<i64> = failed
            .iter()
            .filter(|(_, error)| is_refusal(error))
            .map(|(token, _)| id(*token))
            .collect();
        let refusal = failed.iter().find(|(_, error)| is_refusal(error)).cloned();
        match (refusal, failed.into_iter().next()) {
            // The others failed in its wake.
            (Some((_, source)), _) => Some(PublishError::Refused {
                ids: refused,
                certain: false,
                source,
            }),
            (None, Some((_, source))) => Some(PublishError::Transient {
                doing: "publish",
                source,
            }),
            (None, None) => None,
        }
    }
}

/// Whether records can go to a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TopicState {
    There,
    Missing,
    Forbidden,
}

struct Context {
    deliveries: Mutex<Deliveries>,
    /// The last error that belongs to no record.
    complaint: Mutex<Option<String>>,
}

impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        // librdkafka goes on by itself; what it cannot mend comes back with a record.
        tracing::warn!(kafka.error = %error, kafka.reason = reason, "Kafka client reports an error");
        // This comes after what says why, and says no more.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            let mut complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
            *complaint = Some(reason.to_owned());
        }
    }
}

impl ProducerContext<NoCustomPartitioner> for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, token: usize) {
        let mut deliveries = self.deliveries.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(_) => deliveries.acknowledged.push(token),
            Err((error, _)) => deliveries.failed.push((token, error.clone())),
        }
    }
}

/// Publishes records in the order in which they are handed over, per partition.
pub(crate) struct Publisher {
    producer: Arc<BaseProducer<Context>>,
    known_topics: HashSet<String>,
}

/// Events served at once, at the most: more than there are, since each is about a record at least. One call of rdkafka's
/// serves one event, a batch of reports; it spins through the last millisecond of any other timeout than zero.
const EVENTS_A_CALL: usize = 100_000;
/// Events among which a complaint is looked for.
const COMPLAINTS: usize = 64;
/// How long to wait for a topic's metadata.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

impl Publisher {
    /// # Errors
    /// [`PublishError::Transient`] when the configuration is refused: it was checked at start.
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, PublishError> {
        let context = Context {
            deliveries: Mutex::default(),
            complaint: Mutex::default(),
        };
        let producer = config
            .create_with_context(context)
            .map_err(|source| PublishError::Transient {
                doing: "make the producer",
                source,
            })?;
        Ok(Self {
            producer: Arc::new(producer),
            known_topics: HashSet::default(),
        })
    }

    /// Whether this topic was there when it was last asked for.
    pub(crate) fn knows(&self, topic: &str) -> bool {
        self.known_topics.contains(topic)
    }

    /// Whether records can go to this topic. That it is there is remembered; that it is not is asked each time.
    ///
    /// # Errors
    /// [`PublishError::Transient`] when Kafka does not say.
    pub(crate) async fn topic(&mut self, name: &str) -> Result<TopicState, PublishError> {
        if self.knows(name) {
            return Ok(TopicState::There);
        }
        let (producer, topic) = (Arc::clone(&self.producer), name.to_owned());
        let metadata = tokio::task::spawn_blocking(move || {
            producer
                .client()
                .fetch_metadata(Some(&topic), METADATA_TIMEOUT)
                .map(|metadata| {
                    let found = metadata.topics().iter().find(|found| found.name() == topic);
                    found.map(|found| {
                        (
                            found.error().map(RDKafkaErrorCode::from),
                            found.partitions().len(),
                        )
                    })
                })
        })
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        let doing = "ask for the topic";
        let unknown = |source| match self.complaint() {
            Some(complaint) => PublishError::Unreachable {
                doing,
                complaint,
                source,
            },
            None => PublishError::Transient { doing, source },
        };
        match metadata.map_err(unknown)? {
            Some((None, partitions)) if partitions > 0 => {
                self.known_topics.insert(name.to_owned());
                Ok(TopicState::There)
            }
            Some((Some(RDKafkaErrorCode::TopicAuthorizationFailed), _)) => Ok(TopicState::Forbidden),
            Some((Some(code), _)) if !is_refusal(code) => Err(unknown(KafkaError::MetadataFetch(code))),
            _ => Ok(TopicState::Missing),
        }
    }

    /// Why Kafka cannot be reached, as the client has it: a wrong password looks like a broker that is away otherwise.
    fn complaint(&self) -> Option<String> {
        for _ in 0..COMPLAINTS {
            self.producer.poll(Duration::ZERO);
        }
        let complaint = self.producer.context().complaint.lock();
        complaint.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Hands a record over; `false` when the producer's queue is full: collect, and try again. Its deliveries have the
    /// `token`.
    ///
    /// # Errors
    /// When the producer refuses the record.
    pub(crate) fn send(&mut self, record: &mut Record<'_>, token: usize) -> Result<bool, PublishError> {
        let topic: &str = &record.topic;
        let mut message = BaseRecord::<str, [u8], usize>::with_opaque_to(topic, token).key(record.key);
        message.headers = record.headers.take();
        message.payload = record.payload;
        match self.producer.send(message) {
            Ok(()) => Ok(true),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), message)) => {
                record.headers = message.headers;
                Ok(false)
            }
            Err((source, _)) if source.rdkafka_error_code().is_some_and(is_refusal) => {
                Err(PublishError::Refused {
                    ids: vec![record.id],
                    certain: true,
                    source,
                })
            }
            Err((source, _)) => Err(PublishError::Transient {
                doing: "hand a record over",
                source,
            }),
        }
    }

    /// Serves the producer's callbacks, and returns what they said since the last call.
    pub(crate) fn collect(&mut self) -> Deliveries {
        let said = || {
            let deliveries = self.producer.context().deliveries.lock();
            let deliveries = deliveries.unwrap_or_else(PoisonError::into_inner);
            deliveries.acknowledged.len() + deliveries.failed.len()
        };
        for _ in 0..EVENTS_A_CALL {
            let before = said();
            self.producer.poll(Duration::ZERO);
            if said() == before {
                break;
            }
        }
        let deliveries = self.producer.context().deliveries.lock();
        std::mem::take(&mut *deliveries.unwrap_or_else(PoisonError::into_inner))
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

/// Whether an error is about the record or its topic; all else goes away with waiting.
fn is_refusal(code: RDKafkaErrorCode) -> bool {
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
            | UnsupportedForMessageFormat
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(codes: &[RDKafkaErrorCode]) -> Option<PublishError> {
        let failed = codes.iter().enumerate();
        let mut deliveries = Deliveries {
            acknowledged: vec![],
            failed: failed
                .map(|(token, code)| (token, KafkaError::MessageProduction(*code)))
                .collect(),
        };
        deliveries.failure(|token| token as i64)
    }

    #[test]
    fn errors_of_a_record_are_refusals_and_errors_of_the_broker_are_not() {
        use RDKafkaErrorCode::*;
        for code in [
            MessageSizeTooLarge,
            InvalidRecord,
            TopicAuthorizationFailed,
            UnknownTopicOrPartition,
        ] {
            assert!(
                matches!(failed(&[code]), Some(PublishError::Refused { .. })),
                "{code:?}"
            );
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
            ClusterAuthorizationFailed,
            Fatal,
        ] {
            assert!(
                matches!(failed(&[code]), Some(PublishError::Transient { .. })),
                "{code:?}"
            );
        }
        assert!(failed(&[]).is_none());
        match failed(&[PurgeQueue, MessageSizeTooLarge, GaplessGuarantee]) {
            Some(PublishError::Refused { ids, .. }) => assert_eq!(ids, [1], "the others failed in its wake"),
            other => panic!("{other:?}"),
        }
    }
}
