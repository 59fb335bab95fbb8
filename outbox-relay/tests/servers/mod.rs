//! For tests that kill servers or cut them off: relays in this process with any configuration, writers that go on through
//! it all, and what is committed compared with what is on Kafka.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use local_stack::postgres::connect;
use local_stack::process::http_get;
use local_stack::{testing, wait};
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

/// An outbox, and entities whose versions its rows count.
pub(crate) const SCHEMA: &str = concat!(
    include_str!("../../../migrations/outbox/2026-01-01-000001_outbox/up.sql"),
    "CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL);"
);

/// Moves entity `$1` by one version, with its event, which goes to topic `$2`.
pub(crate) const APPEND: &str = "
    WITH e AS (INSERT INTO entity AS e VALUES ($1, 1)
               ON CONFLICT (id) DO UPDATE SET version = e.version + 1 RETURNING id, version)
    INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, topic, payload)
    SELECT gen_random_uuid(), 'test', id, version, 'test.moved', '/test', $2, convert_to(id || ' at ' || version, 'UTF8')
      FROM e";

/// Event id and where it goes, in the order of the rows.
pub(crate) const ROWS: &str = "SELECT event_id::text, topic || '/' || aggregate_id FROM outbox ORDER BY id";

/// Long enough for a loaded machine; what is waited for comes much sooner.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) fn parse(toml: &str) -> Config {
    config::parse(config::Sources::new("T_").toml(toml), Config::read).expect("valid")
}

pub(crate) fn plain(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

pub(crate) async fn create_topics(brokers: &ClientConfig, names: &[&str], partitions: i32) {
    let topics: Vec<Topic> = names
        .iter()
        .map(|name| Topic {
            name: (*name).to_owned(),
            partitions,
        })
        .collect();
    topics::create(brokers, &topics, 1).await.expect("created");
}

/// A relay in this process.
pub(crate) struct Relay {
    pub(crate) admin: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), TaskError>>,
}

