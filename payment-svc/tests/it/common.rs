//! A database, a topic of orders, a sandbox, and replicas of payment-svc on them.

use std::time::Duration;

use contracts::catalogue::order as types;
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as events;
use contracts::shop::payment::v1 as api;
use contracts::shop::payment::v1::payment_service_client::PaymentServiceClient;
use contracts::shop::payment::v1::process_payment_request::Method;
use local_stack::process::{Builder, http_get};
use local_stack::testing::events::{Topic, envelope};
use local_stack::testing::{self, Database, Folder, Process};
use local_stack::wait;
use payment_svc::{AppError, Config};
use serde_json::Value;
use service::config::{Sources, parse};
use service::shutdown::BoxError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

pub(crate) use contracts::shop::payment::events::v1::FailureReason;
pub(crate) use contracts::shop::payment::v1::PaymentStatus;

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The order's total in every test.
pub(crate) const TOTAL: i64 = 1299;
/// What the sandbox and the service agree on.
const KEY: &str = "sk_test_it";

pub(crate) struct Stage {
    pub(crate) database: Database,
    pub(crate) sql: tokio_postgres::Client,
    pub(crate) topic: Topic,
    group: String,
    pub(crate) sandbox: Process,
    /// Where payment-svc looks for its provider.
    provider: String,
    pub(crate) folder: Folder,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        let folder = Folder::create("payment-svc");
        let database = database().await;
        let sandbox = Process::builder("payment-sandbox", folder.path())
            .set("http.secret_key", KEY)
            .set(
                "storage.path",
                folder.path().join("sandbox.redb").to_string_lossy(),
            )
            .set("faults.slow", "1500ms")
            .set("faults.hang", "30s")
            .start();
        let brokers = testing::kafka_brokers();
        let topic = Topic::create(&brokers, "events.order", 3);
        let (sandbox, topic) = tokio::join!(sandbox, topic);
        let sandbox = sandbox.expect("a sandbox");
        Self {
            sql: database.connect().await.expect("connected"),
            database,
            topic: topic.expect("a topic"),
            group: testing::unique("payment-svc"),
            provider: sandbox.http_url().expect("serving"),
            sandbox,
            folder,
        }
    }

    /// Puts something between the service and the sandbox.
    pub(crate) fn through(&mut self, url: String) {
        self.provider = url;
    }

    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        [
            ("database.url", self.database.url().as_str()),
            ("database.pool_size", "8"),
            ("database.acquire_timeout", "5s"),
            ("kafka.brokers", &testing::kafka_brokers()),
            ("consumer.order_topic", self.topic.name()),
            ("consumer.group", &self.group),
            ("provider.base_url", &self.provider),
            ("provider.secret_key", KEY),
            ("provider.timeout", "1s"),
            ("payments.lease", "2s"),
            ("payments.settle_every", "50ms"),
            ("payments.retry_first", "50ms"),
            ("payments.retry_longest", "300ms"),
            ("grpc.shutdown_wait", "0s"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }

    pub(crate) fn config(&self, more: &[(&str, &str)]) -> Config {
        let listen = [("grpc.listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0")];
        let more = listen
            .iter()
            .chain(more)
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let variables = self
            .settings()
            .into_iter()
            .chain(more)
            .map(|(key, value)| (format!("TEST_{}", key.replace('.', "__").to_uppercase()), value));
        parse(Sources::new("TEST_").env(variables), Config::read).expect("valid configuration")
    }

    /// A replica within the test's process.
    pub(crate) async fn replica(&self) -> Replica {
        self.replica_with(&[]).await
    }

    pub(crate) async fn replica_with(&self, more: &[(&str, &str)]) -> Replica {
        let app = self.config(more).build().await.expect("free ports");
        let (grpc, admin) = (app.grpc_addr(), app.admin_addr());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(app.run(shutdown.clone()));
        Replica {
            client: Client::new(&format!("http://{grpc}")),
            admin,
            shutdown,
            task,
        }
    }

    /// A replica as a process, to be killed.
    pub(crate) fn process(&self, instance: &str) -> Builder {
        self.settings().iter().fold(
            Process::builder("payment-svc", self.folder.path()).instance(instance),
            |builder, (key, value)| builder.set(key, value),
        )
    }

    /// An order that is known, of a new user, as if it had been read from the topic.
    pub(crate) async fn known_order(&self) -> Order {
        let order = Order::new();
        self.know(&order).await;
        order
    }

    pub(crate) async fn know(&self, order: &Order) {
        let insert = "INSERT INTO known_orders VALUES ($1, $2, $3, 'EUR', NULL, false, false, false, 1)";
        self.sql
            .execute(insert, &[&order.id, &order.user, &TOTAL])
            .await
            .expect("inserted");
    }

    pub(crate) async fn publish(
        &self,
        order: &Order,
        version: i64,
        event_type: &str,
        payload: &impl prost::Message,
    ) {
        let mut envelope = envelope(types::ENTITY_TYPE, &order.id.to_string(), version, event_type);
        envelope.traceparent = Some(traceparent(order));
        self.topic
            .publish(&envelope, &payload.encode_to_vec())
            .await
            .expect("published");
    }

    pub(crate) async fn publish_placed(&self, order: &Order, method: Option<&str>) {
        let placed = events::OrderPlaced {
            order_id: order.id.to_string(),
            user_id: order.user.to_string(),
            total: Some(order.amount()),
            payment_method_id: method.map(str::to_owned),
            ..Default::default()
        };
        self.publish(order, 1, types::PLACED, &placed).await;
    }

    pub(crate) async fn publish_reserved(&self, order: &Order, version: i64) {
        let reserved = events::OrderReserved {
            order_id: order.id.to_string(),
            ..Default::default()
        };
        self.publish(order, version, types::RESERVED, &reserved).await;
    }

    pub(crate) async fn publish_overdue(&self, order: &Order, version: i64) {
        let overdue = events::OrderOverdue {
            order_id: order.id.to_string(),
            ..Default::default()
        };
        self.publish(order, version, types::OVERDUE, &overdue).await;
    }

    pub(crate) async fn publish_cancelled(&self, order: &Order, version: i64) {
        let cancelled = events::OrderCancelled {
            order_id: order.id.to_string(),
            ..Default::default()
        };
        self.publish(order, version, types::CANCELLED, &cancelled).await;
    }

    /// Waits until a query, whose first column is a boolean, says yes of this id.
    pub(crate) async fn until(&self, what: &str, query: &str, id: Uuid) {
        wait::until(what, LIMIT, || async {
            let row = self.sql.query_opt(query, &[&id]).await?;
            Ok(row.filter(|row| row.get(0)).map(|_| ()))
        })
        .await
        .expect(what);
    }

    pub(crate) async fn until_known(&self, order: &Order) {
        let query = "SELECT true FROM known_orders WHERE order_id = $1";
        self.until("the order is known", query, order.id).await;
    }

    pub(crate) async fn until_cancelled(&self, order: &Order) {
        let query = "SELECT cancelled FROM known_orders WHERE order_id = $1";
        self.until("the order is known as cancelled", query, order.id)
            .await;
    }

    /// Waits until the order has payments of these statuses, oldest first.
    pub(crate) async fn until_payments(&self, order: &Order, expected: &[&str]) {
        let what = format!("payments are {expected:?}");
        let query = format!(
            "SELECT coalesce(array_agg(status ORDER BY payment_id), '{{}}') = '{{{}}}' FROM payments WHERE order_id = $1",
            expected.join(",")
        );
        self.until(&what, &query, order.id).await;
    }

    /// Types of the events of an order's payments, in the order of the outbox, each with its version.
    pub(crate) async fn events(&self, order: &Order) -> Vec<String> {
        let query = "SELECT o.event_type || ' ' || o.aggregate_version FROM outbox o
                     WHERE o.correlation_id = $1 ORDER BY o.id";
        let rows = self.sql.query(query, &[&order.id]).await.expect("answered");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// How many charges and refunds the sandbox has made of an order.
    pub(crate) async fn ledger(&self, order: &Order) -> (usize, usize) {
        let ledger = self.whole_ledger().await;
        let of = |kind: &str| {
            let entries = ledger[kind].as_array().expect("a list").iter();
            entries
                .filter(|entry| entry["order_id"] == order.id.to_string() && entry["status"] != "failed")
                .count()
        };
        (of("charges"), of("refunds"))
    }

    pub(crate) async fn whole_ledger(&self) -> Value {
        let url = self.sandbox.http_url().expect("serving");
        let address = url.trim_start_matches("http://").parse().expect("an address");
        let (status, body) = http_get(address, "/sandbox/ledger").await.expect("a ledger");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// Everything is quiet, both ledgers agree, and histories rebuild.
    pub(crate) async fn is_right(&self) {
        wait::until("nothing is under way", LIMIT, || async {
            let row = self
                .sql
                .query_one(
                    "SELECT count(*) FROM payments WHERE next_step_at IS NOT NULL",
                    &[],
                )
                .await?;
            Ok((row.get::<_, i64>(0) == 0).then_some(()))
        })
        .await
        .expect("quiet");
        for command in ["reconcile", "verify"] {
            self.process(command)
                .arg(command)
                .run_to_end()
                .await
                .unwrap_or_else(|error| panic!("{command}: {error:#}"));
        }
    }
}

pub(crate) async fn database() -> Database {
    Database::create("payment-svc 2026-02-03-000001 inbox", migrate).await
}

async fn migrate(url: String) -> Result<(), BoxError> {
    let toml = format!("database.url = \"{url}\"");
    let database = parse(Sources::new("X_").toml(&toml), service::config::Database::read).expect("valid");
    payment_svc::migrate(&database).await?;
    Ok(())
}

/// An order, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order {
    pub(crate) id: Uuid,
    pub(crate) user: Uuid,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self {
            id: Uuid::new_v4(),
            user: Uuid::new_v4(),
        }
    }

    pub(crate) fn amount(&self) -> Money {
        Money {
            minor_units: TOTAL,
            currency_code: "EUR".into(),
        }
    }

    /// A request to pay it by a card.
    pub(crate) fn pay_by_card(&self, number: &str) -> api::ProcessPaymentRequest {
        self.pay(Method::Card(card(number)))
    }

    /// A request to pay it.
    pub(crate) fn pay(&self, method: Method) -> api::ProcessPaymentRequest {
        api::ProcessPaymentRequest {
            request_id: id(),
            user_id: self.user.to_string(),
            order_id: self.id.to_string(),
            amount: Some(self.amount()),
            method: Some(method),
        }
    }
}

