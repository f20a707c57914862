"""The bus over NATS: core subjects for events, JetStream for everything that must not be lost.

Comes in: a server's URL and the limits. It does not know what travels. nats-py reconnects by itself
for as long as it takes; this class then makes again what a restarted server forgot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, Self, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as RawSubscription
from nats.js import JetStreamContext, api

from shared.bus import subjects
from shared.bus.base import Headers
from shared.bus.limits import BusLimits
from shared.bus.nats_delivery import own_headers
from shared.bus.nats_errors import translated
from shared.bus.nats_kv import NatsKeyValue
from shared.bus.nats_objects import NatsObjectStore
from shared.bus.nats_queue import NatsWorkQueue
from shared.bus.nats_streams import ensure_stream
from shared.errors import BusError, ProtocolError
from shared.messages import codec
from shared.messages.base import Message

M = TypeVar("M", bound=Message)

_RECONNECT_WAIT_S = 0.2
_PING_INTERVAL_S = 5
# Room for headers beside the largest message.
_HEADROOM_BYTES = 64 * 1024

logger = logging.getLogger(__name__)


class _Resource(Protocol):
    """A queue, bucket or store that this connection opened."""

    async def reconnected(self) -> None: ...

    async def close(self) -> None: ...


class NatsSubscription:
    """A standing core subscription; `close` is idempotent."""

    def __init__(self, raw: RawSubscription) -> None:
        self._raw: RawSubscription | None = raw

    async def close(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            with translated("unsubscribe"):
                await raw.unsubscribe()


class NatsBus:
    """See `shared.bus.base.Bus`. Made by `connect`, ended by `close`."""

    def __init__(self, client: Client, limits: BusLimits) -> None:
        self._client = client
        self._has_connected = False
        self._limits = limits
        self._jetstream = JetStreamContext(client, timeout=limits.request_timeout_s)
        self._resources: list[_Resource] = []
        self._restoring: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str,
        limits: BusLimits | None = None,
        credentials_file: Path | None = None,
    ) -> Self:
        """Connect as client `name`, trying for `connect_timeout_s`; `url` may be several, with
        commas between. Raises `BusError` without a server that has JetStream.
        """
        limits = limits or BusLimits()
        client = Client()
        bus = cls(client, limits)
        try:
            with translated(f"connect to {url}"):
                await asyncio.wait_for(
                    bus._connect(url, name, credentials_file), limits.connect_timeout_s
                )
        except BusError as error:
            await client.close()
            raise BusError(
                f"no NATS server at {url} within {limits.connect_timeout_s:g} s ({error})"
            ) from error
        bus._has_connected = True
        bus._check_max_payload()
        try:
            await bus._ensure_dead_letters()
        except BusError:
            await client.close()
            raise
        return bus

    async def _connect(self, url: str, name: str, credentials_file: Path | None) -> None:
        await self._client.connect(
            [each.strip() for each in url.split(",")],
            name=name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type]  # fractions work
            ping_interval=_PING_INTERVAL_S,
            pending_size=self._limits.reconnect_buffer_bytes,
            user_credentials=str(credentials_file) if credentials_file else None,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
        )

    async def work_queue(self, subject: str, kind: type[M]) -> NatsWorkQueue[M]:
        queue = NatsWorkQueue(self._client, subject, kind, self._limits)
        await queue.open()
        self._resources.append(queue)
        return queue

    async def publish(self, subject: str, message: Message, headers: Headers | None = None) -> None:
        data = codec.encode(message)
        with translated(f"publish on {subject} ({len(data)} bytes)"):
            await self._client.publish(subject, data, headers=dict(headers) if headers else None)

    async def subscribe(
        self, subject: str, kind: type[M], handler: Callable[[M, Headers], Awaitable[None]]
    ) -> NatsSubscription:
        async def on_message(raw: Msg) -> None:
            try:
                message = codec.decode(raw.data, kind)
            except ProtocolError as error:
                logger.warning("event on %s dropped: %s", raw.subject, error)
                return
            try:
                await handler(message, own_headers(raw.headers))
            except Exception:
                logger.exception("handler of %s failed", raw.subject)

        with translated(f"subscribe to {subject}"):
            raw_subscription = await self._client.subscribe(
                subject,
                cb=on_message,
                pending_msgs_limit=self._limits.subscription_max_msgs,
                pending_bytes_limit=self._limits.subscription_max_bytes,
            )
            # The server must know of the interest before the caller acts on it.
            await self._client.flush()
        return NatsSubscription(raw_subscription)

    async def key_value(self, bucket: str, *, ttl_s: float) -> NatsKeyValue:
        key_value = NatsKeyValue(self._jetstream, bucket, ttl_s, self._limits)
        await key_value.open()
        self._resources.append(key_value)
        return key_value

    async def object_store(self, bucket: str, *, ttl_s: float, max_bytes: int) -> NatsObjectStore:
        store = NatsObjectStore(self._jetstream, bucket, ttl_s, max_bytes, self._limits)
        await store.open()
        self._resources.append(store)
        return store

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._restoring is not None:
            self._restoring.cancel()
        for resource in reversed(self._resources):
            try:
                await resource.close()
            except BusError as error:
                logger.warning("while closing: %s", error)
        with translated("close"):
            if self._client.is_connected:
                await self._client.flush()
            await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _ensure_dead_letters(self) -> None:
        limits = self._limits
        await ensure_stream(
            self._jetstream,
            api.StreamConfig(
                name=subjects.DEAD_LETTER_PREFIX,
                subjects=[f"{subjects.DEAD_LETTER_PREFIX}.>"],
                storage=api.StorageType(limits.storage.value),
                discard=api.DiscardPolicy.OLD,
                max_msgs=limits.dead_max_msgs,
                max_bytes=limits.dead_max_bytes,
                max_age=limits.dead_max_age_s,
                duplicate_window=min(limits.duplicate_window_s, limits.dead_max_age_s),
            ),
        )

    def _check_max_payload(self) -> None:
        needed = codec.MAX_MESSAGE_BYTES + _HEADROOM_BYTES
        if self._client.max_payload < needed:
            logger.warning(
                "the NATS server takes messages of at most %d bytes; Triptych may send %d: "
                "raise max_payload in the server's configuration, or larger requests will fail",
                self._client.max_payload,
                needed,
            )

    async def _restore(self) -> None:
        """Make again what a restarted server forgot, one after the other, until all is there."""
        for again in (self._ensure_dead_letters, *(r.reconnected for r in self._resources)):
            while True:
                try:
                    await again()
                    break
                except BusError as error:
                    logger.warning("after reconnecting, trying again: %s", error)
                    await asyncio.sleep(_RECONNECT_WAIT_S)

    async def _on_error(self, error: Exception) -> None:
        # While disconnected every attempt fails in the same way: said once, when it began.
        is_known = self._client.is_reconnecting or not self._has_connected
        level = logging.DEBUG if is_known else logging.WARNING
        logger.log(level, "NATS: %s", str(error) or type(error).__name__)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            logger.warning("NATS: disconnected")

    async def _on_reconnected(self) -> None:
        logger.info("NATS: reconnected")
        # Not here: the callback runs inside the reconnection that the requests would wait for.
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = asyncio.create_task(self._restore())
