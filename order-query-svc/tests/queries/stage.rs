//! A database, a topic with events of orders, and replicas of the service.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::{DateTime, Utc};
use contracts::catalogue::order as types;
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as events;
use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use envelope::Envelope;
use local_stack::process::http_get;
use local_stack::testing::{self, Database};
use local_stack::wait;
use order_query_svc::App;
use order_query_svc::config::{Config, PREFIX};
use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use service::config::{Sources, parse};
use service::shutdown::BoxError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) type Client = OrderQueryServiceClient<Channel>;

pub(crate) struct Stage {
    pub(crate) database: Database,
    topic: String,
    group: String,
    brokers: String,
    producer: FutureProducer,
}

/// An event's type and payload.
pub(crate) type Event = (&'static str, Vec<u8>);

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::on(&testing::postgres_url()).await
    }

    pub(crate) async fn on(postgres_url: &str) -> Self {
        let database = Database::create_on(postgres_url, "order-query-2026-02-02-000001", migrate).await;
        let topic = testing::unique("events.order");
        let brokers = testing::kafka_brokers();
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .create()
            .unwrap();
        let new = NewTopic::new(&topic, 6, TopicReplication::Fixed(1));
        admin
            .create_topics([&new], &AdminOptions::new())
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        let producer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("partitioner", "murmur2_random")
            .set("linger.ms", "0")
            .create()
            .unwrap();
        Self {
            database,
            topic,
            group: testing::unique("order-query"),
            brokers,
            producer,
        }
    }

    pub(crate) async fn replica(&self) -> Replica {
        self.replica_with("").await
    }

    pub(crate) async fn replica_with(&self, more: &str) -> Replica {
        let toml = format!(
            "grpc.listen = \"127.0.0.1:0\"\ngrpc.shutdown_wait = \"10ms\"\nadmin.listen = \"127.0.0.1:0\"\n\
             database.url = \"{}\"\nkafka.brokers = \"{}\"\nconsumer.order_topic = \"{}\"\nconsumer.group = \"{}\"\n{more}",
            self.database.url(),
            self.brokers,
            self.topic,
            self.group,
        );
        let config = parse(Sources::new(PREFIX).toml(&toml), Config::read).unwrap();
        let app = App::build(config).await.unwrap();
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
                    value(metrics, "consumer_assigned_partitions") == 3.0
                })
                .await;
        }
        replicas
    }

    pub(crate) async fn publish(&self, order: Uuid, version: i64, event: Event) {
        let (event_type, payload) = event;
        let order = order.to_string();
        let envelope = Envelope {
            event_id: Uuid::now_v7(),
            event_type: event_type.into(),
            source: "/order-svc".into(),
            entity_type: types::ENTITY_TYPE.into(),
            entity_id: order.clone(),
            version,
            schema_version: 1,
            occurred_at: at(version),
            content_type: envelope::CONTENT_TYPE_PROTOBUF.into(),
            data_schema: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            outbox_id: None,
            metadata: BTreeMap::new(),
        };
        let mut headers = Some(OwnedHeaders::new());
        envelope.write(|key, value| {
            headers = headers.take().map(|headers| {
                headers.insert(Header {
                    key,
                    value: Some(value),
                })
            });
        });
        let record = FutureRecord::to(&self.topic)
            .key(&order)
            .payload(&payload)
            .headers(headers.unwrap());
        let sent = self
            .producer
            .send_result(record)
            .map_err(|(error, _)| error)
            .unwrap();
        sent.await.unwrap().unwrap();
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
        total: Some(Money {
            minor_units: 750,
            currency_code: "EUR".into(),
        }),
        pay_by: timestamp(at(placed_at + 900)),
        created_at: timestamp(at(placed_at)),
        ..Default::default()
    };
    (types::PLACED, event.encode_to_vec())
}

pub(crate) fn reserved() -> Event {
    (types::RESERVED, events::OrderReserved::default().encode_to_vec())
}

pub(crate) fn paid() -> Event {
    (types::PAID, events::OrderPaid::default().encode_to_vec())
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
