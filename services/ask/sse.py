"""Server-sent events of a chat completion: lines in, pieces of the answer out. Pure."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from services.ask.errors import AnswerCut, ServerRefused

DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds: text, and on the last one why the answer ended."""

    text: str
    finish_reason: str | None = None
    num_completion_tokens: int | None = None


def piece_of(data: str) -> Piece:
    """One `data:` payload as a piece. Raises `ServerRefused` for an error payload."""
    payload = json.loads(data)
    if "error" in payload:
        raise ServerRefused(f"the server gave up: {error_message(payload)}")
    usage = payload.get("usage") or {}
    num_tokens = usage.get("completion_tokens")
    if not payload.get("choices"):
        return Piece("", num_completion_tokens=num_tokens)
    choice = payload["choices"][0]
    text = choice.get("delta", {}).get("content") or ""
    return Piece(text, choice.get("finish_reason"), num_tokens)


def error_message(payload: Any) -> str:
    """The message in an OpenAI error body, else the body itself."""
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or payload)


async def pieces(lines: AsyncIterator[str]) -> AsyncIterator[Piece]:
    """The pieces of a stream; raises `AnswerCut` where it ends without a finish reason."""
    finished = False
    async for line in lines:
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == DONE:
            break
        piece = piece_of(value)
        finished = finished or piece.finish_reason is not None
        yield piece
    if not finished:
        raise AnswerCut
