//! What surrounds every call: a span that continues the caller's trace, a deadline, a cap on calls at once, metrics, and
//! details on errors that have none.

use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use prometheus::{HistogramOpts, HistogramVec, IntGauge, Registry};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span};

use crate::config::Grpc;
use crate::deadline::{Deadline, parse_grpc_timeout};
use crate::status::{Domain, RETRY_DELAY};
use crate::telemetry::set_parent;

const HEALTH: &str = "grpc.health.v1.Health";
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Shared by all calls of a server.
pub(super) struct Calls {
    services: Vec<&'static str>,
    domain: Domain,
    max_deadline: Duration,
    slots: Semaphore,
    duration: HistogramVec,
    in_progress: IntGauge,
}

impl Calls {
    pub(super) fn new(
        services: Vec<&'static str>,
        domain: Domain,
        config: &Grpc,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let opts = HistogramOpts::new(
            "rpc_server_call_duration_seconds",
            "Calls answered, streams to their end.",
        )
        .buckets(SECONDS.to_vec());
        let duration = HistogramVec::new(opts, &["rpc_service", "rpc_method", "rpc_grpc_status_code"])?;
        let in_progress = IntGauge::new(
            "rpc_server_calls_in_progress",
            "Calls that have no complete answer yet.",
        )?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(in_progress.clone()))?;
        Ok(Self {
            services,
            domain,
            max_deadline: config.max_deadline,
            slots: Semaphore::new(config.max_concurrent_calls),
            duration,
            in_progress,
        })
    }

    /// The service that a path names, if it is one of this server, and its method.
    fn parse<'p>(&self, path: &'p str) -> Option<(&'static str, &'p str)> {
        let (service, method) = path.strip_prefix('/')?.split_once('/')?;
        Some((self.services.iter().find(|known| **known == service)?, method))
    }
}

#[derive(Clone)]
pub(super) struct CallLayer(pub(super) Arc<Calls>);

impl<S> Layer<S> for CallLayer {
    type Service = CallService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CallService {
            inner,
            calls: Arc::clone(&self.0),
        }
    }
}

#[derive(Clone)]
pub(super) struct CallService<S> {
    inner: S,
    calls: Arc<Calls>,
}

impl<S> Service<Request<Body>> for CallService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let calls = Arc::clone(&self.calls);
        let known = calls
            .parse(request.uri().path())
            .map(|(service, method)| (service, method.to_owned()));
        let span = match &known {
            Some((service, method)) if *service != HEALTH => call_span(service, method, request.headers()),
            _ => Span::none(),
        };
        let record = Record::new(Arc::clone(&calls), known, span.clone());
        let asked = header(request.headers(), "grpc-timeout").and_then(parse_grpc_timeout);
        let deadline = Deadline::new(asked, calls.max_deadline);
        request.extensions_mut().insert(deadline);
        // The slot is taken now: a call that finds none is refused before its body is read.
        let is_probe = record.service == HEALTH;
        if !is_probe && calls.slots.try_acquire().map(|slot| slot.forget()).is_err() {
            let refused = calls
                .domain
                .status(Code::ResourceExhausted, "OVERLOADED", "too many calls at once")
                .retry_after(RETRY_DELAY)
                .build();
            return Box::pin(async move { Ok(record.finish(refused.into_http())) });
        }
        let slot = Slot {
            calls: Arc::clone(&calls),
            held: !is_probe,
        };
        let inner = self.inner.call(request);
        let answer = async move {
            let _slot = slot;
            let response = match tokio::time::timeout_at(deadline.at(), caught(inner)).await {
                Ok(Ok(response)) => response,
                Ok(Err(Panicked)) => {
                    tracing::error!("a call panicked");
                    calls
                        .domain
                        .status(Code::Internal, "INTERNAL", "internal error")
                        .build()
                        .into_http()
                }
                Err(_) => {
                    let reason = "DEADLINE_EXCEEDED";
                    calls
                        .domain
                        .status(Code::DeadlineExceeded, reason, "the deadline has passed")
                        .build()
                        .into_http()
                }
            };
            Ok(record.finish(with_details(response, calls.domain)))
        };
        Box::pin(answer.instrument(span))
    }
}

