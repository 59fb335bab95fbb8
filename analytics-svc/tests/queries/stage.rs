//! A database, topics with events of orders and payments, and replicas of the service.

use std::sync::Arc;
use std::time::Duration;

use analytics_svc::App;
use analytics_svc::config::{Config, PREFIX};
use analytics_svc::emitter::Emitter;
use anyhow::Result;
use chrono::{DateTime, Utc};
use contracts::shop::analytics::events::v1::{SalesFigures, WindowSize};
use contracts::shop::analytics::v1 as wire;
use contracts::shop::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use contracts::wire::timestamp;
use envelope::Envelope;
use local_stack::process::http_get;
use local_stack::testing::events::Topic;
use local_stack::testing::{self, Database};
use local_stack::wait;
use prometheus::IntCounter;
use prost::Message as _;
use service::config::{Sources, parse};
use service::db::Db;
use service::shutdown::BoxError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Of each topic.
const PARTITIONS: i32 = 6;

pub(crate) type Client = AnalyticsServiceClient<Channel>;

pub(crate) struct Stage {
    pub(crate) database: Database,
    pub(crate) orders: Topic,
    pub(crate) payments: Topic,
    group: String,
    brokers: String,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        let database = Database::create("analytics-2026-02-07-000002", migrate).await;
        let brokers = testing::kafka_brokers();
        let topic = async |prefix| Topic::create(&brokers, prefix, PARTITIONS).await.unwrap();
        Self {
            database,
            orders: topic("events.order").await,
            payments: topic("events.payment").await,
            group: testing::unique("analytics"),
            brokers,
        }
    }

    /// By dotted name.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("database.url", self.database.url()),
            ("kafka.brokers", self.brokers.clone()),
            ("consumer.order_topic", self.orders.name().to_owned()),
            ("consumer.payment_topic", self.payments.name().to_owned()),
            ("consumer.group", self.group.clone()),
        ]
    }

    pub(crate) fn config(&self, more: &str) -> Config {
        let mut toml = "grpc.listen = \"127.0.0.1:0\"\ngrpc.shutdown_wait = \"10ms\"\n\
                        admin.listen = \"127.0.0.1:0\"\n"
            .to_owned();
        for (key, value) in self.settings() {
            toml.push_str(&format!("{key} = \"{value}\"\n"));
        }
        parse(Sources::new(PREFIX).toml(&format!("{toml}{more}")), Config::read).unwrap()
    }

    pub(crate) fn db(&self) -> Db {
        let mut database = self.config("").database;
        database.pool_size = 8;
        Db::new(&database, "test").unwrap()
    }

    /// For single steps.
    pub(crate) fn emitter(&self) -> Emitter {
        Emitter::new(
            self.db(),
            Duration::ZERO,
            IntCounter::new("emitted", "Events.").unwrap(),
        )
    }

    pub(crate) async fn replica(&self) -> Replica {
        self.replica_with("").await
    }

    pub(crate) async fn replica_with(&self, more: &str) -> Replica {
        let app = App::build(self.config(more)).await.unwrap();
        let (grpc, admin) = (app.grpc_addr(), app.admin_addr());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(app.run(shutdown.clone()));
        let channel = Channel::from_shared(format!("http://{grpc}"))
            .unwrap()
            .connect_lazy();
        Replica {
            client: Client::new(channel),
            admin,
            shutdown,
            task: Some(task),
        }
    }

    /// Two, each of which has partitions.
    pub(crate) async fn two_replicas(&self) -> [Replica; 2] {
        let replicas = [self.replica().await, self.replica().await];
        for replica in &replicas {
            replica
                .shows("partitions", |metrics| {
                    value(metrics, "consumer_assigned_partitions") == f64::from(PARTITIONS)
                })
                .await;
        }
        replicas
    }

    pub(crate) async fn publish(&self, envelope: &Envelope, payload: &[u8]) {
        let topic = match envelope.entity_type.as_str() {
            "payment" => &self.payments,
            _ => &self.orders,
        };
        topic.publish(envelope, payload).await.unwrap();
    }

    /// Rows of one column of text.
    pub(crate) async fn rows(&self, sql: &str) -> Vec<String> {
        let client = self.database.connect().await.unwrap();
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    pub(crate) async fn run(&self, sql: &str) {
        let client = self.database.connect().await.unwrap();
        client.batch_execute(sql).await.unwrap();
    }

    /// Everything that the projection knows, but not which build it is and what is yet to be told. A product may have a row that says
    /// nothing: that depends on batches.
    pub(crate) async fn dump(&self) -> Vec<String> {
        let mut rows = Vec::new();
        for (table, filter) in [
            ("sales_figures", ""),
            ("sales_orders", ""),
            ("sales_products", "WHERE quantity > 0"),
        ] {
            let sql = format!("SELECT '{table} ' || t::text FROM {table} t {filter} ORDER BY 1");
            rows.extend(self.rows(&sql).await);
        }
        rows
    }

    /// Waits until the sum of the versions of all orders and payments that are applied is this.
    pub(crate) async fn applied(&self, versions: i64) {
        wait::until("everything to be applied", LIMIT, || async {
            let sql = "SELECT coalesce(sum(version), 0)::text FROM consumer_marks m WHERE generation = \
                       coalesce((SELECT live FROM consumer_generations g WHERE g.consumer = m.consumer), 1)";
            Ok((self.rows(sql).await == [versions.to_string()]).then_some(()))
        })
        .await
        .unwrap();
    }

    /// Waits until all changes were looked at by an emitter.
    pub(crate) async fn all_told(&self) {
        wait::until("all changes to be told", LIMIT, || async {
            let left = self.rows("SELECT count(*)::text FROM sales_changes").await;
            Ok((left == ["0"]).then_some(()))
        })
        .await
        .unwrap();
    }

    /// What the events of the outbox say, in their order: entity, version, figures.
    pub(crate) async fn told(&self) -> Vec<(String, i64, Vec<SalesFigures>)> {
        let client = self.database.connect().await.unwrap();
        let sql = "SELECT aggregate_id, aggregate_version, payload FROM outbox \
                   WHERE aggregate_type = 'order_analytics' AND event_type = 'order_analytics.updated' ORDER BY id";
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter()
            .map(|row| {
                let payload: Vec<u8> = row.get(2);
                let event =
                    contracts::shop::analytics::events::v1::OrderAnalyticsUpdated::decode(&payload[..]);
                (row.get(0), row.get(1), event.unwrap().figures)
            })
            .collect()
    }
}

