"""A bucket of small values with a lifetime, over JetStream key-value.

A watch survives a reconnect: it starts again from the values that are there, and keys that vanished
in between are reported as deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import nats.js.errors
from nats.js import JetStreamContext, api
from nats.js.kv import KV_DEL, KV_MARKER_REASON, KV_OP, KV_PURGE
from nats.js.kv import KeyValue as Bucket

from shared.bus.base import KeyValueEntry
from shared.bus.limits import BusLimits
from shared.bus.nats_errors import is_settings_conflict, translated
from shared.errors import BusError

# The server reports a lapsed key by a marker that itself lives this long (its minimum).
_LAPSE_MARKER_S = 1.0
_REOPEN_PAUSE_S = 0.2
_DELETIONS = frozenset({KV_DEL, KV_PURGE})
_DELETION_HEADERS = frozenset({KV_OP, KV_MARKER_REASON})

logger = logging.getLogger(__name__)


class NatsKeyValue:
    """See `shared.bus.base.KeyValue`."""

    def __init__(
        self, jetstream: JetStreamContext, bucket: str, ttl_s: float, limits: BusLimits
    ) -> None:
        self._jetstream = jetstream
        self._name = bucket
        self._ttl_s = ttl_s
        self._limits = limits
        self._bucket: Bucket | None = None
        self._watchers: set[Bucket.KeyWatcher] = set()
        self._closed = False

    async def open(self) -> None:
        """Make the bucket if it does not exist."""
        config = api.KeyValueConfig(
            bucket=self._name,
            history=1,
            ttl=self._ttl_s,
            max_bytes=self._limits.kv_max_bytes,
            storage=api.StorageType.MEMORY,
            direct=True,
            limit_marker_ttl=_LAPSE_MARKER_S,
        )
        with translated(f"make bucket {self._name}"):
            try:
                self._bucket = await self._jetstream.create_key_value(config)
            except nats.js.errors.APIError as error:
                if not is_settings_conflict(error):
                    raise
                logger.warning("bucket %s exists with other settings; using them", self._name)
                self._bucket = await self._jetstream.key_value(self._name)

    async def put(self, key: str, value: bytes) -> None:
        with translated(f"put {key} in {self._name} ({len(value)} bytes)"):
            await self._opened().put(key, value)

    async def get(self, key: str) -> bytes | None:
        # Not nats-py's `get`: it takes the server's mark of a lapsed key for an empty value.
        with translated(f"get {key} from {self._name}"):
            try:
                raw = await self._jetstream.get_last_msg(
                    f"KV_{self._name}", f"$KV.{self._name}.{key}", direct=True
                )
            except nats.js.errors.NotFoundError:
                return None
        if _DELETION_HEADERS & set(raw.headers or {}):
            return None
        return raw.data or b""

    async def delete(self, key: str) -> None:
        with translated(f"delete {key} from {self._name}"):
            await self._opened().delete(key)

    async def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        known: set[str] = set()
        while not self._closed:
            watcher = await self._open_watcher()
            try:
                async for entry in self._follow(watcher, known):
                    yield entry
            finally:
                self._watchers.discard(watcher)
                await self._stop(watcher)

    async def reconnected(self) -> None:
        """The connection is new: the consumers behind the watches may be gone."""
        await self.open()
        await self._stop_all()

    async def close(self) -> None:
        """End every watch."""
        self._closed = True
        await self._stop_all()

    def _opened(self) -> Bucket:
        if self._bucket is None:
            raise BusError(f"bucket {self._name} is not open")
        return self._bucket

    async def _open_watcher(self) -> Bucket.KeyWatcher:
        while True:
            try:
                with translated(f"watch {self._name}"):
                    watcher = await self._opened().watchall()
            except BusError as error:
                if self._closed:
                    raise
                logger.warning("watch not opened, trying again: %s", error)
                await asyncio.sleep(_REOPEN_PAUSE_S)
            else:
                self._watchers.add(watcher)
                return watcher

    async def _follow(
        self, watcher: Bucket.KeyWatcher, known: set[str]
    ) -> AsyncGenerator[KeyValueEntry, None]:
        """Entries of one watcher; `known` are the keys that were reported as present so far."""
        present: set[str] | None = set()
        async for update in watcher:
            if update is None:  # nats-py's mark after the values that were there already
                for key in sorted(known - (present or set())):
                    known.discard(key)
                    yield KeyValueEntry(key, None)
                present = None
            elif update.operation in _DELETIONS:
                if present is not None and update.key not in known:
                    continue
                known.discard(update.key)
                yield KeyValueEntry(update.key, None)
            else:
                known.add(update.key)
                if present is not None:
                    present.add(update.key)
                yield KeyValueEntry(update.key, update.value or b"")

    async def _stop_all(self) -> None:
        for watcher in list(self._watchers):
            await self._stop(watcher)

    async def _stop(self, watcher: Bucket.KeyWatcher) -> None:
        try:
            with translated(f"stop watching {self._name}"):
                await watcher.stop()  # type: ignore[no-untyped-call]
        except BusError as error:
            # Already stopped, or the connection is closed: the watch is over either way.
            logger.debug("%s", error)
