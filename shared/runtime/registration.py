"""A worker's sign of life: its registration, put again and again while it lives.

Comes in: the registration and its lifetime. Goes out: an entry in the `workers` bucket under its
name, one per process, whichever stages that hosts. A clean exit deletes the entry; after a crash it
lapses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from shared.bus import subjects
from shared.bus.base import Bus, KeyValue
from shared.errors import BusError, ProtocolError
from shared.messages import codec
from shared.messages.control import Registration, Role
from shared.runtime.keep_running import keep_running

BEATS_PER_TTL = 3

logger = logging.getLogger(__name__)


def registration_key(registration: Registration) -> str:
    """Where a registration is kept; a later life of the same worker replaces it."""
    return registration.worker.name


class RegistrationHeartbeat:
    """Registers while its `async with` is open."""

    def __init__(self, bus: Bus, registration: Registration, *, ttl_s: float) -> None:
        self._bus = bus
        self._registration = registration
        self._ttl_s = ttl_s
        self._bucket: KeyValue | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def registration(self) -> Registration:
        """What is being announced now."""
        return self._registration

    async def __aenter__(self) -> Self:
        self._bucket = await self._bus.key_value(subjects.WORKERS_BUCKET, ttl_s=self._ttl_s)
        await self._put(self._bucket)
        bucket = self._bucket
        self._task = asyncio.create_task(
            keep_running(lambda: self._beat(bucket), "registration heartbeat")
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._bucket is not None:
            await self._withdraw(self._bucket)

    async def update(
        self,
        *,
        ready: bool | None = None,
        stages: tuple[Role, ...] | None = None,
        capacity: Mapping[str, int] | None = None,
    ) -> None:
        """Announce a change at once, all of it in one entry. A bus that is away hears it with the
        next heartbeat."""
        changes: dict[str, object] = {}
        if stages is not None:
            changes["stages"] = stages
        if ready is not None:
            changes["ready"] = ready
        if capacity is not None:
            changes["capacity"] = dict(capacity)
        self._registration = self._registration.model_copy(update=changes)
        if self._bucket is not None:
            await self._try_put(self._bucket)

    async def _beat(self, bucket: KeyValue) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / BEATS_PER_TTL)
            await self._try_put(bucket)

    async def _try_put(self, bucket: KeyValue) -> None:
        try:
            await self._put(bucket)
        except BusError as error:
            logger.warning("registration not renewed: %s", error)

    async def _put(self, bucket: KeyValue) -> None:
        await bucket.put(registration_key(self._registration), codec.encode(self._registration))

    async def _withdraw(self, bucket: KeyValue) -> None:
        """Delete the entry, unless a later life of this worker has put its own meanwhile."""
        key = registration_key(self._registration)
        try:
            data = await bucket.get(key)
            if data is None:
                return
            if codec.decode(data, Registration).worker == self._registration.worker:
                await bucket.delete(key)
        except (BusError, ProtocolError) as error:
            logger.warning("registration not withdrawn, it will lapse: %s", error)
