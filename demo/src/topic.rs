//! A raw read of a topic: every partition from its beginning to its end, without a group.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};

const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const READ_LIMIT: Duration = Duration::from_secs(300);
/// Whoever only looks how far things are does not wait for a broker that is away.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// A record as it is on Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// When the broker appended it, in milliseconds since 1970.
    pub(crate) appended_at_ms: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    /// The value of a header, if it is there once and is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(header, _)| header == name);
        match (values.next(), values.next()) {
            (Some((_, Some(value))), None) => std::str::from_utf8(value).ok(),
            _ => None,
        }
    }

    pub(crate) fn key_text(&self) -> &str {
        self.key
            .as_deref()
            .and_then(|key| std::str::from_utf8(key).ok())
            .unwrap_or("")
    }
}

/// Several topics to be read.
pub(crate) struct Topics(Vec<Topic>);

impl Topics {
    pub(crate) fn open(brokers: &str, names: &[&str]) -> Result<Self> {
        let topics = names.iter().map(|name| Topic::open(brokers, name));
        Ok(Self(topics.collect::<Result<_>>()?))
    }

    /// How many records there are in each.
    pub(crate) fn counts(&self) -> Result<Vec<u64>> {
        self.0.iter().map(Topic::count).collect()
    }

    /// All records that are there now, topic by topic.
    pub(crate) fn read(&self) -> Result<Vec<Vec<Record>>> {
        self.0.iter().map(Topic::read).collect()
    }
}

/// A topic to be read.
pub(crate) struct Topic {
    consumer: BaseConsumer,
    name: String,
    partitions: Vec<i32>,
}

impl Topic {
    pub(crate) fn open(brokers: &str, name: &str) -> Result<Self> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            // librdkafka wants one even of those who never join it.
            .set("group.id", "demo-raw-read")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "error")
            .set("check.crcs", "true")
            .create()
            .context("no Kafka consumer")?;
        let metadata = consumer
            .fetch_metadata(Some(name), ANSWER_LIMIT)
            .context("Kafka does not answer")?;
        let partitions: Vec<i32> = metadata
            .topics()
            .iter()
            .filter(|topic| topic.name() == name)
            .flat_map(|topic| topic.partitions())
            .map(|partition| partition.id())
            .collect();
        if partitions.is_empty() {
            bail!("there is no topic {name}");
        }
        Ok(Self {
            consumer,
            name: name.to_owned(),
            partitions,
        })
    }

    /// The end of each partition.
    fn ends(&self, limit: Duration) -> Result<Vec<(i32, i64, i64)>> {
        let end = |partition: &i32| {
            let (low, high) = self.consumer.fetch_watermarks(&self.name, *partition, limit)?;
            Ok((*partition, low, high))
        };
        self.partitions.iter().map(end).collect()
    }

    /// How many records there are.
    pub(crate) fn count(&self) -> Result<u64> {
        let ends = self.ends(LOOK_LIMIT)?;
        Ok(ends
            .iter()
            .map(|(_, low, high)| u64::try_from(high - low).unwrap_or(0))
            .sum())
    }

    /// All records that are there now, by partition and offset.
    pub(crate) fn read(&self) -> Result<Vec<Record>> {
        let mut left: Vec<(i32, i64)> = Vec::new();
        let mut assignment = TopicPartitionList::new();
        for (partition, low, high) in self.ends(ANSWER_LIMIT)? {
            if low > 0 {
                bail!(
                    "partition {partition} of {} does not begin at 0 but at {low}",
                    self.name
                );
            }
            if high > 0 {
                left.push((partition, high));
                assignment.add_partition_offset(&self.name, partition, Offset::Beginning)?;
            }
        }
        self.consumer.assign(&assignment)?;
        let deadline = Instant::now() + READ_LIMIT;
        let mut records = Vec::new();
        while !left.is_empty() {
            if Instant::now() > deadline {
                bail!("{} could not be read within {READ_LIMIT:?}", self.name);
            }
            let Some(message) = self.consumer.poll(Duration::from_millis(200)) else {
                continue;
            };
            let message = match message {
                // Of a broker that was away; the client connects again by itself.
                Err(KafkaError::MessageConsumption(
                    RDKafkaErrorCode::AllBrokersDown | RDKafkaErrorCode::BrokerTransportFailure,
                )) => continue,
                message => message.context("reading the topic failed")?,
            };
            let headers = message.headers().map(|headers| {
                let header = |header: rdkafka::message::Header<'_, &[u8]>| {
                    (header.key.to_owned(), header.value.map(<[u8]>::to_vec))
                };
                headers.iter().map(header).collect()
            });
            left.retain(|(partition, end)| *partition != message.partition() || message.offset() + 1 < *end);
            records.push(Record {
                partition: message.partition(),
                offset: message.offset(),
                appended_at_ms: message.timestamp().to_millis().unwrap_or(0),
                key: message.key().map(<[u8]>::to_vec),
                payload: message.payload().map(<[u8]>::to_vec),
                headers: headers.unwrap_or_default(),
            });
        }
        self.consumer.unassign()?;
        records.sort_by_key(|record| (record.partition, record.offset));
        Ok(records)
    }
}
