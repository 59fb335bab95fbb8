//! notification-svc: mails to users about their orders.
//!
//! [`events`] writes what `events.order`, `events.payment` and `events.user` tell: the address book, whose orders are, and which mails are
//! to be sent. [`sender`] sends them, and records each as sent together with its event. [`letter`] has their words, [`smtp`] the mail
//! server, [`mails`] what operators can do, [`store`] the tables, [`domain`] what follows from what.
//!
//! A mail is sent once, as far as that can be known: "sending" is committed before a byte of it leaves, "sent" after the mail server has
//! taken it, and what died between the two is unknown, listed, and never sent again by itself.
//!
//! Addresses and names are in this database and in the mails, and nowhere else. There are no calls: gRPC serves health checks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use consumer::Consumer;
use service::admin::{AdminServer, Readiness};
use service::db::{Db, SetupError};
use service::grpc::{GrpcError, GrpcServer};
use service::shutdown::{BoxError, Supervisor, TaskError};
use service::status::Domain;
use subscription::Dlt;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub use config::{Config, ENV_PREFIX};
use events::Events;
use metrics::Metrics;
use sender::Sender;

pub mod codec;
pub mod config;
pub mod domain;
pub mod events;
pub mod failpoints;
pub mod letter;
pub mod mails;
pub mod metrics;
pub mod sender;
pub mod smtp;
pub mod store;
pub mod verify;

/// The process's name.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// The process's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Whose reasons errors give.
const DOMAIN: Domain = Domain("notification.shop");
const PING_EVERY: Duration = Duration::from_secs(1);
/// What writing an outcome may take, besides sending.
const WRITE: Duration = Duration::from_secs(10);

/// Why the process cannot start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("the database cannot be used")]
    Database(#[from] SetupError),
    #[error("gRPC cannot be served")]
    Grpc(#[from] GrpcError),
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    #[error("the consumer cannot be made")]
    Consumer(#[source] BoxError),
    #[error("the mail server cannot be used")]
    Smtp(#[from] smtp::SetupError),
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
    consumer: Consumer<Events>,
    sender: Sender,
    metrics: Metrics,
    readiness: Readiness,
    grpc: GrpcServer,
    admin: AdminServer,
}

impl Config {
    /// Binds the ports and makes the pools; connects to nothing yet.
    ///
    /// # Errors
    /// When a port is taken or the configuration cannot be used.
    pub async fn build(self) -> Result<App, AppError> {
        let db = Db::new(&self.database, NAME)?;
        let registry = service::metrics::registry(NAME, VERSION)?;
        db.register_metrics(&registry)?;
        let metrics = Metrics::new(&registry)?;
        let readiness = Readiness::default();
        let wake = Arc::new(Notify::new());
        let events = Events::new(Arc::clone(&wake));
        let consumer = subscription::build(&self.consumer, &self.database, NAME, events, &registry)
            .map_err(AppError::Consumer)?;
        let sender = Sender::new(
            db.clone(),
            smtp::Server::new(self.smtp.clone())?,
            self.mails.clone(),
            self.instance.name.clone(),
            wake,
            metrics.clone(),
            readiness.check("mail server"),
        );
        let grpc = GrpcServer::bind(&self.grpc, contracts::FILE_DESCRIPTOR_SET, DOMAIN, &registry).await?;
        let listen = self.admin.listen;
        let admin = AdminServer::bind(listen, registry, readiness.clone())
            .await
            .map_err(|error| AppError::Admin(listen, error))?;
        Ok(App {
            config: self,
            db,
            consumer,
            sender,
            metrics,
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

    /// Works until `shutdown`, then ends what is under way.
    ///
    /// # Errors
    /// When a task ended that should not have.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AppError> {
        let (grpc_addr, admin_addr) = (self.grpc_addr(), self.admin_addr());
        let Self {
            config,
            db,
            consumer,
            sender,
            metrics,
            readiness,
            grpc,
            admin,
        } = self;
        let grace = [
            config.grpc.shutdown_wait + config.grpc.drain,
            subscription::longest_end(&config.consumer),
            // It may be connecting, which it does not begin again.
            config.smtp.timeout.max(config.mails.drain) + WRITE,
        ]
        .into_iter()
        .fold(Duration::ZERO, Duration::max);

        let mut tasks = Supervisor::new(shutdown.clone());
        tasks.spawn("grpc", grpc.serve(shutdown.clone()));
        let status = consumer.status();
        tasks.spawn("consumer", consumer.run(shutdown.clone()));
        tasks.spawn("sender", sender.run(shutdown));
        tasks.spawn_background(
            "consumer watch",
            subscription::watch(status, readiness.check("consumer")),
        );
        tasks.spawn_background("admin", admin.serve());
        tasks.spawn_background(
            "database watch",
            db.clone().watch(readiness.check("database"), PING_EVERY),
        );
        tasks.spawn_background("lease watch", metrics.watch(db, config.mails.poll));
        if let Some(file) = &config.instance.endpoints_file {
            let endpoints = [("grpc", grpc_addr), ("admin", admin_addr)];
            service::endpoints::write(file, &endpoints)
                .await
                .map_err(AppError::Endpoints)?;
        }
        tracing::info!(grpc.address = %grpc_addr, admin.address = %admin_addr, "serving");
        Ok(tasks.run(grace + Duration::from_secs(5)).await?)
    }
}

/// Works on parked events.
///
/// # Errors
/// When it cannot be done, or a record still fails.
pub async fn dlt(config: &Config, command: Dlt) -> Result<(), BoxError> {
    // Senders look for themselves.
    let events = Events::new(Arc::new(Notify::new()));
    command
        .run(config.consumer.clone(), &config.database, NAME, events)
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
        consumer::MIGRATIONS,
        store::MIGRATIONS,
    ];
    service::db::migrate(config, sources).await
}
