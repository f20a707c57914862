"""Background work that a process cannot do without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

RESTART_PAUSE_S = 1.0

logger = logging.getLogger(__name__)


async def keep_running(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Run `work` again, a little later, whenever it fails; return when it ends by itself.

    For loops whose death nobody would see: a heartbeat that stopped would let a healthy worker be
    taken for dead, for ever.
    """
    while True:
        try:
            await work()
            return
        except Exception:
            logger.exception("%s failed and is started again", name)
            await asyncio.sleep(RESTART_PAUSE_S)


@asynccontextmanager
async def kept_running(work: Callable[[], Awaitable[None]], name: str) -> AsyncIterator[None]:
    """`keep_running` beside what is done within."""
    running = asyncio.create_task(keep_running(work, name))
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
