"""The live workers of the system, followed through the `workers` bucket.

Comes in: the bucket's changes and the local clock. Goes out: who lives, and a call for each worker
that was lost. It does not know what its callers do about a loss. All decisions are in `Roster`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self

from shared.bus import subjects
from shared.bus.base import Bus, KeyValue, KeyValueEntry
from shared.clock import Clock, monotonic
from shared.errors import ProtocolError
from shared.messages import codec
from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef
from shared.runtime.keep_running import keep_running
from shared.runtime.roster import LostWorker, Roster
from shared.runtime.signal import Signal
from shared.runtime.topology import name_of

_SWEEPS_PER_TTL = 10

logger = logging.getLogger(__name__)

OnLost = Callable[[LostWorker], Awaitable[None]]


class WorkerDirectory:
    """Follows registrations while its `async with` is open. `model` limits it to one model's."""

    def __init__(
        self,
        bus: Bus,
        *,
        ttl_s: float,
        model: str | None = None,
        on_lost: OnLost | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self._bus = bus
        self._ttl_s = ttl_s
        self._model = model
        self._on_lost = on_lost
        self._clock = clock
        self._roster = Roster(ttl_s)
        self._changed = Signal()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        bucket = await self._bus.key_value(subjects.WORKERS_BUCKET, ttl_s=self._ttl_s)
        self._tasks = [
            asyncio.create_task(keep_running(lambda: self._follow(bucket), "worker directory")),
            asyncio.create_task(keep_running(self._sweep, "worker directory sweep")),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def live(
        self, role: Role | None = None, model: str | None = None, *, ready_only: bool = False
    ) -> list[Registration]:
        """Registered workers that host that stage of that model (None: any)."""
        return self._roster.live(role, model or self._model, ready_only=ready_only)

    def is_served(self, role: Role) -> bool:
        """Whether a live and ready worker hosts this stage."""
        return bool(self.live(role, ready_only=True))

    def is_gone(self, worker: WorkerRef) -> bool:
        """Whether this life of the worker is over: it lapsed, left, or a newer life began."""
        return self._roster.is_gone(worker)

    async def wait_until_served(self, roles: Iterable[Role]) -> None:
        """Return when each role has a live and ready worker."""
        wanted = list(roles)
        await self.until(lambda: all(self.is_served(role) for role in wanted))

    async def until(self, ready: Callable[[], bool]) -> None:
        """Return when this is so; it is looked at after every change of a registration."""
        await self._changed.until(ready)

    async def _follow(self, bucket: KeyValue) -> None:
        async with aclosing(bucket.watch()) as watch:
            async for entry in watch:
                await self._tell(self._lost_by(entry))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / _SWEEPS_PER_TTL)
            await self._tell(self._roster.expire(self._clock()))

    def _lost_by(self, entry: KeyValueEntry) -> list[LostWorker]:
        if entry.value is None:
            return self._roster.withdrawn(entry.key)
        try:
            registration = codec.decode(entry.value, Registration)
        except ProtocolError as error:
            logger.warning("registration %s not understood: %s", entry.key, error)
            return []
        return self._roster.heard(entry.key, registration, self._clock())

    async def _tell(self, lost: list[LostWorker]) -> None:
        self._changed.notify()
        for worker in lost:
            name = worker.registration.worker.name
            stages = name_of(worker.registration.stages)
            logger.info("worker %s (%s) %s", name, stages, worker.reason.value)
            if self._on_lost is None:
                continue
            try:
                await self._on_lost(worker)
            except Exception:
                logger.exception("what follows from losing %s failed", name)
