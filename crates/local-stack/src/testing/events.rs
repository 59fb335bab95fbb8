//! Events on Kafka as the relay publishes them, for tests of what consumes them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use chrono::Utc;
use envelope::Envelope;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use uuid::Uuid;

/// A topic of a test's own, and a producer for it.
pub struct Topic {
    name: String,
    producer: FutureProducer,
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topic")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Topic {
    /// A new one, whose name begins with `prefix`.
    ///
    /// # Errors
    /// When Kafka does not make it.
    pub async fn create(brokers: &str, prefix: &str, partitions: i32) -> Result<Self> {
        // Kafka's own default.
        Self::create_for(brokers, prefix, partitions, 1_048_588).await
    }

    /// The same for records of at most so many bytes.
    ///
    /// # Errors
    /// When Kafka does not make it.
    pub async fn create_for(brokers: &str, prefix: &str, partitions: i32, max_bytes: usize) -> Result<Self> {
        let name = super::unique(prefix);
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers);
        let admin: AdminClient<DefaultClientContext> = config.create()?;
        let bytes = max_bytes.to_string();
        let new =
            NewTopic::new(&name, partitions, TopicReplication::Fixed(1)).set("max.message.bytes", &bytes);
        let made = admin.create_topics([&new], &AdminOptions::new()).await?;
        made.into_iter()
            .next()
            .context("no answer about the topic")?
            .map_err(|(name, code)| anyhow::anyhow!("topic {name} was not made: {code}"))?;
        let producer = config
            .set("partitioner", "murmur2_random")
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .set("message.max.bytes", bytes)
            .create()?;
        Ok(Self { name, producer })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Publishes an event; its key is its entity's id.
    ///
    /// # Errors
    /// When Kafka does not take it.
    pub async fn publish(&self, envelope: &Envelope, payload: &[u8]) -> Result<()> {
        let key = Some(envelope.entity_id.as_str());
        self.produce(key, Some(payload), headers(envelope), None).await?;
        Ok(())
    }

    /// Anything at all; returns partition and offset.
    ///
    /// # Errors
    /// When Kafka does not take it.
    pub async fn produce(
        &self,
        key: Option<&str>,
        value: Option<&[u8]>,
        headers: OwnedHeaders,
        partition: Option<i32>,
    ) -> Result<(i32, i64)> {
        let mut record: FutureRecord<'_, str, [u8]> = FutureRecord::to(&self.name).headers(headers);
        record.key = key;
        record.payload = value;
        record.partition = partition;
        let sent = self.producer.send_result(record).map_err(|(error, _)| error)?;
        let delivery = sent.await?.map_err(|(error, _)| error)?;
        Ok((delivery.partition, delivery.offset))
    }
}

/// The envelope of an event that has just happened: Protobuf of major version 1, and nothing that is optional.
pub fn envelope(entity_type: &str, entity_id: &str, version: i64, event_type: &str) -> Envelope {
    Envelope {
        event_id: Uuid::now_v7(),
        event_type: event_type.to_owned(),
        source: "/test".to_owned(),
        entity_type: entity_type.to_owned(),
        entity_id: entity_id.to_owned(),
        version,
        schema_version: 1,
        occurred_at: Utc::now(),
        content_type: envelope::CONTENT_TYPE_PROTOBUF.to_owned(),
        data_schema: None,
        correlation_id: None,
        causation_id: None,
        traceparent: None,
        tracestate: None,
        outbox_id: None,
        metadata: BTreeMap::new(),
    }
}

/// An envelope as headers.
pub fn headers(envelope: &Envelope) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new();
    envelope.write(|key, value| {
        let header = Header {
            key,
            value: Some(value),
        };
        headers = std::mem::replace(&mut headers, OwnedHeaders::new_with_capacity(0)).insert(header);
    });
    headers
}
