//! Publishes the rows of outbox tables in PostgreSQL to Kafka: in order per entity, losing nothing.
//!
//! `protocol` holds the rules as pure state; `source` speaks with PostgreSQL, `publisher` with Kafka; `relay` stands by and
//! starts again, and `term` drives the three while it leads. [`App`] runs any number of outboxes in one process, and
//! [`commands`] are what people ask beside it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use service::admin::{AdminServer, Readiness};
use service::shutdown::{BoxError, Supervisor};
use service::{endpoints, telemetry};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub mod commands;
pub mod config;
pub mod failpoints;
pub mod protocol;
pub mod schema;
pub mod topics;

mod admin;
mod context;
mod database;
mod figures;
mod inspect;
mod leadership;
mod metrics;
mod publisher;
mod record;
mod relay;
mod row;
mod source;
mod sql;
mod status;
mod term;
mod time;

pub use config::Config;

use config::Outbox;
use context::Context;
use leadership::Leadership;
use metrics::Metrics;
use relay::Stopped;
use status::Status;

/// How often `/readyz` is brought up to date.
const READINESS_INTERVAL: Duration = Duration::from_millis(250);
/// How long outboxes may take to drain and to give their leases up.
const GRACE: Duration = Duration::from_secs(15);

/// Why the relay could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the admin port cannot be bound")]
    Admin(#[source] std::io::Error),
    #[error("metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    #[error("endpoints_file cannot be written")]
    Endpoints(#[source] std::io::Error),
}

/// A relay that listens but does not relay yet.
pub struct App {
    outboxes: Vec<Context>,
    admin: AdminServer,
    readiness: Readiness,
}

impl Config {
    /// Binds the admin port and prepares every outbox.
    ///
    /// # Errors
    /// When the port is taken or the endpoints file cannot be written.
    pub async fn build(self) -> Result<App, StartError> {
        let registry = service::metrics::registry("outbox-relay", env!("CARGO_PKG_VERSION"))?;
        let metrics = Metrics::register(&registry)?;
        let readiness = Readiness::default();
        let leadership = Leadership::default();
        let outboxes: Vec<Context> = self
            .outboxes
            .iter()
            .map(|(name, outbox)| self.context(name, outbox, &metrics, &leadership))
            .collect();
        let shown = outboxes.iter().map(|outbox| admin::ShownOutbox {
            name: outbox.name.clone(),
            config: outbox.config.clone(),
            status: outbox.status.clone(),
        });
        let shown = admin::Shown(Arc::new(shown.collect()), self.instance.name.as_str().into());
        let admin = AdminServer::bind(self.admin.listen, registry, readiness.clone())
            .await
            .map_err(StartError::Admin)?
            .merge(admin::router(shown));
        if let Some(file) = &self.instance.endpoints_file {
            endpoints::write(file, &[("admin", admin.local_addr())])
                .await
                .map_err(StartError::Endpoints)?;
        }
        Ok(App {
            outboxes,
            admin,
            readiness,
        })
    }

    fn rendering(&self, name: &str, outbox: &Outbox) -> record::Rendering {
        record::Rendering {
            layout: outbox.layout.clone(),
            topic: outbox.topic.clone(),
            source: format!("/{name}"),
        }
    }

    fn context(&self, name: &str, outbox: &Outbox, metrics: &Metrics, leadership: &Leadership) -> Context {
        Context {
            metrics: metrics.of(name),
            status: Status::default(),
            owner: self.instance.name.clone(),
            producer: self.producer(),
            traced: self.telemetry.otlp_endpoint.is_some(),
            rendering: self.rendering(name, outbox),
            name: name.to_owned(),
            config: outbox.clone(),
            max_record_bytes: self.max_record_bytes(),
            leadership: leadership.clone(),
        }
    }
}

impl App {
    /// Where `/metrics`, `/livez` and `/readyz` are served.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// Relays until `shutdown`, then drains and gives the leases up.
    ///
    /// # Errors
    /// When every outbox has stopped for good, or something broke that should not.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), service::shutdown::TaskError> {
        let mut supervisor = Supervisor::new(shutdown);
        supervisor.spawn_background("admin", self.admin.serve());
        let check = self.readiness.check("outboxes");
        let watched: Vec<(String, Status)> = self
            .outboxes
            .iter()
            .map(|outbox| (outbox.name.clone(), outbox.status.clone()))
            .collect();
        supervisor.spawn_background::<BoxError>("readiness", async move {
            loop {
                check.set(all_ready(&watched));
                tokio::time::sleep(READINESS_INTERVAL).await;
            }
        });
        supervisor.spawn("outboxes", relay_all(self.outboxes, supervisor.shutdown()));
        supervisor.run(GRACE).await
    }
}

fn all_ready(outboxes: &[(String, Status)]) -> Result<(), String> {
    let problems: Vec<String> = outboxes
        .iter()
        .filter_map(|(name, status)| status.ready().err().map(|problem| format!("{name}: {problem}")))
        .collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.join("; "))
    }
}

/// Runs the outboxes side by side. One that stops leaves the others alone; when the last one has, so does the process.
async fn relay_all(outboxes: Vec<Context>, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut running = JoinSet::new();
    for outbox in outboxes {
        running.spawn(relay::run(outbox, shutdown.clone()));
    }
    let mut stopped: Option<Stopped> = None;
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = %telemetry::chain(&error), "outbox ended");
                stopped = Some(error);
            }
            Err(panic) => return Err(panic.into()),
        }
    }
    match stopped {
        Some(stopped) if !shutdown.is_cancelled() => Err(stopped.into()),
        _ => Ok(()),
    }
}
