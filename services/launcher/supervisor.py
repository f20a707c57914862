"""Keeps processes running: reports every death, restarts with back-off, stops in order.

In: `ProcessSpec`s. Out: calls to a `Watcher`, and `GaveUp` where a process cannot be kept alive.
Knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from typing import Protocol

from services.launcher.child import Child
from services.launcher.log_line import LogLine
from services.launcher.plan import ProcessSpec, StopRank, in_role
from services.launcher.restart import GiveUp, RestartHistory, RestartPolicy, after_exit
from shared.clock import Clock, monotonic
from shared.errors import SettingsError, TriptychError

STOP_UNASKED_S = 1.0


class Watcher(Protocol):
    """Is told what happens to the processes, as it happens."""

    def started(self, name: str, pid: int) -> None: ...
    def said(self, name: str, line: LogLine) -> None: ...
    def ended(self, name: str, how: str, restart_in_s: float) -> None: ...
    def stopping(self, name: str) -> None: ...
    def stopped(self, name: str) -> None: ...


class GaveUp(TriptychError):
    """A process cannot be kept running."""

    def __init__(self, name: str, how: str, reason: str, last_words: str) -> None:
        super().__init__(f"{name} {how} and {reason}{': ' if last_words else ''}{last_words}")
        self.name = name


class BadSetting(GaveUp, SettingsError):
    """A process refused a setting that it was given by variable or flag."""


class Supervisor:
    """Owns its children from `start` to `stop`; always call `stop`."""

    def __init__(
        self, watcher: Watcher, policy: RestartPolicy | None = None, clock: Clock = monotonic
    ) -> None:
        self._watcher = watcher
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._children: dict[str, Child] = {}
        self._histories: dict[str, RestartHistory] = {}
        self._specs: dict[str, ProcessSpec] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._gave_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, spec: ProcessSpec) -> None:
        """Start the process and keep it running."""
        child = await self._start_child(spec)
        keeper = asyncio.create_task(self._keep(spec, child), name=f"keep {spec.name}")
        self._keepers[spec.name] = keeper
        keeper.add_done_callback(self._keeper_done)

    async def failed(self) -> None:
        """Wait until a process was given up; raises why. Never returns otherwise."""
        await asyncio.shield(self._gave_up)

    def all_ready(self) -> None:
        """From now on a process that dies is restarted however often it takes."""
        self._histories = {name: history.ready() for name, history in self._histories.items()}

    def pid(self, name: str) -> int | None:
        """The process id, or None while the process is down."""
        child = self._children.get(name)
        return child.pid if child else None

    async def stop(self, grace_s: float) -> None:
        """End every process, rank by rank; each rank has `grace_s`, then it is killed."""
        await self._cancel_keepers()
        for rank in StopRank:
            await self._stop_all(
                (child for child in self._children.values() if child.spec.stop_rank == rank),
                grace_s,
            )
        self._children.clear()
        if not self._gave_up.cancel() and not self._gave_up.cancelled():
            self._gave_up.exception()  # mark it as seen

    async def _cancel_keepers(self) -> None:
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _stop_all(self, children: Iterable[Child], grace_s: float) -> None:
        async def stop_one(child: Child) -> None:
            self._watcher.stopping(child.spec.name)
            await child.stop(grace_s)
            self._watcher.stopped(child.spec.name)

        await asyncio.gather(*map(stop_one, children))

    async def _start_child(self, spec: ProcessSpec) -> Child:
        child = await Child.start(spec, lambda line: self._heard(spec, line))
        self._children[spec.name] = child
        self._histories.setdefault(spec.name, RestartHistory())
        self._watcher.started(spec.name, child.pid)
        return child

    def _heard(self, spec: ProcessSpec, line: LogLine) -> None:
        if line.new_stages:
            self._specs[spec.name] = in_role(spec, line.new_stages)
        self._watcher.said(spec.name, line)

    async def _keep(self, spec: ProcessSpec, child: Child) -> None:
        while True:
            started = self._clock()
            exit_code = await child.wait()
            how, ran_s = how_it_ended(exit_code), self._clock() - started
            await child.stop(STOP_UNASKED_S)  # what it may have left behind
            verdict = after_exit(self._policy, self._histories[spec.name], exit_code, ran_s)
            if isinstance(verdict, GiveUp):
                error = BadSetting if verdict.is_bad_setting else GaveUp
                raise error(spec.name, how, verdict.reason, last_words(child))
            words = last_words(child) if exit_code > 0 else ""
            self._watcher.ended(spec.name, f"{how}: {words}" if words else how, verdict.delay_s)
            self._histories[spec.name] = verdict.history
            del self._children[spec.name]
            await asyncio.sleep(verdict.delay_s)
            # As what it was last, which need not be what it was first.
            spec = self._specs.get(spec.name, spec)
            child = await self._start_child(spec)

    def _keeper_done(self, keeper: asyncio.Task[None]) -> None:
        if keeper.cancelled() or self._gave_up.done():
            return
        error = keeper.exception()
        if error is not None:
            self._gave_up.set_exception(error)


def how_it_ended(exit_code: int) -> str:
    """ "exited with code 3" or "was killed by SIGKILL"."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def last_words(child: Child) -> str:
    """The last line worth reading: an error if there is one, else whatever came last."""
    errors = [line for line in child.last_lines if line.at_least("error")]
    lines = errors or list(child.last_lines)
    return str(lines[-1]) if lines else ""