/// A call's place among those at once; given back when the handler has answered.
struct Slot {
    calls: Arc<Calls>,
    held: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.held {
            self.calls.slots.add_permits(1);
        }
    }
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn call_span(service: &str, method: &str, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        "call",
        otel.name = format!("{service}/{method}"),
        otel.kind = "server",
        otel.status_code = tracing::field::Empty,
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        rpc.grpc.status_code = tracing::field::Empty,
    );
    set_parent(
        &span,
        header(headers, "traceparent"),
        header(headers, "tracestate"),
    );
    span
}

struct Panicked;

/// The output of an infallible future, or that it panicked: tonic would cut the connection without a word.
async fn caught<F, T>(future: F) -> Result<T, Panicked>
where
    F: Future<Output = Result<T, Infallible>>,
{
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(
        |cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(Ok(output))) => Poll::Ready(Ok(output)),
            Ok(Poll::Ready(Err(never))) => match never {},
            Err(_) => Poll::Ready(Err(Panicked)),
        },
    )
    .await
}

/// Errors that tonic gives by itself (a message too large, an unknown method) get an `ErrorInfo` as all others have.
fn with_details(response: Response<Body>, domain: Domain) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != Code::Ok && status.details().is_empty() => {
            let reason = match status.code() {
                Code::OutOfRange | Code::ResourceExhausted => "MESSAGE_TOO_LARGE",
                Code::Unimplemented => "UNIMPLEMENTED",
                Code::Cancelled => "CANCELLED",
                Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
                Code::InvalidArgument => "MALFORMED_MESSAGE",
                _ => "PROTOCOL_ERROR",
            };
            domain
                .status(status.code(), reason, status.message())
                .build()
                .into_http()
        }
        _ => response,
    }
}

/// Measures a call; counts it as cancelled when it is dropped before its end.
struct Record {
    calls: Arc<Calls>,
    service: &'static str,
    method: String,
    span: Span,
    start: Instant,
    code: Option<Code>,
}

impl Record {
    fn new(calls: Arc<Calls>, known: Option<(&'static str, String)>, span: Span) -> Self {
        calls.in_progress.inc();
        // Whatever a client makes up must not become a label.
        let (service, method) = known.unwrap_or(("unknown", "unknown".to_owned()));
        Self {
            calls,
            service,
            method,
            span,
            start: Instant::now(),
            code: None,
        }
    }

    /// Goes on living in the body of the response, where the status of a success is.
    fn finish(mut self, response: Response<Body>) -> Response<Body> {
        if let Some(status) = Status::from_header_map(response.headers()) {
            self.end(status.code());
        }
        response.map(|body| Body::new(Recorded { body, record: self }))
    }

    fn end(&mut self, code: Code) {
        if self.code.is_some() {
            return;
        }
        self.code = Some(code);
        let name = name_of(code);
        // The methods of a known service are bounded only if it knows them.
        let method = if code == Code::Unimplemented {
            "unknown"
        } else {
            &self.method
        };
        self.calls
            .duration
            .with_label_values(&[self.service, method, name])
            .observe(self.start.elapsed().as_secs_f64());
        self.span.record("rpc.grpc.status_code", i32::from(code));
        if matches!(
            code,
            Code::Unknown | Code::DeadlineExceeded | Code::Unimplemented | Code::Internal
        ) || matches!(code, Code::Unavailable | Code::DataLoss)
        {
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
        self.calls.in_progress.dec();
    }
}

fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A response's body that ends its call's record.
struct Recorded {
    body: Body,
    record: Record,
}

impl HttpBody for Recorded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let code = Status::from_header_map(trailers).map_or(Code::Ok, |status| status.code());
                    self.record.end(code);
                }
            }
            Some(Err(status)) => {
                let code = status.code();
                self.record.end(code);
            }
            None => self.record.end(Code::Ok),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
