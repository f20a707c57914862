"""Tasks from a queue to coroutines: each delivery ends exactly once, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from shared.bus import subjects
from shared.bus.base import Headers
from shared.bus.limits import BusLimits
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.errors import FailureKind, RequestFailed
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.events import EventBatch, FailedEvent
from shared.messages.work import PrefillTask
from shared.runtime.cancellations import Cancellations
from shared.runtime.events import EventSink
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.signal import Signal
from shared.telemetry.metrics import TaskMetrics

GATEWAY = WorkerRef(name="gateway", incarnation=1)
SUBJECT = subjects.work(Role.PREFILL, "m")
Serve = Callable[[PrefillTask, Ticket], Awaitable[None]]


def task(name: str, *, deadline_s: float = 30.0) -> PrefillTask:
    now_s = time.time()
    return PrefillTask(
        request=RequestDescriptor(
            request_id=name,
            attempt=0,
            gateway=GATEWAY,
            model="m",
            prompt_token_ids=(1,),
            sampling=SamplingParams(),
            created_unix_s=now_s,
            deadline_unix_s=now_s + deadline_s,
        )
    )


@dataclass
class System:
    hub: MemoryHub
    bus: MemoryBus
    cancellations: Cancellations
    intake: Intake[PrefillTask]
    stop: Stop
    failures: list[FailedEvent] = field(default_factory=list)

    async def put(self, message: PrefillTask) -> None:
        queue = await self.bus.work_queue(SUBJECT, PrefillTask)
        await queue.put(message, message_id=message.request.request_id)

    async def depth(self) -> int:
        return await (await self.bus.work_queue(SUBJECT, PrefillTask)).depth()

    async def until(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not ready():
                await asyncio.sleep(0.005)

    async def drained(self) -> None:
        async with asyncio.timeout(5):
            while await self.depth():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    serve: Serve, *, max_held: int = 8, ack_wait_s: float = 10.0, drain_s: float = 1.0
) -> AsyncIterator[System]:
    hub = MemoryHub(BusLimits(ack_wait_s=ack_wait_s))
    bus = MemoryBus(hub)
    cancellations, stop = Cancellations(), Stop()
    intake: Intake[PrefillTask] = Intake(
        await bus.work_queue(SUBJECT, PrefillTask),
        serve,
        stage="prefill",
        has_room=lambda: intake.num_held < max_held,
        room=Signal(),
        events=EventSink(bus, WorkerRef(name="prefill-0", incarnation=1)),
        cancellations=cancellations,
        metrics=TaskMetrics.create(CollectorRegistry()),
        heartbeat_s=ack_wait_s / 3,
    )
    system = System(hub, bus, cancellations, intake, stop)

    async def on_batch(batch: EventBatch, headers: Headers) -> None:
        system.failures += [e for e in batch.events if isinstance(e, FailedEvent)]

    await bus.subscribe(subjects.events(GATEWAY), EventBatch, on_batch)
    run = asyncio.create_task(intake.run(stop, drain_s))
    try:
        yield system
    finally:
        stop.request("the test is over")
        await run
        await bus.close()


async def test_a_served_task_is_acknowledged() -> None:
    served: list[str] = []

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        served.append(message.request.request_id)

    async with running(serve) as system:
        await system.put(task("a"))
        await system.put(task("b"))
        await system.drained()
    assert served == ["a", "b"]


async def test_a_task_is_not_overtaken_before_it_was_admitted() -> None:
    started: list[str] = []
    admit = asyncio.Event()

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        started.append(message.request.request_id)
        await admit.wait()
        ticket.admit()

    async with running(serve) as system:
        await system.put(task("a"))
        await system.put(task("b"))
        await asyncio.sleep(0.05)
        assert started == ["a"]
        admit.set()
        await system.drained()
    assert started == ["a", "b"]


async def test_a_failure_reaches_the_gateway_and_ends_the_task() -> None:
    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        raise RequestFailed(FailureKind.WORKER_LOST, "gone", retryable=True)

    async with running(serve) as system:
        await system.put(task("a"))
        await system.drained()
    (failure,) = system.failures
    assert (failure.kind, failure.retryable, failure.message) == ("worker_lost", True, "gone")


async def test_a_defect_is_one_typed_event_and_a_dead_letter() -> None:
    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        raise ZeroDivisionError("secret detail")

    async with running(serve) as system:
        await system.put(task("a"))
        await system.drained()
    (failure,) = system.failures
    assert failure.kind is FailureKind.INTERNAL
    assert "secret detail" not in failure.message
    assert len(system.hub.dead_letters) == 1


async def test_a_passed_deadline_is_a_timeout() -> None:
    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        await asyncio.sleep(10)

    async with running(serve) as system:
        await system.put(task("a", deadline_s=0.05))
        await system.drained()
    assert [f.kind for f in system.failures] == [FailureKind.TIMEOUT]


async def test_a_cancelled_request_stops_at_once_and_is_acknowledged() -> None:
    ended = asyncio.Event()

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        ticket.admit()
        try:
            await asyncio.sleep(10)
        finally:
            ended.set()

    async with running(serve) as system:
        await system.put(task("a"))
        await system.until(lambda: system.intake.num_held == 1)
        await asyncio.sleep(0.01)
        system.cancellations.cancel("a", 0)
        await asyncio.wait_for(ended.wait(), 1)
        await system.drained()
    assert system.failures == []


async def test_long_work_keeps_its_claim() -> None:
    starts = 0

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        nonlocal starts
        starts += 1
        ticket.admit()
        await asyncio.sleep(0.6)

    async with running(serve, ack_wait_s=0.2) as system:
        await system.put(task("a"))
        await system.drained()
    assert starts == 1


async def test_a_stop_lets_running_tasks_finish() -> None:
    finished: list[str] = []

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        ticket.admit()
        await asyncio.sleep(0.1)
        finished.append(message.request.request_id)

    async with running(serve) as system:
        await system.put(task("a"))
        await system.until(lambda: system.intake.num_held == 1)
        system.stop.request("test")
    assert finished == ["a"]


async def test_what_does_not_finish_in_time_returns_to_the_queue() -> None:
    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        ticket.admit()
        await asyncio.sleep(10)

    async with running(serve, drain_s=0.05) as system:
        await system.put(task("a"))
        await system.until(lambda: system.intake.num_held == 1)
        system.stop.request("test")
        await system.until(lambda: system.intake.num_held == 0)
        queue = await system.bus.work_queue(SUBJECT, PrefillTask)
        (delivery,) = await queue.take(1, 1.0)
        assert delivery.num_delivered == 2
        await delivery.ack()


async def test_a_second_delivery_of_running_work_replaces_the_first() -> None:
    """The claim lapsed while the work went on: the new delivery is not a second piece of work."""
    starts = 0
    finish = asyncio.Event()

    async def serve(message: PrefillTask, ticket: Ticket) -> None:
        nonlocal starts
        starts += 1
        ticket.admit()
        await finish.wait()

    async with running(serve) as system:
        queue = await system.bus.work_queue(SUBJECT, PrefillTask)
        await queue.put(task("a"), message_id="one")
        await system.until(lambda: system.intake.num_held == 1)
        await queue.put(task("a"), message_id="two")
        await asyncio.sleep(0.05)
        assert starts == 1
        finish.set()
        await system.until(lambda: system.intake.num_held == 0)
    assert starts == 1
    assert system.failures == []
