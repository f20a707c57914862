"""The lease book: who may still read which exposure, and when its memory is the owner's again.

In: opens, extensions, releases, revocations, sends that begin and end, and the time. Out: the ids
of leases whose memory just became free. Pure: knows no clock, bytes, network or event loop.

A lease is open until its last holder released it, it was revoked, or its time passed. Only an open
lease may be sent; a closed one is freed as soon as no send of it is in flight, and exactly once.
A standing lease is the owner's own offer of what it keeps anyway: it lasts until it is revoked.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from shared.errors import Outcome, TransferError

LEASE_S = 30.0
STANDING = "*"
"""The holder of a standing lease; no request has this id."""
MAX_REMEMBERED = 4096
"""Freed leases whose end is remembered, so that a late receiver learns why it came in vain."""

_ENDS = {
    Outcome.MISSING: "was released by its last holder",
    Outcome.CANCELLED: "was revoked",
    Outcome.EXPIRED: "expired",
}


@dataclass
class _Lease:
    holders: set[str]
    expires_s: float
    num_sends: int = 0
    end: Outcome | None = None
    """None while open; then what a receiver that still asks is told."""


class LeaseBook:
    """All leases of one owner."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        if lease_s <= 0:
            raise ValueError(f"a lease must last longer than {lease_s} s")
        self.lease_s = lease_s
        self.num_expired = 0
        self._leases: dict[str, _Lease] = {}
        self._held_by: dict[str, set[str]] = {}  # holder -> its open leases
        self._ended: OrderedDict[str, Outcome] = OrderedDict()

    def __contains__(self, lease_id: str) -> bool:
        """Whether the lease's memory is still in use: it is open or a send of it is in flight."""
        return lease_id in self._leases

    @property
    def num_open(self) -> int:
        """Leases that may still be sent, standing ones aside."""
        return sum(
            lease.end is None and STANDING not in lease.holders for lease in self._leases.values()
        )

    def open(self, lease_id: str, holders: Iterable[str], now: float) -> None:
        """Start a lease. Raises `ValueError` if the id is in use or nobody holds it."""
        if lease_id in self._leases:
            raise ValueError(f"lease {lease_id} is in use")
        lease = _Lease(set(holders), now + self.lease_s)
        if STANDING in lease.holders:
            lease.expires_s = math.inf
        if not lease.holders:
            raise ValueError(f"lease {lease_id} needs a holder")
        self._leases[lease_id] = lease
        self._ended.pop(lease_id, None)
        for holder in lease.holders:
            self._held_by.setdefault(holder, set()).add(lease_id)

    def extend(self, holders: Iterable[str], now: float) -> None:
        """Push the expiry of every open lease that one of these holders holds."""
        for holder in holders:
            for lease_id in self._held_by.get(holder, ()):
                lease = self._leases[lease_id]
                lease.expires_s = max(lease.expires_s, now + self.lease_s)

    def release(self, lease_id: str, holder: str) -> bool:
        """One holder is done. Idempotent. Returns whether the memory became free."""
        lease = self._leases.get(lease_id)
        if lease is None or holder not in lease.holders:
            return False
        lease.holders.discard(holder)
        self._unhold(holder, lease_id)
        return not lease.holders and self._close(lease_id, lease, Outcome.MISSING)

    def drop(self, holder: str) -> tuple[str, ...]:
        """A holder is done with all its leases. Returns those whose memory became free."""
        held = tuple(self._held_by.get(holder, ()))
        return tuple(lease_id for lease_id in held if self.release(lease_id, holder))

    def revoke(self, lease_id: str) -> bool:
        """Take a lease back. Idempotent. Returns whether the memory became free."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.end is not None:
            return False
        return self._close(lease_id, lease, Outcome.CANCELLED)

    def expire(self, now: float) -> tuple[str, ...]:
        """Close the leases whose time passed. Returns those whose memory became free."""
        lapsed = [
            (lease_id, lease)
            for lease_id, lease in self._leases.items()
            if lease.end is None and lease.expires_s <= now
        ]
        self.num_expired += len(lapsed)
        return tuple(
            lease_id for lease_id, lease in lapsed if self._close(lease_id, lease, Outcome.EXPIRED)
        )

    def begin_send(self, lease_id: str, now: float) -> None:
        """Hold the memory for one send. Raises `TransferError` unless the lease is open."""
        lease = self._leases.get(lease_id)
        end = self._ended.get(lease_id, Outcome.MISSING) if lease is None else lease.end
        if lease is not None and end is None and lease.expires_s <= now:
            end = Outcome.EXPIRED
        if lease is None or end is not None:
            known = lease is not None or lease_id in self._ended
            why = _ENDS[end or Outcome.MISSING] if known else "is unknown"
            raise TransferError(end or Outcome.MISSING, f"lease {lease_id} {why}")
        lease.num_sends += 1

    def end_send(self, lease_id: str) -> bool:
        """Undo one `begin_send`. Returns whether the memory became free."""
        lease = self._leases[lease_id]
        lease.num_sends -= 1
        return self._free_if_idle(lease_id, lease)

    def _close(self, lease_id: str, lease: _Lease, end: Outcome) -> bool:
        for holder in lease.holders:
            self._unhold(holder, lease_id)
        lease.holders.clear()
        lease.end = end
        return self._free_if_idle(lease_id, lease)

    def _free_if_idle(self, lease_id: str, lease: _Lease) -> bool:
        if lease.end is None or lease.num_sends:
            return False
        del self._leases[lease_id]
        self._ended[lease_id] = lease.end
        if len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)
        return True

    def _unhold(self, holder: str, lease_id: str) -> None:
        held = self._held_by[holder]
        held.discard(lease_id)
        if not held:
            del self._held_by[holder]
