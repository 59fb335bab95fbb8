//! Topics: made, deleted, and how far they are.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::drain::Count;

/// Of every topic that is measured.
pub(crate) const PARTITIONS: i32 = 6;

const ANSWER_LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn client(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

fn admin(brokers: &str) -> Result<AdminClient<DefaultClientContext>> {
    Ok(client(brokers).create()?)
}

/// Makes a topic that keeps everything, or so many bytes a partition.
pub(crate) async fn create(brokers: &str, name: &str, partitions: i32, keep: Option<u64>) -> Result<()> {
    let bytes = keep.map_or("-1".to_owned(), |bytes| bytes.to_string());
    let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1))
        .set("retention.ms", "-1")
        .set("retention.bytes", &bytes);
    if keep.is_some() {
        topic = topic.set("segment.bytes", "33554432");
    }
    let options = AdminOptions::new().operation_timeout(Some(ANSWER_LIMIT));
    for made in admin(brokers)?.create_topics([&topic], &options).await? {
        made.map_err(|(name, code)| anyhow::anyhow!("topic {name} was not made: {code}"))?;
    }
    Ok(())
}

pub(crate) async fn delete(brokers: &str, names: &[&str]) -> Result<()> {
    let options = AdminOptions::new().operation_timeout(Some(ANSWER_LIMIT));
    for deleted in admin(brokers)?.delete_topics(names, &options).await? {
        deleted.map_err(|(name, code)| anyhow::anyhow!("topic {name} was not deleted: {code}"))?;
    }
    Ok(())
}

/// What a topic takes on the broker's disk.
pub(crate) fn bytes_on_disk(data: &Path, topic: &str) -> Result<u64> {
    let mut bytes = 0;
    for partition in 0..PARTITIONS {
        let folder = data.join(format!("{topic}-{partition}"));
        for entry in std::fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))? {
            let entry = entry?;
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "log")
            {
                bytes += entry.metadata()?.len();
            }
        }
    }
    Ok(bytes)
}

/// Asks for the ends of all partitions of a topic by one request on a connection of its own. It speaks the protocol by
/// hand, since fifty times a second it must cost those who are measured nothing.
pub(crate) struct LogEnds {
    stream: TcpStream,
    request: Vec<u8>,
    partitions: usize,
}

impl LogEnds {
    pub(crate) async fn connect(brokers: &str, topic: &str, partitions: i32) -> Result<Self> {
        let stream = TcpStream::connect(brokers)
            .await
            .context("Kafka does not listen")?;
        stream.set_nodelay(true)?;
        let mut body = Vec::new();
        body.extend(2i16.to_be_bytes()); // ListOffsets
        body.extend(1i16.to_be_bytes()); // its version
        body.extend(0i32.to_be_bytes()); // correlation id
        body.extend((-1i16).to_be_bytes()); // no client id
        body.extend((-1i32).to_be_bytes()); // not a replica
        body.extend(1i32.to_be_bytes()); // topics
        body.extend(i16::try_from(topic.len())?.to_be_bytes());
        body.extend(topic.as_bytes());
        body.extend(partitions.to_be_bytes());
        for partition in 0..partitions {
            body.extend(partition.to_be_bytes());
            body.extend((-1i64).to_be_bytes()); // the end
        }
        let mut request = u32::try_from(body.len())?.to_be_bytes().to_vec();
        request.extend(body);
        Ok(Self {
            stream,
            request,
            partitions: usize::try_from(partitions)?,
        })
    }

    /// The sum of the ends: how many records were ever appended.
    pub(crate) async fn total(&mut self) -> Result<u64> {
        tokio::time::timeout(ANSWER_LIMIT, self.ask())
            .await
            .context("Kafka does not say how far the topic is")?
    }

    async fn ask(&mut self) -> Result<u64> {
        self.stream.write_all(&self.request).await?;
        let length = usize::try_from(self.stream.read_u32().await?)?;
        ensure!(length < 1 << 20, "an answer of {length} bytes");
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer).await?;
        sum_of_ends(&answer, self.partitions).context("Kafka's answer is not understood")?
    }
}

impl Count for LogEnds {
    const EVERY: Duration = Duration::from_millis(20);

    async fn count(&mut self) -> Result<u64> {
        self.total().await
    }
}

/// Correlation id, topics, then for each partition: number, error, timestamp, offset.
fn sum_of_ends(answer: &[u8], partitions: usize) -> Option<Result<u64>> {
    let name = usize::from(u16::from_be_bytes(answer.get(8..10)?.try_into().ok()?));
    let entries = answer.get(10 + name + 4..)?;
    let mut sum = 0;
    let mut found = 0;
    for entry in entries.chunks_exact(22) {
        let error = i16::from_be_bytes(entry[4..6].try_into().ok()?);
        if error != 0 {
            return Some(Err(anyhow::anyhow!("Kafka answers with error {error}")));
        }
        sum += u64::try_from(i64::from_be_bytes(entry[14..22].try_into().ok()?)).ok()?;
        found += 1;
    }
    if found != partitions {
        return None;
    }
    Some(Ok(sum))
}

/// Waits until a topic that was just made can be asked for its ends.
pub(crate) async fn ready(brokers: &str, topic: &str, partitions: i32) -> Result<LogEnds> {
    let mut ends = LogEnds::connect(brokers, topic, partitions).await?;
    for _ in 0..500 {
        if ends.total().await.is_ok() {
            return Ok(ends);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("topic {topic} has no leaders")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_summed_and_errors_told() {
        let answer = |error: i16, ends: &[i64]| {
            let mut bytes = vec![0; 8];
            bytes.extend(1u16.to_be_bytes());
            bytes.push(b't');
            bytes.extend((ends.len() as i32).to_be_bytes());
            for (partition, end) in ends.iter().enumerate() {
                bytes.extend((partition as i32).to_be_bytes());
                bytes.extend(error.to_be_bytes());
                bytes.extend((-1i64).to_be_bytes());
                bytes.extend(end.to_be_bytes());
            }
            bytes
        };
        assert_eq!(
            sum_of_ends(&answer(0, &[3, 4]), 2)
                .expect("understood")
                .expect("good"),
            7
        );
        assert!(sum_of_ends(&answer(6, &[3, 4]), 2).expect("understood").is_err());
        assert!(sum_of_ends(&answer(0, &[3]), 2).is_none());
    }
}
