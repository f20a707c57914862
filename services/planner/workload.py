"""Requests to simulate: read from a trace, or drawn at random.

A trace is JSONL: `arrival_s`, `num_prompt_tokens` (pictures' tokens among them),
`num_output_tokens`, and optionally `patches` (one count per picture) and `class`. Pure but for the
one function that reads a file.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import SettingsError

MAX_REQUESTS = 1_000_000
Patches = tuple[int, ...]


class Arrival(BaseModel):
    """One request: when it comes and what it costs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arrival_s: float = Field(ge=0)
    num_prompt_tokens: int = Field(ge=1, le=10_000_000)
    num_output_tokens: int = Field(ge=1, le=10_000_000)
    patches: Patches = Field((), max_length=10_000)
    kind: str = Field("all", alias="class", min_length=1)


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of request for `poisson`; `weight` is its share beside the other kinds."""

    kind: str
    num_prompt_tokens: int
    num_output_tokens: int
    patches: Patches = ()
    weight: float = 1.0


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """The requests of a file, in order of arrival. Raises `SettingsError`."""
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the trace {path} cannot be read: {error}") from None


def parse_trace(lines: Iterable[str], source: str) -> tuple[Arrival, ...]:
    """The requests of JSON lines. Raises `SettingsError` that names line and field."""
    arrivals: list[Arrival] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(arrivals) == MAX_REQUESTS:
            raise SettingsError(f"{source}: more than {MAX_REQUESTS} requests")
        try:
            arrivals.append(Arrival.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "line"
            raise SettingsError(f"{source}:{number}: {field}: {first['msg']}") from None
    if not arrivals:
        raise SettingsError(f"{source}: the trace holds no request")
    return tuple(sorted(arrivals, key=lambda each: each.arrival_s))


def poisson(
    shapes: Sequence[Shape], *, rate_per_s: float, num_requests: int, seed: int
) -> tuple[Arrival, ...]:
    """Independent arrivals at a mean rate."""
    draw = random.Random(seed)
    now_s = 0.0
    arrivals = []
    for shape in draw.choices(shapes, [each.weight for each in shapes], k=num_requests):
        now_s += draw.expovariate(rate_per_s)
        arrivals.append(
            Arrival.model_validate(
                {
                    "arrival_s": now_s,
                    "num_prompt_tokens": shape.num_prompt_tokens,
                    "num_output_tokens": shape.num_output_tokens,
                    "patches": shape.patches,
                    "class": shape.kind,
                }
            )
        )
    return tuple(arrivals)
