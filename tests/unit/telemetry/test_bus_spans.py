"""Spans over the bus: batched, bounded, counted when dropped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from shared.bus import subjects
from shared.bus.base import Headers
from shared.bus.memory_bus import MemoryBus
from shared.errors import BusError
from shared.messages.base import Message
from shared.messages.telemetry import SpanBatch
from shared.telemetry import tracing
from shared.telemetry.bus_spans import FLUSH_INTERVAL_S, BusSpanExporter


async def listen(bus: MemoryBus) -> asyncio.Queue[SpanBatch]:
    heard: asyncio.Queue[SpanBatch] = asyncio.Queue()

    async def handler(batch: SpanBatch, _headers: Headers) -> None:
        heard.put_nowait(batch)

    await bus.subscribe(subjects.SPANS, SpanBatch, handler)
    return heard


async def test_spans_arrive_within_a_moment() -> None:
    async with MemoryBus() as bus:
        heard = await listen(bus)
        async with tracing.setup_tracing("decode", "decode-0", bus):
            with tracing.span("outer"), tracing.span("inner", num_tokens=3):
                pass
            batch = await asyncio.wait_for(heard.get(), 1.0)
    inner, outer = batch.spans
    assert (inner.name, inner.service, inner.instance) == ("inner", "decode", "decode-0")
    assert inner.attributes == {"num_tokens": 3}
    assert (inner.parent_id, inner.trace_id) == (outer.span_id, outer.trace_id)
    assert outer.parent_id is None
    assert outer.start_unix_ns <= inner.start_unix_ns <= inner.end_unix_ns <= outer.end_unix_ns


async def test_spans_arrive_again_after_a_pause_and_from_other_threads() -> None:
    def record() -> None:
        with tracing.span("elsewhere"):
            pass

    async with MemoryBus() as bus:
        heard = await listen(bus)
        async with tracing.setup_tracing("decode", "decode-0", bus):
            for _ in range(3):
                await asyncio.to_thread(record)
                batch = await asyncio.wait_for(heard.get(), 1.0)
                assert [span.name for span in batch.spans] == ["elsewhere"]
                await asyncio.sleep(2 * FLUSH_INTERVAL_S)
    assert heard.empty()


async def test_without_spans_nothing_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = 0

    async def flush(self: BusSpanExporter) -> None:
        nonlocal flushed
        flushed += 1

    monkeypatch.setattr(BusSpanExporter, "flush", flush)
    async with MemoryBus() as bus, tracing.setup_tracing("decode", "decode-0", bus):
        await asyncio.sleep(3 * FLUSH_INTERVAL_S)
        assert flushed == 0


async def test_the_last_spans_are_sent_on_shutdown() -> None:
    async with MemoryBus() as bus:
        heard = await listen(bus)
        async with tracing.setup_tracing("decode", "decode-0", bus):
            for _ in range(300):
                with tracing.span("s"):
                    pass
        batches = [await asyncio.wait_for(heard.get(), 1.0) for _ in range(2)]
    assert [len(b.spans) for b in batches] == [256, 44]


class BrokenBus(MemoryBus):
    async def publish(self, subject: str, message: Message, headers: Headers | None = None) -> None:
        raise BusError("away")


def end_spans(exporter: BusSpanExporter, count: int) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(exporter)
    tracer = provider.get_tracer("test")
    for _ in range(count):
        tracer.start_span("s").end()


async def test_a_full_queue_drops_and_counts() -> None:
    async with MemoryBus() as bus:
        heard = await listen(bus)
        exporter = BusSpanExporter(bus, service="s", instance="i", max_waiting=10)
        end_spans(exporter, 12)
        await exporter.flush()
        batch = await asyncio.wait_for(heard.get(), 1.0)
    assert (len(batch.spans), batch.num_dropped) == (10, 2)


async def test_a_bus_that_is_away_harms_nobody() -> None:
    exporter = BusSpanExporter(BrokenBus(), service="s", instance="i")
    end_spans(exporter, 3)
    await exporter.flush()
    assert exporter.num_dropped == 3


@pytest.mark.parametrize(("value", "sent"), [((1, 2), "(1, 2)"), ("x", "x"), (True, True)])
async def test_attributes_become_scalars(value: Any, sent: object) -> None:
    async with MemoryBus() as bus:
        heard = await listen(bus)
        exporter = BusSpanExporter(bus, service="s", instance="i")
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(exporter)
        provider.get_tracer("test").start_span("s", attributes={"k": value}).end()
        await exporter.flush()
        batch = await asyncio.wait_for(heard.get(), 1.0)
    assert batch.spans[0].attributes == {"k": sent}
