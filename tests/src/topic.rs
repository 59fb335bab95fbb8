//! A raw read of a topic: every partition from its beginning to its end, without a group.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};

use crate::check::Record;
use crate::{PATIENCE, shop};

const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// All records that are there now, by partition and offset.
pub async fn read(brokers: &str, topic: &str) -> Result<Vec<Record>> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    tokio::task::spawn_blocking(move || read_now(&brokers, &topic)).await?
}

fn read_now(brokers: &str, topic: &str) -> Result<Vec<Record>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // librdkafka wants one even of those who never join it.
        .set("group.id", "tests-raw-read")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error")
        .set("check.crcs", "true")
        .create()
        .context("no Kafka consumer")?;
    let mut left: Vec<(i32, i64)> = Vec::new();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..shop::PARTITIONS {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, ANSWER_LIMIT)
            .with_context(|| format!("partition {partition} of {topic}"))?;
        if low > 0 {
            bail!("partition {partition} of {topic} does not begin at 0 but at {low}");
        }
        if high > 0 {
            left.push((partition, high));
            assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
    }
    consumer.assign(&assignment)?;
    let deadline = Instant::now() + PATIENCE;
    let mut records = Vec::new();
    while !left.is_empty() {
        if Instant::now() > deadline {
            bail!("{topic} could not be read within {PATIENCE:?}");
        }
        let Some(message) = consumer.poll(Duration::from_millis(200)) else {
            continue;
        };
        let message = message.context("reading the topic failed")?;
        let header = |header: Header<'_, &[u8]>| (header.key.to_owned(), header.value.map(<[u8]>::to_vec));
        left.retain(|(partition, end)| *partition != message.partition() || message.offset() + 1 < *end);
        records.push(Record {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            headers: message
                .headers()
                .map(|headers| headers.iter().map(header).collect())
                .unwrap_or_default(),
            payload: message.payload().map(<[u8]>::to_vec),
        });
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    Ok(records)
}
