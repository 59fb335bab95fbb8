//! user-svc: users over gRPC, one address each.
//!
//! `main` → [`grpc`] → [`app`] → [`store`] → [`domain`]. A command runs in one transaction that claims its request id,
//! locks and changes the user's row, stores the response, and appends the events to history and outbox. It needs PostgreSQL alone.
//!
//! Addresses and names are in the database and in the events, and nowhere else: the types that hold them do not show them.

use std::net::SocketAddr;
use std::time::Duration;

use contracts::shop::user::v1::user_service_server::UserServiceServer;
use service::admin::{AdminServer, Readiness};
use service::command::Commands;
use service::db::{Db, SetupError};
use service::grpc::{GrpcError, GrpcServer};
use service::requests;
use service::shutdown::{BoxError, Supervisor, TaskError};
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;

use app::Users;
pub use config::{Config, ENV_PREFIX};

pub mod app;
pub mod codec;
pub mod config;
pub mod domain;
pub mod grpc;
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
        let users = Users::new(db.clone(), commands.clone());
        let service = UserServiceServer::new(grpc::UserGrpc::new(users, self.grpc.max_deadline))
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
            readiness,
            grpc,
            admin,
        } = self;
        let grace = config.grpc.shutdown_wait + config.grpc.drain + Duration::from_secs(5);
        let command_timeout = config.database.command_timeout;

        let mut tasks = Supervisor::new(shutdown.clone());
        tasks.spawn("grpc", grpc.serve(shutdown));
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

/// Brings the database up to date; returns the names of the migrations that were run.
///
/// # Errors
/// When the database cannot be reached or a migration fails.
pub async fn migrate(config: &service::config::Database) -> Result<Vec<String>, BoxError> {
    let sources = [
        outbox::MIGRATIONS,
        event_store::MIGRATIONS,
        requests::MIGRATIONS,
        store::MIGRATIONS,
    ];
    service::db::migrate(config, sources).await
}
