"""One child process: started in a session of its own, read line by line, ended for certain.

In: a `ProcessSpec` and a call-back for log lines. Out: the exit code. The child dies with the
launcher (see `shared.runtime.lifecycle`) and takes its own children with it when it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable

from services.launcher.log_line import LogLine, parse
from services.launcher.plan import ProcessSpec
from shared.errors import TriptychError
from shared.runtime.lifecycle import DIE_WITH_PARENT

MAX_LINE_BYTES = 1 << 20
NUM_LAST_LINES = 20
KILL_WAIT_S = 1.0
KILL_POLL_S = 0.005


class Child:
    """A running process. `last_lines` is what to show when it ends unasked."""

    def __init__(
        self, spec: ProcessSpec, process: Process, on_line: Callable[[LogLine], None]
    ) -> None:
        self.spec = spec
        self.last_lines: deque[LogLine] = deque(maxlen=NUM_LAST_LINES)
        self._process = process
        self._on_line = on_line
        self._reader = asyncio.create_task(self._read(), name=f"read {spec.name}")

    @classmethod
    async def start(cls, spec: ProcessSpec, on_line: Callable[[LogLine], None]) -> Child:
        """Raises `TriptychError` where the program cannot be started at all."""
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=environment(spec),
                limit=MAX_LINE_BYTES,
                # Ctrl-C in a terminal reaches the whole process group; the launcher alone decides
                # in which order the others stop.
                start_new_session=True,
            )
        except OSError as error:
            raise TriptychError(f"{spec.name} cannot be started: {error}") from error
        _keep_on(process.pid, spec.cores)
        return cls(spec, process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal, once the process ended and its pipe is read."""
        exit_code = await self._process.wait()
        # A grandchild may hold the pipe open for ever.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reader, timeout=1.0)
        return exit_code

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL to all that is left of it after `grace_s`. Idempotent."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        await self._kill_group()
        await self._process.wait()
        await self._close_reader()

    async def _kill_group(self) -> None:
        """Kill the process and its descendants, and see them gone (they are not ours to reap)."""
        with contextlib.suppress(ProcessLookupError):
            for _ in range(round(KILL_WAIT_S / KILL_POLL_S)):
                os.killpg(self._process.pid, signal.SIGKILL)
                await asyncio.sleep(KILL_POLL_S)

    async def _close_reader(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # longer than MAX_LINE_BYTES: the buffer was dropped, go on
                continue
            if not raw:
                return
            line = parse(raw)
            if line.event:
                self.last_lines.append(line)
                self._on_line(line)


def _keep_on(pid: int, cores: tuple[int, ...]) -> None:
    """Keep a process that has just begun, and so all its threads to come, on these cores."""
    if cores and hasattr(os, "sched_setaffinity"):
        # It has ended already, which others tell, or the machine has taken the cores away since:
        # then it runs wherever it may.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(pid, cores)


def environment(spec: ProcessSpec) -> dict[str, str]:
    """The launcher's own, plus what ties the child to it."""
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        # Shared memory is then reached through /proc and unlinked at once: even a killed process
        # leaves no file behind.
        "UCX_POSIX_USE_PROC_LINK": "y",
        DIE_WITH_PARENT: str(os.getpid()),
        **spec.environment,
    }
