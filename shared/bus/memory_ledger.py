"""What a work queue remembers, as a plain state machine: no clock, no waiting, no bus.

Comes in: tasks as bytes, and `now_s`. Goes out: claims. It is the in-memory twin of a JetStream
stream with work-queue retention and one durable consumer.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from shared.bus.limits import BusLimits


@dataclass(frozen=True)
class Claim:
    """One delivery of one task."""

    number: int
    num_delivered: int
    data: bytes
    headers: Mapping[str, str]
    queued_s: float


@dataclass
class _Held:
    data: bytes
    headers: Mapping[str, str]
    put_s: float
    visible_s: float
    num_delivered: int = 0


class TaskLedger:
    """Tasks in order, who may see them when, and the message ids seen lately."""

    def __init__(self, limits: BusLimits) -> None:
        self._limits = limits
        self._held: OrderedDict[int, _Held] = OrderedDict()
        # (visible_s, number); an entry that no longer agrees with its task is skipped.
        self._order: list[tuple[float, int]] = []
        self._seen_ids: OrderedDict[str, float] = OrderedDict()
        self._num_bytes = 0
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._held)

    def put(self, data: bytes, headers: Mapping[str, str], message_id: str, now_s: float) -> bool:
        """Remember a task, or drop it if its id is known. False: there is no room."""
        self._forget_old(now_s)
        if message_id in self._seen_ids:
            return True
        if len(self._held) >= self._limits.queue_max_msgs:
            return False
        if self._num_bytes + len(data) > self._limits.queue_max_bytes:
            return False
        self._seen_ids[message_id] = now_s
        self._held[self._next_number] = _Held(data, dict(headers), now_s, now_s)
        heapq.heappush(self._order, (now_s, self._next_number))
        self._num_bytes += len(data)
        self._next_number += 1
        return True

    def take(self, max_count: int, now_s: float) -> list[Claim]:
        """Claim up to `max_count` visible tasks; each hides until its ack is overdue."""
        self._forget_old(now_s)
        claims: list[Claim] = []
        while len(claims) < max_count and (due_s := self.next_due_s()) is not None:
            if due_s > now_s:
                break
            _, number = heapq.heappop(self._order)
            held = self._held[number]
            held.num_delivered += 1
            self._hide(number, now_s + self._limits.ack_wait_s)
            queued_s = now_s - held.put_s
            claims.append(Claim(number, held.num_delivered, held.data, held.headers, queued_s))
        return claims

    def next_due_s(self) -> float | None:
        """When the next task becomes visible; None if there is none at all."""
        while self._order:
            visible_s, number = self._order[0]
            held = self._held.get(number)
            if held is not None and held.visible_s == visible_s:
                return visible_s
            heapq.heappop(self._order)
        return None

    def end(self, claim: Claim) -> None:
        """Forget the task, whichever of its deliveries says so. Idempotent."""
        held = self._held.pop(claim.number, None)
        if held is not None:
            self._num_bytes -= len(held.data)

    def give_back(self, claim: Claim, now_s: float, delay_s: float) -> None:
        """Make the task visible again, unless it has been delivered to someone else meanwhile."""
        held = self._held.get(claim.number)
        if held is not None and held.num_delivered == claim.num_delivered:
            self._hide(claim.number, now_s + delay_s)

    def restart_timer(self, claim: Claim, now_s: float) -> None:
        """The task is being worked on: its acknowledgement is due later."""
        if claim.number in self._held:
            self._hide(claim.number, now_s + self._limits.ack_wait_s)

    def _hide(self, number: int, until_s: float) -> None:
        self._held[number].visible_s = until_s
        heapq.heappush(self._order, (until_s, number))

    def _forget_old(self, now_s: float) -> None:
        while self._seen_ids:
            message_id, seen_s = next(iter(self._seen_ids.items()))
            if now_s - seen_s < self._limits.duplicate_window_s:
                break
            del self._seen_ids[message_id]
        while self._held:
            number, held = next(iter(self._held.items()))
            if now_s - held.put_s < self._limits.task_max_age_s:
                break
            del self._held[number]
            self._num_bytes -= len(held.data)
