//! The shop's processes, as the demo, `./dev up` and tests across processes start them: [`SERVICES`] is the table of them, and
//! everything here follows from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::ports::free_ports;
use crate::postgres;
use crate::process::{self, Process};
use crate::smtp::{self, Smtp};
use crate::wait;

pub const ORDER_SVC: &str = "order-svc";
pub const ORDER_QUERY_SVC: &str = "order-query-svc";
pub const PAYMENT_SVC: &str = "payment-svc";
pub const INVENTORY_SVC: &str = "inventory-svc";
pub const USER_SVC: &str = "user-svc";
pub const NOTIFICATION_SVC: &str = "notification-svc";
pub const ANALYTICS_SVC: &str = "analytics-svc";
pub const PAYMENT_SANDBOX: &str = "payment-sandbox";
pub const OUTBOX_RELAY: &str = "outbox-relay";

/// Partitions of every topic.
pub const PARTITIONS: u32 = 6;

/// The events of one kind of entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    pub entity_type: &'static str,
    pub topic: &'static str,
    /// Whether they are in the service's event store too. Otherwise each says all there is, and nobody needs the ones before it.
    pub stored: bool,
}

/// One kind of process, and what it works on.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// Its binary's.
    pub name: &'static str,
    /// How many of it run.
    pub instances: u16,
    /// The first of its ports, from the base; each instance has two, one to serve and one for metrics and health.
    first_port: u16,
    /// The database that it alone writes.
    pub database: Option<&'static str>,
    /// The events in its database's outbox.
    pub emits: &'static [Events],
    /// The topics that it reads.
    pub consumes: &'static [&'static str],
}

/// In the order in which they are stopped: first what takes commands, then what carries their events on.
pub const SERVICES: [Service; 9] = [
    Service {
        name: ORDER_SVC,
        instances: 2,
        first_port: 10,
        database: Some("orders"),
        emits: &[Events {
            entity_type: "order",
            topic: "events.order",
            stored: true,
        }],
        consumes: &["events.inventory", "events.payment"],
    },
    Service {
        name: PAYMENT_SVC,
        instances: 2,
        first_port: 40,
        database: Some("payments"),
        emits: &[Events {
            entity_type: "payment",
            topic: "events.payment",
            stored: true,
        }],
        consumes: &["events.order"],
    },
    Service {
        name: INVENTORY_SVC,
        instances: 2,
        first_port: 60,
        database: Some("inventory"),
        emits: &[
            Events {
                entity_type: "reservation",
                topic: "events.inventory",
                stored: true,
            },
            Events {
                entity_type: "stock",
                topic: "events.stock",
                stored: true,
            },
        ],
        consumes: &["events.order"],
    },
    Service {
        name: USER_SVC,
        instances: 2,
        first_port: 70,
        database: Some("users"),
        emits: &[Events {
            entity_type: "user",
            topic: "events.user",
            stored: true,
        }],
        consumes: &[],
    },
    Service {
        name: NOTIFICATION_SVC,
        instances: 2,
        first_port: 80,
        database: Some("notifications"),
        emits: &[Events {
            entity_type: "notification",
            topic: "events.notification",
            stored: true,
        }],
        consumes: &["events.order", "events.payment", "events.user"],
    },
    Service {
        name: ANALYTICS_SVC,
        instances: 2,
        first_port: 90,
        database: Some("analytics"),
        emits: &[Events {
            entity_type: "order_analytics",
            topic: "events.order_analytics",
            stored: false,
        }],
        consumes: &["events.order", "events.payment"],
    },
    Service {
        name: OUTBOX_RELAY,
        instances: 1,
        first_port: 30,
        database: None,
        emits: &[],
        consumes: &[],
    },
    Service {
        name: ORDER_QUERY_SVC,
        instances: 2,
        first_port: 20,
        database: Some("order_query"),
        emits: &[],
        consumes: &[
            "events.inventory",
            "events.notification",
            "events.order",
            "events.payment",
        ],
    },
    Service {
        name: PAYMENT_SANDBOX,
        instances: 1,
        first_port: 50,
        database: None,
        emits: &[],
        consumes: &[],
    },
];

/// How many ports a [`Plan`] with a base keeps for itself; there is room for services to come.
pub const PORTS: u16 = 100;
/// PostgreSQL's port, Kafka's two, and the mail server's, from the base.
pub const POSTGRES_PORT: u16 = 0;
pub const KAFKA_PORTS: [u16; 2] = [1, 2];
pub const MAIL_PORT: u16 = 3;

