"""Spans of this process, and how a trace goes on in the next one.

Comes in: names, times and attributes. Goes out: spans to whatever processors were set up. Before
`setup_tracing` (in tests, say) spans cost nothing and go nowhere. Export over OTLP/HTTP happens
only if the standard OTEL_EXPORTER_OTLP_* variables ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.messages.telemetry import AttributeValue

_PROPAGATOR = TraceContextTextMapPropagator()
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_INSTRUMENTATION = "triptych"


@dataclass(frozen=True)
class Tracing:
    """What `setup_tracing` made; whoever set it up shuts it down."""

    provider: TracerProvider

    def shutdown(self) -> None:
        """Export what is left, and make later spans go nowhere."""
        _use(trace.NoOpTracer())
        self.provider.shutdown()


_tracer: Tracer = trace.NoOpTracer()


def setup_tracing(
    service_name: str,
    instance: str,
    *,
    processors: Iterable[SpanProcessor] = (),
    sample_ratio: float = 1.0,
) -> Tracing:
    """Trace this process as `service_name`/`instance`; a started trace keeps its own sampling."""
    provider = TracerProvider(
        resource=Resource.create({"service.name": service_name, "service.instance.id": instance}),
        sampler=ParentBasedTraceIdRatio(sample_ratio),
        shutdown_on_exit=False,
    )
    for processor in processors:
        provider.add_span_processor(processor)
    if any(os.environ.get(name) for name in _OTLP_ENDPOINTS):
        provider.add_span_processor(_otlp_processor())
    _use(provider.get_tracer(_INSTRUMENTATION))
    return Tracing(provider)


def inject(context: Context | None = None) -> dict[str, str]:
    """Headers (`traceparent`) that carry the current span, or that of `context`, to another process."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, context=context)
    return headers


def extract(headers: Mapping[str, str]) -> Context:
    """The context of the sender's span; an empty one if the headers carry none."""
    return _PROPAGATOR.extract(headers, context=Context())


@contextmanager
def attached(headers: Mapping[str, str]) -> Iterator[None]:
    """Within the block, spans are children of the sender's span."""
    token = attach(extract(headers))
    try:
        yield
    finally:
        detach(token)


@contextmanager
def span(
    name: str, *, parent: Context | None = None, **attributes: AttributeValue
) -> Iterator[Span]:
    """A span around a block, current inside it (also across `await`). An exception marks it failed.

    Without `parent` it is a child of the current span, or a trace of its own.
    """
    with _tracer.start_as_current_span(name, context=parent, attributes=attributes) as started:
        yield started


def record_span(
    name: str,
    start_unix_s: float,
    end_unix_s: float,
    *,
    parent: Context | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Context:
    """A span of something that is over already (queue time, say); returns its context."""
    recorded = _tracer.start_span(
        name, context=parent, attributes=attributes, start_time=_unix_ns(start_unix_s)
    )
    # Two clocks may disagree by a little: a span never ends before it starts.
    recorded.end(end_time=_unix_ns(max(start_unix_s, end_unix_s)))
    return trace.set_span_in_context(recorded, parent)


def current_trace_id() -> str | None:
    """The current trace as 32 hex digits, for log lines."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


def _unix_ns(unix_s: float) -> int:
    return int(unix_s * 1e9)


def _use(tracer: Tracer) -> None:
    global _tracer
    _tracer = tracer


def _otlp_processor() -> SpanProcessor:
    # Imported here: it pulls in an HTTP client that most processes never need.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return BatchSpanProcessor(OTLPSpanExporter())
