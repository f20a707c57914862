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
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

MAX_WAIT_S = 2.0
"""However long others compute; answers do not pause for longer."""

POLL_S = 0.001
"""How often whoever stands first in line looks at several slots: the kernel waits for one lock."""

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
        self, lock: Path | None = None, num_slots: int = 1, max_wait_s: float = MAX_WAIT_S
    ) -> None:
        self._cores = _Cores(lock, num_slots) if lock else None
        self._max_wait_s = max_wait_s
        self._waiters: SimpleQueue[_Waiter] | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """A turn, which ends with the block or before."""
        turn = await self._next(self._cores) if self._cores else Turn()
        try:
            yield turn
        finally:
            turn.end()

    async def _next(self, cores: _Cores) -> Turn:
        try:
            return cores.free_now() or await self._in_line(cores)
        except TimeoutError:
            return Turn()
        except OSError as error:
            if self._cores:
                logger.warning("no more turns on shared cores: %s", error)
            self._cores = None
            return Turn()

    async def _in_line(self, cores: _Cores) -> Turn:
        """Raises `TimeoutError` after `max_wait_s`."""
        if self._waiters is None:
            self._waiters = SimpleQueue()
            # A daemon: a turn that nobody gives back must not keep the process from ending.
            standing = threading.Thread(
                target=_stand_in_line, args=(cores, self._waiters), name="turns", daemon=True
            )
            standing.start()
        waiter = _Waiter()
        self._waiters.put(waiter)
        try:
            async with asyncio.timeout(self._max_wait_s):
                return await waiter.turn
        except BaseException:
            waiter.give_up()
            raise


class _Cores:
    """The lock files. Raises `OSError` where they cannot be made."""

    def __init__(self, lock: Path, num_slots: int) -> None:
        self._line = Path(f"{lock}.line")
        self._slots = [Path(f"{lock}.{slot}") for slot in range(num_slots)]

    def free_now(self) -> Turn | None:
        """A turn if one is free and nobody waits for it."""
        with suppress(BlockingIOError):
            first = Turn(_lock(self._line, fcntl.LOCK_EX | fcntl.LOCK_NB))
            try:
                return self._free_slot()
            finally:
                first.end()
        return None

    def wait(self) -> Turn:
        """Stand in line until a turn is free. Blocks, however long that takes."""
        # Whoever stands first in line gets the next slot, and not who happens to ask then.
        first = Turn(_lock(self._line, fcntl.LOCK_EX))
        try:
            if len(self._slots) == 1:
                return Turn(_lock(self._slots[0], fcntl.LOCK_EX))
            while (turn := self._free_slot()) is None:
                time.sleep(POLL_S)
            return turn
        finally:
            first.end()

    def _free_slot(self) -> Turn | None:
        for slot in self._slots:
            with suppress(BlockingIOError):  # another has it
                return Turn(_lock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB))
        return None


class _Waiter:
    """Somebody of this process who wants a turn, until it is told of one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.turn: asyncio.Future[Turn] = self._loop.create_future()
        self.gave_up = False

    def give_up(self) -> None:
        """It wants no turn any more, not even one that has just come."""
        self.gave_up = True
        came = self.turn.done() and not self.turn.cancelled() and self.turn.exception() is None
        if came:
            self.turn.result().end()

    def tell(self, found: Turn | OSError) -> None:
        """From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, found)
        except RuntimeError:  # the loop is closed
            if isinstance(found, Turn):
                found.end()

    def _take(self, found: Turn | OSError) -> None:
        if isinstance(found, Turn):
            if self.turn.done():
                found.end()
            else:
                self.turn.set_result(found)
        elif not self.turn.done():
            self.turn.set_exception(found)


def _stand_in_line(cores: _Cores, waiters: SimpleQueue[_Waiter]) -> None:
    """The kernel has no lock with a time limit, so a thread waits without one. Whoever gives up
    meanwhile leaves the place in line to the next of this process."""
    while True:
        waiter = waiters.get()
        try:
            turn = cores.wait()
        except OSError as error:
            waiter.tell(error)
            continue
        try:
            while waiter.gave_up:
                waiter = waiters.get_nowait()
        except Empty:
            turn.end()
        else:
            waiter.tell(turn)


def _lock(file: Path, operation: int) -> int:
    """An open file that is locked for as long as it is open. Raises `OSError`."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
