//! The limit: a binary COPY out of the outbox straight into librdkafka. The records are those of the relay with its default
//! headers, the producer is set as the relay's, memory is bounded by its queue, and nothing is kept: no progress, no lease,
//! no acknowledgement looked at. No relay that publishes these records can be faster by more than this is badly written.
//!
//! A process of its own, `bench limit`, so that it is measured as the others are.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use envelope::header;
use futures::StreamExt as _;
use local_stack::postgres::connect;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use tokio::sync::mpsc;
use tokio_postgres::Client;
use uuid::Uuid;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    database_url: String,
    #[arg(long)]
    brokers: String,
    #[arg(long)]
    topic: String,
}

/// In the order in which [`Fields`] is read below.
const COPY: &str =
    "COPY (SELECT id, event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version,
        source, content_type, data_schema, correlation_id, causation_id, traceparent, occurred_at, payload
   FROM outbox) TO STDOUT (FORMAT binary)";

/// As the relay has it: defaults and what it fixes, in `outbox-relay/src/config/producer.rs`.
pub(crate) const PRODUCER: [(&str, &str); 11] = [
    ("linger.ms", "0"),
    ("compression.type", "lz4"),
    ("batch.num.messages", "10000"),
    ("queue.buffering.max.messages", "8000"),
    ("queue.buffering.max.kbytes", "16384"),
    ("message.max.bytes", "1000012"),
    ("enable.idempotence", "true"),
    ("acks", "all"),
    ("max.in.flight.requests.per.connection", "1"),
    ("message.timeout.ms", "0"),
    ("partitioner", "murmur2_random"),
];

/// Microseconds from the Unix epoch to PostgreSQL's, the first of January 2000.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(1);
/// Once the queue is full, it is left to become as empty as this: filled up place by place, it would go out record by record.
const LOW: i32 = 4_000;
/// Rows that go from the reading task to the publishing one at once, and how often that may wait.
const BATCH_ROWS: usize = 1_000;
const BATCHES: usize = 3;
const FLUSH_LIMIT: Duration = Duration::from_secs(60);

/// Publishes the whole table once, then waits to be killed, so that what it has used can still be read.
pub(crate) async fn run(options: Options) -> Result<()> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &options.brokers);
    for (name, value) in PRODUCER {
        config.set(name, value);
    }
    let producer: BaseProducer = config.create()?;
    let client = connect(&options.database_url).await?;
    // Rows come in the order in which they lie in the table, which nobody deletes from.
    client
        .batch_execute(
            "SET synchronize_seqscans = off; SET jit = off; SET max_parallel_workers_per_gather = 0",
        )
        .await?;
    // Read and published side by side: one task for both was a fifth slower.
    let (sender, mut batches) = mpsc::channel(BATCHES);
    let reader = tokio::spawn(read(client, sender));
    let mut record = Record::default();
    let mut is_first = true;
    while let Some(batch) = batches.recv().await {
        for chunk in batch {
            let mut bytes: &[u8] = &chunk;
            if is_first {
                bytes = without_head(bytes)?;
                is_first = false;
            }
            // A message of the protocol is a row, and the last one none.
            let Some(row) = Fields::of(bytes)? else { break };
            record.publish(&producer, &options.topic, row)?;
        }
        // Gives the memory of those that are delivered back to the thread that it came from: left to the client's own
        // thread, that was slower.
        collect(&producer);
    }
    reader.await??;
    producer.flush(FLUSH_LIMIT)?;
    // For those who read the log.
    writeln!(std::io::stdout(), "published everything")?;
    std::future::pending().await
}

/// Takes all reports of delivery there are; how many records are left in the queue.
fn collect(producer: &BaseProducer) -> i32 {
    let mut left = producer.in_flight_count();
    loop {
        producer.poll(Duration::ZERO);
        let now = producer.in_flight_count();
        if now >= left {
            return now;
        }
        left = now;
    }
}

async fn read(client: Client, batches: mpsc::Sender<Vec<Bytes>>) -> Result<()> {
    let rows = client.copy_out(COPY).await?;
    futures::pin_mut!(rows);
    let mut batch = Vec::with_capacity(BATCH_ROWS);
    while let Some(chunk) = rows.next().await {
        batch.push(chunk?);
        if batch.len() == BATCH_ROWS {
            let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_ROWS));
            batches.send(full).await.context("nobody publishes any more")?;
        }
    }
    batches.send(batch).await.context("nobody publishes any more")
}

/// Signature, flags, length of an extension.
fn without_head(bytes: &[u8]) -> Result<&[u8]> {
    let rest = bytes
        .strip_prefix(SIGNATURE)
        .context("not COPY's binary format")?;
    let length = rest.get(4..8).context("a head that is cut off")?;
    let length = u32::from_be_bytes(length.try_into()?);
    rest.get(8 + usize::try_from(length)?..)
        .context("a head that is cut off")
}

