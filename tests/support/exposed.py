"""Memory to expose in a test, and what becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import numpy as np

from shared.messages.refs import TensorRef
from shared.transport.base import Segment, Transport
from shared.transport.buffers import ByteArray


def pattern(num_bytes: int, seed: int = 0) -> ByteArray:
    """Bytes that no other seed has."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


class Exposed:
    """One exposure: its reference, its bytes and how often it was released."""

    def __init__(
        self,
        owner: Transport,
        lease_id: str,
        sizes: Iterable[int],
        *,
        holders: Iterable[str] = ("request",),
        before_open: Callable[[], None] = lambda: None,
        is_instant: bool = False,
    ) -> None:
        self.num_releases = 0
        self.released = asyncio.Event()
        self.values = [pattern(size, index) for index, size in enumerate(sizes)]
        self._before_open = before_open
        segments = [
            Segment(value.nbytes, lambda value=value: self._open(value), is_instant)
            for value in self.values
        ]
        self.ref: TensorRef = owner.expose(
            lease_id, segments, holders=holders, on_release=self._on_release
        )

    def _open(self, value: ByteArray) -> ByteArray:
        self._before_open()
        return value

    def _on_release(self) -> None:
        self.num_releases += 1
        self.released.set()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something to become true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        await asyncio.sleep(0.005)
