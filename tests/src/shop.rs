//! The shop of one test: databases, a topic and a consumer group that nobody else has, and how to start processes on them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use local_stack::Process;
use local_stack::process::Builder;
use local_stack::shop::dead_letters_config;
use local_stack::testing::{self, Database, Folder};
use tonic::transport::{Channel, Endpoint};

use crate::load::DEADLINE;

/// Partitions of each topic.
pub const PARTITIONS: i32 = 6;

/// Everything but the processes. Declare it before them, so that it is dropped after them.
#[derive(Debug)]
pub struct Shop {
    pub orders: Database,
    pub order_query: Database,
    /// Events of orders.
    pub topic: String,
    /// Events of payments.
    pub payment_topic: String,
    /// Events of reservations.
    pub inventory_topic: String,
    pub notification_topic: String,
    /// The group of order-query-svc.
    pub group: String,
    pub brokers: String,
    folder: PathBuf,
}

impl Shop {
    /// On the shared PostgreSQL and Kafka, with its logs in `folder`.
    pub async fn new(folder: &Folder) -> Result<Self> {
        Self::on(folder, &testing::postgres_url(), &testing::kafka_brokers()).await
    }

    /// On these.
    pub async fn on(folder: &Folder, postgres_url: &str, brokers: &str) -> Result<Self> {
        let folder = folder.path().to_owned();
        let shop = Self {
            orders: database(postgres_url, "order-svc", &folder).await?,
            order_query: database(postgres_url, "order-query-svc", &folder).await?,
            topic: testing::unique("events.order"),
            payment_topic: testing::unique("events.payment"),
            inventory_topic: testing::unique("events.inventory"),
            notification_topic: testing::unique("events.notification"),
            group: testing::unique("order-query-svc"),
            brokers: brokers.to_owned(),
            folder,
        };
        let mut create = shop.outbox_relay().arg("create-topics");
        for topic in [
            &shop.topic,
            &shop.payment_topic,
            &shop.inventory_topic,
            &shop.notification_topic,
        ] {
            create = create
                .arg(format!("{topic}={PARTITIONS}"))
                .arg(format!("{topic}-dlt={PARTITIONS}"));
        }
        create.run_to_end().await?;
        Ok(shop)
    }

    pub fn order_svc(&self) -> Builder {
        Process::builder("order-svc", &self.folder)
            .set("database.url", self.orders.url())
            .set("kafka.brokers", &self.brokers)
            .set("consumer.payment_topic", &self.payment_topic)
            .set("consumer.inventory_topic", &self.inventory_topic)
            // The topic is this test's own, so the group is as well.
            .set("consumer.group", format!("order-svc {}", self.payment_topic))
    }

    /// A lease is short: whoever follows a relay that was killed has to wait for it.
    pub fn outbox_relay(&self) -> Builder {
        Process::builder("outbox-relay", &self.folder)
            .set("kafka.brokers", &self.brokers)
            .set("outbox.orders.database_url", self.orders.url())
            .set("outbox.orders.topic", &self.topic)
            .set("outbox.orders.lease_ttl", "1s")
    }

    /// One that publishes the read model's dead letters too.
    pub fn outbox_relay_with_dead_letters(&self) -> Builder {
        let name = "order_query_dead_letters";
        self.outbox_relay()
            .config(&dead_letters_config(name, &self.order_query.url()))
            .set(&format!("outbox.{name}.lease_ttl"), "1s")
    }

    /// An instance by a name that it keeps.
    pub fn order_query_svc(&self, instance: u16) -> Builder {
        let name = format!("order-query-svc-{instance}");
        Process::builder("order-query-svc", &self.folder)
            .instance(&name)
            .set("service.instance", &name)
            .set("database.url", self.order_query.url())
            .set("kafka.brokers", &self.brokers)
            .set("consumer.order_topic", &self.topic)
            .set("consumer.payment_topic", &self.payment_topic)
            .set("consumer.inventory_topic", &self.inventory_topic)
            .set("consumer.notification_topic", &self.notification_topic)
            .set("consumer.group", &self.group)
    }

    /// `order-svc verify`: every order is rebuilt from its history and compared.
    pub async fn verify(&self) -> Result<()> {
        self.order_svc().arg("verify").run_to_end().await
    }
}

/// A client of order-svc, which connects again when the process is another one.
pub fn order_client(process: &Process) -> Result<OrderServiceClient<Channel>> {
    Ok(OrderServiceClient::new(channel(process)?))
}

/// The same of order-query-svc.
pub fn view_client(process: &Process) -> Result<OrderQueryServiceClient<Channel>> {
    Ok(OrderQueryServiceClient::new(channel(process)?))
}

/// A channel to a process.
pub fn channel(process: &Process) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(process.grpc_url()?)?;
    Ok(endpoint.connect_timeout(DEADLINE).connect_lazy())
}

/// A database as `binary migrate` makes it.
async fn database(server_url: &str, binary: &str, folder: &Path) -> Result<Database> {
    // Named after all migrations: who changes one gets another template.
    let template = format!("{binary} {:016x}", migrations()?);
    let migrate = |url: String| async move {
        Process::builder(binary, folder)
            .set("database.url", url)
            // It asks for this whatever it does, and does not connect to migrate.
            .set("kafka.brokers", "127.0.0.1:1")
            .arg("migrate")
            .run_to_end()
            .await
    };
    Ok(Database::create_on(server_url, &template, migrate).await)
}

fn migrations() -> Result<u64> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("tests/ has a parent")?;
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![root.join("migrations")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        std::fs::read(&file)?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}
