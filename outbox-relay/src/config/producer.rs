//! What the producer is configured with: what may be overridden, and what may not.

use std::collections::BTreeMap;

use rdkafka::config::ClientConfig;
use secrecy::{ExposeSecret as _, SecretString};
use service::config::Kafka;

/// The producer's configuration.
pub(super) fn config(kafka: &Kafka, password: Option<&SecretString>) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in PRODUCER_DEFAULTS {
        config.set(name, value);
    }
    // A record that is larger than the queue would wait for room for ever.
    let largest = max_record_bytes(kafka).div_ceil(1024);
    config.set(QUEUE_KBYTES, largest.max(MIN_QUEUE_KBYTES).to_string());
    for (name, value) in &kafka.properties {
        config.set(name, value);
    }
    config.set("bootstrap.servers", &kafka.brokers);
    for (name, value, _) in PRODUCER_FIXED {
        config.set(name, value);
    }
    if let Some(password) = password {
        config.set("sasl.password", password.expose_secret());
    }
    config
}

/// The largest record that the producer takes, in bytes.
pub(super) fn max_record_bytes(kafka: &Kafka) -> usize {
    kafka
        .properties
        .get("message.max.bytes")
        .and_then(|value| value.parse().ok())
        .unwrap_or(DEFAULT_MAX_RECORD_BYTES)
}

/// The broker's default.
const DEFAULT_MAX_RECORD_BYTES: usize = 1_000_012;

/// Bounds the bytes in flight.
const QUEUE_KBYTES: &str = "queue.buffering.max.kbytes";
const MIN_QUEUE_KBYTES: usize = 16_384;

/// What fits most; any of it can be overridden.
const PRODUCER_DEFAULTS: [(&str, &str); 6] = [
    ("client.id", "outbox-relay"),
    // Batches form by themselves while a request is in flight; waiting for more only costs latency.
    ("linger.ms", "0"),
    ("compression.type", "lz4"),
    ("batch.num.messages", "10000"),
    // Bounds what is in flight, and with it the memory: with its headers a small record takes 2 kB. It is a full batch for
    // each of several partitions.
    ("queue.buffering.max.messages", "8000"),
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

/// A property that would break the protocol, and why.
pub(super) fn refused_property(properties: &BTreeMap<String, String>) -> Option<(&str, &'static str)> {
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
