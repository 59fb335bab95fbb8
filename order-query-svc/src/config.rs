//! What this process is told.

use service::config::{Admin, Database, Grpc, Instance, Log, Reader, Reported, Telemetry};

/// What environment variables of this process start with.
pub const PREFIX: &str = "ORDER_QUERY_SVC_";

/// The topics that are read, by their keys in `[consumer]`.
const TOPICS: [(&str, &str); 4] = [
    ("order_topic", contracts::topics::ORDER),
    ("payment_topic", contracts::topics::PAYMENT),
    ("inventory_topic", contracts::topics::INVENTORY),
    ("notification_topic", contracts::topics::NOTIFICATION),
];

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
    /// `[kafka]` and `[consumer]`.
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
        let max_waiting = reader.number("queries.max_waiting", 10_000, 1..=1_000_000);
        let instance = instance?;
        let projection = subscription::read(reader, &instance, "order-query-svc", &TOPICS)?;
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

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use consumer::Topic;

    use super::*;

    const MINIMAL: &str = "[database]\nurl = \"postgres://u@h/d\"\n[kafka]\nbrokers = \"h:1\"\n";

    #[test]
    fn addresses_are_all_that_must_be_given() {
        let config = parse(Sources::new(PREFIX).toml(MINIMAL), Config::read).expect("valid");
        assert_eq!(config.projection.group, "order-query-svc");
        assert_eq!(
            config.projection.topics,
            [
                "events.order",
                "events.payment",
                "events.inventory",
                "events.notification"
            ]
            .map(Topic::from_beginning)
        );
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
                    [consumer]\nworkers = 0\nspeed = 9";
        let errors = parse(Sources::new(PREFIX).toml(toml), Config::read)
            .expect_err("invalid")
            .to_string();
        for part in ["database.url", "consumer.workers", "consumer.speed"] {
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
