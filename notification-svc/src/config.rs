//! The configuration of notification-svc.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use lettre::message::Mailbox;
use lettre::transport::smtp::extension::ClientId;
use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

use crate::domain::Retry;
use crate::smtp::Tls;
use crate::{sender, smtp};

/// What the names of environment variables start with.
pub const ENV_PREFIX: &str = "NOTIFICATION_SVC_";

/// The topics that are read, by their keys in `[consumer]`.
const TOPICS: [(&str, &str); 3] = [
    ("order_topic", contracts::topics::ORDER),
    ("payment_topic", contracts::topics::PAYMENT),
    ("user_topic", contracts::topics::USER),
];

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// What a lease leaves for writing how it ended.
const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// For health checks: there are no calls.
    pub grpc: Grpc,
    pub admin: Admin,
    /// `database.pool_size` is for sending; the consumer has as many connections again as it has workers.
    pub database: Database,
    pub log: Log,
    pub telemetry: Telemetry,
    pub instance: Instance,
    /// `[kafka]` and `[consumer]`.
    pub consumer: consumer::Config,
    /// `[smtp]`
    pub smtp: smtp::Config,
    /// `[mails]`
    pub mails: sender::Config,
}

/// `implicit` or `starttls`
struct TlsText(Tls);

impl FromStr for TlsText {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "implicit" => Ok(Self(Tls::Implicit)),
            "starttls" => Ok(Self(Tls::StartTls)),
            _ => Err("must be implicit or starttls"),
        }
    }
}

/// A mailbox whose error does not quote it.
struct Sender(Mailbox);

impl FromStr for Sender {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse()
            .map(Self)
            .map_err(|_| "must be like Shop <shop@example.org>")
    }
}

impl smtp::Config {
    fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let host = reader.required::<String>("smtp.host");
        let tls = reader.or("smtp.tls", TlsText(Tls::Implicit)).map(|tls| tls.0);
        let default_port = match tls {
            Ok(Tls::StartTls) => 587,
            _ => 465,
        };
        let port = reader.number("smtp.port", default_port, 1..=65535);
        let ca_file = reader.optional::<PathBuf>("smtp.ca_file");
        let user = reader.optional::<String>("smtp.user");
        let password = reader.optional_secret("smtp.password");
        let hello = reader.or("smtp.hello", "localhost".to_owned());
        let from = reader.required::<Sender>("smtp.from");
        let timeout = reader.duration("smtp.timeout", 30 * SECOND, 10 * MS..=10 * MINUTE);
        let data_timeout = reader.duration("smtp.data_timeout", 5 * MINUTE, 10 * MS..=30 * MINUTE);
        let login = match (user?, password?) {
            (Some(user), Some(password)) => Some((user, password)),
            (None, None) => None,
            (Some(_), None) => return reader.reject("smtp.password", "must be given with smtp.user"),
            (None, Some(_)) => return reader.reject("smtp.user", "must be given with smtp.password"),
        };
        Ok(Self {
            host: host?,
            port: port?,
            tls: tls?,
            ca_file: ca_file?,
            login,
            hello: ClientId::Domain(hello?),
            from: from?.0,
            timeout: timeout?,
            data_timeout: data_timeout?,
        })
    }
}

