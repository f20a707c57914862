"""What the gateway tells the workers about its requests: which are wanted, which no longer are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shared.bus import subjects
from shared.bus.base import Bus
from shared.errors import BusError
from shared.messages.base import Message
from shared.messages.control import CancelRequest, RequestsAlive
from shared.messages.descriptor import WorkerRef

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
CLOSE_TIMEOUT_S = 2.0


class Liveness:
    """Heartbeats on a timer, cancellations at once.

    Both may be lost with the bus: a request that is no longer reported alive loses its leases, and
    every task carries a deadline.
    """

    def __init__(self, bus: Bus, me: WorkerRef, live_ids: Callable[[], tuple[str, ...]]) -> None:
        self._bus = bus
        self._me = me
        self._live_ids = live_ids
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Report the live requests until cancelled."""
        while True:
            ids = self._live_ids()
            if ids:
                alive = RequestsAlive(gateway=self._me, request_ids=ids)
                await self._publish(subjects.ALIVE, alive)
            await asyncio.sleep(interval_s)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Tell every worker to drop this request up to `attempt`. Returns at once.

        Runs in a task of its own, so that a request that is itself being cancelled still says so.
        """
        message = CancelRequest(request_id=request_id, attempt=attempt)
        task = asyncio.create_task(self._publish(subjects.CANCEL, message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def close(self) -> None:
        """Let the last cancellations leave. Idempotent."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=CLOSE_TIMEOUT_S)

    async def _publish(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, message)
        except BusError as error:
            logger.warning("%s was not sent: %s", subject, error)
