"""One task taken from a JetStream work queue, and the ways to end it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Generic, TypeVar

from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shared.bus import subjects
from shared.bus.base import Headers
from shared.bus.dead_letters import dead_letter_headers
from shared.bus.nats_errors import translated
from shared.errors import BusError
from shared.messages.base import Message

M = TypeVar("M", bound=Message)


class RawTask:
    """An undecoded task. Exactly one of ack, nak or reject ends it; each is idempotent."""

    def __init__(self, raw: Msg, jetstream: JetStreamContext, max_deliver: int) -> None:
        self._raw = raw
        self._jetstream = jetstream
        self._max_deliver = max_deliver
        self._ended = False
        self.headers: Headers = own_headers(raw.headers)
        self.num_delivered = raw.metadata.num_delivered
        self.queued_s = max(0.0, time.time() - raw.metadata.timestamp.timestamp())

    @property
    def data(self) -> bytes:
        return self._raw.data

    @property
    def is_overdelivered(self) -> bool:
        """Every allowed delivery was used up, and none of them ended the task."""
        return self.num_delivered > self._max_deliver

    async def ack(self) -> None:
        """The result is safe with the next hop: forget the task."""
        if self._ended:
            return
        self._ended = True
        with translated(f"ack on {self._raw.subject}"):
            await self._raw.ack()

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give the task back; on its last delivery that is the same as rejecting it."""
        if self._ended:
            return
        if self.num_delivered >= self._max_deliver:
            await self.reject(f"given back on delivery {self.num_delivered} of {self._max_deliver}")
            return
        self._ended = True
        with translated(f"nak on {self._raw.subject}"):
            await self._raw.nak(delay=delay_s or None)

    async def in_progress(self) -> None:
        """Still at work: restart the redelivery timer."""
        if self._ended:
            return
        with translated(f"in-progress on {self._raw.subject}"):
            await self._raw.in_progress()

    async def reject(self, reason: str) -> None:
        """Keep the task as a dead letter, then forget it. If the dead letter cannot be stored the
        task stays in the queue."""
        if self._ended:
            return
        position = self._raw.metadata.sequence.stream
        headers = dead_letter_headers(self.headers, reason, self.num_delivered)
        # Two workers may meet the same overdelivered task: one dead letter is enough.
        headers["Nats-Msg-Id"] = f"{self._raw.metadata.stream}.{position}"
        self._ended = True
        try:
            with translated(f"reject on {self._raw.subject}"):
                await self._jetstream.publish(
                    subjects.dead(self._raw.subject), self._raw.data, headers=headers
                )
                await self._raw.term()
        except BusError:
            self._ended = False
            raise


class NatsDelivery(Generic[M]):
    """A decoded task: see `shared.bus.base.Delivery`."""

    def __init__(self, task: RawTask, message: M) -> None:
        self._task = task
        self._message = message

    @property
    def message(self) -> M:
        return self._message

    @property
    def headers(self) -> Headers:
        return self._task.headers

    @property
    def num_delivered(self) -> int:
        return self._task.num_delivered

    @property
    def queued_s(self) -> float:
        return self._task.queued_s

    async def ack(self) -> None:
        await self._task.ack()

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._task.nak(delay_s)

    async def in_progress(self) -> None:
        await self._task.in_progress()

    async def reject(self, reason: str) -> None:
        await self._task.reject(reason)


def own_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers without those that belong to the server."""
    return {k: v for k, v in (headers or {}).items() if not k.startswith("Nats-")}
