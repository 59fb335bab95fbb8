//! inventory-svc within the test's process, on a database and a topic of its own, and orders whose events it reads.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use contracts::catalogue::order as types;
use contracts::shop::inventory::v1 as api;
use contracts::shop::inventory::v1::inventory_service_client::InventoryServiceClient;
use contracts::shop::order::events::v1 as proto;
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use envelope::Envelope;
use inventory_svc::verify::{Report, verify};
use inventory_svc::{App, AppError, Config};
use local_stack::process::http_get;
use local_stack::testing::events::{Topic, envelope, headers};
use local_stack::testing::{self, Database, Process};
use service::config::{self, Sources};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
pub(crate) const PARTITIONS: i32 = 6;

pub(crate) struct Running {
    pub(crate) client: InventoryServiceClient<Channel>,
    pub(crate) channel: Channel,
    pub(crate) admin: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), AppError>>,
}

/// A migrated database; the template is named after the newest migration.
pub(crate) async fn database() -> Database {
    Database::create("inventory-svc 2026-02-04-000001", migrate).await
}

async fn migrate(url: String) -> Result<(), service::shutdown::BoxError> {
    inventory_svc::migrate(&config(&url, &[]).database).await?;
    Ok(())
}

/// Settings by their dotted names, besides the ports and the database.
pub(crate) fn config(url: &str, settings: &[(&str, &str)]) -> Config {
    let fixed = [
        ("grpc.listen", "127.0.0.1:0"),
        ("grpc.shutdown_wait", "0s"),
        ("admin.listen", "127.0.0.1:0"),
        ("database.url", url),
        ("database.pool_size", "8"),
        ("database.acquire_timeout", "5s"),
        // Nobody is there: commands do without.
        ("kafka.brokers", "127.0.0.1:1"),
    ];
    let variable = |(key, value): &(&str, &str)| {
        (
            format!("TEST_{}", key.replace('.', "__").to_uppercase()),
            (*value).to_owned(),
        )
    };
    let sources = Sources::new("TEST_").env(fixed.iter().chain(settings).map(variable));
    config::parse(sources, Config::read).expect("valid configuration")
}

/// Starts the service on a database, without Kafka.
pub(crate) async fn start(database: &Database) -> Running {
    start_with(config(&database.url(), &[])).await
}

pub(crate) async fn start_with(config: Config) -> Running {
    let app: App = config.build().await.expect("free ports");
    let (grpc, admin) = (app.grpc_addr(), app.admin_addr());
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(app.run(shutdown.clone()));
    let channel = Channel::from_shared(format!("http://{grpc}"))
        .expect("a URL")
        .connect()
        .await
        .expect("listening");
    let client = InventoryServiceClient::new(channel.clone());
    Running {
        client,
        channel,
        admin,
        shutdown,
        task,
    }
}

impl Running {
    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        drop((self.client, self.channel));
        let ended = tokio::time::timeout(LIMIT, self.task).await.expect("in time");
        ended.expect("no panic").expect("a clean end");
    }

    pub(crate) async fn set(&self, request: api::SetStockRequest) -> Result<api::Stock, Status> {
        let response = self.client.clone().set_stock(request).await?;
        Ok(response.into_inner().stock.expect("stock"))
    }

    pub(crate) async fn adjust(&self, request: api::AdjustStockRequest) -> Result<api::Stock, Status> {
        let response = self.client.clone().adjust_stock(request).await?;
        Ok(response.into_inner().stock.expect("stock"))
    }

    pub(crate) async fn get(&self, product: Uuid) -> Result<api::Stock, Status> {
        let request = api::GetStockRequest {
            product_id: product.to_string(),
        };
        let response = self.client.clone().get_stock(request).await?;
        Ok(response.into_inner().stock.expect("stock"))
    }

    /// Available, reserved and sold.
    pub(crate) async fn counts(&self, product: Uuid) -> (i64, i64, i64) {
        let stock = self.get(product).await.expect("known");
        (stock.available, stock.reserved, stock.sold)
    }

    /// A new product of which so many pieces are available.
    pub(crate) async fn product(&self, available: i64) -> Uuid {
        let product = Uuid::new_v4();
        self.set(set_request(product, available)).await.expect("set");
        product
    }
}

pub(crate) fn set_request(product: Uuid, available: i64) -> api::SetStockRequest {
    api::SetStockRequest {
        request_id: Uuid::new_v4().to_string(),
        product_id: product.to_string(),
        available,
        expected_version: None,
    }
}

pub(crate) fn adjust_request(product: Uuid, change: i64) -> api::AdjustStockRequest {
    api::AdjustStockRequest {
        request_id: Uuid::new_v4().to_string(),
        product_id: product.to_string(),
        change,
        expected_version: None,
    }
}

