"""All-or-nothing reservations of landing memory, first come first served.

In: how many bytes a request will land, how many are in quarantine. Out: reservations. Pure:
allocates nothing and never waits.

A request reserves everything it will land at once or nothing, so requests never hold parts of what
others wait for, and requests that together exceed the budget cannot deadlock.
"""

from __future__ import annotations

from collections import OrderedDict


class LandingBudget:
    """Bytes that requests may land into. Quarantined bytes count as taken until they settle."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"landing memory of {max_bytes} bytes")
        self.max_bytes = max_bytes
        self.reserved_bytes = 0
        self.quarantined_bytes = 0
        self._reserved: dict[str, int] = {}
        self._waiting: OrderedDict[str, int] = OrderedDict()

    @property
    def free_bytes(self) -> int:
        """What can be reserved now; never negative."""
        return max(0, self.max_bytes - self.reserved_bytes - self.quarantined_bytes)

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def try_reserve(self, request_id: str, num_bytes: int) -> bool:
        """Reserve everything for a request, or put it in line.

        Whoever is in line is served before whoever comes later, even if the latter needs less.
        Raises `ValueError` for more than the whole budget, or if the request already has some.
        """
        if request_id in self._reserved or request_id in self._waiting:
            raise ValueError(f"{request_id} already reserved landing memory")
        if not 0 <= num_bytes <= self.max_bytes:
            raise ValueError(f"{num_bytes} bytes to land, the budget is {self.max_bytes}")
        if self._waiting or num_bytes > self.free_bytes:
            self._waiting[request_id] = num_bytes
            return False
        self._take(request_id, num_bytes)
        return True

    def release(self, request_id: str) -> tuple[str, ...]:
        """Give a reservation, or a place in line, back. Idempotent. Returns who got theirs now."""
        self._waiting.pop(request_id, None)
        self.reserved_bytes -= self._reserved.pop(request_id, 0)
        return self._serve()

    def set_quarantined(self, num_bytes: int) -> tuple[str, ...]:
        """So many bytes cannot be used though nobody reserves them. Returns who got theirs now."""
        self.quarantined_bytes = num_bytes
        return self._serve()

    def _serve(self) -> tuple[str, ...]:
        served: list[str] = []
        while self._waiting:
            request_id, num_bytes = next(iter(self._waiting.items()))
            if num_bytes > self.free_bytes:
                break
            del self._waiting[request_id]
            self._take(request_id, num_bytes)
            served.append(request_id)
        return tuple(served)

    def _take(self, request_id: str, num_bytes: int) -> None:
        self._reserved[request_id] = num_bytes
        self.reserved_bytes += num_bytes
