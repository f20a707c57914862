"""The bus without a server: the same promises as over NATS, inside one process.

Messages pass through the codec as they would on the wire. Several connections share one hub:
`MemoryBus(hub)`; a bus made without one has a hub of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Self, TypeVar

from shared.bus.base import Headers
from shared.bus.memory_hub import MemoryHub, MemorySubscription
from shared.bus.memory_kv import MemoryKeyValue
from shared.bus.memory_objects import MemoryObjects
from shared.bus.memory_queue import MemoryWorkQueue
from shared.errors import ProtocolError
from shared.messages import codec
from shared.messages.base import Message

M = TypeVar("M", bound=Message)

logger = logging.getLogger(__name__)


class MemoryBus:
    """See `shared.bus.base.Bus`."""

    def __init__(self, hub: MemoryHub | None = None) -> None:
        self.hub = hub or MemoryHub()
        self._subscriptions: list[MemorySubscription] = []
        self._key_values: list[MemoryKeyValue] = []

    async def work_queue(self, subject: str, kind: type[M]) -> MemoryWorkQueue[M]:
        return MemoryWorkQueue(self.hub, subject, kind)

    async def publish(self, subject: str, message: Message, headers: Headers | None = None) -> None:
        self.hub.publish(subject, codec.encode(message), dict(headers or {}))

    async def subscribe(
        self, subject: str, kind: type[M], handler: Callable[[M, Headers], Awaitable[None]]
    ) -> MemorySubscription:
        async def on_message(data: bytes, headers: Mapping[str, str]) -> None:
            try:
                message = codec.decode(data, kind)
            except ProtocolError as error:
                logger.warning("event on %s dropped: %s", subject, error)
                return
            await handler(message, headers)

        subscription = self.hub.subscribe(subject, on_message)
        self._subscriptions.append(subscription)
        return subscription

    async def key_value(self, bucket: str, *, ttl_s: float) -> MemoryKeyValue:
        key_value = MemoryKeyValue(self.hub.bucket(bucket, ttl_s))
        self._key_values.append(key_value)
        return key_value

    async def object_store(self, bucket: str, *, ttl_s: float, max_bytes: int) -> MemoryObjects:
        return self.hub.objects(bucket, ttl_s, max_bytes)

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()
        for key_value in self._key_values:
            await key_value.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