impl Relay {
    pub(crate) async fn start(toml: &str) -> Self {
        let config = parse(&format!(
            "admin.listen = \"127.0.0.1:0\"\nservice.instance = \"{}\"\n{toml}",
            testing::unique("relay")
        ));
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

    pub(crate) async fn status(&self) -> String {
        http_get(self.admin, "/status").await.expect("answered").1
    }

    /// Waits until `/status` has this text.
    pub(crate) async fn says(&self, text: &str) -> String {
        let last = RefCell::new(String::new());
        let waited = wait::until(text, PATIENCE, async || {
            let status = self.status().await;
            let found = status.contains(text).then_some(());
            last.replace(status);
            Ok(found)
        });
        if let Err(error) = waited.await {
            panic!("{error:#}: {}", last.borrow());
        }
        last.into_inner()
    }
}

/// Sessions that write all the time, whatever happens to the server.
pub(crate) struct Writers {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<u64>>,
}

impl Writers {
    /// `count` of them insert by `statement` for 10 entities, each of which goes to one of `topics`. Each session begins
    /// with `setup`.
    pub(crate) fn start(
        url: &str,
        count: usize,
        statement: &'static str,
        topics: &[&str],
        setup: &'static str,
    ) -> Self {
        let stop = CancellationToken::new();
        let tasks = (0..count).map(|writer| {
            let (stop, url) = (stop.clone(), url.to_owned());
            let topics: Vec<String> = topics.iter().map(|topic| (*topic).to_owned()).collect();
            tokio::spawn(async move {
                let (mut committed, mut n) = (0, writer);
                while !stop.is_cancelled() {
                    // Errors are what servers that were killed give.
                    let _ = write(&url, statement, &topics, setup, &stop, &mut n, &mut committed).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                committed
            })
        });
        let tasks = tasks.collect();
        Self { stop, tasks }
    }

    /// How many inserts were acknowledged.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.cancel();
        let mut committed = 0;
        for task in self.tasks {
            committed += task.await.expect("no panic");
        }
        committed
    }
}

async fn write(
    url: &str,
    statement: &str,
    topics: &[String],
    setup: &str,
    stop: &CancellationToken,
    n: &mut usize,
    committed: &mut u64,
) -> Result<()> {
    let client = connect(url).await?;
    client.batch_execute(setup).await?;
    while !stop.is_cancelled() {
        *n = n.wrapping_mul(31).wrapping_add(7) % 1_000_003;
        let entity = *n % 10;
        let (key, topic) = (format!("k{entity}"), &topics[entity % topics.len()]);
        let executed = async { client.execute(statement, &[&key, topic]).await };
        tokio::time::timeout(Duration::from_secs(5), executed).await??;
        *committed += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Waits until so many rows are in the outbox by `count`, a query.
pub(crate) async fn rows_reach(client: &Client, count: &str, at_least: i64) {
    wait::until("rows are written", PATIENCE, async || {
        let rows: i64 = client.query_one(count, &[]).await?.get(0);
        Ok((rows >= at_least).then_some(()))
    })
    .await
    .expect("written");
}

/// Waits until every id of `table` is published or dead, and saved as such by relay `name`.
pub(crate) async fn settled(url: &str, name: &str, table: &str, id: &str) {
    let seen = Cell::new((0, 0));
    let waited = wait::until("all is published", PATIENCE, async || {
        let asked = async {
            let client = connect(url).await?;
            let text = "SELECT (SELECT floor FROM outbox_relay WHERE name = $1),
                               pg_sequence_last_value(pg_get_serial_sequence($2, $3)::regclass)";
            let row = client.query_one(text, &[&name, &table, &id]).await?;
            anyhow::Ok((
                row.get::<_, Option<i64>>(0).unwrap_or(0),
                row.get::<_, Option<i64>>(1).unwrap_or(0),
            ))
        };
        if let Ok(asked) = asked.await {
            seen.set(asked);
            return Ok((asked.0 >= asked.1).then_some(()));
        }
        Ok(None)
    });
    if let Err(error) = waited.await {
        let (floor, last) = seen.get();
        panic!("{error:#}: the floor stays at {floor} of {last}");
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) key: String,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(other, _)| other == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    }

    /// As the relay or Debezium names it.
    pub(crate) fn event_id(&self) -> &str {
        self.header("ce_id").or_else(|| self.header("id")).expect("an id")
    }
}

/// Every record of these topics; those of a partition in order.
pub(crate) async fn records(brokers: &ClientConfig, topics: &[&str]) -> Vec<Record> {
    let brokers = brokers.clone();
    let topics: Vec<String> = topics.iter().map(|topic| (*topic).to_owned()).collect();
    tokio::task::spawn_blocking(move || read(brokers, &topics).expect("read"))
        .await
        .expect("no panic")
}

fn read(mut config: ClientConfig, topics: &[String]) -> Result<Vec<Record>> {
    let consumer: BaseConsumer = config.set("group.id", "unused").create()?;
    let mut ends = BTreeMap::new();
    let mut assignment = TopicPartitionList::new();
    for topic in topics {
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
        for partition in metadata.topics()[0].partitions() {
            let (low, high) = consumer.fetch_watermarks(topic, partition.id(), PATIENCE)?;
            if high > low {
                ends.insert((topic.clone(), partition.id()), high);
                assignment.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
            }
        }
    }
    consumer.assign(&assignment)?;
    let mut records = Vec::new();
    while !ends.is_empty() {
        let message = consumer.poll(PATIENCE).context("a record before the end")??;
        let headers = message.headers().into_iter().flat_map(Headers::iter);
        records.push(Record {
            topic: message.topic().to_owned(),
            partition: message.partition(),
            key: String::from_utf8(message.key().context("a key")?.to_vec())?,
            value: message.payload().map(<[u8]>::to_vec),
            headers: headers
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect(),
        });
        let place = (message.topic().to_owned(), message.partition());
        if ends.get(&place) == Some(&(message.offset() + 1)) {
            ends.remove(&place);
        }
    }
    Ok(records)
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) rows: usize,
    pub(crate) records: usize,
    /// Records of rows that were published before, with the same bytes.
    pub(crate) repeats: usize,
    /// Records of rows that are not there.
    pub(crate) ghosts: usize,
}

/// Every row of `query` (event id, and topic and key, in order) is on Kafka, and of each key the first records of the rows
/// are in the rows' order, on one partition; repeats are the same bytes.
pub(crate) async fn compare(client: &Client, query: &str, records: &[Record]) -> Outcome {
    let rows = client.query(query, &[]).await.expect("read");
    let mut expected: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in &rows {
        expected.entry(row.get(1)).or_default().push(row.get(0));
    }
    let known: HashSet<&str> = expected.values().flatten().map(String::as_str).collect();
    let mut first: HashMap<&str, &Record> = HashMap::new();
    let mut published: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut partitions: HashMap<String, i32> = HashMap::new();
    let (mut repeats, mut ghosts) = (0, 0);
    for record in records {
        let (id, entity) = (record.event_id(), format!("{}/{}", record.topic, record.key));
        let partition = *partitions.entry(entity.clone()).or_insert(record.partition);
        assert_eq!(partition, record.partition, "{entity} is on two partitions");
        if let Some(before) = first.get(id) {
            assert_eq!(before.value, record.value, "a repeat of {id} has another value");
            repeats += 1;
            continue;
        }
        first.insert(id, record);
        if known.contains(id) {
            published.entry(entity).or_default().push(id.to_owned());
        } else {
            ghosts += 1;
        }
    }
    for (entity, ids) in &expected {
        let found = published.get(entity).map_or(&[][..], Vec::as_slice);
        let missing: Vec<&String> = ids.iter().filter(|id| !first.contains_key(id.as_str())).collect();
        assert!(
            missing.is_empty(),
            "{} rows of {entity} are not on Kafka: {missing:?}",
            missing.len()
        );
        assert_eq!(found, ids, "the order of {entity}");
    }
    Outcome {
        rows: rows.len(),
        records: records.len(),
        repeats,
        ghosts,
    }
}

/// Where a number ends up that only people look at: past the harness, which shows nothing of tests that pass.
pub(crate) fn report(what: &str, outcome: &impl std::fmt::Debug) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{what}: {outcome:?}");
}
