//! Reads topics as they are, without a group.

use std::collections::BTreeMap;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};

use super::CommandError;

/// How long Kafka may take to answer, or to send the next record of a partition that has one.
const LIMIT: Duration = Duration::from_secs(60);
/// Partitions end with records that are not for consumers: then this much silence is the end.
const SILENCE: Duration = Duration::from_secs(10);

/// The value of a header, as text.
pub(super) fn header<'m>(message: &'m BorrowedMessage<'_>, name: &str) -> Option<&'m str> {
    let found = message.headers()?.iter().find(|header| header.key == name)?;
    std::str::from_utf8(found.value?).ok()
}

/// Hands every record of the topics to `each`, up to where their partitions ended at the start; those of a partition in
/// order. Topics that do not exist have no records. It blocks.
pub(super) fn read(
    producer: &ClientConfig,
    topics: &[String],
    mut each: impl FnMut(&BorrowedMessage<'_>),
) -> Result<(), CommandError> {
    let kafka = |doing| move |source| CommandError::Kafka { doing, source };
    let consumer: BaseConsumer = consumer_config(producer)
        .create()
        .map_err(kafka("make a consumer"))?;
    let mut assignment = TopicPartitionList::new();
    let mut ends: BTreeMap<(String, i32), i64> = BTreeMap::new();
    let mut total = 0;
    for topic in topics {
        let metadata = consumer
            .fetch_metadata(Some(topic), LIMIT)
            .map_err(kafka("ask for a topic"))?;
        let partitions: Vec<i32> = metadata
            .topics()
            .iter()
            .flat_map(|found| found.partitions().iter().map(|partition| partition.id()))
            .collect();
        for partition in partitions {
            let (low, high) = consumer
                .fetch_watermarks(topic, partition, LIMIT)
                .map_err(kafka("ask for the ends of a partition"))?;
            if high > low {
                assignment
                    .add_partition_offset(topic, partition, Offset::Beginning)
                    .map_err(kafka("assign a partition"))?;
                ends.insert((topic.clone(), partition), high);
                total += u64::try_from(high - low).unwrap_or_default();
            }
        }
    }
    consumer.assign(&assignment).map_err(kafka("assign partitions"))?;
    // Drawn on a terminal only.
    let progress = ProgressBar::new(total).with_style(
        ProgressStyle::with_template(
            "reading topics {bar:30} {human_pos} of {human_len} records, {eta} left",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    while !ends.is_empty() {
        let Some(message) = consumer.poll(SILENCE) else {
            // What is left of these partitions are markers of transactions.
            break;
        };
        let message = message.map_err(kafka("read a record"))?;
        let place = (message.topic().to_owned(), message.partition());
        let Some(end) = ends.get(&place).copied() else {
            continue;
        };
        if message.offset() < end {
            each(&message);
            progress.inc(1);
        }
        if message.offset() + 1 >= end {
            ends.remove(&place);
        }
    }
    progress.finish_and_clear();
    Ok(())
}

/// Where the brokers are and how to get in, as the producer has it.
fn consumer_config(producer: &ClientConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in producer.config_map() {
        let shared = ["bootstrap.servers", "client.id"].contains(&name)
            || ["security.", "sasl.", "ssl.", "socket.", "broker.address."]
                .iter()
                .any(|prefix| name.starts_with(prefix));
        if shared {
            config.set(name, value);
        }
    }
    config
        .set("group.id", "outbox-relay-reader")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest");
    config
}
