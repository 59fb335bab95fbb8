//! inventory-svc: how many pieces there are of each product, and which of them are held for which order.
//!
//! `main` → [`grpc`] → [`app`] → [`store`] → [`domain`]. [`orders`] brings in what happens to orders, a batch at a time: all lines of an
//! order are held or none, in the order of the batch, and each product's stock changes once per batch, so that a product which everybody
//! wants is no slower than many.
//!
//! It has no timer: what is held for an order is let go when the order is cancelled, and order-svc alone decides when.

use std::net::SocketAddr;
use std::time::Duration;

use consumer::Consumer;
use contracts::shop::inventory::v1::inventory_service_server::InventoryServiceServer;
use service::admin::{AdminServer, Readiness};
use service::command::Commands;
use service::db::{Db, SetupError};
use service::grpc::{GrpcError, GrpcServer};
use service::requests;
use service::shutdown::{BoxError, Supervisor, TaskError};
use subscription::Dlt;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;

use app::Inventory;
pub use config::{Config, ENV_PREFIX};
use orders::Orders;

pub mod app;
pub mod codec;
pub mod config;
pub mod domain;
pub mod grpc;
pub mod orders;
pub mod store;
pub mod verify;

/// The process's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// The process's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const PING_EVERY: Duration = Duration::from_secs(1);
const CLEAN_EVERY: Duration = Duration::from_secs(60);

/// Why the process cannot start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("the database cannot be used")]
    Database(#[from] SetupError),
    #[error("gRPC cannot be served")]
    Grpc(#[from] GrpcError),
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    #[error("the consumer of orders cannot be made")]
    Consumer(#[source] BoxError),
    #[error("the admin port {0} cannot be bound")]
    Admin(SocketAddr, #[source] std::io::Error),
    #[error("service.endpoints_file cannot be written")]
    Endpoints(#[source] std::io::Error),
    #[error("the process has to stop")]
    Task(#[from] TaskError),
}

/// The process, listening but not serving yet.
pub struct App {
    config: Config,
    db: Db,
    commands: Commands,
    consumer: Consumer<Orders>,
    readiness: Readiness,
    grpc: GrpcServer,
    admin: AdminServer,
}

impl Config {
    /// Binds the ports and makes the pool; connects to nothing yet.
    ///
    /// # Errors
    /// When a port is taken or the configuration cannot be used.
    pub async fn build(self) -> Result<App, AppError> {
        let db = Db::new(&self.database, NAME)?;
        let commands = Commands::new();
        let registry = service::metrics::registry(NAME, VERSION)?;
        db.register_metrics(&registry)?;
        let readiness = Readiness::default();
        let inventory = Inventory::new(db.clone(), commands.clone());
        let consumer = subscription::build(&self.orders, &self.database, NAME, Orders, &registry)
            .map_err(AppError::Consumer)?;
        let service =
            InventoryServiceServer::new(grpc::InventoryGrpc::new(inventory, self.grpc.max_deadline))
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(self.grpc.max_request_bytes)
                .max_encoding_message_size(self.grpc.max_response_bytes);
        let mut grpc = GrpcServer::bind(
            &self.grpc,
            contracts::FILE_DESCRIPTOR_SET,
            grpc::DOMAIN,
            &registry,
        )
        .await?;
        grpc.add_service(service).await;
        let listen = self.admin.listen;
        let admin = AdminServer::bind(listen, registry, readiness.clone())
            .await
            .map_err(|error| AppError::Admin(listen, error))?;
        Ok(App {
            config: self,
            db,
            commands,
            consumer,
            readiness,
            grpc,
            admin,
        })
    }
}

impl App {
    /// Where gRPC is served.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc.local_addr()
    }

    /// Where metrics and probes are served.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// Serves until `shutdown`, then drains: calls in progress end, and commands that outlived their call are waited for.
    ///
    /// # Errors
    /// When a task ended that should not have.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AppError> {
        let (grpc_addr, admin_addr) = (self.grpc_addr(), self.admin_addr());
        let Self {
            config,
            db,
            commands,
            consumer,
            readiness,
            grpc,
            admin,
        } = self;
        let serving = config.grpc.shutdown_wait + config.grpc.drain;
        let grace = serving.max(subscription::longest_end(&config.orders)) + Duration::from_secs(5);
        let command_timeout = config.database.command_timeout;

        let mut tasks = Supervisor::new(shutdown.clone());
        tasks.spawn("grpc", grpc.serve(shutdown.clone()));
        let status = consumer.status();
        tasks.spawn("orders", consumer.run(shutdown));
        tasks.spawn_background(
            "orders watch",
            subscription::watch(status, readiness.check("orders")),
        );
        tasks.spawn_background("admin", admin.serve());
        tasks.spawn_background(
            "database watch",
            db.clone().watch(readiness.check("database"), PING_EVERY),
        );
        tasks.spawn_background(
            "request cleaner",
            requests::clean(db, config.keep_requests, CLEAN_EVERY),
        );
        if let Some(file) = &config.instance.endpoints_file {
            let endpoints = [("grpc", grpc_addr), ("admin", admin_addr)];
            service::endpoints::write(file, &endpoints)
                .await
                .map_err(AppError::Endpoints)?;
        }
        tracing::info!(grpc.address = %grpc_addr, admin.address = %admin_addr, "serving");
        let ended = tasks.run(grace).await;
        if tokio::time::timeout(command_timeout, commands.finish())
            .await
            .is_err()
        {
            tracing::warn!("commands were still running at the end");
        }
        Ok(ended?)
    }
}

/// Works on parked events of orders.
///
/// # Errors
/// When it cannot be done, or a record still fails.
pub async fn dlt(config: &Config, command: Dlt) -> Result<(), BoxError> {
    command
        .run(config.orders.clone(), &config.database, NAME, Orders)
        .await
}

/// Brings the database up to date; returns the names of the migrations that were run.
///
/// # Errors
/// When the database cannot be reached or a migration fails.
pub async fn migrate(config: &service::config::Database) -> Result<Vec<String>, BoxError> {
    let sources = [
        outbox::MIGRATIONS,
        event_store::MIGRATIONS,
        requests::MIGRATIONS,
        consumer::MIGRATIONS,
        store::MIGRATIONS,
    ];
    service::db::migrate(config, sources).await
}