/// Who the mails are from; their ids end in its domain.
pub const MAIL_SENDER: &str = "Shop <shop@shop.example>";
/// The domain of mails' ids.
pub const MAIL_DOMAIN: &str = "shop.example";

/// The secret key that the payment sandbox takes.
const SANDBOX_KEY: &str = "sk_test_sandbox";

/// Rebalances, some of which may have to wait for a member that is gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

impl Service {
    /// What its instances are called.
    pub fn instance_names(&self) -> Vec<String> {
        match self.instances {
            1 => vec![self.name.to_owned()],
            several => (1..=several)
                .map(|instance| format!("{}-{instance}", self.name))
                .collect(),
        }
    }

    /// Whether it keeps its events, and can rebuild everything from them.
    pub fn has_history(&self) -> bool {
        self.emits.iter().any(|events| events.stored)
    }

    fn ports(&self) -> impl Iterator<Item = [u16; 2]> {
        (0..self.instances).map(|instance| {
            let first = self.first_port + 2 * instance;
            [first, first + 1]
        })
    }
}

/// The topics, in the order of those who emit.
pub fn topics() -> Vec<&'static str> {
    events().into_iter().map(|(_, events)| events.topic).collect()
}

/// The databases, in the order of those who write them.
pub fn databases() -> Vec<&'static str> {
    SERVICES.iter().filter_map(|service| service.database).collect()
}

/// Databases that have an outbox.
pub fn outboxes() -> Vec<&'static str> {
    let emitting = SERVICES.iter().filter(|service| !service.emits.is_empty());
    emitting.filter_map(|service| service.database).collect()
}

/// All kinds of events, with the database in whose outbox they are.
pub fn events() -> Vec<(&'static str, Events)> {
    let of = |service: &Service| {
        let database = service.database;
        let emits = service.emits.iter();
        emits.filter_map(move |events| Some((database?, *events)))
    };
    SERVICES.iter().flat_map(of).collect()
}

/// The topics of records that some consumer could not handle.
pub fn dead_letter_topics() -> Vec<String> {
    let consumed: BTreeSet<&str> = SERVICES
        .iter()
        .flat_map(|service| service.consumes)
        .copied()
        .collect();
    consumed.into_iter().map(|topic| format!("{topic}-dlt")).collect()
}

/// Databases in which consumers leave dead letters.
fn consuming() -> impl Iterator<Item = &'static str> {
    let consumers = SERVICES.iter().filter(|service| !service.consumes.is_empty());
    consumers.filter_map(|service| service.database)
}

/// What the relay has to know of the dead letters in a database, in TOML; `name` is what it calls them.
pub fn dead_letters_config(name: &str, database_url: &str) -> String {
    const HEADERS: [&str; 14] = [
        "dlt-type",
        "dlt-consumer",
        "dlt-original-topic",
        "dlt-original-partition",
        "dlt-original-offset",
        "dlt-original-timestamp",
        "dlt-original-id",
        "dlt-original-headers",
        "dlt-original-key",
        "dlt-original-bytes",
        "dlt-error-kind",
        "dlt-attempt",
        "processing_error",
        "failed_at",
    ];
    let mut toml = format!(
        "[outbox.{name}]\ndatabase_url = \"{database_url}\"\ntable = \"dead_letters\"\nversions = \"unchecked\"\n\
         [outbox.{name}.headers.columns]\n"
    );
    for header in HEADERS {
        toml.push_str(&format!("{header} = \"{}\"\n", header.replace('-', "_")));
    }
    toml
}

/// What the relay calls the dead letters of a database.
fn dead_letters_of(database: &str) -> String {
    format!("{database}_dead_letters")
}

/// Every port that is used with a base, counted from it.
pub fn ports() -> Vec<u16> {
    let of_services = SERVICES.iter().flat_map(Service::ports).flatten();
    [POSTGRES_PORT, MAIL_PORT]
        .into_iter()
        .chain(KAFKA_PORTS)
        .chain(of_services)
        .collect()
}

/// Where a running shop is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Addresses {
    /// Connection URLs by name.
    pub databases: BTreeMap<String, String>,
    /// `host:port` of Kafka.
    pub brokers: String,
    /// URLs for gRPC, one per instance, by service.
    pub services: BTreeMap<String, Vec<String>>,
    /// URL of the payment sandbox.
    pub sandbox: String,
    /// Where the mail server keeps what it takes.
    pub mails: PathBuf,
}