/// The fields of a row, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn of(bytes: &'a [u8]) -> Result<Option<Self>> {
        let (count, rest) = bytes.split_at_checked(2).context("a row that is cut off")?;
        Ok((count != [0xff, 0xff]).then_some(Self(rest)))
    }

    fn next(&mut self) -> Result<Option<&'a [u8]>> {
        let (length, rest) = self.0.split_first_chunk::<4>().context("a row that is cut off")?;
        let length = i32::from_be_bytes(*length);
        if length < 0 {
            self.0 = rest;
            return Ok(None);
        }
        let (field, rest) = rest
            .split_at_checked(usize::try_from(length)?)
            .context("a field that is cut off")?;
        self.0 = rest;
        Ok(Some(field))
    }

    fn needed(&mut self) -> Result<&'a [u8]> {
        self.next()?.context("a NULL that cannot be")
    }
}

/// What is used again from record to record.
#[derive(Default)]
struct Record {
    text: Vec<u8>,
}

impl Record {
    fn publish(&mut self, producer: &BaseProducer, topic: &str, mut row: Fields<'_>) -> Result<()> {
        let id = i64::from_be_bytes(row.needed()?.try_into()?);
        let event_id = row.needed()?;
        let aggregate_type = row.needed()?;
        let key = row.needed()?;
        let version = i64::from_be_bytes(row.needed()?.try_into()?);
        let event_type = row.needed()?;
        let schema_version = i32::from_be_bytes(row.needed()?.try_into()?);
        let source = row.needed()?;
        let content_type = row.needed()?;
        let data_schema = row.next()?;
        let correlation_id = row.next()?;
        let causation_id = row.next()?;
        let traceparent = row.next()?;
        let occurred_at = i64::from_be_bytes(row.needed()?.try_into()?);
        let payload = row.next()?;

        let mut headers = Headers {
            list: Some(OwnedHeaders::new_with_capacity(16)),
            text: &mut self.text,
        };
        let [Ok(kind), Ok(entity)] = [aggregate_type, key].map(std::str::from_utf8) else {
            bail!("text that is not UTF-8")
        };
        headers.put(header::CE_SPECVERSION, envelope::SPEC_VERSION.as_bytes());
        headers.put_id(header::CE_ID, event_id)?;
        headers.put(header::CE_SOURCE, source);
        headers.put(header::CE_TYPE, event_type);
        headers.put_text(header::CE_SUBJECT, format_args!("{kind}/{entity}"));
        envelope::time::rfc3339(occurred_at + POSTGRES_EPOCH, |time| {
            headers.put(header::CE_TIME, time)
        });
        if let Some(schema) = data_schema {
            headers.put(header::CE_DATASCHEMA, schema);
        }
        headers.put(header::CONTENT_TYPE, content_type);
        headers.put_text(header::AGGREGATE_VERSION, format_args!("{version}"));
        headers.put_text(header::SCHEMA_VERSION, format_args!("{schema_version}"));
        if let Some(id) = correlation_id {
            headers.put_id(header::CORRELATION_ID, id)?;
        }
        if let Some(id) = causation_id {
            headers.put_id(header::CAUSATION_ID, id)?;
        }
        if let Some(trace) = traceparent {
            headers.put(header::TRACEPARENT, trace);
        }
        headers.put_text(header::OUTBOX_ID, format_args!("{id}"));
        let mut message = BaseRecord::<[u8], [u8]>::to(topic).key(key);
        message.headers = headers.list;
        message.payload = payload;
        loop {
            message = match producer.send(message) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), message)) => message,
                Err((error, _)) => return Err(error.into()),
            };
            while collect(producer) > LOW {
                std::thread::sleep(QUEUE_FULL_PAUSE);
            }
        }
    }
}

/// The headers of a record, and memory to write them in.
struct Headers<'t> {
    /// Always there; each header takes the list and gives it back, and an empty one in between would cost as much.
    list: Option<OwnedHeaders>,
    text: &'t mut Vec<u8>,
}

impl Headers<'_> {
    fn put(&mut self, name: &str, value: &[u8]) {
        self.list = self.list.take().map(|list| insert(list, name, value));
    }

    fn put_id(&mut self, name: &str, id: &[u8]) -> Result<()> {
        let id = Uuid::from_slice(id)?;
        let mut buffer = Uuid::encode_buffer();
        self.put(name, id.as_hyphenated().encode_lower(&mut buffer).as_bytes());
        Ok(())
    }

    fn put_text(&mut self, name: &str, value: std::fmt::Arguments<'_>) {
        self.text.clear();
        // Writing to memory cannot fail.
        let _ = self.text.write_fmt(value);
        self.list = self.list.take().map(|list| insert(list, name, self.text));
    }
}

fn insert(list: OwnedHeaders, name: &str, value: &[u8]) -> OwnedHeaders {
    list.insert(Header {
        key: name,
        value: Some(value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_field_by_field_and_ends_are_seen() {
        let row = [&[0, 2][..], &3i32.to_be_bytes(), b"abc", &(-1i32).to_be_bytes()].concat();
        let mut fields = Fields::of(&row).expect("a row").expect("not the end");
        assert_eq!(fields.needed().expect("there"), b"abc");
        assert_eq!(fields.next().expect("there"), None);
        assert!(fields.next().is_err());
        assert!(Fields::of(&[0xff, 0xff]).expect("the end").is_none());
        let head = [SIGNATURE, &[0; 8], b"x"].concat();
        assert_eq!(without_head(&head).expect("a head"), b"x");
    }
}