/// The trace that an order's events are part of.
pub(crate) fn traceparent(order: &Order) -> String {
    format!("00-{}-b7ad6b7169203331-01", order.id.simple())
}

pub(crate) fn id() -> String {
    Uuid::new_v4().to_string()
}

pub(crate) fn card(number: &str) -> api::Card {
    api::Card {
        number: number.into(),
        expiry_month: 12,
        expiry_year: 2040,
        cvv: "737".into(),
    }
}

/// payment-svc within the test's process.
pub(crate) struct Replica {
    pub(crate) client: Client,
    pub(crate) admin: std::net::SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), AppError>>,
}

impl Replica {
    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        drop(self.client);
        let ended = tokio::time::timeout(LIMIT, self.task).await.expect("in time");
        ended.expect("no panic").expect("a clean end");
    }

    /// Waits until it reads some of the topic's partitions.
    pub(crate) async fn reads(&self) {
        wait::until("partitions are assigned", LIMIT, || async {
            let (_, metrics) = http_get(self.admin, "/metrics").await?;
            let assigned = metrics
                .lines()
                .find(|line| line.starts_with("consumer_assigned_partitions"))
                .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            Ok(assigned.filter(|assigned| *assigned > 0.0).map(|_| ()))
        })
        .await
        .expect("assigned");
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Client {
    service: PaymentServiceClient<Channel>,
    /// The trace that payments and refunds are part of.
    trace: Option<&'static str>,
}

impl Client {
    pub(crate) fn new(url: &str) -> Self {
        let channel = Channel::from_shared(url.to_owned())
            .expect("a URL")
            .connect_lazy();
        Self {
            service: PaymentServiceClient::new(channel),
            trace: None,
        }
    }

    pub(crate) fn within_trace(&self, trace: &'static str) -> Self {
        Self {
            trace: Some(trace),
            ..self.clone()
        }
    }

    fn request<T>(&self, message: T, limit: Duration) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(limit);
        if let Some(trace) = self.trace {
            let traceparent = format!("00-{trace}-b7ad6b7169203331-01");
            let metadata = request.metadata_mut();
            metadata.insert("traceparent", traceparent.parse().expect("ASCII"));
        }
        request
    }

    pub(crate) async fn pay(&self, request: api::ProcessPaymentRequest) -> Result<api::Payment, Status> {
        self.pay_within(request, Duration::from_secs(25)).await
    }

    pub(crate) async fn pay_within(
        &self,
        request: api::ProcessPaymentRequest,
        limit: Duration,
    ) -> Result<api::Payment, Status> {
        let request = self.request(request, limit);
        let response = self.service.clone().process_payment(request).await?;
        Ok(response.into_inner().payment.expect("a payment"))
    }

    pub(crate) async fn refund(&self, request: api::RefundPaymentRequest) -> Result<api::Payment, Status> {
        let request = self.request(request, Duration::from_secs(25));
        let response = self.service.clone().refund_payment(request).await?;
        Ok(response.into_inner().payment.expect("a payment"))
    }

    pub(crate) async fn get(&self, user_id: &str, payment_id: &str) -> Result<api::Payment, Status> {
        let request = api::GetPaymentRequest {
            user_id: user_id.into(),
            payment_id: payment_id.into(),
        };
        let response = self.service.clone().get_payment(request).await?;
        Ok(response.into_inner().payment.expect("a payment"))
    }

    pub(crate) async fn create_method(
        &self,
        request: api::CreatePaymentMethodRequest,
    ) -> Result<api::PaymentMethod, Status> {
        let response = self.service.clone().create_payment_method(request).await?;
        Ok(response.into_inner().payment_method.expect("a method"))
    }

    /// A method of this user.
    pub(crate) async fn method(&self, user: Uuid, number: &str) -> String {
        self.try_method(user, number)
            .await
            .expect("created")
            .payment_method_id
    }

    /// The same, or why not.
    pub(crate) async fn try_method(&self, user: Uuid, number: &str) -> Result<api::PaymentMethod, Status> {
        self.create_method(api::CreatePaymentMethodRequest {
            request_id: id(),
            user_id: user.to_string(),
            card: Some(card(number)),
        })
        .await
    }
}

pub(crate) fn refund_request(payment: &api::Payment) -> api::RefundPaymentRequest {
    api::RefundPaymentRequest {
        request_id: id(),
        user_id: payment.user_id.clone(),
        payment_id: payment.payment_id.clone(),
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
        (reason, "payment.shop"),
        "{status:?}"
    );
    if code == Code::Unavailable {
        assert!(details.retry_info().is_some(), "no RetryInfo in {status:?}");
    }
}