impl Addresses {
    /// From the file that [`write`](Self::write) made.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not understood", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// The connection URL of a database.
    pub fn database(&self, name: &str) -> Result<&str> {
        let url = self.databases.get(name);
        Ok(url.with_context(|| format!("there is no database {name}"))?)
    }

    /// The URLs of a service's instances.
    pub fn service(&self, name: &str) -> Result<&[String]> {
        let urls = self.services.get(name);
        Ok(urls.with_context(|| format!("there is no service {name}"))?)
    }
}

/// Where the processes are to work, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    folder: PathBuf,
    postgres_url: String,
    kafka_brokers: String,
    port_base: Option<u16>,
    sandbox_port: u16,
    mail_port: u16,
    mail_ca_file: PathBuf,
    mails: PathBuf,
    /// For one service, or for all of them.
    settings: Vec<(Option<&'static str>, String, String)>,
}

impl Plan {
    /// Logs and the sandbox's storage go to `folder`. `postgres_url` is any database of the server on which the shop's
    /// databases are, with a user that may create databases. Mails go to `mail_server`, which encrypts from the first byte. [`PORTS`]
    /// ports from `port_base` are used, or free ones.
    pub fn new(
        folder: impl Into<PathBuf>,
        postgres_url: String,
        kafka_brokers: String,
        mail_server: &Smtp,
        port_base: Option<u16>,
    ) -> Result<Self> {
        // payment-svc has to know it before the sandbox is started.
        let sandbox_port = match port_base {
            Some(base) => base + service(PAYMENT_SANDBOX)?.first_port,
            None => free_ports(1)?[0],
        };
        Ok(Self {
            folder: folder.into(),
            postgres_url,
            kafka_brokers,
            port_base,
            sandbox_port,
            mail_port: mail_server.port(),
            mail_ca_file: mail_server.ca_file().to_owned(),
            mails: mail_server.received_file(),
            settings: Vec::new(),
        })
    }

    /// A setting of one service.
    pub fn set(mut self, service: &'static str, key: &str, value: impl Into<String>) -> Self {
        self.settings.push((Some(service), key.to_owned(), value.into()));
        self
    }

    /// A setting of all of them.
    pub fn set_for_all(mut self, key: &str, value: impl Into<String>) -> Self {
        self.settings.push((None, key.to_owned(), value.into()));
        self
    }

