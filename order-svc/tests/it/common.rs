//! order-svc within the test's process, on a database of its own.

use std::time::{Duration, Instant};

use contracts::shop::order::v1 as api;
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use local_stack::testing::Database;
use order_svc::{App, AppError, Config};
use service::config::{self, Sources};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Running {
    pub(crate) client: OrderServiceClient<Channel>,
    pub(crate) channel: Channel,
    pub(crate) admin: std::net::SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), AppError>>,
}

/// A migrated database; the template is named after the newest migration.
pub(crate) async fn database() -> Database {
    Database::create("order-svc 2026-02-01-000002 inbox", migrate).await
}

pub(crate) async fn migrate(url: String) -> Result<(), service::shutdown::BoxError> {
    order_svc::migrate(&config(&url, &[]).database).await?;
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

/// Starts the service on a database.
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
    let client = OrderServiceClient::new(channel.clone());
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

    pub(crate) async fn place(&self, request: api::PlaceOrderRequest) -> Result<api::Order, Status> {
        let response = self.client.clone().place_order(request).await?;
        Ok(response.into_inner().order.expect("an order"))
    }

    pub(crate) async fn cancel(&self, request: api::CancelOrderRequest) -> Result<api::Order, Status> {
        let response = self.client.clone().cancel_order(request).await?;
        Ok(response.into_inner().order.expect("an order"))
    }

    pub(crate) async fn ship(&self, request: api::ShipOrderRequest) -> Result<api::Order, Status> {
        let response = self.client.clone().ship_order(request).await?;
        Ok(response.into_inner().order.expect("an order"))
    }

    pub(crate) async fn deliver(&self, request: api::MarkDeliveredRequest) -> Result<api::Order, Status> {
        let response = self.client.clone().mark_delivered(request).await?;
        Ok(response.into_inner().order.expect("an order"))
    }

    pub(crate) async fn get(&self, user_id: &str, order_id: &str) -> Result<api::Order, Status> {
        let request = api::GetOrderRequest {
            user_id: user_id.into(),
            order_id: order_id.into(),
        };
        let response = self.client.clone().get_order(request).await?;
        Ok(response.into_inner().order.expect("an order"))
    }

    pub(crate) async fn history(
        &self,
        user_id: &str,
        order_id: &str,
        page_size: i32,
        page_token: &str,
    ) -> Result<api::GetOrderHistoryResponse, Status> {
        let request = api::GetOrderHistoryRequest {
            user_id: user_id.into(),
            order_id: order_id.into(),
            page_size,
            page_token: page_token.into(),
        };
        Ok(self.client.clone().get_order_history(request).await?.into_inner())
    }
}

pub(crate) fn id() -> String {
    Uuid::new_v4().to_string()
}

pub(crate) fn item(quantity: i32, unit_price_minor_units: i64) -> api::OrderItem {
    api::OrderItem {
        product_id: id(),
        quantity,
        unit_price_minor_units,
    }
}

/// A valid request of a new user: 2 × 5.00 and 1 × 2.99 EUR.
pub(crate) fn place_request() -> api::PlaceOrderRequest {
    api::PlaceOrderRequest {
        request_id: id(),
        user_id: id(),
        items: vec![item(2, 500), item(1, 299)],
        currency_code: "EUR".into(),
        user_email: "someone@example.org".into(),
        payment_method_id: id(),
    }
}

pub(crate) fn cancel_request(order: &api::Order) -> api::CancelOrderRequest {
    api::CancelOrderRequest {
        request_id: id(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        reason: "changed my mind".into(),
        expected_version: 0,
    }
}

pub(crate) fn ship_request(order: &api::Order) -> api::ShipOrderRequest {
    api::ShipOrderRequest {
        request_id: id(),
        order_id: order.order_id.clone(),
        carrier: "Post".into(),
        tracking_number: "T 1".into(),
        expected_version: 0,
    }
}

pub(crate) fn deliver_request(order: &api::Order) -> api::MarkDeliveredRequest {
    api::MarkDeliveredRequest {
        request_id: id(),
        order_id: order.order_id.clone(),
        expected_version: 0,
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
        (reason, "order.shop"),
        "{status:?}"
    );
    if code == Code::Unavailable {
        assert!(details.retry_info().is_some(), "no RetryInfo in {status:?}");
    }
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
