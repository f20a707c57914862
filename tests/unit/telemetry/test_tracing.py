"""Spans, their parents and their times."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from shared.telemetry import names, tracing


def by_name(finished: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in finished.get_finished_spans()}


def parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def span_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


async def test_a_trace_goes_on_in_another_process(finished: InMemorySpanExporter) -> None:
    with tracing.span(names.REQUEST):
        trace_id = tracing.current_trace_id()
        headers = tracing.inject()
    assert list(headers) == ["traceparent"]
    with tracing.attached(headers), tracing.span(names.DECODE, num_tokens=3):
        assert tracing.current_trace_id() == trace_id
        await asyncio.sleep(0)
        tracing.record_queue_span("decode", 0.5, request_id="r1")
    assert tracing.current_trace_id() == ""
    spans = by_name(finished)
    assert parent_id(spans["decode"]) == span_id(spans["request"])
    assert parent_id(spans["queue.decode"]) == span_id(spans["decode"])
    assert spans["decode"].attributes == {"num_tokens": 3}
    queue = spans["queue.decode"]
    duration_ns = (queue.end_time or 0) - (queue.start_time or 0)
    assert duration_ns == pytest.approx(0.5e9, rel=1e-3)


async def test_concurrent_tasks_keep_their_own_spans(finished: InMemorySpanExporter) -> None:
    async def one(name: str) -> None:
        with tracing.span(name):
            await asyncio.sleep(0.01)
            with tracing.span(f"{name}.inner"):
                await asyncio.sleep(0.01)

    await asyncio.gather(one("a"), one("b"))
    spans = by_name(finished)
    for name in "ab":
        assert parent_id(spans[f"{name}.inner"]) == span_id(spans[name])
        assert parent_id(spans[name]) is None


async def test_a_span_may_end_in_another_task(
    finished: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    scope = ExitStack()
    scope.enter_context(tracing.attached({}))
    scope.enter_context(tracing.span(names.REQUEST))

    async def close() -> None:
        scope.close()

    await asyncio.create_task(close())
    assert list(by_name(finished)) == ["request"]
    assert caplog.text == ""


async def test_an_error_marks_its_span_and_a_cancellation_does_not(
    finished: InMemorySpanExporter,
) -> None:
    with pytest.raises(ValueError, match="odd"), tracing.span("failed"):
        raise ValueError("odd")
    with pytest.raises(asyncio.CancelledError), tracing.span("cancelled"):
        raise asyncio.CancelledError
    spans = by_name(finished)
    assert spans["failed"].status.status_code is StatusCode.ERROR
    assert spans["failed"].status.description == "ValueError: odd"
    assert spans["cancelled"].status.status_code is StatusCode.UNSET


async def test_clocks_that_disagree_give_an_empty_span(finished: InMemorySpanExporter) -> None:
    tracing.record_span(names.ENCODE, 100.5, 100.0)
    (span,) = finished.get_finished_spans()
    assert (span.start_time, span.end_time) == (100_500_000_000, 100_500_000_000)


def test_without_set_up_spans_go_nowhere() -> None:
    with tracing.span("nowhere"):
        assert tracing.current_trace_id() == ""
        assert tracing.inject() == {}
    tracing.record_span("nowhere", 0.0, 1.0)


def test_malformed_headers_start_a_new_trace() -> None:
    with tracing.attached({"traceparent": "nonsense"}):
        assert tracing.current_trace_id() == ""


def test_every_queue_span_has_a_name() -> None:
    assert {names.queue_span(s) for s in ("encode", "prefill", "decode")} <= names.ALL_SPANS
