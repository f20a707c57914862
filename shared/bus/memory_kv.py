"""The in-process twin of a key-value bucket with a lifetime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from shared.bus.base import KeyValueEntry
from shared.clock import Clock
from shared.errors import BusError


@dataclass(frozen=True)
class _Value:
    data: bytes
    put_s: float


class MemoryBucket:
    """Values by key and the queues of those who watch; shared by all connections."""

    def __init__(self, name: str, ttl_s: float, max_bytes: int, clock: Clock) -> None:
        self._name = name
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._values: dict[str, _Value] = {}
        self._watches: set[asyncio.Queue[KeyValueEntry | None]] = set()

    def put(self, key: str, data: bytes) -> None:
        self.sweep()
        others = sum(len(k) + len(v.data) for k, v in self._values.items() if k != key)
        if others + len(key) + len(data) > self._max_bytes:
            raise BusError(f"bucket {self._name} is full ({self._max_bytes} bytes)")
        self._values[key] = _Value(data, self._clock())
        self._tell(KeyValueEntry(key, data))
        # A little late, so that the value has surely lapsed by then.
        asyncio.get_running_loop().call_later(self._ttl_s * 1.01 + 0.001, self.sweep)

    def get(self, key: str) -> bytes | None:
        self.sweep()
        value = self._values.get(key)
        return value.data if value is not None else None

    def delete(self, key: str) -> None:
        if self._values.pop(key, None) is not None:
            self._tell(KeyValueEntry(key, None))

    def sweep(self) -> None:
        """Drop what lapsed and tell the watches."""
        now_s = self._clock()
        for key in [k for k, v in self._values.items() if now_s - v.put_s >= self._ttl_s]:
            del self._values[key]
            self._tell(KeyValueEntry(key, None))

    def add_watch(self) -> asyncio.Queue[KeyValueEntry | None]:
        """A queue that holds the present entries and receives every change; None ends it."""
        self.sweep()
        watch: asyncio.Queue[KeyValueEntry | None] = asyncio.Queue()
        for key, value in self._values.items():
            watch.put_nowait(KeyValueEntry(key, value.data))
        self._watches.add(watch)
        return watch

    def end_watch(self, watch: asyncio.Queue[KeyValueEntry | None]) -> None:
        self._watches.discard(watch)
        watch.put_nowait(None)

    def _tell(self, entry: KeyValueEntry) -> None:
        for watch in self._watches:
            watch.put_nowait(entry)


class MemoryKeyValue:
    """One connection's view of a bucket: see `shared.bus.base.KeyValue`."""

    def __init__(self, bucket: MemoryBucket) -> None:
        self._bucket = bucket
        self._watches: set[asyncio.Queue[KeyValueEntry | None]] = set()

    async def put(self, key: str, value: bytes) -> None:
        self._bucket.put(key, bytes(value))

    async def get(self, key: str) -> bytes | None:
        return self._bucket.get(key)

    async def delete(self, key: str) -> None:
        self._bucket.delete(key)

    async def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        watch = self._bucket.add_watch()
        self._watches.add(watch)
        try:
            while (entry := await watch.get()) is not None:
                yield entry
        finally:
            self._watches.discard(watch)
            self._bucket.end_watch(watch)

    async def close(self) -> None:
        for watch in list(self._watches):
            self._bucket.end_watch(watch)
