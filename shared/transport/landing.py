"""Waiting for landing memory: a `LandingBudget` that tasks can line up for.

In: requests with the bytes they will land, and what the transport holds in quarantine. Out: a scope
in which the bytes are the request's. Allocates nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from shared.errors import FailureKind, RequestFailed
from shared.transport.landing_budget import LandingBudget


class Landing:
    """Landing memory of one stage. All calls come from one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._budget = LandingBudget(max_bytes)
        self._turns: dict[str, asyncio.Event] = {}
        self._tickets = itertools.count()

    @property
    def free_bytes(self) -> int:
        """What can be reserved now."""
        return self._budget.free_bytes

    @asynccontextmanager
    async def reserved(self, request_id: str, num_bytes: int) -> AsyncIterator[None]:
        """Wait until all of a request's landing memory is there, and hold it for the scope.

        Raises `RequestFailed` if it can never be there.
        """
        if num_bytes > self._budget.max_bytes:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the request needs {num_bytes} bytes of landing memory, "
                f"this worker has {self._budget.max_bytes}",
            )
        # A redelivered task may come while its first attempt unwinds: each gets its own place.
        ticket = f"{request_id}/{next(self._tickets)}"
        try:
            if not self._budget.try_reserve(ticket, num_bytes):
                turn = self._turns[ticket] = asyncio.Event()
                await turn.wait()
            yield
        finally:
            self._turns.pop(ticket, None)
            self._wake(self._budget.release(ticket))

    def set_quarantined(self, num_bytes: int) -> None:
        """The transport may still write to so many bytes (see `Transport.watch_quarantine`)."""
        self._wake(self._budget.set_quarantined(num_bytes))

    def _wake(self, tickets: Iterable[str]) -> None:
        for ticket in tickets:
            self._turns[ticket].set()
