//! What a consumer is told: where, as whom, and within which bounds.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;

use crate::parked::DEAD_LETTER_SUFFIX;

/// librdkafka properties that this crate's promises rest on; setting them is refused.
const RESERVED: [(&str, &str); 10] = [
    ("bootstrap.servers", "set `brokers`"),
    ("metadata.broker.list", "set `brokers`"),
    ("group.id", "set `group`"),
    ("group.instance.id", "set `instance`"),
    (
        "enable.auto.commit",
        "stored offsets are committed in the background",
    ),
    (
        "enable.auto.offset.store",
        "offsets are stored only after the effects have committed",
    ),
    (
        "auto.offset.reset",
        "a new group starts at the beginning; a lost offset must not skip records",
    ),
    (
        "isolation.level",
        "records of aborted transactions must not be seen",
    ),
    (
        "partition.assignment.strategy",
        "rebalances are handled incrementally",
    ),
    ("group.protocol", "rebalances are handled by the classic protocol"),
];

/// A topic to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// What to take for the first version of an entity that has no mark yet.
    pub start: Start,
}

impl Topic {
    /// A topic that still has all of its records: every entity must start at version 1.
    pub fn from_beginning(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            start: Start::Beginning,
        }
    }

    /// A topic of a source that does not count the versions of its entities: repeats are known by their event ids, for as long as
    /// [`Config::keep_seen`] says, and a record that is missing cannot be noticed. Its `aggregate-version` headers, if there are any, are not
    /// looked at.
    pub fn by_event_id(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            start: Start::Uncounted,
        }
    }

    /// A topic whose beginning is gone: an entity starts at whichever version is seen first.
    pub fn baseline(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            start: Start::Baseline,
        }
    }
}

/// What to take for the first version of an entity that has no mark yet, if there are versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Version 1; anything higher is a gap.
    Beginning,
    /// Whichever version comes first.
    Baseline,
    /// None: the source does not count, and a repeat is known by its event id.
    Uncounted,
}

/// Settings of a [`Consumer`](crate::Consumer). [`Config::new`] fills in defaults that suit a projection.
#[derive(Debug, Clone)]
pub struct Config {
    /// `host:port,…` of Kafka.
    pub brokers: String,
    /// The name under which marks are kept, and the Kafka group.
    pub group: String,
    /// A name that this process keeps over restarts (static membership): coming back within the session timeout then
    /// causes no rebalance. Two live processes must never share it. `None`: dynamic membership.
    pub instance: Option<String>,
    /// What to read.
    pub topics: Vec<Topic>,
    /// Ordered workers, each with at most one transaction at a time.
    pub workers: usize,
    /// The most records that share a transaction.
    pub batch_records: usize,
    /// How long an idle worker waits for more records before it takes fewer than `batch_records`. Zero: it takes what is there; a
    /// busy worker's records gather meanwhile, so batches grow with the load all the same.
    pub linger: Duration,
    /// The most records held in memory, over all partitions.
    pub in_flight_records: usize,
    /// The most bytes of keys, values and headers held in memory, over all partitions, but for one record each.
    pub in_flight_bytes: usize,
    /// The most bytes of key and value that a record may have; a larger one parks.
    pub max_record_bytes: usize,
    /// How far ahead of this machine's clock an event may have happened; one from further ahead parks.
    pub max_ahead: Duration,
    /// Deadline of one attempt of a batch, from `BEGIN` to the answer to `COMMIT`.
    pub transaction_timeout: Duration,
    /// How long PostgreSQL lets a batch's transaction sit idle before it ends the session. It bounds how long a stopped process
    /// can hold the marks that its successor waits for.
    pub idle_transaction_timeout: Duration,
    /// First and longest pause between attempts after a transient failure.
    pub backoff: (Duration, Duration),
    /// How long a shutdown waits for the batches under way, and then for the last offsets to be committed.
    pub drain_timeout: Duration,
    /// How long event ids are kept of topics that are read [by event id](Topic::by_event_id). A record that comes again later than that takes
    /// effect again: it has to be longer than the topic's retention, and than what an outage of whoever publishes may take.
    pub keep_seen: Duration,
    /// How long parked records stay after they were replayed, or found to be repeats or superseded, with what was decided about them.
    /// Discarded ones stay for ever: rebuilds need them.
    pub keep_settled: Duration,
    /// Further librdkafka properties. Those that would break a promise of this crate are refused.
    pub properties: BTreeMap<String, String>,
}

impl Config {
    /// Settings for reading `topics` as `group`, with defaults for the rest.
    pub fn new(brokers: impl Into<String>, group: impl Into<String>, topics: Vec<Topic>) -> Self {
        Self {
            brokers: brokers.into(),
            group: group.into(),
            instance: None,
            topics,
            workers: 4,
            batch_records: 500,
            linger: Duration::ZERO,
            // A pause throws away what the client has fetched ahead: these should be rare.
            in_flight_records: 50_000,
            in_flight_bytes: 64 << 20,
            // Kafka's default is a little more, headers included.
            max_record_bytes: 1_000_000,
            max_ahead: Duration::from_secs(3600),
            transaction_timeout: Duration::from_secs(30),
            idle_transaction_timeout: Duration::from_secs(5),
            backoff: (Duration::from_millis(50), Duration::from_secs(2)),
            drain_timeout: Duration::from_secs(10),
            keep_seen: Duration::from_secs(30 * 24 * 3600),
            keep_settled: Duration::from_secs(90 * 24 * 3600),
            properties: BTreeMap::new(),
        }
    }

