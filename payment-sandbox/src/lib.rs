//! payment-sandbox: a payment provider to develop and test against, which speaks the part of Stripe's API that this shop
//! uses and misbehaves as its cards have it.
//!
//! [`http`] → [`writer`] → [`bank`] → [`store`]. It keeps what it did in a file of its own, on disk before it answers, so that
//! `kill -9` is to it what an outage is to a real provider. It keeps no card number and no CVC.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use service::admin::{AdminServer, Readiness};
use service::shutdown::{BoxError, Supervisor, TaskError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store::{Store, StoreError};

pub use config::{Config, ENV_PREFIX};

pub mod bank;
pub mod card;
pub mod config;
pub mod error;
pub mod http;
pub mod ledger;
pub mod model;
pub mod params;
pub mod store;
pub mod writer;

/// The process's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// The process's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const FORGET_EVERY: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(2);

/// Why the process cannot start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("opening the storage file was broken off")]
    Opening(#[source] tokio::task::JoinError),
    #[error("port {0} cannot be bound")]
    Bind(SocketAddr, #[source] std::io::Error),
    #[error("the metrics cannot be registered")]
    Metrics(#[source] BoxError),
    #[error("service.endpoints_file cannot be written")]
    Endpoints(#[source] std::io::Error),
    #[error("the process has to stop")]
    Task(#[from] TaskError),
}

/// The process, listening but not serving yet.
#[derive(Debug)]
pub struct App {
    config: Config,
    store: Store,
    listener: TcpListener,
    http_addr: SocketAddr,
    admin: AdminServer,
    readiness: Readiness,
}

impl Config {
    /// Opens the storage, ends what was under way when it was closed, and binds the ports.
    ///
    /// # Errors
    /// When a port is taken or the storage cannot be used.
    pub async fn build(self) -> Result<App, AppError> {
        let path = self.path.clone();
        let store = tokio::task::spawn_blocking(move || {
            let store = Store::open(&path)?;
            store.write(bank::settle)?;
            Ok::<_, StoreError>(store)
        })
        .await
        .map_err(AppError::Opening)??;
        let registry =
            service::metrics::registry(NAME, VERSION).map_err(|error| AppError::Metrics(error.into()))?;
        let listener = TcpListener::bind(self.listen)
            .await
            .map_err(|error| AppError::Bind(self.listen, error))?;
        let http_addr = listener
            .local_addr()
            .map_err(|error| AppError::Bind(self.listen, error))?;
        let readiness = Readiness::default();
        let admin = AdminServer::bind(self.admin.listen, registry, readiness.clone())
            .await
            .map_err(|error| AppError::Bind(self.admin.listen, error))?;
        Ok(App {
            config: self,
            store,
            listener,
            http_addr,
            admin,
            readiness,
        })
    }
}

impl App {
    /// Serves until `shutdown`, then ends: what is slow is ended at once, and what hangs is cut.
    ///
    /// # Errors
    /// When a task ended that should not have.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AppError> {
        let Self {
            config,
            store,
            listener,
            http_addr,
            admin,
            readiness,
        } = self;
        let (desk, queue) = writer::queue();
        let at_work = TaskTracker::new();
        let mut tasks = Supervisor::new(shutdown.clone());
        let forgetting = forget(desk.clone(), config.keep_keys, shutdown.clone());
        let api = http::Api {
            secret_key: config.secret_key,
            store: store.clone(),
            desk,
            slow: config.slow,
            hang: config.hang,
            shutdown: shutdown.clone(),
            at_work: at_work.clone(),
            keys: std::sync::Mutex::default(),
        };
        let router = http::router(Arc::new(api));
        if let Some(file) = &config.instance.endpoints_file {
            let endpoints = [("http", http_addr), ("admin", admin.local_addr())];
            service::endpoints::write(file, &endpoints)
                .await
                .map_err(AppError::Endpoints)?;
        }
        tracing::info!(http.address = %http_addr, admin.address = %admin.local_addr(), "serving");
        readiness.check("storage").set(Ok(()));

        tasks.spawn_background("admin", admin.serve());
        tasks.spawn("answer cleaner", forgetting);
        // The writer ends when all that could hand something in has ended.
        tasks.spawn("writer", async move {
            let run = tokio::task::spawn_blocking(move || writer::run(&store, queue));
            run.await.map_err(BoxError::from)?.map_err(BoxError::from)
        });
        let stopping = shutdown.clone();
        tasks.spawn("http", async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(stopping.cancelled_owned())
                .await
        });
        tasks.spawn("requests at work", async move {
            shutdown.cancelled().await;
            at_work.close();
            at_work.wait().await;
            Ok::<_, Infallible>(())
        });
        Ok(tasks.run(config.drain + GRACE).await?)
    }
}

/// Forgets old answers, little by little.
async fn forget(desk: writer::Desk, age: Duration, shutdown: CancellationToken) -> Result<(), Infallible> {
    // A desk that is closed means that the writer has ended, which says itself why.
    while desk.forget(age).await.is_ok() {
        if tokio::time::timeout(FORGET_EVERY, shutdown.cancelled())
            .await
            .is_ok()
        {
            return Ok(());
        }
    }
    drop(desk);
    shutdown.cancelled().await;
    Ok(())
}
