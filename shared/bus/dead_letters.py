"""Tasks that were given up: how they are labelled, and who hears of them.

A dead letter is the task's own bytes on `dead.<work subject>`, with the reason and the number of
deliveries as headers. It is stored for people to look at, and it passes by whoever subscribes:
a gateway fails the request that it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.messages.work import Task

REASON_HEADER = "Triptych-Reason"
DELIVERIES_HEADER = "Triptych-Deliveries"

_MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class DeadLetter:
    """A task that no worker will try again."""

    task: Task
    reason: str
    num_delivered: int


DeadLetterHandler = Callable[[DeadLetter], Awaitable[None]]


def dead_letter_headers(headers: Headers, reason: str, num_delivered: int) -> dict[str, str]:
    """The task's own headers and why it was given up; a reason is one line of printable ASCII."""
    line = " ".join(reason.split()).encode("ascii", "backslashreplace").decode("ascii")
    return {
        **headers,
        REASON_HEADER: line[:_MAX_REASON_CHARS] or "unknown",
        DELIVERIES_HEADER: str(num_delivered),
    }


class DeadLetterWatcher:
    """Calls `handler` for every dead letter of the given work subjects while the context is open.

    Tasks that cannot be decoded have no request to fail; they are stored and logged only. A dead
    letter of a time without connection is not heard: a request still has its deadline.
    """

    def __init__(
        self, bus: Bus, kinds: Mapping[str, type[Task]], handler: DeadLetterHandler
    ) -> None:
        self._bus = bus
        self._kinds = dict(kinds)
        self._handler = handler
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for work_subject, kind in self._kinds.items():
            subscription = await self._bus.subscribe(
                subjects.dead(work_subject), kind, self._on_dead_letter
            )
            self._stack.push_async_callback(subscription.close)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _on_dead_letter(self, task: Task, headers: Headers) -> None:
        deliveries = headers.get(DELIVERIES_HEADER, "")
        await self._handler(
            DeadLetter(
                task=task,
                reason=headers.get(REASON_HEADER, "unknown"),
                num_delivered=int(deliveries) if deliveries.isdecimal() else 0,
            )
        )
