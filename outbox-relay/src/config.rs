//! Configuration of the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::config::ClientConfig;
use secrecy::SecretString;
use service::config::{Admin, Instance, Kafka, Log, Reader, Reported, Telemetry};

pub use connection::{Connection, Pooling, TlsFiles};
pub use layout::{Columns, HeaderStyle, Headers, Layout, Profile};
pub use names::{TableName, TopicTemplate};

mod connection;
mod layout;
mod names;
mod producer;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

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
    /// `kafka.sasl_password`, which may come from a file.
    pub sasl_password: Option<SecretString>,
    /// By name.
    pub outboxes: BTreeMap<String, Outbox>,
}

/// `[outbox.<name>]`: one outbox table.
#[derive(Debug, Clone)]
pub struct Outbox {
    pub connection: Connection,
    pub table: TableName,
    pub layout: Layout,
    /// Where rows go that name no topic.
    pub topic: TopicTemplate,
    /// What versions promise.
    pub versions: Versions,
    /// What must have happened to a row before it is published.
    pub durability: Durability,
    /// How long published rows stay replayable; `None`: for ever.
    pub retention: Option<Duration>,
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

/// What the versions of an entity's rows promise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Versions {
    /// They count by one: an entity whose versions do not is frozen before its consumers see a gap.
    #[default]
    Contiguous,
    /// Nothing.
    Unchecked,
}

impl std::str::FromStr for Versions {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "contiguous" => Ok(Self::Contiguous),
            "unchecked" => Ok(Self::Unchecked),
            _ => Err("must be contiguous or unchecked"),
        }
    }
}

/// How safe a row must be before it is published. With `synchronous_commit = off`, a row can be seen and then be gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Durability {
    /// On the server's disk.
    #[default]
    Flushed,
    /// On the disks of its synchronous standbys too.
    Replicated,
    /// Committed.
    Committed,
}

impl std::str::FromStr for Durability {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "flushed" => Ok(Self::Flushed),
            "replicated" => Ok(Self::Replicated),
            "committed" => Ok(Self::Committed),
            _ => Err("must be flushed, replicated or committed"),
        }
    }
}

impl Outbox {
    /// Bound on each statement: several fit into a lease.
    pub fn statement_timeout(&self) -> Duration {
        self.lease_ttl / 3
    }

    /// How often a replica says that it is there.
    pub fn heartbeat(&self) -> Duration {
        self.lease_ttl / 5
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
        let kafka =
            Kafka::read(reader).and_then(|kafka| match producer::refused_property(&kafka.properties) {
                None => Ok(kafka),
                Some((name, why)) => reader.reject(&format!("kafka.properties.{name}"), why),
            });
        let sasl_password = reader.optional_secret("kafka.sasl_password");
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
            sasl_password: sasl_password?,
            outboxes: outboxes.into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// The producer's configuration.
    pub fn producer(&self) -> ClientConfig {
        producer::config(&self.kafka, self.sasl_password.as_ref())
    }

    /// The largest record that the producer takes, in bytes.
    pub fn max_record_bytes(&self) -> usize {
        producer::max_record_bytes(&self.kafka)
    }
}

impl Outbox {
    fn read(reader: &mut Reader, name: &str) -> Result<Self, Reported> {
        let section = format!("outbox.{name}");
        let key = |key: &str| format!("{section}.{key}");
        let connection = Connection::read(reader, &section);
        let table = reader.or(&key("table"), TableName::default());
        let profile = reader.or(&key("profile"), Profile::default());
        let layout = Layout::read(reader, &section, profile.unwrap_or_default());
        let topic = reader.or(
            &key("topic"),
            match profile.unwrap_or_default() {
                Profile::CloudEvents => TopicTemplate::default(),
                Profile::Debezium => TopicTemplate::prefixed("outbox.event"),
            },
        );
        let versions = reader.or(&key("versions"), Versions::default());
        let durability = reader.or(&key("durability"), Durability::default());
        let retention = match reader.optional::<String>(&key("retention")) {
            Ok(Some(text)) if text == "forever" => Ok(None),
            Ok(_) => reader
                .duration(&key("retention"), 7 * DAY, SECOND..=3650 * DAY)
                .map(Some),
            Err(reported) => Err(reported),
        };
        let poll_min = reader.duration(&key("poll_min"), 3 * MS / 10, MS / 10..=MINUTE);
        let poll_max = reader.duration(&key("poll_max"), 25 * MS, MS..=MINUTE);
        let lease_ttl = reader.duration(&key("lease_ttl"), 10 * SECOND, SECOND..=10 * MINUTE);
        let save_interval = reader.duration(&key("save_interval"), 250 * MS, 10 * MS..=10 * SECOND);
        let fetch_rows = reader.number(&key("fetch_rows"), 2_500, 1..=100_000);
        let fetch_bytes = reader.number(&key("fetch_bytes"), 8 << 20, 1 << 10..=1 << 30);
        let delivery_timeout = reader.duration(&key("delivery_timeout"), MINUTE, SECOND..=10 * MINUTE);
        profile?;
        let outbox = Self {
            connection: connection?,
            table: table?,
            layout: layout?,
            topic: topic?,
            versions: versions?,
            durability: durability?,
            retention: retention?,
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
        assert_eq!(outbox.table.quoted(), "public.outbox");
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
