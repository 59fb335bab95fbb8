//! What this process is told.

use std::time::Duration;

use consumer::Topic;
use service::config::{Admin, Database, Grpc, Instance, Kafka, Log, Reader, Reported, Telemetry};

/// What environment variables of this process start with.
pub const PREFIX: &str = "ORDER_QUERY_SVC_";

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Everything, checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub grpc: Grpc,
    pub admin: Admin,
    /// `database.pool_size` is for queries; the projection has as many connections again as it has workers.
    pub database: Database,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
    /// `[kafka]` and `[projection]`.
    pub projection: consumer::Config,
    /// `queries.max_waiting`: calls of GetOrderView that wait, and streams of WatchOrder.
    pub max_waiting: usize,
}

impl Config {
    /// Reads all sections.
    ///
    /// # Errors
    /// When something is wrong; the reader has noted everything.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let grpc = Grpc::read(reader, 50052);
        let admin = Admin::read(reader, 9102);
        let database = Database::read(reader);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        let projection = projection(reader);
        let max_waiting = reader.number("queries.max_waiting", 10_000, 1..=1_000_000);
        let (instance, mut projection) = (instance?, projection?);
        // A name that is made up at each start would only keep partitions from moving on when the process has gone.
        projection.instance = reader.is_given("service.instance").then(|| instance.name.clone());
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance,
            projection,
            max_waiting: max_waiting?,
        })
    }
}

fn projection(reader: &mut Reader) -> Result<consumer::Config, Reported> {
    let kafka = Kafka::read(reader);
    let group = reader.or("projection.group", "order-query-svc".to_owned());
    let topic = reader.or("projection.topic", contracts::topics::ORDER.to_owned());
    let defaults = consumer::Config::new("", "", Vec::new());
    let workers = reader.number("projection.workers", defaults.workers, 1..=256);
    let batch_records = reader.number("projection.batch_records", defaults.batch_records, 1..=10_000);
    let linger = reader.duration("projection.linger", defaults.linger, Duration::ZERO..=5 * SECOND);
    let in_flight_records = reader.number(
        "projection.in_flight_records",
        defaults.in_flight_records,
        1..=10_000_000,
    );
    let in_flight_bytes = reader.number(
        "projection.in_flight_bytes",
        defaults.in_flight_bytes,
        1 << 20..=1 << 40,
    );
    let transaction_timeout = reader.duration(
        "projection.transaction_timeout",
        defaults.transaction_timeout,
        100 * MS..=10 * MINUTE,
    );
    let idle_transaction_timeout = reader.duration(
        "projection.idle_transaction_timeout",
        defaults.idle_transaction_timeout,
        100 * MS..=10 * MINUTE,
    );
    let drain_timeout = reader.duration(
        "projection.drain_timeout",
        defaults.drain_timeout,
        MS..=10 * MINUTE,
    );
    let kafka = kafka?;
    let config = consumer::Config {
        brokers: kafka.brokers,
        group: group?,
        topics: vec![Topic::from_beginning(topic?)],
        workers: workers?,
        batch_records: batch_records?,
        linger: linger?,
        in_flight_records: in_flight_records?,
        in_flight_bytes: in_flight_bytes?,
        transaction_timeout: transaction_timeout?,
        idle_transaction_timeout: idle_transaction_timeout?,
        drain_timeout: drain_timeout?,
        properties: kafka.properties,
        ..defaults
    };
    let mut result = Ok(());
    for problem in config.problems() {
        result = reader.reject("projection", &problem);
    }
    result.map(|()| config)
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    const MINIMAL: &str = "[database]\nurl = \"postgres://u@h/d\"\n[kafka]\nbrokers = \"h:1\"\n";

    #[test]
    fn addresses_are_all_that_must_be_given() {
        let config = parse(Sources::new(PREFIX).toml(MINIMAL), Config::read).expect("valid");
        assert_eq!(config.projection.group, "order-query-svc");
        assert_eq!(config.projection.topics, [Topic::from_beginning("events.order")]);
        assert_eq!(config.projection.instance, None);
    }

    #[test]
    fn a_given_instance_is_a_static_member() {
        let toml = format!("{MINIMAL}[service]\ninstance = \"view-1\"");
        let config = parse(Sources::new(PREFIX).toml(&toml), Config::read).expect("valid");
        assert_eq!(config.projection.instance.as_deref(), Some("view-1"));
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let toml = "[kafka]\nbrokers = \"h:1\"\n[kafka.properties]\n\"enable.auto.commit\" = \"false\"\n\
                    [projection]\nworkers = 0\nspeed = 9";
        let errors = parse(Sources::new(PREFIX).toml(toml), Config::read)
            .expect_err("invalid")
            .to_string();
        for part in ["database.url", "projection.workers", "projection.speed"] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
    }

    #[test]
    fn properties_that_would_break_a_promise_are_refused() {
        let toml = format!("{MINIMAL}[kafka.properties]\n\"enable.auto.commit\" = \"false\"");
        let errors = parse(Sources::new(PREFIX).toml(&toml), Config::read)
            .expect_err("invalid")
            .to_string();
        assert!(errors.contains("enable.auto.commit"), "{errors}");
    }
}
