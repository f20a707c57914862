"""Sends finished spans over the bus, in batches, for live views.

A span processor: the hot path only appends to a bounded queue. When the queue is full or the bus
is away, spans are dropped and counted; nothing ever waits for telemetry.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import StatusCode

from shared.bus import subjects
from shared.bus.base import Bus
from shared.errors import TriptychError
from shared.messages.telemetry import AttributeValue, SpanBatch, SpanRecord

FLUSH_INTERVAL_S = 0.05
MAX_WAITING_SPANS = 4096
MAX_BATCH_SPANS = 256

logger = logging.getLogger(__name__)


class BusSpanExporter(SpanProcessor):
    """Publishes on `subjects.SPANS` from `start` to `close`."""

    def __init__(
        self, bus: Bus, *, service: str, instance: str, max_waiting: int = MAX_WAITING_SPANS
    ) -> None:
        self._bus = bus
        self._service = service
        self._instance = instance
        self._max_waiting = max_waiting
        # Spans may end in worker threads; appending and popping at the ends are atomic.
        self._waiting: deque[ReadableSpan] = deque()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()
        self._is_awake = False
        self.num_dropped = 0

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Only finished spans are of interest."""

    def on_end(self, span: ReadableSpan) -> None:
        if len(self._waiting) >= self._max_waiting:
            self.num_dropped += 1
            return
        self._waiting.append(span)
        if self._loop is not None and not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._arrived.set)

    def start(self) -> None:
        """Begin to publish. Call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="span export")

    async def close(self) -> None:
        """Publish what waits and stop."""
        self._loop = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    async def flush(self) -> None:
        """Publish everything that waits now."""
        while self._waiting:
            count = min(len(self._waiting), MAX_BATCH_SPANS)
            spans = tuple(self._record(self._waiting.popleft()) for _ in range(count))
            batch = SpanBatch(spans=spans, num_dropped=self.num_dropped)
            try:
                await self._bus.publish(subjects.SPANS, batch)
            except TriptychError as error:
                self.num_dropped += count
                logger.debug("%d spans dropped: %s", count, error)

    async def _run(self) -> None:
        # A process without spans sleeps: waking up for nothing costs the models their cores.
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(FLUSH_INTERVAL_S)
            self._is_awake = False  # before the look at what waits, so that no span is forgotten
            await self.flush()

    def _record(self, span: ReadableSpan) -> SpanRecord:
        context = span.get_span_context()
        return SpanRecord(
            trace_id=format(context.trace_id if context else 0, "032x"),
            span_id=format(context.span_id if context else 0, "016x"),
            parent_id=format(span.parent.span_id, "016x") if span.parent else None,
            name=span.name,
            service=self._service,
            instance=self._instance,
            start_unix_ns=span.start_time or 0,
            end_unix_ns=span.end_time or 0,
            failed=span.status.status_code is StatusCode.ERROR,
            attributes={k: _scalar(v) for k, v in (span.attributes or {}).items()},
        )


def _scalar(value: object) -> AttributeValue:
    return value if isinstance(value, bool | int | float | str) else str(value)
