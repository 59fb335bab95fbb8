//! Configuration of the relay.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rdkafka::config::ClientConfig;
use secrecy::{ExposeSecret as _, SecretString};
use service::config::{Admin, Instance, Kafka, Log, Reader, Reported, Telemetry};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// What the relay's environment variables start with.
pub const ENV_PREFIX: &str = "OUTBOX_RELAY_";

/// A whole configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub instance: Instance,
    pub admin: Admin,
    pub log: Log,
    pub telemetry: Telemetry,
    pub kafka: Kafka,
    /// By name.
    pub outboxes: BTreeMap<String, Outbox>,
}

/// `[outbox.<name>]`: one outbox table.
#[derive(Debug, Clone)]
pub struct Outbox {
    pub database_url: SecretString,
    pub table: TableName,
    /// Where rows go that name no topic.
    pub topic: TopicTemplate,
    /// Pause between polls while rows come.
    pub poll_min: Duration,
    /// Pause between polls while none come.
    pub poll_max: Duration,
    /// How long the lease outlives its leader.
    pub lease_ttl: Duration,
    /// How often progress is saved: what a crash republishes at the most.
    pub save_interval: Duration,
    /// Rows of one read at the most.
    pub fetch_rows: u32,
    /// Bytes of one read at the most, give or take a row.
    pub fetch_bytes: usize,
    /// When Kafka acknowledges nothing for so long, the producer is thrown away and everything read again.
    pub delivery_timeout: Duration,
}

impl Outbox {
    /// Bound on each statement: several fit into a lease.
    pub fn statement_timeout(&self) -> Duration {
        self.lease_ttl / 3
    }

    /// Nothing is handed to the producer when less than this is left of the lease.
    pub fn lease_margin(&self) -> Duration {
        self.lease_ttl / 4
    }
}

