"""From `__main__` to exit code: signals, errors and the tie to a parent process.

In: a coroutine function that takes a `Stop` and serves until it is requested. The first SIGINT or
SIGTERM requests a graceful stop, the second ends the process at once. An error ends it with one
line on stderr and exit code 1 (2 for a bad setting). Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

from shared.errors import SettingsError, TriptychError

log = logging.getLogger(__name__)

DIE_WITH_PARENT = "TRIPTYCH_DIE_WITH_PARENT"
"""Environment variable: the process id of the parent to die with, or 1 for whoever it is."""
ORPHAN_GRACE_S = 10.0
"""How long a process that lost its parent may drain: nobody is left to end it otherwise."""
EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Stop:
    """The wish that the service finish. Set once, never taken back.

    Where `finish_s` is set, the process goes on in another role: running work has so long to end,
    instead of the time that a stopping process grants, and what has not begun is handed back.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""
        self.finish_s: float | None = None

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, reason: str) -> None:
        """Ask for a graceful end; the first reason is kept."""
        self.reason = self.reason or reason
        self._event.set()

    def request_role_change(self, reason: str, finish_s: float) -> None:
        """Ask for the end of a role, whose process goes on. A stop that was requested stays one."""
        if not self.requested:
            self.finish_s = finish_s
        self.request(reason)

    async def wait(self) -> None:
        await self._event.wait()


def run_service(main: Callable[[Stop], Awaitable[None]]) -> None:
    """Run `main` to its end; returns when it ended well, else raises `SystemExit`."""
    die_with_parent()
    try:
        asyncio.run(_serve(main))
    except KeyboardInterrupt:  # a SIGINT before the handlers were in place
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        raise SystemExit(report(error)) from None


async def _serve(main: Callable[[Stop], Awaitable[None]]) -> None:
    stop = Stop()
    with _signals_request(stop):
        await main(stop)


@contextlib.contextmanager
def _signals_request(stop: Stop) -> Iterator[None]:
    """Within: SIGINT and SIGTERM request the stop, a second one exits without clean-up."""
    loop = asyncio.get_running_loop()
    parent_pid = os.getppid()

    def on_signal(number: signal.Signals) -> None:
        if stop.requested:
            os._exit(128 + number)
        stop.request(number.name)
        if os.getppid() != parent_pid:
            loop.call_later(ORPHAN_GRACE_S, os._exit, 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def report(error: BaseException) -> int:
    """Say what went wrong, once; returns the exit code.

    Our own errors explain themselves in a line. Anything else is a defect: its stack trace goes to
    the log, where it stays one record.
    """
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, TriptychError):
            print(f"error: {leaf}", file=sys.stderr, flush=True)
        else:
            log.critical("unexpected %s: %s", type(leaf).__name__, leaf, exc_info=leaf)
    only_settings = all(isinstance(leaf, SettingsError) for leaf in leaves)
    return EXIT_BAD_SETTINGS if only_settings else EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The single errors inside nested exception groups, as task groups raise them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def die_with_parent() -> None:
    """Where the environment asks for it, get SIGTERM when the parent process ends (Linux only)."""
    wanted = os.environ.get(DIE_WITH_PARENT, "")
    if not wanted or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The parent may have died before the line above: then no signal will ever come.
    if wanted.isdigit() and int(wanted) > 1 and os.getppid() != int(wanted):
        raise SystemExit(f"the parent process {wanted} has already ended")
