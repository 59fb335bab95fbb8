//! The configuration of user-svc.

use std::time::Duration;

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "USER_SVC_";

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
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance: instance?,
            keep_requests: keep_requests?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    #[test]
    fn the_database_is_all_that_must_be_given() {
        let toml = "database.url = \"postgres://u@h/users\"";
        let config = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect("valid");
        assert_eq!(config.keep_requests, 2 * DAY);
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[requests]\nkeep = \"1h\"\n[grpc]\nlisten = \"x\"\nextra = 1";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect_err("invalid");
        assert_eq!(errors.problems().len(), 4, "{errors}");
        for part in ["database.url", "requests.keep", "grpc.listen", "grpc.extra"] {
            assert!(errors.to_string().contains(part), "{part}: {errors}");
        }
    }
}
