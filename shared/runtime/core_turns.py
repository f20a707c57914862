"""Turns on the same cores: workers that share them compute one step at a time.

A step has a thread for each core. Two steps at the same time displace each other's threads, and at
every barrier a team waits for the thread that the other has displaced, so that both take longer
than one after the other. A decode step also costs nearly the same for one answer as for many:
beside a pass of prompts it would take cores from the very prompts whose answers it could have taken
along.

In: a file that the workers on these cores have in common. Out: a turn, in the order in which they
asked; at most `MAX_WAIT_S` later without one. Locks are the kernel's, so the turn of a process that
dies ends with it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from shared.clock import Clock, monotonic

MAX_WAIT_S = 2.0
"""However long others compute; answers do not pause for longer."""

POLL_S = 0.001
"""A lock that one can wait for with a time limit does not exist."""

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Turn:
    """The right to compute now, until `end`."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def last(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, after which the turn ends at once, on whatever thread that is."""

        def ending(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return call(*args, **kwargs)
            finally:
                self.end()

        return ending

    def end(self) -> None:
        """The next one may begin. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class CoreTurns:
    """`num_slots` steps at a time, as many as have cores of their own. Without a file every turn is
    free."""

    def __init__(
        self, lock: Path | None = None, num_slots: int = 1, clock: Clock = monotonic
    ) -> None:
        self._line = [Path(f"{lock}.line")] if lock else []
        self._slots = [Path(f"{lock}.{slot}") for slot in range(num_slots)] if lock else []
        self._clock = clock

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """A turn, which ends with the block or before."""
        turn = await self._next() if self._slots else Turn()
        try:
            yield turn
        finally:
            turn.end()

    async def _next(self) -> Turn:
        until_s = self._clock() + MAX_WAIT_S
        try:
            # Whoever stands first in line gets the next slot, and not who happens to ask then.
            first = await self._locked(self._line, until_s)
            try:
                return await self._locked(self._slots, until_s)
            finally:
                first.end()
        except OSError as error:
            logger.warning("no more turns on shared cores: %s", error)
            self._slots = []
            return Turn()

    async def _locked(self, files: Sequence[Path], until_s: float) -> Turn:
        """The first of these that is free, or none in time."""
        while True:
            for file in files:
                with suppress(BlockingIOError):  # another has it
                    return Turn(_lock(file))
            if self._clock() >= until_s:
                return Turn()
            await asyncio.sleep(POLL_S)


def _lock(file: Path) -> int:
    """An open file that is locked for as long as it is open. Raises `OSError`."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
