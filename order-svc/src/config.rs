//! The configuration of order-svc.

use std::time::Duration;

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "ORDER_SVC_";

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub grpc: Grpc,
    pub admin: Admin,
    pub database: Database,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
    /// `orders.pay_within`: how long users have to pay.
    pub pay_within: Duration,
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
        let pay_within = reader.duration(
            "orders.pay_within",
            30 * MINUTE,
            Duration::from_secs(1)..=365 * DAY,
        );
        let keep_requests = reader.duration("requests.keep", 2 * DAY, DAY..=365 * DAY);
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance: instance?,
            pay_within: pay_within?,
            keep_requests: keep_requests?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    #[test]
    fn only_the_database_must_be_given() {
        let sources = Sources::new(ENV_PREFIX).toml("database.url = \"postgres://u@h/orders\"");
        let config = parse(sources, Config::read).expect("valid");
        assert_eq!(config.pay_within, 30 * MINUTE);
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml =
            "[orders]\npay_within = \"0s\"\n[requests]\nkeep = \"1h\"\n[grpc]\nlisten = \"x\"\nextra = 1";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect_err("invalid");
        assert_eq!(errors.problems().len(), 5, "{errors}");
        for part in [
            "database.url",
            "orders.pay_within",
            "requests.keep",
            "grpc.listen",
            "grpc.extra",
        ] {
            assert!(errors.to_string().contains(part), "{part}: {errors}");
        }
    }
}
