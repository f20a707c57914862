"""Waiting for a condition that the same event loop changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Signal:
    """`until(ready)` waits for a truthy answer of `ready`; whoever changes what `ready` looks at
    calls `notify`. The check and the wait happen without a gap, so no change is missed."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something changed: every waiter asks again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Return at the next `notify`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    async def until(self, ready: Callable[[], T | None]) -> T:
        """Return the first truthy value of `ready()`, asked now and after every `notify`."""
        while not (value := ready()):
            await self.changed()
        return value
