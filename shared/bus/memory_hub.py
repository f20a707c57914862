"""The in-process stand-in for a server: what all `MemoryBus` connections to it share."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from shared.bus.limits import BusLimits
from shared.bus.memory_kv import MemoryBucket
from shared.bus.memory_ledger import TaskLedger
from shared.bus.memory_objects import MemoryObjects
from shared.clock import Clock, monotonic

logger = logging.getLogger(__name__)

RawHandler = Callable[[bytes, Mapping[str, str]], Awaitable[None]]


@dataclass(frozen=True)
class StoredDeadLetter:
    """A given-up task as the hub keeps it."""

    subject: str
    data: bytes
    headers: Mapping[str, str]


class MemorySubscription:
    """One listener with its own bounded queue; `close` is idempotent."""

    def __init__(self, hub: MemoryHub, subject: str, handler: RawHandler) -> None:
        self._hub = hub
        self.subject = subject
        self._handler = handler
        self._waiting: asyncio.Queue[tuple[bytes, Mapping[str, str]]] = asyncio.Queue(
            hub.limits.subscription_max_msgs
        )
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._run())

    def offer(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Queue one event; a listener that is too slow loses it."""
        try:
            self._waiting.put_nowait((data, headers))
        except asyncio.QueueFull:
            logger.warning("slow subscriber on %s: event dropped", self.subject)

    async def close(self) -> None:
        task, self._task = self._task, None
        self._hub.subscriptions.discard(self)
        if task is None or task is asyncio.current_task():
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while self._task is not None:
            data, headers = await self._waiting.get()
            try:
                await self._handler(data, headers)
            except Exception:
                logger.exception("handler of %s failed", self.subject)


class MemoryHub:
    """Queues, buckets and listeners by name. `clock` gives seconds; who moves a clock of their own
    calls `clock_moved` so that waiting calls look again."""

    def __init__(self, limits: BusLimits | None = None, clock: Clock = monotonic) -> None:
        self.limits = limits or BusLimits()
        self.clock = clock
        self.subscriptions: set[MemorySubscription] = set()
        self.dead_letters: deque[StoredDeadLetter] = deque(maxlen=self.limits.dead_max_msgs)
        self._ledgers: dict[str, TaskLedger] = {}
        self._buckets: dict[str, MemoryBucket] = {}
        self._objects: dict[str, MemoryObjects] = {}
        self._takers: set[asyncio.Event] = set()

    def ledger(self, subject: str) -> TaskLedger:
        return self._ledgers.setdefault(subject, TaskLedger(self.limits))

    def bucket(self, name: str, ttl_s: float) -> MemoryBucket:
        if name not in self._buckets:
            self._buckets[name] = MemoryBucket(name, ttl_s, self.limits.kv_max_bytes, self.clock)
        return self._buckets[name]

    def objects(self, name: str, ttl_s: float, max_bytes: int) -> MemoryObjects:
        if name not in self._objects:
            self._objects[name] = MemoryObjects(name, ttl_s, max_bytes, self.clock)
        return self._objects[name]

    def subscribe(self, subject: str, handler: RawHandler) -> MemorySubscription:
        subscription = MemorySubscription(self, subject, handler)
        self.subscriptions.add(subscription)
        return subscription

    def publish(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        for subscription in list(self.subscriptions):
            if subject_matches(subscription.subject, subject):
                subscription.offer(data, headers)

    def bury(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Keep a dead letter and tell whoever listens."""
        self.dead_letters.append(StoredDeadLetter(subject, data, headers))
        self.publish(subject, data, headers)

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when some queue changed, or after `timeout_s`."""
        changed = asyncio.Event()
        self._takers.add(changed)
        try:
            # Not `wait_for`, which before Python 3.12 forgets that it was cancelled if the event
            # is set at the same moment.
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            pass
        finally:
            self._takers.discard(changed)

    def work_changed(self) -> None:
        for changed in self._takers:
            changed.set()

    def clock_moved(self) -> None:
        """The injected clock jumped: tasks may be due and values may have lapsed."""
        self.work_changed()
        for bucket in self._buckets.values():
            bucket.sweep()


def subject_matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` is one token, a final `>` is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)
