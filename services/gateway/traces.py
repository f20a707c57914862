"""The newest traces of the whole system, for looking at one request.

In: finished spans, as every process publishes them. Out: all spans of one trace. Bounded twice:
so many traces, and so many spans of each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from services.gateway.settings import TraceSettings
from shared.messages.telemetry import SpanBatch, SpanRecord


class TraceStore:
    """Keeps the traces that were heard of last."""

    def __init__(self, settings: TraceSettings) -> None:
        self._settings = settings
        self._traces: OrderedDict[str, list[SpanRecord]] = OrderedDict()

    async def on_batch(self, batch: SpanBatch, headers: Mapping[str, str]) -> None:
        """The handler of the span subject."""
        for span in batch.spans:
            self.add(span)

    def add(self, span: SpanRecord) -> None:
        """Keep a span; the trace that was silent longest makes room."""
        trace = self._traces.setdefault(span.trace_id, [])
        self._traces.move_to_end(span.trace_id)
        if len(trace) < self._settings.max_spans:
            trace.append(span)
        while len(self._traces) > self._settings.max_traces:
            self._traces.popitem(last=False)

    def get(self, trace_id: str) -> list[SpanRecord] | None:
        """The trace's spans in order of their start, or None if it is not (or no longer) known."""
        trace = self._traces.get(trace_id.lower())
        return None if trace is None else sorted(trace, key=lambda span: span.start_unix_ns)
