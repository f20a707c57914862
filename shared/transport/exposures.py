"""An owner's exposed memory: leases, their segments and what to do when one is free again.

In: exposures, releases, requests of receivers, the time. Out: segments to send, `on_release` calls.
Knows nothing of how bytes travel; both transports answer their receivers with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shared.clock import Clock
from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Segment
from shared.transport.lease import LeaseBook

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a receiver believes it is about to read."""

    owner: WorkerRef
    compatibility: str
    lease_id: str
    segment: int
    num_bytes: int


@dataclass(frozen=True)
class _Exposure:
    segments: tuple[Segment, ...]
    on_release: Callable[[], None]


class Exposures:
    """Everything one owner offers. `address` is where its transport listens."""

    def __init__(self, me: WorkerRef, compatibility: str, *, lease_s: float) -> None:
        self._me = me
        self._compatibility = compatibility
        self._leases = LeaseBook(lease_s)
        self._exposed: dict[str, _Exposure] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def num_open(self) -> int:
        """Leases that may still be pulled."""
        return self._leases.num_open

    @property
    def num_expired(self) -> int:
        """Leases that lapsed since start."""
        return self._leases.num_expired

    def open(
        self,
        lease_id: str,
        segments: Iterable[Segment],
        *,
        holders: Iterable[str],
        on_release: Callable[[], None],
        address: bytes,
        now: float,
    ) -> TensorRef:
        """Offer memory under a new lease. Raises `ValueError` if the id is in use."""
        exposure = _Exposure(tuple(segments), on_release)
        ref = TensorRef(
            owner=self._me,
            address=address,
            lease_id=lease_id,
            compatibility=self._compatibility,
            segment_bytes=tuple(segment.num_bytes for segment in exposure.segments),
        )
        self._leases.open(lease_id, holders, now)
        self._exposed[lease_id] = exposure
        return ref

    def extend(self, holders: Iterable[str], now: float) -> None:
        """Push the expiry of every lease that one of these holders holds."""
        self._leases.extend(holders, now)

    def release(self, lease_id: str, holder: str) -> None:
        """One holder is done."""
        if self._leases.release(lease_id, holder):
            self._free(lease_id)

    def drop(self, holder: str) -> None:
        """One holder is done with all that it holds."""
        for lease_id in self._leases.drop(holder):
            self._free(lease_id)

    def revoke(self, lease_id: str) -> None:
        """Take an exposure back."""
        if self._leases.revoke(lease_id):
            self._free(lease_id)

    def revoke_all(self) -> None:
        """The owner stops."""
        for lease_id in tuple(self._exposed):
            self.revoke(lease_id)

    def expire(self, now: float) -> None:
        """Close the leases whose time passed."""
        for lease_id in self._leases.expire(now):
            self._free(lease_id)

    def begin_send(self, asked: Asked, now: float) -> Segment:
        """Admit a receiver and hold the memory until `end_send`. Raises `TransferError`."""
        if asked.owner != self._me:
            raise TransferError(
                Outcome.VERSION, f"{_name(asked.owner)} was asked for, this is {_name(self._me)}"
            )
        if asked.compatibility != self._compatibility:
            raise TransferError(
                Outcome.INCOMPATIBLE,
                f"the receiver has {asked.compatibility}, the owner {self._compatibility}",
            )
        self._leases.begin_send(asked.lease_id, now)
        segments = self._exposed[asked.lease_id].segments
        if asked.segment < len(segments):
            segment = segments[asked.segment]
            if segment.num_bytes == asked.num_bytes:
                return segment
        self.end_send(asked.lease_id)
        raise TransferError(
            Outcome.INTERNAL,
            f"lease {asked.lease_id} has no segment {asked.segment} of {asked.num_bytes} bytes",
        )

    async def until_ready(
        self, asked: Asked, segment: Segment, *, timeout_s: float, clock: Clock
    ) -> None:
        """Wait until an admitted segment can be opened; the memory is not held meanwhile.

        Raises `TransferError` if that takes too long or the lease is over; the memory is not held
        then, and no `end_send` is due.
        """
        if segment.ready is None:
            return
        self.end_send(asked.lease_id)
        waiting = asyncio.ensure_future(segment.ready())
        self._waiting.add(waiting)
        try:
            done, _ = await asyncio.wait((waiting,), timeout=timeout_s)
        finally:
            self._waiting.discard(waiting)
            waiting.cancel()
        if not done:
            raise TransferError(
                Outcome.NOT_READY, f"segment {asked.segment} was not ready within {timeout_s} s"
            )
        if waiting.cancelled():
            raise TransferError(Outcome.CANCELLED, f"{self._me.name} stops")
        waiting.result()
        self.begin_send(asked, clock())

    def stop_waiting(self) -> None:
        """The owner stops: whoever waits for a segment is refused."""
        for waiting in self._waiting:
            waiting.cancel()

    def end_send(self, lease_id: str) -> None:
        """The memory is no longer being read by this send."""
        if self._leases.end_send(lease_id):
            self._free(lease_id)

    def _free(self, lease_id: str) -> None:
        exposure = self._exposed.pop(lease_id)
        try:
            exposure.on_release()
        except Exception:
            # One owner's mistake must not stop the sends and expiries of all others.
            logger.exception("on_release of lease %s failed", lease_id)


def _name(worker: WorkerRef) -> str:
    return f"{worker.name}#{worker.incarnation}"
