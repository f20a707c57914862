"""Everything that `triptych up` runs, as one thing with a beginning and an end.

In: settings and a board. Out: the URL of a gateway that is ready. Whatever happens inside the
block, at its end no process and no temporary folder is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx

from services.launcher import nats_server
from services.launcher.board import Board
from services.launcher.cores import own_cores
from services.launcher.data_dir import owned_data_dir
from services.launcher.plan import service_specs
from services.launcher.ports import claim, url_of
from services.launcher.settings import LauncherSettings
from services.launcher.supervisor import Supervisor
from shared.errors import TriptychError
from shared.runtime.lifecycle import Stop

KILL_MARGIN_S = 5.0
"""What a process gets beyond its drain, to close what it has open."""
_POLL_S = 0.1
_POLL_TIMEOUT_S = 5.0


class Stack:
    """The running processes. Made by `running`."""

    def __init__(self, supervisor: Supervisor, board: Board, url: str) -> None:
        self.url = url
        self._supervisor = supervisor
        self._board = board

    async def until_ready(self, stop: Stop, timeout_s: float) -> bool:
        """True once the gateway is ready, False if the stop came first.

        Raises where a process cannot be kept alive or `timeout_s` have passed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                ready = await self._first(stop, answers_ready(self.url))
        except TimeoutError:
            raise TriptychError(f"not ready within {timeout_s:g} s") from None
        if ready:
            self._supervisor.all_ready()
            self._board.all_ready()
        return ready

    async def until_stopped(self, stop: Stop) -> None:
        """Returns at the stop; raises where a process is given up."""
        await self._first(stop, asyncio.Event().wait())

    async def run_beside(self, stop: Stop, *command: str) -> int | None:
        """Run a command on this terminal; its exit code, or None if the stop came first."""
        process = await asyncio.create_subprocess_exec(*command)
        try:
            done = await self._first(stop, process.wait())
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            exit_code = await process.wait()
        return exit_code if done else None

    async def _first(self, stop: Stop, work: Coroutine[Any, Any, object]) -> bool:
        """Whether the work was done before the stop; a process given up raises."""
        tasks = [asyncio.ensure_future(c) for c in (work, stop.wait(), self._supervisor.failed())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (tasks[2], tasks[0]):
                if task.done():
                    task.result()
            return tasks[0].done()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(settings: LauncherSettings, board: Board) -> AsyncIterator[Stack]:
    """Start NATS, the workers and the gateway; stop them all at the end of the block."""
    port = claim(settings.host, settings.port)
    with owned_data_dir(settings.data_dir) as data_dir:
        supervisor = Supervisor(board)
        board.open()
        try:
            nats_url = await _start_nats(settings, supervisor, data_dir)
            core_lock = str(data_dir.resolve() / "cores")
            for spec in service_specs(settings, nats_url, port, own_cores(), core_lock):
                board.hosts(spec.name, spec.stages)
                await supervisor.start(spec)
            yield Stack(supervisor, board, url_of(settings.host, port))
        finally:
            board.close()
            await supervisor.stop(settings.drain_s + KILL_MARGIN_S)


async def _start_nats(settings: LauncherSettings, supervisor: Supervisor, data_dir: Path) -> str:
    if not settings.starts_nats:
        return settings.bus.url
    server = nats_server.prepare(data_dir)
    await supervisor.start(server.spec)
    await nats_server.wait_until_listening(server.port)
    return server.url


async def answers_ready(url: str) -> None:
    """Returns when the gateway's GET /ready says 200; asks for ever."""
    # trust_env off: a proxy for the outside world is not the way to this machine.
    async with httpx.AsyncClient(trust_env=False, timeout=_POLL_TIMEOUT_S) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/ready")).status_code == httpx.codes.OK:
                    return
            await asyncio.sleep(_POLL_S)