    /// How long the relay's leases outlive a relay that was killed.
    pub fn relay_lease(self, lease: Duration) -> Self {
        let events = outboxes().into_iter().map(str::to_owned);
        let names = events.chain(consuming().map(dead_letters_of));
        names.fold(self, |plan, name| {
            let key = format!("outbox.{name}.lease_ttl");
            plan.set(OUTBOX_RELAY, &key, format!("{}ms", lease.as_millis()))
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn database_url(&self, database: &str) -> String {
        postgres::with_database(&self.postgres_url, database)
    }

    /// Where everything is.
    pub fn addresses(&self, shop: &Shop) -> Result<Addresses> {
        let mut services: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for service in SERVICES {
            let urls = shop
                .of(service.name)
                .filter_map(|process| process.grpc_url().ok());
            services.insert(service.name.to_owned(), urls.collect());
        }
        services.retain(|_, urls| !urls.is_empty());
        let databases = databases().into_iter();
        Ok(Addresses {
            databases: databases
                .map(|database| (database.to_owned(), self.database_url(database)))
                .collect(),
            brokers: self.kafka_brokers.clone(),
            services,
            sandbox: self.sandbox_url(),
            mails: self.mails.clone(),
        })
    }

    /// Where the payment provider is.
    pub fn sandbox_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.sandbox_port)
    }

    /// The file in which the payment sandbox keeps what it knows.
    pub fn sandbox_storage(&self) -> PathBuf {
        self.folder.join("payment-sandbox.redb")
    }

    /// Makes the databases.
    pub async fn create_databases(&self) -> Result<()> {
        for database in databases() {
            postgres::create_database(&self.postgres_url, database).await?;
        }
        Ok(())
    }

    /// Brings the databases up to date.
    pub async fn migrate(&self) -> Result<()> {
        let mut all = JoinSet::new();
        for service in SERVICES.iter().filter(|service| service.database.is_some()) {
            all.spawn(self.command(service).arg("migrate").run_to_end());
        }
        finished(all).await
    }

    /// Makes the topics that are missing.
    pub async fn create_topics(&self) -> Result<()> {
        let relay = self.command(service(OUTBOX_RELAY)?).arg("create-topics");
        let topics = topics().into_iter().map(str::to_owned);
        let all = topics
            .chain(dead_letter_topics())
            .fold(relay, |relay, topic| relay.arg(format!("{topic}={PARTITIONS}")));
        all.run_to_end().await
    }

    /// Rebuilds everything from its history and compares, in every service that has one. What differs is in the error.
    pub async fn verify(&self) -> Result<()> {
        let mut all = JoinSet::new();
        for service in SERVICES.iter().filter(|service| service.has_history()) {
            all.spawn(self.command(service).arg("verify").run_to_end());
        }
        finished(all).await
    }

    /// Compares payment-svc's ledger with the provider's. What differs is in the error.
    pub async fn reconcile(&self) -> Result<()> {
        self.command(service(PAYMENT_SVC)?)
            .arg("reconcile")
            .run_to_end()
            .await
    }

    /// Starts the processes and waits until they are ready.
    pub async fn start(&self) -> Result<Shop> {
        let mut starting = JoinSet::new();
        for (place, service) in SERVICES.iter().enumerate() {
            for instance in 0..service.instances {
                let builder = self.instance(service, instance);
                starting.spawn(async move {
                    let mut process = builder.start().await?;
                    process.ready().await?;
                    anyhow::Ok(((place, instance), process))
                });
            }
        }
        let mut started = Vec::new();
        while let Some(process) = starting.join_next().await {
            started.push(process??);
        }
        started.sort_by_key(|(place, _)| *place);
        let members = started.into_iter().map(|((place, _), process)| Member {
            service: SERVICES[place],
            process,
        });
        Ok(Shop {
            members: members.collect(),
        })
    }

    fn instance(&self, service: &Service, instance: u16) -> process::Builder {
        let index = usize::from(instance);
        let name = &service.instance_names()[index];
        let mut builder = self.command(service).instance(name);
        if !service.consumes.is_empty() {
            // By this name it keeps its partitions when it is started again.
            builder = builder.set("service.instance", name);
        }
        if let (Some(base), Some([port, admin])) = (self.port_base, service.ports().nth(index)) {
            builder = builder.port(base + port).admin_port(base + admin);
        }
        if service.name == PAYMENT_SANDBOX {
            builder = builder.port(self.sandbox_port);
        }
        builder
    }

    /// With all that it has to know, whatever it is asked to do.
    fn command(&self, service: &Service) -> process::Builder {
        let mut builder = Process::builder(service.name, &self.folder);
        if let Some(database) = service.database {
            builder = builder.set("database.url", self.database_url(database));
        }
        if !service.consumes.is_empty() || service.name == OUTBOX_RELAY {
            builder = builder.set("kafka.brokers", &self.kafka_brokers);
        }
        match service.name {
            OUTBOX_RELAY => {
                for database in outboxes() {
                    builder = builder.set(
                        &format!("outbox.{database}.database_url"),
                        self.database_url(database),
                    );
                }
                for database in consuming() {
                    let url = self.database_url(database);
                    builder = builder.config(&dead_letters_config(&dead_letters_of(database), &url));
                }
            }
            PAYMENT_SVC => {
                builder = builder
                    .set("provider.base_url", self.sandbox_url())
                    .set("provider.secret_key", SANDBOX_KEY);
            }
            NOTIFICATION_SVC => {
                builder = builder
                    .set("smtp.host", "localhost")
                    .set("smtp.port", self.mail_port.to_string())
                    .set("smtp.tls", "implicit")
                    .set("smtp.ca_file", self.mail_ca_file.to_string_lossy())
                    .set("smtp.user", smtp::USER)
                    .set("smtp.password", smtp::PASSWORD)
                    .set("smtp.from", MAIL_SENDER);
            }
            PAYMENT_SANDBOX => {
                builder = builder.set("storage.path", self.sandbox_storage().to_string_lossy());
            }
            _ => {}
        }
        let mine = |(of, key, value): &'_ (Option<&'static str>, String, String)| {
            let applies = of.is_none_or(|of| of == service.name);
            applies.then(|| (key.clone(), value.clone()))
        };
        self.settings
            .iter()
            .filter_map(mine)
            .fold(builder, |builder, (key, value)| builder.set(&key, value))
    }
}

