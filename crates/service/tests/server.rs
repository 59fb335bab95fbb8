//! The gRPC server around services that misbehave, and around too many connections.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use service::config::{self, Grpc, Sources};
use service::grpc::GrpcServer;
use service::status::Domain;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

const LIMIT: Duration = Duration::from_secs(20);

/// A service whose every method panics.
#[derive(Clone)]
struct Panics;

impl NamedService for Panics {
    const NAME: &'static str = "test.Panics";
}

impl tower::Service<http::Request<Body>> for Panics {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        Box::pin(async { panic!("on purpose") })
    }
}

async fn start(settings: &str) -> (Endpoint, CancellationToken) {
    let text = format!("grpc.listen = \"127.0.0.1:0\"\ngrpc.shutdown_wait = \"0s\"\n{settings}");
    let config =
        config::parse(Sources::new("TEST_").toml(&text), |reader| Grpc::read(reader, 0)).expect("valid");
    let registry = prometheus::Registry::new();
    let mut server = GrpcServer::bind(
        &config,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        Domain("test"),
        &registry,
    )
    .await
    .expect("bound");
    server.add_service(Panics).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.local_addr())).expect("a URL");
    let shutdown = CancellationToken::new();
    tokio::spawn(server.serve(shutdown.clone()));
    (endpoint, shutdown)
}

async fn call(channel: Channel, path: &'static str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::unknown(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    grpc.unary(
        Request::new(()),
        http::uri::PathAndQuery::from_static(path),
        codec,
    )
    .await
    .map(|_| ())
}

#[tokio::test]
async fn a_panic_is_an_internal_error_and_the_server_goes_on() {
    let (endpoint, _shutdown) = start("grpc.max_concurrent_calls = 2").await;
    let channel = endpoint.connect().await.expect("connected");
    // More often than there are slots: each is given back.
    for _ in 0..5 {
        let status = call(channel.clone(), "/test.Panics/Any")
            .await
            .expect_err("it panics");
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(
            status.get_details_error_info().expect("always").reason,
            "INTERNAL"
        );
        assert!(!status.message().contains("purpose"), "{status:?}");
    }
    let status = call(channel, "/test.Nowhere/Any").await.expect_err("unknown");
    assert_eq!(status.code(), Code::Unimplemented);
    assert_eq!(status.get_details_error_info().expect("always").domain, "test");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let (endpoint, _shutdown) = start("grpc.max_connections = 1").await;
    let first = endpoint.connect().await.expect("connected");
    HealthClient::new(first.clone())
        .check(HealthCheckRequest::default())
        .await
        .expect("served");

    let second = endpoint.connect_lazy();
    let mut waiting = HealthClient::new(second.clone());
    let check = waiting.check(HealthCheckRequest::default());
    tokio::time::timeout(Duration::from_millis(200), check)
        .await
        .expect_err("it waits");
    drop(first);
    let mut waiting = HealthClient::new(second);
    let check = waiting.check(HealthCheckRequest::default());
    tokio::time::timeout(LIMIT, check)
        .await
        .expect("in time")
        .expect("served");
}
