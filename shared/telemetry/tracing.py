"""Spans of this process, and how a trace goes on in the next one.

Comes in: names, times and attributes. Goes out: spans to the bus and, if an endpoint is
given or the standard OTEL_EXPORTER_OTLP_* variables name one, to a collector over OTLP/HTTP. Before
`setup_tracing` (in tests, say) spans cost nearly nothing and go nowhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.bus.base import Bus
from shared.messages.telemetry import AttributeValue
from shared.telemetry import names
from shared.telemetry.bus_spans import BusSpanExporter

_PROPAGATOR = TraceContextTextMapPropagator()
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing:
    """This process' spans, from `setup_tracing` to the end of its `async with`."""

    def __init__(self, provider: TracerProvider, bus_spans: BusSpanExporter | None) -> None:
        self._provider = provider
        self._bus_spans = bus_spans

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Export what is left; later spans go nowhere."""
        _use(trace.NoOpTracer())
        if self._bus_spans is not None:
            await self._bus_spans.close()
        self._provider.shutdown()


_tracer: Tracer = trace.NoOpTracer()


def setup_tracing(
    service_name: str,
    instance: str,
    bus: Bus | None = None,
    *,
    otlp_endpoint: str = "",
    processors: Iterable[SpanProcessor] = (),
    sample_ratio: float = 1.0,
) -> Tracing:
    """Trace this process as `service_name`/`instance`, and publish its spans on `bus` if given.

    `otlp_endpoint` is a collector's base URL; the standard variables do as well. Call it inside the
    event loop. A trace that began elsewhere keeps its own sampling decision.
    """
    provider = TracerProvider(
        resource=Resource.create({"service.name": service_name, "service.instance.id": instance}),
        sampler=ParentBasedTraceIdRatio(sample_ratio),
        shutdown_on_exit=False,
    )
    for processor in processors:
        provider.add_span_processor(processor)
    bus_spans = None
    if bus is not None:
        bus_spans = BusSpanExporter(bus, service=service_name, instance=instance)
        bus_spans.start()
        provider.add_span_processor(bus_spans)
    if otlp_endpoint or any(os.environ.get(name) for name in _OTLP_ENDPOINTS):
        provider.add_span_processor(_otlp_processor(otlp_endpoint))
    _use(provider.get_tracer("triptych"))
    return Tracing(provider, bus_spans)


def inject(context: Context | None = None) -> dict[str, str]:
    """Headers (`traceparent`) that carry the current span, or that of `context`, elsewhere."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, context=context)
    return headers


def extract(headers: Mapping[str, str]) -> Context:
    """The context of the sender's span; an empty one if the headers carry none."""
    return _PROPAGATOR.extract(headers, context=Context())


@contextmanager
def attached(headers: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, spans continue the trace that the headers carry."""
    with _current(extract(headers)):
        yield


@contextmanager
def span(
    name: str, *, parent: Context | None = None, **attributes: AttributeValue
) -> Iterator[Span]:
    """A span around a block, current inside it (also across `await`). An error marks it failed.

    Without `parent` it is a child of the current span, or the root of a new trace.
    """
    started = _tracer.start_span(name, context=parent, attributes=attributes)
    try:
        with _current(trace.set_span_in_context(started, parent)):
            yield started
    except Exception as error:
        started.set_status(StatusCode.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        started.end()


def record_span(
    name: str,
    start_unix_s: float,
    end_unix_s: float,
    *,
    parent: Context | None = None,
    **attributes: AttributeValue,
) -> None:
    """A span of something that is over already; times are wall-clock seconds."""
    recorded = _tracer.start_span(
        name, context=parent, attributes=attributes, start_time=_unix_ns(start_unix_s)
    )
    # Two clocks may disagree by a little: a span never ends before it starts.
    recorded.end(end_time=_unix_ns(max(start_unix_s, end_unix_s)))


def record_queue_span(
    stage: str, queued_s: float, *, parent: Context | None = None, **attributes: AttributeValue
) -> None:
    """The time that a task waited for `stage`, until now."""
    now_s = time.time()
    record_span(names.queue_span(stage), now_s - queued_s, now_s, parent=parent, **attributes)


def current_trace_id() -> str:
    """The current trace as 32 hex digits; empty outside of any."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""


@contextmanager
def _current(context: Context) -> Iterator[None]:
    # Sets the former context again instead of using up a token: a token is refused in another task,
    # and a streamed answer may well be closed by another task than the one that began it.
    before = otel_context.get_current()
    otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.attach(before)


def _unix_ns(unix_s: float) -> int:
    return int(unix_s * 1e9)


def _use(tracer: Tracer) -> None:
    global _tracer
    _tracer = tracer


def _otlp_processor(endpoint: str) -> SpanProcessor:
    # Imported here: it pulls in an HTTP client that most processes never need.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=url))
