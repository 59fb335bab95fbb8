//! analytics-svc: live figures of sales, by minute, hour and day, per currency.
//!
//! Events of `events.order` and `events.payment` become differences between what orders count for ([`domain`]), which are added to the
//! windows in which the orders were placed ([`projection`], on the crate `consumer`). Queries are answered from there ([`grpc`], [`app`]),
//! watchers are served by one question for all of them ([`feed`]), and events tell of windows that have changed ([`emitter`]). Replicas
//! share the database and divide the partitions among them; any of them answers any query, also about what another one applies.

pub mod app;
pub mod config;
pub mod domain;
pub mod emitter;
pub mod feed;
pub mod grpc;
pub mod projection;
pub mod store;

mod events;
mod wire;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use consumer::Consumer;
use contracts::shop::analytics::v1::analytics_service_server::AnalyticsServiceServer;
use prometheus::{IntCounter, IntGauge};
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
use crate::emitter::Emitter;
use crate::feed::Feed;
use crate::grpc::{Analytics, DOMAIN};
use crate::projection::Projection;

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
    feed: Arc<Feed>,
    consumer: Consumer<Projection>,
    emitter: Emitter,
    grpc: GrpcServer,
    admin: AdminServer,
    readiness: Readiness,
    watching: IntGauge,
}

impl App {
    /// Makes everything and listens; reads nothing and serves nobody yet. Neither database nor Kafka need be there.
    ///
    /// # Errors
    /// When an address cannot be bound, or a part cannot be made.
    pub async fn build(config: Config) -> Result<Self, BoxError> {
        let registry = service::metrics::registry(NAME, VERSION)?;
        let watching = IntGauge::new("analytics_watching", "Streams that watch figures.")?;
        registry.register(Box::new(watching.clone()))?;
        let emitted = IntCounter::new(
            "analytics_emitted_total",
            "Events that told of the figures of a window.",
        )?;
        registry.register(Box::new(emitted.clone()))?;
        let readiness = Readiness::default();
        let feed = Arc::new(Feed::new(config.max_watching));
        let db = Db::new(&config.database, NAME)?;
        let emitter = Emitter::new(db.clone(), config.event_interval, emitted);
        let consumer =
            subscription::build(&config.projection, &config.database, NAME, Projection, &registry)?;
        let grpc = GrpcServer::bind(&config.grpc, contracts::FILE_DESCRIPTOR_SET, DOMAIN, &registry).await?;
        let admin = AdminServer::bind(config.admin.listen, registry, readiness.clone()).await?;
        Ok(Self {
            config,
            db,
            feed,
            consumer,
            emitter,
            grpc,
            admin,
            readiness,
            watching,
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

    /// Serves, projects and emits until `shutdown`, then ends within the configured drains.
    ///
    /// # Errors
    /// When a part ends that should not.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), BoxError> {
        let Self {
            config,
            db,
            feed,
            consumer,
            emitter,
            mut grpc,
            admin,
            readiness,
            watching,
        } = self;
        if let Some(file) = &config.instance.endpoints_file {
            let endpoints = [("grpc", grpc.local_addr()), ("admin", admin.local_addr())];
            service::endpoints::write(file, &endpoints).await?;
        }
        tracing::info!(grpc = %grpc.local_addr(), admin = %admin.local_addr(), "listening");
        let mut supervisor = Supervisor::new(shutdown);
        let queries = Queries::new(db.clone(), Arc::clone(&feed), supervisor.shutdown());
        let service = AnalyticsServiceServer::new(Analytics::new(queries, config.grpc.max_deadline))
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
        supervisor.spawn_background("watching gauge", count(Arc::clone(&feed), watching));
        supervisor.spawn_background("feed", feed.poll(db));
        supervisor.spawn("projection", consumer.run(supervisor.shutdown()));
        supervisor.spawn("emitter", emitter.run(supervisor.shutdown()));
        supervisor.spawn("grpc", grpc.serve(supervisor.shutdown()));
        let serving = config.grpc.shutdown_wait + config.grpc.drain;
        let projecting = subscription::longest_end(&config.projection);
        let emitting = config.database.command_timeout;
        Ok(supervisor
            .run(serving.max(projecting).max(emitting) + GRACE)
            .await?)
    }
}

/// Keeps the gauge of those who watch up to date.
async fn count(feed: Arc<Feed>, watching: IntGauge) -> Result<(), Infallible> {
    loop {
        watching.set(i64::try_from(feed.watching()).unwrap_or(i64::MAX));
        sleep(CHECK_INTERVAL).await;
    }
}

/// Works on parked events.
///
/// # Errors
/// When it cannot be done, or a record still fails.
pub async fn dlt(config: &Config, command: Dlt) -> Result<(), BoxError> {
    command
        .run(config.projection.clone(), &config.database, NAME, Projection)
        .await
}

/// Builds the figures anew beside the live ones, and swaps. What events have told stays: only what turns out otherwise is told again.
///
/// # Errors
/// When it did not come to its end.
pub async fn rebuild(config: &Config, command: Rebuild, shutdown: CancellationToken) -> Result<(), BoxError> {
    let (consumer, database) = (config.projection.clone(), &config.database);
    command
        .run(
            consumer,
            database,
            (NAME, VERSION),
            || store::MIGRATIONS,
            Projection,
            shutdown,
        )
        .await
}

/// Brings the database up to date.
///
/// # Errors
/// When it cannot be reached, or a migration fails.
pub async fn migrate(database: &Database) -> Result<(), BoxError> {
    let sources = [
        outbox::MIGRATIONS,
        consumer::MIGRATIONS,
        store::MIGRATIONS,
        store::EMISSION_MIGRATIONS,
    ];
    for name in db::migrate(database, sources).await? {
        tracing::info!(migration = name, "migrated");
    }
    Ok(())
}