/// A replica in this process. Dropping it ends it at once.
pub(crate) struct Replica {
    pub(crate) client: Client,
    admin: std::net::SocketAddr,
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), BoxError>>>,
}

impl Replica {
    pub(crate) async fn summary(
        &self,
        request: wire::GetSalesSummaryRequest,
    ) -> Result<wire::GetSalesSummaryResponse, Status> {
        Ok(self.client.clone().get_sales_summary(request).await?.into_inner())
    }

    pub(crate) async fn watch(
        &self,
        size: WindowSize,
        currency: &str,
    ) -> Result<tonic::Streaming<wire::WatchSalesResponse>, Status> {
        let request = wire::WatchSalesRequest {
            window_size: size.into(),
            currency_code: currency.to_owned(),
        };
        Ok(self.client.clone().watch_sales(request).await?.into_inner())
    }

    /// Waits until the metrics are as they should be.
    pub(crate) async fn shows(&self, what: &str, check: impl Fn(&str) -> bool) {
        let check = Arc::new(check);
        wait::until(what, LIMIT, || {
            let check = Arc::clone(&check);
            async move {
                let (_, text) = http_get(self.admin, "/metrics").await?;
                Ok(check(&text).then_some(()))
            }
        })
        .await
        .unwrap();
    }

    /// Waits until this many streams watch.
    pub(crate) async fn has_watching(&self, count: u32) {
        self.shows(&format!("{count} to watch"), |metrics| {
            value(metrics, "analytics_watching") == f64::from(count)
        })
        .await;
    }

    /// Waits for what `/readyz` says.
    pub(crate) async fn readiness(&self, status: u16, contains: &str) {
        wait::until("readiness", LIMIT, || async {
            let (code, text) = http_get(self.admin, "/readyz").await?;
            Ok((code == status && text.contains(contains)).then_some(()))
        })
        .await
        .unwrap();
    }

    pub(crate) fn begin_stop(&self) {
        self.shutdown.cancel();
    }

    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        let task = self.task.take().unwrap();
        tokio::time::timeout(LIMIT, task).await.unwrap().unwrap().unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// The sum of a metric over its labels.
pub(crate) fn value(metrics: &str, name: &str) -> f64 {
    metrics
        .lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Requires a status with a reason.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &str) {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(
        status.get_details_error_info().expect("always there").reason,
        reason
    );
}

/// Requires INVALID_ARGUMENT with exactly these fields.
#[track_caller]
pub(crate) fn assert_bad_fields<T: std::fmt::Debug>(answer: Result<T, Status>, fields: &[&str]) {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let violations = status
        .get_details_bad_request()
        .expect("fields are named")
        .field_violations;
    let found: Vec<&str> = violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(found, fields);
}

/// The request for all figures of windows of a size within a span.
pub(crate) fn span(
    size: WindowSize,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
) -> wire::GetSalesSummaryRequest {
    wire::GetSalesSummaryRequest {
        window_size: size.into(),
        start: Some(timestamp(start)),
        end: Some(timestamp(end)),
        currency_code: String::new(),
    }
}

async fn migrate(url: String) -> Result<()> {
    let toml = format!("database.url = \"{url}\"\nkafka.brokers = \"unused:1\"");
    let config = parse(Sources::new(PREFIX).toml(&toml), Config::read)?;
    analytics_svc::migrate(&config.database)
        .await
        .map_err(anyhow::Error::from_boxed)
}
