//! Spans reach a collector, at the latest when the process ends. A process of its own, since the subscriber is global.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use service::config::{Log, LogFormat, Telemetry};
use service::telemetry;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::server::NamedService;

#[derive(Clone)]
struct Collector(mpsc::UnboundedSender<Vec<u8>>);

impl NamedService for Collector {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl tower::Service<http::Request<Body>> for Collector {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let received = self.0.clone();
        Box::pin(async move {
            let body = axum::body::Body::new(request.into_body());
            let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
            let _ = received.send(bytes.to_vec());
            Ok(tonic::Status::new(tonic::Code::Ok, "").into_http())
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_exported_before_the_end() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let (sender, mut received) = mpsc::unbounded_channel();
    let collector = tonic::transport::Server::builder().add_service(Collector(sender));
    let server = tokio::spawn(collector.serve_with_incoming(TcpListenerStream::new(listener)));

    let log = Log {
        format: LogFormat::Json,
        level: "off".to_owned(),
    };
    let telemetry = Telemetry {
        otlp_endpoint: Some(endpoint),
    };
    let guard = telemetry::init("test-svc", "1", "test-svc-1", &log, &telemetry).expect("installed");
    tracing::info_span!("a span of this test").in_scope(|| {
        assert!(telemetry::current_trace_context().traceparent.is_some());
    });
    guard.shutdown().await;

    let body = received.try_recv().expect("sent before shutdown() returned");
    let contains = |text: &str| body.windows(text.len()).any(|part| part == text.as_bytes());
    for part in ["a span of this test", "test-svc", "test-svc-1"] {
        assert!(contains(part), "{part}");
    }
    server.abort();
}
