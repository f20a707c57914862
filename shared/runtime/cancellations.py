"""Which attempts of which requests nobody wants any more.

In: cancel requests from gateways. Out: an answer to "is this attempt cancelled?" and a call-back
for work that is already running. Remembers a bounded number of requests, so a task that is still
in a queue when its request is cancelled is dropped when it is taken. Knows neither bus nor stages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MAX_REMEMBERED = 65_536


class Cancellations:
    """Remembers cancelled attempts and tells the running work of them."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._cancelled_up_to: OrderedDict[str, int] = OrderedDict()
        self._watchers: dict[tuple[str, int], list[Callable[[], None]]] = {}

    def cancel(self, request_id: str, attempt: int) -> None:
        """Every attempt of the request up to `attempt` is void; running work is told at once."""
        known = self._cancelled_up_to.pop(request_id, -1)
        self._cancelled_up_to[request_id] = max(known, attempt)
        while len(self._cancelled_up_to) > self._max_remembered:
            self._cancelled_up_to.popitem(last=False)
        for key in [k for k in self._watchers if k[0] == request_id and k[1] <= attempt]:
            for call in self._watchers.pop(key):
                call()

    def is_cancelled(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt was cancelled, as far as remembered."""
        return attempt <= self._cancelled_up_to.get(request_id, -1)

    def watch(self, request_id: str, attempt: int, call: Callable[[], None]) -> Callable[[], None]:
        """Call `call` once when the attempt is cancelled; returns a function that stops
        watching."""
        key = (request_id, attempt)
        self._watchers.setdefault(key, []).append(call)

        def unwatch() -> None:
            calls = self._watchers.get(key)
            if calls and call in calls:
                calls.remove(call)
                if not calls:
                    del self._watchers[key]

        return unwatch