fn service(name: &str) -> Result<&'static Service> {
    const TABLE: &[Service] = &SERVICES;
    TABLE
        .iter()
        .find(|service| service.name == name)
        .with_context(|| format!("there is no service {name}"))
}

async fn finished(mut tasks: JoinSet<Result<()>>) -> Result<()> {
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

#[derive(Debug)]
struct Member {
    service: Service,
    process: Process,
}

/// The running processes. Dropping it kills them.
#[derive(Debug)]
pub struct Shop {
    members: Vec<Member>,
}

impl Shop {
    /// All processes, by service and instance.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        self.members.iter().map(|member| &member.process)
    }

    /// All processes, by service and instance.
    pub fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        self.members.iter_mut().map(|member| &mut member.process)
    }

    /// The instances of a service.
    pub fn of(&self, service: &str) -> impl Iterator<Item = &Process> {
        let mine = self
            .members
            .iter()
            .filter(move |member| member.service.name == service);
        mine.map(|member| &member.process)
    }

    /// An instance of a service, counted from 0.
    pub fn instance_mut(&mut self, service: &str, instance: usize) -> Result<&mut Process> {
        let mut mine = self
            .members
            .iter_mut()
            .filter(|member| member.service.name == service);
        let member = mine.nth(instance);
        Ok(&mut member
            .with_context(|| format!("{service} has no instance {instance}"))?
            .process)
    }

    /// Waits until the instances of each consumer have shared out the partitions among them, each with some: until then
    /// events wait.
    pub async fn consumers_settled(&self) -> Result<()> {
        for service in SERVICES.iter().filter(|service| !service.consumes.is_empty()) {
            let all = f64::from(PARTITIONS) * service.consumes.len() as f64;
            let what = format!("the partitions are shared out among {}", service.name);
            wait::until(&what, SETTLE_LIMIT, || async {
                let mut shares = Vec::new();
                for instance in self.of(service.name) {
                    shares.push(metric(&instance.metrics().await?, "consumer_assigned_partitions"));
                }
                let settled = shares.iter().sum::<f64>() == all && shares.iter().all(|share| *share >= 1.0);
                Ok(settled.then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Stops all of them, service after service in the order of the table.
    pub async fn stop(mut self) -> Result<()> {
        for service in SERVICES {
            let mut stopping = JoinSet::new();
            let (now, later) = std::mem::take(&mut self.members)
                .into_iter()
                .partition::<Vec<_>, _>(|member| member.service.name == service.name);
            self.members = later;
            for mut member in now {
                stopping.spawn(async move { member.process.stop().await.map(drop) });
            }
            finished(stopping).await?;
        }
        Ok(())
    }
}

/// The sum over all labels of a metric, in what /metrics answers.
fn metric(text: &str, name: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Not the beginning of a longer name.
        rest.starts_with([' ', '{'])
            .then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let text = "# HELP a A.\na{t=\"x\"} 2\na{t=\"y\"} 1\nab 7\n";
        assert_eq!(metric(text, "a"), 3.0);
        assert_eq!(metric(text, "ab"), 7.0);
        assert_eq!(metric(text, "b"), 0.0);
    }

    #[test]
    fn consumers_read_what_the_relay_is_told_of_dead_letters() {
        let readme = include_str!("../../consumer/README.md");
        let block = readme
            .split("```toml\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next());
        let lines = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.is_empty());
            lines.map(str::to_owned).collect()
        };
        let config = dead_letters_config("orders_dead_letters", "postgres://relay@db/orders");
        assert_eq!(lines(block.expect("a block of TOML")), lines(&config));
    }

    #[test]
    fn the_table_is_consistent() {
        let ports = ports();
        let distinct: BTreeSet<u16> = ports.iter().copied().collect();
        assert_eq!(distinct.len(), ports.len(), "{ports:?}");
        assert!(distinct.iter().all(|port| *port < PORTS));
        for service in SERVICES {
            assert!(
                service.emits.is_empty() || service.database.is_some(),
                "{}",
                service.name
            );
            for topic in service.consumes {
                assert!(topics().contains(topic), "nobody emits {topic}");
            }
            assert!(
                service.consumes.is_empty() || service.instances >= 2,
                "{} runs alone",
                service.name
            );
        }
    }
}
