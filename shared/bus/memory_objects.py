"""The in-process twin of the object store."""

from __future__ import annotations

from dataclasses import dataclass

from shared.clock import Clock
from shared.errors import ObjectMissing, QueueFull


@dataclass(frozen=True)
class _Object:
    data: bytes
    put_s: float


class MemoryObjects:
    """See `shared.bus.base.ObjectStore`; shared by all connections."""

    def __init__(self, bucket: str, ttl_s: float, max_bytes: int, clock: Clock) -> None:
        self._bucket = bucket
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._objects: dict[str, _Object] = {}

    async def put(self, name: str, data: bytes) -> None:
        self._sweep()
        now_s = self._clock()
        before = self._objects.get(name)
        if before is not None and now_s - before.put_s <= self._ttl_s / 2:
            return
        used = sum(len(o.data) for n, o in self._objects.items() if n != name)
        if used + len(data) > self._max_bytes:
            raise QueueFull(
                f"put {name} in {self._bucket} ({len(data)} bytes): full "
                f"({used} of {self._max_bytes} bytes used)"
            )
        self._objects[name] = _Object(bytes(data), now_s)

    async def get(self, name: str) -> bytes:
        self._sweep()
        stored = self._objects.get(name)
        if stored is None:
            raise ObjectMissing(f"{name} is not in {self._bucket}")
        return stored.data

    def _sweep(self) -> None:
        now_s = self._clock()
        for name in [n for n, o in self._objects.items() if now_s - o.put_s >= self._ttl_s]:
            del self._objects[name]