/// A database, a topic of orders, and the group of the replicas on them.
pub(crate) struct Stage {
    pub(crate) database: Database,
    topic: Topic,
    brokers: String,
    group: String,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        let brokers = testing::kafka_brokers();
        let topic = Topic::create(&brokers, "events.order", PARTITIONS)
            .await
            .expect("a topic");
        Self {
            database: database().await,
            topic,
            brokers,
            group: testing::unique("inventory-svc"),
        }
    }

    pub(crate) async fn start(&self, settings: &[(&str, &str)]) -> Running {
        let mut all = vec![
            ("kafka.brokers", self.brokers.as_str()),
            ("consumer.order_topic", self.topic.name()),
            ("consumer.group", &self.group),
        ];
        all.extend(settings);
        start_with(config(&self.database.url(), &all)).await
    }

    /// The binary, on the same.
    pub(crate) fn process(&self, folder: &std::path::Path) -> local_stack::process::Builder {
        Process::builder("inventory-svc", folder)
            .set("database.url", self.database.url())
            .set("kafka.brokers", &self.brokers)
            .set("consumer.order_topic", self.topic.name())
            .set("consumer.group", &self.group)
    }

    /// Two replicas, each with some of the partitions.
    pub(crate) async fn start_two(&self) -> [Running; 2] {
        let replicas = [self.start(&[]).await, self.start(&[]).await];
        for replica in &replicas {
            until("partitions are assigned", async || {
                metric(replica.admin, "consumer_assigned_partitions").await == f64::from(PARTITIONS / 2)
            })
            .await;
        }
        replicas
    }

    pub(crate) async fn publish(&self, event: &OrderEvent) {
        self.topic
            .publish(&event.envelope, &event.payload)
            .await
            .expect("published");
    }

    pub(crate) async fn publish_to(&self, event: &OrderEvent, partition: i32) {
        let (key, headers) = (event.envelope.entity_id.as_str(), headers(&event.envelope));
        let sent = self
            .topic
            .produce(Some(key), Some(&event.payload), headers, Some(partition));
        sent.await.expect("published");
    }

    /// Waits until these events have been taken in.
    pub(crate) async fn heard<'e>(&self, events: impl IntoIterator<Item = &'e OrderEvent>) {
        let sql = self.database.connect().await.expect("connected");
        let query = "SELECT count(*) FROM consumer_marks WHERE entity_id = $1 AND version >= $2";
        for event in events {
            let (order, version) = (&event.envelope.entity_id, event.envelope.version);
            until("the event is taken in", async || {
                let row = sql.query_one(query, &[order, &version]).await.expect(query);
                row.get::<_, i64>(0) == 1
            })
            .await;
        }
    }

    /// The types of the events of an entity, oldest first.
    pub(crate) async fn types_of(&self, entity: Uuid) -> Vec<String> {
        let sql = self.database.connect().await.expect("connected");
        let query = "SELECT event_type FROM events WHERE entity_id = $1 ORDER BY version";
        let rows = sql.query(query, &[&entity.to_string()]).await.expect("rows");
        rows.iter().map(|row| row.get(0)).collect()
    }

    pub(crate) async fn assert_sound(&self) {
        let report = report(&self.database).await;
        assert!(report.sound().is_ok(), "{report}");
    }
}

pub(crate) async fn report(database: &Database) -> Report {
    let mut conn = AsyncPgConnection::establish(&database.url())
        .await
        .expect("connected");
    verify(&mut conn).await.expect("verified")
}

/// An event of an order, as order-svc would emit it.
#[derive(Clone)]
pub(crate) struct OrderEvent {
    pub(crate) envelope: Envelope,
    pub(crate) payload: Vec<u8>,
}

/// An order that tells its story.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) id: Uuid,
    version: i64,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self {
            id: Uuid::now_v7(),
            version: 0,
        }
    }

    pub(crate) fn tell(&mut self, event_type: &str, payload: &impl prost::Message) -> OrderEvent {
        self.version += 1;
        OrderEvent {
            envelope: envelope(types::ENTITY_TYPE, &self.id.to_string(), self.version, event_type),
            payload: payload.encode_to_vec(),
        }
    }

    /// It wants so many pieces of these products.
    pub(crate) fn placed(&mut self, wanted: &[(Uuid, i32)]) -> OrderEvent {
        let line = |(product, quantity): &(Uuid, i32)| proto::OrderLine {
            product_id: product.to_string(),
            quantity: *quantity,
            unit_price_minor_units: 100,
        };
        let placed = proto::OrderPlaced {
            order_id: self.id.to_string(),
            items: wanted.iter().map(line).collect(),
            ..Default::default()
        };
        self.tell(types::PLACED, &placed)
    }

    pub(crate) fn confirmed(&mut self) -> OrderEvent {
        let confirmed = proto::OrderConfirmed {
            order_id: self.id.to_string(),
            confirmed_at: None,
        };
        self.tell(types::CONFIRMED, &confirmed)
    }

    pub(crate) fn cancelled(&mut self) -> OrderEvent {
        let cancelled = proto::OrderCancelled {
            order_id: self.id.to_string(),
            ..Default::default()
        };
        self.tell(types::CANCELLED, &cancelled)
    }
}

/// Code, reason and domain are as they should be.
#[track_caller]
pub(crate) fn check_status(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        (reason, "inventory.shop"),
        "{status:?}"
    );
}

/// The sum of a metric over its labels.
pub(crate) async fn metric(admin: SocketAddr, name: &str) -> f64 {
    let (_, text) = http_get(admin, "/metrics").await.expect("metrics");
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.starts_with([' ', '{'])
            .then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

/// Asks until it is so.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let start = Instant::now();
    while !ask().await {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The first column of the first row.
pub(crate) async fn count(sql: &tokio_postgres::Client, query: &str) -> i64 {
    sql.query_one(query, &[]).await.expect(query).get(0)
}
