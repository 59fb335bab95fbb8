//! A consumer as a part of a service: its section of the configuration, its connections, its readiness, and the commands on its
//! parked records.

use std::convert::Infallible;
use std::time::Duration;

use consumer::{Config, Consumer, Handler, Record, Topic};
use service::admin::Check;
use service::config::{Database, Instance, Kafka, Reader, Reported};
use service::db::Db;
use service::shutdown::BoxError;
use service::telemetry;

mod dlt;
mod rebuild;

pub use dlt::Dlt;
pub use rebuild::Rebuild;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// How often readiness is looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Reads `[kafka]` and `[consumer]`. `group` is the default of `consumer.group`. Each of `topics` is a key of `[consumer]` and its
/// default: `("order_topic", "events.order")`.
///
/// # Errors
/// When something is wrong; the reader has noted everything.
pub fn read(
    reader: &mut Reader,
    instance: &Instance,
    group: &str,
    topics: &[(&str, &str)],
) -> Result<Config, Reported> {
    let kafka = Kafka::read(reader);
    let group = reader.or("consumer.group", group.to_owned());
    let topics: Vec<_> = topics
        .iter()
        .map(|(key, default)| reader.or(&format!("consumer.{key}"), (*default).to_owned()))
        .collect();
    let defaults = Config::new("", "", Vec::new());
    let workers = reader.number("consumer.workers", defaults.workers, 1..=256);
    let batch_records = reader.number("consumer.batch_records", defaults.batch_records, 1..=10_000);
    let linger = reader.duration("consumer.linger", defaults.linger, Duration::ZERO..=5 * SECOND);
    let in_flight_records = reader.number(
        "consumer.in_flight_records",
        defaults.in_flight_records,
        1..=10_000_000,
    );
    let in_flight_bytes = reader.number(
        "consumer.in_flight_bytes",
        defaults.in_flight_bytes,
        1 << 20..=1 << 40,
    );
    let max_record_bytes = reader.number(
        "consumer.max_record_bytes",
        defaults.max_record_bytes,
        1..=64 << 20,
    );
    let max_ahead = reader.duration(
        "consumer.max_ahead",
        defaults.max_ahead,
        SECOND..=24 * 60 * MINUTE,
    );
    let transaction_timeout = reader.duration(
        "consumer.transaction_timeout",
        defaults.transaction_timeout,
        100 * MS..=10 * MINUTE,
    );
    let idle_transaction_timeout = reader.duration(
        "consumer.idle_transaction_timeout",
        defaults.idle_transaction_timeout,
        100 * MS..=10 * MINUTE,
    );
    let drain_timeout = reader.duration("consumer.drain_timeout", defaults.drain_timeout, MS..=10 * MINUTE);
    let keep_settled = reader.duration("consumer.keep_settled", defaults.keep_settled, DAY..=3650 * DAY);
    let kafka = kafka?;
    let config = Config {
        brokers: kafka.brokers,
        group: group?,
        // A name that is made up at each start would only keep partitions from moving on when the process has gone.
        instance: reader.is_given("service.instance").then(|| instance.name.clone()),
        topics: topics
            .into_iter()
            .map(|name| name.map(Topic::from_beginning))
            .collect::<Result<_, _>>()?,
        workers: workers?,
        batch_records: batch_records?,
        linger: linger?,
        in_flight_records: in_flight_records?,
        in_flight_bytes: in_flight_bytes?,
        max_record_bytes: max_record_bytes?,
        max_ahead: max_ahead?,
        transaction_timeout: transaction_timeout?,
        idle_transaction_timeout: idle_transaction_timeout?,
        drain_timeout: drain_timeout?,
        keep_settled: keep_settled?,
        properties: kafka.properties,
        ..defaults
    };
    let mut result = Ok(());
    for problem in config.problems() {
        result = reader.reject("consumer", &problem);
    }
    result.map(|()| config)
}

/// The consumer, with a pool of its own: one connection per worker, so that neither it nor the calls can keep the other waiting.
///
/// # Errors
/// When the configuration cannot be used.
pub fn build<H: Handler>(
    config: &Config,
    database: &Database,
    process: &str,
    handler: H,
    registry: &prometheus::Registry,
) -> Result<Consumer<H>, BoxError> {
    let database = Database {
        pool_size: config.workers,
        ..database.clone()
    };
    let db = Db::new(&database, &format!("{process} consumer"))?;
    Ok(Consumer::new(
        config.clone(),
        db.pool().clone(),
        handler,
        registry,
    )?)
}

/// Keeps a readiness check up to date, for ever.
pub async fn watch(status: consumer::Status, check: Check) -> Result<(), Infallible> {
    loop {
        let problems = status.problems();
        check.set(if problems.is_empty() {
            Ok(())
        } else {
            Err(problems.join("; "))
        });
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

/// The span of what one event of a batch leads to: a part of the event's trace, not of the batch's.
pub fn hear_span(record: &Record) -> tracing::Span {
    let envelope = &record.envelope;
    let span = tracing::info_span!(
        parent: None,
        "hear",
        otel.name = format!("hear {}", envelope.event_type),
        cause.event.id = %envelope.event_id,
        cause.event.r#type = envelope.event_type,
    );
    telemetry::set_parent(
        &span,
        envelope.traceparent.as_deref(),
        envelope.tracestate.as_deref(),
    );
    span
}

/// The longest that a consumer takes to end, once asked to.
pub fn longest_end(config: &Config) -> Duration {
    2 * config.drain_timeout
}
