"""A measuring client: one streamed chat completion, timed."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from shared.modelspec import ModelSpec

NEVER = -100.0
"""OpenAI's least bias: such a token is not chosen."""


@dataclass(frozen=True)
class Timed:
    """One answer. `ttft_s` from sending the request to its first token; gaps between tokens."""

    text: str
    ttft_s: float
    gaps_s: tuple[float, ...]
    num_tokens: int
    trace_id: str


def chat_body(
    model: str, pictures: Sequence[bytes], question: str, *, preface: str = "", **options: Any
) -> dict[str, Any]:
    """An OpenAI chat request: the pictures in order between the preface, if any, and the
    question."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": preface}] if preface else []
    parts += [
        {"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures
    ]
    parts.append({"type": "text", "text": question})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **options}


@cache
def forbid_end(model_dir: Path) -> dict[str, float]:
    """The logit bias under which no answer of this model ends by itself.

    With `ignore_eos` an answer goes on behind its end, but tokens there have no text to be seen by.
    """
    return {str(token): NEVER for token in ModelSpec.load(model_dir).eos_token_ids}


def digits_body(model: str, question: str, num_tokens: int) -> dict[str, Any]:
    """A request without pictures whose answer is digits, so that every token is seen as text."""
    digits = {"regex": f"[0-9]{{{num_tokens}}}"}
    return chat_body(
        model, [], question, temperature=0, max_tokens=num_tokens, structured_outputs=digits
    )


def data_url(picture: bytes, mime: str = "image/png") -> str:
    """Picture bytes as a `data:` URL."""
    return f"data:{mime};base64,{base64.b64encode(picture).decode()}"


def stream(client: httpx.Client, url: str, body: dict[str, Any]) -> Timed:
    """Send one streamed request and time what comes back. Raises on an error of any kind."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    text, arrivals_s, num_tokens = "", [], 0
    started_s = time.perf_counter()
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                delta = choice["delta"].get("content")
                if delta:
                    arrivals_s.append(time.perf_counter())
                    text += delta
        trace_id = response.headers.get("x-trace-id", "")
    gaps_s = tuple(b - a for a, b in pairwise(arrivals_s))
    ttft_s = (arrivals_s[0] if arrivals_s else time.perf_counter()) - started_s
    return Timed(text, ttft_s, gaps_s, num_tokens, trace_id)
