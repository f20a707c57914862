"""A transport that fails as it is told: for stages whose neighbours misbehave."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from shared.errors import Outcome, TransferError
from shared.messages.refs import TensorRef
from shared.transport.base import Buffer, Segment, Transport, TransportCounters

HANG = "hang"
"""A completion that never arrives: the pull ends with its deadline."""


class FaultyTransport:
    """Passes everything on, but the next pulls meet what `faults` holds, one each.

    An `Outcome` fails the pull at once, `HANG` lets it wait for its deadline, None lets it through.
    While `loses_releases` is set, releases do not reach the owner.
    """

    def __init__(self, inner: Transport, faults: Iterable[Outcome | str | None] = ()) -> None:
        self.inner = inner
        self.faults = deque(faults)
        self.loses_releases = False
        self.num_pulls = 0

    def expose(
        self,
        lease_id: str,
        segments: Iterable[Segment],
        *,
        holders: Iterable[str],
        on_release: Callable[[], None],
    ) -> TensorRef:
        return self.inner.expose(lease_id, segments, holders=holders, on_release=on_release)

    def extend(self, holders: Iterable[str]) -> None:
        self.inner.extend(holders)

    def revoke(self, lease_id: str) -> None:
        self.inner.revoke(lease_id)

    async def pull(self, ref: TensorRef, segment: int, into: Buffer, *, timeout_s: float) -> None:
        self.num_pulls += 1
        fault = self.faults.popleft() if self.faults else None
        if fault == HANG:
            await asyncio.sleep(timeout_s)
            raise TransferError(Outcome.INTERNAL, f"nothing came within {timeout_s} s")
        if isinstance(fault, Outcome):
            raise TransferError(fault, "as the test told")
        await self.inner.pull(ref, segment, into, timeout_s=timeout_s)

    async def release(self, ref: TensorRef, holder: str) -> None:
        if not self.loses_releases:
            await self.inner.release(ref, holder)

    def watch_quarantine(self, callback: Callable[[int], None]) -> None:
        self.inner.watch_quarantine(callback)

    def counters(self) -> TransportCounters:
        return self.inner.counters()