    /// Everything that is wrong with these settings; empty when they can be used.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: &str| {
            if !holds {
                problems.push(problem.to_owned());
            }
        };
        require(!self.brokers.trim().is_empty(), "brokers must not be empty");
        require(!self.group.trim().is_empty(), "group must not be empty");
        require(self.instance.as_deref() != Some(""), "instance must not be empty");
        require(!self.topics.is_empty(), "topics must not be empty");
        // Kafka's limit, less what dead letters' topics are called behind it.
        let longest = 249 - DEAD_LETTER_SUFFIX.len();
        let distinct = |(position, topic): (usize, &Topic)| {
            (1..=longest).contains(&topic.name.len())
                && self.topics[..position]
                    .iter()
                    .all(|other| other.name != topic.name)
        };
        require(
            self.topics.iter().enumerate().all(distinct),
            "topics must be named, each once, in at most 245 characters",
        );
        require((1..=256).contains(&self.workers), "workers must be 1 to 256");
        require(
            (1..=10_000).contains(&self.batch_records),
            "batch_records must be 1 to 10,000",
        );
        require(
            self.linger <= Duration::from_secs(5),
            "linger must be at most 5 s",
        );
        require(
            self.in_flight_records >= self.batch_records,
            "in_flight_records must be at least batch_records",
        );
        require(
            self.in_flight_bytes >= 1 << 20,
            "in_flight_bytes must be at least 1 MiB",
        );
        require(
            (1..=64 << 20).contains(&self.max_record_bytes),
            "max_record_bytes must be 1 to 64 MiB",
        );
        require(
            self.transaction_timeout >= Duration::from_millis(100),
            "transaction_timeout must be at least 100 ms",
        );
        require(
            self.idle_transaction_timeout >= Duration::from_millis(100),
            "idle_transaction_timeout must be at least 100 ms",
        );
        require(
            !self.backoff.0.is_zero() && self.backoff.0 <= self.backoff.1,
            "backoff must be positive, and its first pause at most its longest",
        );
        for (name, instead) in RESERVED {
            if self.properties.contains_key(name) {
                problems.push(format!("property {name} cannot be set: {instead}"));
            }
        }
        problems
    }

    /// The client's settings. Every value is a bound or a promise; see `Client settings that matter` in the design.
    pub(crate) fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        for (name, value) in [
            // A crashed process's partitions move on after the session timeout, a restarted one is back within it.
            ("session.timeout.ms", "10000"),
            ("heartbeat.interval.ms", "2000"),
            // How much may be repeated after a crash.
            ("auto.commit.interval.ms", "1000"),
            ("check.crcs", "true"),
            // What librdkafka itself keeps in memory ahead of us.
            ("queued.min.messages", "20000"),
            ("queued.max.messages.kbytes", "16384"),
            // The default holds a full queue back for a whole second.
            ("fetch.queue.backoff.ms", "5"),
            ("reconnect.backoff.ms", "50"),
            ("reconnect.backoff.max.ms", "2000"),
            // Topics and partitions made after the start are found by this.
            ("topic.metadata.refresh.interval.ms", "10000"),
            ("allow.auto.create.topics", "false"),
            ("socket.keepalive.enable", "true"),
            // Lag and reachability of the brokers, for the metrics.
            ("statistics.interval.ms", "1000"),
        ] {
            client.set(name, value);
        }
        for (name, value) in &self.properties {
            client.set(name, value);
        }
        client
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", &self.group)
            .set("enable.auto.commit", "true")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_committed")
            .set("partition.assignment.strategy", "cooperative-sticky");
        if let Some(instance) = &self.instance {
            client.set("group.instance.id", instance);
        }
        client
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> Config {
        Config::new(
            "localhost:9092",
            "view",
            vec![Topic::from_beginning("events.order")],
        )
    }

    #[test]
    fn the_defaults_are_usable() {
        assert_eq!(usable().problems(), Vec::<String>::new());
        usable()
            .client()
            .create_native_config()
            .expect("librdkafka knows every property");
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let mut config = usable();
        config.group = String::new();
        config.workers = 0;
        config.topics.push(Topic::baseline("events.order"));
        config
            .properties
            .insert("enable.auto.offset.store".into(), "true".into());
        let problems = config.problems();
        assert_eq!(problems.len(), 4, "{problems:?}");
    }

    #[test]
    fn properties_pass_through_but_promises_stay() {
        let mut config = usable();
        config
            .properties
            .insert("session.timeout.ms".into(), "7000".into());
        let client = config.client();
        assert_eq!(client.get("session.timeout.ms"), Some("7000"));
        assert_eq!(client.get("enable.auto.offset.store"), Some("false"));
        assert_eq!(client.get("isolation.level"), Some("read_committed"));
    }
}
