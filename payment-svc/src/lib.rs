//! payment-svc: takes the money for orders, once, and gives it back.
//!
//! `main` → [`grpc`] → [`app`] → [`store`] → [`domain`]. What is to be done is stored before the provider is asked for anything;
//! [`attempt`] does it step by step, called by the command itself and, for whatever was left, by [`settler`]. [`orders`] learns
//! from `events.order` which orders there are and what became of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use contracts::shop::payment::v1::payment_service_server::PaymentServiceServer;
use service::admin::{AdminServer, Readiness};
use service::command::Commands;
use service::db::{Db, SetupError};
use service::grpc::{GrpcError, GrpcServer};
use service::requests;
use service::shutdown::{BoxError, Supervisor, TaskError};
use subscription::Dlt;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;

use crate::attempt::{Access, Driver, Pace};
use crate::facts::Facts;
use crate::orders::Orders;
use crate::provider::Provider;
use crate::settler::{Gauges, Settler};
use crate::waits::Waits;

pub use config::{Config, ENV_PREFIX};

pub mod app;
pub mod attempt;
pub mod codec;
pub mod config;
pub mod domain;
pub mod facts;
pub mod failpoints;
pub mod grpc;
pub mod orders;
pub mod provider;
pub mod reconcile;
pub mod settler;
pub mod store;
pub mod verify;
pub mod waits;

/// The process's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// The process's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const PING_EVERY: Duration = Duration::from_secs(1);
const CLEAN_EVERY: Duration = Duration::from_secs(60);
/// For what comes after the drains.
const GRACE: Duration = Duration::from_secs(5);

/// Why the process cannot start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("the database cannot be used")]
    Database(#[from] SetupError),
    #[error("gRPC cannot be served")]
    Grpc(#[from] GrpcError),
    #[error("the payment provider cannot be used")]
    Provider(#[from] provider::SetupError),
    #[error("events of orders cannot be read")]
    Consumer(#[source] BoxError),
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
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
    stop_commands: CancellationToken,
    consumer: consumer::Consumer<Orders>,
    settler: Settler,
    gauges: Gauges,
    access: Access,
    provider: Provider,
    readiness: Readiness,
    grpc: GrpcServer,
    admin: AdminServer,
}

impl Config {
    /// Binds the ports and makes the pools; connects to nothing yet. Neither database, Kafka nor provider need be there.
    ///
    /// # Errors
    /// When a port is taken or the configuration cannot be used.
    pub async fn build(self) -> Result<App, AppError> {
        let registry = service::metrics::registry(NAME, VERSION)?;
        let db = Db::new(&self.database, NAME)?;
        db.register_metrics(&registry)?;
        let readiness = Readiness::default();
        let commands = Commands::new();
        let stop_commands = CancellationToken::new();
        let waits = Arc::new(Waits::new(self.payments.max_waiting));
        let wake = Arc::new(Notify::new());
        let facts = Facts::new(&registry, Arc::clone(&waits))?;
        let provider = Provider::new(&self.provider, &registry)?;
        let access = Access::new(readiness.check("provider"));
        let pace = Pace {
            lease: self.payments.lease,
            retry: self.payments.retry,
        };
        let driver = Driver::new(db.clone(), provider.clone(), access.clone(), facts.clone(), pace);
        let settler = Settler::new(
            db.clone(),
            driver.clone(),
            Arc::clone(&wake),
            self.payments.settle_concurrency,
            self.payments.settle_every,
        );
        let gauges = Gauges::new(&registry)?;
        let orders = Orders::new(self.payments.charge_at, facts.clone(), Arc::clone(&waits), wake);
        let consumer = subscription::build(&self.consumer, &self.database, NAME, orders, &registry)
            .map_err(AppError::Consumer)?;
        let payments = app::Payments {
            db: db.clone(),
            commands: commands.clone(),
            provider: provider.clone(),
            access: access.clone(),
            driver,
            // As many as there may be calls: what clients have given up on goes on, and counts.
            drives: Arc::new(Semaphore::new(self.grpc.max_concurrent_calls)),
            facts,
            waits,
            stop: stop_commands.clone(),
        };
        let service = PaymentServiceServer::new(grpc::PaymentGrpc::new(payments, self.grpc.max_deadline))
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
            stop_commands,
            consumer,
            settler,
            gauges,
            access,
            provider,
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

    /// Serves, reads and settles until `shutdown`, then drains: calls in progress end, and payments are left where their next
    /// step is stored.
    ///
    /// # Errors
    /// When a task ended that should not have.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AppError> {
        let (grpc_addr, admin_addr) = (self.grpc_addr(), self.admin_addr());
        let Self {
            config,
            db,
            commands,
            stop_commands,
            consumer,
            settler,
            gauges,
            access,
            provider,
            readiness,
            grpc,
            admin,
        } = self;
        // One step is a call and a transaction on either side of it.
        let step = config.provider.timeout + 2 * config.database.command_timeout;
        let serving = config.grpc.shutdown_wait + config.grpc.drain;
        let reading = subscription::longest_end(&config.consumer);

        let mut tasks = Supervisor::new(shutdown.clone());
        tasks.spawn("grpc", grpc.serve(shutdown.clone()));
        let status = consumer.status();
        tasks.spawn("orders", consumer.run(shutdown.clone()));
        tasks.spawn("settler", settler.run(shutdown));
        tasks.spawn_background("admin", admin.serve());
        tasks.spawn_background("gauges", gauges.watch(db.clone()));
        tasks.spawn_background("provider watch", access.watch(provider));
        tasks.spawn_background(
            "orders watch",
            subscription::watch(status, readiness.check("orders")),
        );
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
        let ended = tasks.run(serving.max(reading).max(step) + GRACE).await;
        stop_commands.cancel();
        if tokio::time::timeout(step, commands.finish()).await.is_err() {
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
    // Nobody waits in this process, and the settlers of others look by themselves.
    let waits = Arc::new(Waits::new(1));
    let facts = Facts::new(&prometheus::Registry::new(), Arc::clone(&waits))?;
    let orders = Orders::new(config.payments.charge_at, facts, waits, Arc::default());
    command
        .run(config.consumer.clone(), &config.database, NAME, orders)
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
