"""The gateway as a process: connect, listen, serve, drain.

In: settings and the wish to stop. Out: nothing; returns when the last answers were sent or the
time for them is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack

import uvicorn
from fastapi import FastAPI

from services.gateway.access import Access
from services.gateway.app import make_app
from services.gateway.gateway import open_gateway
from services.gateway.model import ServedModel
from services.gateway.settings import GatewaySettings
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.connection import connect_bus, new_identity
from shared.runtime.directory import WorkerDirectory
from shared.runtime.lifecycle import Stop
from shared.runtime.model_dir import SMALL_FILES, find_model_dir
from shared.telemetry import logs, tracing

logger = logging.getLogger(__name__)

STARTED_POLL_S = 0.02


async def serve_gateway(settings: GatewaySettings, stop: Stop) -> None:
    """Run one gateway until a stop is requested."""
    me = new_identity(settings.name, Role.GATEWAY.value)
    telemetry = settings.telemetry
    logs.setup_logging(telemetry.log_level.upper(), telemetry.log_format, me.name)
    model_dir = await asyncio.to_thread(find_model_dir, settings.model.path, SMALL_FILES)
    access = await asyncio.to_thread(Access.load, settings.access)
    model = await asyncio.to_thread(ServedModel.load, settings.model.name, model_dir)
    async with AsyncExitStack() as scope:
        # Bound first: a taken port is the commonest mistake and should cost no waiting.
        listening = scope.enter_context(_listen(settings.host, settings.port))
        bus = await scope.enter_async_context(await connect_bus(settings.bus, me))
        await scope.enter_async_context(
            tracing.setup_tracing(
                Role.GATEWAY.value, me.name, bus, otlp_endpoint=telemetry.otlp_endpoint
            )
        )
        workers = await scope.enter_async_context(
            WorkerDirectory(bus, ttl_s=settings.registration_ttl_s, model=model.name)
        )
        parts = await scope.enter_async_context(
            open_gateway(settings, model, bus, workers, me, access=access)
        )
        await _serve_http(make_app(parts), listening, settings, stop)


async def _serve_http(
    app: FastAPI, listening: socket.socket, settings: GatewaySettings, stop: Stop
) -> None:
    """Serve until the stop, then finish what runs within `drain_s`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="http")
    stopping = asyncio.create_task(stop.wait())
    try:
        # uvicorn tells that it has started by a flag only.
        while not server.started and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(STARTED_POLL_S)
        host, port = listening.getsockname()[:2]
        logs.log_event(
            logger, "ready", role="gateway", model=settings.model.name, url=f"http://{host}:{port}"
        )
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        for task in (serving, stopping):
            task.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)


class _Server(uvicorn.Server):
    """Leaves signals to the service's own lifecycle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket. Raises `SettingsError` naming the address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with listening:
        # Connections inherit it. asyncio sets it only on sockets whose protocol number is given,
        # and without it a token waits up to 40 ms for the client to acknowledge the one before.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listening
