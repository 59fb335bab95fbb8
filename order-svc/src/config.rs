//! The configuration of order-svc.

use std::time::Duration;

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "ORDER_SVC_";

/// The topics that are read, by their keys in `[consumer]`.
const TOPICS: [(&str, &str); 2] = [
    ("inventory_topic", contracts::topics::INVENTORY),
    ("payment_topic", contracts::topics::PAYMENT),
];

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub grpc: Grpc,
    pub admin: Admin,
    /// `database.pool_size` is for commands and queries; the consumer has as many connections again as it has workers.
    pub database: Database,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
    /// `orders.pay_within`: how long users have to pay.
    pub pay_within: Duration,
    /// `orders.expiry_interval`: how often orders are looked for that should have been paid.
    pub expiry_interval: Duration,
    /// `[kafka]` and `[consumer]`: the events of reservations and payments.
    pub news: consumer::Config,
    /// `requests.keep`: how long repeats of a request id get the first response.
    pub keep_requests: Duration,
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    /// The reader has noted what is wrong.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let grpc = Grpc::read(reader, 50051);
        let admin = Admin::read(reader, 9101);
        let database = Database::read(reader);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        let pay_within = reader.duration("orders.pay_within", 30 * MINUTE, SECOND..=365 * DAY);
        let expiry_interval = reader.duration("orders.expiry_interval", SECOND, SECOND / 100..=60 * MINUTE);
        let keep_requests = reader.duration("requests.keep", 2 * DAY, DAY..=365 * DAY);
        let instance = instance?;
        let news = subscription::read(reader, &instance, "order-svc", &TOPICS)?;
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance,
            pay_within: pay_within?,
            expiry_interval: expiry_interval?,
            news,
            keep_requests: keep_requests?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    #[test]
    fn addresses_are_all_that_must_be_given() {
        let toml = "database.url = \"postgres://u@h/orders\"\nkafka.brokers = \"h:1\"";
        let config = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect("valid");
        assert_eq!(config.pay_within, 30 * MINUTE);
        assert_eq!(config.news.group, "order-svc");
        assert_eq!(
            config.news.topics,
            [
                consumer::Topic::from_beginning("events.inventory"),
                consumer::Topic::from_beginning("events.payment")
            ]
        );
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[orders]\npay_within = \"0s\"\nexpiry_interval = \"1ms\"\n[requests]\nkeep = \"1h\"\n\
                    [grpc]\nlisten = \"x\"\nextra = 1";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect_err("invalid");
        assert_eq!(errors.problems().len(), 7, "{errors}");
        for part in [
            "database.url",
            "orders.pay_within",
            "orders.expiry_interval",
            "requests.keep",
            "grpc.listen",
            "grpc.extra",
            "kafka.brokers",
        ] {
            assert!(errors.to_string().contains(part), "{part}: {errors}");
        }
    }
}
