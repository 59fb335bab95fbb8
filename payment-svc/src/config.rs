//! The configuration of payment-svc.

use std::str::FromStr;
use std::time::Duration;

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

use crate::domain::ChargeAt;
use crate::provider;

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "PAYMENT_SVC_";

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The topics that are read, by their keys in `[consumer]`.
const TOPICS: [(&str, &str); 1] = [("order_topic", contracts::topics::ORDER)];

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub grpc: Grpc,
    pub admin: Admin,
    /// `database.pool_size` is for calls and for settling; the consumer has as many connections again as it has workers.
    pub database: Database,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
    /// `[kafka]` and `[consumer]`.
    pub consumer: consumer::Config,
    pub provider: provider::Config,
    pub payments: Payments,
    /// `requests.keep`: how long repeats of a request id are recognised.
    pub keep_requests: Duration,
}

/// `[payments]`
#[derive(Debug, Clone)]
pub struct Payments {
    /// `charge_at`: when an order that names a payment method is charged.
    pub charge_at: ChargeAt,
    /// `settle_concurrency`: how many payments are brought on at once, besides those that calls bring on.
    pub settle_concurrency: usize,
    /// `settle_every`: how often to look for payments whose next step is due.
    pub settle_every: Duration,
    /// `lease`: how long a payment belongs to whoever brings it on, from step to step. Longer than a call to the provider.
    pub lease: Duration,
    /// `retry_first` and `retry_longest`: the pauses before asking the provider again.
    pub retry: (Duration, Duration),
    /// `max_waiting`: how many calls may wait for an order that is not known, or for a payment to be settled.
    pub max_waiting: usize,
}

/// `placed` or `reserved`
struct ChargeAtText(ChargeAt);

impl FromStr for ChargeAtText {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "placed" => Ok(Self(ChargeAt::Placed)),
            "reserved" => Ok(Self(ChargeAt::Reserved)),
            _ => Err("must be placed or reserved"),
        }
    }
}

impl Payments {
    fn read(reader: &mut Reader, call_timeout: Option<Duration>) -> Result<Self, Reported> {
        let charge_at = reader.or("payments.charge_at", ChargeAtText(ChargeAt::Reserved));
        let settle_concurrency = reader.number("payments.settle_concurrency", 8, 1..=1000);
        let settle_every = reader.duration("payments.settle_every", 200 * MS, 10 * MS..=MINUTE);
        let lease = reader
            .duration("payments.lease", 30 * SECOND, 100 * MS..=HOUR)
            .and_then(|lease| match call_timeout {
                Some(timeout) if lease <= timeout => {
                    reader.reject("payments.lease", "must be longer than provider.timeout")
                }
                _ => Ok(lease),
            });
        let retry_first = reader.duration("payments.retry_first", 200 * MS, MS..=MINUTE);
        let retry_longest = reader.duration("payments.retry_longest", 30 * SECOND, MS..=HOUR);
        let max_waiting = reader.number("payments.max_waiting", 256, 1..=100_000);
        let (retry_first, retry_longest) = (retry_first?, retry_longest?);
        if retry_longest < retry_first {
            return reader.reject(
                "payments.retry_longest",
                "must not be shorter than payments.retry_first",
            );
        }
        Ok(Self {
            charge_at: charge_at?.0,
            settle_concurrency: settle_concurrency?,
            settle_every: settle_every?,
            lease: lease?,
            retry: (retry_first, retry_longest),
            max_waiting: max_waiting?,
        })
    }
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    /// The reader has noted what is wrong.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let grpc = Grpc::read(reader, 50053);
        let admin = Admin::read(reader, 9103);
        let database = Database::read(reader);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        let provider = provider::Config::read(reader);
        let payments = Payments::read(reader, provider.as_ref().ok().map(|provider| provider.timeout));
        let keep_requests = reader.duration("requests.keep", 2 * DAY, DAY..=365 * DAY);
        let instance = instance?;
        let consumer = subscription::read(reader, &instance, "payment-svc", &TOPICS);
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance,
            consumer: consumer?,
            provider: provider?,
            payments: payments?,
            keep_requests: keep_requests?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    const MINIMAL: &str = "[database]\nurl = \"postgres://u@h/d\"\n[kafka]\nbrokers = \"h:1\"\n\
                           [provider]\nsecret_key = \"sk_test_1\"\n";

    #[test]
    fn addresses_and_the_key_must_be_given() {
        let config = parse(Sources::new(ENV_PREFIX).toml(MINIMAL), Config::read).expect("valid");
        assert_eq!(config.payments.charge_at, ChargeAt::Reserved);
        assert_eq!(config.consumer.group, "payment-svc");
        assert!(!format!("{config:?}").contains("sk_test_1"));
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[kafka]\nbrokers = \"h:1\"\n[provider]\ntimeout = \"40s\"\n\
                    [payments]\ncharge_at = \"later\"\nsettle_concurrency = 0\n[requests]\nkeep = \"1h\"\n";
        let errors = parse(Sources::new(ENV_PREFIX).toml(toml), Config::read)
            .expect_err("invalid")
            .to_string();
        for part in [
            "database.url",
            "provider.secret_key",
            "payments.charge_at",
            "payments.settle_concurrency",
            "requests.keep",
        ] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
    }

    #[test]
    fn a_lease_outlasts_a_call() {
        let toml = format!("{MINIMAL}timeout = \"5s\"\n[payments]\nlease = \"5s\"");
        let errors = parse(Sources::new(ENV_PREFIX).toml(&toml), Config::read)
            .expect_err("invalid")
            .to_string();
        assert!(errors.contains("payments.lease"), "{errors}");
    }

    #[test]
    fn the_example_is_valid_and_shows_the_defaults() {
        let example = include_str!("../payment-svc.example.toml");
        let shown = example.replace("#: ", "");
        for text in [example, &shown] {
            let config = parse(Sources::new(ENV_PREFIX).toml(text), Config::read).expect("valid");
            let minimal = parse(Sources::new(ENV_PREFIX).toml(MINIMAL), Config::read).expect("valid");
            assert_eq!(
                format!("{:?}", config.payments),
                format!("{:?}", minimal.payments)
            );
        }
    }
}
