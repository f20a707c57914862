"""A process' transport, as the stages of its changing roles see it.

In: a transport. Out: the same one: what stages expose is known here, so that it can be taken back
when their memory goes, and what they watch ends with their role.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from shared.messages.refs import TensorRef
from shared.runtime.signal import Signal
from shared.transport.base import Buffer, Segment, Transport, TransportCounters
from shared.transport.lease import STANDING


class RoleTransport:
    """A `Transport` that outlives roles."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._open: set[str] = set()
        self._held: set[str] = set()  # of these, what others have asked for
        self._released = Signal()
        self._watchers: list[Callable[[int], None]] = []
        self._quarantined_bytes = 0
        inner.watch_quarantine(self._tell_quarantine)

    def forget_watchers(self) -> None:
        """A role is over, and what it watched with it."""
        self._watchers.clear()

    async def collected(self, timeout_s: float) -> None:
        """Wait, bounded, until others have pulled what they asked for: the tasks are done, but
        their results would have to be computed again. Standing offers do not count."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._released.until(lambda: not self._held)

    def revoke_all(self) -> None:
        """Take back whatever is exposed."""
        for lease_id in tuple(self._open):
            self._inner.revoke(lease_id)

    def expose(
        self,
        lease_id: str,
        segments: Iterable[Segment],
        *,
        holders: Iterable[str],
        on_release: Callable[[], None],
    ) -> TensorRef:
        """See `Transport.expose`."""

        def released() -> None:
            self._open.discard(lease_id)
            self._held.discard(lease_id)
            self._released.notify()
            on_release()

        holders = tuple(holders)
        ref = self._inner.expose(lease_id, segments, holders=holders, on_release=released)
        self._open.add(lease_id)
        if STANDING not in holders:
            self._held.add(lease_id)
        return ref

    def extend(self, holders: Iterable[str]) -> None:
        """See `Transport.extend`."""
        self._inner.extend(holders)

    def drop(self, holder: str) -> None:
        """See `Transport.drop`."""
        self._inner.drop(holder)

    def revoke(self, lease_id: str) -> None:
        """See `Transport.revoke`."""
        self._inner.revoke(lease_id)

    async def pull(self, ref: TensorRef, segment: int, into: Buffer, *, timeout_s: float) -> None:
        """See `Transport.pull`."""
        await self._inner.pull(ref, segment, into, timeout_s=timeout_s)

    async def release(self, ref: TensorRef, holder: str) -> None:
        """See `Transport.release`."""
        await self._inner.release(ref, holder)

    def watch_quarantine(self, callback: Callable[[int], None]) -> None:
        """See `Transport.watch_quarantine`; told at once what an earlier role left there."""
        self._watchers.append(callback)
        if self._quarantined_bytes:
            callback(self._quarantined_bytes)

    def counters(self) -> TransportCounters:
        """Of the whole process; see `Transport.counters`."""
        return self._inner.counters()

    def _tell_quarantine(self, num_bytes: int) -> None:
        self._quarantined_bytes = num_bytes
        for watcher in self._watchers:
            watcher(num_bytes)
