"""The answers of the OpenAI API: whole, in chunks, and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.messages.events import FinishReason

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; a stop token is not counted. The prompt counts once, however many
    answers it gets; `cached_tokens` of it were not computed anew."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def body(self) -> Json:
        body: Json = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens:
            body["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return body


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete answer. `logprobs` and `token_ids` where the client asked for them."""

    text: str
    reason: FinishReason
    logprobs: Sequence[Json] | None = None
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every chunk of one answer repeats."""

    request_id: str
    model: str
    created_unix_s: int
    with_usage: bool = False

    def completion(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """All answers at once."""
        bodies = [_choice(index, choice) for index, choice in enumerate(choices)]
        return self._body("chat.completion", bodies) | {"usage": usage.body}

    def first_chunk(self, index: int = 0) -> Json:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def text_chunk(self, text: str, index: int = 0, logprobs: Sequence[Json] | None = None) -> Json:
        return self._chunk(index, {"content": text}, logprobs=logprobs)

    def last_chunk(self, reason: FinishReason, index: int = 0) -> Json:
        return self._chunk(index, {}, reason)

    def usage_chunk(self, usage: Usage) -> Json:
        """Follows the last chunk where the client asked for it."""
        return self._body("chat.completion.chunk", []) | {"usage": usage.body}

    def _chunk(
        self,
        index: int,
        delta: Json,
        reason: FinishReason | None = None,
        logprobs: Sequence[Json] | None = None,
    ) -> Json:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs),
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


def _choice(index: int, choice: Choice) -> Json:
    body: Json = {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": choice.reason.value,
    }
    return body if choice.token_ids is None else body | {"token_ids": list(choice.token_ids)}


def _logprobs(entries: Sequence[Json] | None) -> Json | None:
    return None if entries is None else {"content": list(entries), "refusal": None}


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
