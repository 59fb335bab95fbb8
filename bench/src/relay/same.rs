//! Whether two topics hold the same records in the same order: what the limit publishes must be what the relay does, or the
//! comparison says nothing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};

use crate::topics::{self, PARTITIONS};

/// Records at the beginning and at the end of each partition.
const SAMPLE: i64 = 200;
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, PartialEq, Eq)]
struct Record {
    partition: i32,
    offset: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    fn of(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
        Self {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: headers
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect(),
        }
    }

    fn bytes(&self) -> usize {
        let of = |part: &Option<Vec<u8>>| part.as_ref().map_or(0, Vec::len);
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| name.len() + of(value))
            .sum();
        of(&self.key) + of(&self.value) + headers
    }
}

/// What the records of a topic are like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Key, value and headers, in bytes.
    pub(crate) bytes: f64,
    pub(crate) headers: f64,
}

/// Fails unless both topics have the same in their samples; `records` is how many each has.
pub(crate) async fn check(brokers: &str, one: &str, other: &str, records: u64) -> Result<Shape> {
    let names = [brokers.to_owned(), one.to_owned(), other.to_owned()];
    tokio::task::spawn_blocking(move || {
        let [brokers, one, other] = &names;
        let (ours, theirs) = (sample(brokers, one)?, sample(brokers, other)?);
        ensure!(
            ours.0 == records && theirs.0 == records,
            "{one} has {} records and {other} {}, not {records}",
            ours.0,
            theirs.0
        );
        ensure!(ours.1.len() == theirs.1.len(), "samples of different length");
        for (ours, theirs) in ours.1.iter().zip(&theirs.1) {
            ensure!(
                ours == theirs,
                "the records are not the same:\n{one}: {ours:?}\n{other}: {theirs:?}"
            );
        }
        let count = ours.1.len() as f64;
        Ok(Shape {
            bytes: ours.1.iter().map(Record::bytes).sum::<usize>() as f64 / count,
            headers: ours.1.iter().map(|record| record.headers.len()).sum::<usize>() as f64 / count,
        })
    })
    .await?
}

/// How many records a topic has, and those of the sample by partition and offset.
fn sample(brokers: &str, topic: &str) -> Result<(u64, Vec<Record>)> {
    let consumer: BaseConsumer = topics::client(brokers)
        .set("group.id", "unused")
        .set("enable.auto.commit", "false")
        // Little more than the samples.
        .set("fetch.message.max.bytes", "131072")
        .set("queued.max.messages.kbytes", "256")
        // What was asked for last is answered before what is asked for next.
        .set("fetch.wait.max.ms", "10")
        .create()?;
    let mut total = 0;
    let mut records = Vec::new();
    for partition in 0..PARTITIONS {
        let (low, high) = consumer.fetch_watermarks(topic, partition, PATIENCE)?;
        ensure!(low == 0, "{topic} has lost its beginning");
        total += u64::try_from(high)?;
        let first = 0..high.min(SAMPLE);
        let last = (high - SAMPLE).max(first.end)..high;
        for range in [first, last].into_iter().filter(|range| !range.is_empty()) {
            let mut assignment = TopicPartitionList::new();
            assignment.add_partition_offset(topic, partition, Offset::Offset(range.start))?;
            consumer.assign(&assignment)?;
            let mut next = range.start;
            while next < range.end {
                let message = consumer.poll(PATIENCE).context("a record that does not come")??;
                next = message.offset() + 1;
                if range.contains(&message.offset()) {
                    records.push(Record::of(&message));
                }
            }
        }
    }
    Ok((total, records))
}
