//! Rows as writers insert them, topics byte for byte, and the relay's answers.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::process::Output;
use std::time::{Duration, Instant};

use local_stack::{testing, wait};
use outbox_relay::Config;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_postgres::Client;

use crate::support::{Bed, PATIENCE, brokers};

/// A record as it is on Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) key: String,
    pub(crate) headers: Vec<(String, Option<Vec<u8>>)>,
    pub(crate) payload: Option<Vec<u8>>,
}

impl Raw {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(found, _)| found == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    }

    pub(crate) fn version(&self) -> i64 {
        self.header("aggregate-version")
            .and_then(|version| version.parse().ok())
            .unwrap_or(-1)
    }
}

/// Every record of a topic; those of a key in order. None, while there is no such topic.
pub(crate) async fn read(topic: &str) -> Vec<Raw> {
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || read_now(&topic))
        .await
        .expect("read")
}

fn read_now(topic: &str) -> Vec<Raw> {
    let consumer: BaseConsumer = brokers().set("group.id", "unused").create().expect("consumer");
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).expect("metadata");
    let mut ends = BTreeMap::new();
    let mut assignment = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        // A partition that was just made has no leader for a moment.
        let deadline = Instant::now() + PATIENCE;
        let (low, high) = loop {
            match consumer.fetch_watermarks(topic, partition.id(), PATIENCE) {
                Ok(found) => break found,
                Err(error) => assert!(Instant::now() < deadline, "watermarks: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if high > low {
            ends.insert(partition.id(), high);
            assignment
                .add_partition_offset(topic, partition.id(), Offset::Beginning)
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
        let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
        records.push(Raw {
            key: String::from_utf8(message.key().expect("a key").to_vec()).expect("UTF-8"),
            headers: headers
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect(),
            payload: message.payload().map(<[u8]>::to_vec),
        });
        if ends.get(&message.partition()) == Some(&(message.offset() + 1)) {
            ends.remove(&message.partition());
        }
    }
    records
}

/// The versions of a key, in the order of the topic.
pub(crate) fn versions(records: &[Raw], key: &str) -> Vec<i64> {
    let of_key = records.iter().filter(|record| record.key == key);
    of_key.map(Raw::version).collect()
}

pub(crate) async fn create_topic(name: &str, config: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = brokers().create().expect("admin client");
    let topic = config.iter().fold(
        NewTopic::new(name, 2, TopicReplication::Fixed(1)),
        |topic, (name, value)| topic.set(name, value),
    );
    for created in admin
        .create_topics(&[topic], &AdminOptions::new())
        .await
        .expect("asked")
    {
        created.expect("created");
    }
}

/// Inserts one row of type `test`, and returns its id.
pub(crate) async fn insert(
    client: &impl tokio_postgres::GenericClient,
    key: &str,
    version: i64,
    topic: Option<&str>,
    payload: Option<&[u8]>,
) -> i64 {
    client
        .query_one(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, topic, source, payload,
                                 metadata)
             VALUES (gen_random_uuid(), 'test', $1, $2, 'test.moved', $3, '/test', $4, '{\"b\": \"2\", \"a\": \"1\"}')
             RETURNING id",
            &[&key, &version, &topic, &payload],
        )
        .await
        .expect("inserted")
        .get(0)
}

/// Bytes that no compression makes smaller.
pub(crate) fn noise(size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 16);
    while bytes.len() < size {
        bytes.extend_from_slice(uuid_bytes(testing::unique("")).as_slice());
    }
    bytes.truncate(size);
    bytes
}

fn uuid_bytes(unique: String) -> Vec<u8> {
    let hex = unique.trim_start_matches('-').as_bytes().chunks(2);
    hex.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// What is in quarantine, skipped rows left out: key, version, state, problem, attempts.
pub(crate) async fn quarantined(client: &Client) -> Vec<(String, i64, String, Option<String>, i32)> {
    let rows = client
        .query(
            "SELECT key, version, state, problem, attempts FROM outbox_relay_quarantine WHERE state <> 'skipped'
              ORDER BY key, version, id",
            &[],
        )
        .await
        .expect("read");
    rows.iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4)))
        .collect()
}

/// Keys and versions of it.
pub(crate) async fn kept(client: &Client) -> Vec<(String, i64)> {
    let rows = quarantined(client).await;
    rows.into_iter().map(|row| (row.0, row.1)).collect()
}

pub(crate) async fn wait_until<F, Fut>(what: &str, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let waited = wait::until(what, PATIENCE, || {
        let asked = check();
        async move { Ok(asked.await.then_some(())) }
    });
    if let Err(error) = waited.await {
        panic!("{error:#}");
    }
}

pub(crate) async fn until_quarantine_is_empty(bed: &Bed) {
    wait_until("the quarantine is empty", || async {
        kept(&bed.client).await.is_empty()
    })
    .await;
}

/// The configuration of a command.
pub(crate) fn toml(sections: &str) -> String {
    format!(
        "kafka.brokers = \"{}\"\nservice.instance = \"by-hand\"\n{sections}",
        testing::kafka_brokers()
    )
}

pub(crate) fn config(sections: &str) -> Config {
    let sources = service::config::Sources::new("T_").toml(&toml(sections));
    service::config::parse(sources, Config::read).expect("valid")
}

/// Runs the binary with this configuration.
pub(crate) async fn run(sections: &str, words: &[&str]) -> Output {
    let folder = testing::Folder::create("relay-command");
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, toml(sections)).expect("written");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    command.arg("--config").arg(&file).args(words);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OUTBOX_RELAY_")) {
        command.env_remove(name);
    }
    tokio::time::timeout(PATIENCE, command.kill_on_drop(true).output())
        .await
        .expect("it ends")
        .expect("it runs")
}

/// Runs the binary with `--json`: exit code, and what it says on standard output, or on standard error when it fails.
pub(crate) async fn json(sections: &str, words: &[&str]) -> (i32, Value) {
    let output = run(sections, &[words, &["--json"]].concat()).await;
    let code = output.status.code().expect("a code");
    let said = match output.stdout.is_empty() {
        true => &output.stderr,
        false => &output.stdout,
    };
    let text = String::from_utf8_lossy(said);
    let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {words:?}: {text}"));
    (code, value)
}

/// An answer of the admin port.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

pub(crate) async fn http(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("listening");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), asked)
        .await
        .expect("an answer in time");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Answer {
        code: code.expect("a code"),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
    http(address, "GET", path, "", "").await
}

/// With the relay's own header.
pub(crate) async fn post(address: SocketAddr, path: &str, body: &str) -> Answer {
    let headers = "content-type: application/json\r\nx-outbox-relay: 1\r\n";
    http(address, "POST", path, headers, body).await
}

/// The value of a metric of the outbox `test`.
pub(crate) async fn metric(address: SocketAddr, name: &str) -> f64 {
    let text = get(address, "/metrics").await.body;
    let line = text
        .lines()
        .find(|line| line.starts_with(name) && line.contains("outbox=\"test\""));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}
