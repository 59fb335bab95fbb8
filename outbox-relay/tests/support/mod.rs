//! An outbox of its own on the shared PostgreSQL and Kafka, relays in this process, and a raw look at the topic.

use std::collections::BTreeMap;
use std::time::Duration;

use local_stack::testing::{self, Database};
use outbox_relay::topics::{self, Topic};
use outbox_relay::{App, Config};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use service::config;
use service::shutdown::TaskError;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

pub(crate) const PARTITIONS: i32 = 6;

const SCHEMA: &str = concat!(
    include_str!("../../../migrations/outbox/2026-01-01-000001_outbox/up.sql"),
    "CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL);"
);

/// Long enough for a loaded machine; what is waited for comes much sooner.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Bed {
    pub(crate) database: Database,
    pub(crate) topic: String,
    pub(crate) client: Client,
}

impl Bed {
    pub(crate) async fn new() -> Self {
        let bed = Self::without_topic().await;
        let topic = Topic {
            name: bed.topic.clone(),
            partitions: PARTITIONS,
        };
        topics::create(&brokers(), &[topic], 1).await.expect("created");
        bed
    }

    pub(crate) async fn without_topic() -> Self {
        let template = format!(
            "relay-{:x}",
            SCHEMA
                .bytes()
                .fold(5381u64, |h, b| h.wrapping_mul(33) ^ u64::from(b))
        );
        let database = Database::create(&template, |url| async move {
            local_stack::postgres::connect(&url)
                .await?
                .batch_execute(SCHEMA)
                .await?;
            anyhow::Ok(())
        })
        .await;
        let client = database.connect().await.expect("connected");
        Self {
            database,
            topic: testing::unique("events.test"),
            client,
        }
    }

    pub(crate) async fn connect(&self) -> Client {
        self.database.connect().await.expect("connected")
    }

    /// The configuration of this outbox under `name`, with `extra` lines in its section.
    pub(crate) fn section(&self, name: &str, extra: &str) -> String {
        format!(
            "[outbox.{name}]\ndatabase_url = \"{}\"\ntopic = \"{}\"\nlease_ttl = \"2s\"\nsave_interval = \"50ms\"\n{extra}\n",
            self.database.url(),
            self.topic
        )
    }

    pub(crate) async fn relay(&self) -> RunningRelay {
        RunningRelay::start(&self.section("test", "")).await
    }

    /// Moves an entity by one version, with its event, in a transaction of its own.
    pub(crate) async fn append(&self, entity: &str) {
        append(&self.client, entity).await.expect("appended");
    }

    /// Floor, and the last id that the sequence gave.
    pub(crate) async fn floor_and_last(&self) -> (i64, i64) {
        let row = self
            .client
            .query_one(
                "SELECT (SELECT max(floor) FROM outbox_relay),
                        pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass)",
                &[],
            )
            .await
            .expect("read");
        (
            row.get::<_, Option<i64>>(0).unwrap_or(0),
            row.get::<_, Option<i64>>(1).unwrap_or(0),
        )
    }

    /// Waits until every id is published or dead, and saved as such.
    pub(crate) async fn settled(&self) {
        let mut seen = (0, 0);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < deadline {
            seen = self.floor_and_last().await;
            if seen.0 == seen.1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the floor stays at {} of {}", seen.0, seen.1);
    }

    pub(crate) async fn committed(&self) -> BTreeMap<String, i64> {
        let rows = self
            .client
            .query(
                "SELECT aggregate_id, max(aggregate_version) FROM outbox GROUP BY 1",
                &[],
            )
            .await;
        rows.expect("read")
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect()
    }

    /// Every record of the topic, by partition and offset.
    pub(crate) async fn records(&self) -> Vec<Record> {
        let topic = self.topic.clone();
        tokio::task::spawn_blocking(move || read_topic(&topic))
            .await
            .expect("read")
    }

    /// Everything committed is on Kafka; per entity first occurrences are 1, 2, 3 … on one partition; repeats are the
    /// same bytes. Returns how many records were repeats.
    #[track_caller]
    pub(crate) fn check(committed: &BTreeMap<String, i64>, records: &[Record]) -> usize {
        let mut first: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
        let mut repeats = 0;
        for record in records {
            let seen = first.entry(&record.key).or_default();
            assert!(
                seen.iter().all(|other| other.partition == record.partition),
                "{} is on two partitions",
                record.key
            );
            match seen.iter().find(|other| other.version == record.version) {
                Some(other) => {
                    assert_eq!(
                        (&other.headers, &other.payload),
                        (&record.headers, &record.payload)
                    );
                    repeats += 1;
                }
                None => seen.push(record),
            }
        }
        for (key, last) in committed {
            let versions: Vec<i64> = first
                .get(key.as_str())
                .map_or_else(Vec::new, |seen| seen.iter().map(|r| r.version).collect());
            assert_eq!(
                versions,
                (1..=*last).collect::<Vec<_>>(),
                "versions of {key} in the topic"
            );
        }
        assert_eq!(
            first.len(),
            committed.len(),
            "entities on Kafka that nobody committed"
        );
        repeats
    }
}

