//! The trace of an event, continued where it is processed.

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use tracing::{Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::record::Record;

/// The most spans that a batch's span links to.
const LINKS: usize = 128;

/// The span `process {topic}` of a batch: a child of the event's trace when there is one event, linked to each event's
/// when there are several.
pub(crate) fn process_span(group: &str, records: &[&Record]) -> Span {
    let Some(first) = records.first() else {
        return Span::none();
    };
    let span = tracing::info_span!(
        "process",
        otel.name = format!("process {}", first.topic),
        otel.kind = "consumer",
        messaging.system = "kafka",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = &*first.topic,
        messaging.consumer.group.name = group,
        messaging.batch.message_count = records.len(),
        messaging.destination.partition.id = field::Empty,
        messaging.kafka.offset = field::Empty,
        messaging.kafka.message.key = field::Empty,
        messaging.message.id = field::Empty,
    );
    if span.is_disabled() {
        return span;
    }
    if let [record] = records {
        span.record(
            "messaging.destination.partition.id",
            field::display(record.partition),
        );
        span.record("messaging.kafka.offset", record.offset);
        span.record("messaging.kafka.message.key", record.envelope.entity_id.as_str());
        span.record("messaging.message.id", field::display(record.envelope.event_id));
        if let Some(parent) = span_context(record) {
            // Fails only when no OpenTelemetry layer is installed: then there is no trace to continue.
            let _ = span.set_parent(Context::new().with_remote_span_context(parent));
        }
    } else {
        for context in records
            .iter()
            .filter_map(|record| span_context(record))
            .take(LINKS)
        {
            span.add_link(context);
        }
    }
    span
}

/// The trace id of a record, for log lines.
pub(crate) fn trace_id(record: &Record) -> &str {
    record.trace_id().unwrap_or("")
}

fn span_context(record: &Record) -> Option<SpanContext> {
    let state = record
        .envelope
        .tracestate
        .as_deref()
        .and_then(|state| state.parse::<TraceState>().ok());
    parse(record.envelope.traceparent.as_deref()?, state.unwrap_or_default())
}

/// W3C `traceparent`, version 00.
fn parse(traceparent: &str, state: TraceState) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if version != "00" || parts.next().is_some() || trace.len() != 32 || span.len() != 16 || flags.len() != 2
    {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        state,
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_is_parsed_or_ignored() {
        let context = parse(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            TraceState::default(),
        )
        .expect("valid");
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert!(context.is_sampled() && context.is_remote());
        for bad in [
            "",
            "00",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        ] {
            assert!(parse(bad, TraceState::default()).is_none(), "{bad}");
        }
    }
}
