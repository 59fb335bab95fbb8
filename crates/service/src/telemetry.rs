//! Logs and traces.
//!
//! Every span belongs to a trace even when nothing is exported, so that a command's trace context can be stored with its
//! events and carried on. Log lines carry `trace_id` and `span_id` of the span they were written in, and the fields of
//! the spans around them. Never put personal data or payloads into either.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Log, LogFormat, Telemetry};

mod json;

/// How long the last spans may take to reach the collector when the process ends.
const FLUSH: Duration = Duration::from_secs(3);

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("the OTLP exporter cannot be built")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    #[error("log.level is not understood")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    #[error("another subscriber is installed already")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Keeps telemetry alive; call [`TelemetryGuard::shutdown`] as the last thing of the process.
#[derive(Debug)]
#[must_use = "spans are flushed by shutdown()"]
pub struct TelemetryGuard {
    provider: SdkTracerProvider,
}

impl TelemetryGuard {
    /// Sends what is still buffered, within a bound.
    pub async fn shutdown(self) {
        let flush = tokio::task::spawn_blocking(move || self.provider.shutdown_with_timeout(FLUSH));
        // A collector that is away must not keep the process: nothing else can be done about it here.
        let _ = tokio::time::timeout(FLUSH + Duration::from_secs(1), flush).await;
    }
}

/// Installs the subscriber of this process: logs on standard error, spans to the collector if there is one.
///
/// Call it within a runtime, once.
///
/// # Errors
/// When the exporter or the filter cannot be built, or a subscriber is installed already.
pub fn init(
    service: &'static str,
    version: &'static str,
    instance: &str,
    log: &Log,
    telemetry: &Telemetry,
) -> Result<TelemetryGuard, TelemetryError> {
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attributes([
            KeyValue::new("service.version", version),
            KeyValue::new("service.instance.id", instance.to_owned()),
        ])
        .build();
    let mut provider = SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .with_resource(resource);
    if let Some(endpoint) = &telemetry.otlp_endpoint {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(FLUSH)
            .build()?;
        provider = provider.with_batch_exporter(exporter);
    }
    let provider = provider.build();

    // The exporter's own transport must not be traced: it would never come to rest.
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(quiet(Targets::new().with_default(LevelFilter::INFO)));
    let filter = quiet(log.level.parse::<Targets>()?);
    let registry = tracing_subscriber::registry().with(spans);
    match log.format {
        LogFormat::Json => {
            let lines = tracing_subscriber::fmt::layer()
                .event_format(json::Lines)
                .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
                .with_writer(std::io::stderr);
            registry.with(lines.with_filter(filter)).try_init()?;
        }
        LogFormat::Text => {
            let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
            registry.with(lines.with_filter(filter)).try_init()?;
        }
    }
    Ok(TelemetryGuard { provider })
}

/// Libraries that would otherwise speak about every frame, or quote what they transport. A level that the configuration
/// names for one of them stands.
fn quiet(filter: Targets) -> Targets {
    const LIBRARIES: [&str; 8] = [
        "h2",
        "hyper",
        "hyper_util",
        "tower",
        "tonic",
        "opentelemetry_sdk",
        "opentelemetry-otlp",
        "tokio_postgres",
    ];
    let level = filter
        .default_level()
        .unwrap_or(LevelFilter::OFF)
        .min(LevelFilter::WARN);
    let named: Vec<String> = filter.iter().map(|(target, _)| target.to_owned()).collect();
    let unnamed = LIBRARIES
        .into_iter()
        .filter(|library| !named.iter().any(|target| target == library));
    unnamed.fold(filter, |filter, library| filter.with_target(library, level))
}

/// A W3C trace context as it is stored in outbox rows and carried in headers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// `00-<trace id>-<span id>-<flags>`; none when there is no trace.
    pub traceparent: Option<String>,
    /// What vendors added; none when empty.
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// The trace id, 32 hexadecimal digits.
    pub fn trace_id(&self) -> Option<&str> {
        trace_id(self.traceparent.as_deref()?)
    }
}

/// The trace id within a traceparent.
pub fn trace_id(traceparent: &str) -> Option<&str> {
    traceparent.split('-').nth(1).filter(|id| id.len() == 32)
}

