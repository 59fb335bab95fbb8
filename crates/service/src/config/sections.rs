//! The sections that several processes have.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use super::{Reader, Reported, listen_address};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// `[grpc]`: the gRPC server and its limits.
#[derive(Debug, Clone)]
pub struct Grpc {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The longest that a unary call may take, whatever deadline the client asks for.
    pub max_deadline: Duration,
    /// Calls in progress at once over all connections; more are refused with RESOURCE_EXHAUSTED.
    pub max_concurrent_calls: usize,
    /// Connections at once; more wait in the kernel's queue.
    pub max_connections: usize,
    /// Bytes of a request, after decompression.
    pub max_request_bytes: usize,
    /// Bytes of a response.
    pub max_response_bytes: usize,
    /// How long to go on serving as NOT_SERVING, so that load balancers notice.
    pub shutdown_wait: Duration,
    /// How long calls in progress may take to end at shutdown.
    pub drain: Duration,
    /// A connection is asked to go away after this long, so that clients spread over replicas.
    pub max_connection_age: Duration,
}

impl Grpc {
    /// Reads `[grpc]`; `port` is the usual one of this process.
    pub fn read(reader: &mut Reader, port: u16) -> Result<Self, Reported> {
        let listen = listen_address(
            reader,
            "grpc.listen",
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        );
        let max_deadline = reader.duration("grpc.max_deadline", 30 * SECOND, 10 * MS..=10 * MINUTE);
        let max_concurrent_calls = reader.number("grpc.max_concurrent_calls", 512, 1..=100_000);
        let max_connections = reader.number("grpc.max_connections", 1024, 1..=100_000);
        let max_request_bytes = reader.number("grpc.max_request_bytes", 256 << 10, 1024..=64 << 20);
        let max_response_bytes = reader.number("grpc.max_response_bytes", 4 << 20, 1024..=64 << 20);
        let shutdown_wait = reader.duration("grpc.shutdown_wait", 500 * MS, Duration::ZERO..=MINUTE);
        let drain = reader.duration("grpc.drain", 10 * SECOND, Duration::ZERO..=10 * MINUTE);
        let max_connection_age = reader.duration("grpc.max_connection_age", 30 * MINUTE, SECOND..=24 * HOUR);
        Ok(Self {
            listen: listen?,
            max_deadline: max_deadline?,
            max_concurrent_calls: max_concurrent_calls?,
            max_connections: max_connections?,
            max_request_bytes: max_request_bytes?,
            max_response_bytes: max_response_bytes?,
            shutdown_wait: shutdown_wait?,
            drain: drain?,
            max_connection_age: max_connection_age?,
        })
    }
}

/// `[admin]`: the HTTP port for metrics and probes.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
}

impl Admin {
    /// Reads `[admin]`; `port` is the usual one of this process.
    pub fn read(reader: &mut Reader, port: u16) -> Result<Self, Reported> {
        let listen = listen_address(
            reader,
            "admin.listen",
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        );
        Ok(Self { listen: listen? })
    }
}

/// `[database]`: a PostgreSQL database and the bounds on everything that is asked of it.
#[derive(Debug, Clone)]
pub struct Database {
    /// `postgres://user:password@host:port/database`, or `database.url_file`.
    pub url: SecretString,
    /// Connections at most.
    pub pool_size: usize,
    /// How long to wait for a new connection to be set up.
    pub connect_timeout: Duration,
    /// How long to wait for a free connection of the pool.
    pub acquire_timeout: Duration,
    /// The longest that one statement may run.
    pub statement_timeout: Duration,
    /// The longest that one statement may wait for a lock; shorter than `statement_timeout`.
    pub lock_timeout: Duration,
    /// The longest that a transaction may sit idle before the server ends it.
    pub idle_in_transaction_timeout: Duration,
    /// The longest that a whole command may hold a connection before it is cut.
    pub command_timeout: Duration,
}

impl Database {
    /// Reads `[database]`.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let url = reader.secret("database.url").and_then(|url| {
            match url.expose_secret().parse::<tokio_postgres::Config>() {
                Ok(config) if config.get_hosts().is_empty() => reader.reject("database.url", "names no host"),
                Ok(_) => Ok(url),
                Err(_) => reader.reject(
                    "database.url",
                    "must be like postgres://user@host:port/database (hidden)",
                ),
            }
        });
        let pool_size = reader.number("database.pool_size", 16, 1..=1000);
        let connect_timeout = reader.duration("database.connect_timeout", 3 * SECOND, 10 * MS..=MINUTE);
        let acquire_timeout = reader.duration("database.acquire_timeout", 2 * SECOND, 10 * MS..=MINUTE);
        let statement_timeout =
            reader.duration("database.statement_timeout", 5 * SECOND, 10 * MS..=10 * MINUTE);
        let lock_timeout = reader.duration("database.lock_timeout", 3 * SECOND, 10 * MS..=10 * MINUTE);
        let idle = reader.duration(
            "database.idle_in_transaction_timeout",
            10 * SECOND,
            SECOND..=10 * MINUTE,
        );
        let command_timeout =
            reader.duration("database.command_timeout", 15 * SECOND, 100 * MS..=10 * MINUTE);
        let database = Self {
            url: url?,
            pool_size: pool_size?,
            connect_timeout: connect_timeout?,
            acquire_timeout: acquire_timeout?,
            statement_timeout: statement_timeout?,
            lock_timeout: lock_timeout?,
            idle_in_transaction_timeout: idle?,
            command_timeout: command_timeout?,
        };
        if database.lock_timeout >= database.statement_timeout {
            return reader.reject(
                "database.lock_timeout",
                "must be shorter than database.statement_timeout",
            );
        }
        Ok(database)
    }
}

