//! A database, topics with events of orders and payments, and replicas of the service.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::{DateTime, Utc};
use consumer::Redrive;
use contracts::catalogue::{
    inventory as reservation_types, notification as mail_types, order as types, payment as payment_types,
};
use contracts::shop::common::v1::Money;
use contracts::shop::inventory::events::v1 as inventory;
use contracts::shop::notification::events::v1 as notification;
use contracts::shop::order::events::v1 as events;
use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::payment::events::v1 as payments;
use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::deadpool::Pool;
use envelope::Envelope;
use local_stack::process::http_get;
use local_stack::testing::events::{Topic, envelope};
use local_stack::testing::{self, Database};
use local_stack::wait;
use order_query_svc::App;
use order_query_svc::config::{Config, PREFIX};
use order_query_svc::projection::Projection;
use order_query_svc::waits::Waits;
use prost::Message as _;
use service::config::{Sources, parse};
use service::db::Db;
use service::shutdown::BoxError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Of each topic.
const PARTITIONS: i32 = 6;

pub(crate) type Client = OrderQueryServiceClient<Channel>;

pub(crate) struct Stage {
    pub(crate) database: Database,
    pub(crate) orders: Topic,
    pub(crate) payments: Topic,
    pub(crate) reservations: Topic,
    pub(crate) mails: Topic,
    group: String,
    brokers: String,
}

/// An event's type and payload.
pub(crate) type Event = (&'static str, Vec<u8>);

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::on(&testing::postgres_url()).await
    }

    pub(crate) async fn on(postgres_url: &str) -> Self {
        let database =
            Database::create_on(postgres_url, "order-query-2026-02-02-000003 correlation", migrate).await;
        let brokers = testing::kafka_brokers();
        let topic = async |prefix| Topic::create(&brokers, prefix, PARTITIONS).await.unwrap();
        Self {
            database,
            orders: topic("events.order").await,
            payments: topic("events.payment").await,
            reservations: topic("events.inventory").await,
            mails: topic("events.notification").await,
            group: testing::unique("order-query"),
            brokers,
        }
    }

    pub(crate) async fn replica(&self) -> Replica {
        self.replica_with("").await
    }

    pub(crate) fn config(&self, more: &str) -> Config {
        let toml = format!(
            "grpc.listen = \"127.0.0.1:0\"\ngrpc.shutdown_wait = \"10ms\"\nadmin.listen = \"127.0.0.1:0\"\n\
             database.url = \"{}\"\nkafka.brokers = \"{}\"\nconsumer.order_topic = \"{}\"\n\
             consumer.payment_topic = \"{}\"\nconsumer.inventory_topic = \"{}\"\n\
             consumer.notification_topic = \"{}\"\nconsumer.group = \"{}\"\n{more}",
            self.database.url(),
            self.brokers,
            self.orders.name(),
            self.payments.name(),
            self.reservations.name(),
            self.mails.name(),
            self.group,
        );
        parse(Sources::new(PREFIX).toml(&toml), Config::read).unwrap()
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
                    // Half of those of four topics.
                    value(metrics, "consumer_assigned_partitions") == f64::from(2 * PARTITIONS)
                })
                .await;
        }
        replicas
    }

    pub(crate) async fn publish(&self, order: Uuid, version: i64, event: Event) {
        let envelope = Envelope {
            occurred_at: at(version),
            ..envelope(types::ENTITY_TYPE, &order.to_string(), version, event.0)
        };
        self.orders.publish(&envelope, &event.1).await.unwrap();
    }

    /// An event of an order, with an envelope of the test's own.
    pub(crate) async fn publish_as(&self, envelope: &Envelope, payload: &[u8]) {
        self.orders.publish(envelope, payload).await.unwrap();
    }

    pub(crate) async fn publish_reservation(&self, order: Uuid, version: i64, event: Event) {
        let envelope = envelope(
            reservation_types::ENTITY_TYPE,
            &order.to_string(),
            version,
            event.0,
        );
        self.reservations.publish(&envelope, &event.1).await.unwrap();
    }

    /// Waits until so much is applied: the sum of the versions that all entities have reached.
    pub(crate) async fn applied(&self, versions: i64) {
        wait::until("everything to be applied", LIMIT, || async {
            let sql = "SELECT coalesce(sum(version), 0)::text FROM consumer_marks m WHERE generation = \
                       coalesce((SELECT live FROM consumer_generations g WHERE g.consumer = m.consumer), 1)";
            Ok((self.rows(sql).await == [versions.to_string()]).then_some(()))
        })
        .await
        .unwrap();
    }

    pub(crate) fn pool(&self) -> Pool<AsyncPgConnection> {
        let mut database = self.config("").database;
        database.pool_size = 8;
        Db::new(&database, "operator").unwrap().pool().clone()
    }

    pub(crate) fn redrive(&self) -> Redrive<Projection> {
        Redrive::new(self.config("").projection, self.pool(), projection())
    }

    /// Rows of one column of text.
    pub(crate) async fn rows(&self, sql: &str) -> Vec<String> {
        let client = self.database.connect().await.unwrap();
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    pub(crate) async fn publish_payment(&self, payment: Uuid, version: i64, second: i64, event: Event) {
        let envelope = Envelope {
            occurred_at: at(second),
            ..envelope(payment_types::ENTITY_TYPE, &payment.to_string(), version, event.0)
        };
        self.payments.publish(&envelope, &event.1).await.unwrap();
    }
}

