"""Turns of prefill and decode on the same cores: one decode step between two long passes.

A decode step costs nearly the same for one answer as for many. Beside a pass of prompts it would
take cores from the very prompts whose answers it could have taken along: both stages end later. So
while long passes follow each other, decoders on those cores take one step at the end of each, and
no answer pauses for longer than `MAX_PAUSE_S`.

In: the name that workers on the same cores have in common, and news of passes on the bus. Out: when
a decoder may begin a step. News may be lost: a pause ends by itself soon after a pass should have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.clock import Clock, monotonic
from shared.errors import BusError
from shared.messages.control import PassNews
from shared.messages.descriptor import WorkerRef

LONG_S = 0.15
"""Shorter passes are no reason to wait."""

MAX_PAUSE_S = 2.0
"""Between two steps of a decoder, however long a pass takes."""

MARGIN = 1.5
"""A pass whose end was not heard of is over after so many times what it should have taken."""

logger = logging.getLogger(__name__)


def group_on(device: str, group: str) -> str:
    """Who shares the cores that compute; nobody where another device does."""
    return group if device == "cpu" else ""


class LongPasses:
    """The side of prefill: tells of passes that will be long. Without a group it tells nobody."""

    def __init__(self, bus: Bus, me: WorkerRef, group: str) -> None:
        self._bus = bus
        self._me = me
        self._group = group
        self._s_per_token = 0.0
        self._is_told = False

    async def begins(self, num_tokens: int) -> None:
        """A pass over so many tokens begins; how long it takes, the last one tells."""
        expected_s = self._s_per_token * num_tokens
        if expected_s >= LONG_S:
            self._is_told = True
            await self._tell(MARGIN * expected_s)

    async def ended(self, num_tokens: int, took_s: float) -> None:
        """It has ended."""
        self._s_per_token = took_s / num_tokens
        if self._is_told:
            self._is_told = False
            await self._tell(0.0)

    async def _tell(self, seconds: float) -> None:
        if not self._group:
            return
        news = PassNews(worker=self._me, seconds=seconds)
        try:
            await self._bus.publish(subjects.passes(self._group), news)
        except BusError as error:
            logger.warning("decoders were not told of a pass: %s", error)


class Turns:
    """The side of decode. Without a group it never waits."""

    def __init__(self, bus: Bus, group: str, clock: Clock = monotonic) -> None:
        self._bus = bus
        self._group = group
        self._clock = clock
        self._ends_s: dict[str, float] = {}  # by the worker whose pass it is
        self._last_step_s = 0.0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """News is heard within."""
        if not self._group:
            yield
            return
        subject = subjects.passes(self._group)
        subscription = await self._bus.subscribe(subject, PassNews, self._on_news)
        try:
            yield
        finally:
            await subscription.close()

    def pause_s(self, now_s: float) -> float:
        """How long the next step has to wait, as far as is known; 0 or less: not at all."""
        ends_s = max(self._ends_s.values(), default=now_s)
        return min(ends_s, self._last_step_s + MAX_PAUSE_S) - now_s

    async def free(self) -> None:
        """Return when a step may begin."""
        while (pause_s := self.pause_s(self._clock())) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
        self._last_step_s = self._clock()

    async def _on_news(self, news: PassNews, headers: Headers) -> None:
        now_s = self._clock()
        self._ends_s = {name: end_s for name, end_s in self._ends_s.items() if end_s > now_s}
        self._ends_s[news.worker.name] = now_s + news.seconds
        self._changed.set()
