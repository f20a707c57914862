"""A work queue as one JetStream stream with work-queue retention and one durable pull consumer.

Comes in: messages and their ids. Goes out: deliveries. It does not know what a task is for. The
server itself never gives a task up (it would stay in the stream unseen): the worker that meets a
task beyond `max_deliver` moves it to the dead letters, so a crash on the last delivery ends there
too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Generic, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from shared.bus.base import Delivery, Headers
from shared.bus.limits import BusLimits
from shared.bus.nats_delivery import NatsDelivery, RawTask
from shared.bus.nats_errors import translated
from shared.bus.nats_pull import PullInbox
from shared.bus.nats_streams import ensure_stream
from shared.errors import BusError, ProtocolError
from shared.messages import codec
from shared.messages.base import Message

M = TypeVar("M", bound=Message)

_CONSUMER = "workers"
_MAX_WAITING_PULLS = 2048
# After the server refused a pull: long enough not to spin, short enough not to be noticed.
_REFUSED_PAUSE_S = 0.1

logger = logging.getLogger(__name__)


class NatsWorkQueue(Generic[M]):
    """See `shared.bus.base.WorkQueue`. Concurrent `take` calls of one object queue up."""

    def __init__(self, client: Client, subject: str, kind: type[M], limits: BusLimits) -> None:
        self._jetstream = JetStreamContext(client, timeout=limits.request_timeout_s)
        self._subject = subject
        self._kind = kind
        self._limits = limits
        self._stream = stream_name(subject)
        self._inbox = PullInbox(client, self._stream, _CONSUMER)
        self._taking = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the stream and its consumer if they do not exist."""
        limits = self._limits
        await ensure_stream(
            self._jetstream,
            api.StreamConfig(
                name=self._stream,
                subjects=[self._subject],
                retention=api.RetentionPolicy.WORK_QUEUE,
                discard=api.DiscardPolicy.NEW,
                storage=api.StorageType(limits.storage.value),
                max_msgs=limits.queue_max_msgs,
                max_bytes=limits.queue_max_bytes,
                max_age=limits.task_max_age_s,
                duplicate_window=limits.duplicate_window_s,
            ),
        )
        with translated(f"open {self._subject}"):
            await self._jetstream.add_consumer(
                self._stream,
                api.ConsumerConfig(
                    durable_name=_CONSUMER,
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=limits.ack_wait_s,
                    max_deliver=-1,
                    max_ack_pending=limits.queue_max_msgs,
                    max_waiting=_MAX_WAITING_PULLS,
                ),
            )

    async def put(self, message: M, *, message_id: str, headers: Headers | None = None) -> None:
        data = codec.encode(message)
        with translated(f"put on {self._subject} ({len(data)} bytes)"):
            await self._jetstream.publish(
                self._subject, data, headers={**(headers or {}), "Nats-Msg-Id": message_id}
            )

    async def take(self, max_count: int, timeout_s: float) -> list[Delivery[M]]:
        deadline_s = time.monotonic() + timeout_s
        async with self._taking:
            try:
                return await self._take_until(deadline_s, max_count)
            except asyncio.CancelledError:
                self._in_background(self._give_back_later())
                raise

    async def _take_until(self, deadline_s: float, max_count: int) -> list[Delivery[M]]:
        while True:
            raws, refusal = await self._inbox.fetch(max_count, deadline_s - time.monotonic())
            # Nothing is awaited from here to the return: see `PullInbox.fetch`.
            deliveries: list[Delivery[M]] = []
            for raw in raws:
                if (delivery := self._delivery(self._task(raw))) is not None:
                    deliveries.append(delivery)
            if deliveries or time.monotonic() >= deadline_s:
                return deliveries
            if refusal is not None:
                await self._recover(refusal)

    async def depth(self) -> int:
        with translated(f"depth of {self._subject}"):
            info = await self._jetstream.stream_info(self._stream)
        return info.state.messages

    async def reconnected(self) -> None:
        """The connection is new: what was asked for on the old one will not come."""
        try:
            await self.open()
        finally:
            self._inbox.interrupt("reconnected")

    async def close(self) -> None:
        """Give back what was received and never taken."""
        await self._inbox.abandon()
        await self._give_back()
        rejections = [task for task in self._background if task.get_name() == "reject"]
        await asyncio.gather(*rejections)
        for task in self._background:
            task.cancel()

    def _task(self, raw: Msg) -> RawTask:
        return RawTask(raw, self._jetstream, self._limits.max_deliver)

    def _delivery(self, task: RawTask) -> NatsDelivery[M] | None:
        if task.is_overdelivered:
            reason = f"not ended by any of {self._limits.max_deliver} deliveries"
        else:
            try:
                return NatsDelivery(task, codec.decode(task.data, self._kind))
            except ProtocolError as error:
                reason = str(error)
        # In the background: `take` must not await while it holds undelivered tasks.
        self._in_background(self._reject(task, reason), name="reject")
        return None

    async def _reject(self, task: RawTask, reason: str) -> None:
        logger.warning("dead letter on %s: %s", self._subject, reason)
        try:
            await task.reject(reason)
        except BusError as error:
            logger.error("dead letter on %s not stored: %s", self._subject, error)

    async def _give_back_later(self) -> None:
        """The next `take` may have what a cancelled one received, but not a stale task that the
        server is about to give to someone else."""
        patience_s = self._limits.ack_wait_s / 4
        await asyncio.sleep(patience_s)
        while not self._inbox.is_empty:
            await self._give_back(patience_s)
            await asyncio.sleep(patience_s)

    async def _give_back(self, min_age_s: float = 0.0) -> None:
        for raw in self._inbox.unfetched(min_age_s):
            try:
                await self._task(raw).nak()
            except BusError as error:
                logger.warning("not given back at once: %s", error)

    def _in_background(self, work: Coroutine[None, None, None], name: str | None = None) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _recover(self, refusal: str) -> None:
        """The server refused a pull; a restart may have forgotten a stream kept in memory."""
        logger.warning("pull on %s ended with status %s", self._subject, refusal)
        await asyncio.sleep(_REFUSED_PAUSE_S)
        if refusal != "reconnected":
            await self.open()


def stream_name(subject: str) -> str:
    """The stream of a work subject; two subjects never share one ('+' is in no subject of ours)."""
    return subject.replace(".", "+")
