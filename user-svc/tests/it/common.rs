//! user-svc within the test's process, on a database of its own.

use std::time::{Duration, Instant};

use contracts::shop::user::v1 as api;
use contracts::shop::user::v1::user_service_client::UserServiceClient;
use local_stack::testing::Database;
use service::config::{self, Sources};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use user_svc::{AppError, Config};
use uuid::Uuid;

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Running {
    pub(crate) client: UserServiceClient<Channel>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), AppError>>,
}

/// A migrated database; the template is named after the newest migration.
pub(crate) async fn database() -> Database {
    Database::create("user-svc 2026-02-04-000001", migrate).await
}

async fn migrate(url: String) -> Result<(), service::shutdown::BoxError> {
    user_svc::migrate(&config(&url).database).await?;
    Ok(())
}

fn config(url: &str) -> Config {
    let settings = [
        ("GRPC__LISTEN", "127.0.0.1:0"),
        ("GRPC__SHUTDOWN_WAIT", "0s"),
        ("ADMIN__LISTEN", "127.0.0.1:0"),
        ("DATABASE__URL", url),
        ("DATABASE__POOL_SIZE", "8"),
        ("DATABASE__ACQUIRE_TIMEOUT", "5s"),
    ];
    let variables = settings.map(|(key, value)| (format!("TEST_{key}"), value.to_owned()));
    config::parse(Sources::new("TEST_").env(variables), Config::read).expect("valid configuration")
}

/// Starts the service on a database.
pub(crate) async fn start(database: &Database) -> Running {
    let app = config(&database.url()).build().await.expect("free ports");
    let url = format!("http://{}", app.grpc_addr());
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(app.run(shutdown.clone()));
    let client = UserServiceClient::connect(url).await.expect("listening");
    Running {
        client,
        shutdown,
        task,
    }
}

impl Running {
    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        drop(self.client);
        let ended = tokio::time::timeout(LIMIT, self.task).await.expect("in time");
        ended.expect("no panic").expect("a clean end");
    }

    pub(crate) async fn create(&self, request: api::CreateUserRequest) -> Result<api::User, Status> {
        let response = self.client.clone().create_user(request).await?;
        Ok(response.into_inner().user.expect("a user"))
    }

    pub(crate) async fn update(&self, request: api::UpdateUserRequest) -> Result<api::User, Status> {
        let response = self.client.clone().update_user(request).await?;
        Ok(response.into_inner().user.expect("a user"))
    }

    pub(crate) async fn get(&self, user_id: &str) -> Result<api::User, Status> {
        let user_id = user_id.to_owned();
        let response = self
            .client
            .clone()
            .get_user(api::GetUserRequest { user_id })
            .await?;
        Ok(response.into_inner().user.expect("a user"))
    }
}

pub(crate) fn id() -> String {
    Uuid::new_v4().to_string()
}

/// A valid request of a new user.
pub(crate) fn create_request(email: &str) -> api::CreateUserRequest {
    api::CreateUserRequest {
        request_id: id(),
        email: email.into(),
        first_name: "Ann".into(),
        last_name: "Lee".into(),
    }
}

/// A valid request that changes nothing.
pub(crate) fn update_request(user: &api::User) -> api::UpdateUserRequest {
    api::UpdateUserRequest {
        request_id: id(),
        user_id: user.user_id.clone(),
        ..api::UpdateUserRequest::default()
    }
}

/// Code, reason and domain are as they should be, and nothing that was sent comes back.
#[track_caller]
pub(crate) fn check_status(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        (reason, "user.shop"),
        "{status:?}"
    );
    for personal in ["example.org", "Ann", "Lee"] {
        assert!(!format!("{status:?}").contains(personal), "{status:?}");
    }
}

/// The first column of the first row.
pub(crate) async fn count(sql: &tokio_postgres::Client, query: &str) -> i64 {
    sql.query_one(query, &[]).await.expect(query).get(0)
}

/// Asks until it is so.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let start = Instant::now();
    while !ask().await {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
