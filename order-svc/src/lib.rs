//! order-svc: commands on orders, reads of one order from its source, and what stock, payments and the clock do to orders.
//!
//! `main` → [`grpc`] → [`app`] → [`store`] → [`domain`]. A command runs in one transaction that claims its request id,
//! locks and changes the order's row, stores the response, and appends the events to history and outbox. [`news`] brings in
//! what inventory-svc and payment-svc tell, and [`expiry`] what time tells.
//!
//! Commands need PostgreSQL alone: the process starts, serves and is SERVING to gRPC's health checks whatever Kafka does. `/readyz`,
//! for people and alerts, also says when events of other services cannot be applied.

use std::net::SocketAddr;
use std::time::Duration;

use consumer::Consumer;
use contracts::shop::order::v1::order_service_server::OrderServiceServer;
use service::admin::{AdminServer, Readiness};
use service::command::Commands;
use service::db::{Db, SetupError};
use service::grpc::{GrpcError, GrpcServer};
use service::requests;
use service::shutdown::{BoxError, Supervisor, TaskError};
use subscription::Dlt;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;

use app::Orders;
pub use config::{Config, ENV_PREFIX};
use news::News;

pub mod app;
pub mod codec;
pub mod config;
pub mod domain;
pub mod expiry;
pub mod grpc;
pub mod news;
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
    #[error("events of other services cannot be read")]
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
    orders: Orders,
    consumer: Consumer<News>,
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
        let orders = Orders::new(db.clone(), commands.clone(), self.pay_within);
        let consumer = subscription::build(&self.news, &self.database, NAME, News, &registry)
            .map_err(AppError::Consumer)?;
        let service = OrderServiceServer::new(grpc::OrderGrpc::new(orders.clone(), self.grpc.max_deadline))
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
            orders,
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
            orders,
            consumer,
            readiness,
            grpc,
            admin,
        } = self;
        let serving = config.grpc.shutdown_wait + config.grpc.drain;
        let grace = serving.max(subscription::longest_end(&config.news)) + Duration::from_secs(5);
        let command_timeout = config.database.command_timeout;

        let mut tasks = Supervisor::new(shutdown.clone());
        tasks.spawn("grpc", grpc.serve(shutdown.clone()));
        let status = consumer.status();
        tasks.spawn("news", consumer.run(shutdown));
        tasks.spawn_background("news watch", subscription::watch(status, readiness.check("news")));
        // What it has begun is a command, which is waited for below.
        tasks.spawn_background("expiry", expiry::run(orders, config.expiry_interval));
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

/// Works on parked events of other services.
///
/// # Errors
/// When it cannot be done, or a record still fails.
pub async fn dlt(config: &Config, command: Dlt) -> Result<(), BoxError> {
    command
        .run(config.news.clone(), &config.database, NAME, News)
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
