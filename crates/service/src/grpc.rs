//! The gRPC server: limits, health, reflection, deadlines, metrics and traces around the services of a process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::Service;

use crate::config::Grpc;
use crate::status::Domain;

mod calls;
mod incoming;

use calls::{CallLayer, Calls};
use incoming::Listener;

/// Largest header list of a request, in bytes.
const MAX_HEADER_LIST: u32 = 16 << 10;
/// Streams of one connection at once; tonic would unset hyper's own limit.
const MAX_STREAMS: u32 = 100;
/// How long calls may go on once their connection has become too old.
const AGE_GRACE: Duration = Duration::from_secs(60);

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    #[error("cannot listen on {address}")]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("the descriptors of the services are not usable")]
    Descriptors(#[from] tonic_reflection::server::Error),
    #[error("the metrics of calls cannot be registered")]
    Metrics(#[from] prometheus::Error),
    #[error("the gRPC server failed")]
    Serve(#[from] tonic::transport::Error),
}

/// The server of a process, listening but not serving yet.
pub struct GrpcServer {
    config: Grpc,
    listener: Listener,
    address: SocketAddr,
    routes: RoutesBuilder,
    names: Vec<&'static str>,
    health: HealthReporter,
    domain: Domain,
    registry: Registry,
}

impl std::fmt::Debug for GrpcServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrpcServer")
            .field("address", &self.address)
            .field("services", &self.names)
            .finish()
    }
}

impl GrpcServer {
    /// Listens; port 0 takes a free one. `descriptors` is an encoded FileDescriptorSet for reflection, `domain` that of
    /// errors which the server itself gives.
    ///
    /// # Errors
    /// When the address cannot be bound, or the descriptors cannot be read.
    pub async fn bind(
        config: &Grpc,
        descriptors: &'static [u8],
        domain: Domain,
        registry: &Registry,
    ) -> Result<Self, GrpcError> {
        let address = config.listen;
        let listener = Listener::bind(address, config.max_connections)
            .await
            .map_err(|source| GrpcError::Bind { address, source })?;
        let address = listener
            .local_addr()
            .map_err(|source| GrpcError::Bind { address, source })?;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(descriptors)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // So that clients can show the details of errors.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut server = Self {
            config: config.clone(),
            listener,
            address,
            routes: Routes::builder(),
            names: Vec::new(),
            health,
            domain,
            registry: registry.clone(),
        };
        server.add_unreported(health_service);
        server.add_unreported(reflection().build_v1()?);
        server.add_unreported(reflection().build_v1alpha()?);
        Ok(server)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Adds a service; its health is SERVING until shutdown, since liveness does not depend on databases.
    ///
    /// Message sizes are the service's own: set `max_decoding_message_size` and `max_encoding_message_size` on it.
    pub async fn add_service<S>(&mut self, service: S)
    where
        S: Service<http::Request<Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.health.set_serving::<S>().await;
        self.add_unreported(service);
    }

    fn add_unreported<S>(&mut self, service: S)
    where
        S: Service<http::Request<Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes.add_service(service);
    }

    /// Serves until `shutdown`; then says NOT_SERVING, goes on for `shutdown_wait`, refuses new connections and lets
    /// calls in progress end within `drain`.
    ///
    /// # Errors
    /// When the server fails for good.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), GrpcError> {
        let Self {
            config,
            listener,
            names,
            health,
            domain,
            registry,
            routes,
            ..
        } = self;
        let calls = Calls::new(names.clone(), domain, &config, &registry)?;
        let stopped = CancellationToken::new();
        let stop = {
            let stopped = stopped.clone();
            async move {
                shutdown.cancelled().await;
                for name in std::iter::once("").chain(names) {
                    health.set_service_status(name, ServingStatus::NotServing).await;
                }
                tokio::time::sleep(config.shutdown_wait).await;
                stopped.cancel();
            }
        };
        let serve = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .max_connection_age(config.max_connection_age)
            .max_connection_age_grace(AGE_GRACE)
            .layer(CallLayer(Arc::new(calls)))
            .serve_with_incoming_shutdown(routes.routes().prepare(), listener.into_stream(), stop);
        let drained = async {
            stopped.cancelled().await;
            tokio::time::sleep(config.drain).await;
        };
        tokio::select! {
            served = serve => Ok(served?),
            () = drained => {
                tracing::warn!("calls were still in progress at the end of the drain");
                Ok(())
            }
        }
    }
}
