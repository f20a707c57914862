"""The answers of the OpenAI API: whole, in chunks, and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.messages.events import FinishReason

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; a stop token is not counted."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every chunk of one answer repeats."""

    request_id: str
    model: str
    created_unix_s: int
    with_usage: bool = False

    def completion(
        self,
        text: str,
        reason: FinishReason,
        usage: Usage,
        token_ids: Sequence[int] | None = None,
    ) -> Json:
        """The whole answer at once; with its token ids where the client asked for them."""
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason.value,
        }
        if token_ids is not None:
            choice["token_ids"] = list(token_ids)
        return self._body("chat.completion", [choice]) | {"usage": usage.body}

    def first_chunk(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""})

    def text_chunk(self, text: str) -> Json:
        return self._chunk({"content": text})

    def last_chunk(self, reason: FinishReason) -> Json:
        return self._chunk({}, reason)

    def usage_chunk(self, usage: Usage) -> Json:
        """Follows the last chunk where the client asked for it."""
        return self._body("chat.completion.chunk", []) | {"usage": usage.body}

    def _chunk(self, delta: Json, reason: FinishReason | None = None) -> Json:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": reason.value if reason else None,
        }
        body = self._body("chat.completion.chunk", [choice])
        return body | {"usage": None} if self.with_usage else body

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": kind,
            "created": self.created_unix_s,
            "model": self.model,
            "choices": choices,
        }


def model_list(model: str, created_unix_s: int, max_context_tokens: int) -> Json:
    """`GET /v1/models`. `max_model_len` is an addition that several clients read."""
    entry = {
        "id": model,
        "object": "model",
        "created": created_unix_s,
        "owned_by": "triptych",
        "max_model_len": max_context_tokens,
    }
    return {"object": "list", "data": [entry]}