/// `[kafka]`: the brokers, and librdkafka properties passed through.
#[derive(Debug, Clone)]
pub struct Kafka {
    /// `host:port`, several separated by commas.
    pub brokers: String,
    /// Any librdkafka property; the process that uses them refuses those that would break an invariant.
    pub properties: BTreeMap<String, String>,
}

impl Kafka {
    /// Reads `[kafka]`. Names of properties from the environment, which cannot hold dots, may have underscores instead.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let properties = reader
            .map("kafka.properties")
            .into_iter()
            .map(|(name, value)| {
                if name.contains('.') {
                    (name, value)
                } else {
                    (name.replace('_', "."), value)
                }
            })
            .collect();
        Ok(Self {
            brokers: reader.required("kafka.brokers")?,
            properties,
        })
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For a terminal.
    Text,
}

impl std::str::FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "json" => Ok(Self::Json),
            "text" => Ok(Self::Text),
            _ => Err("must be json or text"),
        }
    }
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    pub format: LogFormat,
    /// A level, or directives like `info,order_svc=debug`.
    pub level: String,
}

impl Log {
    /// Reads `[log]`.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let format = reader.or("log.format", LogFormat::Json);
        let level = reader.or("log.level", "info".to_owned()).and_then(|level| {
            match level.parse::<tracing_subscriber::filter::Targets>() {
                Ok(_) => Ok(level),
                Err(error) => reader.reject("log.level", &error.to_string()),
            }
        });
        Ok(Self {
            format: format?,
            level: level?,
        })
    }
}

/// `[telemetry]`
#[derive(Debug, Clone)]
pub struct Telemetry {
    /// An OTLP collector that speaks gRPC, `http://host:4317`; none: spans are not exported.
    pub otlp_endpoint: Option<String>,
}

impl Telemetry {
    /// Reads `[telemetry]`.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let otlp_endpoint = match reader.optional::<http::Uri>("telemetry.otlp_endpoint")? {
            Some(uri) if uri.scheme().is_none() || uri.host().is_none() => {
                return reader.reject("telemetry.otlp_endpoint", "must be like http://host:4317");
            }
            other => other.map(|uri| uri.to_string()),
        };
        Ok(Self { otlp_endpoint })
    }
}

/// `[service]`: who this process is.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Its name among replicas; host name and process id unless given.
    pub name: String,
    /// Where to write the addresses that it listens on, if anywhere.
    pub endpoints_file: Option<PathBuf>,
}

impl Instance {
    /// Reads `[service]`.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let name = reader.optional::<String>("service.instance");
        let endpoints_file = reader.optional("service.endpoints_file");
        let host = || std::fs::read_to_string("/etc/hostname").unwrap_or_default();
        let default = || match host().trim() {
            "" => format!("localhost-{}", std::process::id()),
            host => format!("{host}-{}", std::process::id()),
        };
        Ok(Self {
            name: name?.unwrap_or_else(default),
            endpoints_file: endpoints_file?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Sources, parse};
    use super::*;

    #[test]
    fn defaults_are_valid() {
        let sources =
            Sources::new("X_").toml("[database]\nurl = \"postgres://u@h/d\"\n[kafka]\nbrokers = \"h:1\"");
        parse(sources, |r| {
            let _ = (
                Grpc::read(r, 50051)?,
                Admin::read(r, 9101)?,
                Database::read(r)?,
                Kafka::read(r)?,
            );
            let _ = (Log::read(r)?, Telemetry::read(r)?, Instance::read(r)?);
            Ok(())
        })
        .expect("valid");
    }

    #[test]
    fn bad_values_of_every_section_are_refused() {
        for (toml, problem) in [
            ("grpc.listen = \"here\"", "ADDRESS:PORT"),
            ("grpc.max_deadline = \"1h\"", "10ms to 10m"),
            ("admin.listen = \"1\"", "ADDRESS:PORT"),
            ("database.url = \"mysql://u:pw1@h\"", "database.url"),
            ("database.pool_size = 0", "1 to 1000"),
            ("database.lock_timeout = \"6s\"", "shorter than"),
            ("log.level = \"loud=x\"", "log.level"),
            ("log.format = \"xml\"", "json or text"),
            ("telemetry.otlp_endpoint = \"collector\"", "http://host:4317"),
        ] {
            let base = if toml.contains("database.url") {
                ""
            } else {
                "database.url = \"postgres://u@h/d\"\n"
            };
            let errors = parse(Sources::new("X_").toml(&format!("{base}{toml}")), |r| {
                let all = (
                    Grpc::read(r, 1),
                    Admin::read(r, 2),
                    Database::read(r),
                    Log::read(r),
                    Telemetry::read(r),
                );
                let _ = (all.0?, all.1?, all.2?, all.3?, all.4?);
                Ok(())
            })
            .expect_err(toml);
            assert!(errors.to_string().contains(problem), "{toml}: {errors}");
            assert!(!errors.to_string().contains("pw1"), "{errors}");
        }
    }

    #[test]
    fn kafka_properties_from_the_environment_have_underscores() {
        let variables = [
            ("X_KAFKA__BROKERS", "h:1"),
            ("X_KAFKA__PROPERTIES__LINGER_MS", "5"),
        ];
        let sources = Sources::new("X_").env(variables.map(|(n, v)| (n.to_owned(), v.to_owned())));
        let kafka = parse(sources, Kafka::read).expect("valid");
        assert_eq!(kafka.properties.get("linger.ms").map(String::as_str), Some("5"));
    }
}
