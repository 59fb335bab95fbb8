//! The configuration of payment-sandbox.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use service::config::{Admin, Instance, Log, Reader, Reported, Telemetry};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "PAYMENT_SANDBOX_";

/// The port of stripe-mock.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 12111);
const MS: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// `http.listen`
    pub listen: SocketAddr,
    /// `http.drain`: how long requests in progress may take to end at shutdown.
    pub drain: Duration,
    /// `http.secret_key`: the key that callers must know.
    pub secret_key: SecretString,
    /// `storage.path`: the file that holds everything.
    pub path: PathBuf,
    /// `storage.keep_keys`: how long answers are repeated under their idempotency key.
    pub keep_keys: Duration,
    /// `faults.slow`: how long slow cards take.
    pub slow: Duration,
    /// `faults.hang`: how long a caller is kept waiting for nothing, unless it leaves before.
    pub hang: Duration,
    pub admin: Admin,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    /// The reader has noted what is wrong.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let listen = reader.or("http.listen", DEFAULT_LISTEN);
        let drain = reader.duration("http.drain", Duration::from_secs(5), Duration::ZERO..=MINUTE);
        let secret_key = reader.optional_secret("http.secret_key");
        let path = reader.or("storage.path", PathBuf::from("payment-sandbox.redb"));
        let keep_keys = reader.duration("storage.keep_keys", 2 * DAY, DAY..=365 * DAY);
        let slow = reader.duration("faults.slow", Duration::from_secs(3), MS..=10 * MINUTE);
        let hang = reader.duration("faults.hang", 5 * MINUTE, MS..=60 * MINUTE);
        let admin = Admin::read(reader, 9112);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        Ok(Self {
            listen: listen?,
            drain: drain?,
            secret_key: secret_key?.unwrap_or_else(|| "sk_test_sandbox".into()),
            path: path?,
            keep_keys: keep_keys?,
            slow: slow?,
            hang: hang?,
            admin: admin?,
            log: log?,
            telemetry: telemetry?,
            instance: instance?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    #[test]
    fn nothing_must_be_given() {
        let config = parse(Sources::new(ENV_PREFIX), Config::read).expect("valid");
        assert_eq!(config.listen.to_string(), "127.0.0.1:12111");
        assert!(!format!("{config:?}").contains("sk_test_sandbox"));
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[http]\nlisten = \"x\"\n[storage]\nkeep_keys = \"1h\"\n[faults]\nslow = \"0s\"\nfast = 1";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).expect_err("invalid");
        assert_eq!(errors.problems().len(), 4, "{errors}");
        for part in ["http.listen", "storage.keep_keys", "faults.slow", "faults.fast"] {
            assert!(errors.to_string().contains(part), "{part}: {errors}");
        }
    }
}
