"""What a stage tells the gateways: tokens and ends, one message per step and gateway."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from shared.bus import subjects
from shared.bus.base import Bus
from shared.errors import BusError, RequestFailed
from shared.messages.descriptor import WorkerRef
from shared.messages.events import Event, EventBatch, FailedEvent
from shared.messages.work import Origin

logger = logging.getLogger(__name__)


class EventSink:
    """Publishes events to the gateways that own the requests.

    Events may be lost with the bus; the gateway notices gaps and silence and resubmits.
    """

    def __init__(self, bus: Bus, me: WorkerRef) -> None:
        self._bus = bus
        self._me = me

    async def publish(self, events: Iterable[tuple[WorkerRef, Event]]) -> None:
        """Send `(gateway, event)` pairs, grouped by gateway, in order."""
        by_gateway: dict[WorkerRef, list[Event]] = {}
        for gateway, event in events:
            by_gateway.setdefault(gateway, []).append(event)
        for gateway, batch in by_gateway.items():
            message = EventBatch(worker=self._me, events=tuple(batch))
            try:
                await self._bus.publish(subjects.events(gateway), message)
            except BusError as error:
                logger.warning("events for gateway %s were lost: %s", gateway.name, error)

    async def fail(self, origin: Origin, failure: RequestFailed) -> None:
        """Tell the gateway that this attempt ended without an answer."""
        event = FailedEvent(
            request_id=origin.request_id,
            attempt=origin.attempt,
            kind=failure.kind,
            message=failure.message,
            retryable=failure.retryable,
        )
        await self.publish([(origin.gateway, event)])
