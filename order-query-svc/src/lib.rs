//! order-query-svc: the read model of orders.
//!
//! Events of `events.order`, `events.payment`, `events.inventory` and `events.notification` are applied to the tables `order_views`,
//! `order_payments` and `order_journey` ([`projection`], on the crate `consumer`), and queries are answered from them ([`grpc`], [`app`]). Replicas share the database and divide the partitions among them; any of them answers any
//! query, also one that waits for what another replica applies ([`waits`]).

pub mod app;
pub mod config;
pub mod domain;
pub mod grpc;
pub mod projection;
pub mod store;
pub mod waits;

mod events;
mod page;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use consumer::{Consumer, Parking};
use contracts::shop::orderquery::v1::order_query_service_server::OrderQueryServiceServer;
use prometheus::IntGauge;
use service::admin::{AdminServer, Readiness};
use service::config::Database;
use service::db::{self, Db};
use service::grpc::GrpcServer;
use service::shutdown::{BoxError, Supervisor};
use subscription::{Dlt, Rebuild};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::app::Queries;
use crate::config::Config;
use crate::grpc::{DOMAIN, OrderQueries};
use crate::projection::Projection;
use crate::waits::Waits;

/// The name of this process.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// Its version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How often readiness is looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// For what comes after the drains.
const GRACE: Duration = Duration::from_secs(2);

/// The process, listening and about to serve.
pub struct App {
    config: Config,
    db: Db,
    waits: Arc<Waits>,
    consumer: Consumer<Projection>,
    grpc: GrpcServer,
    admin: AdminServer,
    readiness: Readiness,
    waiting: IntGauge,
}

impl App {
    /// Makes everything and listens; reads nothing and serves nobody yet. Neither database nor Kafka need be there.
    ///
    /// # Errors
    /// When an address cannot be bound, or a part cannot be made.
    pub async fn build(config: Config) -> Result<Self, BoxError> {
        let registry = service::metrics::registry(NAME, VERSION)?;
        let waiting = IntGauge::new(
            "order_query_waiting",
            "Calls and streams that wait for an order to change.",
        )?;
        registry.register(Box::new(waiting.clone()))?;
        let readiness = Readiness::default();
        let waits = Arc::new(Waits::new(config.max_waiting));
        let db = Db::new(&config.database, NAME)?;
        let consumer = subscription::build(
            &config.projection,
            &config.database,
            NAME,
            Projection::new(Arc::clone(&waits)),
            &registry,
        )?;
        let grpc = GrpcServer::bind(&config.grpc, contracts::FILE_DESCRIPTOR_SET, DOMAIN, &registry).await?;
        let admin = AdminServer::bind(config.admin.listen, registry, readiness.clone()).await?;
        Ok(Self {
            config,
            db,
            waits,
            consumer,
            grpc,
            admin,
            readiness,
            waiting,
        })
    }

    /// Where gRPC is served.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc.local_addr()
    }

    /// Where metrics and probes are served.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// Serves and projects until `shutdown`, then ends within the configured drains.
    ///
    /// # Errors
    /// When a part ends that should not.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), BoxError> {
        let Self {
            config,
            db,
            waits,
            consumer,
            mut grpc,
            admin,
            readiness,
            waiting,
        } = self;
        if let Some(file) = &config.instance.endpoints_file {
            let endpoints = [("grpc", grpc.local_addr()), ("admin", admin.local_addr())];
            service::endpoints::write(file, &endpoints).await?;
        }
        tracing::info!(grpc = %grpc.local_addr(), admin = %admin.local_addr(), "listening");
        let mut supervisor = Supervisor::new(shutdown);
        let parking = Parking::of(&config.projection);
        let queries = Queries::new(
            db.clone(),
            parking.clone(),
            Arc::clone(&waits),
            supervisor.shutdown(),
        );
        let service = OrderQueryServiceServer::new(OrderQueries::new(queries, config.grpc.max_deadline))
            .max_decoding_message_size(config.grpc.max_request_bytes)
            .max_encoding_message_size(config.grpc.max_response_bytes);
        grpc.add_service(service).await;

        supervisor.spawn_background("admin", admin.serve());
        supervisor.spawn_background(
            "database check",
            db.clone().watch(readiness.check("database"), CHECK_INTERVAL),
        );
        let status = consumer.status();
        supervisor.spawn_background(
            "projection check",
            subscription::watch(status, readiness.check("projection")),
        );
        supervisor.spawn_background("waiting gauge", count(Arc::clone(&waits), waiting));
        supervisor.spawn_background("waits", waits.poll(db, parking));
        supervisor.spawn("projection", consumer.run(supervisor.shutdown()));
        supervisor.spawn("grpc", grpc.serve(supervisor.shutdown()));
        let serving = config.grpc.shutdown_wait + config.grpc.drain;
        let projecting = subscription::longest_end(&config.projection);
        Ok(supervisor.run(serving.max(projecting) + GRACE).await?)
    }
}

/// Keeps the gauge of those who wait up to date.
async fn count(waits: Arc<Waits>, waiting: IntGauge) -> Result<(), Infallible> {
    loop {
        waiting.set(i64::try_from(waits.len()).unwrap_or(i64::MAX));
        sleep(CHECK_INTERVAL).await;
    }
}

/// Works on parked events.
///
/// # Errors
/// When it cannot be done, or a record still fails.
pub async fn dlt(config: &Config, command: Dlt) -> Result<(), BoxError> {
    // Nobody waits in this process; those who do in others ask the database.
    let projection = Projection::new(Arc::new(Waits::new(1)));
    command
        .run(config.projection.clone(), &config.database, NAME, projection)
        .await
}

/// Builds the views anew beside the live ones, and swaps.
///
/// # Errors
/// When it did not come to its end.
pub async fn rebuild(config: &Config, command: Rebuild, shutdown: CancellationToken) -> Result<(), BoxError> {
    let projection = Projection::new(Arc::new(Waits::new(1)));
    let (consumer, database) = (config.projection.clone(), &config.database);
    command
        .run(
            consumer,
            database,
            (NAME, VERSION),
            || store::MIGRATIONS,
            projection,
            shutdown,
        )
        .await
}

/// Brings the database up to date.
///
/// # Errors
/// When it cannot be reached, or a migration fails.
pub async fn migrate(database: &Database) -> Result<(), BoxError> {
    for name in db::migrate(database, [consumer::MIGRATIONS, store::MIGRATIONS]).await? {
        tracing::info!(migration = name, "migrated");
    }
    Ok(())
}
