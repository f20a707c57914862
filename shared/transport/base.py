"""What a stage needs of the data plane.

The sender exposes memory under a lease and goes on with its work. The receiver reserves landing
memory, pulls segment by segment, and releases the lease when everything landed. A lease that nobody
extends expires and its memory is the owner's again. A pull whose end is uncertain never gives its
landing memory back by itself: the buffer stays referenced until the transport has settled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from shared.messages.refs import TensorRef

Buffer = Any
"""Contiguous memory: buffer protocol, `__array_interface__` or `__cuda_array_interface__`."""


@dataclass(frozen=True)
class Segment:
    """Memory to expose. `open` returns the contiguous bytes; it is called when a receiver asks for
    them (and may gather scattered blocks then), in a worker thread; it must be repeatable.

    `open` may raise `TransferError` to answer the receiver with that outcome (NOT_READY, say).
    `is_instant` says that it only hands over memory that lies ready: it is then called on the event
    loop, which saves the hop to a thread.

    `ready` waits, on the event loop, until there is something to open; None: from the start. The
    lease is not held meanwhile. A receiver that would wait for longer than half its time is
    answered NOT_READY, and may ask again.
    """

    num_bytes: int
    open: Callable[[], Buffer]
    is_instant: bool = False
    ready: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class TransportCounters:
    """Totals since start. They prove that tensors moved out of band.

    `bytes_local` were copied within this process, which sent and received nothing for it.
    """

    bytes_sent: int
    bytes_received: int
    bytes_local: int
    transfers_sent: int
    transfers_received: int
    transfers_failed: int
    leases_open: int
    leases_expired: int
    quarantined_bytes: int


class Transport(Protocol):
    """One process' access to the data plane. `async with` starts and stops it."""

    def expose(
        self,
        lease_id: str,
        segments: Iterable[Segment],
        *,
        holders: Iterable[str],
        on_release: Callable[[], None],
    ) -> TensorRef:
        """Offer memory under a new lease for the given holders (request ids).

        `on_release` is called exactly once, from the event loop, when the last holder released, the
        lease was revoked, or it expired; the memory may be reused only then (never while a send of
        it is still in flight). Raises `ValueError` if the lease id is in use.
        """
        ...

    def extend(self, holders: Iterable[str]) -> None:
        """These requests still live: push the expiry of every lease that one of them holds."""
        ...

    def drop(self, holder: str) -> None:
        """This request ended: release all that it still holds here. Idempotent."""
        ...

    def revoke(self, lease_id: str) -> None:
        """Take an exposure back (its request was cancelled, say). Idempotent."""
        ...

    async def pull(self, ref: TensorRef, segment: int, into: Buffer, *, timeout_s: float) -> None:
        """Receive segment `segment` of `ref` into `into`, which must have exactly its size.

        What this process exposes itself is copied in memory, under the same rules.

        Raises `TransferError`. After a failure whose end is uncertain the transport keeps `into`
        referenced (quarantined) until the operation settles; the caller must not reuse that memory
        and simply drops it.
        """
        ...

    async def release(self, ref: TensorRef, holder: str) -> None:
        """Everything landed: the owner may free. Idempotent; a lost release is mended by expiry."""
        ...

    def watch_quarantine(self, callback: Callable[[int], None]) -> None:
        """Call back, from the event loop, with the bytes in quarantine whenever they change."""
        ...

    def counters(self) -> TransportCounters:
        """Totals since start, and what is open now."""
        ...
