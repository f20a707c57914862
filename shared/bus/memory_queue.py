"""The in-process twin of a work queue: the ledger, plus waiting."""

from __future__ import annotations

import asyncio
import time
from typing import Generic, TypeVar

from shared.bus import subjects
from shared.bus.base import Delivery, Headers
from shared.bus.dead_letters import dead_letter_headers
from shared.bus.memory_hub import MemoryHub
from shared.bus.memory_ledger import Claim
from shared.errors import ProtocolError, QueueFull
from shared.messages import codec
from shared.messages.base import Message

M = TypeVar("M", bound=Message)


class MemoryClaim:
    """An undecoded task and the ways to end it; each is idempotent."""

    def __init__(self, hub: MemoryHub, subject: str, claim: Claim) -> None:
        self._hub = hub
        self._subject = subject
        self._claim = claim
        self._ended = False
        self.headers: Headers = dict(claim.headers)
        self.num_delivered = claim.num_delivered
        self.queued_s = claim.queued_s

    @property
    def data(self) -> bytes:
        return self._claim.data

    @property
    def is_overdelivered(self) -> bool:
        """Every allowed delivery was used up, and none of them ended the task."""
        return self.num_delivered > self._hub.limits.max_deliver

    async def ack(self) -> None:
        if not self._ended:
            self._ended = True
            self._hub.ledger(self._subject).end(self._claim)

    async def nak(self, delay_s: float = 0.0) -> None:
        if self._ended:
            return
        limit = self._hub.limits.max_deliver
        if self.num_delivered >= limit:
            self.bury(f"given back on delivery {self.num_delivered} of {limit}")
            return
        self._ended = True
        self._hub.ledger(self._subject).give_back(self._claim, self._hub.clock(), delay_s)
        self._hub.work_changed()

    async def in_progress(self) -> None:
        if not self._ended:
            self._hub.ledger(self._subject).restart_timer(self._claim, self._hub.clock())

    async def reject(self, reason: str) -> None:
        self.bury(reason)

    def bury(self, reason: str) -> None:
        """Keep the task as a dead letter and forget it."""
        if self._ended:
            return
        self._ended = True
        headers = dead_letter_headers(self.headers, reason, self.num_delivered)
        self._hub.bury(subjects.dead(self._subject), self.data, headers)
        self._hub.ledger(self._subject).end(self._claim)


class MemoryDelivery(Generic[M]):
    """A decoded task: see `shared.bus.base.Delivery`."""

    def __init__(self, claim: MemoryClaim, message: M) -> None:
        self._claim = claim
        self._message = message

    @property
    def message(self) -> M:
        return self._message

    @property
    def headers(self) -> Headers:
        return self._claim.headers

    @property
    def num_delivered(self) -> int:
        return self._claim.num_delivered

    @property
    def queued_s(self) -> float:
        return self._claim.queued_s

    async def ack(self) -> None:
        await self._claim.ack()

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._claim.nak(delay_s)

    async def in_progress(self) -> None:
        await self._claim.in_progress()

    async def reject(self, reason: str) -> None:
        await self._claim.reject(reason)


class MemoryWorkQueue(Generic[M]):
    """See `shared.bus.base.WorkQueue`."""

    def __init__(self, hub: MemoryHub, subject: str, kind: type[M]) -> None:
        self._hub = hub
        self._subject = subject
        self._kind = kind

    async def put(self, message: M, *, message_id: str, headers: Headers | None = None) -> None:
        data = codec.encode(message)
        ledger = self._hub.ledger(self._subject)
        if not ledger.put(data, headers or {}, message_id, self._hub.clock()):
            raise QueueFull(f"put on {self._subject} ({len(data)} bytes): full ({len(ledger)})")
        self._hub.work_changed()
        await asyncio.sleep(0)  # a real bus lets others run here

    async def take(self, max_count: int, timeout_s: float) -> list[Delivery[M]]:
        deadline_s = time.monotonic() + timeout_s
        ledger = self._hub.ledger(self._subject)
        while True:
            deliveries: list[Delivery[M]] = []
            for claim in ledger.take(max_count, self._hub.clock()):
                if (delivery := self._delivery(claim)) is not None:
                    deliveries.append(delivery)
            remaining_s = deadline_s - time.monotonic()
            if deliveries or remaining_s <= 0:
                return deliveries
            due_s = ledger.next_due_s()
            until_due_s = due_s - self._hub.clock() if due_s is not None else remaining_s
            await self._hub.wait_for_work(max(min(remaining_s, until_due_s), 0.001))

    async def depth(self) -> int:
        return len(self._hub.ledger(self._subject))

    def _delivery(self, raw: Claim) -> MemoryDelivery[M] | None:
        claim = MemoryClaim(self._hub, self._subject, raw)
        if claim.is_overdelivered:
            claim.bury(f"not ended by any of {self._hub.limits.max_deliver} deliveries")
            return None
        try:
            return MemoryDelivery(claim, codec.decode(claim.data, self._kind))
        except ProtocolError as error:
            claim.bury(str(error))
            return None
