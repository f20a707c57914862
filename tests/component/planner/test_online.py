"""The online planner over the in-memory bus: it sees queues and waiting, and asks the right worker.

The workers are stand-ins that register, and answer a role request as the real ones do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from prometheus_client import CollectorRegistry

from services.planner.online.decision import Policy, Switch
from services.planner.online.load import Targets
from services.planner.online.metrics import PlannerMetrics
from services.planner.online.observer import Observer
from services.planner.online.planner import Actuator, Planner
from shared.bus import subjects
from shared.bus.base import Headers
from shared.bus.memory_bus import MemoryBus
from shared.messages.control import Role, RolePhase, RoleReport, RoleRequest
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.telemetry import SpanBatch, SpanRecord
from shared.messages.work import PrefillTask
from shared.runtime.registration import RegistrationHeartbeat
from shared.runtime.role_control import request_switch
from shared.telemetry import names
from tests.support.registrations import registered

MODEL = "m"
E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
POLICY = Policy(Targets({E: 4.0, P: 4.0, D: 16.0}, wait_s=1.0), hold_s=0.0, cooldown_s=1000.0)


class StandIn:
    """A worker of which only the registration and the answers to role requests exist."""

    def __init__(self, bus: MemoryBus, name: str, *stages: Role, model: str = MODEL) -> None:
        self._bus = bus
        self.me = WorkerRef(name=name, incarnation=1)
        registration = registered(self.me, *stages, model=model)
        self.heartbeat = RegistrationHeartbeat(bus, registration, ttl_s=60.0)
        self.refuses = False
        self.asked: list[tuple[Role, ...]] = []

    async def answer(self, request: RoleRequest, headers: Headers) -> None:
        if request.worker != self.me:
            return
        self.asked.append(request.stages)
        phase = RolePhase.REFUSED_PART if self.refuses else RolePhase.DONE
        await self._bus.publish(
            subjects.ROLE_REPORTS,
            RoleReport(
                switch_id=request.switch_id,
                worker=self.me,
                phase=phase,
                stages=request.stages,
                detail="no weights",
            ),
        )


class Stage:
    """The planner and the workers around it."""

    def __init__(self, bus: MemoryBus, observer: Observer, workers: dict[str, StandIn]) -> None:
        self.bus, self.observer, self.workers = bus, observer, workers
        self.registry = CollectorRegistry()
        self._metrics = PlannerMetrics.create(self.registry)

    def planner(self, *, advises: bool = False) -> Planner:
        async def act(switch: Switch) -> object:
            return await request_switch(
                self.bus, self.observer.directory, switch.worker, switch.after
            )

        actuator: Actuator | None = None if advises else act
        return Planner(self.observer, POLICY, self._metrics, act=actuator, max_workers=8)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"triptych_planner_{name}", labels)

    async def queue_prompts(self, count: int) -> None:
        queue = await self.bus.work_queue(subjects.work(P, MODEL), PrefillTask)
        for number in range(count):
            await queue.put(PrefillTask(request=prompt(number)), message_id=str(number))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    bus = MemoryBus()
    workers = {
        name: StandIn(bus, name, *stages)
        for name, stages in {"e0": (E,), "e1": (E,), "e2": (E,), "p0": (P,), "d0": (D,)}.items()
    }
    other = StandIn(bus, "other", E, model="another")
    async with AsyncExitStack() as scope:
        for worker in (*workers.values(), other):
            await scope.enter_async_context(worker.heartbeat)
            await bus.subscribe(subjects.ROLE, RoleRequest, worker.answer)
        observer = await scope.enter_async_context(Observer(bus, MODEL, ttl_s=60.0, window_s=60.0))
        await until_seen(observer, 5)
        yield Stage(bus, observer, workers)
    await bus.close()


async def until_seen(observer: Observer, count: int) -> None:
    """Registrations are followed in the background."""
    async with asyncio.timeout(10.0):
        while len((await observer.look()).workers) != count:
            await asyncio.sleep(0.01)


def prompt(number: int) -> RequestDescriptor:
    now_s = time.time()
    return RequestDescriptor(
        request_id=f"r{number}",
        attempt=0,
        gateway=WorkerRef(name="gateway", incarnation=1),
        model=MODEL,
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        created_unix_s=now_s,
        deadline_unix_s=now_s + 60,
    )


def waited(instance: str, seconds: float) -> SpanRecord:
    return SpanRecord(
        trace_id="0" * 32,
        span_id="0" * 16,
        parent_id=None,
        name=names.queue_span("prefill"),
        service="s",
        instance=instance,
        start_unix_ns=0,
        end_unix_ns=int(seconds * 1e9),
    )


async def test_a_full_queue_brings_a_worker_of_an_idle_stage(stage: Stage) -> None:
    planner = stage.planner()
    assert await planner.step() is None
    await stage.queue_prompts(20)
    switch = await planner.step()
    assert switch is not None
    assert (switch.before, switch.after) == ((E,), (P,))
    assert stage.workers[switch.worker].asked == [(P,)]
    assert stage.metric("switches_total", stage="prefill", outcome="done") == 1
    assert stage.metric("queue_depth", stage="prefill") == 20
    assert stage.metric("stage_load", stage="prefill") == 5
    # Peace, although the stand-in never registered its new role.
    assert await planner.step() is None


async def test_a_refusal_is_counted_and_remembered(stage: Stage) -> None:
    for worker in stage.workers.values():
        worker.refuses = True
    planner = stage.planner()
    await stage.queue_prompts(20)
    assert await planner.step() is not None
    assert stage.metric("switches_total", stage="prefill", outcome="refused") == 1
    assert await planner.step() is None


async def test_advice_moves_nobody(stage: Stage) -> None:
    planner = stage.planner(advises=True)
    await stage.queue_prompts(20)
    assert await planner.step() is None
    assert stage.metric("desired_workers", stage="prefill") == 5
    assert stage.metric("desired_workers", stage="decode") == 1
    assert all(not worker.asked for worker in stage.workers.values())


async def test_waiting_counts_where_it_was_ours(stage: Stage) -> None:
    await stage.queue_prompts(1)
    spans = (waited("p0", 2.0), waited("p0", 4.0), waited("other", 99.0))
    await stage.bus.publish(subjects.SPANS, SpanBatch(spans=spans))
    async with asyncio.timeout(10.0):
        while not (observed := await stage.observer.look()).waits_s[P]:
            await asyncio.sleep(0.01)
    assert observed.waits_s == {E: 0.0, P: 3.0, D: 0.0}
    assert observed.depths == {E: 0, P: 1, D: 0}
    assert {each.name for each in observed.workers} == set(stage.workers)


async def test_a_worker_that_is_not_ready_is_not_counted(stage: Stage) -> None:
    await stage.workers["e2"].heartbeat.update(ready=False)
    await until_seen(stage.observer, 4)
    observed = await stage.observer.look()
    assert {each.name for each in observed.workers} == {"e0", "e1", "p0", "d0"}