/// One that nobody waits for.
pub(crate) fn projection() -> Projection {
    Projection::new(Arc::new(Waits::new(1)))
}

/// A replica in this process. Dropping it ends it at once.
pub(crate) struct Replica {
    pub(crate) client: Client,
    admin: std::net::SocketAddr,
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), BoxError>>>,
}

impl Replica {
    pub(crate) async fn view(
        &self,
        user: Uuid,
        order: Uuid,
        at_least_version: i64,
    ) -> Result<wire::OrderView, Status> {
        self.view_within(user, order, at_least_version, LIMIT).await
    }

    pub(crate) async fn view_within(
        &self,
        user: Uuid,
        order: Uuid,
        at_least_version: i64,
        timeout: Duration,
    ) -> Result<wire::OrderView, Status> {
        let mut request = Request::new(wire::GetOrderViewRequest {
            user_id: user.to_string(),
            order_id: order.to_string(),
            at_least_version,
        });
        request.set_timeout(timeout);
        Ok(self
            .client
            .clone()
            .get_order_view(request)
            .await?
            .into_inner()
            .order
            .unwrap())
    }

    pub(crate) async fn journey(
        &self,
        user: Uuid,
        order: Uuid,
    ) -> Result<wire::GetOrderJourneyResponse, Status> {
        let request = wire::GetOrderJourneyRequest {
            user_id: user.to_string(),
            order_id: order.to_string(),
            at_least_version: 0,
        };
        Ok(self.client.clone().get_order_journey(request).await?.into_inner())
    }

    pub(crate) async fn list(
        &self,
        request: wire::ListOrdersRequest,
    ) -> Result<wire::ListOrdersResponse, Status> {
        Ok(self.client.clone().list_orders(request).await?.into_inner())
    }