impl Config {
    /// Reads everything.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let instance = Instance::read(reader);
        let admin = Admin::read(reader, 9100);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let kafka = Kafka::read(reader).and_then(|kafka| match refused_property(&kafka.properties) {
            None => Ok(kafka),
            Some((name, why)) => reader.reject(&format!("kafka.properties.{name}"), why),
        });
        let names = reader.children("outbox");
        if names.is_empty() {
            return reader.reject(
                "outbox",
                "no outbox is configured: give at least outbox.NAME.database_url",
            );
        }
        let outboxes: Vec<Result<(String, Outbox), Reported>> = names
            .into_iter()
            .map(|name| Ok((name.clone(), Outbox::read(reader, &name)?)))
            .collect();
        Ok(Self {
            instance: instance?,
            admin: admin?,
            log: log?,
            telemetry: telemetry?,
            kafka: kafka?,
            outboxes: outboxes.into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// The producer's configuration.
    pub fn producer(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        for (name, value) in PRODUCER_DEFAULTS {
            config.set(name, value);
        }
        for (name, value) in &self.kafka.properties {
            config.set(name, value);
        }
        config.set("bootstrap.servers", &self.kafka.brokers);
        for (name, value, _) in PRODUCER_FIXED {
            config.set(name, value);
        }
        config
    }

    /// The largest record that the producer takes, in bytes.
    pub fn max_record_bytes(&self) -> usize {
        self.kafka
            .properties
            .get("message.max.bytes")
            .and_then(|value| value.parse().ok())
            .unwrap_or(DEFAULT_MAX_RECORD_BYTES)
    }
}

/// The broker's default.
const DEFAULT_MAX_RECORD_BYTES: usize = 1_000_012;

/// What fits most; any of it can be overridden.
const PRODUCER_DEFAULTS: [(&str, &str); 7] = [
    ("client.id", "outbox-relay"),
    // Batches form by themselves while a request is in flight; waiting for more only costs latency.
    ("linger.ms", "0"),
    ("compression.type", "lz4"),
    ("batch.num.messages", "10000"),
    // Bounds what is in flight, and with it the memory.
    ("queue.buffering.max.messages", "50000"),
    ("queue.buffering.max.kbytes", "32768"),
    ("message.max.bytes", "1000012"),
];

/// What the protocol stands on, and why.
const PRODUCER_FIXED: [(&str, &str, &str); 7] = [
    (
        "enable.idempotence",
        "true",
        "the broker could write records twice or out of order",
    ),
    ("acks", "all", "an acknowledged record could be lost"),
    (
        "max.in.flight.requests.per.connection",
        "1",
        "a failed request could be overtaken by the one behind it",
    ),
    (
        "enable.gapless.guarantee",
        "true",
        "a record could be written although one before it failed",
    ),
    (
        "message.timeout.ms",
        "0",
        "a record could time out while those behind it are written; use outbox.NAME.delivery_timeout",
    ),
    (
        "partitioner",
        "murmur2_random",
        "keys would go to other partitions than Java's and this project's clients send them to",
    ),
    (
        "allow.auto.create.topics",
        "false",
        "topics would come up with the broker's defaults",
    ),
];

/// Names under which librdkafka knows properties of [`PRODUCER_FIXED`] as well.
const ALIASES: [(&str, &str); 4] = [
    ("request.required.acks", "acks"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("delivery.timeout.ms", "message.timeout.ms"),
    ("bootstrap.servers", "metadata.broker.list"),
];

fn refused_property(properties: &BTreeMap<String, String>) -> Option<(&str, &'static str)> {
    properties.iter().find_map(|(name, value)| {
        let canonical = ALIASES
            .iter()
            .find(|(alias, _)| alias == name)
            .map_or(name.as_str(), |(_, name)| name);
        if canonical == "metadata.broker.list" {
            return Some((name.as_str(), "give the brokers as kafka.brokers"));
        }
        if canonical == "transactional.id" {
            return Some((name.as_str(), "the relay does not use transactions"));
        }
        PRODUCER_FIXED
            .iter()
            .find(|(fixed, needed, _)| {
                *fixed == canonical && needed != value && !(*fixed == "acks" && value == "-1")
            })
            .map(|(_, _, why)| (name.as_str(), *why))
    })
}

impl Outbox {
    fn read(reader: &mut Reader, name: &str) -> Result<Self, Reported> {
        let key = |key: &str| format!("outbox.{name}.{key}");
        let database_url = reader.secret(&key("database_url")).and_then(|url| {
            match url.expose_secret().parse::<tokio_postgres::Config>() {
                Ok(_) => Ok(url),
                Err(_) => reader.reject(
                    &key("database_url"),
                    "must be like postgres://user@host:port/database (hidden)",
                ),
            }
        });
        let table = reader.or(&key("table"), TableName::default());
        let topic = reader.or(&key("topic"), TopicTemplate::default());
        let poll_min = reader.duration(&key("poll_min"), MS, MS..=SECOND);
        let poll_max = reader.duration(&key("poll_max"), 20 * MS, MS..=MINUTE);
        let lease_ttl = reader.duration(&key("lease_ttl"), 10 * SECOND, SECOND..=10 * MINUTE);
        let save_interval = reader.duration(&key("save_interval"), 250 * MS, 10 * MS..=10 * SECOND);
        let fetch_rows = reader.number(&key("fetch_rows"), 5_000, 1..=100_000);
        let fetch_bytes = reader.number(&key("fetch_bytes"), 8 << 20, 1 << 10..=1 << 30);
        let delivery_timeout = reader.duration(&key("delivery_timeout"), MINUTE, SECOND..=10 * MINUTE);
        let outbox = Self {
            database_url: database_url?,
            table: table?,
            topic: topic?,
            poll_min: poll_min?,
            poll_max: poll_max?,
            lease_ttl: lease_ttl?,
            save_interval: save_interval?,
            fetch_rows: fetch_rows?,
            fetch_bytes: fetch_bytes?,
            delivery_timeout: delivery_timeout?,
        };
        if outbox.poll_max < outbox.poll_min {
            return reader.reject(&key("poll_max"), "must not be shorter than poll_min");
        }
        if outbox.save_interval * 3 > outbox.lease_ttl {
            return reader.reject(
                &key("save_interval"),
                "must be at most a third of lease_ttl: saving renews the lease",
            );
        }
        Ok(outbox)
    }
}

/// A table with its schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName {
    schema: String,
    name: String,
}

impl TableName {
    pub fn schema(&self) -> &str {
        &self.schema
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As an SQL identifier.
    pub fn quoted(&self) -> String {
        self.sibling_quoted(&self.name)
    }

    /// Another table of the same schema, as an SQL identifier.
    pub fn sibling_quoted(&self, name: &str) -> String {
        format!("{}.{}", quote(&self.schema), quote(name))
    }
}

fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

impl Default for TableName {
    fn default() -> Self {
        Self {
            schema: "public".to_owned(),
            name: "outbox".to_owned(),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl FromStr for TableName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (schema, name) = text.split_once('.').unwrap_or(("public", text));
        if schema.is_empty() || name.is_empty() || name.contains('.') || text.contains('\0') {
            return Err("must be TABLE or SCHEMA.TABLE, without quotes");
        }
        Ok(Self {
            schema: schema.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// A topic name in which `{aggregate_type}` stands for the row's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicTemplate(String);

const AGGREGATE_TYPE: &str = "{aggregate_type}";

impl TopicTemplate {
    pub fn topic_of(&self, aggregate_type: &str) -> String {
        self.0.replace(AGGREGATE_TYPE, aggregate_type)
    }
}

impl Default for TopicTemplate {
    fn default() -> Self {
        Self(format!("events.{AGGREGATE_TYPE}"))
    }
}

impl fmt::Display for TopicTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TopicTemplate {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.replace(AGGREGATE_TYPE, "").contains(['{', '}', '/', ' ']) {
            return Err("must be a topic name, in which only {aggregate_type} is replaced");
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use service::config;

    use super::*;

    fn read(toml: &str) -> Result<Config, String> {
        config::parse(config::Sources::new(ENV_PREFIX).toml(toml), Config::read)
            .map_err(|errors| errors.to_string())
    }

    const MINIMAL: &str = "kafka.brokers = \"h:1\"\noutbox.a.database_url = \"postgres://u:pw1@h/d\"\n";

    #[test]
    fn little_is_needed() {
        let config = read(MINIMAL).expect("valid");
        let outbox = &config.outboxes["a"];
        assert_eq!(outbox.table.quoted(), "\"public\".\"outbox\"");
        assert_eq!(outbox.topic.topic_of("order"), "events.order");
        assert_eq!(config.producer().get("acks"), Some("all"));
    }

    #[test]
    fn properties_pass_through_unless_they_break_the_protocol() {
        let config = read(&format!(
            "{MINIMAL}kafka.properties.\"linger.ms\" = 50\nkafka.properties.acks = -1"
        ));
        let config = config.expect("valid");
        assert_eq!(config.producer().get("linger.ms"), Some("50"));
        assert_eq!(config.producer().get("acks"), Some("all"));
        for property in [
            "acks = 1",
            "\"request.required.acks\" = 1",
            "\"enable.idempotence\" = false",
            "\"max.in.flight\" = 5",
            "\"message.timeout.ms\" = 1000",
            "partitioner = \"random\"",
            "\"transactional.id\" = \"x\"",
            "\"bootstrap.servers\" = \"x\"",
        ] {
            let errors = read(&format!("{MINIMAL}kafka.properties.{property}")).expect_err(property);
            assert!(errors.contains("kafka.properties."), "{errors}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once_without_secrets() {
        let errors = read(
            "kafka.brokerz = 1\n[outbox.a]\ndatabase_url = \"nonsense pw1\"\ntable = \"a.b.c\"\ntopic = \"{x}\"\n\
             lease_ttl = \"1s\"\nsave_interval = \"5s\"\n[outbox.b]\nlease_ttl = \"0s\"",
        )
        .expect_err("bad");
        for part in [
            "kafka.brokers",
            "kafka.brokerz",
            "outbox.a.database_url",
            "outbox.a.table",
            "outbox.a.topic",
        ] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
        for part in ["outbox.b.database_url", "outbox.b.lease_ttl"] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
        assert!(!errors.contains("pw1"), "{errors}");
        assert!(
            read("kafka.brokers = \"h:1\"")
                .expect_err("none")
                .contains("no outbox is configured")
        );
        let slow = read(&format!("{MINIMAL}outbox.a.save_interval = \"4s\"")).expect_err("slow");
        assert!(slow.contains("a third of lease_ttl"), "{slow}");
    }
}
