"""`/metrics` and `/health` of a worker, over plain HTTP.

A gateway serves both itself. This endpoint knows two GET paths and nothing else; it runs in the
worker's event loop, so that a worker which no longer answers is a worker which hangs.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from shared.errors import SettingsError

_REQUEST_TIMEOUT_S = 5.0
_MAX_HEAD_BYTES = 16 * 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether the process is fit for work, and what an operator may want to know."""

    ready: bool
    details: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Response:
    status: HTTPStatus
    content_type: str
    body: bytes

    def encode(self) -> bytes:
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"Content-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode("ascii") + self.body


class TelemetryEndpoint:
    """Serves while its `async with` is open; port 0 serves nothing."""

    def __init__(
        self, registry: CollectorRegistry, health: Callable[[], Health], *, host: str, port: int
    ) -> None:
        self._registry = registry
        self._health = health
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        if self._port:
            try:
                self._server = await asyncio.start_server(
                    self._serve, self._host, self._port, limit=_MAX_HEAD_BYTES
                )
            except OSError as error:
                raise SettingsError(
                    f"--metrics-port = {self._port}: cannot listen on {self._host} "
                    f"({error.strerror or error})"
                ) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_TIMEOUT_S)
            writer.write(self._respond(head).encode())
            await asyncio.wait_for(writer.drain(), _REQUEST_TIMEOUT_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            logger.debug("a telemetry client went away")
        finally:
            writer.close()

    def _respond(self, head: bytes) -> _Response:
        method, _, rest = head.decode("latin-1").split("\r\n", 1)[0].partition(" ")
        path = rest.split(" ", 1)[0].split("?", 1)[0]
        if method != "GET":
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET\n")
        if path == "/metrics":
            return _Response(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry))
        if path == "/health":
            return self._health_response()
        return _text(HTTPStatus.NOT_FOUND, "there is /metrics and /health\n")

    def _health_response(self) -> _Response:
        health = self._health()
        status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
        body = json.dumps({"ready": health.ready, **health.details}).encode()
        return _Response(status, "application/json", body)


def _text(status: HTTPStatus, text: str) -> _Response:
    return _Response(status, "text/plain; charset=utf-8", text.encode())
