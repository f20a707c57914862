"""Runs a worker's stages, and others when it is asked for them, in one process.

In: a worker with its links, and a function that builds the stages of a role. Out: stages that run
until a stop is requested. A switch ends the old stages within a bounded time, drops or keeps what
they loaded, builds the new ones and announces them in one entry; bus, transport and compute thread
stay. Knows nothing of what a stage does; which state a switch is in is `RoleSwitch`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.bus import subjects
from shared.bus.base import Headers
from shared.clock import Clock, monotonic
from shared.errors import BusError, TriptychError
from shared.messages.control import Role, RoleReport, RoleRequest
from shared.runtime.lifecycle import Stop
from shared.runtime.registration import RegistrationHeartbeat
from shared.runtime.role_switch import RoleSwitch
from shared.runtime.role_transport import RoleTransport
from shared.runtime.topology import Stages, name_of
from shared.runtime.worker import Stage, Worker
from shared.telemetry import logs
from shared.telemetry.metrics import TaskMetrics, TransportCollector

LANGUAGE = {Role.PREFILL, Role.DECODE}

logger = logging.getLogger(__name__)

Build = Callable[[Worker], Awaitable[Stage]]


class RoleHost:
    """One process and its present role. `registry` always shows the present role's metrics.

    `finish_s` is what begun work has to end in a switch, and what is exposed to be collected.
    """

    def __init__(
        self,
        worker: Worker,
        build: Build,
        transport: RoleTransport,
        heartbeat: RegistrationHeartbeat,
        *,
        has_tower: bool,
        finish_s: float,
        clock: Clock = monotonic,
    ) -> None:
        self._worker = worker
        self._build = build
        self._transport = transport
        self._heartbeat = heartbeat
        self._finish_s = finish_s
        self._clock = clock
        self._switch = RoleSwitch(worker.me, worker.stages, has_tower=has_tower)
        self._asked = asyncio.Event()
        self.registry = CollectorRegistry()
        self.registry.register(_Present(lambda: self._worker.registry))

    async def run(self, stop: Stop) -> None:
        """Serve, in whichever roles, until a stop is requested."""
        stage = await self._build(self._worker)
        async with self._following_requests():
            if not stop.requested:
                await self._announce()
            while not await self._serve(stage, stop):
                del stage  # its weights may have to make room for the next ones
                stage = await self._change_role()
            await self._heartbeat.update(ready=False)

    async def _announce(self) -> None:
        """The stages take tasks: say both in one entry."""
        stages = self._worker.stages
        await self._heartbeat.update(ready=True, stages=stages)
        logs.log_event(logger, "ready", role=name_of(stages), model=self._worker.model)

    async def _serve(self, stage: Stage, stop: Stop) -> bool:
        """Run the stages until they are to end; whether the process is."""
        role_stop = Stop()
        tasks = [
            asyncio.create_task(stage.run(role_stop), name=name_of(self._worker.stages)),
            asyncio.create_task(stop.wait()),
            asyncio.create_task(self._asked.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stop.requested:
                role_stop.request(stop.reason)
            elif self._switch.is_under_way:
                await self._heartbeat.update(ready=False)
                role_stop.request_role_change("role switch", self._finish_s)
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return stop.requested or not self._switch.is_under_way

    async def _change_role(self) -> Stage:
        """Build and announce the stages that were asked for, or the old ones if that fails."""
        before, after = self._worker.stages, self._switch.target
        assert after is not None, "no switch is under way"
        self._asked.clear()
        self._worker = in_role(self._worker, after)
        self._transport.forget_watchers()
        if not keeps_memory(before, after):
            await self._transport.collected(self._finish_s)
            self._transport.revoke_all()
            await asyncio.to_thread(gc.collect)
        await self._publish(self._switch.drained(self._clock()))
        problem = ""
        try:
            stage = await self._build(self._worker)
        except Exception as error:
            logger.exception("the stages %s cannot be built", name_of(after))
            detail = str(error) if isinstance(error, TriptychError) else type(error).__name__
            problem = f"{name_of(after)} cannot be built: {detail}"
            self._worker = in_role(self._worker, before)
            stage = await self._build(self._worker)
        await self._announce()
        await self._end_switch(problem)
        return stage

    async def _end_switch(self, problem: str) -> None:
        if problem:
            await self._publish(self._switch.failed(problem, self._clock()))
            return
        report = self._switch.built(self._clock())
        logs.log_event(
            logger,
            logs.ROLE_CHANGED,
            stages=",".join(report.stages),
            drain_s=round(report.drain_s, 3),
            build_s=round(report.build_s, 3),
        )
        await self._publish(report)

    @asynccontextmanager
    async def _following_requests(self) -> AsyncIterator[None]:
        subscription = await self._worker.bus.subscribe(
            subjects.ROLE, RoleRequest, self._on_request
        )
        try:
            yield
        finally:
            await subscription.close()

    async def _on_request(self, request: RoleRequest, headers: Headers) -> None:
        was_under_way = self._switch.is_under_way
        report = self._switch.asked(request, self._clock())
        if report is None:
            return
        if self._switch.is_under_way and not was_under_way:
            self._asked.set()
        await self._publish(report)

    async def _publish(self, report: RoleReport) -> None:
        """A report that is lost comes with the next copy of the request."""
        with contextlib.suppress(BusError):
            await self._worker.bus.publish(subjects.ROLE_REPORTS, report)


def in_role(worker: Worker, stages: Stages) -> Worker:
    """The same process in another role, with metrics of its own."""
    registry = CollectorRegistry()
    registry.register(TransportCollector(worker.transport.counters))
    return replace(worker, stages=stages, registry=registry, metrics=TaskMetrics.create(registry))


def keeps_memory(before: Stages, after: Stages) -> bool:
    """Whether all that the old stages may have exposed outlives them: the language model and its
    KV cache do where the new stages use them, an encoder's embeddings do not."""
    return Role.ENCODE not in before and bool(LANGUAGE & set(before) and LANGUAGE & set(after))


class _Present(Collector):
    """Whatever the present registry collects."""

    def __init__(self, registry: Callable[[], CollectorRegistry]) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        yield from self._registry().collect()
