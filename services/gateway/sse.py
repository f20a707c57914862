"""Server-sent events, and a response that notices at once when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_MARK = "\0"
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


def event(body: Mapping[str, Any]) -> bytes:
    """One event with a JSON body."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode()


def text_events(body_of: Callable[[str], Mapping[str, Any]]) -> Callable[[str], bytes]:
    """`event(body_of(text))` as a function of the text, with all around it encoded once: most of a
    stream's events differ in nothing else. The text stands behind every other string."""
    before, _, after = event(body_of(_MARK)).rpartition(_quoted(_MARK).encode())
    return lambda text: before + _quoted(text).encode() + after


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; if the client goes away first, cancel it and raise `ClientGone`.

    The request's body must have been read: what comes next on `receive` is the disconnect.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. `on_end` is called exactly once, whatever happens.

    A client that takes no data for `send_timeout_s` counts as gone: otherwise it would keep its
    place for as long as it likes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        send_timeout_s: float,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._send_timeout_s = send_timeout_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, TimeoutError, OSError) as gone:
            error = gone
        except BaseException as other:
            error = other
            raise
        finally:
            self._on_end(error)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with contextlib.aclosing(self._events) as events:
            async for chunk in events:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
