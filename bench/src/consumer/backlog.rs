//! What is consumed: histories on two topics of their own, published as the relay does it.

use std::time::Duration;

use anyhow::Result;
use local_stack::testing::events::headers;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use super::history::{self, Poison, Source};
use crate::relay::limit;
use crate::servers::Servers;
use crate::topics::{self, PARTITIONS};

const FLUSH_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub(crate) struct Backlog {
    pub(crate) order_topic: String,
    pub(crate) payment_topic: String,
    /// Those that stay empty: where reservations and mails are told of.
    pub(crate) empty_topics: [String; 2],
    pub(crate) events: u64,
    /// Of keys that are not poisoned.
    pub(crate) good: u64,
}

impl Backlog {
    /// Makes the topics `{name}.order` and `{name}.payment`, and publishes the histories of so many orders.
    pub(crate) async fn publish(servers: &Servers, name: &str, orders: u64, poison: Poison) -> Result<Self> {
        let mut backlog = Self {
            order_topic: format!("{name}.order"),
            payment_topic: format!("{name}.payment"),
            empty_topics: [format!("{name}.inventory"), format!("{name}.notification")],
            events: 0,
            good: 0,
        };
        let empty = backlog.empty_topics.iter().map(String::as_str);
        for topic in backlog.topics().into_iter().chain(empty) {
            topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
            topics::ready(&servers.brokers(), topic, PARTITIONS).await?;
        }
        let mut config = topics::client(&servers.brokers());
        for (property, value) in limit::PRODUCER {
            config.set(property, value);
        }
        tokio::task::spawn_blocking(move || {
            let producer: BaseProducer = config.create()?;
            for event in history::events(orders, poison) {
                backlog.events += 1;
                backlog.good += u64::from(event.is_good);
                backlog.send(&producer, &event)?;
            }
            producer.flush(FLUSH_LIMIT)?;
            Ok(backlog)
        })
        .await?
    }

    pub(crate) fn topics(&self) -> [&str; 2] {
        [&self.order_topic, &self.payment_topic]
    }

    fn send(&self, producer: &BaseProducer, event: &history::Event) -> Result<()> {
        let topic = match event.source {
            Source::Order => &self.order_topic,
            Source::Payment => &self.payment_topic,
        };
        let mut record = BaseRecord::to(topic)
            .key(&event.envelope.entity_id)
            .payload(&event.payload)
            .headers(headers(&event.envelope));
        loop {
            record = match producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), record)) => record,
                Err((error, _)) => return Err(error.into()),
            };
            producer.poll(Duration::from_millis(10));
        }
    }
}