/// The trace context of the current span.
pub fn current_trace_context() -> TraceContext {
    trace_context_of(&Span::current())
}

/// The trace context of a span.
pub fn trace_context_of(span: &Span) -> TraceContext {
    let mut fields = BTreeMap::new();
    let mut injector = Fields(&mut fields);
    TraceContextPropagator::new().inject_context(&span.context(), &mut injector);
    TraceContext {
        traceparent: fields.remove("traceparent"),
        tracestate: fields.remove("tracestate").filter(|state| !state.is_empty()),
    }
}

/// Makes a span that was just created continue a trace. A context that is missing or malformed is passed over.
pub fn set_parent(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let parent = remote_context(traceparent, tracestate);
    if parent.span().span_context().is_valid() {
        // Fails only when tracing is off or the span was entered before: then it keeps its own trace.
        let _ = span.set_parent(parent);
    }
}

/// Links a span to another trace, for batches that belong to several.
pub fn add_link(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let linked = remote_context(traceparent, tracestate);
    let context = linked.span().span_context().clone();
    if context.is_valid() {
        span.add_link(context);
    }
}

fn remote_context(traceparent: Option<&str>, tracestate: Option<&str>) -> Context {
    TraceContextPropagator::new().extract_with_context(
        &Context::new(),
        &Remote {
            traceparent,
            tracestate,
        },
    )
}

struct Fields<'a>(&'a mut BTreeMap<String, String>);

impl opentelemetry::propagation::Injector for Fields<'_> {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key.to_owned(), value);
    }
}

struct Remote<'a> {
    traceparent: Option<&'a str>,
    tracestate: Option<&'a str>,
}

impl Extractor for Remote<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.traceparent,
            "tracestate" => self.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// An error with all its causes in one line, as it is logged.
pub fn chain<'a>(error: &'a (dyn std::error::Error + 'static)) -> impl fmt::Display + 'a {
    struct Chain<'a>(&'a (dyn std::error::Error + 'static));
    impl fmt::Display for Chain<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}", self.0)?;
            let mut source = self.0.source();
            while let Some(cause) = source {
                write!(f, ": {cause}")?;
                source = cause.source();
            }
            Ok(())
        }
    }
    Chain(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn with_tracing<T>(test: impl FnOnce() -> T) -> T {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), test)
    }

    #[test]
    fn a_span_has_a_trace_without_any_exporter() {
        with_tracing(|| {
            let span = tracing::info_span!("command");
            let context = span.in_scope(current_trace_context);
            assert_eq!(context.trace_id().map(str::len), Some(32), "{context:?}");
        });
    }

    #[test]
    fn a_trace_is_continued() {
        with_tracing(|| {
            let span = tracing::info_span!("process");
            set_parent(&span, Some(PARENT), Some("vendor=1"));
            let context = trace_context_of(&span);
            assert_eq!(context.trace_id(), trace_id(PARENT));
            assert_ne!(context.traceparent.as_deref(), Some(PARENT), "a span of its own");
            assert_eq!(context.tracestate.as_deref(), Some("vendor=1"));
        });
    }

    #[test]
    fn a_malformed_parent_is_passed_over() {
        with_tracing(|| {
            for bad in [None, Some(""), Some("00-00-00-00"), Some("garbage")] {
                let span = tracing::info_span!("process");
                set_parent(&span, bad, None);
                assert!(trace_context_of(&span).traceparent.is_some(), "{bad:?}");
            }
        });
    }

    #[test]
    fn libraries_are_quiet_unless_asked() {
        use tracing::Level;
        let filter = |text: &str| quiet(text.parse().expect("directives"));
        assert!(!filter("debug").would_enable("h2", &Level::INFO));
        assert!(filter("debug").would_enable("h2", &Level::WARN));
        assert!(filter("debug").would_enable("order_svc", &Level::DEBUG));
        assert!(filter("info,h2=debug").would_enable("h2", &Level::DEBUG));
        assert!(!filter("off").would_enable("h2", &Level::ERROR));
    }

    #[test]
    fn no_subscriber_no_trace() {
        assert_eq!(current_trace_context(), TraceContext::default());
    }
}