    pub(crate) async fn watch(
        &self,
        user: Uuid,
        order: Uuid,
    ) -> Result<tonic::Streaming<wire::WatchOrderResponse>, Status> {
        let request = wire::WatchOrderRequest {
            user_id: user.to_string(),
            order_id: order.to_string(),
        };
        Ok(self.client.clone().watch_order(request).await?.into_inner())
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

    /// Waits until this many calls and streams wait.
    pub(crate) async fn has_waiting(&self, count: u32) {
        self.shows(&format!("{count} to wait"), |metrics| {
            value(metrics, "order_query_waiting") == f64::from(count)
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

pub(crate) fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
}

fn timestamp(time: DateTime<Utc>) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp {
        seconds: time.timestamp(),
        nanos: 0,
    })
}

pub(crate) fn placed(user: Uuid, placed_at: i64) -> Event {
    let event = events::OrderPlaced {
        user_id: user.to_string(),
        items: vec![events::OrderLine {
            product_id: Uuid::from_u128(5).to_string(),
            quantity: 3,
            unit_price_minor_units: 250,
        }],
        total: price(),
        pay_by: timestamp(at(placed_at + 900)),
        created_at: timestamp(at(placed_at)),
        ..Default::default()
    };
    (types::PLACED, event.encode_to_vec())
}

pub(crate) fn reserved() -> Event {
    (types::RESERVED, events::OrderReserved::default().encode_to_vec())
}

pub(crate) fn overdue() -> Event {
    (types::OVERDUE, events::OrderOverdue::default().encode_to_vec())
}

pub(crate) fn paid(payment: Uuid) -> Event {
    let event = events::OrderPaid {
        payment_id: payment.to_string(),
        ..Default::default()
    };
    (types::PAID, event.encode_to_vec())
}

fn price() -> Option<Money> {
    Some(Money {
        minor_units: 750,
        currency_code: "EUR".into(),
    })
}

fn visa() -> Option<payments::PaymentMethodSummary> {
    Some(payments::PaymentMethodSummary {
        brand: "visa".into(),
        last_four: "4242".into(),
    })
}

pub(crate) fn received(order: Uuid) -> Event {
    let event = payments::PaymentReceived {
        order_id: order.to_string(),
        amount: price(),
        payment_method: visa(),
        ..Default::default()
    };
    (payment_types::RECEIVED, event.encode_to_vec())
}

pub(crate) fn failed(order: Uuid, reason: i32, another_try: bool) -> Event {
    let event = payments::PaymentFailed {
        order_id: order.to_string(),
        amount: price(),
        reason,
        another_try,
        ..Default::default()
    };
    (payment_types::FAILED, event.encode_to_vec())
}

pub(crate) fn refunded(order: Uuid) -> Event {
    let event = payments::PaymentRefunded {
        order_id: order.to_string(),
        amount: price(),
        payment_method: visa(),
        ..Default::default()
    };
    (payment_types::REFUNDED, event.encode_to_vec())
}

pub(crate) fn held(order: Uuid) -> Event {
    let event = inventory::InventoryReserved {
        order_id: order.to_string(),
        ..Default::default()
    };
    (reservation_types::RESERVED, event.encode_to_vec())
}

pub(crate) fn sold(order: Uuid) -> Event {
    let event = inventory::InventoryCommitted {
        order_id: order.to_string(),
        ..Default::default()
    };
    (reservation_types::COMMITTED, event.encode_to_vec())
}

pub(crate) fn mailed(order: Uuid, template: notification::Template) -> Event {
    let event = notification::NotificationSent {
        template: template.into(),
        order_id: order.to_string(),
        ..Default::default()
    };
    (mail_types::SENT, event.encode_to_vec())
}

pub(crate) fn confirmed() -> Event {
    (
        types::CONFIRMED,
        events::OrderConfirmed::default().encode_to_vec(),
    )
}

pub(crate) fn shipped() -> Event {
    let event = events::OrderShipped {
        tracking_number: "T-1".into(),
        carrier: "DHL".into(),
        ..Default::default()
    };
    (types::SHIPPED, event.encode_to_vec())
}

pub(crate) fn completed() -> Event {
    (
        types::COMPLETED,
        events::OrderCompleted::default().encode_to_vec(),
    )
}

pub(crate) fn cancelled() -> Event {
    let event = events::OrderCancelled {
        reason: "too slow".into(),
        ..Default::default()
    };
    (types::CANCELLED, event.encode_to_vec())
}

#[track_caller]
pub(crate) fn status_of(view: &wire::OrderView) -> OrderStatus {
    OrderStatus::try_from(view.status).unwrap()
}

/// Requires a status with a reason.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(
    answer: Result<T, Status>,
    code: Code,
    reason: &str,
) -> Status {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(
        status.get_details_error_info().expect("always there").reason,
        reason
    );
    status
}

/// Requires INVALID_ARGUMENT with exactly this field, whose value is not echoed.
#[track_caller]
pub(crate) fn assert_bad_field<T: std::fmt::Debug>(answer: Result<T, Status>, field: &str) {
    let status = assert_refused(answer, Code::InvalidArgument, "INVALID_REQUEST");
    let violations = status
        .get_details_bad_request()
        .expect("fields are named")
        .field_violations;
    let fields: Vec<&str> = violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(fields, [field]);
}

async fn migrate(url: String) -> Result<()> {
    let toml = format!("database.url = \"{url}\"\nkafka.brokers = \"unused:1\"");
    let config = parse(Sources::new(PREFIX).toml(&toml), Config::read)?;
    order_query_svc::migrate(&config.database)
        .await
        .map_err(anyhow::Error::from_boxed)
}
