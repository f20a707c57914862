"""Who is registered, as a plain state machine: no clock, no bus.

Comes in: registrations, deletions and `now_s`. Goes out: who lives, and who was lost by what.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef

# Lives that are over; enough to answer for every worker that a request in flight may name.
_MAX_REMEMBERED = 4096


class LossReason(StrEnum):
    """How a worker's life ended."""

    WITHDRAWN = "withdrawn"  # deleted by its owner, or lapsed at the server
    LAPSED = "lapsed"  # no heartbeat within the TTL, by the local clock
    REPLACED = "replaced"  # a later life of the same worker registered


@dataclass(frozen=True)
class LostWorker:
    """A registration that ended."""

    registration: Registration
    reason: LossReason


@dataclass(frozen=True)
class _Seen:
    registration: Registration
    seen_s: float


class Roster:
    """Registrations by key, each alive until `ttl_s` after it was last heard."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._seen: dict[str, _Seen] = {}
        # The latest life of each worker that is known to be over.
        self._ended: OrderedDict[str, int] = OrderedDict()

    def heard(self, key: str, registration: Registration, now_s: float) -> list[LostWorker]:
        """A heartbeat. An earlier life than the one known is ignored."""
        lost: list[LostWorker] = []
        before = self._seen.get(key)
        if before is not None:
            known, new = before.registration.worker, registration.worker
            if new.incarnation < known.incarnation:
                return []
            if new.incarnation > known.incarnation:
                lost.append(self._end(key, LossReason.REPLACED))
        self._seen[key] = _Seen(registration, now_s)
        return lost

    def withdrawn(self, key: str) -> list[LostWorker]:
        """The key is gone from the bucket."""
        return [self._end(key, LossReason.WITHDRAWN)] if key in self._seen else []

    def expire(self, now_s: float) -> list[LostWorker]:
        """Drop those whose heartbeat is overdue."""
        overdue = [k for k, seen in self._seen.items() if now_s - seen.seen_s > self._ttl_s]
        return [self._end(key, LossReason.LAPSED) for key in overdue]

    def live(
        self, role: Role | None = None, model: str | None = None, *, ready_only: bool = False
    ) -> list[Registration]:
        """Registrations that host that stage of that model (None: any), in order of their keys."""
        present = (seen.registration for _, seen in sorted(self._seen.items()))
        return [
            registration
            for registration in present
            if (role is None or role in registration.stages)
            and model in (None, registration.model)
            and (registration.ready or not ready_only)
        ]

    def is_gone(self, worker: WorkerRef) -> bool:
        """Whether this life is known to be over. A worker never heard of is not gone."""
        lives = [
            seen.registration.worker.incarnation
            for seen in self._seen.values()
            if seen.registration.worker.name == worker.name
        ]
        if lives:
            return worker.incarnation < max(lives)
        return worker.incarnation <= self._ended.get(worker.name, -1)

    def _end(self, key: str, reason: LossReason) -> LostWorker:
        registration = self._seen.pop(key).registration
        name, incarnation = registration.worker.name, registration.worker.incarnation
        self._ended[name] = max(incarnation, self._ended.get(name, -1))
        self._ended.move_to_end(name)
        if len(self._ended) > _MAX_REMEMBERED:
            self._ended.popitem(last=False)
        return LostWorker(registration, reason)
