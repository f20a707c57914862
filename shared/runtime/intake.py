"""From a work queue to running coroutines: takes tasks when there is room, one coroutine each.

In: a work queue, a `serve` coroutine, and the stage's answer to "is there room?". Out: every
delivery ends in exactly one of: acknowledged (its result is safe, its failure was reported, or
nobody wants it), or given back to the queue (this process stops, or changes its role). A task that
waits or runs long keeps its claim by in-progress heartbeats. Knows neither models nor memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from shared.bus.base import Delivery, WorkQueue
from shared.clock import Clock, wall
from shared.errors import BusError, FailureKind, RequestFailed, TriptychError
from shared.messages.work import Origin, Task
from shared.runtime.cancellations import Cancellations
from shared.runtime.events import EventSink
from shared.runtime.lifecycle import Stop
from shared.runtime.signal import Signal
from shared.telemetry import tracing
from shared.telemetry.metrics import TaskMetrics

logger = logging.getLogger(__name__)

TAKE_TIMEOUT_S = 1.0
BUS_RETRY_S = 0.5
LEAVE_S = 1.0
"""What a stage has, beyond the time to finish, to move answers to other workers."""

T = TypeVar("T", bound=Task)


class Ticket:
    """A running task's link back to the intake: `admit()` lets the next task be looked at.

    Until a task is admitted (memory reserved) it stands at the head of the line, so that a large
    request is never overtaken for ever by small ones. Once work on it `began`, a process that
    changes its role tries to finish it; before that it is another worker's at once.
    """

    def __init__(self) -> None:
        self._admitted = asyncio.Event()
        self.has_begun = False

    def began(self) -> None:
        """Its computation is under way. Idempotent."""
        self.has_begun = True

    def admit(self) -> None:
        """Memory is reserved. Idempotent."""
        self._admitted.set()

    async def wait_admitted(self) -> None:
        """Wait until the task has its memory, or has ended without it."""
        await self._admitted.wait()


Serve = Callable[[T, Ticket], Awaitable[None]]


class Intake(Generic[T]):
    """Runs `serve(task, ticket)` for each task of a queue.

    `has_room` says whether the stage would take another task now; it is asked again after every
    `room.notify()`, which the intake itself calls whenever a task ends.
    """

    def __init__(
        self,
        queue: WorkQueue[T],
        serve: Serve[T],
        *,
        stage: str,
        has_room: Callable[[], bool],
        room: Signal,
        events: EventSink,
        cancellations: Cancellations,
        metrics: TaskMetrics,
        heartbeat_s: float,
        clock: Clock = wall,
    ) -> None:
        self._queue = queue
        self._serve = serve
        self._stage = stage
        self._has_room = has_room
        self._room = room
        self._events = events
        self._cancellations = cancellations
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], Ticket] = {}
        self._held: dict[str, Delivery[T]] = {}

    @property
    def num_held(self) -> int:
        """Tasks taken and not yet ended."""
        return len(self._held)

    async def run(self, stop: Stop, drain_s: float) -> None:
        """Take tasks until a stop is requested, then wait up to `drain_s` for those that run.

        Where the process only changes its role, it waits for what has begun, as long as `stop`
        says.
        """
        heartbeat = asyncio.create_task(self._beat(), name=f"{self._stage} heartbeats")
        take = asyncio.create_task(self._take_all(), name=f"{self._stage} intake")
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([take, stopped, heartbeat], return_when=asyncio.FIRST_COMPLETED)
            for task in (take, heartbeat):
                if task.done() and not stop.requested:
                    task.result()  # raises what broke it
            take.cancel()
            if stop.finish_s is not None:
                drain_s = stop.finish_s + LEAVE_S
                await _cancel_all([t for t, ticket in self._tasks.items() if not ticket.has_begun])
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=drain_s)
        finally:
            await _cancel_all([take, stopped, *self._tasks])
            await _cancel_all([heartbeat])

    async def _take_all(self) -> None:
        while True:
            await self._room.until(self._has_room)
            try:
                # One at a time: a worker that took several would keep them from an idle sibling.
                deliveries = await self._queue.take(1, TAKE_TIMEOUT_S)
            except BusError as error:
                logger.warning("%s: cannot take tasks, trying again: %s", self._stage, error)
                await asyncio.sleep(BUS_RETRY_S)
                continue
            for delivery in deliveries:
                await self._start(delivery)

    async def _start(self, delivery: Delivery[T]) -> None:
        ticket = Ticket()
        key = delivery.message.key
        if key in self._held:
            # The claim lapsed while the work went on here (a pause of this process or of the bus).
            # The new delivery stands for the same work; a second copy would fail the first.
            self._held[key] = delivery
            return
        self._held[key] = delivery
        self._metrics.queue_s.labels(self._stage).observe(delivery.queued_s)
        self._metrics.running.labels(self._stage).set(len(self._held))
        if delivery.num_delivered > 1:
            self._metrics.redeliveries.labels(self._stage).inc()
        task = asyncio.create_task(self._run_one(delivery, ticket))
        self._tasks[task] = ticket
        task.add_done_callback(self._forget)
        await ticket.wait_admitted()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    async def _run_one(self, first: Delivery[T], ticket: Ticket) -> None:
        task, origin = first.message, first.message.origin
        this = asyncio.current_task()
        assert this is not None
        cancelled_by_client = False

        def cancel() -> None:
            nonlocal cancelled_by_client
            cancelled_by_client = True
            this.cancel()

        unwatch = self._cancellations.watch(origin.request_id, origin.attempt, cancel)
        try:
            with tracing.attached(first.headers):
                tracing.record_queue_span(self._stage, first.queued_s)
                await self._serve_or_fail(task, ticket)
        except asyncio.CancelledError:
            if not cancelled_by_client:
                await _quietly(self._held[task.key].nak())
                raise
            await _quietly(self._held[task.key].ack())
        finally:
            unwatch()
            ticket.admit()
            del self._held[task.key]
            self._metrics.running.labels(self._stage).set(len(self._held))
            self._room.notify()

    async def _serve_or_fail(self, task: T, ticket: Ticket) -> None:
        origin = task.origin
        if self._cancellations.is_cancelled(origin.request_id, origin.attempt):
            await _quietly(self._held[task.key].ack())
            return
        try:
            async with asyncio.timeout(origin.deadline_unix_s - self._clock()):
                await self._serve(task, ticket)
            await _quietly(self._held[task.key].ack())
        except TimeoutError:
            await self._fail(task, _too_late(self._stage))
        except RequestFailed as failure:
            await self._fail(task, failure)
        except BusError as error:
            # The bus itself is in trouble: the task goes back, with more patience each time.
            logger.warning("%s: request %s: %s", self._stage, origin.request_id, error)
            delivery = self._held[task.key]
            await _quietly(delivery.nak(BUS_RETRY_S * 3 ** (delivery.num_delivered - 1)))
        except Exception as error:
            logger.exception("%s: request %s failed", self._stage, origin.request_id)
            detail = str(error) if isinstance(error, TriptychError) else type(error).__name__
            broken = RequestFailed(FailureKind.INTERNAL, f"{self._stage} failed: {detail}")
            await self._report(origin, broken)
            await _quietly(self._held[task.key].reject(f"{type(error).__name__}: {error}"))

    async def _fail(self, task: T, failure: RequestFailed) -> None:
        await self._report(task.origin, failure)
        await _quietly(self._held[task.key].ack())

    async def _report(self, origin: Origin, failure: RequestFailed) -> None:
        if failure.kind is not FailureKind.PREEMPTED:  # it goes on, and the stage counts it
            self._metrics.failures.labels(self._stage, failure.kind.value).inc()
        await self._events.fail(origin, failure)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            for delivery in list(self._held.values()):
                await _quietly(delivery.in_progress())


def _too_late(stage: str) -> RequestFailed:
    return RequestFailed(FailureKind.TIMEOUT, f"the request's deadline passed in {stage}")


async def _quietly(operation: Awaitable[None]) -> None:
    """A lost acknowledgement only means a redelivery, which fencing absorbs."""
    try:
        await operation
    except BusError as error:
        logger.warning("acknowledgement lost: %s", error)


async def _cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