/// The order of the protocol: lock first, outbox row last, fed from the locking statement.
pub(crate) async fn append(
    client: &impl tokio_postgres::GenericClient,
    entity: &str,
) -> Result<(), tokio_postgres::Error> {
    let moved = "WITH e AS (INSERT INTO entity AS e VALUES ($1, 1)
                            ON CONFLICT (id) DO UPDATE SET version = e.version + 1 RETURNING id, version)
                 INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source,
                                     traceparent, payload)
                 SELECT gen_random_uuid(), 'test', id, version, 'test.moved', '/test',
                        '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
                        convert_to(id || ' at ' || version, 'UTF8') FROM e";
    client.execute(moved, &[&entity]).await.map(drop)
}

#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) key: String,
    pub(crate) version: i64,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) payload: Option<Vec<u8>>,
}

pub(crate) fn brokers() -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", testing::kafka_brokers());
    config
}

fn read_topic(topic: &str) -> Vec<Record> {
    let consumer: BaseConsumer = brokers().set("group.id", "unused").create().expect("consumer");
    let mut ends = BTreeMap::new();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, PATIENCE)
            .expect("watermarks");
        if high > low {
            ends.insert(partition, high);
            assignment
                .add_partition_offset(topic, partition, Offset::Beginning)
                .expect("added");
        }
    }
    consumer.assign(&assignment).expect("assigned");
    let mut records = Vec::new();
    while !ends.is_empty() {
        let message = consumer
            .poll(PATIENCE)
            .expect("a record before the end")
            .expect("no error");
        let headers: Vec<(String, String)> = message
            .headers()
            .map(|headers| {
                headers
                    .iter()
                    .map(|h| {
                        (
                            h.key.to_owned(),
                            String::from_utf8_lossy(h.value.unwrap_or_default()).into_owned(),
                        )
                    })
                    .collect()
            })
            .unwrap_or_default();
        let version = headers
            .iter()
            .find(|(name, _)| name == "aggregate-version")
            .expect("a version")
            .1
            .parse();
        records.push(Record {
            partition: message.partition(),
            key: String::from_utf8(message.key().expect("a key").to_vec()).expect("UTF-8"),
            version: version.expect("a number"),
            headers,
            payload: message.payload().map(<[u8]>::to_vec),
        });
        if ends.get(&message.partition()) == Some(&(message.offset() + 1)) {
            ends.remove(&message.partition());
        }
    }
    records
}

/// A relay in this process.
pub(crate) struct RunningRelay {
    pub(crate) admin: std::net::SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), TaskError>>,
}

impl RunningRelay {
    /// Starts a relay of the outboxes in `sections`.
    pub(crate) async fn start(sections: &str) -> Self {
        let toml = format!(
            "admin.listen = \"127.0.0.1:0\"\nkafka.brokers = \"{}\"\nservice.instance = \"{}\"\n{sections}",
            testing::kafka_brokers(),
            testing::unique("relay")
        );
        let config = config::parse(config::Sources::new("T_").toml(&toml), Config::read).expect("valid");
        let app: App = config.build().await.expect("built");
        let (admin, stop) = (app.admin_addr(), CancellationToken::new());
        let task = tokio::spawn(app.run(stop.clone()));
        Self { admin, stop, task }
    }

    /// Asks it to stop and waits.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("a clean stop");
    }

    /// Ends it without a chance to save or to give the lease up, as a crash would.
    pub(crate) async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Waits for it to end by itself, and returns the whole chain of its error.
    pub(crate) async fn failure(self) -> String {
        let ended = tokio::time::timeout(PATIENCE, self.task)
            .await
            .expect("it goes on")
            .expect("no panic");
        service::telemetry::chain(&ended.expect_err("it ended well")).to_string()
    }

    /// The answer of `/readyz`.
    pub(crate) async fn readyz(&self) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.admin)
            .await
            .expect("listening");
        stream
            .write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    }
}
