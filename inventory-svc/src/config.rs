//! The configuration of inventory-svc.

use std::time::Duration;

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "INVENTORY_SVC_";

/// The topics that are read, by their keys in `[consumer]`.
const TOPICS: [(&str, &str); 1] = [("order_topic", contracts::topics::ORDER)];

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
    /// `[kafka]` and `[consumer]`: the events of orders.
    pub orders: consumer::Config,
    /// `requests.keep`: how long repeats of a request id get the first response.
    pub keep_requests: Duration,
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    /// The reader has noted what is wrong.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let grpc = Grpc::read(reader, 50055);
        let admin = Admin::read(reader, 9105);
        let database = Database::read(reader);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        let keep_requests = reader.duration("requests.keep", 2 * DAY, DAY..=365 * DAY);
        let instance = instance?;
        let orders = subscription::read(reader, &instance, "inventory-svc", &TOPICS)?;
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance,
            orders,
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
        let toml = "database.url = \"postgres://u@h/inventory\"\nkafka.brokers = \"h:1\"";
        let config = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect("valid");
        assert_eq!(config.orders.group, "inventory-svc");
        assert_eq!(
            config.orders.topics,
            [consumer::Topic::from_beginning("events.order")]
        );
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[requests]\nkeep = \"1h\"\n[grpc]\nlisten = \"x\"\nextra = 1";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect_err("invalid");
        assert_eq!(errors.problems().len(), 5, "{errors}");
        for part in [
            "database.url",
            "requests.keep",
            "grpc.listen",
            "grpc.extra",
            "kafka.brokers",
        ] {
            assert!(errors.to_string().contains(part), "{part}: {errors}");
        }
    }
}
