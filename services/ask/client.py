"""The server as the ask command sees it: models, one streamed chat, the spans of a trace.

In: where it is. Out: values of this package; every failure of HTTP is an `AskError`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx

from services.ask.errors import ServerNotReachable, ServerRefused
from services.ask.span import ROOT_NAME, Span
from services.ask.sse import Piece, error_message, pieces
from shared.runtime.access import Server

CONNECT_TIMEOUT_S = 5.0
SPANS_WAIT_S = 2.0
_SPANS_POLL_S = 0.1


class Client:
    """Open it with `async with`; one question at a time."""

    def __init__(self, server: Server, transport: httpx.AsyncBaseTransport | None = None) -> None:
        # OpenAI clients want the URL with /v1; here both are understood.
        self.url = server.url.rstrip("/").removesuffix("/v1")
        self.trace_id = ""
        # A long prompt may take minutes to its first token: only connecting has a limit.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=server.headers,
            timeout=timeout,
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The name of the model that the server serves."""
        with self._translated():
            response = await self._http.get("/v1/models")
        _raise_for_status(response)
        models = response.json().get("data") or []
        if not models:
            raise ServerRefused("the server serves no model yet")
        return str(models[0]["id"])

    async def ask(self, body: dict[str, Any]) -> AsyncIterator[Piece]:
        """Stream the answer; afterwards `trace_id` names its trace."""
        with self._translated():
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                _raise_for_status(response)
                self.trace_id = response.headers.get("x-trace-id", "")
                async for piece in pieces(response.aiter_lines()):
                    yield piece

    async def spans(self) -> list[Span]:
        """The spans of the last question, waiting a little for the last of them.

        Empty where the server keeps no traces: the answer is worth showing without them.
        """
        found: list[Span] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SPANS_WAIT_S):
                num_before = -1
                # The workers' last spans travel on their own: done is what has stopped growing.
                while len(found) > num_before or not any(s.name == ROOT_NAME for s in found):
                    num_before = len(found)
                    found = await self._spans_now() or found
                    await asyncio.sleep(_SPANS_POLL_S)
        return found

    async def _spans_now(self) -> list[Span]:
        try:
            response = await self._http.get(f"/v1/traces/{self.trace_id}")
        except httpx.HTTPError:
            return []
        if response.is_error:
            return []
        return [Span.from_record(record) for record in response.json()]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ServerNotReachable(self.url, str(error) or "no connection") from None
        except httpx.ConnectTimeout:
            reason = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise ServerNotReachable(self.url, reason) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerRefused(f"{self.url}: {error or type(error).__name__}") from None


def _raise_for_status(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = error_message(response.json())
    except ValueError:
        message = response.text.strip() or response.reason_phrase
    raise ServerRefused(f"the server says {response.status_code}: {message}")


def chat_body(
    model: str, media: Sequence[dict[str, object]], question: str, max_tokens: int | None
) -> dict[str, Any]:
    """An OpenAI chat request: the parts of media in order, then the question."""
    content = [*media, {"type": "text", "text": question}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return body
