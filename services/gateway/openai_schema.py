"""The chat completion request of the OpenAI API, as far as this system honours it.

In: JSON. Out: a frozen `ChatRequest`, or a `Refused` that names the field. Types are strict. A
parameter that would change the answer and is not implemented is accepted only with the value that
changes nothing; parameters that cannot change an answer are accepted and ignored; any other name is
refused, so a misspelt parameter is noticed.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from services.gateway.openai_base import Schema as _Schema
from services.gateway.openai_format import Formats
from services.gateway.openai_parts import Message
from services.gateway.problems import Refused, refuse
from shared.messages.descriptor import MAX_LOGIT_BIASES, MAX_LOGPROBS

M = TypeVar("M", bound=BaseModel)

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16

MAX_SHOWN_CHARS = 60


class StreamOptions(_Schema):
    include_usage: bool = False
    include_obfuscation: bool | None = None


LogitBias = dict[
    Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]
]
"""Token ids, as JSON's names are strings, to what is added to their logits."""

# Would change the answer, not implemented: only these values are taken.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


class ChatRequest(Formats):
    """`POST /v1/chat/completions`."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[LogitBias, Field(max_length=MAX_LOGIT_BIASES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Lower is served earlier (not part of OpenAI's API)."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[
            Annotated[str, Tag("<string>")] | Annotated[tuple[str, ...], Tag("<list>")],
            Discriminator(lambda stop: "<list>" if isinstance(stop, list | tuple) else "<string>"),
        ]
        | None
    ) = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    """Adds `token_ids` to each choice of a whole answer (not part of OpenAI's API)."""

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator(*_NEUTRAL, mode="after")
    @classmethod
    def _only_neutral(cls, value: Any, info: Any) -> Any:
        taken = _NEUTRAL[info.field_name]
        # True == 1 and False == 0 in Python, but not in JSON.
        if value is None or any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in taken
        ):
            return value
        allowed = f"only {taken[0]!r}" if taken else "nothing"
        raise ValueError(f"not supported here: {allowed} may be given")

    @field_validator("stop", mode="after")
    @classmethod
    def _usable_stops(cls, value: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        stops = (value,) if isinstance(value, str) else value or ()
        if len(stops) > MAX_STOPS:
            raise ValueError(f"{len(stops)} stop strings were given, the limit is {MAX_STOPS}")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"a stop string must have 1 to {MAX_STOP_CHARS} characters")
        return stops

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("logprobs must be true where top_logprobs is given")
        return value

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell, None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def stops(self) -> tuple[str, ...]:
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def token_limit(self) -> int | None:
        """The newer name wins where both are given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_request(body: bytes) -> ChatRequest:
    """Raises `Refused` (400) that names the first field that is wrong."""
    return parse_body(ChatRequest, body)


def parse_body(kind: type[M], body: bytes) -> M:
    """A body as this model. Raises `Refused` (400) that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return refuse(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    field = _field(first["loc"])
    reason = first["msg"].removeprefix("Value error, ").replace("Tuple", "List")
    reason = reason.removesuffix(" after validation, not 0") + _shown(first["input"])
    if first["type"] == "extra_forbidden":
        return refuse(f"{field}: unknown parameter", param=field, code="unknown_parameter")
    return refuse(f"{field or 'body'}: {reason}", param=field or None, code="invalid_value")


def _shown(value: object) -> str:
    """The refused value, if it is short enough to help."""
    if not isinstance(value, str | int | float | bool):
        return ""
    text = json.dumps(value)
    return f", not {text}" if len(text) <= MAX_SHOWN_CHARS else ""


# What pydantic writes into a path besides the names that the client wrote.
_TAGS = ("<", "tuple[", "constrained-", "[key]", "dict[str,")


def _field(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url.url`, without the tags of unions."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith(_TAGS) and step not in ("str", "bool"):
            path += f".{step}" if path else step
    return path
