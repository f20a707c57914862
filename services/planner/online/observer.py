"""Looks at a running system through its bus: registrations, queues, and the spans of waiting.

Out: an `Observation`. Open it with `async with`. Decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from services.planner.online.load import Observation, WorkerView
from shared.bus import subjects
from shared.bus.base import Bus, Headers, Subscription, WorkQueue
from shared.clock import Clock, monotonic
from shared.messages.control import STAGES, Role
from shared.messages.telemetry import SpanBatch
from shared.messages.work import DecodeTask, EncodeTask, PrefillTask
from shared.runtime.directory import WorkerDirectory
from shared.telemetry import names

TASKS: Mapping[Role, type[Any]] = {
    Role.ENCODE: EncodeTask,
    Role.PREFILL: PrefillTask,
    Role.DECODE: DecodeTask,
}
MAX_WAITS = 4096
"""Of each stage that are remembered at most."""


class Observer:
    """Follows one model's workers, which are in `directory`; `window_s` is how far back waiting
    counts."""

    def __init__(
        self, bus: Bus, model: str, *, ttl_s: float, window_s: float, clock: Clock = monotonic
    ) -> None:
        self._bus = bus
        self._model = model
        self._window_s = window_s
        self._clock = clock
        self.directory = WorkerDirectory(bus, ttl_s=ttl_s, model=model, clock=clock)
        self._queues: dict[Role, WorkQueue[Any]] = {}
        self._subscription: Subscription | None = None
        self._waits: dict[Role, deque[tuple[float, float]]] = {
            stage: deque(maxlen=MAX_WAITS) for stage in STAGES
        }

    async def __aenter__(self) -> Self:
        for stage, kind in TASKS.items():
            subject = subjects.work(stage, self._model)
            self._queues[stage] = await self._bus.work_queue(subject, kind)
        self._subscription = await self._bus.subscribe(subjects.SPANS, SpanBatch, self._on_spans)
        await self.directory.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.directory.__aexit__(kind, error, traceback)
        if self._subscription is not None:
            await self._subscription.close()

    async def look(self) -> Observation:
        """The system now. Raises `BusError` if the bus is away."""
        depths = {stage: await queue.depth() for stage, queue in self._queues.items()}
        ready = self.directory.live(ready_only=True)
        return Observation(
            tuple(WorkerView(each.worker.name, each.stages) for each in ready),
            depths,
            {stage: self._mean_wait_s(stage) for stage in STAGES},
        )

    async def _on_spans(self, batch: SpanBatch, headers: Headers) -> None:
        known = {each.worker.name for each in self.directory.live()}
        now_s = self._clock()
        for span in batch.spans:
            for stage, waits in self._waits.items():
                # Spans do not name a model: those of other models' workers are not ours.
                if span.name == names.queue_span(stage.value) and span.instance in known:
                    waits.append((now_s, span.duration_s))

    def _mean_wait_s(self, stage: Role) -> float:
        waits, now_s = self._waits[stage], self._clock()
        while waits and now_s - waits[0][0] > self._window_s:
            waits.popleft()
        return sum(wait_s for _, wait_s in waits) / len(waits) if waits else 0.0
