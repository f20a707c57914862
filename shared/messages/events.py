"""What the gateway hears back of its requests: tokens, then exactly one end."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from shared.errors import FailureKind
from shared.messages.base import Message
from shared.messages.descriptor import TokenId, WorkerRef


class FinishReason(StrEnum):
    """Why an answer is complete (OpenAI's words)."""

    STOP = "stop"
    LENGTH = "length"


class TokenLogprobs(Message):
    """Natural logarithms of probabilities at one position: of the chosen token, and `top`, the
    likeliest tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()


class TokenEvent(Message):
    """Token `index` of an answer. Events may repeat or be lost; the index tells.

    `num_cached_tokens` comes with the first token of an attempt: how many tokens of its prompt were
    not computed because their keys and values were cached.
    """

    type: Literal["token"] = "token"
    request_id: str
    attempt: int
    index: Annotated[int, Field(ge=0)]
    token_id: TokenId
    num_cached_tokens: Annotated[int, Field(ge=0)] = 0
    logprobs: TokenLogprobs | None = None


class FinishedEvent(Message):
    """The answer is complete and has `num_tokens` tokens (a stop token is not counted)."""

    type: Literal["finished"] = "finished"
    request_id: str
    attempt: int
    num_tokens: Annotated[int, Field(ge=0)]
    reason: FinishReason


class FailedEvent(Message):
    """The attempt ended without an answer; `retryable` invites the gateway to resubmit."""

    type: Literal["failed"] = "failed"
    request_id: str
    attempt: int
    kind: FailureKind
    message: str
    retryable: bool


Event = Annotated[TokenEvent | FinishedEvent | FailedEvent, Field(discriminator="type")]


class EventBatch(Message):
    """All events of one worker step for one gateway, in order per request."""

    worker: WorkerRef
    events: tuple[Event, ...]