impl sender::Config {
    fn read(reader: &mut Reader, longest: Option<Duration>) -> Result<Self, Reported> {
        let senders = reader.number("mails.senders", 4, 1..=64);
        let poll = reader.duration("mails.poll", SECOND, 10 * MS..=MINUTE);
        let lease = reader.duration("mails.lease", 6 * MINUTE, SECOND..=2 * HOUR);
        let first = reader.duration("mails.retry_first", 30 * SECOND, 10 * MS..=HOUR);
        let retry_longest = reader.duration("mails.retry_longest", HOUR, 10 * MS..=24 * HOUR);
        let drain = reader.duration("mails.drain", 10 * SECOND, Duration::ZERO..=10 * MINUTE);
        let (lease, first, retry_longest) = (lease?, first?, retry_longest?);
        if longest.is_some_and(|longest| lease < longest + LEASE_MARGIN) {
            let message = "must be 2 s longer than smtp.timeout and smtp.data_timeout together: nobody else may think that a mail is given up";
            return reader.reject("mails.lease", message);
        }
        if retry_longest < first {
            return reader.reject(
                "mails.retry_longest",
                "must not be shorter than mails.retry_first",
            );
        }
        Ok(Self {
            senders: senders?,
            poll: poll?,
            lease,
            retry: Retry {
                first,
                longest: retry_longest,
            },
            drain: drain?,
        })
    }
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    /// The reader has noted what is wrong.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let grpc = Grpc::read(reader, 50056);
        let admin = Admin::read(reader, 9106);
        let database = Database::read(reader);
        let log = Log::read(reader);
        let telemetry = Telemetry::read(reader);
        let instance = Instance::read(reader);
        let smtp = smtp::Config::read(reader);
        let longest = smtp.as_ref().ok().map(|smtp| smtp.timeout + smtp.data_timeout);
        let mails = sender::Config::read(reader, longest);
        let instance = instance?;
        let consumer = subscription::read(reader, &instance, "notification-svc", &TOPICS);
        Ok(Self {
            grpc: grpc?,
            admin: admin?,
            database: database?,
            log: log?,
            telemetry: telemetry?,
            instance,
            consumer: consumer?,
            smtp: smtp?,
            mails: mails?,
        })
    }
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    const MINIMAL: &str = "[database]\nurl = \"postgres://u@h/d\"\n[kafka]\nbrokers = \"h:1\"\n\
                           [smtp]\nhost = \"mail.example.org\"\nfrom = \"Shop <shop@example.org>\"\n";

    fn read(toml: &str) -> Result<Config, String> {
        parse(Sources::new(ENV_PREFIX).toml(toml), Config::read).map_err(|errors| errors.to_string())
    }

    #[test]
    fn addresses_are_all_that_must_be_given() {
        let config = read(MINIMAL).expect("valid");
        assert_eq!((config.smtp.tls, config.smtp.port), (Tls::Implicit, 465));
        assert_eq!(config.consumer.group, "notification-svc");
        let topics: Vec<_> = config
            .consumer
            .topics
            .iter()
            .map(|topic| topic.name.as_str())
            .collect();
        assert_eq!(topics, ["events.order", "events.payment", "events.user"]);
        let starttls = read(&format!("{MINIMAL}tls = \"starttls\"")).expect("valid");
        assert_eq!((starttls.smtp.tls, starttls.smtp.port), (Tls::StartTls, 587));
        let secret = read(&format!("{MINIMAL}user = \"u\"\npassword = \"hunter2\"")).expect("valid");
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let toml = "[kafka]\nbrokers = \"h:1\"\n[smtp]\nfrom = \"nobody\"\ntls = \"none\"\nport = 0\n\
                    [mails]\nsenders = 0\npoll = \"0s\"\n";
        let errors = read(toml).expect_err("invalid");
        for part in [
            "database.url",
            "smtp.host",
            "smtp.from",
            "smtp.tls",
            "smtp.port",
            "mails.senders",
            "mails.poll",
        ] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
        for half in ["user = \"u\"", "password = \"p\""] {
            let errors = read(&format!("{MINIMAL}{half}")).expect_err("half a login");
            assert!(errors.contains("smtp."), "{errors}");
        }
    }

    #[test]
    fn a_lease_outlasts_the_longest_mail() {
        let lease = |text: &str| {
            read(&format!(
                "{MINIMAL}timeout = \"5s\"\ndata_timeout = \"10s\"\n[mails]\nlease = \"{text}\""
            ))
        };
        lease("17s").expect("long enough");
        let errors = lease("16s").expect_err("too short");
        assert!(errors.contains("mails.lease"), "{errors}");
    }
}
